"""What the catalog's book of jobs must do on every engine. An engine's tests inherit ``JobsContract``
and give a ``catalog`` fixture: an empty, migrated catalog."""

import itertools
from typing import Any

import pytest

from memcube.catalog import Catalog, Job, JobKind, JobState, NewJob
from memcube.catalog.jobs import MAX_ATTEMPTS, MAX_LOG_LINES
from memcube.errors import Conflict, IdempotencyMismatch, NotFound, StaleEpoch, TooBusy
from memcube.ids import CubeId
from memcube.testing.catalog_contract import NOW, A, B, add_one, at, at_once, update

TTL_S = 30.0
_made = itertools.count()


def queue(catalog: Catalog, *, tenant: Any = A, key: str | None = None, **spec: Any) -> Job:
    new = NewJob(kind=JobKind.CONSOLIDATE, spec=spec, author="key", key=key)
    return catalog.jobs.add(tenant, new, now=at(next(_made) / 1e3 - 10))


def claim(catalog: Catalog, runner: str = "one", *, seconds: float = 0) -> Job:
    job = catalog.jobs.claim(runner, now=at(seconds), ttl_s=TTL_S)
    assert job is not None
    return job


class JobsContract:
    """Inherit, and give ``catalog``."""

    @pytest.fixture(autouse=True)
    def two_tenants(self, catalog: Catalog) -> None:
        for tenant in (A, B):
            catalog.access.ensure_tenant(tenant, shards=1, now=NOW)

    def test_a_job_is_queued_then_run_then_done(self, catalog: Catalog):
        job = queue(catalog, seed=1)
        assert (job.state, job.spec, job.attempts) == ("queued", {"seed": 1}, 0)
        running = claim(catalog, seconds=5)
        assert (running.id, running.state, running.started_at) == (job.id, "running", at(5))
        done = catalog.jobs.finish(running, JobState.DONE, now=at(9), result={"version": 1})
        assert (done.state, done.result, done.finished_at) == ("done", {"version": 1}, at(9))
        assert catalog.jobs.claim("one", now=at(99), ttl_s=TTL_S) is None

    def test_jobs_are_claimed_in_the_order_they_came(self, catalog: Catalog):
        first, second = queue(catalog), queue(catalog, tenant=B)
        assert [claim(catalog, r).id for r in ("one", "two")] == [first.id, second.id]

    def test_a_key_names_one_job_of_a_tenant(self, catalog: Catalog):
        job = queue(catalog, key="k", seed=1)
        assert queue(catalog, key="k", seed=1) == job
        assert catalog.jobs.find(A, "k") == job
        assert catalog.jobs.find(A, "other") is catalog.jobs.find(B, "k") is None
        assert queue(catalog, tenant=B, key="k", seed=1).id != job.id
        with pytest.raises(IdempotencyMismatch):
            queue(catalog, key="k", seed=2)

    def test_a_tenant_has_only_so_many_jobs_open_and_finds_those_it_has(self, catalog: Catalog):
        first = queue(catalog, key="k")
        queue(catalog, tenant=B)
        new = NewJob(kind=JobKind.CONSOLIDATE, spec={}, author="key")
        catalog.jobs.add(A, new, now=NOW, max_open=2)
        with pytest.raises(TooBusy):
            catalog.jobs.add(A, new, now=NOW, max_open=2)
        same = NewJob(kind=JobKind.CONSOLIDATE, spec={}, author="key", key="k")
        assert catalog.jobs.add(A, same, now=NOW, max_open=2) == first

    def test_another_tenants_job_reads_as_none(self, catalog: Catalog):
        job = queue(catalog)
        for call in (catalog.jobs.get, catalog.jobs.resume, catalog.jobs.logs):
            with pytest.raises(NotFound):
                call(B, job.id)
        with pytest.raises(NotFound):
            catalog.jobs.cancel(B, job.id, now=NOW)
        assert catalog.jobs.page(B) == []

    def test_a_held_job_is_nobody_elses_until_the_lease_runs_out(self, catalog: Catalog):
        queue(catalog)
        first = claim(catalog)
        assert catalog.jobs.claim("two", now=at(TTL_S - 1), ttl_s=TTL_S) is None
        kept = catalog.jobs.keep(first, now=at(TTL_S - 1), ttl_s=TTL_S, progress={"step": 3})
        assert kept.progress == {"step": 3}
        assert catalog.jobs.claim("two", now=at(TTL_S + 1), ttl_s=TTL_S) is None
        second = claim(catalog, "two", seconds=2 * TTL_S)
        assert (second.id, second.epoch, second.progress) == (first.id, 2, {"step": 3})

    def test_what_a_runner_writes_after_it_was_taken_over_is_refused(self, catalog: Catalog):
        queue(catalog)
        old = claim(catalog)
        new = claim(catalog, "two", seconds=TTL_S)
        for write in (
            lambda: catalog.jobs.keep(old, now=at(TTL_S), ttl_s=TTL_S),
            lambda: catalog.jobs.hold(old, {}),
            lambda: catalog.jobs.begin_anew(old),
            lambda: catalog.jobs.requeue(old),
            lambda: catalog.jobs.finish(old, JobState.DONE, now=at(TTL_S)),
        ):
            with pytest.raises(StaleEpoch):
                write()
        assert catalog.jobs.get(A, old.id) == new

    def test_a_runner_that_starts_again_goes_on_with_its_own_job_at_once(self, catalog: Catalog):
        job = queue(catalog)
        claim(catalog)
        queue(catalog)
        again = claim(catalog)
        assert (again.id, again.epoch, again.attempts) == (job.id, 2, 2)

    def test_a_job_that_ends_its_runner_each_time_has_failed(self, catalog: Catalog):
        job, other = queue(catalog), queue(catalog)
        for _ in range(MAX_ATTEMPTS):
            assert claim(catalog).id == job.id
        assert claim(catalog).id == other.id
        failed = catalog.jobs.get(A, job.id)
        assert failed.state == "failed"
        assert "ended 5 times" in (failed.error or "")

    def test_a_queued_job_is_cancelled_at_once_and_a_running_one_is_told(self, catalog: Catalog):
        waiting = queue(catalog)
        assert catalog.jobs.cancel(A, waiting.id, now=at(1)).state == "cancelled"
        queue(catalog)
        running = claim(catalog)
        assert catalog.jobs.cancel(A, running.id, now=at(1)).state == "running"
        assert catalog.jobs.keep(running, now=at(2), ttl_s=TTL_S).is_cancelled
        ended = catalog.jobs.finish(running, JobState.CANCELLED, now=at(3))
        assert catalog.jobs.cancel(A, running.id, now=at(4)) == ended

    def test_a_failed_or_cancelled_job_is_resumed_with_what_it_had(self, catalog: Catalog):
        cube = add_one(catalog)
        queue(catalog)
        job = catalog.jobs.hold(claim(catalog), {cube.id: 1})
        catalog.jobs.finish(job, JobState.FAILED, now=NOW, error="no room")
        queued = catalog.jobs.resume(A, job.id)
        assert (queued.state, queued.error, queued.held) == ("queued", None, {cube.id: 1})
        assert catalog.jobs.resume(A, job.id) == queued
        catalog.jobs.finish(claim(catalog), JobState.DONE, now=NOW)
        with pytest.raises(Conflict, match="start a new one"):
            catalog.jobs.resume(A, job.id)

    def test_a_job_begins_anew_with_cubes_to_be_chosen_again(self, catalog: Catalog):
        cube = add_one(catalog)
        queue(catalog)
        catalog.jobs.begin_anew(catalog.jobs.hold(claim(catalog), {cube.id: 1}))
        again = claim(catalog)
        assert (again.held, again.attempts) == (None, 2)
        catalog.jobs.requeue(catalog.jobs.hold(again, {cube.id: 1}))
        third = claim(catalog)
        assert (third.held, third.attempts) == ({cube.id: 1}, 3)
        catalog.jobs.requeue(third, is_attempt=False)
        assert claim(catalog).attempts == 3

    def test_a_job_knows_which_of_its_cubes_moved_on(self, catalog: Catalog):
        cubes = [add_one(catalog, text) for text in ("tea", "milk", "bread")]
        queue(catalog)
        job = catalog.jobs.hold(claim(catalog), {cube.id: 1 for cube in cubes})
        assert catalog.jobs.moved_on(job, now=NOW) == []
        update(catalog, cubes[0].id, text="coffee")
        update(catalog, cubes[1].id, tags=("white",))
        catalog.cubes.delete(A, cubes[2].id, now=NOW)
        assert set(catalog.jobs.moved_on(job, now=NOW)) == {cubes[0].id, cubes[2].id}

    def test_ended_jobs_are_listed_until_their_files_are_removed(self, catalog: Catalog):
        queue(catalog)
        job = catalog.jobs.hold(claim(catalog), {CubeId("0"): 1})
        assert catalog.jobs.ended_with_files() == []
        ended = catalog.jobs.finish(job, JobState.REFUSED, now=NOW)
        assert catalog.jobs.ended_with_files() == [ended]
        assert catalog.jobs.ended_with_files(after=ended.id) == []
        catalog.jobs.files_removed(job.id)
        assert catalog.jobs.ended_with_files() == []

    def test_a_log_is_read_on_from_a_line_and_forgets_its_oldest(self, catalog: Catalog):
        job = queue(catalog)
        for number in range(3):
            catalog.jobs.log(job.id, f"line {number}", now=at(number))
        lines = catalog.jobs.logs(A, job.id, after=1)
        assert [(line.seq, line.text) for line in lines] == [(2, "line 1"), (3, "line 2")]
        assert lines[0].at == at(1)
        for _ in range(MAX_LOG_LINES):
            catalog.jobs.log(job.id, "more", now=NOW)
        assert catalog.jobs.logs(A, job.id, limit=1)[0].seq == 4

    def test_jobs_are_paged_newest_first_and_counted_by_state(self, catalog: Catalog):
        made = [queue(catalog) for _ in range(3)]
        claim(catalog)
        page = catalog.jobs.page(A, limit=2)
        assert [job.id for job in page] == [made[2].id, made[1].id]
        assert [j.id for j in catalog.jobs.page(A, before=page[-1].id)] == [made[0].id]
        assert [j.id for j in catalog.jobs.page(A, state=JobState.RUNNING)] == [made[0].id]
        counts, running = catalog.jobs.load()
        states = (JobState.QUEUED, JobState.RUNNING, JobState.DONE)
        assert [counts[state] for state in states] == [2, 1, 0]
        assert [job.id for job in running] == [made[0].id]

    def test_many_runners_at_once_claim_each_job_once(self, catalog: Catalog):
        jobs = [queue(catalog) for _ in range(6)]
        claimed = at_once(
            [lambda n=n: catalog.jobs.claim(f"runner {n}", now=NOW, ttl_s=TTL_S) for n in range(8)]
        )
        ids = [job.id for job in claimed if job is not None]
        assert sorted(ids) == sorted(job.id for job in jobs)
