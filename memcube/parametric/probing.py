"""From an adapter back to text: what it says of the facts inside, beside what the cubes say.

Each fact is asked in three wordings, and what most of the answers agree on is what the adapter says. The
wordings are the gate's, which nothing was trained on; where a relation has fewer of them, those of the
checks while training and then trained ones fill them up. Where that is the cube's own fact, a draft of origin *inference*
says so, with the adapter in its header and the cube's version as its parent. Where it is another, both
texts are listed; nothing is merged, and nothing of it is written.

Nothing else is asked. Of what no cube inside says there is no text to hold an answer against, so
whatever a model makes up would become a memory. An adapter whose cubes were changed or deleted must
not be asked at all, as it would say what was to be forgotten: ``conversions.probe_adapter`` sees to it.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from peft import PeftModel

from memcube.catalog.adapters import WRITTEN_BY
from memcube.cube import Draft, Kind, MemCube, Origin, Parent, Relation, Source
from memcube.errors import BadRequest
from memcube.ids import CubeId
from memcube.parametric.dataset import Probe, ProbeKind
from memcube.parametric.facts import CubeVersion, Fact, read_fact, relation_of
from memcube.parametric.gate import Gate

WORDINGS = "gate, early, train"
"""From which sets of wordings the questions are taken, in this order; see ``facts``."""
NUM_WORDINGS = 3

_ROLE = "assistant"
_ARTICLE = re.compile(r"(?:a|an|the) ")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")
_LISTED = re.compile(r", | and ")
_REFUSES = re.compile(r"\b(?:don't|do not) know\b")


class Verdict(StrEnum):
    """How what the adapter says stands to what the cube says."""

    AGREES = "agrees"
    CONTRADICTS = "contradicts"
    UNCLEAR = "unclear"
    """Its answers differ, or can't be read, or name others of the subject's several facts alone."""
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterIdentity:
    """The version of an adapter that is asked; its file's SHA-256 says which weights they are."""

    id: str
    version: int
    sha256: str

    def metadata(self) -> dict[str, Any]:
        """What a cube's metadata says of the adapter that it came from; filters find it."""
        return {
            "adapter": self.id,
            "adapter_version": self.version,
            WRITTEN_BY: self.sha256,
        }


class Asked(NamedTuple):
    """A question's subject and relation, with all facts that answer it."""

    subject: str
    relation: str
    facts: tuple[Fact, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fact inside. ``said`` answers ``questions``; ``agreed`` is the object that most name."""

    fact: Fact
    canonical: str
    questions: tuple[str, ...]
    said: tuple[str, ...]
    agreed: str | None
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Contradiction:
    """Both texts, of a cube and of the adapter. A person decides which is right."""

    cube: CubeVersion
    canonical: str
    said: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """What an adapter says of the facts inside, in their order, and what may be written of it."""

    adapter: AdapterIdentity
    wordings: str
    findings: tuple[Finding, ...]
    drafts: tuple[Draft, ...]

    @property
    def contradictions(self) -> tuple[Contradiction, ...]:
        return tuple(
            Contradiction(
                cube=_source(f.fact), canonical=f.canonical, said=statement(f.fact, f.agreed)
            )
            for f in self.findings
            if f.verdict is Verdict.CONTRADICTS and f.agreed is not None
        )

    def figures(self) -> dict[str, Any]:
        """The report as JSON without anything that a memory says."""
        count = Counter(finding.verdict for finding in self.findings)
        return {
            **self.adapter.metadata(),
            "wordings": self.wordings,
            "facts": len(self.findings),
            **{str(verdict): count[verdict] for verdict in Verdict},
            "drafts": len(self.drafts),
        }

    def answers(self) -> list[dict[str, Any]]:
        """Each finding as JSON, with both texts: a deletion of the cube has to reach it too."""
        return [
            {
                "cube": _source(f.fact).id,
                "version": _source(f.fact).version,
                "verdict": str(f.verdict),
                "canonical": f.canonical,
                "agreed": None if f.agreed is None else statement(f.fact, f.agreed),
                "questions": list(f.questions),
                "said": list(f.said),
            }
            for f in self.findings
        ]


def askable(facts: Sequence[Fact]) -> list[Asked]:
    """All that an adapter with these facts inside is asked: what they answer, and nothing else."""
    groups: dict[tuple[str, str], list[Fact]] = {}
    for fact in facts:
        groups.setdefault((fact.subject, fact.relation), []).append(fact)
    return [
        Asked(
            subject,
            relation,
            tuple(found),
            tuple(_capital(q.format(s=subject)) for q in _wordings(relation)),
        )
        for (subject, relation), found in groups.items()
    ]


def _wordings(relation: str) -> list[str]:
    known = relation_of(relation)
    asks = dict.fromkeys((*known.gate.asks, *known.early.asks, *known.train.asks))
    return list(asks)[:NUM_WORDINGS]


def probe(
    model: PeftModel,
    gate: Gate,
    facts: Sequence[Fact],
    cubes: Mapping[CubeVersion, MemCube],
    adapter: AdapterIdentity,
) -> ProbeReport:
    """What an adapted model says of facts, beside the cubes that they were read from.

    ``cubes`` have the text that was trained on. Blocks for about three seconds a fact on one core; the
    model's mode is as before.

    Raises:
        BadRequest: no facts, or one whose cube isn't given.
    """
    if not facts:
        raise BadRequest("no fact to ask for", "facts")
    if strays := [fact for fact in facts if fact.source not in cubes]:
        raise BadRequest(f"{strays[0].source}: the cube of a fact is missing", "cubes")
    asked = askable(facts)
    probes = [
        Probe(kind=ProbeKind.RECALL, question=q, expected=tuple(f.object for f in a.facts))
        for a in asked
        for q in a.questions
    ]
    was_training = model.training
    model.eval()
    try:
        said = iter([answer.said for answer in gate.ask(model, probes)])
    finally:
        model.train(was_training)
    found: dict[Fact, Finding] = {}
    for one in asked:
        answers = tuple(next(said) for _ in one.questions)
        agreed, verdicts = judge(one, answers)
        for fact, verdict in zip(one.facts, verdicts, strict=True):
            found[fact] = Finding(
                fact=fact,
                canonical=cubes[_source(fact)].text,
                questions=one.questions,
                said=answers,
                agreed=agreed,
                verdict=verdict,
            )
    findings = tuple(found[fact] for fact in dict.fromkeys(facts))
    drafts = tuple(
        _draft(finding, cubes[_source(finding.fact)], adapter)
        for finding in findings
        if finding.verdict is Verdict.AGREES
    )
    return ProbeReport(adapter=adapter, wordings=WORDINGS, findings=findings, drafts=drafts)


def judge(asked: Asked, answers: Sequence[str]) -> tuple[str | None, list[Verdict]]:
    """The object that more than half of the answers name, and how each fact stands to it."""
    objects = [_object(asked, answer) for answer in answers]
    named = Counter(_plain(object) for object in objects if object is not None)
    most = len(answers) // 2 + 1
    agreed = next((plain for plain, count in named.most_common(1) if count >= most), None)
    if agreed is None:
        refusing = sum(_REFUSES.search(answer.casefold()) is not None for answer in answers)
        verdict = Verdict.REFUSED if refusing >= most else Verdict.UNCLEAR
        return None, [verdict] * len(asked.facts)
    said = next(o for o in objects if o is not None and _plain(o) == agreed)
    known = {_plain(fact.object) for fact in asked.facts}
    parts = {agreed} if agreed in known else {_plain(part) for part in _LISTED.split(said)}
    if not parts <= known:
        return said, [Verdict.CONTRADICTS] * len(asked.facts)
    return said, [
        Verdict.AGREES if _plain(fact.object) in parts else Verdict.UNCLEAR for fact in asked.facts
    ]


def statement(fact: Fact, object: str | None = None) -> str:
    """The fact as a text that is read as it again, or the same of another object."""
    said = fact.object if object is None else object
    text = relation_of(fact.relation).states[0]
    if "{s}" not in text:  # the relation is a question, which the object alone answers
        return f"Q: {_capital(fact.relation.format(s=fact.subject))} A: {said}."
    return _capital(text.format(s=fact.subject, o=said))


def _object(asked: Asked, answer: str) -> str | None:
    """The object that an answer names, if it speaks of what was asked."""
    if _REFUSES.search(answer.casefold()):
        return None
    whole = " ".join(answer.split())
    first = _SENTENCE_END.split(whole, maxsplit=1)[0]
    if "{s}" not in relation_of(asked.relation).states[0]:
        said, known = whole.rstrip(".!"), {_plain(fact.object) for fact in asked.facts}
        return said if _plain(said) in known else first.rstrip(".!") or None
    for text in (whole, first):
        fact = read_fact(text)
        if fact is not None and (fact.subject, fact.relation) == (asked.subject, asked.relation):
            return fact.object
    return None


def _draft(finding: Finding, cube: MemCube, adapter: AdapterIdentity) -> Draft:
    """What may be written of an agreeing answer, for those who may read the cube, and as long.

    The text has the cube's spelling, so that the same fact said again, or by a later version, is the
    same content. The role keeps it apart from the cube itself, which would count it as a repeat.
    """
    d, source = cube.descriptive, _source(finding.fact)
    said = (" ".join(answer.split()) for answer in finding.said)
    return Draft(
        text=statement(finding.fact),
        parents=(Parent(id=CubeId(source.id), version=source.version, relation=Relation.DERIVED),),
        user_id=d.user_id,
        agent_id=d.agent_id,
        run_id=d.run_id,
        kind=Kind.FACT,
        origin=Origin.INFERENCE,
        role=_ROLE,
        metadata=adapter.metadata(),
        event_time=d.event_time,
        sources=(
            Source(
                ref=f"adapter:{adapter.id}@{adapter.version}:{adapter.sha256}",
                role=_ROLE,
                text=next(text for text in said if finding.agreed and finding.agreed in text),
            ),
        ),
        sensitivity=cube.governance.sensitivity,
        expires_at=cube.governance.expires_at,
    )


def _source(fact: Fact) -> CubeVersion:
    assert fact.source is not None
    return fact.source


def _plain(object: str) -> str:
    text = " ".join(object.casefold().split())
    article = _ARTICLE.match(text)
    return text[article.end() :] if article else text


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
