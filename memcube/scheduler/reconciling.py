"""The catalog against what a place holds, in both directions; pure.

What is listed and not there, or not sound, is made anew; where the place is a cache, which lets go what it
likes, it is struck from the list instead, and the policies say whether it is worth making again. What is
there and not listed goes after a grace time, as do reservations and holds of actions that have ended. What
belongs to an open action is left to it.

``memcube.reconcile`` does the same for the plaintext index, shard by shard and with its own book; this is
for places that the scheduler fills by copies.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from memcube.catalog.placing import Listed
from memcube.scheduler.actions import Copy, Drop, Place, Tier
from memcube.scheduler.port import Stored

POLICY = "reconcile"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What to do about a place: ``rebuild`` by copies (a cache: ``strike`` by drops), ``remove`` by a sweep.
    ``num_young`` are those that are left for now."""

    rebuild: tuple[Copy, ...]
    strike: tuple[Drop, ...]
    remove: tuple[Stored, ...]
    num_young: int = 0


def compare(
    place: Place,
    listed: Iterable[Listed],
    stored: Iterable[Stored],
    *,
    open_actions: Collection[str],
    now: float,
    grace_s: float,
    is_cache: bool = False,
) -> Difference:
    """What differs. ``open_actions`` are the ids of those under way; it does no harm if lists are of
    slightly different moments: rebuilds are conditional on the epoch, and what is young is left."""
    wanted = {(one.tenant, one.cube): one for one in listed}
    lacking: list[tuple[Listed, str]] = []
    remove: list[Stored] = []
    num_young = 0
    for found in stored:
        if found.action in open_actions or any(id in open_actions for id in found.pinned_by):
            if found.action is None:
                wanted.pop((found.tenant, found.cube), None)
            continue
        is_old = now - found.since >= grace_s
        if found.action is not None or found.pinned_by:
            remove += [found] if is_old else []
            num_young += not is_old
        if found.action is not None:
            continue
        one = wanted.pop((found.tenant, found.cube), None)
        if one is not None and one.current is not None:
            # An index keeps an old version until it is given the new one, and nobody is shown it.
            is_right = found.version == one.version or place.tier is Tier.PLAINTEXT
            if is_right and found.sound and found.version >= one.version:
                continue
            if one.version == one.current:
                lacking.append((one, "it is damaged" if is_right else "it is old"))
            continue
        if not found.pinned_by:
            remove += [found] if is_old else []
            num_young += not is_old
    lacking += [
        (one, "it is listed and not there") for one in wanted.values() if one.current == one.version
    ]
    return Difference(
        rebuild=() if is_cache else tuple(_rebuild(place, *one) for one in lacking),
        strike=tuple(_strike(place, *one) for one in lacking) if is_cache else (),
        remove=tuple(remove),
        num_young=num_young,
    )


def _rebuild(place: Place, one: Listed, reason: str) -> Copy:
    return Copy(
        tenant=one.tenant,
        cube=one.cube,
        version=one.version,
        epoch=one.epoch,
        source=None,
        target=place,
        num_bytes=one.num_bytes,
        policy=POLICY,
        reason=reason,
    )


def _strike(place: Place, one: Listed, reason: str) -> Drop:
    return Drop(
        tenant=one.tenant,
        cube=one.cube,
        version=one.version,
        epoch=one.epoch,
        place=place,
        num_bytes=one.num_bytes,
        policy=POLICY,
        reason=reason,
    )
