"""A tenant that moves between shards while it is written and searched, and what a crash leaves on the way."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memcube.catalog import ActionRecord, Principal
from memcube.config import load_config
from memcube.cube import MemCube
from memcube.errors import Conflict, Moved, StaleEpoch, Unavailable
from memcube.ids import TenantId
from memcube.reader.messages import Header
from memcube.scheduler.actions import ActionState, Copy, Drop, shard_place
from memcube.scheduler.enact import Enactor
from memcube.scheduler.shard_port import ShardPort, rest_s
from memcube.service import AddRequest, SearchScope
from memcube.testing.local import LocalSystem
from memcube.tiers.moving import Standing, Whereabouts

ACME = TenantId("acme")
ALL = SearchScope()


@pytest.fixture
def system(tmp_path: Path, catalog_template: Path) -> Iterator[LocalSystem]:
    config = load_config(None, ["plaintext.shards=2", f"data_dir={tmp_path}"])
    opened = LocalSystem.open(tmp_path, config=config, template=catalog_template)
    yield opened
    opened.close()


@pytest.fixture
def who(system: LocalSystem) -> Principal:
    return system.principal(ACME)


class Mover:
    """Moves the tenant as the scheduler does, as one leader after another."""

    def __init__(self, system: LocalSystem) -> None:
        self.system = system
        self.port = ShardPort(lambda number: system.shards[number].moving)
        self.leader = 0
        self.lead()

    def lead(self) -> None:
        lease = self.system.catalog.leases.acquire(
            "scheduler", "test", now=self.system.clock(), ttl_s=1e6
        )
        self.leader = lease.epoch
        self.enactor = Enactor(
            self.port, self.system.catalog.actions, leader=self.leader, clock=self.system.clock
        )

    @property
    def home(self) -> int:
        return self.system.catalog.shards.shard_of(ACME)

    def copy(self) -> Copy:
        return Copy(
            tenant=ACME,
            cube=None,
            version=0,
            epoch=self.system.catalog.actions.placement(ACME, None).epoch,
            source=shard_place(self.home),
            target=shard_place(1 - self.home),
            num_bytes=0,
            takes_over=True,
        )

    async def submit(self, action: Copy | Drop | None = None) -> ActionRecord:
        (record,) = await self.enactor.submit([action or self.copy()])
        assert isinstance(record, ActionRecord), record
        return record

    async def finish(self) -> ActionRecord:
        """Go on until one action is closed."""
        self.enactor.closed.clear()
        async with asyncio.timeout(20):
            while not self.enactor.closed:
                self.enactor.pump()
                await asyncio.sleep(0.005)
                if self.enactor.num_waiting:
                    self.system.clock.advance(1)
        return self.enactor.closed[-1]

    async def move(self) -> ActionRecord:
        await self.submit()
        return await self.finish()


@pytest.fixture
def mover(system: LocalSystem, who: Principal) -> Mover:
    return Mover(system)


async def add(system: LocalSystem, who: Principal, *texts: str) -> list[MemCube]:
    outcomes = await system.service.add(
        who, [AddRequest(text=text, header=Header()) for text in texts], wait_indexed=True
    )
    return [outcome.results[0].cube for outcome in outcomes]


async def found(system: LocalSystem, who: Principal, query: str) -> set[str]:
    return {hit.id for hit in (await system.service.search(who, query, ALL, top_k=200)).hits}


async def test_a_moved_tenant_is_found_written_and_deleted_at_its_new_shard(system, who, mover):
    cubes = await add(system, who, *(f"note {n} about tea" for n in range(150)))
    old = mover.home
    done = await mover.move()
    assert (done.state, mover.home) == (ActionState.DONE, 1 - old)
    # ``who`` was authenticated before the move: it is followed.
    assert await found(system, who, "tea") == {cube.id for cube in cubes}
    (late,) = await add(system, who, "a late note about tea")
    await system.service.delete(who, cubes[0].id)
    assert late.id in system.shards[1 - old].held()
    assert late.id not in system.shards[old].held()
    assert await found(system, who, "tea") == {cube.id for cube in cubes[1:]} | {late.id}
    places = {
        r.location for r in system.catalog.cubes.residency(ACME, cubes[1].id, now=system.clock())
    }
    assert places == {f"shard-{1 - old}"}


async def test_it_may_move_there_and_back(system, who, mover):
    cubes = await add(system, who, *(f"note {n} about tea" for n in range(20)))
    await system.service.delete(who, cubes[0].id)
    for _ in range(3):
        old = mover.home
        await mover.move()
        left = await system.shards[old].info()
        assert left.left == {ACME}
        await mover.submit(
            Drop(
                tenant=ACME,
                cube=None,
                version=0,
                epoch=system.catalog.actions.placement(ACME, None).epoch,
                place=shard_place(old),
                num_bytes=0,
            )
        )
        assert (await mover.finish()).state is ActionState.DONE
        assert system.shards[old].held() == {}
        assert await found(system, who, "tea") == {cube.id for cube in cubes[1:]}


async def test_writes_and_searches_go_on_while_it_moves_and_nothing_is_lost(system, who, mover):
    known = {cube.id for cube in await add(system, who, *(f"first {n} tea" for n in range(100)))}
    going: set[str] = set()
    """Those whose deletion has begun."""
    deleted: set[str] = set()
    stop = asyncio.Event()

    async def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            (cube,) = await add(system, who, f"later {number} tea")
            known.add(cube.id)
            if number % 3 == 0:
                victim = sorted(known)[number % len(known)]
                going.add(victim)
                await system.service.delete(who, victim)
                known.discard(victim)
                deleted.add(victim)
            assert cube.id in await found(system, who, f"later {number} tea") or cube.id in deleted

    async def search() -> None:
        while not stop.is_set():
            before, gone = set(known), set(deleted)
            hits = await found(system, who, "tea")
            assert len(before - going - hits) == 0 or len(hits) == 200
            assert not hits & gone
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(write()), asyncio.create_task(search())]
    for _ in range(4):
        assert (await mover.move()).state is ActionState.DONE
    stop.set()
    await asyncio.gather(*tasks)
    assert await found(system, who, "tea") >= known or len(known) > 200
    held = system.shards[mover.home].held()
    assert known <= held.keys()
    assert not deleted & held.keys()


async def test_a_sealed_tenant_is_neither_read_nor_written_until_it_is_let_go(system, who, mover):
    (cube,) = await add(system, who, "tea")
    shard = system.shards[mover.home]
    await shard.moving.begin_move(ACME, "m", leader=mover.leader)
    await shard.moving.seal(ACME, "m", leader=mover.leader)
    info = await shard.info()
    with pytest.raises(Moved):
        await shard.delete(ACME, {cube.id: 1}, epoch=info.epoch)
    with pytest.raises(Moved):
        await shard.nearest(ACME, [cube.id], where=None, now=system.clock(), limit=1)
    await shard.moving.let_go(ACME, moved=False, leader=mover.leader)
    assert await found(system, who, "tea") == {cube.id}


async def test_a_seal_waits_for_writes_that_are_on_their_way(system, who, mover):
    await add(system, who, "tea")
    shard = system.shards[mover.home]
    entered, go_on = asyncio.Event(), asyncio.Event()
    put = shard.store.put

    async def slow_put(cubes):
        entered.set()
        await go_on.wait()
        await put(cubes)

    shard.store.put = slow_put
    await shard.moving.begin_move(ACME, "m", leader=mover.leader)
    writing = asyncio.create_task(add(system, who, "coffee"))
    await entered.wait()
    sealing = asyncio.create_task(shard.moving.seal(ACME, "m", leader=mover.leader))
    await asyncio.sleep(0)
    assert not sealing.done()
    go_on.set()
    (cube,) = await writing
    assert await sealing == {cube.id: 0}


async def test_a_source_that_restarts_while_sealed_serves_nobody_until_the_move_has_ended(
    system, who, mover
):
    await add(system, who, "tea")
    record = await mover.submit()
    source = system.shards[mover.home]
    await mover.port.prepare(record, leader=mover.leader)
    await mover.port.copy(record, leader=mover.leader)
    source.restart()
    with pytest.raises(Moved):
        await source.nearest(ACME, [], where=None, now=system.clock(), limit=1)
    mover.lead()  # the leader that sealed it is gone
    await mover.enactor.recover()
    assert (await mover.finish()).state is ActionState.DONE
    assert len(await found(system, who, "tea")) == 1


async def test_who_was_not_asked_for_before_the_move_is_served_until_the_seal(system, who, mover):
    await add(system, who, "tea")
    source = system.shards[mover.home]
    source.restart()  # it has served nobody yet
    record = await mover.submit()
    assert len(await found(system, who, "tea")) == 1  # the move waits for its turn
    await mover.port.prepare(record, leader=mover.leader)
    await source.moving.begin_move(ACME, record.id, leader=mover.leader)
    (late,) = await add(system, who, "more tea")
    last = await source.moving.seal(ACME, record.id, leader=mover.leader)
    assert last == {late.id: 0}
    with pytest.raises(Moved):
        await source.nearest(ACME, [], where=None, now=system.clock(), limit=1)
    mover.lead()
    await mover.enactor.recover()
    assert (await mover.finish()).state is ActionState.DONE
    assert len(await found(system, who, "tea")) == 2


@pytest.mark.parametrize("which", ["source", "target"])
async def test_a_shard_that_restarts_on_the_way_makes_the_move_begin_again(
    system, who, mover, which: str
):
    await add(system, who, *(f"note {n} tea" for n in range(200)))
    here = mover.home
    shard = system.shards[here if which == "source" else 1 - here]
    reached = shard._reached
    calls = 0

    def restart_once():
        nonlocal calls
        calls += 1
        if calls == 4:
            shard.restart(empty=which == "target")
        return reached()

    shard._reached = restart_once
    done = await mover.move()
    assert (done.state, mover.home) == (ActionState.DONE, 1 - here)
    assert len(await found(system, who, "tea")) == 200


async def test_a_target_that_is_down_leaves_the_tenant_where_it_is(system, who, mover):
    (cube,) = await add(system, who, "tea")
    here = mover.home
    system.shards[1 - here].down = True
    await mover.submit()
    for _ in range(3):
        mover.enactor.pump()
        await asyncio.sleep(0.02)
        system.clock.advance(60)
    assert await found(system, who, "tea") == {cube.id}
    assert mover.home == here


async def test_an_undone_move_leaves_nothing_at_the_target(system, who, mover):
    await add(system, who, "tea")
    here = mover.home
    record = await mover.submit()
    await mover.port.prepare(record, leader=mover.leader)
    await mover.port.copy(record, leader=mover.leader)
    assert system.shards[1 - here].held()
    await mover.port.free(record, leader=mover.leader)
    await mover.port.release(record, leader=mover.leader, moved=False)
    system.catalog.actions.close(
        record.id, ActionState.UNDONE, "", leader=mover.leader, now=system.clock()
    )
    assert system.shards[1 - here].held() == {}
    assert len(await found(system, who, "tea")) == 1


async def test_what_lies_here_by_the_catalog_is_never_dropped(system, who, mover):
    await add(system, who, "tea")
    shard = system.shards[mover.home]
    with pytest.raises(Conflict):
        await shard.moving.drop_tenant(ACME, leader=mover.leader)
    with pytest.raises(Conflict):
        await shard.moving.expect(ACME, "m", leader=mover.leader)
    assert shard.held()


async def test_an_earlier_leader_is_refused(system, who, mover):
    await add(system, who, "tea")
    shard = system.shards[mover.home]
    shard.fence.check(mover.leader + 1)
    for call in (
        shard.moving.begin_move(ACME, "m", leader=mover.leader),
        shard.moving.let_go(ACME, moved=True, leader=mover.leader),
        shard.moving.drop_tenant(ACME, leader=mover.leader),
    ):
        with pytest.raises(StaleEpoch):
            await call


async def test_what_was_left_behind_is_found_again_after_a_restart(system, who, mover):
    await add(system, who, "tea")
    old = mover.home
    await mover.move()
    system.shards[old].restart()
    assert (await system.shards[old].info()).left == frozenset()
    await system.reconcile()
    assert (await system.shards[old].info()).left == {ACME}
    assert len(await found(system, who, "tea")) == 1


async def test_a_caller_that_waits_too_long_is_told_to_try_again():
    async def never(shard: int) -> None:
        raise Moved("acme", shard)

    async def same(_: TenantId) -> int:
        return 0

    waits = Whereabouts(same, patience_s=0.01, look_every_s=0.001, ask_every_s=0.002)
    with pytest.raises(Unavailable, match="try again"):
        await waits.follow(ACME, 0, never)


async def test_all_that_wait_for_a_tenant_share_one_look_at_the_catalog():
    home, looks, looked = 0, 0, asyncio.Event()

    async def shard_of(_: TenantId) -> int:
        nonlocal looks
        looks += 1
        looked.set()
        return home

    async def search(shard: int) -> str:
        if shard != 1:
            raise Moved("acme", shard)
        return "found"

    waits = Whereabouts(shard_of, look_every_s=0.001, ask_every_s=60.0)
    callers = [asyncio.create_task(waits.follow(ACME, 0, search)) for _ in range(100)]
    await looked.wait()
    home = 1
    assert await asyncio.gather(*callers) == [("found", 1)] * 100
    assert looks < 5


def test_standing(system: LocalSystem, who: Principal, mover: Mover):
    shards: Callable[[TenantId, int], Standing] = system.catalog.shards.standing
    here = mover.home
    assert shards(ACME, here) is Standing.HERE
    assert shards(ACME, 1 - here) is Standing.ELSEWHERE
    system.catalog.actions.plan([mover.copy()], leader=mover.leader, now=system.clock())
    assert shards(ACME, here) is Standing.LEAVING
    assert system.catalog.shards.moving() == {ACME}
    assert shards(TenantId("nobody"), here) is Standing.UNKNOWN


async def test_a_late_put_does_not_bring_a_deleted_memory_back_at_the_new_shard(system, who, mover):
    (cube,) = await add(system, who, "tea")
    late = await system.shards[mover.home].moving.read_out(ACME, [cube.id], leader=mover.leader)
    assert late
    await system.service.delete(who, cube.id)
    await mover.move()
    # A gateway that had embedded the text before the deletion, and knew the tenant's old shard.
    await system.indexer.index([cube], shard=1 - mover.home)
    assert cube.id not in system.shards[mover.home].held()


async def test_a_move_that_could_not_tell_its_source_leaves_no_seal_for_the_way_back(
    system, who, mover
):
    await add(system, who, "tea")
    old = mover.home
    record = await mover.submit()
    await mover.port.prepare(record, leader=mover.leader)
    await mover.port.copy(record, leader=mover.leader)
    checksum = await mover.port.verify(record, leader=mover.leader)
    book, how = system.catalog.actions, {"leader": mover.leader, "now": system.clock()}
    book.prepared(record.id, checksum, **how)
    book.commit(record.id, **how)
    book.close(record.id, ActionState.FAILED, "the source was never told", **how)
    mover.lead()
    await mover.move()  # back
    assert mover.home == old
    assert len(await found(system, who, "tea")) == 1


async def test_an_undone_move_lets_the_source_go_also_when_the_target_is_down(system, who, mover):
    await add(system, who, "tea")
    here = mover.home
    record = await mover.submit()
    await mover.port.prepare(record, leader=mover.leader)
    await mover.port.copy(record, leader=mover.leader)
    system.shards[1 - here].down = True
    for _ in range(8):
        mover.enactor.pump()
        await asyncio.sleep(0.01)
        system.clock.advance(60)
    assert mover.home == here
    assert len(await found(system, who, "tea")) == 1


async def test_a_search_that_a_move_overtakes_is_made_again_at_the_new_shard(system, who, mover):
    await add(system, who, "tea")
    shard = system.shards[mover.home]
    search, began, go_on = shard._shard._retriever.search, asyncio.Event(), asyncio.Event()

    async def slow_search(*given, **named):
        began.set()
        await go_on.wait()
        return await search(*given, **named)

    shard._shard._retriever.search = slow_search
    searching = asyncio.create_task(found(system, who, "tea"))
    await began.wait()
    await mover.move()
    await shard.moving.drop_tenant(ACME, leader=mover.leader)
    go_on.set()
    assert len(await searching) == 1


@pytest.mark.parametrize(
    ("took_s", "fastest_s", "rest"),
    [(0.1, 0.1, 0.1), (0.2, 0.1, 0.4), (5.0, 0.1, 20.0), (0.1, 0.2, 0.1), (0.1, 0.0, 0.1)],
)
def test_a_step_that_was_slow_is_followed_by_a_longer_rest(took_s, fastest_s, rest):
    assert rest_s(took_s, fastest_s) == pytest.approx(rest)
