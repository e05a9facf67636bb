"""The workers that train one adapter: actors in a placement group, made for one run and gone with it.

A run is ``memcube.parametric.work.perform`` in each of them. It ends whole: when one worker dies or
stands still all are ended, and the next run over the same folder goes on from the last checkpoint. So
the folder lies on storage that every worker sees; on one machine any folder does.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.placement import worker_bundle
from memcube.activation.models import LoadedModel, load_model
from memcube.config import Config, TrainingConfig
from memcube.errors import BadRequest, DeadlineExceeded, MemCubeError, Unavailable
from memcube.parametric.engines import LocalEngine, OpenEngine, Workers, engine_name
from memcube.parametric.work import TrainingWork, Worked, WorkProgress, perform

POLL_S = 0.5
_LEFT_ALONE = 4
"""A worker that nobody asks for so many times the timeout ends by itself: its group is gone."""
_OTHERS_S = 3.0

Address = tuple[str, int]


class AdapterTrainerActor:
    """One worker. ``load`` and ``run`` are called once, in this order; the others at any time."""

    def __init__(self, config: Config, work: TrainingWork, folder: str, rank: int) -> None:
        self._config = config
        self._work = work
        self._folder = Path(folder)
        self._workers = Workers(rank, config.training.workers)
        self._host = ray.util.get_node_ip_address()
        self._loaded: LoadedModel | None = None
        self._meeting_place: Any = None
        self._progress: WorkProgress | None = None
        self._is_stopped = False
        self._asked_at = time.monotonic()
        self._priority = min(19, os.getpriority(os.PRIO_PROCESS, 0) + config.training.nice)

    async def load(self) -> Address | None:
        """Load the model. Of the first of several workers: where all are to meet."""
        self._loaded = await asyncio.to_thread(self._load)
        self._asked_at = time.monotonic()
        if self._workers.rank or self._workers.count == 1:
            return None
        from memcube.parametric.deepspeed_engine import open_meeting_place

        timeout_s = self._config.training.timeout_s
        self._meeting_place, port = open_meeting_place(self._host, timeout_s)
        return self._host, port

    def _load(self) -> LoadedModel:
        self._go_behind()
        loaded = load_model(self._config.model, self._config.model_folder())
        if loaded.model.device.type == "cpu":
            torch.set_num_threads(self._config.training.cpus_per_worker)
        return loaded

    def _go_behind(self) -> None:
        """Let what answers requests on this machine go first. Linux keeps this by thread."""
        os.setpriority(os.PRIO_PROCESS, 0, self._priority)

    async def run(self, address: Address | None) -> Worked:
        """Train with the other workers; of the first also the adapter and its report."""
        return await asyncio.to_thread(self._run, address)

    def _run(self, address: Address | None) -> Worked:
        assert self._loaded is not None, "load comes first"
        self._go_behind()
        return perform(
            self._work,
            self._loaded,
            self._folder,
            workers=self._workers,
            open_engine=self._opener(address),
            progress=self._told,
            should_stop=self._should_stop,
        )

    def _opener(self, address: Address | None) -> OpenEngine:
        wanted = self._config.training
        if engine_name(wanted.engine) == "torch":
            return LocalEngine
        from memcube.parametric.deepspeed_engine import DeepSpeedOpener

        return DeepSpeedOpener(
            zero_stage=wanted.zero_stage,
            address=address,
            host=self._host,
            timeout_s=wanted.timeout_s,
        )

    def _told(self, progress: WorkProgress) -> None:
        self._progress = progress

    def _should_stop(self) -> bool:
        alone_s = time.monotonic() - self._asked_at
        return self._is_stopped or alone_s > _LEFT_ALONE * self._config.training.timeout_s

    async def progress(self) -> WorkProgress | None:
        """How far it is; None before the first step."""
        self._asked_at = time.monotonic()
        return self._progress

    async def stop(self) -> None:
        """Let the run end after the present step, with a checkpoint."""
        self._is_stopped = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerGroup:
    """The workers of one training. ``run`` makes them and removes them, however it ends."""

    config: Config
    work: TrainingWork
    folder: Path
    job_id: str

    async def run(
        self,
        *,
        progress: Callable[[WorkProgress], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Worked:
        """Train, going on from what the folder holds. Both callables are called now and then, here.

        Raises:
            Unavailable: no room for the workers, or one is gone; another ``run`` goes on.
            MemCubeError: what ``perform`` raises.
        """
        bundle = worker_bundle(self.config)
        async with _placed(self.config.training, bundle, self.job_id) as group:
            workers = self._spawn(group, bundle)
            try:
                return await self._watched(workers, progress, should_stop)
            finally:
                for worker in workers:
                    ray.kill(worker)

    def _spawn(self, group: PlacementGroup, bundle: dict[str, float]) -> list[ActorHandle[Any]]:
        """The one place that states this actor's Ray options."""
        spawned = [
            ray.remote(AdapterTrainerActor)
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0.0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=rank
                ),
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=8,
            )
            .remote(self.config, self.work, str(self.folder), rank)
            for rank in range(self.config.training.workers)
        ]
        return cast(list[ActorHandle[Any]], spawned)

    async def _watched(
        self,
        workers: Sequence[ActorHandle[Any]],
        progress: Callable[[WorkProgress], None],
        should_stop: Callable[[], bool],
    ) -> Worked:
        wanted = self.config.training
        addresses = await _all([worker.load.remote() for worker in workers], wanted.load_s)
        runs = [
            asyncio.ensure_future(_told(worker.run.remote(addresses[0]), rank, None))
            for rank, worker in enumerate(workers)
        ]
        is_stopped, last = False, None
        try:
            while not all(run.done() for run in runs):
                await asyncio.wait(runs, timeout=POLL_S, return_when=asyncio.FIRST_EXCEPTION)
                if any(run.done() and run.exception() for run in runs):
                    await asyncio.wait(runs, timeout=_OTHERS_S)
                    _raise_cause(runs)
                if not is_stopped and should_stop():
                    is_stopped = True
                    await _all([worker.stop.remote() for worker in workers], wanted.timeout_s)
                told = await _all(
                    [worker.progress.remote() for worker in workers], wanted.timeout_s
                )
                if told[0] is not None and told[0] != last:
                    last = told[0]
                    progress(last)
            return runs[0].result()
        finally:
            for run in runs:
                run.cancel()
            await asyncio.gather(*runs, return_exceptions=True)


def spawn_trainer_group(
    config: Config, work: TrainingWork, folder: Path, *, job_id: str
) -> TrainerGroup:
    """The workers of a training over a folder that all of them see. They are made by ``run``.

    Raises:
        BadRequest: the configured engine isn't installed, or can't take so many workers.
    """
    wanted = config.training
    if wanted.workers > 1 and engine_name(wanted.engine) == "torch":
        raise BadRequest(
            f"torch alone trains with one worker, not {wanted.workers}; several take deepspeed",
            "training.engine",
        )
    if work.recipe.rows % wanted.workers:
        raise BadRequest(
            f"{work.recipe.rows} rows a step can't be shared by {wanted.workers} workers",
            "training.workers",
        )
    return TrainerGroup(config=config, work=work, folder=folder.resolve(), job_id=job_id)


@asynccontextmanager
async def _placed(
    wanted: TrainingConfig, bundle: dict[str, float], job_id: str
) -> AsyncIterator[PlacementGroup]:
    group = placement_group(
        [bundle] * wanted.workers, strategy=wanted.placement.upper(), name=f"training-{job_id}"
    )
    try:
        if not await asyncio.to_thread(group.wait, wanted.place_s):
            free = ray.available_resources()
            has = ", ".join(f"{free.get(name, 0):g} {name}" for name in bundle)
            raise Unavailable(
                f"no room for {wanted.workers} workers of {bundle} within {wanted.place_s:g} s; "
                f"free are {has}",
                wanted.place_s,
            )
        yield group
    finally:
        remove_placement_group(group)


async def _all(refs: Sequence[Any], deadline_s: float) -> list[Any]:
    return await asyncio.gather(*(_told(ref, rank, deadline_s) for rank, ref in enumerate(refs)))


async def _told(ref: Any, rank: int, deadline_s: float | None) -> Any:
    """What a worker returned.

    Raises:
        MemCubeError: what it raised.
        Unavailable: it is gone, or didn't answer in time.
    """
    try:
        async with asyncio.timeout(deadline_s):
            return await asyncio.wrap_future(ref.future())
    except RayTaskError as failed:
        if isinstance(failed.cause, MemCubeError):
            raise failed.cause from None
        raise
    except TimeoutError:
        raise DeadlineExceeded(f"worker {rank} of the training stands still") from None
    except RayError as gone:
        raise Unavailable(
            f"worker {rank} of the training is gone ({type(gone).__name__})"
        ) from None


def _raise_cause(runs: Sequence[asyncio.Future[Worked]]) -> NoReturn:
    """When one worker fails the others find it gone; what only they say comes last."""
    failures = [failure for run in runs if run.done() and (failure := run.exception()) is not None]
    causes = [failure for failure in failures if not isinstance(failure, Unavailable)]
    raise (causes or failures)[0]
