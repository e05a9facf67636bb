"""The adapters that an engine holds ready: a bounded set, the least recently used goes first.

An adapter is loaded when a request first asks for it, on a thread of its own, while other requests
compute. One that a request uses is not given up before the request ends.
"""

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

from memcube.activation.contract import AdapterRef
from memcube.activation.lora import LoraAdapter
from memcube.errors import LimitExceeded, TooBusy

AdapterLoader = Callable[[str, AdapterRef], LoraAdapter]
"""An adapter of a tenant; blocks. Raises of ``memcube.errors``, NotFound for one that isn't there."""


class _Key(NamedTuple):
    tenant: str
    ref: AdapterRef


@dataclass(slots=True, eq=False)
class _Entry:
    loading: Future[LoraAdapter]
    users: int = 0
    num_bytes: int = 0
    """0 until it is loaded."""


class AdapterStats(NamedTuple):
    """This moment. ``load_s`` is all the time that loads took."""

    resident: int
    resident_bytes: int
    loads: int
    load_s: float
    evictions: int


class ResidentAdapters:
    """Adapters ready to compute with. From any thread and event loop."""

    def __init__(self, load: AdapterLoader, *, max_bytes: int) -> None:
        self._load = load
        self._max_bytes = max_bytes
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        self._loads = self._evictions = 0
        self._load_s = 0.0

    @asynccontextmanager
    async def held(self, tenant: str, ref: AdapterRef) -> AsyncGenerator[LoraAdapter]:
        """The adapter, which stays resident meanwhile.

        Raises:
            TooBusy: those in use fill the memory. LimitExceeded: it alone is more.
            Other errors of ``memcube.errors``: what the loader says.
        """
        key = _Key(tenant, ref)
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = _Entry(self._pool.submit(self._loaded, key))
                self._entries[key] = entry
            entry.users += 1
            self._entries.move_to_end(key)
        try:
            # Shielded: another request may wait for it too.
            yield await asyncio.shield(asyncio.wrap_future(entry.loading))
        finally:
            with self._lock:
                entry.users -= 1

    def forget(self, tenant: str) -> None:
        """Let go of a tenant's adapters; those in use go with their requests."""
        with self._lock:
            for key in [key for key in self._entries if key.tenant == tenant]:
                del self._entries[key]

    def stats(self) -> AdapterStats:
        """This moment."""
        with self._lock:
            sizes = [entry.num_bytes for entry in self._entries.values() if entry.num_bytes]
            return AdapterStats(len(sizes), sum(sizes), self._loads, self._load_s, self._evictions)

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._pool.shutdown(cancel_futures=True)

    def _loaded(self, key: _Key) -> LoraAdapter:
        began = time.monotonic()
        try:
            adapter = self._load(*key)
            with self._lock:
                self._make_room(adapter.num_bytes)
                self._loads += 1
                self._load_s += time.monotonic() - began
                if (entry := self._entries.get(key)) is not None:
                    entry.num_bytes = adapter.num_bytes
        except BaseException:
            # The next request tries again.
            with self._lock:
                self._entries.pop(key, None)
            raise
        return adapter

    def _make_room(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise LimitExceeded("bytes of resident adapters", self._max_bytes, num_bytes)
        used = sum(entry.num_bytes for entry in self._entries.values())
        idle = [key for key, entry in self._entries.items() if entry.num_bytes and not entry.users]
        for key in idle:
            if used + num_bytes <= self._max_bytes:
                break
            used -= self._entries.pop(key).num_bytes
            self._evictions += 1
        if used + num_bytes > self._max_bytes:
            raise TooBusy("the adapters in use fill the memory for them", 1.0)
