"""The commands of the scheduler, against a small server in memory."""

import json
from functools import partial

import pytest

from memcube.testing.api import FakeApi

STATUS = {
    "leading": True,
    "epoch": 3,
    "rounds": 12,
    "moves_open": 1,
    "parts": {
        "moves": {"rounds": 12, "error": None, "took_s": 0.01},
        "reconcile": {"rounds": 2, "error": "shard 0 is down", "took_s": 0.2},
    },
    "failing": {"activation": "no engine answers"},
    "places": [
        {
            "place": "node-1/engine-0:activation/device",
            "used_bytes": 500,
            "capacity_bytes": 1_000,
            "readable": False,
        }
    ],
    "queue": {"by_state": {"waiting": 2, "dead": 1}},
}


@pytest.fixture
def api():
    api = FakeApi()
    api.scheduler = STATUS
    return api


@pytest.fixture
def memcube(memcube):
    """Runs a command of the scheduler."""
    return partial(memcube, "scheduler")


def test_the_status_tells_who_leads_what_fails_and_how_full_places_are(memcube):
    code, out, _ = memcube("status")
    assert code == 0
    for told in (
        "leads under epoch 3, 12 rounds, 1 moves under way",
        "part reconcile: 2 rounds, failed: shard 0 is down",
        "places of the activation tier could not be looked at: no engine answers",
        "500 bytes, 50% full, can't be read now",
        "queue: 2 waiting, 1 dead",
    ):
        assert told in out
    assert json.loads(memcube("status", "--json")[1]) == STATUS


def test_a_plan_is_a_dry_run_unless_a_round_is_asked_for(memcube, api):
    code, out, err = memcube("plan", "--limit", "5")
    assert (code, out.count("copy"), "worth it" in out) == (0, 2, True)
    assert "refused: the round is full" in out
    assert "1 to be done, 1 refused" in err
    assert dict(api.requests[-1].url.params) == {"dry_run": "true", "limit": "5"}
    assert "1 done, 1 refused" in memcube("plan", "--now")[2]
    assert api.requests[-1].url.params["dry_run"] == "false"


def test_the_journal_tells_ways_and_outcomes(memcube, api):
    ends = {
        end: {"tier": "activation", "medium": "device", "location": f"{end}/engine-0"}
        for end in ("source", "target")
    }
    api.event("action", "failed", cube="c1", policy="promotion", outcome="no room", **ends)
    api.event("action", "done", cube="c2")
    code, out, _ = memcube("journal", "--cube", "c1")
    assert (code, out.count("copy")) == (0, 1)
    assert "source/engine-0:activation/device → target/engine-0:activation/device" in out
    assert "(no room)" in out
    found = json.loads(memcube("journal", "--json")[1])
    assert [event["cube"] for event in found["events"]] == ["c2", "c1"]


def test_dead_tasks_are_listed_and_retried_and_proposals_accepted(memcube, api):
    dead = api.event("task", "dead", kind="consolidate", outcome="too many jobs")
    api.event("task", "done", kind="consolidate")
    code, out, _ = memcube("tasks", "--state", "dead")
    assert (code, out.count("consolidate"), dead in out) == (0, 1, True)
    assert "waiting" in memcube("retry", dead)[1]
    assert json.loads(memcube("retry", dead, "--json")[1])["id"] == dead
    assert memcube("accept", dead)[1] == f"job job-of-{dead}  queued\n"
    assert json.loads(memcube("accept", dead, "--json")[1])["state"] == "queued"
    assert memcube("retry", "nothing")[0] == 1
