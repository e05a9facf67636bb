"""The routes of jobs: start, watch, cancel, resume, read the report."""

import pytest

from memcube.cube import Scope
from memcube.ids import CubeId
from memcube.parametric.dataset import ProbeKind
from memcube.parametric.judgement import Answered, GateReport
from memcube.parametric.specs import ConsolidateSpec, default_name, report_name

CONSOLIDATE = {"kind": "consolidate", "user_id": "ann"}


async def test_a_job_is_queued_with_what_was_asked_for(api):
    body = CONSOLIDATE | {
        "tag": "lasting",
        "stable_days": 30,
        "recipe": {"steps": 7, "distil_weight": 0.5},
    }
    job = await api.ok("POST", "/v1/jobs", body)
    assert (job["state"], job["kind"], job["adapter"]) == ("queued", "consolidate", "ann")
    who = api.system.catalog.access.authenticate(api.key, now=api.system.clock())
    spec = ConsolidateSpec.from_json(api.system.catalog.jobs.get(who.tenant, job["id"]).spec)
    assert (spec.choice.user_id, spec.choice.tag, spec.choice.stable_days) == ("ann", "lasting", 30)
    assert spec.settings.recipe == {"steps": 7, "distil_weight": 0.5}
    assert await api.ok("GET", f"/v1/jobs/{job['id']}") == job


async def test_a_retry_key_names_one_job(api):
    headers = {"Idempotency-Key": "k"}
    first = await api.ok("POST", "/v1/jobs", CONSOLIDATE, headers=headers)
    assert await api.ok("POST", "/v1/jobs", CONSOLIDATE, headers=headers) == first
    other = CONSOLIDATE | {"user_id": "bob"}
    await api.problem(422, "idempotency_mismatch", "POST", "/v1/jobs", other, headers=headers)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "nothing"},
        {"kind": "consolidate", "adapter": "Ann!"},
        {"kind": "consolidate", "recipe": {"rank": 0}},
        {"kind": "consolidate", "recipe": {"layers": 0.5}},
        {"kind": "consolidate", "cubes": ["x"], "tag": "y"},
        {"kind": "consolidate", "limit": 0},
    ],
    ids=str,
)
async def test_what_can_not_be_is_refused_and_queues_nothing(api, wrong):
    await api.problem(422, "bad_request", "POST", "/v1/jobs", wrong)
    assert (await api.ok("GET", "/v1/jobs"))["jobs"] == []


async def test_a_tenant_has_only_so_many_jobs_open(api):
    most = api.system.config.training.max_open_jobs
    for _ in range(most):
        await api.ok("POST", "/v1/jobs", CONSOLIDATE)
    await api.problem(429, "too_busy", "POST", "/v1/jobs", CONSOLIDATE)


async def test_a_queued_job_is_cancelled_and_resumed(api):
    id = (await api.ok("POST", "/v1/jobs", CONSOLIDATE))["id"]
    for _ in range(2):
        assert (await api.ok("POST", f"/v1/jobs/{id}/cancel"))["state"] == "cancelled"
    for _ in range(2):
        assert (await api.ok("POST", f"/v1/jobs/{id}/resume"))["state"] == "queued"


async def test_jobs_are_listed_by_state_and_page(api):
    ended = api.job()
    for _ in range(3):
        api.system.clock.advance(1)
        await api.ok("POST", "/v1/jobs", CONSOLIDATE)
    page = await api.ok("GET", "/v1/jobs?limit=2")
    assert [job["state"] for job in page["jobs"]] == ["queued", "queued"]
    rest = await api.ok("GET", f"/v1/jobs?before={page['next']}&limit=5")
    assert [job["state"] for job in rest["jobs"]] == ["queued", "failed"]
    assert rest["next"] is None
    failed = await api.ok("GET", "/v1/jobs?state=failed")
    assert [job["id"] for job in failed["jobs"]] == [ended]


async def test_a_log_is_read_on(api):
    id = api.job()
    (line,) = (await api.ok("GET", f"/v1/jobs/{id}/logs"))["lines"]
    assert line["text"] == "begun"
    assert (await api.ok("GET", f"/v1/jobs/{id}/logs?after={line['seq']}"))["lines"] == []


async def test_a_job_without_a_judgement_has_no_report(api):
    id = (await api.ok("POST", "/v1/jobs", CONSOLIDATE))["id"]
    await api.problem(404, "not_found", "GET", f"/v1/jobs/{id}/report")


async def test_jobs_and_the_training_that_runs_are_measured(api):
    id = (await api.ok("POST", "/v1/jobs", CONSOLIDATE))["id"]
    now, jobs = api.system.clock(), api.system.catalog.jobs
    running = jobs.claim("one", now=now, ttl_s=9)
    told = {"step": 3, "num_steps": 9, "loss": 1.5, "tokens_per_s": 200.0, "eta_s": None}
    jobs.keep(running, now=now, ttl_s=9, progress=told)
    text = (await api.call("GET", "/metrics", key=None)).text
    for line in (
        'memcube_jobs{state="running"} 1.0',
        'memcube_jobs{state="queued"} 0.0',
        'memcube_training{figure="loss"} 1.5',
        'memcube_training{figure="tokens_per_s"} 200.0',
    ):
        assert line in text
    jobs.finish(running, "done", now=now)
    assert id not in text
    assert "memcube_training{" not in (await api.call("GET", "/metrics", key=None)).text


async def judged(api) -> tuple[str, str]:
    """A job whose report speaks of a memory, and that memory."""
    cube = await api.add("Ann drinks kumquat tea.")
    id = api.job()
    now, catalog = api.system.clock(), api.system.catalog
    who = catalog.access.authenticate(api.key, now=now)
    catalog.jobs.resume(who.tenant, id)
    job = catalog.jobs.hold(catalog.jobs.claim("x", now=now, ttl_s=9), {CubeId(cube): 1})
    catalog.jobs.finish(job, "refused", now=now, result=catalog.jobs.get(who.tenant, id).result)
    said = Answered(
        kind=ProbeKind.RECALL,
        question="What does <Ann> drink?",
        expected=("kumquat tea",),
        said="Milk.",
        holds=False,
    )
    report = GateReport(
        recall=0.5,
        reverse=None,
        earlier=None,
        leak=None,
        refused=None,
        base_nll=2.0,
        nll=2.0,
        adapter_bytes=10,
        answers=(said,),
    )
    await api.objects.put(report_name(job), report.to_json().encode())
    return id, cube


async def test_a_report_has_figures_limits_and_answers(api):
    id, _ = await judged(api)
    report = await api.ok("GET", f"/v1/jobs/{id}/report")
    assert report["figures"]["recall"] == 0.5
    assert report["short"] == ["recall 50.0% (at least 93%)"]
    assert report["answers"][0]["said"] == "Milk."
    assert "history" not in (await api.ok("GET", f"/v1/jobs/{id}"))["result"]


async def test_the_page_draws_the_report_and_escapes_what_memories_say(api):
    id, _ = await judged(api)
    response = await api.call("GET", f"/v1/jobs/{id}/report?format=html")
    assert response.headers["content-type"].startswith("text/html")
    assert "What does &lt;Ann&gt; drink?" in response.text
    assert response.text.count("<polyline") == 3
    assert "<script" not in response.text


@pytest.mark.parametrize("how", ["change", "delete"])
async def test_the_answers_go_with_the_memory_that_they_speak_of(api, how):
    id, cube = await judged(api)
    if how == "delete":
        await api.ok("DELETE", f"/v1/memories/{cube}")
    else:
        await api.ok("PUT", f"/v1/memories/{cube}", {"text": "Ann drinks milk."})
    report = await api.ok("GET", f"/v1/jobs/{id}/report")
    assert report["answers"] is None
    page = (await api.call("GET", f"/v1/jobs/{id}/report?format=html")).text
    assert "kumquat" not in page


@pytest.mark.parametrize(
    ("scope", "name"),
    [
        ({"user_id": "ann"}, "ann"),
        ({"user_id": "ann", "run_id": "r.1"}, "ann-r.1"),
        ({}, "everyone"),
    ],
)
def test_an_adapter_is_named_after_its_scope(scope, name):
    ids = Scope(tenant="t", **scope)
    assert default_name(ids.user_id, ids.agent_id, ids.run_id) == name


def test_ids_that_are_no_names_get_a_hash_that_tells_them_apart():
    names = {default_name(user, None, None) for user in ("Ann", "ann ", "ÄNN", "x" * 300, "..", "")}
    assert len(names) == 6
    assert all(len(name) <= 63 and name[0].isalnum() for name in names)
