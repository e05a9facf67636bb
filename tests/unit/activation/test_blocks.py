import pytest
import torch

from memcube.activation.blocks import Block, BlockPool
from memcube.policies.retention import Retention
from memcube.testing.kv import TinyLru

BYTES = 2 * 2 * 4 * 2 * 4
"""Of a block of four tokens: one layer, two heads of two."""


def block(key, token_ids=(1, 2, 3, 4), *, parent="root", tenant="a", cubes=(), start=0):
    return Block(
        key=key,
        start=start,
        kv_L2HND=torch.randn(1, 2, 2, len(token_ids), 2),
        tenant=tenant,
        group="g",
        cubes=frozenset(cubes),
        saves_s=1.0,
        parent=parent,
        token_ids=tuple(token_ids),
    )


@pytest.fixture
def evicted():
    return []


@pytest.fixture
def pool(evicted):
    return BlockPool(TinyLru(3 * BYTES), evicted.append)


def test_a_block_is_kept_as_a_copy_and_the_first_of_a_key_stays(pool):
    given = block("k")
    assert pool.put(given, 0.0)
    with pool.held(["k"]) as held:
        kept = held[0].kv_L2HND
        assert torch.equal(kept, given.kv_L2HND)
        assert kept.data_ptr() != given.kv_L2HND.data_ptr()
    assert pool.put(block("k"), 1.0)
    with pool.held(["k"]) as held:
        assert held[0].kv_L2HND is kept
    assert pool.used_bytes == BYTES


def test_what_is_evicted_is_handed_on_and_counted(pool, evicted):
    for number in range(4):
        pool.put(block(f"k{number}", (number, 1, 1, 1)), float(number))
    assert [b.key for b in evicted] == ["k0"]
    assert pool.evictions == {"capacity": 1}
    assert pool.bytes_by_tenant == {"a": 3 * BYTES}
    assert "k0" not in pool
    assert pool.continuing("root", (0, 1, 1, 1)) is None


def test_what_is_not_let_in_is_counted(pool):
    assert not pool.put(block("big", range(40)), 0.0)
    assert pool.evictions == {"refused: no room": 1}
    assert len(pool) == 0


def test_held_blocks_stay(pool, evicted):
    for number in range(3):
        pool.put(block(f"k{number}", (number, 1, 1, 1)), 0.0)
    with pool.held(["k0", "k1", "gone", "k2"]) as held:
        assert [b.key for b in held] == ["k0", "k1"]
        pool.put(block("k3", (3, 1, 1, 1)), 1.0)
    assert [b.key for b in evicted] == ["k2"]


def test_of_a_chain_the_end_is_the_first_to_go(pool, evicted):
    for number in range(3):
        pool.put(block(f"k{number}", (number, 1, 1, 1)), 0.0)
    pool.hit(["k0", "k1", "k2"], 1.0)
    pool.put(block("k3", (3, 1, 1, 1)), 2.0)
    assert [b.key for b in evicted] == ["k2"]


def test_the_block_that_goes_on_like_a_prompt_for_longest_is_found(pool):
    pool.put(block("a", (1, 2, 3, 4)), 0.0)
    pool.put(block("b", (1, 2, 9, 9)), 0.0)
    pool.put(block("c", (1, 2, 3, 4), parent="other"), 0.0)
    found = pool.continuing("root", (1, 2, 3, 7))
    assert found is not None
    assert (found[0].key, found[1]) == ("a", 3)
    assert pool.continuing("root", (2, 2)) is None
    assert pool.continuing("root", ()) is None


def test_a_block_takes_the_place_of_those_it_begins_with(pool, evicted):
    pool.put(block("tail", (1, 2)), 0.0)
    pool.put(block("other", (1, 3)), 0.0)
    pool.put(block("full", (1, 2, 3, 4)), 0.0)
    assert [b.key for b in pool.blocks()] == ["other", "full"]
    assert evicted == []
    assert pool.evictions == {"superseded": 1}
    found = pool.continuing("root", (1, 2))
    assert found is not None
    assert (found[0].key, found[1]) == ("full", 2)


def test_the_only_block_behind_a_parent_can_be_superseded(pool):
    pool.put(block("tail", (1, 2)), 0.0)
    pool.put(block("full", (1, 2, 3, 4)), 0.0)
    assert pool.continuing("root", (1, 2, 3, 4)) is not None
    pool.forget((), "a", "test")
    assert len(pool) == 0
    assert pool.continuing("root", (1, 2, 3, 4)) is None


def test_what_holds_a_cube_and_what_is_of_a_tenant_is_forgotten(pool, evicted):
    pool.put(block("one", (1,), cubes=("x",)), 0.0)
    pool.put(block("two", (2,), cubes=("y",)), 0.0)
    pool.put(block("three", (3,), tenant="b"), 0.0)
    assert pool.forget({"x"}, "b", "deleted") == 2
    assert [b.key for b in pool.blocks()] == ["two"]
    assert evicted == []
    assert pool.evictions == {"deleted": 2}
    assert set(pool.bytes_by_tenant) == {"a"}


def test_the_real_policy_keeps_what_a_chain_needs_and_never_overfills():
    gone = []
    pool = BlockPool(Retention(10 * BYTES), gone.append)
    for chain in range(6):
        parent = f"root-{chain}"
        for number in range(4):
            key = f"{chain}-{number}"
            pool.put(block(key, (number, 1, 1, 1), parent=parent), float(chain))
            parent = key
        assert pool.used_bytes <= 10 * BYTES
        here = {b.key for b in pool.blocks()}
        for b in pool.blocks():
            assert b.parent in here or str(b.parent).startswith("root")
    assert gone
