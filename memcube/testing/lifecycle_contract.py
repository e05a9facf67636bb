"""What the catalog's time machine, snapshots, archives and proposals must do on every engine. An
engine's tests inherit ``LifecycleContract`` and give a ``catalog`` fixture: an empty, migrated one."""

from datetime import datetime, timedelta
from typing import Any

import pytest

from memcube.catalog import (
    ArchiveRecord,
    Catalog,
    ChangeKind,
    Idempotency,
    KvPlace,
    NewAdapter,
    NewProposal,
    Proposal,
    ProposalKind,
    ProposalState,
    RolledBack,
)
from memcube.catalog.proposals import KEPT
from memcube.catalog.schema import metadata
from memcube.catalog.state_log import FORGOTTEN_KEPT
from memcube.cube import Draft, MemCube, Scope
from memcube.errors import (
    BadRequest,
    Conflict,
    Frozen,
    IdempotencyMismatch,
    LimitExceeded,
    NotFound,
)
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import Event, State
from memcube.testing.catalog_contract import NOW, A, B, add_one, at, composite, update

ANN = Scope(tenant=A, user_id="ann")


def ann(catalog: Catalog, text: str, seconds: float = 0, **draft: Any) -> MemCube:
    return add_one(catalog, text, now=at(seconds), user_id="ann", **draft)


def event(catalog: Catalog, cube: MemCube, event: Event, seconds: float) -> MemCube:
    return catalog.cubes.transition(A, cube.id, event, author="key", now=at(seconds))


def fuse(catalog: Catalog, *cubes: MemCube, seconds: float, text: str = "both") -> MemCube:
    draft = Draft(text=text, user_id="ann")
    ids = [cube.id for cube in cubes]
    return catalog.cubes.fuse(A, ids, draft, author="key", now=at(seconds))


def back(catalog: Catalog, to: float, *, now: float = 1000, **rest: Any) -> RolledBack:
    rest = {"limit": 100, "scope": ANN} | rest
    scope = rest.pop("scope")
    return catalog.past.rollback(scope, to=at(to), author="key", now=at(now), **rest)


def shown(catalog: Catalog, seconds: float, scope: Scope = ANN) -> dict[str, str]:
    """Text and state of what a scope held at a time, by id."""
    page = catalog.past.find(scope, as_of=at(seconds), now=at(5000), limit=100)
    return {cube.text: str(cube.state) for cube in page.cubes}


def live(catalog: Catalog, seconds: float = 5000) -> set[str]:
    """The texts that a search may find."""
    page = catalog.cubes.find(A, now=at(seconds), limit=100)
    return {c.text for c in page.cubes if c.state in ("generated", "activated")}


def differences(catalog: Catalog, since: float, until: float, **rest: Any) -> dict[CubeId, Any]:
    rest = {"limit": 100} | rest
    found = catalog.past.compare(ANN, since=at(since), until=at(until), now=at(5000), **rest)
    return {one.id: one for one in found.differences}


def propose(catalog: Catalog, *cubes: MemCube, **rest: Any) -> Proposal:
    new = {"kind": ProposalKind.DUPLICATE, "text": "both"} | rest
    versions = {cube.id: cube.version for cube in cubes}
    (made,) = catalog.proposals.note(A, [NewProposal(cubes=versions, **new)], now=NOW)
    return made


def accept(catalog: Catalog, made: Proposal, *, tenant: TenantId = A) -> tuple[Proposal, MemCube]:
    draft = Draft(text=made.text, user_id="ann")
    return catalog.proposals.apply(tenant, made.id, draft, author="key", now=at(9))


class LifecycleContract:
    """Inherit, and give ``catalog``."""

    @pytest.fixture(autouse=True)
    def two_tenants(self, catalog: Catalog) -> None:
        for tenant in (A, B):
            catalog.access.ensure_tenant(tenant, shards=1, now=NOW)

    # -- as of a time --------------------------------------------------------------------------

    def test_a_scope_is_read_as_it_was_at_a_time(self, catalog: Catalog):
        tea, milk = ann(catalog, "tea"), ann(catalog, "milk", 10)
        update(catalog, tea.id, text="coffee", now=at(20))
        event(catalog, milk, Event.ARCHIVE, 30)
        add_one(catalog, "bob's", user_id="bob")
        assert shown(catalog, -1) == {}
        assert shown(catalog, 5) == {"tea": "generated"}
        assert shown(catalog, 19) == {"tea": "generated", "milk": "generated"}
        assert shown(catalog, 20) == {"coffee": "generated", "milk": "generated"}
        assert shown(catalog, 30) == {"coffee": "generated", "milk": "archived"}

    def test_what_was_merged_and_restored_had_those_states_then(self, catalog: Catalog):
        one, two = ann(catalog, "one"), ann(catalog, "two")
        fuse(catalog, one, two, seconds=10)
        event(catalog, one, Event.RESTORE, 20)
        merged = {"one": "merged", "two": "merged", "both": "generated"}
        assert shown(catalog, 9) == {"one": "generated", "two": "generated"}
        assert shown(catalog, 10) == merged
        assert shown(catalog, 20) == merged | {"one": "activated"}

    def test_what_was_deleted_since_is_in_no_past(self, catalog: Catalog):
        tea = ann(catalog, "tea")
        ann(catalog, "milk", expires_at=at(50))
        catalog.cubes.delete(A, tea.id, now=at(10))
        assert shown(catalog, 5) == {}
        page = catalog.past.find(ANN, as_of=at(5), now=at(49), limit=9)
        assert [cube.text for cube in page.cubes] == ["milk"]

    def test_a_past_is_paged_and_stays_in_its_tenant(self, catalog: Catalog):
        made = [ann(catalog, f"{n}", n) for n in range(5)]
        add_one(catalog, "theirs", tenant=B, user_id="ann")
        texts, cursor = [], None
        for _ in range(3):
            page = catalog.past.find(ANN, as_of=at(9), now=at(9), limit=2, cursor=cursor)
            texts += [cube.text for cube in page.cubes]
            cursor = page.next_cursor
        assert cursor is None
        assert texts == [cube.text for cube in reversed(made)]
        with pytest.raises(BadRequest):
            catalog.past.find(ANN, as_of=at(9), now=at(9), limit=2, cursor="!")

    # -- two times -----------------------------------------------------------------------------

    def test_two_times_differ_by_what_was_added_changed_moved_and_deleted(self, catalog: Catalog):
        kept, tea, milk, gone = (ann(catalog, text) for text in ("kept", "tea", "milk", "gone"))
        update(catalog, tea.id, text="coffee", now=at(20))
        new = ann(catalog, "new", 21)
        update(catalog, new.id, text="newer", now=at(22))
        event(catalog, milk, Event.ARCHIVE, 23)
        catalog.cubes.delete(A, gone.id, now=at(24))
        found = differences(catalog, 10, 30)
        assert {id: str(one.kind) for id, one in found.items()} == {
            tea.id: "changed",
            new.id: "added",
            milk.id: "moved",
            gone.id: "deleted",
        }
        before, after = found[tea.id].before, found[tea.id].after
        assert (before.text, before.version, after.text, after.version) == ("tea", 1, "coffee", 2)
        assert (found[new.id].before, found[new.id].after.text) == (None, "newer")
        assert found[milk.id].state_after is State.ARCHIVED
        assert (found[gone.id].before, found[gone.id].after) == (None, None)
        assert kept.id not in found

    def test_only_what_lies_between_the_times_counts(self, catalog: Catalog):
        tea = ann(catalog, "tea")
        update(catalog, tea.id, text="coffee", now=at(20))
        ann(catalog, "later", 40)
        assert differences(catalog, 20, 30) == {}
        assert list(differences(catalog, 19.999, 20)) == [tea.id]
        assert differences(catalog, 10, 30)[tea.id].kind is ChangeKind.CHANGED
        assert differences(catalog, 20, 20) == {}
        with pytest.raises(BadRequest):
            differences(catalog, 21, 20)

    def test_a_change_that_was_taken_back_is_no_difference(self, catalog: Catalog):
        tea = ann(catalog, "tea")
        update(catalog, tea.id, text="coffee", now=at(10))
        catalog.cubes.rollback(A, tea.id, 1, author="key", now=at(20))
        event(catalog, tea, Event.ARCHIVE, 21)
        event(catalog, tea, Event.RESTORE, 22)
        assert differences(catalog, 5, 30) == {}

    def test_a_comparison_is_paged_over_deleted_ones_too(self, catalog: Catalog):
        made = [ann(catalog, f"{n}") for n in range(6)]
        for cube in made[::2]:
            catalog.cubes.delete(A, cube.id, now=at(20))
        for cube in made[1::2]:
            update(catalog, cube.id, text="x" + cube.text, now=at(20))
        ids, cursor = [], None
        for _ in range(3):
            page = catalog.past.compare(
                ANN, since=at(10), until=at(30), now=at(40), limit=2, cursor=cursor
            )
            ids += [one.id for one in page.differences]
            cursor = page.next_cursor
        assert cursor is None
        assert ids == sorted(cube.id for cube in made)

    def test_whose_a_wiped_cube_was_is_kept_as_a_digest_and_not_for_long(self, catalog: Catalog):
        secret = "zanzibar-31337"
        gone = add_one(catalog, "tea", user_id=secret, run_id=secret)
        catalog.cubes.delete_scope(A, user_id=secret, agent_id=None, run_id=None, now=at(20))
        scope = Scope(tenant=A, user_id=secret)

        def deleted(now: datetime) -> list[CubeId]:
            found = catalog.past.compare(scope, since=at(10), until=at(30), now=now, limit=9)
            return [one.id for one in found.differences]

        assert deleted(at(40)) == [gone.id]
        with catalog._database.reading() as connection:
            rows = [str(connection.execute(t.select()).all()) for t in metadata.sorted_tables]
        assert secret not in "".join(rows)
        catalog.cubes.prune(now=at(21) + FORGOTTEN_KEPT)
        assert deleted(at(40)) == []

    # -- back to a time ------------------------------------------------------------------------

    def test_a_scope_goes_back_to_what_it_was(self, catalog: Catalog):
        tea, milk, one, two = (ann(catalog, text) for text in ("tea", "milk", "one", "two"))
        update(catalog, tea.id, text="coffee", tags=("hot",), now=at(20))
        event(catalog, milk, Event.ARCHIVE, 21)
        both = fuse(catalog, one, two, seconds=22)
        new = ann(catalog, "new", 23)
        done = back(catalog, 10)
        assert live(catalog) == {"tea", "milk", "one", "two"}
        assert {id for id, _ in done.changed} == {tea.id, milk.id, one.id, two.id}
        assert {id for id, _ in done.out} == {both.id, new.id}
        assert done.cannot_restore == ()
        restored = catalog.cubes.get(A, tea.id, now=at(1001))
        assert (restored.version, restored.descriptive.tags) == (3, ())
        reasons = [v.reason for v in catalog.cubes.history(A, tea.id, now=at(1001))]
        assert reasons[-1] == f"rollback to {at(10).isoformat()}"
        assert catalog.cubes.get(A, new.id, now=at(1001)).state == "archived"

    def test_a_rollback_is_itself_in_the_past_and_can_be_rolled_back(self, catalog: Catalog):
        tea, milk = ann(catalog, "tea"), ann(catalog, "milk")
        update(catalog, tea.id, text="coffee", now=at(20))
        event(catalog, milk, Event.ARCHIVE, 21)
        new = ann(catalog, "new", 22)
        then = shown(catalog, 30)
        back(catalog, 10, now=100)
        back(catalog, 30, now=200)
        assert shown(catalog, 300).keys() == then.keys()
        assert live(catalog) == {"coffee", "new"}
        assert catalog.cubes.get(A, milk.id, now=at(300)).state == "archived"
        assert catalog.cubes.get(A, new.id, now=at(300)).version == 2

    def test_going_back_twice_changes_nothing_the_second_time(self, catalog: Catalog):
        tea = ann(catalog, "tea")
        update(catalog, tea.id, text="coffee", now=at(20))
        ann(catalog, "new", 21)
        back(catalog, 10, now=100)
        again = back(catalog, 10, now=200)
        assert (again.changed, again.out) == ((), ())
        assert catalog.cubes.get(A, tea.id, now=at(300)).version == 3

    def test_a_text_that_was_said_anew_since_makes_room_for_the_one_of_then(self, catalog: Catalog):
        tea = ann(catalog, "tea")
        update(catalog, tea.id, text="coffee", now=at(20))
        again = ann(catalog, "tea", 21)
        assert again.id != tea.id
        back(catalog, 10)
        assert live(catalog) == {"tea"}
        assert catalog.cubes.get(A, tea.id, now=at(2000)).text == "tea"
        assert ann(catalog, "tea", 3000).id == tea.id

    def test_what_was_wiped_since_is_told_and_stays_wiped(self, catalog: Catalog):
        gone, kept = ann(catalog, "gone"), ann(catalog, "kept")
        whole = composite(catalog, gone.id, kept.id, user_id="ann")
        other = add_one(catalog, "bob's", user_id="bob")
        catalog.cubes.delete(A, gone.id, now=at(20))
        catalog.cubes.delete(A, other.id, now=at(20))
        update(catalog, kept.id, text="changed", now=at(21))
        done = back(catalog, 10)
        assert [(one.id, one.at) for one in done.cannot_restore] == [(gone.id, at(20))]
        with pytest.raises(NotFound):
            catalog.cubes.get(A, gone.id, now=at(2000))
        assert catalog.cubes.get(A, whole.id, now=at(2000)).members == (kept.id,)
        assert live(catalog) == {"kept", ""}

    def test_a_frozen_cube_that_would_change_stops_all_of_it(self, catalog: Catalog):
        tea, milk, still = (ann(catalog, text) for text in ("tea", "milk", "still"))
        for cube in (tea, milk):
            update(catalog, cube.id, text="new " + cube.text, now=at(20))
        for cube in (milk, still):
            catalog.cubes.set_frozen(A, cube.id, True, now=at(21))
        with pytest.raises(Frozen):
            back(catalog, 10)
        assert live(catalog) == {"new tea", "new milk", "still"}
        catalog.cubes.set_frozen(A, milk.id, False, now=at(22))
        back(catalog, 10)
        assert live(catalog) == {"tea", "milk", "still"}

    def test_going_back_drops_kv_and_retires_the_adapters_of_what_reads_otherwise_then(
        self, catalog: Catalog
    ):
        tea, tagged, new = ann(catalog, "tea"), ann(catalog, "tagged"), ann(catalog, "new", 15)
        update(catalog, tea.id, text="coffee", now=at(20))
        update(catalog, tagged.id, tags=("x",), now=at(20))
        held = [(tea, 2), (tagged, 2), (new, 1)]
        for cube, version in held:
            about = {"scope": ANN, "base": "f" * 64, "sha256": "0" * 64, "size_bytes": 1, "rank": 1}
            inside = {cube.id: version}
            made = NewAdapter(name=cube.text, cubes=inside, **about)
            record = catalog.adapters.add(A, made, now=at(21))
            catalog.adapters.activate(A, record.line.id, 1, now=at(22))
            places = [KvPlace(medium="device", location="n", size_bytes=7)]
            assert catalog.kv.mark(A, cube.id, inside, places, now=at(23)) == []
        back(catalog, 10)
        states = {r.line.name: str(r.state) for r in catalog.adapters.versions(A)}
        assert states == {"tea": "retired", "new": "retired", "tagged": "serving"}
        for cube, _ in held:
            assert catalog.cubes.residency(A, cube.id, now=at(2000)) == []

    def test_more_than_the_limit_is_refused_whole(self, catalog: Catalog):
        for n in range(3):
            ann(catalog, f"{n}", 20)
        with pytest.raises(LimitExceeded):
            back(catalog, 10, limit=2)
        assert len(live(catalog)) == 3

    def test_a_retry_key_gives_the_same_answer_and_no_second_effect(self, catalog: Catalog):
        tea, gone = ann(catalog, "tea"), ann(catalog, "gone")
        update(catalog, tea.id, text="coffee", now=at(20))
        catalog.cubes.delete(A, gone.id, now=at(20))
        key = Idempotency(key="k", body_hash="h")
        first = back(catalog, 10, now=100, idempotency=key)
        update(catalog, tea.id, text="third", now=at(110))
        again = back(catalog, 10, now=200, idempotency=key)
        assert again.replayed
        assert (again.changed, again.out, again.cannot_restore) == (
            first.changed,
            first.out,
            first.cannot_restore,
        )
        assert catalog.cubes.get(A, tea.id, now=at(300)).text == "third"
        with pytest.raises(IdempotencyMismatch):
            back(catalog, 10, idempotency=Idempotency(key="k", body_hash="other"))

    def test_another_scope_and_another_tenant_are_left_alone(self, catalog: Catalog):
        mine = ann(catalog, "mine", 20)
        bobs = add_one(catalog, "bob's", user_id="bob", now=at(20))
        theirs = add_one(catalog, "theirs", tenant=B, user_id="ann", now=at(20))
        done = back(catalog, 10)
        assert [id for id, _ in done.out] == [mine.id]
        assert catalog.cubes.get(A, bobs.id, now=at(2000)).state == "generated"
        assert catalog.cubes.get(B, theirs.id, now=at(2000)).state == "generated"

    # -- snapshots -----------------------------------------------------------------------------

    def test_a_snapshot_is_found_by_id_and_name_and_listed_until_it_is_deleted(
        self, catalog: Catalog
    ):
        made = catalog.snapshots.create(ANN, "before", at=at(5), author="key", now=at(9))
        assert (made.scope, made.at) == (ANN, at(5))
        assert catalog.snapshots.get(A, made.id) == catalog.snapshots.get(A, "before") == made
        later = catalog.snapshots.create(ANN, "later", at=at(6), author="key", now=at(9))
        assert catalog.snapshots.all(A) == [later, made]
        catalog.snapshots.delete(A, made.id)
        assert catalog.snapshots.all(A) == [later]
        for tenant, id in ((A, made.id), (B, later.id), (B, "later")):
            with pytest.raises(NotFound):
                catalog.snapshots.get(tenant, id)
            with pytest.raises(NotFound):
                catalog.snapshots.delete(tenant, id)

    def test_a_name_is_taken_once_in_a_tenant(self, catalog: Catalog):
        made = catalog.snapshots.create(ANN, "n", at=at(5), author="key", now=at(9))
        assert catalog.snapshots.create(ANN, "n", at=at(5), author="key", now=at(20)) == made
        with pytest.raises(Conflict):
            catalog.snapshots.create(ANN, "n", at=at(6), author="key", now=at(9))
        theirs = Scope(tenant=B, user_id="ann")
        catalog.snapshots.create(theirs, "n", at=at(6), author="key", now=at(9))

    def test_a_forgotten_scope_takes_its_snapshots_along(self, catalog: Catalog):
        ann(catalog, "tea")
        for name, scope in (
            ("hers", ANN),
            ("her trip", Scope(tenant=A, user_id="ann", run_id="trip")),
            ("all", Scope(tenant=A)),
            ("bob's", Scope(tenant=A, user_id="bob")),
            ("theirs", Scope(tenant=B, user_id="ann")),
        ):
            catalog.snapshots.create(scope, name, at=at(5), author="key", now=at(9))
        catalog.cubes.delete_scope(A, user_id="ann", agent_id=None, run_id=None, now=at(10))
        assert {s.name for s in catalog.snapshots.all(A)} == {"all", "bob's"}
        assert {s.name for s in catalog.snapshots.all(B)} == {"theirs"}

    # -- expiry --------------------------------------------------------------------------------

    def test_what_has_run_out_is_noted_then_wiped_after_its_retention(self, catalog: Catalog):
        made = ann(catalog, "canary", expires_at=at(10))
        week = timedelta(days=7)

        def sweep(when: datetime) -> int:
            return catalog.cubes.expire_due(now=when, limit=9, retention=week)

        assert sweep(at(9)) == 0
        assert sweep(at(10)) == 1
        assert catalog.index.stats(A).cubes_by_state == {"expired": 1}
        with pytest.raises(NotFound):
            catalog.cubes.get(A, made.id, now=at(11))
        assert self._holds(catalog, "canary")
        assert sweep(at(9) + week) == 0
        assert self._holds(catalog, "canary")
        assert sweep(at(10) + week) == 0
        assert not self._holds(catalog, "canary")
        assert catalog.index.stats(A).cubes_by_state == {"expired": 1}

    def test_what_has_run_out_and_is_kept_is_in_no_answer(self, catalog: Catalog):
        key = Idempotency(key="k", body_hash="h")
        draft = Draft(text="canary", user_id="ann", expires_at=at(10))
        catalog.cubes.add(A, [draft], author="key", now=NOW, idempotency=key)
        catalog.cubes.expire_due(now=at(10), limit=9, retention=timedelta(days=7))
        replayed = catalog.cubes.replayed(A, key, now=at(11))
        assert replayed is not None
        assert replayed.results[0].cube.text == ""
        assert shown(catalog, 5) == {}
        assert catalog.cubes.find(A, now=at(11), limit=9).cubes == []
        assert ann(catalog, "canary", 12).version == 1
        assert [one.kind for one in differences(catalog, 5, 11).values()] == [ChangeKind.DELETED]

    def test_a_forgotten_scope_wipes_also_what_had_run_out(self, catalog: Catalog):
        ann(catalog, "canary", expires_at=at(10))
        catalog.cubes.expire_due(now=at(10), limit=9, retention=timedelta(days=7))
        none = catalog.cubes.delete_scope(A, user_id="ann", agent_id=None, run_id=None, now=at(11))
        assert none == {}
        assert not self._holds(catalog, "canary")

    # -- archives ------------------------------------------------------------------------------

    def test_an_archived_cube_waits_for_its_copy_until_it_is_noted(self, catalog: Catalog):
        tea = ann(catalog, "tea")
        assert catalog.archives.waiting(now=at(1), limit=9) == []
        event(catalog, tea, Event.ARCHIVE, 10)
        assert catalog.archives.waiting(now=at(11), limit=9) == [(A, tea.id)]
        assert catalog.archives.note(self._copy(tea))
        assert catalog.archives.waiting(now=at(11), limit=9) == []
        assert catalog.archives.of(A, tea.id) == self._copy(tea)
        assert catalog.archives.of(B, tea.id) is None
        assert catalog.archives.page(limit=9) == [self._copy(tea)]

    @pytest.mark.parametrize("how", ["restore", "delete", "expire"])
    def test_a_copy_is_doomed_by_what_ends_its_cubes_being_archived(
        self, catalog: Catalog, how: str
    ):
        tea = ann(catalog, "tea", expires_at=at(100))
        event(catalog, tea, Event.ARCHIVE, 10)
        catalog.archives.note(self._copy(tea))
        if how == "restore":
            event(catalog, tea, Event.RESTORE, 20)
        elif how == "delete":
            catalog.cubes.delete(A, tea.id, now=at(20))
        else:
            catalog.cubes.expire_due(now=at(100), limit=9)
        (doomed,) = catalog.archives.doomed(limit=9)
        assert doomed == self._copy(tea)
        assert catalog.archives.of(A, tea.id) is None
        assert catalog.archives.known([doomed.sha256]) == {doomed.sha256}
        catalog.archives.removed(doomed)
        assert catalog.archives.doomed(limit=9) == []

    def test_a_copy_that_comes_late_is_not_noted(self, catalog: Catalog):
        tea, milk = ann(catalog, "tea"), ann(catalog, "milk")
        for cube in (tea, milk):
            event(catalog, cube, Event.ARCHIVE, 10)
        event(catalog, tea, Event.RESTORE, 20)
        catalog.cubes.delete(A, milk.id, now=at(20))
        assert not catalog.archives.note(self._copy(tea))
        assert not catalog.archives.note(self._copy(milk))
        event(catalog, tea, Event.ARCHIVE, 21)
        assert not catalog.archives.note(self._copy(tea))

    # -- proposals -----------------------------------------------------------------------------

    def test_an_applied_proposal_merges_its_cubes_and_says_what_came_of_it(self, catalog: Catalog):
        one, two = ann(catalog, "one"), ann(catalog, "two")
        made = propose(catalog, one, two, why={"cosine": 0.97})
        assert (made.state, made.why) == (ProposalState.OPEN, {"cosine": 0.97})
        assert made.cubes == {one.id: 1, two.id: 1}
        done, cube = accept(catalog, made)
        assert (done.state, done.result, done.decided_by) == ("applied", cube.id, "key")
        assert live(catalog) == {"both"}
        assert catalog.cubes.get(A, one.id, now=at(10)).state == "merged"
        assert accept(catalog, made) == (done, cube)
        assert len(live(catalog)) == 1

    @pytest.mark.parametrize("how", ["update", "archive", "fuse", "expire"])
    def test_a_proposal_whose_cube_moved_on_is_outdated_and_refused(
        self, catalog: Catalog, how: str
    ):
        one, two, three = (ann(catalog, t, expires_at=at(7)) for t in ("one", "two", "three"))
        made = propose(catalog, one, two)
        if how == "update":
            update(catalog, one.id, text="new", now=at(5))
        elif how == "archive":
            event(catalog, one, Event.ARCHIVE, 5)
        elif how == "fuse":
            fuse(catalog, one, three, seconds=5)
        state = catalog.proposals.get(A, made.id, now=at(8 if how == "expire" else 6)).state
        assert state is ProposalState.OUTDATED
        before = live(catalog)
        with pytest.raises(Conflict):
            accept(catalog, made)
        assert live(catalog) == before

    def test_a_frozen_cube_stops_its_merge(self, catalog: Catalog):
        one, two = ann(catalog, "one"), ann(catalog, "two")
        made = propose(catalog, one, two)
        catalog.cubes.set_frozen(A, two.id, True, now=at(5))
        with pytest.raises(Frozen):
            accept(catalog, made)
        assert live(catalog) == {"one", "two"}
        assert catalog.proposals.get(A, made.id, now=at(6)).state is ProposalState.OPEN

    def test_the_same_is_proposed_once_also_after_it_was_dismissed(self, catalog: Catalog):
        one, two = ann(catalog, "one"), ann(catalog, "two")
        made = propose(catalog, one, two)
        again = NewProposal(
            kind=made.kind, cubes=dict(reversed(list(made.cubes.items()))), text="x"
        )
        assert catalog.proposals.note(A, [again], now=at(5)) == []
        gone = catalog.proposals.dismiss(A, made.id, author="key", now=at(5))
        assert gone.state is ProposalState.DISMISSED
        assert catalog.proposals.dismiss(A, made.id, author="other", now=at(6)) == gone
        assert catalog.proposals.note(A, [again], now=at(7)) == []
        with pytest.raises(Conflict):
            accept(catalog, made)
        update(catalog, one.id, text="new", now=at(8))
        anew = NewProposal(kind=made.kind, cubes={one.id: 2, two.id: 1}, text="x")
        assert len(catalog.proposals.note(A, [anew], now=at(9))) == 1

    def test_proposals_are_listed_by_state_and_stay_in_their_tenant(self, catalog: Catalog):
        cubes = [ann(catalog, f"{n}") for n in range(8)]
        outdated, dismissed, applied, opened = (
            propose(catalog, *cubes[n : n + 2]) for n in range(0, 8, 2)
        )
        update(catalog, cubes[0].id, text="new", now=at(5))
        catalog.proposals.dismiss(A, dismissed.id, author="key", now=at(5))
        accept(catalog, applied)

        def listed(state: str | None, tenant: TenantId = A) -> set[str]:
            given = None if state is None else ProposalState(state)
            found = catalog.proposals.find(tenant, state=given, limit=9, now=at(10))
            return {one.id for one in found}

        assert listed("open") == {opened.id}
        assert listed("outdated") == {outdated.id}
        assert listed("dismissed") == {dismissed.id}
        assert listed("applied") == {applied.id}
        assert len(listed(None)) == 4
        assert listed(None, B) == set()
        with pytest.raises(NotFound):
            accept(catalog, opened, tenant=B)
        with pytest.raises(NotFound):
            catalog.proposals.dismiss(B, opened.id, author="key", now=at(5))
        with pytest.raises(Conflict):
            catalog.proposals.dismiss(A, applied.id, author="key", now=at(11))
        first = catalog.proposals.find(A, limit=3, now=at(10))
        rest = catalog.proposals.find(A, limit=3, after=first[-1].id, now=at(10))
        assert len({one.id for one in (*first, *rest)}) == 4

    def test_a_wiped_cube_takes_its_proposals_along(self, catalog: Catalog):
        one, two = ann(catalog, "one"), ann(catalog, "two")
        made = propose(catalog, one, two, text="canary")
        assert self._holds(catalog, "canary")
        catalog.cubes.delete(A, one.id, now=at(5))
        assert not self._holds(catalog, "canary")
        with pytest.raises(NotFound):
            catalog.proposals.get(A, made.id, now=at(6))

    def test_old_decided_and_outdated_proposals_are_pruned(self, catalog: Catalog):
        cubes = [ann(catalog, f"{n}") for n in range(6)]
        outdated, dismissed, opened = (propose(catalog, *cubes[n : n + 2]) for n in (0, 2, 4))
        update(catalog, cubes[0].id, text="new", now=at(5))
        catalog.proposals.dismiss(A, dismissed.id, author="key", now=at(5))
        assert catalog.proposals.prune(now=NOW + KEPT) == 0
        assert catalog.proposals.prune(now=at(1) + KEPT) == 2
        (left,) = catalog.proposals.find(A, limit=9, now=at(10))
        assert (left.id, outdated.id != left.id) == (opened.id, True)

    @staticmethod
    def _copy(cube: MemCube) -> ArchiveRecord:
        return ArchiveRecord(
            tenant=cube.tenant,
            cube=cube.id,
            version=1,
            sha256="a" * 32 + cube.id.replace("-", ""),
            content_sha256="c" * 64,
            size_bytes=10,
            created_at=at(11),
        )

    @staticmethod
    def _holds(catalog: Catalog, text: str) -> bool:
        """Whether any row of any table holds it."""
        with catalog._database.reading() as connection:
            return any(
                text in str(connection.execute(table.select()).all())
                for table in metadata.sorted_tables
            )
