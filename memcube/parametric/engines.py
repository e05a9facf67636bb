"""What takes a training step: torch's AdamW in this process. ``StepEngine`` is the seam for an engine
over several workers, which is not built yet.

The trainer gives gradients of means over the whole step, whatever the number of workers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_MOMENTS = "optimizer.safetensors"


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


class StepEngine(Protocol):
    """Gradients in, changed weights out. ``module`` is what the forward pass must call."""

    @property
    def module(self) -> Any: ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one row's part of the step's loss."""
        ...

    def step(self, lr: float) -> None:
        """Change the weights by the gradients of all rows of all workers, and clear them."""
        ...

    def total(self, sums: Tensor) -> Tensor:
        """The sums of all workers, added."""
        ...

    def save(self, folder: Path) -> None:
        """Write the optimizer's state into a folder that exists."""
        ...

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote. The weights are in place already."""
        ...


class LocalEngine:
    """AdamW in this process, for one worker."""

    def __init__(self, model: torch.nn.Module, settings: StepSettings, workers: Workers) -> None:
        if workers.count != 1:
            raise ValueError("one worker alone; there is no engine for several yet")
        self._model = model
        self._clip = settings.clip
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=settings.lr, weight_decay=settings.weight_decay
        )

    @property
    def module(self) -> torch.nn.Module:
        return self._model

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> None:
        torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def total(self, sums: Tensor) -> Tensor:
        return sums

    def save(self, folder: Path) -> None:
        state = self._optimizer.state_dict()["state"]
        tensors = {
            f"{index}.{name}": value.contiguous()
            for index, values in state.items()
            for name, value in values.items()
        }
        save_file(tensors, folder / _MOMENTS)

    def load(self, folder: Path) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(folder / _MOMENTS).items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        full = self._optimizer.state_dict()
        full["state"] = state
        self._optimizer.load_state_dict(full)
