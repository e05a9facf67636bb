"""Keys, status, health, metrics, and how errors of any kind are answered."""

import asyncio
import logging
from dataclasses import replace
from typing import Any, cast

import pytest

from memcube.config import Config, PlaintextConfig
from memcube.errors import Unavailable
from memcube.testing.local import LocalSystem
from memcube.tiers import shard

# -- keys ------------------------------------------------------------------------------------------


async def test_a_key_is_told_once_and_works_until_it_is_revoked(api, admin):
    response = await api.call("POST", "/v1/keys", {"name": "ci", "role": "writer"}, key=admin)
    assert response.status_code == 201
    made = response.json()
    assert (made["tenant"], made["name"], made["role"]) == ("acme", "ci", "writer")
    assert made["key"].endswith(made["hint"])
    await api.add("tea", key=made["key"])
    listed = (await api.ok("GET", "/v1/keys", key=admin))["keys"]
    assert made["id"] in {key["id"] for key in listed}
    assert made["key"] not in str(listed)
    told = await api.ok("DELETE", f"/v1/keys/{made['id']}", key=admin)
    assert told == {"id": made["id"], "deleted": True}
    await api.problem(401, "unauthenticated", "GET", "/v1/memories", key=made["key"])
    listed = (await api.ok("GET", "/v1/keys", key=admin))["keys"]
    assert next(key for key in listed if key["id"] == made["id"])["revoked_at"]
    await api.ok("DELETE", f"/v1/keys/{made['id']}", key=admin)


async def test_a_key_ends_at_its_time(api, admin):
    body = {"name": "brief", "expires_at": "2026-03-01T12:01:00Z"}
    made = await api.ok("POST", "/v1/keys", body, key=admin)
    api.system.clock.advance(59)
    await api.ok("GET", "/v1/memories", key=made["key"])
    api.system.clock.advance(1)
    await api.problem(401, "unauthenticated", "GET", "/v1/memories", key=made["key"])


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "x", "role": "god"}, "role"),
        ({"name": "x", "expires_at": "2020-01-01"}, "expires_at"),
        ({"name": "x", "key": "mk_mine"}, "key"),
    ],
    ids=str,
)
async def test_a_bad_key_request_is_refused(api, admin, body, field):
    told = await api.problem(422, "bad_request", "POST", "/v1/keys", body, key=admin)
    assert told["field"] == field


@pytest.mark.parametrize("name", ["", "A", "a/b", "a b", "..", "é", "a" * 64, "a%2fb"])
async def test_a_tenant_of_another_alphabet_is_refused(api, operator, name):
    body = {"name": "x", "tenant": name}
    await api.problem(422, "bad_request", "POST", "/v1/keys", body, key=operator)


async def test_a_new_tenant_begins_empty(api, operator):
    await api.add("tea")
    made = await api.ok("POST", "/v1/keys", {"name": "x", "tenant": "fresh"}, key=operator)
    assert await api.everything(key=made["key"]) == []


async def test_an_operators_key_is_not_an_admins_to_revoke(api, admin, operator):
    keys = (await api.ok("GET", "/v1/keys", key=admin))["keys"]
    (id,) = [key["id"] for key in keys if key["role"] == "operator"]
    await api.problem(403, "forbidden", "DELETE", f"/v1/keys/{id}", key=admin)
    await api.ok("GET", "/v1/status", key=operator)


# -- status, health, metrics -----------------------------------------------------------------------


async def test_status_tells_counts_and_parts(api, reader):
    await api.add("tea")
    id = await api.add("milk")
    await api.ok("POST", f"/v1/cubes/{id}/archive")
    pending = await api.add("bread")
    api.system.catalog.index.unmark("acme", [pending], now=api.system.clock())
    told = await api.ok("GET", "/v1/status", key=reader)
    assert told["cubes"] == {"generated": 2, "archived": 1}
    assert told["pending_index"] == 1
    assert told["embedder"]["identity"] == "hash@1"
    assert [one["shard"] for one in told["shards"]] == [0]
    assert told["version"]


async def test_paths_on_hosts_are_told_to_an_operator_alone(api, reader, admin, operator):
    path = "host-1:/home/ann/.memcube/plaintext/shard-000/28c2"
    opened = api.system.shards[0]._shard
    opened._info = replace(opened._info, location=path)
    id = await api.add("tea")
    for key, told in ((reader, "shard-000/28c2"), (admin, "shard-000/28c2"), (operator, path)):
        (listed,) = (await api.ok("GET", "/v1/status", key=key))["shards"]
        assert listed["location"] == told
        for route in ("memories", "cubes"):
            (place,) = (await api.ok("GET", f"/v1/{route}/{id}", key=key))["residency"]
            assert place["location"] == "shard-0"  # wherever that runs


async def test_while_a_shard_is_down_the_others_serve_and_the_status_says_which(
    tmp_path, prepared, open_api, operator
):
    config = Config(data_dir=tmp_path, plaintext=PlaintextConfig(shards=2))
    system = LocalSystem.open(tmp_path, config=config, template=prepared.file)
    api = open_api(system, operator)
    async with api.client:
        system.shards[1].down = True
        assert (await api.call("GET", "/readyz", key=None)).text == "ready\n"
        up, down = (await api.ok("GET", "/v1/status"))["shards"]
        assert (up["shard"], up["error"]) == (0, None)
        assert (down["shard"], down["epoch"], down["location"]) == (1, None, None)
        assert "shard 1" in down["error"]
        assert (await metrics(api))["memcube_shards_down"] == 1
        system.shards[0].down = True
        told = await api.problem(503, "unavailable", "GET", "/readyz", key=None)
        assert "shard 0" in told["detail"]
    system.close()


async def test_a_shard_that_hangs_is_given_up_in_time(monkeypatch):
    class Hanging:
        async def info(self):
            await asyncio.Event().wait()

    monkeypatch.setattr(shard, "LOOK_DEADLINE_S", 0.01)
    state = await shard.look_at(3, cast(Any, Hanging()))
    assert (state.shard, state.error) == (3, "shard 3 does not answer within 0.01 s")


async def test_health_asks_nobody_and_readiness_asks_the_parts(api):
    response = await api.call("GET", "/healthz", key=None)
    assert (response.status_code, response.text) == (200, "ok\n")
    assert (await api.call("GET", "/readyz", key=None)).text == "ready\n"
    api.system.shards[0].down = True
    assert (await api.call("GET", "/healthz", key=None)).status_code == 200
    response = await api.call("GET", "/readyz", key=None)
    told = api.check(response)
    assert (told["status"], told["code"]) == (503, "unavailable")
    assert "shard 0" in told["detail"]
    assert response.headers["retry-after"] == "2"


def samples(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


async def metrics(api) -> dict[str, float]:
    response = await api.call("GET", "/metrics", key=None)
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return samples(response.text)


async def test_metrics_count_requests_by_route_and_never_by_what_was_sent(counted):
    id = await counted.add("tea")
    await counted.add("tea")
    await counted.ok("GET", f"/v1/memories/{id}")
    await counted.call("GET", "/v1/memories/canary")
    await counted.call("GET", "/canary?canary=1")
    await counted.call("CANARY", "/v1/memories")
    await counted.call("GET", "/v1/memories", key="mk_canary")
    told = await metrics(counted)
    requests = "memcube_http_requests_total"
    by_id = f'{requests}{{method="GET",route="/v1/memories/{{id}}",status='
    assert told[by_id + '"200"}'] == 1
    assert told[by_id + '"404"}'] == 1
    assert told[f'{requests}{{method="GET",route="unmatched",status="404"}}'] == 1
    assert told[f'{requests}{{method="GET",route="/v1/memories",status="401"}}'] == 1
    assert told['memcube_cubes_added_total{event="added"}'] == 1
    assert told['memcube_cubes_added_total{event="repeated"}'] == 1
    assert told["memcube_http_requests_in_flight"] == 1
    count = 'memcube_http_request_seconds_count{method="POST",route="/v1/memories"}'
    assert told[count] == 2
    assert not [name for name in told if "canary" in name.lower() or "acme" in name]


async def test_a_scrape_goes_on_without_a_part(api):
    api.system.shards[0].down = True
    await api.call("POST", "/v1/memories", {"text": "bread", "wait": "stored"})
    assert (await metrics(api))["memcube_index_pending"] == 1


async def test_a_refused_body_is_counted_too(counted):
    headers = {"content-length": "99999999999"}
    await counted.problem(413, "limit_exceeded", "POST", "/v1/memories", b"{}", headers=headers)
    told = await metrics(counted)
    counted = 'memcube_http_requests_total{method="POST",route="unmatched",status="413"}'
    assert told[counted] == 1


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nowhere", "/v2/memories", "/v1/memories/a/b/c"])
async def test_a_path_that_is_none_is_a_problem(api, path):
    await api.problem(404, "not_found", "GET", path)


async def test_a_request_keeps_the_plain_name_that_it_comes_with(api):
    # Serve's proxy names each request, and puts that name into the answer itself.
    response = await api.call("GET", "/nowhere", headers={"x-request-id": "abc-1.2_Z"})
    assert response.json()["request_id"] == "abc-1.2_Z"
    assert "x-request-id" not in response.headers
    for odd in ("two words", "x" * 65, "a,b"):
        response = await api.call("GET", "/nowhere", headers={"x-request-id": odd})
        assert odd not in response.text


async def test_a_method_that_a_path_has_not_is_refused_with_those_it_has(api):
    response = await api.call("PATCH", "/v1/status")
    told = api.check(response)
    assert (told["status"], told["code"]) == (405, "method_not_allowed")
    assert "GET" in response.headers["allow"]


async def test_a_mistake_of_ours_tells_nothing_and_is_logged_under_its_request(
    counted, monkeypatch, caplog
):
    async def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("canary of the inside")

    monkeypatch.setattr(counted.system.service, "find", broken)
    with caplog.at_level(logging.ERROR, "memcube.gateway"):
        response = await counted.call("GET", "/v1/memories")
    told = response.json()
    assert (response.status_code, told["code"]) == (500, "internal")
    assert "canary" not in response.text
    assert response.headers["x-request-id"] == told["request_id"]
    assert told["request_id"] in caplog.text
    assert "canary of the inside" in caplog.text
    seen = await metrics(counted)
    assert seen['memcube_http_requests_total{method="GET",route="/v1/memories",status="500"}'] == 1


async def test_a_part_that_can_not_answer_says_when_to_ask_again(api, monkeypatch):
    async def busy(*_: object, **__: object) -> None:
        raise Unavailable("the catalog is busy", 7.4)

    monkeypatch.setattr(api.system.service, "find", busy)
    response = await api.call("GET", "/v1/memories")
    assert (response.status_code, response.headers["retry-after"]) == (503, "7")
    assert response.json()["detail"] == "the catalog is busy; try again in 7.4 s"


async def test_no_secret_stands_in_an_answer_or_a_log(api, admin, caplog):
    with caplog.at_level(logging.DEBUG):
        for path in ("/v1/status", "/v1/keys", "/v1/memories", "/metrics", "/nowhere"):
            response = await api.call("GET", path, key=admin)
            assert admin not in response.text
        await api.call("POST", "/v1/memories", b"{", key=admin)
        await api.call("GET", "/v1/memories", key=admin + "x")
    assert admin not in caplog.text


async def test_the_backend_opens_and_closes_with_the_application(counted):
    app = counted.app
    del app.state.backend
    async with app.router.lifespan_context(app):
        assert (await counted.call("GET", "/readyz", key=None)).text == "ready\n"
