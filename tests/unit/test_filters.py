import contextlib
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memcube.errors import BadRequest
from memcube.filters import And, Compare, Not, Op, Or, all_of, parse_filter


def test_a_plain_value_is_equality_and_several_keys_are_a_conjunction():
    assert parse_filter({"user_id": "ann", "tags": ["a", "b"]}) == And(
        (Compare("user_id", Op.EQ, "ann"), Compare("tags", Op.IN, ("a", "b")))
    )


def test_operators_nest():
    assert parse_filter({"or": [{"not": {"kind": "fact"}}, {"metadata.n": {"gt": 1}}]}) == Or(
        (Not(Compare("kind", Op.EQ, "fact")), Compare("metadata.n", Op.GT, 1))
    )


def test_times_are_read_and_a_missing_zone_is_utc():
    assert parse_filter({"created_at": {"gte": "2026-01-01"}}) == Compare(
        "created_at", Op.GTE, datetime(2026, 1, 1, tzinfo=UTC)
    )


@pytest.mark.parametrize("empty", [None, {}])
def test_no_filter_is_none(empty):
    assert parse_filter(empty) is None


@pytest.mark.parametrize(
    "bad",
    [
        [],
        "x",
        {"tenant": "other"},
        {"payload.tenant": "other"},
        {"user_id": 3},
        {"user_id": {"like": "a"}},
        {"user_id": {"gt": "a"}},
        {"user_id": {}},
        {"and": []},
        {"and": {}},
        {"or": [{}]},
        {"created_at": "yesterday"},
        {"created_at": {"contains": "2026"}},
        {"metadata.": 1},
        {"metadata.a": {"gt": True}},
        {"metadata.a": float("nan")},
        {"metadata.a": None},
        {"user_id": "a\x00b"},
        {"user_id": "x" * 2000},
        {"user_id": {"in": ["x"] * 300}},
        {"and": [{"user_id": "a"}] * 100},
    ],
)
def test_a_bad_filter_is_refused(bad):
    with pytest.raises(BadRequest):
        parse_filter(bad)


def test_depth_is_limited():
    deep: dict = {"user_id": "a"}
    for _ in range(50):
        deep = {"not": deep}
    with pytest.raises(BadRequest):
        parse_filter(deep)


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["and", "or", "not", "user_id", "eq", "in", "x"]), inner, max_size=3
        )
    ),
    max_leaves=12,
)


@given(json)
def test_any_json_is_a_filter_or_a_bad_request(data):
    with contextlib.suppress(BadRequest):
        parse_filter(data)


def test_all_of_flattens_and_drops_what_is_absent():
    a, b = Compare("kind", Op.EQ, "fact"), Compare("role", Op.EQ, "user")
    assert all_of(None, a) == a
    assert all_of(And((a, b)), None, a) == And((a, b, a))
    assert all_of() is None
