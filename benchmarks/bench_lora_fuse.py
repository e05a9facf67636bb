"""Two adapters merged by every method, beside one that is trained on the facts of both.

    python -m benchmarks.bench_lora_fuse            10 facts each, by the default recipe
    python -m benchmarks.bench_lora_fuse --short    2 facts each in a few steps: shows that it runs
    python -m benchmarks.bench_lora_fuse --draw     the plot anew from the results

Every merged adapter is asked, also those whose language or size the gate would refuse unasked. CPU time
is of this process, with one thread. ``--short`` prints its figures and writes nothing.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from peft.utils import get_peft_model_state_dict

from benchmarks.lora_facts import invented_facts
from benchmarks.plots import can_draw, svg
from benchmarks.results import RESULTS, ROOT, Figure, show, write_results
from memcube.activation.models import LoadedModel, load_model
from memcube.config import Config, ModelConfig
from memcube.parametric.attaching import attached
from memcube.parametric.dataset import ProbeKind, TrainingSet, build_training_set
from memcube.parametric.facts import Fact
from memcube.parametric.fusing import FuseMethod, FuseSettings, Parent, fuse_and_judge
from memcube.parametric.gate import Gate
from memcube.parametric.judgement import GateReport, Thresholds, decide, share
from memcube.parametric.limits import AdapterLimits
from memcube.parametric.recipe import Recipe
from memcube.parametric.replay import UNRELATED
from memcube.parametric.training import AdapterTrainer
from memcube.parametric.weights import AdapterWeights, encode

NAME = "lora_fuse"
PLOT = ROOT / "docs" / "lora-fuse.svg"

# Of the checks while training: above the gate's, as the wordings and people are fewer.
_ENOUGH = {ProbeKind.RECALL: 0.95, ProbeKind.REVERSE: 0.85}
_LEAK = 0.05


class _Trained(NamedTuple):
    weights: AdapterWeights
    num_steps: int
    cpu_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.draw:
        draw(json.loads((RESULTS / f"{NAME}.json").read_text())["details"], PLOT)
        return

    def load() -> LoadedModel:
        return load_model(ModelConfig(threads=1, dtype="float32"), Config().model_folder())

    recipe, settings = Recipe(), FuseSettings(ask_all=True, seed=args.seed)
    facts = invented_facts(4, 5, seed=args.seed)
    if args.short:
        recipe = Recipe(steps=4, decay_steps=2, check_steps=0)
        settings = FuseSettings(methods=(FuseMethod.SVD,), weights=(1.0,), ask_all=True)
        facts = invented_facts(2, 2, seed=args.seed)
    details = measure(load, facts, recipe, settings)
    figures = figures_of(details)
    if args.short:
        show(figures)
        return
    command = " ".join(["python -m benchmarks.bench_lora_fuse", *sys.argv[1:]])
    write_results(NAME, command, figures, **details)
    draw(details, PLOT)


def measure(
    load: Callable[[], LoadedModel],
    facts: Sequence[Fact],
    recipe: Recipe,
    settings: FuseSettings,
    *,
    unrelated: Sequence[str] = UNRELATED,
) -> dict[str, Any]:
    """Train on both halves of the facts and on all of them; merge the halves; ask all of them."""
    middle = len(facts) // 2
    halves = (tuple(facts[:middle]), tuple(facts[middle:]))
    if {f.subject for f in halves[0]} & {f.subject for f in halves[1]}:
        raise ValueError("the halves share a person")
    apart = [train(load(), half, recipe) for half in halves]
    joint = train(load(), facts, recipe)
    loaded = load()
    gate = Gate(loaded, unrelated=unrelated)
    since = time.process_time()
    joint_report = ask(loaded, gate, joint.weights, facts, seed=settings.seed)
    gate_s = time.process_time() - since
    since = time.process_time()
    parents = [
        Parent(name=name, weights=one.weights, facts=half)
        for name, one, half in zip(("left", "right"), apart, halves, strict=True)
    ]
    _, report = fuse_and_judge(
        loaded, parents, gate, settings=settings, judged=lambda a: print(a, a.recall, flush=True)
    )
    return {
        "num_facts": len(facts),
        "seed": settings.seed,
        "fused": report.figures(),
        "joint": joint_report.figures() | {"short": decide(joint_report, Thresholds()).short},
        "steps": {"apart": [one.num_steps for one in apart], "joint": joint.num_steps},
        "cpu_s": {
            "apart": [one.cpu_s for one in apart],
            "joint": joint.cpu_s,
            "gate": gate_s,
            "fused": time.process_time() - since,
        },
        "recipe": asdict(recipe),
    }


def train(loaded: LoadedModel, facts: Sequence[Fact], recipe: Recipe) -> _Trained:
    """An adapter of the facts, rounded as it would be kept. The model is taken over."""
    data = build_training_set(facts, seed=recipe.seed)
    since = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = AdapterTrainer(
            loaded, data, recipe, Path(folder), check=_is_enough(loaded, data, recipe)
        )
        num_steps = trainer.train().step
    spent = time.process_time() - since
    tensors = {
        name: value.detach().bfloat16()
        for name, value in get_peft_model_state_dict(trainer.model).items()
    }
    print(f"trained on {len(facts)} facts: {num_steps} steps, {spent:.0f} CPU-s", flush=True)
    weights = AdapterWeights.of_tensors(
        tensors, base=loaded.fingerprint, rank=recipe.rank, alpha=recipe.alpha
    )
    return _Trained(weights, num_steps, spent)


def _is_enough(
    loaded: LoadedModel, data: TrainingSet, recipe: Recipe
) -> Callable[[PeftModel], bool]:
    gate = Gate(loaded, unrelated=(), autocast=recipe.autocast)

    def check(model: PeftModel) -> bool:
        answers = gate.ask(model, data.early)
        found = {kind: share(answers, kind) or 0.0 for kind in (*_ENOUGH, ProbeKind.LEAK)}
        enough = all(found[kind] >= least for kind, least in _ENOUGH.items())
        return enough and found[ProbeKind.LEAK] <= _LEAK

    return check


def ask(
    loaded: LoadedModel, gate: Gate, weights: AdapterWeights, facts: Sequence[Fact], *, seed: int
) -> GateReport:
    """The gate's report of an adapter, of the probes that merged ones get."""
    probes = build_training_set(facts, seed=seed).probes
    size = len(encode(weights, AdapterLimits()))
    with attached(loaded, {"asked": weights}) as model:
        return gate.judge(model, probes, adapter_bytes=size)


def figures_of(details: Mapping[str, Any]) -> list[Figure]:
    """Recall of the parents, of the best merged adapter and of the one trained on all."""
    fused, joint = details["fused"], details["joint"]
    asked = [a for a in fused["attempts"] if a.get("recall") is not None]
    best = max(asked, key=lambda a: (a["recall"], -a["nll_rise"]))
    name = f"{best['method']} at {best['weight']:g}"
    alone = ", ".join(f"{100 * parent['recall']:.0f}" for parent in fused["parents"])
    own = ", ".join(f"{100 * recall:.0f}" for recall in best["own"])
    cpu_s = details["cpu_s"]
    return [
        Figure(
            name=f"best merged ({name}): recall of all facts",
            value=100 * best["recall"],
            unit="%",
            beside=f"of each half {own}; the parents alone {alone}",
        ),
        Figure(
            name=f"best merged ({name}): loss on unrelated text, rise",
            value=100 * best["nll_rise"],
            unit="%",
        ),
        Figure(
            name="merged adapters that pass the gate",
            value=sum(attempt["passed"] for attempt in fused["attempts"]),
            unit="",
            beside=f"of {len(fused['attempts'])}",
        ),
        Figure(name="trained jointly: recall", value=100 * joint["recall"], unit="%"),
        Figure(
            name="trained jointly: loss on unrelated text, rise",
            value=100 * joint["nll_rise"],
            unit="%",
        ),
        Figure(
            name="joint training",
            value=cpu_s["joint"],
            unit="CPU-s",
            beside=f"merging and asking {len(fused['attempts'])} times: {cpu_s['fused']:.0f}",
        ),
    ]


def draw(details: Mapping[str, Any], path: Path) -> None:
    """Recall by what the language lost, of all that was asked, with the gate's limits."""
    if not can_draw(path):
        return
    limits = Thresholds()
    marks = dict(zip(FuseMethod, "osD^v<", strict=True))
    with svg(path, (7, 4.5)) as (_, axes):
        for attempt in details["fused"]["attempts"]:
            if attempt.get("recall") is None:
                continue
            method = FuseMethod(attempt["method"])
            at = (100 * attempt["nll_rise"], 100 * attempt["recall"])
            axes.plot(*at, marks[method], color=f"C{list(FuseMethod).index(method)}")
            axes.annotate(
                f"{method} at {attempt['weight']:g}",
                at,
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=8,
            )
        joint = details["joint"]
        at = (100 * joint["nll_rise"], 100 * joint["recall"])
        axes.plot(*at, "*", color="black", markersize=14)
        axes.annotate("trained jointly", at, xytext=(7, -12), textcoords="offset points")
        for parent in details["fused"]["parents"]:
            axes.axhline(100 * parent["recall"], color="grey", linewidth=0.8, linestyle=":")
        axes.axhline(100 * limits.recall, color="tab:red", linewidth=0.8, linestyle="--")
        axes.axvline(100 * limits.nll_rise, color="tab:red", linewidth=0.8, linestyle="--")
        axes.set_xscale("symlog", linthresh=100 * limits.nll_rise)
        axes.set_ylim(-3, 103)
        axes.set_xlabel("rise of the loss on unrelated text, % (red: the gate's limits)")
        axes.set_ylabel("recall of all facts, % (dotted: parents, of their own)")
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
