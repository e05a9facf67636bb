"""Archived cubes as objects: a checked, sealed copy of each beside the catalog's own.

One object a cube: a line that says what it is, the cube, its versions, a line with the checksum of all
before, each JSON. It is a copy; the catalog keeps the texts, so that reading an archived cube, its past
and its lineage needs no object store (docs/adr/0011). The copy mends a catalog whose content no longer
has the hash that was noted, byte for byte.

Order: object first, row second; the row is doomed in the transaction that restores or wipes the cube,
and the object goes in the next round. Names hold digests and ids only.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from memcube.activation.keyring import Keyring
from memcube.catalog import ArchiveRecord, Catalog
from memcube.catalog.schema import micros
from memcube.config import Config
from memcube.cube import Version
from memcube.errors import Corrupt
from memcube.ids import CubeId, TenantId, digest, framed
from memcube.objects import ObjectStore

PREFIX = "archives/"
FORMAT = 1
MAX_BYTES = 256 << 20
_PLAIN, _SEALED = b"memcube-archive plain ", b"memcube-archive sealed\n"
_SALT_CHARS = 32
"""Of hex behind ``_PLAIN``: no two copies are one object, so that removing one never takes another."""
_FIELDS = (
    "id",
    "tenant",
    "shape",
    "version",
    "text",
    "user_id",
    "agent_id",
    "run_id",
    "kind",
    "origin",
    "role",
    "speaker",
    "tags",
    "metadata",
    "sources",
    "parents",
    "created_at",
    "updated_at",
    "event_time",
    "thread",
    "seq",
    "owner",
    "sensitivity",
    "priority",
)
"""What never changes while a cube is archived. Its members may: one that is wiped leaves the list."""

_CONTENT = ("text", "tags", "metadata", "sources", "role", "speaker")
"""What a copy may write back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivedCube:
    """A copy as it is read: the cube's fields and its versions, as rows of the catalog."""

    cube: Mapping[str, Any]
    versions: Sequence[Mapping[str, Any]]
    content_sha256: str


@dataclass(slots=True)
class ArchiveReport:
    """What one round did."""

    copied: int = 0
    removed: int = 0


class Archive:
    """Copies archived cubes, checks copies, and mends by them."""

    def __init__(
        self, catalog: Catalog, objects: ObjectStore, keyring: Keyring | None = None
    ) -> None:
        self._catalog = catalog
        self._book = catalog.archives
        self._objects = objects
        self._keyring = keyring

    async def step(self, now: datetime, *, limit: int) -> ArchiveReport:
        """Copy what waits and remove what is doomed, at most ``limit`` of each.

        Raises:
            Unavailable, StorageFull: the object store can't take or answer. What was done stays done.
        """
        report = ArchiveReport()
        for record in await asyncio.to_thread(self._book.doomed, limit=limit):
            await self.remove(record)
            report.removed += 1
        for tenant, id in await asyncio.to_thread(self._book.waiting, now=now, limit=limit):
            report.copied += await self.copy(tenant, id, now=now)
        return report

    async def copy(self, tenant: TenantId, id: CubeId, *, now: datetime) -> bool:
        """Make and note a copy of an archived cube; whether it is still wanted."""
        found = await asyncio.to_thread(self._book.contents, tenant, id)
        if found is None:
            return False
        row, versions = found
        lines = encode(row, versions)
        data = await asyncio.to_thread(self._sealed, tenant, id, lines)
        sha256 = hashlib.sha256(data).hexdigest()
        await self._objects.put(name_of(tenant, id, sha256), data)
        record = ArchiveRecord(
            tenant=tenant,
            cube=id,
            version=row["version"],
            sha256=sha256,
            content_sha256=hashlib.sha256(lines).hexdigest(),
            size_bytes=len(data),
            created_at=now,
        )
        if await asyncio.to_thread(self._book.note, record):
            return True
        # Restored or wiped meanwhile. A crash here leaves an object that the doctor finds.
        await self._objects.delete(name_of(tenant, id, sha256))
        return False

    async def read(self, record: ArchiveRecord) -> ArchivedCube:
        """A copy, checked.

        Raises:
            NotFound: the object is gone. Corrupt: it is damaged, or sealed with a key that is not here.
        """
        name = name_of(record.tenant, record.cube, record.sha256)
        data = await self._objects.get_range(name, 0, MAX_BYTES + 1)
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise Corrupt(name, "has not the bytes that were noted")
        lines = await asyncio.to_thread(self._unsealed, record, data, name)
        if hashlib.sha256(lines).hexdigest() != record.content_sha256:
            raise Corrupt(name, "has not the content that was noted")
        return decode(lines, where=name)

    async def agrees(self, record: ArchiveRecord) -> bool:
        """Whether the catalog holds what was copied; True also where the cube moved on meanwhile."""
        found = await asyncio.to_thread(self._book.contents, record.tenant, record.cube)
        if found is None or found[0]["version"] != record.version:
            return True
        return hashlib.sha256(encode(*found)).hexdigest() == record.content_sha256

    async def put_back(self, record: ArchiveRecord) -> bool:
        """Write a copy's content over the catalog's; False where the cube moved on meanwhile.

        Raises:
            NotFound, Corrupt: see ``read``.
        """
        held = await self.read(record)
        content = {name: held.cube[name] for name in _CONTENT}
        return await asyncio.to_thread(self._book.put_back, record, content, held.versions)

    async def replace(self, record: ArchiveRecord, *, now: datetime) -> bool:
        """Make a new copy in the place of one that is missing or damaged."""
        await asyncio.to_thread(self._book.lost, record)
        done = await self.copy(record.tenant, record.cube, now=now)
        await self.remove(record)
        return done

    async def remove(self, record: ArchiveRecord) -> None:
        """Delete a doomed copy. Idempotent."""
        await self._objects.delete(name_of(record.tenant, record.cube, record.sha256))
        await asyncio.to_thread(self._book.removed, record)

    def _sealed(self, tenant: TenantId, id: CubeId, lines: bytes) -> bytes:
        if self._keyring is None:
            return _PLAIN + os.urandom(_SALT_CHARS // 2).hex().encode() + b"\n" + lines
        return _SEALED + self._keyring.get(tenant).seal(lines, framed("archive", id))

    def _unsealed(self, record: ArchiveRecord, data: bytes, name: str) -> bytes:
        if data.startswith(_PLAIN):
            return data[len(_PLAIN) + _SALT_CHARS + 1 :]
        if not data.startswith(_SEALED):
            raise Corrupt(name, "is no archive")
        cipher = None if self._keyring is None else self._keyring.find(record.tenant)
        about = framed("archive", record.cube)
        lines = None if cipher is None else cipher.unseal(data[len(_SEALED) :], about)
        if lines is None:
            raise Corrupt(name, "is sealed with a key that is not here (archive.keyring)")
        return lines


def archive_of(catalog: Catalog, objects: ObjectStore, config: Config) -> Archive:
    """The archive, with the keys of this node's data folder where copies are sealed."""
    sealed = config.lifecycle.archive_encrypt
    keyring = Keyring(Path(config.data_dir) / "archive.keyring") if sealed else None
    return Archive(catalog, objects, keyring)


def name_of(tenant: TenantId, id: CubeId, sha256: str) -> str:
    """Where a copy lies."""
    return f"{PREFIX}{digest('tenant', tenant)}/{id}.{sha256}"


def encode(row: Mapping[str, Any], versions: Sequence[Version]) -> bytes:
    """The lines of a copy. The same content gives the same bytes."""
    lines = [
        _line({"format": FORMAT, "num_versions": len(versions)}),
        _line({name: row[name] for name in _FIELDS}),
        *(_line(_version_row(row["id"], version)) for version in versions),
    ]
    body = b"".join(lines)
    return body + _line({"sha256": hashlib.sha256(body).hexdigest()})


def decode(lines: bytes, *, where: str) -> ArchivedCube:
    """What a copy holds.

    Raises:
        Corrupt: it is not whole, or of another format.
    """
    body, _, _ = lines.removesuffix(b"\n").rpartition(b"\n")
    try:
        head, cube, *versions, tail = [json.loads(line) for line in lines.splitlines()]
        if head["format"] != FORMAT or head["num_versions"] != len(versions):
            raise ValueError("of another format or length")
        if tail["sha256"] != hashlib.sha256(body + b"\n").hexdigest():
            raise ValueError("checksum")
        if set(cube) != set(_FIELDS):
            raise ValueError("fields")
    except (ValueError, KeyError, TypeError, RecursionError) as broken:
        raise Corrupt(where, f"is no archive ({type(broken).__name__}: {broken})") from None
    return ArchivedCube(
        cube=cube, versions=versions, content_sha256=hashlib.sha256(lines).hexdigest()
    )


def _version_row(id: str, version: Version) -> dict[str, Any]:
    return {
        "cube": id,
        "version": version.version,
        "text": version.text,
        "members": list(version.members),
        "tags": list(version.tags),
        "metadata": dict(version.metadata),
        "created_at": micros(version.created_at),
        "author": version.author,
        "reason": version.reason,
    }


def _line(value: Mapping[str, Any]) -> bytes:
    # ASCII only: no character of a text can end a line.
    return (
        json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    )


__all__ = [
    "PREFIX",
    "Archive",
    "ArchiveReport",
    "ArchivedCube",
    "archive_of",
    "decode",
    "encode",
    "name_of",
]
