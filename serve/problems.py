"""Errors as problem+json (RFC 9457), and the limit on bodies."""

import logging
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


def problem(
    request_id: str,
    *,
    status: int,
    code: str,
    detail: str,
    headers: dict[str, str] | None = None,
    **more: Any,
) -> JSONResponse:
    """One error answer."""
    body = {
        "type": f"urn:memcube:{code}",
        "title": code.replace("_", " "),
        "status": status,
        "code": code,
        "detail": detail,
        "request_id": request_id,
    }
    body |= {name: value for name, value in more.items() if value is not None}
    return JSONResponse(body, status, headers, MEDIA_TYPE)


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
        where = [
            str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")
        ]
        return problem(
            request_id(request),
            status=422,
            code="bad_request",
            detail=f"{'.'.join(where) or 'body'}: {first['msg']}",
            field=".".join(where) or None,
        )

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        # FastAPI hides whatever went wrong while it read the body behind a bare 400.
        if isinstance(error.__cause__, LimitExceeded | RecursionError):
            return _over(error.__cause__, request_id(request))
        codes = {404: "not_found", 405: "method_not_allowed", 400: "bad_request"}
        return problem(
            request_id(request),
            status=422 if error.status_code == 400 else error.status_code,
            code=codes.get(error.status_code, "http_error"),
            detail=f"{request.method} {request.url.path}: {error.detail}",
        )

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return problem(
            request_id(request),
            status=500,
            code="internal",
            detail="an error of ours; the log has it under this request_id",
        )


def _over(over: LimitExceeded | RecursionError, id: str) -> JSONResponse:
    """The answer to a body that is too long or too deep to be read."""
    if isinstance(over, LimitExceeded):
        return problem(id, status=413, code=over.code, detail=str(over), limit=over.limit)
    return problem(id, status=422, code="limit_exceeded", detail="JSON nested too deeply")


def request_id(request: Request) -> str:
    return request.scope.get("memcube_request_id", "")


class BodyLimit:
    """Refuses a body over the limit before it is read whole, and names each request."""

    def __init__(self, app: ASGIApp, *, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        id = scope["memcube_request_id"] = secrets.token_hex(8)
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        started = False
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise LimitExceeded("bytes of the body", self._limit)
            return message

        async def named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message.setdefault("headers", []).append((b"x-request-id", id.encode()))
            await send(message)

        try:
            if stated.isdigit() and int(stated) > self._limit:
                raise LimitExceeded("bytes of the body", self._limit, int(stated))
            await self._app(scope, limited, named)
        except (LimitExceeded, RecursionError) as over:
            if started:
                raise
            await _over(over, id)(scope, receive, named)
