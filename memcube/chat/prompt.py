"""Turns and memories as the model's tokens, laid out so that what is stable comes first.

    system text · memories, segment by segment · the conversation

Each segment is tokenised on its own, so that its tokens don't hang on what stands before it. The
model's own chat template decides how turns are marked; where the memories go is found by a marker
that is random for each prompt. Special tokens in what callers or memories say are taken apart:
no text can end a turn or open another.
"""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from memcube.activation.contract import Member, SegmentRef
from memcube.chat.contract import ChatPrompt, MemorySegment, Turn
from memcube.context import CLOSING, OPENING
from memcube.errors import BadRequest

DEFAULT_SYSTEM = "You are a helpful assistant."
_BREAK = "\u200b"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltPrompt:
    """``ids`` of the whole prompt. ``segments[i]`` and ``members`` say where the memories are."""

    ids: tuple[int, ...]
    segments: tuple[SegmentRef, ...]
    members: tuple[Member, ...]


class PromptBuilder:
    """Lays prompts out for one tokenizer."""

    def __init__(self, tokenizer: Any, *, system: str = DEFAULT_SYSTEM) -> None:
        self._tokenizer = tokenizer
        self._system = system
        special = sorted(
            {str(t) for t in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())},
            key=len,
            reverse=True,
        )
        self._special = re.compile("|".join(map(re.escape, special))) if special else None

    def build(self, prompt: ChatPrompt) -> BuiltPrompt:
        """The prompt's tokens.

        Raises:
            BadRequest: the model's template refuses these turns.
        """
        before, after = self._rendered(prompt.turns, with_memory=bool(prompt.segments))
        ids = self._ids(before)
        segments: list[SegmentRef] = []
        members: list[Member] = []
        for segment in prompt.segments:
            start = len(ids)
            ids += self._ids(self.inert(segment.text))
            segments.append(SegmentRef(start, len(ids)))
            members += [Member(cube, start) for cube in segment.cubes]
        ids += self._ids(after)
        return BuiltPrompt(ids=tuple(ids), segments=tuple(segments), members=tuple(members))

    def prefix(self, segments: Sequence[MemorySegment]) -> BuiltPrompt:
        """The part that every prompt with these segments and the default system text begins with,
        up to the last segment's end: what is built ahead of any question."""
        before, _ = self._rendered((Turn(role="user", content="…"),), with_memory=True)
        ids = self._ids(before)
        places: list[SegmentRef] = []
        members: list[Member] = []
        for segment in segments:
            start = len(ids)
            ids += self._ids(self.inert(segment.text))
            places.append(SegmentRef(start, len(ids)))
            members += [Member(cube, start) for cube in segment.cubes]
        return BuiltPrompt(ids=tuple(ids), segments=tuple(places), members=tuple(members))

    def question(self, text: str, memories: str = "") -> list[int]:
        """The tokens of one question up to where the answer begins, with these memories if there are any.

        Raises:
            BadRequest: the model's template refuses it.
        """
        turns = (Turn(role="user", content=text),)
        before, after = self._rendered(turns, with_memory=bool(memories))
        return [*self._ids(before), *self._ids(self.inert(memories)), *self._ids(after)]

    def inert(self, text: str) -> str:
        """The text without the power to act as a special token."""
        if self._special is None:
            return text
        return self._special.sub(lambda found: found[0][0] + _BREAK + found[0][1:], text)

    def _rendered(self, turns: Sequence[Turn], *, with_memory: bool) -> tuple[str, str]:
        system = "\n".join(turn.content for turn in turns if turn.role == "system")
        marker = f"memories-{secrets.token_hex(16)}"
        parts = [self.inert(system) if system else self._system]
        if with_memory:
            parts.append(f"{OPENING}{marker}{CLOSING}")
        messages = [{"role": "system", "content": "\n\n".join(parts)}]
        messages += [
            {"role": turn.role, "content": self.inert(turn.content)}
            for turn in turns
            if turn.role != "system"
        ]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError) as refused:
            raise BadRequest(
                f"the model's chat template refuses them: {refused}", "messages"
            ) from None
        if not with_memory:
            return "", text
        before, found, after = text.partition(marker)
        if not found:
            raise BadRequest("the model's chat template leaves system messages out", "messages")
        return before, after

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
