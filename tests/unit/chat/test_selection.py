from datetime import timedelta

import pytest

from memcube.activation.contract import SegmentRef, Usage
from memcube.chat.contract import SegmentUse
from memcube.chat.host import segment_uses
from memcube.chat.selection import SEGMENT_TOKENS, SHORT_TOKENS, fitting, pack, wanted
from memcube.context import estimate_tokens
from memcube.cube import Descriptive, Governance, MemCube, Shape
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import State
from memcube.retrieval.ranker import Hit
from memcube.testing.local import START
from memcube.tiers.plaintext import StoredCube
from memcube.window import WINDOW_TURNS, Window


def cube(number: int, text: str = "tea") -> MemCube:
    at = START + timedelta(minutes=number)
    return MemCube(
        id=CubeId(f"id-{number:03}"),
        tenant=TenantId("t"),
        shape=Shape.LEAF,
        state=State.GENERATED,
        version=1,
        text=text,
        descriptive=Descriptive(created_at=at),
        governance=Governance(owner="t"),
        updated_at=at,
    )


def hit(number: int, score: float, seq: int | None = None) -> Hit:
    payload = {"thread": "th" if seq is not None else None, "seq": seq}
    id = CubeId(f"id-{number:03}")
    return Hit(
        id=id,
        score=score,
        cube=StoredCube(id=id, version=1, text="", payload=payload),
        explain=None,
    )


def test_hits_of_one_window_count_together_and_facts_stand_alone():
    found = wanted([hit(1, 0.4, seq=1), hit(2, 0.3, seq=WINDOW_TURNS - 1), hit(3, 0.5)])
    assert found.windows == {Window("th", 0): pytest.approx(0.7)}
    assert found.singles == {"id-003": 0.5}


def test_windows_tile_a_thread():
    assert Window.of("th", WINDOW_TURNS) == Window("th", 1)
    assert Window("th", 1).first == Window("th", 0).last + 1


def test_a_segment_holds_whole_memories_within_its_bound_and_nothing_is_left_out():
    cubes = [cube(n, "word " * 100) for n in range(12)]
    packed = pack(cubes, worth=1.0)
    assert len(packed) > 1
    assert [id for one in packed for id in one.segment.cubes] == [c.id for c in cubes]
    assert all(one.num_tokens <= SEGMENT_TOKENS for one in packed)
    assert all(estimate_tokens(one.segment.text) == one.num_tokens for one in packed)


def test_a_short_last_segment_takes_its_share_of_the_one_before():
    cubes = [cube(n, "word " * 40) for n in range(10)]
    packed = pack(cubes, worth=1.0)
    assert [id for one in packed for id in one.segment.cubes] == [c.id for c in cubes]
    assert [len(one.segment.cubes) for one in packed] == [5, 5]
    assert all(SHORT_TOKENS <= one.num_tokens <= SEGMENT_TOKENS for one in packed)


def test_more_memories_leave_all_segments_but_the_last_two():
    cubes = [cube(n, "word " * 60) for n in range(30)]
    fewer, more = pack(cubes[:-1], worth=1.0), pack(cubes, worth=1.0)
    assert [one.segment for one in fewer][:-2] == [one.segment for one in more][: len(fewer) - 2]


def test_a_memory_longer_than_a_segment_is_one_of_its_own():
    (one,) = pack([cube(1, "word " * 2000)], worth=1.0)
    assert one.num_tokens > SEGMENT_TOKENS


def test_the_worthiest_that_fit_are_laid_out_oldest_first():
    old, middle, new = (
        pack([cube(n, f"memory {n} " + "word " * 50)], worth=worth)[0]
        for n, worth in ((1, 0.2), (2, 0.1), (3, 0.9))
    )
    budget = old.num_tokens + new.num_tokens
    assert fitting([new, middle, old], token_budget=budget) == (old.segment, new.segment)
    assert fitting([new, middle, old], token_budget=new.num_tokens) == (new.segment,)


def test_a_segment_counts_as_what_most_of_it_was():
    def uses(exact: int, composed: tuple[SegmentRef, ...] = ()) -> tuple[SegmentUse, ...]:
        usage = Usage(
            prompt_tokens=100,
            completion_tokens=1,
            attached_exact=exact,
            attached_composed=sum(s.end - s.start for s in composed),
            recomputed=0,
            prefilled=0,
            queue_s=0.0,
            ttft_s=0.0,
            composed=composed,
        )
        return segment_uses((SegmentRef(10, 40), SegmentRef(40, 70)), usage)

    assert [use.form for use in uses(0)] == ["text", "text"]
    assert [use.form for use in uses(64)] == ["exact_kv", "exact_kv"]
    assert [use.form for use in uses(40)] == ["exact_kv", "text"]
    assert [use.form for use in uses(10, (SegmentRef(10, 40),))] == ["composed_kv", "text"]
    assert [use.form for use in uses(40, (SegmentRef(40, 70),))] == ["exact_kv", "composed_kv"]
