"""One cube a turn, word for word; what is too long is split at sentences."""

import re
from collections.abc import Sequence

from memcube.cube import Draft, Kind, Source
from memcube.errors import BadRequest
from memcube.reader.messages import Header, Message

_SENTENCE_END = re.compile(r"(?<=[.!?…。！？])[\"'”’)\]]*\s+|\n+")
_SPACE = re.compile(r"\s+")


def read_verbatim(
    messages: Sequence[Message] | None, text: str | None, header: Header, *, max_chars: int
) -> list[Draft]:
    """Drafts of messages (threaded, episodes) or of a text (facts; documents when it was split).

    Raises:
        BadRequest: neither or both are given, or one is empty.
    """
    if (messages is None) == (text is None):
        raise BadRequest("give either messages or text", "messages")
    if messages is not None:
        if not messages:
            raise BadRequest("give at least one message", "messages")
        drafts: list[Draft] = []
        for i, message in enumerate(messages):
            if not message.content.strip():
                raise BadRequest("is empty", f"messages[{i}].content")
            for part in split(message.content, max_chars):
                drafts.append(_turn(message, part, header))
        return drafts
    assert text is not None
    if not text.strip():
        raise BadRequest("is empty", "text")
    parts = split(text, max_chars)
    kind = header.kind or (Kind.FACT if len(parts) == 1 else Kind.DOCUMENT)
    return [_draft(part, header, kind=kind) for part in parts]


def _turn(message: Message, text: str, header: Header) -> Draft:
    source = Source(
        ref=message.id, role=message.role, speaker=message.name, time=message.time, text=None
    )
    return _draft(
        text,
        header,
        kind=header.kind or Kind.EPISODE,
        role=message.role,
        speaker=message.name,
        event_time=message.time,
        sources=(source,),
        threaded=True,
    )


def _draft(text: str, header: Header, **more) -> Draft:
    return Draft(
        text=text,
        user_id=header.user_id,
        agent_id=header.agent_id,
        run_id=header.run_id,
        origin=header.origin,
        tags=header.tags,
        metadata=header.metadata,
        sensitivity=header.sensitivity,
        priority=header.priority,
        expires_at=header.expires_at,
        **more,
    )


def split(text: str, max_chars: int) -> list[str]:
    """Parts of at most ``max_chars``, cut after sentences, else at spaces, else anywhere.

    Nothing but white space at the cuts is lost.
    """
    text = text.strip()
    if len(text) <= max_chars:
        return [text]
    parts: list[str] = []
    current = ""
    for sentence in _pieces(text, _SENTENCE_END, max_chars):
        joined = f"{current} {sentence}" if current else sentence
        if len(joined) <= max_chars:
            current = joined
        else:
            parts.append(current)
            current = sentence
    return [*parts, current]


def _pieces(text: str, boundary: re.Pattern[str], max_chars: int) -> list[str]:
    pieces: list[str] = []
    start = 0
    ends = [*((m.start(), m.end()) for m in boundary.finditer(text)), (len(text), len(text))]
    for _, end in ends:
        piece = text[start:end].strip()
        start = end
        if not piece:
            continue
        if len(piece) <= max_chars:
            pieces.append(piece)
        elif boundary is _SENTENCE_END:
            pieces.extend(_pieces(piece, _SPACE, max_chars))
        else:
            pieces.extend(piece[i : i + max_chars] for i in range(0, len(piece), max_chars))
    return pieces
