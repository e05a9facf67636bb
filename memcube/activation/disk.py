"""The local disk as a medium: one file a payload, in a folder that one process has open.

Files are not fsynced (see ``memcube.activation.payload``); what was deleted is, so that a loss of power
doesn't bring it back. Opening reads the headers alone. A file that fails a check, or is of another
model, is moved to ``quarantine``, where a few of them stay for a day to be looked at.

With a keyring each tenant's files are sealed with its key.
"""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from memcube.activation import payload as files
from memcube.activation.keyring import Keyring, TenantCipher
from memcube.activation.layout import KvLayout
from memcube.activation.medium import Record
from memcube.activation.payload import Foreign, KvPayload
from memcube.errors import Corrupt, NotFound, StorageFull, Unavailable
from memcube.ids import TenantId, digest

log = logging.getLogger(__name__)

RESERVE_BYTES = 256 * 1024 * 1024
"""Left free on the file system: the catalog and the plaintext tier write there too."""
MAX_QUARANTINED = 16
QUARANTINE_S = 24 * 3600.0
_HEADER_ALLOWANCE = 2048
_SUFFIX = ".safetensors"
_HEX = re.compile(r"[0-9a-f]{16,64}")


class _File(NamedTuple):
    path: Path
    record: Record
    num_bytes: int


class DiskMedium:
    """A folder of payload files of one model. ``open`` it."""

    name = "disk"
    remote = False

    def __init__(
        self,
        folder: Path,
        lock: int,
        *,
        model: str,
        layout: KvLayout,
        keyring: Keyring | None,
        reserve_bytes: int,
    ) -> None:
        self._folder = folder
        self._handle = lock
        self._model = model
        self._layout = layout
        self._keyring = keyring
        self._reserve_bytes = reserve_bytes
        self._lock = threading.Lock()
        self._files: dict[str, _File] = {}
        self._used_bytes = 0
        self.quarantined: Counter[str] = Counter()
        """Files that were not served, by kind."""

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        model: str,
        layout: KvLayout,
        keyring: Keyring | None = None,
        reserve_bytes: int = RESERVE_BYTES,
    ) -> "DiskMedium":
        """The medium in a folder, made if it is not there; its files are indexed by their headers.

        Raises:
            Unavailable: another process has it open, or the system can't read it.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name in ("kv", "quarantine"):
                (folder / name).mkdir(exist_ok=True, mode=0o700)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as failed:
            raise Unavailable(f"{folder}: {os.strerror(failed.errno or 0)}", 5.0) from None
        disk = cls(
            folder, lock, model=model, layout=layout, keyring=keyring, reserve_bytes=reserve_bytes
        )
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            disk._index()
        except BlockingIOError:
            os.close(lock)
            raise Unavailable(f"{folder} is open in another process") from None
        except BaseException:
            os.close(lock)
            raise
        return disk

    def path_of(self, key: str) -> Path:
        """Where a key's file lies, if there is one."""
        # Keys are digests. Any other string gets a name that no digest has.
        stem = key if _HEX.fullmatch(key) else f"x{digest(key)}"
        return self._folder / "kv" / stem[-2:] / (stem + _SUFFIX)

    def size_of(self, num_bytes: int) -> int:
        return num_bytes + _HEADER_ALLOWANCE

    def put(self, payload: KvPayload, record: Record) -> None:
        path, size = self.path_of(payload.key), self.size_of(payload.num_bytes)
        try:
            free = os.statvfs(self._folder)
            if free.f_bavail * free.f_frsize - size < self._reserve_bytes:
                raise StorageFull(str(self._folder))
            path.parent.mkdir(exist_ok=True, mode=0o700)
        except OSError as failed:
            raise Unavailable(f"{self._folder}: {os.strerror(failed.errno or 0)}", 5.0) from None
        cipher = self._keyring and self._keyring.get(TenantId(record.item.tenant))
        written = files.write(path, payload, cipher, record.note())
        self._remember(_File(path, record, written))

    def get(self, key: str) -> KvPayload | None:
        with self._lock:
            file = self._files.get(key)
        if file is None:
            return None
        try:
            cipher = self._cipher(file.record)
            found = files.read(
                file.path, key=key, model=self._model, layout=self._layout, cipher=cipher
            )
        except NotFound:
            self._forget(key)
            return None
        except Corrupt as bad:
            self._forget(key)
            self._quarantine(file.path, bad)
            return None
        with contextlib.suppress(OSError):
            os.utime(file.path)  # the order of use, for the next start
        return found

    def evict(self, keys: Collection[str]) -> None:
        self._remove(keys)

    def delete(self, keys: Collection[str]) -> None:
        touched = self._remove(keys)
        stems = {self.path_of(key).stem for key in keys}
        for left in self._quarantined():
            if left.stem in stems:
                self._discard(left)
        for folder in touched:
            _sync(folder)

    def delete_tenant(self, tenant: str) -> None:
        # Whose they are can't be read from damaged files.
        for left in self._quarantined():
            self._discard(left)
        _sync(self._folder / "quarantine")

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def records(self) -> list[Record]:
        with self._lock:
            return [file.record for file in self._files.values()]

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def flush(self) -> None:
        """Nothing is put off."""

    def refresh(self) -> None:
        """No other changes it."""

    def close(self) -> None:
        os.close(self._handle)

    def _index(self) -> None:
        self._trim_quarantine()
        for _, size, path in sorted(self._found()):
            try:
                record = self._record(path)
            except NotFound:
                continue
            except Corrupt as bad:
                self._quarantine(path, bad)
                continue
            self._remember(_File(path, record, size))

    def _found(self) -> Iterator[tuple[int, int, Path]]:
        """Time of last use, size and path of each file. What killed writers left is removed."""
        for folder in os.scandir(self._folder / "kv"):
            if not folder.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(folder.path):
                if entry.name.endswith(files.NEW_SUFFIX):
                    self._unlink(Path(entry.path))
                else:
                    about = entry.stat(follow_symlinks=False)
                    yield about.st_mtime_ns, about.st_size, Path(entry.path)

    def _record(self, path: Path) -> Record:
        manifest = files.read_manifest(path)
        where = str(path)
        if (manifest.model, manifest.layout) != (self._model, self._layout):
            raise Foreign(where, f"is of model {manifest.model[:100]!r} and {manifest.layout}")
        if path != self.path_of(manifest.key):
            raise Foreign(where, f"is of key {manifest.key[:100]!r}")
        record = Record.of_note(where, manifest.key, manifest.note)
        if manifest.sealed != (self._cipher(record) is not None):
            raise Foreign(where, "is sealed and should not be, or should be and is not")
        return record

    def _cipher(self, record: Record) -> TenantCipher | None:
        if self._keyring is None:
            return None
        cipher = self._keyring.find(TenantId(record.item.tenant))
        if cipher is None:
            raise Foreign(record.key, "is of a tenant whose key is gone")
        return cipher

    def _remember(self, file: _File) -> None:
        with self._lock:
            old = self._files.pop(file.record.key, None)
            self._files[file.record.key] = file
            self._used_bytes += file.num_bytes - (old.num_bytes if old else 0)

    def _forget(self, key: str) -> None:
        with self._lock:
            if (file := self._files.pop(key, None)) is not None:
                self._used_bytes -= file.num_bytes

    def _remove(self, keys: Collection[str]) -> set[Path]:
        """Remove files, known or not; the folders that they were in."""
        touched: set[Path] = set()
        for key in keys:
            self._forget(key)
            path = self.path_of(key)
            if self._unlink(path):
                touched.add(path.parent)
        return touched

    def _unlink(self, path: Path) -> bool:
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as failed:
            raise Unavailable(f"{path}: {os.strerror(failed.errno or 0)}", 5.0) from None
        return True

    def _quarantine(self, path: Path, bad: Corrupt) -> None:
        self.quarantined[type(bad).__name__.lower()] += 1
        log.warning("KV file not used: %s", bad)
        aside = self._folder / "quarantine" / f"{path.stem}.{os.urandom(4).hex()}"
        try:
            os.replace(path, aside)
        except FileNotFoundError:
            return
        except OSError:
            # A folder in a file's place, or a disk that fails: it is not served, which is what counts.
            log.exception("%s could not be moved aside", path)
        self._trim_quarantine()

    def _quarantined(self) -> list[Path]:
        """Files set aside: the name that each had, and an ending of its own."""
        try:
            return [Path(e.path) for e in os.scandir(self._folder / "quarantine")]
        except OSError as failed:
            raise Unavailable(f"{self._folder}: {os.strerror(failed.errno or 0)}", 5.0) from None

    def _trim_quarantine(self) -> None:
        held = sorted(((p.lstat().st_ctime, p) for p in self._quarantined()), reverse=True)
        oldest = time.time() - QUARANTINE_S
        for number, (moved_at, path) in enumerate(held):
            if number >= MAX_QUARANTINED or moved_at < oldest:
                self._discard(path)

    def _discard(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            self._unlink(path)


def _sync(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as failed:
        raise Unavailable(f"{folder}: {os.strerror(failed.errno or 0)}", 5.0) from None
