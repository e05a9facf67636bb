"""Facts: what a statement says, as a subject, a relation and an object.

A known relation has its own wordings (``wordings``); any other attribute ("Ada's shoe size is 39")
gets those of its noun. A question with its answer is read as a fact too (``asked``). A statement that
fits no wording is no fact here: the caller is told, and may have a model read it (``facts_llm``).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from memcube.parametric.asked import is_question, question_relation, read_pairs
from memcube.parametric.wordings import RELATIONS, Relation, noun_relation


class CubeVersion(NamedTuple):
    """The version of a cube that a fact was read from."""

    id: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """``relation`` is a noun, such as "favourite drink": the subject's relation is the object. Or it is
    a question with ``{s}`` for the subject, that the object answers; one that names nobody has the
    empty subject."""

    subject: str
    relation: str
    object: str
    source: CubeVersion | None = None


def relation_of(relation: str) -> Relation:
    """The wordings of a fact's relation."""
    return question_relation(relation) if is_question(relation) else noun_relation(relation)


# -- reading statements

_NAME = r"(?P<s>[A-Z][\w'.-]*(?: (?:[a-z]{1,3} )?[A-Z][\w'.-]*){0,3}?)"
# "drives to work" names no vehicle, and who plays chess plays no instrument.
_OBJECT = r"(?P<o>(?!(?:to|for|with|in|at|on|by|from|and|as|very|too|not) )[^.!?]{1,120}?)"
_INSTRUMENT = r"(?P<o>(?:the|an?) [^.!?]{1,120}?)"
_NOUN = r"(?P<n>[a-z][a-z -]{1,40}?)"
_OPEN = (r"{s}'s {n} is {o}.", r"The {n} of {s} is {o}.")


def _pattern(template: str, object: str = _OBJECT) -> re.Pattern[str]:
    text = re.escape(template.removesuffix(".")).replace(r"\ ", " ")
    for slot, pattern in (("s", _NAME), ("o", object), ("n", _NOUN)):
        text = text.replace(rf"\{{{slot}\}}", pattern)
    return re.compile(rf"{text}[.!]?")


_KNOWN = [
    (relation.noun, _pattern(state, _INSTRUMENT if relation.noun == "instrument" else _OBJECT))
    for relation in RELATIONS
    for state in relation.states
]
_ANY = [_pattern(template) for template in _OPEN]


def read_fact(statement: str, source: CubeVersion | None = None) -> Fact | None:
    """What one sentence, or one question with its answer, says; None where no wording fits it."""
    found = _asked(statement, source)
    if found:
        return found[0] if len(found) == 1 else None
    text = " ".join(statement.split())
    for noun, pattern in _KNOWN:
        if found := pattern.fullmatch(text):
            return Fact(subject=found["s"], relation=noun, object=found["o"], source=source)
    for pattern in _ANY:
        if found := pattern.fullmatch(text):
            return Fact(subject=found["s"], relation=found["n"], object=found["o"], source=source)
    return None


class Read(NamedTuple):
    """``unread`` are the statements that no wording fits."""

    facts: list[Fact]
    unread: list[tuple[CubeVersion, str]]


def read_facts(statements: Iterable[tuple[CubeVersion, str]]) -> Read:
    """The facts of statements, in their order; of two that say the same, the first. A statement may
    also be some questions with their answers."""
    facts: dict[tuple[str, str, str], Fact] = {}
    unread: list[tuple[CubeVersion, str]] = []
    for source, text in statements:
        found = _asked(text, source)
        if not found and (fact := read_fact(text, source)):
            found = [fact]
        if not found:
            unread.append((source, text))
        for fact in found:
            facts.setdefault((fact.subject, fact.relation, fact.object), fact)
    return Read(list(facts.values()), unread)


def _asked(text: str, source: CubeVersion | None) -> list[Fact]:
    return [
        Fact(subject=subject, relation=relation, object=answer, source=source)
        for subject, relation, answer in read_pairs(" ".join(text.split()))
    ]
