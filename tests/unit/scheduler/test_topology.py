"""Nodes and shards in the scheduler's world, and tenants that move between them, without a cluster."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from worlds import NOW, A, B, Small

from memcube.catalog import NodeSeen
from memcube.config import load_config
from memcube.errors import Conflict, NotFound, Unavailable
from memcube.ids import TenantId
from memcube.scheduler.actions import Copy, Drop, shard_place
from memcube.scheduler.planner import Planner
from memcube.scheduler.policies.balance import SMALL_BYTES, Balance
from memcube.scheduler.policies.spread import Spread
from memcube.scheduler.settings import Profile, Profiles
from memcube.scheduler.tenant_moves import TenantMoves, tenant_move
from memcube.scheduler.topology import Ports, Topology
from memcube.scheduler.world import Capacity, Held, Node, World
from memcube.testing.local import LocalSystem
from memcube.tiers.shard import ShardInfo

ACME = TenantId("acme")


class Cluster:
    """A catalog, and nodes that the test says there are. Shards open at once."""

    def __init__(self, system: LocalSystem, *, num_configured: int = 1) -> None:
        self.system = system
        self.is_slow = False
        self.book = system.catalog.shards
        self.up = {"a": True}
        self.opened: list[tuple[int, str, bool]] = []
        self.left: dict[int, frozenset[TenantId]] = {}
        self.epoch = 0
        self.world = World()
        lease = system.catalog.leases.acquire("scheduler", "t", now=system.clock(), ttl_s=1e6)
        self.leader = lease.epoch
        self.topology = Topology(
            self.book,
            Ports(
                nodes=self.nodes,
                info=self.info,
                open_shard=self.open_shard,
                tenants=system.catalog.access.tenants,
            ),
            num_configured=num_configured,
            shard_bytes=1 << 30,
            shard_per_node=True,
        )

    async def nodes(self) -> list[NodeSeen]:
        return [
            NodeSeen(name=name, labels={"zone": name * 2, "gpu": "true"}, alive=alive)
            for name, alive in self.up.items()
        ]

    async def info(self, shard: int) -> ShardInfo | None:
        left = self.left.get(shard, frozenset())
        return ShardInfo(shard=shard, epoch=1, index="i", location="", left=left)

    async def open_shard(self, shard: int, node: str, again: bool) -> None:
        self.opened.append((shard, node, again))
        if not self.is_slow:
            self.open(shard, node)

    def open(self, shard: int, node: str) -> None:
        self.epoch += 1
        self.book.opened(shard, node=node, location="", epoch=self.epoch, now=self.system.clock())

    async def look(self) -> list[Drop]:
        self.system.clock.advance(1)
        found = await self.topology.update(self.world, leader=self.leader, now=self.system.clock())
        return list(found)

    def homes(self) -> list[tuple[int, str, str]]:
        return [(s.shard, s.home, s.node) for s in self.book.shards()]

    def fit(self, shard: int) -> bool:
        return self.world.is_fit(self.world.places.get(shard_place(shard)))


@pytest.fixture
def system(tmp_path: Path, catalog_template: Path) -> Iterator[LocalSystem]:
    config = load_config(None, ["plaintext.shards=1", f"data_dir={tmp_path}"])
    opened = LocalSystem.open(tmp_path, config=config, template=catalog_template)
    yield opened
    opened.close()


@pytest.fixture
def cluster(system: LocalSystem) -> Cluster:
    found = Cluster(system)
    found.open(0, "a")
    system.principal(ACME)
    return found


async def test_a_node_that_joins_gets_a_shard_of_its_own_and_one_that_drains_none(cluster):
    await cluster.look()
    assert cluster.homes() == [(0, "a", "a")]
    cluster.up |= {"b": True}
    await cluster.look()
    cluster.up |= {"c": True}
    cluster.book.note_nodes(
        await cluster.nodes(), leader=cluster.leader, now=cluster.system.clock()
    )
    cluster.book.drain("c", True, now=cluster.system.clock())
    await cluster.look()
    await cluster.look()
    assert cluster.homes() == [(0, "a", "a"), (1, "b", "b")]
    assert cluster.world.tenant_places == {ACME: shard_place(0)}
    assert cluster.world.nodes["shard-1"].labels == {"b", "zone=bb", "gpu=true", "gpu"}


async def test_a_shard_away_from_home_drains_and_goes_back_when_it_is_empty(cluster):
    cluster.up |= {"b": True}
    await cluster.look()
    cluster.up["b"] = False
    await cluster.look()
    assert not cluster.world.is_readable(cluster.world.places.get(shard_place(1)))
    cluster.open(1, "a")  # Ray started it there
    await cluster.look()
    assert cluster.fit(1)
    cluster.up["b"] = True
    await cluster.look()
    assert cluster.opened[-1] == (1, "b", True)
    await cluster.look()
    assert cluster.homes() == [(0, "a", "a"), (1, "b", "b")]
    assert cluster.fit(1)


async def test_a_shard_away_from_home_with_a_tenant_is_emptied_first(cluster):
    cluster.up |= {"b": True}
    await cluster.look()
    cluster.open(0, "b")
    await cluster.look()
    assert not cluster.fit(0)
    assert cluster.fit(1)
    assert (0, "a", True) not in cluster.opened


async def test_what_a_tenant_left_behind_is_to_be_dropped(cluster):
    cluster.up |= {"b": True}
    cluster.left[1] = frozenset({ACME, TenantId("gone")})
    await cluster.look()
    (drop,) = [one for one in await cluster.look() if one.tenant == ACME]
    assert (drop.cube, drop.place, drop.policy) == (None, shard_place(1), "leftovers")
    cluster.world.moving_tenants.add(ACME)
    assert [one for one in await cluster.look() if one.tenant == ACME] == []


async def test_nodes_that_are_gone_are_down_and_can_be_forgotten(cluster):
    cluster.up |= {"b": True}
    await cluster.look()
    with pytest.raises(Conflict, match="is up"):
        cluster.book.forget_node("b", now=cluster.system.clock())
    del cluster.up["b"]
    cluster.open(1, "a")
    await cluster.look()
    assert not cluster.book.node("b").alive
    cluster.book.forget_node("b", now=cluster.system.clock())
    await cluster.look()
    assert "b" not in cluster.world.nodes
    assert cluster.homes() == [(0, "a", "a"), (1, "a", "a")]


async def test_a_node_that_was_forgotten_stays_so_though_ray_remembers_it(cluster):
    cluster.up |= {"b": True}
    await cluster.look()
    cluster.up["b"] = False
    cluster.open(1, "a")
    await cluster.look()
    cluster.book.forget_node("b", now=cluster.system.clock())
    cluster.up |= {"c": True}
    await cluster.look()
    assert [node.name for node in cluster.book.nodes()] == ["a", "c"]


async def test_a_shard_goes_home_when_nothing_is_left_in_it_and_is_given_time_to_open(cluster):
    cluster.up |= {"b": True}
    await cluster.look()
    cluster.open(1, "a")
    cluster.left[1] = frozenset({ACME})
    await cluster.look()
    assert (1, "b", True) not in cluster.opened
    cluster.left.clear()
    cluster.is_slow = True
    for _ in range(3):
        await cluster.look()
    assert cluster.opened.count((1, "b", True)) == 1


async def test_no_node_is_given_a_shard_before_those_of_the_configuration_are_open(system):
    cluster = Cluster(system, num_configured=2)
    cluster.open(0, "a")
    cluster.up |= {"b": True}
    await cluster.look()
    assert cluster.homes() == [(0, "a", "a")]
    cluster.open(1, "a")
    await cluster.look()
    assert cluster.homes() == [(0, "a", "a"), (1, "a", "a"), (2, "b", "b")]


async def test_the_last_node_is_not_drained(cluster):
    await cluster.look()
    with pytest.raises(Conflict, match="no other node"):
        cluster.book.drain("a", True, now=cluster.system.clock())
    with pytest.raises(NotFound):
        cluster.book.drain("x", True, now=cluster.system.clock())


async def test_new_tenants_lie_where_something_new_is_taken(cluster):
    cluster.up |= {"b": True}
    await cluster.look()
    cluster.book.drain("a", True, now=cluster.system.clock())
    access, now = cluster.system.catalog.access, cluster.system.clock()
    made = [access.ensure_tenant(f"t{n}", shards=1, now=now).shard for n in range(5)]
    assert made == [1] * 5


class Asked:
    """Who plans, for ``TenantMoves``."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.actions: list[Copy] = []

    def ask(self, actions: list[Copy]) -> None:
        self.actions += actions


async def test_an_operators_move_is_asked_for_until_it_is_so(cluster):
    cluster.up |= {"b": True}
    await cluster.look()
    await cluster.look()
    tasks, clock = cluster.system.catalog.tasks, cluster.system.clock
    task = tasks.put(ACME, tenant_move(ACME, "zone=bb"), now=clock())
    asked = Asked(cluster.world)
    moves = TenantMoves(cluster.book, asked)
    with pytest.raises(Unavailable):
        await moves.move(task, clock())
    (copy,) = asked.actions
    assert (copy.source, copy.target, copy.takes_over) == (shard_place(0), shard_place(1), True)
    cluster.world.moving_tenants.add(ACME)
    with pytest.raises(Unavailable):
        await moves.move(task, clock())
    assert len(asked.actions) == 1
    cluster.world.tenant_places[ACME] = shard_place(1)
    assert (await moves.move(task, clock()))["node"] == "b"
    nowhere = tasks.supersede(ACME, tenant_move(ACME, "zone=xx"), now=clock())
    with pytest.raises(NotFound):
        await moves.move(nowhere, clock())


# -- policies by tenant ----------------------------------------------------------------------------


def shards(*sizes: dict[TenantId, int]) -> Small:
    """A world with a shard for each of these, and one cube of each tenant."""
    small = Small(nodes=())
    for number, tenants in enumerate(sizes):
        place = shard_place(number)
        small.world.set_node(Node(name=place.location))
        small.world.set_place(place, Capacity(num_bytes=1 << 40))
        for tenant, num_bytes in tenants.items():
            small.world.tenant_places[tenant] = place
            if num_bytes:
                small.world.set_held(
                    small.world.row(tenant, small.add(place, tenant=tenant)),
                    [Held(place, 1, num_bytes)],
                )
    return small


def moved(small: Small, policy) -> list[tuple[TenantId, str]]:
    plan = Planner(Profiles(default=Profile()), policies=[policy]).plan(small.world, NOW, full=True)
    return [
        (action.tenant, action.target.location)
        for action in plan.actions
        if isinstance(action, Copy) and action.cube is None
    ]


def test_a_draining_shard_is_emptied_of_tenants_also_of_those_without_a_cube():
    small = shards({A: 1_000, B: 0}, {})
    small.world.set_node(Node(name="shard-0", draining=True))
    assert moved(small, Spread(by_tenant=True)) == [(A, "shard-1"), (B, "shard-1")]
    small.world.moving_tenants.add(A)
    assert moved(small, Spread(by_tenant=True)) == [(B, "shard-1")]


def test_balance_moves_the_largest_tenant_that_halves_the_difference_and_then_rests():
    big = 10 * SMALL_BYTES
    small = shards({A: 3 * big, B: big}, {})
    assert moved(small, Balance(by_tenant=True)) == [(B, "shard-1")]
    assert moved(shards({A: 3 * big}, {B: big}), Balance(by_tenant=True)) == []
    assert moved(shards({A: 2 * big, B: big}, {}), Balance(by_tenant=True)) == [(B, "shard-1")]
    assert moved(shards({A: 100, B: 50}, {}), Balance(by_tenant=True)) == []
