"""Chats answered by an adapter: the one that is named, or the one that serves the scope."""

from typing import Any

import pytest

from memcube.catalog import AdapterRecord, NewAdapter
from memcube.chat.adapters import AdapterChoice
from memcube.chat.service import ChatService
from memcube.cube import Scope
from memcube.ids import CubeId
from memcube.testing.chat import ScriptedModel

MODEL = "SmolLM2-135M-Instruct"
BASE = "f" * 64


def body(**more: Any) -> dict[str, Any]:
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Where does Ann live?"}]}
    return asked | more


@pytest.fixture
def model(api) -> ScriptedModel:
    """A scripted model that serves adapters."""
    scripted = ScriptedModel()
    backend = api.app.state.backend
    choice = AdapterChoice(backend.catalog.adapters, base=BASE, clock=backend.clock)
    chat = ChatService(backend.service, [scripted], backend.config.chat, None, choice)
    object.__setattr__(backend, "chat", chat)
    return scripted


async def serving(api, *, user_id: str = "ann", base: str = BASE) -> tuple[str, AdapterRecord]:
    """A memory, and an adapter that holds it and serves its user."""
    id = await api.add("Ann moved to Oslo", user_id=user_id)
    tenant = api.system.catalog.access.authenticate(api.key, now=api.system.clock()).tenant
    new = NewAdapter(
        name=f"{user_id}-knows",
        scope=Scope(tenant=tenant, user_id=user_id),
        base=base,
        sha256="a" * 64,
        size_bytes=10,
        rank=16,
        cubes={CubeId(id): 1},
    )
    book, now = api.system.catalog.adapters, api.system.clock()
    made = book.add(tenant, new, now=now)
    return id, book.activate(tenant, made.line.id, made.version, now=now)


async def test_the_adapter_of_a_scope_answers_by_itself_and_is_reported(api, model):
    _, record = await serving(api)
    answer = await api.ok("POST", "/v1/chat/completions", body(memory={"user_id": "ann"}))
    assert answer["memory"]["adapter"] == {
        "id": record.line.id,
        "name": "ann-knows",
        "version": 1,
    }
    assert model.prompts[-1].adapter == (record.line.id, "a" * 64)
    for other in ({"user_id": "ben"}, {"user_id": "ann", "run_id": "r"}, False):
        answer = await api.ok("POST", "/v1/chat/completions", body(memory=other))
        assert answer["memory"]["adapter"] is None
        assert model.prompts[-1].adapter is None


async def test_a_chat_over_some_of_the_memories_does_without(api, model):
    id, _ = await serving(api)
    for narrow in ({"cube_ids": [id]}, {"filters": {"user_id": "ann"}}):
        memory = {"user_id": "ann", **narrow}
        answer = await api.ok("POST", "/v1/chat/completions", body(memory=memory))
        assert answer["memory"]["adapter"] is None


async def test_a_deleted_memory_stops_the_adapter_with_the_next_request(api, model):
    id, _ = await serving(api)
    await api.ok("DELETE", f"/v1/memories/{id}")
    answer = await api.ok("POST", "/v1/chat/completions", body(memory={"user_id": "ann"}))
    assert answer["memory"]["adapter"] is None
    asked = body(model=f"{MODEL}:ann-knows")
    await api.problem(404, "not_found", "POST", "/v1/chat/completions", asked)


async def test_a_named_adapter_answers_without_memories(api, model):
    _, record = await serving(api)
    for name in ("ann-knows", record.line.id):
        asked = body(model=f"{MODEL}:{name}", memory=False)
        answer = await api.ok("POST", "/v1/chat/completions", asked)
        assert answer["model"] == f"{MODEL}:{name}"
        assert answer["memory"]["adapter"]["name"] == "ann-knows"


async def test_an_adapter_of_another_base_serves_nobody(api, model):
    await serving(api, base="0" * 64)
    answer = await api.ok("POST", "/v1/chat/completions", body(memory={"user_id": "ann"}))
    assert answer["memory"]["adapter"] is None
