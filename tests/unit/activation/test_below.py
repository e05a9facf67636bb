import asyncio
import threading

import pytest

from memcube.activation.below import Below
from memcube.activation.blocks import Place
from memcube.errors import Unavailable
from tests.unit.activation.test_blocks import BYTES, block


class Lower:
    """Media in a dict, whose calls wait for the test if it says so."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.offered = []
        self.blocks = {}
        self.asked = []
        self.fails = False

    def _enter(self):
        self.entered.set()
        assert self.gate.wait(30)
        if self.fails:
            raise OSError("broken")

    def offer(self, blocks):
        self._enter()
        self.offered += [b.key for b in blocks]

    def fetch(self, places):
        self._enter()
        self.asked.append([place.key for place in places])
        return {p.key: self.blocks[p.key].kv_L2HND for p in places if p.key in self.blocks}

    def forget(self, cubes, tenant):
        self._enter()


@pytest.fixture
def lower():
    return Lower()


@pytest.fixture
def below(lower):
    below = Below(lower, waiting_bytes=2 * BYTES, clock=lambda: 0.0)
    yield below
    lower.gate.set()
    below.close()


def places(*keys):
    return [Place(key, 0) for key in keys]


async def hold(below, lower):
    """Let the thread wait in a call."""
    lower.gate.clear()
    lower.entered.clear()
    below.offer(block("first"))
    assert await asyncio.to_thread(lower.entered.wait, 30)


async def test_of_a_chain_what_lies_behind_a_gap_is_left(below, lower):
    lower.blocks = {key: block(key) for key in ("a", "b", "d")}
    assert set(await below.fetch(places("a", "b", "c", "d"), 30.0, is_chain=True)) == {"a", "b"}
    assert set(await below.fetch(places("a", "c", "d"), 30.0, is_chain=False)) == {"a", "d"}


async def test_many_blocks_are_asked_for_a_few_at_a_time(below, lower):
    lower.blocks = {str(n): block(str(n)) for n in range(20)}
    assert len(await below.fetch(places(*map(str, range(20))), 30.0, is_chain=True)) == 20
    assert [len(keys) for keys in lower.asked] == [8, 8, 4]


async def test_what_came_before_the_time_was_up_is_used():
    lower = Lower()
    lower.blocks = {str(n): block(str(n)) for n in range(20)}
    now = iter([0.0, 0.0, 0.0, 5.0, 5.0, 5.0])
    below = Below(lower, waiting_bytes=BYTES, clock=lambda: next(now))
    found = await below.fetch(places(*map(str, range(20))), 4.0, is_chain=True)
    assert len(found) == 8
    below.close()


async def test_loads_go_before_stores(below, lower):
    await hold(below, lower)
    below.offer(block("second"))
    fetch = asyncio.create_task(below.fetch(places("a"), 30.0, is_chain=True))
    await asyncio.sleep(0)
    lower.gate.set()
    await fetch
    assert lower.offered[:1] == ["first"]
    await asyncio.to_thread(below.close)
    assert lower.offered == ["first", "second"]


async def test_of_what_was_evicted_only_so_much_waits(below, lower):
    await hold(below, lower)
    for key in ("a", "b", "c"):
        below.offer(block(key))
    assert below.num_dropped == 1
    lower.gate.set()
    await asyncio.to_thread(below.close, [block("last")])
    assert lower.offered == ["first", "a", "b", "last"]
    below.offer(block("late"))
    assert below.num_dropped == 2


async def test_what_is_forgotten_leaves_the_line_too(below, lower):
    await hold(below, lower)
    below.offer(block("a", cubes=("x",)))
    below.offer(block("b"))
    forget = asyncio.create_task(below.forget({"x"}, None))
    await asyncio.sleep(0)
    lower.gate.set()
    await forget
    await asyncio.to_thread(below.close)
    assert lower.offered == ["first", "b"]


async def test_a_medium_that_fails_is_a_miss_and_a_loss(below, lower):
    lower.fails = True
    assert await below.fetch(places("a"), 30.0, is_chain=True) == {}
    with pytest.raises(OSError, match="broken"):
        await below.forget({"x"}, None)
    below.offer(block("a"))
    await asyncio.to_thread(below.close)
    assert below.num_failed == 2
    with pytest.raises(Unavailable):
        await below.fetch(places("a"), 30.0, is_chain=True)
