"""Readers of files: LoCoMo JSON, OpenAI-style message JSONL, plain text.

A file is read and checked whole before anything is sent, so it must fit in memory; a bad line is
named by its number. Records of one ``lane`` must be stored in order: they are one conversation.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memcube.client.types import Item, Message
from memcube.errors import BadRequest
from memcube.evaluation.locomo import Conversation, load_locomo
from memcube.ids import digest

# What the server takes in one add by default. Checked here too, so that a file is refused before
# half of it is stored.
MESSAGES_PER_ITEM = 500
TEXT_CHARS = 200_000
NAME_CHARS = 256
TAG_CHARS = 128
NUM_TAGS = 64
METADATA_BYTES = 16_384

_SCOPE = ("user_id", "agent_id", "run_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Whose memory a file becomes. What a line of the file says itself goes before it."""

    user_id: str | None = None
    agent_id: str | None = None
    run_id: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One add, and the lane whose order it keeps; None keeps no order."""

    lane: str | None
    item: Item


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A file's adds. ``num_empty`` messages or paragraphs had no text and were left out."""

    format: str
    records: tuple[Record, ...]
    num_empty: int = 0


def read_file(path: Path, *, format: str | None = None, target: Target | None = None) -> Reading:
    """The adds of a file; without ``format`` it is told by the content.

    Raises:
        BadRequest: unreadable, of an unknown format, empty, or bad in a line that it names.
    """
    text = _text(path)
    name = format or detect(text)
    if name not in FORMATS:
        raise BadRequest(f"no such format; there are: {', '.join(FORMATS)}", name)
    reading = FORMATS[name](path, text, target or Target())
    if not reading.records:
        raise BadRequest("holds nothing to remember", str(path))
    return reading


def detect(text: str) -> str:
    """The format that a text is in: ``locomo``, ``jsonl`` or ``text``."""
    start = text.lstrip()
    if start.startswith("["):
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            return "text"
        if isinstance(data, list) and data and all(_is_conversation(entry) for entry in data):
            return "locomo"
    first_line = start.partition("\n")[0]
    if first_line.startswith("{"):
        try:
            entry = json.loads(first_line)
        except (ValueError, RecursionError):
            return "text"
        if "messages" in entry or "role" in entry:
            return "jsonl"
    return "text"


def locomo_items(
    conversation: Conversation, *, user_id: str, run_prefix: str = "", target: Target | None = None
) -> list[Item]:
    """One add a turn, in order. A session is a run; ``dia_id`` stands in ref and metadata."""
    header = target or Target()
    first, _ = conversation.speakers
    return [
        Item(
            messages=(
                Message(
                    role="user" if turn.speaker == first else "assistant",
                    content=turn.text,
                    name=turn.speaker,
                    time=turn.time,
                    id=turn.id,
                ),
            ),
            user_id=user_id,
            agent_id=header.agent_id,
            run_id=f"{run_prefix}session-{turn.session}",
            tags=header.tags,
            metadata={"dia_id": turn.id},
        )
        for turn in conversation.turns
    ]


def _read_locomo(path: Path, text: str, target: Target) -> Reading:
    if target.run_id is not None:
        raise BadRequest("LoCoMo files have a run for each session; leave it out", "run")
    records: list[Record] = []
    for conversation in load_locomo(path):
        for turn in conversation.turns:
            where = f"{path}: {conversation.id} {turn.id}"
            _storable(turn.text, where)
            _name(turn.speaker, "speaker", where)
        shared = target.user_id is not None
        items = locomo_items(
            conversation,
            user_id=target.user_id or conversation.id,
            run_prefix=f"{conversation.id}-" if shared else "",
            target=target,
        )
        records += [Record(lane=conversation.id, item=item) for item in items]
    return Reading(format="locomo", records=tuple(records))


def _read_jsonl(path: Path, text: str, target: Target) -> Reading:
    records: list[Record] = []
    num_empty = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        entry = _json_object(line, where)
        raw = entry.get("messages", [entry])
        if not isinstance(raw, list):
            raise BadRequest("'messages' must be an array", where)
        parsed = [_message(message, where) for message in raw]
        messages = [message for message in parsed if message.content.strip()]
        num_empty += len(parsed) - len(messages)
        scope = {name: _string(entry, name, where) or getattr(target, name) for name in _SCOPE}
        header = {
            "tags": (*target.tags, *_tags(entry, where)),
            "metadata": _metadata(entry, where),
            "kind": _string(entry, "kind", where),
        }
        lane = digest("lane", *scope.values())
        for start in range(0, len(messages), MESSAGES_PER_ITEM):
            part = tuple(messages[start : start + MESSAGES_PER_ITEM])
            records.append(Record(lane=lane, item=Item(messages=part, **scope, **header)))
    return Reading(format="jsonl", records=tuple(records), num_empty=num_empty)


def _read_text(path: Path, text: str, target: Target) -> Reading:
    records = [
        Record(
            lane=None,
            item=Item(
                text=_storable(paragraph, f"{path}:{number}"),
                user_id=target.user_id,
                agent_id=target.agent_id,
                run_id=target.run_id,
                tags=target.tags,
            ),
        )
        for number, paragraph in _paragraphs(text)
    ]
    return Reading(format="text", records=tuple(records))


FORMATS: dict[str, Callable[[Path, str, Target], Reading]] = {
    "locomo": _read_locomo,
    "jsonl": _read_jsonl,
    "text": _read_text,
}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as missing:
        raise BadRequest(f"can't be read: {missing.strerror}", str(path)) from None
    except UnicodeDecodeError as broken:
        line = path.read_bytes()[: broken.start].count(b"\n") + 1
        raise BadRequest("is not UTF-8", f"{path}:{line}") from None


def _is_conversation(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("conversation"), dict)


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Paragraphs with the number of their first line; one over the limit is cut at line ends."""
    lines: list[str] = []
    num_chars = 0
    for number, raw in enumerate([*text.split("\n"), ""], start=1):
        line = raw.strip()
        if lines and (not line or num_chars + len(line) > TEXT_CHARS):
            yield number - len(lines), "\n".join(lines)
            lines, num_chars = [], 0
        if line:
            lines.append(line)
            num_chars += len(line) + 1


def _storable(text: str, where: str) -> str:
    """The text, if the server can take it."""
    if "\x00" in text:
        raise BadRequest("can't hold a NUL character", where)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest("holds half of a surrogate pair, which is no character", where) from None
    if len(text) > TEXT_CHARS:
        raise BadRequest(f"{len(text):,} characters; at most {TEXT_CHARS:,}", where)
    return text


def _name(text: str, name: str, where: str) -> str:
    """A text that names something: a role, a speaker, an id."""
    if not 0 < len(_storable(text, where)) <= NAME_CHARS:
        raise BadRequest(f"{name!r} must have 1 to {NAME_CHARS} characters", where)
    return text


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as broken:
        raise BadRequest(f"is no JSON: {broken}", where) from None
    if not isinstance(entry, dict):
        raise BadRequest("expected an object with 'role' and 'content', or 'messages'", where)
    return entry


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, dict):
        raise BadRequest("a message must be an object", where)
    role = _string(entry, "role", where)
    if role is None:
        raise BadRequest("a message lacks 'role'", where)
    time = next((entry[k] for k in ("time", "timestamp", "created_at") if entry.get(k)), None)
    return Message(
        role=role,
        content=_content(entry.get("content"), where),
        name=_string(entry, "name", where),
        time=None if time is None else _time(time, where),
        id=_string(entry, "id", where),
    )


def _content(content: Any, where: str) -> str:
    """The text of a message; of a list of parts, those of type text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return _storable(content, where)
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = (str(part["text"]) for part in content if "text" in part)
        return _storable("\n".join(texts), where)
    raise BadRequest("'content' must be a string or an array of parts", where)


def _string(entry: Mapping[str, Any], name: str, where: str) -> str | None:
    value = entry.get(name)
    if value is None:
        return None
    if isinstance(value, str):
        return _name(value, name, where)
    raise BadRequest(f"{name!r} must be a string", where)


def _tags(entry: Mapping[str, Any], where: str) -> list[str]:
    tags = entry.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise BadRequest("'tags' must be an array of strings", where)
    if len(tags) > NUM_TAGS or not all(0 < len(_storable(t, where)) <= TAG_CHARS for t in tags):
        raise BadRequest(f"at most {NUM_TAGS} tags of 1 to {TAG_CHARS} characters", where)
    return tags


def _metadata(entry: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    metadata = entry.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise BadRequest("'metadata' must be an object", where)
    text = _storable(json.dumps(metadata, ensure_ascii=False), where)
    if "\\u0000" in text:
        raise BadRequest("'metadata' can't hold a NUL character", where)
    if len(text.encode()) > METADATA_BYTES:
        raise BadRequest(f"'metadata' of at most {METADATA_BYTES:,} bytes", where)
    return metadata


def _time(value: Any, where: str) -> datetime:
    """An instant of ISO 8601 text or seconds since 1970. Without a zone it is taken as UTC."""
    try:
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value, UTC)
        return _aware(datetime.fromisoformat(value))
    except (TypeError, ValueError, OverflowError, OSError):
        raise BadRequest(f"{value!r} is no time; use ISO 8601 or Unix seconds", where) from None


def _aware(time: datetime) -> datetime:
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)
