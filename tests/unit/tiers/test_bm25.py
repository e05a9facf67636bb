import math

from hypothesis import given
from hypothesis import strategies as st

from memcube.tiers import bm25


def test_stems_and_stop_words():
    assert bm25.terms("The dogs were running") == bm25.terms("dog runs")


def test_a_possessive_is_its_noun():
    assert bm25.terms("Caroline's") == bm25.terms("Caroline")


def test_a_document_of_average_length_and_one_occurrence_weighs_one():
    words = " ".join(f"w{i}x" for i in range(int(bm25.AVERAGE_LENGTH)))
    assert all(math.isclose(value, 1.0) for value in bm25.document(words, None).values)


def test_idf_is_never_negative():
    assert bm25.idf(1, 1) > 0
    assert bm25.idf(1000, 1) > bm25.idf(1000, 500) > bm25.idf(1000, 1000) > 0


@given(st.text(max_size=200))
def test_any_text_gives_distinct_indices_and_positive_weights(text):
    vector = bm25.document(text, None)
    assert len(set(vector.indices)) == len(vector.indices)
    assert all(0 <= i < 2**32 for i in vector.indices)
    assert all(value > 0 for value in vector.values)
