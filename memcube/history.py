"""The time machine: snapshots of a scope, the scope as it was, two times beside each other, and back.

A snapshot is a name, a scope and a time; the version chain holds the rest, so nothing is copied. What
can't be had: a *search* as of a time, since the index holds present versions alone; the parts of the
header that have no versions (frozen, expiry, priority, sources, usage), which are today's; and what was
deleted or has expired, which no time brings back.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import ParamSpec, TypeVar

from memcube.catalog import (
    Catalog,
    Comparison,
    Idempotency,
    Page,
    Principal,
    RolledBack,
    Snapshot,
)
from memcube.config import Limits
from memcube.cube import Scope
from memcube.errors import BadRequest
from memcube.indexing import Clock
from memcube.settling import Settling

INDEXED_NOW = 1_000
"""Cubes of a rollback that are indexed before its answer; more are left to the reconcile loop."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class WentBack:
    """A rollback, the time it went back to, and how many of its cubes no search finds yet."""

    done: RolledBack
    to: datetime
    pending: int


class TimeMachine:
    """Every method takes the caller's Principal first; the tenant comes from it."""

    def __init__(
        self, catalog: Catalog, settling: Settling, *, clock: Clock, limits: Limits
    ) -> None:
        self._catalog = catalog
        self._settling = settling
        self._clock = clock
        self._limits = limits

    async def snapshot(
        self, principal: Principal, scope: Scope, name: str, *, at: datetime | None = None
    ) -> Snapshot:
        """Give a scope's state a name, by default the present one.

        Raises:
            BadRequest: a time that has not come. Conflict: the name is taken.
        """
        now = self._clock()
        return await _run(
            self._catalog.snapshots.create,
            _of(principal, scope),
            name,
            at=_past(at or now, now, "at"),
            author=principal.key_id,
            now=now,
        )

    async def snapshots(self, principal: Principal) -> list[Snapshot]:
        """The tenant's, the latest time first."""
        return await _run(self._catalog.snapshots.all, principal.tenant)

    async def named(self, principal: Principal, id: str) -> Snapshot:
        """A snapshot by its id or name."""
        return await _run(self._catalog.snapshots.get, principal.tenant, id)

    async def delete_snapshot(self, principal: Principal, id: str) -> None:
        """Take its name and pin away."""
        await _run(self._catalog.snapshots.delete, principal.tenant, id)

    async def find(
        self,
        principal: Principal,
        scope: Scope,
        *,
        as_of: datetime,
        limit: int,
        cursor: str | None = None,
        kind: str | None = None,
    ) -> Page:
        """A page of the cubes that were there at a time and are still."""
        return await _run(
            self._catalog.past.find,
            _of(principal, scope),
            as_of=as_of,
            now=self._clock(),
            limit=limit,
            cursor=cursor,
            kind=kind,
        )

    async def compare(
        self,
        principal: Principal,
        scope: Scope,
        *,
        since: datetime,
        until: datetime | None,
        limit: int,
        cursor: str | None = None,
    ) -> Comparison:
        """What changed in a scope between two times, by default up to now."""
        now = self._clock()
        return await _run(
            self._catalog.past.compare,
            _of(principal, scope),
            since=_past(since, now, "since"),
            until=_past(until or now, now, "until"),
            now=now,
            limit=limit,
            cursor=cursor,
        )

    async def rollback(
        self,
        principal: Principal,
        scope: Scope,
        *,
        to: datetime,
        idempotency: Idempotency | None = None,
    ) -> WentBack:
        """Take a scope back to a time, in one transaction. See ``Past.rollback``.

        Raises:
            BadRequest: no user, agent or run is named, or a time that has not come.
            Frozen, LimitExceeded, IdempotencyMismatch. Nothing is changed.
        """
        scope = _of(principal, scope)
        if scope == Scope(tenant=scope.tenant):
            raise BadRequest(
                "name at least one of user_id, agent_id, run_id; a whole tenant is not rolled back"
            )
        now = self._clock()
        done = await _run(
            self._catalog.past.rollback,
            scope,
            to=_past(to, now, "to"),
            author=principal.key_id,
            now=now,
            limit=self._limits.rollback_cubes,
            idempotency=idempotency,
        )
        await self._settle(principal, done)
        return WentBack(done=done, to=to, pending=max(0, len(done.changed) - INDEXED_NOW))

    async def _settle(self, principal: Principal, done: RolledBack) -> None:
        changed = [one.id for one in done.changed]
        out = dict(done.out)
        if out:
            await self._settling.unindex(principal.tenant, out, shard=principal.shard)
        await self._settling.forget_kv(principal.tenant, changed)
        await self._settling.take_back(principal.tenant, [*changed, *out], shard=principal.shard)
        if changed:
            cubes = await _run(
                self._catalog.cubes.get_many,
                principal.tenant,
                changed[:INDEXED_NOW],
                now=self._clock(),
            )
            await self._settling.reindex(cubes, shard=principal.shard)


def _of(principal: Principal, scope: Scope) -> Scope:
    return replace(scope, tenant=principal.tenant)


def _past(time: datetime, now: datetime, field: str) -> datetime:
    if time > now:
        raise BadRequest("is in the future", field)
    return time


async def _run(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    return await asyncio.to_thread(call, *args, **kwargs)
