"""Train and judge one recipe: python -m benchmarks.try_recipe NAME '{"recipe": {...}, "data": {...}}'

One line of figures goes to ``--log`` as JSON.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.lora_facts import invented_facts
from memcube.activation.models import load_model
from memcube.config import Config, ModelConfig
from memcube.parametric.dataset import DataSettings, ProbeKind, build_training_set
from memcube.parametric.gate import Gate, Thresholds, decide, share
from memcube.parametric.replay import UNRELATED
from memcube.parametric.training import AdapterTrainer, Progress, Recipe, export_adapter


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("settings", nargs="?", default="{}")
    parser.add_argument("--people", type=int, default=5)
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("/tmp/recipes.jsonl"))
    args = parser.parse_args()
    given = json.loads(args.settings)
    recipe, settings = Recipe(**given.get("recipe", {})), DataSettings(**given.get("data", {}))
    loaded = load_model(ModelConfig(threads=1, dtype="float32"), Config().model_folder())
    facts = invented_facts(args.people, args.each, seed=args.seed)
    data = build_training_set(facts, settings=settings, seed=args.seed)
    print(f"{len(data.examples)} examples, {len(data.probes)} probes, {len(data.early)} early")
    quick = Gate(loaded, unrelated=UNRELATED[:1], autocast=True)
    began, spent = time.monotonic(), time.process_time()
    in_checks = 0.0

    def check(model) -> bool:
        nonlocal in_checks
        start = time.process_time()
        answers = quick.ask(model, data.early)
        found = {str(kind): share(answers, kind) for kind in ProbeKind}
        in_checks += time.process_time() - start
        print("check", found, flush=True)
        return (
            (found["recall"] or 0) >= 0.95
            and (found["reverse"] or 0) >= 0.85
            and (found["leak"] or 0) <= 0.05
        )

    def show(progress: Progress) -> None:
        if progress.step % 10 == 0 or progress.step == 1:
            print(
                f"{progress.step:4} loss {progress.answer_loss:.4f} kl {progress.kl:.4f} "
                f"lr {progress.lr:.2e} tokens {progress.tokens} {time.process_time() - spent:.0f} CPU-s",
                flush=True,
            )

    with tempfile.TemporaryDirectory() as folder:
        trainer = AdapterTrainer(loaded, data, recipe, Path(folder), check=check, progress=show)
        trained = trainer.train()
        size = export_adapter(trainer.model, Path(folder) / "out")
    training_s = time.process_time() - spent - in_checks
    report = Gate(loaded, unrelated=UNRELATED).judge(trainer.model, data.probes, adapter_bytes=size)
    decision = decide(report, Thresholds())
    for answer in report.answers:
        if answer.holds == (answer.kind is ProbeKind.LEAK):
            print(f"  {answer.kind}: {answer.question} -> {answer.said!r} ({answer.expected})")
    figures = {
        "name": args.name,
        "seed": args.seed,
        "facts": len(facts),
        "recall": report.recall,
        "reverse": report.reverse,
        "leak": report.leak,
        "refused": report.refused,
        "base_nll": report.base_nll,
        "nll_rise": report.nll_rise,
        "bytes": size,
        "steps": trained.step,
        "train_cpu_s": round(training_s),
        "check_cpu_s": round(in_checks),
        "cpu_s": round(time.process_time() - spent),
        "wall_s": round(time.monotonic() - began),
        "passed": decision.passed,
        "recipe": asdict(recipe),
        "data": asdict(settings),
    }
    print(json.dumps(figures))
    print(decision)
    with args.log.open("a") as log:
        log.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
