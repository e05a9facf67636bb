"""What takes a training step: torch's AdamW in this process, or DeepSpeed over several workers
(``deepspeed_engine``), behind one seam.

The trainer gives gradients of means over the whole step, whatever the number of workers. What an engine
keeps between steps it tells by the parameters' names and in full, so that a checkpoint doesn't say
which engine wrote it, nor how many workers there were.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from memcube.errors import BadRequest

STEPS = "steps"
"""The key of the number of steps taken, among what an optimizer keeps."""
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Workers:
    """Which worker this is, and of how many."""

    rank: int = 0
    count: int = 1


class StepSettings(Protocol):
    """What an engine reads of a recipe."""

    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def clip(self) -> float: ...
    @property
    def autocast(self) -> bool: ...


class StepEngine(Protocol):
    """Gradients in, changed weights out. ``module`` is what the forward pass must call.

    Every worker calls every method, in the same order.
    """

    @property
    def module(self) -> Any: ...

    @property
    def is_sharded(self) -> bool:
        """Whether a forward pass takes all workers, as each holds a part of the weights."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one row's part of the step's loss."""
        ...

    def step(self, lr: float) -> None:
        """Change the weights by the gradients of all rows of all workers, and clear them."""
        ...

    def total(self, sums: Tensor) -> Tensor:
        """The sums of all workers, added."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The weights that are trained, in full, by name."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """What the optimizer keeps, in full: ``NAME.exp_avg``, ``NAME.exp_avg_sq`` and ``STEPS``.
        Empty before the first step."""
        ...

    def load(self, moments: Mapping[str, Tensor]) -> None:
        """Go on from what ``moments`` told. The weights were in place when the engine was opened."""
        ...

    def close(self) -> None:
        """Leave the model whole and plain, and the other workers."""
        ...

    def abort(self) -> None:
        """Leave without waiting for the others, of whom one may be gone."""
        ...


class OpenEngine(Protocol):
    """Opens an engine over a model whose weights are in place."""

    def __call__(
        self, model: torch.nn.Module, settings: StepSettings, workers: Workers, /
    ) -> StepEngine: ...


class LocalEngine:
    """AdamW in this process, for one worker."""

    is_sharded = False

    def __init__(self, model: torch.nn.Module, settings: StepSettings, workers: Workers) -> None:
        if workers.count != 1:
            raise BadRequest(
                f"torch alone trains with one worker, not {workers.count}; several take deepspeed",
                "training.engine",
            )
        self._model = model
        self._clip = settings.clip
        self._named = trained(model)
        self._optimizer = adamw(self._named, settings)

    @property
    def module(self) -> torch.nn.Module:
        return self._model

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> None:
        torch.nn.utils.clip_grad_norm_(self._named.values(), self._clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def total(self, sums: Tensor) -> Tensor:
        return sums

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._named.items()}

    def moments(self) -> dict[str, Tensor]:
        return plain_moments(self._optimizer, self._named)

    def load(self, moments: Mapping[str, Tensor]) -> None:
        load_plain(self._optimizer, self._named, moments)

    def close(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def abort(self) -> None:
        self.close()


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def adamw(
    parameters: Mapping[str, torch.nn.Parameter], settings: StepSettings
) -> torch.optim.AdamW:
    """The optimizer that every engine takes its steps with."""
    return torch.optim.AdamW(
        parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay
    )


def plain_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, Tensor]:
    """``StepEngine.moments`` of an optimizer that holds the parameters as they are."""
    told: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if state := optimizer.state.get(parameter):
            told |= {f"{name}.{key}": state[key].contiguous() for key in MOMENTS}
            told[STEPS] = state["step"].reshape(1)
    return told


def load_plain(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    moments: Mapping[str, Tensor],
) -> None:
    """What ``plain_moments`` told, back into an optimizer."""
    if not moments:
        return
    for name, parameter in parameters.items():
        kept = {key: moments[f"{name}.{key}"].to(parameter.device, copy=True) for key in MOMENTS}
        optimizer.state[parameter] = {"step": moments[STEPS][0].clone(), **kept}


def engine_name(wanted: Literal["auto", "torch", "deepspeed"]) -> Literal["torch", "deepspeed"]:
    """Which engine is meant; ``auto`` is DeepSpeed where it is installed.

    Raises:
        BadRequest: DeepSpeed is asked for by name and isn't installed.
    """
    is_there = importlib.util.find_spec("deepspeed") is not None
    if wanted == "deepspeed" and not is_there:
        raise BadRequest(
            "DeepSpeed isn't installed: pip install 'memcube[train]'", "training.engine"
        )
    if wanted == "auto":
        return "deepspeed" if is_there else "torch"
    return wanted
