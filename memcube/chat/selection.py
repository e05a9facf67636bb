"""Which memories go into a prompt, packed so that the same ones make the same segments.

A turn found by a search is read with the turns around it: threads are cut into windows of a fixed
number of turns, from their first on, and a window goes in whole. So two questions that touch the
same part of a conversation get the same segments, byte for byte, and the KV of the first serves the
second. Memories without a thread are packed in the order of their ids. Pure.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from memcube.chat.contract import MemorySegment
from memcube.context import estimate_tokens, memory_line
from memcube.cube import MemCube
from memcube.ids import CubeId
from memcube.retrieval.ranker import Hit
from memcube.window import Window

SEGMENT_TOKENS = 512
"""A segment holds no more, unless one memory alone is longer."""
SHORT_TOKENS = 256
"""A last segment that would be shorter takes its share of the one before: the KV of short segments
loses more when it is composed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a search suggests: windows of threads and single cubes, each with its worth."""

    windows: Mapping[Window, float]
    singles: Mapping[CubeId, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A segment with what choosing and ordering it needs."""

    segment: MemorySegment
    num_tokens: int
    worth: float
    place: tuple[datetime, str]


class _Line(NamedTuple):
    cube: MemCube
    text: str
    num_tokens: int


def wanted(hits: Iterable[Hit]) -> Wanted:
    """The windows that the hits lie in. A window is worth the sum of its hits' scores."""
    windows: dict[Window, float] = defaultdict(float)
    singles: dict[CubeId, float] = {}
    for hit in hits:
        payload = hit.cube.payload
        thread, seq = payload.get("thread"), payload.get("seq")
        if thread is None or seq is None:
            singles[hit.id] = max(hit.score, 0.0)
        else:
            windows[Window.of(thread, seq)] += max(hit.score, 0.0)
    return Wanted(windows=windows, singles=singles)


def pack(cubes: Sequence[MemCube], *, worth: float) -> list[Packed]:
    """Segments of these cubes, in their order, each of SEGMENT_TOKENS at most, and of about
    SHORT_TOKENS at least where there are as many. More cubes at the end leave all segments but the last two."""
    groups: list[list[_Line]] = [[]]
    tokens = 0
    for cube in cubes:
        d = cube.descriptive
        text = memory_line(cube.text, speaker=d.speaker, time=d.event_time or d.created_at) + "\n"
        line = _Line(cube, text, estimate_tokens(text))
        if groups[-1] and tokens + line.num_tokens > SEGMENT_TOKENS:
            groups.append([])
            tokens = 0
        groups[-1].append(line)
        tokens += line.num_tokens
    if len(groups) > 1 and tokens < SHORT_TOKENS:
        groups[-2:] = _evened(groups[-2] + groups[-1])
    return [_packed(group, worth) for group in groups if group]


def _evened(lines: list[_Line]) -> list[list[_Line]]:
    """Two groups of these lines, as even as they come; each within its bound."""
    total = sum(line.num_tokens for line in lines)
    best, before = (total, 0), 0
    for place, line in enumerate(lines[:-1], 1):
        before += line.num_tokens
        best = min(best, (max(before, total - before), place))
    return [lines[: best[1]], lines[best[1] :]]


def fitting(packed: Sequence[Packed], *, token_budget: int) -> tuple[MemorySegment, ...]:
    """The worthiest segments that fit, oldest first."""
    left = token_budget
    chosen: list[Packed] = []
    for one in sorted(packed, key=lambda one: (-one.worth, one.place)):
        if one.num_tokens <= left:
            chosen.append(one)
            left -= one.num_tokens
    return tuple(one.segment for one in sorted(chosen, key=lambda one: one.place))


def _packed(group: Sequence[_Line], worth: float) -> Packed:
    first = group[0].cube
    return Packed(
        segment=MemorySegment(
            text="".join(line.text for line in group), cubes=tuple(line.cube.id for line in group)
        ),
        num_tokens=sum(line.num_tokens for line in group),
        worth=worth,
        place=(first.descriptive.event_time or first.descriptive.created_at, first.id),
    )
