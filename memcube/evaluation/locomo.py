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
        data = json.loads(path.read_text())
        return [_conversation(sample) for sample in data]
    except OSError as missing:
        raise BadRequest(f"can't be read: {missing.strerror}", str(path)) from None
    except (ValueError, KeyError, TypeError, AttributeError) as wrong:
        raise BadRequest(f"is not in LoCoMo's form: {wrong!r}", str(path)) from None


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
