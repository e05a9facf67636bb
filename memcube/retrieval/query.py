"""What a query says about itself: which speakers it names, what it asks for, and of what date."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from memcube.tiers import bm25

_WHEN = re.compile(
    r"\b(when|what (?:time|day|date|month|year)|how long|which (?:day|date|month|year))\b", re.I
)
_MONTHS = dict(
    january=1,
    february=2,
    march=3,
    april=4,
    may=5,
    june=6,
    july=7,
    august=8,
    september=9,
    october=10,
    november=11,
    december=12,
)
_MONTH = re.compile(rf"\b({'|'.join(_MONTHS)})\b", re.I)
# "may" and "march" are months where a preposition, a day or a year stands beside them.
_DATED = re.compile(r"(?:\b(?:in|on|of|since|until|by|last|during|\d+(?:st|nd|rd|th)?)\s+)$", re.I)
_YEAR = re.compile(r"\b((?:19|20)\d\d)\b")
_DAY_BEFORE = re.compile(r"\b(\d{1,2})(?:st|nd|rd|th)?(?:\s+of)?\s+$", re.I)
_DAY_AFTER = re.compile(r"\s+(\d{1,2})(?:st|nd|rd|th)?\b", re.I)
_DAYS_AROUND = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedDate:
    """The date that a query speaks of, as far as it says."""

    months: frozenset[int]
    years: frozenset[int]
    day: int | None

    def same_month(self, time: datetime) -> bool:
        """Whether a time lies in the month and year, as far as they are named."""
        return (not self.months or time.month in self.months) and (
            not self.years or time.year in self.years
        )

    def day_nearness(self, time: datetime) -> float:
        """1 on the day named, falling to 0 a week off it; 0 when no day is named."""
        if self.day is None or not self.same_month(time):
            return 0.0
        return max(0.0, 1.0 - abs(time.day - self.day) / _DAYS_AROUND)


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A query as the ranker sees it. ``dense_text`` is embedded; it has no speaker's name in it."""

    text: str
    dense_text: str
    terms: frozenset[int]
    """BM25 terms of ``dense_text``."""

    named: frozenset[str]
    asks_when: bool
    date: AskedDate | None


def analyse(text: str, speakers: Sequence[str]) -> Query:
    """Find the speakers named (whole, or by first name) and take their names out."""
    named: set[str] = set()
    stripped, lowered = text, text.casefold()
    for speaker in speakers:
        for form in _forms(speaker):
            if form.casefold() not in lowered:
                continue
            pattern = _name_pattern(form)
            if pattern.search(text):
                named.add(speaker)
                stripped = pattern.sub(" ", stripped)
    stripped = " ".join(stripped.split())
    if not any(character.isalnum() for character in stripped):
        stripped = text
    return Query(
        text=text,
        dense_text=stripped,
        terms=frozenset(bm25.terms(stripped)),
        named=frozenset(named),
        asks_when=bool(_WHEN.search(text)),
        date=_asked_date(text),
    )


def _forms(speaker: str) -> list[str]:
    """The whole name, then the first name. A single letter is too often something else."""
    words = speaker.split()
    forms = dict.fromkeys((" ".join(words), words[0])) if words else {}
    return [form for form in forms if len(form) > 1]


def _name_pattern(form: str) -> re.Pattern[str]:
    # A name that is a common word ("Will") is a name only where it is written as one.
    flags = re.IGNORECASE if bm25.terms(form) else re.NOFLAG
    return re.compile(rf"(?<!\w){re.escape(form)}(?:['’]s)?(?!\w)", flags)


def _asked_date(text: str) -> AskedDate | None:
    months: set[int] = set()
    day = None
    for match in _MONTH.finditer(text):
        before, after = text[: match.start()], text[match.end() :]
        if match[0].lower() in ("may", "march") and not (
            _DATED.search(before) or re.match(r",?\s+\d", after)
        ):
            continue
        months.add(_MONTHS[match[0].lower()])
        near = _DAY_BEFORE.search(before) or _DAY_AFTER.match(after)
        if near and 1 <= int(near[1]) <= 31:
            day = int(near[1])
    years = {int(year) for year in _YEAR.findall(text)}
    if not months and not years:
        return None
    return AskedDate(months=frozenset(months), years=frozenset(years), day=day)
