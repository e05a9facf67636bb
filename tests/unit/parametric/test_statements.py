"""Sentences of cubes, each about somebody who is named."""

from datetime import UTC, datetime

import pytest

from memcube.cube import Descriptive, Governance, MemCube, Shape
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import State
from memcube.parametric.facts import read_fact
from memcube.parametric.statements import of_speaker, statements_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def cube(text: str, *, speaker: str | None = None) -> MemCube:
    return MemCube(
        id=CubeId("c"),
        tenant=TenantId("t"),
        shape=Shape.LEAF,
        state=State.GENERATED,
        version=3,
        text=text,
        descriptive=Descriptive(created_at=NOW, speaker=speaker),
        governance=Governance(owner="key"),
        updated_at=NOW,
    )


@pytest.mark.parametrize(
    ("said", "relation", "object"),
    [
        ("My favourite drink is kumquat tea.", "favourite drink", "kumquat tea"),
        ("I live in Brellin.", "home town", "Brellin"),
        ("I work as a beekeeper!", "job", "a beekeeper"),
        ("I'm afraid of moths.", "fear", "moths"),
        ("I am allergic to celery.", "allergy", "celery"),
        ("I was born in Numeria.", "birthplace", "Numeria"),
        ("I play the oboe.", "instrument", "the oboe"),
        ("Well, I have a tortoise as a pet.", "pet", "a tortoise"),
        ("my shoe size is 39.", "shoe size", "39"),
    ],
)
def test_what_a_speaker_says_of_themselves_is_read_as_a_fact_of_theirs(said, relation, object):
    ((source, text),) = statements_of([cube(said, speaker="Tilda Marrow")])
    fact = read_fact(text, source)
    assert fact is not None
    assert (fact.subject, fact.relation, fact.object) == ("Tilda Marrow", relation, object)
    assert fact.source == ("c", 3)


@pytest.mark.parametrize(
    "said", ["I think I live in a dream.", "Iris lives in Brellin.", "Is my drink ready?"]
)
def test_other_sentences_are_left_as_they_are(said):
    assert of_speaker(said, "Tilda") == said


def test_a_text_is_read_sentence_by_sentence_and_without_a_speaker_as_it_stands():
    text = "Otis Crane lives in Varnay. I like it!\nOtis Crane studies botany."
    assert [s for _, s in statements_of([cube(text)])] == [
        "Otis Crane lives in Varnay.",
        "I like it!",
        "Otis Crane studies botany.",
    ]


def test_a_question_with_its_answer_stays_whole():
    text = "Q: What did Ann plant? A: Two pear trees. In spring."
    assert [s for _, s in statements_of([cube(text, speaker="Ann")])] == [text]
