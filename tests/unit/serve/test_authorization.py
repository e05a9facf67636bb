"""Who may call what: every route by every kind of key, and two tenants with all ids crossed."""

import json
import re
import sqlite3
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts

from memcube.catalog import Role
from memcube.ids import uuid7
from memcube.testing.local import START, LocalSystem

MODEL = "SmolLM2-135M-Instruct"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "theirs"}]}
PUBLIC, READER, WRITER, ADMIN, OPERATOR = None, *Role
NAMES = {"name": MODEL, "version": "1", "tenant": "acme"}
PAST = "2026-03-01T12:00:00Z"


@dataclass(frozen=True)
class Row:
    """A route's least role, a body that is valid for it, and the scope of its query; and whether an operator
    sees other tenants' there, which hold no text."""

    role: Role | None
    body: dict[str, Any] | None = None
    query: str = ""
    sees_all: bool = False


MATRIX = {
    ("POST", "/v1/memories"): Row(WRITER, {"text": "from the matrix", "user_id": "matrix"}),
    ("POST", "/v1/memories/batch"): Row(WRITER, {"items": [{"text": "x", "user_id": "matrix"}]}),
    ("POST", "/v1/memories/search"): Row(READER, {"query": "tea"}),
    ("POST", "/v1/context"): Row(READER, {"query": "tea"}),
    ("GET", "/v1/memories"): Row(READER),
    ("DELETE", "/v1/memories"): Row(WRITER, query="?user_id=nobody"),
    ("GET", "/v1/memories/{id}"): Row(READER),
    ("PUT", "/v1/memories/{id}"): Row(WRITER, {"text": "changed"}),
    ("DELETE", "/v1/memories/{id}"): Row(WRITER),
    ("GET", "/v1/memories/{id}/history"): Row(READER),
    ("POST", "/v1/cubes"): Row(WRITER, {"title": "x"}),
    ("POST", "/v1/cubes/compose"): Row(WRITER, {"ids": ["{id}"]}),
    ("POST", "/v1/cubes/fuse"): Row(WRITER, {"ids": ["{id}", "{second}"]}),
    ("GET", "/v1/cubes/{id}"): Row(READER),
    ("GET", "/v1/cubes/{id}/versions"): Row(READER),
    ("GET", "/v1/cubes/{id}/members"): Row(READER),
    ("PUT", "/v1/cubes/{id}/members"): Row(WRITER, {"members": []}),
    ("POST", "/v1/cubes/{id}/migrate"): Row(WRITER, {"tier": "activation"}),
    ("POST", "/v1/cubes/{id}/rollback"): Row(WRITER, {"version": 1}),
    ("POST", "/v1/cubes/{id}/freeze"): Row(WRITER),
    ("POST", "/v1/cubes/{id}/unfreeze"): Row(WRITER),
    ("POST", "/v1/cubes/{id}/archive"): Row(WRITER),
    ("POST", "/v1/cubes/{id}/restore"): Row(WRITER),
    ("GET", "/v1/cubes/{id}/lineage"): Row(READER),
    ("POST", "/v1/chat/completions"): Row(
        READER, {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "user": "matrix"}
    ),
    ("GET", "/v1/models"): Row(READER),
    ("GET", "/v1/models/{name}"): Row(READER),
    ("GET", "/v1/adapters"): Row(READER),
    ("GET", "/v1/adapters/{id}/versions/{version}"): Row(READER),
    ("GET", "/v1/cubes/{id}/adapters"): Row(READER),
    ("POST", "/v1/adapters/{id}/activate"): Row(WRITER, {"version": 1}),
    ("POST", "/v1/adapters/{id}/rollback"): Row(WRITER),
    ("POST", "/v1/jobs"): Row(WRITER, {"kind": "consolidate", "user_id": "matrix"}),
    ("GET", "/v1/jobs"): Row(READER),
    ("GET", "/v1/jobs/{id}"): Row(READER),
    ("GET", "/v1/jobs/{id}/logs"): Row(READER),
    ("POST", "/v1/jobs/{id}/cancel"): Row(WRITER),
    ("POST", "/v1/jobs/{id}/resume"): Row(WRITER),
    ("GET", "/v1/jobs/{id}/report"): Row(READER),
    ("POST", "/v1/memories/compare"): Row(READER, {"user_id": "nobody", "since": PAST}),
    ("POST", "/v1/memories/rollback"): Row(WRITER, {"user_id": "nobody", "to": PAST}),
    ("POST", "/v1/snapshots"): Row(WRITER, {"name": "{id}", "user_id": "matrix"}),
    ("GET", "/v1/snapshots"): Row(READER),
    ("DELETE", "/v1/snapshots/{id}"): Row(WRITER),
    ("GET", "/v1/proposals"): Row(READER),
    ("POST", "/v1/proposals/find"): Row(WRITER, {"user_id": "nobody"}),
    ("POST", "/v1/proposals/{id}/apply"): Row(WRITER),
    ("POST", "/v1/proposals/{id}/dismiss"): Row(WRITER),
    ("GET", "/v1/scheduler"): Row(OPERATOR),
    ("POST", "/v1/scheduler/plan"): Row(OPERATOR),
    ("GET", "/v1/scheduler/journal"): Row(READER),
    ("GET", "/v1/events/{id}"): Row(READER, sees_all=True),
    ("GET", "/v1/events/{id}/wait"): Row(READER, query="?timeout_s=0", sees_all=True),
    ("GET", "/v1/tasks"): Row(READER),
    ("POST", "/v1/tasks/{id}/retry"): Row(WRITER, sees_all=True),
    ("POST", "/v1/tasks/{id}/accept"): Row(WRITER),
    ("GET", "/v1/nodes"): Row(OPERATOR),
    ("GET", "/v1/nodes/{name}"): Row(OPERATOR),
    ("POST", "/v1/nodes/{name}/drain"): Row(OPERATOR),
    ("POST", "/v1/nodes/{name}/undrain"): Row(OPERATOR),
    ("DELETE", "/v1/nodes/{name}"): Row(OPERATOR),
    ("POST", "/v1/tenants/{tenant}/move"): Row(OPERATOR, {"to": "host"}),
    ("GET", "/v1/doctor"): Row(OPERATOR),
    ("POST", "/v1/doctor/repair"): Row(OPERATOR),
    ("POST", "/v1/embeddings"): Row(READER, {"model": "all-MiniLM-L6-v2", "input": "tea"}),
    ("POST", "/v1/keys"): Row(ADMIN, {"name": "matrix", "role": "reader"}),
    ("GET", "/v1/keys"): Row(ADMIN),
    ("DELETE", "/v1/keys/{id}"): Row(ADMIN),
    ("GET", "/v1/status"): Row(READER),
    ("GET", "/healthz"): Row(PUBLIC),
    ("GET", "/readyz"): Row(PUBLIC),
    ("GET", "/metrics"): Row(PUBLIC),
    ("GET", "/docs"): Row(PUBLIC),
    ("GET", "/docs/oauth2-redirect"): Row(PUBLIC),
    ("GET", "/redoc"): Row(PUBLIC),
    ("GET", "/openapi.json"): Row(PUBLIC),
}
GUARDED = [route for route, row in MATRIX.items() if row.role is not None]
NO_KEYS = ["none", "empty", "unknown", "not a scheme", "expired", "revoked", "hash", "long"]


def name_of(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


# One system for the whole module: nothing that is refused may change it, and that is checked.
@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, prepared) -> Iterator[LocalSystem]:
    opened = LocalSystem.open(tmp_path_factory.mktemp("matrix"), template=prepared.file)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def secrets(shared: LocalSystem, prepared) -> dict[str, str]:
    """A key of each role of the tenant ``acme``, an admin's of another, and what is no key."""
    access = shared.catalog.access
    keys = dict(prepared.keys)
    keys["other"] = shared.key("other", Role.ADMIN)
    keys["expired"] = shared.key("acme", Role.ADMIN, expires_at=START + timedelta(seconds=1))
    keys["revoked"] = shared.key("acme", Role.ADMIN)
    revoked = access.authenticate(keys["revoked"], now=START)
    access.revoke_key(revoked.tenant, revoked.key_id, now=START)
    with access._database.reading() as connection:
        row = connection.exec_driver_sql("SELECT secret_sha256 FROM api_keys LIMIT 1").one()
    keys["hash"] = row[0]
    shared.clock.advance(1)
    return keys


@pytest.fixture
async def api(shared: LocalSystem, secrets: dict[str, str], open_api) -> AsyncIterator[Any]:
    opened = open_api(shared, secrets["writer"])
    async with opened.client:
        yield opened


def filled(value: Any, **names: str) -> Any:
    """A path or body with ``{id}`` and the like filled in."""
    text = json.dumps(value)
    for name, given in names.items():
        text = text.replace("{" + name + "}", given)
    return json.loads(text)


def maker(api: Any, route: tuple[str, str]) -> Any:
    """What makes the thing that a route's id names, where that is no cube."""

    async def ended_job(*, key: str) -> str:
        return api.job(key=key)

    async def node(*, key: str) -> str:
        return api.nodes("host")[0]

    async def lost_node(*, key: str) -> str:
        api.nodes("lost")
        return api.nodes("lost", alive=False)[0]

    made = {
        "adapters": api.adapter,
        "jobs": ended_job,
        "snapshots": api.snapshot,
        "proposals": api.proposal,
        "events": api.task,
        "tenants": node,
        "nodes": lost_node if route[0] == "DELETE" else node,
        "tasks": api.dead_task if route[1].endswith("/retry") else api.task,
    }
    names_one = any(part in route[1] for part in ("{id}", "/nodes/", "/move"))
    return made.get(route[1].split("/")[2]) if names_one else None


async def request(api: Any, route: tuple[str, str], id: str, second: str = "", **how: Any):
    row = MATRIX[route]
    name = id if "/nodes/" in route[1] else MODEL
    body = () if row.body is None else (filled(row.body, id=id, second=second),)
    return await api.call(
        route[0], filled(route[1], **(NAMES | {"name": name, "id": id})) + row.query, *body, **how
    )


def headers_without_key(kind: str, secrets: dict[str, str]) -> dict[str, str]:
    return {
        "none": {},
        "empty": {"authorization": "Bearer "},
        "unknown": {"authorization": "Bearer mk_" + "A" * 43},
        "not a scheme": {"authorization": f"Basic {secrets['admin']}"},
        "expired": {"x-api-key": secrets["expired"]},
        "revoked": {"authorization": f"Token {secrets['revoked']}"},
        "hash": {"authorization": f"Bearer {secrets['hash']}"},
        "long": {"x-api-key": "mk_" + "A" * 10_000},
    }[kind]


class Unchanged:
    """A block in which nothing is written to the catalog, by whatever way."""

    def __init__(self, system: LocalSystem) -> None:
        # SQLite raises this number, as one connection sees it, at every commit of another one.
        self._watch = sqlite3.connect(system.catalog._database.url.database or "")

    def _number(self) -> int:
        return self._watch.execute("PRAGMA data_version").fetchone()[0]

    def __enter__(self) -> None:
        self._before = self._number()

    def __exit__(self, *error: object) -> None:
        now = self._number()
        self._watch.close()
        assert now == self._before, "something was written"


def test_every_route_has_its_row(shared: LocalSystem, open_api):
    routes = {
        (method, route.path)
        for route in iter_route_contexts(open_api(shared, "").app.routes)
        for method in (route.methods or ())
        if method != "HEAD"
    }
    assert routes == set(MATRIX), "a new route needs a row in MATRIX"


@pytest.mark.parametrize("route", GUARDED, ids=name_of)
async def test_without_a_valid_key_every_route_answers_the_same_401(api, secrets, route):
    told = []
    with Unchanged(api.system):
        for kind in NO_KEYS:
            id = "x" * 100 if kind == "unknown" else str(uuid7(START))
            headers = headers_without_key(kind, secrets)
            response = await request(api, route, id, key=None, headers=headers)
            assert response.headers["www-authenticate"] == "Bearer", kind
            told.append(api.check(response))
    assert {(t["status"], t["code"]) for t in told} == {(401, "unauthenticated")}
    assert {t["detail"] for t in told} == {
        "no valid API key; send 'Authorization: Bearer KEY' or 'X-API-Key: KEY' "
        "(make one with: memcube keys create)"
    }


@pytest.mark.parametrize("route", [r for r in GUARDED if MATRIX[r].body is not None], ids=name_of)
async def test_without_a_valid_key_no_body_is_looked_at(api, route):
    path = filled(route[1], **(NAMES | {"id": str(uuid7(START))}))
    for body in (b"{", b"[" * 100_000, b'{"nothing": 1}', b"\xff"):
        response = await api.call(route[0], path, body, key="mk_wrong")
        assert response.status_code == 401, body[:20]
    response = await api.call(route[0], path + "?unknown=1", b"{", key=None)
    assert response.status_code == 401


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("route", GUARDED, ids=name_of)
async def test_each_role_may_do_what_its_row_says(api, secrets, route, role):
    needed = MATRIX[route].role
    id = await api.add(f"tea of {name_of(route)} {role}", key=secrets["writer"])
    second = await api.add(f"milk of {name_of(route)} {role}", key=secrets["writer"])
    if "/keys/" in route[1]:
        made = {"name": "doomed", "role": "reader"}
        id = (await api.ok("POST", "/v1/keys", made, key=secrets["admin"]))["id"]
    if (make := maker(api, route)) is not None:
        id = await make(key=secrets["writer"])
    if route[1].endswith("/restore"):
        await api.ok("POST", f"/v1/cubes/{id}/archive", key=secrets["writer"])
    if route == ("PUT", "/v1/cubes/{id}/members"):
        id = (await api.ok("POST", "/v1/cubes", {}, key=secrets["writer"]))["id"]
    if role.allows(needed):
        response = await request(api, route, id, second, key=secrets[role])
        assert response.is_success, response.text
        return
    with Unchanged(api.system):
        told = api.check(await request(api, route, id, second, key=secrets[role]))
    assert (told["status"], told["code"]) == (403, "forbidden")
    assert needed in told["detail"]


@pytest.mark.parametrize("route", [r for r in MATRIX if r not in GUARDED], ids=name_of)
async def test_what_is_public_needs_no_key_and_names_no_tenant(api, secrets, route):
    await api.add("secret of acme", key=secrets["writer"])
    for key in (None, secrets["reader"], "mk_wrong"):
        response = await api.call(*route, key=key)
        assert response.is_success
        for word in ("acme", "secret of"):
            assert word not in response.text


@pytest.mark.parametrize("how", ["bearer", "token", "header", "lower case", "spaces", "both"])
async def test_a_key_may_be_sent_in_each_of_the_stated_ways(api, secrets, how):
    secret = secrets["reader"]
    headers = {
        "bearer": {"authorization": f"Bearer {secret}"},
        "token": {"authorization": f"Token {secret}"},
        "header": {"x-api-key": secret},
        "lower case": {"authorization": f"bearer {secret}"},
        "spaces": {"authorization": f"Bearer   {secret} "},
        "both": {"authorization": "Bearer mk_other", "x-api-key": secret},
    }[how]
    assert (await api.call("GET", "/v1/status", key=None, headers=headers)).status_code == 200


# -- two tenants, all ids crossed ------------------------------------------------------------------

BY_ID = [
    route
    for route in GUARDED
    if "{id}" in json.dumps([route[1], MATRIX[route].body]) and route != ("POST", "/v1/snapshots")
]


@pytest.mark.parametrize("kind", ["leaf", "composite", "deleted", "expired"])
@pytest.mark.parametrize("route", BY_ID, ids=name_of)
async def test_a_foreign_id_and_an_unknown_one_can_not_be_told_apart(api, secrets, route, kind):
    """Byte for byte, apart from the id that was asked for and the number of the request."""
    other = secrets["other"]
    if "/keys/" in route[1]:
        made = {"name": "theirs", "role": "reader"}
        foreign = (await api.ok("POST", "/v1/keys", made, key=other))["id"]
    elif (make := maker(api, route)) is not None:
        foreign = await make(key=other)
    elif kind == "composite":
        foreign = (await api.ok("POST", "/v1/cubes", {"title": "theirs"}, key=other))["id"]
    else:
        foreign = await api.add(f"theirs, {name_of(route)}", key=other, ttl_s=50)
    of_cubes = "/keys/" not in route[1] and maker(api, route) is None
    if kind == "deleted" and of_cubes:
        await api.ok("DELETE", f"/v1/memories/{foreign}", key=other)
    if kind == "expired":
        api.system.clock.advance(60)
    mine = await api.add(f"mine, {name_of(route)} {kind}", key=secrets["writer"])
    answers = []
    with Unchanged(api.system):
        for asked in (foreign, str(uuid7(START))):
            for row_id, second in ((asked, mine), (mine, asked)):
                if row_id is mine and "{second}" not in json.dumps(MATRIX[route].body):
                    continue
                role = "admin" if MATRIX[route].sees_all else "operator"
                response = await request(api, route, row_id, second, key=secrets[role])
                assert response.status_code == 404, response.text
                request_id = api.check(response)["request_id"]
                told = response.text.replace(asked, "ID").replace(request_id, "REQUEST")
                headers = {k: v for k, v in response.headers.items() if k != "x-request-id"}
                answers.append((told, headers))
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/memories/{id}?version=1", None),
        ("GET", "/v1/memories/{id}?version=77", None),
        ("GET", "/v1/memories/{id}?as_of=2026-03-01T12:00:00Z", None),
        ("POST", "/v1/memories/search", {"query": "theirs", "cube_ids": ["{id}"]}),
        ("POST", "/v1/context", {"query": "theirs", "cube_ids": ["{id}"]}),
        ("POST", "/v1/chat/completions", CHAT | {"memory": {"cube_ids": ["{id}"]}}),
        (
            "POST",
            "/v1/chat/completions",
            CHAT | {"stream": True, "memory": {"cube_ids": ["{whole}", "{id}"]}},
        ),
        ("POST", "/v1/cubes", {"members": ["{id}"]}),
        ("PUT", "/v1/cubes/{whole}/members", {"members": ["{id}"]}),
        ("PUT", "/v1/memories/{id}", {"text": "x", "expected_version": 9}),
        ("POST", "/v1/cubes/{id}/rollback", {"version": 9}),
    ],
    ids=str,
)
async def test_a_foreign_id_is_unknown_wherever_an_id_may_stand(api, secrets, method, path, body):
    foreign = await api.add("theirs, of another tenant", key=secrets["other"])
    whole = (await api.ok("POST", "/v1/cubes", {"title": "w"}, key=secrets["writer"]))["id"]
    answers = []
    for asked in (foreign, str(uuid7(START))):
        rest = () if body is None else (filled(body, id=asked, whole=whole),)
        at = filled(path, id=asked, whole=whole)
        response = await api.call(method, at, *rest, key=secrets["writer"])
        told = api.check(response)
        assert (told["status"], told["code"]) == (404, "not_found")
        told = response.text.replace(asked, "ID").replace(told["request_id"], "REQUEST")
        answers.append(told)
    assert answers[0] == answers[1]
    assert (await api.ok("GET", f"/v1/cubes/{whole}", key=secrets["writer"]))["version"] == 1


async def test_no_list_search_or_count_shows_another_tenant(api, secrets):
    """The same words, users and tags in both tenants: each sees its own alone."""
    body = {"user_id": "shared", "tags": ["shared"], "metadata": {"k": "shared"}, "run_id": "1"}
    mine = await api.add("the shared kumquat of acme", key=secrets["writer"], **body)
    theirs = await api.add("the shared kumquat of other", key=secrets["other"], **body)
    for key, own in ((secrets["reader"], mine), (secrets["other"], theirs)):
        page = await api.ok("GET", "/v1/memories?user_id=shared", key=key)
        assert [c["id"] for c in page["results"]] == [own]
        page = await api.ok("GET", "/v1/memories?tag=shared&run_id=1", key=key)
        assert [c["id"] for c in page["results"]] == [own]
        for mode in ("dense", "sparse", "hybrid"):
            for filters in (
                None,
                {"or": [{"metadata.k": "shared"}, {"not": {"metadata.k": "shared"}}]},
                {"id": [mine, theirs]},
                {"user_id": {"contains": ""}},
            ):
                asked = {"query": "shared kumquat", "mode": mode, "user_id": "shared"}
                asked |= {} if filters is None else {"filters": filters}
                found = await api.ok("POST", "/v1/memories/search", asked, key=key)
                assert [hit["id"] for hit in found["results"]] == [own]
        block = await api.ok("POST", "/v1/context", {"query": "shared kumquat"}, key=key)
        assert own in block["ids"]
        assert ({mine, theirs} - {own}).isdisjoint(block["ids"])


@pytest.mark.parametrize(
    "memory",
    [
        {"user_id": "shared"},
        {"filters": {"user_id": "shared"}},
        {"filters": {"or": [{"user_id": "shared"}, {"not": {"user_id": "nobody"}}]}},
    ],
    ids=str,
)
async def test_no_chat_is_given_another_tenants_memory_or_kv(api, secrets, memory):
    """The same words of the same user in both tenants, asked in turn."""
    body = {"user_id": "shared", "text": f"the shared medlar of {json.dumps(memory)}"}
    asked = CHAT | {"memory": memory}
    ids = {}
    for key in ("writer", "other"):
        added = await api.ok("POST", "/v1/memories", body, key=secrets[key])
        ids[key] = added["results"][0]["id"]
        told = (await api.ok("POST", "/v1/chat/completions", asked, key=secrets[key]))["memory"]
        used = {cube["id"]: cube["form"] for cube in told["cubes"]}
        assert used[ids[key]] == "text"
        assert told["tokens_attached"] == 0
    again = (await api.ok("POST", "/v1/chat/completions", asked, key=secrets["writer"]))["memory"]
    assert again["tokens_attached"] > 0
    assert ids["other"] not in {cube["id"] for cube in again["cubes"]}


async def test_scores_do_not_tell_of_another_tenants_words(api, secrets):
    """Document frequencies are the tenant's own: a rare word stays rare whatever others store."""
    asked = {"query": "quince", "mode": "sparse"}
    await api.add("a quince tree", key=secrets["writer"], user_id="q")
    before = await api.ok("POST", "/v1/memories/search", asked, key=secrets["reader"])
    for i in range(20):
        await api.add(f"quince number {i}", key=secrets["other"])
    after = await api.ok("POST", "/v1/memories/search", asked, key=secrets["reader"])
    assert after["results"] == before["results"]


async def test_counts_and_keys_are_the_tenants_own(api, secrets):
    mine = await api.ok("GET", "/v1/status", key=secrets["reader"])
    await api.add("one more of theirs", key=secrets["other"])
    again = await api.ok("GET", "/v1/status", key=secrets["reader"])
    assert again["cubes"] == mine["cubes"]
    assert (mine["tenant"], mine["role"]) == ("acme", "reader")
    ids = {
        key: {k["id"] for k in (await api.ok("GET", "/v1/keys", key=secrets[key]))["keys"]}
        for key in ("admin", "operator", "other")
    }
    assert ids["admin"] == ids["operator"]
    assert ids["admin"].isdisjoint(ids["other"])


async def test_a_scope_that_is_forgotten_is_the_tenants_own(api, secrets):
    theirs = await api.add("theirs to keep", key=secrets["other"], user_id="crossed")
    mine = await api.add("mine to forget", key=secrets["writer"], user_id="crossed")
    path = "/v1/memories?user_id=crossed"
    assert await api.ok("DELETE", path, key=secrets["operator"]) == {"deleted": 1}
    assert (await api.call("GET", f"/v1/memories/{mine}", key=secrets["writer"])).status_code == 404
    assert (await api.ok("GET", f"/v1/memories/{theirs}", key=secrets["other"]))["text"]


@pytest.mark.parametrize("where", ["query", "header", "path"])
async def test_a_tenant_named_beside_the_key_widens_nothing(api, secrets, where):
    theirs = await api.add("theirs, named", key=secrets["other"])
    headers = {"x-tenant": "other", "x-tenant-id": "other", "tenant": "other"}
    if where == "header":
        page = await api.ok("GET", "/v1/memories?limit=500", key=secrets["writer"], headers=headers)
        assert theirs not in {c["id"] for c in page["results"]}
    elif where == "query":
        at = "/v1/memories?tenant=other"
        await api.problem(422, "bad_request", "GET", at, key=secrets["writer"])
    else:
        for path in (f"/v1/other/memories/{theirs}", f"/v1/memories/other%2f{theirs}"):
            assert (await api.call("GET", path, key=secrets["writer"])).status_code == 404


async def test_a_cursor_of_another_tenant_shows_ones_own_cubes_alone(api, secrets):
    for i in range(3):
        await api.add(f"theirs in pages {i}", key=secrets["other"])
    page = await api.ok("GET", "/v1/memories?limit=1", key=secrets["other"])
    at = f"/v1/memories?limit=500&cursor={page['next_cursor']}"
    mine = await api.ok("GET", at, key=secrets["writer"])
    assert not re.search("theirs", json.dumps(mine))


# -- keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caller", "asked", "made"),
    [
        ("admin", {"role": "operator"}, False),
        ("admin", {"role": "admin"}, True),
        ("operator", {"role": "operator"}, True),
        ("admin", {"tenant": "other"}, False),
        ("admin", {"tenant": "acme"}, True),
        ("admin", {"tenant": "fresh"}, False),
        ("operator", {"tenant": "other"}, True),
        ("operator", {"tenant": "fresh"}, True),
    ],
    ids=str,
)
async def test_no_key_makes_one_that_may_do_more(api, secrets, caller, asked, made):
    body = {"name": "x", **asked}
    if not made:
        with Unchanged(api.system):
            await api.problem(403, "forbidden", "POST", "/v1/keys", body, key=secrets[caller])
        return
    response = await api.call("POST", "/v1/keys", body, key=secrets[caller])
    assert response.status_code == 201
    assert response.json()["tenant"] == asked.get("tenant", "acme")


async def test_an_operator_reads_no_tenants_memory_but_its_own(api, secrets):
    theirs = await api.add("theirs, private", key=secrets["other"])
    response = await api.call("GET", f"/v1/memories/{theirs}", key=secrets["operator"])
    assert response.status_code == 404
    texts = await api.texts("private", key=secrets["operator"])
    assert "theirs, private" not in texts
