"""What the jobs' actor does, by kind of job. It takes the trainer's libraries."""

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import httpx

from actors.adapter_trainer import spawn_trainer_group
from actors.adapter_work import RemoteConversions
from actors.objects import open_objects
from memcube.catalog import Catalog, JobKind
from memcube.config import Config
from memcube.cube import MemCube
from memcube.job_runner import JobRunner
from memcube.parametric.consolidation import Consolidation, ReadsFacts
from memcube.parametric.conversion_jobs import ConversionJobs
from memcube.parametric.conversions import by_wordings
from memcube.parametric.facts import Read
from memcube.parametric.facts_llm import read_facts_by_model
from memcube.parametric.limits import AdapterLimits
from memcube.parametric.work import TrainingWork, Worked, WorkProgress


def job_runner(
    config: Config, catalog: Catalog, http: httpx.AsyncClient, *, name: str
) -> tuple[Consolidation, JobRunner]:
    """The runner of all kinds, under a name that a restart keeps; and the consolidation, which also sweeps."""
    limits = AdapterLimits.of(config.adapters)
    consolidation = Consolidation(
        catalog,
        lambda: open_objects(config),
        Trains(config),
        config.training_folder().resolve(),
        limits=limits,
        system=config.chat.system,
        clock=_now,
        read=_reading(config, http),
    )
    conversions = ConversionJobs(
        catalog,
        lambda: open_objects(config),
        RemoteConversions(config),
        limits=limits,
        clock=_now,
    )
    performs = {
        JobKind.CONSOLIDATE: consolidation.perform,
        JobKind.FUSE: conversions.fuse,
        JobKind.PROBE: conversions.probe,
    }
    return consolidation, JobRunner(catalog, performs, name=name, clock=_now)


class Trains:
    """Training work in a group of workers that is there for this work alone."""

    def __init__(self, config: Config) -> None:
        self._config = config

    async def __call__(
        self,
        work: TrainingWork,
        folder: Path,
        *,
        job: str,
        progress: Callable[[WorkProgress], None],
        should_stop: Callable[[], bool],
    ) -> Worked:
        group = spawn_trainer_group(self._config, work, folder, job_id=job)
        return await group.run(progress=progress, should_stop=should_stop)


def _reading(config: Config, http: httpx.AsyncClient) -> ReadsFacts:
    """By wordings; what fits none by the reader's model, where one is configured."""
    llm = config.reader.llm
    if llm is None:
        return by_wordings
    key = os.environ.get(llm.api_key_env)

    async def read(cubes: Sequence[MemCube]) -> Read:
        facts, unread = await by_wordings(cubes)
        if not unread:
            return Read(facts, unread)
        more = await read_facts_by_model(unread, llm, api_key=key, http=http)
        told = {fact.source for fact in more}
        return Read(facts + more, [one for one in unread if one[0] not in told])

    return read


def _now() -> datetime:
    return datetime.now(UTC)
