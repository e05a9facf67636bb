"""The commands of the lifecycle, against a small server in memory."""

import io
import json

import pytest

ORPHAN = {"check": "index", "kind": "orphan", "advice": "remove it", "count": 2}


def sent(api):
    return json.loads(api.requests[-1].content)


def test_a_snapshot_is_made_listed_compared_with_and_deleted(memcube, api):
    memcube("add", "Ann likes tea", "--user", "ann")
    code, out, _ = memcube("snapshot", "create", "spring", "--user", "ann", "--at", "2024-04-01")
    assert (code, sent(api)["at"]) == (0, "2024-04-01T00:00:00Z")
    id = out.split()[-1]
    assert "user=ann" in memcube("snapshot", "list")[1]
    assert "+ Ann likes tea" in memcube("compare", "--snapshot", "spring")[1]
    assert "since" not in sent(api)
    assert memcube("snapshot", "delete", id)[1] == f"deleted {id}\n"
    assert memcube("snapshot", "list")[1] == ""


def test_a_comparison_walks_all_pages_up_to_one_time(memcube, api):
    for n in range(450):
        api._add({"text": f"turn {n}", "user_id": "ann"})
    code, out, _ = memcube("compare", "--user", "ann", "--since", "2024-01-01")
    assert (code, out.count("+ turn")) == (0, 450)
    untils = [json.loads(request.content).get("until") for request in api.requests]
    assert untils == [None, "2024-05-01T12:00:00Z", "2024-05-01T12:00:00Z"]
    assert "nothing changed" in memcube("compare", "--user", "bob", "--since", "2024-01-01")[2]


def test_a_rollback_asks_first_and_says_what_it_did(memcube, api, monkeypatch):
    memcube("add", "tea", "--user", "ann")
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert memcube("rollback", "--user", "ann", "--to", "2024-04-01")[0] == 1
    code, out, _ = memcube("rollback", "--user", "ann", "--to", "2024-04-01", "--yes")
    assert (code, out) == (0, "0 back, 1 out of search\n")
    assert "idempotency-key" in api.requests[-1].headers


@pytest.mark.parametrize("command", ["compare", "rollback"])
def test_a_time_or_a_snapshot_is_needed_and_not_both(memcube, api, command):
    option = "--since" if command == "compare" else "--to"
    assert memcube(command, "--user", "ann")[0] == 2
    assert memcube(command, option, "2024-04-01", "--snapshot", "spring")[0] == 2
    assert api.requests == []


def test_proposals_are_found_listed_applied_and_dismissed(memcube, api):
    for text in ("Ann likes tea", "Ann likes tea!"):
        memcube("add", text, "--user", "ann")
    code, out, _ = memcube("proposals", "find", "--user", "ann")
    assert (code, "= Ann likes tea" in out, "cosine 0.97" in out) == (0, True, True)
    id = out.split()[-1]
    assert id in memcube("proposals", "list")[1]
    assert "merged 2 into 9" in memcube("proposals", "apply", id)[1]
    assert memcube("proposals", "dismiss", id)[1] == f"dismissed {id}\n"
    assert memcube("proposals", "apply", "unknown")[0] == 1


def test_the_doctor_exits_with_1_until_all_is_mended(memcube, api):
    assert "all is well" in memcube("doctor")[1]
    api.findings.append(ORPHAN | {"examples": ["acme/1"]})
    code, out, _ = memcube("doctor")
    assert (code, "2 index orphan" in out, "acme/1" in out) == (1, True, True)
    assert json.loads(memcube("doctor", "--json")[1])["sound"] is False
    code, out, _ = memcube("doctor", "--repair")
    assert (code, "2 mended" in out) == (0, True)
    assert memcube("doctor")[0] == 0
