"""A system on three nodes: a node joins, is emptied, and is killed, while it is written and searched."""

import threading
import time
from collections.abc import Iterator

import pytest

from cluster.testing import ClusterSystem, node_of
from memcube.catalog import Catalog
from memcube.client import MemCubeClient
from memcube.errors import MemCubeError
from memcube.ids import TenantId
from memcube.testing.waiting import until

pytestmark = pytest.mark.long

TENANT = TenantId("default")
WITHIN_S = 180.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterSystem]:
    overrides = ["scheduler.interval_s=0.3", "scheduler.pending_grace_s=1"]
    with ClusterSystem(tmp_path_factory.mktemp("cluster"), overrides) as running:
        yield running


@pytest.fixture(scope="module")
def catalog(cluster: ClusterSystem) -> Iterator[Catalog]:
    found = Catalog.open(f"sqlite:///{cluster.system.data_dir / 'catalog.db'}")
    yield found
    found.close()


@pytest.fixture
def client(cluster: ClusterSystem) -> Iterator[MemCubeClient]:
    with cluster.client() as client:
        yield client


class Traffic:
    """Adds memories and searches for what was acknowledged, until it is stopped."""

    def __init__(self, client: MemCubeClient) -> None:
        self._client = client
        self._stop = threading.Event()
        self.known: dict[str, str] = {}
        self.wrong: list[str] = []
        self.failed: list[str] = []
        self.longest_s = 0.0
        self.num_searches = 0
        self._threads = [threading.Thread(target=work) for work in (self._add, self._search)]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=60)

    def _add(self) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            text = f"remark {time.monotonic_ns()} about kumquat tea"
            try:
                added = self._client.add(text)
            except MemCubeError as failed:
                self.failed.append(repr(failed))
            else:
                self.known[added.results[0].id] = text
            self._stop.wait(0.1)

    def _search(self) -> None:
        while not self._stop.is_set():
            wanted = list(self.known.items())[-5:]
            started = time.monotonic()
            for id, text in wanted:
                try:
                    found = self._client.search(text, top_k=3)
                except MemCubeError as failed:
                    self.failed.append(repr(failed))
                    continue
                if id not in {hit.id for hit in found.results}:
                    self.wrong.append(text)
                self.num_searches += 1
            self.longest_s = max(self.longest_s, time.monotonic() - started)
            self._stop.wait(0.05)


def test_each_node_gets_a_shard(cluster: ClusterSystem, catalog: Catalog):
    def settled() -> bool:
        shards = catalog.shards.shards()
        return all(s.epoch for s in shards) and {s.home for s in shards} == {"a", "b", "c"}

    until(settled, within_s=WITHIN_S, what="a shard on each node")
    assert [one.is_away for one in catalog.shards.shards()] == [False] * 3


def test_a_tenant_goes_to_the_node_that_it_is_sent_to_while_it_is_used(
    cluster: ClusterSystem, catalog: Catalog, client: MemCubeClient
):
    old = node_of(catalog, TENANT)
    target = next(name for name in ("b", "c") if name != old)
    with Traffic(client) as traffic:
        until(lambda: len(traffic.known) > 5, within_s=WITHIN_S)
        client.nodes.move_tenant(TENANT, to=target)
        until(lambda: node_of(catalog, TENANT) == target, within_s=WITHIN_S, what="the move")
        before = len(traffic.known)
        until(lambda: len(traffic.known) > before + 5, within_s=WITHIN_S)
    assert (traffic.wrong, traffic.failed) == ([], [])
    journal = client.scheduler.journal(limit=50).events
    assert any((one.kind, one.state, one.cube) == ("copy", "done", None) for one in journal)


def test_what_it_left_behind_is_removed_by_an_action_of_its_own(
    catalog: Catalog, client: MemCubeClient
):
    def dropped() -> bool:
        journal = client.scheduler.journal(limit=50).events
        return any((one.kind, one.state) == ("drop", "done") for one in journal)

    until(dropped, within_s=WITHIN_S, what="the drop of what was left behind")


def test_a_drained_node_is_emptied_and_may_be_used_again(
    cluster: ClusterSystem, catalog: Catalog, client: MemCubeClient
):
    node = node_of(catalog, TENANT)
    with Traffic(client) as traffic:
        client.nodes.drain(node)
        until(lambda: node_of(catalog, TENANT) != node, within_s=WITHIN_S, what="the draining")
        until(
            lambda: client.nodes.get(node)["state"] == "drained",
            within_s=WITHIN_S,
            what="the word that it is empty",
        )
    assert (traffic.wrong, traffic.failed) == ([], [])
    client.nodes.undrain(node)
    assert client.nodes.get(node)["state"] == "up"


def test_a_killed_node_is_healed_and_what_was_acknowledged_is_found(
    cluster: ClusterSystem, catalog: Catalog, client: MemCubeClient
):
    if node_of(catalog, TENANT) == "a":
        client.nodes.move_tenant(TENANT, to="b")
        until(lambda: node_of(catalog, TENANT) == "b", within_s=WITHIN_S)
    node = node_of(catalog, TENANT)
    with Traffic(client) as traffic:
        until(lambda: len(traffic.known) > 10, within_s=WITHIN_S)
        cluster.kill(node)
        killed = time.monotonic()
        until(lambda: node_of(catalog, TENANT) != node, within_s=WITHIN_S, what="a new place")
        before = len(traffic.known)
        until(lambda: len(traffic.known) > before + 5, within_s=WITHIN_S)
        print(f"healed in {time.monotonic() - killed:.1f} s")
    assert traffic.wrong == []
    for id, text in traffic.known.items():
        assert id in {hit.id for hit in client.search(text, top_k=3).results}
    until(lambda: client.nodes.get(node)["state"] == "down", within_s=WITHIN_S)


def test_a_node_that_comes_back_gets_its_shard_again(
    cluster: ClusterSystem, catalog: Catalog, client: MemCubeClient
):
    (lost,) = [node.name for node in catalog.shards.nodes() if not node.alive]
    cluster.join(lost)
    until(lambda: client.nodes.get(lost)["state"] == "up", within_s=WITHIN_S)

    def at_home() -> bool:
        return not any(shard.is_away for shard in catalog.shards.shards())

    with Traffic(client) as traffic:
        until(at_home, within_s=WITHIN_S, what="shards at home")
    assert traffic.wrong == []
    assert len(catalog.shards.shards()) == 3
