"""Cubes into the activation tier and out of it, and where their KV lies.

A migrated cube's KV is that of the prompt which names it by ``cube_ids``: its members (or itself), in
their order, behind the server's system text. It is a cache like all KV: media may evict it, and a
change of any member drops it. So to migrate is to read the memories ahead of the first question.
"""

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from memcube.activation.contract import AdapterRef, Mode, Usage
from memcube.catalog import KvPlace, Principal
from memcube.catalog.kv_book import TIER
from memcube.chat.adapters import AdapterChoice
from memcube.chat.contract import BuildRequest, KvBytes, KvModel, in_time
from memcube.chat.kv_building import KvSource
from memcube.chat.router import Router
from memcube.chat.service import segment_parts
from memcube.cube import MemCube, Residency, Shape
from memcube.errors import AdapterUnusable, Conflict, NotFound, UnknownBackend
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import SEARCHABLE
from memcube.parametric.registry import reference
from memcube.service import MemoryService, SearchScope

LOOK_DEADLINE_S = 2.0
"""How long a read of a cube waits for the engines to say what they hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrated:
    """What a migration did. ``num_cubes`` are those whose text was read. ``built_tokens`` were
    computed now, the others of ``num_tokens`` lay there. ``kv`` is where it lies afterwards."""

    cube: MemCube
    num_cubes: int
    num_tokens: int = 0
    built_tokens: int = 0
    dropped_bytes: int = 0
    engine: int | None = None
    kv: tuple[KvPlace, ...] = ()


class ActivationTier:
    """Moves cubes over engines numbered as the router knows them, which it shares with the chat."""

    def __init__(
        self,
        memory: MemoryService,
        models: Sequence[KvModel],
        router: Router,
        *,
        mode: Mode,
        adapters: AdapterChoice | None = None,
    ) -> None:
        """Without ``adapters`` these engines serve none."""
        self._memory = memory
        self._models = models
        self._router = router
        self._mode = mode
        self._adapters = adapters

    async def activate(
        self,
        principal: Principal,
        id: str,
        *,
        adapter: str | None = None,
        nodes: Collection[str] | None = None,
    ) -> Migrated:
        """Build the KV of a cube now, as far as it isn't stored; for chats that name this ``adapter``, if
        one is given, and on an engine of one of these ``nodes``. Idempotent.

        Raises:
            NotFound: no such cube in this tenant, no such adapter serves, or no engine runs on such a node.
            Conflict: it holds no text that a prompt may have, or was changed meanwhile.
            BadRequest: it doesn't fit the model's window.
            Unavailable, DeadlineExceeded: no engine built it; what was built so far is stored.
            Other errors of ``memcube.errors``: why the adapter can't be used.
        """
        cube = await self._memory.get(principal, id)
        members = await self._members(principal, cube)
        source = KvSource(cube, members).checked()
        named = None if adapter is None else await self._named(principal, adapter)
        among = None if nodes is None else await self._engines_on(nodes)
        engine, usage = await self._build(source.request(self._mode, adapter=named), among)
        ids = [member.id for member in members]
        kv = _places([(engine, await self._models[engine].residency(ids))])
        if moved_on := await self._memory.mark_kv(principal, cube, members, _noted(kv)):
            await self._forget(moved_on)
            raise Conflict(f"cube {cube.id!r} was changed while its KV was built; migrate it again")
        return Migrated(
            cube=cube,
            num_cubes=len(members),
            num_tokens=usage.prompt_tokens,
            built_tokens=usage.prefilled,
            engine=engine,
            kv=tuple(kv),
        )

    async def deactivate(self, principal: Principal, id: str) -> Migrated:
        """Drop all KV that holds a cube, or any member of it; the text stays. Idempotent.

        Raises:
            NotFound: no such cube in this tenant.
            Unavailable, DeadlineExceeded: an engine didn't answer, and may hold some still.
        """
        cube = await self._memory.get(principal, id)
        members = await self._members(principal, cube)
        ids = list(dict.fromkeys([cube.id, *(member.id for member in members)]))
        held = await asyncio.gather(*(model.residency(ids) for model in self._models))
        await self._forget(ids)
        await self._memory.drop_kv(principal, ids)
        dropped = sum(place.size_bytes for place in _places(list(enumerate(held))))
        return Migrated(cube=cube, num_cubes=len(members), dropped_bytes=dropped)

    async def residency(
        self, principal: Principal, cube: MemCube, noted: Sequence[Residency]
    ) -> list[Residency]:
        """Where a cube's payloads lie: those noted, and of KV what the engines say now, if any
        answers in time."""
        ids = [member.id for member in await self._members(principal, cube)]
        found = await asyncio.gather(
            *(in_time(model.residency(ids), LOOK_DEADLINE_S) for model in self._models)
        )
        answers = [(n, bytes_) for n, bytes_ in enumerate(found) if bytes_ is not None]
        if not answers:
            return list(noted)
        now = self._memory.now()
        return [place for place in noted if place.tier != TIER] + [
            Residency(
                tier=TIER,
                medium=place.medium,
                location=place.location,
                version=cube.version,
                size_bytes=place.size_bytes,
                epoch=0,
                updated_at=now,
            )
            for place in _places(answers)
        ]

    async def _members(self, principal: Principal, cube: MemCube) -> list[MemCube]:
        if cube.shape is Shape.LEAF:
            return [cube] if cube.text and cube.state in SEARCHABLE else []
        return await self._memory.members_of(principal, SearchScope(cube_ids=(cube.id,)))

    async def _named(self, principal: Principal, adapter: str) -> AdapterRef:
        if self._adapters is None:
            raise UnknownBackend("adapter", adapter, ())
        return reference(await self._adapters.named(principal.tenant, adapter))

    async def _engines_on(self, nodes: Collection[str]) -> list[int]:
        """The engines on these nodes, of those that answer."""
        facts = await asyncio.gather(
            *(in_time(model.facts(), LOOK_DEADLINE_S) for model in self._models)
        )
        found = [n for n, one in enumerate(facts) if one is not None and one.node in nodes]
        if not found:
            raise NotFound("engine on node", ", ".join(sorted(nodes)))
        return found

    async def _build(
        self, wanted: BuildRequest, among: Collection[int] | None
    ) -> tuple[int, Usage]:
        parts = segment_parts(TenantId(wanted.tenant), wanted.segments, wanted.adapter)
        for attempt in self._router.attempts(parts, among):
            with attempt as route:
                try:
                    return route.engine, await self._models[route.engine].build(wanted)
                except AdapterUnusable as unusable:
                    raise unusable.why from None
        raise AssertionError("the last attempt raises")

    async def _forget(self, ids: Sequence[CubeId]) -> None:
        await asyncio.gather(*(model.forget(ids, None) for model in self._models))


def _places(found: Sequence[tuple[int, Sequence[KvBytes]]]) -> list[KvPlace]:
    """What engines, by number, say they hold. Those of a node share what lies below the device."""
    sizes: dict[tuple[str, str], int] = {}
    for engine, held in found:
        for one in held:
            location = f"{one.node}/engine-{engine}" if one.medium == "device" else one.node
            place = one.medium, "objects" if one.medium == "object" else location
            sizes[place] = max(sizes.get(place, 0), one.num_bytes)
    return [
        KvPlace(medium=medium, location=location, size_bytes=size)
        for (medium, location), size in sorted(sizes.items())
    ]


def _noted(kv: Sequence[KvPlace]) -> list[KvPlace]:
    """What is noted of it: the engine that built it, with all its bytes. It brings them down to other media
    and up again as it likes, and the scheduler reckons with engines alone."""
    built = [place for place in kv if place.medium == "device"]
    return [replace(one, size_bytes=max(place.size_bytes for place in kv)) for one in built[:1]]
