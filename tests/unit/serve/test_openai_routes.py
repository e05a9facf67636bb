"""The OpenAI-shaped routes, over a scripted model: what goes in, what comes out, what is refused."""

import base64
import json
from typing import Any

import numpy as np
import pytest

from memcube.activation.contract import Mode
from memcube.chat.service import ChatService
from memcube.errors import TooBusy, Unavailable
from memcube.testing.chat import ScriptedModel

MODEL = "SmolLM2-135M-Instruct"


def body(**more: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Where does Ann live?"}],
    } | more


@pytest.fixture
def models(api) -> list[ScriptedModel]:
    """Two scripted models behind the routes."""
    scripted = [ScriptedModel(), ScriptedModel()]
    backend = api.app.state.backend
    chat = ChatService(backend.service, scripted, backend.config.chat)
    object.__setattr__(backend, "chat", chat)
    return scripted


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_an_answer_has_openais_shape_and_says_which_memories_were_used(api, models):
    id = await api.add("Ann moved to Oslo", user_id="ann")
    answer = await api.ok(
        "POST", "/v1/chat/completions", body(memory={"user_id": "ann", "mode": "exact"})
    )
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": "In Oslo.",
        "refusal": None,
    }
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["memory"]["cubes"] == [{"id": id, "form": "text", "in_adapter": False}]
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    again = await api.ok("POST", "/v1/chat/completions", body(memory={"user_id": "ann"}))
    assert again["memory"]["cubes"] == [{"id": id, "form": "exact_kv", "in_adapter": False}]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


async def test_a_stream_ends_with_its_report_its_usage_and_done(api, models):
    await api.add("Ann moved to Oslo", user_id="ann")
    response = await api.call(
        "POST",
        "/v1/chat/completions",
        body(stream=True, stream_options={"include_usage": True}, user="ann"),
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last, done = events(response.text)
    said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert said == "In Oslo."
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert len(chunks[-1]["memory"]["cubes"]) == 1
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert done == "[DONE]"


async def test_without_a_user_or_memory_none_is_read(api, models):
    await api.add("Ann moved to Oslo", user_id="ann")
    for more in ({}, {"memory": False, "user": "ann"}):
        answer = await api.ok("POST", "/v1/chat/completions", body(**more))
        assert answer["memory"]["cubes"] == []


async def test_a_deleted_memory_is_in_no_later_prompt(api, models):
    id = await api.add("Ann moved to Oslo", user_id="ann")
    await api.ok("POST", "/v1/chat/completions", body(user="ann"))
    await api.ok("DELETE", f"/v1/memories/{id}")
    answer = await api.ok("POST", "/v1/chat/completions", body(user="ann"))
    assert answer["memory"]["cubes"] == []
    assert not any("Oslo" in s.text for s in models[0].prompts[-1].segments)


async def test_a_turn_is_written_back_where_it_is_asked_for(api, models):
    answer = await api.ok(
        "POST", "/v1/chat/completions", body(memory={"user_id": "ann", "write_back": True})
    )
    assert len(answer["memory"]["written_back"]) == 2
    stored = {cube["text"]: cube["role"] for cube in await api.everything()}
    assert stored == {"Where does Ann live?": "user", "In Oslo.": "assistant"}


async def test_a_reader_may_not_write_back(api, models, prepared):
    response = await api.call(
        "POST",
        "/v1/chat/completions",
        body(memory={"user_id": "ann", "write_back": True}),
        key=prepared.keys["reader"],
    )
    assert response.status_code == 403
    assert models[0].prompts == []


async def test_a_conversation_stays_with_the_model_that_read_its_memories(api, models):
    await api.add("Ann moved to Oslo", user_id="ann")
    for _ in range(3):
        await api.ok("POST", "/v1/chat/completions", body(user="ann"))
    assert [len(model.prompts) for model in models] == [3, 0]


async def test_another_model_answers_when_one_is_gone(api, models):
    models[0].failing = (0, Unavailable("engine 0 is being restarted"))
    answer = await api.ok("POST", "/v1/chat/completions", body())
    assert answer["memory"]["engine"] == 1


async def test_what_was_said_is_not_said_again_by_another_model(api, models):
    models[0].failing = (1, Unavailable("engine 0 is being restarted"))
    response = await api.call("POST", "/v1/chat/completions", body(stream=True))
    *_, last = events(response.text)
    assert last["error"]["code"] == "unavailable"
    assert models[1].prompts == []


async def test_a_full_queue_is_429_with_retry_after_also_for_a_stream(api, models):
    for model in models:
        model.failing = (0, TooBusy("9 requests wait for the model", 7.0))
    for stream in (False, True):
        response = await api.call("POST", "/v1/chat/completions", body(stream=stream))
        assert response.status_code == 429
        assert response.headers["retry-after"] == "7"


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"model": "gpt-4"}, 400),
        ({"model": f"{MODEL}:somebody"}, 400),
        ({"messages": []}, 422),
        ({"messages": [{"role": "user", "content": " "}]}, 422),
        ({"messages": [{"role": "robot", "content": "hi"}]}, 422),
        ({"temperature": 3}, 422),
        ({"top_p": 0}, 422),
        ({"n": 2}, 422),
        ({"tools": [{"type": "function"}]}, 422),
        ({"stop": [""]}, 422),
        ({"memory": {"token_budget": 10**9}}, 422),
        ({"memory": {"user": "ann"}}, 422),
        ({"memory": {"filters": {"nonsense": {"eq": 1}}}}, 422),
        ({"messages": [{"role": "user", "content": "x" * 200_001}]}, 422),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
async def test_what_cannot_be_done_is_refused_before_a_model_is_asked(api, models, more, status):
    response = await api.call("POST", "/v1/chat/completions", body(**more))
    assert response.status_code == status, response.text
    assert all(model.prompts == [] for model in models)


async def test_sampling_and_mode_reach_the_model(api, models):
    await api.ok(
        "POST",
        "/v1/chat/completions",
        body(temperature=0.5, top_p=0.9, seed=7, max_tokens=5, stop="x", memory={"mode": "blend"}),
    )
    (prompt,) = models[0].prompts
    assert (prompt.sampling.temperature, prompt.sampling.top_p, prompt.sampling.seed) == (
        0.5,
        0.9,
        7,
    )
    assert (prompt.max_tokens, prompt.stop, prompt.mode) == (5, ("x",), Mode.BLEND)


async def test_models_are_listed_and_found(api, models):
    listed = await api.ok("GET", "/v1/models")
    assert [model["id"] for model in listed["data"]] == [MODEL, "all-MiniLM-L6-v2"]
    assert (await api.ok("GET", f"/v1/models/{MODEL}"))["object"] == "model"
    assert (await api.call("GET", "/v1/models/gpt-4")).status_code == 404


async def test_embeddings_come_as_numbers_or_packed(api, models):
    asked = {"model": "all-MiniLM-L6-v2", "input": ["tea", "milk"]}
    plain = await api.ok("POST", "/v1/embeddings", asked)
    packed = await api.ok("POST", "/v1/embeddings", asked | {"encoding_format": "base64"})
    for one, other in zip(plain["data"], packed["data"], strict=True):
        vector = np.frombuffer(base64.b64decode(other["embedding"]), dtype="<f4")
        assert np.allclose(vector, one["embedding"])
    assert (await api.call("POST", "/v1/embeddings", asked | {"input": [""]})).status_code == 422
    assert (await api.call("POST", "/v1/embeddings", asked | {"model": "other"})).status_code == 400
