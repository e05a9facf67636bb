"""What of a cube is embedded."""


def passage_text(text: str, *, speaker: str | None) -> str:
    """The text that stands for a cube in the dense index: its own alone.

    A small encoder lets a speaker's name swamp a short turn; the name counts in BM25 and in the
    ranker instead (docs/retrieval.md has the figures).
    """
    return text
