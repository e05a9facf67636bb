from datetime import UTC, datetime

import pytest

from memcube.cube import Kind
from memcube.errors import BadRequest
from memcube.reader.messages import Header, Message
from memcube.reader.verbatim import read_verbatim

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


@pytest.mark.parametrize("bad", ["a\0b", "a\ud800b"])
def test_what_is_no_text_is_refused_by_name(bad):
    with pytest.raises(BadRequest) as refused:
        read_verbatim([Message(role="user", content=bad)], None, Header(), max_chars=10)
    assert refused.value.field == "messages[0].content"


def test_line_ends_are_normalised_and_all_else_is_kept():
    (draft,) = read_verbatim(None, "a\r\n  b\rc\t d", Header(), max_chars=100)
    assert draft.text == "a\n  b\nc\t d"


def test_a_system_message_is_kept_like_any_other():
    (draft,) = read_verbatim(
        [Message(role="system", content="Be kind.")], None, Header(), max_chars=99
    )
    assert draft.role == "system"
