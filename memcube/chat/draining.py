"""Engines of nodes that drain: they get no new work while another engine is there to do it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence

from memcube.chat.router import Router

log = logging.getLogger(__name__)


class DrainWatch:
    """Tells a router which engines to leave alone.

    ``draining`` names the nodes that drain (it may block); ``nodes`` is the node of each engine, None for one that doesn't answer:
    asked while some node drains, as an engine that was started anew may be elsewhere.
    """

    def __init__(
        self,
        router: Router,
        *,
        draining: Callable[[], Collection[str]],
        nodes: Callable[[], Awaitable[Sequence[str | None]]],
    ) -> None:
        self._router = router
        self._draining = draining
        self._nodes = nodes

    async def look(self) -> None:
        """Once."""
        draining = await asyncio.to_thread(self._draining)
        nodes = await self._nodes() if draining else ()
        self._router.leave_out({i for i, node in enumerate(nodes) if node in draining})

    async def run(self, *, every_s: float) -> None:
        """Look again and again, until cancelled."""
        while True:
            try:
                await self.look()
            except Exception:
                log.exception("could not look for nodes that drain")
            await asyncio.sleep(every_s)
