"""One runner, and the ways a job's work can end."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from memcube.catalog import Catalog, Job, JobKind, NewJob
from memcube.catalog.jobs import MAX_ATTEMPTS
from memcube.errors import Conflict, Unavailable
from memcube.ids import TenantId
from memcube.job_runner import Anew, Ended, JobRun, JobRunner, JobState

NOW = datetime(2026, 1, 1, tzinfo=UTC)
A = TenantId("acme")
DONE = Ended(state=JobState.DONE, result={"version": 1})


class Desk:
    """A catalog with one queued job, a clock, and runners on them."""

    def __init__(self, folder: Path) -> None:
        self.now = NOW
        self.catalog = Catalog.open(f"sqlite:///{folder}/catalog.db")
        self.catalog.access.ensure_tenant(A, shards=1, now=NOW)
        self.id = self.queue().id

    def queue(self) -> Job:
        new = NewJob(kind=JobKind.CONSOLIDATE, spec={}, author="key")
        return self.catalog.jobs.add(A, new, now=self.now)

    def runner(self, work: Any, *, name: str = "one", kinds: Any = None) -> JobRunner:
        by_kind = {JobKind.CONSOLIDATE: work} if kinds is None else kinds
        return JobRunner(
            self.catalog, by_kind, name=name, clock=lambda: self.now, ttl_s=30, renew_s=0.01
        )

    @property
    def job(self) -> Job:
        return self.catalog.jobs.get(A, self.id)

    def lines(self) -> list[str]:
        return [line.text for line in self.catalog.jobs.logs(A, self.id)]


async def until(holds: Callable[[], bool]) -> None:
    """Poll for at most ten seconds."""
    for _ in range(2_000):
        if holds():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to hold in time")


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.catalog.close()


async def test_a_job_is_done_with_its_result_and_its_log(desk):
    async def work(run: JobRun) -> Ended:
        run.progress = {"step": 1}
        await run.say("half way")
        return DONE

    job = await desk.runner(work).run_next()
    assert (job.state, job.result) == ("done", {"version": 1})
    assert desk.lines() == ["begun", "half way", "done"]
    assert await desk.runner(work).run_next() is None


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (Conflict("no cube"), "no cube"),
        (ValueError("the memory says so"), "ValueError; see the runner's log"),
    ],
)
async def test_an_error_fails_the_job_and_one_that_is_not_ours_tells_no_text(desk, error, told):
    async def work(run: JobRun) -> Ended:
        raise error

    job = await desk.runner(work).run_next()
    assert (job.state, job.error) == ("failed", told)


async def test_a_kind_that_is_not_built_fails(desk):
    job = await desk.runner(None, kinds={}).run_next()
    assert job.state == "failed"


async def test_what_can_not_answer_is_tried_again_a_few_times(desk):
    async def work(run: JobRun) -> Ended:
        raise Unavailable("worker 0 is gone")

    runner = desk.runner(work)
    for _ in range(MAX_ATTEMPTS):
        assert (await runner.run_next()).state == "queued"
    assert await runner.run_next() is None
    assert desk.job.state == "failed"
    assert "not now: worker 0 is gone; try again in 1 s" in desk.lines()


async def test_cubes_that_changed_begin_it_anew(desk):
    async def work(run: JobRun) -> Ended:
        if run.job.attempts == 1:
            await run.hold({})
            raise Anew
        assert run.job.held is None
        return DONE

    runner = desk.runner(work)
    assert (await runner.run_next()).state == "queued"
    assert (await runner.run_next()).state == "done"


async def test_a_cancelled_job_is_told_while_it_runs(desk):
    async def work(run: JobRun) -> Ended:
        desk.catalog.jobs.cancel(A, desk.id, now=NOW)
        await until(lambda: run.should_stop)
        return run.ended_early()

    assert (await desk.runner(work).run_next()).state == "cancelled"


async def test_a_runner_that_stops_leaves_the_job_for_the_next(desk):
    async def work(run: JobRun) -> Ended:
        if runner.is_stopping:
            return DONE
        runner.stop()
        return run.ended_early()

    runner = desk.runner(work)
    left = await runner.run_next()
    assert (left.state, left.attempts) == ("queued", 0)
    assert await runner.run_next() is None
    assert (await desk.runner(work, name="two").run_next()).state == "done"


async def test_a_runner_whose_lease_was_taken_over_ends_its_work(desk):
    begun, ended = asyncio.Event(), threading.Event()

    async def slow(run: JobRun) -> Ended:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return DONE

    async def quick(run: JobRun) -> Ended:
        return DONE

    first = asyncio.create_task(desk.runner(slow).run_next())
    await begun.wait()
    # As a runner that was asleep for long: its lease has run out before it renews.
    taken = desk.catalog.jobs.claim("two", now=NOW + timedelta(days=1), ttl_s=30)
    assert taken is not None
    await asyncio.wait_for(first, 10)
    assert ended.is_set()
    done = desk.catalog.jobs.finish(taken, JobState.DONE, now=NOW)
    assert desk.job == done


async def test_progress_is_told_while_the_work_goes_on(desk):
    async def work(run: JobRun) -> Ended:
        run.progress = {"step": 3}
        await until(lambda: desk.job.progress == {"step": 3})
        return DONE

    assert (await desk.runner(work).run_next()).progress == {"step": 3}
