"""A training from its set to an adapter that is judged: one piece of work, for whoever runs it.

All of its state lies in one folder: checkpoints below ``steps``, the adapter, the report. Each appears
whole or not at all, and ``perform`` goes on from what it finds there; two runs over one folder at once
are refused. With several workers all of them train, and the first exports and judges.
"""

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from memcube.activation.models import LoadedModel
from memcube.chat.prompt import DEFAULT_SYSTEM
from memcube.errors import BadRequest, Corrupt, Unavailable
from memcube.files import replace_file
from memcube.ids import digest
from memcube.parametric.checkpoints import begin, settle
from memcube.parametric.dataset import ProbeKind, TrainingSet
from memcube.parametric.engines import LocalEngine, OpenEngine, Workers
from memcube.parametric.gate import Gate
from memcube.parametric.judgement import GateReport
from memcube.parametric.recipe import Recipe
from memcube.parametric.replay import UNRELATED
from memcube.parametric.training import AdapterTrainer, Outcome, Progress, Sharing, export_adapter
from memcube.parametric.weights import AdapterWeights

_STEPS = "steps"
_ADAPTER = "adapter"
_TENSORS = "adapter_model.safetensors"
_LOCK = "lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Enough:
    """When a training may end before its steps are over: shares of the early probes. They are above
    the gate's, as the wordings and people are fewer."""

    recall: float = 0.95
    reverse: float = 0.85
    leak: float = 0.05

    def __post_init__(self) -> None:
        if not all(0 <= value <= 1 for value in (self.recall, self.reverse, self.leak)):
            raise BadRequest("shares from 0 to 1", "enough")

    def holds(self, shares: Mapping[ProbeKind, float]) -> bool:
        """Whether shares by kind suffice. A kind that isn't asked for is no obstacle."""
        return (
            ProbeKind.RECALL in shares
            and shares[ProbeKind.RECALL] >= self.recall
            and shares.get(ProbeKind.REVERSE, 1.0) >= self.reverse
            and shares.get(ProbeKind.LEAK, 0.0) <= self.leak
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingWork:
    """What to train and how to judge it. ``enough`` none trains all of the recipe's steps."""

    data: TrainingSet
    recipe: Recipe = field(default_factory=Recipe)
    unrelated: tuple[str, ...] = UNRELATED
    system: str = DEFAULT_SYSTEM
    enough: Enough | None = field(default_factory=Enough)


class Phase(StrEnum):
    """What a piece of work is at. Checks happen between steps, the judging when all are taken."""

    TRAINING = "training"
    CHECKING = "checking"
    JUDGING = "judging"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkProgress:
    """``done`` of ``total``: steps in training, probes otherwise. ``training`` is of the last step
    and ``early`` the shares of the last check; both none before the first since the start or resume."""

    phase: Phase
    done: int
    total: int
    training: Progress | None = None
    early: Mapping[ProbeKind, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Worked:
    """``history`` holds loss, answer loss and KL of each step. ``adapter`` is a folder as PEFT writes
    it, for the model of this fingerprint. Only the first worker has it and the report, and only if the
    work was not cancelled."""

    base: str
    outcome: Outcome
    step: int
    history: tuple[tuple[float, float, float], ...]
    report: GateReport | None = None
    adapter: Path | None = None


def perform(
    work: TrainingWork,
    loaded: LoadedModel,
    folder: Path,
    *,
    workers: Workers | None = None,
    open_engine: OpenEngine = LocalEngine,
    progress: Callable[[WorkProgress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Worked:
    """Train, export and judge; blocks until it is done or ``should_stop``. The model is taken over.

    Goes on from what the folder holds, and does nothing but read it if all is done.

    Raises:
        Conflict: the folder is of another model, training set or recipe.
        Corrupt: what lies there can't be read.
        Unavailable: another worker is gone, or another run works in the folder.
    """
    run = _Run(work, loaded, folder, workers or Workers(), progress, should_stop)
    folder.mkdir(parents=True, exist_ok=True)
    if run.workers.rank:
        return run.train(open_engine)
    with _alone(folder):
        trained = run.train(open_engine)
        return trained if trained.outcome is Outcome.CANCELLED else run.judge(trained)


def adapter_weights(folder: Path, *, base: str, recipe: Recipe) -> AdapterWeights:
    """The weights of an exported adapter, to be published. ``base`` is the model's fingerprint.

    Raises:
        Corrupt: the folder holds no adapter of this recipe.
    """
    try:
        return AdapterWeights.of_tensors(
            _tensors(folder), base=base, rank=recipe.rank, alpha=recipe.alpha
        )
    except ValueError as wrong:
        raise Corrupt(str(folder), f"no adapter of this recipe: {wrong}") from None


class _Stopped(Exception):
    """The judging was told to stop."""


class _Run:
    def __init__(
        self,
        work: TrainingWork,
        loaded: LoadedModel,
        folder: Path,
        workers: Workers,
        progress: Callable[[WorkProgress], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.workers = workers
        self._work = work
        self._loaded = loaded
        self._folder = folder
        self._progress = progress
        self._should_stop = should_stop
        self._last: Progress | None = None
        self._early: Mapping[ProbeKind, float] | None = None
        self._trainer: AdapterTrainer | None = None

    def train(self, open_engine: OpenEngine) -> Worked:
        work = self._work
        trainer = self._trainer = AdapterTrainer(
            self._loaded,
            work.data,
            work.recipe,
            self._folder / _STEPS,
            system=work.system,
            workers=self.workers,
            open_engine=open_engine,
            progress=self._stepped,
            check=self._is_enough,
            should_stop=self._should_stop,
        )
        trained = trainer.train()
        return Worked(
            base=self._loaded.fingerprint,
            outcome=trained.outcome,
            step=trained.step,
            history=trained.history,
        )

    def judge(self, trained: Worked) -> Worked:
        """Export and judge what is trained, as far as it isn't done yet."""
        work, trainer = self._work, self._trainer
        assert trainer is not None, "trained before"
        adapter = self._folder / _ADAPTER
        if not adapter.exists():
            partial = begin(adapter)
            export_adapter(trainer.model, partial)
            settle(partial, adapter)
        about = digest("report", json.dumps([trainer.identity, *_asked(work)], sort_keys=True))
        path = self._folder / f"report-{about[:16]}.json"
        report = _read_report(path)
        if report is None:
            _put(trainer.model, adapter)
            gate = Gate(self._loaded, unrelated=work.unrelated, system=work.system)
            try:
                report = gate.judge(
                    trainer.model,
                    work.data.probes,
                    adapter_bytes=(adapter / _TENSORS).stat().st_size,
                    asked=self._judged,
                )
            except _Stopped:
                return replace(trained, outcome=Outcome.CANCELLED)
            replace_file(path, report.to_json())
        return replace(trained, outcome=Outcome.DONE, report=report, adapter=adapter)

    def _tell(self, phase: Phase, done: int, total: int) -> None:
        told = WorkProgress(
            phase=phase, done=done, total=total, training=self._last, early=self._early
        )
        self._progress(told)

    def _stepped(self, progress: Progress) -> None:
        self._last = progress
        self._tell(Phase.TRAINING, progress.step, progress.num_steps)

    def _judged(self, done: int) -> None:
        if self._should_stop():
            raise _Stopped
        self._tell(Phase.JUDGING, done, len(self._work.data.probes))

    def _is_enough(self, model: PeftModel) -> bool:
        work, trainer = self._work, self._trainer
        if work.enough is None or not work.data.early:
            return False
        assert trainer is not None, "it asks"
        self._early = _early(
            self._loaded,
            model,
            work,
            trainer.sharing,
            asked=lambda done: self._tell(Phase.CHECKING, done, len(work.data.early)),
        )
        return work.enough.holds(self._early)


def _early(
    loaded: LoadedModel,
    model: PeftModel,
    work: TrainingWork,
    sharing: Sharing,
    *,
    asked: Callable[[int], None],
) -> dict[ProbeKind, float]:
    """The shares of the early probes that hold, by kind; each worker asks a part of them."""
    gate = Gate(loaded, unrelated=(), system=work.system, autocast=work.recipe.autocast)
    kinds = list(ProbeKind)
    counts = torch.zeros(2, len(kinds), dtype=torch.float64)
    part = work.data.early[sharing.rank :: sharing.count]
    for answer in gate.ask(model, part, asked=lambda done: asked(done * sharing.count)):
        counts[0, kinds.index(answer.kind)] += answer.holds
        counts[1, kinds.index(answer.kind)] += 1
    hold, asked_for = sharing.total(counts).tolist()
    return {kind: hold[i] / asked_for[i] for i, kind in enumerate(kinds) if asked_for[i]}


def _asked(work: TrainingWork) -> list[object]:
    """What a report depends on beside the adapter."""
    return [[asdict(probe) for probe in work.data.probes], list(work.unrelated)]


def _read_report(path: Path) -> GateReport | None:
    try:
        return GateReport.from_json(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as broken:
        raise Corrupt(str(path), f"can't be read: {broken}") from None


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(folder / _TENSORS)
    except (OSError, SafetensorError) as broken:
        raise Corrupt(str(folder), f"the adapter can't be read: {broken}") from None


def _put(model: PeftModel, adapter: Path) -> None:
    """The weights of a folder into the model: what is judged is what will be published."""
    outcome = set_peft_model_state_dict(model, _tensors(adapter))
    if outcome.unexpected_keys:
        raise Corrupt(str(adapter), "holds weights that are not this adapter's")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder; let go of at the latest when the process ends.

    Raises:
        Unavailable: another process holds it.
    """
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(f"another run works in {folder}", 5.0) from None
        yield
