"""Where adapters are kept: weights and manifests among the objects, versions and states in the catalog.

An adapter's file is named by its tenant and its SHA-256, which the catalog knows: what is loaded is
what was published, or it is refused. The manifest beside it says in JSON how it came to be; nothing
that serves reads it. Files come first and the catalog's row last, so a crash leaves files that no one
asks for, never a row without its file.

``AdapterFiles`` is all that an engine needs; ``AdapterRegistry`` is for those who publish and decide.
"""

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from memcube.activation.contract import AdapterRef
from memcube.catalog import AdapterBook, AdapterRecord, NewAdapter
from memcube.cube import Scope
from memcube.errors import Corrupt, NotFound
from memcube.ids import CubeId, TenantId, digest
from memcube.objects import ObjectStore
from memcube.parametric.weights import AdapterLimits, AdapterWeights, decode, encode

MANIFEST_FORMAT = 1
MAX_MANIFEST_BYTES = 4 << 20
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
        self, tenant: TenantId, weights: AdapterWeights, manifest: Mapping[str, Any]
    ) -> tuple[str, int]:
        """Keep an adapter; the SHA-256 of its file, and its size. Durable and idempotent.

        Raises:
            BadRequest: a weight is no finite number. LimitExceeded: too large.
        """
        data = await asyncio.to_thread(encode, weights, self.limits)
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

    async def get(self, tenant: TenantId, ref: AdapterRef, *, base: str) -> AdapterWeights:
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
            decode,
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

    async def erase(self, tenant: TenantId, sha256: str) -> None:
        """Remove an adapter's files. Idempotent."""
        for kind in ("safetensors", "json"):
            await self._objects.delete(_name(tenant, sha256, kind))


class AdapterRegistry:
    """Publishes adapters and says which of them serve."""

    def __init__(self, files: AdapterFiles, book: AdapterBook) -> None:
        self.files = files
        self._book = book

    async def publish(
        self,
        scope: Scope,
        name: str,
        weights: AdapterWeights,
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

    async def erase_stale(self, tenant: TenantId) -> int:
        """Remove the files of versions that hold what was changed or deleted; how many there were.

        A file that another version shares which isn't stale stays.
        """
        records = await asyncio.to_thread(lambda: self._book.versions(tenant))
        kept = {record.sha256 for record in records if not record.stale}
        gone = {record.sha256 for record in records if record.stale} - kept
        for sha256 in gone:
            await self.files.erase(tenant, sha256)
        return len(gone)


def reference(record: AdapterRecord) -> AdapterRef:
    """What an engine is asked for: KV keys take both, so the version says what the weights are."""
    return AdapterRef(record.line.id, record.sha256)


def _name(tenant: TenantId, sha256: str, kind: str) -> str:
    return f"adapters/{digest('tenant', tenant)}/{sha256}.{kind}"
