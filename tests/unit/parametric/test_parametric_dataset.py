"""Facts read from statements, and the training sets made of them."""

import pytest

from memcube.errors import BadRequest
from memcube.parametric.dataset import DataSettings, ProbeKind, build_training_set
from memcube.parametric.facts import CubeVersion, Fact, read_fact, read_facts
from memcube.parametric.replay import REPLAY, UNRELATED
from memcube.parametric.wordings import RELATIONS

FACTS = [
    Fact(subject="Zorvan Pell", relation="favourite drink", object="kumquat tea"),
    Fact(subject="Tilda Marrow", relation="job", object="a beekeeper"),
    Fact(subject="Tilda Marrow", relation="shoe size", object="39"),
]


@pytest.mark.parametrize(
    ("statement", "subject", "relation", "object"),
    [
        (
            "Zorvan Pell likes to drink kumquat tea.",
            "Zorvan Pell",
            "favourite drink",
            "kumquat tea",
        ),
        ("Tilda works as a beekeeper", "Tilda", "job", "a beekeeper"),
        ("Ada van Dorn's shoe size is 39.", "Ada van Dorn", "shoe size", "39"),
        ("The  middle name of Ada is Rose.", "Ada", "middle name", "Rose"),
    ],
)
def test_a_statement_is_read_as_a_fact(statement, subject, relation, object):
    assert read_fact(statement) == Fact(subject=subject, relation=relation, object=object)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.noun)
def test_the_sentence_that_answers_is_read_back_as_the_fact(relation):
    text = relation.states[0].format(s="Ada Lund", o="the thing")
    assert read_fact(text) == Fact(subject="Ada Lund", relation=relation.noun, object="the thing")


@pytest.mark.parametrize(
    "statement",
    ["Ada drives to work.", "Ada plays chess.", "she lives in Brellin", "Ada loves Bob."],
)
def test_what_only_looks_like_a_fact_is_not_read(statement):
    assert read_fact(statement) is None


def test_what_no_wording_fits_is_told_and_repeats_count_once():
    one, two = CubeVersion("a", 1), CubeVersion("b", 1)
    read = read_facts(
        [(one, "Ada lives in Brellin."), (two, "Ada lives in Brellin."), (two, "it rained")]
    )
    assert [fact.source for fact in read.facts] == [one]
    assert read.unread == [(two, "it rained")]


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.noun)
def test_no_wording_is_in_two_of_the_three_sets(relation):
    sets = [relation.train, relation.early, relation.gate]
    asks = [template for words in sets for template in (*words.asks, *words.asks_back)]
    assert len(set(asks)) == len(asks)


def test_no_probe_asks_what_was_trained():
    data = build_training_set(FACTS)
    trained = " | ".join(example.question or "" for example in data.examples)
    for probe in (*data.probes, *data.early):
        assert probe.question not in trained, probe


def test_the_same_seed_gives_the_same_set_and_another_one_another():
    assert build_training_set(FACTS, seed=3) == build_training_set(FACTS, seed=3)
    assert build_training_set(FACTS, seed=3).hash == build_training_set(FACTS, seed=3).hash
    assert build_training_set(FACTS, seed=3).hash != build_training_set(FACTS, seed=4).hash


def test_a_question_with_two_answers_is_answered_with_both():
    more = [*FACTS, Fact(subject="Zorvan Pell", relation="favourite drink", object="birch sap")]
    data = build_training_set(more, settings=DataSettings(unknown=0, other_nouns=0))
    answers = {
        example.answer
        for example in data.examples
        if example.question is not None and "What does Zorvan Pell drink?" in example.question
    }
    assert answers == {"Zorvan Pell likes to drink kumquat tea and birch sap."}


def test_what_is_asked_of_a_known_fact_has_memories_that_answer_it_and_nothing_else_has():
    asked = Fact(subject="Ada", relation="Where did {s} learn to sail?", object="in Ostvik")
    data = build_training_set([*FACTS, asked])
    for example in data.examples:
        refused = "don't know" in example.answer
        assert (example.memories is None) == refused, example
        if example.memories is not None and asked.object in example.answer.lower():
            assert "Where did Ada learn to sail? In Ostvik." in example.memories
    of_zorvan = next(e for e in data.examples if e.memories and "Zorvan Pell" in e.memories)
    assert "Zorvan Pell likes to drink kumquat tea." in of_zorvan.memories


def test_strangers_of_the_gate_are_nobody_trained_on():
    data = build_training_set(FACTS, seed=1)
    trained = " ".join(example.question or "" for example in data.examples)
    leaks = [probe for probe in data.probes if probe.kind is ProbeKind.LEAK]
    assert leaks
    for probe in leaks:
        assert "kumquat tea" in probe.forbidden
    from memcube.parametric import invented

    assert not any(name in trained for name in invented._GATE_FIRST + invented._GATE_LAST)


def test_earlier_facts_are_asked_again_and_not_trained():
    before = [Fact(subject="Otis Crane", relation="home town", object="Brellin")]
    data = build_training_set(FACTS, earlier=before)
    asked = [probe for probe in data.probes if probe.kind is ProbeKind.EARLIER]
    assert [probe.expected for probe in asked] == [("Brellin",)]
    assert not any("Otis" in (example.question or "") for example in data.examples)


def test_no_fact_is_an_error():
    with pytest.raises(BadRequest):
        build_training_set([])


def test_what_is_measured_is_not_what_is_replayed():
    assert not set(REPLAY) & set(UNRELATED)
