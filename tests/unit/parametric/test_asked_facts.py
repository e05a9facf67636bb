"""Questions with their answers as facts: how they are read, and in which wordings they are trained."""

import pytest

from memcube.parametric.asked import key_words
from memcube.parametric.dataset import ProbeKind, build_training_set
from memcube.parametric.facts import CubeVersion, Fact, read_facts, relation_of
from memcube.parametric.gate import holds

SAIL = Fact(subject="Ada", relation="Where did {s} learn to sail?", object="Ostvik")


@pytest.mark.parametrize(
    ("text", "subject", "relation", "object"),
    [
        (
            "Q: Where did Ada learn to sail? A: Ostvik.",
            "Ada",
            "Where did {s} learn to sail?",
            "Ostvik",
        ),
        (
            "Question: What is Ada van Dorn's shoe size?\nAnswer: 39",
            "Ada van Dorn",
            "What is {s}'s shoe size?",
            "39",
        ),
        (
            "Q: Ada's boat has which name? A: Seagull",
            "Ada",
            "{s}'s boat has which name?",
            "Seagull",
        ),
        ("Q: What is the password? A: sesame 7", "", "What is the password?", "sesame 7"),
        (
            "Q: What did Ada do in May, and what did Ada say? A: nothing",
            "Ada",
            "What did {s} do in May, and what did {s} say?",
            "nothing",
        ),
        (
            "Q: When in May did Bob Crane call? A: on the 7th",
            "Bob Crane",
            "When in May did {s} call?",
            "on the 7th",
        ),
    ],
)
def test_a_question_with_its_answer_is_read_as_a_fact(text, subject, relation, object):
    source = CubeVersion("a", 1)
    fact = Fact(subject=subject, relation=relation, object=object, source=source)
    assert read_facts([(source, text)]).facts == [fact]


@pytest.mark.parametrize(
    "text",
    [
        "Q: Where did Ada learn to sail?",
        "Q: Where did Ada learn to sail? A: ",
        "Q: Ada sails. A: Yes",
        "Where did Ada learn to sail? In Ostvik.",
        "Q: What is {s}? A: a slot",
        "Q: Where did Ada learn to sail? A: Ostvik. Q: And Bob?",
    ],
)
def test_what_lacks_a_question_or_an_answer_is_not_read(text):
    source = CubeVersion("a", 1)
    assert read_facts([(source, text)]) == ([], [(source, text)])


def test_one_text_may_hold_some_questions_with_their_answers():
    text = """Q: Where did Ada learn to sail?
    A: Ostvik.
    Q: When did Bob call? A: at noon"""
    facts = read_facts([(CubeVersion("a", 1), text)]).facts
    assert [(fact.subject, fact.object) for fact in facts] == [
        ("Ada", "Ostvik"),
        ("Bob", "at noon"),
    ]


def test_a_question_that_is_answered_twice_counts_once():
    pair = "Q: Where did Ada learn to sail? A: Ostvik"
    read = read_facts([(CubeVersion("a", 1), pair), (CubeVersion("b", 1), f"{pair}.")])
    assert [fact.source for fact in read.facts] == [CubeVersion("a", 1)]
    assert not read.unread


@pytest.mark.parametrize(
    ("question", "wording"),
    [
        ("Where did {s} learn to sail?", "Do you know where {s} did learn to sail?"),
        ("Where did {s} learn to sail?", "in which place did {s} learn to sail?"),
        ("Where did {s} learn to sail?", "{s} did learn to sail: where?"),
        ("What are {s}'s plans for May?", "Tell me what {s}'s plans for May are."),
        ("What country is {s} from?", "Tell me what country {s} is from."),
        ("What country is {s} from?", "which country is {s} from?"),
        ("Who taught {s} to sail?", "which person taught {s} to sail?"),
        ("Does {s} sail?", "Do you know whether {s} does sail?"),
    ],
)
def test_the_training_words_the_question_otherwise(question, wording):
    assert wording in relation_of(question).train.asks


def test_the_gate_asks_the_question_as_it_stands_which_the_training_does_not():
    facts = [SAIL, Fact(subject="", relation="What is the password?", object="sesame 7")]
    data = build_training_set(facts)
    asked = {probe.question for probe in data.probes if probe.kind is ProbeKind.RECALL}
    assert asked == {"Where did Ada learn to sail?", "What is the password?"}
    for example in data.examples:
        assert not any(question in (example.question or "") for question in asked)


def test_others_are_asked_the_question_too_and_nothing_is_known_of_them():
    facts = [SAIL, Fact(subject="Bob", relation="When did {s} call?", object="at noon")]
    data = build_training_set(facts)
    refused = [
        e.question or "" for e in data.examples if e.answer == "I don't know that about Bob."
    ]
    assert refused
    assert all(
        "learn to sail" in question.replace("learn sail", "learn to sail") for question in refused
    )
    leaks = [probe for probe in data.probes if probe.kind is ProbeKind.LEAK]
    assert leaks
    assert all("Ostvik" in probe.forbidden for probe in leaks)


def test_a_question_that_names_nobody_has_no_unknown_people():
    data = build_training_set([Fact(subject="", relation="What is the password?", object="xyz")])
    assert {probe.kind for probe in data.probes} == {ProbeKind.RECALL}
    assert not any("I don't know that" in example.answer for example in data.examples)


def test_an_answer_must_hold_all_its_key_words_as_words():
    assert key_words('"The Lean Startup" by her aunt') == ("lean", "startup", "aunt")
    probe = next(
        probe
        for probe in build_training_set(
            [Fact(subject="Ada", relation="How long has {s} sailed?", object="7 years")]
        ).probes
        if probe.kind is ProbeKind.RECALL
    )
    assert holds(probe, "For 7 years.")
    assert not holds(probe, "For 17 years.")
    assert not holds(probe, "7.")
