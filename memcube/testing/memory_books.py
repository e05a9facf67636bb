"""The scheduler's side of the catalog in memory, for simulations: the same contract as the real books.

``memcube.testing.scheduling_contract`` holds for this and for the catalog on every engine. It keeps of cubes
what the scheduler depends on: version, state, expiry and where their payloads are listed. No locks:
one thread.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from memcube.catalog.access import Lease
from memcube.catalog.action_rows import ActionRecord, record_of, row_of_action
from memcube.catalog.fence import LEASE
from memcube.catalog.placing import Listed, Placement
from memcube.catalog.scheduling import Passed, task_of
from memcube.catalog.schema import micros
from memcube.catalog.tasks import (
    SUPERSEDED,
    NewTask,
    QueueStats,
    Task,
    TaskState,
    in_turn,
    wait_s,
)
from memcube.errors import Conflict, NotFound, StaleEpoch
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import SEARCHABLE, State
from memcube.scheduler.actions import (
    Action,
    ActionKind,
    ActionState,
    Copy,
    Drop,
    Place,
    Tier,
)

Key = tuple[TenantId, CubeId]


@dataclass(slots=True)
class MemoryCube:
    """A cube as far as the scheduler's books know it; ``listed`` gives versions by place."""

    version: int = 1
    state: State = State.GENERATED
    expires_at: datetime | None = None
    listed: dict[Place, tuple[int, int]] = field(default_factory=dict)

    def is_searchable(self, now: datetime) -> bool:
        return self.state in SEARCHABLE and (self.expires_at is None or self.expires_at > now)


@dataclass(slots=True)
class MemoryPlacement:
    epoch: int = 0
    owner: Place | None = None


class MemoryStore:
    """What the books of one catalog share."""

    def __init__(self, new_id: Callable[[datetime], str]) -> None:
        self.new_id = new_id
        self.cubes: dict[Key, MemoryCube] = {}
        self.leases: dict[str, Lease] = {}
        self.placements: dict[tuple[TenantId, str], MemoryPlacement] = {}
        self.actions: dict[str, dict[str, Any]] = {}
        self.open: dict[str, dict[str, Any]] = {}
        self.tasks: dict[str, dict[str, Any]] = {}
        self.changed: dict[Key, None] = {}
        """Cubes that anything was done to since somebody took the set away."""

    def fence(self, leader: int) -> None:
        lease = self.leases.get(LEASE)
        current = 0 if lease is None else lease.epoch
        if current != leader:
            raise StaleEpoch(leader, current)

    def next_epoch(self, tenant: TenantId, cube: CubeId) -> None:
        """Count one more for a cube whose content changed."""
        if (placement := self.placements.get((tenant, cube))) is not None:
            placement.epoch += 1
        self.changed[tenant, cube] = None

    def drop_kv(self, tenant: TenantId, cube: CubeId) -> None:
        """Strike a cube's KV, as each change of its content does."""
        listed = self.cubes[tenant, cube].listed
        for place in [place for place in listed if place.tier is Tier.ACTIVATION]:
            del listed[place]
        self.next_epoch(tenant, cube)


class MemoryLeases:
    """``memcube.catalog.Leases``, as far as it is needed."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    def acquire(self, name: str, holder: str, *, now: datetime, ttl_s: float) -> Lease:
        held = self._store.leases.get(name)
        if held is not None and held.holder != holder and held.expires_at > now:
            raise Conflict(f"lease {name!r} is held by {held.holder}")
        epoch = 1 if held is None else held.epoch + 1
        until = now + timedelta(seconds=ttl_s)
        lease = Lease(name=name, holder=holder, epoch=epoch, expires_at=until)
        self._store.leases[name] = lease
        return lease

    def renew(self, held: Lease, *, now: datetime, ttl_s: float) -> Lease:
        current = self._store.leases.get(held.name)
        if current is None or current.epoch != held.epoch:
            raise StaleEpoch(held.epoch, 0 if current is None else current.epoch)
        until = now + timedelta(seconds=ttl_s)
        lease = Lease(name=held.name, holder=held.holder, epoch=held.epoch, expires_at=until)
        self._store.leases[held.name] = lease
        return lease


class MemoryActionBook:
    """``memcube.catalog.ActionBook`` in memory."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    def plan(
        self, actions: Sequence[Action], *, leader: int, now: datetime
    ) -> list[ActionRecord | Passed]:
        store = self._store
        store.fence(leader)
        busy = {(row["tenant"], row["cube"]) for row in store.open.values()}
        found: list[ActionRecord | Passed] = []
        for action in actions:
            row = row_of_action(action, id=store.new_id(now), leader=leader, now=now)
            if isinstance(action, Copy | Drop):
                why = self._passed(action, busy)
                if why is None:
                    busy.add((action.tenant, row["cube"]))
                    store.open[row["id"]] = row
                    store.changed[action.tenant, row["cube"]] = None
            else:
                id = store.new_id(now)
                _, is_new = put_task(store, action.tenant, task_of(action), id=id, now=now)
                why = None if is_new else "the queue has it"
                row |= {"state": ActionState.DONE, "closed_at": micros(now)}
            if why is None:
                store.actions[row["id"]] = row
                found.append(record_of(row))
            else:
                found.append(Passed(action, why))
        return found

    def _passed(self, action: Copy | Drop, busy: set[tuple[TenantId, str]]) -> str | None:
        name = (action.tenant, action.cube or "")
        placement = self._store.placements.setdefault(name, MemoryPlacement())
        if placement.epoch != action.epoch:
            return f"the cube is at epoch {placement.epoch}, not {action.epoch}"
        if name in busy:
            return "the cube has an action under way"
        if action.cube is None and any(tenant == action.tenant for tenant, _ in busy):
            return "cubes of the tenant have actions under way"
        if action.cube is not None and (action.tenant, "") in busy:
            return "the tenant as a whole has an action under way"
        return None

    def adopt(self, *, leader: int, now: datetime) -> list[ActionRecord]:
        self._store.fence(leader)
        for row in self._store.open.values():
            row["leader"] = leader
        return self.open()

    def prepared(self, id: str, checksum: str, *, leader: int, now: datetime) -> ActionRecord:
        row = self._mine(id, leader)
        if row["state"] is ActionState.PLANNED:
            row |= {"state": ActionState.PREPARED, "checksum": checksum, "updated_at": micros(now)}
        elif row["closed_at"] is not None:
            raise Conflict(f"action {id} is {row['state']}")
        return record_of(row)

    def commit(self, id: str, *, leader: int, now: datetime) -> ActionRecord:
        row = self._mine(id, leader)
        if row["state"] is ActionState.COMMITTED:
            return record_of(row)
        is_copy = row["action"] is ActionKind.COPY
        needed = ActionState.PREPARED if is_copy else ActionState.PLANNED
        if row["state"] is not needed:
            raise Conflict(f"action {id} is {row['state']}, not {needed}")
        record = record_of(row)
        placement = self._store.placements[record.tenant, record.cube or ""]
        if placement.epoch != record.epoch:
            raise Conflict(f"the cube is at epoch {placement.epoch}, not {record.epoch}")
        if is_copy:
            self._list(record, record.target, now)
        else:
            self._strike(record, placement)
        placement.epoch += 1
        if record.takes_over:
            placement.owner = record.target
        row |= {"state": ActionState.COMMITTED, "attempts": 0, "updated_at": micros(now)}
        self._store.changed[record.tenant, record.cube or CubeId("")] = None
        return record_of(row)

    def restore(self, id: str, why: str, *, leader: int, now: datetime) -> ActionRecord:
        row = self._mine(id, leader)
        if row["closed_at"] is not None:
            return record_of(row)
        if (row["action"], row["state"]) != (ActionKind.DROP, ActionState.COMMITTED):
            raise Conflict(f"action {id} is a {row['action']} that is {row['state']}")
        record = record_of(row)
        if record.cube is None:
            raise Conflict("only a cube's payload is listed again")
        self._list(record, record.source, now)
        self._store.placements[record.tenant, record.cube].epoch += 1
        return self._end(row, ActionState.UNDONE, why, now)

    def _list(self, record: ActionRecord, target: Place | None, now: datetime) -> None:
        if target is None:
            raise AssertionError("it is listed at a place")
        if record.cube is None:
            if record.source is None:
                raise Conflict("a tenant is copied from a place to another one")
            return  # its cubes are listed when it is done
        cube = self._store.cubes.get((record.tenant, record.cube))
        if cube is None or not cube.is_searchable(now):
            raise Conflict("the cube is gone")
        if cube.version != record.version:
            raise Conflict(f"the cube is at version {cube.version}, not {record.version}")
        cube.listed[target] = record.version, record.num_bytes

    def _strike(self, record: ActionRecord, placement: MemoryPlacement) -> None:
        place = record.source
        if place is None:
            raise AssertionError("a drop has a place")
        if record.cube is None:
            if placement.owner == place:
                raise Conflict("the place takes the tenant's writes")
            if any(
                tenant == record.tenant and place in cube.listed
                for (tenant, _), cube in self._store.cubes.items()
            ):
                raise Conflict("payloads of the tenant are listed there")
            return
        cube = self._store.cubes[record.tenant, record.cube]
        if place.tier is Tier.PLAINTEXT and cube.state in SEARCHABLE:
            if placement.owner == place:
                raise Conflict("the place takes the cube's writes")
            if not any(
                other != place and other.tier is place.tier and version == cube.version
                for other, (version, _) in cube.listed.items()
            ):
                raise Conflict("it is the last copy")
        cube.listed.pop(place, None)

    def put_off(
        self, id: str, why: str, *, until: datetime, leader: int, now: datetime
    ) -> ActionRecord:
        row = self._mine(id, leader)
        if row["closed_at"] is None:
            row |= {
                "attempts": row["attempts"] + 1,
                "next_at": micros(until),
                "outcome": why,
                "updated_at": micros(now),
            }
        return record_of(row)

    def close(
        self, id: str, state: ActionState, why: str, *, leader: int, now: datetime
    ) -> ActionRecord:
        row = self._mine(id, leader)
        if row["closed_at"] is not None:
            return record_of(row)
        is_committed = row["state"] is ActionState.COMMITTED
        if (state is ActionState.UNDONE and is_committed) or (
            state is ActionState.DONE and not is_committed
        ):
            raise Conflict(f"action {id} is {row['state']} and can't be {state}")
        record = record_of(row)
        if is_committed and record.action is ActionKind.COPY and record.cube is None:
            self._list_tenant(record)
        return self._end(row, state, why, now)

    def _list_tenant(self, record: ActionRecord) -> None:
        if record.source is None or record.target is None:
            raise AssertionError("a tenant was copied from a place to another one")
        for (tenant, id), cube in self._store.cubes.items():
            if tenant == record.tenant and record.source in cube.listed:
                cube.listed.setdefault(record.target, cube.listed.pop(record.source))
                self._store.changed[tenant, id] = None

    def _end(
        self, row: dict[str, Any], state: ActionState, why: str, now: datetime
    ) -> ActionRecord:
        row |= {"state": state, "outcome": why, "closed_at": micros(now), "updated_at": micros(now)}
        del self._store.open[row["id"]]
        self._store.changed[row["tenant"], row["cube"]] = None
        return record_of(row)

    def get(self, id: str) -> ActionRecord:
        return record_of(self._row(id))

    def open(self) -> list[ActionRecord]:
        return [record_of(row) for row in self._store.open.values()]

    def page(
        self,
        *,
        tenant: TenantId | None = None,
        cube: CubeId | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> list[ActionRecord]:
        found = [
            row
            for row in self._store.actions.values()
            if tenant in (None, row["tenant"])
            and cube in (None, row["cube"])
            and (before is None or row["id"] < before)
        ]
        found.sort(key=lambda row: row["id"], reverse=True)
        return [record_of(row) for row in found[:limit]]

    def placement(self, tenant: TenantId, cube: CubeId | None) -> Placement:
        found = self._store.placements.get((tenant, cube or ""))
        return Placement(0, None) if found is None else Placement(found.epoch, found.owner)

    def copies(self, tenant: TenantId, cube: CubeId, tier: Tier) -> list[tuple[Place, int]]:
        found = self._store.cubes.get((tenant, cube))
        if found is None:
            return []
        listed = [(p, v) for p, (v, _) in found.listed.items() if p.tier is tier]
        return sorted(listed, key=lambda one: (one[0].location, one[0].medium))

    def listed(self, place: Place) -> list[Listed]:
        found = []
        for (tenant, id), cube in self._store.cubes.items():
            if place in cube.listed:
                version, num_bytes = cube.listed[place]
                placement = self._store.placements.get((tenant, id))
                epoch = 0 if placement is None else placement.epoch
                current = cube.version if cube.state in SEARCHABLE else None
                found.append(Listed(tenant, id, version, num_bytes, epoch, current))
        return found

    def forget_location(self, location: str, *, leader: int, now: datetime) -> int:
        store = self._store
        store.fence(leader)
        num = 0
        for key, cube in store.cubes.items():
            for place in [place for place in cube.listed if place.location == location]:
                del cube.listed[place]
                store.changed[key] = None
                num += 1
        for (tenant, id), placement in store.placements.items():
            if placement.owner is not None and placement.owner.location == location:
                placement.owner = None
                placement.epoch += 1
                store.changed[tenant, CubeId(id)] = None
        return num

    def prune(self, *, before: datetime) -> int:
        gone = [
            id
            for id, row in self._store.actions.items()
            if row["closed_at"] is not None and row["closed_at"] < micros(before)
        ]
        for id in gone:
            del self._store.actions[id]
        return len(gone)

    def _row(self, id: str) -> dict[str, Any]:
        row = self._store.actions.get(id)
        if row is None:
            raise NotFound("action", id)
        return row

    def _mine(self, id: str, leader: int) -> dict[str, Any]:
        self._store.fence(leader)
        return self._row(id)


def put_task(
    store: MemoryStore,
    tenant: TenantId,
    new: NewTask,
    *,
    id: str,
    now: datetime,
    not_before: datetime | None = None,
) -> tuple[str, bool]:
    for row in store.tasks.values():
        if (row["kind"], row["key"]) == (new.kind, new.key) and (
            new.once or row["closed_at"] is None
        ):
            return row["id"], False
    store.tasks[id] = {
        "id": id,
        "tenant": tenant,
        "kind": new.kind,
        "key": new.key,
        "state": TaskState.WAITING,
        "payload": dict(new.payload),
        "result": None,
        "priority": new.priority,
        "attempts": 0,
        "max_attempts": new.max_attempts,
        "next_at": not_before or now,
        "leader": None,
        "error": "",
        "created_at": now,
        "updated_at": now,
        "closed_at": None,
    }
    return id, True


class MemoryTaskQueue:
    """``memcube.catalog.TaskQueue`` in memory."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._served = ""

    def put(
        self, tenant: TenantId, new: NewTask, *, now: datetime, not_before: datetime | None = None
    ) -> Task:
        new_id = self._store.new_id(now)
        id, _ = put_task(self._store, tenant, new, id=new_id, now=now, not_before=not_before)
        return Task(**self._store.tasks[id])

    def supersede(self, tenant: TenantId, new: NewTask, *, now: datetime) -> Task:
        id = self._store.new_id(now)
        for row in self._store.tasks.values():
            is_open = row["closed_at"] is None
            if is_open and (row["kind"], row["key"]) == (new.kind, new.key):
                if row["payload"] == dict(new.payload):
                    continue
                result = {"outcome": SUPERSEDED, "by": id}
                ended = {"result": result, "error": "", "closed_at": now, "updated_at": now}
                row |= {"state": TaskState.DONE, **ended}
        id, _ = put_task(self._store, tenant, new, id=id, now=now)
        return Task(**self._store.tasks[id])

    def get(self, tenant: TenantId, id: str) -> Task:
        row = self._store.tasks.get(id)
        if row is None or row["tenant"] != tenant:
            raise NotFound("task", id)
        return Task(**row)

    def page(
        self,
        *,
        tenant: TenantId | None = None,
        state: TaskState | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> list[Task]:
        found = [
            Task(**row)
            for row in self._store.tasks.values()
            if tenant in (None, row["tenant"])
            and state in (None, row["state"])
            and (before is None or row["id"] < before)
        ]
        return sorted(found, key=lambda task: task.id, reverse=True)[:limit]

    def retry(self, id: str, *, tenant: TenantId | None = None, now: datetime) -> Task:
        row = self._store.tasks.get(id)
        if row is None or tenant not in (None, row["tenant"]):
            raise NotFound("task", id)
        if row["state"] is TaskState.DONE:
            raise Conflict(f"task {id} is done")
        if row["state"] is TaskState.DEAD:
            row |= {"state": TaskState.WAITING, "attempts": 0, "next_at": now, "updated_at": now}
        return Task(**row)

    def stats(self, *, now: datetime, tenant: TenantId | None = None) -> QueueStats:
        mine = [r for r in self._store.tasks.values() if tenant in (None, r["tenant"])]
        due = [
            r["next_at"] for r in mine if r["state"] is TaskState.WAITING and r["next_at"] <= now
        ]
        return QueueStats(
            by_state={str(s): sum(r["state"] is s for r in mine) for s in TaskState},
            oldest_due=min(due, default=None),
        )

    def claim(
        self,
        *,
        leader: int,
        now: datetime,
        limit: int,
        kinds: Sequence[str] | None = None,
        held: Collection[str] = (),
    ) -> list[Task]:
        self._store.fence(leader)
        due: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in self._store.tasks.values():
            if row["state"] is TaskState.RUNNING and (
                row["leader"] < leader or row["id"] not in held
            ):
                row |= {"state": TaskState.WAITING, "updated_at": now}
            if (
                row["state"] is TaskState.WAITING
                and row["next_at"] <= now
                and (kinds is None or row["kind"] in kinds)
            ):
                due[row["tenant"]].append(row)
        tenants = sorted(due, key=lambda tenant: (tenant <= self._served, tenant))[:limit]
        for rows in due.values():
            rows.sort(key=lambda row: (-row["priority"], row["next_at"], row["id"]))
        ids = in_turn({tenant: [row["id"] for row in due[tenant]] for tenant in tenants}, limit)
        for id in ids:
            row = self._store.tasks[id]
            row |= {"state": TaskState.RUNNING, "leader": leader, "updated_at": now}
            row["attempts"] += 1
        found = [Task(**self._store.tasks[id]) for id in ids]
        if found:
            self._served = found[-1].tenant
        return found

    def done(
        self,
        task: Task,
        *,
        leader: int,
        now: datetime,
        result: Mapping[str, Any] | None = None,
    ) -> None:
        row = self._mine(task, leader)
        if row["state"] is not TaskState.DONE:
            row |= {
                "state": TaskState.DONE,
                "result": None if result is None else dict(result),
                "error": "",
                "closed_at": now,
                "updated_at": now,
            }

    def failed(self, task: Task, error: str, *, leader: int, now: datetime) -> Task:
        row = self._mine(task, leader)
        if row["state"] is TaskState.RUNNING:
            is_dead = 0 < row["max_attempts"] <= row["attempts"]
            row |= {
                "state": TaskState.DEAD if is_dead else TaskState.WAITING,
                "next_at": now + timedelta(seconds=wait_s(row["attempts"])),
                "error": error,
                "updated_at": now,
            }
        return Task(**row)

    def prune(self, *, before: datetime) -> int:
        gone = [
            id
            for id, row in self._store.tasks.items()
            if row["closed_at"] is not None and row["closed_at"] < before
        ]
        for id in gone:
            del self._store.tasks[id]
        return len(gone)

    def _mine(self, task: Task, leader: int) -> dict[str, Any]:
        self._store.fence(leader)
        row = self._store.tasks[task.id]
        if row["leader"] != leader or row["attempts"] != task.attempts:
            raise StaleEpoch(leader, row["leader"] or 0)
        return row
