"""Errors as problem+json (RFC 9457), and the limit on bodies."""

import logging
import re
import secrets
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memcube.errors import LimitExceeded, MemCubeError, Unauthenticated, Unavailable

log = logging.getLogger("memcube.gateway")
MEDIA_TYPE = "application/problem+json"
MAX_DETAIL = 500
MAX_FIELD = 200
_PLAIN = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def problem(
    request_id: str,
    *,
    status: int,
    code: str,
    detail: str,
    headers: dict[str, str] | None = None,
    **more: Any,
) -> JSONResponse:
    """One error answer. What it repeats of the request is cut short and made text."""
    body = {
        "type": f"urn:memcube:{code}",
        "title": code.replace("_", " "),
        "status": status,
        "code": code,
        "detail": _told(detail, MAX_DETAIL),
        "request_id": request_id,
    }
    if isinstance(more.get("field"), str):
        more["field"] = _told(more["field"], MAX_FIELD)
    body |= {name: value for name, value in more.items() if value is not None}
    return JSONResponse(body, status, headers, MEDIA_TYPE)


def _told(text: str, most: int) -> str:
    """A text that may be half a surrogate pair or a megabyte, as one that can be sent."""
    sendable = text.encode("utf-8", "backslashreplace").decode()
    return sendable if len(sendable) <= most else f"{sendable[: most - 1]}…"


def of_error(error: MemCubeError, request_id: str) -> JSONResponse:
    """The answer to one of our own errors."""
    headers = {}
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return problem(
        request_id,
        status=error.status,
        code=error.code,
        detail=str(error),
        headers=headers,
        field=getattr(error, "field", None),
        limit=error.limit if isinstance(error, LimitExceeded) else None,
    )


def install(app: FastAPI) -> None:
    """Answer every error of the application as a problem."""

    @app.exception_handler(MemCubeError)
    async def _ours(request: Request, error: MemCubeError) -> JSONResponse:
        if error.status >= 500:
            log.warning("%s %s: %s", request.method, request.url.path, error)
        return of_error(error, request_id(request))

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = _place(first["loc"])
        return problem(
            request_id(request),
            status=422,
            code="bad_request",
            detail=f"{field or 'body'}: {first['msg']}",
            field=field,
        )

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        # FastAPI hides whatever went wrong while it read the body behind a bare 400.
        if isinstance(error.__cause__, LimitExceeded | RecursionError):
            return _over(error.__cause__, request_id(request))
        if isinstance(error.__cause__, MemCubeError):
            return of_error(error.__cause__, request_id(request))
        codes = {404: "not_found", 405: "method_not_allowed", 400: "bad_request"}
        return problem(
            request_id(request),
            status=422 if error.status_code == 400 else error.status_code,
            code=codes.get(error.status_code, "http_error"),
            detail=f"{request.method} {request.url.path}: {error.detail}",
            headers=dict(error.headers or {}),
        )


def _place(where: tuple[int | str, ...]) -> str | None:
    """``messages[0].content`` of ``("body", "messages", 0, "content")``."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in where[1:])
    return "".join(parts).removeprefix(".") or None


def _over(over: LimitExceeded | RecursionError, id: str) -> JSONResponse:
    """The answer to a body that is too long or too deep to be read."""
    if isinstance(over, LimitExceeded):
        return problem(id, status=413, code=over.code, detail=str(over), limit=over.limit)
    return problem(id, status=422, code="limit_exceeded", detail="JSON nested too deeply")


def request_id(request: Request) -> str:
    return request.scope.get("memcube_request_id", "")


class Named:
    """Names each request, and answers what nobody else answered with a 500 that tells nothing.

    A request that comes with an ``x-request-id`` keeps it where it is a plain word: Serve's proxy has
    given it one, and sends it back with the answer. So only a request without one gets ours in a header.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id")
        plain = given is not None and _PLAIN.fullmatch(given)
        id = plain[0].decode() if plain else secrets.token_hex(8)
        scope["memcube_request_id"] = id
        started = False

        async def named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if given is None:
                    message.setdefault("headers", []).append((b"x-request-id", id.encode()))
            await send(message)

        try:
            await self._app(scope, receive, named)
        except Exception:
            log.exception("request %s, %s %s, failed", id, scope["method"], scope["path"])
            if started:
                raise
            answer = problem(
                id,
                status=500,
                code="internal",
                detail="an error of ours; the log has it under this request_id",
            )
            await answer(scope, receive, named)


class BodyLimit:
    """Refuses a body over the limit before it is read whole."""

    def __init__(self, app: ASGIApp, *, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise LimitExceeded("bytes of the body", self._limit)
            return message

        async def noting(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            self._check(dict(scope["headers"]).get(b"content-length", b"0"))
            await self._app(scope, limited, noting)
        except (LimitExceeded, RecursionError) as over:
            if started:
                raise
            await _over(over, scope["memcube_request_id"])(scope, receive, send)

    def _check(self, stated: bytes) -> None:
        # 18 digits are more than any limit, and few enough to be a number.
        if stated.isdigit() and int(stated[:19]) > self._limit:
            given = int(stated) if len(stated) < 19 else None
            raise LimitExceeded("bytes of the body", self._limit, given)
