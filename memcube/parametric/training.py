"""Training of one adapter: LoRA by PEFT, over packed rows, held to the base model by a KL term.

``AdapterTrainer`` needs neither Ray nor DeepSpeed; ``engines`` has the seam for several workers. All that a
step does follows from the training set, the recipe and the step's number, so a run that goes on from a
checkpoint (``checkpoints``) ends as the undisturbed one does. Several workers share each step's rows;
what one of them is told (to stop, that it is enough) all of them do after the same step.
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from memcube.activation.models import LoadedModel
from memcube.chat.prompt import DEFAULT_SYSTEM
from memcube.errors import BadRequest, Conflict, Corrupt, Unavailable
from memcube.ids import digest
from memcube.parametric import checkpoints
from memcube.parametric.casting import autocast, casts
from memcube.parametric.dataset import TrainingSet
from memcube.parametric.engines import LocalEngine, OpenEngine, StepEngine, Workers, trained
from memcube.parametric.packed_attention import attending
from memcube.parametric.packing import Encoder, PackedRow, Segment, pack
from memcube.parametric.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a step came to. ``tokens`` are all that were read so far, by all workers; ``seconds`` how
    long all steps up to it take at the pace since the start or resume."""

    step: int
    num_steps: int
    loss: float
    answer_loss: float
    kl: float
    lr: float
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

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


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a check may divide its work: this worker's part of it, and the sums over all of them."""

    rank: int
    count: int
    total: Callable[[Tensor], Tensor]


class AdapterTrainer:
    """Trains one adapter over a model, which it takes over: its layers are wrapped.

    ``check`` is asked now and then, by all workers after the same step, whether the adapter is good
    enough already: what the first worker finds counts, and ``sharing`` lets them divide the work.
    ``should_stop`` is asked between steps, of each worker; a run that was stopped goes on from where
    it was. The folder is one that all workers see; the first writes.
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
        open_engine: OpenEngine = LocalEngine,
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
        self._told = [
            encoder.told(example) if recipe.distil_weight else None for example in data.examples
        ]
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
        }
        self._base = loaded.model
        self.model = adapted(self._base, recipe)
        self._device = next(self.model.parameters()).device
        self._open_engine = open_engine
        self._engine: StepEngine | None = None
        self._in_blocks = self._agrees()

    @property
    def identity(self) -> dict[str, str]:
        """What the outcome depends on; a checkpoint of another is refused."""
        return dict(self._identity)

    @property
    def sharing(self) -> Sharing:
        """For ``check`` alone, while it is asked."""
        engine = self._engine
        assert engine is not None, "no check is asked now"
        if engine.is_sharded:  # a forward pass takes all workers, so all ask the same
            return Sharing(0, 1, lambda sums: sums)
        return Sharing(self._workers.rank, self._workers.count, engine.total)

    def train(self) -> Trained:
        """Train to the end, going on from the last checkpoint in the folder if there is one.

        Raises:
            Conflict: the checkpoint is of another model, training set or recipe.
            Corrupt: the checkpoint can't be read.
            Unavailable: another worker is gone.
        """
        state, moments = self._resume()
        if state.step >= self._end(state):
            return _told(Outcome.DONE, state)
        with self._lowered(), attending(self._base, in_blocks=self._in_blocks):
            engine = self._open_engine(self.model, self._recipe, self._workers)
            self._engine = engine
            try:
                _agree(engine, state.step, self._workers.count)
                engine.load(moments)
                outcome = self._train(engine, state)
            except BaseException:
                engine.abort()
                raise
            finally:
                self._engine = None
            engine.close()
        return _told(outcome, state)

    def _end(self, state: _State) -> int:
        return min(self._recipe.steps, state.decay_from + self._recipe.decay_steps)

    def _train(self, engine: StepEngine, state: _State) -> Outcome:
        recipe = self._recipe
        began, first = self._clock(), state.step
        end = self._end(state)
        while state.step < end:
            if _any(engine, self._should_stop()):
                self._save(engine, state)
                return Outcome.CANCELLED
            lr = recipe.rate(state.step, state.decay_from)
            found = self._step(engine, lr, state)
            state.step += 1
            state.history.append(found)
            is_checked = recipe.check_steps and not state.step % recipe.check_steps
            if (
                is_checked
                and recipe.first_check <= state.step < state.decay_from
                and self._passes(engine)
            ):
                state.decay_from = state.step
                end = self._end(state)
            if not state.step % recipe.checkpoint_steps and state.step < end:
                self._save(engine, state)
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
        self._save(engine, state)
        return Outcome.DONE

    @contextmanager
    def _lowered(self) -> Iterator[None]:
        """The frozen weights in bfloat16 meanwhile, as to cast them in each step costs a third more."""
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        kept = [parameter.data for parameter in frozen]
        if casts(self._device.type, self._recipe.autocast):
            for parameter in frozen:
                parameter.data = parameter.data.to(torch.bfloat16)
        try:
            yield
        finally:
            for parameter, data in zip(frozen, kept, strict=True):
                parameter.data = data

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether attention in blocks is what this model computes; some have one of their own."""
        row = pack(self._prefix, [*self._examples[:2], *self._replay[:2]], self._device)
        self.model.eval()
        with self.model.disable_adapter():
            own_KV = self._logits(self.model, row, cast=False)
            with attending(self._base, in_blocks=True):
                found_KV = self._logits(self.model, row, cast=False)
        return bool((own_KV - found_KV).abs().mean() <= 1e-2 * own_KV.abs().mean())

    def _passes(self, engine: StepEngine) -> bool:
        self.model.eval()
        found = self._check(self.model)
        return _any(engine, found and self._workers.rank == 0)

    def _step(self, engine: StepEngine, lr: float, state: _State) -> tuple[float, float, float]:
        """Loss, answer loss and KL of a step, which is taken. All are means over the whole step."""
        recipe = self._recipe
        self.model.train()
        micros = self._plan[state.step]
        num_answer = sum(self._examples[i].num_learned for m in micros for i in m.examples)
        num_replay = sum(self._replay[i].num_learned for m in micros for i in m.replay)
        told = (self._told[i] for m in micros for i in m.examples)
        num_told = sum(segment.num_learned for segment in told if segment is not None)
        weights = torch.tensor(
            [
                1 / num_answer,
                recipe.kl_weight / max(1, num_replay),
                recipe.distil_weight / max(1, num_told),
            ],
            dtype=torch.float64,
        )
        sums = torch.zeros(3, dtype=torch.float64)
        for micro in micros[self._workers.rank :: self._workers.count]:
            losses = self._losses(engine, micro)
            engine.backward(losses @ weights.to(losses))
            sums += losses.detach().double().cpu()
        engine.step(lr)
        sums = engine.total(sums)
        state.tokens += sum(len(self._examples[i].ids) for m in micros for i in m.examples)
        state.tokens += sum(len(self._replay[i].ids) for m in micros for i in m.replay)
        answer, kl = sums[0].item() / num_answer, sums[1].item() / max(1, num_replay)
        return float(sums @ weights), answer, kl

    def _losses(self, engine: StepEngine, micro: MicroStep) -> Tensor:
        """The sums over a row: the answers' cross entropy, the replay's KL to the base, and the answers' to the
        base that is told the memories."""
        answers = [self._examples[i] for i in micro.examples]
        replay = [self._replay[i] for i in micro.replay]
        row = pack(self._prefix, [*answers, *replay], self._device)
        logits_KV = self._logits(engine.module, row)
        split = sum(segment.num_learned for segment in answers)
        loss = F.cross_entropy(logits_KV[:split], row.targets_K[:split], reduction="sum")
        none = loss.new_zeros(())
        kl = self._from_base(engine, replay, logits_KV[split:]) if self._recipe.kl_weight else none
        distilled = (
            self._distilled(engine, micro, logits_KV) if self._recipe.distil_weight else none
        )
        return torch.stack([loss, kl, distilled])

    def _distilled(self, engine: StepEngine, micro: MicroStep, logits_KV: Tensor) -> Tensor:
        places: list[int] = []
        told: list[Segment] = []
        at = 0
        for i in micro.examples:
            size = self._examples[i].num_learned
            if (segment := self._told[i]) is not None:
                places += range(at, at + size)
                told.append(segment)
            at += size
        if told:
            return self._from_base(engine, told, logits_KV[places])
        # Workers whose weights are in parts pass as often as each other: this row passes for nothing.
        first = self._examples[micro.examples[0]]
        return 0 * self._from_base(engine, [first], logits_KV[: first.num_learned])

    def _from_base(
        self, engine: StepEngine, segments: Sequence[Segment], logits_KV: Tensor
    ) -> Tensor:
        """The sum over what is learned of these segments of the KL to the base model, which reads them."""
        if not segments:
            return logits_KV.new_zeros(())
        with torch.no_grad(), self.model.disable_adapter():
            base_KV = self._logits(engine.module, pack(self._prefix, segments, self._device))
        return F.kl_div(
            F.log_softmax(logits_KV, -1),
            F.log_softmax(base_KV, -1),
            reduction="sum",
            log_target=True,
        )

    def _logits(self, module: Any, row: PackedRow, *, cast: bool = True) -> Tensor:
        on = self._device.type
        is_cast = cast and casts(on, self._recipe.autocast)
        # PEFT would cast each layer's input to float32, only for autocast to cast it back.
        with (
            autocast(on, is_cast),
            disable_input_dtype_casting(self.model, active=is_cast),
        ):
            out = module(
                input_ids=row.ids_1T,
                position_ids=row.positions_1T,
                attention_mask=row.bias_11TT(torch.bfloat16 if is_cast else torch.float32),
                logits_to_keep=row.keep_K,
                use_cache=False,
                memcube_blocks=row.blocks,
            )
        return out.logits[0].float()

    # -- checkpoints

    def _save(self, engine: StepEngine, state: _State) -> None:
        weights, moments = engine.weights(), engine.moments()
        if self._workers.rank == 0:
            about = {"identity": self._identity, "state": asdict(state)}
            checkpoints.write(self._folder, state.step, about, weights, moments)

    def _resume(self) -> tuple[_State, Mapping[str, Tensor]]:
        found = checkpoints.read_last(self._folder)
        if found is None:
            decay_from = max(0, self._recipe.steps - self._recipe.decay_steps)
            return _State(decay_from=decay_from), {}
        try:
            identity, values = found.about["identity"], found.about["state"]
            state = _State(**values | {"history": [tuple(step) for step in values["history"]]})
            others = [key for key, value in self._identity.items() if identity.get(key) != value]
        except (AttributeError, KeyError, TypeError) as broken:
            raise Corrupt(str(found.path), f"no checkpoint of a training: {broken}") from None
        if others:
            raise Conflict(
                f"the checkpoint {found.path.name} is of another {', '.join(others)}; "
                "give the training a new folder to begin anew"
            )
        own = _trainable(self.model)
        if own.keys() != found.weights.keys():
            raise Corrupt(str(found.path), "its weights are not those of this adapter")
        for name, value in found.weights.items():
            own[name].copy_(value)
        return state, found.moments


def _agree(engine: StepEngine, step: int, num_workers: int) -> None:
    steps = torch.tensor([step, step * step], dtype=torch.float64)
    if engine.total(steps).tolist() != [step * num_workers, step * step * num_workers]:
        raise Unavailable("the workers found other checkpoints than each other in the folder")


def _any(engine: StepEngine, flag: bool) -> bool:
    """Whether any worker says so; all of them learn it."""
    return bool(engine.total(torch.tensor([float(flag)])).item())


def _told(outcome: Outcome, state: _State) -> Trained:
    return Trained(outcome=outcome, step=state.step, history=tuple(state.history))


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
    return {name: value.detach() for name, value in trained(model).items()}
