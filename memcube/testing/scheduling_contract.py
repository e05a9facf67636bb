"""What the scheduler's journal and the queue must do: on every engine, and in the double of the simulation.

A test class inherits ``ActionsContract`` and ``TasksContract`` and gives a ``books`` fixture.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import pytest

from memcube.catalog import (
    ActionRecord,
    Catalog,
    Change,
    Lease,
    NewTask,
    Passed,
    Placement,
    Task,
    TaskState,
)
from memcube.catalog.fence import LEASE
from memcube.cube import Draft
from memcube.errors import Conflict, NotFound, StaleEpoch
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import State
from memcube.scheduler.actions import (
    Action,
    ActionState,
    Archive,
    Consolidate,
    Copy,
    Drop,
    Expire,
    Medium,
    Place,
    Reindex,
    Tier,
    shard_place,
)
from memcube.testing.memory_books import (
    MemoryActionBook,
    MemoryCube,
    MemoryLeases,
    MemoryStore,
    MemoryTaskQueue,
)

NOW = datetime(2026, 11, 1, tzinfo=UTC)
A, B = TenantId("a"), TenantId("b")
N1 = shard_place(0)
N2 = Place(Tier.PLAINTEXT, Medium.DISK, "n2")
KV1 = Place(Tier.ACTIVATION, Medium.HOST, N1.location)
KV2 = Place(Tier.ACTIVATION, Medium.HOST, "n2")


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


class Books(Protocol):
    """A catalog, real or not, as the contract needs it."""

    @property
    def actions(self) -> Any: ...
    @property
    def tasks(self) -> Any: ...
    @property
    def leases(self) -> Any: ...
    def add(self, tenant: TenantId = A) -> CubeId:
        """A searchable cube at version 1, listed at ``N1``."""
        ...

    def change(self, tenant: TenantId, cube: CubeId) -> None: ...
    def delete(self, tenant: TenantId, cube: CubeId) -> None: ...


class CatalogBooks:
    """The real catalog in the form of ``Books``."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.actions, self.tasks, self.leases = catalog.actions, catalog.tasks, catalog.leases
        self._made = 0
        for tenant in (A, B):
            catalog.access.ensure_tenant(tenant, shards=1, now=NOW)

    def add(self, tenant: TenantId = A) -> CubeId:
        self._made += 1
        draft = Draft(text=f"cube {self._made}")
        id = self._catalog.cubes.add(tenant, [draft], author="t", now=NOW).results[0].cube.id
        self._catalog.index.mark(
            tenant, {id: 1}, sizes={id: 100}, index="i", shard=0, epoch=0, now=NOW
        )
        return id

    def change(self, tenant: TenantId, cube: CubeId) -> None:
        self._made += 1
        self._catalog.cubes.update(
            tenant,
            cube,
            Change(text=f"changed {self._made}"),
            expected_version=None,
            author="t",
            reason="",
            now=NOW,
        )

    def delete(self, tenant: TenantId, cube: CubeId) -> None:
        self._catalog.cubes.delete(tenant, cube, now=NOW)


class MemoryBooks:
    """The simulation's double in the form of ``Books``."""

    def __init__(self) -> None:
        self._made = 0
        self.store = MemoryStore(lambda now: self._id())
        self.actions = MemoryActionBook(self.store)
        self.tasks = MemoryTaskQueue(self.store)
        self.leases = MemoryLeases(self.store)

    def _id(self) -> str:
        self._made += 1
        return f"{self._made:036d}"

    def add(self, tenant: TenantId = A) -> CubeId:
        id = CubeId(self._id())
        self.store.cubes[tenant, id] = MemoryCube(listed={N1: (1, 100)})
        return id

    def change(self, tenant: TenantId, cube: CubeId) -> None:
        self.store.cubes[tenant, cube].version += 1
        self.store.drop_kv(tenant, cube)

    def delete(self, tenant: TenantId, cube: CubeId) -> None:
        self.store.cubes[tenant, cube].state = State.DELETED
        self.store.drop_kv(tenant, cube)


class _Shared:
    @pytest.fixture
    def leader(self, books: Books) -> int:
        return lead(books)


def lead(books: Books, holder: str = "one", *, seconds: float = 0) -> int:
    lease: Lease = books.leases.acquire(LEASE, holder, now=at(seconds), ttl_s=10)
    return lease.epoch


def copy(cube: CubeId | None, target: Place = N2, *, epoch: int = 0, **more: Any) -> Copy:
    given: dict[str, Any] = {"tenant": A, "version": 1, "source": N1, "num_bytes": 100, **more}
    return Copy(cube=cube, target=target, epoch=epoch, **given)


def drop(cube: CubeId | None, place: Place = N1, *, epoch: int = 0, **more: Any) -> Drop:
    given: dict[str, Any] = {"tenant": A, "version": 1, "num_bytes": 100, **more}
    return Drop(cube=cube, place=place, epoch=epoch, **given)


def journal(books: Books, action: Action, leader: int, *, seconds: float = 0) -> ActionRecord:
    (found,) = books.actions.plan([action], leader=leader, now=at(seconds))
    assert isinstance(found, ActionRecord), found
    return found


def carry(books: Books, action: Action, leader: int, *, seconds: float = 0) -> ActionRecord:
    """Take an action through all its states."""
    record = journal(books, action, leader, seconds=seconds)
    if isinstance(action, Copy):
        books.actions.prepared(record.id, "c" * 64, leader=leader, now=NOW)
    books.actions.commit(record.id, leader=leader, now=NOW)
    return books.actions.close(record.id, ActionState.DONE, "", leader=leader, now=NOW)


def committed_drop(books: Books, cube: CubeId, leader: int) -> ActionRecord:
    """What lay at ``N1`` struck, at the epoch after a copy's."""
    record = journal(books, drop(cube, epoch=1), leader)
    return books.actions.commit(record.id, leader=leader, now=NOW)


class ActionsContract(_Shared):
    """The journal. Inherit, and give ``books``."""

    def test_a_copy_goes_through_its_states_and_takes_the_epoch(self, books: Books, leader: int):
        cube = books.add()
        record = journal(books, copy(cube, reason="why", policy="p", urgent=True), leader)
        assert (record.state, record.epoch, record.source, record.target) == (
            "planned",
            0,
            N1,
            N2,
        )
        assert (record.reason, record.policy, record.urgent) == ("why", "p", True)
        prepared = books.actions.prepared(record.id, "c" * 64, leader=leader, now=at(1))
        assert (prepared.state, prepared.checksum) == ("prepared", "c" * 64)
        assert books.actions.copies(A, cube, Tier.PLAINTEXT) == [(N1, 1)]
        committed = books.actions.commit(record.id, leader=leader, now=at(2))
        assert committed.state == "committed"
        assert books.actions.copies(A, cube, Tier.PLAINTEXT) == [(N2, 1), (N1, 1)]
        assert books.actions.placement(A, cube) == Placement(1, None)
        assert [r.id for r in books.actions.open()] == [record.id]
        done = books.actions.close(record.id, ActionState.DONE, "", leader=leader, now=at(3))
        assert (done.state, done.closed_at) == ("done", at(3))
        assert books.actions.open() == []
        assert books.actions.get(record.id) == done

    def test_each_step_done_twice_is_done_once(self, books: Books, leader: int):
        cube = books.add()
        record = journal(books, copy(cube), leader)
        for _ in range(2):
            books.actions.prepared(record.id, "c" * 64, leader=leader, now=NOW)
        for _ in range(2):
            books.actions.commit(record.id, leader=leader, now=NOW)
            books.actions.prepared(record.id, "d" * 64, leader=leader, now=NOW)
        for state in (ActionState.DONE, ActionState.FAILED):
            books.actions.close(record.id, state, "", leader=leader, now=NOW)
        found = books.actions.get(record.id)
        assert (found.state, found.checksum) == ("done", "c" * 64)
        assert books.actions.placement(A, cube).epoch == 1

    def test_a_cube_has_one_action_under_way(self, books: Books, leader: int):
        cube, other = books.add(), books.add()
        first, second, third = books.actions.plan(
            [copy(cube), copy(cube, KV1), copy(other)], leader=leader, now=NOW
        )
        assert isinstance(second, Passed)
        assert "under way" in second.why
        assert isinstance(third, ActionRecord)
        (again,) = books.actions.plan([drop(cube)], leader=leader, now=NOW)
        assert isinstance(again, Passed)
        books.actions.close(first.id, ActionState.UNDONE, "", leader=leader, now=NOW)
        journal(books, copy(cube, KV1), leader)

    def test_what_was_planned_at_an_epoch_that_has_passed_is_not_journaled(
        self, books: Books, leader: int
    ):
        cube = books.add()
        carry(books, copy(cube), leader)
        (late,) = books.actions.plan([copy(cube, KV1)], leader=leader, now=NOW)
        assert isinstance(late, Passed)
        assert "epoch 1" in late.why
        journal(books, copy(cube, KV1, epoch=1), leader)

    @pytest.mark.parametrize("how", ["change", "delete"])
    def test_a_copy_of_what_changed_meanwhile_does_not_commit(
        self, books: Books, leader: int, how: str
    ):
        cube = books.add()
        record = journal(books, copy(cube, KV1), leader)
        books.actions.prepared(record.id, "c" * 64, leader=leader, now=NOW)
        getattr(books, how)(A, cube)
        with pytest.raises(Conflict):
            books.actions.commit(record.id, leader=leader, now=NOW)
        assert books.actions.copies(A, cube, Tier.ACTIVATION) == []
        closed = books.actions.close(record.id, ActionState.UNDONE, "x", leader=leader, now=NOW)
        assert (closed.state, closed.outcome) == ("undone", "x")

    def test_a_change_strikes_kv_that_was_listed(self, books: Books, leader: int):
        cube = books.add()
        carry(books, copy(cube, KV1), leader)
        assert books.actions.copies(A, cube, Tier.ACTIVATION) == [(KV1, 1)]
        books.change(A, cube)
        assert books.actions.copies(A, cube, Tier.ACTIVATION) == []
        assert books.actions.placement(A, cube).epoch == 2

    def test_a_copy_of_another_version_does_not_commit(self, books: Books, leader: int):
        cube = books.add()
        record = journal(books, copy(cube, version=2), leader)
        books.actions.prepared(record.id, "c" * 64, leader=leader, now=NOW)
        with pytest.raises(Conflict, match="version 1"):
            books.actions.commit(record.id, leader=leader, now=NOW)

    def test_the_last_copy_is_not_struck(self, books: Books, leader: int):
        cube = books.add()
        record = journal(books, drop(cube), leader)
        with pytest.raises(Conflict, match="last copy"):
            books.actions.commit(record.id, leader=leader, now=NOW)
        assert books.actions.copies(A, cube, Tier.PLAINTEXT) == [(N1, 1)]

    def test_a_copy_of_an_old_version_is_no_other_copy(self, books: Books, leader: int):
        cube = books.add()
        carry(books, copy(cube), leader)
        books.change(A, cube)
        epoch = books.actions.placement(A, cube).epoch
        record = journal(books, drop(cube, epoch=epoch), leader)
        with pytest.raises(Conflict, match="last copy"):
            books.actions.commit(record.id, leader=leader, now=NOW)

    def test_one_of_two_copies_is_struck_and_kv_always(self, books: Books, leader: int):
        cube = books.add()
        carry(books, copy(cube), leader)
        carry(books, copy(cube, KV1, epoch=1), leader)
        carry(books, drop(cube, epoch=2), leader)
        carry(books, drop(cube, KV1, epoch=3), leader)
        assert books.actions.copies(A, cube, Tier.PLAINTEXT) == [(N2, 1)]
        assert books.actions.copies(A, cube, Tier.ACTIVATION) == []
        assert books.actions.placement(A, cube).epoch == 4

    def test_who_takes_over_owns_and_the_owners_copy_stays(self, books: Books, leader: int):
        cube = books.add()
        carry(books, copy(cube, takes_over=True), leader)
        assert books.actions.placement(A, cube) == Placement(1, N2)
        record = journal(books, drop(cube, N2, epoch=1), leader)
        with pytest.raises(Conflict, match="writes"):
            books.actions.commit(record.id, leader=leader, now=NOW)
        books.actions.close(record.id, ActionState.UNDONE, "", leader=leader, now=NOW)
        carry(books, drop(cube, N1, epoch=1), leader)

    def test_what_a_deleted_cube_left_may_go(self, books: Books, leader: int):
        cube = books.add()
        books.delete(A, cube)
        carry(books, drop(cube), leader)
        assert books.actions.copies(A, cube, Tier.PLAINTEXT) == []

    def test_states_go_one_way(self, books: Books, leader: int):
        cube = books.add()
        record = journal(books, copy(cube), leader)
        with pytest.raises(Conflict):
            books.actions.commit(record.id, leader=leader, now=NOW)  # not prepared
        with pytest.raises(Conflict):
            books.actions.close(record.id, ActionState.DONE, "", leader=leader, now=NOW)
        books.actions.prepared(record.id, "c" * 64, leader=leader, now=NOW)
        books.actions.commit(record.id, leader=leader, now=NOW)
        with pytest.raises(Conflict):
            books.actions.close(record.id, ActionState.UNDONE, "", leader=leader, now=NOW)
        books.actions.close(record.id, ActionState.DONE, "", leader=leader, now=NOW)
        with pytest.raises(Conflict):
            books.actions.commit(record.id, leader=leader, now=NOW)

    def test_a_drop_is_listed_again_after_its_commit(self, books: Books, leader: int):
        cube = books.add()
        carry(books, copy(cube), leader)
        record = committed_drop(books, cube, leader)
        assert books.actions.copies(A, cube, Tier.PLAINTEXT) == [(N2, 1)]
        for _ in range(2):
            undone = books.actions.restore(record.id, "why", leader=leader, now=at(5))
            assert (undone.state, undone.outcome, undone.closed_at) == ("undone", "why", at(5))
        assert set(books.actions.copies(A, cube, Tier.PLAINTEXT)) == {(N1, 1), (N2, 1)}
        assert books.actions.placement(A, cube) == Placement(3, None)
        (listed,) = [one for one in books.actions.listed(N1) if one.cube == cube]
        assert (listed.version, listed.num_bytes, listed.epoch) == (1, 100, 3)
        assert books.actions.open() == []
        carry(books, drop(cube, epoch=3), leader)

    def test_it_is_listed_again_though_its_other_place_was_forgotten_with_an_epoch(
        self, books: Books, leader: int
    ):
        cube = books.add()
        carry(books, copy(cube, takes_over=True), leader)
        record = committed_drop(books, cube, leader)
        books.actions.forget_location("n2", leader=leader, now=NOW)
        assert books.actions.copies(A, cube, Tier.PLAINTEXT) == []
        books.actions.restore(record.id, "", leader=leader, now=NOW)
        assert books.actions.copies(A, cube, Tier.PLAINTEXT) == [(N1, 1)]
        assert books.actions.placement(A, cube) == Placement(4, None)

    @pytest.mark.parametrize("how", ["change", "delete"])
    def test_what_changed_since_the_drop_is_not_listed_again(
        self, books: Books, leader: int, how: str
    ):
        cube = books.add()
        carry(books, copy(cube), leader)
        record = committed_drop(books, cube, leader)
        getattr(books, how)(A, cube)
        epoch = books.actions.placement(A, cube).epoch
        with pytest.raises(Conflict):
            books.actions.restore(record.id, "", leader=leader, now=NOW)
        assert books.actions.get(record.id).state == "committed"
        assert books.actions.placement(A, cube).epoch == epoch
        assert (N1, 1) not in books.actions.copies(A, cube, Tier.PLAINTEXT)

    def test_only_a_committed_drop_of_a_cube_is_listed_again(self, books: Books, leader: int):
        cube = books.add()
        planned_copy = journal(books, copy(cube), leader)
        planned_drop = journal(books, drop(books.add()), leader)
        for record in (planned_copy, planned_drop):
            with pytest.raises(Conflict):
                books.actions.restore(record.id, "", leader=leader, now=NOW)
            assert books.actions.get(record.id).state == "planned"
        books.actions.prepared(planned_copy.id, "c" * 64, leader=leader, now=NOW)
        books.actions.commit(planned_copy.id, leader=leader, now=NOW)
        with pytest.raises(Conflict):
            books.actions.restore(planned_copy.id, "", leader=leader, now=NOW)
        whole = journal(books, drop(None, N2, version=0, tenant=B), leader)
        books.actions.commit(whole.id, leader=leader, now=NOW)
        with pytest.raises(Conflict):
            books.actions.restore(whole.id, "", leader=leader, now=NOW)

    def test_an_action_can_fail_in_every_open_state(self, books: Books, leader: int):
        for num_steps in range(3):
            record = journal(books, copy(books.add()), leader)
            steps = [
                lambda id=record.id: books.actions.prepared(id, "c", leader=leader, now=NOW),
                lambda id=record.id: books.actions.commit(id, leader=leader, now=NOW),
            ]
            for step in steps[:num_steps]:
                step()
            failed = books.actions.close(
                record.id, ActionState.FAILED, "why", leader=leader, now=NOW
            )
            assert (failed.state, failed.outcome) == ("failed", "why")

    def test_a_leader_that_was_followed_is_refused_everything(self, books: Books, leader: int):
        cube, other = books.add(), books.add()
        record = journal(books, copy(cube), leader)
        new = lead(books, "two", seconds=20)
        refused = {"leader": leader, "now": NOW}
        for call in (
            lambda: books.actions.plan([copy(other)], **refused),
            lambda: books.actions.prepared(record.id, "c", **refused),
            lambda: books.actions.commit(record.id, **refused),
            lambda: books.actions.restore(record.id, "", **refused),
            lambda: books.actions.put_off(record.id, "", until=NOW, **refused),
            lambda: books.actions.close(record.id, ActionState.UNDONE, "", **refused),
            lambda: books.actions.adopt(**refused),
            lambda: books.actions.forget_location(N1.location, **refused),
        ):
            with pytest.raises(StaleEpoch):
                call()
        (adopted,) = books.actions.adopt(leader=new, now=NOW)
        assert (adopted.id, adopted.state, adopted.leader) == (record.id, "planned", new)

    def test_a_put_off_action_counts_attempts_until_it_commits(self, books: Books, leader: int):
        cube = books.add()
        record = journal(books, copy(cube), leader)
        for attempts in (1, 2):
            off = books.actions.put_off(record.id, "no answer", until=at(9), leader=leader, now=NOW)
            assert (off.attempts, off.next_at, off.outcome) == (attempts, at(9), "no answer")
        books.actions.prepared(record.id, "c", leader=leader, now=NOW)
        assert books.actions.commit(record.id, leader=leader, now=NOW).attempts == 0

    def test_a_tenant_moves_as_one(self, books: Books, leader: int):
        cubes = [books.add(), books.add()]
        foreign = books.add(B)
        carry(books, copy(None, version=0, takes_over=True), leader)
        for cube in cubes:
            assert books.actions.copies(A, cube, Tier.PLAINTEXT) == [(N2, 1)]
        assert books.actions.copies(B, foreign, Tier.PLAINTEXT) == [(N1, 1)]
        assert books.actions.placement(A, None) == Placement(1, N2)
        carry(books, drop(None, N1, epoch=1, version=0), leader)

    def test_a_tenants_listed_payloads_are_not_dropped(self, books: Books, leader: int):
        books.add()
        record = journal(books, drop(None, N1, version=0), leader)
        with pytest.raises(Conflict, match="listed"):
            books.actions.commit(record.id, leader=leader, now=NOW)

    def test_a_tenant_and_its_cubes_do_not_move_at_once(self, books: Books, leader: int):
        cube = books.add()
        record = journal(books, copy(cube), leader)
        (whole,) = books.actions.plan([copy(None, version=0)], leader=leader, now=NOW)
        assert isinstance(whole, Passed)
        books.actions.close(record.id, ActionState.UNDONE, "", leader=leader, now=NOW)
        journal(books, copy(None, version=0), leader)
        (part,) = books.actions.plan([copy(cube)], leader=leader, now=NOW)
        assert isinstance(part, Passed)
        (foreign,) = books.actions.plan([copy(books.add(B), tenant=B)], leader=leader, now=NOW)
        assert isinstance(foreign, ActionRecord)

    def test_a_lost_location_is_forgotten_with_its_owners(self, books: Books, leader: int):
        cube = books.add()
        carry(books, copy(cube, takes_over=True), leader)
        assert books.actions.forget_location("n2", leader=leader, now=NOW) == 1
        assert books.actions.copies(A, cube, Tier.PLAINTEXT) == [(N1, 1)]
        assert books.actions.placement(A, cube) == Placement(2, None)

    def test_work_for_the_queue_is_journaled_with_its_task_once(self, books: Books, leader: int):
        cube = books.add()
        actions: Sequence[Action] = [
            Reindex(tenant=A, cube=cube, version=1, epoch=0, reason="late"),
            Expire(tenant=A, cube=cube, epoch=0),
            Archive(tenant=A, cube=cube, epoch=0),
            Consolidate(tenant=A, scope="ann", cubes=(cube,), epoch=7),
        ]
        found = books.actions.plan(actions, leader=leader, now=NOW)
        assert [r.state for r in found if isinstance(r, ActionRecord)] == ["done"] * 4
        kinds = {task.kind: task.payload for task in books.tasks.page()}
        assert kinds["reindex"] == {"cube": cube, "reason": "late"}
        assert kinds["consolidate"]["cubes"] == [cube]
        again = books.actions.plan(actions, leader=leader, now=NOW)
        assert all(isinstance(one, Passed) for one in again)
        assert books.actions.open() == []

    def test_the_journal_is_read_newest_first_by_tenant_and_cube(self, books: Books, leader: int):
        cube, foreign = books.add(), books.add(B)
        first = carry(books, copy(cube), leader)
        second = carry(books, copy(cube, KV1, epoch=1), leader, seconds=1)
        other = journal(books, copy(foreign, tenant=B), leader, seconds=2)
        ids = [r.id for r in books.actions.page()]
        assert ids == [other.id, second.id, first.id]
        assert [r.id for r in books.actions.page(tenant=A, before=second.id)] == [first.id]
        assert [r.id for r in books.actions.page(cube=foreign)] == [other.id]
        assert books.actions.prune(before=at(1)) == 2
        assert [r.id for r in books.actions.page()] == [other.id]
        with pytest.raises(NotFound):
            books.actions.get(first.id)


def queue(books: Books, key: str, *, tenant: TenantId = A, **more: Any) -> Task:
    payload: Mapping[str, Any] = {"n": key}
    return books.tasks.put(tenant, NewTask(kind="k", key=key, payload=payload, **more), now=NOW)


class TasksContract(_Shared):
    """The queue. Inherit, and give ``books``."""

    def test_a_task_waits_runs_and_is_done(self, books: Books, leader: int):
        task = queue(books, "x")
        assert (task.state, task.attempts, task.payload) == ("waiting", 0, {"n": "x"})
        (claimed,) = books.tasks.claim(leader=leader, now=at(1), limit=5)
        assert (claimed.id, claimed.state, claimed.attempts) == (task.id, "running", 1)
        held = {claimed.id}
        assert books.tasks.claim(leader=leader, now=at(1), limit=5, held=held) == []
        for _ in range(2):
            books.tasks.done(claimed, leader=leader, now=at(2), result={"made": 1})
        found = books.tasks.get(A, task.id)
        assert (found.state, found.result, found.closed_at) == ("done", {"made": 1}, at(2))

    def test_of_one_kind_and_key_one_is_open(self, books: Books, leader: int):
        task = queue(books, "x")
        assert queue(books, "x").id == task.id
        assert books.tasks.put(A, NewTask(kind="other", key="x", payload={}), now=NOW).id != task.id
        (claimed,) = books.tasks.claim(leader=leader, now=NOW, limit=5, kinds=["k"])
        assert queue(books, "x").id == task.id
        books.tasks.done(claimed, leader=leader, now=NOW)
        assert queue(books, "x", once=True).id == task.id
        assert queue(books, "x").id != task.id

    def test_a_later_word_takes_the_place_of_an_open_task(self, books: Books, leader: int):
        def ask(to: str) -> Task:
            new = NewTask(kind="move", key="x", payload={"to": to}, max_attempts=0)
            return books.tasks.supersede(A, new, now=NOW)

        first = ask("b")
        assert ask("b").id == first.id
        (claimed,) = books.tasks.claim(leader=leader, now=NOW, limit=5)
        second = ask("c")
        assert second.id != first.id
        # Who works on the first one finds that it has ended, whatever comes of it.
        assert books.tasks.failed(claimed, "on its way", leader=leader, now=NOW).state == "done"
        books.tasks.done(claimed, leader=leader, now=NOW, result={"shard": 1})
        ended = books.tasks.get(A, first.id)
        assert (ended.state, ended.closed_at) == ("done", NOW)
        assert ended.result == {"outcome": "superseded", "by": second.id}
        third = ask("b")
        assert third.id not in (first.id, second.id)
        (waiting,) = books.tasks.claim(leader=leader, now=NOW, limit=5)
        assert (waiting.id, waiting.payload) == (third.id, {"to": "b"})

    def test_a_failure_puts_a_task_off_longer_each_time(self, books: Books, leader: int):
        queue(books, "x")
        now, waits = NOW, []
        for _ in range(4):
            (task,) = books.tasks.claim(leader=leader, now=now, limit=1)
            off = books.tasks.failed(task, "broken", leader=leader, now=now)
            assert (off.state, off.error) == ("waiting", "broken")
            waits.append((off.next_at - now).total_seconds())
            assert (
                books.tasks.claim(leader=leader, now=off.next_at - timedelta(seconds=0.5), limit=1)
                == []
            )
            now = off.next_at
        assert waits == [1, 2, 4, 8]

    def test_a_task_that_failed_too_often_is_dead_and_can_be_retried(
        self, books: Books, leader: int
    ):
        task = queue(books, "x", max_attempts=2)
        for seconds in (0, 10):
            (claimed,) = books.tasks.claim(leader=leader, now=at(seconds), limit=1)
            books.tasks.failed(claimed, "broken", leader=leader, now=at(seconds))
        (dead,) = books.tasks.page(state=TaskState.DEAD)
        assert (dead.id, dead.error, dead.attempts) == (task.id, "broken", 2)
        assert books.tasks.claim(leader=leader, now=at(1e6), limit=1) == []
        assert books.tasks.prune(before=at(1e9)) == 0
        assert queue(books, "x").id == task.id
        with pytest.raises(NotFound):
            books.tasks.retry(task.id, tenant=B, now=NOW)
        for _ in range(2):
            again = books.tasks.retry(task.id, now=at(20))
            assert (again.state, again.attempts) == ("waiting", 0)
        (claimed,) = books.tasks.claim(leader=leader, now=at(20), limit=1)
        books.tasks.done(claimed, leader=leader, now=at(21))
        with pytest.raises(Conflict):
            books.tasks.retry(task.id, now=at(22))

    def test_tenants_are_served_in_turn(self, books: Books, leader: int):
        for n in range(6):
            queue(books, f"a{n}")
        for n in range(2):
            queue(books, f"b{n}", tenant=B)
        first = books.tasks.claim(leader=leader, now=NOW, limit=3)
        assert [task.tenant for task in first] == [A, B, A]
        held = {task.id for task in first}
        second = books.tasks.claim(leader=leader, now=NOW, limit=2, held=held)
        assert [task.tenant for task in second] == [B, A]

    def test_the_urgent_and_then_the_oldest_come_first(self, books: Books, leader: int):
        late = books.tasks.put(A, NewTask(kind="k", key="1", payload={}), now=NOW, not_before=at(5))
        early = queue(books, "2")
        urgent = queue(books, "3", priority=1)
        held = [t.id for t in books.tasks.claim(leader=leader, now=NOW, limit=9)]
        assert held == [urgent.id, early.id]
        last = books.tasks.claim(leader=leader, now=at(5), limit=9, held=held)
        assert [t.id for t in last] == [late.id]

    def test_a_claim_that_its_leader_never_heard_of_is_claimed_again(
        self, books: Books, leader: int
    ):
        queue(books, "x")
        (lost,) = books.tasks.claim(leader=leader, now=NOW, limit=1)
        (again,) = books.tasks.claim(leader=leader, now=NOW, limit=1)
        assert (again.id, again.attempts) == (lost.id, 2)
        with pytest.raises(StaleEpoch):
            books.tasks.done(lost, leader=leader, now=NOW)

    def test_what_must_be_done_is_never_given_up(self, books: Books, leader: int):
        queue(books, "x", max_attempts=0)
        now = NOW
        for _ in range(40):
            (task,) = books.tasks.claim(leader=leader, now=now, limit=1)
            now = books.tasks.failed(task, "broken", leader=leader, now=now).next_at
        assert (now - NOW).total_seconds() < 40 * 300

    def test_kinds_can_be_chosen(self, books: Books, leader: int):
        queue(books, "x")
        assert books.tasks.claim(leader=leader, now=NOW, limit=1, kinds=["other"]) == []
        assert len(books.tasks.claim(leader=leader, now=NOW, limit=1, kinds=["k"])) == 1

    def test_what_an_earlier_leader_had_claimed_runs_again(self, books: Books, leader: int):
        queue(books, "x")
        (old,) = books.tasks.claim(leader=leader, now=NOW, limit=1)
        new = lead(books, "two", seconds=20)
        (again,) = books.tasks.claim(leader=new, now=NOW, limit=1)
        assert (again.id, again.attempts) == (old.id, 2)
        for call in (
            lambda: books.tasks.done(old, leader=leader, now=NOW),
            lambda: books.tasks.failed(old, "", leader=leader, now=NOW),
            lambda: books.tasks.done(old, leader=new, now=NOW),
            lambda: books.tasks.claim(leader=leader, now=NOW, limit=1),
        ):
            with pytest.raises(StaleEpoch):
                call()
        books.tasks.done(again, leader=new, now=NOW)

    def test_another_tenants_task_reads_as_none(self, books: Books, leader: int):
        task = queue(books, "x")
        with pytest.raises(NotFound):
            books.tasks.get(B, task.id)
        assert books.tasks.page(tenant=B) == []
        assert [t.id for t in books.tasks.page(tenant=A)] == [task.id]

    def test_depth_and_age_are_told(self, books: Books, leader: int):
        for n in range(3):
            queue(books, str(n))
        queue(books, "b", tenant=B)
        books.tasks.claim(leader=leader, now=NOW, limit=1)
        stats = books.tasks.stats(now=at(60))
        assert stats.by_state == {"waiting": 3, "running": 1, "done": 0, "dead": 0}
        assert stats.oldest_due == NOW
        assert books.tasks.stats(now=at(60), tenant=B).by_state["waiting"] == 1
        assert books.tasks.stats(now=NOW - timedelta(seconds=1)).oldest_due is None

    def test_done_tasks_are_pruned_in_time(self, books: Books, leader: int):
        task = queue(books, "x")
        (claimed,) = books.tasks.claim(leader=leader, now=NOW, limit=1)
        books.tasks.done(claimed, leader=leader, now=NOW)
        assert books.tasks.prune(before=NOW) == 0
        assert books.tasks.prune(before=at(1)) == 1
        with pytest.raises(NotFound):
            books.tasks.get(A, task.id)
