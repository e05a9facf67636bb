"""One leader's rounds: hear what changed, plan, journal, start, and compare a place now and then.

The caller holds the lease, and makes a new ``Control`` for each epoch. It calls ``round`` every second or
two, and stops when ``is_deposed``.
"""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from memcube.catalog.action_rows import ActionRecord
from memcube.catalog.placing import Listed
from memcube.catalog.scheduling import Passed
from memcube.errors import NotFound, Unavailable
from memcube.ids import CubeId, TenantId
from memcube.scheduler.actions import Action, ActionKind, ActionState, Copy, Drop, Place, Tier
from memcube.scheduler.columns import NONE
from memcube.scheduler.enact import Call, Enactor, Journal
from memcube.scheduler.planner import Plan, Planner, Refused
from memcube.scheduler.port import TierPort
from memcube.scheduler.reconciling import compare
from memcube.scheduler.world import CubeFacts, Held, World

Key = tuple[TenantId, CubeId]
COMPARE_EVERY_S = 60.0
GRACE_S = 120.0
MAX_SETTLING = 10_000
"""So many cubes whose copy failed are remembered."""


class Feed(Protocol):
    """How a control hears of the world; the calls are blocking ones of the catalog."""

    def changed(self, cursor: int) -> tuple[Sequence[Key], int]:
        """The cubes that something happened to since a cursor, and the next one. 0 is the beginning: all
        cubes there are. Each change is told once at least."""
        ...

    def read(self, keys: Sequence[Key]) -> Sequence[tuple[CubeFacts, Sequence[Held]]]:
        """What the catalog says of cubes; those that are gone are left out."""
        ...


class Book(Journal, Protocol):
    """What is asked of the journal beside what the enactor asks."""

    def listed(self, place: Place) -> Iterable[Listed]: ...
    def forget_location(self, location: str, *, leader: int, now: datetime) -> int: ...


@dataclass(slots=True)
class Report:
    """What one round did. ``planned`` and ``passed`` (the catalog knew better) count by policy, ``refused`` by
    policy and reason, ``closed`` and the bytes of copies that are done (``moved_bytes``) are those of actions
    that ended since the round before."""

    num_changed: int = 0
    num_looked_at: int = 0
    num_planned: int = 0
    num_passed: int = 0
    num_started: int = 0
    num_closed: int = 0
    num_compared: int = 0
    num_rebuilt: int = 0
    num_struck: int = 0
    num_removed: int = 0
    planned: Counter[str] = field(default_factory=Counter)
    passed: Counter[str] = field(default_factory=Counter)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    closed: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """By tier, kind and state."""
    moved_bytes: Counter[str] = field(default_factory=Counter)
    """By tier."""


class Control:
    """Rounds under one epoch."""

    def __init__(
        self,
        world: World,
        planner: Planner,
        enactor: Enactor,
        port: TierPort,
        book: Book,
        feed: Feed,
        *,
        leader: int,
        clock: Callable[[], datetime],
        call: Call = asyncio.to_thread,
        compare_every_s: float = COMPARE_EVERY_S,
        grace_s: float = GRACE_S,
        compares: Collection[Tier] = frozenset(Tier),
        caches: Collection[Tier] = frozenset(),
    ) -> None:
        """``world`` knows the nodes and places; the caller keeps them up to date. ``compares`` are the tiers
        whose places are compared with the catalog, ``caches`` those of them where what is listed and not
        there is struck from the list."""
        self.world = world
        self._planner = planner
        self._enactor = enactor
        self._port = port
        self._book = book
        self._feed = feed
        self._leader = leader
        self._clock = clock
        self._call = call
        self._compare_every_s = compare_every_s
        self._grace_s = grace_s
        self._compares = compares
        self._caches = caches
        self._settling: OrderedDict[Key, float] = OrderedDict()
        """When the last copy of a cube failed: it settles like one that was moved, lest it is tried for ever."""
        self._gone: set[str] = set()
        """Locations that were forgotten. A copy may yet commit there that was on its way."""
        self._cursor = 0
        self._unread: dict[Key, None] = {}
        """Cubes that changed, and of which the catalog has not been read since."""
        self._open: dict[str, ActionRecord] = {}
        self._busy: Counter[tuple[TenantId, CubeId | None]] = Counter()
        self._asked: deque[Action] = deque()
        self._to_compare: deque[Place] = deque()
        self._compared_at = float("-inf")
        self._is_known = False
        self._is_unsure = True
        """Whether actions may be in the journal that this doesn't know of: the answer was lost."""
        self.last_refused: Sequence[Refused] = ()

    @property
    def is_deposed(self) -> bool:
        return self._enactor.is_deposed

    @property
    def num_failures(self) -> int:
        """Errors of the enactor that are faults of ours."""
        return self._enactor.num_failures

    @property
    def num_open(self) -> int:
        """Actions that are journaled and have not ended."""
        return len(self._open)

    @property
    def num_waiting(self) -> int:
        """Those of them that wait for their turn, or were put off."""
        return self._enactor.num_waiting

    def ask(self, actions: Iterable[Action]) -> None:
        """Put an operator's actions into the next plan, before all others."""
        self._asked.extend(actions)

    def used(self, tenant: TenantId, cubes: Iterable[CubeId]) -> None:
        """Cubes whose uses were counted in the catalog, which the feed need not tell of."""
        self._unread |= {(tenant, cube): None for cube in cubes}

    async def forget(self, location: str) -> int:
        """Strike what is listed at a location that will not come back, so that it is made anew elsewhere; how
        many payloads. To be called for each location that the catalog names and the cluster doesn't.

        Raises:
            StaleEpoch: another leads. Unavailable: the catalog does not answer.
        """
        num = await self._call(
            self._book.forget_location, location, leader=self._leader, now=self._clock()
        )
        self._gone.add(location)
        self.world.remove_location(location)
        return num

    async def _forget_again(self) -> None:
        used = zip(self.world.places, self.world.used_bytes, strict=True)
        for location in {place.location: None for place, num_bytes in used if num_bytes}:
            if location in self._gone:
                await self.forget(location)

    def dry_run(self, *, full: bool = True) -> Plan:
        """What would be planned now, and what refused; nothing is changed."""
        now = self._clock().timestamp()
        return self._planner.plan(self.world, now, full=full, asked=tuple(self._asked))

    async def recover(self) -> int:
        """Take over what is open in the journal, whoever began it; how many actions. The first round does
        it, and each one after a round whose answer from the journal was lost.

        Raises:
            StaleEpoch: another leads. Unavailable: the catalog does not answer.
        """
        found = await self._enactor.recover()
        for record in found:
            self._note_open(record)
        self._is_unsure = False
        return len(found)

    async def round(self) -> Report:
        """One round. What it starts goes on beside it.

        Raises:
            StaleEpoch: another leads. Unavailable: the catalog does not answer; repeat it.
        """
        report = Report()
        if self._is_unsure:
            await self.recover()
        await self._hear(report)
        await self._forget_again()
        now = self._clock().timestamp()
        asked = tuple(self._asked)
        plan = self._planner.plan(self.world, now, full=not self._is_known, asked=asked)
        self._is_unsure = True
        outcomes = await self._enactor.submit(plan.actions)
        self._is_unsure = False
        self._planner.settle(self.world, plan)
        self._note(plan.actions, outcomes, report)
        self._is_known = True
        for _ in asked:
            self._asked.popleft()
        report.num_looked_at = len(plan.rows)
        report.refused.update({(p, str(why)): n for (p, why), n in plan.num_refused.items()})
        self.last_refused = plan.refused
        report.num_started = self._enactor.pump()
        await self._compare_next(report, now)
        return report

    async def _hear(self, report: Report) -> None:
        """Bring the world up to date."""
        closed, self._enactor.closed[:] = list(self._enactor.closed), []
        for record in closed:
            _count(record, report)
            self._note_closed(record)
            if record.cube is not None:
                self._unread[record.tenant, record.cube] = None
            elif record.action is ActionKind.COPY:
                self._unread |= dict.fromkeys(self.world.cubes_of(record.tenant))
        fresh, cursor = await self._call(self._feed.changed, self._cursor)
        self._cursor = cursor
        self._unread |= dict.fromkeys(fresh)
        report.num_closed, report.num_changed = len(closed), len(self._unread)
        if self._unread:
            # What is told of while they are read is read again.
            keys, self._unread = list(self._unread), {}
            try:
                found = await self._call(self._feed.read, keys)
            except BaseException:
                self._unread |= dict.fromkeys(keys)
                raise
            self._put(keys, found)
        self._reserve()

    def _put(self, keys: Sequence[Key], found: Iterable[tuple[CubeFacts, Sequence[Held]]]) -> None:
        gone = dict.fromkeys(keys)
        for facts, held in found:
            row = self.world.put(facts, held)
            self.world.cubes["busy"][row] = self._is_busy(facts.tenant, facts.id)
            failed_at = self._settling.get((facts.tenant, facts.id), facts.moved_at)
            self.world.cubes["moved_at"][row] = max(facts.moved_at, failed_at)
            del gone[facts.tenant, facts.id]
        for tenant, cube in gone:
            self.world.remove(tenant, cube)

    def _note(
        self,
        actions: Sequence[Action],
        outcomes: Sequence[ActionRecord | Passed],
        report: Report,
    ) -> None:
        """Note what became of a plan's actions."""
        for action, outcome in zip(actions, outcomes, strict=True):
            if isinstance(outcome, ActionRecord):
                report.num_planned += 1
                report.planned[action.policy] += 1
                if outcome.is_open:
                    self._note_open(outcome)
            else:
                report.num_passed += 1
                report.passed[action.policy] += 1
                if isinstance(action, Copy | Drop) and action.cube is not None:
                    self._unread[action.tenant, action.cube] = None  # it is not as it was thought

    async def _compare_next(self, report: Report, now: float) -> None:
        """Compare one place: what is suspected first, then all in turn."""
        if self._enactor.suspects:
            place = next(iter(self._enactor.suspects))
            del self._enactor.suspects[place]
        else:
            if not self._to_compare and now - self._compared_at >= self._compare_every_s:
                self._to_compare.extend(p for p in self.world.places if p.tier in self._compares)
                self._compared_at = now
            if not self._to_compare:
                return
            place = self._to_compare.popleft()
        number = self.world.places.get(place)
        if number == NONE or place.tier not in self._compares or not self.world.is_readable(number):
            return
        try:
            await self._compare(place, report)
        except (Unavailable, NotFound):
            self._enactor.suspects[place] = None

    async def _compare(self, place: Place, report: Report) -> None:
        stored = await self._port.inventory(place, leader=self._leader)
        listed = await self._call(lambda: list(self._book.listed(place)))
        different = compare(
            place,
            listed,
            stored,
            open_actions=self._open,
            now=self._clock().timestamp(),
            grace_s=self._grace_s,
            is_cache=place.tier in self._caches,
        )
        report.num_compared += 1
        # Bytes that an open drop has struck may yet be listed again.
        remove = [one for one in different.remove if not self._is_busy(one.tenant, one.cube)]
        if remove:
            report.num_removed += await self._port.sweep(place, remove, leader=self._leader)
        self._asked.extend((*different.rebuild, *different.strike))
        report.num_rebuilt += len(different.rebuild)
        report.num_struck += len(different.strike)

    # -- what is under way ---------------------------------------------------------------------

    def _note_open(self, record: ActionRecord) -> None:
        if record.id in self._open:
            return
        self._open[record.id] = record
        self._busy[record.tenant, record.cube] += 1
        if record.cube is None:
            self.world.moving_tenants.add(record.tenant)
        else:
            row = self.world.row(record.tenant, record.cube)
            if row != NONE:
                self.world.cubes["busy"][row] = True

    def _note_closed(self, record: ActionRecord) -> None:
        if self._open.pop(record.id, None) is None:
            return
        self._busy[record.tenant, record.cube] -= 1
        if not self._busy[record.tenant, record.cube]:
            del self._busy[record.tenant, record.cube]
        if record.cube is None:
            if not self._busy[record.tenant, None]:
                self.world.moving_tenants.discard(record.tenant)
            return
        if record.state is ActionState.FAILED:
            self._settling[record.tenant, record.cube] = record.updated_at.timestamp()
            if len(self._settling) > MAX_SETTLING:
                self._settling.popitem(last=False)
        row = self.world.row(record.tenant, record.cube)
        if row != NONE:
            self.world.cubes["busy"][row] = self._is_busy(record.tenant, record.cube)
            if record.state is ActionState.DONE:
                self.world.cubes["moved_at"][row] = record.updated_at.timestamp()
            self.world.touch(row)

    def _reserve(self) -> None:
        """Count the room that open copies will take."""
        reserved = [0] * len(self.world.places)
        for record in self._open.values():
            target = record.target if record.action is ActionKind.COPY else None
            number = NONE if target is None else self.world.places.get(target)
            if number != NONE:
                reserved[number] += record.num_bytes
        self.world.reserved_bytes = reserved

    def _is_busy(self, tenant: TenantId, cube: CubeId) -> bool:
        return self._busy[tenant, cube] > 0 or self._busy[tenant, None] > 0


def _count(record: ActionRecord, report: Report) -> None:
    place = record.target or record.source
    if place is None:
        return
    report.closed[place.tier, record.action, record.state] += 1
    if record.action is ActionKind.COPY and record.state is ActionState.DONE:
        report.moved_bytes[place.tier] += record.num_bytes
