import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memcube.reader.sentences import split


def test_a_short_text_is_one_part_and_is_left_as_it_is():
    assert split("  One\n\n  two.\tThree \n", 100) == ["One\n\n  two.\tThree"]


@pytest.mark.parametrize(
    ("text", "max_chars", "parts"),
    [
        ("A b c. D e f. G h i.", 13, ["A b c. D e f.", "G h i."]),
        ('He said "No." Then he left.', 16, ['He said "No."', "Then he left."]),
        ("- one thing\n- another thing", 20, ["- one thing", "- another thing"]),
        ("One. Two.\n\nThree. Four.", 18, ["One. Two.", "Three. Four."]),
        ("私は行く。君も来る。", 7, ["私は行く。", "君も来る。"]),
        ("no end of a sentence here", 12, ["no end of a", "sentence", "here"]),
        ("exactly ten", 7, ["exactly", "ten"]),
        ("abcdefghij kl", 4, ["abcd", "efgh", "ij", "kl"]),
    ],
)
def test_a_part_ends_after_a_sentence_else_a_word_else_anywhere(text, max_chars, parts):
    assert split(text, max_chars) == parts


def test_an_accent_is_not_torn_off_its_letter():
    assert split("e\u0301" * 4, 3) == ["e\u0301"] * 4


def test_white_space_has_no_parts():
    assert split(" \n\t ", 10) == []


@given(st.text(max_size=400), st.integers(min_value=1, max_value=60))
def test_nothing_but_white_space_is_lost(text, max_chars):
    parts = split(text, max_chars)
    assert all(0 < len(part) <= max_chars for part in parts)
    assert "".join("".join(part.split()) for part in parts) == "".join(text.split())


@given(st.lists(st.text("abc.", min_size=1, max_size=9), min_size=1, max_size=40))
def test_a_word_that_fits_is_never_cut(words):
    parts = split(" ".join(words), 10)
    assert [word for part in parts for word in part.split()] == words


@given(st.text("ab. \n", max_size=300), st.integers(min_value=1, max_value=30))
def test_each_part_is_a_piece_of_the_text_in_order(text, max_chars):
    at = 0
    for part in split(text, max_chars):
        at = text.index(part, at) + len(part)


@pytest.mark.parametrize("unit", ["x", ". ", '."', " ", "\n", "a ", "。", "\u0301"])
def test_the_worst_texts_take_milliseconds(unit):
    text = unit * (200_000 // len(unit))
    started = time.process_time()
    split(text, 1600)
    assert time.process_time() - started < 2
