"""Which memories say the same, and which contradict each other: pure functions over texts and facts.

Two are near-duplicates when their vectors and their words agree and nothing that turns a statement
around differs: a number, a negation, or what a sentence says of whom. Two contradict when each is one
sentence that gives the same subject's attribute another value, and a subject has one of it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from memcube.catalog import NewProposal, ProposalKind
from memcube.cube import MemCube
from memcube.ids import CubeId
from memcube.parametric.facts import Fact, read_fact

MAX_GROUP = 16
"""Cubes of one proposal: more are proposed in the next search, with the one that was made of these."""

_WORD = re.compile(r"\w+(?:['’]\w+)*", re.UNICODE)
_NEGATIONS = frozenset({"no", "not", "never", "none", "nobody", "nothing", "without", "cannot"})
_ARTICLES = re.compile(r"^(?:the|an?) ")
_MANY = frozenset({"allergy", "fear", "hobby", "instrument", "pet", "vehicle"})
"""Attributes of which one may have several."""


class Near(NamedTuple):
    """Another cube of the same scope, and the cosine of the two vectors."""

    id: CubeId
    cosine: float


def words(text: str) -> frozenset[str]:
    """The words of a text, folded."""
    return frozenset(word.casefold() for word in _WORD.findall(text))


def overlap(one: str, other: str) -> float:
    """The words that two texts share, of all they have (Jaccard)."""
    a, b = words(one), words(other)
    return len(a & b) / len(a | b) if a and b else 0.0


def same_statement(one: str, other: str) -> bool:
    """Whether nothing that turns a statement around differs."""
    a, b = words(one), words(other)
    if {w for w in a ^ b if w in _NEGATIONS or w.endswith(("n't", "n’t"))}:
        return False
    if {w for w in a ^ b if any(c.isdigit() for c in w)}:
        return False
    facts = _fact(one), _fact(other)
    return None in facts or facts[0] == facts[1]


def may_merge(cube: MemCube) -> bool:
    """Whether a cube can be part of a merge at all."""
    return bool(cube.text) and not cube.members and not cube.governance.frozen


def belong_together(one: MemCube, other: MemCube) -> bool:
    """Whether two cubes are of the same scope, speaker and sensitivity."""
    a, b = one.descriptive, other.descriptive
    return (
        one.scope == other.scope
        and (a.speaker, a.role) == (b.speaker, b.role)
        and one.governance.sensitivity == other.governance.sensitivity
    )


def duplicates(
    seeds: Iterable[MemCube],
    near: Mapping[CubeId, Sequence[Near]],
    known: Mapping[CubeId, MemCube],
    *,
    cosine: float,
    min_overlap: float,
) -> list[NewProposal]:
    """Groups in which each says the same as all others; a cube is in one of them.

    ``near`` are the index's neighbours of the seeds; all cubes are in ``known``.
    """
    taken: set[CubeId] = set()
    found: list[NewProposal] = []
    for seed in seeds:
        if seed.id in taken or not may_merge(seed):
            continue
        group, cosines, overlaps = [seed], [], []
        for id, alike in near.get(seed.id, ()):
            other = known.get(id)
            if other is None or id in taken or alike < cosine or len(group) == MAX_GROUP:
                continue
            shared = [overlap(member.text, other.text) for member in group]
            if (
                may_merge(other)
                and min(shared) >= min_overlap
                and all(
                    belong_together(m, other) and same_statement(m.text, other.text) for m in group
                )
            ):
                group.append(other)
                cosines.append(alike)
                overlaps += shared
        if len(group) > 1:
            taken.update(cube.id for cube in group)
            why = {"cosine": round(min(cosines), 4), "overlap": round(min(overlaps), 4)}
            found.append(_proposal(ProposalKind.DUPLICATE, group, _fullest(group).text, why))
    return found


def contradictions(cubes: Iterable[MemCube]) -> list[NewProposal]:
    """Statements of one scope that give a subject's attribute different values; the newest is what they
    would become."""
    said: dict[tuple[object, ...], list[tuple[MemCube, Fact]]] = defaultdict(list)
    for cube in cubes:
        fact = read_fact(cube.text) if may_merge(cube) else None
        if fact is not None and fact.relation not in _MANY:
            about = (cube.scope, fact.subject.casefold(), fact.relation)
            said[about].append((cube, fact))
    found: list[NewProposal] = []
    for statements in said.values():
        if len({_value(fact) for _, fact in statements}) < 2:
            continue
        statements.sort(key=lambda one: (_when(one[0]), one[0].id))
        group = [cube for cube, _ in statements][-MAX_GROUP:]
        newest, fact = statements[-1]
        # The values are the memories' own words: they are read in the cubes, while those are there.
        why = {"relation": fact.relation, "newest": newest.id}
        found.append(_proposal(ProposalKind.CONTRADICTION, group, newest.text, why))
    return found


def is_turn(cube: MemCube) -> bool:
    """Whether a cube is a turn of a conversation: a record of what was said, not a statement."""
    return cube.descriptive.seq is not None


def _proposal(
    kind: ProposalKind, group: Sequence[MemCube], text: str, why: Mapping[str, object]
) -> NewProposal:
    return NewProposal(
        kind=kind,
        cubes={cube.id: cube.version for cube in group},
        text=text,
        why={**why, "turns": any(is_turn(cube) for cube in group)},
    )


def _fullest(group: Sequence[MemCube]) -> MemCube:
    """The one with the most words; of these the newest."""
    return max(group, key=lambda cube: (len(words(cube.text)), _when(cube), cube.id))


def _when(cube: MemCube) -> datetime:
    return cube.descriptive.event_time or cube.updated_at


def _fact(text: str) -> tuple[str, str, str] | None:
    fact = read_fact(text)
    return None if fact is None else (fact.subject.casefold(), fact.relation, _value(fact))


def _value(fact: Fact) -> str:
    return _ARTICLES.sub("", fact.object.casefold())
