"""The HTTP application over a system in this process: no Ray, no socket, a manual clock."""

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from fastapi import FastAPI

from memcube.activation.contract import Mode
from memcube.catalog import (
    JobKind,
    JobState,
    NewJob,
    NewProposal,
    NewTask,
    NodeSeen,
    ProposalKind,
    Role,
)
from memcube.chat.migration import ActivationTier
from memcube.chat.router import Router
from memcube.chat.service import ChatService
from memcube.config import Limits
from memcube.cube import Scope
from memcube.ids import CubeId, digest
from memcube.lifecycle_parts import lifecycle_parts
from memcube.objects.folder import FolderStore
from memcube.parametric.registry import AdapterFiles, AdapterRegistry, Provenance
from memcube.parametric.weights import AdapterWeights, LoraPair
from memcube.testing.local import LocalSystem
from serve.app import create_app
from serve.backend import Backend, moments_of
from serve.problems import MEDIA_TYPE

_UNSET: Any = object()


class Prepared(NamedTuple):
    """A catalog with the tenant ``acme``, a key of each role of it, and ``other``, a writer's key of
    another tenant: made once, since every commit waits for the disk."""

    file: Path
    keys: dict[str, str]


class Api:
    """One application; ``key`` is a writer's of the tenant ``acme``."""

    def __init__(self, system: LocalSystem, key: str, *, app: FastAPI | None = None) -> None:
        self.system = system
        self.app = app or _app_of(system.config.limits)
        self.app.state.backend = _backend_of(system)
        self.key = key
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=False),
            base_url="http://memcube",
        )

    async def call(
        self,
        method: str,
        path: str,
        body: Any = _UNSET,
        *,
        key: str | None = "",
        headers: dict[str, str] | None = None,
        **rest: Any,
    ) -> httpx.Response:
        """The response. ``key``: the writer's by default, None for none. A body that is no ``bytes``
        goes as JSON, also where the standard has no word for it (NaN, half a surrogate pair)."""
        sent = dict(headers or {})
        if key is not None:
            sent.setdefault("authorization", f"Bearer {key or self.key}")
        if body is not _UNSET:
            sent.setdefault("content-type", "application/json")
            rest["content"] = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.client.request(method, path, headers=sent, **rest)

    async def ok(self, method: str, path: str, body: Any = _UNSET, **rest: Any) -> Any:
        """The JSON of a response of success."""
        response = await self.call(method, path, body, **rest)
        assert response.is_success, response.text
        return response.json()

    async def problem(
        self, status: int, code: str, method: str, path: str, body: Any = _UNSET, **rest: Any
    ) -> dict[str, Any]:
        """The problem of a refused request, with what every problem must have checked."""
        response = await self.call(method, path, body, **rest)
        told = self.check(response)
        assert (told["status"], told["code"]) == (status, code), told
        return told

    @staticmethod
    def check(response: httpx.Response) -> dict[str, Any]:
        """A refusal's body, which must be a whole problem of bounded size."""
        assert 400 <= response.status_code < 500 or response.status_code == 503, response.text
        assert response.headers["content-type"] == MEDIA_TYPE
        assert len(response.content) < 2_000
        told = response.json()
        assert told["status"] == response.status_code
        assert told["type"] == f"urn:memcube:{told['code']}"
        assert told["title"]
        assert told["detail"]
        assert told["request_id"] == response.headers["x-request-id"]
        return told

    async def add(self, text: str, **more: Any) -> str:
        """The id of a new memory."""
        rest = {"key": more.pop("key")} if "key" in more else {}
        body = {"text": text, "user_id": "ann", **more}
        return (await self.ok("POST", "/v1/memories", body, **rest))["results"][0]["id"]

    async def adapter(self, *, key: str = "") -> str:
        """The id of a new adapter that holds a new memory, with two versions, the second serving."""
        now, catalog = self.system.clock(), self.system.catalog
        who = catalog.access.authenticate(key or self.key, now=now)
        name = digest("adapter", *[v.sha256 for v in catalog.adapters.versions(who.tenant)])[:32]
        cube = await self.add(f"held by {name}", user_id="ann", key=key or self.key)
        registry = AdapterRegistry(AdapterFiles(_objects_of(self.system)), catalog.adapters)
        record = None
        for value in (1.0, 2.0):
            pair = LoraPair(torch.full((2, 3), value), torch.zeros(3, 2))
            record = await registry.publish(
                Scope(tenant=who.tenant, user_id="ann"),
                name,
                AdapterWeights(base="f" * 64, rank=2, alpha=2.0, pairs={"q_proj": pair}),
                cubes={CubeId(cube): 1},
                provenance=Provenance(recipe={}, seed=0, data_sha256="0" * 64),
                now=now,
            )
            await registry.activate(who.tenant, record.line.id, record.version, now=now)
        assert record is not None
        return record.line.id

    def job(self, *, key: str = "", **result: Any) -> str:
        """The id of a job that failed after its gate had judged."""
        now, catalog = self.system.clock(), self.system.catalog
        who = catalog.access.authenticate(key or self.key, now=now)
        new = NewJob(kind=JobKind.CONSOLIDATE, spec={"name": "ann"}, author=who.key_id)
        made = catalog.jobs.add(who.tenant, new, now=now)
        # Others may be queued: the one that was made now is claimed last.
        while (job := catalog.jobs.claim("test", now=now, ttl_s=1e6)) and job.id != made.id:
            catalog.jobs.finish(job, JobState.CANCELLED, now=now)
        assert job is not None
        report = {
            "adapter": "ann",
            "figures": {"recall": 0.5, "leak": None},
            "limits": {"recall": 0.93, "leak": 0.08},
            "short": ["recall 50.0% (at least 93%)"],
            "history": [[2.0, 1.5, 0.1], [1.0, 0.5, 0.2]],
        }
        catalog.jobs.log(job.id, "begun", now=now)
        catalog.jobs.finish(job, JobState.FAILED, now=now, result=report | result, error="no room")
        return job.id

    @property
    def objects(self) -> FolderStore:
        return _objects_of(self.system)

    async def snapshot(self, *, key: str = "") -> str:
        """The id of a new snapshot."""
        known = await self.ok("GET", "/v1/snapshots", key=key)
        body = {"name": f"number {len(known['snapshots'])}", "user_id": "ann"}
        return (await self.ok("POST", "/v1/snapshots", body, key=key))["id"]

    async def proposal(self, *, key: str = "") -> str:
        """The id of a new proposal, to merge two new memories."""
        now, catalog = self.system.clock(), self.system.catalog
        who = catalog.access.authenticate(key or self.key, now=now)
        number = len(catalog.proposals.find(who.tenant, limit=10_000, now=now))
        ids = [await self.add(f"part {n} of {number}", key=key or self.key) for n in (1, 2)]
        new = NewProposal(
            kind=ProposalKind.DUPLICATE,
            cubes={CubeId(id): 1 for id in ids},
            text=f"both of {number}",
            why={"turns": False},
        )
        return catalog.proposals.note(who.tenant, [new], now=now)[0].id

    async def task(self, *, key: str = "", kind: str = "consolidate") -> str:
        """The id of a new task that is done: it proposes to train a new memory."""
        now, catalog = self.system.clock(), self.system.catalog
        who = catalog.access.authenticate(key or self.key, now=now)
        number = len(catalog.tasks.page(limit=10_000))
        cube = await self.add(f"of task {number}", key=key or self.key)
        payload = {"scope": "s", "cubes": [cube], "reason": "it lasts"}
        new = NewTask(kind=kind, key=str(number), payload=payload)
        made = catalog.tasks.put(who.tenant, new, now=now)
        self.system.scheduler.keeper.step()
        leader = self.system.scheduler.keeper.epoch or 0
        for task in catalog.tasks.claim(leader=leader, now=now, limit=10_000, kinds=[kind]):
            catalog.tasks.done(task, leader=leader, now=now, result={"outcome": "proposed"})
        return made.id

    async def dead_task(self, *, key: str = "") -> str:
        """The id of a new task that has had its attempts."""
        now, catalog = self.system.clock(), self.system.catalog
        who = catalog.access.authenticate(key or self.key, now=now)
        number = len(catalog.tasks.page(limit=10_000))
        new = NewTask(kind="test", key=str(number), payload={}, max_attempts=1)
        made = catalog.tasks.put(who.tenant, new, now=now)
        self.system.scheduler.keeper.step()
        leader = self.system.scheduler.keeper.epoch or 0
        for task in catalog.tasks.claim(leader=leader, now=now, limit=10_000, kinds=["test"]):
            catalog.tasks.failed(task, "it can't be", leader=leader, now=now)
        return made.id

    def nodes(self, *names: str, alive: bool = True, **labels: str) -> tuple[str, ...]:
        """Nodes that the cluster has now, or has lost, beside those that it had."""
        now, book = self.system.clock(), self.system.catalog.shards
        known = {
            node.name: NodeSeen(name=node.name, labels=node.labels, alive=node.alive)
            for node in book.nodes()
        }
        known["spare"] = NodeSeen(name="spare", labels={}, alive=True)
        known |= {name: NodeSeen(name=name, labels=labels, alive=alive) for name in names}
        self.system.scheduler.keeper.step()
        leader = self.system.scheduler.keeper.epoch or 0
        book.note_nodes(list(known.values()), leader=leader, now=now)
        return names

    async def texts(self, query: str, *, key: str = "", **body: Any) -> list[str]:
        """Texts of a sparse search's hits, best first."""
        asked = {"query": query, "mode": "sparse", **body}
        found = await self.ok("POST", "/v1/memories/search", asked, key=key)
        return [hit["text"] for hit in found["results"]]

    async def everything(self, *, key: str = "") -> list[dict[str, Any]]:
        """The tenant's memories, as the longest page shows them."""
        limit = self.system.config.limits.page
        return (await self.ok("GET", f"/v1/memories?limit={limit}", key=key))["results"]


def _objects_of(system: LocalSystem) -> FolderStore:
    return FolderStore.open(Path(system.catalog._database.url.database or "").parent / "objects")


async def _nothing() -> None:
    return None


def _backend_of(system: LocalSystem) -> Backend:
    async def open_objects() -> FolderStore:
        return _objects_of(system)

    router = Router(len(system.engines))
    return Backend(
        service=system.service,
        catalog=system.catalog,
        config=system.config,
        clock=system.clock,
        status=system.status,
        close=_nothing,
        embedder=system.embedder,
        chat=ChatService(system.service, system.engines, system.config.chat, router),
        kv_stats=moments_of(system.engines),
        tier=ActivationTier(system.service, system.engines, router, mode=Mode.EXACT),
        forgetting=system.forgetting,
        open_objects=open_objects,
        lifecycle=lifecycle_parts(
            system.catalog,
            system.indexer,
            system.shards.__getitem__,
            system.config,
            clock=system.clock,
            open_objects=open_objects,
        ),
        scheduler=system.scheduler,
        chat_model=system.config.model.name,
    )


async def _opened_by_api() -> Backend:
    raise AssertionError("the test gives the backend")


_apps: dict[str, FastAPI] = {}


def _app_of(limits: Limits) -> FastAPI:
    """One application for many tests: the first request to one costs a tenth of a second."""
    name = limits.model_dump_json()
    if name not in _apps:
        _apps[name] = create_app(_opened_by_api, limits)
    return _apps[name]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared")
    system = LocalSystem.open(folder)
    keys = {str(role): system.key("acme", role) for role in Role}
    keys["other"] = system.key("other")
    system.catalog.close()
    return Prepared(folder / "catalog.db", keys)


@pytest.fixture
def system(tmp_path: Path, prepared: Prepared) -> Iterator[LocalSystem]:
    opened = LocalSystem.open(tmp_path, template=prepared.file)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def open_api() -> type[Api]:
    """For tests that need a system of their own."""
    return Api


@pytest.fixture
async def api(system: LocalSystem, prepared: Prepared) -> AsyncIterator[Api]:
    opened = Api(system, prepared.keys["writer"])
    async with opened.client:
        yield opened


@pytest.fixture
async def counted(system: LocalSystem, prepared: Prepared) -> AsyncIterator[Api]:
    """With an application of its own, whose metrics begin at 0, and which opens its backend."""

    async def open_here() -> Backend:
        return _backend_of(system)

    app = create_app(open_here, system.config.limits)
    opened = Api(system, prepared.keys["writer"], app=app)
    async with opened.client:
        yield opened


@pytest.fixture
def reader(prepared: Prepared) -> str:
    return prepared.keys["reader"]


@pytest.fixture
def admin(prepared: Prepared) -> str:
    return prepared.keys["admin"]


@pytest.fixture
def operator(prepared: Prepared) -> str:
    return prepared.keys["operator"]


@pytest.fixture
def other(prepared: Prepared) -> str:
    """A writer's key of another tenant."""
    return prepared.keys["other"]
