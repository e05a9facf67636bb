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
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from benchmarks.lora_facts import invented_facts
from benchmarks.results import Figure, write_results
from memcube.activation.models import LoadedModel, load_model
from memcube.config import Config, ModelConfig
from memcube.parametric.dataset import DataSettings, ProbeKind, TrainingSet, build_training_set
from memcube.parametric.gate import Gate, GateReport, Thresholds, decide, share
from memcube.parametric.replay import UNRELATED
from memcube.parametric.training import AdapterTrainer, Progress, Recipe, export_adapter

# Of the checks while training: above the gate's, as the wordings and people are fewer.
_ENOUGH = {ProbeKind.RECALL: 0.95, ProbeKind.REVERSE: 0.85}
_LEAK = 0.05


@dataclass(slots=True)
class _Spent:
    """CPU seconds: of the steps, of the checks while training, of the gate."""

    steps: float = 0.0
    checks: float = 0.0
    gate: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", default="default")
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--people", type=int, default=5)
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path)
    args = parser.parse_args()
    recipe = Recipe(**args.settings.get("recipe", {}))
    settings = DataSettings(**args.settings.get("data", {}))
    facts = invented_facts(args.people, args.each, seed=args.seed)
    data = build_training_set(facts, settings=settings, seed=args.seed)
    loaded = load_model(ModelConfig(threads=1, dtype="float32"), Config().model_folder())
    began = time.monotonic()
    spent = _Spent()
    report, num_steps = _run(loaded, data, recipe, spent)
    details: dict[str, Any] = {
        "name": args.name,
        "seed": args.seed,
        "num_facts": len(facts),
        **report.figures(),
        "num_steps": num_steps,
        "cpu_s": asdict(spent),
        "wall_s": time.monotonic() - began,
        "short": decide(report, Thresholds()).short,
        "recipe": asdict(recipe),
        "data": asdict(settings),
    }
    if args.log is not None:
        with args.log.open("a") as log:
            log.write(json.dumps(details) + "\n")
        print(json.dumps(details))
        return
    name = "lora" if len(facts) == 20 else f"lora-{len(facts)}"
    command = " ".join(["python -m benchmarks.bench_lora", *sys.argv[1:]])
    write_results(name, command, _figures(report, spent, len(facts)), **details)


def _run(
    loaded: LoadedModel, data: TrainingSet, recipe: Recipe, spent: _Spent
) -> tuple[GateReport, int]:
    quick = Gate(loaded, unrelated=(), autocast=True)
    start = time.process_time()

    def check(model: PeftModel) -> bool:
        since = time.process_time()
        answers = quick.ask(model, data.early)
        spent.checks += time.process_time() - since
        found = {kind: share(answers, kind) or 0.0 for kind in (*_ENOUGH, ProbeKind.LEAK)}
        print({str(kind): round(value, 3) for kind, value in found.items()}, flush=True)
        enough = all(found[kind] >= least for kind, least in _ENOUGH.items())
        return enough and found[ProbeKind.LEAK] <= _LEAK

    def show(progress: Progress) -> None:
        if progress.step % 10 == 0:
            print(
                f"{progress.step} of {progress.num_steps}: answers {progress.answer_loss:.3f}, "
                f"KL {progress.kl:.4f}, {time.process_time() - start:.0f} CPU-s",
                flush=True,
            )

    with tempfile.TemporaryDirectory() as folder:
        trainer = AdapterTrainer(loaded, data, recipe, Path(folder), check=check, progress=show)
        trained = trainer.train()
        size = export_adapter(trainer.model, Path(folder) / "adapter")
    spent.steps = time.process_time() - start - spent.checks
    since = time.process_time()
    report = Gate(loaded, unrelated=UNRELATED).judge(trainer.model, data.probes, adapter_bytes=size)
    spent.gate = time.process_time() - since
    for answer in report.answers:
        if answer.holds == (answer.kind is ProbeKind.LEAK):
            print(f"{answer.kind}: {answer.question} -> {answer.said}")
    return report, trained.step


def _figures(report: GateReport, spent: _Spent, num_facts: int) -> list[Figure]:
    limits = Thresholds() if num_facts <= 20 else Thresholds(recall=0.8)
    shares = [
        ("recall, no context, held-out wordings", report.recall, f">= {100 * limits.recall:g}"),
        ("reverse questions", report.reverse, f">= {100 * limits.reverse:g}"),
        ("unknown people given a trained fact", report.leak, f"<= {100 * limits.leak:g}"),
        ("loss on unrelated text, rise", report.nll_rise, f"<= {100 * limits.nll_rise:g}"),
        ("unknown people refused", report.refused, None),
    ]
    return [
        *(
            Figure(name=f"{num_facts} facts: {name}", value=100 * value, unit="%", goal=goal)
            for name, value, goal in shares
            if value is not None
        ),
        Figure(
            name=f"{num_facts} facts: adapter",
            value=report.adapter_bytes / 1e6,
            unit="MB",
            goal=f"<= {limits.adapter_bytes / 1e6:g}",
        ),
        Figure(name=f"{num_facts} facts: training", value=spent.steps, unit="CPU-s"),
        Figure(name=f"{num_facts} facts: checks while training", value=spent.checks, unit="CPU-s"),
        Figure(name=f"{num_facts} facts: gate", value=spent.gate, unit="CPU-s"),
    ]


if __name__ == "__main__":
    main()
