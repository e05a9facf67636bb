"""The media of a node as an engine's blocks see them: keys un-rotated, compressed, by key.

An engine's block lies rotated on its device; below it lies as a payload that serves at any
position, int8 by default. The store may be in this process or behind Ray's object store.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from memcube.activation.blocks import Block, Place
from memcube.activation.media import MediaHierarchy
from memcube.activation.models import LoadedModel
from memcube.activation.payload import KvPayload, decode
from memcube.activation.quantise import Codec
from memcube.activation.rope import Rope
from memcube.policies.retention import Item


class KvStore(Protocol):
    """The payloads of one node. All calls block."""

    def put(self, payload: KvPayload, item: Item, members: Collection[str]) -> None:
        """Keep a payload if it is worth its bytes. Idempotent."""
        ...

    def get(self, keys: Sequence[str]) -> list[KvPayload | None]:
        """The payloads of these keys, None where there is none."""
        ...

    def delete_members(self, cubes: Collection[str], tenant: str | None) -> None:
        """Drop what holds one of these cubes, and all of a tenant."""
        ...


class LocalKvStore:
    """A hierarchy in this process."""

    def __init__(self, media: MediaHierarchy) -> None:
        self._media = media

    def put(self, payload: KvPayload, item: Item, members: Collection[str]) -> None:
        self._media.put(payload, item, time.monotonic(), members=members)

    def get(self, keys: Sequence[str]) -> list[KvPayload | None]:
        now = time.monotonic()
        return [self._media.get(key, now) for key in keys]

    def delete_members(self, cubes: Collection[str], tenant: str | None) -> None:
        if cubes:
            self._media.delete_members(cubes)
        if tenant is not None:
            self._media.delete_tenant(tenant)


class StoreBelow:
    """A ``Lower`` over a node's store, for one model."""

    def __init__(self, store: KvStore, loaded: LoadedModel, *, codec: Codec) -> None:
        self._store = store
        self._layout = loaded.layout
        self._model = loaded.fingerprint
        self._device = loaded.model.device
        self._rope = Rope(loaded.model)
        self._codec: Codec = codec

    def offer(self, blocks: Sequence[Block]) -> None:
        """Take down blocks that left the device."""
        for block in blocks:
            positions = range(block.start, block.start + block.num_tokens)
            payload = KvPayload.of(
                self._rope.unrotate(block.kv_L2HND, positions),
                key=block.key,
                kind="segment" if block.is_segment else "block",
                layout=self._layout,
                codec=self._codec,
                model=self._model,
            )
            item = Item(
                key=block.key,
                num_bytes=payload.num_bytes,
                tenant=block.tenant,
                group=block.group,
                saves_s=block.saves_s,
                load_s=0.0,
                parent=block.parent,
            )
            self._store.put(payload, item, block.cubes)

    def fetch(self, places: Sequence[Place]) -> Mapping[str, Tensor]:
        """Of the blocks wanted those at hand, rotated to their slots."""
        found: dict[str, Tensor] = {}
        payloads = self._store.get([place.key for place in places])
        for place, payload in zip(places, payloads, strict=True):
            if payload is not None and payload.model == self._model:
                kv_L2HND = decode(payload, self._device)
                slots = range(place.start, place.start + payload.num_tokens)
                found[place.key] = self._rope.rotate(kv_L2HND, slots)
        return found

    def forget(self, cubes: Collection[str], tenant: str | None) -> None:
        """Drop all that holds one of these cubes, and all of a tenant."""
        self._store.delete_members(cubes, tenant)
