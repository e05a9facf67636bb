"""The activation tier as the scheduler sees it: engines, one place each, whose KV is a cache.

An engine's place is its device (``node/engine-0``). What it brings down to host memory, disk or objects, and
up again, is its own business: a payload that lies there is still the engine's. An engine lets go what it
likes, and keeps KV of chats that nobody listed; so only what the catalog lists is looked for, and what is
listed and gone is struck from the list.

KV is keyed by the content that was read. So it is served to nobody who asks for other content, and needs no
seal, hold or hiding before its commit.
"""

import asyncio
import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from typing import Protocol

from memcube.activation.contract import Mode, Usage
from memcube.catalog import Catalog
from memcube.catalog.action_rows import ActionRecord
from memcube.chat.contract import BuildRequest, EngineFacts
from memcube.chat.kv_building import KvSource, moved_on, read_source
from memcube.cube import Shape
from memcube.errors import BadRequest, Conflict, MemCubeError, NotFound, StorageFull
from memcube.ids import CubeId, TenantId, digest
from memcube.indexing import Clock
from memcube.scheduler.actions import Action, Medium, Place, Tier
from memcube.scheduler.enact import Call
from memcube.scheduler.port import Stored
from memcube.scheduler.world import Capacity, Node, World

LOOK_S = 1.0
"""How long an engine that answered the last time is waited for."""
_ENGINE = re.compile(r"engine-(\d+)")
log = logging.getLogger(__name__)


class LedEngine(Protocol):
    """An engine, for a leader. Each call under an epoch is refused (``StaleEpoch``) once the engine has heard
    of a later one; the gateways' calls carry none."""

    async def facts(self) -> EngineFacts | None:
        """None where the engine can't say what it holds."""
        ...

    async def build(self, wanted: BuildRequest, *, leader: int | None = None) -> Usage: ...

    async def forget(
        self, cubes: Collection[str], tenant: str | None, *, leader: int | None = None
    ) -> int: ...

    async def held(self, cubes: Collection[str], *, leader: int) -> set[str]:
        """Those of these cubes that KV holds, on the device or below it."""
        ...


class Engines:
    """The engines by number, and what each said of itself last. It belongs to one event loop."""

    def __init__(self, engines: Sequence[LedEngine]) -> None:
        self._engines = engines
        self._asked: dict[int, asyncio.Task[EngineFacts | None]] = {}
        self.facts: dict[int, EngineFacts] = {}
        self.down: set[int] = set(range(len(engines)))
        """Engines that did not answer when they were last asked."""

    def __len__(self) -> int:
        return len(self._engines)

    async def look(self) -> None:
        """Ask all engines. One that loads, or is down, is waited for once; its answer counts when it comes."""
        fresh = set(range(len(self._engines))) - set(self._asked)
        for number in fresh:
            self._asked[number] = asyncio.ensure_future(self._engines[number].facts())
        if fresh:
            await asyncio.wait([self._asked[number] for number in fresh], timeout=LOOK_S)
        for number, asked in list(self._asked.items()):
            if not asked.done():
                self.down.add(number)
                continue
            del self._asked[number]
            try:
                facts = asked.result()
            except MemCubeError as failed:
                if number not in self.down:
                    log.info("engine %d did not answer: %s", number, failed)
                self.down.add(number)
                continue
            self.down.discard(number)
            self.facts.pop(number, None)
            if facts is not None:
                self.facts[number] = facts

    def places(self) -> Iterator[tuple[int, Place, EngineFacts]]:
        """Each engine that can be scheduled."""
        for number, facts in self.facts.items():
            location = f"{facts.node}/engine-{number}"
            yield number, Place(Tier.ACTIVATION, Medium.DEVICE, location), facts

    def at(self, place: Place | None) -> tuple[LedEngine, EngineFacts]:
        """
        Raises:
            NotFound: no engine has this place any more.
        """
        for number, where, facts in self.places():
            if where == place:
                return self._engines[number], facts
        raise NotFound("engine", str(place))

    def is_gone(self, place: Place) -> bool:
        """Whether no engine will have this place again: there are fewer, or its engine is on another node."""
        found = _ENGINE.fullmatch(place.location.partition("/")[2])
        if place.tier is not Tier.ACTIVATION or found is None:
            return False
        number = int(found[1])
        if number >= len(self._engines):
            return True
        return number in self.facts and self.facts[number].node != place.node


class EngineTopology:
    """Tells a world of the engines' places."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    async def update(self, world: World, *, leader: int, now: datetime) -> Sequence[Action]:
        """Ask the engines, and note places, sizes and who is down. A node that nobody told of is one that
        lives, since an engine answers from it."""
        await self._engines.look()
        found = list(self._engines.places())
        for number, place, facts in found:
            if place.node not in world.nodes:
                world.set_node(Node(name=place.node, since=now.timestamp()))
            world.set_place(place, Capacity(num_bytes=facts.device_bytes))
            world.set_down(place, number in self._engines.down)
        if found:
            world.kv_bytes_per_token = max(facts.bytes_per_token for *_, facts in found)
            world.kv_least_tokens = max(facts.least_tokens for *_, facts in found)
            world.kv_most_tokens = min(facts.most_tokens for *_, facts in found)
        return ()


class EnginePort:
    """``TierPort`` of the activation tier.

    An engine has no reservations: ``prepare`` looks whether it is there and large enough, and what is copied
    may be let go again before it is committed, or a moment later. An action then fails or its payload is
    struck from the list, and no request is answered wrongly by it. For the same reason ``free``, ``release``
    and ``sweep`` have nothing to do: what was built and is not listed is a cache's, which lets it go in time.

    A copy is built of the catalog's text also where there is a source: engines don't give KV to each other.
    """

    def __init__(
        self,
        engines: Engines,
        catalog: Catalog,
        *,
        mode: Mode,
        clock: Clock,
        max_members: int,
        call: Call = asyncio.to_thread,
    ) -> None:
        """``mode`` is the chats', ``max_members`` how many a composite may have; ``call`` runs a blocking call
        of the catalog."""
        self._engines = engines
        self._catalog = catalog
        self._mode = mode
        self._clock = clock
        self._max_members = max_members
        self._call = call

    async def prepare(self, move: ActionRecord, *, leader: int) -> None:
        engine, facts = self._engines.at(move.target)
        if move.num_bytes > facts.device_bytes:
            raise StorageFull(str(move.target))
        await engine.held((), leader=leader)

    async def copy(self, move: ActionRecord, *, leader: int) -> str:
        """Read the cube's text into the engine; what identifies it, as nothing is carried over.

        Raises:
            Conflict: the cube has changed, or holds no text that fits.
        """
        engine, _ = self._engines.at(move.target)
        source = await self._source(move)
        try:
            await engine.build(source.request(self._mode), leader=leader)
        except BadRequest as unfit:
            raise NotFound("KV that fits the engine", f"{move.cube}: {unfit}") from None
        changed = await self._call(moved_on, self._catalog, source, now=self._clock())
        if changed:
            # Whoever changed it told the engines before this was stored.
            await engine.forget(changed, None, leader=leader)
            raise Conflict("the cube was changed while its KV was built")
        return _identity(source)

    async def verify(self, move: ActionRecord, *, leader: int) -> str:
        """What lies there, by what the engine says it holds; of KV that came back from below each block was
        checked when it was read."""
        engine, _ = self._engines.at(move.target)
        source = await self._source(move)
        await self._must_hold(engine, source, leader)
        return _identity(source)

    async def publish(self, move: ActionRecord, *, leader: int) -> None:
        """See that it is still there: it can be served since it was built."""
        engine, _ = self._engines.at(move.target)
        try:
            source = await self._source(move)
        except Conflict as changed:
            raise NotFound("payload", f"of {move.cube}: {changed}") from None
        await self._must_hold(engine, source, leader)

    async def free(self, move: ActionRecord, *, leader: int) -> None:
        """Nothing was reserved."""

    async def release(self, move: ActionRecord, *, leader: int, moved: bool) -> None:
        """Nothing was held."""

    async def has(
        self, place: Place, tenant: TenantId, cube: CubeId, version: int, *, leader: int
    ) -> bool:
        engine, _ = self._engines.at(place)
        try:
            source = await self._call(
                read_source,
                self._catalog,
                tenant,
                cube,
                now=self._clock(),
                limit=self._max_members,
            )
        except NotFound:
            return False
        wanted = {member.id for member in source.members}
        return source.cube.version == version and wanted <= await engine.held(wanted, leader=leader)

    async def drop(self, drop: ActionRecord, *, leader: int) -> None:
        """Forget all KV of this engine that holds the cube or a member of it, unless it is listed there again:
        then the drop is a late one."""
        try:
            engine, _ = self._engines.at(drop.source)
        except NotFound:
            return  # the engine is gone with all that it held
        if drop.cube is None:
            raise Conflict("the activation tier moves cubes, not tenants")
        listed = await self._call(
            self._catalog.actions.copies, drop.tenant, drop.cube, Tier.ACTIVATION
        )
        if any(place == drop.source for place, _ in listed):
            return
        ids = [drop.cube]
        try:
            source = await self._call(
                read_source,
                self._catalog,
                drop.tenant,
                drop.cube,
                now=self._clock(),
                limit=self._max_members,
            )
            ids += [member.id for member in source.members if member.id != drop.cube]
        except NotFound:
            pass  # it was wiped, and the engines were told of it and its members then
        await engine.forget(ids, None, leader=leader)

    async def inventory(self, place: Place, *, leader: int) -> Sequence[Stored]:
        """Of what the catalog lists at an engine that which is there, whole: all else there is a cache's own.

        Raises:
            NotFound: no engine has this place any more.
        """
        engine, _ = self._engines.at(place)
        listed = await self._call(lambda: list(self._catalog.actions.listed(place)))
        members = await self._call(self._members, [(one.tenant, one.cube) for one in listed])
        held = await engine.held({id for ids in members.values() for id in ids}, leader=leader)
        return [
            Stored(
                tenant=one.tenant,
                cube=one.cube,
                version=one.version,
                epoch=one.epoch,
                num_bytes=one.num_bytes,
                since=0.0,
            )
            for one in listed
            if (wanted := members.get(one.cube)) and wanted <= held
        ]

    async def sweep(self, place: Place, stored: Sequence[Stored], *, leader: int) -> int:
        """Nothing is reserved or held, and what is not listed is not ours to remove."""
        return 0

    async def _source(self, move: ActionRecord) -> KvSource:
        if move.cube is None:
            raise Conflict("the activation tier moves cubes, not tenants")
        source = await self._call(
            read_source,
            self._catalog,
            move.tenant,
            move.cube,
            now=self._clock(),
            limit=self._max_members,
        )
        if source.cube.version != move.version:
            raise Conflict(f"the cube is at version {source.cube.version}, not {move.version}")
        return source.checked()

    async def _must_hold(self, engine: LedEngine, source: KvSource, leader: int) -> None:
        wanted = {member.id for member in source.members}
        if missing := wanted - await engine.held(wanted, leader=leader):
            raise NotFound("KV", f"of {source.cube.id}: the engine has let go {len(missing)} of it")

    def _members(self, cubes: Sequence[tuple[TenantId, CubeId]]) -> dict[CubeId, set[CubeId]]:
        """The memories that the KV of each cube is made of."""
        now = self._clock()
        by_tenant: defaultdict[TenantId, list[CubeId]] = defaultdict(list)
        for tenant, id in cubes:
            by_tenant[tenant].append(id)
        found: dict[CubeId, set[CubeId]] = {}
        for tenant, ids in by_tenant.items():
            for cube in self._catalog.cubes.get_many(tenant, ids, now=now):
                found[cube.id] = {cube.id}
                if cube.shape is not Shape.LEAF:
                    source = read_source(
                        self._catalog, tenant, cube.id, now=now, limit=self._max_members
                    )
                    found[cube.id] = {member.id for member in source.members}
        return found


def _identity(source: KvSource) -> str:
    """What stands for the bytes' SHA-256: that of what was read, by cubes and versions."""
    versions = sorted(source.versions.items())
    return digest("kv", *(part for pair in versions for part in pair))
