"""What tests of the media of KV share: a policy small enough to reckon with, and payloads."""

from collections import OrderedDict
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import torch

from memcube.activation.layout import KvLayout
from memcube.activation.payload import KvPayload
from memcube.errors import Unavailable
from memcube.ids import digest64
from memcube.objects.blocking import BlockingObjects
from memcube.objects.folder import FolderStore
from memcube.policies.retention import Decision, Item

LAYOUT = KvLayout(2, 1, 4, "float32")
MODEL = "m@1"
_T = TypeVar("_T")


class TinyLru:
    """The least recently used goes first. No watermarks, no budgets: what a test expects is plain."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.items: OrderedDict[str, Item] = OrderedDict()
        self.pinned: set[str] = set()
        self.hints: list[tuple[str, float | None]] = []

    def hit(self, key: str, now: float) -> None:
        if key in self.items:
            self.items.move_to_end(key)

    def admit(self, item: Item, now: float) -> Decision:
        if item.key in self.items:
            return Decision(admitted=True, victims=(), reason="")
        used = sum(held.num_bytes for held in self.items.values()) + item.num_bytes
        victims = []
        for key, held in self.items.items():
            if used <= self.capacity_bytes:
                break
            if key not in self.pinned:
                victims.append(key)
                used -= held.num_bytes
        if used > self.capacity_bytes:
            return Decision(admitted=False, victims=(), reason="no room")
        for key in victims:
            del self.items[key]
        self.items[item.key] = item
        return Decision(admitted=True, victims=tuple(victims), reason="capacity")

    def forget(self, key: str) -> None:
        self.items.pop(key, None)
        self.pinned.discard(key)

    def pin(self, key: str) -> None:
        self.pinned.add(key)

    def unpin(self, key: str) -> None:
        self.pinned.discard(key)

    def hint(
        self, group: str, probability: float | None, now: float, expected_at: float | None = None
    ) -> None:
        self.hints.append((group, probability))


def payload(key: str, num_tokens: int = 4) -> KvPayload:
    """256 bytes of KV for four tokens, each key's its own."""
    generator = torch.Generator().manual_seed(digest64(key))
    kv_L2HND = torch.randn(LAYOUT.shape(num_tokens), generator=generator)
    return KvPayload.of(kv_L2HND, key=key, kind="block", layout=LAYOUT, codec="raw", model=MODEL)


def item(key: str, *, tenant: str = "a", group: str = "g", num_tokens: int = 4) -> Item:
    return Item(
        key=key,
        num_bytes=LAYOUT.bytes_per_token * num_tokens,
        tenant=tenant,
        group=group,
        saves_s=1.0,
        load_s=0.0,
    )


def same(one: KvPayload | None, key: str, num_tokens: int = 4) -> bool:
    """Whether it is what ``payload`` made of the key."""
    return (
        one is not None
        and one.key == key
        and bool((one.arrays["kv"] == payload(key, num_tokens).arrays["kv"]).all())
    )


class Objects(BlockingObjects):
    """A folder of objects that can stop to answer."""

    down = False

    def __init__(self, path: Path) -> None:
        async def opened() -> FolderStore:
            return FolderStore.open(path)

        super().__init__(opened)

    def _run(self, call: Coroutine[Any, Any, _T]) -> _T:
        if self.down:
            call.close()
            raise Unavailable("the double of an object store is down")
        return super()._run(call)

    def close(self) -> None:
        self.down = False
        super().close()
