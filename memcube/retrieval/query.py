"""What a query says about itself: which speakers it names, and what it asks for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_WHEN = re.compile(
    r"\b(when|what (?:time|day|date|month|year)|how long|which (?:day|date|month|year))\b", re.I
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A query as the ranker sees it. ``dense_text`` is embedded; it has no speaker's name in it."""

    text: str
    dense_text: str
    named: frozenset[str]
    asks_when: bool


def analyse(text: str, speakers: Sequence[str]) -> Query:
    """Find the speakers named (whole, or by first name) and take their names out."""
    named: set[str] = set()
    stripped = text
    for speaker in speakers:
        forms = {speaker, speaker.split()[0]} if speaker.split() else set()
        for form in sorted(forms, key=len, reverse=True):
            pattern = re.compile(rf"(?<!\w){re.escape(form)}(?:['’]s)?(?!\w)", re.IGNORECASE)
            if pattern.search(text):
                named.add(speaker)
                stripped = pattern.sub(" ", stripped)
    stripped = " ".join(stripped.split())
    if not any(character.isalnum() for character in stripped):
        stripped = text
    return Query(
        text=text,
        dense_text=stripped,
        named=frozenset(named),
        asks_when=bool(_WHEN.search(text)),
    )
