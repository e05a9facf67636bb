"""A model that chats: an engine, with prompts laid out for its tokenizer. Hosted by an actor."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from memcube.activation.contract import GenerateRequest, Mode, Sampling, SegmentRef, Usage
from memcube.activation.engine import Engine
from memcube.chat.contract import ChatPiece, ChatPrompt, MemorySegment, SegmentUse
from memcube.chat.prompt import BuiltPrompt, PromptBuilder


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """Memories to read ahead of any question."""

    segments: tuple[MemorySegment, ...]
    tenant: str
    salt: str
    group: str


class ChatHost:
    """A ``ChatModel`` over one engine."""

    def __init__(self, engine: Engine, prompts: PromptBuilder) -> None:
        self._engine = engine
        self._prompts = prompts

    async def chat(self, prompt: ChatPrompt) -> AsyncGenerator[ChatPiece]:
        """The answer in pieces; see ``contract.ChatModel``."""
        built = self._prompts.build(prompt)
        request = GenerateRequest(
            prompt_ids=built.ids,
            tenant=prompt.tenant,
            salt=prompt.salt,
            sampling=prompt.sampling,
            max_tokens=prompt.max_tokens,
            stop=prompt.stop,
            deadline_s=prompt.deadline_s,
            mode=prompt.mode,
            segments=built.segments,
            adapter=prompt.adapter,
            group=prompt.group,
            members=built.members,
        )
        async with aclosing(self._engine.generate(request)) as pieces:
            async for piece in pieces:
                if piece.usage is None:
                    yield ChatPiece(text=piece.text)
                else:
                    yield ChatPiece(
                        text=piece.text,
                        finish=piece.finish,
                        usage=piece.usage,
                        uses=segment_uses(built.segments, piece.usage),
                    )

    async def build(self, wanted: BuildRequest) -> Usage:
        """Compute and store the KV of these memories when nothing else is to be done."""
        return await self._engine.build(self._ahead(self._prompts.prefix(wanted.segments), wanted))

    def _ahead(self, built: BuiltPrompt, wanted: BuildRequest) -> GenerateRequest:
        # A segment must end before the prompt does: one token more stands for what will follow.
        return GenerateRequest(
            prompt_ids=(*built.ids, built.ids[-1]),
            tenant=wanted.tenant,
            salt=wanted.salt,
            sampling=Sampling(),
            mode=Mode.EXACT,
            segments=built.segments,
            group=wanted.group,
            members=built.members,
        )


def segment_uses(segments: Sequence[SegmentRef], usage: Usage) -> tuple[SegmentUse, ...]:
    """What of each segment was attached: exact KV lies at the prompt's beginning, composed KV
    behind it."""
    uses: list[SegmentUse] = []
    composed_end = usage.attached_exact + usage.attached_composed
    for segment in segments:
        exact = max(0, min(segment.end, usage.attached_exact) - segment.start)
        composed = max(0, min(segment.end, composed_end) - max(segment.start, usage.attached_exact))
        uses.append(
            SegmentUse(num_tokens=segment.end - segment.start, exact=exact, composed=composed)
        )
    return tuple(uses)
