from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memcube.errors import NotFound
from memcube.ids import digest, framed, parse_cube_id, uuid7

part = st.one_of(st.none(), st.text(max_size=8), st.integers(), st.binary(max_size=8))


@given(st.lists(part, max_size=4), st.lists(part, max_size=4))
def test_framing_is_injective(a, b):
    assert (framed(*a) == framed(*b)) == (a == b)


@given(st.lists(st.text(alphabet="a&/%\x00é", max_size=4), min_size=1, max_size=4))
def test_joined_strings_do_not_collide_with_their_pieces(parts):
    if len(parts) > 1:
        assert digest(*parts) != digest("".join(parts))


def test_ids_are_unique_canonical_and_ordered_by_time():
    start = datetime(2026, 1, 1, tzinfo=UTC)
    ids = [uuid7(start + timedelta(milliseconds=i)) for i in range(100)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 100
    assert all(parse_cube_id(i.upper()) == i for i in ids)


@pytest.mark.parametrize("text", ["", "x", "../etc/passwd", "0" * 10_000, "%2f"])
def test_what_is_no_id_reads_as_an_unknown_one(text):
    with pytest.raises(NotFound):
        parse_cube_id(text)
