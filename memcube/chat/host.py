"""A model that chats: an engine, with prompts laid out for its tokenizer. Hosted by an actor."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from memcube.activation.contract import (
    GenerateRequest,
    KvEngine,
    Sampling,
    SegmentRef,
    Usage,
)
from memcube.chat.contract import BuildRequest, ChatPiece, ChatPrompt, SegmentUse
from memcube.chat.prompt import BuiltPrompt, PromptBuilder


class ChatHost:
    """A ``ChatModel`` over one engine."""

    def __init__(self, engine: KvEngine, prompts: PromptBuilder) -> None:
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
        """Compute and store the KV of these memories when nothing else is to be done.

        A mode that the model's fidelity gate didn't pass is built, as it is served, exactly.
        """
        return await self._engine.build(self._ahead(self._prompts.prefix(wanted.segments), wanted))

    def _ahead(self, built: BuiltPrompt, wanted: BuildRequest) -> GenerateRequest:
        # A segment must end before the prompt does: one token more stands for what will follow.
        return GenerateRequest(
            prompt_ids=(*built.ids, built.ids[-1]),
            tenant=wanted.tenant,
            salt=wanted.salt,
            sampling=Sampling(),
            mode=wanted.mode,
            segments=built.segments,
            adapter=wanted.adapter,
            group=wanted.group,
            members=built.members,
        )


def segment_uses(segments: Sequence[SegmentRef], usage: Usage) -> tuple[SegmentUse, ...]:
    """What of each segment was attached: exact KV lies at the prompt's beginning, composed KV where
    the engine says."""
    composed = set(usage.composed)
    return tuple(
        SegmentUse(
            num_tokens=segment.end - segment.start,
            exact=0
            if segment in composed
            else max(0, min(segment.end, usage.attached_exact) - segment.start),
            composed=segment.end - segment.start if segment in composed else 0,
        )
        for segment in segments
    )
