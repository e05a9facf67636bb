"""The blocking face of a store."""

import asyncio
import threading

import pytest

from memcube.errors import Conflict, DeadlineExceeded, NotFound, Unavailable
from memcube.objects.blocking import BlockingObjects
from memcube.objects.folder import FolderStore


async def opened(path) -> FolderStore:
    return FolderStore.open(path)


def test_all_calls_work_from_many_threads(tmp_path):
    objects = BlockingObjects(lambda: opened(tmp_path))

    def work(number: int) -> None:
        objects.put(f"a/{number}", b"x" * number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {found.name: found.num_bytes for found in objects.list("a/")} == {
        f"a/{number}": number for number in range(8)
    }
    assert objects.atomic_create
    assert objects.get("a/3") == b"xxx"
    assert objects.get_range("a/7", 5, 9) == b"xx"
    with pytest.raises(Conflict):
        objects.put("a/3", b"", if_absent=True)
    objects.delete("a/3")
    with pytest.raises(NotFound):
        objects.get("a/3")
    objects.close()
    assert "objects" not in {thread.name for thread in threading.enumerate()}


def test_a_store_that_does_not_open_leaves_no_thread():
    async def failing() -> FolderStore:
        raise Unavailable("no server")

    with pytest.raises(Unavailable, match="no server"):
        BlockingObjects(failing)
    assert "objects" not in {thread.name for thread in threading.enumerate()}


def test_a_store_that_hangs_misses_the_deadline(tmp_path):
    class Hanging(FolderStore):
        async def get(self, name: str) -> bytes:
            await asyncio.Event().wait()
            raise AssertionError

    async def hanging() -> FolderStore:
        return Hanging(tmp_path)

    objects = BlockingObjects(hanging, timeout_s=0.05)
    with pytest.raises(DeadlineExceeded):
        objects.get("x")
    objects.close()
