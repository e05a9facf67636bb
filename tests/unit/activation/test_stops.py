import pytest
from hypothesis import given
from hypothesis import strategies as st

from memcube.activation.stops import StopStrings


def feed(stops, pieces):
    found = StopStrings(stops)
    shown = [found.push(piece) for piece in pieces]
    return shown, found


def test_a_stop_string_across_pieces_is_never_shown():
    shown, found = feed(["\n\nUser:"], ["Yes.", "\n", "\nUs", "er: more"])
    assert shown == ["Yes.", "", "", ""]
    assert found.stopped


def test_what_only_looked_like_a_stop_string_is_shown_as_soon_as_that_is_known():
    shown, found = feed(["END"], ["a E", "N", "x"])
    assert shown == ["a ", "", "ENx"]
    assert not found.stopped


def test_the_stop_string_that_comes_first_in_the_text_counts():
    shown, found = feed(["late", "early"], ["an early and a late one"])
    assert shown == ["an "]
    assert found.stopped


def test_what_is_held_back_comes_when_the_text_ends():
    shown, found = feed(["END"], ["the E"])
    assert shown == ["the "]
    assert found.flush() == "E"
    assert found.flush() == ""


def test_nothing_comes_after_a_stop():
    _, found = feed(["x"], ["axb"])
    assert found.push("more") == ""
    assert found.flush() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty stop string"):
        StopStrings([""])


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_pieces_show_the_text_before_the_first_stop_string(stops, pieces):
    text = "".join(pieces)
    shown, found = feed(stops, pieces)
    got = "".join(shown) + found.flush()
    ends = [text.find(stop) for stop in stops if stop in text]
    assert found.stopped == bool(ends)
    if not ends:
        assert got == text
        return
    # A stop string found in an earlier piece ends the text before one that begins earlier but
    # ends in a later piece is complete.
    assert text.startswith(got)
    assert len(got) in {at for stop in stops if (at := text.find(stop)) >= 0}
