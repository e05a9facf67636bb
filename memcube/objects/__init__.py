"""Objects: named bytes that are written whole and never changed in place.

``ObjectStore`` is the contract; ``FolderStore`` (``memcube.objects.folder``) keeps it in a local
folder, ``S3Store`` (``memcube.objects.s3``) on any S3 server. One suite,
``memcube.testing.objects_contract``, runs on both. ``BlockingObjects`` is the same for code on threads.

What both promise:

- A ``put`` that returned survives ``kill -9`` of every process; in a folder also a loss of power.
- A reader sees the old bytes or the new ones, whole, never a mixture.
- A call that was cancelled or raised ``Unavailable`` may have had its effect; all but the
  conditional ``put`` can be repeated. A conditional one can too where the bytes tell whose it is.

Names are parts joined by ``/``. They are the system's own: strings that a caller controls are hashed
first (``memcube.ids.digest``). A name that is also a folder of another name (``a`` and ``a/b``) is
refused by a folder and by servers that keep files; which of the two came first stays whole.
"""

import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple, Protocol

from memcube.errors import BadRequest

MAX_NAME_BYTES = 768
"""Of a whole name in UTF-8. S3 allows 1,024, of which a store's own prefix takes some."""
MAX_PART_BYTES = 200
"""Of a part in UTF-8. File systems, and servers that stand on one, stop at 255."""

Bytes = bytes | bytearray | memoryview


class ObjectInfo(NamedTuple):
    """What a listing tells of an object."""

    name: str
    num_bytes: int


class ObjectStore(Protocol):
    """Named bytes. Every call raises of ``memcube.errors``:

    BadRequest: the name is not one (see ``check_name``).
    Unavailable: the store can't answer now; ``DeadlineExceeded`` where it took too long.
    StorageFull: no room is left. Nothing was written, and reads go on.
    """

    @property
    def atomic_create(self) -> bool:
        """Whether ``put(if_absent=True)`` holds between processes, not only inside this one.

        Where it doesn't, fence by the catalog.
        """
        ...

    async def put(self, name: str, data: Bytes, *, if_absent: bool = False) -> None:
        """Write an object, in place of one that is there. Durable when it returns.

        Raises:
            Conflict: ``if_absent`` and it is there; it is left as it was.
        """
        ...

    async def get(self, name: str) -> bytes:
        """All of an object's bytes.

        Raises:
            NotFound: there is none.
        """
        ...

    async def get_range(self, name: str, start: int, length: int) -> bytes:
        """``length`` bytes from ``start``; fewer where the object ends before.

        Raises:
            NotFound: there is none.
            ValueError: a negative start or length.
        """
        ...

    async def delete(self, name: str) -> None:
        """Remove an object. One that is not there is no error."""
        ...

    def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """Objects whose names start with a string, in no stated order.

        What is put or deleted during a listing may be in it or not.
        """
        ...

    async def close(self) -> None:
        """Give back what is held. The store is not used after."""
        ...


OpenObjects = Callable[[], Awaitable[ObjectStore]]
"""Opens the store of a configuration; whoever calls it closes what it gets."""


@asynccontextmanager
async def opened(open_objects: OpenObjects) -> AsyncIterator[ObjectStore]:
    """The store for a while, closed behind it."""
    objects = await open_objects()
    try:
        yield objects
    finally:
        await objects.close()


def check_name(name: str) -> str:
    """The name, if it is one: 1 to 768 bytes in parts of 1 to 200, none of them ``.`` or ``..``,
    and no control characters or lone surrogates.

    Raises:
        BadRequest: it isn't.
    """
    _check_text(name)
    for part in name.split("/"):
        if part in ("", ".", ".."):
            raise BadRequest(f"has an empty part, '.' or '..': {name[:80]!r}", "name")
        if len(part.encode()) > MAX_PART_BYTES:
            raise BadRequest(f"a part has more than {MAX_PART_BYTES} bytes: {part[:40]!r}…", "name")
    return name


def check_prefix(prefix: str) -> str:
    """The prefix, if it is nothing, a name, or a name and ``/``.

    Raises:
        BadRequest: it is something else.
    """
    if prefix:
        check_name(prefix.removesuffix("/"))
    return prefix


def check_range(start: int, length: int) -> None:
    """Raise ValueError for a negative start or length."""
    if start < 0 or length < 0:
        raise ValueError(f"a range has no negative start or length, given {start}, {length}")


def _check_text(name: str) -> None:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise BadRequest("holds a lone surrogate", "name") from None
    if size > MAX_NAME_BYTES:
        raise BadRequest(f"has {size:,} bytes of at most {MAX_NAME_BYTES}", "name")
    if any(unicodedata.category(character) == "Cc" for character in name):
        raise BadRequest(f"holds a control character: {name[:80]!r}", "name")


__all__ = [
    "MAX_NAME_BYTES",
    "MAX_PART_BYTES",
    "Bytes",
    "ObjectInfo",
    "ObjectStore",
    "check_name",
    "check_prefix",
    "check_range",
]
