"""What routes ask for: the backend, and who calls."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request

from memcube.catalog import Principal, Role
from memcube.errors import Forbidden, LimitExceeded
from serve import models
from serve.backend import Backend
from serve.guard import GuardedRoute, principal_of

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": models.ProblemOut, "description": text}
    for status, text in (
        (401, "No valid key"),
        (403, "The key's role is too small"),
        (404, "Not in this tenant"),
        (409, "The cube's state forbids it"),
        (413, "Body over the limit"),
        (422, "Bad input; nothing was changed"),
        (503, "A part can't answer now; Retry-After says when to ask again"),
        (504, "A part did not answer in time; what was asked may have happened"),
        (507, "No room is left to write; reads go on"),
    )
}


async def backend_of(request: Request) -> Backend:
    return request.app.state.backend


Here = Annotated[Backend, Depends(backend_of)]


def caller(needed: Role) -> Any:
    """Who calls, if the key's role allows it."""

    async def check(request: Request) -> Principal:
        principal = principal_of(request)
        if not principal.role.allows(needed):
            raise Forbidden(principal.role, needed)
        return principal

    return Depends(check)


Reader = Annotated[Principal, caller(Role.READER)]
Writer = Annotated[Principal, caller(Role.WRITER)]
Admin = Annotated[Principal, caller(Role.ADMIN)]
Operator = Annotated[Principal, caller(Role.OPERATOR)]


def runs_it(who: Principal) -> bool:
    """Whether somebody runs the system, and is shown what is of all tenants and of the hosts."""
    return who.role.allows(Role.OPERATOR)


def check_page(here: Backend, limit: int) -> None:
    """
    Raises:
        LimitExceeded: a page is shorter.
    """
    if limit > here.config.limits.page:
        raise LimitExceeded("limit", here.config.limits.page, limit)


RetryKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="Repeat a request with the same key: one effect, the same answer (for 48 h).",
    ),
]


def guarded(prefix: str, tag: str) -> APIRouter:
    """A router whose routes know their caller before they read a body."""
    return APIRouter(prefix=prefix, tags=[tag], responses=PROBLEMS, route_class=GuardedRoute)
