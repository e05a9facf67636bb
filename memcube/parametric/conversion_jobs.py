"""Jobs that make one adapter of several, and that read an adapter back into plaintext.

The work needs the model, and is done where one is loaded (``Converts``); here are what was asked for,
how a job ends, and where its report goes. Reports hold what memories say, and go with them.
"""

import asyncio
import json
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

from memcube.catalog import Catalog, JobState
from memcube.ids import CubeId, TenantId
from memcube.indexing import Clock
from memcube.job_runner import Anew, Ended, JobRun
from memcube.objects import OpenObjects, opened
from memcube.parametric.conversions import FusedAdapter, ProbedAdapter
from memcube.parametric.judgement import Thresholds
from memcube.parametric.limits import AdapterLimits
from memcube.parametric.registry import AdapterFiles, AdapterRegistry
from memcube.parametric.specs import AdapterVersion, FuseSpec, report_name

_LOOK_S = 0.5


class Converts(Protocol):
    """Does the work of a conversion where the model is. A call that is cancelled ends it."""

    async def fuse(
        self, tenant: TenantId, adapters: Sequence[AdapterVersion], name: str, limits: Thresholds
    ) -> FusedAdapter: ...

    async def probe(
        self, tenant: TenantId, adapter: AdapterVersion, author: str
    ) -> ProbedAdapter: ...


class ConversionJobs:
    """Performs the jobs of kinds fuse and probe."""

    def __init__(
        self,
        catalog: Catalog,
        open_objects: OpenObjects,
        converts: Converts,
        *,
        limits: AdapterLimits,
        clock: Clock,
    ) -> None:
        self._catalog = catalog
        self._open_objects = open_objects
        self._converts = converts
        self._limits = limits
        self._clock = clock

    async def fuse(self, run: JobRun) -> Ended:
        """Merge adapters, or say that merging loses too much. From the start, where it was cut off."""
        spec, tenant = FuseSpec.from_json(run.job.spec), run.job.tenant
        await self._hold(run, spec.adapters)
        work = self._converts.fuse(tenant, spec.adapters, spec.name, spec.settings.limits)
        fused = await _unless_stopped(run, work)
        if fused is None:
            return run.ended_early()
        result: dict[str, Any] = {"adapter": spec.name, "fusion": fused.report.figures()}
        if fused.record is None:
            return Ended(state=JobState.REFUSED, result=result, error=fused.report.refusal)
        record = fused.record
        await run.say(f"published as version {record.version}")
        if spec.activate:
            async with opened(self._open_objects) as objects:
                registry = AdapterRegistry(
                    AdapterFiles(objects, self._limits), self._catalog.adapters
                )
                record = await registry.activate(
                    tenant, record.line.id, record.version, now=self._clock()
                )
            await run.say(f"version {record.version} serves")
        result |= {"adapter_id": record.line.id, "version": record.version, "state": record.state}
        return Ended(state=JobState.DONE, result=result)

    async def probe(self, run: JobRun) -> Ended:
        """Ask an adapter for what it holds; what agrees with the cubes becomes cubes. What an earlier
        try wrote is not written again."""
        adapter = AdapterVersion(run.job.spec["adapter"], run.job.spec["version"])
        await self._hold(run, [adapter])
        work = self._converts.probe(run.job.tenant, adapter, run.job.author)
        probed = await _unless_stopped(run, work)
        if probed is None:
            return run.ended_early()
        async with opened(self._open_objects) as objects:
            text = json.dumps(probed.report.answers(), ensure_ascii=False)
            await objects.put(report_name(run.job), text.encode())
        written = [result.cube.id for result in probed.written]
        contradictions = [str(c.cube.id) for c in probed.report.contradictions]
        await run.say(f"{len(written)} cubes written, {len(contradictions)} contradictions listed")
        result = {
            "adapter_id": adapter.id,
            "version": adapter.version,
            "probe": probed.report.figures(),
            "written": written,
            "contradictions": contradictions,
            "num_unread": len(probed.unread),
        }
        return Ended(state=JobState.DONE, result=result)

    async def _hold(self, run: JobRun, adapters: Sequence[AdapterVersion]) -> None:
        if run.job.held is not None and await run.moved_on():
            raise Anew  # to be refused with its reason: the adapter is stale
        held: dict[CubeId, int] = {}
        for adapter in adapters:
            held |= await asyncio.to_thread(
                self._catalog.adapters.inside, run.job.tenant, adapter.id, adapter.version
            )
        await run.hold(held)


async def _unless_stopped(run: JobRun, work: Awaitable[Any]) -> Any:
    """What the work returns; None where the job was stopped first, and the work with it."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=_LOOK_S)
            if run.should_stop and not task.done():
                return None
        return task.result()
    finally:
        task.cancel()
