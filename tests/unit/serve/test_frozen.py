"""Frozen cubes can't be changed by anyone: every changing route, with the most powerful key."""

import pytest
from fastapi.routing import iter_route_contexts

FROZEN, FREE = "frozen", "free"

# What each route that could change something does with a frozen cube {id}: refuses it (409 frozen),
# or has nothing to do with what the cube says. {fresh} is a cube that is not frozen.
MUTATIONS = {
    ("POST", "/v1/memories"): (FREE, {"text": "another", "user_id": "ann"}),
    ("POST", "/v1/memories/batch"): (FREE, {"items": [{"text": "another", "user_id": "ann"}]}),
    ("PUT", "/v1/memories/{id}"): (FROZEN, {"text": "changed"}),
    ("DELETE", "/v1/memories/{id}"): (FROZEN, None),
    ("DELETE", "/v1/memories"): (FROZEN, "?user_id=ann"),
    ("POST", "/v1/memories/rollback"): (FROZEN, {"user_id": "ann", "to": "2026-03-01T12:00:00Z"}),
    ("POST", "/v1/cubes"): (FREE, {"members": ["{id}"]}),
    ("POST", "/v1/cubes/compose"): (FREE, {"ids": ["{id}"]}),
    ("POST", "/v1/cubes/fuse"): (FROZEN, {"ids": ["{id}", "{fresh}"]}),
    ("PUT", "/v1/cubes/{id}/members"): (FROZEN, {"members": []}),
    ("POST", "/v1/cubes/{id}/migrate"): (FREE, {"tier": "activation"}),
    ("POST", "/v1/cubes/{id}/rollback"): (FROZEN, {"version": 1}),
    ("POST", "/v1/cubes/{id}/archive"): (FROZEN, None),
    ("POST", "/v1/cubes/{id}/restore"): (FROZEN, None),
    ("POST", "/v1/cubes/{id}/freeze"): (FREE, None),
    ("POST", "/v1/proposals/find"): (FREE, {"user_id": "ann"}),
    ("POST", "/v1/proposals/{proposal}/apply"): (FROZEN, None),
    ("POST", "/v1/proposals/{proposal}/dismiss"): (FREE, None),
    ("POST", "/v1/snapshots"): (FREE, {"name": "n", "user_id": "ann"}),
    ("DELETE", "/v1/snapshots/{snapshot}"): (FREE, None),
    ("POST", "/v1/doctor/repair"): (FREE, None),
}
# Routes that name no cube and read, or are of other things.
OTHER = {
    ("POST", "/v1/memories/search"),
    ("POST", "/v1/memories/compare"),
    ("POST", "/v1/context"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/keys"),
    ("DELETE", "/v1/keys/{id}"),
    ("POST", "/v1/adapters/{id}/activate"),
    ("POST", "/v1/adapters/{id}/rollback"),
    ("POST", "/v1/jobs"),
    ("POST", "/v1/jobs/{id}/cancel"),
    ("POST", "/v1/jobs/{id}/resume"),
    ("POST", "/v1/cubes/{id}/unfreeze"),
    ("POST", "/v1/scheduler/plan"),
    ("POST", "/v1/tasks/{id}/retry"),
    ("POST", "/v1/tasks/{id}/accept"),
    ("POST", "/v1/nodes/{name}/drain"),
    ("POST", "/v1/nodes/{name}/undrain"),
    ("DELETE", "/v1/nodes/{name}"),
    ("POST", "/v1/tenants/{tenant}/move"),
}


def test_every_changing_route_is_in_the_table(api):
    routes = {
        (method, route.path)
        for route in iter_route_contexts(api.app.routes)
        for method in (route.methods or ())
        if method not in ("GET", "HEAD")
    }
    table = {
        (method, path.replace("{proposal}", "{id}").replace("{snapshot}", "{id}"))
        for method, path in MUTATIONS
    }
    assert routes == table | OTHER, "a new changing route needs its word on frozen cubes"


async def said(api, id: str) -> dict:
    """A cube but for where its payloads lie."""
    cube = await api.ok("GET", f"/v1/memories/{id}")
    return {name: value for name, value in cube.items() if name != "residency"}


@pytest.mark.parametrize("shape", ["leaf", "composite", "archived"])
@pytest.mark.parametrize("route", MUTATIONS, ids=" ".join)
async def test_a_frozen_cube_stays_as_it_is(api, operator, route, shape):
    outcome, sent = MUTATIONS[route]
    if route[1].endswith("/apply") and shape != "leaf":
        pytest.skip("a proposal is of searchable leaves")
    proposal = await api.proposal()
    (named,) = (await api.ok("GET", "/v1/proposals"))["proposals"]
    id = named["cubes"][0]["id"]
    fresh = await api.add("fresh")
    if shape == "composite":
        id = (await api.ok("POST", "/v1/cubes", {"members": [fresh], "user_id": "ann"}))["id"]
    api.system.clock.advance(60)
    if shape == "leaf" and not route[1].endswith("/apply"):
        await api.ok("PUT", f"/v1/memories/{id}", {"text": "tea"})
    if shape == "archived":
        await api.ok("POST", f"/v1/cubes/{id}/archive")
    await api.ok("POST", f"/v1/cubes/{id}/freeze")
    before = await said(api, id)
    versions = await api.ok("GET", f"/v1/cubes/{id}/versions")
    fill = {"{id}": id, "{fresh}": fresh, "{proposal}": proposal}
    fill["{snapshot}"] = await api.snapshot()
    path, query, body = route[1], "", ()
    for name, value in fill.items():
        path = path.replace(name, value)
    if isinstance(sent, str):
        query = sent
    elif sent is not None:
        names = {
            field: [fill.get(v, v) for v in sent[field]]
            for field in ("ids", "members")
            if field in sent
        }
        body = (sent | names,)
    response = await api.call(route[0], path + query, *body, key=operator)
    # The composite is as it was at the time that the rollback goes back to.
    as_it_was = shape == "composite" and route == ("POST", "/v1/memories/rollback")
    if outcome == FROZEN and not as_it_was:
        assert (response.status_code, response.json()["code"]) == (409, "frozen"), response.text
    elif outcome == FREE and (shape, route[1]) != ("archived", "/v1/cubes/{id}/migrate"):
        assert response.is_success, response.text
    assert await said(api, id) == before
    assert await api.ok("GET", f"/v1/cubes/{id}/versions") == versions


async def test_an_expiry_wins_over_freezing(api):
    id = await api.add("tea", ttl_s=60)
    await api.ok("POST", f"/v1/cubes/{id}/freeze")
    api.system.clock.advance(61)
    await api.problem(404, "not_found", "GET", f"/v1/memories/{id}")
    await api.system.reconcile()
    assert (await api.ok("GET", "/v1/status"))["cubes"] == {"expired": 1}
