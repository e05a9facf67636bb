"""A chat model without a model: it says what it is told, and reports what it was asked."""

from collections.abc import AsyncGenerator, Sequence

from memcube.activation.contract import FinishReason, Usage
from memcube.chat.contract import ChatPiece, ChatPrompt, SegmentUse
from memcube.errors import MemCubeError


class ScriptedModel:
    """Answers with ``pieces``; the KV of what it was asked before counts as attached.

    ``failing`` is raised before the piece of that number.
    """

    def __init__(self, pieces: Sequence[str] = ("In ", "Oslo", ".")) -> None:
        self.pieces = list(pieces)
        self.prompts: list[ChatPrompt] = []
        self.failing: tuple[int, MemCubeError] | None = None
        self.closed_early = 0
        self._read: set[str] = set()

    async def chat(self, prompt: ChatPrompt) -> AsyncGenerator[ChatPiece]:
        """The scripted answer."""
        self.prompts.append(prompt)
        ended = False
        try:
            for number, text in enumerate(self.pieces):
                if self.failing is not None and self.failing[0] == number:
                    raise self.failing[1]
                yield ChatPiece(text=text)
            uses = []
            for segment in prompt.segments:
                tokens = len(segment.text.split())
                exact = tokens if segment.text in self._read else 0
                uses.append(SegmentUse(num_tokens=tokens, exact=exact, composed=0))
                self._read.add(segment.text)
            said = sum(len(turn.content.split()) for turn in prompt.turns)
            attached = sum(use.exact for use in uses)
            total = said + sum(use.num_tokens for use in uses)
            usage = Usage(
                prompt_tokens=total,
                completion_tokens=len(self.pieces),
                attached_exact=attached,
                attached_composed=0,
                recomputed=0,
                prefilled=total - attached,
                queue_s=0.0,
                ttft_s=0.01,
            )
            ended = True
            yield ChatPiece(text="", finish=FinishReason.STOP, usage=usage, uses=tuple(uses))
        finally:
            self.closed_early += not ended
