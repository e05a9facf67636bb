"""One of several workers in a process of its own: ``python -m tests.unit.parametric.gloo_worker CASE``.

Prints what each training came to, a line of JSON each; ``step N`` while it trains.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from memcube.errors import MemCubeError
from memcube.parametric.deepspeed_engine import DeepSpeedOpener
from memcube.parametric.engines import Workers
from memcube.parametric.work import Enough, perform
from tests.unit.parametric.small import small_model
from tests.unit.parametric.test_training_work import small_work


def main(case: dict[str, Any]) -> None:
    rank = case["rank"]
    for training in case["trainings"]:
        work = small_work(**training.get("recipe", {}))
        if training.get("is_checked"):
            work = replace(work, enough=Enough(recall=0.0, reverse=0.0, leak=1.0))
        taken = 0

        def told(progress: Any) -> None:
            nonlocal taken
            taken = progress.done
            print(f"step {taken}", flush=True)

        def should_stop(stop_at: int | None = training.get("stop_at")) -> bool:
            return rank == 1 and taken == stop_at  # one worker alone is told  # noqa: B023

        opener = DeepSpeedOpener(
            zero_stage=training["stage"],
            address=("127.0.0.1", training["port"]),
            timeout_s=case["timeout_s"],
        )
        try:
            found = perform(
                work,
                small_model(),
                Path(training["folder"]),
                workers=Workers(rank, case["count"]),
                open_engine=opener,
                progress=told,
                should_stop=should_stop,
            )
        except MemCubeError as failed:
            print(json.dumps({"error": type(failed).__name__}), flush=True)
            continue
        print(json.dumps({"outcome": found.outcome, "history": found.history}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
