"""Long texts in parts, cut after sentences where that is possible."""

import re
import unicodedata
from collections.abc import Iterator

_CUTS = (
    # After a paragraph; after a sentence with its closing quotes; at any white space.
    re.compile(r"\n\s*\n"),
    re.compile(r"(?<=[.!?…])[\"'”’»)\]]*\s+|(?<=[。！？])[”’」』）]*\s*|\n"),
    re.compile(r"\s+"),
)
_JOINER = "\u200d"


def split(text: str, max_chars: int) -> list[str]:
    """Parts of 1 to ``max_chars`` characters, in order; none for a text of white space.

    A part ends after a paragraph if one ends in its second half, else after a sentence, else between
    words, and inside a word only when that is longer than a part. White space at the cuts is left out;
    nothing else is changed.
    """
    return [text[start:end] for start, end in _spans(text, max_chars)]


def _spans(text: str, max_chars: int) -> Iterator[tuple[int, int]]:
    start, stop = _skip_space(text, 0), len(text.rstrip())
    while start < stop:
        end = stop if stop - start <= max_chars else _cut(text, start, start + max_chars)
        yield start, start + len(text[start:end].rstrip())
        start = _skip_space(text, end)


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def _cut(text: str, start: int, limit: int) -> int:
    """Where the part that starts here ends: at most ``limit``, where more text follows."""
    half = (start + limit) // 2
    for boundary, least in zip(_CUTS, (half, start + 1, start + 1), strict=True):
        # One character beyond the limit is looked at: white space there ends a word that fits.
        ends = (_content_end(text, found) for found in boundary.finditer(text, start, limit + 1))
        within = [end for end in ends if least <= end <= limit]
        if within:
            return within[-1]
    return _between_characters(text, start, limit)


def _content_end(text: str, found: re.Match[str]) -> int:
    return found.start() + len(found.group().rstrip())


def _between_characters(text: str, start: int, limit: int) -> int:
    """At or before ``limit``, where no accent or joined emoji is torn off, if there is such a place."""
    for end in range(limit, max(start, limit - 32), -1):
        torn = unicodedata.category(text[end]).startswith("M") or _JOINER in text[end - 1 : end + 1]
        if not torn:
            return end
    return limit
