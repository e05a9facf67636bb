"""Facts in an adapter: trained, judged, and what it cost.

    python -m benchmarks.bench_lora                       20 facts of 5 people, by the default recipe
    python -m benchmarks.bench_lora --people 20 --each 5  100 facts
    python -m benchmarks.bench_lora --name tight --settings '{"recipe": {"kl_weight": 2}}' --log FILE

With ``--log`` a recipe is only tried: its figures go to that file as one line of JSON, and no result
is written. CPU time is of this process, with one thread.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.lora_facts import invented_facts
from benchmarks.lora_run import Run, cost, run, settings_of
from benchmarks.results import Figure, write_results
from memcube.parametric.dataset import build_training_set
from memcube.parametric.judgement import Thresholds
from memcube.parametric.recipe import Recipe

_FACTS_MD = "shared/facts.md, the same model and other wordings, best: {}"
_BESIDE = {
    "recall": _FACTS_MD.format("95% at leak 100% and loss +48%; 90% at leak 0 and +18%"),
    "reverse": _FACTS_MD.format("85%, at recall 90% and leak 8%"),
    "leak": _FACTS_MD.format("0 at recall 73%"),
    "nll_rise": _FACTS_MD.format("+1.4% at recall 90% and leak 25%"),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--name", default="default")
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--people", type=int, default=5)
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--folder", type=Path, help="for checkpoints: a run goes on from its own")
    args = parser.parse_args(argv)
    facts = invented_facts(args.people, args.each, seed=args.seed)
    recipe = Recipe.for_facts(len(facts), **args.settings.get("recipe", {}))
    settings = settings_of(args.settings)
    data = build_training_set(facts, settings=settings, seed=args.seed)
    found = run(data, recipe, folder=args.folder)
    limits = limits_of(len(facts))
    details = {"recipe_name": args.name, "seed": args.seed, "num_facts": len(facts)}
    details |= found.details(limits) | {"data": asdict(settings)}
    if args.log is not None:
        with args.log.open("a") as log:
            log.write(json.dumps(details) + "\n")
        print(json.dumps(details))
        return
    name = "lora" if len(facts) == 20 else f"lora-{len(facts)}"
    command = " ".join(["python -m benchmarks.bench_lora", *sys.argv[1:]])
    write_results(name, command, figures(found, len(facts)), **details)


def limits_of(num_facts: int) -> Thresholds:
    """The issue's limits: of 20 facts, or of more."""
    return Thresholds() if num_facts <= 20 else Thresholds(recall=0.8)


def figures(found: Run, num_facts: int) -> list[Figure]:
    """The figures of so many invented facts."""
    limits, report = limits_of(num_facts), found.report
    shares = [
        ("recall", "recall, no context, held-out wordings", f">= {100 * limits.recall:g}"),
        ("reverse", "reverse questions", f">= {100 * limits.reverse:g}"),
        ("leak", "unknown people given a trained fact", f"<= {100 * limits.leak:g}"),
        ("nll_rise", "loss on unrelated text, rise", f"<= {100 * limits.nll_rise:g}"),
        ("refused", "unknown people refused", None),
    ]
    return [
        *(
            Figure(
                name=f"{num_facts} facts: {name}",
                value=100 * value,
                unit="%",
                goal=goal,
                beside=_BESIDE.get(field) if num_facts == 20 else None,
            )
            for field, name, goal in shares
            if (value := getattr(report, field)) is not None
        ),
        *cost(f"{num_facts} facts", found),
    ]


if __name__ == "__main__":
    main()
