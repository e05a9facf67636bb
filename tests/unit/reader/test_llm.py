import json
from datetime import UTC, datetime

import httpx
import pytest

from memcube.config import LlmConfig, ReaderConfig
from memcube.cube import Kind, Origin
from memcube.reader import LlmReader, Reader
from memcube.reader.messages import Header, Message

NOW = datetime(2026, 3, 1, tzinfo=UTC)
TURNS = [
    Message(role="user", content="I moved to Oslo.", name="Ann", time=NOW, id="D1:1"),
    Message(role="assistant", content="Nice!", name="Bob"),
]
GOOD = {"facts": [{"text": "Ann moved to Oslo.", "sources": [1], "kind": "fact"}]}


class Endpoint:
    """Answers with what the test says, one answer a call, and keeps the requests."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, int):
            return httpx.Response(answer)
        content = answer if isinstance(answer, str) else json.dumps(answer)
        return httpx.Response(200, json={"choices": [{"message": {"content": content}}]})


def reader(endpoint: Endpoint) -> Reader:
    config = LlmConfig(base_url="http://llm.test/v1/", model="m")
    http = httpx.AsyncClient(transport=httpx.MockTransport(endpoint))
    return Reader(ReaderConfig(), LlmReader(config, api_key="sk-secret", http=http))


async def test_facts_come_beside_the_turns_with_their_sources():
    endpoint = Endpoint(GOOD)
    reading = await reader(endpoint).read(TURNS, None, Header(user_id="u"), infer=True, now=NOW)
    assert reading.fallback is None
    fact = reading.drafts[2]
    assert [draft.text for draft in reading.drafts[:2]] == ["I moved to Oslo.", "Nice!"]
    assert (fact.text, fact.kind, fact.origin) == (
        "Ann moved to Oslo.",
        Kind.FACT,
        Origin.INFERENCE,
    )
    assert (fact.user_id, fact.event_time, fact.threaded) == ("u", NOW, False)
    assert [(s.ref, s.speaker, s.text) for s in fact.sources] == [
        ("D1:1", "Ann", "I moved to Oslo.")
    ]
    assert str(endpoint.requests[0].url) == "http://llm.test/v1/chat/completions"
    assert endpoint.requests[0].headers["authorization"] == "Bearer sk-secret"


@pytest.mark.parametrize(
    "answer",
    [
        "no json",
        "[]",
        {"facts": "x"},
        {"facts": ["x"]},
        {"facts": [{"text": "", "sources": [1]}]},
        {"facts": [{"text": "x", "sources": []}]},
        {"facts": [{"text": "x", "sources": [3]}]},
        {"facts": [{"text": "x", "sources": [True]}]},
        {"facts": [{"text": "x", "sources": ["1"]}]},
        {"facts": [{"text": "x" * 2001, "sources": [1]}]},
        {"facts": [{"text": "x", "sources": [1], "kind": "rumour"}]},
        {"facts": [{"text": "x", "sources": [1]}] * 101},
        500,
        httpx.ConnectTimeout("slow"),
    ],
)
async def test_a_bad_answer_falls_back_to_verbatim_and_says_why(answer):
    endpoint = Endpoint(answer)
    reading = await reader(endpoint).read(TURNS, None, Header(), infer=True, now=NOW)
    assert [draft.text for draft in reading.drafts] == ["I moved to Oslo.", "Nice!"]
    assert reading.fallback is not None
    assert "verbatim" in reading.fallback
    assert "sk-secret" not in reading.fallback
    assert len(endpoint.requests) == 2


async def test_a_second_try_may_succeed():
    reading = await reader(Endpoint("bad", GOOD)).read(TURNS, None, Header(), infer=True, now=NOW)
    assert reading.fallback is None
    assert len(reading.drafts) == 3


async def test_without_a_model_the_text_is_kept_and_the_answer_says_so():
    reading = await Reader(ReaderConfig(), None).read(None, "x", Header(), infer=True, now=NOW)
    assert [draft.text for draft in reading.drafts] == ["x"]
    assert reading.fallback is not None
    assert "no model is configured" in reading.fallback


async def test_no_model_is_asked_unless_inference_is_asked_for():
    endpoint = Endpoint(GOOD)
    await reader(endpoint).read(TURNS, None, Header(), infer=False, now=NOW)
    assert endpoint.requests == []
