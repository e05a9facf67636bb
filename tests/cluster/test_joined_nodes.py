"""A second process on this machine joins a running system as a node, and leaves it."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.testing import joining
from memcube.client import MemCubeClient
from memcube.errors import NotFound
from memcube.testing.process import SystemProcess
from memcube.testing.waiting import until

pytestmark = pytest.mark.long
WITHIN_S = 180.0


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemProcess]:
    folder = tmp_path_factory.mktemp("join") / "data"
    overrides = ["scheduler.interval_s=0.3", "scheduler.pending_grace_s=1"]
    with SystemProcess(folder, overrides) as running:
        yield running


@pytest.fixture
def client(system: SystemProcess) -> Iterator[MemCubeClient]:
    with MemCubeClient(system.url, system.key) as client:
        yield client


def state_of(client: MemCubeClient, name: str) -> str | None:
    try:
        return client.nodes.get(name)["state"]
    except NotFound:
        return None


def test_a_node_joins_gets_a_shard_and_a_tenant_and_leaves(
    system: SystemProcess, client: MemCubeClient
):
    client.add("Ann likes kumquat tea", user_id="ann")
    with joining(system, "--name", "b", "--label", "zone=west") as process:
        until(lambda: state_of(client, "b") == "up", within_s=WITHIN_S, what="the node")
        until(lambda: client.nodes.get("b")["shards"], within_s=WITHIN_S, what="its shard")
        assert client.nodes.get("b")["labels"]["zone"] == "west"
        event = client.nodes.move_tenant("default", to="zone=west")
        until(lambda: client.scheduler.wait(event.id).ended, within_s=WITHIN_S, what="the move")
        assert client.nodes.get("b")["num_tenants"] == 1
        assert client.search("kumquat", user_id="ann").results

        with joining(system, "--name", "b") as second:
            told, _ = second.communicate(timeout=WITHIN_S)
            assert (second.returncode, "is up already" in told) == (1, True)

        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=WITHIN_S)
        assert (process.returncode, told.splitlines()[-1]) == (0, "left"), told
    until(lambda: state_of(client, "b") == "down", within_s=WITHIN_S, what="the word that it left")

    def served() -> bool:
        return all(shard["error"] is None for shard in client.status()["shards"])

    until(served, within_s=WITHIN_S, what="its shard elsewhere")
    assert client.ready()
    assert client.search("kumquat", user_id="ann").results


def test_two_nodes_may_join_at_once(system: SystemProcess, client: MemCubeClient):
    with joining(system, "--name", "d"), joining(system, "--name", "e"):
        for name in ("d", "e"):
            until(lambda n=name: state_of(client, n) == "up", within_s=WITHIN_S, what=name)


def test_what_can_not_be_joined_is_said_so(system: SystemProcess, tmp_path: Path):
    with joining(system, "127.0.0.1:1", "--name", "c") as process:
        told, _ = process.communicate(timeout=WITHIN_S)
        assert (process.returncode, "no system is reached at 127.0.0.1:1" in told) == (1, True)
