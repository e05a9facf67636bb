"""Objects in a local folder: each a file, written beside its place, fsynced and renamed into it.

``put`` returns after the file and every folder above it are fsynced, so that what it wrote survives
a loss of power. After an fsync that failed nothing more is written until the store is opened anew: the
kernel may have dropped the pages, and a second fsync would say that all is well.

Any number of processes may use one folder. Half-written files lie in ``.tmp`` under a lock that ends
with their writer; the next ``open`` removes those that nobody holds.

Names map to paths without loss on file systems that fold case or normalise Unicode: what is not a
lower-case letter, digit, ``-``, ``_`` or ``.`` is written as ``=`` and the hex of each byte, and a part
that becomes long is cut into nested folders.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from memcube.errors import Conflict, MemCubeError, NotFound, StorageFull, Unavailable
from memcube.objects import Bytes, ObjectInfo, check_name, check_prefix, check_range

_TEMPORARY = ".tmp"
_ESCAPED = re.compile(rb"[^a-z0-9._-]|^\.")
"""A leading dot too: such names are ours, or the system's."""
_PIECE = 200
_MAX_TRIES = 64


class FolderStore:
    """An ``ObjectStore`` in a folder. Its calls run on the event loop's threads."""

    atomic_create = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._failed: str | None = None

    @classmethod
    def open(cls, path: Path) -> "FolderStore":
        """The store in a folder, made if it is not there. Clears what killed writers left.

        Raises:
            Unavailable: the folder can't be made or read.
        """
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            (path / _TEMPORARY).mkdir(exist_ok=True, mode=0o700)
            for left in os.scandir(path / _TEMPORARY):
                _remove_if_unheld(Path(left.path))
        except OSError as failed:
            raise _mapped(failed, str(path)) from None
        return cls(path)

    async def put(self, name: str, data: Bytes, *, if_absent: bool = False) -> None:
        await asyncio.to_thread(self._put, check_name(name), data, if_absent)

    async def get(self, name: str) -> bytes:
        return await asyncio.to_thread(self._read, check_name(name), 0, None)

    async def get_range(self, name: str, start: int, length: int) -> bytes:
        check_range(start, length)
        return await asyncio.to_thread(self._read, check_name(name), start, length)

    async def delete(self, name: str) -> None:
        await asyncio.to_thread(self._delete, check_name(name))

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        for found in await asyncio.to_thread(self._list, check_prefix(prefix)):
            yield found

    async def close(self) -> None:
        """Nothing is held between calls."""

    def _put(self, name: str, data: Bytes, if_absent: bool) -> None:
        if self._failed is not None:
            raise Unavailable(f"{self._path} is read-only since {self._failed}", 60.0)
        target = self._path / _encoded(name)
        try:
            temporary, handle = _new_temporary(self._path / _TEMPORARY)
            try:
                _write(handle, data)
                self._sync(handle)
                self._place(temporary, target, if_absent)
            finally:
                # The lock ends with the handle: first the name goes, so that no one finds it unheld.
                temporary.unlink(missing_ok=True)
                os.close(handle)
            self._sync_folders(target)
        except FileExistsError:
            raise Conflict(f"object {name!r} exists already") from None
        except (NotADirectoryError, IsADirectoryError):
            raise Conflict(f"object {name!r} is a folder of others, or in one's place") from None
        except OSError as failed:
            raise _mapped(failed, str(self._path)) from None

    def _place(self, temporary: Path, target: Path, if_absent: bool) -> None:
        for left in reversed(range(_MAX_TRIES)):
            try:
                self._make_folders(target)
                if if_absent:
                    os.link(temporary, target, follow_symlinks=False)
                else:
                    os.replace(temporary, target)
                return
            except FileNotFoundError:
                # A delete took the folder away as it was empty: make it again.
                if left == 0:
                    raise

    def _make_folders(self, target: Path) -> None:
        folder = self._path
        for part in target.relative_to(self._path).parts[:-1]:
            folder /= part
            # Whether what exists is a folder, and does so still, the next step finds out.
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)

    def _sync_folders(self, target: Path) -> None:
        """Fsync the folders from the target's to ours. Those that didn't change cost microseconds,
        and one that another process made may not be on disk yet."""
        for folder in target.parents:
            try:
                handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue  # it was pruned, which the one above tells
            try:
                self._sync(handle)
            finally:
                os.close(handle)
            if folder == self._path:
                return

    def _sync(self, handle: int) -> None:
        try:
            os.fsync(handle)
        except OSError as failed:
            self._failed = f"fsync failed: {os.strerror(failed.errno or 0)}"
            raise

    def _read(self, name: str, start: int, length: int | None) -> bytes:
        try:
            with open(self._path / _encoded(name), "rb") as file:
                if length is None:
                    return file.read()
                size = os.fstat(file.fileno()).st_size
                file.seek(min(start, size))
                return file.read(min(length, size))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise NotFound("object", name) from None
        except OSError as failed:
            raise _mapped(failed, str(self._path)) from None

    def _delete(self, name: str) -> None:
        target = self._path / _encoded(name)
        try:
            target.unlink()
            self._prune(target.parent)
            self._sync_folders(target)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return
        except OSError as failed:
            raise _mapped(failed, str(self._path)) from None

    def _prune(self, folder: Path) -> None:
        """Remove a folder and those above it that are empty: their names may tell of what was deleted."""
        while folder != self._path:
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass  # another delete was faster
            except OSError as failed:
                if failed.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return
            folder = folder.parent

    def _list(self, prefix: str) -> Sequence[ObjectInfo]:
        folder = self._path / _encoded(prefix.rpartition("/")[0])
        try:
            return [found for found in self._walk(folder) if found.name.startswith(prefix)]
        except OSError as failed:
            raise _mapped(failed, str(self._path)) from None

    def _walk(self, folder: Path) -> Iterator[ObjectInfo]:
        try:
            entries = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if entry.path != str(self._path / _TEMPORARY):
                    yield from self._walk(Path(entry.path))
            elif (name := _decoded(Path(entry.path).relative_to(self._path))) is not None:
                try:
                    size = entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:
                    continue  # deleted meanwhile
                yield ObjectInfo(name, size)


def _encoded(name: str) -> str:
    """The path of a name. No two names have one path, and none leads out of the folder."""
    return "/".join(map(_encoded_part, name.split("/")))


def _encoded_part(part: str) -> str:
    plain = _ESCAPED.sub(lambda found: f"={found[0][0]:02x}".encode(), part.encode()).decode()
    # '+' is escaped, so that a seam is not the seam of two parts.
    return "+/+".join(plain[i : i + _PIECE] for i in range(0, len(plain), _PIECE))


def _decoded(path: Path) -> str | None:
    """The name of a path, or None for a file that is not an object."""
    plain = path.as_posix().replace("+/+", "")
    try:
        name = re.sub(
            rb"=([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), plain.encode()
        ).decode()
        return name if _encoded(check_name(name)) == path.as_posix() else None
    except (UnicodeError, MemCubeError):
        return None


def _new_temporary(folder: Path) -> tuple[Path, int]:
    """A new file, held by a lock for as long as its handle is open."""
    while True:
        path = folder / os.urandom(16).hex()
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return path, handle
        os.close(handle)  # an opener removed it before it was held


def _remove_if_unheld(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return  # its writer lives
    finally:
        os.close(handle)


def _write(handle: int, data: Bytes) -> None:
    left = memoryview(data).cast("B")
    while left:
        left = left[os.write(handle, left) :]


def _mapped(failed: OSError, where: str) -> MemCubeError:
    if failed.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(where)
    return Unavailable(f"{where}: {os.strerror(failed.errno or 0)}", 5.0)
