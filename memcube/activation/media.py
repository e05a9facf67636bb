"""KV below the device: host, disk and object store as one hierarchy.

A payload is put into the first medium that admits it. What a medium's policy evicts goes to the next one
that admits it, unless one below has it already; what none admits is dropped. A hit below is copied up
to the first medium that admits it. So there are no moves: a copy is made, then another is dropped, and
a payload may lie in several media.

A failing medium never takes others along: a full disk, or a store that doesn't answer, admits nothing for a
while, and what would have gone there goes further down or is dropped. A read that fails is a miss.

``delete`` and its kin return when no medium has the payload any more, and what is on its way between
two media then doesn't arrive.

Thread-safe. No lock is held while a medium works but that of the key it works on. ``now`` is a
monotonic time in seconds.
"""

import asyncio
import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from memcube.activation.blocks import RetentionPolicy
from memcube.activation.disk import DiskMedium
from memcube.activation.keyring import Keyring
from memcube.activation.medium import HostMedium, LocalArrays, Medium, Record, SharedArrays
from memcube.activation.packs import ObjectMedium, remove_models
from memcube.activation.payload import KvPayload
from memcube.activation.stats import MediumStats
from memcube.errors import LimitExceeded, MemCubeError, Unavailable
from memcube.ids import TenantId
from memcube.policies.retention import Item

log = logging.getLogger(__name__)

PAUSE_S = 30.0
"""How long a medium that failed admits nothing."""
_STRIPES = 64
_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class _Level:
    medium: Medium
    policy: RetentionPolicy
    s_per_byte: float
    resident: set[str] = field(default_factory=set)
    """What the policy lets stay. What is not in it and lies here is on its way out."""
    closed_until: float = float("-inf")
    hits: int = 0
    hit_tokens: int = 0
    misses: int = 0
    events: Counter[str] = field(default_factory=Counter)

    def load_s(self, num_bytes: int) -> float:
        return num_bytes * self.s_per_byte

    def loaded(self, num_bytes: int, took_s: float) -> None:
        if num_bytes:
            self.s_per_byte += 0.1 * (took_s / num_bytes - self.s_per_byte)


@dataclass(slots=True, eq=False)
class _Entry:
    """A payload that lies in the media of ``at``, by size there."""

    record: Record
    at: dict[int, int] = field(default_factory=dict)


class MediaHierarchy:
    """Media from the nearest to the farthest, each with the policy that says what stays in it."""

    def __init__(
        self,
        media: Sequence[tuple[Medium, RetentionPolicy]],
        *,
        now: float,
        keyring: Keyring | None = None,
        pause_s: float = PAUSE_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Takes in what the media hold already, as far as their policies admit it.

        ``keyring`` is the one that the media seal with; ``clock`` measures how long loads take.
        """
        guesses = {"host": 1e-10, "disk": 1e-9}
        self._levels = [
            _Level(medium, policy, guesses.get(medium.name, 1e-8)) for medium, policy in media
        ]
        self._keyring = keyring
        self._pause_s = pause_s
        self._clock = clock
        self._lock = threading.RLock()
        self._stripes = [threading.Lock() for _ in range(_STRIPES)]
        self._entries: dict[str, _Entry] = {}
        self._by_tenant: defaultdict[str, set[str]] = defaultdict(set)
        self._by_member: defaultdict[str, set[str]] = defaultdict(set)
        self._pins: Counter[str] = Counter()
        self._undeleted: set[str] = set()
        for number in range(len(self._levels)):
            self._take_in(number, now)

    def put(
        self, payload: KvPayload, item: Item, now: float, *, members: Collection[str] = ()
    ) -> bool:
        """Keep a payload; whether a medium did. Idempotent: one that is here already stays.

        ``members`` are the cubes whose text is in it, for ``delete_members``. The item's ``num_bytes``
        and ``load_s`` are set anew, as they differ from medium to medium.
        """
        item = replace(item, key=payload.key, num_bytes=payload.num_bytes, load_s=0.0)
        record = Record(item=item, members=frozenset(members))
        with self._lock:
            entry = self._entries.get(payload.key)
            if entry is None:
                entry = self._add(record)
            else:  # other cubes may have the same text
                self._add_members(entry, record.members)
            if 0 in entry.at:
                self._levels[0].policy.hit(payload.key, now)
                return True
        kept = self._place(entry, lambda: payload, 0, len(self._levels), now)
        with self._lock:
            self._drop_if_nowhere(entry)
        return kept

    def get(self, key: str, now: float) -> KvPayload | None:
        """A payload from the nearest medium that has it, or None. It passed its check."""
        with self._lock:
            entry = self._entries.get(key)
        if entry is None:
            self._levels[0].misses += 1
            return None
        for number, level in enumerate(self._levels):
            with self._lock:
                if number not in entry.at:
                    level.misses += 1
                    continue
                level.policy.hit(key, now)
            if (payload := self._read(number, key, now)) is None:
                self._lose_if_gone(number, entry)
                continue
            self._place(entry, lambda found=payload: found, 0, number, now)
            with self._lock:
                level.hits += 1
                level.hit_tokens += payload.num_tokens
                # Deleted while it was read?
                return payload if self._entries.get(key) is entry else None
        return None

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def where(self, key: str) -> tuple[str, ...]:
        """The media that have a payload, the nearest first."""
        with self._lock:
            entry = self._entries.get(key)
            return tuple(self._levels[n].medium.name for n in sorted(entry.at)) if entry else ()

    def residency(self, members: Collection[str]) -> dict[str, int]:
        """Bytes by medium of the payloads that hold any of these cubes."""
        found: Counter[str] = Counter()
        with self._lock:
            for key in {key for member in members for key in self._by_member.get(member, ())}:
                for number, size in self._entries[key].at.items():
                    found[self._levels[number].medium.name] += size
        return dict(found)

    def members(self) -> dict[str, set[str]]:
        """The cubes and adapters that payloads here hold, by tenant."""
        with self._lock:
            found: dict[str, set[str]] = {}
            for entry in self._entries.values():
                found.setdefault(entry.record.item.tenant, set()).update(entry.record.members)
            return found

    def delete(self, keys: Collection[str]) -> None:
        """Remove payloads from every medium. They are not served from the beginning of the call on.

        Raises:
            Unavailable: a medium could not be reached, and may have their bytes still. Repeat the
                call, or make another of its kind: what is left to delete is remembered.
        """
        with self._lock:
            wanted = {*keys} | self._undeleted
            self._undeleted |= wanted
            for key in wanted:
                for level in self._levels:
                    level.policy.forget(key)
                    level.resident.discard(key)
                self._remove(key)
        for key in wanted:
            # Who is writing it is done when we have its lock, and who comes later finds it gone.
            with self._key_lock(key):
                pass
        if wanted:
            self._each(lambda medium: medium.delete(wanted))
        with self._lock:
            self._undeleted -= wanted

    def delete_members(self, cubes: Collection[str], tenant: str | None = None) -> int:
        """Remove every payload that holds one of these cubes (of a tenant); their number.

        Raises:
            Unavailable: as ``delete``.
        """
        with self._lock:
            keys = {
                key
                for cube in cubes
                for key in self._by_member.get(cube, ())
                if tenant in (None, self._entries[key].record.item.tenant)
            }
        self.delete(keys)
        return len(keys)

    def delete_tenant(self, tenant: str) -> int:
        """Destroy a tenant's key and remove all of its payloads; the number of those known here.

        Raises:
            Unavailable: as ``delete``. The key is gone all the same.
        """
        if self._keyring is not None:
            self._keyring.forget(TenantId(tenant))
        with self._lock:
            keys = set(self._by_tenant.get(tenant, ()))
        self.delete(keys)
        self._each(lambda medium: medium.delete_tenant(tenant))
        return len(keys)

    def pin(self, key: str) -> None:
        """Keep a payload where it is, or will be put, until as many ``unpin`` calls."""
        with self._lock:
            self._pins[key] += 1
            if self._pins[key] == 1:
                for level in self._levels:
                    if key in level.resident:
                        level.policy.pin(key)

    def unpin(self, key: str) -> None:
        with self._lock:
            self._pins[key] -= 1
            if self._pins[key] <= 0:
                del self._pins[key]
                for level in self._levels:
                    if key in level.resident:
                        level.policy.unpin(key)

    def hint(
        self, group: str, probability: float | None, now: float, expected_at: float | None = None
    ) -> None:
        """How likely it is that a conversation has another turn, and when; None takes a hint back."""
        with self._lock:
            for level in self._levels:
                level.policy.hint(group, probability, now, expected_at)

    def refresh(self, now: float) -> None:
        """Learn of what other nodes have put into shared media, or removed from them.

        Raises:
            Unavailable: a medium doesn't answer.
        """
        for number, level in enumerate(self._levels):
            if level.medium.remote:
                level.medium.refresh()
                self._take_in(number, now)

    def flush(self) -> None:
        """Write what media have put off.

        Raises:
            Unavailable: some of it was dropped.
        """
        self._each(lambda medium: medium.flush())

    def copy_down(self, now: float) -> int:
        """Copy what lies in the nearest medium alone to one below that admits it, most recently used
        first: what a host's memory holds outlives the process that way. Returns how many were."""
        with self._lock:
            alone = [
                entry
                for record in reversed(self._levels[0].medium.records())
                if (entry := self._entries.get(record.key)) is not None and set(entry.at) == {0}
            ]
        copied = 0
        for entry in alone:
            fetch = partial(self._read, 0, entry.record.key, now)
            copied += self._place(entry, fetch, 1, len(self._levels), now)
        return copied

    def close(self) -> None:
        for level in self._levels:
            level.medium.close()

    def stats(self) -> list[MediumStats]:
        """One entry a medium, the nearest first."""
        with self._lock:
            by_tenant = [Counter[str]() for _ in self._levels]
            num_payloads = [0] * len(self._levels)
            for entry in self._entries.values():
                for number, size in entry.at.items():
                    by_tenant[number][entry.record.item.tenant] += size
                    num_payloads[number] += 1
            return [
                MediumStats(
                    name=level.medium.name,
                    num_payloads=num_payloads[number],
                    used_bytes=level.medium.used_bytes,
                    bytes_by_tenant=dict(by_tenant[number]),
                    hits=level.hits,
                    hit_tokens=level.hit_tokens,
                    misses=level.misses,
                    events=dict(level.events),
                    load_s_per_mb=level.s_per_byte * 1e6,
                )
                for number, level in enumerate(self._levels)
            ]

    def _place(
        self,
        entry: _Entry,
        fetch: Callable[[], KvPayload | None],
        first: int,
        stop: int,
        now: float,
    ) -> bool:
        """Copy a payload into the first of these media that admits it. No lock is held by the caller."""
        for number in range(first, stop):
            with self._lock:
                if self._entries.get(entry.record.key) is not entry:
                    return False
                if number in entry.at:
                    return True
                admitted, victims, reason = self._admit(entry, number, now)
            for victim in victims:
                self._evict(victim, number, reason, now)
            if admitted and self._write(entry, fetch, number, now):
                return True
        return False

    def _admit(self, entry: _Entry, number: int, now: float) -> tuple[bool, Sequence[str], str]:
        """Under the lock: ask the policy, and note what it said."""
        level, item = self._levels[number], entry.record.item
        if now < level.closed_until:
            level.events["refused: closed"] += 1
            return False, (), ""
        size = level.medium.size_of(item.num_bytes)
        asked = replace(item, num_bytes=size, load_s=level.load_s(size))
        decision = level.policy.admit(asked, now)
        level.resident.difference_update(decision.victims)
        if decision.admitted:
            if item.key in self._pins and item.key not in level.resident:
                level.policy.pin(item.key)
            level.resident.add(item.key)
        else:
            level.events[f"refused: {decision.reason}"] += 1
        return decision.admitted, decision.victims, decision.reason

    def _write(
        self, entry: _Entry, fetch: Callable[[], KvPayload | None], number: int, now: float
    ) -> bool:
        """Put an admitted payload into its medium, unless it was evicted or deleted by now."""
        level, key = self._levels[number], entry.record.key
        with self._key_lock(key):
            with self._lock:
                if number in entry.at:
                    return True
                if self._entries.get(key) is not entry or key not in level.resident:
                    return False
            failure = "lost"
            try:
                if (payload := fetch()) is not None:
                    level.medium.put(payload, entry.record)
                    with self._lock:
                        if self._entries.get(key) is entry and key in level.resident:
                            entry.at[number] = level.medium.size_of(entry.record.item.num_bytes)
                            return True
                    self._evict_from(level, key)
                    return False
            except (LimitExceeded, Unavailable) as failed:
                failure = f"failed: {type(failed).__name__}"
                if isinstance(failed, Unavailable):
                    log.warning("%s admits no KV for a while: %s", level.medium.name, failed)
                    level.closed_until = now + self._pause_s
            with self._lock:
                level.events[failure] += 1
                if self._entries.get(key) is entry:
                    level.resident.discard(key)
                    level.policy.forget(key)
        return False

    def _evict(self, key: str, number: int, reason: str, now: float) -> None:
        """Let a payload go from a medium, to one below if none there has it."""
        level = self._levels[number]
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or number not in entry.at:
                return  # deleted, or still being written: then its writer finds that it may not stay
            is_below = any(lower > number for lower in entry.at)
        if not is_below:
            fetch = partial(self._read, number, key, now)
            self._place(entry, fetch, number + 1, len(self._levels), now)
        with self._key_lock(key):
            with self._lock:
                if self._entries.get(key) is not entry or key in level.resident:
                    return  # deleted, or admitted again
                entry.at.pop(number, None)
                level.events[f"evicted: {reason}"] += 1
                self._drop_if_nowhere(entry)
            self._evict_from(level, key)

    def _evict_from(self, level: _Level, key: str) -> None:
        try:
            level.medium.evict([key])
        except MemCubeError as failed:
            log.warning("KV stays in %s for now: %s", level.medium.name, failed)
            level.events[f"failed: {type(failed).__name__}"] += 1

    def _read(self, number: int, key: str, now: float) -> KvPayload | None:
        level = self._levels[number]
        if level.medium.remote and now < level.closed_until:
            return None
        started = self._clock()
        try:
            payload = level.medium.get(key)
        except MemCubeError as failed:
            log.warning("KV could not be read from %s: %s", level.medium.name, failed)
            with self._lock:
                level.events[f"failed: {type(failed).__name__}"] += 1
                if level.medium.remote:  # it may be long in not answering
                    level.closed_until = now + self._pause_s
            return None
        if payload is not None:
            level.loaded(payload.num_bytes, self._clock() - started)
        return payload

    def _lose_if_gone(self, number: int, entry: _Entry) -> None:
        """After a read that gave nothing: what the medium hasn't any more is not known there."""
        key, level = entry.record.key, self._levels[number]
        with self._key_lock(key), self._lock:
            level.misses += 1
            if number not in entry.at or key in level.medium or self._entries.get(key) is not entry:
                return
            level.events["lost"] += 1
            del entry.at[number]
            level.resident.discard(key)
            level.policy.forget(key)
            self._drop_if_nowhere(entry)

    def _take_in(self, number: int, now: float) -> None:
        """Know what a medium holds, as far as its policy admits it; the rest is evicted."""
        level = self._levels[number]
        held = level.medium.records()
        with self._lock:
            gone = [e for e in self._entries.values() if number in e.at]
        for entry in gone:
            if entry.record.key not in level.medium:
                self._lose_if_gone(number, entry)
        for record in held:
            with self._lock:
                entry = self._entries.get(record.key) or self._add(record)
                if number in entry.at:
                    continue
                admitted, victims, reason = self._admit(entry, number, now)
                if admitted:
                    entry.at[number] = level.medium.size_of(record.item.num_bytes)
            for victim in victims:
                self._evict(victim, number, reason, now)
            if not admitted:
                self._evict_from(level, record.key)
                with self._lock:
                    self._drop_if_nowhere(entry)

    def _add(self, record: Record) -> _Entry:
        """Under the lock."""
        entry = self._entries[record.key] = _Entry(record)
        self._by_tenant[record.item.tenant].add(record.key)
        self._add_members(entry, record.members)
        return entry

    def _add_members(self, entry: _Entry, members: frozenset[str]) -> None:
        """Under the lock."""
        if not members <= entry.record.members:
            entry.record = replace(entry.record, members=entry.record.members | members)
        for member in members:
            self._by_member[member].add(entry.record.key)

    def _remove(self, key: str) -> None:
        """Under the lock. The policies keep what they know of its past."""
        if (entry := self._entries.pop(key, None)) is None:
            return
        _discard(self._by_tenant, entry.record.item.tenant, key)
        for member in entry.record.members:
            _discard(self._by_member, member, key)

    def _drop_if_nowhere(self, entry: _Entry) -> None:
        """Under the lock. What is being written is somewhere soon."""
        key = entry.record.key
        if entry.at or any(key in level.resident for level in self._levels):
            return
        if self._entries.get(key) is entry:
            self._remove(key)

    def _each(self, call: Callable[[Medium], None]) -> None:
        """Call on every medium; then raise the first of their errors."""
        errors: list[MemCubeError] = []
        for level in self._levels:
            try:
                call(level.medium)
            except MemCubeError as failed:
                errors.append(failed)
        if errors:
            raise errors[0]

    @contextmanager
    def _key_lock(self, key: str) -> Iterator[None]:
        with self._stripes[hash(key) % _STRIPES]:
            yield


class AsyncMedia:
    """The calls of a hierarchy that do I/O, from an event loop, on threads of its own."""

    def __init__(self, media: MediaHierarchy, *, num_threads: int = 4) -> None:
        self.media = media
        self._threads = ThreadPoolExecutor(num_threads, "kv-media")

    async def put(
        self, payload: KvPayload, item: Item, now: float, *, members: Collection[str] = ()
    ) -> bool:
        return await self._run(lambda: self.media.put(payload, item, now, members=members))

    async def get(self, key: str, now: float) -> KvPayload | None:
        return await self._run(lambda: self.media.get(key, now))

    async def prefetch(self, keys: Sequence[str], now: float, *, deadline_s: float) -> int:
        """Bring payloads up, in order, until the time is over; how many are there now.

        What is being read at the deadline is still brought up.
        """
        until = asyncio.get_running_loop().time() + deadline_s
        num_found = 0
        for key in keys:
            left_s = until - asyncio.get_running_loop().time()
            getting = asyncio.ensure_future(self.get(key, now))
            done, _ = await asyncio.wait([getting], timeout=max(0.0, left_s))
            if not done:
                break
            num_found += getting.result() is not None
        return num_found

    async def delete(self, keys: Collection[str]) -> None:
        await self._run(lambda: self.media.delete(keys))

    async def delete_members(self, cubes: Collection[str], tenant: str | None = None) -> int:
        return await self._run(lambda: self.media.delete_members(cubes, tenant))

    async def delete_tenant(self, tenant: str) -> int:
        return await self._run(lambda: self.media.delete_tenant(tenant))

    async def flush(self) -> None:
        await self._run(self.media.flush)

    async def close(self) -> None:
        await self._run(self.media.close)
        self._threads.shutdown()

    async def _run(self, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def _discard(index: dict[str, set[str]], name: str, key: str) -> None:
    held = index[name]
    held.discard(key)
    if not held:
        del index[name]


__all__ = [
    "AsyncMedia",
    "DiskMedium",
    "HostMedium",
    "LocalArrays",
    "MediaHierarchy",
    "Medium",
    "MediumStats",
    "ObjectMedium",
    "Record",
    "RetentionPolicy",
    "SharedArrays",
    "remove_models",
]
