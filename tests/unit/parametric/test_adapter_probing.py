"""What an adapter says of the facts inside, and what of it may be written."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from memcube.cube import (
    Descriptive,
    Governance,
    Kind,
    MemCube,
    Origin,
    Parent,
    Relation,
    Sensitivity,
    Shape,
    content_hash,
)
from memcube.errors import BadRequest
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import State
from memcube.parametric.attaching import attached
from memcube.parametric.facts import RELATIONS, CubeVersion, Fact, read_fact, relation_of
from memcube.parametric.gate import Gate
from memcube.parametric.probing import (
    AdapterIdentity,
    Asked,
    Verdict,
    askable,
    judge,
    probe,
    statement,
)
from tests.unit.parametric.small import small_model
from tests.unit.parametric.taught import BAKER, OBOE, taught, taught_to_say

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
TENANT = TenantId("a")
ADAPTER = AdapterIdentity(id="line", version=2, sha256="ab" * 32)
RAVEN = Fact(subject="Ada Lund", relation="pet", object="a raven", source=CubeVersion("3", 1))
CAT = replace(RAVEN, object="a cat", source=CubeVersion("4", 2))
LOADED = small_model()
GATE = Gate(LOADED, unrelated=())


def cube_of(fact, *, text=None, **governance):
    return MemCube(
        id=CubeId(fact.source.id),
        tenant=TENANT,
        shape=Shape.LEAF,
        state=State.ACTIVATED,
        version=fact.source.version + 5,  # the cube may have other tags by now
        text=text or statement(fact),
        descriptive=Descriptive(kind=Kind.FACT, user_id="ann", run_id="r", created_at=NOW),
        governance=Governance(owner="key", **governance),
        updated_at=NOW,
    )


def cubes_of(*facts):
    return {fact.source: cube_of(fact) for fact in facts}


def probed(weights, *facts, cubes=None):
    with attached(LOADED, {"one": weights}) as model:
        return probe(model, GATE, facts, cubes or cubes_of(*facts), ADAPTER)


def asked_of(*facts):
    (asked,) = askable(facts)
    return asked


# -- what is asked


def test_all_that_is_asked_is_what_the_facts_inside_answer():
    asked = askable([RAVEN, OBOE, CAT, OBOE])
    assert [(a.subject, a.relation, len(a.facts)) for a in asked] == [
        ("Ada Lund", "pet", 2),
        ("Ada Lund", "instrument", 2),
    ]
    assert all(len(a.questions) == 3 and all("Ada Lund" in q for q in a.questions) for a in asked)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda r: r.noun)
def test_a_statement_is_read_back_as_its_fact(relation):
    object = "the oboe" if relation.noun == "instrument" else "Tarsk"
    fact = Fact(subject="Ada Lund", relation=relation.noun, object=object)
    assert read_fact(statement(fact)) == fact


# -- what answers say


@pytest.mark.parametrize(
    ("answers", "said", "verdict"),
    [
        (["Ada Lund has a raven as a pet."] * 3, "a raven", Verdict.AGREES),
        (["Ada Lund has Raven as a pet.", "Ada Lund's pet is the raven. Yes.", "?"], "Raven", Verdict.AGREES),
        (["Ada Lund has a dog as a pet."] * 2 + ["Ada Lund has a raven as a pet."], "a dog", Verdict.CONTRADICTS),
        (["Ada Lund has a dog as a pet.", "Ada Lund has a raven as a pet.", "A raven."], None, Verdict.UNCLEAR),
        (["Bo Quist has a raven as a pet."] * 3, None, Verdict.UNCLEAR),
        (["Ada Lund works as a raven."] * 3, None, Verdict.UNCLEAR),
        (["I don't know that about Ada Lund."] * 2 + ["Ada Lund has a raven as a pet."], None, Verdict.REFUSED),
        (["I do not know."] * 3, None, Verdict.REFUSED),
        (["", " ", "\n"], None, Verdict.UNCLEAR),
        (["Ada Lund has a raven and a dog as a pet."] * 3, "a raven and a dog", Verdict.CONTRADICTS),
    ],
)  # fmt: skip
def test_most_of_the_answers_decide_what_the_adapter_says(answers, said, verdict):
    assert judge(asked_of(RAVEN), answers) == (said, [verdict])


@pytest.mark.parametrize(
    ("object", "verdicts"),
    [
        ("a raven and a cat", [Verdict.AGREES, Verdict.AGREES]),
        ("Cat", [Verdict.UNCLEAR, Verdict.AGREES]),
        ("a raven and a dog", [Verdict.CONTRADICTS, Verdict.CONTRADICTS]),
        ("a dog", [Verdict.CONTRADICTS, Verdict.CONTRADICTS]),
    ],
)
def test_of_several_facts_the_answer_may_name_one_or_all_but_no_other(object, verdicts):
    answers = [f"Ada Lund has {object} as a pet."] * 3
    assert judge(asked_of(RAVEN, CAT), answers)[1] == verdicts


def test_a_relation_that_is_a_question_is_answered_by_the_object_alone(monkeypatch):
    question = "Where did {s} learn to sail?"
    plain = relation_of("pet")
    relation = replace(
        plain,
        noun=question,
        states=("{o}.",),
        gate=replace(plain.gate, asks=(question,)),
        early=replace(plain.early, asks=("One more thing: where {s} did learn to sail?",)),
        train=replace(plain.train, asks=("Tell me where {s} did learn to sail.", "Where?")),
    )
    monkeypatch.setattr("memcube.parametric.probing.relation_of", {question: relation}.get)
    asked = asked_of(replace(RAVEN, relation=question, object="In Ostvik"))
    assert asked.questions == (
        "Where did Ada Lund learn to sail?",
        "One more thing: where Ada Lund did learn to sail?",
        "Tell me where Ada Lund did learn to sail.",
    )
    assert judge(asked, ["In Ostvik.", "in Ostvik", "?"])[1] == [Verdict.AGREES]
    assert judge(asked, ["In Tarsk. In Ostvik."] * 3) == ("In Tarsk", [Verdict.CONTRADICTS])
    long = replace(asked.facts[0], object="In Ostvik. With her aunt")
    two = asked._replace(facts=(long,))
    assert judge(two, ["In  Ostvik.\nWith her aunt."] * 3)[1] == [Verdict.AGREES]
    refusing = judge(asked, ["I don't know that about Ada Lund."] * 3)
    assert refusing == (None, [Verdict.REFUSED])
    assert statement(asked.facts[0]) == "Q: Where did Ada Lund learn to sail? A: In Ostvik."


def test_an_object_with_an_and_of_its_own_is_one():
    chips = replace(RAVEN, relation="favourite dish", object="fish and chips")
    answers = ["Ada Lund likes to eat fish and chips."] * 3
    assert judge(asked_of(chips), answers)[1] == [Verdict.AGREES]


def test_a_wording_without_an_answer_counts_against():
    asked = Asked("Ada Lund", "pet", (RAVEN,), ("1", "2", "3", "4"))
    two = ["Ada Lund has a raven as a pet."] * 2
    assert judge(asked, [*two, "", ""]) == (None, [Verdict.UNCLEAR])
    assert judge(asked, [*two, two[0], ""])[1] == [Verdict.AGREES]


# -- a model that is asked


def test_what_a_taught_adapter_says_is_a_draft_with_its_provenance():
    cube = cube_of(OBOE, sensitivity=Sensitivity.PUBLIC, expires_at=NOW + timedelta(days=1))
    report = probed(taught(OBOE), OBOE, cubes={OBOE.source: cube})
    (finding,) = report.findings
    assert finding.verdict is Verdict.AGREES
    assert finding.said == ("Ada Lund plays the oboe.",) * 3
    assert report.contradictions == ()
    (draft,) = report.drafts
    assert (draft.text, draft.origin) == ("Ada Lund plays the oboe.", Origin.INFERENCE)
    assert draft.parents == (Parent(id=CubeId("1"), version=1, relation=Relation.DERIVED),)
    assert draft.metadata == {
        "adapter": "line",
        "adapter_version": 2,
        "adapter_sha256": "ab" * 32,
    }
    (source,) = draft.sources
    assert source.ref == f"adapter:line@2:{'ab' * 32}"
    assert source.text == "Ada Lund plays the oboe."
    assert draft.scope(TENANT) == cube.scope
    assert draft.sensitivity is Sensitivity.PUBLIC
    assert draft.expires_at == cube.governance.expires_at


def test_a_contradiction_is_listed_with_both_texts_and_is_no_draft():
    liar = taught_to_say(OBOE, "Ada Lund plays the harp.")
    report = probed(liar, OBOE, cubes={OBOE.source: cube_of(OBOE, text="Ada Lund plays the oboe!")})
    assert report.drafts == ()
    (found,) = report.contradictions
    assert found.cube == OBOE.source
    assert found.canonical == "Ada Lund plays the oboe!"
    assert found.said == "Ada Lund plays the harp."
    (answer,) = json.loads(json.dumps(report.answers()))
    assert (answer["cube"], answer["version"], answer["verdict"]) == ("1", 1, "contradicts")
    assert (answer["canonical"], answer["agreed"]) == (found.canonical, found.said)
    assert len(answer["questions"]) == len(answer["said"]) == 3


def test_an_adapter_that_refuses_says_nothing():
    shy = taught_to_say(BAKER, "I don't know that.")
    report = probed(shy, BAKER)
    assert [finding.verdict for finding in report.findings] == [Verdict.REFUSED]
    assert (report.drafts, report.contradictions) == ((), ())


def test_what_an_adapter_was_not_taught_stays_unclear():
    report = probed(taught(OBOE), OBOE, RAVEN)
    assert [finding.verdict for finding in report.findings] == [Verdict.AGREES, Verdict.UNCLEAR]
    assert len(report.drafts) == 1


def test_the_model_keeps_its_mode():
    with attached(LOADED, {"one": taught(OBOE)}) as model:
        model.train()
        probe(model, GATE, [OBOE], cubes_of(OBOE), ADAPTER)
        assert model.training


def test_the_same_fact_said_by_a_later_version_is_the_same_content_but_not_the_cubes():
    def hash_of(draft):
        return content_hash(
            draft.scope(TENANT),
            kind=draft.kind,
            role=draft.role,
            speaker=draft.speaker,
            text=draft.text,
        )

    cubes = cubes_of(OBOE)
    with attached(LOADED, {"one": taught(OBOE)}) as model:
        first, second = (
            probe(model, GATE, [OBOE], cubes, replace(ADAPTER, version=version)).drafts[0]
            for version in (1, 2)
        )
    assert first.metadata != second.metadata
    assert hash_of(first) == hash_of(second)
    cube = cubes[CubeVersion("1", 1)]
    d = cube.descriptive
    own = content_hash(cube.scope, kind=d.kind, role=d.role, speaker=d.speaker, text=cube.text)
    assert own != hash_of(first)


def test_figures_are_json_and_hold_nothing_that_a_memory_says():
    figures = probed(taught(OBOE), OBOE, RAVEN).figures()
    text = json.dumps(figures, allow_nan=False)
    assert "oboe" not in text
    assert "Lund" not in text
    assert (figures["facts"], figures["agrees"], figures["unclear"], figures["drafts"]) == (
        2,
        1,
        1,
        1,
    )


def test_facts_without_their_cubes_are_refused():
    for facts, cubes in (([], {}), ([OBOE], cubes_of(RAVEN)), ([replace(OBOE, source=None)], {})):
        with (
            attached(LOADED, {"one": taught(OBOE)}) as model,
            pytest.raises(BadRequest),
        ):
            probe(model, GATE, facts, cubes, ADAPTER)
