"""What every plaintext store must do. A store's tests inherit ``PlaintextContract`` and give a
``store`` fixture of an empty store of ``SPEC``."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memcube.cube import slot
from memcube.filters import And, Compare, Filter, Not, Op, Or, parse_filter
from memcube.ids import CubeId, TenantId, uuid7
from memcube.tiers.memory import MemoryStore, matches
from memcube.tiers.plaintext import IndexedCube, IndexSpec, PlaintextStore

DIM = 8
SPEC = IndexSpec(embedder="test@1", dim=DIM)
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
A, B = TenantId("a"), TenantId("b")


def unit(*weights: float) -> np.ndarray:
    """A unit vector that begins with these weights."""
    vector = np.zeros(DIM, dtype=np.float32)
    vector[: len(weights)] = weights
    return vector / np.linalg.norm(vector)


def cube(text: str, vector: np.ndarray | None = None, **header: Any) -> IndexedCube:
    given = {
        "id": uuid7(NOW),
        "tenant": A,
        "version": 1,
        "kind": "episode",
        "state": "generated",
        "created_at": NOW,
        "updated_at": NOW,
    }
    return IndexedCube(
        text=text, vector=unit(1.0) if vector is None else vector, **(given | header)
    )


async def found(store: PlaintextStore, where: Any, *, tenant: TenantId = A) -> set[str]:
    """Texts of the cubes that a dense search finds under a filter."""
    condition = parse_filter(where) if isinstance(where, dict) or where is None else where
    hits = await store.search_dense(tenant, unit(1.0), where=condition, now=NOW, limit=1000)
    return {c.text for c in await store.get(tenant, [hit.id for hit in hits])}


_VALUES = st.one_of(
    st.sampled_from(["a", "b", "ab", "A", "", 1, 2, 1.5, 1.0, True, False, "1", "2026-01-01"]),
    st.floats(min_value=-2, max_value=2),
)
_DAYS = st.integers(0, 3).map(lambda day: datetime(2026, 1, 1 + day, tzinfo=UTC))
_NAMES = st.sampled_from(["a", "ab", "B"])
_HEADERS = st.fixed_dictionaries(
    {"version": st.integers(1, 3), "created_at": _DAYS},
    optional={
        "metadata": st.fixed_dictionaries(
            {},
            optional={
                "x": st.one_of(_VALUES, st.lists(_VALUES, max_size=3)),
                "y.z": _VALUES,
                "y": st.fixed_dictionaries({"z": _VALUES}),
            },
        ),
        "speaker": _NAMES,
        "user_id": _NAMES,
        "event_time": _DAYS,
        "tags": st.lists(_NAMES, max_size=2).map(tuple),
    },
)
_KEYS = st.sampled_from(["metadata.x", "metadata.y.z"])
_TEXT_FIELDS = st.sampled_from(["speaker", "user_id", "tags"])
_RANGES = st.sampled_from([Op.GT, Op.GTE, Op.LT, Op.LTE])
_CONDITIONS = st.one_of(
    st.builds(Compare, _KEYS, st.sampled_from([Op.EQ, Op.NE, Op.CONTAINS]), _VALUES),
    st.builds(
        Compare,
        _KEYS,
        st.sampled_from([Op.IN, Op.NIN]),
        st.lists(_VALUES, min_size=1, max_size=3).map(tuple),
    ),
    st.builds(
        Compare,
        _KEYS,
        _RANGES,
        st.one_of(st.sampled_from([1, 1.5, 2]), st.floats(min_value=-2, max_value=2), _DAYS),
    ),
    st.builds(Compare, _TEXT_FIELDS, st.sampled_from([Op.EQ, Op.NE, Op.CONTAINS]), _NAMES),
    st.builds(Compare, st.sampled_from(["created_at", "event_time"]), _RANGES, _DAYS),
    st.builds(Compare, st.just("event_time"), st.sampled_from([Op.EQ, Op.NE]), _DAYS),
    st.builds(Compare, st.just("version"), _RANGES, st.integers(0, 4)),
)
_FILTERS: st.SearchStrategy[Filter] = st.recursive(
    _CONDITIONS,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: And(tuple(parts))),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: Or(tuple(parts))),
    ),
    max_leaves=5,
)


class PlaintextContract:
    """The suite. Each test's name says what must hold."""

    async def test_a_put_cube_is_found_and_read_back_whole(self, store: PlaintextStore):
        put = cube(
            "Ann likes kumquat tea",
            user_id="u",
            agent_id="g",
            run_id="r",
            role="user",
            speaker="Ann",
            tags=("x", "y"),
            metadata={"n": 1, "deep": {"a": [1, None]}, "f": 0.5},
            event_time=NOW - timedelta(days=1),
            slot=slot("t", 3),
            thread="t",
            seq=3,
        )
        await store.put([put])
        (read,) = await store.get(A, [put.id], with_vectors=True)
        assert (read.id, read.version, read.text) == (put.id, 1, put.text)
        for name in (
            "user_id",
            "agent_id",
            "run_id",
            "role",
            "speaker",
            "event_time",
            "slot",
            "seq",
        ):
            assert read.payload[name] == getattr(put, name), name
        assert read.payload["created_at"] == NOW
        assert list(read.payload["tags"]) == ["x", "y"]
        assert read.payload["metadata"] == {"n": 1, "deep": {"a": [1, None]}, "f": 0.5}
        assert read.vector is not None
        np.testing.assert_allclose(read.vector, put.vector, atol=1e-6)

    async def test_get_keeps_the_order_asked_for_and_leaves_out_what_is_not_there(self, store):
        cubes = [cube(f"t{i}") for i in range(4)]
        await store.put(cubes)
        asked = [cubes[2].id, uuid7(NOW), cubes[0].id]
        assert [c.text for c in await store.get(A, asked)] == ["t2", "t0"]

    async def test_dense_is_best_first_by_cosine(self, store):
        await store.put(
            [cube("far", unit(0, 1)), cube("near", unit(1, 0.1)), cube("mid", unit(1, 1))]
        )
        hits = await store.search_dense(A, unit(1.0), where=None, now=NOW, limit=2)
        texts = [c.text for c in await store.get(A, [h.id for h in hits])]
        assert texts == ["near", "mid"]
        assert hits[1].score == pytest.approx(1 / np.sqrt(2), abs=1e-3)

    async def test_sparse_is_bm25_and_returns_only_cubes_that_share_a_term(self, store):
        await store.put(
            [
                cube("the kumquat tree bears kumquats"),
                cube("a kumquat and many other words about a garden and its long history"),
                cube("tea"),
            ]
        )
        hits = await store.search_sparse(A, "kumquat?", where=None, now=NOW, limit=9)
        texts = [c.text for c in await store.get(A, [h.id for h in hits])]
        assert [t.split()[1] for t in texts] == ["kumquat", "kumquat"]
        assert texts[0].startswith("the")
        assert await store.search_sparse(A, "the of and", where=None, now=NOW, limit=9) == []

    async def test_a_speakers_name_counts_as_text(self, store):
        await store.put(
            [cube("hello there", speaker="Ann"), cube("hello there you", speaker="Bob")]
        )
        (hit,) = await store.search_sparse(A, "Ann", where=None, now=NOW, limit=9)
        assert (await store.get(A, [hit.id]))[0].payload["speaker"] == "Ann"

    async def test_scores_depend_on_no_cube_of_another_tenant_or_outside_the_filter(self, store):
        mine = [cube("kumquat", user_id="u"), cube("pear", user_id="u")]
        await store.put(mine)
        where = Compare("user_id", Op.EQ, "u")

        async def scores() -> list[float]:
            hits = await store.search_sparse(A, "kumquat", where=where, now=NOW, limit=9)
            return [hit.score for hit in hits]

        before = await scores()
        await store.put([cube("kumquat", tenant=B, user_id="u") for _ in range(5)])
        await store.put([cube("kumquat", user_id="other") for _ in range(5)])
        assert await scores() == pytest.approx(before)

    async def test_no_read_crosses_a_tenant(self, store):
        mine, foreign = cube("mine", slot=1), cube("foreign", tenant=B, slot=1, speaker="Spy")
        await store.put([mine, foreign])
        assert await found(store, None) == {"mine"}
        assert await store.get(A, [foreign.id]) == []
        assert await store.count(A, where=None, now=NOW) == 1
        assert await store.speakers(A, where=None, now=NOW, limit=9) == []
        hits = await store.search_sparse(A, "foreign", where=None, now=NOW, limit=9)
        assert hits == []
        slots = await store.score_slots(
            A, [1], vector=unit(1.0), text="foreign", where=None, now=NOW
        )
        assert [s.id for s in slots] == [mine.id]

    async def test_a_tenants_put_and_delete_of_a_foreign_id_leave_the_foreign_cube(self, store):
        foreign = cube("foreign", tenant=B)
        await store.put([foreign])
        await store.put([cube("mine", id=foreign.id)])
        await store.delete(A, {foreign.id: 9})
        assert await found(store, None, tenant=B) == {"foreign"}

    async def test_put_is_idempotent_and_never_goes_back_a_version(self, store):
        first = cube("one")
        second = cube("two", id=first.id, version=2)
        await store.put([first])
        await store.put([second])
        await store.put([first])
        await store.put([second])
        assert await found(store, None) == {"two"}
        assert await store.count(A, where=None, now=NOW) == 1

    async def test_of_two_versions_in_one_put_the_newer_stays(self, store):
        first = cube("one")
        await store.put([cube("two", id=first.id, version=2), first])
        assert await found(store, None) == {"two"}

    async def test_a_late_put_does_not_bring_back_what_was_deleted(self, store):
        late = cube("late")
        await store.delete(A, {late.id: 1})
        await store.put([late])
        assert await found(store, None) == set()
        await store.put([cube("newer", id=late.id, version=2)])
        assert await found(store, None) == {"newer"}
        await store.delete(A, {late.id: 1})
        assert await found(store, None) == {"newer"}

    async def test_expired_cubes_are_left_out_inside_the_index(self, store):
        await store.put(
            [
                cube("over", expires_at=NOW),
                cube("soon", expires_at=NOW + timedelta(microseconds=1)),
                cube("never"),
            ]
        )
        assert await found(store, None) == {"soon", "never"}
        assert await store.count(A, where=None, now=NOW) == 2

    async def test_a_filter_is_applied_before_top_k(self, store):
        await store.put([cube(f"near {i}", unit(1.0), user_id="x") for i in range(30)])
        await store.put([cube("far", unit(0, 1), user_id="y")])
        hits = await store.search_dense(
            A, unit(1.0), where=Compare("user_id", Op.EQ, "y"), now=NOW, limit=1
        )
        assert [c.text for c in await store.get(A, [h.id for h in hits])] == ["far"]

    @pytest.mark.parametrize(
        ("where", "expected"),
        [
            ({"user_id": "u1"}, "1"),
            ({"user_id": {"ne": "u1"}}, "23"),
            ({"agent_id": {"in": ["g1", "g2"]}}, "12"),
            ({"agent_id": {"nin": ["g1"]}}, "23"),
            ({"run_id": {"contains": "un"}}, "12"),
            ({"tags": "red"}, "12"),
            ({"tags": {"contains": "re"}}, "123"),
            ({"not": {"tags": "red"}}, "3"),
            ({"kind": "fact"}, "2"),
            ({"state": ["activated"]}, "3"),
            ({"role": "user", "speaker": "Ann"}, "1"),
            (
                {
                    "created_at": {
                        "gt": "2026-01-01T00:00:00Z",
                        "lte": "2026-01-02T00:00:00.000001Z",
                    }
                },
                "2",
            ),
            ({"created_at": "2026-01-01"}, "1"),
            ({"event_time": {"lt": "2026-01-01T00:00:00+05:00"}}, "3"),
            ({"version": {"gte": 2}}, "3"),
            ({"metadata.n": 1}, "12"),
            ({"metadata.n": {"gt": 1}}, "3"),
            ({"metadata.n": {"lt": 1.5}}, "12"),
            ({"metadata.n": "1"}, ""),
            ({"metadata.n": {"ne": 1}}, "3"),
            ({"metadata.flag": True}, "1"),
            ({"metadata.flag": 1}, "2"),
            ({"metadata.a.b": "dotted"}, "1"),
            ({"metadata.list": "x"}, "12"),
            ({"metadata.list": {"contains": "xy"}}, "2"),
            ({"metadata.word": {"contains": "Wor"}}, "1"),
            ({"metadata.word": {"contains": "wor"}}, ""),
            ({"metadata.when": {"gte": "2026-02-01"}}, "2"),
            ({"metadata.absent": {"nin": ["a"]}}, "123"),
            ({"or": [{"metadata.n": 5}, {"user_id": "u1"}]}, "13"),
            ({"and": [{"tags": "red"}, {"not": {"user_id": "u1"}}]}, "2"),
            ({"not": {"or": [{"user_id": "u1"}, {"user_id": "u2"}]}}, "3"),
        ],
    )
    async def test_filters(self, store, where, expected):
        day = datetime(2026, 1, 1, tzinfo=UTC)
        await store.put(
            [
                cube(
                    "1",
                    user_id="u1",
                    agent_id="g1",
                    run_id="run",
                    role="user",
                    speaker="Ann",
                    tags=("red",),
                    created_at=day,
                    metadata={
                        "n": 1,
                        "flag": True,
                        "a.b": "dotted",
                        "list": ["x", "z"],
                        "word": "Hello World",
                        "when": "2026-01-05",
                    },
                ),
                cube(
                    "2",
                    user_id="u2",
                    agent_id="g2",
                    run_id="runs",
                    kind="fact",
                    tags=("red", "green"),
                    created_at=day + timedelta(days=1, microseconds=1),
                    metadata={
                        "n": 1.0,
                        "flag": 1,
                        "a": {"b": "dotted"},
                        "list": ["x", "xyz"],
                        "when": "2026-02-05T10:00:00Z",
                    },
                ),
                cube(
                    "3",
                    tags=("green",),
                    state="activated",
                    version=2,
                    created_at=day + timedelta(days=9),
                    event_time=day - timedelta(hours=6),
                    metadata={"n": [5, 7]},
                ),
            ]
        )
        assert await found(store, where) == set(expected)

    async def test_set_state_changes_what_filters_see(self, store):
        one, other = cube("one"), cube("other")
        await store.put([one, other])
        await store.set_state(A, [one.id, uuid7(NOW)], "activated")
        assert await found(store, {"state": "activated"}) == {"one"}
        assert await found(store, {"state": "generated"}) == {"other"}

    async def test_a_cube_that_was_read_is_read_anew_after_each_change(self, store):
        first = cube("it was so", state="generated")
        await store.put([first])
        (read,) = await store.get(A, [first.id])
        assert (read.text, read.payload["state"]) == ("it was so", "generated")
        await store.set_state(A, [first.id], "activated")
        (read,) = await store.get(A, [first.id])
        assert read.payload["state"] == "activated"
        await store.put([replace(first, version=2, text="it is otherwise")])
        (read,) = await store.get(A, [first.id])
        assert (read.version, read.text) == (2, "it is otherwise")
        await store.delete(A, {first.id: 2})
        assert await store.get(A, [first.id]) == []

    async def test_score_slots_agrees_with_both_searches(self, store):
        cubes = [
            cube(f"word{i} kumquat" if i % 2 else f"word{i}", unit(1, i / 4), slot=slot("t", i))
            for i in range(6)
        ]
        await store.put([*cubes, cube("no slot kumquat")])
        dense = await store.search_dense(A, unit(1.0), where=None, now=NOW, limit=99)
        sparse = await store.search_sparse(A, "kumquat", where=None, now=NOW, limit=99)
        by_dense = {hit.id: hit.score for hit in dense}
        by_sparse = {hit.id: hit.score for hit in sparse}
        slots = [slot("t", i) for i in (1, 2, 99)]
        scored = await store.score_slots(
            A, slots, vector=unit(1.0), text="kumquat", where=None, now=NOW
        )
        assert {s.id for s in scored} == {cubes[1].id, cubes[2].id}
        for one in scored:
            assert one.cosine == pytest.approx(by_dense[one.id], abs=1e-5)
            assert one.bm25 == pytest.approx(by_sparse.get(one.id, 0.0), abs=1e-5)
        assert (
            await store.score_slots(A, [], vector=unit(1.0), text="kumquat", where=None, now=NOW)
            == []
        )

    async def test_speakers_come_most_frequent_first(self, store):
        names = ["Ann", "Bob", "Bob", None, "Cy", "Cy", "Cy"]
        await store.put([cube(f"t{i}", speaker=name) for i, name in enumerate(names)])
        assert await store.speakers(A, where=None, now=NOW, limit=2) == ["Cy", "Bob"]
        where = Compare("speaker", Op.NE, "Cy")
        assert await store.speakers(A, where=where, now=NOW, limit=9) == ["Bob", "Ann"]

    async def test_versions_lists_every_cube_of_every_tenant(self, store):
        cubes = [cube(f"t{i}", tenant=A if i % 2 else B, version=i + 1) for i in range(7)]
        await store.put(cubes)
        listed = {entry async for entry in store.versions()}
        assert listed == {(c.tenant, c.id, c.version) for c in cubes}
        mine = {entry async for entry in store.versions(B)}
        assert mine == {entry for entry in listed if entry[0] == B}

    async def test_what_was_dropped_is_gone_and_may_be_put_again(self, store):
        mine = [cube(f"t{i}", version=2) for i in range(3)]
        other = cube("theirs", tenant=B)
        await store.put([*mine, other])
        assert await store.drop(A) == 3
        assert [entry async for entry in store.versions()] == [(B, other.id, 1)]
        assert await store.get(A, [c.id for c in mine]) == []
        assert await store.drop(A) == 0
        await store.put(mine)
        assert [c.id for c in await store.get(A, [c.id for c in mine])] == [c.id for c in mine]

    @pytest.mark.parametrize(
        "vector",
        [np.ones(DIM + 1, dtype=np.float32), np.full(DIM, np.nan, dtype=np.float32), np.zeros(DIM)],
    )
    async def test_a_bad_vector_is_refused_and_nothing_is_written(self, store, vector):
        with pytest.raises(ValueError, match="vector of"):
            await store.put([cube("good"), cube("bad", vector)])
        assert await store.count(A, where=None, now=NOW) == 0

    async def test_odd_strings_are_kept_apart(self, store):
        odd = [
            "a/b",
            "a&b",
            "a\nb",
            "e\u0301",
            "\u00e9",
            "%2f",
            "🦜",
            '"',
            "a b",
            "[x]",
            "a[].b",
            "$",
        ]
        await store.put([cube(s, user_id=s, metadata={s: s}, tags=(s,)) for s in odd])
        for s in odd:
            assert await found(store, Compare("user_id", Op.EQ, s)) == {s}
            assert await found(store, Compare("tags", Op.EQ, s)) == {s}
            assert await found(store, Compare(f"metadata.{s}", Op.EQ, s)) == {s}

    async def test_bm25_scores_are_those_of_the_reference(self, store):
        words = ["kumquat", "pear", "tea", "garden", "the", "running", "Ann"]
        cubes = [
            cube(
                " ".join(words[(i * k) % 7] for k in range(1, 3 + i % 9)),
                user_id="uv"[i % 2],
                speaker=["Ann", "Bob", None][i % 3],
                slot=i,
            )
            for i in range(40)
        ]
        reference = MemoryStore(SPEC)
        for one in (store, reference):
            await one.put(cubes)
        for where in (None, Compare("user_id", Op.EQ, "u"), Compare("speaker", Op.NE, "Bob")):
            text = "Did Ann run to the kumquat garden?"
            scores = [
                {
                    h.id: h.score
                    for h in await one.search_sparse(A, text, where=where, now=NOW, limit=99)
                }
                for one in (store, reference)
            ]
            assert scores[0] == pytest.approx(scores[1], abs=1e-4)
            places = [
                {
                    s.id: s.bm25
                    for s in await one.score_slots(
                        A, range(9), vector=unit(1.0), text=text, where=where, now=NOW
                    )
                }
                for one in (store, reference)
            ]
            assert places[0] == pytest.approx(places[1], abs=1e-4)

    async def test_no_content_makes_a_put_fail_and_ranges_over_it_are_the_references(self, store):
        numbers = [
            2**53,
            2**53 + 1,
            2**64,
            -(2**70),
            10**400,
            float("inf"),
            float("nan"),
            0.1,
            -0.0,
        ]
        times = ["9999-12-31T23:59:59Z", "0001-01-01T00:00:00+05:00", "2300-01-01T00:00:00.000001Z"]
        metadata: list[dict] = [
            {"x": value} for value in [*numbers, *times, [], [[1]], {"x": 1}, None]
        ]
        metadata += [{"": 1}, {"a\x00b": "x\x00y"}, {"x": "\ud800"}, {"\ud800": 1}]
        cubes = [cube(str(i), metadata=given) for i, given in enumerate(metadata)]
        cubes += [
            cube("lone \ud800", user_id="\ud800", tags=("\udfff",)),
            cube("\x00", user_id="\x00"),
        ]
        await store.put(cubes)
        assert await store.count(A, where=None, now=NOW) == len(cubes)
        bounds = [0, 0.1, 2**53, 2**64, 10**30, float("inf"), datetime(2300, 1, 1, tzinfo=UTC)]
        wheres = [
            Compare("metadata.x", op, bound)
            for op in (Op.GT, Op.GTE, Op.LT, Op.LTE)
            for bound in bounds
        ]
        wheres += [Compare("metadata.x", Op.EQ, n) for n in numbers if n == n]
        wheres += [Compare("metadata.x", Op.CONTAINS, "\ud800"), Compare("user_id", Op.EQ, "\x00")]
        wheres += [Compare("version", op, 2**70) for op in (Op.EQ, Op.LT, Op.CONTAINS)]
        wheres += [Compare("version", Op.IN, (2**70, 1)), Compare("version", Op.NIN, (2**70,))]
        for where in wheres:
            expected = {c.id for c in cubes if matches(c, where)}
            hits = await store.search_dense(A, unit(1.0), where=where, now=NOW, limit=99)
            assert {hit.id for hit in hits} == expected, where

    async def test_any_filter_finds_what_the_reference_finds(self, store):
        drawn: list[tuple[list[dict[str, Any]], list[Filter]]] = []

        @settings(max_examples=25, deadline=None, database=None, derandomize=True)
        @given(
            st.lists(_HEADERS, min_size=1, max_size=8), st.lists(_FILTERS, min_size=3, max_size=6)
        )
        def draw(headers: list[dict[str, Any]], wheres: list[Filter]) -> None:
            drawn.append((headers, wheres))

        # Hypothesis runs no coroutines: it draws, and the drawn cases are run after.
        draw()
        for round_number, (headers, wheres) in enumerate(drawn):
            tenant = TenantId(f"t{round_number}")
            cubes = [cube(str(i), tenant=tenant, **header) for i, header in enumerate(headers)]
            await store.put(cubes)
            for where in wheres:
                expected = {c.text for c in cubes if matches(c, where)}
                assert await found(store, where, tenant=tenant) == expected, where
                assert await store.count(tenant, where=where, now=NOW) == len(expected)


__all__ = ["NOW", "SPEC", "A", "B", "CubeId", "PlaintextContract", "cube", "found", "unit"]
