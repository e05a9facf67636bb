"""Which questions of a conversation the benchmark takes as facts."""

from typing import Any

import pytest

from benchmarks.bench_lora_locomo import chosen


def asked(number: int, **changed: Any) -> dict[str, Any]:
    question = f"Which town did Ada see on tour {number}?"
    return {
        "question": question,
        "answer": f"Ostvik {number}",
        "category": 4,
        "evidence": ["D1:1"],
    } | changed


FITTING = [asked(number) for number in range(25)]


def test_twenty_are_chosen_by_the_seed():
    facts = chosen(FITTING, seed=0)
    assert len({fact.object for fact in facts}) == 20
    assert {fact.subject for fact in facts} == {"Ada"}
    assert chosen(FITTING, seed=0) == facts != chosen(FITTING, seed=1)


@pytest.mark.parametrize(
    "changed",
    [
        {"category": 2},
        {"evidence": ["D1:1", "D1:2"]},
        {"answer": "a town near the sea in autumn"},
        {"answer": "Yes"},
        {"answer": ""},
        {"question": "Which town was seen?"},
    ],
)
def test_what_the_rule_leaves_out_is_never_chosen(changed):
    questions = [*FITTING[:19], asked(99, **changed)]
    with pytest.raises(ValueError, match="larger than population"):
        chosen(questions, seed=0)
    assert len(chosen([*questions, asked(20)], seed=0)) == 20
