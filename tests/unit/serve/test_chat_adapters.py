"""Chats answered by an adapter: the one that is named, or the one that serves the scope."""

from typing import Any

import pytest

from memcube.activation.contract import Mode
from memcube.catalog import AdapterRecord, NewAdapter
from memcube.chat.adapters import AdapterChoice
from memcube.chat.migration import ActivationTier
from memcube.chat.router import Router
from memcube.chat.service import ChatService
from memcube.cube import Scope
from memcube.errors import Conflict, Corrupt, LimitExceeded, NotFound, TooBusy, Unavailable
from memcube.ids import CubeId
from memcube.testing.chat import ScriptedModel

MODEL = "SmolLM2-135M-Instruct"
BASE = "f" * 64


def body(**more: Any) -> dict[str, Any]:
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Where does Ann live?"}]}
    return asked | more


async def ask_ann(api, name: str = MODEL, **memory: Any) -> dict[str, Any]:
    """The report of a chat with Ann's memories."""
    asked = body(model=name, memory={"user_id": "ann", **memory})
    return (await api.ok("POST", "/v1/chat/completions", asked))["memory"]


@pytest.fixture
def model(api) -> ScriptedModel:
    """A scripted model that serves adapters."""
    scripted = ScriptedModel()
    backend = api.app.state.backend
    choice = AdapterChoice(backend.catalog.adapters, base=BASE, clock=backend.clock)
    chat = ChatService(backend.service, [scripted], backend.config.chat, None, choice)
    object.__setattr__(backend, "chat", chat)
    object.__setattr__(backend, "adapters", choice)
    tier = ActivationTier(backend.service, [scripted], Router(1), mode=Mode.EXACT, adapters=choice)
    object.__setattr__(backend, "tier", tier)
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


async def test_the_serving_adapters_of_a_tenant_are_models(api, model, other):
    async def named(key: str = "") -> list[str]:
        return [one["id"] for one in (await api.ok("GET", "/v1/models", key=key))["data"]]

    id, _ = await serving(api)
    await serving(api, user_id="bob", base="0" * 64)
    mine = f"{MODEL}:ann-knows"
    assert await named() == [MODEL, mine, "all-MiniLM-L6-v2"]
    assert (await api.ok("GET", f"/v1/models/{mine}"))["id"] == mine
    assert await named(other) == [MODEL, "all-MiniLM-L6-v2"]
    await api.problem(404, "not_found", "GET", f"/v1/models/{mine}", key=other)
    await api.ok("DELETE", f"/v1/memories/{id}")
    assert await named() == [MODEL, "all-MiniLM-L6-v2"]


async def test_kv_is_built_ahead_for_the_adapter_that_is_named(api, model):
    id, _ = await serving(api)
    path, ahead = f"/v1/cubes/{id}/migrate", {"tier": "activation", "adapter": "ann-knows"}
    built = await api.ok("POST", path, ahead)
    assert built["built_tokens"] == built["tokens"] > 0
    assert (await api.ok("POST", path, ahead))["built_tokens"] == 0
    forms = {}
    for name in (f"{MODEL}:ann-knows", MODEL):
        (use,) = (await ask_ann(api, name, cube_ids=[id]))["cubes"]
        forms[name] = use["form"]
    assert list(forms.values()) == ["exact_kv", "text"]
    await api.problem(404, "not_found", "POST", path, ahead | {"adapter": "bob-knows"})
    await api.problem(422, "bad_request", "POST", path, ahead | {"tier": "plaintext"})
    model.unusable = UNUSABLE[1]
    await api.problem(409, "conflict", "POST", path, ahead)


# -- the forms of memories


def told(id: str, form: str, in_adapter: bool) -> dict[str, Any]:
    return {"id": id, "form": form, "in_adapter": in_adapter}


def in_prompt(model: ScriptedModel) -> str:
    return "".join(segment.text for segment in model.prompts[-1].segments)


async def test_a_memory_in_the_prompt_says_whether_the_adapter_holds_it_too(api, model):
    held, _ = await serving(api)
    new = await api.add("Ann drinks tea", user_id="ann")
    found = (await ask_ann(api))["cubes"]
    assert sorted(found, key=str) == sorted(
        [told(held, "text", True), told(new, "text", False)], key=str
    )
    assert "Oslo" in in_prompt(model)


async def test_instead_leaves_what_the_adapter_holds_out_of_the_prompt(api, model):
    held, _ = await serving(api)
    new = await api.add("Ann drinks tea", user_id="ann")
    for name in (MODEL, f"{MODEL}:ann-knows"):
        found = (await ask_ann(api, name, parametric="instead"))["cubes"]
        assert [use for use in found if use["id"] == held] == [told(held, "parametric", True)]
        assert [use["in_adapter"] for use in found if use["id"] == new] == [False]
        assert "Oslo" not in in_prompt(model)
        assert "tea" in in_prompt(model)


async def test_instead_may_leave_nothing_in_the_prompt(api, model):
    held, _ = await serving(api)
    found = await ask_ann(api, parametric="instead")
    assert found["cubes"] == [told(held, "parametric", True)]
    assert model.prompts[-1].segments == ()


async def test_instead_holds_for_cubes_that_are_named(api, model):
    held, _ = await serving(api)
    new = await api.add("Ann drinks tea", user_id="ann")
    more = {"cube_ids": [held, new], "parametric": "instead"}
    found = (await ask_ann(api, f"{MODEL}:ann-knows", **more))["cubes"]
    assert found == [told(new, "text", False), told(held, "parametric", True)]
    # Without an adapter there is nothing in whose place it could stand.
    found = (await ask_ann(api, **more))["cubes"]
    assert {use["form"] for use in found} <= {"text", "exact_kv"}
    assert "Oslo" in in_prompt(model)


async def test_what_the_adapter_holds_takes_none_of_the_budget(api, model):
    await serving(api)
    await api.add("Ann drinks tea in the afternoon", user_id="ann")
    beside = await ask_ann(api, token_budget=64)
    assert len(beside["cubes"]) == 1
    instead = await ask_ann(api, token_budget=64, parametric="instead")
    assert [use["in_adapter"] for use in instead["cubes"]] == [False, True]


async def test_instead_goes_on_with_new_tags_and_ends_with_a_new_text(api, model):
    held, _ = await serving(api)
    await api.ok("PUT", f"/v1/memories/{held}", {"tags": ["home"]})
    assert (await ask_ann(api, parametric="instead"))["cubes"] == [told(held, "parametric", True)]
    await api.ok("PUT", f"/v1/memories/{held}", {"text": "Ann moved to Bergen"})
    assert (await ask_ann(api, parametric="instead"))["cubes"] == [told(held, "text", False)]
    assert "Bergen" in in_prompt(model)


async def test_an_adapter_that_can_not_be_used_holds_nothing(api, model):
    held, _ = await serving(api)
    model.unusable = UNUSABLE[0]
    for _ in range(2):
        found = (await ask_ann(api, parametric="instead"))["cubes"]
        assert [use["id"] for use in found if not use["in_adapter"]] == [held]
        assert "Oslo" in in_prompt(model)


@pytest.mark.parametrize("default", ["beside", "instead"])
async def test_the_server_says_what_holds_where_a_request_does_not(api, model, default):
    config = api.app.state.backend.config
    chosen = config.model_copy(
        update={"chat": config.chat.model_copy(update={"parametric": default})}
    )
    object.__setattr__(api.app.state.backend, "config", chosen)
    await serving(api)
    found = [use["form"] for use in (await ask_ann(api))["cubes"]]
    assert (found == ["parametric"]) == (default == "instead")
    asked = body(memory={"parametric": "neither"})
    await api.problem(422, "bad_request", "POST", "/v1/chat/completions", asked)


# -- an adapter that can't be used

UNUSABLE = [
    Corrupt("adapter 1", "its bytes are not those that were published; train it anew"),
    Conflict("adapter 1 was trained on another model"),
    LimitExceeded("bytes of an adapter", 10, 20),
    NotFound("adapter", "1"),
    TooBusy("the adapters in use fill the memory for them", 1.0),
    Unavailable("the object store does not answer", 5.0),
]


@pytest.mark.parametrize("why", UNUSABLE, ids=lambda why: why.code)
async def test_the_base_model_answers_where_the_adapter_of_a_scope_can_not(api, model, why):
    id, record = await serving(api)
    model.unusable = why
    told = await ask_ann(api)
    assert told["adapter"] is None
    assert told["adapter_refused"] == {
        "id": record.line.id,
        "name": "ann-knows",
        "version": 1,
        "code": why.code,
    }
    assert [use["id"] for use in told["cubes"]] == [id]
    assert [prompt.adapter is None for prompt in model.prompts] == [False, True]


async def test_the_stream_of_a_chat_that_fell_back_is_whole(api, model):
    await serving(api)
    model.unusable = UNUSABLE[0]
    asked = body(memory={"user_id": "ann"}, stream=True)
    response = await api.call("POST", "/v1/chat/completions", asked)
    assert response.status_code == 200
    assert response.text.count('"role": "assistant"') == 1
    assert '"code": "corrupt"' in response.text
    assert response.text.endswith("data: [DONE]\n\n")


async def test_a_broken_adapter_is_tried_again_after_a_while(api, model):
    await serving(api)
    model.unusable = UNUSABLE[0]
    for _ in range(3):
        assert (await ask_ann(api))["adapter_refused"]["code"] == "corrupt"
    assert len([prompt for prompt in model.prompts if prompt.adapter]) == 1
    api.system.clock.advance(61)
    model.unusable = None
    told = await ask_ann(api)
    assert (told["adapter"]["version"], told["adapter_refused"]) == (1, None)


async def test_one_that_found_no_room_is_tried_again_when_it_was_said_to(api, model):
    await serving(api)
    model.unusable = UNUSABLE[4]
    await ask_ann(api)
    model.unusable = None
    assert (await ask_ann(api))["adapter"] is None
    api.system.clock.advance(1.5)
    assert (await ask_ann(api))["adapter"] is not None


async def test_another_version_is_tried_at_once(api, model):
    id, first = await serving(api)
    model.unusable = UNUSABLE[0]
    await ask_ann(api)
    model.unusable = None
    new = NewAdapter(
        name="ann-knows",
        scope=first.line.scope,
        base=BASE,
        sha256="b" * 64,
        size_bytes=10,
        rank=16,
        cubes={CubeId(id): 1},
    )
    book, now, tenant = api.system.catalog.adapters, api.system.clock(), first.line.scope.tenant
    book.activate(tenant, first.line.id, book.add(tenant, new, now=now).version, now=now)
    assert (await ask_ann(api))["adapter"]["version"] == 2


@pytest.mark.parametrize("why", UNUSABLE, ids=lambda why: why.code)
async def test_a_named_adapter_that_can_not_be_used_is_an_error(api, model, why):
    await serving(api)
    model.unusable = why
    for memory in (False, {"user_id": "ann"}):
        asked = body(model=f"{MODEL}:ann-knows", memory=memory)
        response = await api.call("POST", "/v1/chat/completions", asked)
        assert (response.status_code, response.json()["code"]) == (why.status, why.code)
    assert all(prompt.adapter is not None for prompt in model.prompts)


async def test_chats_without_their_adapter_are_counted_by_reason(api, model):
    await serving(api)
    before = _counted(await api.call("GET", "/metrics", key=None))
    model.unusable = UNUSABLE[0]
    for _ in range(2):
        await ask_ann(api)
    assert _counted(await api.call("GET", "/metrics", key=None)) == before + 2


def _counted(response) -> float:
    name = 'memcube_chat_adapter_refused_total{code="corrupt"} '
    found = [line for line in response.text.splitlines() if line.startswith(name)]
    return float(found[0].removeprefix(name)) if found else 0.0
