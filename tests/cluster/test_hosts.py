"""Two machines with nothing in common but the network, PostgreSQL and an S3 server: a tenant is served by a node
whose cable is then taken out."""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster import environment
from memcube.client import MemCubeClient
from memcube.errors import MemCubeError
from memcube.ids import TenantId
from memcube.objects.s3 import S3Settings, S3Store
from memcube.ports import free_ports
from memcube.testing.hosts import GATE, Host, NoHosts, hosts
from memcube.testing.postgres import NoPostgres, postgres_schema, postgres_server
from memcube.testing.s3 import NoS3, s3_server
from memcube.testing.waiting import until

pytestmark = pytest.mark.slow
WITHIN_S = 240.0
TENANT = TenantId("default")


@dataclass
class Site:
    """Two hosts, what they reach besides each other, and where what they print goes."""

    data: Path
    hosts: dict[str, Host]
    environ: dict[str, str]
    s3: str
    logs: Path

    def run(self, host: str, *command: str) -> subprocess.Popen[Any]:
        """A program of this checkout on a host, with its output in a file."""
        with open(self.logs / f"{host}.log", "ab") as log:
            return self.hosts[host].start(
                [sys.executable, "-m", *command],
                env=self.environ,
                cwd=environment.ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


async def made_bucket(settings: S3Settings) -> None:
    await (await S3Store.open(settings, create_bucket=True)).close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    data = Path(tempfile.mkdtemp(prefix="memcube-hosts-"))
    names = [f"mc{secrets.token_hex(2)}{letter}" for letter in "ab"]
    try:
        with contextlib.ExitStack() as stack:
            made = stack.enter_context(
                hosts(names, private=[data, environment.temp_dir(data)], folder=tmp_path / "hosts")
            )
            url = stack.enter_context(postgres_schema(stack.enter_context(postgres_server(GATE))))
            settings = stack.enter_context(s3_server(GATE)).settings()
            asyncio.run(made_bucket(settings))
            environ = os.environ | {
                "DATABASE_URL": url,
                "MEMCUBE_S3_ACCESS_KEY": settings.access_key,
                "MEMCUBE_S3_SECRET_KEY": settings.secret_key,
            }
            a, b = made.values()
            yield Site(data, {"a": a, "b": b}, environ, settings.endpoint, tmp_path)
    except (NoHosts, NoPostgres, NoS3) as missing:
        pytest.skip(str(missing))
    finally:
        for path in (data, environment.temp_dir(data)):
            shutil.rmtree(path, ignore_errors=True)


def test_a_tenant_outlives_the_machine_that_served_it(site: Site):
    a, b = site.hosts["a"], site.hosts["b"]
    port, ray_port = free_ports(2)
    site.run(
        "a",
        "cluster.up",
        *("--data", str(site.data), "--port", str(port)),
        *("http.host=0.0.0.0", f"ray.node_ip={a.address}", f"ray.port={ray_port}"),
        *(f"objects.s3_endpoint={site.s3}", "objects.s3_secure=false"),
        *("activation.actors=0", "scheduler.interval_s=0.3", "scheduler.pending_grace_s=1"),
    )
    state = a.own[site.data] / "serve.json"
    until(state.exists, within_s=WITHIN_S, what="the head")
    token = site.logs / "ray.token"
    shutil.copy(a.own[site.data] / "ray.token", token)
    key = json.loads(state.read_text())["api_key"]
    site.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    site.run("b", "cluster.join", f"{a.address}:{ray_port}", "--name", "b", "--cpus", "1")

    with MemCubeClient(f"http://{a.address}:{port}", key) as client:
        for number in range(50):
            client.add(f"remark {number} about kumquat tea", user_id="ann")
        until(
            lambda: any(one["name"] == "b" and one["shards"] for one in client.nodes.list()),
            within_s=WITHIN_S,
            what="a shard on b",
        )
        event = client.nodes.move_tenant(TENANT, to="b")
        until(lambda: client.scheduler.wait(event.id).ended, within_s=WITHIN_S, what="the move")
        assert client.nodes.get("b")["num_tenants"] == 1
        assert client.search("remark 7", user_id="ann", top_k=3).results
        assert any(b.own[site.data].rglob("*"))

        b.cut()
        until(
            lambda: client.nodes.get("b")["state"] == "down",
            within_s=WITHIN_S,
            passing=(MemCubeError,),
            what="the word that b is gone",
        )

        def all_found() -> bool:
            found = client.search("kumquat tea", user_id="ann", top_k=50).results
            return len({one.id for one in found}) == 50

        until(all_found, within_s=WITHIN_S, passing=(MemCubeError,), what="all that was added")
        b.mend()
        client.add("said after it all", user_id="ann")
        assert client.search("said after it all", user_id="ann").results
