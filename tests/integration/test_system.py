"""The whole system on one machine: added, found, killed in part and in whole, and all still there."""

import concurrent.futures
import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from memcube.client import MemCubeClient
from memcube.testing.process import ROOT, SystemProcess
from memcube.testing.waiting import until

BACK_S = 180.0


def found(client: MemCubeClient, query: str, user_id: str) -> list[str]:
    return [hit.text for hit in client.search(query, user_id=user_id)]


def test_what_was_added_is_found_by_the_next_search(client: MemCubeClient):
    client.add("Ann moved to Oslo in May", user_id="ann")
    assert found(client, "where does Ann live?", "ann") == ["Ann moved to Oslo in May"]


def test_what_was_only_stored_is_found_soon(client: MemCubeClient):
    client.add("Bob keeps bees", user_id="bob", wait="stored")
    until(lambda: found(client, "bees", "bob") == ["Bob keeps bees"], within_s=BACK_S)


def test_every_part_says_that_it_is_ready(system: SystemProcess, client: MemCubeClient):
    status = client.status()
    assert [shard["shard"] for shard in status["shards"]] == [0, 1]
    assert status["scheduler"]["epoch"] >= 1
    metrics = httpx.get(f"{system.url}/metrics").text
    assert "memcube_http_requests_total" in metrics


def test_a_request_has_one_name(system: SystemProcess):
    for headers in ({}, {"x-request-id": "mine-1"}):
        response = httpx.get(f"{system.url}/v1/nowhere", headers=headers)
        assert response.headers.get_list("x-request-id") == [response.json()["request_id"]]


def test_tenants_lie_on_different_shards_and_never_see_each_other(
    system: SystemProcess, client: MemCubeClient
):
    clients = []
    for name in ("north", "west"):  # on shards 0 and 1
        secret = client.keys.create(f"{name} key", role="writer", tenant=name).key
        clients.append(MemCubeClient(system.url, secret))
    north, west = clients
    mine = north.add("the code word is heron", user_id="u").ids[0]
    west.add("the code word is marten", user_id="u")
    assert found(north, "code word", "u") == ["the code word is heron"]
    assert found(west, "code word", "u") == ["the code word is marten"]
    assert (
        north.get(mine).residency[0].location
        != west.get(west.search("code word", user_id="u").results[0].id).residency[0].location
    )
    answer = httpx.get(
        f"{system.url}/v1/memories/{mine}", headers={"X-API-Key": west.address.api_key}
    )
    assert answer.status_code == 404


@pytest.mark.parametrize(
    "title", ["ray::QdrantActor", "ray::EmbedderActor", "ray::SchedulerActor", "ray::ServeReplica"]
)
def test_a_killed_part_comes_back_with_its_data(
    system: SystemProcess, client: MemCubeClient, title: str
):
    user = title.rpartition(":")[2]
    client.add(f"before the {user} died", user_id=user)
    assert system.kill_one(title) > 0
    client.add("after it", user_id=user)
    until(
        lambda: set(found(client, "died after", user)) == {f"before the {user} died", "after it"},
        within_s=BACK_S,
    )


def test_a_killed_scheduler_leads_again_under_a_higher_epoch(
    system: SystemProcess, client: MemCubeClient
):
    epoch = until(lambda: client.status()["scheduler"]["epoch"], within_s=BACK_S)
    system.kill_one("ray::SchedulerActor")

    def higher() -> bool:
        try:
            return (client.status()["scheduler"]["epoch"] or 0) > epoch
        except Exception:  # noqa: BLE001 - it is on its way back
            return False

    until(higher, within_s=BACK_S)


def test_a_retry_with_the_same_key_has_one_effect_though_the_gateway_died_between(
    system: SystemProcess, client: MemCubeClient
):
    first = client.add("only once", user_id="retry", idempotency_key="retry-1").ids
    system.kill_one("ray::ServeReplica")
    again = client.add("only once", user_id="retry", idempotency_key="retry-1").ids
    assert again == first
    assert client.get(first[0]).repeats == 1


def test_searches_are_answered_while_much_is_added(client: MemCubeClient):
    items = [{"text": f"note {n} about the harbour", "user_id": "bulk"} for n in range(400)]
    client.add("the lighthouse is green", user_id="reader")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        adding = pool.submit(client.add_batch, items)
        took = []
        while not adding.done():
            started = time.monotonic()
            assert found(client, "lighthouse", "reader")
            took.append(time.monotonic() - started)
        assert len(adding.result().results) == 400
    assert len(took) >= 3
    assert sorted(took)[len(took) // 2] < 1.0


def test_the_command_line_ingests_a_file_and_finds_its_turns(system: SystemProcess, tmp_path: Path):
    turns = [
        {"role": "user", "name": "Mia", "content": "I adopted a greyhound called Comet."},
        {"role": "user", "name": "Leo", "content": "My ferry leaves at noon."},
    ]
    file = tmp_path / "talk.jsonl"
    file.write_text("\n".join(json.dumps({"messages": [turn]}) for turn in turns) + "\n")

    def memcube(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "memcube.cli", *arguments],
            cwd=ROOT,
            env={
                "MEMCUBE_URL": system.url,
                "MEMCUBE_API_KEY": system.key,
                "PATH": "/usr/bin:/bin",
                "HOME": str(tmp_path),
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout

    memcube("ingest", str(file), "--user", "talk")
    assert "Comet" in memcube("search", "what is the dog called?", "--user", "talk")


def test_it_stops_cleanly_and_starts_again_with_its_data_even_after_a_kill_of_everything(
    tmp_path: Path,
):
    system = SystemProcess(tmp_path / "data")
    try:
        system.start()
        with MemCubeClient(system.url, system.key) as client:
            client.add("it outlives a stop", user_id="u")
        tree = psutil.Process(system.pid).children(recursive=True)
        system.stop()
        _, alive = psutil.wait_procs(tree, timeout=20)
        assert alive == []
        assert "stopped" in system.log.read_text()

        system.start()
        with MemCubeClient(system.url, system.key) as client:
            assert found(client, "outlives", "u") == ["it outlives a stop"]
            client.add("and a kill of everything", user_id="u")
        system.kill()

        system.start()
        with MemCubeClient(system.url, system.key) as client:
            until(
                lambda: (
                    set(found(client, "outlives kill", "u"))
                    == {"it outlives a stop", "and a kill of everything"}
                ),
                within_s=BACK_S,
            )
    finally:
        system.stop()
