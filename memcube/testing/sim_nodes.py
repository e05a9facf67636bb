"""Nodes of a simulation, and the port to them: payloads, reservations, holds and seals, and how they are lost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from memcube.catalog.action_rows import ActionRecord
from memcube.errors import Conflict, NotFound, StaleEpoch, StorageFull, Unavailable
from memcube.ids import CubeId, TenantId
from memcube.scheduler.actions import Medium, Place
from memcube.scheduler.port import Stored
from memcube.testing.sim_kernel import Kernel, Wait

Content = tuple[TenantId, CubeId, int]
Slot = tuple[Place, TenantId, CubeId]


class Read(NamedTuple):
    """A leader heard that at a time a place had a payload, whole."""

    slot: Slot
    version: int
    leader: int
    at_s: float


@dataclass(slots=True)
class Payload:
    """Bytes at a place. ``content`` None is damage."""

    content: Content | None
    version: int
    epoch: int
    num_bytes: int
    since: float
    action: str
    is_durable: bool = False


@dataclass(slots=True)
class SimNode:
    """A node: what lies on it, and what it has promised."""

    name: str
    capacity_bytes: int
    is_up: bool = True
    is_lost: bool = False
    leader: int = 0
    """The latest leader it has heard of."""
    published: dict[Slot, Payload] = field(default_factory=dict)
    reserved: dict[str, tuple[Slot, Payload | None, int, float]] = field(default_factory=dict)
    """By action: slot, bytes (None: not written), size, since when."""
    holds: dict[Slot, dict[str, float]] = field(default_factory=dict)
    sealed: dict[Slot, tuple[str, int]] = field(default_factory=dict)
    """The action that took the writes away, and the epoch that it made."""

    def hear(self, leader: int) -> None:
        if leader < self.leader:
            raise StaleEpoch(leader, self.leader)
        self.leader = leader

    @property
    def used_bytes(self) -> int:
        return sum(p.num_bytes for p in self.published.values()) + sum(
            size for _, _, size, _ in self.reserved.values()
        )

    # -- what the scheduler asks ---------------------------------------------------------------

    def reserve(self, move: ActionRecord, slot: Slot, now: float) -> None:
        if move.id in self.reserved:
            return
        if (found := self.published.get(slot)) is not None and found.action == move.id:
            return
        if self.used_bytes + move.num_bytes > self.capacity_bytes:
            raise StorageFull(self.name)
        self.reserved[move.id] = slot, None, move.num_bytes, now

    def hold(self, move: ActionRecord, slot: Slot, now: float) -> None:
        if slot not in self.published:
            raise NotFound("payload", f"{slot[2]} at {slot[0]}")
        self.holds.setdefault(slot, {}).setdefault(move.id, now)

    def read(self, move: ActionRecord, slot: Slot) -> Content | None:
        """The bytes of a source; one that is to be taken over takes no writes from here on."""
        found = self.published.get(slot)
        if found is None or found.version != move.version:
            raise NotFound("payload", f"{slot[2]} v{move.version} at {slot[0]}")
        if move.id not in self.holds.get(slot, ()):
            raise NotFound("hold", move.id)
        if move.takes_over:
            self.sealed[slot] = move.id, move.epoch + 1
        return found.content

    def write(self, move: ActionRecord, content: Content | None, now: float) -> None:
        if move.id not in self.reserved:
            slot = (move.target, move.tenant, move.cube)
            found = self.published.get(slot)  # type: ignore[arg-type]
            if found is not None and found.action == move.id:
                return
            raise NotFound("reservation", move.id)
        slot, _, size, since = self.reserved[move.id]
        payload = Payload(content, move.version, move.epoch + 1, size, now, move.id)
        self.reserved[move.id] = slot, payload, size, since

    def read_back(self, move: ActionRecord) -> Content | None:
        reserved = self.reserved.get(move.id)
        if reserved is None or reserved[1] is None:
            raise NotFound("reservation", move.id)
        reserved[1].is_durable = True
        return reserved[1].content

    def publish(self, move: ActionRecord, slot: Slot, now: float) -> None:
        found = self.published.get(slot)
        if move.id not in self.reserved:
            if found is None or found.version < move.version:
                raise NotFound("reservation", move.id)
            return
        _, payload, _, _ = self.reserved.pop(move.id)
        if payload is None:
            raise NotFound("reservation", move.id)
        if found is None or found.version <= payload.version:
            payload.since = now
            self.published[slot] = payload
        if move.takes_over:
            self.sealed.pop(slot, None)

    def free(self, move: ActionRecord) -> None:
        self.reserved.pop(move.id, None)

    def let_go(self, move: ActionRecord, slot: Slot, moved: bool) -> None:
        if (holders := self.holds.get(slot)) is not None:
            holders.pop(move.id, None)
            if not holders:
                del self.holds[slot]
        if not moved and self.sealed.get(slot, ("",))[0] == move.id:
            del self.sealed[slot]

    def has(self, slot: Slot, version: int) -> bool:
        found = self.published.get(slot)
        return found is not None and found.content == (slot[1], slot[2], version)

    def drop(self, slot: Slot, epoch: int) -> None:
        found = self.published.get(slot)
        if found is not None and found.epoch <= epoch:
            self._remove(slot)

    def inventory(self, place: Place) -> list[Stored]:
        found = []
        for slot, payload in self.published.items():
            if slot[0] == place:
                held = self.holds.get(slot, {})
                found.append(_stored(slot, payload, payload.since, None, tuple(held)))
        for id, (slot, payload, size, since) in self.reserved.items():
            if slot[0] == place:
                made = payload or Payload(None, 0, 0, size, since, id)
                found.append(_stored(slot, made, since, id, ()))
        return found

    def sweep(self, place: Place, stored: Sequence[Stored]) -> int:
        num = 0
        for one in stored:
            slot = place, one.tenant, one.cube
            if one.action is not None:
                num += self.reserved.pop(one.action, None) is not None
                continue
            payload = self.published.get(slot)
            if one.pinned_by:
                for id in one.pinned_by:
                    self.holds.get(slot, {}).pop(id, None)
                if not self.holds.get(slot):
                    self.holds.pop(slot, None)
                if self.sealed.get(slot, ("",))[0] in one.pinned_by:
                    del self.sealed[slot]
                num += 1
            elif payload is not None and (payload.since, payload.epoch, payload.version) == (
                one.since,
                one.epoch,
                one.version,
            ):
                self._remove(slot)
                num += 1
        return num

    # -- what writers and readers ask ----------------------------------------------------------

    def put(self, slot: Slot, version: int, epoch: int, num_bytes: int, now: float) -> None:
        """Write a version, by who believes that this is the owner as of an epoch."""
        if slot in self.sealed:
            if epoch <= self.sealed[slot][1]:
                raise Unavailable("the cube is moving")
            del self.sealed[slot]
        found = self.published.get(slot)
        if found is not None and found.version > version:
            return
        if found is None and self.used_bytes + num_bytes > self.capacity_bytes:
            raise StorageFull(self.name)
        content = slot[1], slot[2], version
        self.published[slot] = Payload(content, version, epoch, num_bytes, now, "")

    def erase(self, slot: Slot, version: int) -> None:
        """Remove a cube that is deleted."""
        found = self.published.get(slot)
        if found is not None and found.version <= version:
            self._remove(slot)

    def get(self, slot: Slot) -> tuple[int, Content | None]:
        found = self.published.get(slot)
        if found is None:
            raise NotFound("payload", slot[2])
        return found.version, found.content

    # -- faults --------------------------------------------------------------------------------

    def crash(self) -> None:
        """Lose what is in memory: holds, seals, what was not made durable, and what lies above the disk."""
        self.is_up = False
        self.holds.clear()
        self.sealed.clear()
        for id, (_, payload, _, _) in list(self.reserved.items()):
            if payload is None or not payload.is_durable:
                del self.reserved[id]
        for slot in [slot for slot in self.published if slot[0].medium in _VOLATILE]:
            del self.published[slot]

    def lose(self) -> None:
        """Go for good, with all that lies here."""
        self.is_up, self.is_lost = False, True
        for part in (self.published, self.reserved, self.holds, self.sealed):
            part.clear()

    def _remove(self, slot: Slot) -> None:
        del self.published[slot]
        self.holds.pop(slot, None)
        self.sealed.pop(slot, None)


_VOLATILE = (Medium.DEVICE, Medium.HOST)


def _stored(
    slot: Slot, payload: Payload, since: float, action: str | None, pinned_by: tuple[str, ...]
) -> Stored:
    return Stored(
        tenant=slot[1],
        cube=slot[2],
        version=payload.version,
        epoch=payload.epoch,
        num_bytes=payload.num_bytes,
        since=since,
        action=action,
        pinned_by=pinned_by,
        sound=payload.content == (slot[1], slot[2], payload.version),
    )


_NOT_SAID = object()


class SimPort:
    """``TierPort`` to simulated nodes: each call is one message or two."""

    def __init__(
        self,
        kernel: Kernel,
        nodes: dict[str, SimNode],
        build: Callable[[ActionRecord], Wait],
        touched: Callable[[TenantId, CubeId], None],
        heard: Callable[[Read], None],
    ) -> None:
        """``build`` gives the content of what the catalog holds; ``touched`` is told of cubes whose payloads
        may have changed, ``heard`` of payloads that a leader has found to be there."""
        self._kernel = kernel
        self._nodes = nodes
        self._build = build
        self._touched = touched
        self._heard = heard

    def send(self, place: Place, leader: int | None, do: Callable[[SimNode], Any]) -> Wait:
        """A message to a place's node. One that is gone for good holds nothing: ``do`` isn't done."""

        def arrive() -> Any:
            node = self._nodes[place.node]
            if node.is_lost:
                raise _Gone(place.node)
            if not node.is_up:
                raise Unavailable(f"node {node.name} is down")
            if leader is not None:
                node.hear(leader)
            return do(node)

        return self._kernel.request(arrive, what=place.node)

    async def prepare(self, move: ActionRecord, *, leader: int) -> None:
        target, slot = _target(move)
        await self._to(target, leader, lambda n: n.reserve(move, slot, self._now()))
        if move.source is not None:
            source = _slot(move.source, move)
            await self._to(move.source, leader, lambda n: n.hold(move, source, self._now()))

    async def copy(self, move: ActionRecord, *, leader: int) -> str:
        target, slot = _target(move)
        if move.source is None:
            content = await self._build(move)
        else:
            source = _slot(move.source, move)
            content = await self._to(move.source, leader, lambda n: n.read(move, source))
        await self._to(target, leader, lambda n: n.write(move, content, self._now()))
        return _checksum((slot[1], slot[2], move.version))

    async def verify(self, move: ActionRecord, *, leader: int) -> str:
        target, _ = _target(move)
        return _checksum(await self._to(target, leader, lambda n: n.read_back(move)))

    async def publish(self, move: ActionRecord, *, leader: int) -> None:
        target, slot = _target(move)
        await self._to(target, leader, lambda n: self._changed(n.publish, move, slot, self._now()))

    async def free(self, move: ActionRecord, *, leader: int) -> None:
        target, _ = _target(move)
        await self._to(target, leader, lambda n: n.free(move), gone=None)

    async def release(self, move: ActionRecord, *, leader: int, moved: bool) -> None:
        if move.source is not None:
            slot = _slot(move.source, move)
            await self._to(move.source, leader, lambda n: n.let_go(move, slot, moved), gone=None)

    async def has(
        self, place: Place, tenant: TenantId, cube: CubeId, version: int, *, leader: int
    ) -> bool:
        slot = place, tenant, cube
        read_s: list[float] = []

        def do(node: SimNode) -> bool:
            read_s.append(self._kernel.now_s)
            return node.has(slot, version)

        found = await self._to(place, leader, do, gone=False)
        if found:
            self._heard(Read(slot, version, leader, read_s[0]))
        return found

    async def drop(self, drop: ActionRecord, *, leader: int) -> None:
        if drop.source is None:
            raise AssertionError("a drop has a place")
        slot = _slot(drop.source, drop)
        await self._to(
            drop.source, leader, lambda n: self._changed(n.drop, slot, drop.epoch), gone=None
        )

    async def inventory(self, place: Place, *, leader: int) -> Sequence[Stored]:
        return await self._to(place, leader, lambda n: n.inventory(place), gone=())

    async def sweep(self, place: Place, stored: Sequence[Stored], *, leader: int) -> int:
        def do(node: SimNode) -> int:
            for one in stored:
                self._touched(one.tenant, one.cube)
            return node.sweep(place, stored)

        return await self._to(place, leader, do, gone=0)

    async def _to(
        self, place: Place, leader: int, do: Callable[[SimNode], Any], gone: Any = _NOT_SAID
    ) -> Any:
        try:
            return await self.send(place, leader, do)
        except _Gone:
            if gone is _NOT_SAID:
                raise NotFound("node", place.node) from None
            return gone

    def _changed(self, do: Callable[..., None], *given: Any) -> None:
        for one in given:
            if isinstance(one, tuple):
                self._touched(one[1], one[2])
        do(*given)

    def _now(self) -> float:
        return self._kernel.time().timestamp()


class _Gone(Conflict):
    """The node will not come back."""


def _slot(place: Place, record: ActionRecord) -> Slot:
    if record.cube is None:
        raise AssertionError("tenants as a whole are not simulated")
    return place, record.tenant, record.cube


def _target(move: ActionRecord) -> tuple[Place, Slot]:
    if move.target is None:
        raise AssertionError("a copy has a target")
    return move.target, _slot(move.target, move)


def _checksum(content: Content | None) -> str:
    return "damaged" if content is None else "/".join(map(str, content))
