"""KV and weights that nobody may be answered from any more: who is told of them, and what is swept.

A prompt never asks for them: cubes that are gone are in no prompt, and an adapter that has stopped is
chosen for none. So to forget frees memory, and makes true that what was deleted is nowhere.
"""

import asyncio
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Protocol

from memcube.activation.contract import names_adapter
from memcube.catalog import AdapterBook, Catalog
from memcube.chat.contract import KvModel
from memcube.errors import MemCubeError
from memcube.ids import CubeId, TenantId
from memcube.indexing import Clock
from memcube.parametric.registry import reference

TOLD_AGAIN = timedelta(minutes=10)
"""Adapters that stopped since then are told of with each change of a tenant's: an engine may have been
away, or have been asked by a chat that began before. The sweep does the rest."""


class Forgetting:
    """Tells all engines. A ``memcube.service.Changed``."""

    def __init__(self, models: Sequence[KvModel], book: AdapterBook, *, clock: Clock) -> None:
        self._models = models
        self._book = book
        self._clock = clock

    async def __call__(self, tenant: TenantId, ids: Sequence[CubeId]) -> None:
        """Forget these cubes, and the adapters that stopped serving: those that held one did so with
        the change. An engine that doesn't answer serves nothing of them either."""
        since = self._clock() - TOLD_AGAIN
        stopped = await asyncio.to_thread(lambda: self._book.retired(tenant, since=since))
        names = [*ids, *(reference(adapter).name for adapter in stopped)]
        if not names:
            return
        told = await asyncio.gather(
            *(model.forget(names, None) for model in self._models), return_exceptions=True
        )
        for failed in told:
            if isinstance(failed, BaseException) and not isinstance(failed, MemCubeError):
                raise failed


class AdapterHolder(Protocol):
    """An engine with adapters on its device: ``engine.Engine``."""

    async def adapters_held(self) -> dict[str, set[str]]: ...
    async def forget(self, cubes: Collection[str] = (), tenant: str | None = None) -> int: ...


async def sweep(engine: AdapterHolder, catalog: Catalog, *, now: datetime) -> int:
    """Forget the adapters on an engine's device that serve no more; how many there were.

    It was not there when it should have been told, a cube inside has expired since, or a chat that had
    begun before brought them back.
    """
    stopped: list[str] = []
    for tenant, names in (await engine.adapters_held()).items():
        if names:
            stopped += await asyncio.to_thread(gone, catalog, tenant, names, now=now)
    if stopped:
        await engine.forget(stopped)
    return len(stopped)


def gone(catalog: Catalog, tenant: str, held: Collection[str], *, now: datetime) -> list[str]:
    """Of the cubes and adapters that KV of a tenant's holds those that are deleted, expired or stopped."""
    adapters = {name for name in held if names_adapter(name)}
    ids = [CubeId(id) for id in held if id not in adapters]
    live: set[str] = set(catalog.cubes.live_versions(TenantId(tenant), ids, now=now))
    if adapters:
        live |= {reference(a).name for a in catalog.adapters.live(TenantId(tenant), now=now)}
    return [name for name in held if name not in live]
