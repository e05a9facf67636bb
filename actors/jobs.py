"""The actor that runs queued jobs: it takes them from the catalog, and has others do the heavy work."""

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any, cast

import httpx
import ray
from ray.actor import ActorHandle

from actors import NAMESPACE
from actors.nodes import PLACED, on_head
from memcube.catalog import Catalog
from memcube.config import Config
from memcube.errors import MemCubeError
from memcube.job_runner import JobRunner

NAME = "jobs"
SWEEP_S = 60.0
log = logging.getLogger("memcube.jobs")


class JobsActor:
    """Runs one job at a time, in a thread with a loop of its own. A restarted actor is the same
    runner, and goes on at once with the job that it had."""

    def __init__(self, config: Config) -> None:
        # Ray imports this module in each process that gets a handle, gateways among them: these do without.
        from actors.job_work import job_runner

        self._make_runner = job_runner
        self._config = config
        self._runner: JobRunner | None = None
        self._failures = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    def status(self) -> dict[str, Any]:
        """How often the loop failed since the actor started."""
        return {"failures": self._failures}

    def stop(self) -> None:
        """End the present job's work at its next step, for the next runner to go on with."""
        self._stopping.set()
        if self._runner is not None:
            self._runner.stop()
        self._thread.join(timeout=60)

    async def _run(self) -> None:
        config = self._config
        catalog = Catalog.open(config.catalog_url())
        async with httpx.AsyncClient() as http:
            name = ray.get_runtime_context().get_actor_id() or NAME
            consolidation, runner = self._make_runner(config, catalog, http, name=name)
            self._runner = runner
            sweeping = asyncio.create_task(self._sweep(consolidation.sweep))
            while not self._stopping.is_set():
                if await self._guarded(runner.run_next) is None:
                    await asyncio.to_thread(self._stopping.wait, config.training.poll_s)
            sweeping.cancel()
        catalog.close()

    async def _sweep(self, sweep: Callable[[], Any]) -> None:
        while True:
            await self._guarded(sweep)
            await asyncio.sleep(SWEEP_S)

    async def _guarded(self, work: Callable[[], Any]) -> Any:
        """What the work returns; None where it failed, which is counted and logged."""
        try:
            return await work()
        except MemCubeError as failed:
            self._failures += 1
            log.warning("jobs: %s", failed)
        except Exception:
            self._failures += 1
            log.exception("jobs: a round failed")
        return None


def spawn_jobs_actor(config: Config) -> ActorHandle[Any]:
    """The one place that states this actor's Ray options."""
    spawned = (
        ray.remote(JobsActor)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=PLACED,
            max_concurrency=4,
            scheduling_strategy=on_head(),
            max_restarts=-1,
            max_task_retries=0,
        )
        .remote(config)
    )
    return cast(ActorHandle[Any], spawned)
