"""Where the fidelity gate of an engine stands. Without torch, for whoever only reads it."""

from dataclasses import dataclass, field
from enum import StrEnum

from memcube.activation.contract import Mode
from memcube.activation.fidelity_report import FidelityReport


class GateState(StrEnum):
    """Where the gate of a model stands."""

    OFF = "off"
    """By configuration nothing is composed."""
    MEASURING = "measuring"
    DONE = "done"
    FAILED = "failed"
    """It could not be measured; ``GateStatus.why`` says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateStatus:
    """Which modes are composed, and why. ``num_measured`` of ``num_cases`` cases are done."""

    state: GateState = GateState.OFF
    modes: tuple[Mode, ...] = ()
    why: str | None = None
    num_cases: int = 0
    num_measured: int = 0
    report: FidelityReport | None = field(default=None, repr=False)
