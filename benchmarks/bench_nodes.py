"""A system on three nodes of one machine: a tenant moves while it is used, and nodes and actors are killed.

    python -m benchmarks.bench_nodes move [--cubes 20200] [--rate 20]
    python -m benchmarks.bench_nodes kills [--kills 30] [--seed 1] [--no-chat]

``move``: searches come at a steady rate, each for the one word that one memory alone has; it is wrong where that
memory is not among the hits. Adds go on beside them. A pause is the time from the moment that a request was due to
its answer.

``kills``: two tenants on two nodes are written, searched and asked. In turn a node is killed (and joins again),
or the scheduler, a shard, the embedder, the gateway or an engine, by ``kill -9``. Each memory that was acknowledged
must be found at the end, and no search may ever show another text under its id. A request is repeated
once, after a second; what fails then is counted, by whether it is the tenant's whose node was killed.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.results import Figure, show, write_results
from cluster.testing import ClusterSystem, node_of
from memcube.catalog import Catalog
from memcube.catalog.fence import LEASE
from memcube.ids import TenantId

BATCH = 200
DEFAULT = TenantId("default")
ADDS_PER_S = 2.0
SETTLE_S = 180.0
CALM_S, CALM_FOR_S, CALM_WITHIN_S = 0.25, 40.0, 400.0
"""So quick shall searches be for so long before a move is measured. Within it a shard that lacks a graph begins one."""
AFTER_S = 60.0
"""So long it is searched after the move, while the target builds its graph."""
RETRY_S = 1.0
OVERRIDES = ("scheduler.interval_s=0.5", "scheduler.pending_grace_s=1")
ACTORS = {
    "scheduler": "ray::SchedulerActor",
    "shard": "ray::QdrantActor",
    "embedder": "ray::EmbedderActor",
    "gateway": "ray::ServeReplica:memcube:gateway",
}
ENGINE = {"engine": "ray::KVCacheActor"}
THINGS = ("kumquat tea", "the old ferry", "a blue bicycle", "the night train", "her violin lesson")


def word(number: int) -> str:
    """A word that one memory alone has."""
    return f"zq{number:06d}x"


def text_of(number: int) -> str:
    return f"Remark {word(number)} is about {THINGS[number % len(THINGS)]} and what came of it."


@dataclass
class Api:
    """One tenant's side of the API."""

    http: httpx.AsyncClient
    url: str
    key: str

    async def send(self, method: str, path: str, **given: Any) -> Any:
        response = await self.http.request(
            method, self.url + path, headers={"X-API-Key": self.key}, **given
        )
        response.raise_for_status()
        return response.json()

    async def add(self, *numbers: int) -> list[str]:
        items = [{"text": text_of(number)} for number in numbers]
        answer = await self.send("POST", "/v1/memories/batch", json={"items": items})
        return [item["results"][0]["id"] for item in answer["results"]]

    async def search(self, number: int) -> list[tuple[str, str]]:
        body = {"query": f"what is {word(number)} about", "top_k": 5}
        answer = await self.send("POST", "/v1/memories/search", json=body)
        return [(hit["id"], hit["text"]) for hit in answer["results"]]

    async def chat(self, number: int) -> str:
        body = {
            "model": "SmolLM2-135M-Instruct",
            "messages": [{"role": "user", "content": f"What is {word(number)} about?"}],
            "max_tokens": 4,
        }
        answer = await self.send("POST", "/v1/chat/completions", json=body)
        return answer["choices"][0]["message"]["content"]


@dataclass
class Ledger:
    """What was acknowledged and what was seen."""

    ids: dict[int, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    num: Counter[str] = field(default_factory=Counter)
    missing: int = 0
    """Searches that did not show what was acknowledged: not indexed yet, or not any more."""
    good_at: float = 0.0
    """When a search was last answered."""


async def until(
    holds: Callable[[], Awaitable[bool]], what: str, within_s: float = SETTLE_S
) -> None:
    deadline = time.monotonic() + within_s
    while not await holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not hold within {within_s:g} s")
        await asyncio.sleep(0.1)


async def settled(catalog: Catalog, names: tuple[str, ...]) -> None:
    """Wait until each node has its shard."""

    async def at_home() -> bool:
        shards = await asyncio.to_thread(catalog.shards.shards)
        alive = {n.name for n in await asyncio.to_thread(catalog.shards.nodes) if n.alive}
        homes = {shard.home for shard in shards}
        return set(names) <= homes & alive and all(s.epoch and not s.is_away for s in shards)

    await until(at_home, "a shard on each node")


async def bring(operator: Api, catalog: Catalog, tenant: str, node: str) -> float:
    """Move a tenant; how long it took, in seconds."""
    started = time.monotonic()
    await operator.send("POST", f"/v1/tenants/{tenant}/move", json={"to": node})

    async def there() -> bool:
        return await asyncio.to_thread(node_of, catalog, TenantId(tenant)) == node

    await until(there, f"{tenant} on node {node}")
    return time.monotonic() - started


# -- a move ----------------------------------------------------------------------------------------


async def move(cluster: ClusterSystem, num_cubes: int, rate: float) -> list[Figure]:
    catalog = Catalog.open(f"sqlite:///{cluster.system.data_dir / 'catalog.db'}")
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(timeout=60, limits=limits) as http:
        api = Api(http, cluster.system.url, cluster.system.key)
        await settled(catalog, ("a", "b", "c"))
        old = await asyncio.to_thread(node_of, catalog, DEFAULT)
        if old == "a":
            await bring(api, catalog, "default", "b")
        ledger, started = Ledger(), time.monotonic()
        for first in range(0, num_cubes, BATCH):
            numbers = list(range(first, min(first + BATCH, num_cubes)))
            for number, id in zip(numbers, await api.add(*numbers), strict=True):
                ledger.ids[number] = id
            if first % 2_000 == 0:
                print(
                    f"{first + len(numbers):,} added, {time.monotonic() - started:.0f} s",
                    flush=True,
                )
        await _calm(api, ledger)
        before = await _searched(api, ledger, rate, for_s=10.0)
        here = await asyncio.to_thread(node_of, catalog, DEFAULT)
        stop = asyncio.Event()
        searching = asyncio.create_task(_searched(api, ledger, rate, stop=stop))
        adding = asyncio.create_task(_adding(api, ledger, stop))
        await asyncio.sleep(2.0)
        took_s = await bring(api, catalog, "default", "c" if here == "b" else "b")
        await asyncio.sleep(3.0)
        stop.set()
        during = await searching
        adds = await adding
        after = await _searched(api, ledger, rate, for_s=AFTER_S)
        missing = 0
        for number in random.Random(0).sample(sorted(ledger.ids), 500):
            hits = await api.search(number)
            missing += ledger.ids[number] not in {id for id, _ in hits}
    catalog.close()
    return [
        Figure(name="cubes", value=len(ledger.ids), unit=""),
        Figure(name="searches during", value=len(during), unit=f"at {rate:g}/s"),
        Figure(name="wrong or missing", value=len(ledger.wrong) + missing, unit="", goal="<= 0"),
        Figure(name="failed requests", value=sum(ledger.failed.values()), unit="", goal="<= 0"),
        Figure(name="longest pause of a search", value=max(during), unit="s", goal="<= 1.0"),
        Figure(name="longest add", value=max(adds), unit="s"),
        Figure(name="longest search in the minute after", value=max(after), unit="s"),
        Figure(name="search p50 before", value=statistics.median(before), unit="s"),
        Figure(name="search p50 during", value=statistics.median(during), unit="s"),
        Figure(name="longest search before", value=max(before), unit="s"),
        Figure(name="the move", value=took_s, unit="s"),
    ]


async def _calm(api: Api, ledger: Ledger) -> None:
    """Wait until searches are quick: what was added is loaded, and the graph built or in nobody's way."""
    ids = list(ledger.ids)
    calm_since = time.monotonic()

    async def is_calm() -> bool:
        nonlocal calm_since
        started = time.monotonic()
        await api.search(random.choice(ids))
        ended = time.monotonic()
        if ended - started >= CALM_S:
            calm_since = ended
        return ended - calm_since >= CALM_FOR_S

    await until(is_calm, "a calm machine", within_s=CALM_WITHIN_S)


async def _searched(
    api: Api,
    ledger: Ledger,
    rate: float,
    *,
    stop: asyncio.Event | None = None,
    for_s: float = 1e9,
) -> list[float]:
    """Search at a rate, whether answers come or not; how long each took from when it was due."""
    times: list[float] = []
    rng = random.Random(1)

    async def one(number: int, due: float) -> None:
        try:
            hits = await api.search(number)
        except httpx.HTTPError as failed:
            ledger.failed[repr(failed)] += 1
        else:
            if ledger.ids[number] not in {id for id, _ in hits}:
                ledger.wrong.append(word(number))
        times.append(time.monotonic() - due)

    tasks: set[asyncio.Task[None]] = set()
    due = began = time.monotonic()
    while (stop is None or not stop.is_set()) and due - began < for_s:
        task = asyncio.create_task(one(rng.choice(list(ledger.ids)), due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        due += 1 / rate
        await asyncio.sleep(max(due - time.monotonic(), 0))
    await asyncio.gather(*tasks)
    return times


async def _adding(api: Api, ledger: Ledger, stop: asyncio.Event) -> list[float]:
    times: list[float] = []
    number = max(ledger.ids) + 1
    while not stop.is_set():
        started = time.monotonic()
        (id,) = await api.add(number)
        ledger.ids[number] = id
        times.append(time.monotonic() - started)
        number += 1
        await asyncio.sleep(1 / ADDS_PER_S)
    return times


# -- kills -----------------------------------------------------------------------------------------


@dataclass
class Run:
    """Two tenants among kills. ``hit`` is the tenant whose node is down, or all where an actor is."""

    apis: dict[str, Api]
    ledgers: dict[str, Ledger]
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    hit: frozenset[str] = frozenset()

    async def tried(self, tenant: str, what: str, call: Callable[[], Awaitable[Any]]) -> Any:
        """A request and its one repetition."""
        ledger = self.ledgers[tenant]
        ledger.num[what] += 1
        hit = tenant in self.hit
        for attempt in range(2):
            try:
                return await call()
            except httpx.HTTPError as failed:
                hit = hit or tenant in self.hit
                if attempt:
                    ledger.failed[f"{what} of {'a hit' if hit else 'an unaffected'} tenant"] += 1
                    print(f"    {tenant}: {what} failed twice: {failed!r}"[:200], flush=True)
                else:
                    await asyncio.sleep(RETRY_S)
        return None

    async def add(self, tenant: str) -> None:
        api, ledger, number = self.apis[tenant], self.ledgers[tenant], 0
        while not self.stop.is_set():
            number += 1
            found = await self.tried(tenant, "add", lambda n=number: api.add(n))
            if found is not None:
                ledger.ids[number] = found[0]
            await asyncio.sleep(1 / ADDS_PER_S)

    async def search(self, tenant: str) -> None:
        api, ledger, rng = self.apis[tenant], self.ledgers[tenant], random.Random(tenant)
        while not self.stop.is_set():
            await asyncio.sleep(0.2)
            if not ledger.ids:
                continue
            number = rng.choice(list(ledger.ids))
            hits = await self.tried(tenant, "search", lambda n=number: api.search(n))
            if hits is not None:
                ledger.good_at = time.monotonic()
                self._check(tenant, number, hits)

    def _check(self, tenant: str, number: int, hits: list[tuple[str, str]]) -> None:
        ledger = self.ledgers[tenant]
        right = (ledger.ids[number], text_of(number))
        if any(id == right[0] and text != right[1] for id, text in hits):
            ledger.wrong.append(f"{right[0]}: {hits}")
        elif right not in hits:
            ledger.missing += 1

    async def chat(self, tenant: str) -> None:
        api, ledger = self.apis[tenant], self.ledgers[tenant]
        while not self.stop.is_set():
            if ledger.ids:
                await self.tried(tenant, "chat", lambda: api.chat(max(ledger.ids)))
            await asyncio.sleep(3.0)


async def kills(cluster: ClusterSystem, num_kills: int, seed: int, *, chats: bool) -> list[Figure]:
    catalog = Catalog.open(f"sqlite:///{cluster.system.data_dir / 'catalog.db'}")
    rng = random.Random(seed)
    async with httpx.AsyncClient(timeout=30) as http:
        operator = Api(http, cluster.system.url, cluster.system.key)
        homes = {"tenant-b": "b", "tenant-c": "c"}
        await settled(catalog, ("a", "b", "c"))
        apis = {}
        for tenant, node in homes.items():
            made = await operator.send(
                "POST", "/v1/keys", json={"name": "bench", "role": "writer", "tenant": tenant}
            )
            apis[tenant] = Api(http, operator.url, made["key"])
            await bring(operator, catalog, tenant, node)
        run = Run(apis, {tenant: Ledger() for tenant in homes})
        tasks = [
            asyncio.create_task(work(tenant))
            for tenant in homes
            for work in (run.add, run.search, *((run.chat,) if chats else ()))
        ]
        found_s: list[float] = []
        led_s: list[float] = []
        targets = [*homes.values(), *ACTORS, *(ENGINE if chats else ())]
        for number in range(num_kills):
            await asyncio.sleep(rng.uniform(1.0, 3.0))
            target = "scheduler" if number % 6 == 0 else rng.choice(targets)
            line = await _kill(cluster, catalog, operator, run, target, found_s, led_s)
            print(f"  {number + 1}/{num_kills} {target}: {line}", flush=True)
        run.stop.set()
        await asyncio.gather(*tasks)
        lost = 0
        for tenant, ledger in run.ledgers.items():
            for n, id in ledger.ids.items():
                hits = await apis[tenant].search(n)
                lost += (id, text_of(n)) not in hits
    catalog.close()
    failed = sum((ledger.failed for ledger in run.ledgers.values()), Counter())
    requests = sum((ledger.num for ledger in run.ledgers.values()), Counter())
    chat_failures = sum(n for what, n in failed.items() if what.startswith("chat"))
    unaffected = sum(n for what, n in failed.items() if "unaffected" in what) - sum(
        n for what, n in failed.items() if what.startswith("chat of an unaffected")
    )
    print(dict(requests), dict(failed))
    return [
        Figure(name="kills", value=num_kills, unit=""),
        Figure(name="requests", value=requests.total(), unit=""),
        Figure(
            name="acknowledged cubes",
            value=sum(len(one.ids) for one in run.ledgers.values()),
            unit="",
        ),
        Figure(name="lost", value=lost, unit="", goal="<= 0"),
        Figure(
            name="wrong payloads served",
            value=sum(len(one.wrong) for one in run.ledgers.values()),
            unit="",
            goal="<= 0",
        ),
        Figure(
            name="search again, median", value=statistics.median(found_s), unit="s", goal="<= 10.0"
        ),
        Figure(name="search again, longest", value=max(found_s), unit="s"),
        Figure(name="the leader's successor, longest", value=max(led_s), unit="s", goal="<= 10.0"),
        Figure(
            name="requests of unaffected tenants that failed twice",
            value=unaffected,
            unit="",
            goal="<= 0",
        ),
        Figure(
            name="requests of hit tenants that failed twice",
            value=failed.total() - unaffected - chat_failures,
            unit="",
        ),
        Figure(name="chats that failed twice", value=chat_failures, unit=""),
        Figure(
            name="searches that missed what was acknowledged",
            value=sum(one.missing for one in run.ledgers.values()),
            unit="",
        ),
    ]


async def _kill(
    cluster: ClusterSystem,
    catalog: Catalog,
    operator: Api,
    run: Run,
    target: str,
    found_s: list[float],
    led_s: list[float],
) -> str:
    """One kill, and what comes after it until all is in order; notes how long searches and a leader took."""
    names = {**ACTORS, **ENGINE}
    is_node = target not in names
    run.hit = frozenset(
        tenant for tenant in run.apis if not is_node or node_of(catalog, TenantId(tenant)) == target
    )
    opened = {one.shard: one.epoch for one in catalog.shards.shards()}
    waited_for = run.hit or frozenset(run.apis)
    shards = {catalog.shards.shard_of(TenantId(tenant)) for tenant in waited_for}
    epoch = catalog.leases.epoch(LEASE)
    started = time.monotonic()
    if is_node:
        await asyncio.to_thread(cluster.kill, target)
    else:
        await asyncio.to_thread(cluster.kill_actors, names[target])
    told = []
    again = started + 0.5

    async def opened_again() -> bool:
        """A process whose node was killed may answer for a moment: what counts comes after its successor."""
        found = await asyncio.to_thread(catalog.shards.shards)
        return all(one.epoch > opened[one.shard] for one in found if one.shard in shards)

    if run.hit and (is_node or target == "shard"):
        await until(opened_again, f"the shard after {target}")
        again = time.monotonic()

    async def searched() -> bool:
        return all(run.ledgers[tenant].good_at > again for tenant in waited_for)

    await until(searched, f"a search after {target}")
    found_s.append(time.monotonic() - started)
    told.append(f"search after {found_s[-1]:.1f} s")
    if target == "scheduler":

        async def led() -> bool:
            return await asyncio.to_thread(catalog.leases.epoch, LEASE) > epoch

        await until(led, "a new leader")
        led_s.append(time.monotonic() - started)
        told.append(f"led after {led_s[-1]:.1f} s")
    run.hit = frozenset(run.apis) if not is_node else run.hit
    if is_node:
        await asyncio.to_thread(cluster.join, target)
        await settled(catalog, ("a", "b", "c"))
        for tenant, home in (("tenant-b", "b"), ("tenant-c", "c")):
            if await asyncio.to_thread(node_of, catalog, TenantId(tenant)) != home:
                await bring(operator, catalog, tenant, home)
        told.append(f"in order after {time.monotonic() - started:.1f} s")
    run.hit = frozenset()
    return ", ".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("move", "kills"))
    parser.add_argument("--cubes", type=int, default=20_200, help="above 20,000 a graph is built")
    parser.add_argument("--rate", type=float, default=20.0, help="searches a second")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-chat", action="store_true", help="no model, and no chats")
    parser.add_argument("--no-results", action="store_true", help="write no result file")
    args = parser.parse_args()
    chats = args.part == "kills" and not args.no_chat
    with (
        tempfile.TemporaryDirectory() as folder,
        ClusterSystem(Path(folder), OVERRIDES, chat=chats) as cluster,
    ):
        if args.part == "move":
            figures = asyncio.run(move(cluster, args.cubes, args.rate))
        else:
            figures = asyncio.run(kills(cluster, args.kills, args.seed, chats=chats))
    if args.no_results:
        show(figures)
    else:
        command = " ".join(["python -m benchmarks.bench_nodes", *sys.argv[1:]])
        write_results(f"nodes_{args.part}", command, figures)


if __name__ == "__main__":
    main()
