"""What the catalog's book of adapters must do on every engine. An engine's tests inherit
``AdaptersContract`` and give a ``catalog`` fixture: an empty, migrated catalog."""

import contextlib
from typing import Any

import pytest

from memcube.catalog import AdapterRecord, AdapterState, Catalog, NewAdapter
from memcube.cube import Draft, MemCube, Scope
from memcube.errors import BadRequest, Conflict, NotFound
from memcube.ids import CubeId
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


def note(catalog: Catalog, *cubes: MemCube, name: str = "ann", **other: Any) -> AdapterRecord:
    """A new version of an adapter that holds these cubes, as a candidate."""
    about = {
        "scope": Scope(tenant=A, user_id="ann"),
        "base": BASE,
        "sha256": "0" * 64,
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
        assert {r.line.name for r in catalog.adapters.stale(A)} == {"one", "two"}
        with pytest.raises(Conflict, match="stale"):
            activate(catalog, records[0])

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
