"""A scheduler that ends at any step of an action, and the next one that finds it in the journal."""

from collections.abc import Callable

import pytest
from houses import KV2, N1, N2, A, House, copy, drop

from memcube.ids import CubeId
from memcube.scheduler.actions import Action, ActionState

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")

MOST_STEPS = 16


ACTIONS: dict[str, Callable[[CubeId], Action]] = {
    "a copy that takes over": lambda cube: copy(cube, N2, N1, takes_over=True),
    "a copy beside": lambda cube: copy(cube, N2, N1),
    "a copy built of the catalog": lambda cube: copy(cube, KV2, None),
    "a drop": drop,
}


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("step", range(MOST_STEPS))
def test_whatever_step_it_ends_at_the_next_leader_brings_order(name: str, step: int):
    house = House()
    if name == "a drop":
        house.put(N2)
    action = ACTIONS[name](house.cube)
    first, process = house.lead("one")
    left = step

    def may_crash() -> bool:
        nonlocal left
        left -= 1
        process.is_dead = left < 0
        return process.is_dead

    async def work() -> None:
        await first.submit([action])
        first.pump()

    process.may_crash = may_crash
    process.start(work())
    house.run()
    assert house.has(N1) or house.has(N2), "no copy while nobody leads"

    second = house.succeed("two")
    assert second.num_failures == 0
    assert house.catalog.actions.open() == []
    for node in house.cluster.nodes.values():
        assert (node.reserved, node.holds) == ({}, {})
    journal = house.catalog.actions.page()
    if not journal:
        assert step == 0
        return
    (record,) = journal
    assert record.state is ActionState.DONE
    where = [place for place, _ in house.catalog.actions.copies(A, house.cube, N1.tier)]
    assert all(house.has(place) for place in where)
    assert bool(where)
    assert house.catalog.actions.placement(A, house.cube).epoch == 1


def test_a_paused_leader_that_wakes_up_is_refused_and_stops():
    house = House()
    first, process = house.lead("one")

    async def work() -> None:
        await first.submit([copy(house.cube, N2, N1, takes_over=True)])
        first.pump()

    process.start(work())
    house.run(0.03)
    process.is_paused = True
    house.succeed("two")
    process.wake()
    house.run()
    assert first.is_deposed
    assert first.pump() == 0
    (record,) = house.catalog.actions.page()
    assert (record.state, record.leader) == ("done", 2)


def test_a_tier_that_heard_of_a_later_leader_refuses_an_earlier_one():
    house = House()
    house.lead("one")
    house.cluster.nodes["n2"].hear(5)
    first, process = house.lead("one")

    async def work() -> None:
        await first.submit([copy(house.cube, N2, N1)])
        first.pump()

    process.start(work())
    house.run()
    assert first.is_deposed
    assert not house.has(N2)


def test_the_last_copy_is_never_dropped_though_the_list_says_there_is_another():
    house = House()
    house.put(N2)
    house.cluster.nodes["n2"].published.clear()
    first, process = house.lead("one")

    async def work() -> None:
        await first.submit([drop(house.cube)])
        first.pump()

    process.start(work())
    house.run()
    (record,) = house.catalog.actions.page()
    assert (record.state, record.outcome) == ("undone", "no other copy could be read")
    assert house.has(N1)
    assert list(first.suspects) == [N2]


def test_a_damaged_source_is_not_copied():
    house = House()
    house.cluster.nodes["n1"].published[N1, A, house.cube].content = None
    first, process = house.lead("one")

    async def work() -> None:
        await first.submit([copy(house.cube, N2, N1)])
        first.pump()

    process.start(work())
    house.run()
    (record,) = house.catalog.actions.page()
    assert record.state == "failed"
    assert "differs" in record.outcome
    assert not house.has(N2)
    assert house.cluster.nodes["n2"].reserved == {}


def test_a_target_that_is_down_is_tried_again_and_in_the_end_let_be():
    house = House()
    house.cluster.nodes["n2"].is_up = False
    first, process = house.lead("one")

    async def work() -> None:
        await first.submit([copy(house.cube, N2, N1)])

    process.start(work())
    for _ in range(40):
        house.run(5.0)
        first.pump()
    (record,) = house.catalog.actions.page()
    assert (record.state, record.attempts) == ("failed", 5)
    assert house.cluster.nodes["n1"].holds == {}
    assert N2 in first.suspects
