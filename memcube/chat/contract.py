"""What goes between the gateway and the actor that has the model."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar

from memcube.activation.contract import AdapterRef, FinishReason, Mode, Sampling, Usage
from memcube.activation.stats import KvStats
from memcube.errors import MemCubeError
from memcube.ids import CubeId, TenantId

log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Parametric(StrEnum):
    """Where memories stand that the answering adapter holds in its weights."""

    BESIDE = "beside"
    """In the prompt all the same."""
    INSTEAD = "instead"
    """Not in the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message of the conversation so far."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySegment:
    """Memories that are read together, and whose KV is built, kept and attached as one.

    ``text`` ends with a line break. The same cubes give the same text, whatever was asked: that is
    what makes the KV of one question fit the next.
    """

    text: str
    cubes: tuple[CubeId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation to go on with, and the memories that it may use.

    ``salt`` separates tenants in every KV key. ``group`` names the conversation, whose next turn is
    likely to follow.
    """

    turns: tuple[Turn, ...]
    segments: tuple[MemorySegment, ...]
    tenant: TenantId
    salt: str
    group: str
    mode: Mode
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    deadline_s: float
    adapter: AdapterRef | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentUse:
    """How much of a segment's KV was attached: exactly, or composed; the rest was read as text."""

    num_tokens: int
    exact: int
    composed: int

    @property
    def form(self) -> str:
        """``exact_kv``, ``composed_kv`` or ``text``: the form that most of it had."""
        text = self.num_tokens - self.exact - self.composed
        if self.exact >= max(self.composed, text, 1):
            return "exact_kv"
        return "composed_kv" if self.composed >= max(text, 1) else "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPiece:
    """A part of an answer. The last one alone has ``finish``, ``usage`` and ``uses`` (a segment each)."""

    text: str
    finish: FinishReason | None = None
    usage: Usage | None = None
    uses: tuple[SegmentUse, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """Memories to read ahead of any question.

    ``mode`` says what is built: in ``EXACT`` the chain behind the default system text, in one that
    composes each segment apart, where the model can be composed. With an ``adapter`` it is built with
    that one, and exactly.
    """

    segments: tuple[MemorySegment, ...]
    tenant: str
    salt: str
    group: str
    mode: Mode = Mode.EXACT
    adapter: AdapterRef | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KvBytes:
    """Bytes of KV in a medium of a node: ``device``, ``host``, ``disk`` or ``object``."""

    medium: str
    node: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What the scheduler reckons with: where an engine is, the bytes of KV that its device may hold, what a
    token takes there, and the shortest and the longest text (in tokens) whose KV it keeps."""

    node: str
    device_bytes: int
    bytes_per_token: int
    least_tokens: int
    most_tokens: int


class ChatModel(Protocol):
    """A model that answers, as the gateway sees it."""

    def chat(self, prompt: ChatPrompt) -> AsyncGenerator[ChatPiece]:
        """The answer in pieces; closing the iterator ends the work.

        Raises:
            BadRequest: the prompt doesn't fit the model.
            AdapterUnusable: the prompt's adapter can't be used; before anything is said.
            TooBusy: too much waits; says when to try again.
            Unavailable, DeadlineExceeded: no answer.
        """
        ...


class KvModel(ChatModel, Protocol):
    """A chat model whose KV can be built, found and dropped by cube."""

    async def build(self, wanted: BuildRequest) -> Usage:
        """Compute and store the KV of memories, as far as it isn't stored. Idempotent.

        Raises:
            AdapterUnusable: the adapter can't be used. Others as ``chat``.
        """
        ...

    async def forget(self, cubes: Collection[str], tenant: str | None) -> int:
        """Make all KV unservable that holds one of these cubes, and all of a tenant."""
        ...

    async def residency(self, cubes: Collection[str]) -> list[KvBytes]:
        """Bytes of the payloads that hold any of these cubes, each payload counted once a medium."""
        ...

    async def stats(self) -> KvStats:
        """This moment."""
        ...

    async def facts(self) -> EngineFacts | None:
        """What the scheduler reckons with; None where it leaves this engine alone."""
        ...


async def in_time(asked: Awaitable[_T], deadline_s: float) -> _T | None:
    """What a part says of itself; None where it doesn't in time: nobody waits for a dead one."""
    try:
        return await asyncio.wait_for(asked, deadline_s)
    except (MemCubeError, TimeoutError) as failed:
        log.info("a part did not say: %s", failed or type(failed).__name__)
        return None
