"""An object store for code that runs on threads."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from memcube.errors import DeadlineExceeded
from memcube.objects import Bytes, ObjectInfo, ObjectStore

_T = TypeVar("_T")


class BlockingObjects:
    """The calls of an ``ObjectStore``, blocking, from any thread but an event loop's.

    The store is opened on, and only used by, an event loop in a thread of this object's.
    """

    def __init__(self, opened: Callable[[], Awaitable[ObjectStore]], *, timeout_s: float = 120.0):
        self._timeout_s = timeout_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="objects", daemon=True)
        self._thread.start()
        try:
            self._store = self._run(_awaited(opened()))
        except BaseException:
            self._stop()
            raise

    @property
    def atomic_create(self) -> bool:
        return self._store.atomic_create

    def put(self, name: str, data: Bytes, *, if_absent: bool = False) -> None:
        self._run(self._store.put(name, data, if_absent=if_absent))

    def get(self, name: str) -> bytes:
        return self._run(self._store.get(name))

    def get_range(self, name: str, start: int, length: int) -> bytes:
        return self._run(self._store.get_range(name, start, length))

    def delete(self, name: str) -> None:
        self._run(self._store.delete(name))

    def list(self, prefix: str = "") -> Sequence[ObjectInfo]:
        async def collected() -> Sequence[ObjectInfo]:
            return [found async for found in self._store.list(prefix)]

        return self._run(collected())

    def close(self) -> None:
        self._run(self._store.close())
        self._stop()

    def _run(self, call: Coroutine[Any, Any, _T]) -> _T:
        running = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return running.result(self._timeout_s)
        except TimeoutError:
            running.cancel()
            raise DeadlineExceeded(
                f"no answer of the object store in {self._timeout_s:g} s"
            ) from None

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _awaited(given: Awaitable[_T]) -> _T:
    return await given
