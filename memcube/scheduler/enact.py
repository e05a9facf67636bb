"""Carries actions out, each step journaled before it is taken.

A copy: the target reserves, the bytes go over and are read back (*prepared*), the catalog lists them
(*committed*), the target publishes, the source is let go (*done*). A drop: another copy is read, the catalog
strikes the payload (*committed*), another copy is read once more, the bytes go (*done*). Until the commit an
action can be undone, after it it is finished; but a drop whose other copy was lost around its commit is
listed again. So whoever leads next finishes or undoes what it finds open, with the same code (``recover``).

What must not wait for the enactor: nothing. It starts what the limits let (``pump``), each action as a
task of its own, and knows no clock but the one it is given.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol

from memcube.catalog.action_rows import ActionRecord
from memcube.catalog.scheduling import Passed
from memcube.errors import (
    Conflict,
    Corrupt,
    NotFound,
    StaleEpoch,
    StorageFull,
    Unavailable,
)
from memcube.ids import CubeId, TenantId
from memcube.scheduler.actions import Action, ActionKind, ActionState, Place, Tier
from memcube.scheduler.fairness import Bucket, FairQueue
from memcube.scheduler.port import TierPort
from memcube.scheduler.settings import MoveLimits

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 6
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0

Spawn = Callable[[Coroutine[Any, Any, None]], object]
Call = Callable[..., Awaitable[Any]]


class Journal(Protocol):
    """What the enactor asks of the catalog: ``memcube.catalog.ActionBook``."""

    def plan(
        self, actions: Sequence[Action], *, leader: int, now: datetime
    ) -> list[ActionRecord | Passed]: ...
    def adopt(self, *, leader: int, now: datetime) -> list[ActionRecord]: ...
    def get(self, id: str) -> ActionRecord: ...
    def prepared(self, id: str, checksum: str, *, leader: int, now: datetime) -> ActionRecord: ...
    def commit(self, id: str, *, leader: int, now: datetime) -> ActionRecord: ...
    def put_off(
        self, id: str, why: str, *, until: datetime, leader: int, now: datetime
    ) -> ActionRecord: ...
    def close(
        self, id: str, state: ActionState, why: str, *, leader: int, now: datetime
    ) -> ActionRecord: ...
    def restore(self, id: str, why: str, *, leader: int, now: datetime) -> ActionRecord: ...
    def copies(self, tenant: TenantId, cube: CubeId, tier: Tier) -> list[tuple[Place, int]]: ...


class Enactor:
    """Acts for one leader, under its epoch. When it hears that another leads, it stops for good."""

    def __init__(
        self,
        port: TierPort,
        book: Journal,
        *,
        leader: int,
        clock: Callable[[], datetime],
        limits: MoveLimits | None = None,
        spawn: Spawn = asyncio.create_task,
        call: Call = asyncio.to_thread,
    ) -> None:
        """``call`` runs a blocking call of the catalog; ``spawn`` starts a coroutine beside this one."""
        self._port = port
        self._book = book
        self._leader = leader
        self._clock = clock
        self._limits = limits or MoveLimits()
        self._spawn = spawn
        self._call = call
        self._waiting: FairQueue[ActionRecord] = FairQueue()
        self._put_off: dict[str, tuple[datetime, ActionRecord]] = {}
        self._running: dict[str, ActionRecord] = {}
        self._fresh: set[str] = set()
        """Actions that were just journaled, and that nothing was done about yet."""
        self._going: set[str] = set()
        """Drops whose bytes were told to go: they may be gone, so they can't be listed again."""
        self._on_node: Counter[str] = Counter()
        self._bucket = Bucket(
            self._limits.bytes_per_s, self._limits.burst_bytes, now=clock().timestamp()
        )
        self.is_deposed = False
        self.closed: list[ActionRecord] = []
        """Actions that ended, for whoever drives this to take away."""
        self.suspects: dict[Place, None] = {}
        """Places that lost something they had promised: to be compared with the catalog soon."""
        self.num_failures = 0

    # -- for who drives it ---------------------------------------------------------------------

    async def submit(self, actions: Sequence[Action]) -> list[ActionRecord | Passed]:
        """Journal a plan's actions, and let them wait for their turn; of each what became of it.

        Raises:
            StaleEpoch: another leads. Unavailable: the catalog does not answer; they may be journaled,
                and ``recover`` finds them then.
        """
        if not actions:
            return []
        try:
            found = await self._call(
                self._book.plan, actions, leader=self._leader, now=self._clock()
            )
        except StaleEpoch:
            self.is_deposed = True
            raise
        for record in found:
            if isinstance(record, ActionRecord) and record.is_open:
                self._fresh.add(record.id)
                self._waiting.put(record)
        return found

    async def recover(self) -> list[ActionRecord]:
        """Take over all that is open in the journal, whoever began it.

        Raises:
            StaleEpoch: another leads. Unavailable: the catalog does not answer.
        """
        try:
            found = await self._call(self._book.adopt, leader=self._leader, now=self._clock())
        except StaleEpoch:
            self.is_deposed = True
            raise
        for record in found:
            if record.id not in self._running and record.id not in self._put_off:
                self._waiting.put(record)
        return found

    def pump(self) -> int:
        """Start what is due, as far as the limits let; how many actions."""
        now = self._clock()
        for id, (at, record) in list(self._put_off.items()):
            if at <= now:
                del self._put_off[id]
                self._waiting.put(record)
        started = 0
        while (
            not self.is_deposed
            and len(self._running) < self._limits.max_moves
            and self._bucket.is_open(now.timestamp())
            and (record := self._waiting.pop(self._may_start)) is not None
        ):
            self._running[record.id] = record
            self._on_node.update(_nodes(record))
            if record.action is ActionKind.COPY:
                self._bucket.take(record.num_bytes)
            self._spawn(self._run(record))
            started += 1
        return started

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._put_off)

    def _may_start(self, record: ActionRecord) -> bool:
        most = self._limits.max_moves_per_node
        return all(self._on_node[node] < most for node in _nodes(record))

    # -- one action ----------------------------------------------------------------------------

    async def _run(self, record: ActionRecord) -> None:
        try:
            await self._carry_out(record)
        except StaleEpoch:
            self.is_deposed = True
        except Exception:
            # A fault of ours must neither stop the others nor leave the action to nobody.
            self.num_failures += 1
            log.exception("action %s failed", record.id)
            self._later(record)
        del self._running[record.id]
        self._on_node.subtract(_nodes(record))
        self.pump()

    async def _carry_out(self, record: ActionRecord) -> None:
        try:
            if record.id in self._fresh:
                self._fresh.discard(record.id)
            else:  # what is known of it may be old
                record = await self._call(self._book.get, record.id)
            if not record.is_open:
                self.closed.append(record)
            elif record.action is ActionKind.COPY:
                await self._copy(record)
            else:
                await self._drop(record)
        except Unavailable as failed:
            await self._try_again(record, failed)

    async def _copy(self, record: ActionRecord) -> None:
        leader = self._leader
        try:
            if record.state is ActionState.PLANNED:
                await self._port.prepare(record, leader=leader)
                wanted = await self._port.copy(record, leader=leader)
                found = await self._port.verify(record, leader=leader)
                if found != wanted:
                    raise Corrupt(str(record.target), "the copy differs from its source")
                record = await self._note(self._book.prepared, record.id, found)
            if record.state is ActionState.PREPARED:
                record = await self._note(self._book.commit, record.id)
        except (Conflict, NotFound, Corrupt, StorageFull) as refused:
            is_passed = isinstance(refused, Conflict)
            if isinstance(refused, NotFound | Corrupt):
                self._suspect(record.source)
            await self._undo(
                record, ActionState.UNDONE if is_passed else ActionState.FAILED, str(refused)
            )
            return
        try:
            await self._port.publish(record, leader=leader)
        except NotFound as lost:
            self._suspect(record.target)
            await self._close(record, ActionState.FAILED, f"committed, but {lost}")
            return
        why = ""
        try:
            await self._port.release(record, leader=leader, moved=True)
        except Unavailable as failed:
            if record.cube is None and record.attempts + 1 < MAX_ATTEMPTS:
                raise  # a tenant's source keeps what it has until it is told
            why = f"the source was not let go: {failed}"
            self._suspect(record.source)
        await self._close(record, ActionState.DONE, why)

    async def _drop(self, record: ActionRecord) -> None:
        if record.state is ActionState.PLANNED:
            try:
                await self._check_another(record)
                record = await self._note(self._book.commit, record.id)
            except Conflict as refused:
                try:
                    await self._close(record, ActionState.UNDONE, str(refused))
                    return
                except Conflict:
                    # A commit that was given up for lost has arrived since it was read.
                    record = await self._call(self._book.get, record.id)
        if record.id not in self._going and await self._list_again(record):
            return
        self._going.add(record.id)
        await self._port.drop(record, leader=self._leader)
        await self._close(record, ActionState.DONE, "")

    async def _check_another(self, record: ActionRecord) -> None:
        """Read another copy of what a search needs before this one goes: the list alone may be wrong."""
        if not _is_searched(record):
            return
        listed = await self._copies(record)
        is_listed = (record.source, record.version) in listed
        if not await self._has_another(record, listed) and is_listed:
            raise Conflict("no other copy could be read")

    async def _list_again(self, record: ActionRecord) -> bool:
        """Take a committed drop back if its bytes are the last: what was read before may be lost by now.

        The place is read under this leader's epoch: from then on no earlier leader can remove them.
        """
        if not _is_searched(record) or await self._has_another(record, await self._copies(record)):
            return False
        if not await self._has(record.source, record):
            return False
        try:
            restored = await self._note(self._book.restore, record.id, "the other copies are lost")
        except Conflict:
            return False  # the cube has changed or is gone: nobody needs the bytes
        self.closed.append(restored)
        return True

    async def _copies(self, record: ActionRecord) -> list[tuple[Place, int]]:
        return await self._call(self._book.copies, record.tenant, record.cube, Tier.PLAINTEXT)

    async def _has_another(self, record: ActionRecord, listed: Sequence[tuple[Place, int]]) -> bool:
        for place, version in listed:
            if place == record.source or version != record.version:
                continue
            if await self._has(place, record):
                return True
            self._suspect(place)
        return False

    async def _has(self, place: Place | None, record: ActionRecord) -> bool:
        if place is None or record.cube is None:
            return False
        return await self._port.has(
            place, record.tenant, record.cube, record.version, leader=self._leader
        )

    async def _undo(self, record: ActionRecord, state: ActionState, why: str) -> None:
        """Free both ends and close. Where an end can't be told it is left to the comparison."""
        failed: Unavailable | None = None
        try:
            await self._port.release(record, leader=self._leader, moved=False)
        except Unavailable as silent:
            failed = silent
        try:
            await self._port.free(record, leader=self._leader)
        except Unavailable as silent:
            failed = silent
        if failed is not None:
            if record.attempts + 1 < MAX_ATTEMPTS:
                raise failed
            why = f"{why}; {failed}"
            self._suspect(record.source, record.target)
        await self._close(record, state, why)

    async def _try_again(self, record: ActionRecord, failed: Unavailable) -> None:
        """Put an action off, or end it after so many attempts."""
        now = self._clock()
        try:
            record = await self._call(self._book.get, record.id)
            if not record.is_open:
                self.closed.append(record)
            elif record.attempts + 1 < MAX_ATTEMPTS:
                wait = min(FIRST_WAIT_S * 2.0**record.attempts, LONGEST_WAIT_S)
                record = await self._call(
                    self._book.put_off,
                    record.id,
                    str(failed),
                    until=now + timedelta(seconds=wait),
                    leader=self._leader,
                    now=now,
                )
                self._put_off[record.id] = record.next_at, record
            elif record.state is ActionState.COMMITTED:
                self._suspect(record.source, record.target)
                await self._close(record, ActionState.FAILED, f"committed, but {failed}")
            elif record.action is ActionKind.COPY:
                await self._undo(record, ActionState.FAILED, str(failed))
            else:
                await self._close(record, ActionState.FAILED, str(failed))
        except Unavailable:
            self._later(record)  # the catalog itself: nothing can be noted

    async def _note(self, call: Callable[..., ActionRecord], *given: str) -> ActionRecord:
        return await self._call(call, *given, leader=self._leader, now=self._clock())

    async def _close(self, record: ActionRecord, state: ActionState, why: str) -> None:
        closed = await self._call(
            self._book.close, record.id, state, why, leader=self._leader, now=self._clock()
        )
        self._going.discard(record.id)
        self.closed.append(closed)

    def _later(self, record: ActionRecord) -> None:
        self._put_off[record.id] = self._clock() + timedelta(seconds=LONGEST_WAIT_S), record

    def _suspect(self, *places: Place | None) -> None:
        self.suspects |= dict.fromkeys(place for place in places if place is not None)


def _is_searched(drop: ActionRecord) -> bool:
    """Whether a search needs what is to go: a cube's plaintext."""
    return drop.cube is not None and drop.source is not None and drop.source.tier is Tier.PLAINTEXT


def _nodes(record: ActionRecord) -> set[str]:
    return {place.node for place in (record.source, record.target) if place is not None}
