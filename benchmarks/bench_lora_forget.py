"""Forgetting: the adapter that is trained anew after a deletion, asked for what was deleted.

    python -m benchmarks.bench_lora_forget

The 20 facts of ``bench_lora`` less four, trained as the queued job trains them: from the base model, of
the cubes that are left. What was deleted is asked in all wordings of the gate, of the adapter and of
the base model; the others' recall stands beside that of ``results/lora.json``, before the deletion.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.lora_facts import invented_facts
from benchmarks.lora_run import cost, run
from benchmarks.results import RESULTS, Figure, write_results
from memcube.parametric.dataset import ProbeKind, build_training_set
from memcube.parametric.judgement import Thresholds
from memcube.parametric.recipe import Recipe

DELETED = (3, 7, 11, 17)
"""Which of the facts, by number."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="for checkpoints: a run goes on from its own")
    args = parser.parse_args(argv)
    before = json.loads((RESULTS / "lora.json").read_text())["details"]["recall"]
    facts = invented_facts(5, 4, seed=0)
    gone = [facts[number] for number in DELETED]
    left = [fact for fact in facts if fact not in gone]
    data = build_training_set(left, seed=0)
    asked = [
        replace(probe, kind=ProbeKind.EARLIER)
        for probe in build_training_set(gone, seed=0).probes
        if probe.kind is ProbeKind.RECALL
    ]
    found = run(
        replace(data, probes=(*data.probes, *asked)),
        Recipe.for_facts(len(left)),
        ask_base=True,
        folder=args.folder,
    )
    assert found.report.earlier is not None
    assert found.report.recall is not None
    what = f"{len(gone)} of {len(facts)} facts deleted"
    figures = [
        Figure(
            name=f"{what}: recall of those, {len(asked)} questions",
            value=100 * found.report.earlier,
            unit="%",
            goal="<= 0",
            beside=f"the base model recalls {found.base_recall:.0%} of the others",
        ),
        Figure(
            name=f"{what}: the others' recall over that before",
            value=found.report.recall / before,
            unit="×",
            goal=">= 0.95",
        ),
        *cost(what, found),
    ]
    details = found.details(Thresholds(earlier=0.0))
    deleted = [asdict(fact) for fact in gone]
    write_results(
        "lora-forget", "python -m benchmarks.bench_lora_forget", figures, deleted=deleted, **details
    )


if __name__ == "__main__":
    main()
