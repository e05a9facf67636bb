"""Many seeds in parts: kept in a file, gone on with, and told of."""

import subprocess
import sys
from pathlib import Path

import pytest

from memcube.testing import sim_runs
from memcube.testing.sim_runs import Progress, run_parts


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim_runs, "PART", 2)


def test_a_run_goes_on_with_the_parts_that_its_file_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "parts.jsonl"
    whole = list(run_parts(range(10, 15), num_ops=3))
    begun = run_parts(range(10, 15), num_ops=3, into=path)
    assert next(begun).first == 10
    begun.close()
    path.write_text(path.read_text() + '\n{"first": 12, "st')  # stopped while it wrote
    ran = []
    run_part = sim_runs.run_part
    monkeypatch.setattr(sim_runs, "run_part", lambda *a: ran.append(a[:2]) or run_part(*a))
    parts = list(run_parts(range(10, 15), num_ops=3, into=path))
    assert ran == [(12, 14), (14, 15)]
    assert [(one.first, one.num_events, one.counts) for one in parts] == [
        (one.first, one.num_events, one.counts) for one in whole
    ]
    ran.clear()
    list(run_parts(range(10, 15), num_ops=3, into=path))
    assert ran == []
    list(run_parts(range(10, 15), num_ops=4, into=path))
    assert len(ran) == 3


def test_parts_of_other_code_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "parts.jsonl"
    (part,) = run_parts(range(2), num_ops=3, into=path)
    monkeypatch.setattr(sim_runs, "code_digest", lambda: "other")
    (again,) = run_parts(range(2), num_ops=3, into=path)
    assert (again.code, again.num_events) == ("other", part.num_events)


def test_several_processes_do_the_same(tmp_path: Path):
    one = {part.first: part.num_events for part in run_parts(range(4), num_ops=3)}
    two = run_parts(range(4), num_ops=3, processes=2, into=tmp_path / "parts.jsonl")
    assert {part.first: part.num_events for part in two} == one


def test_parts_add_up():
    progress = Progress(4)
    for part in run_parts(range(4), num_ops=3):
        progress.add(part)
    assert (progress.num_done, progress.broken) == (4, [])
    assert str(progress).startswith("4 seeds, ")


def test_the_command_names_broken_seeds_and_how_to_replay_them(tmp_path: Path):
    part = sim_runs.Part(
        first=7, stop=8, num_ops=5, code=sim_runs.code_digest(), broken={"7": "at 1 s: gone"}
    )
    path = tmp_path / "parts.jsonl"
    sim_runs._kept(part, path)
    command = ["-m", "memcube.testing.simulation", "--seeds", "7", "--ops", "5"]
    told = subprocess.run(
        [sys.executable, *command, "--into", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 1
    assert "seed 7 at 1 s: gone" in told.stdout
    assert "replay: python -m memcube.testing.simulation --seeds 7 --ops 5" in told.stdout
