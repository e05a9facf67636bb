"""Reads conversations in the form of LoCoMo (Maharana et al. 2024, arXiv 2402.17753)."""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from memcube.errors import BadRequest

ADVERSARIAL = 5
_SESSION = re.compile(r"session_(\d+)")
_EVIDENCE = re.compile(r"D:?\s*(\d+)\s*:\s*(\d+)")
_TIME_FORMAT = "%I:%M %p on %d %B, %Y"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn. ``time`` is its session's, plus a second a turn."""

    id: str
    speaker: str
    text: str
    time: datetime
    session: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question and the ids of the turns that answer it."""

    text: str
    answer: str
    evidence: tuple[str, ...]
    category: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns in order, and the questions that have evidence among them."""

    id: str
    speakers: tuple[str, str]
    turns: tuple[Turn, ...]
    questions: tuple[Question, ...]

    def sessions(self) -> dict[int, list[Turn]]:
        """Turns by session, in order."""
        found: dict[int, list[Turn]] = {}
        for turn in self.turns:
            found.setdefault(turn.session, []).append(turn)
        return found


def load_locomo(path: Path) -> list[Conversation]:
    """The conversations of a file.

    Raises:
        BadRequest: not readable, or of another form; says where.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as missing:
        raise BadRequest(f"can't be read: {missing.strerror}", str(path)) from None
    except (ValueError, RecursionError) as broken:
        raise BadRequest(f"is no JSON: {broken}", str(path)) from None
    if not isinstance(data, list):
        raise BadRequest("is not in LoCoMo's form: expected a list of conversations", str(path))
    conversations = []
    for number, sample in enumerate(data, start=1):
        try:
            conversations.append(_conversation(sample))
        except KeyError as lacking:
            raise _bad(path, number, f"lacks {lacking}") from None
        except (ValueError, TypeError, AttributeError) as wrong:
            raise _bad(path, number, str(wrong)) from None
    return conversations


def _bad(path: Path, number: int, what: str) -> BadRequest:
    return BadRequest(f"is not in LoCoMo's form: {what}", f"{path}: conversation {number}")


def _conversation(sample: dict[str, Any]) -> Conversation:
    talk = sample["conversation"]
    turns: list[Turn] = []
    numbers = sorted(
        int(match[1]) for key in talk if (match := _SESSION.fullmatch(key)) and talk[key]
    )
    for number in numbers:
        start = datetime.strptime(talk[f"session_{number}_date_time"], _TIME_FORMAT)
        for i, turn in enumerate(talk[f"session_{number}"]):
            if turn["text"].strip():
                turns.append(
                    Turn(
                        id=turn["dia_id"],
                        speaker=turn["speaker"],
                        text=turn["text"],
                        time=start.replace(tzinfo=UTC) + timedelta(seconds=i),
                        session=number,
                    )
                )
    known = {turn.id for turn in turns}
    questions = []
    for entry in sample.get("qa", ()):
        evidence = tuple(id for id in repaired(entry.get("evidence", ())) if id in known)
        if evidence:
            answer = entry.get("answer", entry.get("adversarial_answer", ""))
            questions.append(
                Question(
                    text=entry["question"],
                    answer=str(answer),
                    evidence=evidence,
                    category=int(entry["category"]),
                )
            )
    return Conversation(
        id=sample["sample_id"],
        speakers=(talk["speaker_a"], talk["speaker_b"]),
        turns=tuple(turns),
        questions=tuple(questions),
    )


def repaired(evidence: object) -> list[str]:
    """Evidence ids in canonical form, each once; the files hold "D8:6; D9:17" and "D:11:26" too."""
    entries = evidence if isinstance(evidence, list | tuple) else [evidence]
    ids = [
        f"D{int(session)}:{int(turn)}"
        for entry in entries
        for session, turn in _EVIDENCE.findall(str(entry))
    ]
    return list(dict.fromkeys(ids))
