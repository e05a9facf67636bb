from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memcube.cube import Kind
from memcube.errors import BadRequest
from memcube.reader.messages import Header, Message
from memcube.reader.verbatim import read_verbatim, split

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def test_each_turn_is_a_cube_with_its_speaker_and_time():
    turns = [
        Message(role="user", content="Hi!", name="Ann", time=NOON, id="D1:1"),
        Message(role="assistant", content="Hello."),
    ]
    first, second = read_verbatim(turns, None, Header(user_id="u", tags=("x",)), max_chars=100)
    assert (first.text, first.speaker, first.role, first.event_time) == ("Hi!", "Ann", "user", NOON)
    assert first.sources[0].ref == "D1:1"
    assert first.threaded
    assert second.threaded
    assert (second.kind, second.speaker, second.user_id, second.tags) == (
        Kind.EPISODE,
        None,
        "u",
        ("x",),
    )


def test_a_text_is_a_fact_and_a_long_one_a_document_in_parts():
    (fact,) = read_verbatim(None, "Ann likes tea.", Header(), max_chars=100)
    assert (fact.kind, fact.threaded) == (Kind.FACT, False)
    parts = read_verbatim(None, "One two. Three four! Five?", Header(), max_chars=12)
    assert [part.text for part in parts] == ["One two.", "Three four!", "Five?"]
    assert {part.kind for part in parts} == {Kind.DOCUMENT}


def test_a_long_turn_is_split_at_sentences_and_each_part_keeps_its_source():
    turn = Message(role="user", content="A b c. D e f. G h i.", name="Ann", id="7")
    parts = read_verbatim([turn], None, Header(), max_chars=13)
    assert [part.text for part in parts] == ["A b c. D e f.", "G h i."]
    assert {part.sources[0].ref for part in parts} == {"7"}


@pytest.mark.parametrize(
    ("messages", "text", "field"),
    [
        (None, None, "messages"),
        ([], None, "messages"),
        (None, " \n", "text"),
        (
            [Message(role="user", content="x"), Message(role="user", content=" ")],
            None,
            "messages[1].content",
        ),
        ([Message(role="user", content="x")], "y", "messages"),
    ],
)
def test_nothing_to_remember_is_refused_by_name(messages, text, field):
    with pytest.raises(BadRequest) as refused:
        read_verbatim(messages, text, Header(), max_chars=10)
    assert refused.value.field == field


@given(st.text(min_size=1, max_size=400), st.integers(min_value=1, max_value=60))
def test_splitting_loses_no_character_but_white_space(text, max_chars):
    parts = split(text, max_chars)
    assert all(len(part) <= max_chars for part in parts)
    assert "".join("".join(part.split()) for part in parts) == "".join(text.split())


@given(st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=40))
def test_splitting_never_cuts_a_word_that_fits(words):
    parts = split(" ".join(words), 10)
    assert [word for part in parts for word in part.split()] == words
