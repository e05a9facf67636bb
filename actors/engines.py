"""Engines as who calls them sees them: gateways and the scheduler. Without the model's libraries, so that one of
these that is started anew serves or leads some seconds earlier."""

import asyncio
import time
from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from ray.actor import ActorHandle

from actors.calls import answer, own_errors
from memcube.activation.contract import Usage
from memcube.activation.gate_status import GateStatus
from memcube.activation.stats import KvStats
from memcube.chat.contract import BuildRequest, ChatPiece, ChatPrompt, EngineFacts, KvBytes
from memcube.errors import DeadlineExceeded

LOAD_DEADLINE_S = 300.0
CALL_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What an engine runs. ``why_not`` says why segments can't be composed, if they can't;
    ``composing`` which modes are composed now, with the fidelity gate's report."""

    name: str
    fingerprint: str
    max_positions: int
    device: str
    node: str
    why_not: str | None
    composing: GateStatus = field(default_factory=GateStatus)


class RemoteChatModel:
    """A ``ChatModel`` that asks the actor."""

    def __init__(self, handle: ActorHandle[Any], number: int) -> None:
        self._handle = handle
        self._name = f"engine {number}"

    async def describe(self) -> ModelInfo:
        call = self._handle.describe.remote()
        return await answer(call, of=self._name, deadline_s=LOAD_DEADLINE_S)

    async def chat(self, prompt: ChatPrompt) -> AsyncGenerator[ChatPiece]:
        """The answer in pieces; closing the iterator ends the work there."""
        refs = self._handle.chat.options(num_returns="streaming").remote(prompt)
        # The engine keeps the deadline; this one is for an engine that is gone without a word.
        until = time.monotonic() + prompt.deadline_s + 10.0
        try:
            while True:
                with own_errors(self._name):
                    try:
                        left_s = max(until - time.monotonic(), 0.1)
                        ref = await asyncio.wait_for(anext(refs), left_s)
                        piece = cast(ChatPiece, await ref)
                    except StopAsyncIteration:
                        return
                    except TimeoutError:
                        raise DeadlineExceeded(f"{self._name} said nothing for too long") from None
                yield piece
                if piece.finish is not None:
                    return
        finally:
            ray.cancel(refs)

    async def facts(self) -> EngineFacts | None:
        return await answer(self._handle.facts.remote(), of=self._name, deadline_s=LOAD_DEADLINE_S)

    async def build(self, wanted: BuildRequest, *, leader: int | None = None) -> Usage:
        call = self._handle.build.remote(wanted, leader)
        return await answer(call, of=self._name, deadline_s=LOAD_DEADLINE_S)

    async def forget(
        self, cubes: Collection[str], tenant: str | None, *, leader: int | None = None
    ) -> int:
        call = self._handle.forget.remote(list(cubes), tenant, leader)
        return await answer(call, of=self._name, deadline_s=CALL_DEADLINE_S)

    async def held(self, cubes: Collection[str], *, leader: int) -> set[str]:
        call = self._handle.held.remote(list(cubes), leader)
        return await answer(call, of=self._name, deadline_s=CALL_DEADLINE_S)

    async def residency(self, cubes: Collection[str]) -> list[KvBytes]:
        call = self._handle.residency.remote(list(cubes))
        return await answer(call, of=self._name, deadline_s=CALL_DEADLINE_S)

    async def stats(self) -> KvStats:
        call = self._handle.stats.remote()
        return await answer(call, of=self._name, deadline_s=10.0)
