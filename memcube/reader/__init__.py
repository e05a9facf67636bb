"""Messages and texts to drafts of cubes: verbatim, or through a model with verbatim beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from memcube.config import ReaderConfig
from memcube.cube import Draft
from memcube.errors import ModelAnswerInvalid, Unavailable
from memcube.reader.llm import LlmReader
from memcube.reader.messages import Header, Message
from memcube.reader.verbatim import read_verbatim


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The drafts, and why there are only verbatim ones where facts were asked for."""

    drafts: tuple[Draft, ...]
    fallback: str | None = None


class Reader:
    """Reads as configured."""

    def __init__(self, config: ReaderConfig, llm: LlmReader | None) -> None:
        self._config = config
        self._llm = llm

    async def read(
        self,
        messages: Sequence[Message] | None,
        text: str | None,
        header: Header,
        *,
        infer: bool,
        now: datetime,
    ) -> Reading:
        """The drafts of messages, or of a text.

        With ``infer`` a configured model's facts come after the verbatim drafts: memory made of
        facts alone loses what no fact was made of. Whatever goes wrong there, the verbatim stays.

        Raises:
            BadRequest: an empty message or text.
        """
        verbatim = tuple(read_verbatim(messages, text, header, max_chars=self._config.max_chars))
        if not infer:
            return Reading(drafts=verbatim)
        if self._llm is None:
            return Reading(
                drafts=verbatim,
                fallback="no model is configured (reader.llm); the text was kept verbatim",
            )
        spoken = messages or [Message(role="user", content=text or "")]
        try:
            facts = await self._llm.read(spoken, header)
        except (ModelAnswerInvalid, Unavailable) as failed:
            return Reading(drafts=verbatim, fallback=f"{failed}; the text was kept verbatim")
        return Reading(drafts=(*verbatim, *facts))


__all__ = ["Header", "LlmReader", "Message", "Reader", "Reading"]
