from datetime import UTC, datetime

import pytest

from memcube.retrieval.query import analyse


@pytest.mark.parametrize(
    ("query", "speakers", "left", "named"),
    [
        ("What did Ann's dog eat?", ["Ann"], "What did dog eat?", {"Ann"}),
        ("what did ANN’s dog eat?", ["Ann"], "what did dog eat?", {"Ann"}),
        ("When did Ann meet Lee?", ["Ann Lee"], "When did meet Lee?", {"Ann Lee"}),
        ("When did Ann Lee leave?", ["Ann Lee"], "When did leave?", {"Ann Lee"}),
        ("Where is Anna?", ["Ann"], "Where is Anna?", set()),
        ("Bob or Ann?", ["Ann", "Bob"], "or ?", {"Ann", "Bob"}),
        ("What is C++?", ["C++"], "What is ?", {"C++"}),
        ("Was sagte Jürgen?", ["Jürgen"], "Was sagte ?", {"Jürgen"}),
    ],
)
def test_names_of_speakers_are_taken_out_of_the_embedded_text(query, speakers, left, named):
    found = analyse(query, speakers)
    assert found.dense_text == left
    assert found.named == named
    assert found.text == query


def test_a_query_that_is_only_a_name_is_embedded_as_it_is():
    assert analyse("Ann?", ["Ann"]).dense_text == "Ann?"
    assert analyse("", ["Ann"]).dense_text == ""


def test_a_name_that_is_a_common_word_counts_only_where_it_is_capitalised():
    assert analyse("what will happen", ["Will"]).named == frozenset()
    assert analyse("what does Will like", ["Will"]).named == {"Will"}


def test_a_one_letter_name_is_left_alone():
    assert analyse("what should I do", ["I"]).dense_text == "what should I do"


def at(year, month, day=15):
    return datetime(year, month, day, tzinfo=UTC)


def test_the_month_and_year_of_a_query_match_times_in_them():
    date = analyse("What did she do in March 2023?", []).date
    assert date is not None
    assert date.same_month(at(2023, 3))
    assert not date.same_month(at(2022, 3))
    assert not date.same_month(at(2023, 4))


def test_a_year_alone_matches_the_whole_year():
    date = analyse("What was new in 2023?", []).date
    assert date is not None
    assert date.same_month(at(2023, 1))
    assert not date.same_month(at(2024, 1))


@pytest.mark.parametrize("query", ["on May 3, 2023", "on 3 May, 2023", "on the 3rd of May 2023"])
def test_a_day_is_nearer_the_closer_the_time(query):
    date = analyse(query, []).date
    assert date is not None
    assert date.day_nearness(at(2023, 5, 3)) == 1.0
    assert 0 < date.day_nearness(at(2023, 5, 5)) < 1
    assert date.day_nearness(at(2023, 5, 20)) == 0.0
    assert date.day_nearness(at(2023, 6, 3)) == 0.0


@pytest.mark.parametrize("query", ["What may she need?", "a march through town", "24 red vans"])
def test_words_and_numbers_that_are_no_dates_are_not_taken_for_them(query):
    assert analyse(query, []).date is None
