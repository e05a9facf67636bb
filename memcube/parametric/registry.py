"""Where adapters are kept: weights and manifests among the objects, versions and states in the catalog.

An adapter's file is named by its tenant and its SHA-256, which the catalog knows: what is loaded is
what was published, or it is refused. The manifest beside it says in JSON how it came to be; nothing
that serves reads it. Files come first and the catalog's row last, so a crash leaves files that no one
asks for, never a row without its file.

``AdapterFiles`` is all that an engine needs; ``AdapterRegistry`` is for those who publish and decide. Gateways
import this too: torch comes with the first file that is read or written.
"""

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from memcube.activation.contract import AdapterRef
from memcube.catalog import AdapterBook, AdapterRecord, NewAdapter
from memcube.cube import Scope
from memcube.errors import Corrupt, NotFound
from memcube.ids import CubeId, TenantId, digest
from memcube.objects import ObjectStore
from memcube.parametric.limits import AdapterLimits

if TYPE_CHECKING:
    from memcube.parametric.weights import AdapterWeights

MANIFEST_FORMAT = 1
MAX_MANIFEST_BYTES = 4 << 20
READ_BYTES = 4 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """How an adapter came to be. ``report`` is the gate's; ``parent`` the version it goes on from.

    All of it is JSON, and none of it holds a memory's text, which a deletion would have to reach.
    """

    recipe: Mapping[str, Any]
    seed: int
    data_sha256: str
    report: Mapping[str, Any] = field(default_factory=dict)
    parent: int | None = None


class AdapterFiles:
    """The files of adapters among the objects."""

    def __init__(self, objects: ObjectStore, limits: AdapterLimits | None = None) -> None:
        self._objects = objects
        self.limits = limits or AdapterLimits()

    async def put(
        self, tenant: TenantId, weights: "AdapterWeights", manifest: Mapping[str, Any]
    ) -> tuple[str, int]:
        """Keep an adapter; the SHA-256 of its file, and its size. Durable and idempotent.

        Raises:
            BadRequest: a weight is no finite number. LimitExceeded: too large.
        """
        data = await asyncio.to_thread(_encode, weights, self.limits)
        sha256 = hashlib.sha256(data).hexdigest()
        about = {
            **manifest,
            "format": MANIFEST_FORMAT,
            "base": weights.base,
            "rank": weights.rank,
            "alpha": weights.alpha,
            "targets": weights.targets,
            "size_bytes": len(data),
            "sha256": sha256,
        }
        text = json.dumps(about, allow_nan=False, sort_keys=True).encode()
        await self._objects.put(_name(tenant, sha256, "safetensors"), data)
        await self._objects.put(_name(tenant, sha256, "json"), text)
        return sha256, len(data)

    async def get(self, tenant: TenantId, ref: AdapterRef, *, base: str) -> "AdapterWeights":
        """The weights of an adapter. Its version is its file's SHA-256: see ``reference``.

        Raises:
            NotFound: no such file of this tenant's.
            Corrupt: it is damaged. Conflict: it is for another base model. LimitExceeded.
        """
        if not _SHA256.fullmatch(ref.version):
            raise NotFound("adapter", ref.id)
        name = _name(tenant, ref.version, "safetensors")
        try:
            data = await self._objects.get_range(name, 0, self.limits.max_bytes + 1)
        except NotFound:
            raise NotFound("adapter", ref.id) from None
        return await asyncio.to_thread(
            _decode,
            data,
            where=f"adapter {ref.id}",
            sha256=ref.version,
            base=base,
            limits=self.limits,
        )

    async def manifest(self, tenant: TenantId, sha256: str) -> dict[str, Any]:
        """How an adapter came to be.

        Raises:
            NotFound: none of this tenant's. Corrupt: it can't be read.
        """
        name = _name(tenant, sha256, "json")
        data = await self._objects.get_range(name, 0, MAX_MANIFEST_BYTES)
        try:
            about = json.loads(data)
            if about["format"] != MANIFEST_FORMAT or about["sha256"] != sha256:
                raise ValueError("of another adapter or format")
        except (ValueError, KeyError, TypeError, RecursionError) as broken:
            raise Corrupt(name, f"is no manifest ({type(broken).__name__})") from None
        return about

    async def whole(self, tenant: TenantId, sha256: str) -> bool:
        """Whether an adapter's file has the bytes that its name says; read in parts.

        Raises:
            NotFound: there is none.
        """
        name, found, start = self.names(tenant, sha256)[0], hashlib.sha256(), 0
        while part := await self._objects.get_range(name, start, READ_BYTES):
            found.update(part)
            start += len(part)
        return found.hexdigest() == sha256

    @staticmethod
    def names(tenant: TenantId, sha256: str) -> tuple[str, str]:
        """The objects that an adapter is: its weights and its manifest."""
        return _name(tenant, sha256, "safetensors"), _name(tenant, sha256, "json")

    async def erase(self, tenant: TenantId, sha256: str) -> None:
        """Remove an adapter's files. Idempotent."""
        for name in self.names(tenant, sha256):
            await self._objects.delete(name)


class AdapterRegistry:
    """Publishes adapters and says which of them serve."""

    def __init__(self, files: AdapterFiles, book: AdapterBook) -> None:
        self.files = files
        self._book = book

    async def publish(
        self,
        scope: Scope,
        name: str,
        weights: "AdapterWeights",
        *,
        cubes: Mapping[CubeId, int],
        provenance: Provenance,
        now: datetime,
    ) -> AdapterRecord:
        """Keep an adapter as the newest version of its name: a candidate, which serves no one yet.

        Raises:
            Conflict: a cube has changed since it was read, or the name is of another scope.
            BadRequest, LimitExceeded: the weights, or the name, can't be.
        """
        manifest = {
            "name": name,
            "recipe": dict(provenance.recipe),
            "seed": provenance.seed,
            "data_sha256": provenance.data_sha256,
            "report": dict(provenance.report),
            "parent": provenance.parent,
            "cubes": sorted(cubes.items()),
            "created_at": now.isoformat(),
        }
        sha256, size_bytes = await self.files.put(scope.tenant, weights, manifest)
        new = NewAdapter(
            name=name,
            scope=scope,
            base=weights.base,
            sha256=sha256,
            size_bytes=size_bytes,
            rank=weights.rank,
            cubes=cubes,
        )
        return await asyncio.to_thread(lambda: self._book.add(scope.tenant, new, now=now))

    async def activate(
        self, tenant: TenantId, id: str, version: int, *, now: datetime
    ) -> AdapterRecord:
        """Let a version serve, once its file is found whole.

        Raises:
            NotFound: no such version, or its file is gone.
            Corrupt: its file is damaged. Conflict: a cube inside has changed.
        """
        record = await asyncio.to_thread(lambda: self._book.get(tenant, id, version))
        await self.files.get(tenant, reference(record), base=record.base)
        return await asyncio.to_thread(lambda: self._book.activate(tenant, id, version, now=now))

    async def erase_stale(self, *, now: datetime, limit: int = 100) -> int:
        """Remove the files of versions, of any tenant, that hold what was changed or deleted; how many
        versions those were. A file that another version shares which isn't stale stays. Idempotent.
        """
        records = await asyncio.to_thread(lambda: self._book.to_erase(limit=limit))
        for record in records:
            if not await asyncio.to_thread(self._book.is_shared, record):
                await self.files.erase(record.line.scope.tenant, record.sha256)
            await asyncio.to_thread(lambda r=record: self._book.erased(r, now=now))
        return len(records)


def reference(record: AdapterRecord) -> AdapterRef:
    """What an engine is asked for: KV keys take both, so the version says what the weights are."""
    return AdapterRef(record.line.id, record.sha256)


def _encode(weights: "AdapterWeights", limits: AdapterLimits) -> bytes:
    from memcube.parametric.weights import encode

    return encode(weights, limits)


def _decode(data: bytes, **about: Any) -> "AdapterWeights":
    from memcube.parametric.weights import decode

    return decode(data, **about)


def _name(tenant: TenantId, sha256: str, kind: str) -> str:
    return f"adapters/{digest('tenant', tenant)}/{sha256}.{kind}"
