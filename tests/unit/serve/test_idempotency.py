"""Retries: one effect a key, the same answer, and no answer of another request."""

import asyncio

import pytest

KEY = {"Idempotency-Key": "7f1c"}


async def once(api, path: str, body, *, key: str = "", retry_key: str = "7f1c"):
    return await api.call("POST", path, body, key=key, headers={"Idempotency-Key": retry_key})


async def bodies(api):
    """A valid request of each route that takes a retry key."""
    one, two = await api.add("one"), await api.add("two")
    return {
        "/v1/memories": {"messages": [{"role": "user", "content": "tea"}]},
        "/v1/memories/batch": {"items": [{"text": "tea"}, {"text": "milk"}]},
        "/v1/cubes": {"members": [one], "title": "x"},
        "/v1/cubes/compose": {"ids": [one, two]},
        "/v1/cubes/fuse": {"ids": [one, two], "text": "both"},
    }


ROUTES = ["/v1/memories", "/v1/memories/batch", "/v1/cubes", "/v1/cubes/compose", "/v1/cubes/fuse"]


@pytest.mark.parametrize("path", ROUTES)
async def test_a_retry_has_one_effect_and_the_same_answer(api, path):
    body = (await bodies(api))[path]
    first = await once(api, path, body)
    assert first.status_code == 201
    before = await api.everything()
    api.system.clock.advance(3600)
    again = await once(api, path, body)
    assert (again.status_code, again.json()) == (201, first.json())
    assert await api.everything() == before


@pytest.mark.parametrize("path", ROUTES)
async def test_a_retry_key_of_another_body_is_refused_and_changes_nothing(api, path):
    body = (await bodies(api))[path]
    assert (await once(api, path, body)).is_success
    before = await api.everything()
    name = "items" if "items" in body else "ids" if "ids" in body else "user_id"
    changed = body | {name: body[name][::-1] if name in body else "bob"}
    told = await api.problem(422, "idempotency_mismatch", "POST", path, changed, headers=KEY)
    assert "7f1c" in told["detail"]
    assert await api.everything() == before


async def test_a_retry_key_belongs_to_its_route(api):
    one, two = await api.add("one"), await api.add("two")
    assert (await once(api, "/v1/cubes/compose", {"ids": [one, two]})).is_success
    told = await once(api, "/v1/cubes/fuse", {"ids": [one, two]})
    assert told.json()["code"] == "idempotency_mismatch"


async def test_the_order_of_fields_and_stated_defaults_are_the_same_request(api):
    first = await once(api, "/v1/memories", {"text": "tea", "user_id": "ann"})
    again = await once(
        api, "/v1/memories", {"user_id": "ann", "infer": False, "text": "tea", "tags": []}
    )
    assert again.json() == first.json()


async def test_without_a_key_a_repeat_is_counted(api):
    for _ in range(2):
        await api.add("tea")
    assert (await api.everything())[0]["repeats"] == 2


async def test_a_retry_answers_the_same_after_an_update(api):
    body = {"text": "tea"}
    first = (await once(api, "/v1/memories", body)).json()
    id = first["results"][0]["id"]
    await api.ok("PUT", f"/v1/memories/{id}", {"text": "milk"})
    assert (await once(api, "/v1/memories", body)).json() == first
    assert await api.texts("tea milk") == ["milk"]


async def test_a_retry_after_a_delete_tells_the_id_and_nothing_of_the_content(api):
    body = {"text": "tea"}
    first = (await once(api, "/v1/memories", body)).json()["results"][0]
    await api.ok("DELETE", f"/v1/memories/{first['id']}")
    again = (await once(api, "/v1/memories", body)).json()["results"][0]
    assert (again["id"], again["event"], again["version"]) == (first["id"], "added", 1)
    assert again["text"] == ""
    assert await api.everything() == []


async def test_a_request_that_was_refused_does_not_use_its_key_up(api):
    assert (await once(api, "/v1/memories", {"text": " "})).status_code == 422
    assert (await once(api, "/v1/memories", {"text": "tea"})).status_code == 201


async def test_a_request_that_was_not_acknowledged_is_finished_by_its_retry(api):
    api.system.shards[0].down = True
    assert (await once(api, "/v1/memories", {"text": "tea"})).status_code == 503
    api.system.shards[0].down = False
    assert (await once(api, "/v1/memories", {"text": "tea"})).status_code == 201
    assert [(c["text"], c["repeats"]) for c in await api.everything()] == [("tea", 1)]
    assert await api.texts("tea") == ["tea"]


async def test_a_key_is_kept_for_two_days_and_belongs_to_its_tenant(api, other):
    body = {"text": "tea"}
    first = (await once(api, "/v1/memories", body)).json()
    foreign = (await once(api, "/v1/memories", body, key=other)).json()
    assert foreign["results"][0]["id"] != first["results"][0]["id"]
    await api.system.reconcile(after_s=47 * 3600)
    assert (await once(api, "/v1/memories", body)).json() == first
    await api.system.reconcile(after_s=2 * 3600)
    (late,) = (await once(api, "/v1/memories", body)).json()["results"]
    assert late["event"] == "repeated"


async def test_retries_at_once_have_one_effect(api):
    answers = await asyncio.gather(*(once(api, "/v1/memories", {"text": "tea"}) for _ in range(12)))
    assert {a.status_code for a in answers} == {201}
    assert len({a.content for a in answers}) == 1
    assert [c["repeats"] for c in await api.everything()] == [1]


@pytest.mark.parametrize("bad", ["", "x" * 256, "a\tb", "\x7f"])
async def test_a_key_that_is_none_is_refused(api, bad):
    told = await api.problem(
        422,
        "bad_request",
        "POST",
        "/v1/memories",
        {"text": "tea"},
        headers={"Idempotency-Key": bad},
    )
    assert told["field"] == "Idempotency-Key"
    assert await api.everything() == []


async def test_a_key_may_hold_any_printable_sign(api):
    for key in ("x" * 255, "a b", 'q"{}&%2f'):
        first = await once(api, "/v1/memories", {"text": key}, retry_key=key)
        again = await once(api, "/v1/memories", {"text": key}, retry_key=key)
        assert first.status_code == 201
        assert again.json() == first.json()


# -- changes ---------------------------------------------------------------------------------------


async def put(api, path: str, body, *, retry_key: str = "7f1c"):
    return await api.call("PUT", path, body, headers={"Idempotency-Key": retry_key})


async def test_a_repeated_change_has_one_effect_whatever_came_between(api):
    path = f"/v1/memories/{await api.add('tea')}"
    first = await put(api, path, {"text": "milk", "expected_version": 1})
    assert first.json()["version"] == 2
    again = await put(api, path, {"text": "milk", "expected_version": 1})
    assert (again.status_code, again.json()["version"]) == (200, 2)
    await api.ok("PUT", path, {"text": "bread"})
    late = await put(api, path, {"text": "milk", "expected_version": 1})
    assert (late.json()["text"], late.json()["version"]) == ("milk", 2)
    assert (await api.ok("GET", path))["text"] == "bread"
    assert await api.texts("bread milk") == ["bread"]


async def test_repeats_at_once_change_a_cube_once(api):
    path = f"/v1/memories/{await api.add('tea')}"
    told = await asyncio.gather(*(put(api, path, {"text": "milk"}) for _ in range(8)))
    assert {response.json()["version"] for response in told} == {2}
    assert (await api.ok("GET", path))["version"] == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"text": "milk"}, {"text": "bread"}),
        ({"tags": ["a"]}, {"tags": ["a"], "expires_at": None}),
        ({"text": "milk"}, {"text": "milk", "expected_version": 1}),
    ],
    ids=str,
)
async def test_a_retry_key_of_another_change_is_refused(api, one, other):
    first, second = await api.add("tea"), await api.add("water")
    assert (await put(api, f"/v1/memories/{first}", one)).is_success
    for id, body in ((first, other), (second, one)):
        told = api.check(await put(api, f"/v1/memories/{id}", body))
        assert told["code"] == "idempotency_mismatch"
    assert (await api.ok("GET", f"/v1/memories/{second}"))["version"] == 1


async def test_a_repeated_change_of_members_has_one_effect(api):
    one, two = await api.add("one"), await api.add("two")
    whole = (await api.ok("POST", "/v1/cubes", {"members": [one]}))["id"]
    path = f"/v1/cubes/{whole}/members"
    versions = [(await put(api, path, {"members": [two]})).json()["version"] for _ in range(2)]
    assert versions == [2, 2]
