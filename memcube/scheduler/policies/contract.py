"""What a policy is."""

from collections.abc import Iterable
from typing import Protocol

from memcube.scheduler.actions import Action
from memcube.scheduler.view import View

RETRY_S = 5.0
"""A row whose action may be refused is looked at again after so long."""


class Policy(Protocol):
    """Proposes actions. Pure: it looks at the view alone, best proposal first.

    ``view.rows`` are the rows to look at; what was looked at comes back when it changes, or when the
    policy asks for it (``view.look_again``). The view knows of proposals that were accepted before, also
    those of this very call: so propose one by one.
    """

    @property
    def name(self) -> str: ...

    def plan(self, view: View, now: float) -> Iterable[Action]: ...
