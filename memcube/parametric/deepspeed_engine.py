"""Training steps by DeepSpeed: ZeRO 0 to 3 over several workers, gloo on CPUs and nccl on GPUs.

DeepSpeed looks for MPI, builds operators with a compiler and casts as it sees fit, unless it is told
otherwise: all that is told here. The workers meet at a store of torch, and no launcher is needed. What
is saved is whole tensors by name, not DeepSpeed's own checkpoint, which is pickled and can be read by as
many workers only as wrote it.
"""

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from memcube.errors import BadRequest, Conflict, Unavailable
from memcube.parametric.casting import autocast
from memcube.parametric.engines import (
    MOMENTS,
    STEPS,
    StepSettings,
    Workers,
    adamw,
    load_plain,
    plain_moments,
    trained,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedOpener:
    """Opens the engine; an ``OpenEngine``. ``address`` is the host and port of the store where the
    workers meet; one worker alone needs none. ``host`` is this worker's own address, by which the
    others reach it. ``timeout_s`` bounds every wait for another worker.

    Raises Unavailable where the others don't come in time.
    """

    zero_stage: int = 1
    address: tuple[str, int] | None = None
    host: str = "127.0.0.1"
    timeout_s: float = 60.0
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.zero_stage <= 3:
            raise BadRequest("ZeRO has stages 0 to 3", "training.zero_stage")

    def __call__(
        self, model: nn.Module, settings: StepSettings, workers: Workers
    ) -> "DeepSpeedEngine":
        if workers.count > 1 and self.address is None:
            raise BadRequest("several workers need an address to meet at", "training.workers")
        return DeepSpeedEngine(model, settings, workers, self)


def open_meeting_place(host: str, timeout_s: float) -> tuple[TCPStore, int]:
    """A store for workers to meet at, served by this process as long as it is kept, and its port, which
    the system chooses.

    The socket is made here, as torch would listen on all addresses, to whoever comes.
    """
    listening = socket.create_server((host, 0), backlog=128)
    port = listening.getsockname()[1]
    store = TCPStore(
        host,
        port,
        None,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    return store, port


def interface_of(host: str) -> str | None:
    """The network interface that has an address; None if none of this machine has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            return name
    return None


class DeepSpeedEngine:
    """Steps taken together with the other workers. One at a time in a process."""

    def __init__(
        self, model: nn.Module, settings: StepSettings, workers: Workers, opener: DeepSpeedOpener
    ) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._workers = workers
        self._stage = opener.zero_stage
        self._named = trained(model)
        self._session = _Session.open(self._device, workers, opener)
        try:
            import deepspeed

            with _together():
                engine, *_ = deepspeed.initialize(
                    model=_Forward(model, self._device.type, settings.autocast),
                    optimizer=adamw(self._named, settings),
                    config=_config(opener.zero_stage, settings, workers),
                    dist_init_required=False,
                )
        except BaseException:
            self._session.abort()
            raise
        self._engine: Any = engine

    @property
    def module(self) -> Any:
        return self._engine

    @property
    def is_sharded(self) -> bool:
        return self._stage == 3

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed takes the mean over the workers, of what are parts of a sum.
        with _together():
            self._engine.backward(loss * self._workers.count, scale_wrt_gas=False)

    def step(self, lr: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        with _together():
            self._engine.step()

    def total(self, sums: Tensor) -> Tensor:
        if self._workers.count == 1:
            return sums
        added = sums.to(self._device, copy=True)
        with _together():
            dist.all_reduce(added)
        return added.to(sums.device)

    def weights(self) -> dict[str, Tensor]:
        if not self.is_sharded:
            return {name: parameter.detach() for name, parameter in self._named.items()}
        from deepspeed.utils import safe_get_full_fp32_param

        with _together():
            return {name: _found(safe_get_full_fp32_param(p)) for name, p in self._named.items()}

    def moments(self) -> dict[str, Tensor]:
        if self._stage == 0:
            return plain_moments(self._engine.optimizer, self._named)
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self._engine.optimizer.optimizer
        steps = [state["step"] for state in inner.state.values() if "step" in state]
        if not steps:
            return {}
        told = {STEPS: steps[0].reshape(1).cpu()}
        with _together():
            for name, parameter in self._named.items():
                for key in MOMENTS:
                    told[f"{name}.{key}"] = _found(safe_get_full_optimizer_state(parameter, key))
        return told

    def load(self, moments: Mapping[str, Tensor]) -> None:
        if not moments:
            return
        if self._stage == 0:
            load_plain(self._engine.optimizer, self._named, moments)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        # The optimizer holds flat parts of all parameters; their state is made at the first step.
        optimizer = self._engine.optimizer
        parts = (
            optimizer.fp32_partitioned_groups_flat
            if self.is_sharded
            else optimizer.single_partition_of_fp32_groups
        )
        for part in parts:
            optimizer.optimizer.state[part] = {
                "step": moments[STEPS][0].clone(),
                **{key: torch.zeros_like(part) for key in MOMENTS},
            }
        if not self.is_sharded:
            optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._named.items():
            for key in MOMENTS:
                value = moments[f"{name}.{key}"].to(self._device)
                safe_set_full_optimizer_state(parameter, value, key)

    def close(self) -> None:
        with _together():
            if self.is_sharded:
                _make_whole(self._model)
            self._engine.destroy()
            self._session.close()

    def abort(self) -> None:
        self._session.abort()


@contextmanager
def _together() -> Iterator[None]:
    """What goes wrong with another worker, as an error of ours.

    Raises:
        Unavailable: one is gone, or doesn't answer in time.
    """
    try:
        yield
    except RuntimeError as failed:
        # gloo raises no type of its own; its messages name its source files.
        if isinstance(failed, dist.DistError) or "gloo" in str(failed):
            told = str(failed).strip().splitlines()[0]
            raise Unavailable(f"another worker is gone or stands still ({told})") from None
        raise


def _found(value: Tensor | None) -> Tensor:
    assert value is not None, "DeepSpeed doesn't hold this parameter"
    return value.detach().clone()


class _Forward(nn.Module):
    """DeepSpeed turns off an autocast that it did not turn on, so it is turned on below it."""

    def __init__(self, model: nn.Module, device_type: str, autocast: bool) -> None:
        super().__init__()
        self.inner = model
        self._device_type = device_type
        self._autocast = autocast

    def forward(self, *given: Any, **named: Any) -> Any:
        with autocast(self._device_type, self._autocast):
            return self.inner(*given, **named)


def _config(stage: int, settings: StepSettings, workers: Workers) -> dict[str, Any]:
    return {
        "train_batch_size": workers.count,
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": settings.clip,
        # Stage 3 would replace torch's linear layer in this process, for good.
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def _make_whole(model: nn.Module) -> None:
    """Undo the cutting up of ZeRO-3, so that the model computes without the other workers."""
    from deepspeed.runtime.zero import GatheredParameters

    parameters = list(model.parameters())
    with GatheredParameters(parameters):
        whole = [parameter.data.clone() for parameter in parameters]
    for module in model.modules():
        if (plain := getattr(module, "_original_parameters", None)) is not None:
            module._parameters = plain
            del module._original_parameters
    for parameter, data in zip(parameters, whole, strict=True):
        parameter.data = data


@dataclass(slots=True)
class _Session:
    """This process's place among the workers, and what DeepSpeed reads of the environment."""

    folder: str
    before: dict[str, str | None] = field(default_factory=dict)

    @classmethod
    def open(cls, device: torch.device, workers: Workers, opener: DeepSpeedOpener) -> "_Session":
        if dist.is_initialized():
            raise Conflict("this process trains already")
        session = cls(tempfile.mkdtemp(prefix="memcube-torch-"))
        host, port = opener.address or ("127.0.0.1", 0)
        if (name := interface_of(opener.host)) is not None:
            session._set({"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name})
        session._set(
            {
                "DS_ACCELERATOR": device.type,
                # Several processes that build into one folder wait for each other's locks.
                "TORCH_EXTENSIONS_DIR": session.folder,
                # Without all five DeepSpeed looks for MPI.
                "RANK": str(workers.rank),
                "LOCAL_RANK": str(opener.local_rank),
                "WORLD_SIZE": str(workers.count),
                "MASTER_ADDR": host,
                "MASTER_PORT": str(port),
            }
        )
        try:
            _join(device, workers, opener)
            _prepare(device)
        except BaseException:
            session.abort()
            raise
        return session

    def _set(self, values: Mapping[str, str]) -> None:
        for name, value in values.items():
            self.before[name] = os.environ.get(name)
            os.environ[name] = value

    def close(self) -> None:
        """Leave when all leave."""
        if dist.is_initialized():
            dist.barrier()
        self.abort()

    def abort(self) -> None:
        if dist.is_initialized():
            _leave()
        for name, value in self.before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(Path(self.folder), ignore_errors=True)


def _join(device: torch.device, workers: Workers, opener: DeepSpeedOpener) -> None:
    timeout = timedelta(seconds=opener.timeout_s)
    with _together():
        if opener.address is None:
            store = HashStore()
        else:
            store = TCPStore(*opener.address, is_master=False, timeout=timeout)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=workers.rank,
            world_size=workers.count,
            timeout=timeout,
        )


def _prepare(device: torch.device) -> None:
    """Bring DeepSpeed to where it takes the process group that is there, and builds nothing."""
    from deepspeed import ops
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator: Any = get_accelerator()
    if (found := accelerator.device_name()) != device.type:
        raise Conflict(f"DeepSpeed was imported for {found}, the model is on {device.type}")
    # The operator that reduces in shared memory would be compiled now; a failed try leaves a lock.
    known: Any = ops
    known.__compatible_ops__ = {}


def _leave() -> None:
    """Destroy the process group, and what DeepSpeed remembers of it, if it came so far."""
    from deepspeed import comm

    if comm.is_initialized():
        comm.destroy_process_group()
    else:
        dist.destroy_process_group()
