"""A deterministic simulation of the scheduler among faults, and the invariants that must hold after every event.

    python -m memcube.testing.simulation --seeds 0:300 --ops 200

The real planner, policies, refusals, enactor, control and comparison run, under two schedulers that contend
for the lease with clocks that differ; the catalog is a double under the real one's contract. Messages are
late, lost, doubled and overtake each other; nodes crash and are lost, payloads are damaged and evicted;
schedulers crash before any step, or pause and wake up with all that came meanwhile. A seed gives the same run each time.

After every event, of each cube that it touched: a cube whose index is up to date has a copy that is
listed, published, whole and of its version, unless a fault took the last one (``sim_drops`` tells what a drop may
do about that); no KV of another version is listed; at each epoch of a cube one action took effect at most. Each read is of the right tenant, cube and version, and none of what was
deleted before. Once the faults end, all is in order within minutes: nothing open, held, reserved or left over.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from memcube.catalog.action_rows import ActionRecord
from memcube.cube import Sensitivity
from memcube.errors import MemCubeError
from memcube.ids import CubeId, TenantId
from memcube.scheduler.actions import Action, ActionKind, Medium, Place, Tier
from memcube.scheduler.enact import Enactor
from memcube.scheduler.planner import Planner
from memcube.scheduler.settings import MoveLimits, Profile, Profiles
from memcube.scheduler.world import Capacity
from memcube.testing.sim_actors import Client, Cluster, Leader, Violation, asked_copy
from memcube.testing.sim_catalog import About, SimCatalog, activation, plaintext
from memcube.testing.sim_drops import DropWatch
from memcube.testing.sim_kernel import Process
from memcube.testing.sim_nodes import Read, SimNode, Slot

TENANTS = (TenantId("a"), TenantId("b"), TenantId("c"))
NUM_OPS = 200
OP_EVERY_S = 0.4
SETTLE_S = 900.0
TOO_LATE, TOO_LATE_S = 0.4, 0.15
"""How often what a drop goes by is lost after one of its steps, and within what time."""
_NODE_BYTES = 400_000
Key = tuple[TenantId, CubeId]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a seed came to. ``error`` is the first invariant that broke, None if none did."""

    seed: int
    error: str | None
    at_s: float
    num_events: int
    counts: Counter[str]


class Simulation:
    """One seed."""

    def __init__(
        self,
        seed: int,
        *,
        num_ops: int = NUM_OPS,
        enactor_class: type[Enactor] = Enactor,
        make_catalog: Callable[..., SimCatalog] = SimCatalog,
    ) -> None:
        self.seed = seed
        self.cluster = Cluster(seed, make_catalog)
        self.kernel = self.cluster.kernel
        self.rng = self.kernel.rng
        self.counts: Counter[str] = Counter()
        self._num_ops = num_ops
        self._enactor_class = enactor_class
        self._client = Client(self.cluster)
        self._processes: list[Process] = []
        self._leaders: dict[str, Leader] = {}
        self._good: dict[Key, int] = {}
        """The version at which a cube was last seen with a good copy, unless a fault took the last one."""
        self._committed: dict[tuple[Key, int], str] = {}
        self._profile = self._make_profile()
        for number in range(self.rng.choice((2, 3, 3, 4))):
            self._add_node(f"n{number}")
        self._drops = DropWatch(self.cluster, self.counts)
        self._watch_journal()
        self.cluster.heard = self._heard

    def run(self) -> Outcome:
        """From the beginning to the end, or to the first invariant that breaks."""
        error = None
        try:
            self.begin()
            for _ in range(self._num_ops):
                self.advance(self.rng.expovariate(1 / OP_EVERY_S))
                self.do(self.rng.choices(_NAMES, _SHARES)[0])
            self.finish()
        except Violation as broken:
            error = str(broken)
        finally:
            self.abandon()
        self.counts["reads"] = self._client.num_reads
        self.counts["reads answered"] = self._client.num_found
        for row in self.cluster.catalog.store.actions.values():
            self.counts[f"{row['action']} {row['state']}"] += 1
        return Outcome(
            seed=self.seed,
            error=error,
            at_s=self.kernel.now_s,
            num_events=self.kernel.num_events,
            counts=self.counts,
        )

    def abandon(self) -> None:
        """Close what still runs; some of it never began, which Python would warn of."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for process in self._processes:
                process.is_dead = True
                for task in process.tasks:
                    task.abandon()
                process.tasks.clear()

    def begin(self) -> None:
        """Start both schedulers."""
        self.kernel.after_event = self._check_touched
        for name, skew_s in (("x", 0.0), ("y", self.rng.uniform(-1.5, 1.5))):
            self._start_leader(name, skew_s)

    def advance(self, seconds: float) -> None:
        """Let time pass.

        Raises:
            Violation: an invariant broke.
        """
        self.kernel.run(self.kernel.now_s + seconds)

    def do(self, operation: str) -> None:
        """One operation of a client, an operator or a fault, by its name in ``OPERATIONS``."""
        OPERATIONS[operation][1](self)

    def finish(self) -> None:
        """End the faults, and see that all comes in order.

        Raises:
            Violation: it doesn't.
        """
        self._end_faults()
        self._wait_for_order()

    # -- what is there -------------------------------------------------------------------------

    def _make_profile(self) -> Profile:
        rng = self.rng
        return Profile(
            strategies=rng.choice(({"frequency": 1.0}, {"lru": 1.0}, {"cost": 1.0, "lru": 1.0})),
            rate=rng.choice((0.5, 2.0)),
            recency_s=30.0,
            stable_s=5.0,
            settle_s=8.0,
            lasting_s=40.0,
            lasting_rate=0.1,
            min_cubes=2,
            propose_every_s=60.0,
            archive_after_s=rng.choice((None, 120.0)),
            replicas=rng.choice((1, 1, 2)),
            heal_after_s=10.0,
            reindex_after_s=4.0,
        )

    def _make_planner(self) -> Planner:
        return Planner(Profiles(default=self._profile), MoveLimits(max_actions=40))

    def _add_node(self, name: str) -> None:
        self.cluster.nodes[name] = SimNode(name=name, capacity_bytes=4 * _NODE_BYTES)
        self.cluster.capacities[plaintext(name)] = Capacity(num_bytes=_NODE_BYTES)
        for medium, size in ((Medium.DEVICE, 20_000), (Medium.DISK, 60_000)):
            self.cluster.capacities[activation(name, medium)] = Capacity(num_bytes=size)

    def _start_leader(self, name: str, skew_s: float) -> None:
        process = Process(name, skew_s=skew_s)
        process.may_crash = lambda: self._may_crash(process)
        self._processes.append(process)
        leader = Leader(self.cluster, process, self._make_planner, self._enactor_class)
        self._leaders[name] = leader
        process.start(leader.run())

    def _may_crash(self, process: Process) -> bool:
        """Now and then a scheduler ends before a step, and another one with its name starts."""
        if not self.kernel.is_faulty or self.rng.random() > 0.004:
            return False
        self.counts["scheduler crashes"] += 1
        process.is_dead = True
        self._leaders[process.name]._end()
        back_s = self.rng.choice((0.5, 3.0, 12.0))
        self.kernel.at(back_s, lambda: self._start_leader(process.name, process.skew_s))
        return True

    # -- what happens --------------------------------------------------------------------------

    def _start(self, name: str, request: Coroutine[Any, Any, Any]) -> None:
        self.counts[name] += 1
        process = Process("client")
        if self.rng.random() < 0.1:
            left = self.rng.randrange(1, 8)

            def may_crash() -> bool:
                nonlocal left
                left -= 1
                process.is_dead = left <= 0
                return process.is_dead

            process.may_crash = may_crash
        self._processes.append(process)
        process.start(_patient(request))

    def _pick(self) -> Key | None:
        cubes = self.cluster.catalog.store.cubes
        if not cubes:
            return None
        is_live = self.cluster.catalog.is_live
        keys = [key for key in cubes if is_live(*key)] if self.rng.random() < 0.9 else list(cubes)
        if not keys:
            return None
        # Some are far more popular than others.
        return keys[min(int(self.rng.expovariate(6 / len(keys))), len(keys) - 1)]

    def _add(self) -> None:
        rng, now = self.rng, self.kernel.time().timestamp()
        about = About(
            tokens=rng.randrange(50, 800),
            num_bytes=rng.randrange(500, 9_000),
            created_at=now,
            changed_at=now,
            sensitivity=rng.choice(list(Sensitivity)),
            frozen=rng.random() < 0.05,
            consents=rng.random() < 0.5,
            session_bound=rng.random() < 0.1,
        )
        if rng.random() < 0.1:
            about.expires_at = now + rng.expovariate(1 / 40)
        self._start("adds", self._client.add(rng.choice(TENANTS), about))

    def _change(self) -> None:
        if (key := self._pick()) is not None:
            self._start("changes", self._client.change(*key))

    def _delete(self) -> None:
        if (key := self._pick()) is not None:
            self._start("deletes", self._client.delete(*key))

    def _use(self) -> None:
        if (key := self._pick()) is not None:
            self._start("uses", self._client.use(*key))

    def _read(self) -> None:
        if (key := self._pick()) is not None:
            tier = self.rng.choice((Tier.PLAINTEXT, Tier.ACTIVATION))
            self._start("reads", self._client.read(*key, tier))

    def _migrate(self) -> None:
        """An operator wants a cube somewhere."""
        controls = [one.control for one in self._leaders.values() if one.control is not None]
        key = self._pick()
        if not controls or key is None:
            return
        catalog = self.cluster.catalog
        target = self.rng.choice(sorted(self.cluster.capacities))
        listed = [place for place, _ in catalog.listed(*key, target.tier) if place != target]
        self.counts["migrations"] += 1
        self.rng.choice(controls).ask([asked_copy(catalog, *key, target, listed)])

    def _drain(self) -> None:
        draining, nodes = self.cluster.draining, self._present()
        if draining:
            draining.clear()
        elif len(nodes) > 2:
            self.counts["drains"] += 1
            draining.add(self.rng.choice(nodes).name)

    def _pause(self) -> None:
        """A scheduler freezes, and wakes up when another may lead."""
        process = next(p for p in reversed(self._processes) if p.name in self._leaders)
        if not process.is_paused and not process.is_dead:
            self.counts["pauses"] += 1
            process.is_paused = True
            self.kernel.at(self.rng.uniform(2, 30), process.wake)

    def _crash_node(self) -> None:
        node = self.rng.choice(self._present())
        if node.is_up:
            self.counts["node crashes"] += 1
            self._fault(node, node.crash)
            self.cluster.since[node.name] = self.kernel.time().timestamp()
            self.kernel.at(self.rng.choice((1.0, 8.0, 30.0)), lambda: self._restart(node))

    def _restart(self, node: SimNode) -> None:
        """A node comes back, and hears from the catalog who leads before it serves."""
        if not node.is_lost:
            node.is_up = True
            lease = self.cluster.catalog.store.leases.get("scheduler")
            node.leader = max(node.leader, lease.epoch if lease else 0)
            self.cluster.since[node.name] = self.kernel.time().timestamp()

    def _lose_node(self) -> None:
        """A node goes for good, and an empty one comes in its place."""
        self._lose(self.rng.choice(self._present()))

    def _lose(self, node: SimNode) -> None:
        if len(self._present()) > 1:
            self.counts["nodes lost"] += 1
            self._fault(node, node.lose)
            self.cluster.draining.discard(node.name)
            for place in [p for p in self.cluster.capacities if p.node == node.name]:
                del self.cluster.capacities[place]
            self._add_node(f"n{len(self.cluster.nodes)}")

    def _damage(self) -> None:
        """Bits flip in a payload."""
        node = self.rng.choice(self._present())
        if node.published:
            self._flip(node, self.rng.choice(list(node.published)))

    def _flip(self, node: SimNode, slot: Slot) -> None:
        def flip() -> None:
            node.published[slot].content = None

        self.counts["damages"] += 1
        self._fault(node, flip)

    def _heard(self, read: Read) -> None:
        self._drops.heard(read)
        self._threaten(read.slot)

    def _threaten_others(self, drop: ActionRecord) -> None:
        """A drop goes by its cube's other copies: one of them may be lost before it is read."""
        if drop.cube is None or drop.source is None or drop.source.tier is not Tier.PLAINTEXT:
            return
        listed = self.cluster.catalog.listed(drop.tenant, drop.cube, Tier.PLAINTEXT)
        others = [place for place, _ in listed if place != drop.source]
        if others:
            self._threaten((self.rng.choice(others), drop.tenant, drop.cube))

    def _threaten(self, slot: Slot) -> None:
        """Now and then a leader's next step comes too late: what it goes by is damaged, or its node lost."""
        if self.kernel.is_faulty and self.rng.random() < TOO_LATE:
            is_lost = self.rng.random() < 0.2
            self.kernel.at(self.rng.random() ** 2 * TOO_LATE_S, lambda: self._take(slot, is_lost))

    def _take(self, slot: Slot, is_lost: bool) -> None:
        node = self.cluster.nodes[slot[0].node]
        if not self.kernel.is_faulty or slot not in node.published:
            return
        self.counts["faults between a drop's steps"] += 1
        if is_lost:
            self._lose(node)
        else:
            self._flip(node, slot)

    def _evict(self) -> None:
        """A cache lets KV go by itself, if nobody holds it."""
        node = self.rng.choice(self._present())
        slots = [s for s in node.published if s[0].tier is Tier.ACTIVATION and s not in node.holds]
        if slots:
            self.counts["evictions"] += 1
            del node.published[self.rng.choice(slots)]

    def _fault(self, node: SimNode, do: Callable[[], None]) -> None:
        """Let a fault happen, and note which cubes it left without a copy."""
        slots = [slot for slot in node.published if slot[0].tier is Tier.PLAINTEXT]
        good = [slot for slot in slots if node.has(slot, self._version(slot[1:]))]
        had = [key for key in (slot[1:] for slot in slots) if self._is_safe(key)]
        do()
        for slot in good:
            if not node.has(slot, self._version(slot[1:])):
                self._drops.took(slot)
        for key in had:
            if not self._is_safe(key):
                self._good.pop(key, None)
                self._drops.forget(key)

    def _version(self, key: Key) -> int:
        return self.cluster.catalog.store.cubes[key].version

    def _is_safe(self, key: Key) -> bool:
        """Whether a cube has a copy that is listed, or can be listed again."""
        return self._has_copy(key) or self._drops.holds(key)

    def _present(self) -> list[SimNode]:
        return [node for node in self.cluster.nodes.values() if not node.is_lost]

    # -- what must hold ------------------------------------------------------------------------

    def _check_touched(self) -> None:
        cluster = self.cluster
        changed = cluster.catalog.store.changed
        if not changed and not cluster.touched:
            return
        for key in changed:
            for feed in cluster.feeds:
                feed.fresh[key] = None
        keys = changed | cluster.touched
        changed.clear()
        cluster.touched.clear()
        for key in keys:
            if key in cluster.catalog.store.cubes:
                self._check(key)

    def _check(self, key: Key) -> None:
        catalog = self.cluster.catalog
        cube = catalog.store.cubes[key]
        for place, (version, _) in cube.listed.items():
            if place.tier is Tier.ACTIVATION and (
                version != cube.version or not catalog.is_live(*key)
            ):
                raise Violation(
                    f"KV of {key} v{version} is listed at {place}; it is v{cube.version}"
                )
        if not catalog.is_live(*key) or catalog.about[key].indexed_version != cube.version:
            self._good.pop(key, None)
            self._drops.forget(key)
        elif self._has_copy(key):
            self._good[key] = cube.version
            self._drops.forget(key)
        elif self._good.get(key) == cube.version and not self._drops.excuses(key):
            raise Violation(f"{key} v{cube.version} has no copy: listed {list(cube.listed)}")

    def _has_copy(self, key: Key) -> bool:
        """Whether a listed place has the present version whole; a node that is down has it on its disk."""
        cube = self.cluster.catalog.store.cubes.get(key)
        if cube is None:
            return False
        content = (*key, cube.version)
        for place, (version, _) in cube.listed.items():
            if place.tier is Tier.PLAINTEXT and version == cube.version:
                found = self.cluster.nodes[place.node].published.get((place, *key))
                if found is not None and found.content == content:
                    return True
        return False

    def _watch_journal(self) -> None:
        """Of all actions on a cube at one epoch at most one may take effect. Drops are watched, and others'
        copies of what they drop."""
        book = self.cluster.catalog.actions
        plan, commit = book.plan, book.commit

        def watched_plan(actions: Sequence[Action], **more: Any):
            found = plan(actions, **more)
            for record in found:
                if isinstance(record, ActionRecord) and record.action is ActionKind.DROP:
                    self._drops.journaled(record)
                    self._threaten_others(record)
            return found

        def watched_commit(id: str, *, leader: int, now: datetime):
            before = book.get(id)
            record = commit(id, leader=leader, now=now)
            if before.state != record.state:
                at = ((record.tenant, record.cube or CubeId("")), record.epoch)
                if self._committed.setdefault(at, id) != id:
                    raise Violation(f"two actions committed at {at}")
                if record.action is ActionKind.DROP:
                    self._drops.committed(record, leader)
            return record

        book.plan = watched_plan  # type: ignore[method-assign]
        book.commit = watched_commit  # type: ignore[method-assign]

    def _end_faults(self) -> None:
        self.kernel.is_faulty = False
        self.cluster.draining.clear()
        for node in self._present():
            self._restart(node)
        for process in self._processes:
            if process.is_paused:
                process.wake()

    def _wait_for_order(self) -> None:
        """All is in order within some minutes without faults."""
        until_s = self.kernel.now_s + SETTLE_S
        disorder = ""
        while self.kernel.now_s < until_s:
            self.kernel.run(self.kernel.now_s + 30.0)
            disorder = self._disorder()
            if not disorder:
                return
        raise Violation(f"not in order {SETTLE_S:.0f} s after the faults: {disorder}")

    def _disorder(self) -> str:
        catalog, store = self.cluster.catalog, self.cluster.catalog.store
        if store.open:
            return f"open actions: {[(r['action'], r['outcome']) for r in store.open.values()]}"
        if waiting := [t for t in catalog.tasks.page(limit=999) if t.state not in ("done", "dead")]:
            return f"tasks wait: {waiting[0].kind} {waiting[0].error}"
        if self._drops.at_risk:
            return f"struck and not listed again: {self._drops.at_risk}"
        for node in self._present():
            if node.reserved or node.holds:
                return f"{node.name} has reservations {node.reserved} or holds {node.holds}"
            for (place, tenant, id), payload in node.published.items():
                if place not in store.cubes[tenant, id].listed:
                    return f"{id} v{payload.version} lies at {place} and isn't listed"
        for key, cube in store.cubes.items():
            if not catalog.is_live(*key):
                if cube.listed:
                    return f"{key} is {cube.state} and listed at {list(cube.listed)}"
                continue
            if catalog.about[key].indexed_version != cube.version:
                return f"{key} v{cube.version} is not indexed"
            good = [p for p, _ in cube.listed.items() if p.tier is Tier.PLAINTEXT]
            if len(good) != min(self._profile.replicas, len(self._present())):
                return f"{key} has {len(good)} copies: {good}"
            for place in cube.listed:
                if not self._is_whole(place, key, cube.version):
                    return f"{key} is listed at {place} and not there"
        return ""

    def _is_whole(self, place: Place, key: Key, version: int) -> bool:
        node = self.cluster.nodes[place.node]
        return node.has((place, *key), version)


async def _patient(request: Coroutine[Any, Any, Any]) -> None:
    """A request whose failure is the caller's to see."""
    try:
        await request
    except MemCubeError:
        return


OPERATIONS: dict[str, tuple[float, Callable[[Simulation], None]]] = {
    "add": (0.20, Simulation._add),
    "change": (0.10, Simulation._change),
    "delete": (0.05, Simulation._delete),
    "use": (0.22, Simulation._use),
    "read": (0.22, Simulation._read),
    "migrate": (0.06, Simulation._migrate),
    "drain": (0.02, Simulation._drain),
    "pause a scheduler": (0.02, Simulation._pause),
    "crash a node": (0.03, Simulation._crash_node),
    "lose a node": (0.01, Simulation._lose_node),
    "damage": (0.03, Simulation._damage),
    "evict": (0.04, Simulation._evict),
}
"""With their shares."""
_NAMES = tuple(OPERATIONS)
_SHARES = tuple(share for share, _ in OPERATIONS.values())


def simulate(seed: int, **more: Any) -> Outcome:
    """Run a seed."""
    return Simulation(seed, **more).run()


if __name__ == "__main__":
    from memcube.testing.sim_runs import main

    main()
