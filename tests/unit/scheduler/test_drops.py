"""Drops whose other copy is lost around their commit: the bytes are listed again, if nobody may have removed them."""

from collections.abc import Callable
from typing import Any

import pytest
from houses import N1, N2, A, House, drop

from memcube.catalog import ActionRecord
from memcube.errors import Unavailable
from memcube.scheduler.actions import ActionState, Place, Tier
from memcube.scheduler.control import Control, Report
from memcube.scheduler.enact import Enactor
from memcube.scheduler.planner import Planner
from memcube.scheduler.world import Capacity, Node, World
from memcube.testing.sim_catalog import SimFeed
from memcube.testing.sim_nodes import SimPort

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")


@pytest.fixture
def house() -> House:
    house = House()
    house.put(N2)
    return house


def lose(house: House, place: Place = N2) -> None:
    house.cluster.nodes[place.node].published.clear()


def after_commit(house: House, do: Callable[[], None]) -> None:
    """Do something at once when an action has committed."""
    book = house.catalog.actions
    commit = book.commit

    def watched(id: str, **more: Any) -> ActionRecord:
        record = commit(id, **more)
        do()
        return record

    book.commit = watched  # type: ignore[method-assign]


def carry_out(house: House) -> Enactor:
    enactor, process = house.lead("one")

    async def work() -> None:
        await enactor.submit([drop(house.cube)])
        enactor.pump()

    process.start(work())
    for _ in range(4):
        house.run(5.0)
        enactor.pump()
    assert enactor.num_failures == 0
    return enactor


def outcome(house: House) -> tuple[str, list[Place]]:
    """How the drop ended, and where the cube is listed."""
    (record,) = house.catalog.actions.page()
    return record.state, [p for p, _ in house.catalog.actions.copies(A, house.cube, Tier.PLAINTEXT)]


def test_a_copy_that_is_lost_between_its_read_and_the_commit(house: House):
    house.cluster.heard = lambda read: lose(house)
    enactor = carry_out(house)
    assert outcome(house) == ("undone", [N1, N2])
    assert house.has(N1)
    assert house.catalog.actions.placement(A, house.cube).epoch == 2
    assert list(enactor.suspects) == [N2]


def test_a_copy_that_is_lost_right_after_the_commit(house: House):
    after_commit(house, lambda: lose(house))
    carry_out(house)
    assert outcome(house) == ("undone", [N1, N2])
    assert house.has(N1)


def test_a_copy_on_a_node_that_is_lost_and_forgotten_after_the_commit(house: House):
    def forget() -> None:
        house.cluster.nodes["n2"].lose()
        house.catalog.actions.forget_location("n2", leader=1, now=house.cluster.kernel.time())

    after_commit(house, forget)
    carry_out(house)
    assert outcome(house) == ("undone", [N1])
    assert house.has(N1)


def test_what_has_changed_since_the_commit_is_not_listed_again(house: House):
    def change() -> None:
        lose(house)
        house.catalog.change(A, house.cube, 0.0)

    after_commit(house, change)
    carry_out(house)
    assert outcome(house) == ("done", [N2])
    assert not house.has(N1)


def test_bytes_that_are_lost_too_are_not_listed_again(house: House):
    after_commit(house, lambda: (lose(house), lose(house, N1)))
    carry_out(house)
    assert outcome(house) == ("done", [N2])


def test_a_drop_that_an_earlier_leader_committed_is_listed_again(house: House):
    first, process = house.lead("one")
    after_commit(house, lambda: (lose(house), setattr(process, "is_dead", True)))

    async def work() -> None:
        await first.submit([drop(house.cube)])
        first.pump()

    process.start(work())
    house.run()
    assert outcome(house) == ("committed", [N2])
    house.succeed("two")
    assert outcome(house) == ("undone", [N1, N2])
    assert house.has(N1)
    assert house.cluster.nodes["n1"].leader == 2


@pytest.mark.parametrize("is_done", [True, False])
def test_bytes_that_may_have_been_removed_are_not_listed_again(
    house: House, monkeypatch: pytest.MonkeyPatch, is_done: bool
):
    remove, num_asked = SimPort.drop, 0

    async def unheard(self: SimPort, given: ActionRecord, *, leader: int) -> None:
        nonlocal num_asked
        num_asked += 1
        if is_done or num_asked > 1:
            await remove(self, given, leader=leader)
        if num_asked == 1:
            lose(house)
            raise Unavailable("n1")

    monkeypatch.setattr(SimPort, "drop", unheard)
    carry_out(house)
    assert num_asked == 2
    assert outcome(house) == ("done", [N2])
    assert not house.has(N1)


def test_a_commit_that_arrives_while_the_next_attempt_gives_up(house: House):
    book = house.catalog.actions
    commit, copies, given = book.commit, book.copies, []

    def lost(id: str, **more: Any) -> ActionRecord:
        given.append((id, more))
        raise Unavailable("catalog")

    def late(*wanted: Any) -> list[tuple[Place, int]]:
        listed = copies(*wanted)
        if given:
            id, more = given.pop()
            book.commit = commit  # type: ignore[method-assign]
            book.commit(id, **more)
            lose(house)
        return listed

    book.commit, book.copies = lost, late  # type: ignore[method-assign]
    carry_out(house)
    assert given == []
    assert outcome(house) == ("undone", [N1, N2])
    assert house.has(N1)


class Idle(Enactor):
    """Starts nothing."""

    def pump(self) -> int:
        return 0


def test_the_comparison_leaves_bytes_that_an_open_drop_has_struck(house: House):
    kernel, book = house.cluster.kernel, house.catalog.actions
    enactor, process = house.lead("one", Idle)
    world = World(kv_bytes_per_token=10)
    for place in (N1, N2):
        world.set_node(Node(name=place.node))
        world.set_place(place, Capacity(num_bytes=10_000))
    control = Control(
        world,
        Planner(),
        enactor,
        house.cluster.port(),
        book,
        SimFeed(house.catalog),
        leader=1,
        clock=kernel.time,
        call=house.cluster.ask,
        compare_every_s=0.0,
        grace_s=0.0,
    )
    (record,) = book.plan([drop(house.cube)], leader=1, now=kernel.time())
    book.commit(record.id, leader=1, now=kernel.time())
    reports: list[Report] = []

    async def compare() -> None:
        for _ in world.places:
            reports.append(await control.round())

    process.start(compare())
    house.run()
    assert [(one.num_compared, one.num_removed) for one in reports] == [(1, 0), (1, 0)]
    assert house.has(N1)
    enactor.closed.append(book.close(record.id, ActionState.DONE, "", leader=1, now=kernel.time()))
    process.start(compare())
    house.run()
    assert [(one.num_compared, one.num_removed) for one in reports[2:]] == [(1, 1), (1, 0)]
    assert not house.has(N1)
