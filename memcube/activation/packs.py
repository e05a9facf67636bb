"""The object store as a medium: payloads packed into objects of some megabytes.

A pack is files of ``memcube.activation.payload`` one after another. Its index, an object beside it, says
what lies where; it is written after the pack and removed before it, so an index never tells of what
isn't there. Both are written once. A payload is read by a range of its pack.

Names are ``PREFIX/MODEL/WRITER/ID.pack`` and ``….index``, the first two after the prefix digests. Each
node is one writer and reads all. Only a pack's writer makes it anew without some of its payloads;
another node that has to delete one removes the whole pack, since a cache may lose what it need not.
So no two nodes ever change one object, and no conditional request is needed. What one node deletes the
others don't find in its pack any more; ``refresh`` learns of new packs.

``evict`` drops the entry and leaves the bytes until half of a pack is dead. ``delete`` takes the bytes
too before it returns.
"""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from memcube.activation import payload as files
from memcube.activation.keyring import Keyring, TenantCipher
from memcube.activation.layout import KvLayout
from memcube.activation.medium import Record
from memcube.activation.payload import Foreign, KvPayload
from memcube.errors import Corrupt, MemCubeError, NotFound
from memcube.ids import TenantId, digest
from memcube.objects.blocking import BlockingObjects

log = logging.getLogger(__name__)

PACK_BYTES = 16 * 1024 * 1024
_FORMAT = 1
_PACK, _INDEX = ".pack", ".index"
_HEADER_ALLOWANCE = 2048


class _Place(NamedTuple):
    """Where a payload lies in its pack."""

    start: int
    length: int
    record: Record


@dataclass(slots=True, eq=False)
class _Pack:
    """``name`` is without its ending. ``dead`` are those evicted: their bytes are there still."""

    name: str
    live: dict[str, _Place]
    dead: dict[str, _Place] = field(default_factory=dict)

    @property
    def wasteful(self) -> bool:
        live, dead = (sum(p.length for p in d.values()) for d in (self.live, self.dead))
        return dead > live

    def bury(self, key: str) -> None:
        self.dead[key] = self.live.pop(key)


class _Waiting(NamedTuple):
    """A payload that is in no pack yet, as the bytes of its file."""

    data: bytes
    record: Record


class ObjectMedium:
    """Packs of one model under a prefix of an object store. One process at a time is a writer."""

    name = "object"
    remote = True

    def __init__(
        self,
        objects: BlockingObjects,
        *,
        writer: str,
        model: str,
        layout: KvLayout,
        keyring: Keyring | None = None,
        prefix: str = "kv",
        pack_bytes: int = PACK_BYTES,
    ) -> None:
        """Reads the indexes of the model, and removes what crashes of this writer left.

        Raises:
            Unavailable: the store doesn't answer.
        """
        self._objects = objects
        self._model = model
        self._layout = layout
        self._keyring = keyring
        self._prefix = f"{prefix}/"
        self._of_model = f"{prefix}/{_model_part(model)}/"
        self._own = f"{self._of_model}{digest('kv writer', writer)[:24]}/"
        self._pack_bytes = pack_bytes
        self._writing = threading.Lock()
        """Held while packs are written, made anew or removed. Taken before ``_lock``."""
        self._lock = threading.Lock()
        self._packs: dict[str, _Pack] = {}
        self._pack_of: dict[str, _Pack] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._condemned: set[str] = set()
        """Packs that hold something deleted; not empty only after a failure of the store."""
        self.damaged = 0
        """Payloads and indexes that failed their check."""
        with self._writing:
            self._remove_leftovers()
            self._refresh()

    def size_of(self, num_bytes: int) -> int:
        return num_bytes + _HEADER_ALLOWANCE

    def put(self, payload: KvPayload, record: Record) -> None:
        cipher = self._keyring and self._keyring.get(TenantId(record.item.tenant))
        data = b"".join(files.serialised(payload, cipher, record.note()))
        with self._lock:
            self._drop([payload.key])
            self._waiting[payload.key] = _Waiting(data, record)
            full = sum(len(one.data) for one in self._waiting.values()) >= self._pack_bytes
        if full:
            self.flush()

    def get(self, key: str) -> KvPayload | None:
        for _ in range(2):  # again where the pack was made anew in the meantime
            with self._lock:
                waiting, pack = self._waiting.get(key), self._pack_of.get(key)
                place = pack.live[key] if pack else None
            if waiting is not None:
                return self._parsed("a pack to be written", key, waiting.data, waiting.record)
            if pack is None or place is None:
                return None
            try:
                data = self._objects.get_range(pack.name + _PACK, place.start, place.length)
            except NotFound:
                with self._lock:
                    self._forget(pack)
                continue
            return self._parsed(pack.name, key, data, place.record)
        return None

    def evict(self, keys: Collection[str]) -> None:
        with self._lock:
            self._drop(keys)

    def delete(self, keys: Collection[str]) -> None:
        wanted = {*keys}
        with self._writing:
            self._purge_all(lambda record: record.key in wanted)

    def delete_tenant(self, tenant: str) -> None:
        """Of all models and writers. An index that can't be read goes with its pack."""

        def holds(record: Record) -> bool:
            return record.item.tenant == tenant

        with self._writing:
            self._purge_all(holds)
            for name in self._listed(self._prefix, _INDEX) - self._packs.keys():
                pack = self._read_index(name)
                if pack is None or any(holds(place.record) for place in pack.live.values()):
                    self._remove(name)

    def __contains__(self, key: str) -> bool:
        return key in self._waiting or key in self._pack_of

    def records(self) -> list[Record]:
        with self._lock:
            packed = [place.record for pack in self._packs.values() for place in pack.live.values()]
            return packed + [one.record for one in self._waiting.values()]

    @property
    def used_bytes(self) -> int:
        with self._lock:
            packed = sum(p.length for pack in self._packs.values() for p in pack.live.values())
            return packed + sum(len(one.data) for one in self._waiting.values())

    def flush(self) -> None:
        """Write what waits as a pack, and make packs that are mostly dead anew.

        Raises:
            Unavailable, StorageFull: what waited is dropped, so that memory stays bounded.
        """
        with self._writing:
            with self._lock:
                batch = dict(self._waiting)
            if batch:
                try:
                    pack = self._write((key, one.data, one.record) for key, one in batch.items())
                except MemCubeError:
                    with self._lock:
                        for key, one in batch.items():
                            if self._waiting.get(key) is one:
                                del self._waiting[key]
                    raise
                with self._lock:
                    for key, one in batch.items():
                        if self._waiting.get(key) is one:
                            del self._waiting[key]
                        else:  # evicted or replaced in the meantime
                            pack.bury(key)
                    self._add(pack)
            with self._lock:
                wasteful = {p.name for p in self._packs.values() if p.wasteful}
            self._condemned |= {name for name in wasteful if name.startswith(self._own)}
            self._purge()

    def refresh(self) -> None:
        """Learn of packs that other nodes have written or removed.

        Raises:
            Unavailable: the store doesn't answer.
        """
        with self._writing:
            self._refresh()

    def close(self) -> None:
        try:
            self.flush()
        except MemCubeError as failed:
            log.warning("KV was not written to the object store: %s", failed)

    def _parsed(self, where: str, key: str, data: bytes, record: Record) -> KvPayload | None:
        try:
            cipher = self._cipher(record)
            return files.parse(
                data, where=where, key=key, model=self._model, layout=self._layout, cipher=cipher
            )
        except Corrupt as bad:
            log.warning("KV of an object not used: %s", bad)
            with self._lock:
                self.damaged += 1
                self._drop([key])
            return None

    def _cipher(self, record: Record) -> TenantCipher | None:
        if self._keyring is None:
            return None
        cipher = self._keyring.find(TenantId(record.item.tenant))
        if cipher is None:
            raise Foreign(record.key, "is of a tenant whose key is gone")
        return cipher

    def _drop(self, keys: Iterable[str]) -> None:
        """Under ``_lock``."""
        for key in keys:
            self._waiting.pop(key, None)
            if (pack := self._pack_of.pop(key, None)) is not None:
                pack.bury(key)

    def _add(self, pack: _Pack) -> None:
        """Under ``_lock``. Of a key in two packs the one known first is used."""
        self._packs[pack.name] = pack
        for key in [*pack.live]:
            if self._pack_of.setdefault(key, pack) is not pack:
                pack.bury(key)

    def _forget(self, pack: _Pack) -> None:
        """Under ``_lock``."""
        self._packs.pop(pack.name, None)
        for key in pack.live:
            if self._pack_of.get(key) is pack:
                del self._pack_of[key]

    def _condemn(self, holds: Callable[[Record], bool]) -> None:
        """From now on what matches is not got, and its packs are to go."""
        with self._lock:
            for key in [k for k, one in self._waiting.items() if holds(one.record)]:
                del self._waiting[key]
            for pack in self._packs.values():
                matching = [
                    k for d in (pack.live, pack.dead) for k, p in d.items() if holds(p.record)
                ]
                if matching:
                    self._condemned.add(pack.name)
                    self._drop(key for key in matching if key in pack.live)

    def _purge_all(self, holds: Callable[[Record], bool]) -> None:
        self._condemn(holds)  # first what needs no answer of the store
        self._refresh()
        self._condemn(holds)
        self._purge()

    def _purge(self) -> None:
        """Take condemned packs out of the store; what lives in our own goes into new ones."""
        for name in [*self._condemned]:
            with self._lock:
                pack = self._packs.get(name)
                kept = dict(pack.live) if pack else {}
            if pack is not None and kept and name.startswith(self._own):
                self._write_anew(pack, kept)
            self._remove(name)
            self._condemned.discard(name)

    def _write_anew(self, pack: _Pack, kept: dict[str, _Place]) -> None:
        try:
            whole = memoryview(self._objects.get(pack.name + _PACK))
        except NotFound:
            return
        new = self._write(
            (key, bytes(whole[place.start : place.start + place.length]), place.record)
            for key, place in kept.items()
        )
        with self._lock:
            for key in [*new.live]:
                if self._pack_of.get(key) is pack:
                    self._pack_of[key] = new
                    pack.bury(key)
                else:  # evicted in the meantime
                    new.bury(key)
            self._packs[new.name] = new

    def _write(self, entries: Iterable[tuple[str, bytes, Record]]) -> _Pack:
        name = self._own + os.urandom(12).hex()
        pack = _Pack(name, {})
        data = bytearray()
        for key, body, record in entries:
            pack.live[key] = _Place(len(data), len(body), record)
            data += body
        try:
            self._objects.put(name + _PACK, data)
            self._objects.put(name + _INDEX, _index_bytes(pack))
        except MemCubeError:
            try:
                self._remove(name)
            except MemCubeError as failed:
                # Without an index it is read by no one, and the next start removes it.
                log.warning("half a pack stays in the object store: %s", failed)
            raise
        return pack

    def _remove(self, name: str) -> None:
        with self._lock:
            if (pack := self._packs.get(name)) is not None:
                self._forget(pack)
        self._objects.delete(name + _INDEX)
        self._objects.delete(name + _PACK)

    def _remove_leftovers(self) -> None:
        """What this writer's crashes left: packs without an index, and indexes that can't be read."""
        whole = self._listed(self._own, _INDEX)
        for name in self._listed(self._own, _PACK) - whole:
            self._remove(name)
        for name in whole:
            if self._read_index(name) is None:
                self._remove(name)

    def _refresh(self) -> None:
        found = self._listed(self._of_model, _INDEX)
        with self._lock:
            for gone in self._packs.keys() - found:
                self._forget(self._packs[gone])
            new = found - self._packs.keys()
        for name in sorted(new):
            if (pack := self._read_index(name)) is not None:
                with self._lock:
                    self._add(pack)

    def _listed(self, prefix: str, ending: str) -> set[str]:
        names = (found.name for found in self._objects.list(prefix))
        return {name.removesuffix(ending) for name in names if name.endswith(ending)}

    def _read_index(self, name: str) -> _Pack | None:
        """A pack by its index; None where that can't be read. One that is gone holds nothing."""
        try:
            return _Pack(name, _read_index(name, self._objects.get(name + _INDEX)))
        except NotFound:
            return _Pack(name, {})
        except Corrupt as bad:
            self.damaged += 1
            log.warning("index of KV not used: %s", bad)
            return None


def remove_models(objects: BlockingObjects, *, keep: Collection[str], prefix: str = "kv") -> int:
    """Remove the packs of all models but these, of all writers; the number of objects removed.

    KV of a model that nobody runs is of no use, and still tells the text that it is of.
    """
    kept = tuple(f"{prefix}/{_model_part(model)}/" for model in keep)
    gone = [found.name for found in objects.list(f"{prefix}/") if not found.name.startswith(kept)]
    for name in sorted(gone, key=lambda name: not name.endswith(_INDEX)):
        objects.delete(name)
    return len(gone)


def _model_part(model: str) -> str:
    return digest("kv model", model)[:24]


def _index_bytes(pack: _Pack) -> bytes:
    entries = [
        {"key": key, "start": place.start, "length": place.length, "note": place.record.note()}
        for key, place in pack.live.items()
    ]
    text = json.dumps({"format": _FORMAT, "entries": entries}, separators=(",", ":")).encode()
    return hashlib.sha256(text).hexdigest().encode() + b"\n" + text


def _read_index(where: str, data: bytes) -> dict[str, _Place]:
    stated, _, text = data.partition(b"\n")
    if stated != hashlib.sha256(text).hexdigest().encode():
        raise Corrupt(where, "does not have the bytes that were written (checksum)")
    try:
        told: Any = json.loads(text)
        if told["format"] != _FORMAT:
            raise Foreign(where, f"is of format {str(told['format'])[:20]!r}, not {_FORMAT}")
        places: dict[str, _Place] = {}
        for entry in told["entries"]:
            key, start, length = str(entry["key"]), int(entry["start"]), int(entry["length"])
            if start < 0 or length < 0:
                raise ValueError("a range below 0")
            places[key] = _Place(start, length, Record.of_note(where, key, entry["note"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as broken:
        raise Corrupt(where, f"is no index of a pack ({type(broken).__name__})") from None
    return places
