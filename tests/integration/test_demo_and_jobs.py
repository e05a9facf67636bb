"""``make demo`` as a person runs it, and the jobs against a running system."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs import evaluate, ingest
from memcube.client import MemCubeClient
from memcube.testing.process import ROOT, SystemProcess

SAMPLE = ROOT / "cluster" / "sample.jsonl"


@pytest.fixture
def address(system: SystemProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMCUBE_URL", system.url)
    monkeypatch.setenv("MEMCUBE_API_KEY", system.key)


def test_the_tour_ends_as_expected_and_leaves_nothing(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "cluster.demo"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 steps as expected" in done.stdout
    assert list(tmp_path.glob("memcube-demo-*")) == []


@pytest.mark.usefixtures("address")
def test_an_ingest_job_goes_on_where_it_stopped(
    client: MemCubeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = [str(SAMPLE), "--data", str(tmp_path)]
    assert ingest.main(arguments) == 0
    assert "40 added, 0 known already, 0 sent before" in capsys.readouterr().out
    assert ingest.main(arguments) == 0
    assert "0 added, 0 known already, 40 sent before" in capsys.readouterr().out
    assert client.search("a greyhound from the shelter", user_id="ines")[0].speaker == "Ines"


@pytest.mark.usefixtures("address")
def test_a_job_with_a_bad_file_says_so_and_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert ingest.main([str(tmp_path / "none.jsonl"), "--data", str(tmp_path)]) == 1
    assert "none.jsonl: can't be read" in capsys.readouterr().err
    assert evaluate.main([str(tmp_path / "none.json"), "--data", str(tmp_path)]) == 1
    assert "jobs.evaluate" in capsys.readouterr().err
