"""Objects on an S3 server (MinIO, AWS, SeaweedFS, a JuiceFS gateway, …) through the ``minio`` client.

The client blocks, so each call runs on a thread of the store's. Its own retries are off: ours know
which failures may have had their effect.

Conditional create is ``If-None-Match: *`` where the server honours it (AWS and MinIO do since 2024).
Some answer 200 and overwrite: the JuiceFS gateway 1.4.2, whose S3 layer is a MinIO of 2021, ignores the
header. ``open`` finds out by creating one small object twice. On a server that ignores it ``put``
looks whether the object is there and then writes it, one caller of this store at a time; two
processes can still both succeed, so ``atomic_create`` is False, and a lock or a fence must not be
made of it.

Such a gateway keeps objects as files: a name that is a folder of another is refused (as an internal
error of the server, so ``Unavailable``), and so is a range that starts at the end, which we answer with
no bytes.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NoReturn, TypeVar

import urllib3
from minio import Minio
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from urllib3.exceptions import HTTPError, TimeoutError

from memcube.errors import (
    Conflict,
    DeadlineExceeded,
    LimitExceeded,
    MemCubeError,
    NotFound,
    StorageFull,
    Unavailable,
)
from memcube.objects import Bytes, ObjectInfo, check_name, check_prefix, check_range

MAX_OBJECT_BYTES = 5 * 1024**3
"""Of one PUT, by S3's rule."""
_PAGE = 1000
_FIRST_PAUSE_S = 0.1
_MISSING = ("NoSuchKey", "NoSuchObject", "ResourceNotFound")
_FULL = (
    "XMinioStorageFull",
    "InsufficientStorage",
    "QuotaExceeded",
    "XMinioAdminBucketQuotaExceeded",
)
_AGAIN = (
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "SlowDownRead",
    "SlowDownWrite",
    "XMinioServerNotInitialized",
)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Settings:
    """Where the server is and how long to wait for it.

    ``prefix`` is put before each name, so that systems can share a bucket. A call is tried ``attempts``
    times, and not again after ``deadline_s``.
    """

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str = field(repr=False)
    secure: bool = True
    region: str = "us-east-1"
    prefix: str = "memcube"
    connect_timeout_s: float = 3.0
    read_timeout_s: float = 30.0
    attempts: int = 4
    deadline_s: float = 60.0
    threads: int = 16


class _Client(Minio):
    """The client with the one header that its ``put_object`` has no argument for."""

    def put_bytes(self, bucket: str, name: str, data: bytes, *, if_absent: bool) -> None:
        self._put_object(bucket, name, data, {"If-None-Match": "*"} if if_absent else None)


class S3Store:
    """An ``ObjectStore`` in a bucket. It lives in one event loop."""

    def __init__(self, settings: S3Settings, client: _Client, threads: ThreadPoolExecutor) -> None:
        self.atomic_create = False
        self._settings = settings
        self._client = client
        self._threads = threads
        self._creating = asyncio.Lock()
        self._prefix = f"{settings.prefix}/" if settings.prefix else ""

    @classmethod
    async def open(cls, settings: S3Settings, *, create_bucket: bool = False) -> "S3Store":
        """The store in a bucket. Writes and removes a small object to learn what the server can.

        Raises:
            Unavailable: the server doesn't answer, refuses the keys, or has no such bucket.
        """
        http = urllib3.PoolManager(
            timeout=urllib3.Timeout(
                connect=settings.connect_timeout_s, read=settings.read_timeout_s
            ),
            maxsize=settings.threads,
            retries=False,
        )
        client = _Client(
            settings.endpoint,
            settings.access_key,
            settings.secret_key,
            secure=settings.secure,
            region=settings.region,
            http_client=http,
        )
        store = cls(settings, client, ThreadPoolExecutor(settings.threads, "s3"))
        try:
            if create_bucket:
                await store._call(store._create_bucket)
            store.atomic_create = await store._honours_conditions()
        except BaseException:
            await store.close()
            raise
        return store

    async def put(self, name: str, data: Bytes, *, if_absent: bool = False) -> None:
        key = self._key(name)
        if len(data) > MAX_OBJECT_BYTES:
            raise LimitExceeded("bytes of an object", MAX_OBJECT_BYTES, len(data))
        body = data if isinstance(data, bytes) else bytes(data)
        if not if_absent:
            await self._call(self._put, key, body)
        elif self.atomic_create:
            await self._create(name, body)
        else:
            async with self._creating:
                if await self._call(self._exists, key):
                    raise Conflict(f"object {name!r} exists already")
                await self._call(self._put, key, body)

    async def get(self, name: str) -> bytes:
        return await self._call(self._get, self._key(name), 0, None, name=name)

    async def get_range(self, name: str, start: int, length: int) -> bytes:
        check_range(start, length)
        return await self._call(self._get, self._key(name), start, length, name=name)

    async def delete(self, name: str) -> None:
        await self._call(self._client.remove_object, self._settings.bucket, self._key(name))

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        last: str | None = None
        full = self._prefix + check_prefix(prefix)
        while True:
            page = await self._call(self._page, full, last)
            for key, size in page:
                if not key.endswith("/"):  # what some servers list for a folder
                    yield ObjectInfo(key.removeprefix(self._prefix), size)
            if len(page) < _PAGE:
                return
            last = page[-1][0]

    async def close(self) -> None:
        """Wait for no one: a call on its thread ends by its own timeout."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _key(self, name: str) -> str:
        return self._prefix + check_name(name)

    async def _create(self, name: str, body: bytes) -> None:
        """Put where nothing is, by the server's word.

        After an attempt without an answer, "it is there" may speak of our own object: then it holds
        our bytes.
        """
        key = self._key(name)
        unsure = False

        def attempt() -> None:
            nonlocal unsure
            try:
                self._client.put_bytes(self._settings.bucket, key, body, if_absent=True)
            except S3Error as error:
                if error.code != "PreconditionFailed":
                    unsure = unsure or _is_temporary(error)
                    raise
                if not unsure or self._get(key, 0, None) != body:
                    raise Conflict(f"object {name!r} exists already") from None
            except (MinioException, HTTPError):
                unsure = True
                raise

        await self._call(attempt)

    async def _honours_conditions(self) -> bool:
        name = f"probe-{time.time_ns():x}"
        await self._create(name, b"a")
        try:
            await self._create(name, b"b")
        except Conflict:
            return True
        finally:
            await self.delete(name)
        return False

    async def _call(self, function: Callable[..., _T], *given: object, name: str = "") -> _T:
        """Run a blocking call on a thread, again where a failure may pass."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._settings.deadline_s
        for attempt in range(1, self._settings.attempts + 1):
            try:
                return await loop.run_in_executor(self._threads, partial(function, *given))
            except (MinioException, HTTPError) as failed:
                pause_s = _FIRST_PAUSE_S * 4 ** (attempt - 1)
                last = attempt == self._settings.attempts or loop.time() + pause_s > until
                if last or not _is_temporary(failed):
                    self._raise(failed, name)
            await asyncio.sleep(pause_s)
        raise AssertionError("attempts is at least 1")

    def _raise(self, failed: Exception, name: str) -> NoReturn:
        raise self._mapped(failed, name) from None

    def _mapped(self, failed: Exception, name: str) -> MemCubeError:
        where = f"{self._settings.endpoint}/{self._settings.bucket}"
        if isinstance(failed, TimeoutError):
            return DeadlineExceeded(f"{where} did not answer in time")
        if not isinstance(failed, S3Error):
            return Unavailable(f"{where}: {type(failed).__name__}: {str(failed)[:200]}", 5.0)
        if failed.code in _MISSING and name:
            return NotFound("object", name)
        if failed.code in _FULL:
            return StorageFull(where)
        return Unavailable(f"{where}: {failed.code}: {failed.message}", 5.0)

    def _create_bucket(self) -> None:
        try:
            self._client.make_bucket(self._settings.bucket, self._settings.region)
        except S3Error as error:
            if error.code != "BucketAlreadyOwnedByYou":
                raise

    def _put(self, key: str, body: bytes) -> None:
        self._client.put_bytes(self._settings.bucket, key, body, if_absent=False)

    def _exists(self, key: str) -> bool:
        try:
            self._client.stat_object(self._settings.bucket, key)
        except S3Error as error:
            if error.code in _MISSING:
                return False
            raise
        return True

    def _get(self, key: str, start: int, length: int | None) -> bytes:
        if length == 0:
            self._client.stat_object(self._settings.bucket, key)
            return b""
        try:
            response = self._client.get_object(
                self._settings.bucket, key, offset=start, length=length or 0
            )
        except S3Error as error:
            if error.code == "InvalidRange":
                return b""
            raise
        try:
            data = response.read()
        finally:
            response.close()
            response.release_conn()
        if response.status == 206:
            return data
        # The whole object: none other was asked for, or the server takes no ranges.
        return data[start:] if length is None else data[start : start + length]

    def _page(self, prefix: str, after: str | None) -> Sequence[tuple[str, int]]:
        found = self._client.list_objects(
            self._settings.bucket, prefix=prefix, recursive=True, start_after=after
        )
        return [(str(one.object_name), int(one.size or 0)) for one in islice(found, _PAGE)]


def _is_temporary(failed: Exception) -> bool:
    if isinstance(failed, S3Error):
        return failed.code in _AGAIN
    if isinstance(failed, ServerError):
        return failed.status_code >= 500
    if isinstance(failed, InvalidResponseError):
        return failed._code >= 500
    return isinstance(failed, HTTPError)
