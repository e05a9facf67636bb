"""Which texts say the same and which contradict each other."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from memcube.alike import (
    MAX_GROUP,
    Near,
    contradictions,
    duplicates,
    overlap,
    same_statement,
)
from memcube.cube import Descriptive, Governance, MemCube, Sensitivity, Shape
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import State
from memcube.testing.local import START


def cube(number: int, text: str, **about: Any) -> MemCube:
    governance = Governance(
        owner="key",
        frozen=about.pop("frozen", False),
        sensitivity=about.pop("sensitivity", Sensitivity.NORMAL),
    )
    return MemCube(
        id=CubeId(f"{number:04d}"),
        tenant=TenantId("a"),
        shape=Shape.LEAF,
        state=State.GENERATED,
        version=1,
        text=text,
        descriptive=Descriptive(created_at=START, **({"user_id": "ann"} | about)),
        governance=governance,
        updated_at=START + timedelta(seconds=number),
        indexed=True,
    )


def found(*cubes: MemCube, cosine: float = 0.95, **limits: float) -> list[set[str]]:
    """The groups that would be proposed, with all as near to each other."""
    near = {c.id: [Near(o.id, cosine) for o in cubes if o.id != c.id] for c in cubes}
    limits = {"cosine": 0.9, "min_overlap": 0.8} | limits
    known = {c.id: c for c in cubes}
    return [set(one.cubes) for one in duplicates(cubes, near, known, **limits)]


TEA, SAME = "Ann likes green tea in the morning", "In the morning Ann likes green tea!"


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [("a b", "b a", 1.0), ("A, b!", "a b", 1.0), ("a b c d", "a b c e", 0.6), ("", "", 0.0)],
)
def test_overlap_is_of_folded_words(one, other, shared):
    assert overlap(one, other) == shared


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("the code is 41", "the code is 42", False),
        ("Ann is a doctor", "Ann is not a doctor", False),
        ("Ann likes it", "Ann doesn't likes it", False),
        ("Ann lives in Oslo.", "Ann lives in Bergen.", False),
        ("Ann lives in Oslo.", "Bob lives in Oslo.", False),
        ("Ann lives in Oslo.", "Ann's home is in Oslo!", True),
        (TEA, SAME, True),
    ],
)
def test_what_turns_a_statement_around_makes_it_another(one, other, same):
    assert same_statement(one, other) is same


def test_near_duplicates_are_proposed_with_the_fullest_text_and_why():
    cubes = [cube(1, TEA), cube(2, SAME), cube(3, TEA + " always")]
    near = {cubes[0].id: [Near(cubes[1].id, 0.97), Near(cubes[2].id, 0.93)]}
    (made,) = duplicates(cubes, near, {c.id: c for c in cubes}, cosine=0.9, min_overlap=0.8)
    assert made.cubes == {"0001": 1, "0002": 1, "0003": 1}
    assert made.text == TEA + " always"
    assert made.why == {"cosine": 0.93, "overlap": 0.875, "turns": False}


@pytest.mark.parametrize(
    "other",
    [
        {"user_id": "bob"},
        {"run_id": "1"},
        {"speaker": "Bob"},
        {"role": "assistant"},
        {"sensitivity": Sensitivity.SECRET},
        {"frozen": True},
    ],
    ids=str,
)
def test_only_what_belongs_together_is_one_memory(other):
    assert found(cube(1, TEA), cube(2, SAME)) == [{"0001", "0002"}]
    assert found(cube(1, TEA), cube(2, SAME, **other)) == []


def test_both_the_vectors_and_the_words_must_agree():
    pair = cube(1, TEA), cube(2, SAME)
    assert found(*pair, cosine=0.89) == []
    assert found(cube(1, TEA), cube(2, "At dawn she enjoys a warm drink")) == []


def test_a_chain_of_likenesses_is_not_one_memory():
    words = [f"w{chr(97 + n)}" for n in range(14)]
    chain = [cube(n, " ".join(words[n : n + 11])) for n in range(3)]
    assert found(*chain) == [{"0000", "0001"}]


def test_a_cube_is_in_one_group_and_a_group_is_bounded():
    cubes = [cube(n, TEA) for n in range(MAX_GROUP + 3)]
    groups = found(*cubes)
    assert [len(group) for group in groups] == [MAX_GROUP, 3]
    assert not groups[0] & groups[1]


def test_statements_that_give_an_attribute_two_values_contradict():
    said = [cube(1, "Ann lives in Oslo."), cube(2, "Ann's home is in Bergen."), cube(3, "Hello!")]
    (made,) = contradictions(said)
    assert made.cubes == {"0001": 1, "0002": 1}
    assert made.text == "Ann's home is in Bergen."
    assert made.why == {"relation": "home town", "newest": "0002", "turns": False}


def test_when_it_was_said_decides_what_is_newest():
    old = cube(2, "Ann lives in Oslo.", event_time=START - timedelta(days=9))
    (made,) = contradictions([cube(1, "Ann lives in Bergen.", event_time=START), old])
    assert made.text == "Ann lives in Bergen."


@pytest.mark.parametrize(
    "texts",
    [
        ("Ann lives in Oslo.", "Ann's home is in Oslo."),
        ("Ann works as a nurse.", "Ann works as the nurse."),
        ("Ann lives in Oslo.", "Bob lives in Bergen."),
        ("Ann lives in Oslo.", "Ann works as a nurse."),
        ("Ann is allergic to nuts.", "Ann is allergic to milk."),
        ("Ann lives in Oslo. She likes it.", "Ann lives in Bergen."),
    ],
    ids=str,
)
def test_what_may_both_be_true_is_no_contradiction(texts):
    assert contradictions(cube(n, text) for n, text in enumerate(texts)) == []


def test_another_scopes_statement_contradicts_nothing():
    bobs = replace(
        cube(2, "Ann lives in Bergen."), descriptive=Descriptive(created_at=START, user_id="bob")
    )
    assert contradictions([cube(1, "Ann lives in Oslo."), bobs]) == []


def test_no_reason_holds_a_word_of_a_memory():
    (made,) = contradictions([cube(1, "Ann lives in Oslo."), cube(2, "Ann lives in Bergen.")])
    assert not any(word in str(made.why) for word in ("Ann", "Oslo", "Bergen"))
