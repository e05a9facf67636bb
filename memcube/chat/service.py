"""One chat request's way through the gateway: choose memories, choose an engine, stream, report.

Memories are read from the catalog at the time of the request, so what was deleted, changed or has
expired is not in the prompt; and since KV is found by the prompt's own tokens, no payload of an
older version can be attached to it.
"""

import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple

from memcube.activation.contract import AdapterRef, FinishReason, Mode, Sampling, Usage
from memcube.catalog import AdapterRecord, Principal
from memcube.chat.adapters import AdapterChoice, Refusal
from memcube.chat.contract import (
    ChatModel,
    ChatPrompt,
    MemorySegment,
    Parametric,
    SegmentUse,
    Turn,
)
from memcube.chat.router import Part, Router
from memcube.chat.selection import Packed, fitting, pack, wanted
from memcube.config import ChatConfig
from memcube.cube import MemCube, Scope
from memcube.errors import AdapterUnusable, BadRequest, UnknownBackend
from memcube.ids import CubeId, TenantId, digest
from memcube.parametric.registry import reference
from memcube.reader.messages import Header, Message
from memcube.service import AddRequest, MemoryService, SearchScope

CANDIDATES = 24
"""Hits that vote for windows: more of them vote for windows that answer nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryChoice:
    """Which memories an answer may use, and how. ``write_back`` remembers the turn afterwards."""

    scope: SearchScope
    token_budget: int
    mode: Mode
    parametric: Parametric = Parametric.BESIDE
    write_back: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A conversation to go on with. ``memory`` None uses none. ``adapter`` names one that serves;
    None leaves it to the scope."""

    turns: tuple[Turn, ...]
    sampling: Sampling
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    memory: MemoryChoice | None = None
    adapter: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CubeUse:
    """A cube in the prompt, and the form that it was read in; or one left out of it, ``parametric``.
    ``in_adapter``: the adapter that answered holds its present text."""

    id: CubeId
    form: str
    in_adapter: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How an answer came about."""

    usage: Usage
    cubes: tuple[CubeUse, ...]
    mode: Mode
    engine: int
    retrieval_ms: float
    written_back: tuple[CubeId, ...] = ()
    adapter: AdapterRecord | None = None
    refusal: Refusal | None = None
    """Of the scope's adapter, in whose place the base model answered."""


class Recalled(NamedTuple):
    """Memories for a prompt, and those found that were left out of it."""

    segments: tuple[MemorySegment, ...] = ()
    left_out: tuple[CubeId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A part of an answer; the last one has ``finish`` and ``report``."""

    text: str
    finish: FinishReason | None = None
    report: Report | None = None


class ChatService:
    """Answers chats over engines numbered as the router knows them."""

    def __init__(
        self,
        memory: MemoryService,
        models: Sequence[ChatModel],
        config: ChatConfig,
        router: Router | None = None,
        adapters: AdapterChoice | None = None,
    ) -> None:
        """``router`` is shared with who else sends work to these models. Without ``adapters`` these
        serve none."""
        self._memory = memory
        self._models = models
        self._config = config
        self._router = router or Router(len(models))
        self._adapters = adapters

    async def answer(self, principal: Principal, request: ChatRequest) -> AsyncGenerator[Chunk]:
        """The answer in parts. Closing the iterator ends the work.

        Where the adapter of its scope can't be used, the base model answers.

        Raises:
            BadRequest: no turn of a user, or a prompt that the model can't take.
            NotFound: the adapter that it names doesn't serve.
            Other errors of ``memcube.errors``: why the adapter that it names can't be used.
            TooBusy: every engine has too much in line.
            Unavailable, DeadlineExceeded: no engine answered.
        """
        question = _question(request.turns)
        adapter = await self._adapter(principal, request)
        while True:
            try:
                answers = self._answered(principal, request, question, adapter)
                async with aclosing(answers) as chunks:
                    async for chunk in chunks:
                        yield chunk
                return
            except AdapterUnusable as unusable:
                # Nothing was said yet. Who names an adapter wants no other model's answer.
                if request.adapter is not None or not isinstance(adapter, AdapterRecord):
                    raise unusable.why from None
                assert self._adapters is not None
                adapter = self._adapters.refused(adapter, unusable.why)

    async def _answered(
        self,
        principal: Principal,
        request: ChatRequest,
        question: str,
        adapter: AdapterRecord | Refusal | None,
    ) -> AsyncGenerator[Chunk]:
        serving = adapter if isinstance(adapter, AdapterRecord) else None
        recalled, inside = Recalled(), frozenset[CubeId]()
        started = time.perf_counter()
        if (memory := request.memory) is not None:
            if serving is not None and self._adapters is not None:
                inside = await self._adapters.inside(serving)
            without = inside if memory.parametric is Parametric.INSTEAD else frozenset[CubeId]()
            recalled = await self.recall(principal, question, memory, without)
        retrieval_ms = (time.perf_counter() - started) * 1e3
        prompt = ChatPrompt(
            turns=request.turns,
            segments=recalled.segments,
            tenant=principal.tenant,
            salt=principal.tenant,
            group=_group(principal, request),
            mode=request.memory.mode if request.memory is not None else Mode.EXACT,
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            stop=request.stop,
            deadline_s=self._config.deadline_s,
            adapter=None if serving is None else reference(serving),
        )
        for attempt in self._router.attempts(_parts(principal, prompt)):
            with attempt as route:
                said: list[str] = []
                async with aclosing(self._models[route.engine].chat(prompt)) as pieces:
                    async for piece in pieces:
                        attempt.said = True
                        said.append(piece.text)
                        if piece.usage is None:
                            yield Chunk(text=piece.text)
                            continue
                        report = Report(
                            usage=piece.usage,
                            cubes=_uses(recalled, piece.uses, inside),
                            mode=prompt.mode,
                            engine=route.engine,
                            retrieval_ms=retrieval_ms,
                            written_back=await self._write_back(principal, request, "".join(said)),
                            adapter=serving,
                            refusal=adapter if isinstance(adapter, Refusal) else None,
                        )
                        yield Chunk(text=piece.text, finish=piece.finish, report=report)
                return

    async def _adapter(
        self, principal: Principal, request: ChatRequest
    ) -> AdapterRecord | Refusal | None:
        if request.adapter is not None:
            if self._adapters is None:
                raise UnknownBackend("adapter", request.adapter, ())
            return await self._adapters.named(principal.tenant, request.adapter)
        if self._adapters is None or self._config.adapter != "auto" or request.memory is None:
            return None
        scope = request.memory.scope
        if scope.cube_ids or scope.filters is not None:
            return None  # the adapter knows more than was asked for
        return await self._adapters.of_scope(
            Scope(
                tenant=principal.tenant,
                user_id=scope.user_id,
                agent_id=scope.agent_id,
                run_id=scope.run_id,
            )
        )

    async def recall(
        self,
        principal: Principal,
        question: str,
        choice: MemoryChoice,
        without: Collection[CubeId] = (),
    ) -> Recalled:
        """The memories for a question but ``without`` some, as segments of at most the choice's budget
        in all.

        Cubes that are named and fit the budget all go in, in their order: then nothing is searched.
        """
        scope = choice.scope
        if scope.cube_ids and scope.filters is None:
            named = await self._memory.members_of(principal, scope)
            everything = pack([cube for cube in named if cube.id not in without], worth=1.0)
            if sum(one.num_tokens for one in everything) <= choice.token_budget:
                left_out = tuple(cube.id for cube in named if cube.id in without)
                return Recalled(tuple(one.segment for one in everything), left_out)
        found = await self._memory.search(
            principal, question[-self._config.query_chars :], scope, top_k=CANDIDATES
        )
        left_out = tuple(hit.id for hit in found.hits if hit.id in without)
        suggested = wanted(found.hits)
        packed: list[Packed] = []
        if scope.cube_ids or scope.filters is not None:
            # The turns around a hit need not match what was asked for: the hits alone go in.
            ranking = [hit.id for hit in found.hits if hit.id not in without]
            cubes = await self._memory.get_many(principal, ranking)
            packed += _ranked(cubes, ranking, choice.token_budget)
        else:
            for window, turns in (await self._memory.turns(principal, suggested.windows)).items():
                kept = [cube for cube in turns if cube.id not in without]
                packed += pack(kept, worth=suggested.windows[window])
            ranking = [id for id in suggested.singles if id not in without]
            singles = await self._memory.get_many(principal, ranking)
            packed += _ranked(singles, ranking, choice.token_budget // 2)
        return Recalled(fitting(packed, token_budget=choice.token_budget), left_out)

    async def _write_back(
        self, principal: Principal, request: ChatRequest, answer: str
    ) -> tuple[CubeId, ...]:
        """The question and its answer as turns of the scope, stored before the answer ends."""
        if request.memory is None or not request.memory.write_back:
            return ()
        scope = request.memory.scope
        now = self._memory.now()
        said = [Message(role="user", content=_question(request.turns), time=now)]
        if answer.strip():
            said.append(Message(role="assistant", content=answer, time=now))
        header = Header(user_id=scope.user_id, agent_id=scope.agent_id, run_id=scope.run_id)
        (outcome,) = await self._memory.add(
            principal, [AddRequest(messages=tuple(said), header=header)], wait_indexed=False
        )
        return tuple(result.cube.id for result in outcome.results)


def _question(turns: Sequence[Turn]) -> str:
    for turn in reversed(turns):
        if turn.role == "user" and turn.content.strip():
            return turn.content
    raise BadRequest("hold nothing that a user says", "messages")


def _group(principal: Principal, request: ChatRequest) -> str:
    """The conversation: its scope, or else its first question, which all its requests repeat."""
    scope = request.memory.scope if request.memory is not None else SearchScope()
    first = next(turn.content for turn in request.turns if turn.role == "user")
    return digest("chat", principal.tenant, scope.user_id, scope.agent_id, scope.run_id, first)


def _parts(principal: Principal, prompt: ChatPrompt) -> list[Part]:
    """What of a prompt an engine may hold: each segment, and the conversation up to each turn."""
    parts = segment_parts(principal.tenant, prompt.segments, prompt.adapter)
    so_far = digest("turns", principal.tenant, *(part.digest for part in parts))
    for turn in prompt.turns:
        so_far = digest("turn", so_far, turn.role, turn.content)
        parts.append(Part(so_far, len(turn.content)))
    return parts


def segment_parts(
    tenant: TenantId, segments: Sequence[MemorySegment], adapter: AdapterRef | None
) -> list[Part]:
    """What of these segments an engine may hold: the same text's KV is another with another adapter."""
    built_with = None if adapter is None else adapter.name
    return [Part(digest("segment", tenant, built_with, s.text), len(s.text)) for s in segments]


def _uses(
    recalled: Recalled, uses: Sequence[SegmentUse], inside: Collection[CubeId]
) -> tuple[CubeUse, ...]:
    in_prompt = [
        CubeUse(id=cube, form=use.form, in_adapter=cube in inside)
        for segment, use in zip(recalled.segments, uses, strict=True)
        for cube in segment.cubes
    ]
    left_out = [CubeUse(id=id, form="parametric", in_adapter=True) for id in recalled.left_out]
    return (*in_prompt, *left_out)


def _ranked(cubes: Sequence[MemCube], ranking: Sequence[CubeId], token_budget: int) -> list[Packed]:
    """The best cubes that fit, packed in the order of their ids, so that a like choice is laid out
    alike."""
    order = {id: place for place, id in enumerate(ranking)}
    chosen: list[MemCube] = []
    left = token_budget
    for cube in sorted(cubes, key=lambda cube: order[cube.id]):
        (alone,) = pack([cube], worth=0.0)
        if alone.num_tokens <= left:
            chosen.append(cube)
            left -= alone.num_tokens
    return pack(sorted(chosen, key=lambda cube: cube.id), worth=1.0)
