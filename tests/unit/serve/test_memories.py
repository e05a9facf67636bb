"""What the routes of memories do: add, batch, list, get, change, forget."""

from datetime import timedelta

import pytest

MESSAGES = [
    {
        "role": "user",
        "content": "I moved to Oslo.",
        "name": "Ann",
        "time": "2026-02-01T09:30:00Z",
        "id": "D1:1",
    },
    {"role": "assistant", "content": "How is it there?"},
]


# -- add -------------------------------------------------------------------------------------------


async def test_messages_become_one_memory_a_turn(api):
    response = await api.call(
        "POST", "/v1/memories", {"messages": MESSAGES, "user_id": "ann", "run_id": "r1"}
    )
    assert response.status_code == 201
    one, two = response.json()["results"]
    assert (one["event"], one["version"], one["text"], one["indexed"]) == (
        "added",
        1,
        "I moved to Oslo.",
        True,
    )
    cube = await api.ok("GET", f"/v1/memories/{one['id']}")
    assert (cube["role"], cube["speaker"], cube["kind"]) == ("user", "Ann", "episode")
    assert cube["event_time"] == "2026-02-01T09:30:00+00:00"
    assert cube["sources"][0]["ref"] == "D1:1"
    assert (cube["user_id"], cube["run_id"], cube["agent_id"]) == ("ann", "r1", None)
    assert (await api.ok("GET", f"/v1/memories/{two['id']}"))["speaker"] is None


async def test_a_text_becomes_a_fact_with_all_that_was_said_of_it(api):
    id = await api.add(
        "Ann prefers tea.",
        agent_id="bot",
        tags=["taste", "taste", "ann"],
        metadata={"source": {"page": 3}},
        sensitivity="secret",
        priority=7,
        origin="import",
    )
    cube = await api.ok("GET", f"/v1/memories/{id}")
    assert cube["kind"] == "fact"
    assert cube["tags"] == ["taste", "ann"]
    assert cube["metadata"] == {"source": {"page": 3}}
    assert (cube["sensitivity"], cube["priority"], cube["origin"]) == ("secret", 7, "import")
    assert (cube["shape"], cube["state"], cube["repeats"]) == ("leaf", "generated", 1)
    assert cube["residency"][0]["tier"] == "plaintext"


async def test_a_text_of_a_given_kind_keeps_it(api):
    id = await api.add("First boil water.", kind="procedure")
    assert (await api.ok("GET", f"/v1/memories/{id}"))["kind"] == "procedure"


async def test_a_long_text_becomes_a_document_in_parts(api):
    long = " ".join(f"Sentence {i} speaks of kumquats at length." for i in range(90))
    made = await api.ok("POST", "/v1/memories", {"text": long, "user_id": "ann"})
    texts = [result["text"] for result in made["results"]]
    assert len(texts) > 1
    assert " ".join(texts) == long
    assert {c["kind"] for c in await api.everything()} == {"document"}


async def test_an_exact_repeat_is_counted_and_told(api):
    first = await api.add("Tea, please.")
    again = await api.ok("POST", "/v1/memories", {"text": "Tea,  please. ", "user_id": "ann"})
    assert [(r["id"], r["event"]) for r in again["results"]] == [(first, "repeated")]
    (only,) = await api.everything()
    assert only["repeats"] == 2


async def test_stored_is_answered_before_the_index_has_it(api):
    api.system.shards[0].down = True
    made = await api.ok("POST", "/v1/memories", {"text": "tea", "wait": "stored"})
    assert made["results"][0]["indexed"] is False
    api.system.shards[0].down = False
    await api.system.reconcile()
    assert await api.texts("tea") == ["tea"]


async def test_indexed_is_not_acknowledged_while_the_index_is_down(api):
    api.system.shards[0].down = True
    response = await api.call("POST", "/v1/memories", {"text": "tea"})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["code"] == "unavailable"


async def test_without_a_model_inference_keeps_the_words_and_says_so(api):
    made = await api.ok("POST", "/v1/memories", {"messages": MESSAGES, "infer": True})
    assert [r["text"] for r in made["results"]] == [m["content"] for m in MESSAGES]
    assert "no model" in made["fallback"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "messages"),
        ({"text": "x", "messages": MESSAGES}, "messages"),
        ({"messages": []}, "messages"),
        ({"text": ""}, "text"),
        ({"text": " \n\t"}, "text"),
        ({"messages": [MESSAGES[0], {"role": "user", "content": " "}]}, "messages[1].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "", "content": "x"}]}, "messages[0].role"),
        ({"text": 7}, "text"),
        ({"text": "x", "user_id": ""}, "user_id"),
        ({"text": "x", "kind": "dream"}, "kind"),
        ({"text": "x", "wait": "forever"}, "wait"),
        ({"text": "x", "priority": 101}, "priority"),
        ({"text": "x", "tags": [""]}, "tags[0]"),
        ({"text": "x", "metadata": []}, "metadata"),
        ({"text": "x", "ttl_s": 0}, "ttl_s"),
        ({"text": "x", "ttl_s": -1}, "ttl_s"),
        ({"text": "x", "ttl_s": 1e10}, "ttl_s"),
        ({"text": "x", "ttl_s": 5, "expires_at": "2027-01-01"}, "ttl_s"),
        ({"text": "x", "expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"text": "x", "expires_at": "0001-01-01T00:00:00+23:00"}, "expires_at"),
        ({"text": "x", "expires_at": "tomorrow"}, "expires_at"),
        ({"messages": [MESSAGES[0] | {"time": "9999-12-31T23:59:59-14:00"}]}, "messages[0].time"),
    ],
    ids=str,
)
async def test_a_bad_add_is_refused_by_its_field_and_changes_nothing(api, body, field):
    told = await api.problem(422, "bad_request", "POST", "/v1/memories", body)
    assert told["field"] == field
    assert await api.everything() == []


# -- expiry ----------------------------------------------------------------------------------------


async def test_a_memory_runs_out_after_its_time_to_live(api):
    id = await api.add("tea", ttl_s=60)
    cube = await api.ok("GET", f"/v1/memories/{id}")
    assert cube["expires_at"] == "2026-03-01T12:01:00+00:00"
    api.system.clock.advance(59.9)
    assert await api.texts("tea") == ["tea"]
    api.system.clock.advance(0.1)
    assert await api.texts("tea") == []
    assert await api.everything() == []
    await api.problem(404, "not_found", "GET", f"/v1/memories/{id}")


async def test_an_expiry_without_a_zone_is_in_utc(api):
    id = await api.add("tea", expires_at="2026-03-01T12:00:10")
    assert (await api.ok("GET", f"/v1/memories/{id}"))["expires_at"] == "2026-03-01T12:00:10+00:00"
    api.system.clock.advance(10)
    await api.problem(404, "not_found", "GET", f"/v1/memories/{id}")


async def test_an_expiry_can_be_moved_and_taken_away(api):
    id = await api.add("tea", ttl_s=60)
    until = (api.system.clock() + timedelta(hours=1)).isoformat()
    await api.ok("PUT", f"/v1/memories/{id}", {"expires_at": until})
    api.system.clock.advance(120)
    assert await api.texts("tea") == ["tea"]
    told = await api.ok("PUT", f"/v1/memories/{id}", {"expires_at": None})
    assert (told["expires_at"], told["version"]) == (None, 1)
    api.system.clock.advance(10_000)
    assert await api.texts("tea") == ["tea"]


# -- batch -----------------------------------------------------------------------------------------


async def test_a_batch_answers_item_by_item(api):
    items = [
        {"text": "tea", "user_id": "ann"},
        {"messages": MESSAGES, "user_id": "bob"},
        {"text": "tea", "user_id": "ann"},
    ]
    response = await api.call("POST", "/v1/memories/batch", {"items": items})
    assert response.status_code == 201
    one, two, three = (item["results"] for item in response.json()["results"])
    assert [r["event"] for r in one] == ["added"]
    assert [r["text"] for r in two] == [m["content"] for m in MESSAGES]
    assert [(r["event"], r["id"]) for r in three] == [("repeated", one[0]["id"])]
    assert await api.texts("tea") == ["tea"]


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"text": " "}, "items[1].text"),
        ({"messages": [{"role": "user", "content": ""}]}, "items[1].messages[0].content"),
        ({}, "items[1].messages"),
        ({"text": "x", "infer": True}, "items[1].infer"),
        ({"text": "x", "ttl_s": 3, "expires_at": "2027-01-01"}, "items[1].ttl_s"),
        ({"text": "x", "metadata": {"a": float("nan")}}, "items[1].metadata"),
        ({"text": "x", "wait": "stored"}, "items[1].wait"),
    ],
    ids=str,
)
async def test_one_bad_item_refuses_the_batch_by_its_number(api, bad, field):
    items = [{"text": "tea"}, bad, {"text": "milk"}]
    told = await api.problem(422, "bad_request", "POST", "/v1/memories/batch", {"items": items})
    assert told["field"] == field
    assert await api.everything() == []


async def test_an_empty_batch_is_refused(api):
    await api.problem(422, "bad_request", "POST", "/v1/memories/batch", {"items": []})


# -- list ------------------------------------------------------------------------------------------


async def test_a_list_goes_page_by_page_from_new_to_old_and_holds_each_once(api):
    ids = []
    for i in range(7):
        api.system.clock.advance(1)
        ids.append(await api.add(f"memory {i}"))
    seen, cursor, pages = [], None, 0
    while True:
        at = f"&cursor={cursor}" if cursor else ""
        page = await api.ok("GET", f"/v1/memories?limit=3{at}")
        seen += [c["id"] for c in page["results"]]
        pages += 1
        if (cursor := page["next_cursor"]) is None:
            break
    assert seen == ids[::-1]
    assert pages == 3


async def test_the_turns_of_one_request_are_listed_in_their_order(api):
    turns = [{"role": "user", "content": f"turn {i}"} for i in range(20)]
    await api.ok("POST", "/v1/memories", {"messages": turns})
    listed = [c["text"] for c in await api.everything()]
    assert listed == [t["content"] for t in reversed(turns)]


async def test_a_page_is_not_moved_by_what_is_added_meanwhile(api):
    for i in range(4):
        api.system.clock.advance(1)
        await api.add(f"memory {i}")
    first = await api.ok("GET", "/v1/memories?limit=2")
    api.system.clock.advance(1)
    await api.add("newer")
    second = await api.ok("GET", f"/v1/memories?limit=2&cursor={first['next_cursor']}")
    assert [c["text"] for c in second["results"]] == ["memory 1", "memory 0"]


@pytest.mark.parametrize(
    "where",
    [
        "user_id=bob",
        "agent_id=g",
        "run_id=r",
        "kind=preference",
        "tag=x",
        "state=archived",
        "user_id=bob&tag=x",
    ],
)
async def test_a_list_is_narrowed_by_each_condition(api, where):
    await api.add("tea", tags=["y"])
    wanted = await api.add(
        "milk", user_id="bob", agent_id="g", run_id="r", kind="preference", tags=["x"]
    )
    if where == "state=archived":
        await api.ok("POST", f"/v1/cubes/{wanted}/archive")
    page = await api.ok("GET", f"/v1/memories?{where}")
    assert [c["id"] for c in page["results"]] == [wanted]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("state=expired", "state"),
        ("state=deleted", "state"),
        ("kind=dream", "kind"),
        ("user_id=", "user_id"),
        ("cursor=nonsense", "cursor"),
        ("cursor=", "cursor"),
        ("user_id=a%00b", "user_id"),
        ("tag=%00", "tag"),
    ],
    ids=lambda value: value[:24],
)
async def test_a_bad_condition_is_refused_by_its_name(api, query, field):
    told = await api.problem(422, "bad_request", "GET", f"/v1/memories?{query}")
    assert told["field"] == field


async def test_a_name_may_hold_any_sign(api):
    for name in ("a/b", "a&b", "a%2fb", "é", "e\u0301", "🦜", "a b", "tenant:other", "'; --"):
        await api.add(f"memory of {name}", user_id=name)
        page = (
            await api.client.get(
                "/v1/memories",
                params={"user_id": name},
                headers={"x-api-key": api.key},
            )
        ).json()
        assert [c["user_id"] for c in page["results"]] == [name]


# -- get -------------------------------------------------------------------------------------------


async def test_a_version_and_a_point_in_time_read_what_was_then(api):
    id = await api.add("one")
    api.system.clock.advance(60)
    await api.ok("PUT", f"/v1/memories/{id}", {"text": "two", "tags": ["x"]})
    then = await api.ok("GET", f"/v1/memories/{id}?version=1")
    assert (then["text"], then["version"], then["tags"]) == ("one", 1, [])
    assert (await api.ok("GET", f"/v1/memories/{id}"))["text"] == "two"
    for time, text in (
        ("2026-03-01T12:00:00Z", "one"),
        ("2026-03-01T12:00:59", "one"),
        ("2026-03-01T12:01:00Z", "two"),
        ("2026-03-01T14:01:00%2B02:00", "two"),
    ):
        read = await api.ok("GET", f"/v1/memories/{id}?as_of={time}")
        assert read["text"] == text, time
    before = f"/v1/memories/{id}?as_of=2026-03-01T11:59:59Z"
    await api.problem(404, "not_found", "GET", before)
    await api.problem(404, "not_found", "GET", f"/v1/memories/{id}?version=3")
    both = f"/v1/memories/{id}?version=1&as_of=2026-03-01"
    await api.problem(422, "bad_request", "GET", both)


async def test_the_id_is_read_in_any_of_its_forms(api):
    id = await api.add("tea")
    assert (await api.ok("GET", f"/v1/memories/{id.upper()}"))["id"] == id
    assert (await api.ok("GET", f"/v1/cubes/{id}"))["id"] == id


# -- change ----------------------------------------------------------------------------------------


async def test_a_change_is_a_new_version_that_the_next_search_finds(api):
    id = await api.add("tea", tags=["a"], metadata={"n": 1})
    told = await api.ok("PUT", f"/v1/memories/{id}", {"text": "milk", "metadata": {"n": 2}})
    assert (told["version"], told["text"], told["metadata"], told["tags"]) == (
        2,
        "milk",
        {"n": 2},
        ["a"],
    )
    assert told["indexed"] is True
    assert await api.texts("tea") == []
    assert await api.texts("milk") == ["milk"]
    versions = (await api.ok("GET", f"/v1/memories/{id}/history"))["versions"]
    assert [(v["version"], v["text"]) for v in versions] == [(1, "tea"), (2, "milk")]
    assert versions[1]["reason"] == "update"


async def test_the_same_content_again_is_no_new_version(api):
    id = await api.add("tea")
    assert (await api.ok("PUT", f"/v1/memories/{id}", {"text": "tea"}))["version"] == 1


async def test_a_change_of_another_version_is_refused_and_tells_the_present_one(api):
    id = await api.add("tea")
    body = {"text": "milk", "expected_version": 1}
    assert (await api.ok("PUT", f"/v1/memories/{id}", body))["version"] == 2
    late = {"text": "bread", "expected_version": 1}
    told = await api.problem(409, "version_mismatch", "PUT", f"/v1/memories/{id}", late)
    assert "version 2, not 1" in told["detail"]
    assert await api.texts("milk bread") == ["milk"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"expected_version": 1},
        {"text": None},
        {"text": ""},
        {"text": " \n"},
        {"tags": None},
        {"metadata": None},
        {"metadata": {"a": 2**63}},
        {"expires_at": "2020-01-01"},
        {"expires_at": "2026-03-01T12:00:00Z"},
        {"expected_version": 0, "text": "x"},
        {"id": "other", "text": "x"},
        {"user_id": "bob"},
    ],
    ids=str,
)
async def test_a_bad_change_is_refused_and_changes_nothing(api, body):
    id = await api.add("tea")
    before = await api.ok("GET", f"/v1/memories/{id}")
    await api.problem(422, "bad_request", "PUT", f"/v1/memories/{id}", body)
    assert await api.ok("GET", f"/v1/memories/{id}") == before


# -- forget ----------------------------------------------------------------------------------------


async def test_a_forgotten_memory_is_in_no_answer(api):
    id = await api.add("tea", tags=["x"])
    whole = await api.ok("POST", "/v1/cubes", {"members": [id]})
    assert await api.ok("DELETE", f"/v1/memories/{id}") == {"id": id, "deleted": True}
    for method, path in (
        ("GET", f"/v1/memories/{id}"),
        ("GET", f"/v1/memories/{id}?version=1"),
        ("GET", f"/v1/memories/{id}/history"),
        ("GET", f"/v1/cubes/{id}/lineage"),
        ("DELETE", f"/v1/memories/{id}"),
    ):
        await api.problem(404, "not_found", method, path)
    assert await api.texts("tea") == []
    assert [c["id"] for c in await api.everything()] == [whole["id"]]
    assert (await api.ok("GET", "/v1/memories?tag=x"))["results"] == []
    assert (await api.ok("GET", f"/v1/cubes/{whole['id']}/members"))["results"] == []


async def test_a_scope_is_forgotten_with_all_that_it_holds_and_no_more(api, other):
    await api.add("tea of ann", run_id="1")
    await api.add("milk of ann", run_id="2")
    await api.add("tea of bob", user_id="bob")
    await api.add("tea of another ann", key=other)
    assert await api.ok("DELETE", "/v1/memories?user_id=ann&run_id=2") == {"deleted": 1}
    assert await api.ok("DELETE", "/v1/memories?user_id=ann") == {"deleted": 1}
    assert await api.ok("DELETE", "/v1/memories?user_id=ann") == {"deleted": 0}
    assert await api.texts("tea milk") == ["tea of bob"]
    assert await api.texts("tea", key=other) == ["tea of another ann"]


@pytest.mark.parametrize("query", ["", "?user_id=", "?user_id=a%00"])
async def test_a_scope_without_a_name_is_refused(api, query):
    await api.add("tea")
    await api.problem(422, "bad_request", "DELETE", f"/v1/memories{query}")
    assert len(await api.everything()) == 1


async def test_a_misspelt_condition_is_refused_rather_than_passed_over(api):
    """``?user_id=ann&runid=1`` must not forget all of ann."""
    await api.add("tea", run_id="1")
    told = await api.problem(422, "bad_request", "DELETE", "/v1/memories?user_id=ann&runid=1")
    assert told["field"] == "runid"
    assert len(await api.everything()) == 1
    await api.problem(422, "bad_request", "GET", "/v1/memories?tenant=other")


async def test_a_scope_with_a_frozen_memory_is_not_forgotten_at_all(api):
    await api.add("tea")
    id = await api.add("milk")
    await api.ok("POST", f"/v1/cubes/{id}/freeze")
    told = await api.problem(409, "frozen", "DELETE", "/v1/memories?user_id=ann")
    assert id in told["detail"]
    assert len(await api.everything()) == 2
