"""Input that is too long, too deep, too many or no text: 4xx, a bounded answer, nothing changed."""

import json
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memcube.config import load_config
from memcube.testing.local import LocalSystem

MEMORIES, BATCH, SEARCH = "/v1/memories", "/v1/memories/batch", "/v1/memories/search"
TURN = {"role": "user", "content": "x"}
LIMITS = [
    "body_bytes=65536",
    "text_chars=100",
    "messages=3",
    "batch_items=3",
    "batch_texts=5",
    "query_chars=50",
    "top_k=10",
    "page=50",
    "metadata_bytes=100",
    "metadata_depth=3",
    "json_values=2000",
    "members=3",
    "token_budget=1024",
]


@pytest.fixture
async def small(tmp_path: Path, catalog_template: Path, open_api) -> AsyncIterator[Any]:
    """An application with small limits."""
    overrides = [f"limits.{limit}" for limit in LIMITS]
    config = load_config(None, [f"data_dir={tmp_path}", *overrides])
    system = LocalSystem.open(tmp_path, config=config, template=catalog_template)
    opened = open_api(system)
    async with opened.client:
        yield opened
    system.catalog.close()


@pytest.mark.parametrize(
    ("method", "path", "body", "limit"),
    [
        ("POST", MEMORIES, {"text": "x" * 101}, 100),
        ("POST", MEMORIES, {"messages": [TURN | {"content": "x" * 101}]}, 100),
        ("POST", MEMORIES, {"messages": [TURN] * 4}, 3),
        ("POST", MEMORIES, {"text": "x", "metadata": {"a": "x" * 99}}, 100),
        ("POST", MEMORIES, {"text": "x", "metadata": {"a": {"b": {"c": {}}}}}, 3),
        ("POST", MEMORIES, {"text": "x", "metadata": {"a": [[["c"]]]}}, 3),
        ("POST", BATCH, {"items": [{"text": "x"}] * 4}, 3),
        ("POST", BATCH, {"items": [{"messages": [TURN] * 3}] * 2}, 5),
        ("POST", BATCH, {"items": [{"text": "x"}, {"text": "x" * 101}]}, 100),
        ("POST", SEARCH, {"query": "x" * 51}, 50),
        ("POST", SEARCH, {"query": "x", "top_k": 11}, 10),
        ("POST", SEARCH, {"query": "x", "top_k": 10**9}, 10),
        ("POST", SEARCH, {"query": "x", "filters": {"and": [{"user_id": "a"}] * 65}}, 64),
        ("POST", SEARCH, {"query": "x", "filters": {"user_id": ["a"] * 257}}, 256),
        ("POST", SEARCH, {"query": "x", "filters": {"user_id": "a" * 1025}}, 1024),
        ("POST", "/v1/context", {"query": "x", "token_budget": 1025}, 1024),
        ("POST", "/v1/context", {"query": "x", "top_k": 11}, 10),
        ("POST", "/v1/context", {"query": "x" * 51}, 50),
        ("POST", "/v1/context", {"messages": [TURN] * 4}, 3),
        ("POST", "/v1/context", {"messages": [TURN | {"content": "x" * 101}]}, 100),
        ("POST", "/v1/cubes", {"text": "x" * 101}, 100),
        ("POST", "/v1/cubes", {"title": "x" * 200}, 100),
        ("POST", "/v1/cubes", {"members": ["a"] * 4}, 3),
        ("POST", "/v1/cubes/compose", {"ids": ["a"], "title": "x" * 200}, 100),
        ("POST", "/v1/cubes/compose", {"ids": ["a"] * 4}, 3),
        ("PUT", "/v1/cubes/{id}/members", {"members": ["a"] * 4}, 3),
        ("POST", "/v1/cubes/fuse", {"ids": ["a", "b"], "text": "x" * 101}, 100),
        ("PUT", "/v1/memories/{id}", {"text": "x" * 101}, 100),
        ("PUT", "/v1/memories/{id}", {"metadata": {"a": "x" * 99}}, 100),
        ("GET", f"{MEMORIES}?limit=51", None, 50),
        ("GET", "/v1/cubes/{id}/members?limit=51", None, 50),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_what_is_over_a_limit_is_refused_by_it(small, method, path, body, limit):
    id = await small.add("tea")
    before = await small.everything()
    rest = () if body is None else (body,)
    path = path.replace("{id}", id)
    told = await small.problem(422, "limit_exceeded", method, path, *rest)
    assert told["limit"] == limit
    assert f"{limit:,}" in told["detail"]
    assert await small.everything() == before


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"text": "x", "user_id": "u" * 257}, "user_id"),
        ({"text": "x", "user_id": "u" * 10_240}, "user_id"),
        ({"text": "x", "tags": ["t"] * 65}, "tags"),
        ({"text": "x", "tags": ["t" * 129]}, "tags[0]"),
        ({"messages": [TURN | {"name": "n" * 257}]}, "messages[0].name"),
        ({"messages": [TURN | {"id": "n" * 257}]}, "messages[0].id"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_the_limits_of_names_stand_in_the_schema(api, body, field):
    told = await api.problem(422, "bad_request", "POST", MEMORIES, body)
    assert told["field"] == field
    assert await api.everything() == []


async def test_a_body_at_the_limit_is_read_and_one_byte_more_is_not(small):
    limit = small.system.config.limits.body_bytes
    frame = len(json.dumps({"text": ""}))
    at = json.dumps({"text": " " * (limit - frame)}).encode()
    assert len(at) == limit
    await small.problem(422, "limit_exceeded", "POST", MEMORIES, at)
    told = await small.problem(413, "limit_exceeded", "POST", MEMORIES, at + b" ")
    assert told["limit"] == limit


async def test_a_body_of_unstated_length_is_cut_off_at_the_limit(small):
    sent = 0

    async def flood() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield b" " * 4096

    sending = {"headers": {"content-type": "application/json"}, "content": flood()}
    told = await small.problem(413, "limit_exceeded", "POST", MEMORIES, **sending)
    assert told["limit"] == 65536
    assert sent < 30


@pytest.mark.parametrize("length", ["9" * 30, "9" * 5000, str(2**64)])
async def test_a_stated_length_over_the_limit_is_refused_unread(small, length):
    headers = {"content-length": length}
    await small.problem(413, "limit_exceeded", "POST", MEMORIES, b"{}", headers=headers)


DEEP = 100_000


@pytest.mark.parametrize(
    "body",
    [
        b"[" * DEEP,
        b"[" * DEEP + b"]" * DEEP,
        b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        b'{"text":"x","metadata":{"a":' + b"[" * 900 + b"]" * 900 + b"}}",
        b'{"text":"x","metadata":{"a":' + b"[" * DEEP + b"]" * DEEP + b"}}",
        b'{"text":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"text":"x","tags":' + b"[" * 900 + b"]" * 900 + b"}",
    ],
    ids=["open", "lists", "objects", "metadata 900", "metadata 1e5", "text", "tags"],
)
async def test_nesting_without_end_is_refused(api, body):
    response = await api.call("POST", MEMORIES, body)
    assert api.check(response)["status"] == 422
    assert await api.everything() == []


@pytest.mark.parametrize("depth", [9, 900])
async def test_a_filter_of_many_levels_is_refused(api, depth):
    filters: dict[str, Any] = {"user_id": "a"}
    for _ in range(depth):
        filters = {"not": filters}
    body = {"query": "x", "filters": filters}
    told = await api.problem(422, "limit_exceeded", "POST", SEARCH, body)
    assert told["limit"] == 8


def listed(value: str, count: int) -> str:
    return ",".join([value] * count)


BOMBS = {
    "empty lists": (MEMORIES, '{"text":"x","metadata":{"a":[' + listed("[]", 200_000) + "]}}"),
    "numbers": (MEMORIES, '{"text":"x","tags":[' + listed("7", 400_000) + "]}"),
    "strings": (MEMORIES, '{"text":"x","tags":[' + listed('"a"', 200_000) + "]}"),
    "keys": (MEMORIES, json.dumps({"text": "x", "metadata": dict.fromkeys(range(100_000))})),
    "items": (BATCH, '{"items":[' + listed("{}", 200_000) + "]}"),
    "ids": ("/v1/cubes", '{"members":[' + listed('"a"', 200_000) + "]}"),
    "turns": (MEMORIES, '{"messages":[' + listed('{"role":"u","content":"x"}', 60_000) + "]}"),
    "escapes": (MEMORIES, '{"tags":[' + listed('"\\\\\\""', 200_000) + "]}"),
}


@pytest.fixture
async def measured(tmp_path: Path, catalog_template: Path, open_api) -> AsyncIterator[Any]:
    """An application that takes a fifth of the values that it takes by default."""
    number = load_config().limits.json_values // 5
    config = load_config(None, [f"data_dir={tmp_path}", f"limits.json_values={number}"])
    system = LocalSystem.open(tmp_path, config=config, template=catalog_template)
    opened = open_api(system)
    async with opened.client:
        yield opened
    system.catalog.close()


@pytest.mark.parametrize("name", BOMBS)
async def test_a_body_of_too_many_values_is_refused(measured, name):
    path, body = BOMBS[name]
    told = await measured.problem(413, "limit_exceeded", "POST", path, body.encode())
    assert told["limit"] == measured.system.config.limits.json_values
    assert await measured.everything() == []


FULL = {
    "keys": json.dumps({"text": "x", "metadata": {f"{i}": i for i in range(34_500)}}),
    "lists": '{"text":"x","metadata":{"a":[' + listed("[]", 34_500) + "]}}",
    "turns": '{"messages":[' + listed('{"role":"u","content":"x"}', 9_900) + "]}",
}


@pytest.mark.parametrize("name", FULL)
async def test_a_body_of_as_many_values_as_may_be_takes_little_memory(measured, name):
    """Less than 64 MiB at the default limit. Each of these is over another limit."""
    body = FULL[name].encode()
    tracemalloc.start()
    try:
        told = await measured.problem(422, "limit_exceeded", "POST", MEMORIES, body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert told["limit"] < measured.system.config.limits.json_values
    assert peak < 64 * 2**20 / 5


async def test_text_with_many_commas_and_braces_is_text(api):
    code = '{"a": [1, 2, 3]}, \\" ' * 5_000
    made = await api.ok("POST", MEMORIES, {"text": code, "user_id": "ann"})
    assert " ".join(r["text"] for r in made["results"]).split() == code.split()


async def test_the_largest_batch_of_its_kind_is_taken(api):
    items = [{"text": f"turn {i}", "tags": ["a", "b"], "user_id": "ann"} for i in range(1000)]
    made = await api.ok("POST", BATCH, {"items": items, "wait": "stored"})
    assert len(made["results"]) == 1000
    told = await api.problem(
        422, "limit_exceeded", "POST", BATCH, {"items": [*items, {"text": "x"}]}
    )
    assert told["limit"] == 1000


# -- what is no text -------------------------------------------------------------------------------

NUL, HALF = "a\x00b", "a\ud800b"


def bodies_with(text: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Requests that hold a text at each place where a text may stand."""
    return [
        ("POST", MEMORIES, {"text": text}),
        ("POST", MEMORIES, {"messages": [TURN | {"content": text}]}),
        ("POST", MEMORIES, {"messages": [TURN | {"role": text}]}),
        ("POST", MEMORIES, {"messages": [TURN | {"name": text}]}),
        ("POST", MEMORIES, {"messages": [TURN | {"id": text}]}),
        ("POST", MEMORIES, {"text": "x", "user_id": text}),
        ("POST", MEMORIES, {"text": "x", "agent_id": text}),
        ("POST", MEMORIES, {"text": "x", "run_id": text}),
        ("POST", MEMORIES, {"text": "x", "tags": [text]}),
        ("POST", MEMORIES, {"text": "x", "metadata": {"k": text}}),
        ("POST", MEMORIES, {"text": "x", "metadata": {text: 1}}),
        ("POST", MEMORIES, {"text": "x", "metadata": {"k": [{"a": [text]}]}}),
        ("POST", MEMORIES, {"text": "x", "kind": text}),
        ("POST", MEMORIES, {"text": "x", "expires_at": text}),
        ("POST", MEMORIES, {"text": "x", text: 1}),
        ("POST", BATCH, {"items": [{"text": "x"}, {"text": text}]}),
        ("POST", SEARCH, {"query": text}),
        ("POST", SEARCH, {"query": "x", "user_id": text}),
        ("POST", SEARCH, {"query": "x", "filters": {"user_id": NUL}}),
        ("POST", SEARCH, {"query": "x", "filters": {text: "x"}}),
        ("POST", SEARCH, {"query": "x", "filters": {"user_id": {text: "x"}}}),
        ("POST", SEARCH, {"query": "x", "filters": {"created_at": text}}),
        ("POST", SEARCH, {"query": "x", "cube_ids": [text]}),
        ("POST", "/v1/context", {"query": text}),
        ("POST", "/v1/context", {"messages": [TURN | {"content": text}]}),
        ("PUT", "/v1/memories/{id}", {"text": text}),
        ("PUT", "/v1/memories/{id}", {"tags": [text]}),
        ("PUT", "/v1/memories/{id}", {"metadata": {"k": text}}),
        ("POST", "/v1/cubes", {"title": text}),
        ("POST", "/v1/cubes", {"text": text}),
        ("POST", "/v1/cubes", {"members": [text]}),
        ("POST", "/v1/cubes/compose", {"ids": [text]}),
        ("POST", "/v1/cubes/fuse", {"ids": [text, "b"]}),
        ("PUT", "/v1/cubes/{id}/members", {"members": [text]}),
    ]


@pytest.mark.parametrize("text", [NUL, HALF], ids=["NUL", "half a pair"])
async def test_what_is_no_text_is_refused_wherever_it_stands(api, text):
    id = await api.add("tea")
    before = await api.everything()
    for method, path, body in bodies_with(text):
        response = await api.call(method, path.replace("{id}", id), body)
        assert response.status_code == 422, (method, path, body, response.text)
        api.check(response)
    assert await api.everything() == before


async def test_a_search_for_half_a_pair_in_metadata_finds_nothing_and_harms_nothing(api):
    await api.add("tea", metadata={"k": "x"})
    for filters in ({"metadata.k": HALF}, {f"metadata.{HALF}": "x"}, {"user_id": HALF}):
        response = await api.call("POST", SEARCH, {"query": "tea", "filters": filters})
        assert response.status_code in (200, 422)
        if response.status_code == 200:
            assert response.json()["results"] == []


async def test_a_key_for_text_that_looks_like_an_escape_is_text(api):
    id = await api.add("a \\u0000 b", metadata={"k": "\\u0000", "\\ud800": 1})
    cube = await api.ok("GET", f"/v1/memories/{id}")
    assert cube["metadata"] == {"k": "\\u0000", "\\ud800": 1}


@pytest.mark.parametrize(
    "raw",
    [
        b'{"text":"x","metadata":{"a":NaN}}',
        b'{"text":"x","metadata":{"a":-Infinity}}',
        b'{"text":"x","metadata":{"a":1e999}}',
        b'{"text":"x","metadata":{"a":9223372036854775808}}',
        b'{"text":"x","metadata":{"a":[[-9223372036854775809]]}}',
        b'{"text":"x","metadata":{"a":' + b"9" * 4000 + b"}}",
        b'{"text":"x","metadata":{"a":' + b"9" * 5000 + b"}}",
        b'{"text":"x","priority":' + b"9" * 4000 + b"}",
        b'{"text":"x","priority":1e999}',
        b'{"text":"x","priority":NaN}',
        b'{"text":"x","ttl_s":NaN}',
        b'{"text":"x","ttl_s":1e999}',
        b'{"text":"x","expires_at":1e999}',
        b'{"text":"x","expires_at":' + b"9" * 400 + b"}",
        b'{"text":"x","expires_at":NaN}',
    ],
    ids=lambda raw: raw[12:50].decode(),
)
async def test_a_number_that_can_not_be_kept_is_refused(api, raw):
    response = await api.call("POST", MEMORIES, raw)
    assert response.status_code == 422, response.text
    api.check(response)
    assert await api.everything() == []


async def test_the_largest_numbers_that_can_be_kept_come_back_exactly(api):
    kept = {"a": 2**63 - 1, "b": -(2**63) + 1, "c": 1e308, "d": 5e-324, "e": True, "f": None}
    id = await api.add("tea", metadata=kept)
    assert (await api.ok("GET", f"/v1/memories/{id}"))["metadata"] == kept


@pytest.mark.parametrize(
    "filters",
    [
        {"metadata.n": {"gt": 10**400}},
        {"metadata.n": {"lt": -(10**4000)}},
        {"metadata.n": {"eq": 2**64}},
        {"version": {"gt": 10**30}},
        {"version": 2**63},
        {"created_at": {"gt": "9999-12-31T23:59:59-14:00"}},
        {"created_at": {"lt": "0001-01-01T00:00:00+14:00"}},
        {"metadata.n": {"gt": float("inf")}},
    ],
    ids=lambda f: str(f)[:40],
)
async def test_a_bound_beyond_all_numbers_finds_nothing(api, filters):
    await api.add("tea", metadata={"n": 1})
    assert await api.texts("tea", filters=filters) == []


@pytest.mark.parametrize(
    ("raw", "content_type"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"tea", "application/json"),
        (b"null", "application/json"),
        (b"[]", "application/json"),
        (b'"text"', "application/json"),
        (b'{"text":"x"}', "text/plain"),
        (b'{"text":"x"}', "application/x-www-form-urlencoded"),
        (b"text=x", "application/x-www-form-urlencoded"),
        (b'{"text":"\xff"}', "application/json"),
        (b'{"text":"\xed\xa0\x80"}', "application/json"),
        (b"\x1f\x8b\x08\x00", "application/json"),
        (b'{"text":"x"}', ""),
        ('{"text":"x"}'.encode("utf-16"), "application/json"),
        ('{"text":"x"}'.encode("utf-32-le"), "application/json"),
    ],
    ids=str,
)
async def test_what_is_no_json_object_is_refused(api, raw, content_type):
    response = await api.call("POST", MEMORIES, raw, headers={"content-type": content_type})
    assert response.status_code == 422, response.text
    api.check(response)
    assert await api.everything() == []


async def test_where_json_is_broken_is_told(api):
    told = await api.problem(422, "bad_request", "POST", MEMORIES, b'{"text": "x",}')
    assert "JSON" in told["detail"]
    assert "13" in told["detail"]
    assert "field" not in told


async def test_json_with_a_byte_order_mark_is_json(api):
    await api.ok("POST", MEMORIES, '{"text": "tea"}'.encode("utf-8-sig"))
    assert await api.texts("tea") == ["tea"]


async def test_an_unknown_field_is_refused_wherever_it_stands(api):
    id = await api.add("tea")
    for method, path, body in (
        ("POST", MEMORIES, {"text": "x", "tenant": "other"}),
        ("POST", MEMORIES, {"text": "x", "tenant_id": "other"}),
        ("POST", MEMORIES, {"messages": [TURN | {"tenant": "other"}]}),
        ("POST", BATCH, {"items": [{"text": "x", "tenant": "other"}]}),
        ("POST", BATCH, {"items": [{"text": "x"}], "tenant": "other"}),
        ("POST", SEARCH, {"query": "x", "tenant": "other"}),
        ("POST", "/v1/context", {"query": "x", "tenant": "other"}),
        ("POST", "/v1/cubes", {"owner": "other"}),
        ("POST", "/v1/cubes/compose", {"ids": [id], "tenant": "other"}),
        ("POST", "/v1/cubes/fuse", {"ids": [id, id], "tenant": "other"}),
        ("PUT", f"/v1/cubes/{id}/members", {"members": [], "tenant": "other"}),
        ("POST", f"/v1/cubes/{id}/rollback", {"version": 1, "tenant": "other"}),
        ("PUT", f"/v1/memories/{id}", {"text": "x", "owner": "other"}),
        ("PUT", f"/v1/memories/{id}", {"text": "x", "__proto__": {}}),
    ):
        told = await api.problem(422, "bad_request", method, path, body)
        assert told["field"].rpartition(".")[2] in ("tenant", "tenant_id", "owner", "__proto__")
    assert [c["text"] for c in await api.everything()] == ["tea"]


async def test_a_refusal_repeats_no_long_input(api):
    long = "x" * 100_000
    for body in (
        {long: 1},
        {"text": "x", "kind": long},
        {"text": "x", "metadata": {"a": 2**63}, "user_id": long},
    ):
        api.check(await api.call("POST", MEMORIES, body))
    for filters in ({long: 1}, {"user_id": {long: 1}}, {"created_at": long[:900]}):
        body = {"query": "x", "filters": filters}
        api.check(await api.call("POST", SEARCH, body))
    api.check(await api.call("GET", f"/v1/nowhere/{long[:60_000]}"))


# -- ids -------------------------------------------------------------------------------------------

ODD_IDS = [
    "x",
    "0" * 64,
    "..%2f..%2fetc%2fpasswd",
    "%00",
    "%ed%a0%80",
    "%F0%9F%A6%9C",
    "a%26b",
    "*",
    "null",
    "00000000-0000-0000-0000-000000000000",
]


@pytest.mark.parametrize("id", ODD_IDS)
async def test_an_id_of_nothing_is_not_found(api, id):
    for method, path in (
        ("GET", "/v1/memories/{id}"),
        ("DELETE", "/v1/memories/{id}"),
        ("GET", "/v1/memories/{id}/history"),
        ("POST", "/v1/cubes/{id}/freeze"),
        ("GET", "/v1/cubes/{id}/members"),
    ):
        response = await api.call(method, path.replace("{id}", id))
        assert response.status_code == 404, response.text
        api.check(response)


@pytest.mark.parametrize("id", ["x" * 65, "x" * 10_240], ids=len)
async def test_an_id_of_ten_kilobytes_is_refused(api, id):
    told = await api.problem(422, "bad_request", "GET", f"/v1/memories/{id}")
    assert told["field"] == "id"
    body = {"query": "x", "cube_ids": [id * 5]}
    await api.problem(422, "bad_request", "POST", SEARCH, body)


async def test_names_that_look_alike_are_kept_apart(api):
    names = ["é", "e\u0301", "a b", "a\u00a0b", "a", "A", "a/b", "a%2fb", "a&b", "ab", "а"]
    for name in names:
        await api.add("tea", user_id=name)
    assert len(await api.everything()) == len(names)
    for name in names:
        found = await api.ok("POST", SEARCH, {"query": "tea", "user_id": name})
        assert [hit["user_id"] for hit in found["results"]] == [name]


# -- anything --------------------------------------------------------------------------------------

_NAMES = [
    "text",
    "messages",
    "role",
    "content",
    "query",
    "filters",
    "and",
    "or",
    "not",
    "items",
    "metadata",
    "tags",
    "user_id",
    "ids",
    "members",
    "eq",
    "in",
    "metadata.a",
    "time",
    "tenant",
    "wait",
    "top_k",
    "threshold",
    "expires_at",
    "ttl_s",
    "token_budget",
    "name",
    "�",
]
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True)
    | st.text(st.characters(codec=None), max_size=8)
    | st.sampled_from(["user", "ann", "2026-01-01", "fact", "dense", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(_NAMES),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)
_PATHS = [MEMORIES, BATCH, SEARCH, "/v1/context", "/v1/cubes", "/v1/cubes/compose", "/v1/keys"]


async def test_no_body_makes_an_error_of_ours(api):
    drawn: list[tuple[str, Any]] = []

    @settings(
        max_examples=150,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(_PATHS), _JSON)
    def draw(path: str, body: Any) -> None:
        drawn.append((path, body))

    # Hypothesis runs no coroutines: it draws, and the drawn cases are run after.
    draw()
    for path, body in drawn:
        response = await api.call("POST", path, body)
        assert response.status_code < 500, (path, body, response.text)
        if response.status_code >= 400:
            api.check(response)
