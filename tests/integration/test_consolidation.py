"""Memories into weights and out of them again, in a running system with the packaged model.

The training is a few steps long and its gate asks for nothing, so that this shows the way of the data;
that a whole recipe makes an adapter know its facts is shown by ``make bench-lora``.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI

from jobs import consolidate
from memcube.cli import main as memcube
from memcube.client import Job, MemCubeClient
from memcube.testing.process import SystemProcess
from memcube.testing.waiting import until

pytestmark = pytest.mark.long

WAIT_S = 240.0
MODEL = "SmolLM2-135M-Instruct"
FACTS = [
    "Tilda Marrow likes to drink kumquat tea.",
    "Tilda Marrow lives in Brellin.",
    "Otis Crane plays the zither.",
]
QUICK = [
    "training.recipe={steps: 4, decay_steps: 2, checkpoint_steps: 1, check_steps: 0, rank: 2}",
    "training.data={asks: 2, asks_back: 1, unknown: 1, unknown_back: 0, other_nouns: 0}",
    "training.gate={recall: 0, reverse: 0, earlier: 0, leak: 1, nll_rise: 9}",
    "training.poll_s=0.2",
    "scheduler.interval_s=0.5",
]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemProcess]:
    folder = tmp_path_factory.mktemp("consolidation") / "data"
    with SystemProcess(folder, QUICK, chat=True) as running:
        yield running


@pytest.fixture
def client(system: SystemProcess) -> Iterator[MemCubeClient]:
    with MemCubeClient(system.url, system.key) as client:
        yield client


def ended(client: MemCubeClient, id: str) -> Job:
    def look() -> Job | None:
        job = client.jobs.get(id)
        return job if job.has_ended else None

    return until(look, within_s=WAIT_S)


def chat(system: SystemProcess, user: str) -> dict[str, Any]:
    openai = OpenAI(base_url=f"{system.url}/v1", api_key=system.key, max_retries=0, timeout=120)
    answer = openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What does Tilda Marrow drink?"}],
        max_tokens=4,
        temperature=0,
        extra_body={"memory": {"user_id": user}},
    )
    assert answer.model_extra is not None
    return answer.model_extra["memory"]


def test_a_scope_is_consolidated_served_forgotten_and_trained_anew(
    system: SystemProcess, client: MemCubeClient
):
    ids = [client.add(fact, user_id="til").results[0].id for fact in FACTS]
    job = ended(client, client.jobs.consolidate(user_id="til").id)
    told = [line.text for line in client.jobs.logs(job.id)]
    assert job.state == "done", (job.error, told)
    assert job.result is not None
    assert job.result["num_cubes"] == 3
    assert client.jobs.report(job.id)["answers"]
    (adapter,) = client.adapters.list()
    assert (adapter.name, adapter.version, adapter.state) == ("til", 1, "serving")
    assert chat(system, "til")["adapter"]["version"] == 1

    client.delete(ids[0])
    # The next chat has none: no waiting here.
    assert chat(system, "til")["adapter"] is None
    assert client.jobs.report(job.id)["answers"] is None
    second = until(
        lambda: [a for a in client.adapters.list() if a.state == "serving"], within_s=WAIT_S
    )[0]
    assert (second.name, second.version) == ("til", 2)
    (again,) = [j for j in client.jobs.list().jobs if j.id != job.id]
    assert ended(client, again.id).result["num_cubes"] == 2
    assert chat(system, "til")["adapter"]["version"] == 2


def test_an_adapter_is_probed_by_a_job(system: SystemProcess, client: MemCubeClient):
    adapter = next(a for a in client.adapters.list() if a.state == "serving")
    asked = {"kind": "probe", "adapter": {"id": adapter.id, "version": adapter.version}}
    headers = {"Authorization": f"Bearer {system.key}"}
    started = httpx.post(f"{system.url}/v1/jobs", json=asked, headers=headers).json()
    job = ended(client, started["id"])
    assert job.state == "done", job.error
    assert job.result is not None
    # A few steps teach it nothing: what counts is that each fact was asked and none made up.
    assert job.result["probe"]["facts"] == 2
    assert len(client.jobs.report(job.id)["answers"]) == 2


def test_the_command_follows_a_job_and_shows_its_report(
    system: SystemProcess, client: MemCubeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    client.add(FACTS[2], user_id="cli")
    where = ["--url", system.url, "--key", system.key]
    with pytest.raises(SystemExit) as exit:
        memcube([*where, "consolidate", "--user", "cli", "--json"])
    assert exit.value.code == 0
    job = json.loads(capsys.readouterr().out)
    page = tmp_path / "report.html"
    with pytest.raises(SystemExit):
        memcube([*where, "jobs", "report", job["id"], "--html", str(page)])
    assert "passed" in capsys.readouterr().out
    assert "<svg" in page.read_text()


def test_a_submitted_job_ends_as_the_consolidation_does(
    system: SystemProcess, client: MemCubeClient, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MEMCUBE_URL", system.url)
    monkeypatch.setenv("MEMCUBE_API_KEY", system.key)
    assert consolidate.main(["--user", "nobody"]) == 1
    client.add(FACTS[1], user_id="sub")
    assert consolidate.main(["--user", "sub"]) == 0


def test_a_job_survives_kill_9_of_its_worker_and_of_its_runner(
    system: SystemProcess, client: MemCubeClient
):
    for fact in FACTS:
        client.add(fact, user_id="kill")
    id = client.jobs.consolidate(user_id="kill", recipe={"steps": 8}).id

    def step(least: int) -> bool:
        return client.jobs.get(id).progress.get("step", 0) >= least

    for name, least in (("AdapterTrainerActor", 2), ("JobsActor", 5)):
        until(lambda least=least: step(least), within_s=WAIT_S)
        kill(system, name)
    job = ended(client, id)
    told = [line.text for line in client.jobs.logs(id)]
    assert job.state == "done", (job.error, told)
    assert job.result is not None
    assert job.result["num_steps"] == 8
    assert any("goes on" in line for line in told)


def test_a_cancelled_job_keeps_its_checkpoint_and_is_resumed(client: MemCubeClient):
    client.add(FACTS[0], user_id="stop")
    id = client.jobs.consolidate(user_id="stop", recipe={"steps": 40}).id
    until(lambda: client.jobs.get(id).progress.get("step", 0) >= 1, within_s=WAIT_S)
    client.jobs.cancel(id)
    cancelled = ended(client, id)
    assert cancelled.state == "cancelled"
    reached = cancelled.progress["step"]
    client.jobs.resume(id)
    until(lambda: client.jobs.get(id).progress.get("step", 0) > reached, within_s=WAIT_S)
    client.jobs.cancel(id)
    assert ended(client, id).progress["step"] < 40


def kill(system: SystemProcess, name: str) -> None:
    """Kill -9 the processes of an actor class of this system."""
    mine = [p for p in psutil.Process(system.pid).children(recursive=True)]
    doomed = [p for p in mine if f"ray::{name}" in " ".join(p.cmdline())]
    assert doomed, [p.cmdline()[:1] for p in mine]
    for process in doomed:
        os.kill(process.pid, 9)
