"""Cubes into the activation tier and back: what is built, shown, and made unservable."""

import pytest

from memcube.catalog import NodeSeen
from memcube.ids import uuid7
from memcube.testing.chat import BYTES_PER_TOKEN, ScriptedModel
from memcube.testing.local import START

MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture
def engine(system) -> ScriptedModel:
    return system.engines[0]


async def migrate(api, id: str, tier: str = "activation"):
    return await api.ok("POST", f"/v1/cubes/{id}/migrate", {"tier": tier})


async def kv(api, id: str) -> list[dict]:
    """The cube's KV as the engines tell it, which must also be what is noted of it."""
    places = []
    for path in (f"/v1/cubes/{id}", f"/v1/memories/{id}"):
        residency = (await api.ok("GET", path))["residency"]
        places.append([place for place in residency if place["tier"] == "activation"])
    assert places[0] == places[1]
    return places[0]


async def chat(api, *ids: str):
    asked = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Where does Ann live?"}],
        "memory": {"cube_ids": list(ids)},
    }
    return (await api.ok("POST", "/v1/chat/completions", asked))["memory"]


async def composite(api, *texts: str) -> tuple[str, list[str]]:
    ids = [await api.add(text) for text in texts]
    return (await api.ok("POST", "/v1/cubes", {"members": ids, "user_id": "ann"}))["id"], ids


async def test_a_migrated_leaf_is_attached_by_the_first_question(api, engine):
    id = await api.add("Ann moved to Oslo")
    told = await migrate(api, id)
    assert (told["id"], told["tier"], told["cubes"], told["engine"]) == (id, "activation", 1, 0)
    assert told["tokens"] == told["built_tokens"] > 0
    assert told["size_bytes"] == told["tokens"] * BYTES_PER_TOKEN
    (place,) = told["residency"]
    assert (place["medium"], place["location"]) == ("device", "node-1/engine-0")
    assert await kv(api, id) == [place]
    assert (await chat(api, id))["cubes"] == [{"id": id, "form": "exact_kv", "in_adapter": False}]


async def test_a_migrated_composite_holds_all_its_members(api, engine):
    whole, ids = await composite(api, "Ann moved to Oslo", "Ann drinks tea")
    told = await migrate(api, whole)
    assert told["cubes"] == 2
    assert await kv(api, whole) == told["residency"]
    assert {use["form"] for use in (await chat(api, whole))["cubes"]} == {"exact_kv"}
    shown = (await api.ok("GET", f"/v1/cubes/{ids[0]}"))["residency"]
    assert {place["tier"] for place in shown} == {"plaintext", "activation"}


async def test_to_migrate_again_builds_nothing_and_answers_the_same(api, engine):
    id = await api.add("Ann moved to Oslo")
    first, again = await migrate(api, id), await migrate(api, id)
    assert again == first | {"built_tokens": 0}


async def test_back_to_plaintext_drops_the_kv_and_keeps_the_text(api, engine):
    whole, ids = await composite(api, "Ann moved to Oslo", "Ann drinks tea")
    built = await migrate(api, whole)
    told = await migrate(api, whole, "plaintext")
    assert told["dropped_bytes"] == built["size_bytes"]
    assert told["residency"] == []
    assert await kv(api, whole) == []
    assert await api.texts("tea") == ["Ann drinks tea"]
    assert {use["form"] for use in (await chat(api, whole))["cubes"]} == {"text"}
    await migrate(api, ids[0], "plaintext")
    assert (await migrate(api, ids[0], "plaintext"))["dropped_bytes"] == 0


@pytest.mark.parametrize("how", ["update", "delete", "archive", "rollback", "scope", "fuse"])
async def test_a_change_of_any_member_makes_all_kv_of_it_unservable_before_the_answer(
    api, engine, how
):
    whole, ids = await composite(api, "Ann moved to Oslo", "Ann drinks tea")
    other, _ = await composite(api, "Bob lives in Rome")
    await migrate(api, whole)
    await migrate(api, ids[0])
    await migrate(api, other)
    path = f"/v1/memories/{ids[0]}"
    if how == "update":
        await api.ok("PUT", path, {"text": "Ann moved to Bergen"})
    elif how == "delete":
        await api.ok("DELETE", path)
    elif how == "archive":
        await api.ok("POST", f"/v1/cubes/{ids[0]}/archive")
    elif how == "rollback":
        await api.ok("PUT", path, {"tags": ["x"]})
        await migrate(api, whole)
        await api.ok("POST", f"/v1/cubes/{ids[0]}/rollback", {"version": 1})
    elif how == "fuse":
        await api.ok("POST", "/v1/cubes/fuse", {"ids": ids})
    else:
        await api.ok("DELETE", "/v1/memories?user_id=ann")
    assert await engine.residency(ids[:1]) == []
    assert not any("Oslo" in text for *_, text in engine._kv)
    if how != "scope":
        assert await kv(api, whole) == []
        assert await kv(api, other) != []


async def test_what_is_changed_while_it_is_built_is_not_kept(api, engine, system):
    whole, ids = await composite(api, "Ann moved to Oslo", "Ann drinks tea")
    tenant = system.principal().tenant

    def delete() -> None:
        # Straight in the catalog: the engine was told before it had anything to drop.
        system.catalog.cubes.delete(tenant, ids[0], now=system.clock())

    engine.on_build = delete
    body = {"tier": "activation"}
    told = await api.problem(409, "conflict", "POST", f"/v1/cubes/{whole}/migrate", body)
    assert "changed" in told["detail"]
    assert not any("Oslo" in text for *_, text in engine._kv)
    assert await kv(api, whole) == []
    assert (await migrate(api, whole))["cubes"] == 1


async def test_the_same_text_in_two_tenants_is_built_in_each(api, engine, other):
    mine, theirs = await api.add("Ann moved to Oslo"), await api.add("Ann moved to Oslo", key=other)
    await migrate(api, mine)
    path = f"/v1/cubes/{theirs}/migrate"
    told = await api.ok("POST", path, {"tier": "activation"}, key=other)
    assert told["built_tokens"] == told["tokens"] > 0
    assert await kv(api, mine) == told["residency"]


async def test_what_holds_no_text_or_is_out_of_search_is_a_conflict(api):
    body = {"tier": "activation"}
    empty = (await api.ok("POST", "/v1/cubes", {"title": "empty"}))["id"]
    archived = await api.add("Ann moved to Oslo")
    await api.ok("POST", f"/v1/cubes/{archived}/archive")
    for id, why in ((empty, "no text"), (archived, "archived")):
        told = await api.problem(409, "conflict", "POST", f"/v1/cubes/{id}/migrate", body)
        assert why in told["detail"]


@pytest.mark.parametrize("body", [{}, {"tier": "parametric"}, {"tier": "activation", "x": 1}])
async def test_another_tier_is_refused(api, body):
    id = await api.add("Ann moved to Oslo")
    await api.problem(422, "bad_request", "POST", f"/v1/cubes/{id}/migrate", body)


async def test_an_engine_that_is_down_is_told_and_leaves_what_was_noted(api, engine):
    id = await api.add("Ann moved to Oslo")
    built = await migrate(api, id)
    engine.down = True
    for tier in ("activation", "plaintext"):
        body = {"tier": tier}
        response = await api.call("POST", f"/v1/cubes/{id}/migrate", body)
        assert api.check(response)["code"] == "unavailable"
        assert response.headers["retry-after"]
    assert await kv(api, id) == built["residency"]


@pytest.mark.parametrize("tier", ["activation", "plaintext"])
async def test_without_a_chat_model_it_is_a_conflict_that_says_what_to_do(api, tier):
    object.__setattr__(api.app.state.backend, "tier", None)
    id = await api.add("Ann moved to Oslo")
    body = {"tier": tier}
    told = await api.problem(409, "conflict", "POST", f"/v1/cubes/{id}/migrate", body)
    assert "activation.actors=1" in told["detail"]
    await api.problem(404, "not_found", "POST", f"/v1/cubes/{uuid7(START)}/migrate", body)
    assert await kv(api, id) == []


async def test_kv_is_built_on_the_node_that_is_named(api, system, engine):
    nodes = [
        NodeSeen(name=name, labels={"zone": "west"}, alive=True) for name in (engine.node, "b")
    ]
    lease = system.catalog.leases.acquire("scheduler", "test", now=system.clock(), ttl_s=9)
    system.catalog.shards.note_nodes(nodes, leader=lease.epoch, now=system.clock())
    id = await api.add("Ann lives in Oslo")
    path = f"/v1/cubes/{id}/migrate"
    for word in (engine.node, "zone=west"):
        told = await api.ok("POST", path, {"tier": "activation", "node": word})
        assert {place["location"].partition("/")[0] for place in told["residency"]} == {engine.node}
    for word in ("b", "zone=east"):  # no engine there, no such node
        refused = await api.call("POST", path, {"tier": "activation", "node": word})
        assert api.check(refused)["status"] == 404
    refused = await api.call("POST", path, {"tier": "plaintext", "node": "b"})
    assert api.check(refused)["status"] == 422
