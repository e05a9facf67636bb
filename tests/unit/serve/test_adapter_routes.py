"""The routes of adapters: list, activate, rollback."""


async def states(api):
    found = (await api.ok("GET", "/v1/adapters"))["adapters"]
    return {one["version"]: (one["state"], one["reason"]) for one in found}


async def test_adapters_are_listed_with_their_states_and_scope(api):
    id = await api.adapter()
    newest, first = (await api.ok("GET", "/v1/adapters"))["adapters"]
    assert (newest["id"], newest["version"], newest["state"]) == (id, 2, "serving")
    assert (first["state"], first["reason"]) == ("retired", "superseded")
    assert (first["user_id"], first["agent_id"]) == ("ann", None)
    assert first["size_bytes"] > 0


async def test_a_version_is_activated_and_rolled_back(api):
    id = await api.adapter()
    for _ in range(2):
        done = await api.ok("POST", f"/v1/adapters/{id}/activate", {"version": 1})
        assert (done["version"], done["state"]) == (1, "serving")
    assert (await api.ok("POST", f"/v1/adapters/{id}/rollback"))["version"] == 2
    assert await states(api) == {2: ("serving", None), 1: ("retired", "rolled back")}
    await api.problem(409, "conflict", "POST", f"/v1/adapters/{id}/rollback")
    assert (await states(api))[2] == ("serving", None)


async def test_engines_forget_the_version_that_stops(api):
    engine, told = api.system.engines[0], []

    async def forget(cubes, tenant):
        told.append({name.partition(":")[0] for name in cubes})
        return 0

    engine.forget = forget
    id = await api.adapter()
    await api.ok("POST", f"/v1/adapters/{id}/activate", {"version": 1})
    await api.ok("POST", f"/v1/adapters/{id}/rollback")
    assert told == [{"adapter"}, {"adapter"}]


async def test_one_that_holds_a_deleted_memory_can_not_be_activated(api):
    id = await api.adapter()
    await api.ok("DELETE", "/v1/memories?user_id=ann")
    assert await states(api) == {2: ("retired", "stale"), 1: ("retired", "stale")}
    for path, body in (("activate", {"version": 1}), ("rollback", None)):
        given = () if body is None else (body,)
        await api.problem(409, "conflict", "POST", f"/v1/adapters/{id}/{path}", *given)


async def test_a_version_that_is_not_there_is_not_found(api):
    id = await api.adapter()
    await api.problem(404, "not_found", "POST", f"/v1/adapters/{id}/activate", {"version": 9})
    await api.problem(422, "bad_request", "POST", f"/v1/adapters/{id}/activate", {"version": 0})


async def test_lineage_is_read_both_ways(api):
    id = await api.adapter()
    found = await api.ok("GET", f"/v1/adapters/{id}/versions/2")
    ((cube, version),) = [(inside["id"], inside["version"]) for inside in found["cubes"]]
    assert (found["state"], version) == ("serving", 1)
    holders = (await api.ok("GET", f"/v1/cubes/{cube}/adapters"))["adapters"]
    assert [(h["adapter"], h["version"], h["state"], h["cube_version"]) for h in holders] == [
        (id, 1, "retired", 1),
        (id, 2, "serving", 1),
    ]
    await api.problem(404, "not_found", "GET", f"/v1/adapters/{id}/versions/3")
