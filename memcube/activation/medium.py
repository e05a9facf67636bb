"""A medium of KV below the device, and the nearest one, the host's memory."""

import mmap
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from memcube.activation.payload import KvPayload
from memcube.activation.quantise import Arrays
from memcube.errors import Corrupt
from memcube.policies.retention import Item


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known of a payload, wherever it lies. ``members`` are the cubes whose text is in it,
    and the adapter that it was built with, by name."""

    item: Item
    members: frozenset[str] = frozenset()

    @property
    def key(self) -> str:
        return self.item.key

    def note(self) -> dict[str, Any]:
        """What a file or an index keeps of it."""
        item = self.item
        return {
            "tenant": item.tenant,
            "group": item.group,
            "saves_s": item.saves_s,
            "num_bytes": item.num_bytes,
            "parent": item.parent,
            "members": sorted(self.members),
        }

    @classmethod
    def of_note(cls, where: str, key: str, note: Mapping[str, Any]) -> "Record":
        """
        Raises:
            Corrupt: it is no such note.
        """
        tenant, group, saves_s = note.get("tenant"), note.get("group"), note.get("saves_s")
        num_bytes, parent, members = note.get("num_bytes"), note.get("parent"), note.get("members")
        if (
            not isinstance(tenant, str)
            or not isinstance(group, str)
            or not isinstance(saves_s, int | float)
            or type(num_bytes) is not int
            or num_bytes < 0
            or not isinstance(parent, str | None)
            or not isinstance(members, list)
            or not all(isinstance(member, str) for member in members)
        ):
            raise Corrupt(where, "does not say whose it is")
        item = Item(
            key=key,
            num_bytes=num_bytes,
            tenant=tenant,
            group=group,
            saves_s=float(saves_s),
            load_s=0.0,
            parent=parent,
        )
        return cls(item=item, members=frozenset(members))


class Medium(Protocol):
    """Where payloads lie. It knows nothing of capacity: what stays is the hierarchy's to say.

    All calls block and may come from any thread, those on one key one at a time; only ``get`` may
    meet another call on its key, and then finds the payload or doesn't.
    """

    name: str
    remote: bool
    """Whether it may be long in answering, and others change it: it has ``refresh`` to tell of that."""

    def size_of(self, num_bytes: int) -> int:
        """The bytes that a payload of so many takes here, about."""
        ...

    def put(self, payload: KvPayload, record: Record) -> None:
        """Keep a payload. One that is here already is replaced.

        Raises:
            StorageFull, Unavailable, LimitExceeded: it is not kept; nothing else changed.
        """
        ...

    def get(self, key: str) -> KvPayload | None:
        """A payload that passed its check, or None. One that is damaged is gone from here then."""
        ...

    def evict(self, keys: Collection[str]) -> None:
        """Make room. Does not raise for what is not here."""
        ...

    def delete(self, keys: Collection[str]) -> None:
        """Remove payloads so that no one can read them here again, after a restart neither.

        Raises:
            Unavailable: some may still be here, though not for ``get``. Repeat the call.
        """
        ...

    def delete_tenant(self, tenant: str) -> None:
        """Remove what the hierarchy doesn't know of, of a tenant whose known payloads are deleted."""
        ...

    def __contains__(self, key: str) -> bool: ...

    def records(self) -> list[Record]:
        """What is here, least recently used first."""
        ...

    @property
    def used_bytes(self) -> int: ...

    def flush(self) -> None:
        """Finish what was put off."""
        ...

    def refresh(self) -> None:
        """Learn of what others have put here or removed."""
        ...

    def close(self) -> None: ...


class SharedArrays(Protocol):
    """Memory for arrays that other processes of the node can map, such as Ray's object store."""

    def put(self, arrays: Arrays) -> Any:
        """A handle on arrays that stay as they are until it is dropped.

        Raises:
            StorageFull: there is no room.
        """
        ...

    def get(self, handle: Any) -> Arrays | None:
        """The arrays, without a copy; None where they were lost."""
        ...

    def drop(self, handle: Any) -> None: ...


class LocalArrays:
    """The memory of this process."""

    def put(self, arrays: Arrays) -> Any:
        # What is mapped from a file would not be in memory, and go with the page cache.
        return {name: a.copy() if _is_mapped(a) else a for name, a in arrays.items()}

    def get(self, handle: Any) -> Arrays | None:
        return handle

    def drop(self, handle: Any) -> None:
        """The garbage collector's."""


class _Held(NamedTuple):
    about: dict[str, Any]
    record: Record
    handle: Any
    num_bytes: int


class HostMedium:
    """The node's memory."""

    name = "host"
    remote = False

    def __init__(self, arrays: SharedArrays | None = None) -> None:
        self._arrays = arrays or LocalArrays()
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._used_bytes = 0

    def size_of(self, num_bytes: int) -> int:
        return num_bytes

    def put(self, payload: KvPayload, record: Record) -> None:
        about = {
            "key": payload.key,
            "kind": payload.kind,
            "num_tokens": payload.num_tokens,
            "layout": payload.layout,
            "codec": payload.codec,
            "model": payload.model,
        }
        held = _Held(about, record, self._arrays.put(payload.arrays), payload.num_bytes)
        with self._lock:
            old = self._held.pop(payload.key, None)
            self._held[payload.key] = held
            self._used_bytes += held.num_bytes - (old.num_bytes if old else 0)
        if old is not None:
            self._arrays.drop(old.handle)

    def get(self, key: str) -> KvPayload | None:
        with self._lock:
            held = self._held.get(key)
        if held is None:
            return None
        arrays = self._arrays.get(held.handle)
        if arrays is None:
            self.evict([key])
            return None
        return KvPayload(**held.about, arrays=arrays)

    def handle(self, key: str) -> Any | None:
        """What another process of the node gets the arrays by; None where they are not here."""
        with self._lock:
            held = self._held.get(key)
        return held.handle if held else None

    def evict(self, keys: Collection[str]) -> None:
        with self._lock:
            gone = [self._held.pop(key) for key in keys if key in self._held]
            self._used_bytes -= sum(held.num_bytes for held in gone)
        for held in gone:
            self._arrays.drop(held.handle)

    def delete(self, keys: Collection[str]) -> None:
        self.evict(keys)

    def delete_tenant(self, tenant: str) -> None:
        """All that is here is known."""

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def records(self) -> list[Record]:
        with self._lock:
            return [held.record for held in self._held.values()]

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def flush(self) -> None:
        """Nothing is put off."""

    def refresh(self) -> None:
        """No other changes it."""

    def close(self) -> None:
        self.evict([*self._held])


def _is_mapped(array: np.ndarray) -> bool:
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return isinstance(base, mmap.mmap)
