"""``kill -9`` under steady adds: nothing acknowledged is lost, nothing is stored twice.

    python -m benchmarks.chaos [--kills 50] [--seed 1]

Adders send texts with an Idempotency-Key each, and repeat a request with the same key until it is
acknowledged. Meanwhile the gateway's replica, the QdrantActor, the scheduler and the whole process
tree are killed in turn. At the end every acknowledged text must be there exactly once, with the id
that was acknowledged, and a search must find it.
"""

import argparse
import asyncio
import random
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import httpx

from benchmarks.results import Figure, write_results
from memcube.testing.process import SystemProcess

ADDERS = 3
TITLES = {
    "gateway": "ray::ServeReplica",
    "QdrantActor": "ray::QdrantActor",
    "scheduler": "ray::SchedulerActor",
}
BETWEEN_S = (0.3, 1.5)
BACK_S = 120.0


@dataclass
class Ledger:
    """What was acknowledged: text → id. ``attempts`` counts requests, ``last`` the latest answer's time."""

    acknowledged: dict[str, str] = field(default_factory=dict)
    attempts: int = 0
    changed_ids: int = 0
    last: float = 0.0


class Target:
    """Where to send to; changes when the whole system is started again."""

    def __init__(self, system: SystemProcess) -> None:
        self.url, self.key = system.url, system.key


async def adder(number: int, target: Target, ledger: Ledger, stop: asyncio.Event) -> None:
    async with httpx.AsyncClient(timeout=30) as http:
        count = 0
        while not stop.is_set():
            text = f"adder {number} remembers thing {count}"
            key = uuid.uuid4().hex
            body = {"text": text, "user_id": f"adder-{number}"}
            while True:
                ledger.attempts += 1
                try:
                    answer = await http.post(
                        f"{target.url}/v1/memories",
                        json=body,
                        headers={"X-API-Key": target.key, "Idempotency-Key": key},
                    )
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
                    continue
                if answer.status_code == 201:
                    break
                if answer.status_code not in (404, 408, 429, 500, 502, 503, 504):
                    raise RuntimeError(f"{answer.status_code}: {answer.text}")
                await asyncio.sleep(0.05)
            (result,) = answer.json()["results"]
            ledger.acknowledged[text] = result["id"]
            ledger.last = time.monotonic()
            # Now and then the answer "was lost": the same request again must change nothing.
            if count % 5 == 0:
                await _repeat(http, target, body, key, result["id"], ledger)
            count += 1


async def _repeat(http, target: Target, body, key: str, id: str, ledger: Ledger) -> None:
    try:
        again = await http.post(
            f"{target.url}/v1/memories",
            json=body,
            headers={"X-API-Key": target.key, "Idempotency-Key": key},
        )
    except httpx.TransportError:
        return
    if again.status_code == 201 and again.json()["results"][0]["id"] != id:
        ledger.changed_ids += 1


async def run(
    system: SystemProcess, kills: int, seed: int
) -> tuple[Ledger, dict[str, list[float]]]:
    generator = random.Random(seed)
    ledger, target, stop = Ledger(), Target(system), asyncio.Event()
    adders = [asyncio.create_task(adder(i, target, ledger, stop)) for i in range(ADDERS)]
    back: dict[str, list[float]] = {name: [] for name in (*TITLES, "everything")}
    plan = [list(back)[i % len(back)] for i in range(kills)]
    for number, name in enumerate(plan):
        await asyncio.sleep(generator.uniform(*BETWEEN_S))
        started = time.monotonic()
        if name == "everything":
            system.kill()
            await asyncio.to_thread(system.start)
            target.url, target.key = system.url, system.key
        elif system.kill_one(TITLES[name]) == 0:
            raise RuntimeError(f"no process of {name}")
        while ledger.last < started:
            if time.monotonic() - started > BACK_S:
                raise RuntimeError(f"no add was acknowledged {BACK_S:g} s after a kill of {name}")
            if any(task.done() for task in adders):
                await asyncio.gather(*adders)
            await asyncio.sleep(0.05)
        back[name].append(ledger.last - started)
        print(
            f"kill {number + 1}/{kills}: {name}, adds again after {back[name][-1]:.1f} s",
            flush=True,
        )
    stop.set()
    await asyncio.gather(*adders)
    return ledger, back


async def audit(system: SystemProcess, ledger: Ledger) -> tuple[int, int, int]:
    """Acknowledged texts that are missing, stored twice, and not found by a search."""
    stored: dict[str, list[str]] = {}
    headers = {"X-API-Key": system.key}
    async with httpx.AsyncClient(base_url=system.url, headers=headers, timeout=60) as http:
        cursor: str | None = None
        while True:
            query = {"limit": "500"} | ({"cursor": cursor} if cursor else {})
            page = (await http.get("/v1/memories", params=query)).raise_for_status().json()
            for cube in page["results"]:
                stored.setdefault(cube["text"], []).append(cube["id"])
            cursor = page["next_cursor"]
            if cursor is None:
                break
        lost = sum(id not in stored.get(text, ()) for text, id in ledger.acknowledged.items())
        doubled = sum(len(ids) > 1 for ids in stored.values())
        until = time.monotonic() + 60
        while True:
            status = (await http.get("/v1/status")).raise_for_status().json()
            if status["pending_index"] == 0 or time.monotonic() > until:
                break
            await asyncio.sleep(0.5)
        unfound = 0
        for text, id in ledger.acknowledged.items():
            body = {"query": text, "mode": "sparse", "top_k": 5, "filters": {"id": id}}
            answer = (await http.post("/v1/memories/search", json=body)).raise_for_status().json()
            unfound += [hit["id"] for hit in answer["results"]] != [id]
    return lost, doubled, unfound


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        system = SystemProcess(Path(folder) / "data").start()
        try:
            ledger, back = asyncio.run(run(system, given.kills, given.seed))
            lost, doubled, unfound = asyncio.run(audit(system, ledger))
        finally:
            system.stop()
    figures = [
        Figure(name="kills", value=sum(map(len, back.values())), unit="", goal=">= 50"),
        Figure(name="adds acknowledged", value=len(ledger.acknowledged), unit=""),
        Figure(name="acknowledged adds lost", value=lost, unit="", goal="<= 0"),
        Figure(name="stored twice", value=doubled, unit="", goal="<= 0"),
        Figure(name="answers changed by a retry", value=ledger.changed_ids, unit="", goal="<= 0"),
        Figure(name="acknowledged but not found by search", value=unfound, unit="", goal="<= 0"),
    ]
    for name, times in back.items():
        if times:
            figures.append(
                Figure(
                    name=f"adds again after a kill: {name}, median", value=median(times), unit="s"
                )
            )
    write_results(
        "chaos", f"python -m benchmarks.chaos --kills {given.kills} --seed {given.seed}", figures
    )


if __name__ == "__main__":
    main()
