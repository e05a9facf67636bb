"""Folds what policies propose into a plan: each action is vetoed with a reason, or taken up.

A plan changes nothing, so that a dry run is a plan that is thrown away. ``Planner.settle`` notes afterwards
that its rows were looked at.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from memcube.errors import UnknownBackend
from memcube.scheduler.actions import Action, Consolidate
from memcube.scheduler.policies import BUILT, Policy
from memcube.scheduler.refusals import Refusal, Tally, refusal
from memcube.scheduler.settings import POLICIES, CostModel, MoveLimits, Profiles
from memcube.scheduler.view import View
from memcube.scheduler.world import World

MAX_TOLD = 1_000
"""So many refusals a plan tells one by one; it counts all."""
OPERATOR = "operator"


class Refused(NamedTuple):
    """An action that did not get into a plan."""

    action: Action
    why: Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do, in order, and what not, and why. ``num_refused`` counts by policy and reason."""

    actions: tuple[Action, ...]
    refused: tuple[Refused, ...]
    num_refused: Counter[tuple[str, Refusal]]
    rows: np.ndarray
    due: np.ndarray


class Planner:
    """The policies that are in use, and the bounds of a round."""

    def __init__(
        self,
        profiles: Profiles | None = None,
        limits: MoveLimits | None = None,
        *,
        cost: CostModel | None = None,
        policies: Sequence[Policy] | None = None,
    ) -> None:
        """``policies``: in the order in which they are asked; none is all that are built."""
        self.profiles = profiles or Profiles()
        self.limits = limits or MoveLimits()
        self._cost = cost or CostModel()
        self._policies = [BUILT[name]() for name in POLICIES] if policies is None else policies

    def plan(
        self, world: World, now: float, *, full: bool = False, asked: Iterable[Action] = ()
    ) -> Plan:
        """What to do about all that changed, or whose time has come; with ``full`` about all there is.

        ``asked`` are an operator's wishes. They come first, and the same vetoes hold for them.
        """
        rows = world.pending(now, full=full)
        view = View(world, rows, now=now, profiles=self.profiles, cost=self._cost)
        fold = _Fold(view, self.limits)
        fold.take(asked, OPERATOR)
        for policy in self._policies:
            view.rows = self._rows_for(policy.name, view, rows)
            fold.take(policy.plan(view, now), policy.name)
        fold.take_up_what_is_left()
        return Plan(
            actions=tuple(fold.actions),
            refused=tuple(fold.refused),
            num_refused=fold.num_refused,
            rows=rows,
            due=view.due[rows],
        )

    def settle(self, world: World, plan: Plan) -> None:
        """Note that what a plan looked at was looked at: the next one looks at what changes after it."""
        world.looked_at(plan.rows, plan.due)
        for action in plan.actions:
            if isinstance(action, Consolidate):
                world.proposed[action.tenant, action.scope] = action.epoch

    @staticmethod
    def _rows_for(policy: str, view: View, rows: np.ndarray) -> np.ndarray:
        """The rows of tenants whose profile has a policy."""
        has = np.asarray([policy in profile.policies for profile in view.profiles])
        if policy not in POLICIES or has.all():
            return rows
        return rows[has[view.profile_numbers(rows)]]


class _Fold:
    """A plan in the making."""

    def __init__(self, view: View, limits: MoveLimits) -> None:
        self._view = view
        self._limits = limits
        self._tally = Tally()
        self._aside: list[Action] = []
        self.actions: list[Action] = []
        self.refused: list[Refused] = []
        self.num_refused: Counter[tuple[str, Refusal]] = Counter()

    def take(self, proposed: Iterable[Action], policy: str) -> None:
        for action in proposed:
            why = refusal(self._view, action, self._limits, self._tally)
            if why is None:
                self._accept(action)
            elif why is Refusal.TENANT_SHARE:
                self._aside.append(action)
            else:
                self._refuse(action, why, policy)
                if (
                    why is Refusal.OVER_LIMITS
                    and self._tally.num_actions >= self._limits.max_actions
                ):
                    return

    def take_up_what_is_left(self) -> None:
        """Give what nobody else wanted to tenants that have had their share."""
        for action in self._aside:
            self._tally.by_tenant[action.tenant] = 0
            why = refusal(self._view, action, self._limits, self._tally)
            if why is None:
                self._accept(action)
            else:
                self._refuse(
                    action,
                    Refusal.TENANT_SHARE if why is Refusal.OVER_LIMITS else why,
                    action.policy,
                )

    def _accept(self, action: Action) -> None:
        self.actions.append(action)
        self._tally.count(action)
        self._view.take(action)

    def _refuse(self, action: Action, why: Refusal, policy: str) -> None:
        self.num_refused[action.policy or policy, why] += 1
        if len(self.refused) < MAX_TOLD:
            self.refused.append(Refused(action, why))


def build_policies(names: Iterable[str]) -> list[Policy]:
    """Policies by their names, in this order.

    Raises:
        UnknownBackend: one is not built.
    """
    found = []
    for name in names:
        if name not in BUILT:
            raise UnknownBackend("policy", name, tuple(BUILT))
        found.append(BUILT[name]())
    return found
