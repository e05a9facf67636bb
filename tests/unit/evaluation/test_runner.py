import os
from datetime import UTC, datetime

import pytest

from memcube.client import MemCubeClient
from memcube.errors import BadRequest, Unauthenticated
from memcube.evaluation.locomo import Conversation, Question, Turn
from memcube.evaluation.runner import cpu_clock_of, run_locomo
from memcube.testing.api import KEY, FakeApi

WHEN = datetime(2023, 5, 8, tzinfo=UTC)
TEXTS = ["red apples", "green pears", "blue plums", "red apples"]


def conversation(id="conv-1"):
    turns = tuple(
        Turn(id=f"D1:{n}", speaker="Ann", text=text, time=WHEN, session=1)
        for n, text in enumerate(TEXTS, 1)
    )
    questions = (
        Question(text="who has green pears", answer="", evidence=("D1:2",), category=1),
        Question(text="red apples", answer="", evidence=("D1:1", "D1:4"), category=5),
    )
    return Conversation(id=id, speakers=("Ann", "Bob"), turns=turns, questions=questions)


@pytest.fixture
def api():
    return FakeApi()


@pytest.fixture
def client(api):
    with MemCubeClient("http://server", KEY, transport=api.transport) as client:
        yield client


def test_the_report_has_every_system_measure_and_category(client):
    report = run_locomo(client, [conversation(), conversation("conv-2")], suffix="x")
    assert list(report) == ["memcube", "dense", "bm25"]
    for told in report.values():
        assert set(told) == {
            "overall",
            "by_category",
            "without_adversarial",
            "cpu_ms_per_query",
            "ms_per_query",
        }
        assert told["overall"] == {
            "recall@5": 100.0,
            "recall@10": 100.0,
            "recall@20": 100.0,
            "mrr": 100.0,
            "ndcg@10": 100.0,
            "num_questions": 4,
        }
        assert set(told["by_category"]) == {"1", "5"}
        assert told["without_adversarial"]["num_questions"] == 2
        assert told["cpu_ms_per_query"] is None
        assert set(told["ms_per_query"]) == {"p50", "p95"}


def test_a_repeated_turn_is_found_by_the_one_cube_that_stands_for_it(client, api):
    run_locomo(client, [conversation()], suffix="x", modes=["dense"], keep=True)
    assert len(api.cubes) == len(TEXTS) - 1


def test_users_are_the_runs_own_and_are_deleted(client, api):
    client.add("mine", user_id="conv-1")
    run_locomo(client, [conversation()], suffix="x", modes=["sparse"])
    assert [cube["user_id"] for cube in api.cubes.values()] == ["conv-1"]


def test_kept_conversations_stay(client, api):
    run_locomo(client, [conversation()], suffix="x", modes=["sparse"], keep=True)
    assert {cube["user_id"] for cube in api.cubes.values()} == {"conv-1-eval-x"}


def test_a_run_that_fails_deletes_its_users_too(client, api):
    def broken(progress):
        if progress.phase == "dense":
            raise Unauthenticated

    with pytest.raises(Unauthenticated):
        run_locomo(client, [conversation()], suffix="x", progress=broken)
    assert api.cubes == {}


def test_cpu_time_is_spread_over_the_questions(client):
    clock = iter([1.0, 1.5])
    report = run_locomo(
        client, [conversation()], suffix="x", modes=["hybrid"], cpu_clock=lambda: next(clock)
    )
    assert report["memcube"]["cpu_ms_per_query"] == 250.0


def test_several_questions_in_flight_give_the_same_figures(client):
    one = run_locomo(client, [conversation()], suffix="x", modes=["hybrid"])
    four = run_locomo(client, [conversation()], suffix="y", modes=["hybrid"], concurrency=4)
    assert one["memcube"]["overall"] == four["memcube"]["overall"]


def test_progress_reaches_its_total_in_each_phase(client):
    last = {}
    run_locomo(client, [conversation()], suffix="x", progress=lambda p: last.update({p.phase: p}))
    assert list(last) == ["store", "hybrid", "dense", "sparse"]
    assert all(progress.done == progress.total for progress in last.values())


def test_an_unknown_system_or_a_file_without_questions_is_refused(client, api):
    with pytest.raises(BadRequest, match="hybrid, dense, sparse"):
        run_locomo(client, [conversation()], suffix="x", modes=["best"])
    with pytest.raises(BadRequest, match="no question"):
        run_locomo(client, [], suffix="x")
    assert api.requests == []


def test_the_cpu_clock_of_a_process_goes_forward_and_is_none_without_one():
    pytest.importorskip("psutil")
    clock = cpu_clock_of(os.getpid())
    assert clock is not None
    assert 0 < clock() <= clock()
    assert cpu_clock_of(None) is None
    assert cpu_clock_of(2**22 + 1) is None
