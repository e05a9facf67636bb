"""A consolidation from its cubes to the version that serves, on a tiny model and without Ray."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from memcube.catalog import AdapterState, Catalog, Change, Job, JobKind, NewJob
from memcube.cube import Draft, Kind, Sensitivity
from memcube.errors import Conflict, NotFound, Unavailable
from memcube.ids import TenantId
from memcube.job_runner import JobRunner
from memcube.objects.folder import FolderStore
from memcube.parametric.consolidation import Consolidation
from memcube.parametric.dataset import DataSettings
from memcube.parametric.forgetting import queue_retraining
from memcube.parametric.judgement import Thresholds
from memcube.parametric.limits import AdapterLimits
from memcube.parametric.selection import Choice
from memcube.parametric.settings import TrainingSettings
from memcube.parametric.specs import ConsolidateSpec, read_report
from memcube.parametric.work import perform
from tests.unit.parametric.small import small_model

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
A = TenantId("acme")
ANYTHING = Thresholds(recall=0.0, reverse=0.0, earlier=0.0, leak=1.0, nll_rise=1e9)
QUICK = TrainingSettings(
    recipe={
        "rank": 2,
        "steps": 3,
        "decay_steps": 1,
        "row_tokens": 300,
        "rows": 1,
        "replay_tokens": 60,
        "check_steps": 0,
        "checkpoint_steps": 1,
        "autocast": False,
    },
    data=DataSettings(asks=2, asks_back=1, unknown=1, unknown_back=0, other_nouns=0),
    limits=ANYTHING,
)
BASE = small_model().fingerprint


class Office:
    """A catalog, objects, and a runner whose training happens here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "jobs"
        self.catalog = Catalog.open(f"sqlite:///{folder}/catalog.db")
        self.catalog.access.ensure_tenant(A, shards=1, now=NOW)
        self.objects = FolderStore.open(folder / "objects")
        self.trained: list[Any] = []
        self.meanwhile: list[Any] = []
        """Called once each, after a training and before its adapter is published."""

    def objects_root(self) -> Path:
        return self.folder.parent / "objects"

    async def open_objects(self) -> FolderStore:
        return self.objects

    async def _trains(self, work, folder, *, job, progress, should_stop):
        self.trained.append(work)
        found = perform(work, small_model(), folder, progress=progress, should_stop=should_stop)
        if self.meanwhile:
            self.meanwhile.pop(0)()
        return found

    def add(self, text: str, **header: Any) -> Any:
        draft = Draft(text=text, kind=Kind.FACT, **({"user_id": "ann"} | header))
        return self.catalog.cubes.add(A, [draft], author="k", now=NOW).results[0].cube

    def queue(self, settings: TrainingSettings = QUICK, **asked: Any) -> Job:
        choice = asked.pop("choice", Choice(user_id="ann"))
        spec = ConsolidateSpec(**({"name": "ann", "choice": choice, "settings": settings} | asked))
        new = NewJob(kind=JobKind.CONSOLIDATE, spec=spec.to_json(), author="key")
        return self.catalog.jobs.add(A, new, now=NOW)

    async def run(self) -> Job:
        """The next job, at its end or where it was left."""
        runner = JobRunner(
            self.catalog,
            {JobKind.CONSOLIDATE: self.consolidation().perform},
            name="one",
            clock=lambda: NOW,
        )
        job = await runner.run_next()
        assert job is not None
        return job

    def consolidation(self) -> Consolidation:
        return Consolidation(
            self.catalog,
            self.open_objects,
            self._trains,
            self.folder,
            limits=AdapterLimits(),
            system="You are kind.",
            clock=lambda: NOW,
        )

    def lines(self, job: Job) -> list[str]:
        return [line.text for line in self.catalog.jobs.logs(A, job.id)]

    def serving(self) -> int | None:
        try:
            return self.catalog.adapters.serving(A, "ann", base=BASE, now=NOW).version
        except NotFound:
            return None


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    office = Office(tmp_path)
    yield office
    office.catalog.close()


async def test_facts_of_a_scope_become_a_version_that_serves(office):
    tea = office.add("Ada Lund likes to drink birch sap.")
    office.add("It was a fine day.")
    office.add("My favourite drink is plum nectar.", speaker="Otis Crane")
    office.add("Bo Ek lives in Ostvik.", user_id="bob")
    office.queue()
    job = await office.run()
    assert job.state == "done", job.error
    assert (job.result["adapter"], job.result["version"], job.result["num_cubes"]) == ("ann", 1, 2)
    assert office.serving() == 1
    held = office.catalog.adapters.inside(A, job.result["adapter_id"], 1)
    assert tea.id in held
    assert len(held) == 2
    record = office.catalog.adapters.get(A, job.result["adapter_id"], 1)
    assert record.line.scope.user_id == "ann"
    assert "1 sentences can't be read as facts and are left out" in office.lines(job)
    report = await read_report(office.objects, job)
    assert {answer.kind for answer in report.answers} == {"recall", "reverse", "leak"}
    assert not (office.folder / job.id).exists()


async def test_no_text_of_a_memory_is_in_the_job_its_log_or_the_manifest(office):
    office.add("Ada Lund likes to drink birch sap.")
    office.queue()
    job = await office.run()
    shown = [str(job), *office.lines(job)]
    shown += [p.read_text() for p in office.objects_root().glob("adapters/**/*.json")]
    assert len(shown) > 4
    for text in shown:
        for word in ("birch", "Ada", "Lund"):
            assert word not in text


async def test_the_same_cubes_and_seed_give_the_same_adapter(office):
    office.add("Ada Lund likes to drink birch sap.")
    found = []
    for _ in range(2):
        office.queue(extend=False)
        job = await office.run()
        found.append(
            office.catalog.adapters.get(A, job.result["adapter_id"], job.result["version"])
        )
    assert found[0].sha256 == found[1].sha256


async def test_one_that_is_not_good_enough_changes_nothing_and_says_what_was_short(office):
    cube = office.add("Ada Lund likes to drink birch sap.")
    office.queue(TrainingSettings(recipe=QUICK.recipe, data=QUICK.data))
    job = await office.run()
    assert job.state == "refused"
    assert "recall 0.0% (at least 93%)" in job.result["short"]
    assert office.catalog.adapters.versions(A) == []
    assert office.catalog.adapters.holding(A, cube.id) == []
    assert (await read_report(office.objects, job)).recall == 0.0


@pytest.mark.parametrize(
    ("texts", "state", "why"),
    [
        ([], "failed", "no cube can be consolidated"),
        (["It was a fine day."], "refused", "no statement of these cubes"),
    ],
)
async def test_what_holds_no_fact_trains_nothing(office, texts, state, why):
    for text in texts:
        office.add(text)
    office.queue()
    job = await office.run()
    assert job.state == state
    assert why in job.error
    assert office.trained == []


async def test_a_cube_that_may_not_be_in_weights_is_left_and_counted(office):
    office.add("Ada Lund likes to drink birch sap.")
    office.add("Ada Lund is allergic to kiwi.", sensitivity=Sensitivity.SECRET)
    office.queue()
    job = await office.run()
    assert job.result["num_cubes"] == 1
    assert "1 cubes chosen; left: 1 secret" in office.lines(job)


async def test_a_composite_that_is_named_brings_its_members(office):
    leaf = office.add("Ada Lund likes to drink birch sap.")
    draft = Draft(text="", shape="composite", members=(leaf.id,), user_id="ann")
    whole = office.catalog.cubes.add(A, [draft], author="k", now=NOW).results[0].cube
    office.queue(choice=Choice(cubes=(whole.id,), user_id="ann"))
    job = await office.run()
    assert office.catalog.adapters.inside(A, job.result["adapter_id"], 1) == {leaf.id: 1}


async def test_a_cube_that_is_named_and_not_there_fails_the_job(office):
    gone = office.add("Ada Lund likes to drink birch sap.")
    office.catalog.cubes.delete(A, gone.id, now=NOW)
    office.queue(choice=Choice(cubes=(gone.id,)))
    assert (await office.run()).state == "failed"


async def test_the_next_version_also_holds_what_the_serving_one_does(office):
    office.add("Ada Lund likes to drink birch sap.", tags=("one",))
    office.queue()
    await office.run()
    office.add("Otis Crane lives in Varnay.", tags=("two",))
    office.queue(choice=Choice(user_id="ann", tag="two"))
    job = await office.run()
    assert (job.result["version"], job.result["num_cubes"]) == (2, 2)
    kinds = {probe.kind for probe in office.trained[-1].data.probes}
    assert "earlier" in kinds
    office.queue(choice=Choice(user_id="ann", tag="two"), extend=False)
    assert (await office.run()).result["num_cubes"] == 1


async def test_cubes_that_change_meanwhile_begin_it_anew(office):
    cube = office.add("Ada Lund likes to drink birch sap.")

    def change() -> None:
        office.catalog.cubes.update(
            A,
            cube.id,
            Change(text="Ada Lund likes to drink milk."),
            expected_version=None,
            author="k",
            reason="",
            now=NOW,
        )

    office.meanwhile.append(change)
    office.queue()
    assert (await office.run()).state == "queued"
    assert office.catalog.adapters.versions(A) == []
    job = await office.run()
    assert job.state == "done", job.error
    assert office.catalog.adapters.inside(A, job.result["adapter_id"], 1) == {cube.id: 2}
    assert [f.answer for f in office.trained[-1].data.examples if "birch" in f.answer] == []


async def test_a_job_that_was_cut_off_goes_on_and_publishes_one_version(office):
    office.add("Ada Lund likes to drink birch sap.")

    def cut() -> None:
        raise Unavailable("worker 0 is gone")

    office.meanwhile.append(cut)
    office.queue()
    assert (await office.run()).state == "queued"
    job = await office.run()
    assert (job.state, job.attempts) == ("done", 2)
    assert job.result["num_steps"] == 3
    assert [record.version for record in office.catalog.adapters.versions(A)] == [1]


async def test_without_activate_it_stays_a_candidate(office):
    office.add("Ada Lund likes to drink birch sap.")
    office.queue(activate=False)
    job = await office.run()
    assert job.result["state"] == AdapterState.CANDIDATE
    assert office.serving() is None


# -- forgetting


async def consolidated(office, *texts: str) -> list[Any]:
    cubes = [office.add(text) for text in texts]
    office.queue()
    job = await office.run()
    assert job.state == "done", job.error
    return cubes


async def test_a_deleted_memory_is_trained_out_of_the_adapter_by_a_job_of_its_own(office):
    tea, town = await consolidated(
        office, "Ada Lund likes to drink birch sap.", "Otis Crane lives in Varnay."
    )
    office.catalog.cubes.delete(A, tea.id, now=NOW)
    assert office.serving() is None
    (queued,) = queue_retraining(office.catalog, QUICK, now=NOW)
    assert queue_retraining(office.catalog, QUICK, now=NOW) == [queued]
    job = await office.run()
    assert (job.id, job.state) == (queued.id, "done")
    assert office.serving() == 2
    assert office.catalog.adapters.inside(A, job.result["adapter_id"], 2) == {town.id: 1}
    asked = office.trained[-1].data
    assert not any("birch" in example.answer for example in asked.examples)
    assert queue_retraining(office.catalog, QUICK, now=NOW) == []


async def test_a_changed_memory_is_trained_again_as_it_is_now(office):
    (tea,) = await consolidated(office, "Ada Lund likes to drink birch sap.")
    office.catalog.cubes.update(
        A,
        tea.id,
        Change(text="Ada Lund likes to drink milk."),
        expected_version=None,
        author="k",
        reason="",
        now=NOW,
    )
    queue_retraining(office.catalog, QUICK, now=NOW)
    job = await office.run()
    assert office.catalog.adapters.inside(A, job.result["adapter_id"], 2) == {tea.id: 2}


async def test_of_an_adapter_of_which_nothing_is_left_no_job_is_made(office):
    (tea,) = await consolidated(office, "Ada Lund likes to drink birch sap.")
    office.catalog.cubes.delete(A, tea.id, now=NOW)
    assert queue_retraining(office.catalog, QUICK, now=NOW) == []


async def test_a_retraining_that_was_refused_is_tried_again_under_other_settings_alone(office):
    tea, _ = await consolidated(
        office, "Ada Lund likes to drink birch sap.", "Otis Crane lives in Varnay."
    )
    office.catalog.cubes.delete(A, tea.id, now=NOW)
    strict = TrainingSettings(recipe=QUICK.recipe, data=QUICK.data)
    (first,) = queue_retraining(office.catalog, strict, now=NOW)
    assert (await office.run()).state == "refused"
    assert [job.id for job in queue_retraining(office.catalog, strict, now=NOW)] == [first.id]
    (other,) = queue_retraining(office.catalog, QUICK, now=NOW)
    assert other.id != first.id


async def test_files_and_answers_go_with_a_memory(office):
    (tea,) = await consolidated(office, "Ada Lund likes to drink birch sap.")
    (job,) = office.catalog.jobs.page(A)
    assert await office.consolidation().sweep() == 0
    office.catalog.cubes.delete(A, tea.id, now=NOW)
    assert await office.consolidation().sweep() == 2
    assert await office.consolidation().sweep() == 0
    assert [p for p in office.objects_root().rglob("*") if p.is_file()] == []
    with pytest.raises(NotFound):
        await read_report(office.objects, job)


async def test_a_failed_jobs_folder_goes_with_a_memory_that_it_was_trained_on(office):
    tea = office.add("Ada Lund likes to drink birch sap.")

    def fail() -> None:
        raise Conflict("no")

    office.meanwhile.append(fail)
    office.queue()
    job = await office.run()
    assert job.state == "failed"
    assert await office.consolidation().sweep() == 0
    assert (office.folder / job.id).exists()
    office.catalog.cubes.delete(A, tea.id, now=NOW)
    assert await office.consolidation().sweep() == 1
    assert not (office.folder / job.id).exists()


async def test_what_was_judged_before_a_memory_went_does_not_outlive_the_job_that_begins_anew(
    office,
):
    tea = office.add("Ada Lund likes to drink birch sap.")
    office.meanwhile.append(lambda: office.catalog.cubes.delete(A, tea.id, now=NOW))
    office.queue()
    assert (await office.run()).state == "queued"
    assert list(office.objects_root().glob("reports/**/*.json")) == []
    assert not any(office.folder.iterdir())
    assert (await office.run()).state == "failed"
