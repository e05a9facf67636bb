"""What stands before every route under /v1: who calls, which conditions are known, how much JSON.

The key is looked at before the body is read, so that nobody without one makes this process parse
anything. A condition that the route does not know is refused: one that is passed over would make a
list, or a deletion, wider than it was meant.
"""

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from memcube.catalog import Principal
from memcube.errors import BadRequest, LimitExceeded, Unauthenticated

_PART = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{,]', re.DOTALL)


class GuardedRoute(APIRoute):
    """Knows its caller (``principal_of``) before it reads the body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        known = {parameter.alias for parameter in self.dependant.query_params}

        async def guarded(request: Request) -> Response:
            service = request.app.state.backend.service
            request.scope["memcube_principal"] = await service.authenticate(secret_of(request))
            for name in request.query_params:
                if name not in known:
                    raise BadRequest(f"no such condition; there are: {_listed(known)}", name)
            return await handle(_BoundedRequest(request.scope, request.receive))

        return guarded


def principal_of(request: Request) -> Principal:
    """Who calls a guarded route."""
    return request.scope["memcube_principal"]


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def secret_of(request: Request) -> str:
    """The key that a request was sent with.

    Raises:
        Unauthenticated: none.
    """
    given = request.headers.get("x-api-key")
    if given:
        return given.strip()
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() not in ("bearer", "token") or not secret.strip():
        raise Unauthenticated
    return secret.strip()


class _BoundedRequest(Request):
    """Refuses JSON of more values than the limit before it is built: 3 bytes of it can become 64."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            _check_size(body, self.app.state.limits.json_values)
            try:
                self._json = json.loads(body.decode("utf-8-sig"))
            except json.JSONDecodeError as broken:
                raise BadRequest(f"no JSON: {broken}") from None
            except UnicodeDecodeError:
                raise BadRequest("JSON is UTF-8; the body is not") from None
            except ValueError:
                raise BadRequest("a number of the JSON has too many digits") from None
        return self._json


def _check_size(body: bytes, limit: int) -> None:
    # At least as many as there are; few bodies come near the limit.
    most = body.count(b'"') // 2 + body.count(b",") + body.count(b"[") + body.count(b"{")
    if most <= limit:
        return
    for number, _ in enumerate(_PART.finditer(body), 1):
        if number > limit:
            raise LimitExceeded("strings, elements and brackets of the body", limit)
