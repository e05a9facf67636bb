"""Facts by a model: only what the statement holds is taken."""

import json

import httpx
import pytest

from memcube.config import LlmConfig
from memcube.errors import ModelAnswerInvalid, Unavailable
from memcube.parametric.facts import CubeVersion, Fact
from memcube.parametric.facts_llm import read_facts_by_model

SOURCE = CubeVersion("a", 1)
STATEMENTS = [(SOURCE, "Last spring Ada moved to Brellin for good.")]
GOOD = {"number": 1, "subject": "Ada", "attribute": "Home town", "object": "Brellin"}


async def read(content: str, status: int = 200) -> list[Fact]:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, json={"choices": [{"message": {"content": content}}]})

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
        config = LlmConfig(base_url="http://model/v1", model="m")
        return await read_facts_by_model(STATEMENTS, config, api_key=None, http=http)


async def test_a_fact_of_the_statement_is_taken():
    expected = Fact(subject="Ada", relation="home town", object="Brellin", source=SOURCE)
    assert await read(json.dumps({"facts": [GOOD, GOOD]})) == [expected]


@pytest.mark.parametrize(
    "change",
    [
        {"object": "Paris"},
        {"subject": "Bob"},
        {"number": 2},
        {"attribute": ""},
        {"attribute": "{s}"},
    ],
)
async def test_what_the_statement_does_not_hold_is_left_out(change):
    assert await read(json.dumps({"facts": [GOOD | change, 3]})) == []


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"facts": 3}'])
async def test_an_answer_of_another_form_is_told(content):
    with pytest.raises(ModelAnswerInvalid):
        await read(content)


async def test_a_refusing_endpoint_is_told():
    with pytest.raises(Unavailable, match="HTTP 500"):
        await read("{}", status=500)
