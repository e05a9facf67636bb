"""One question to a model behind an OpenAI-compatible endpoint, answered with facts as JSON."""

import json

import httpx

from memcube.config import LlmConfig
from memcube.errors import ModelAnswerInvalid, Unavailable

CONNECT_S = 5.0
MAX_ANSWER_BYTES = 1 << 20
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


class Refused(Unavailable):
    """The endpoint said no in a way (401, 404…) that asking again does not change."""


async def ask_for_facts(
    config: LlmConfig, *, task: str, data: str, api_key: str | None, http: httpx.AsyncClient
) -> object:
    """What the model answers under ``facts``; nothing of it is checked. ``data`` goes apart from the task.

    httpx's time-outs are between bytes; the caller bounds the whole.

    Raises:
        ModelAnswerInvalid: the answer is not JSON of the form {"facts": …}, or too long.
        Unavailable: the endpoint did not answer; Refused where asking again is no use.
    """
    request = {
        "model": config.model,
        "temperature": 0,
        "response_format": {"type": "json_object"},
        "messages": [
            {"role": "system", "content": task},
            {"role": "user", "content": data},
        ],
    }
    body = await _body(config, request, api_key, http)
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ModelAnswerInvalid(config.model, "not a chat completion") from None
    if not isinstance(content, str):
        raise ModelAnswerInvalid(config.model, "no text in the completion")
    try:
        return json.loads(content)["facts"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ModelAnswerInvalid(config.model, 'not JSON of the form {"facts": […]}') from None


async def _body(
    config: LlmConfig, request: object, api_key: str | None, http: httpx.AsyncClient
) -> bytes:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    url = f"{config.base_url.rstrip('/')}/chat/completions"
    # Long answers are usual, long connects are not: they leave time for a second try.
    patience = httpx.Timeout(config.timeout_s, connect=min(CONNECT_S, config.timeout_s))
    body = bytearray()
    try:
        async with http.stream(
            "POST", url, json=request, headers=headers, timeout=patience
        ) as response:
            if response.status_code != 200:
                error = Unavailable if response.status_code in _PASSING else Refused
                raise error(f"model {config.model!r} answered HTTP {response.status_code}")
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    raise ModelAnswerInvalid(
                        config.model, f"the answer is over {MAX_ANSWER_BYTES:,} bytes"
                    )
    except (httpx.HTTPError, httpx.InvalidURL) as failed:
        # Its text may quote the request; its name is enough.
        raise Unavailable(f"model {config.model!r}: {type(failed).__name__}") from None
    return bytes(body)
