"""What gateways, shards and the scheduler import: a restart costs as long."""

import subprocess
import sys

import pytest

from memcube.testing.process import ROOT

HEAVY = ("torch", "transformers", "peft", "deepspeed")


@pytest.mark.parametrize(
    "module", ["serve.gateway", "actors.system", "actors.scheduler", "actors.qdrant"]
)
def test_what_holds_handles_of_engines_and_jobs_needs_no_models_libraries(module: str):
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == "[]"
