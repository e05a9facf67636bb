"""A job that puts cubes into an adapter: choose, read as facts, train, judge, publish.

Each step can be repeated: the chosen versions stand in the job, the training goes on from its
checkpoints, and the same weights published twice are one version. An adapter that is not good enough
changes nothing; the report says what was short. Cubes that change while their job runs begin it anew.

Two things hold what memories say, and go with them (``sweep``): the folder that the job works in, and
its report among the objects.
"""

import asyncio
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from memcube.catalog import Catalog, Job, JobState
from memcube.cube import MemCube, Scope
from memcube.errors import Conflict
from memcube.ids import CubeId, TenantId, parse_cube_id
from memcube.indexing import Clock
from memcube.job_runner import Anew, Ended, JobRun
from memcube.objects import OpenObjects, opened
from memcube.parametric.conversions import by_wordings
from memcube.parametric.dataset import build_training_set
from memcube.parametric.facts import Fact, Read
from memcube.parametric.judgement import decide
from memcube.parametric.limits import AdapterLimits
from memcube.parametric.registry import AdapterFiles, AdapterRegistry, Provenance
from memcube.parametric.replay import UNRELATED
from memcube.parametric.selection import Choice, Chosen, choose
from memcube.parametric.specs import MAX_CUBES, ConsolidateSpec, report_name
from memcube.parametric.training import Outcome
from memcube.parametric.work import TrainingWork, Worked, WorkProgress, adapter_weights

MAX_FACTS = 500
_PAGE = 500


class Trains(Protocol):
    """Does training work somewhere; the actors' is a group of workers."""

    async def __call__(
        self,
        work: TrainingWork,
        folder: Path,
        *,
        job: str,
        progress: Callable[[WorkProgress], None],
        should_stop: Callable[[], bool],
    ) -> Worked:
        """Train, export and judge, going on from what the folder holds.

        Raises:
            Unavailable: a worker is gone; called again it goes on.
        """
        ...


class ReadsFacts(Protocol):
    """Reads cubes as facts; the statements that can't be read come back beside them."""

    async def __call__(self, cubes: Sequence[MemCube]) -> Read: ...


class Consolidation:
    """Performs the jobs of kind consolidate. ``folder`` is where they work, shared by all workers."""

    def __init__(
        self,
        catalog: Catalog,
        open_objects: OpenObjects,
        trains: Trains,
        folder: Path,
        *,
        limits: AdapterLimits,
        system: str,
        clock: Clock,
        read: ReadsFacts = by_wordings,
    ) -> None:
        """``system`` is the chat's system text, which the adapter is trained behind."""
        self._catalog = catalog
        self._open_objects = open_objects
        self._trains = trains
        self._folder = folder
        self._limits = limits
        self._system = system
        self._clock = clock
        self._read = read

    async def perform(self, run: JobRun) -> Ended:
        """Run one job, from wherever it is."""
        spec, job = ConsolidateSpec.from_json(run.job.spec), run.job
        scope = Scope(tenant=job.tenant, **spec.scope_ids)
        parent = await self._parent(job.tenant, spec)
        if job.held is None:
            await self._choose(run, spec, parent)
        elif await run.moved_on():
            await self._discard(job)
            raise Anew
        cubes = await self._held_cubes(run)
        facts = await self._facts(run, cubes)
        if not facts:
            self._remove_folder(job)
            return Ended(
                state=JobState.REFUSED,
                error="no statement of these cubes could be read as a fact; see docs/parametric.md",
            )
        inside = sorted({CubeId(fact.source.id) for fact in facts if fact.source is not None})
        earlier = await self._earlier(job.tenant, parent, facts)
        recipe = spec.settings.recipe_for(len(facts))
        data = build_training_set(
            facts, settings=spec.settings.data, earlier=earlier, seed=recipe.seed
        )
        work = TrainingWork(
            data=data,
            recipe=recipe,
            unrelated=UNRELATED,
            system=self._system,
        )
        await run.say(
            f"{len(facts)} facts of {len(inside)} cubes, {len(data.examples)} examples, "
            f"{len(data.probes)} probes"
        )
        worked = await self._trains(
            work,
            self._folder_of(job),
            job=job.id,
            progress=lambda progress: _tell(run, progress),
            should_stop=lambda: run.should_stop,
        )
        if worked.outcome is Outcome.CANCELLED or worked.report is None:
            return run.ended_early()
        return await self._judged(run, spec, scope, work, worked, inside, parent)

    # -- which cubes, and what they say

    async def _parent(self, tenant: TenantId, spec: ConsolidateSpec) -> tuple[str, int] | None:
        """The version that serves under the name, of any base model: its line and number."""
        records = await asyncio.to_thread(self._catalog.adapters.versions, tenant)
        for record in records:
            if record.line.name == spec.name and record.state == "serving":
                return record.line.id, record.version
        return None

    async def _choose(
        self, run: JobRun, spec: ConsolidateSpec, parent: tuple[str, int] | None
    ) -> None:
        chosen = await self._chosen(run.job.tenant, spec.choice)
        if parent is not None and spec.extend:
            chosen = await self._with_parents(run.job.tenant, spec, parent, chosen)
        left = ", ".join(f"{count} {why}" for why, count in chosen.left.items())
        await run.say(f"{len(chosen.cubes)} cubes chosen" + (f"; left: {left}" if left else ""))
        if not chosen.cubes:
            raise Conflict("no cube can be consolidated" + (f": {left}" if left else ""))
        await run.hold(chosen.versions)

    async def _chosen(self, tenant: TenantId, choice: Choice) -> Chosen:
        now, cubes = self._clock(), self._catalog.cubes
        if choice.cubes:
            ids = await asyncio.to_thread(
                cubes.expand,
                tenant,
                [parse_cube_id(id) for id in choice.cubes],
                now=now,
                limit=MAX_CUBES,
            )
            named = await asyncio.to_thread(cubes.get_many, tenant, ids, now=now)
            return choose(named, replace(choice, cubes=tuple(ids)), now=now)
        found: list[MemCube] = []
        cursor: str | None = None
        while len(found) < MAX_CUBES:
            page = await asyncio.to_thread(
                lambda cursor=cursor: cubes.find(
                    tenant,
                    now=now,
                    limit=_PAGE,
                    cursor=cursor,
                    user_id=choice.user_id,
                    agent_id=choice.agent_id,
                    run_id=choice.run_id,
                    kind=choice.kind,
                    tag=choice.tag,
                )
            )
            found += page.cubes
            if (cursor := page.next_cursor) is None:
                break
        return choose(found, choice, now=now)

    async def _with_parents(
        self, tenant: TenantId, spec: ConsolidateSpec, parent: tuple[str, int], chosen: Chosen
    ) -> Chosen:
        """The chosen cubes, and those of the version that serves which are still there."""
        held = await asyncio.to_thread(self._catalog.adapters.inside, tenant, *parent)
        more = [id for id in held if id not in chosen.versions]
        cubes = await asyncio.to_thread(
            self._catalog.cubes.get_many, tenant, more, now=self._clock()
        )
        named = replace(spec.choice, cubes=tuple(more), limit=max(1, len(more)))
        still = choose(cubes, named, now=self._clock())
        return Chosen([*chosen.cubes, *still.cubes], chosen.left)

    async def _held_cubes(self, run: JobRun) -> list[MemCube]:
        ids = list(run.job.held or {})
        return await asyncio.to_thread(
            self._catalog.cubes.get_many, run.job.tenant, ids, now=self._clock()
        )

    async def _facts(self, run: JobRun, cubes: Sequence[MemCube]) -> list[Fact]:
        facts, unread = await self._read(cubes)
        if unread:
            await run.say(f"{len(unread)} sentences can't be read as facts and are left out")
        if len(facts) > MAX_FACTS:
            await run.say(f"{len(facts):,} facts; the first {MAX_FACTS} go in")
        return facts[:MAX_FACTS]

    async def _earlier(
        self, tenant: TenantId, parent: tuple[str, int] | None, facts: Sequence[Fact]
    ) -> list[Fact]:
        """Those of the facts that the version which serves holds."""
        if parent is None:
            return []
        held = await asyncio.to_thread(self._catalog.adapters.inside, tenant, *parent)
        return [f for f in facts if f.source is not None and CubeId(f.source.id) in held]

    # -- the end

    async def _judged(
        self,
        run: JobRun,
        spec: ConsolidateSpec,
        scope: Scope,
        work: TrainingWork,
        worked: Worked,
        inside: Sequence[CubeId],
        parent: tuple[str, int] | None,
    ) -> Ended:
        job, report = run.job, worked.report
        assert report is not None
        assert worked.adapter is not None
        decision = decide(report, spec.settings.limits)
        figures = report.figures()
        result: dict[str, Any] = {
            "adapter": spec.name,
            "figures": figures,
            "limits": asdict(spec.settings.limits),
            "short": list(decision.short),
            "num_cubes": len(inside),
            "num_steps": worked.step,
            "history": [[round(x, 5) for x in step] for step in worked.history],
        }
        async with opened(self._open_objects) as objects:
            await objects.put(report_name(job), report.to_json().encode())
            if not decision.passed:
                await run.say("not good enough: " + "; ".join(decision.short))
                self._remove_folder(job)
                return Ended(state=JobState.REFUSED, result=result, error="; ".join(decision.short))
            registry = AdapterRegistry(AdapterFiles(objects, self._limits), self._catalog.adapters)
            weights = await asyncio.to_thread(
                adapter_weights, worked.adapter, base=worked.base, recipe=work.recipe
            )
            held = run.job.held or {}
            try:
                record = await registry.publish(
                    scope,
                    spec.name,
                    weights,
                    cubes={id: held[id] for id in inside},
                    provenance=Provenance(
                        recipe=asdict(work.recipe),
                        seed=work.recipe.seed,
                        data_sha256=work.data.hash,
                        report=figures,
                        parent=None if parent is None else parent[1],
                    ),
                    now=self._clock(),
                )
                await run.say(f"published as version {record.version}")
                if spec.activate:
                    record = await registry.activate(
                        job.tenant, record.line.id, record.version, now=self._clock()
                    )
                    await run.say(f"version {record.version} serves")
            except Conflict:
                if await run.moved_on():
                    await self._discard(job)
                    raise Anew from None
                raise
        self._remove_folder(job)
        result |= {"adapter_id": record.line.id, "version": record.version, "state": record.state}
        return Ended(state=JobState.DONE, result=result)

    async def sweep(self) -> int:
        """Remove what ended jobs and stale adapters still keep of memories that have changed or are
        gone, and the folders of jobs that will not go on; how many jobs and versions that were."""
        swept, after = await self._erase_stale(), ""
        jobs = self._catalog.jobs
        while ended := await asyncio.to_thread(jobs.ended_with_files, after=after):
            for job in ended:
                changed = await asyncio.to_thread(jobs.moved_on, job, now=self._clock())
                if changed:
                    await self._discard(job)
                    await asyncio.to_thread(jobs.files_removed, job.id)
                    swept += 1
                elif job.state in (JobState.DONE, JobState.REFUSED):
                    self._remove_folder(job)
            after = ended[-1].id
        return swept

    async def _erase_stale(self) -> int:
        if not await asyncio.to_thread(self._catalog.adapters.to_erase, limit=1):
            return 0
        async with opened(self._open_objects) as objects:
            registry = AdapterRegistry(AdapterFiles(objects, self._limits), self._catalog.adapters)
            return await registry.erase_stale(now=self._clock())

    async def _discard(self, job: Job) -> None:
        """Remove all that a job keeps of what its cubes said. Idempotent."""
        self._remove_folder(job)
        async with opened(self._open_objects) as objects:
            await objects.delete(report_name(job))

    def _folder_of(self, job: Job) -> Path:
        return self._folder / job.id

    def _remove_folder(self, job: Job) -> None:
        shutil.rmtree(self._folder_of(job), ignore_errors=True)


def _tell(run: JobRun, progress: WorkProgress) -> None:
    told: dict[str, Any] = {"phase": progress.phase, "done": progress.done, "total": progress.total}
    if (step := progress.training) is not None:
        told |= {
            "step": step.step,
            "num_steps": step.num_steps,
            "loss": step.loss,
            "answer_loss": step.answer_loss,
            "kl": step.kl,
            "lr": step.lr,
            "tokens": step.tokens,
            "tokens_per_s": step.tokens_per_s,
            "eta_s": step.eta_s,
        }
    if progress.early is not None:
        told["early"] = dict(progress.early)
    run.progress = told
