"""One key per tenant for the KV of a node, so that to forget the key is to forget the KV.

The keys lie in one small file, 0600, in the node's data folder, beside and not in the folder of the
KV. ``forget`` takes a tenant's key out of it before it returns: from then on every payload sealed with
it is noise, wherever a copy of it lies, and a key made later is another one. The old file's bytes are
overwritten before they are given up; a file system or a disk that writes elsewhere keeps them for a
while. Whoever loses the file loses a cache and nothing else.

Any number of processes may use one file. Each asks at every use whether it has changed, so that a key
which one has forgotten no other goes on using.
"""

import base64
import contextlib
import fcntl
import json
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from memcube.errors import BadRequest, Corrupt
from memcube.ids import TenantId, framed

_KEY_BYTES, _NONCE_BYTES = 32, 12
_FORMAT = 1


class TenantCipher:
    """AES-256-GCM under one tenant's key, with a random nonce before each sealed text."""

    def __init__(self, tenant: TenantId, key: bytes) -> None:
        self._tenant = tenant
        self._cipher = AESGCM(key)

    def seal(self, plain: bytes, about: bytes) -> bytes:
        """Sealed bytes that only this key opens, and only with the same ``about``."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plain, framed(self._tenant, about))

    def unseal(self, sealed: bytes, about: bytes) -> bytes | None:
        """The plain bytes; None where the key, the bytes or what they are about differ."""
        nonce, rest = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        if len(nonce) < _NONCE_BYTES:
            return None
        try:
            return self._cipher.decrypt(nonce, rest, framed(self._tenant, about))
        except InvalidTag:
            return None


class Keyring:
    """The keys in one file. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            BadRequest: the file may be read by others than its owner.
            Corrupt: it is damaged. Remove it, and the KV sealed by it, to begin anew.
        """
        self._path = path
        self._lock = threading.RLock()
        self._seen: tuple[int, ...] | None = None
        self._ciphers: dict[TenantId, TenantCipher] = {}
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._refresh()

    def find(self, tenant: TenantId) -> TenantCipher | None:
        """The tenant's cipher, or None where it has no key (any more)."""
        with self._lock:
            self._refresh()
            return self._ciphers.get(tenant)

    def get(self, tenant: TenantId) -> TenantCipher:
        """The tenant's cipher, with a new key where it has none."""
        if (found := self.find(tenant)) is not None:
            return found
        with self._changing() as keys:
            if tenant not in keys:
                keys[tenant] = os.urandom(_KEY_BYTES)
        return self.get(tenant)

    def forget(self, tenant: TenantId) -> None:
        """Destroy the tenant's key. One that has none is no error."""
        if self.find(tenant) is None:
            return
        with self._changing() as keys:
            keys.pop(tenant, None)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[TenantId, bytes]]:
        """The keys, written back afterwards; one process at a time."""
        with self._lock, open(self._path.with_suffix(".lock"), "a", opener=_private) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = self._read()
            yield keys
            self._write(keys)
            self._refresh()

    def _refresh(self) -> None:
        try:
            about = os.stat(self._path)
        except FileNotFoundError:
            self._seen, self._ciphers = None, {}
            return
        if about.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise BadRequest(f"may be read by others; chmod 600 {self._path}", "keyring")
        seen = about.st_ino, about.st_mtime_ns, about.st_ctime_ns, about.st_size
        if seen != self._seen:
            self._ciphers = {tenant: TenantCipher(tenant, k) for tenant, k in self._read().items()}
            self._seen = seen

    def _read(self) -> dict[TenantId, bytes]:
        try:
            told = json.loads(self._path.read_text())
            if told["format"] != _FORMAT:
                raise ValueError("another format")
            keys = {
                TenantId(t): base64.b64decode(k, validate=True) for t, k in told["keys"].items()
            }
            if not all(len(key) == _KEY_BYTES for key in keys.values()):
                raise ValueError("a key of another length")
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as broken:
            # The text of the error may hold a piece of a key.
            raise Corrupt(str(self._path), f"is no keyring ({type(broken).__name__})") from None
        return keys

    def _write(self, keys: dict[TenantId, bytes]) -> None:
        """Replace the file, durably, and overwrite the bytes of the old one."""
        text = {t: base64.b64encode(key).decode() for t, key in keys.items()}
        temporary = self._path.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        with open(temporary, "x", opener=_private) as file:
            json.dump({"format": _FORMAT, "keys": text}, file)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.ExitStack() as held:
            old = None
            with contextlib.suppress(FileNotFoundError):
                old = held.enter_context(open(self._path, "r+b", buffering=0))
            os.replace(temporary, self._path)
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            if old is not None:
                old.write(bytes(os.fstat(old.fileno()).st_size))
                os.fsync(old.fileno())


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
