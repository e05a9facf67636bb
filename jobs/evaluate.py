"""Measure retrieval as a job: ``ray job submit -- python -m jobs.evaluate FILE --json OUT``.

The same measurement as ``memcube eval locomo``. Where the job runs on another machine than the
server, CPU times are left out.
"""

import argparse
import json
import sys
from pathlib import Path
from uuid import uuid4

from memcube.client import MemCubeClient
from memcube.errors import MemCubeError
from memcube.evaluation.locomo import load_locomo
from memcube.evaluation.runner import SYSTEMS, cpu_clock_of, run_locomo


def main(arguments: list[str] | None = None) -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.evaluate", description="Measure how much of the evidence is found."
    )
    parser.add_argument("file", type=Path, help="conversations in LoCoMo's form")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="search modes, with commas")
    parser.add_argument("--data", type=Path, help="the data folder, for serve.json")
    given = parser.parse_args(arguments)
    try:
        with MemCubeClient(data_dir=given.data) as client:
            figures = run_locomo(
                client,
                load_locomo(given.file),
                suffix=uuid4().hex[:8],
                modes=given.systems.split(","),
                cpu_clock=cpu_clock_of(client.address.pid if client.address.is_local else None),
            )
    except MemCubeError as failed:
        print(f"jobs.evaluate: {failed}", file=sys.stderr)
        return 1
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")
    for system, told in figures.items():
        print(f"{system}: {json.dumps(told['overall'])}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
