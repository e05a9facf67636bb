"""A scheduler that runs: the parts of its work beside each other, each under the lease.

Parts (the reconcile loop, the lifecycle's sweep, the queue, the moves of ``Control``) share the lease and
nothing else. One that fails, or waits for what doesn't answer, is noted and tried again, and holds none of
the others up.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol

from memcube.catalog import Catalog
from memcube.errors import MemCubeError, StaleEpoch, Unavailable
from memcube.ids import CubeId, TenantId
from memcube.indexing import Clock
from memcube.scheduler.actions import Action, Place, Tier, kind_of
from memcube.scheduler.columns import NONE
from memcube.scheduler.control import Control, Report
from memcube.scheduler.enact import Call, Enactor
from memcube.scheduler.lease import LeaseKeeper
from memcube.scheduler.planner import Plan, Planner
from memcube.scheduler.policies import Policy
from memcube.scheduler.policies.balance import Balance
from memcube.scheduler.policies.consolidation import Consolidation
from memcube.scheduler.policies.eviction import Eviction
from memcube.scheduler.policies.promotion import Promotion
from memcube.scheduler.policies.spread import Spread
from memcube.scheduler.port import TierPort
from memcube.scheduler.settings import MoveLimits, Profiles
from memcube.scheduler.world import World

MOVES, QUEUE = "moves", "queue"
FENCED = frozenset({MOVES, QUEUE})
"""The parts that act under the leader's epoch."""
PRUNE_EVERY = timedelta(hours=1)
MAX_BATCHES = 1_000
OBJECTS = "objects"
"""Where adapters are listed, and KV in the object store: no node's."""
log = logging.getLogger(__name__)

Work = Callable[[int, datetime], Awaitable[Mapping[str, Any] | None]]
"""One part's round under an epoch, at a time; what it is to tell of it."""


class Topology(Protocol):
    """Who knows the nodes and places of a tier."""

    async def update(self, world: World, *, leader: int, now: datetime) -> Sequence[Action]:
        """Tell a world of nodes and places as they are now; what is to be done about them."""
        ...


def running_policies(*, consolidates: bool) -> list[Policy]:
    """The policies of the running system. What expires, and what the index lacks, the reconcile loop sees to
    in bulk."""
    found: list[Policy] = [
        Spread(by_tenant=True),
        Eviction(),
        Promotion(),
        Balance(by_tenant=True),
    ]
    return [*found, Consolidation()] if consolidates else found


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveSettings:
    """How moves are planned and carried out."""

    profiles: Profiles
    limits: MoveLimits
    consents: Callable[[TenantId], bool]
    consolidates: bool
    compare_every_s: float
    kept: timedelta


@dataclass(slots=True)
class Totals:
    """What the moves came to since the process began; of all epochs."""

    decisions: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By policy, and ``planned``, ``passed`` or why it was refused."""
    moves: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """By tier, kind and the state that they ended in."""
    moved_bytes: Counter[str] = field(default_factory=Counter)
    """By tier."""
    rounds: int = 0

    def count(self, report: Report) -> None:
        self.rounds += 1
        self.decisions.update({(policy, "planned"): n for policy, n in report.planned.items()})
        self.decisions.update({(policy, "passed"): n for policy, n in report.passed.items()})
        self.decisions.update(report.refused)
        self.moves.update(report.closed)
        self.moved_bytes.update(report.moved_bytes)


class Moves:
    """The part that plans and moves: a ``Control`` for each epoch, thrown away when another leads."""

    def __init__(
        self,
        catalog: Catalog,
        port: TierPort,
        topologies: Mapping[Tier, Topology],
        settings: MoveSettings,
        *,
        clock: Clock,
        is_gone: Callable[[Place], bool] = lambda place: False,
        call: Call = asyncio.to_thread,
    ) -> None:
        """``topologies`` are asked in their order; what lies on nodes that none of them knows is forgotten, of
        their tiers alone, and so is what ``is_gone`` says of places on nodes that there are."""
        self._catalog = catalog
        self._port = port
        self._topologies = topologies
        self._settings = settings
        self._clock = clock
        self._is_gone = is_gone
        self._call = call
        self._epoch = 0
        self._control: Control | None = None
        self._one_at_a_time = asyncio.Lock()
        self._running: set[asyncio.Task[None]] = set()
        self._forgotten: set[str] = set()
        """Locations that were forgotten under this epoch: their cubes are read again as they change."""
        self._pruned_at: datetime | None = None
        self.totals = Totals()
        self.last: Report | None = None
        self.last_at: datetime | None = None
        self.failing: dict[str, str] = {}
        """Topologies that could not be asked in the last round, and why."""

    @property
    def control(self) -> Control | None:
        """Of the present epoch, once it has begun."""
        return self._control

    def used(self, tenant: TenantId, cubes: Iterable[CubeId]) -> None:
        """Cubes whose uses were counted in the catalog."""
        if self._control is not None:
            self._control.used(tenant, cubes)

    def near(self, tenant: TenantId, scores: Mapping[CubeId, float], now: datetime) -> None:
        """How close cubes were to what a tenant asked, from 0 to 1."""
        if self._control is not None:
            world = self._control.world
            rows = {world.row(tenant, cube): score for cube, score in scores.items()}
            rows.pop(NONE, None)
            world.set_affinity(rows, now.timestamp())

    async def round(self, epoch: int, now: datetime) -> Report:
        """One round of this epoch.

        Raises:
            StaleEpoch: another leads. Unavailable: the catalog does not answer.
        """
        async with self._one_at_a_time:
            control = self._led(epoch)
            await self._look_around(control, epoch, now)
            try:
                await self._forget_gone(control)
                report = await control.round()
            except StaleEpoch:
                self._control = None
                raise
            if control.is_deposed:
                self._control = None
                raise StaleEpoch(epoch, epoch + 1)
            self.totals.count(report)
            self.last, self.last_at = report, now
            await self._prune(now)
            return report

    def ask(self, actions: Iterable[Action]) -> None:
        """Put actions into the next plan, before all others.

        Raises:
            Unavailable: this process does not lead.
        """
        self._leading().ask(actions)

    @property
    def world(self) -> World:
        """
        Raises:
            Unavailable: this process does not lead.
        """
        return self._leading().world

    def _leading(self) -> Control:
        if self._control is None or self.last is None:
            raise Unavailable("the scheduler has not begun to lead here", 2.0)
        return self._control

    def dry_run(self) -> Plan:
        """What would be planned now.

        Raises:
            Unavailable: this process does not lead, or has not had its first round.
        """
        return self._leading().dry_run()

    def _led(self, epoch: int) -> Control:
        if self._control is None or self._epoch != epoch:
            settings, clock = self._settings, self._clock
            self.last = self.last_at = None
            planner = Planner(
                settings.profiles,
                settings.limits,
                policies=running_policies(consolidates=settings.consolidates),
            )
            self._control = Control(
                World(),
                planner,
                Enactor(
                    self._port,
                    self._catalog.actions,
                    leader=epoch,
                    clock=clock,
                    limits=settings.limits,
                    spawn=self._spawn,
                    call=self._call,
                ),
                self._port,
                self._catalog.actions,
                self._catalog.world_feed(clock=clock, consents=settings.consents),
                leader=epoch,
                clock=clock,
                call=self._call,
                compare_every_s=settings.compare_every_s,
                # The plaintext tier is compared by the reconcile loop, in bulk and with a book of its own.
                compares=frozenset({Tier.ACTIVATION}),
                caches=frozenset({Tier.ACTIVATION}),
            )
            self._epoch = epoch
            self._forgotten.clear()
        return self._control

    def _spawn(self, move: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(move)
        self._running.add(task)  # a loop holds its tasks by weak references alone
        task.add_done_callback(self._running.discard)

    async def settled(self) -> None:
        """Wait until what was started has ended, or was put off."""
        while self._running:
            await asyncio.wait(self._running)

    async def _look_around(self, control: Control, epoch: int, now: datetime) -> None:
        self.failing = {}
        for tier, topology in self._topologies.items():
            try:
                control.ask(await topology.update(control.world, leader=epoch, now=now))
            except StaleEpoch:
                raise
            except MemCubeError as failed:
                self.failing[tier] = str(failed)
            except Exception as failed:
                # What is known of the places of a tier grows old; the others' rounds go on.
                self.failing[tier] = type(failed).__name__
                log.exception("the places of the %s tier could not be looked at", tier)

    async def _forget_gone(self, control: Control) -> None:
        """Forget locations that are listed and that no node has any more."""
        world = control.world
        gone = {
            place.location: None
            for number, place in enumerate(world.places)
            if place.tier in self._topologies
            and place.tier not in self.failing
            and place.location != OBJECTS
            and (place.node not in world.nodes or self._is_gone(place))
            and (
                world.used_bytes[number]
                or (place.location not in self._forgotten and world.owns(number))
            )
        }
        for location in gone:
            num = await control.forget(location)
            self._forgotten.add(location)
            log.warning("forgot %d payloads that were listed at %s, which is gone", num, location)

    async def _prune(self, now: datetime) -> None:
        if self._pruned_at is None or now - self._pruned_at >= PRUNE_EVERY:
            before = now - self._settings.kept
            await self._call(self._catalog.actions.prune, before=before)
            await self._call(self._catalog.tasks.prune, before=before)
            await self._call(self._catalog.cluster_log.prune, before=before)
            self._pruned_at = now


Uses = Mapping[TenantId, Mapping[CubeId, int]]
Scores = Mapping[TenantId, Mapping[CubeId, float]]


class UsesInbox:
    """Uses of cubes as they come in, until they are counted. One loop; ``put`` from any thread.

    A crash loses those not yet counted; while nobody counts, the oldest go.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Uses, Scores]] = deque(maxlen=MAX_BATCHES)

    def put(self, uses: Uses, scores: Scores) -> None:
        self._waiting.append((uses, scores))

    def take(self) -> tuple[dict[TenantId, dict[CubeId, int]], dict[TenantId, dict[CubeId, float]]]:
        """All that waits: uses added up, and the latest scores."""
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        merged: dict[TenantId, dict[CubeId, int]] = {}
        latest: dict[TenantId, dict[CubeId, float]] = {}
        for uses, scores in waiting:
            for tenant, counts in uses.items():
                total = merged.setdefault(tenant, {})
                for id, count in counts.items():
                    total[id] = total.get(id, 0) + count
            for tenant, near in scores.items():
                latest.setdefault(tenant, {}).update(near)
        return merged, latest


@dataclass(slots=True)
class PartStatus:
    """How a part is doing. ``failures`` since the process began."""

    rounds: int = 0
    failures: int = 0
    took_s: float = 0.0
    ended_at: datetime | None = None
    error: str | None = None
    """Why its last round failed; None where it did not."""
    told: Mapping[str, Any] = field(default_factory=dict)


class SchedulerHost:
    """Runs the parts while the lease is held. All calls but ``used`` belong to one loop."""

    def __init__(
        self,
        keeper: LeaseKeeper,
        parts: Mapping[str, Work],
        moves: Moves,
        uses: UsesInbox,
        *,
        clock: Clock,
        interval_s: float,
    ) -> None:
        self._keeper = keeper
        self._parts = {**parts, MOVES: self._move}
        self._moves = moves
        self._uses = uses
        self._clock = clock
        self._interval_s = interval_s
        self._status = {name: PartStatus() for name in self._parts}
        self._stopping = asyncio.Event()

    def used(
        self,
        uses: Mapping[TenantId, Mapping[CubeId, int]],
        scores: Mapping[TenantId, Mapping[CubeId, float]],
    ) -> None:
        """Take a batch of uses, to be counted in the next round, and how close cubes were to what was asked,
        from 0 to 1."""
        self._uses.put(uses, scores)

    async def run(self) -> None:
        """Run all parts until ``stop``; each has a loop of its own."""
        await asyncio.gather(*(self._run_part(name) for name in self._parts))

    def stop(self) -> None:
        """End after the rounds that are under way."""
        self._stopping.set()

    async def step(self) -> None:
        """One round of every part, beside each other; nothing without the lease."""
        await asyncio.gather(*(self._step_part(name) for name in self._parts))

    async def settled(self) -> None:
        """Wait until the moves that were started have ended, or were put off."""
        await self._moves.settled()

    async def round_now(self) -> dict[str, Any]:
        """Plan and move now; what the round did.

        Raises:
            Unavailable: another leads, or the catalog does not answer.
        """
        epoch = self._keeper.epoch
        if epoch is None:
            raise Unavailable("another scheduler leads", 2.0)
        try:
            report = await self._moves.round(epoch, self._clock())
        except StaleEpoch:
            self._keeper.lost(epoch)
            raise
        return told_report(report)

    def plan(self, *, limit: int) -> dict[str, Any]:
        """What would be planned now and what refused, ``limit`` of each at most; counts are of all.

        Raises:
            Unavailable: another leads, or this one has just begun.
        """
        return told_plan(self._moves.dry_run(), limit=limit)

    def status(self) -> dict[str, Any]:
        """The epoch (None: not leading), rounds and failures, and what the reconcile loop and the sweep did."""
        reconciled = self._status.get("reconcile", PartStatus())
        last: dict[str, Any] = {}
        if reconciled.ended_at is not None:
            last = {"at": reconciled.ended_at.isoformat(), **reconciled.told}
        if "lifecycle" in self._status:
            last["lifecycle"] = dict(self._status["lifecycle"].told)
        return {
            "epoch": self._keeper.epoch,
            "rounds": reconciled.rounds,
            "failures": sum(part.failures for part in self._status.values()),
            "last": last,
        }

    def details(self) -> dict[str, Any]:
        """All there is to tell: the parts, the last plan, moves, nodes and places."""
        moves, totals = self._moves, self._moves.totals
        control = moves.control
        lease = self._keeper.lease
        return {
            "epoch": self._keeper.epoch,
            "holder": None if lease is None else lease.holder,
            "lease_until": None if lease is None else lease.expires_at.isoformat(),
            "rounds": totals.rounds,
            "parts": {name: told_part(part) for name, part in self._status.items()},
            "failing": dict(moves.failing),
            "last_round": None if moves.last is None else told_report(moves.last),
            "last_round_at": None if moves.last_at is None else moves.last_at.isoformat(),
            "moves_open": 0 if control is None else control.num_open,
            "moves_waiting": 0 if control is None else control.num_waiting,
            "moved_bytes": dict(totals.moved_bytes),
            "moves": [
                {"tier": tier, "action": kind, "state": state, "count": count}
                for (tier, kind, state), count in sorted(totals.moves.items())
            ],
            "decisions": [
                {"policy": policy, "outcome": outcome, "count": count}
                for (policy, outcome), count in sorted(totals.decisions.items())
            ],
            **(told_world(control.world) if control is not None else {"nodes": [], "places": []}),
        }

    async def _move(self, epoch: int, now: datetime) -> Mapping[str, Any]:
        return told_report(await self._moves.round(epoch, now))

    async def _run_part(self, name: str) -> None:
        while not self._stopping.is_set():
            await self._step_part(name)
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._stopping.wait()
            except TimeoutError:
                continue

    async def _step_part(self, name: str) -> None:
        epoch = self._keeper.epoch
        if epoch is None:
            return
        part, now = self._status[name], self._clock()
        started = time.perf_counter()
        try:
            part.told = await self._parts[name](epoch, now) or {}
        except StaleEpoch as stale:
            part.failures, part.error = part.failures + 1, str(stale)
            if name in FENCED:  # in the others it is the epoch of a shard
                self._keeper.lost(epoch)
        except MemCubeError as failed:
            if part.error is None:
                log.warning("%s: a round ended early: %s", name, failed)
            part.failures, part.error = part.failures + 1, str(failed)
        except Exception as failed:
            log.exception("%s: a round failed", name)
            part.failures, part.error = part.failures + 1, type(failed).__name__
        else:
            part.rounds, part.error = part.rounds + 1, None
        part.took_s = time.perf_counter() - started
        part.ended_at = now


# -- what is told of it, as JSON -------------------------------------------------------------------


def told_part(part: PartStatus) -> dict[str, Any]:
    return {
        "rounds": part.rounds,
        "failures": part.failures,
        "took_s": round(part.took_s, 3),
        "ended_at": None if part.ended_at is None else part.ended_at.isoformat(),
        "error": part.error,
        "last": dict(part.told),
    }


def told_report(report: Report) -> dict[str, Any]:
    """A round's report."""
    counts = {name: value for name, value in asdict(report).items() if isinstance(value, int)}
    return {
        **counts,
        "planned": dict(report.planned),
        "refused": _by_reason(report.refused),
        "moved_bytes": dict(report.moved_bytes),
    }


def told_plan(plan: Plan, *, limit: int) -> dict[str, Any]:
    """A plan, so many of its actions and refusals."""
    planned = Counter(action.policy for action in plan.actions)
    return {
        "num_actions": len(plan.actions),
        "num_refused": plan.num_refused.total(),
        "planned": dict(planned),
        "refused": _by_reason(plan.num_refused),
        "actions": [told_action(action) for action in plan.actions[:limit]],
        "refusals": [
            {**told_action(one.action), "refused": str(one.why)} for one in plan.refused[:limit]
        ],
    }


def told_action(action: Any) -> dict[str, Any]:
    """An action that is not journaled."""
    source = getattr(action, "source", None) or getattr(action, "place", None)
    target = getattr(action, "target", None)
    return {
        "tenant": action.tenant,
        "cube": getattr(action, "cube", None),
        "action": str(kind_of(action)),
        "policy": action.policy,
        "reason": action.reason,
        "source": None if source is None else str(source),
        "target": None if target is None else str(target),
        "num_bytes": getattr(action, "num_bytes", 0),
        "num_cubes": len(getattr(action, "cubes", ())) or 1,
    }


def told_world(world: World) -> dict[str, Any]:
    """Nodes and places. Bytes at a place are what the catalog lists there."""
    return {
        "nodes": [
            {
                "name": node.name,
                "alive": node.alive,
                "draining": node.draining,
                "labels": sorted(node.labels),
            }
            for node in world.nodes.values()
        ],
        "places": [
            {
                "place": str(place),
                "tier": str(place.tier),
                "medium": str(place.medium),
                "location": place.location,
                "used_bytes": world.used_bytes[number],
                "reserved_bytes": world.reserved_bytes[number],
                "capacity_bytes": world.capacities[number].num_bytes,
                "readable": world.is_readable(number),
            }
            for number, place in enumerate(world.places)
            if world.capacities[number].num_bytes or world.used_bytes[number]
        ],
    }


def _by_reason(counts: Mapping[tuple[str, Any], int]) -> Sequence[dict[str, Any]]:
    return [
        {"policy": policy, "reason": str(reason), "count": count}
        for (policy, reason), count in sorted(counts.items())
    ]
