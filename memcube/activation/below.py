"""The way between the device's pool and the media below it: one thread, loads before stores.

A request waits for a load, nobody for a store: so loads go first, and of what was evicted no more
than so many bytes wait, the rest is dropped.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future

from torch import Tensor

from memcube.activation.blocks import Block, Lower, Place
from memcube.errors import Unavailable

log = logging.getLogger(__name__)

_AT_ONCE = 8
"""Blocks a call: between two calls the deadline is looked at."""


class Below:
    """Brings blocks up from a ``Lower`` and takes them down, in the background."""

    def __init__(self, lower: Lower, *, waiting_bytes: int, clock: Callable[[], float]) -> None:
        self._lower = lower
        self._max_bytes = waiting_bytes
        self._clock = clock
        self._wake = threading.Condition()
        self._asked: deque[Callable[[], None]] = deque()
        self._evicted: deque[Block] = deque()
        self._evicted_bytes = 0
        self._busy_since: float | None = None
        self._closed = False
        self.num_dropped = 0
        self.num_failed = 0
        self._thread = threading.Thread(target=self._serve, name="below", daemon=True)
        self._thread.start()

    async def fetch(
        self, places: Sequence[Place], wait_s: float, *, is_chain: bool
    ) -> dict[str, Tensor]:
        """Those of the blocks that come within the time, by key; of a chain the leading ones."""
        if not places or wait_s <= 0 or self._is_stuck(wait_s):
            return {}
        until = self._clock() + wait_s
        found: dict[str, Tensor] = {}
        done = self._ask(lambda: self._fetch(places, until, found, is_chain))
        # On a time-out the thread may be within a call still; what came before it is good.
        await asyncio.wait([asyncio.wrap_future(done)], timeout=wait_s)
        return dict(found)

    async def forget(self, cubes: Collection[str], tenant: str | None) -> None:
        """Drop what holds one of these cubes, and all of a tenant, below and on its way there."""
        await asyncio.wrap_future(self._ask(lambda: self._forget(cubes, tenant)))

    def offer(self, block: Block) -> None:
        """Take down a block when there is time. Does not block."""
        with self._wake:
            if self._closed or self._evicted_bytes + block.num_bytes > self._max_bytes:
                self.num_dropped += 1
                return
            self._evicted.append(block)
            self._evicted_bytes += block.num_bytes
            self._wake.notify()

    def close(self, last: Sequence[Block] = ()) -> None:
        """Take down what waits and these blocks, then stop. Blocks."""
        with self._wake:
            self._evicted.extend(last)
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _ask(self, work: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()

        def call() -> None:
            try:
                work()
            except Exception as failed:  # noqa: BLE001 - handed to the caller, whose it is
                done.set_exception(failed)
            else:
                done.set_result(None)

        with self._wake:
            if self._closed:
                raise Unavailable("the engine is closed")
            self._asked.append(call)
            self._wake.notify()
        return done

    def _is_stuck(self, wait_s: float) -> bool:
        """Whether one call takes so long that to wait behind it is of no use."""
        since = self._busy_since
        return since is not None and self._clock() - since > wait_s

    def _fetch(
        self, places: Sequence[Place], until: float, found: dict[str, Tensor], is_chain: bool
    ) -> None:
        for start in range(0, len(places), _AT_ONCE):
            if self._clock() >= until:
                return
            wanted = places[start : start + _AT_ONCE]
            try:
                got = self._lower.fetch(wanted)
            except Exception:
                log.exception(
                    "%d blocks could not be loaded; they are computed instead", len(wanted)
                )
                self.num_failed += 1
                return
            for place in wanted:
                if place.key in got:
                    found[place.key] = got[place.key]
                elif is_chain:
                    return  # it is of no use behind a gap

    def _forget(self, cubes: Collection[str], tenant: str | None) -> None:
        with self._wake:
            kept = [
                block
                for block in self._evicted
                if block.tenant != tenant and block.cubes.isdisjoint(cubes)
            ]
            self._evicted = deque(kept)
            self._evicted_bytes = sum(block.num_bytes for block in kept)
        self._lower.forget(cubes, tenant)

    def _serve(self) -> None:
        while True:
            with self._wake:
                self._busy_since = None
                while not (self._asked or self._evicted or self._closed):
                    self._wake.wait()
                if self._asked:
                    work = self._asked.popleft()
                elif self._evicted:
                    block = self._evicted.popleft()
                    self._evicted_bytes -= block.num_bytes
                    work = self._taking_down(block)
                else:
                    return
                self._busy_since = self._clock()
            work()

    def _taking_down(self, block: Block) -> Callable[[], None]:
        def call() -> None:
            try:
                self._lower.offer([block])
            except Exception:
                # The block is lost from below, and computed again when it is wanted.
                log.exception(
                    "block %s of %d bytes could not be stored", block.key, block.num_bytes
                )
                self.num_failed += 1

        return call
