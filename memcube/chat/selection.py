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

from memcube.chat.contract import MemorySegment
from memcube.context import estimate_tokens, memory_line
from memcube.cube import MemCube
from memcube.ids import CubeId
from memcube.retrieval.ranker import Hit
from memcube.window import Window

SEGMENT_TOKENS = 512
"""A segment holds no more, unless one memory alone is longer."""


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
    """Segments of these cubes, in their order, each of SEGMENT_TOKENS at most."""
    packed: list[Packed] = []
    group: list[tuple[MemCube, str]] = []
    tokens = 0
    for cube in cubes:
        d = cube.descriptive
        line = memory_line(cube.text, speaker=d.speaker, time=d.event_time or d.created_at) + "\n"
        cost = estimate_tokens(line)
        if group and tokens + cost > SEGMENT_TOKENS:
            packed.append(_packed(group, tokens, worth))
            group, tokens = [], 0
        group.append((cube, line))
        tokens += cost
    if group:
        packed.append(_packed(group, tokens, worth))
    return packed


def fitting(packed: Sequence[Packed], *, token_budget: int) -> tuple[MemorySegment, ...]:
    """The worthiest segments that fit, oldest first."""
    left = token_budget
    chosen: list[Packed] = []
    for one in sorted(packed, key=lambda one: (-one.worth, one.place)):
        if one.num_tokens <= left:
            chosen.append(one)
            left -= one.num_tokens
    return tuple(one.segment for one in sorted(chosen, key=lambda one: one.place))


def _packed(group: Sequence[tuple[MemCube, str]], tokens: int, worth: float) -> Packed:
    first = group[0][0]
    return Packed(
        segment=MemorySegment(
            text="".join(line for _, line in group), cubes=tuple(cube.id for cube, _ in group)
        ),
        num_tokens=tokens,
        worth=worth,
        place=(first.descriptive.event_time or first.descriptive.created_at, first.id),
    )
