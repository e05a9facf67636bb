"""What the routes of cubes do: composites, fusion, versions, freezing, archive, lineage."""

import pytest


async def make(api, *members: str, **more):
    return await api.ok("POST", "/v1/cubes", {"members": list(members), **more})


async def member_texts(api, id: str, **query):
    page = await api.ok("GET", f"/v1/cubes/{id}/members", params=query)
    return [c["text"] for c in page["results"]], page["next_cursor"]


async def test_a_composite_holds_its_members_in_order(api):
    one, two = await api.add("one"), await api.add("two")
    response = await api.call(
        "POST",
        "/v1/cubes",
        {
            "members": [two, one],
            "title": "Ann's profile",
            "user_id": "ann",
            "tags": ["p"],
            "metadata": {"n": 1},
        },
    )
    assert response.status_code == 201
    whole = response.json()
    assert (whole["shape"], whole["kind"], whole["text"]) == ("composite", "document", "")
    assert whole["members"] == [two, one]
    assert whole["metadata"] == {"title": "Ann's profile", "n": 1}
    assert await api.ok("GET", f"/v1/cubes/{whole['id']}", params={}) == whole | {"residency": []}
    assert await member_texts(api, whole["id"]) == (["two", "one"], None)


async def test_members_come_in_pages(api):
    ids = [await api.add(f"{i}") for i in range(5)]
    whole = await make(api, *ids)
    seen, cursor = [], None
    while True:
        query = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        texts, cursor = await member_texts(api, whole["id"], **query)
        seen += texts
        if cursor is None:
            break
    assert seen == [f"{i}" for i in range(5)]


async def test_new_members_are_a_new_version(api):
    one, two = await api.add("one"), await api.add("two")
    whole = await make(api, one)
    told = await api.ok("PUT", f"/v1/cubes/{whole['id']}/members", {"members": [two, one]})
    assert (told["version"], told["members"]) == (2, [two, one])
    versions = (await api.ok("GET", f"/v1/cubes/{whole['id']}/versions"))["versions"]
    assert [v["members"] for v in versions] == [[one], [two, one]]
    back = await api.ok("POST", f"/v1/cubes/{whole['id']}/rollback", {"version": 1})
    assert (back["version"], back["members"]) == (3, [one])


async def test_a_composite_with_a_text_is_found_by_it(api):
    await make(api, text="All about kumquats")
    assert await api.texts("kumquats") == ["All about kumquats"]


async def test_a_leaf_has_no_members(api):
    one, two = await api.add("one"), await api.add("two")
    body = {"members": [two]}
    await api.problem(422, "bad_request", "PUT", f"/v1/cubes/{one}/members", body)
    assert await member_texts(api, one) == ([], None)


async def test_a_composite_can_not_hold_itself(api):
    inner = await make(api)
    outer = await make(api, inner["id"])
    for id in (inner["id"], outer["id"]):
        path = f"/v1/cubes/{inner['id']}/members"
        told = await api.problem(422, "bad_request", "PUT", path, {"members": [id]})
        assert "can't hold itself" in told["detail"]


async def test_a_composition_is_proved_by_its_lineage(api):
    one, two = await api.add("one"), await api.add("two")
    await api.ok("PUT", f"/v1/memories/{one}", {"text": "one more"})
    whole = await api.ok("POST", "/v1/cubes/compose", {"ids": [one, two, one], "title": "both"})
    assert whole["members"] == [one, two, one]
    assert whole["metadata"] == {"title": "both"}
    assert whole["parents"] == [
        {"id": one, "version": 2, "relation": "composed"},
        {"id": two, "version": 1, "relation": "composed"},
    ]
    up = (await api.ok("GET", f"/v1/cubes/{whole['id']}/lineage"))["ancestors"]
    assert {(e["id"], e["version"], e["child"]) for e in up} == {
        (one, 2, whole["id"]),
        (two, 1, whole["id"]),
    }
    down = (await api.ok("GET", f"/v1/cubes/{two}/lineage"))["descendants"]
    assert [(e["id"], e["child"]) for e in down] == [(two, whole["id"])]


async def test_a_fusion_merges_its_parents_and_names_them(api):
    one, two = await api.add("likes tea"), await api.add("likes milk")
    response = await api.call("POST", "/v1/cubes/fuse", {"ids": [one, two]})
    assert response.status_code == 201
    fused = response.json()
    assert (fused["text"], fused["shape"], fused["origin"]) == (
        "likes tea\nlikes milk",
        "leaf",
        "inference",
    )
    assert [p["relation"] for p in fused["parents"]] == ["fused", "fused"]
    assert await api.texts("likes") == ["likes tea\nlikes milk"]
    assert (await api.ok("GET", f"/v1/memories/{one}"))["state"] == "merged"
    await api.problem(409, "illegal_move", "POST", "/v1/cubes/fuse", {"ids": [one, two]})


async def test_a_forgotten_parent_stays_in_the_lineage_by_its_id_alone(api):
    one, two = await api.add("secret of ann"), await api.add("two")
    fused = await api.ok("POST", "/v1/cubes/fuse", {"ids": [one, two], "text": "both"})
    await api.ok("DELETE", f"/v1/memories/{one}")
    told = await api.ok("GET", f"/v1/cubes/{fused['id']}/lineage")
    assert one in {e["id"] for e in told["ancestors"]}
    assert "secret" not in str(told)


@pytest.mark.parametrize(
    "body",
    [
        {"ids": []},
        {"ids": ["x"]},
        {"ids": ["a", "b"], "text": ""},
        {"ids": ["a"] * 101},
        {"text": "x"},
        {"ids": "ab"},
    ],
    ids=lambda b: str(b)[:40],
)
async def test_a_bad_fusion_is_refused(api, body):
    await api.problem(422, "bad_request", "POST", "/v1/cubes/fuse", body)


async def test_a_frozen_cube_says_how_it_can_be_changed(api):
    id = await api.add("tea")
    frozen = await api.ok("POST", f"/v1/cubes/{id}/freeze")
    assert frozen["frozen"] is True
    assert (await api.ok("POST", f"/v1/cubes/{id}/freeze"))["frozen"] is True
    told = await api.problem(409, "frozen", "PUT", f"/v1/memories/{id}", {"text": "milk"})
    assert f"{id!r} is frozen; unfreeze it" in told["detail"]
    await api.problem(409, "frozen", "DELETE", f"/v1/memories/{id}")
    await api.problem(409, "frozen", "POST", f"/v1/cubes/{id}/archive")
    assert (await api.ok("POST", f"/v1/cubes/{id}/unfreeze"))["frozen"] is False
    await api.ok("DELETE", f"/v1/memories/{id}")


async def test_an_archived_cube_is_read_by_id_and_comes_back_by_restore(api):
    id = await api.add("tea")
    archived = await api.ok("POST", f"/v1/cubes/{id}/archive")
    assert (archived["state"], archived["indexed"]) == ("archived", False)
    assert await api.texts("tea") == []
    told = await api.problem(409, "illegal_move", "PUT", f"/v1/memories/{id}", {"text": "x"})
    assert "restore" in told["detail"]
    await api.problem(409, "illegal_move", "POST", f"/v1/cubes/{id}/archive")
    restored = await api.ok("POST", f"/v1/cubes/{id}/restore")
    assert (restored["state"], restored["version"], restored["indexed"]) == ("activated", 2, True)
    assert await api.texts("tea") == ["tea"]
    await api.problem(409, "illegal_move", "POST", f"/v1/cubes/{id}/restore")


@pytest.mark.parametrize("version", [0, -1, "x", None, 1.5])
async def test_a_version_that_is_none_is_refused(api, version):
    id = await api.add("tea")
    body = {"version": version}
    await api.problem(422, "bad_request", "POST", f"/v1/cubes/{id}/rollback", body)


async def test_a_version_that_is_not_there_is_not_found(api):
    id = await api.add("tea")
    path = f"/v1/cubes/{id}/rollback"
    for version in (2, 2**31, 2**62):
        await api.problem(404, "not_found", "POST", path, {"version": version})
        await api.problem(404, "not_found", "GET", f"/v1/memories/{id}?version={version}")


async def test_composites_nest_to_the_stated_depth(api):
    id = (await make(api))["id"]
    for _ in range(16):
        id = (await make(api, id))["id"]
    told = await api.problem(422, "limit_exceeded", "POST", "/v1/cubes", {"members": [id]})
    assert told["limit"] == 16
