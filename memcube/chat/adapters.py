"""Which adapter answers a chat: the one that it names, or the one that serves its scope.

Asked of the catalog for each chat, so that an adapter stops with the change of a cube inside. One
that an engine refused is left alone for a while, and its scope's chats go to the base model at once.
"""

import asyncio
import logging
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime, timedelta

from memcube.activation.contract import AdapterRef
from memcube.catalog import AdapterBook, AdapterRecord
from memcube.cube import Scope
from memcube.errors import MemCubeError, Unavailable
from memcube.ids import CubeId, TenantId
from memcube.indexing import Clock
from memcube.parametric.registry import reference

log = logging.getLogger(__name__)

BROKEN_S = 60.0
"""How long one that can't be used is not tried: what is full or down says itself how long."""
MAX_REFUSALS = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An adapter that would answer but for an error, whose ``code`` this is."""

    adapter: AdapterRecord
    code: str


class AdapterChoice:
    """Chooses among the adapters that serve on one base model. It belongs to one event loop."""

    def __init__(self, book: AdapterBook, *, base: str, clock: Clock) -> None:
        self._book = book
        self._base = base
        self._clock = clock
        self._refused: OrderedDict[AdapterRef, tuple[str, datetime]] = OrderedDict()
        """The code of each refusal, and until when it holds; the oldest first."""

    async def named(self, tenant: TenantId, name: str) -> AdapterRecord:
        """The version that serves, by the adapter's name or id.

        Raises:
            NotFound: none does.
        """
        now = self._clock()
        return await asyncio.to_thread(
            lambda: self._book.serving(tenant, name, base=self._base, now=now)
        )

    async def serving(self, tenant: TenantId) -> list[AdapterRecord]:
        """Those of a tenant's that can be named, by name."""
        now = self._clock()
        found = await asyncio.to_thread(lambda: self._book.live(tenant, now=now))
        return sorted(
            (adapter for adapter in found if adapter.base == self._base),
            key=lambda adapter: adapter.line.name,
        )

    async def of_scope(self, scope: Scope) -> AdapterRecord | Refusal | None:
        """The version that serves exactly this scope, if one does and wasn't refused a moment ago."""
        now = self._clock()
        found = await asyncio.to_thread(
            lambda: self._book.serving_scope(scope, base=self._base, now=now)
        )
        if found is None:
            return None
        code, until = self._refused.get(reference(found), ("", now))
        return Refusal(adapter=found, code=code) if until > now else found

    async def inside(self, adapter: AdapterRecord) -> frozenset[CubeId]:
        """The cubes that a version holds. While it serves, their texts are what it was trained on."""
        found = await asyncio.to_thread(
            self._book.inside, adapter.line.scope.tenant, adapter.line.id, adapter.version
        )
        return frozenset(found)

    def refused(self, adapter: AdapterRecord, why: MemCubeError) -> Refusal:
        """Remember that an engine can't use this version now."""
        wait_s = why.retry_after_s if isinstance(why, Unavailable) else BROKEN_S
        log.warning(
            "version %d of adapter %s is not used for %g s: %s",
            adapter.version,
            adapter.line.id,
            wait_s,
            why,
        )
        ref = reference(adapter)
        self._refused[ref] = why.code, self._clock() + timedelta(seconds=wait_s)
        self._refused.move_to_end(ref)
        while len(self._refused) > MAX_REFUSALS:
            self._refused.popitem(last=False)
        return Refusal(adapter=adapter, code=why.code)
