"""One run of the parametric tier's benchmarks: an adapter trained, judged, and what that cost."""

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import Figure, commit
from memcube.activation.models import load_model
from memcube.config import Config, ModelConfig
from memcube.parametric.dataset import DataSettings, ProbeKind, TrainingSet
from memcube.parametric.gate import Gate
from memcube.parametric.judgement import GateReport, Thresholds, decide, share
from memcube.parametric.recipe import Recipe
from memcube.parametric.training import Progress
from memcube.parametric.work import Phase, TrainingWork, WorkProgress, perform

_SPENT = "spent-"


@dataclass(slots=True)
class Spent:
    """CPU seconds: of the steps, of the checks while training, of the gate."""

    steps: float = 0.0
    checks: float = 0.0
    gate: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """``base_recall`` is the base model's on the same probes; None if it wasn't asked."""

    report: GateReport
    base_recall: float | None
    recipe: Recipe
    num_steps: int
    spent: Spent
    wall_s: float

    def details(self, limits: Thresholds) -> dict[str, Any]:
        """All but the answers, for a result file."""
        return {
            **self.report.figures(),
            "base_recall": self.base_recall,
            "num_steps": self.num_steps,
            "cpu_s": asdict(self.spent),
            "wall_s": self.wall_s,
            "short": decide(self.report, limits).short,
            "recipe": asdict(self.recipe),
            "commit": commit(),
        }


def run(
    data: TrainingSet, recipe: Recipe, *, ask_base: bool = False, folder: Path | None = None
) -> Run:
    """Train on one thread and judge; progress and wrong answers are printed. A run that was cut off
    goes on from its folder, and what it had spent until the last checkpoint is counted."""
    with tempfile.TemporaryDirectory() as temporary:
        return _run(data, recipe, ask_base, folder or Path(temporary))


def _run(data: TrainingSet, recipe: Recipe, ask_base: bool, folder: Path) -> Run:
    began = time.monotonic()
    earlier = _spent_before(folder)
    loaded = load_model(ModelConfig(threads=1, dtype="float32"), Config().model_folder())
    base_recall = None
    if ask_base:
        asked = [probe for probe in data.probes if probe.kind is ProbeKind.RECALL]
        gate = Gate(loaded, unrelated=())
        base_recall = share(gate.ask(loaded.model, asked), ProbeKind.RECALL)
    spent = Spent(steps=earlier.steps_s)
    start = since = time.process_time()

    def told(progress: WorkProgress) -> None:
        nonlocal since
        now = time.process_time()
        if progress.phase is Phase.CHECKING:
            spent.checks += now - since
        elif progress.phase is Phase.TRAINING:
            spent.steps += now - since
        else:
            return  # all since the last step is the gate's
        since = now
        if progress.phase is Phase.TRAINING and progress.training is not None:
            show(progress.training)

    def show(step: Progress) -> None:
        if step.step % recipe.checkpoint_steps == 0 or step.step == step.num_steps:
            wall_s = earlier.wall_s + time.monotonic() - began
            before = _Before(step.step, spent.steps, wall_s)
            (folder / f"{_SPENT}{step.step}.json").write_text(json.dumps(before))
        if step.step % 10 == 0:
            print(
                f"{step.step} of {step.num_steps}: answers {step.answer_loss:.3f}, "
                f"KL {step.kl:.4f}, {since - start:.0f} CPU-s",
                flush=True,
            )

    work = TrainingWork(data=data, recipe=recipe)
    worked = perform(work, loaded, folder, progress=told)
    spent.gate = time.process_time() - since
    assert worked.report is not None
    for answer in worked.report.answers:
        if answer.holds == (answer.kind is ProbeKind.LEAK):
            print(f"{answer.kind}: {answer.question} -> {answer.said}")
    return Run(
        report=worked.report,
        base_recall=base_recall,
        recipe=recipe,
        num_steps=worked.step,
        spent=spent,
        wall_s=earlier.wall_s + time.monotonic() - began,
    )


class _Before(NamedTuple):
    """What a run had spent when it had taken so many steps."""

    step: int = 0
    steps_s: float = 0.0
    wall_s: float = 0.0


def _spent_before(folder: Path) -> _Before:
    """What was spent until the folder's last checkpoint."""
    steps = [int(path.name.rpartition("-")[2]) for path in folder.glob("steps/step-*")]
    path = folder / f"{_SPENT}{max(steps, default=0)}.json"
    return _Before(*json.loads(path.read_text())) if path.exists() else _Before()


def cost(what: str, found: Run) -> list[Figure]:
    """The figures of size, CPU and wall time."""
    return [
        Figure(
            name=f"{what}: adapter", value=found.report.adapter_bytes / 1e6, unit="MB", goal="<= 10"
        ),
        Figure(
            name=f"{what}: training, {found.num_steps} steps", value=found.spent.steps, unit="CPU-s"
        ),
        Figure(name=f"{what}: gate", value=found.spent.gate, unit="CPU-s"),
        Figure(name=f"{what}: training and gate, wall", value=found.wall_s, unit="s"),
    ]


def settings_of(given: dict[str, Any]) -> DataSettings:
    """The settings of a training set, from those given on the command line."""
    return DataSettings(**given.get("data", {}))
