"""Why an action must not be. Pure: each veto is one function of the view and the action.

A policy may propose what it likes; nothing that is listed here gets into a plan, whoever proposed it. The
catalog checks what would cost a memory (last copy, epoch, version) once more when an action commits.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from memcube.ids import TenantId
from memcube.scheduler.actions import (
    Action,
    Archive,
    Consolidate,
    Copy,
    Drop,
    Tier,
    is_move,
)
from memcube.scheduler.columns import NONE
from memcube.scheduler.rules import SECRET
from memcube.scheduler.settings import MoveLimits
from memcube.scheduler.view import View


class Refusal(StrEnum):
    """Why. The texts stand in logs, the journal and metrics."""

    UNKNOWN = "no such cube"
    TAKEN = "the cube has an action under way"
    FROZEN = "the cube is frozen"
    PINNED = "the cube is pinned"
    SENSITIVE = "the cube is secret, or its owner does not consent"
    LAST_COPY = "it is the last copy"
    NO_SOURCE = "the source can't be read now"
    NOT_FIT = "the node is down or draining"
    OVER_CAPACITY = "no room below the high watermark"
    SETTLING = "the cube was moved a short while ago"
    TENANT_SHARE = "the tenant has had its share of this round"
    OVER_LIMITS = "the round is full"


@dataclass(slots=True)
class Tally:
    """What a plan holds so far."""

    num_actions: int = 0
    num_bytes: int = 0
    by_tenant: Counter[TenantId] = field(default_factory=Counter)

    def count(self, action: Action) -> None:
        self.num_actions += 1
        self.by_tenant[action.tenant] += 1
        if isinstance(action, Copy):
            self.num_bytes += action.num_bytes


def refusal(view: View, action: Action, limits: MoveLimits, tally: Tally) -> Refusal | None:
    """The first reason against an action, or None."""
    if tally.num_actions >= limits.max_actions:
        return Refusal.OVER_LIMITS
    for veto in _VETOES:
        if (why := veto(view, action)) is not None:
            return why
    if isinstance(action, Copy) and tally.num_bytes + action.num_bytes > limits.max_bytes:
        return Refusal.OVER_LIMITS
    if tally.by_tenant[action.tenant] >= max(1, int(limits.max_actions * limits.tenant_fraction)):
        return Refusal.TENANT_SHARE
    return None


def _unknown(view: View, action: Action) -> Refusal | None:
    for cube in action.cubes if isinstance(action, Consolidate) else (action.cube,):
        if cube is None:
            continue
        row = view.row_of(action.tenant, cube)
        if row == NONE or not view["alive"][row]:
            return Refusal.UNKNOWN
        if view.taken[row] and not isinstance(action, Consolidate):
            return Refusal.TAKEN
    return None


def _frozen(view: View, action: Action) -> Refusal | None:
    """A frozen cube is not changed. That it expires is no change (retention wins); nor is where it lies."""
    if isinstance(action, Archive) and view["frozen"][view.row_of(action.tenant, action.cube)]:
        return Refusal.FROZEN
    return None


def _pinned(view: View, action: Action) -> Refusal | None:
    """What is pinned stays where it is, unless the node has to be emptied."""
    if isinstance(action, Archive):
        return Refusal.PINNED if view["pinned"][view.row_of(action.tenant, action.cube)] else None
    if not isinstance(action, Drop) or action.cube is None:
        return None
    row = view.row_of(action.tenant, action.cube)
    stays = view.fit[view.number_of(action.place)] and action.place.tier is not Tier.PLAINTEXT
    return Refusal.PINNED if view["pinned"][row] and stays else None


def _sensitive(view: View, action: Action) -> Refusal | None:
    if isinstance(action, Consolidate):
        cubes = action.cubes
    elif isinstance(action, Copy) and action.target.tier is Tier.PARAMETRIC and action.cube:
        cubes = (action.cube,)
    else:
        return None
    for cube in cubes:
        row = view.row_of(action.tenant, cube)
        if view["sensitivity"][row] == SECRET or not view["consents"][row]:
            return Refusal.SENSITIVE
    return None


def _last_copy(view: View, action: Action) -> Refusal | None:
    """Of what a search needs there must be another copy that can be read."""
    if not isinstance(action, Drop) or action.place.tier is not Tier.PLAINTEXT:
        return None
    if action.cube is None:
        return None  # the catalog knows whether the tenant's owner is another place by now
    row = view.row_of(action.tenant, action.cube)
    if not view["searchable"][row]:
        return None
    here = view.number_of(action.place)
    others = [n for n in view.places_of(row, Tier.PLAINTEXT) if n != here and view.readable[n]]
    return None if others else Refusal.LAST_COPY


def _reachable(view: View, action: Action) -> Refusal | None:
    if not isinstance(action, Copy):
        return None
    target = view.number_of(action.target)
    if target == NONE or not view.fit[target]:
        return Refusal.NOT_FIT
    if action.source is not None and not view.readable[view.number_of(action.source)]:
        return Refusal.NO_SOURCE
    return None


def _capacity(view: View, action: Action) -> Refusal | None:
    if not isinstance(action, Copy):
        return None
    target = view.number_of(action.target)
    high = view.world.capacities[target].high
    needed = view.needs_bytes(action)
    return Refusal.OVER_CAPACITY if needed > max(view.room(target, high), 0) else None


def _settling(view: View, action: Action) -> Refusal | None:
    """What was moved lately stays, but for what must be: an empty node, a lost copy, an operator's wish."""
    if not is_move(action) or action.policy not in _GOOD_NOT_NEEDED or action.cube is None:  # type: ignore[union-attr]
        return None
    row = view.row_of(action.tenant, action.cube)  # type: ignore[union-attr]
    since = view.now - view["moved_at"][row]
    return Refusal.SETTLING if since < view.profile(row).settle_s else None


_GOOD_NOT_NEEDED = frozenset({"promotion", "decay", "balance"})
_VETOES: tuple[Callable[[View, Action], Refusal | None], ...] = (
    _unknown,
    _frozen,
    _pinned,
    _sensitive,
    _last_copy,
    _reachable,
    _capacity,
    _settling,
)
