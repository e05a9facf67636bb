"""The adapters that an engine holds ready: a bounded set, the least recently used goes first.

An adapter is loaded when a request first asks for it, on a thread of its own, while other requests
compute. One that a request uses is not given up before the request ends.
"""

import asyncio
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

from memcube.activation.contract import AdapterRef
from memcube.activation.lora import LoraAdapter
from memcube.activation.stats import AdapterStats, Histogram
from memcube.errors import LimitExceeded, MemCubeError, TooBusy

AdapterLoader = Callable[[str, AdapterRef], LoraAdapter]
"""An adapter of a tenant; blocks. Raises of ``memcube.errors``, NotFound for one that isn't there."""

_WAITS_S = (1e-4, 1e-3, 5e-3, 0.025, 0.1, 0.25, 1.0, 5.0)


class _Key(NamedTuple):
    tenant: str
    ref: AdapterRef


@dataclass(slots=True, eq=False)
class _Entry:
    loading: Future[LoraAdapter]
    users: int = 0
    num_bytes: int = 0
    """0 until it is loaded."""


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
        self._refused: Counter[str] = Counter()
        self._wait_s = {kind: Histogram(_WAITS_S) for kind in ("resident", "loaded")}

    @asynccontextmanager
    async def held(self, tenant: str, ref: AdapterRef) -> AsyncGenerator[LoraAdapter]:
        """The adapter, which stays resident meanwhile.

        Raises:
            TooBusy: those in use fill the memory. LimitExceeded: it alone is more.
            Other errors of ``memcube.errors``: what the loader says.
        """
        key, began = _Key(tenant, ref), time.monotonic()
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = _Entry(self._pool.submit(self._loaded, key))
                self._entries[key] = entry
            entry.users += 1
            self._entries.move_to_end(key)
        kind = "resident" if entry.loading.done() else "loaded"
        try:
            try:
                # Shielded: another request may wait for it too.
                adapter = await asyncio.shield(asyncio.wrap_future(entry.loading))
            except MemCubeError as refused:
                with self._lock:
                    self._refused[refused.code] += 1
                raise
            with self._lock:
                self._wait_s[kind].observe(time.monotonic() - began)
            yield adapter
        finally:
            with self._lock:
                entry.users -= 1

    def forget(self, names: Collection[str] = (), tenant: str | None = None) -> None:
        """Let go of these adapters, by ``AdapterRef.name``, and of a tenant's; those in use go with
        their requests."""
        with self._lock:
            for key in [k for k in self._entries if k.tenant == tenant or k.ref.name in names]:
                del self._entries[key]

    def names(self) -> dict[str, set[str]]:
        """The names of those that are here or on their way, by tenant."""
        found: dict[str, set[str]] = {}
        with self._lock:
            for key in self._entries:
                found.setdefault(key.tenant, set()).add(key.ref.name)
        return found

    def stats(self) -> AdapterStats:
        """This moment."""
        with self._lock:
            sizes = [entry.num_bytes for entry in self._entries.values() if entry.num_bytes]
            return AdapterStats(
                resident=len(sizes),
                resident_bytes=sum(sizes),
                loads=self._loads,
                load_s=self._load_s,
                evictions=self._evictions,
                refused=dict(self._refused),
                wait_s={kind: found.shown() for kind, found in self._wait_s.items()},
            )

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
