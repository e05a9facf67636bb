"""The activation tier's media below the device: one actor a node, shared by the node's engines.

Host payloads lie in Ray's object store, so that an engine of the same node reads them without a
copy. Disk and object store are this process's alone.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError, ObjectStoreFullError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import NAMESPACE
from actors.nodes import PLACED
from actors.objects import open_objects
from memcube.activation.disk import DiskMedium
from memcube.activation.keyring import Keyring
from memcube.activation.layout import KvLayout
from memcube.activation.media import MediaHierarchy
from memcube.activation.medium import HostMedium, Medium
from memcube.activation.packs import ObjectMedium
from memcube.activation.payload import KvPayload
from memcube.activation.quantise import Arrays
from memcube.activation.stats import MediumStats
from memcube.catalog import Catalog
from memcube.chat.forgetting import gone
from memcube.config import Config
from memcube.errors import StorageFull, Unavailable
from memcube.objects.blocking import BlockingObjects
from memcube.policies.retention import Item, Retention

CALL_DEADLINE_S = 30.0
OPEN_DEADLINE_S = 30.0
MIB = 1 << 20
log = logging.getLogger("memcube.kv_store")


@dataclass(frozen=True, slots=True)
class Shipped:
    """A payload whose arrays lie in Ray's object store."""

    head: dict[str, Any]
    arrays: Any

    @classmethod
    def of(cls, payload: KvPayload, arrays: Any | None) -> "Shipped":
        """``arrays`` is a reference to the payload's, where there is one already."""
        head = {
            name: getattr(payload, name)
            for name in ("key", "kind", "num_tokens", "layout", "codec", "model")
        }
        return cls(head, arrays if arrays is not None else ray.put(dict(payload.arrays)))

    def payload(self, arrays: Arrays) -> KvPayload:
        return KvPayload(**self.head, arrays=arrays)


class PlasmaArrays:
    """``SharedArrays`` in Ray's object store; a handle is a reference that this process owns."""

    def put(self, arrays: Arrays) -> Any:
        try:
            return ray.put(dict(arrays))
        except ObjectStoreFullError:
            raise StorageFull("Ray's object store; raise ray.object_store_mb") from None

    def get(self, handle: Any) -> Arrays | None:
        try:
            return cast(Mapping[str, Any], ray.get(handle, timeout=CALL_DEADLINE_S))
        except (ObjectLostError, GetTimeoutError):
            return None

    def drop(self, handle: Any) -> None:
        """The object goes with its last reference."""


class KvStoreActor:
    """Hosts a ``MediaHierarchy`` for one model."""

    def __init__(self, config: Config, model: str, layout: KvLayout) -> None:
        self._config = config
        self._model = model
        self._layout = layout
        self._host: HostMedium | None = None
        self._media = self._open()
        self._catalog = Catalog.open(config.catalog_url())
        self._ending = threading.Event()
        threading.Thread(target=self._sweep_on, name="sweep", daemon=True).start()

    def _open(self) -> MediaHierarchy:
        config = self._config.activation
        folder = Path(self._config.data_dir) / "activation"
        keyring = Keyring(folder / "keyring") if config.encrypt else None
        media: list[tuple[Medium, Retention]] = []
        if config.host_mb:
            self._host = HostMedium(PlasmaArrays())
            media.append((self._host, Retention(config.host_mb * MIB)))
        if config.disk_mb:
            disk = self._open_disk(folder / "disk" / self._model[:16], keyring)
            media.append((disk, Retention(config.disk_mb * MIB)))
        if config.object_mb:
            objects = ObjectMedium(
                BlockingObjects(lambda: open_objects(self._config)),
                writer=os.uname().nodename,
                model=self._model,
                layout=self._layout,
                keyring=keyring,
            )
            media.append((objects, Retention(config.object_mb * MIB)))
        return MediaHierarchy(media, now=time.monotonic(), keyring=keyring)

    def _open_disk(self, folder: Path, keyring: Keyring | None) -> DiskMedium:
        """A process that was killed a moment ago may still hold the folder."""
        until = time.monotonic() + OPEN_DEADLINE_S
        while True:
            try:
                return DiskMedium.open(
                    folder, model=self._model, layout=self._layout, keyring=keyring
                )
            except Unavailable:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)

    async def put(self, shipped: Shipped, item: Item, members: Collection[str]) -> None:
        """Keep a payload if it is worth its bytes."""
        payload = shipped.payload(await shipped.arrays)
        await asyncio.to_thread(
            self._media.put, payload, item, time.monotonic(), members=frozenset(members)
        )

    async def get(self, keys: Sequence[str]) -> list[Shipped | None]:
        """The payloads of these keys."""
        return await asyncio.to_thread(self._get, keys)

    def _get(self, keys: Sequence[str]) -> list[Shipped | None]:
        found: list[Shipped | None] = []
        for key in keys:
            payload = self._media.get(key, time.monotonic())
            if payload is None:
                found.append(None)
            else:
                handle = self._host.handle(key) if self._host is not None else None
                found.append(Shipped.of(payload, handle))
        return found

    async def delete_members(self, cubes: Collection[str], tenant: str | None) -> None:
        """Drop what holds one of these cubes, and all of a tenant. Idempotent."""
        if cubes:
            await asyncio.to_thread(self._media.delete_members, frozenset(cubes))
        if tenant is not None:
            await asyncio.to_thread(self._media.delete_tenant, tenant)

    async def residency(self, cubes: Collection[str]) -> dict[str, int]:
        """Bytes that hold any of these cubes, by medium."""
        return self._media.residency(cubes)

    async def members(self) -> set[str]:
        """The cubes and adapters that payloads here hold."""
        return set().union(*self._media.members().values())

    async def stats(self) -> list[MediumStats]:
        """Each medium's bytes and counts."""
        return self._media.stats()

    def _sweep_on(self) -> None:
        while not self._ending.wait(self._config.activation.sweep_s):
            try:
                if count := self._sweep():
                    log.info("dropped the KV of %d cubes and adapters that are gone", count)
            except Exception:
                log.exception("a sweep failed; the next one tries again")

    def _sweep(self) -> int:
        """Drop the KV of cubes and adapters that are gone from the catalog: deleted, expired or stopped
        while this actor, or the one that should have told it, was not there. Returns how many."""
        count = 0
        now = datetime.now(UTC)
        for tenant, members in self._media.members().items():
            if dead := gone(self._catalog, tenant, members, now=now):
                self._media.delete_members(dead, tenant)
                count += len(dead)
        return count

    async def close(self) -> None:
        """Copy to disk what only memory holds; the actor is of no use afterwards."""
        self._ending.set()
        if self._host is not None:
            await asyncio.to_thread(self._media.copy_down, time.monotonic())
        await asyncio.to_thread(self._media.flush)
        await asyncio.to_thread(self._media.close)
        self._catalog.close()


class RemoteKvStore:
    """A ``KvStore`` behind the actor, for the thread that moves blocks up and down."""

    def __init__(self, handle: ActorHandle[Any]) -> None:
        self._handle = handle

    def put(self, payload: KvPayload, item: Item, members: Collection[str]) -> None:
        shipped = Shipped.of(payload, None)
        self._wait(self._handle.put.remote(shipped, item, frozenset(members)))

    def get(self, keys: Sequence[str]) -> list[KvPayload | None]:
        shipped = self._wait(self._handle.get.remote(list(keys)))
        arrays = iter(self._wait([one.arrays for one in shipped if one is not None]))
        return [None if one is None else one.payload(next(arrays)) for one in shipped]

    def delete_members(self, cubes: Collection[str], tenant: str | None) -> None:
        self._wait(self._handle.delete_members.remote(frozenset(cubes), tenant))

    @staticmethod
    def _wait(refs: Any) -> Any:
        return ray.get(refs, timeout=CALL_DEADLINE_S)


def spawn_kv_store_actor(
    config: Config, *, node: str, model: str, layout: KvLayout
) -> ActorHandle[Any]:
    """The one place that states this actor's Ray options: one a node and model, on that node.

    Every call is idempotent, so Ray may repeat it.
    """
    spawned = (
        ray.remote(KvStoreActor)
        .options(
            name=f"kv-store-{node[:16]}-{model[:16]}",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=PLACED,
            max_concurrency=64,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
        )
        .remote(config, model, layout)
    )
    return cast(ActorHandle[Any], spawned)
