"""The contract on a real S3 server, and what kill -9 of it leaves."""

import asyncio
import itertools
import random
import time

import pytest

from memcube.errors import Unavailable
from memcube.objects.s3 import S3Store
from memcube.testing.objects_contract import ObjectsContract, body, names_in
from memcube.testing.s3 import S3Server, s3_server

_count = itertools.count()


class TestS3Store(ObjectsContract):
    @pytest.fixture
    async def store(self, s3: S3Server):
        settings = s3.settings(prefix=f"test-{next(_count)}", attempts=2)
        store = await S3Store.open(settings, create_bucket=True)
        yield store
        await store.close()


async def test_stores_with_other_prefixes_do_not_see_each_other(s3):
    one, other = [
        await S3Store.open(s3.settings(prefix=prefix), create_bucket=True) for prefix in ("p", "p2")
    ]
    await one.put("x", b"1")
    await other.put("y", b"2")
    assert [await names_in(store) for store in (one, other)] == [{"x": 1}, {"y": 1}]


async def test_a_server_that_ignores_conditions_is_found_out(s3):
    store = await S3Store.open(s3.settings(prefix="probe"), create_bucket=True)
    assert store.atomic_create is False
    assert await names_in(store) == {}


async def test_wrong_keys_and_a_missing_bucket_are_told_and_are_not_not_found(s3):
    with pytest.raises(Unavailable, match="SignatureDoesNotMatch"):
        await S3Store.open(s3.settings(secret_key="wrong-secret"))
    with pytest.raises(Unavailable, match="NoSuchBucket"):
        await S3Store.open(s3.settings(bucket="not-there"))


def test_settings_do_not_show_the_secret(s3):
    assert s3.settings().secret_key not in repr(s3.settings())


async def test_kill_9_of_the_server_in_puts_loses_nothing_acknowledged_and_tears_nothing():
    seed = random.Random(4)
    acknowledged: set[str] = set()
    with s3_server() as server:
        store = await S3Store.open(server.settings(attempts=1), create_bucket=True)
        started = time.monotonic()

        async def write(kill: int, writer: int) -> None:
            for number in itertools.count():
                name = f"{kill}/{writer}/{number}"
                try:
                    await store.put(name, body(name))
                    acknowledged.add(name)
                    await store.put(f"hot-{writer}", body("hot", seed=number))
                except Unavailable:
                    return

        for kill in range(5):
            writers = [asyncio.create_task(write(kill, writer)) for writer in range(3)]
            await asyncio.sleep(seed.uniform(0.1, 0.4))
            await asyncio.to_thread(server.kill)
            await asyncio.gather(*writers)
            await asyncio.to_thread(server.start)
            for writer in range(3):
                hot = await store.get(f"hot-{writer}")
                assert hot == body("hot", seed=int(hot.split()[0]))
        for name in await names_in(store, ""):
            if not name.startswith("hot-"):
                assert await store.get(name) == body(name)
                acknowledged.discard(name)
        await store.close()
    assert acknowledged == set(), time.monotonic() - started
