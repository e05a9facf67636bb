from pathlib import Path

import pytest

from benchmarks.bench_trace import TRACE, replay_reference
from benchmarks.reference_caches import REFERENCES, Belady, Lru
from memcube.policies.replay import Request, read_mooncake, replay, with_conversations
from memcube.policies.retention import Retention
from memcube.testing.traces import SHAPES, chats


def request(*blocks: str) -> Request:
    return Request(at_s=0.0, blocks=blocks)


def test_a_block_counts_as_hit_only_if_all_before_it_do():
    requests = [request("a", "b", "c"), request("a", "b", "c"), request("x", "b", "c")]
    found = replay(requests, Retention(10))
    assert (found.num_hits, found.num_blocks) == (3, 9)
    assert replay_reference(requests, Lru(10)) == found


def test_conversations_are_told_by_what_their_requests_contain():
    first, other = request("s", "a", "b", "end"), request("s", "x", "y", "end2")
    second = request("s", "a", "b", "c", "d", "end3")
    found = with_conversations([first, other, second, request("s", "n", "end4")])
    assert [one.next_at_s is not None for one in found] == [True, False, False, False]
    assert found[0].conversation == found[2].conversation
    assert len({one.conversation for one in found}) == 3


def test_a_line_that_is_no_request_is_named(tmp_path: Path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "hash_ids": [1, 2]}\n{"timestamp": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_mooncake(path)


@pytest.mark.parametrize("name", SHAPES)
def test_made_up_traces_are_the_same_each_time(name: str):
    assert SHAPES[name](1_000) == SHAPES[name](1_000)


@pytest.mark.parametrize("name", SHAPES)
def test_it_has_no_fewer_hits_than_lru_however_blocks_are_used_again(name: str):
    requests = with_conversations(SHAPES[name](15_000))
    ours = replay(requests, Retention(500)).hit_ratio
    assert ours >= replay_reference(requests, Lru(500)).hit_ratio - 0.003


@pytest.mark.parametrize("capacity", [500, 2_000])
@pytest.mark.parametrize(
    ("seed", "think_s", "spread"), [(5, 300, 1.2), (6, 600, 1.5), (7, 60, 0.5)]
)
def test_where_what_was_learnt_misleads_it_falls_back_to_recency(
    seed: int, think_s: float, spread: float, capacity: int
):
    requests = with_conversations(chats(2_500, seed=seed, think_s=think_s, spread=spread))
    ours = replay(requests, Retention(capacity)).hit_ratio
    assert ours >= replay_reference(requests, Lru(capacity)).hit_ratio - 0.003


def test_a_loop_that_does_not_fit_is_kept_in_part():
    requests = SHAPES["loop"](40_000)
    assert replay_reference(requests, Lru(4_000)).num_hits == 0
    assert replay(requests, Retention(4_000)).hit_ratio > 0.25


def test_knowing_which_conversations_go_on_helps():
    requests = with_conversations(chats(1_500))
    plain = replay(requests, Retention(500)).hit_ratio
    whether = replay(requests, Retention(500), hints="whether").hit_ratio
    when = replay(requests, Retention(500), hints="when").hit_ratio
    assert when > whether > 1.2 * plain


@pytest.mark.parametrize("name", REFERENCES)
def test_no_reference_exceeds_what_the_future_allows(name: str):
    requests = SHAPES["tools"](5_000)
    best = replay_reference(requests, Belady(300, [one.blocks[::-1] for one in requests]))
    assert 0 < replay_reference(requests, REFERENCES[name](300)).num_hits <= best.num_hits


@pytest.mark.slow
@pytest.mark.skipif(not TRACE.is_file(), reason=f"the trace is not at {TRACE}")
@pytest.mark.parametrize(("capacity", "known"), [(1_000, 0.0445), (5_859, 0.1361)])
def test_the_counting_is_that_of_the_published_figures(capacity: int, known: float):
    requests = read_mooncake(TRACE)
    lru = replay_reference(requests, Lru(capacity)).hit_ratio
    assert lru == pytest.approx(known, abs=0.0005)
    assert replay(requests, Retention(capacity)).hit_ratio >= 1.25 * lru
