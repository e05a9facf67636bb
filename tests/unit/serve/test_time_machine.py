"""The routes of the time machine: what was, what changed, and back."""

import pytest

SCOPE = {"user_id": "ann"}


async def at(api, seconds: float = 60) -> str:
    """The present time, after which some time goes by."""
    now = api.system.clock().isoformat()
    api.system.clock.advance(seconds)
    return now


async def then(api, time: str, **more) -> list[str]:
    params = {"as_of": time, "user_id": "ann", **more}
    response = await api.call("GET", "/v1/memories", params=params)
    assert response.is_success, response.text
    return [cube["text"] for cube in response.json()["results"]]


async def test_a_list_as_of_a_time_shows_what_was(api):
    id = await api.add("tea")
    await at(api)
    await api.add("milk")
    before = await at(api)
    await api.ok("PUT", f"/v1/memories/{id}", {"text": "coffee"})
    await api.add("bread")
    now = await at(api)
    assert await then(api, before) == ["milk", "tea"]
    assert await then(api, now) == ["bread", "milk", "coffee"]
    assert await then(api, before, limit=1) == ["milk"]
    assert await then(api, before, kind="episode") == []


@pytest.mark.parametrize("more", [{"state": "archived"}, {"tag": "x"}])
async def test_what_is_not_known_of_a_past_is_refused(api, more):
    params = {"as_of": await at(api), **more}
    await api.problem(422, "bad_request", "GET", "/v1/memories", params=params)


async def test_two_times_are_compared_with_the_texts_of_both(api):
    id, gone = await api.add("tea"), await api.add("gone")
    since = await at(api)
    await api.ok("PUT", f"/v1/memories/{id}", {"text": "coffee"})
    await api.ok("DELETE", f"/v1/memories/{gone}")
    new = await api.add("new")
    until = await at(api)
    await api.add("later")
    body = {**SCOPE, "since": since, "until": until}
    told = await api.ok("POST", "/v1/memories/compare", body)
    found = {one["id"]: one for one in told["results"]}
    assert {id: one["change"] for id, one in found.items()} == {
        id: "changed",
        gone: "deleted",
        new: "added",
    }
    assert (found[id]["before"]["text"], found[id]["after"]["text"]) == ("tea", "coffee")
    assert (found[gone]["before"], found[gone]["after"]) == (None, None)
    assert "gone" not in str(found[gone]["after"])
    one = await api.ok("POST", "/v1/memories/compare", body | {"limit": 1})
    rest = await api.ok(
        "POST", "/v1/memories/compare", body | {"limit": 5, "cursor": one["next_cursor"]}
    )
    assert [r["id"] for r in one["results"] + rest["results"]] == sorted(found)


async def test_a_scope_goes_back_and_its_searches_with_it(api):
    id = await api.add("tea")
    before = await at(api)
    await api.ok("PUT", f"/v1/memories/{id}", {"text": "coffee"})
    new = await api.add("bread")
    await at(api)
    done = await api.ok("POST", "/v1/memories/rollback", {**SCOPE, "to": before})
    assert [one["id"] for one in done["changed"]] == [id]
    assert [one["id"] for one in done["out_of_search"]] == [new]
    assert (done["cannot_restore"], done["pending"]) == ([], 0)
    assert await api.texts("tea") == ["tea"]
    assert await api.texts("coffee bread") == []
    held = api.system.shards[0].held()
    assert (id in held, new in held) == (True, False)
    assert (await api.ok("GET", f"/v1/memories/{new}"))["state"] == "archived"


async def test_a_rollback_says_what_it_can_not_restore(api):
    gone = await api.add("canary")
    before = await at(api)
    await api.ok("DELETE", f"/v1/memories/{gone}")
    done = await api.ok("POST", "/v1/memories/rollback", {**SCOPE, "to": before})
    assert [one["id"] for one in done["cannot_restore"]] == [gone]
    await api.problem(404, "not_found", "GET", f"/v1/memories/{gone}")


async def test_a_rollbacks_retry_has_one_effect_and_the_same_answer(api):
    id = await api.add("tea")
    before = await at(api)
    await api.ok("PUT", f"/v1/memories/{id}", {"text": "coffee"})
    body, headers = {**SCOPE, "to": before}, {"Idempotency-Key": "k"}
    first = await api.ok("POST", "/v1/memories/rollback", body, headers=headers)
    await api.ok("PUT", f"/v1/memories/{id}", {"text": "third"})
    assert await api.ok("POST", "/v1/memories/rollback", body, headers=headers) == first
    assert (await api.ok("GET", f"/v1/memories/{id}"))["text"] == "third"
    other = {**SCOPE, "to": await at(api)}
    await api.problem(
        422, "idempotency_mismatch", "POST", "/v1/memories/rollback", other, headers=headers
    )


async def test_the_kv_of_what_went_back_is_forgotten(api):
    id = await api.add("tea")
    before = await at(api)
    await api.ok("PUT", f"/v1/memories/{id}", {"text": "coffee"})
    told: list[str] = []

    async def changed(tenant, ids) -> None:
        told.extend(ids)

    api.app.state.backend.lifecycle.time_machine._settling._changed = changed
    await api.ok("POST", "/v1/memories/rollback", {**SCOPE, "to": before})
    assert told == [id]


async def test_a_snapshot_stands_for_its_scope_and_time(api):
    id = await api.add("tea")
    made = await api.ok("POST", "/v1/snapshots", {"name": "spring", **SCOPE})
    await at(api)
    await api.ok("PUT", f"/v1/memories/{id}", {"text": "coffee"})
    for name in ("spring", made["id"]):
        told = await api.ok("POST", "/v1/memories/compare", {"snapshot": name})
        assert [one["id"] for one in told["results"]] == [id]
    await api.ok("POST", "/v1/memories/rollback", {"snapshot": "spring"})
    assert (await api.ok("GET", f"/v1/memories/{id}"))["text"] == "tea"
    (listed,) = (await api.ok("GET", "/v1/snapshots"))["snapshots"]
    assert listed == made
    await api.ok("DELETE", f"/v1/snapshots/{made['id']}")
    await api.problem(404, "not_found", "POST", "/v1/memories/compare", {"snapshot": "spring"})


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("compare", {"user_id": "ann"}, "since"),
        ("compare", {"since": "2027-01-01T00:00:00Z"}, "since"),
        ("compare", {"since": "2026-01-01T00:00:00Z", "until": "2027-01-01T00:00:00Z"}, "until"),
        ("compare", {"since": "2026-02-02T00:00:00Z", "until": "2026-01-01T00:00:00Z"}, "since"),
        ("compare", {"since": "2026-01-01T00:00:00Z", "snapshot": "x"}, "snapshot"),
        ("rollback", {"user_id": "ann"}, "to"),
        ("rollback", {"user_id": "ann", "to": "2027-01-01T00:00:00Z"}, "to"),
        ("rollback", {"to": "2026-01-01T00:00:00Z"}, None),
        ("rollback", {"user_id": "ann", "snapshot": "x"}, "snapshot"),
    ],
)
async def test_a_time_that_says_nothing_is_refused(api, path, body, field):
    told = await api.problem(422, "bad_request", "POST", f"/v1/memories/{path}", body)
    assert told.get("field") == field


async def test_a_snapshots_time_may_not_be_to_come_and_its_name_is_taken_once(api):
    late = {"name": "n", "at": "2027-01-01T00:00:00Z"}
    await api.problem(422, "bad_request", "POST", "/v1/snapshots", late)
    await api.ok("POST", "/v1/snapshots", {"name": "n", **SCOPE})
    await api.problem(409, "conflict", "POST", "/v1/snapshots", {"name": "n", "user_id": "bob"})


async def test_another_tenants_past_is_not_shown(api, other):
    await api.add("theirs", key=other)
    theirs = await api.ok("POST", "/v1/snapshots", {"name": "n", **SCOPE}, key=other)
    now = await at(api)
    assert await then(api, now) == []
    since = {**SCOPE, "since": "2026-01-01T00:00:00Z"}
    assert (await api.ok("POST", "/v1/memories/compare", since))["results"] == []
    for id in ("n", theirs["id"]):
        await api.problem(404, "not_found", "POST", "/v1/memories/compare", {"snapshot": id})
        await api.problem(404, "not_found", "POST", "/v1/memories/rollback", {"snapshot": id})
    assert (await api.ok("GET", "/v1/snapshots"))["snapshots"] == []
