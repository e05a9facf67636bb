"""Training of one adapter: LoRA by PEFT, over packed rows, held to the base model by a KL term.

``AdapterTrainer`` needs neither Ray nor DeepSpeed; ``engines`` has the seam for several workers. All that a
step does follows from the training set, the recipe and the step's number, so a run that goes on from a
checkpoint ends as the undisturbed one does. A checkpoint is a folder that appears by one rename; its
tensors are safetensors.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from memcube.activation.models import LoadedModel
from memcube.chat.prompt import DEFAULT_SYSTEM
from memcube.errors import BadRequest, Conflict, Corrupt
from memcube.ids import digest
from memcube.parametric.dataset import TrainingSet
from memcube.parametric.engines import LocalEngine, StepEngine, Workers
from memcube.parametric.packing import Encoder, PackedRow, pack

_CHECKPOINT = "step-"
_STATE = "state.json"
_WEIGHTS = "adapter.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train. The learning rate rises, stays, and falls to nothing over the last ``decay_steps``.

    The fall begins as soon as a check while training passes, and at the latest so that it ends with
    ``steps``. ``layers`` is the share of the model's layers, from the last down, that are adapted.
    ``kl_weight`` weighs the distance to the base model on general text.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | tuple[str, ...] = "all-linear"
    layers: float = 1.0
    lr: float = 1e-3
    warmup_steps: int = 5
    decay_steps: int = 30
    weight_decay: float = 0.0
    clip: float = 1.0
    steps: int = 120
    row_tokens: int = 320
    rows: int = 2
    replay_tokens: int = 80
    kl_weight: float = 1.0
    check_steps: int = 20
    first_check: int = 60
    checkpoint_steps: int = 20
    autocast: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.steps < 1 or self.rows < 1 or self.row_tokens < 1:
            raise BadRequest("rank, steps, rows and row_tokens are at least 1", "recipe")
        if not 0 < self.layers <= 1:
            raise BadRequest("a share above 0 and up to 1", "recipe.layers")
        if self.lr <= 0 or self.kl_weight < 0:
            raise BadRequest("lr is above 0 and kl_weight not below", "recipe")

    def rate(self, step: int, decay_from: int) -> float:
        """The learning rate of a step, when the fall begins at ``decay_from``."""
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))
        fall = max(0.0, 1 - max(0, step - decay_from) / max(1, self.decay_steps))
        return self.lr * rise * fall


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a step came to. ``tokens`` are all that this worker read so far, ``seconds`` how long all
    steps up to it take at the pace since the start or resume."""

    step: int
    num_steps: int
    loss: float
    answer_loss: float
    kl: float
    lr: float
    tokens: int
    seconds: float

    @property
    def eta_s(self) -> float:
        """The seconds left, if the steps to come are as long as those since the start or resume."""
        return self.seconds / max(1, self.step) * (self.num_steps - self.step)


class Outcome(StrEnum):
    """How a training ended."""

    DONE = "done"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """``history`` holds loss, answer loss and KL of each step."""

    outcome: Outcome
    step: int
    history: tuple[tuple[float, float, float], ...]


@dataclass(slots=True, kw_only=True)
class _State:
    step: int = 0
    tokens: int = 0
    decay_from: int = 0
    history: list[tuple[float, float, float]] = field(default_factory=list)


class MicroStep(NamedTuple):
    """Examples, by number, that share a row."""

    examples: tuple[int, ...]
    replay: tuple[int, ...]


class AdapterTrainer:
    """Trains one adapter over a model, which it takes over: its layers are wrapped.

    ``check`` is asked now and then whether the adapter is good enough already. ``should_stop`` is
    asked between steps; a run that was stopped goes on from where it was.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        data: TrainingSet,
        recipe: Recipe,
        folder: Path,
        *,
        system: str = DEFAULT_SYSTEM,
        workers: Workers | None = None,
        open_engine: Callable[..., StepEngine] = LocalEngine,
        progress: Callable[[Progress], None] = lambda _: None,
        check: Callable[[PeftModel], bool] = lambda _: False,
        should_stop: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._recipe = recipe
        self._folder = folder
        self._workers = workers or Workers()
        if recipe.rows % self._workers.count:
            raise BadRequest(
                f"{recipe.rows} rows a step can't be shared by {self._workers.count} workers",
                "recipe.rows",
            )
        self._progress, self._check, self._should_stop = progress, check, should_stop
        self._clock = clock
        encoder = Encoder(loaded.tokenizer, system=system)
        self._prefix = encoder.prefix
        self._examples = [encoder.segment(example) for example in data.examples]
        self._replay = [encoder.segment(example) for example in data.replay]
        self._plan = plan_steps(
            [len(segment.ids) for segment in self._examples],
            [len(segment.ids) for segment in self._replay],
            recipe,
            len(self._prefix),
        )
        self._identity = {
            "base": loaded.fingerprint,
            "data": data.hash,
            "recipe": digest("recipe", json.dumps(asdict(recipe), sort_keys=True)),
            "system": system,
            "workers": self._workers.count,
        }
        self.model = adapted(loaded.model, recipe)
        self._device = next(self.model.parameters()).device
        self._engine = open_engine(self.model, recipe, self._workers)

    def train(self) -> Trained:
        """Train to the end, going on from the last checkpoint in the folder if there is one.

        Raises:
            Conflict: the checkpoint is of another model, training set, recipe or number of workers.
            Corrupt: the checkpoint can't be read.
        """
        with self._lowered():
            return self._train()

    def _train(self) -> Trained:
        recipe, state = self._recipe, self._resume()
        began, first = self._clock(), state.step
        end = min(recipe.steps, state.decay_from + recipe.decay_steps)
        while state.step < end:
            if self._should_stop():
                self._save(state)
                return Trained(
                    outcome=Outcome.CANCELLED, step=state.step, history=tuple(state.history)
                )
            lr = recipe.rate(state.step, state.decay_from)
            found = self._step(state.step, lr, state)
            state.step += 1
            state.history.append(found)
            is_checked = recipe.check_steps and not state.step % recipe.check_steps
            if (
                is_checked
                and recipe.first_check <= state.step < state.decay_from
                and self._passes()
            ):
                state.decay_from = state.step
                end = min(recipe.steps, state.step + recipe.decay_steps)
            if not state.step % recipe.checkpoint_steps and state.step < end:
                self._save(state)
            elapsed = (self._clock() - began) / (state.step - first) * state.step
            self._progress(
                Progress(
                    step=state.step,
                    num_steps=end,
                    loss=found[0],
                    answer_loss=found[1],
                    kl=found[2],
                    lr=lr,
                    tokens=state.tokens,
                    seconds=elapsed,
                )
            )
        self._save(state)
        return Trained(outcome=Outcome.DONE, step=state.step, history=tuple(state.history))

    @contextmanager
    def _lowered(self) -> Iterator[None]:
        """The frozen weights in bfloat16 meanwhile, as to cast them in each step costs a third more."""
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        kept = [parameter.data for parameter in frozen]
        if self._recipe.autocast:
            for parameter in frozen:
                parameter.data = parameter.data.to(torch.bfloat16)
        try:
            yield
        finally:
            for parameter, data in zip(frozen, kept, strict=True):
                parameter.data = data

    def _passes(self) -> bool:
        self.model.eval()
        return self._check(self.model)

    def _step(self, step: int, lr: float, state: _State) -> tuple[float, float, float]:
        """Loss, answer loss and KL of a step, which is taken. All are means over the whole step."""
        recipe = self._recipe
        self.model.train()
        micros = self._plan[step]
        num_answer = sum(self._examples[i].num_learned for m in micros for i in m.examples)
        num_replay = sum(self._replay[i].num_learned for m in micros for i in m.replay)
        sums = torch.zeros(2, dtype=torch.float64)
        for micro in micros[self._workers.rank :: self._workers.count]:
            answers, kl = self._losses(micro)
            state.tokens += sum(len(self._examples[i].ids) for i in micro.examples)
            state.tokens += sum(len(self._replay[i].ids) for i in micro.replay)
            self._engine.backward(answers / num_answer + recipe.kl_weight * kl / max(1, num_replay))
            sums += torch.stack([answers.detach(), kl.detach()]).double().cpu()
        self._engine.step(lr)
        answer, kl_sum = self._engine.total(sums).tolist()
        answer, kl_mean = answer / num_answer, kl_sum / max(1, num_replay)
        return answer + recipe.kl_weight * kl_mean, answer, kl_mean

    def _losses(self, micro: MicroStep) -> tuple[Tensor, Tensor]:
        """The sums over a row of the answers' cross entropy and of the replay's KL to the base."""
        answers = [self._examples[i] for i in micro.examples]
        replay = [self._replay[i] for i in micro.replay]
        row = pack(self._prefix, [*answers, *replay], self._device)
        logits_KV = self._logits(self._engine.module, row)
        split = sum(segment.num_learned for segment in answers)
        loss = F.cross_entropy(logits_KV[:split], row.targets_K[:split], reduction="sum")
        if not replay or not self._recipe.kl_weight:
            return loss, loss.new_zeros(())
        with torch.no_grad(), self.model.disable_adapter():
            base_KV = self._logits(self._engine.module, pack(self._prefix, replay, self._device))
        kl = F.kl_div(
            F.log_softmax(logits_KV[split:], -1),
            F.log_softmax(base_KV, -1),
            reduction="sum",
            log_target=True,
        )
        return loss, kl

    def _logits(self, module: Any, row: PackedRow) -> Tensor:
        on = self._device.type
        is_cast = self._recipe.autocast
        # PEFT would cast each layer's input to float32, only for autocast to cast it back.
        with (
            torch.autocast(on, torch.bfloat16, enabled=is_cast),
            disable_input_dtype_casting(self.model, active=is_cast),
        ):
            out = module(
                input_ids=row.ids_1T,
                position_ids=row.positions_1T,
                attention_mask=row.bias_11TT(torch.bfloat16 if is_cast else torch.float32),
                logits_to_keep=row.keep_K,
                use_cache=False,
            )
        return out.logits[0].float()

    # -- checkpoints

    def _save(self, state: _State) -> None:
        target = self._folder / f"{_CHECKPOINT}{state.step:06d}"
        partial = self._folder / f".{target.name}"
        if self._workers.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file(_trainable(self.model), partial / _WEIGHTS)
            text = json.dumps({"identity": self._identity, "state": asdict(state)})
            (partial / _STATE).write_text(text)
        self._engine.save(partial)
        if self._workers.rank == 0:
            for path in partial.iterdir():
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            for old in _checkpoints(self._folder)[:-2]:
                shutil.rmtree(old)

    def _resume(self) -> _State:
        found = _checkpoints(self._folder)
        if not found:
            return _State(decay_from=max(0, self._recipe.steps - self._recipe.decay_steps))
        try:
            saved = json.loads((found[-1] / _STATE).read_text())
            weights = load_file(found[-1] / _WEIGHTS)
            identity, values = saved["identity"], saved["state"]
            state = _State(**values | {"history": [tuple(step) for step in values["history"]]})
        except (OSError, ValueError, KeyError, TypeError) as broken:
            raise Corrupt(str(found[-1]), f"the checkpoint can't be read: {broken}") from None
        if others := [key for key, value in self._identity.items() if identity.get(key) != value]:
            raise Conflict(
                f"the checkpoint {found[-1].name} is of another {', '.join(others)}; "
                "give the training a new folder to begin anew"
            )
        own = _trainable(self.model)
        for name, value in weights.items():
            own[name].copy_(value)
        self._engine.load(found[-1])
        return state


def adapted(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """The model with a fresh adapter of a recipe; its first weights follow from the seed."""
    num_layers = model.config.get_text_config().num_hidden_layers
    num_adapted = max(1, round(recipe.layers * num_layers))
    layers = None if recipe.layers == 1 else list(range(num_layers - num_adapted, num_layers))
    targets = recipe.targets if isinstance(recipe.targets, str) else list(recipe.targets)
    if layers is not None and targets == "all-linear":  # PEFT takes layers with names alone
        targets = sorted(
            {
                name.rpartition(".")[2]
                for name, module in model.named_modules()
                if isinstance(module, torch.nn.Linear)
                and module is not model.get_output_embeddings()
            }
        )
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # pyright: ignore[reportArgumentType] - a float does as well
        target_modules=targets,
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def export_adapter(model: PeftModel, folder: Path) -> int:
    """Write the adapter as bfloat16 safetensors with PEFT's own configuration; its size in bytes.

    The model's own weights are rounded alike, so that what is judged next is what was written.
    """
    for value in _trainable(model).values():
        value.copy_(value.to(torch.bfloat16))
    tensors = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in get_peft_model_state_dict(model).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(model.peft_config["default"], inference_mode=True)
    config.save_pretrained(str(folder))
    path = folder / "adapter_model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path.stat().st_size


def plan_steps(
    example_tokens: Sequence[int], replay_tokens: Sequence[int], recipe: Recipe, prefix: int
) -> list[tuple[MicroStep, ...]]:
    """Which examples each step reads. Each pass takes all in an order of its own; a row is full when
    the next example would not fit it."""
    examples = _Passes(example_tokens, recipe.seed, "examples")
    replay = _Passes(replay_tokens, recipe.seed, "replay")
    with_replay = bool(replay_tokens) and recipe.replay_tokens > 0
    return [
        tuple(
            MicroStep(
                _filled(examples, recipe.row_tokens - prefix),
                _filled(replay, recipe.replay_tokens) if with_replay else (),
            )
            for _ in range(recipe.rows)
        )
        for _ in range(recipe.steps)
    ]


class _Passes:
    """Numbers with their sizes, pass after pass; the last taken can be put back."""

    def __init__(self, sizes: Sequence[int], seed: int, name: str) -> None:
        self._numbers = self._endless(sizes, seed, name)
        self._back: list[tuple[int, int]] = []

    def take(self) -> tuple[int, int]:
        return self._back.pop() if self._back else next(self._numbers)

    def put_back(self, item: tuple[int, int]) -> None:
        self._back.append(item)

    @staticmethod
    def _endless(sizes: Sequence[int], seed: int, name: str) -> Iterator[tuple[int, int]]:
        number = 0
        while True:
            order = list(range(len(sizes)))
            random.Random(digest("pass", name, seed, number)).shuffle(order)
            yield from ((index, sizes[index]) for index in order)
            number += 1


def _filled(source: _Passes, budget: int) -> tuple[int, ...]:
    taken: list[int] = []
    while True:
        index, size = source.take()
        if taken and size > budget:
            source.put_back((index, size))
            return tuple(taken)
        taken.append(index)
        budget -= size
        if budget <= 0:
            return tuple(taken)


def _trainable(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_CHECKPOINT}*"))
