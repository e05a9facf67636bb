import inspect
import json
import pickle
import subprocess
import sys
from datetime import UTC, datetime

import httpx
import pytest

from memcube import errors
from memcube.client import (
    AsyncMemCubeClient,
    Cube,
    Item,
    MemCubeClient,
    Message,
    RetryPolicy,
    Unreachable,
    calls,
    find_address,
)
from memcube.client.problems import from_problem
from memcube.client.types import from_json, to_json
from memcube.errors import BadRequest, Corrupt, NotFound, Unauthenticated
from memcube.testing.api import KEY, FakeApi

QUICK = RetryPolicy(base_s=0.0)
WHEN = datetime(2024, 5, 1, 12, tzinfo=UTC)


@pytest.fixture
def api():
    return FakeApi()


@pytest.fixture
def client(api):
    with MemCubeClient("http://server", KEY, transport=api.transport, retry=QUICK) as client:
        yield client


def test_what_is_added_is_found_read_changed_and_forgotten(client):
    id = client.add("Ann likes tea", user_id="ann", tags=["drinks"], metadata={"a": 1}).ids[0]
    hit = client.search("tea", user_id="ann")[0]
    assert (hit.id, hit.metadata, hit.tags) == (id, {"a": 1}, ("drinks",))
    changed = client.update(id, text="Ann likes coffee", expected_version=1)
    assert (changed.version, changed.text) == (2, "Ann likes coffee")
    assert client.get(id).text == "Ann likes coffee"
    assert client.history(id).versions[0].version == 2
    assert client.delete(id).id == id
    with pytest.raises(NotFound):
        client.get(id)


def test_messages_go_with_name_time_and_id(client, api):
    message = Message(role="user", content="hi", name="Ann", time=WHEN, id="m1")
    added = client.add([message, {"role": "assistant", "content": "hello"}], run_id="r")
    assert client.get(added.ids[0]).sources[0].ref == "m1"
    sent = json.loads(api.requests[0].content)["messages"]
    assert sent[0]["time"] == "2024-05-01T12:00:00Z"
    assert sent[1] == {"role": "assistant", "content": "hello"}


def test_a_batch_answers_item_by_item(client):
    answer = client.add_batch([Item(text="a"), {"text": "b"}, {"text": "a"}])
    events = [result.results[0].event for result in answer.results]
    assert events == ["added", "added", "repeated"]


@pytest.mark.parametrize("failure", [503, 429, httpx.ReadTimeout("slow"), httpx.ConnectError("no")])
def test_one_key_serves_all_tries_of_an_add(client, api, failure):
    api.failures.append(failure)
    client.add("a")
    keys = {request.headers["idempotency-key"] for request in api.requests}
    assert len(api.requests) == 2
    assert len(keys) == 1
    client.add("a")
    assert api.requests[-1].headers["idempotency-key"] not in keys


def test_an_add_whose_answer_was_lost_is_stored_once_and_reads_as_added(client, api):
    api.after.append(httpx.ReadError("reset"))
    assert client.add("a").results[0].event == "added"
    assert len(api.cubes) == 1


def test_a_delete_whose_answer_was_lost_succeeds(client, api):
    id = client.add("a").ids[0]
    api.after.append(httpx.RemoteProtocolError("closed"))
    assert client.delete(id).id == id


def test_a_given_key_is_used(client, api):
    client.add("a", idempotency_key="mine")
    assert api.requests[0].headers["idempotency-key"] == "mine"


def test_iterate_walks_all_pages(client):
    client.add_batch([{"text": str(n), "user_id": "ann"} for n in range(7)])
    client.add("x", user_id="bob")
    assert [cube.text for cube in client.iterate(user_id="ann", page_size=3)] == list("6543210")
    assert client.delete_all(user_id="ann") == 7


def test_keys_are_made_listed_and_revoked_and_a_secret_is_not_in_the_repr(client):
    made = client.keys.create("app", role="reader")
    assert made.key == "mk_secret"
    assert "mk_secret" not in repr(made)
    assert [key.name for key in client.keys.list()] == ["app"]
    client.keys.revoke(made.id)
    assert client.keys.list() == ()


def test_status_probes_context_and_freezing_answer(client):
    id = client.add("tea").ids[0]
    assert client.health()
    assert client.ready()
    assert client.status()["version"] == "0.1.0"
    assert client.context("tea", token_budget=9).ids == (id,)
    assert client.cubes.freeze(id).frozen
    assert not client.cubes.unfreeze(id).frozen
    migrated = client.cubes.migrate(id, "activation")
    assert (migrated.tokens, migrated.residency[0].medium) == (1, "device")


def test_nodes_are_listed_drained_and_forgotten_and_tenants_sent_to_them(client, api):
    api.node("a")
    api.node("b", num_tenants=1)
    assert [node["name"] for node in client.nodes.list()] == ["a", "b"]
    assert client.nodes.drain("b")["state"] == "draining"
    assert client.nodes.get("b")["state"] == "drained"
    assert client.nodes.undrain("b")["state"] == "up"
    with pytest.raises(errors.Conflict):
        client.nodes.forget("b")
    api.node("b", state="down")
    assert client.nodes.forget("b") == {"name": "b", "forgotten": True}
    event = client.nodes.move_tenant("acme", to="a")
    assert (event.kind, event.tenant, event.ended) == ("move_tenant", "acme", False)
    assert client.scheduler.event(event.id) == event


async def test_the_async_client_does_the_same(api):
    async with AsyncMemCubeClient("http://s", KEY, transport=api.transport, retry=QUICK) as client:
        api.failures.append(503)
        await client.add_batch([{"text": str(n)} for n in range(5)])
        assert [c.text async for c in client.iterate(page_size=2)] == list("43210")
        assert (await client.cubes.freeze((await client.search("1"))[0].id)).frozen
        assert [key.name for key in await client.keys.list()] == []


def test_both_clients_have_the_same_methods():
    for blocking, waiting in [(MemCubeClient, AsyncMemCubeClient)]:
        names = {name for name in vars(blocking) if not name.startswith("_")} - {"close"}
        assert names == {n for n in vars(waiting) if not n.startswith("_")} - {"aclose"}
        for name in names - {"iterate", "send"}:
            one, other = (inspect.signature(getattr(kind, name)) for kind in (blocking, waiting))
            assert one == other
            assert "self" in one.parameters


def test_a_wrong_key_is_unauthenticated(api):
    with (
        MemCubeClient("http://s", "wrong", transport=api.transport) as client,
        pytest.raises(Unauthenticated, match="req-1"),
    ):
        client.search("a")


def test_the_key_is_in_no_repr():
    client = MemCubeClient("http://s", "mk_hidden")
    assert "mk_hidden" not in repr(client) + repr(client.address)


@pytest.mark.parametrize("bad", [{}, {"text": "a", "messages": []}, {"text": "a", "user": "ann"}])
def test_a_bad_item_is_refused_before_it_is_sent(client, api, bad):
    with pytest.raises(BadRequest):
        client.add_batch([bad])
    assert api.requests == []


def test_a_time_without_a_zone_is_refused(client):
    with pytest.raises(BadRequest, match="time zone"):
        client.add("a", expires_at=datetime(2024, 5, 1))


@pytest.mark.parametrize("id", ["../keys", "a/b", "a?b=c", "ä ö"])
def test_an_id_stays_one_path_segment(client, id):
    with pytest.raises(NotFound) as caught:
        client.get(id)
    assert repr(id) in str(caught.value)
    assert calls.get(id).path.count("/") == 3
    assert "?" not in calls.get(id).path


@pytest.mark.parametrize("id", ["", ".", ".."])
def test_an_id_that_would_change_the_path_is_refused(id):
    with pytest.raises(BadRequest):
        calls.delete(id)


@pytest.mark.parametrize("text", ["\ud800", float("nan")])
def test_what_json_cannot_carry_is_refused(text):
    with pytest.raises(BadRequest, match="JSON"):
        calls.search(text)


def test_unknown_fields_of_an_answer_are_ignored_and_missing_ones_named():
    cube = from_json(Cube, {"id": "1", "state": "s", "version": 1, "text": "t", "new": [1]})
    assert cube.members == ()
    assert to_json(cube)["id"] == "1"
    with pytest.raises(Corrupt, match="version"):
        from_json(Cube, {"id": "1", "state": "s", "text": "t"})


def test_an_answer_that_is_no_json_is_told_with_its_address():
    page = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>"))
    with (
        MemCubeClient("http://s", transport=page) as client,
        pytest.raises(Corrupt, match="http://s"),
    ):
        client.get("1")


CODES = {k.code for _, k in inspect.getmembers(errors, inspect.isclass)}


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_code_gives_its_class_and_survives_pickling(code):
    about = {
        "status": 418,
        "code": code,
        "detail": "what",
        "request_id": "r",
        "retry_after_s": None,
    }
    error = from_problem(about)
    again = pickle.loads(pickle.dumps(error))
    assert error.code == code
    assert str(again) == str(error) == "what (request r)"


def serve_json(folder, **more):
    folder.mkdir(exist_ok=True)
    data = {"url": "http://127.0.0.1:8000", "api_key": "local", "pid": 1, **more}
    (folder / "serve.json").write_text(json.dumps(data))
    return folder


def test_an_argument_goes_before_the_environment_and_that_before_serve_json(tmp_path):
    data = serve_json(tmp_path)
    environ = {"MEMCUBE_URL": "http://env/", "MEMCUBE_API_KEY": "env"}
    first = find_address("http://arg", "arg", data_dir=data, environ=environ)
    second = find_address(data_dir=data, environ=environ)
    third = find_address(environ={"MEMCUBE_HOME": str(data)})
    found = [(a.url, a.api_key, a.pid) for a in (first, second, third)]
    assert found == [
        ("http://arg", "arg", None),
        ("http://env", "env", None),
        ("http://127.0.0.1:8000", "local", 1),
    ]


def test_the_local_key_never_goes_to_another_server(tmp_path):
    data = serve_json(tmp_path)
    assert find_address("http://elsewhere", data_dir=data, environ={}).api_key is None
    assert find_address("http://127.0.0.1:8000/", data_dir=data, environ={}).api_key == "local"


def test_no_address_says_what_to_do(tmp_path):
    with pytest.raises(Unreachable, match="memcube serve"):
        find_address(data_dir=tmp_path, environ={})


@pytest.mark.parametrize("url", ["server:80", "ftp://x", "http://", "nonsense"])
def test_a_bad_url_is_refused(url):
    with pytest.raises(BadRequest, match="no URL"):
        find_address(url, environ={})


def test_a_broken_serve_json_is_told(tmp_path):
    (tmp_path / "serve.json").write_text("{}")
    with pytest.raises(Corrupt, match=r"serve\.json"):
        find_address(data_dir=tmp_path, environ={})


def test_a_broken_serve_json_does_not_matter_to_who_gives_address_and_key(tmp_path):
    (tmp_path / "serve.json").write_text("{}")
    assert find_address("http://arg", "key", data_dir=tmp_path, environ={}).pid is None
    with pytest.raises(Corrupt):
        find_address("http://arg", data_dir=tmp_path, environ={})


@pytest.mark.parametrize("key", ["ключ", "a\nb"])
def test_what_no_header_can_hold_is_refused_without_being_told(client, key):
    with pytest.raises(BadRequest) as refused:
        find_address("http://arg", key, environ={})
    assert key not in str(refused.value)
    with pytest.raises(BadRequest, match="idempotency_key"):
        client.add("a", idempotency_key=key)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, content=b"[" * 100_000),
        httpx.Response(200, json={"results": [], "took_ms": []}),
    ],
)
def test_an_answer_of_another_form_is_corrupt(answer):
    transport = httpx.MockTransport(lambda request: answer)
    with MemCubeClient("http://s", transport=transport) as client, pytest.raises(Corrupt):
        client.search("a")


def test_an_answer_that_cannot_be_decoded_is_corrupt_and_not_asked_again():
    asked = []

    def broken(request):
        asked.append(request)
        raise httpx.DecodingError("incorrect header check", request=request)

    transport = httpx.MockTransport(broken)
    with MemCubeClient("http://s", transport=transport) as client, pytest.raises(Corrupt):
        client.search("a")
    assert len(asked) == 1


@pytest.mark.parametrize("module", ["memcube.client", "memcube.cli"])
def test_importing_it_imports_nothing_of_the_server(module):
    server = "ray torch qdrant_client qdrant_edge sqlalchemy numpy pydantic yaml psutil fastapi"
    code = f"import sys, {module}; print([m for m in '{server}'.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
