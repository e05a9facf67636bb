"""One cube a turn, word for word; what is too long is split after sentences."""

from collections.abc import Sequence
from datetime import datetime

from memcube.cube import Draft, Kind, Source
from memcube.errors import BadRequest
from memcube.reader.messages import Header, Message
from memcube.reader.sentences import split


def read_verbatim(
    messages: Sequence[Message] | None, text: str | None, header: Header, *, max_chars: int
) -> list[Draft]:
    """Drafts of messages (threaded, episodes) or of a text (a fact; documents when it was split).

    Turns of every role are kept, the system's too. Line ends become ``\\n``.

    Raises:
        BadRequest: neither or both are given, or one is empty or holds what is no text.
    """
    if (messages is None) == (text is None):
        raise BadRequest("give either messages or text", "messages")
    if messages is not None:
        if not messages:
            raise BadRequest("give at least one message", "messages")
        return [
            _turn(message, part, header)
            for i, message in enumerate(messages)
            for part in split(_clean(message.content, f"messages[{i}].content"), max_chars)
        ]
    assert text is not None
    parts = split(_clean(text, "text"), max_chars)
    kind = header.kind or (Kind.FACT if len(parts) == 1 else Kind.DOCUMENT)
    return [_draft(part, header, kind=kind) for part in parts]


def _clean(text: str, field: str) -> str:
    if not text.strip():
        raise BadRequest("is empty", field)
    if "\0" in text:
        raise BadRequest("can't hold a NUL character", field)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest("holds half of a surrogate pair, which is no character", field) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


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


def _draft(
    text: str,
    header: Header,
    *,
    kind: Kind,
    role: str | None = None,
    speaker: str | None = None,
    event_time: datetime | None = None,
    sources: tuple[Source, ...] = (),
    threaded: bool = False,
) -> Draft:
    return Draft(
        text=text,
        kind=kind,
        role=role,
        speaker=speaker,
        event_time=event_time,
        sources=sources,
        threaded=threaded,
        user_id=header.user_id,
        agent_id=header.agent_id,
        run_id=header.run_id,
        origin=header.origin,
        tags=header.tags,
        metadata=header.metadata,
        sensitivity=header.sensitivity,
        priority=header.priority,
        expires_at=header.expires_at,
    )
