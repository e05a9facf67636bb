"""What a run does to its buffer, one operation after another; pure.

A prompt is filled exactly, by stored blocks and by computing, or in part from segments that were
built apart. Then what comes before the first such segment is exact; what lies in it and behind it is
near to a full prefill, and is not stored as blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from memcube.activation.contract import SegmentRef


@dataclass(slots=True)
class Extend:
    """Fill the slots up to ``end``: attach what is stored, prefill the rest."""

    end: int


@dataclass(slots=True)
class Load:
    """Copy a stored segment to its slots, which come next. Where it is gone, they are prefilled."""

    index: int
    segment: SegmentRef


@dataclass(slots=True)
class Choose:
    """Find the slots to compute again, now that all segments are there."""


@dataclass(slots=True)
class Recompute:
    """Compute these slots, ascending: chosen ones again, and from ``first_new`` on the prompt's rest."""

    slots: Sequence[int]
    first_new: int
    done: int = 0

    def next(self, num_tokens: int) -> Sequence[int]:
        return self.slots[self.done : self.done + num_tokens]


@dataclass(slots=True)
class Decode:
    """Sample until the answer ends."""


Operation = Extend | Load | Choose | Recompute | Decode


class Plan(NamedTuple):
    """A run's operations. From slot ``exact_end`` on the KV is not that of a full prefill; None: all
    of it is. ``cold`` are segments that would have been composed, had they been stored."""

    operations: list[Operation]
    exact_end: int | None
    cold: list[int]


def plan_exact(num_prompt: int) -> Plan:
    """The whole prompt, then the answer."""
    return Plan([Extend(num_prompt), Decode()], None, [])


def plan_composed(
    num_prompt: int,
    segments: Sequence[SegmentRef],
    is_stored: Sequence[bool],
    *,
    num_exact: int,
    block_tokens: int,
    recompute: bool,
) -> Plan:
    """The prompt with its segments composed where they are stored.

    ``num_exact`` tokens can be attached exactly from the beginning on. Segments that they reach,
    but for less than a block, are filled exactly. One that isn't stored is prefilled in its place,
    as to build it apart would take as long and give less. The first one is exact in any case, as it
    stands where it was built.
    """
    operations: list[Operation] = []
    exact_end: int | None = None
    cold: list[int] = []
    filled = 0
    for index, segment in enumerate(segments):
        if segment.end - num_exact < block_tokens:
            continue
        if not is_stored[index]:
            cold.append(index)
            continue
        if filled < segment.start:
            operations.append(Extend(segment.start))
        operations.append(Load(index, segment))
        filled = segment.end
        if index > 0 and exact_end is None:
            exact_end = segment.start
    if exact_end is not None and recompute:
        if filled < segments[-1].end:
            operations.append(Extend(segments[-1].end))
        operations.append(Choose())
    else:
        operations.append(Extend(num_prompt))
    return Plan([*operations, Decode()], exact_end, cold)
