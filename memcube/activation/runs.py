"""A request on its way through an engine, and what comes of it."""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from memcube.activation.compose import Place
from memcube.activation.contract import GenerateRequest, Piece
from memcube.activation.detokenise import TextStream
from memcube.activation.forward import KvBuffer
from memcube.activation.lora import LoraAdapter
from memcube.activation.operations import Operation, Plan, plan_exact
from memcube.activation.sampling import Sampler
from memcube.activation.stops import StopStrings
from memcube.errors import MemCubeError


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """What runs at once. A step's forward holds ``step_tokens`` at most, so that decoding runs
    don't stall behind a long prompt; ``buffer_bytes`` bounds the runs' own KV."""

    block_tokens: int = 64
    max_running: int = 8
    step_tokens: int = 256
    background_tokens: int = 64
    buffer_bytes: int = 1 << 30
    default_max_tokens: int = 256
    build_wait_s: float = 30.0

    def __post_init__(self) -> None:
        if self.step_tokens <= self.max_running:
            raise ValueError("step_tokens must be more than max_running: prompts need some")


@dataclass(slots=True, eq=False)
class Run:
    """One request on its way. Its buffer holds the KV of all its tokens but the last sampled."""

    request: GenerateRequest
    background: bool
    shares: bool
    """Whether its blocks may come from the pool and go there."""
    root: str
    """The parent of its first block."""
    keys: tuple[str, ...]
    """Keys of the prompt's full blocks, if it shares."""
    max_tokens: int
    submitted_at: float
    deadline_at: float | None
    sampler: Sampler
    text: TextStream
    stops: StopStrings
    tokens: list[int]
    lora: LoraAdapter | None = None
    """The adapter that the request names, once it is loaded."""
    fetched: dict[str, Tensor] = field(default_factory=dict)
    """Blocks that were brought up from below the device for this run."""
    segment_keys: tuple[str, ...] = ()
    """Keys of the request's segments, if it composes."""
    places: list[Place] = field(default_factory=list)
    """Where segments were attached."""
    plan: Plan = field(default_factory=lambda: plan_exact(0))
    to_cut: int | None = None
    """A segment that comes to stand, exact, behind its prefix: it is stored apart too."""
    forgotten: set[str] = field(default_factory=set)
    """Cubes that were deleted meanwhile: KV that holds them isn't stored."""
    operations: deque[Operation] = field(default_factory=deque)
    buffer: KvBuffer | None = None
    admitted_at: float = 0.0
    first_at: float = 0.0
    waits_until: float | None = None
    loading: bool = False
    """Whether blocks for it are on their way up; it is not admitted before."""
    num_sampled: int = 0
    num_attached: int = 0
    num_composed: int = 0
    num_recomputed: int = 0
    num_prefilled: int = 0
    num_stored: int = 0
    """How many blocks, from the first on, need not be offered to the pool any more."""
    internal: bool = False
    """Whether it is the batcher's own idea, so that no one hears of it."""
    unsent: list[int] = field(default_factory=list)
    done: bool = False


class Event(NamedTuple):
    """What a run gave. After an error or a piece with ``finish`` nothing more comes from it."""

    run: Run
    what: Piece | MemCubeError


class Step(NamedTuple):
    """What one step gave. ``is_idle``: nothing was done, as all runs wait, or there are none."""

    events: list[Event]
    is_idle: bool
