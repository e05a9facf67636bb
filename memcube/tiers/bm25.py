"""BM25 as sparse vectors: the document side holds saturated term frequencies, the engine adds the IDF.

score(q, d) = Σ_t idf(t) · tf·(k1+1) / (tf + k1·(1 − b + b·|d|/L)), Robertson and Zaragoza 2009, with
idf(t) = ln(1 + (N − df + ½)/(df + ½)). N and df are counted among the cubes that the query may see,
never engine-wide. L is a constant, since a stored vector can't follow a moving average: it is that of
a chat turn, and BM25 depends on it weakly.
"""

import functools
import math
import re
import zlib
from collections import Counter
from typing import NamedTuple

import snowballstemmer

K1 = 1.2
B = 0.75
AVERAGE_LENGTH = 14.0
"""Terms of a typical turn, stop words left out."""

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_STOP = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "been",
        "but",
        "by",
        "did",
        "do",
        "does",
        "for",
        "from",
        "had",
        "has",
        "have",
        "he",
        "her",
        "hers",
        "him",
        "his",
        "how",
        "i",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "me",
        "my",
        "of",
        "on",
        "or",
        "our",
        "ours",
        "she",
        "so",
        "than",
        "that",
        "the",
        "their",
        "theirs",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "to",
        "too",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "who",
        "whom",
        "why",
        "will",
        "with",
        "would",
        "you",
        "your",
        "yours",
        "i'm",
        "i've",
        "it's",
        "that's",
        "don't",
        "didn't",
        "am",
        "about",
        "can",
        "could",
        "should",
        "just",
    ]
)
_stem = snowballstemmer.stemmer("english").stemWord


class Sparse(NamedTuple):
    """A sparse vector: distinct term ids (unsigned 32 bits) and their weights."""

    indices: list[int]
    values: list[float]


@functools.lru_cache(maxsize=65_536)
def _term(word: str) -> int:
    stem = _stem(word.removesuffix("'s"))
    return zlib.crc32(stem.encode("utf-8", "surrogatepass"))


def terms(text: str) -> list[int]:
    """Ids of a text's stemmed words without stop words, in order, with repeats."""
    words = _WORD.findall(text.lower().replace("’", "'"))
    return [_term(word) for word in words if word not in _STOP]


def document(text: str, speaker: str | None) -> Sparse:
    """The vector of a cube. Its speaker's name counts as text."""
    found = terms(f"{speaker}: {text}" if speaker else text)
    counts = Counter(found)
    norm = K1 * (1 - B + B * len(found) / AVERAGE_LENGTH)
    return Sparse(list(counts), [tf * (K1 + 1) / (tf + norm) for tf in counts.values()])


def query(text: str) -> Sparse:
    """The vector of a query: each distinct term once."""
    distinct = list(dict.fromkeys(terms(text)))
    return Sparse(distinct, [1.0] * len(distinct))


def idf(num_documents: int, document_frequency: int) -> float:
    """Inverse document frequency of a term."""
    return math.log1p((num_documents - document_frequency + 0.5) / (document_frequency + 0.5))
