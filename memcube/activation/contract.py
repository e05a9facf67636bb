"""What a request asks of an engine, and what it gets.

The seam is narrow so that another engine can stand behind it: token ids in, pieces of text out, and
a report of what was attached. Nothing here needs torch.
"""

from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from memcube.activation.stats import AdapterStats, EngineStats
from memcube.errors import BadRequest, LimitExceeded

_MAX_STOPS = 16
_MAX_STOP_CHARS = 256


class Mode(StrEnum):
    """How stored KV may be used."""

    EXACT = "exact"
    """Only what equals a full prefill."""
    BLEND = "blend"
    """Segments built apart, a chosen part of their tokens recomputed."""
    FAST = "fast"
    """Segments built apart, as they are."""
    OFF = "off"
    """None is used and none is stored."""


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    DEADLINE = "deadline"


_ADAPTER = "adapter:"


class AdapterRef(NamedTuple):
    """A LoRA adapter in one version; both are part of a block's key."""

    id: str
    version: str

    @property
    def name(self) -> str:
        """What all KV built with it holds, beside the cubes: it is forgotten by this as a cube is by its
        id."""
        return f"{_ADAPTER}{self.id}:{self.version}"


def names_adapter(held: str) -> bool:
    """Whether what some KV holds is an adapter's name, and no cube's id."""
    return held.startswith(_ADAPTER)


class Member(NamedTuple):
    """A cube whose text begins at this token of the prompt: KV from there on holds it."""

    cube: str
    start: int


class SegmentRef(NamedTuple):
    """A part of the prompt, ``prompt_ids[start:end]``, that may be composed from a stored segment."""

    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """``temperature`` 0 is greedy. Without a ``seed`` one is drawn."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:  # refuses NaN too
            raise BadRequest("must lie between 0 and 100", "temperature")
        if not 0.0 < self.top_p <= 1.0:
            raise BadRequest("must lie above 0 and be 1 at most", "top_p")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One prompt to continue.

    ``prompt_ids`` is all of the prompt, segments included: in exact mode they are tokens like
    others. ``salt`` separates tenants: it is part of each key, so that no two of them share KV.
    ``group`` says whose next turn may follow (a conversation). ``max_tokens`` None is the engine's
    default, or what the model's window leaves. ``stop_ids`` None are the model's own.
    """

    prompt_ids: tuple[int, ...]
    tenant: str
    salt: str
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] | None = None
    deadline_s: float | None = None
    mode: Mode = Mode.EXACT
    segments: tuple[SegmentRef, ...] = ()
    adapter: AdapterRef | None = None
    group: str = ""
    members: tuple[Member, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise BadRequest("is empty", "prompt")
        if not self.salt:
            raise BadRequest("is empty; without one tenants would share KV", "salt")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise BadRequest("must be 1 or more", "max_tokens")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise BadRequest("must be above 0", "deadline_s")
        if len(self.stop) > _MAX_STOPS:
            raise LimitExceeded("stop strings", _MAX_STOPS, len(self.stop))
        if not all(self.stop):
            raise BadRequest("holds an empty string", "stop")
        if (longest := max(map(len, self.stop), default=0)) > _MAX_STOP_CHARS:
            raise LimitExceeded("characters of a stop string", _MAX_STOP_CHARS, longest)
        end = 0
        for segment in self.segments:
            if not end <= segment.start < segment.end < len(self.prompt_ids):
                raise BadRequest("must be ordered, apart and before the prompt's end", "segments")
            end = segment.end


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one answer took. The prompt's tokens are those attached and those prefilled.

    ``recomputed`` tokens were attached with a composed segment and then computed again.
    ``composed`` are the segments that were attached in another place than they were built at.
    """

    prompt_tokens: int
    completion_tokens: int
    attached_exact: int
    attached_composed: int
    recomputed: int
    prefilled: int
    queue_s: float
    ttft_s: float
    composed: tuple[SegmentRef, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of an answer, in order. The last one alone has ``finish`` and ``usage``.

    ``token_ids`` are those sampled since the piece before; text may lag behind them, while it can
    still become a stop string or a character.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None
    usage: Usage | None = None


class Generator(Protocol):
    """An engine as the actor sees it."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Piece]:
        """The answer in pieces. To close the iterator, or to cancel its task, ends the work.

        Raises:
            BadRequest: the request can never be served.
            UnknownBackend: a mode that this engine doesn't have, or any adapter where it serves none.
            AdapterUnusable: the adapter can't be loaded; before anything is said.
            TooBusy: too much waits already; says when to try again.
            DeadlineExceeded: no token came before the deadline. Later the answer ends with
                ``FinishReason.DEADLINE`` instead.
            Unavailable: the engine is closed, or the model failed.
        """
        ...


class KvEngine(Generator, Protocol):
    """All that the actor asks of an engine: ``engine.Engine`` and ``vllm_engine.VllmEngine``."""

    async def build(self, request: GenerateRequest) -> Usage:
        """Compute and store the KV of a prompt ahead of any question."""
        ...

    async def forget(self, cubes: Collection[str] = (), tenant: str | None = None) -> int:
        """Make all KV unservable that holds one of these cubes or was built with one of these adapters
        (by ``AdapterRef.name``), and all of a tenant. When it returns no request attaches them, and none
        on its way stores such KV where one could. The adapters' weights go too."""
        ...

    async def resident_bytes(self, cubes: Collection[str]) -> int:
        """The bytes on the device whose KV holds any of these cubes, as far as the engine knows."""
        ...

    async def cubes_held(self) -> set[str]:
        """The cubes that KV on the device holds, as far as the engine knows."""
        ...

    def stats(self) -> EngineStats:
        """This moment."""
        ...

    def adapter_stats(self) -> AdapterStats | None:
        """The adapters of this moment; None where it serves none."""
        ...

    async def close(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, give the others this time to end, and stop. Idempotent."""
        ...
