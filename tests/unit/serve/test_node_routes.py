"""The routes of the nodes, over a real catalog."""

from memcube.catalog import KvPlace

NODES = "/v1/nodes"


async def test_nodes_are_listed_with_their_shards_and_tenants(api, operator):
    api.nodes("a", zone="x")
    now, shards = api.system.clock(), api.system.catalog.shards
    shards.opened(0, node="a", location="memory:0", epoch=1, now=now)
    told = (await api.ok("GET", NODES, key=operator))["nodes"]
    assert [node["name"] for node in told] == ["a", "spare"]
    assert told[0] == {
        "name": "a",
        "state": "up",
        "since": "2026-03-01T12:00:00+00:00",
        "labels": {"zone": "x"},
        "is_head": False,
        "shards": [0],
        "home_of": [0],
        "num_tenants": 2,
    }
    assert (told[1]["shards"], told[1]["num_tenants"]) == ([], 0)
    shards.opened(0, node="spare", location="memory:0", epoch=2, now=now)
    away = await api.ok("GET", f"{NODES}/a", key=operator)
    assert (away["shards"], away["home_of"], away["num_tenants"]) == ([], [0], 0)
    await api.problem(404, "not_found", "GET", f"{NODES}/unknown", key=operator)


async def test_a_node_is_drained_when_no_tenant_and_no_kv_is_left(api, operator):
    api.nodes("a")
    now, catalog = api.system.clock(), api.system.catalog
    catalog.shards.opened(0, node="a", location="memory:0", epoch=1, now=now)
    tenant, id = api.system.principal().tenant, await api.add("tea")
    place = KvPlace(medium="device", location="a/engine-0", size_bytes=9)
    catalog.kv.mark(tenant, id, {id: 1}, [place], now=now)
    api.system.clock.advance(5)
    for _ in range(2):
        told = await api.ok("POST", f"{NODES}/a/drain", key=operator)
        assert (told["state"], told["since"]) == ("draining", "2026-03-01T12:00:05+00:00")
    catalog.shards.opened(0, node="spare", location="memory:0", epoch=2, now=now)
    told = await api.ok("GET", f"{NODES}/a", key=operator)
    assert (told["state"], told["num_tenants"]) == ("draining", 0)
    catalog.kv.mark(tenant, id, {id: 1}, [], now=now)
    assert (await api.ok("GET", f"{NODES}/a", key=operator))["state"] == "drained"
    assert (await api.ok("POST", f"{NODES}/a/undrain", key=operator))["state"] == "up"


async def test_the_last_node_that_takes_anything_is_not_drained(api, operator):
    api.nodes("a")
    await api.ok("POST", f"{NODES}/a/drain", key=operator)
    told = await api.problem(409, "conflict", "POST", f"{NODES}/spare/drain", key=operator)
    assert "let one join" in told["detail"]
    await api.problem(404, "not_found", "POST", f"{NODES}/unknown/drain", key=operator)


async def test_only_a_node_that_is_down_is_forgotten(api, operator):
    api.nodes("a")
    await api.problem(409, "conflict", "DELETE", f"{NODES}/a", key=operator)
    api.nodes("a", alive=False)
    assert (await api.ok("GET", f"{NODES}/a", key=operator))["state"] == "down"
    told = await api.ok("DELETE", f"{NODES}/a", key=operator)
    assert told == {"name": "a", "forgotten": True}
    await api.problem(404, "not_found", "DELETE", f"{NODES}/a", key=operator)


async def test_a_tenant_is_sent_to_a_node_and_the_last_word_holds(api, operator):
    api.nodes("a", zone="x")
    api.nodes("b")
    path = "/v1/tenants/acme/move"
    first = await api.ok("POST", path, {"to": "zone=x"}, key=operator)
    assert (first["kind"], first["tenant"], first["state"]) == ("move_tenant", "acme", "waiting")
    assert first["reason"] == "an operator sends it to zone=x"
    assert (await api.ok("POST", path, {"to": "zone=x"}, key=operator))["id"] == first["id"]
    last = await api.ok("POST", path, {"to": "b"}, key=operator)
    ended = await api.ok("GET", f"/v1/events/{first['id']}/wait", key=operator)
    assert ended["result"] == {"outcome": "superseded", "by": last["id"]}
    waiting = (await api.ok("GET", "/v1/tasks?state=waiting", key=operator))["events"]
    assert [task["id"] for task in waiting] == [last["id"]]


async def test_a_tenant_is_sent_only_where_something_is_taken(api, operator):
    api.nodes("a")
    api.nodes("b", alive=False)
    await api.ok("POST", f"{NODES}/a/drain", key=operator)
    for tenant, to in (("acme", "a"), ("acme", "b"), ("acme", "c"), ("unknown", "spare")):
        path = f"/v1/tenants/{tenant}/move"
        await api.problem(404, "not_found", "POST", path, {"to": to}, key=operator)
    assert (await api.ok("GET", "/v1/tasks", key=operator))["events"] == []
