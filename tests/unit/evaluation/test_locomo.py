import json
from datetime import UTC, datetime

import pytest

from memcube.errors import BadRequest
from memcube.evaluation.locomo import load_locomo, repaired

SAMPLE = {
    "sample_id": "conv-1",
    "conversation": {
        "speaker_a": "Ann",
        "speaker_b": "Bob",
        "session_1_date_time": "1:56 pm on 8 May, 2023",
        "session_1": [
            {"speaker": "Ann", "dia_id": "D1:1", "text": "Hello"},
            {"speaker": "Bob", "dia_id": "D1:2", "text": "Hi, I bought a kayak"},
        ],
        "session_10_date_time": "10:00 am on 9 June, 2023",
        "session_10": [{"speaker": "Ann", "dia_id": "D10:1", "text": "Back again"}],
        "session_2_date_time": "10:00 am on 1 June, 2023",
        "session_2": [{"speaker": "Ann", "dia_id": "D2:1", "text": "How is it?"}],
    },
    "qa": [
        {"question": "What did Bob buy?", "answer": "a kayak", "evidence": ["D1:2"], "category": 4},
        {"question": "No evidence?", "answer": 1, "evidence": [], "category": 3},
        {
            "question": "What did Ann buy?",
            "adversarial_answer": "a kayak",
            "evidence": ["D1:2; D9:9"],
            "category": 5,
        },
    ],
}


@pytest.fixture
def loaded(tmp_path):
    path = tmp_path / "sample.json"
    path.write_text(json.dumps([SAMPLE]))
    (conversation,) = load_locomo(path)
    return conversation


def test_turns_come_in_the_order_of_the_sessions_numbers(loaded):
    assert [turn.id for turn in loaded.turns] == ["D1:1", "D1:2", "D2:1", "D10:1"]
    assert list(loaded.sessions()) == [1, 2, 10]


def test_a_turns_time_is_its_sessions_plus_a_second_a_turn(loaded):
    assert loaded.turns[1].time == datetime(2023, 5, 8, 13, 56, 1, tzinfo=UTC)


def test_only_questions_with_evidence_that_exists_are_kept(loaded):
    assert [question.evidence for question in loaded.questions] == [("D1:2",), ("D1:2",)]
    assert [question.category for question in loaded.questions] == [4, 5]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (["D8:6; D9:17"], ["D8:6", "D9:17"]),
        (["D:11:26"], ["D11:26"]),
        (["D1:02", "D1:2"], ["D1:2"]),
        ("D3:4", ["D3:4"]),
        (["D"], []),
    ],
)
def test_malformed_evidence_ids_are_repaired(written, meant):
    assert repaired(written) == meant


@pytest.mark.parametrize("text", ["{}", "[{}]", "no json", '[{"sample_id": 1}]', "[" * 100_000])
def test_a_file_of_another_form_is_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(BadRequest, match=r"other\.json"):
        load_locomo(path)
