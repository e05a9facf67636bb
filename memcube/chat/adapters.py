"""Which adapter answers a chat: the one that it names, or the one that serves its scope.

Asked of the catalog for each chat, so that an adapter stops with the change of a cube inside.
"""

import asyncio

from memcube.catalog import AdapterBook, AdapterRecord
from memcube.cube import Scope
from memcube.ids import TenantId
from memcube.indexing import Clock


class AdapterChoice:
    """Chooses among the adapters that serve on one base model."""

    def __init__(self, book: AdapterBook, *, base: str, clock: Clock) -> None:
        self._book = book
        self._base = base
        self._clock = clock

    async def named(self, tenant: TenantId, name: str) -> AdapterRecord:
        """The version that serves, by the adapter's name or id.

        Raises:
            NotFound: none does.
        """
        now = self._clock()
        return await asyncio.to_thread(
            lambda: self._book.serving(tenant, name, base=self._base, now=now)
        )

    async def of_scope(self, scope: Scope) -> AdapterRecord | None:
        """The version that serves exactly this scope, if one does."""
        now = self._clock()
        return await asyncio.to_thread(
            lambda: self._book.serving_scope(scope, base=self._base, now=now)
        )
