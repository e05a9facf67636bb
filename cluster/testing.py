"""A Ray cluster of several nodes on this machine, with a system on it, for tests and benchmarks.

The nodes are those of ``ray.cluster_utils.Cluster``, in a process of their own (``python -m cluster.testing FOLDER``)
that is told by lines what to do: Ray reads its environment once in a process.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import environment
from memcube.catalog import Catalog
from memcube.client import MemCubeClient
from memcube.ids import TenantId
from memcube.testing.process import SystemProcess, processes_below

HEAD = "a"


class ClusterSystem:
    """A head (``a``) and other nodes, and ``cluster.up`` on them.

    All share a data folder, as one machine does. A node that is killed takes its actors along.
    """

    def __init__(
        self,
        folder: Path,
        overrides: Sequence[str] = (),
        *,
        nodes: Sequence[str] = ("b", "c"),
        chat: bool = False,
    ) -> None:
        self._data = folder / "data"
        self._overrides = list(overrides)
        self._names = list(nodes)
        self._chat = chat

    def __enter__(self) -> "ClusterSystem":
        self._data.mkdir(parents=True, mode=0o700)
        with open(self._data / "nodes.log", "ab") as log:
            self._nodes = subprocess.Popen(
                [sys.executable, "-m", "cluster.testing", str(self._data)],
                cwd=environment.ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        try:
            told = self._answer()
            for name in self._names:
                self.join(name)
            self.system = SystemProcess(
                self._data,
                [f"ray.address={told['address']}", "ray.ship_code=false", *self._overrides],
                chat=self._chat,
                environ=told["environ"],
            )
            self.system.start()
        except BaseException:
            self._stop_nodes()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.system.stop()
        finally:
            self._stop_nodes()

    def _stop_nodes(self) -> None:
        if self._nodes.stdin is not None:
            self._nodes.stdin.close()
        self._nodes.wait(timeout=60)
        shutil.rmtree(environment.temp_dir(self._data), ignore_errors=True)

    def _answer(self) -> Any:
        assert self._nodes.stdout is not None
        line = self._nodes.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the nodes ended:\n{(self._data / 'nodes.log').read_text()[-4000:]}"
            )
        return json.loads(line)

    def _tell(self, *words: str) -> None:
        assert self._nodes.stdin is not None
        print(*words, file=self._nodes.stdin, flush=True)
        self._answer()

    def join(self, name: str) -> None:
        """Let a node join; returns when it has."""
        self._tell("join", name)

    def kill(self, name: str) -> None:
        """``kill -9`` a node's Ray, and with it all that runs there."""
        self._tell("kill", name)

    def kill_actors(self, title: str) -> int:
        """``kill -9`` the processes of a title on all nodes; how many there were."""
        found = processes_below(self._nodes.pid, title)
        for process in found:
            process.kill()
        return len(found)

    def client(self, key: str | None = None, **how: Any) -> MemCubeClient:
        return MemCubeClient(self.system.url, key or self.system.key, **how)


@contextmanager
def joining(system: SystemProcess, *options: str) -> Iterator[subprocess.Popen[str]]:
    """``python -m cluster.join`` on a system's data folder, and ``kill -9`` of what is left of it at the end."""
    command = [sys.executable, "-m", "cluster.join", "--data", str(system.data_dir), "--cpus", "1"]
    process = subprocess.Popen(
        [*command, "--object-store-mb", "80", *options],
        cwd=environment.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_joined(process)


def kill_joined(process: subprocess.Popen[str]) -> None:
    """``kill -9`` a node that joined, and all that runs there, if it is there still."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)


def node_of(catalog: Catalog, tenant: TenantId) -> str:
    """The node that a tenant's shard runs on."""
    shard = catalog.shards.shard_of(tenant)
    return next(one.node for one in catalog.shards.shards() if one.shard == shard)


def _run_nodes(data: Path) -> None:
    """Run a cluster until standard input ends."""
    before = dict(os.environ)
    temporary = environment.prepare(data)
    (temporary / "ray").mkdir(exist_ok=True)
    # Without it the cluster would be every ray.init()'s of this machine.
    os.environ["RAY_TMPDIR"] = str(temporary)
    from ray.cluster_utils import Cluster

    from actors.nodes import NODE_LABEL

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    def node(name: str) -> dict[str, Any]:
        return {
            "num_cpus": 2,
            "object_store_memory": 100 << 20,
            "labels": {NODE_LABEL: name},
            "include_dashboard": False,
        }

    cluster = Cluster(initialize_head=True, head_node_args=node(HEAD))
    fresh = {name: value for name, value in os.environ.items() if before.get(name) != value}
    answer({"address": cluster.address, "environ": fresh})
    nodes: dict[str, Any] = {}
    for line in sys.stdin:
        command, name = line.split()
        if command == "join":
            nodes[name] = cluster.add_node(**node(name))
        else:
            cluster.remove_node(nodes.pop(name), allow_graceful=False)
        answer(name)
    cluster.shutdown()


if __name__ == "__main__":
    _run_nodes(Path(sys.argv[1]))
