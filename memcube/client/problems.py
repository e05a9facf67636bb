"""An error answer (problem+json) as an exception of the ``memcube.errors`` tree.

What is raised is a subclass of the class that carries the answer's ``code``, so ``except NotFound``
catches it. Its text is the server's, with the request id to look for in the server's log. The
fields of its class hold what the server sent; one that was not sent is None (retry_after_s: 1.0).
"""

import functools
import inspect
import json
from collections.abc import Mapping
from typing import Any

import httpx

from memcube import errors
from memcube.errors import MemCubeError

_BY_CODE = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, MemCubeError)
}
_BY_STATUS: dict[int, type[MemCubeError]] = {
    400: errors.BadRequest,
    401: errors.Unauthenticated,
    403: errors.Forbidden,
    404: errors.NotFound,
    409: errors.Conflict,
    413: errors.LimitExceeded,
    422: errors.BadRequest,
    429: errors.Unavailable,
    502: errors.Unavailable,
    503: errors.Unavailable,
    504: errors.DeadlineExceeded,
    507: errors.StorageFull,
}


class Unreachable(errors.Unavailable):
    """``Unreachable(what)``: nothing answers at the address, or there is no address."""

    def __str__(self) -> str:
        return self.what


class OutcomeUnknown(errors.DeadlineExceeded):
    """``OutcomeUnknown(what)``: no answer came to a request that had been sent.

    A read can be asked again. A change may have been made or not: look before doing it again.
    """

    def __str__(self) -> str:
        return self.what


def problem_error(response: httpx.Response) -> MemCubeError:
    """The exception of an error response, whatever its body is."""
    problem = _body(response)
    request_id = problem.get("request_id") or response.headers.get("x-request-id")
    detail = problem.get("detail") or problem.get("title") or response.text[:200]
    if is_proxys(response):
        detail = (
            "the proxy reached no gateway, or the one it reached broke off (HTTP 500); try again"
        )
        problem = {"code": errors.Unavailable.code}
    about = {
        **problem,
        "status": response.status_code,
        "detail": detail or f"HTTP {response.status_code}",
        "request_id": request_id,
        "retry_after_s": retry_after_s(response),
    }
    return from_problem(about)


def from_problem(problem: Mapping[str, Any]) -> MemCubeError:
    """The exception of a problem's members; its class by ``code``, else by ``status``."""
    status = problem["status"]
    kind = _BY_CODE.get(str(problem.get("code")))
    if kind is None:
        kind = _BY_STATUS.get(status, errors.BadRequest if status < 500 else MemCubeError)
    return _answered(kind)(dict(problem))


def is_proxys(response: httpx.Response) -> bool:
    """Whether the proxy before the gateways answered: Ray Serve's says 500 for what is 502, 503 or 504 elsewhere."""
    ours = response.headers.get("content-type", "").startswith("application/problem+json")
    return response.status_code == httpx.codes.INTERNAL_SERVER_ERROR and not ours


def retry_after_s(response: httpx.Response) -> float | None:
    """Seconds of a Retry-After header; None when there is none or it is a date."""
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else None


def _body(response: httpx.Response) -> dict[str, Any]:
    try:
        body = json.loads(response.content)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


@functools.cache
def _answered(kind: type[MemCubeError]) -> type[MemCubeError]:
    """``kind`` made of a problem in place of its own arguments.

    The constructors of the tree build the text from their arguments; here the text is given, and
    the server need not send every argument.
    """

    def __init__(self: Any, problem: dict[str, Any]) -> None:
        Exception.__init__(self, problem)
        for name in _field_names(kind):
            setattr(self, name, problem.get(name))
        self.status = problem["status"]
        self.request_id = problem["request_id"]
        if hasattr(self, "what") and self.what is None:
            self.what = problem["detail"]
        if hasattr(self, "retry_after_s") and self.retry_after_s is None:
            self.retry_after_s = 1.0

    def __str__(self: Any) -> str:
        request_id = self.request_id
        field = self.args[0].get("field")
        text = self.args[0]["detail"]
        if field and not str(text).startswith(field):
            text = f"{field}: {text}"
        return f"{text} (request {request_id})" if request_id else str(text)

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return from_problem, self.args

    members = {"__init__": __init__, "__str__": __str__, "__reduce__": __reduce__}
    return type(kind.__name__, (kind,), {**members, "__module__": kind.__module__})


def _field_names(kind: type[MemCubeError]) -> set[str]:
    return {
        name
        for base in kind.__mro__
        if issubclass(base, MemCubeError) and "__init__" in vars(base)
        for name in inspect.signature(vars(base)["__init__"]).parameters
        if name != "self"
    }
