"""The routes of proposals and of the doctor."""

import pytest


async def test_proposals_are_found_shown_applied_and_listed_by_state(api):
    one = await api.add("Ann lives in Oslo.")
    api.system.clock.advance(1)
    two = await api.add("Ann lives in Bergen.")
    (made,) = (await api.ok("POST", "/v1/proposals/find", {"user_id": "ann"}))["proposals"]
    assert (made["kind"], made["state"], made["text"]) == (
        "contradiction",
        "open",
        "Ann lives in Bergen.",
    )
    assert {cube["id"]: cube["text"] for cube in made["cubes"]} == {
        one: "Ann lives in Oslo.",
        two: "Ann lives in Bergen.",
    }
    assert (await api.ok("GET", "/v1/proposals?state=open"))["proposals"] == [made]
    done = await api.ok("POST", f"/v1/proposals/{made['id']}/apply")
    assert done["cube"]["id"] == done["proposal"]["result"]
    assert await api.texts("Ann lives") == ["Ann lives in Bergen."]
    assert (await api.ok("GET", "/v1/proposals?state=open"))["proposals"] == []
    (applied,) = (await api.ok("GET", "/v1/proposals?state=applied"))["proposals"]
    assert applied["id"] == made["id"]


async def test_an_outdated_proposal_shows_no_text_of_what_changed_and_is_refused(api):
    one = await api.add("Ann lives in Oslo.")
    await api.add("Ann lives in Bergen.")
    (made,) = (await api.ok("POST", "/v1/proposals/find", {"user_id": "ann"}))["proposals"]
    await api.ok("PUT", f"/v1/memories/{one}", {"text": "Ann lives in Rome."})
    (shown,) = (await api.ok("GET", "/v1/proposals"))["proposals"]
    assert shown["state"] == "outdated"
    assert {cube["id"]: cube["text"] for cube in shown["cubes"]}[one] is None
    await api.problem(409, "conflict", "POST", f"/v1/proposals/{made['id']}/apply")
    assert len(await api.texts("Ann lives")) == 2


async def test_a_dismissed_proposal_is_not_made_again(api):
    await api.add("Ann lives in Oslo.")
    await api.add("Ann lives in Bergen.")
    (made,) = (await api.ok("POST", "/v1/proposals/find", {"user_id": "ann"}))["proposals"]
    gone = await api.ok("POST", f"/v1/proposals/{made['id']}/dismiss")
    assert gone["state"] == "dismissed"
    assert (await api.ok("POST", "/v1/proposals/find", {"user_id": "ann"}))["proposals"] == []
    await api.problem(409, "conflict", "POST", f"/v1/proposals/{made['id']}/apply")


async def test_proposals_are_paged(api):
    ids = [await api.proposal() for _ in range(5)]
    shown, cursor = [], ""
    for _ in range(3):
        page = await api.ok("GET", f"/v1/proposals?limit=2{cursor}")
        shown += [one["id"] for one in page["proposals"]]
        cursor = f"&cursor={page['next_cursor']}"
    assert page["next_cursor"] is None
    assert sorted(shown) == sorted(ids)


async def test_another_tenants_proposals_are_not_shown_nor_found(api, other):
    await api.add("Ann lives in Oslo.", key=other)
    await api.add("Ann lives in Bergen.")
    assert (await api.ok("POST", "/v1/proposals/find", {}))["proposals"] == []
    await api.proposal(key=other)
    assert (await api.ok("GET", "/v1/proposals"))["proposals"] == []


@pytest.mark.parametrize("over", [{"limit": 201}, {"limit": 0}])
async def test_a_search_over_the_limit_is_refused(api, over):
    response = await api.call("POST", "/v1/proposals/find", over)
    assert response.status_code == 422


async def test_the_doctor_tells_and_mends(api, operator):
    id = await api.add("tea")
    assert (await api.ok("GET", "/v1/doctor", key=operator))["sound"]
    shard = api.system.shards[0]
    await shard.store.delete("acme", {id: 1})
    shard.store._tombstones.clear()
    api.system.clock.advance(60)
    told = await api.ok("GET", "/v1/doctor", key=operator)
    assert (told["sound"], told["findings"][0]["kind"]) == (False, "missing")
    assert told["findings"][0]["examples"] == [f"acme/{id}"]
    assert (await api.ok("POST", "/v1/doctor/repair", key=operator))["sound"]
    assert await api.texts("tea") == ["tea"]


async def test_a_doctor_who_can_not_look_says_so(api, operator):
    api.system.shards[0].down = True
    await api.problem(503, "unavailable", "GET", "/v1/doctor", key=operator)
