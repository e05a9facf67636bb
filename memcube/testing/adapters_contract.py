"""What the catalog's book of adapters must do on every engine. An engine's tests inherit
``AdaptersContract`` and give a ``catalog`` fixture: an empty, migrated catalog."""

import contextlib
import itertools
from typing import Any

import pytest

from memcube.catalog import AdapterRecord, AdapterState, Catalog, NewAdapter
from memcube.catalog.adapters import WRITTEN_BY
from memcube.cube import Draft, MemCube, Origin, Parent, Relation, Scope
from memcube.errors import BadRequest, Conflict, NotFound
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import Event
from memcube.testing.catalog_contract import (
    NOW,
    A,
    B,
    add_one,
    at,
    at_once,
    composite,
    update,
)

BASE = "f" * 64
_files = itertools.count()


def note(catalog: Catalog, *cubes: MemCube, name: str = "ann", **other: Any) -> AdapterRecord:
    """A new version of an adapter that holds these cubes, as a candidate."""
    about = {
        "scope": Scope(tenant=A, user_id="ann"),
        "base": BASE,
        "sha256": f"{next(_files):064x}",
        "size_bytes": 10,
        "rank": 16,
        "cubes": {cube.id: cube.version for cube in cubes},
    }
    return catalog.adapters.add(A, NewAdapter(name=name, **(about | other)), now=NOW)


def activate(catalog: Catalog, record: AdapterRecord, *, seconds: float = 0) -> AdapterRecord:
    return catalog.adapters.activate(A, record.line.id, record.version, now=at(seconds))


def state(catalog: Catalog, record: AdapterRecord) -> tuple[AdapterState, str]:
    found = catalog.adapters.get(A, record.line.id, record.version)
    return found.state, found.reason


def serving(catalog: Catalog, name: str = "ann", *, seconds: float = 0) -> int | None:
    """The version that serves, if any does."""
    try:
        return catalog.adapters.serving(A, name, base=BASE, now=at(seconds)).version
    except NotFound:
        return None


class AdaptersContract:
    """Inherit, and give ``catalog``."""

    @pytest.fixture(autouse=True)
    def two_tenants(self, catalog: Catalog) -> None:
        for tenant in (A, B):
            catalog.access.ensure_tenant(tenant, shards=1, now=NOW)

    def test_a_new_version_is_a_candidate_and_serves_when_it_is_activated(self, catalog: Catalog):
        made = note(catalog, add_one(catalog))
        assert (made.version, made.state, made.line.scope.user_id) == (1, "candidate", "ann")
        assert serving(catalog) is None
        assert activate(catalog, made).activated_at == NOW
        assert serving(catalog) == 1
        assert serving(catalog, made.line.id) == 1

    def test_one_version_of_a_line_serves(self, catalog: Catalog):
        cube = add_one(catalog)
        first, second = (note(catalog, cube) for _ in range(2))
        for record in (first, second, second):
            activate(catalog, record)
        assert serving(catalog) == 2
        assert state(catalog, first) == ("retired", "superseded")
        assert [r.version for r in catalog.adapters.versions(A)] == [2, 1]

    def test_what_serves_and_what_has_stopped_since(self, catalog: Catalog):
        cube, passing = add_one(catalog), add_one(catalog, text="t", expires_at=at(20))
        first, second = (note(catalog, cube) for _ in range(2))
        other = note(catalog, passing, name="other", base="0" * 64)
        for seconds, record in enumerate((first, second, other)):
            activate(catalog, record, seconds=seconds)

        def live(seconds: float) -> list[tuple[str, int]]:
            found = catalog.adapters.live(A, now=at(seconds))
            return sorted((record.line.name, record.version) for record in found)

        def stopped(since: float) -> list[int]:
            return [record.version for record in catalog.adapters.retired(A, since=at(since))]

        assert live(5) == [("ann", 2), ("other", 1)]
        assert live(21) == [("ann", 2)]
        assert catalog.adapters.live(B, now=at(5)) == []
        assert (stopped(1), stopped(2)) == ([1], [])
        catalog.cubes.delete(A, cube.id, now=at(30))
        assert live(30) == []
        assert sorted(stopped(30)) == [1, 2]  # the superseded one is stale from then on
        assert catalog.adapters.retired(B, since=at(0)) == []

    def test_a_rollback_lets_the_one_before_serve_again(self, catalog: Catalog):
        cube = add_one(catalog)
        records = [note(catalog, cube) for _ in range(3)]
        for seconds, record in enumerate(records):
            activate(catalog, record, seconds=seconds)
        id = records[0].line.id
        assert catalog.adapters.rollback(A, id, now=at(5)).version == 2
        assert state(catalog, records[2]) == ("retired", "rolled back")
        assert catalog.adapters.rollback(A, id, now=at(6)).version == 1
        with pytest.raises(Conflict, match="no earlier version"):
            catalog.adapters.rollback(A, id, now=at(7))
        assert serving(catalog) == 1

    @pytest.mark.parametrize("how", ["update", "archive", "delete", "fuse", "scope", "inner"])
    def test_a_change_of_a_cube_stops_every_adapter_that_holds_it(self, catalog: Catalog, how: str):
        leaf = add_one(catalog, "tea", user_id="ann")
        other = add_one(catalog, "milk")
        held = composite(catalog, leaf.id) if how == "inner" else leaf
        records = [note(catalog, held, other, name=name) for name in ("one", "two")]
        apart = note(catalog, other, name="apart")
        for record in (*records, apart):
            activate(catalog, record)
        if how in ("update", "inner"):
            update(catalog, leaf.id, text="coffee")
        elif how == "archive":
            catalog.cubes.transition(A, leaf.id, Event.ARCHIVE, author="key", now=NOW)
        elif how == "delete":
            catalog.cubes.delete(A, leaf.id, now=NOW)
        elif how == "scope":
            catalog.cubes.delete_scope(A, user_id="ann", agent_id=None, run_id=None, now=NOW)
        else:
            third = add_one(catalog, "bread")
            catalog.cubes.fuse(A, [leaf.id, third.id], Draft(text="both"), author="key", now=NOW)
        assert [state(catalog, record) for record in records] == [("retired", "stale")] * 2
        assert serving(catalog, "one") is None
        assert serving(catalog, "apart") == 1
        assert {r.line.name for r in catalog.adapters.to_train_anew()} == {"one", "two"}
        with pytest.raises(Conflict, match="stale"):
            activate(catalog, records[0])

    def test_the_same_file_of_the_same_cubes_is_one_candidate(self, catalog: Catalog):
        cube = add_one(catalog)
        first = note(catalog, cube, sha256="a" * 64)
        assert note(catalog, cube, sha256="a" * 64) == first
        assert note(catalog, cube, sha256="b" * 64).version == 2
        activate(catalog, note(catalog, cube, sha256="b" * 64))
        assert note(catalog, cube, sha256="b" * 64).version == 3

    def test_what_is_stale_is_trained_anew_until_a_later_version_was_activated(
        self, catalog: Catalog
    ):
        leaf, other = add_one(catalog), add_one(catalog, "milk")
        activate(catalog, note(catalog, leaf, other))
        note(catalog, leaf, name="never-served")
        catalog.cubes.delete(A, leaf.id, now=NOW)
        assert [r.version for r in catalog.adapters.to_train_anew()] == [1]
        second = note(catalog, other)
        assert [r.version for r in catalog.adapters.to_train_anew()] == [1]
        activate(catalog, second)
        assert catalog.adapters.to_train_anew() == []
        catalog.cubes.delete(A, other.id, now=NOW)
        assert [r.version for r in catalog.adapters.to_train_anew()] == [2]

    def test_files_of_stale_versions_are_to_be_erased_once(self, catalog: Catalog):
        leaf, other = add_one(catalog), add_one(catalog, "milk")
        gone = note(catalog, leaf, sha256="a" * 64)
        note(catalog, other, sha256="a" * 64, name="two")
        catalog.cubes.delete(A, leaf.id, now=NOW)
        (found,) = catalog.adapters.to_erase()
        assert (found.line.id, found.version) == (gone.line.id, 1)
        assert catalog.adapters.is_shared(found)
        catalog.adapters.erased(found, now=NOW)
        assert catalog.adapters.to_erase() == []

    def test_a_change_that_leaves_the_text_leaves_the_adapter(self, catalog: Catalog):
        cube = add_one(catalog)
        made = activate(catalog, note(catalog, cube))
        update(catalog, cube.id, tags=("drinks",))
        assert serving(catalog) == 1
        activate(catalog, note(catalog, cube))
        assert catalog.adapters.rollback(A, made.line.id, now=at(1)).version == 1

    def test_an_expiry_stops_it_at_its_time(self, catalog: Catalog):
        activate(catalog, note(catalog, add_one(catalog, expires_at=at(10))))
        assert serving(catalog, seconds=9) == 1
        assert serving(catalog, seconds=10) is None
        catalog.cubes.expire_due(now=at(11), limit=9)
        assert [record.reason for record in catalog.adapters.versions(A)] == ["stale"]

    def test_a_rollback_passes_over_what_is_stale(self, catalog: Catalog):
        tea, milk = add_one(catalog, "tea"), add_one(catalog, "milk")
        for seconds, cubes in enumerate([(milk,), (milk, tea), (milk,)]):
            activate(catalog, note(catalog, *cubes), seconds=seconds)
        catalog.cubes.delete(A, tea.id, now=NOW)
        id = catalog.adapters.versions(A)[0].line.id
        assert catalog.adapters.rollback(A, id, now=at(5)).version == 1

    def test_a_cube_that_moved_on_while_it_was_trained_on_is_a_conflict(self, catalog: Catalog):
        cube, foreign = add_one(catalog), add_one(catalog, tenant=B)
        update(catalog, cube.id, text="coffee")
        for held in (cube, foreign):
            with pytest.raises(Conflict, match="have changed"):
                note(catalog, held)
        assert catalog.adapters.versions(A) == []

    def test_a_delete_that_races_an_activation_wins(self, catalog: Catalog):
        for n in range(8):
            cube = add_one(catalog, f"tea {n}")
            made = note(catalog, cube, name=f"n{n}")

            def try_it(made: AdapterRecord = made) -> None:
                with contextlib.suppress(Conflict):
                    activate(catalog, made)

            at_once([try_it, lambda id=cube.id: catalog.cubes.delete(A, id, now=NOW)])
            assert serving(catalog, f"n{n}") is None
            assert state(catalog, made) == ("retired", "stale")

    def test_lineage_goes_both_ways(self, catalog: Catalog):
        tea, milk = add_one(catalog, "tea"), add_one(catalog, "milk")
        first = note(catalog, tea, milk)
        second = note(catalog, tea)
        assert catalog.adapters.inside(A, first.line.id, 1) == {tea.id: 1, milk.id: 1}
        assert catalog.adapters.inside(A, second.line.id, 2) == {tea.id: 1}
        found = [
            (h.adapter, h.version, h.cube_version) for h in catalog.adapters.holding(A, tea.id)
        ]
        assert found == [(first.line.id, 1, 1), (first.line.id, 2, 1)]
        assert catalog.adapters.holding(A, CubeId("unknown")) == []

    def test_another_tenant_finds_nothing(self, catalog: Catalog):
        cube = add_one(catalog)
        made = activate(catalog, note(catalog, cube))
        id = made.line.id
        calls = [
            lambda: catalog.adapters.get(B, id, 1),
            lambda: catalog.adapters.inside(B, id, 1),
            lambda: catalog.adapters.activate(B, id, 1, now=NOW),
            lambda: catalog.adapters.rollback(B, id, now=NOW),
            lambda: catalog.adapters.stop(B, id, now=NOW),
            lambda: catalog.adapters.serving(B, "ann", base=BASE, now=NOW),
        ]
        for call in calls:
            with pytest.raises(NotFound):
                call()
        assert catalog.adapters.versions(B) == []
        assert catalog.adapters.holding(B, cube.id) == []
        assert serving(catalog) == 1

    def test_what_an_adapter_said_of_a_cube_is_found_by_the_cube(self, catalog: Catalog) -> None:
        tea, milk = add_one(catalog, "tea"), add_one(catalog, "milk")

        def child(text: str, **given: Any) -> MemCube:
            edge = Parent(id=tea.id, version=1, relation=given.pop("relation", Relation.DERIVED))
            about = {"origin": Origin.INFERENCE, "metadata": {WRITTEN_BY: "0" * 64}} | given
            draft = Draft(text=text, user_id="ann", parents=(edge,), **about)
            return catalog.cubes.add(A, [draft], author="k", now=NOW).results[0].cube

        said = child("she likes tea")
        child("by a reader", metadata={})
        child("by a person", origin=Origin.USER_INPUT)
        child("composed", relation=Relation.COMPOSED)
        gone = child("she liked tea", expires_at=at(60))

        def found(*cubes: MemCube, tenant: TenantId = A, seconds: float = 0) -> set[CubeId]:
            ids = [cube.id for cube in cubes]
            return {*catalog.adapters.written_back(tenant, ids, now=at(seconds))}

        assert found(tea, milk) == {said.id, gone.id}
        assert found(tea, seconds=60) == {said.id}
        assert found(milk) == found() == found(tea, tenant=B) == set()
        catalog.cubes.delete(A, said.id, now=NOW)
        assert found(tea, seconds=60) == set()

    def test_it_serves_its_own_scope_and_base_alone(self, catalog: Catalog):
        ann, everyone = Scope(tenant=A, user_id="ann"), Scope(tenant=A)
        activate(catalog, note(catalog, add_one(catalog)))
        book = catalog.adapters
        found = book.serving_scope(ann, base=BASE, now=NOW)
        assert found is not None
        assert found.line.name == "ann"
        assert book.serving_scope(everyone, base=BASE, now=NOW) is None
        assert book.serving_scope(ann, base="0" * 64, now=NOW) is None
        with pytest.raises(NotFound):
            book.serving(A, "ann", base="0" * 64, now=NOW)
        with pytest.raises(Conflict, match="another scope"):
            note(catalog, add_one(catalog), scope=everyone)

    def test_a_stopped_adapter_does_not_serve_and_can_again(self, catalog: Catalog):
        made = activate(catalog, note(catalog, add_one(catalog)))
        for _ in range(2):
            catalog.adapters.stop(A, made.line.id, now=NOW)
        assert serving(catalog) is None
        activate(catalog, made)
        assert serving(catalog) == 1

    @pytest.mark.parametrize("name", ["", "A", "a b", "a:b", "-a", "a" * 64, "a\n"])
    def test_a_name_outside_the_alphabet_is_refused(self, catalog: Catalog, name: str):
        with pytest.raises(BadRequest):
            note(catalog, add_one(catalog), name=name)

    def test_an_adapter_without_cubes_is_refused(self, catalog: Catalog):
        with pytest.raises(BadRequest, match="cubes"):
            note(catalog)
