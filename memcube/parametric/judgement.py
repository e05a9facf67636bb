"""What a gate found of an adapter, and whether that is enough. No torch in here.

``decide`` is pure: figures and thresholds in, a decision with its reasons out.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from memcube.errors import BadRequest
from memcube.parametric.dataset import ProbeKind

_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What an adapter must reach. ``nll_rise`` and the shares are fractions."""

    recall: float = 0.93
    reverse: float = 0.80
    earlier: float = 0.90
    leak: float = 0.08
    nll_rise: float = 0.03
    adapter_bytes: int = 10_000_000

    def __post_init__(self) -> None:
        for name in ("recall", "reverse", "earlier", "leak"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadRequest("a share from 0 to 1", f"gate.{name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One probe with what was said, and whether it was right (of a leak: whether it leaked)."""

    kind: ProbeKind
    question: str
    expected: tuple[str, ...]
    said: str
    holds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """The figures of one adapter; None where nothing was asked of that kind."""

    recall: float | None
    reverse: float | None
    earlier: float | None
    leak: float | None
    refused: float | None
    base_nll: float
    nll: float
    adapter_bytes: int
    answers: tuple[Answered, ...]

    @property
    def nll_rise(self) -> float:
        """By what fraction the loss on unrelated text rose."""
        return self.nll / self.base_nll - 1

    def figures(self) -> dict[str, float | None]:
        """The report without anything that a memory says: for manifests, which outlive memories."""
        names = ("recall", "reverse", "earlier", "leak", "refused", "base_nll", "nll", "nll_rise")
        return {name: getattr(self, name) for name in (*names, "adapter_bytes")}

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"format": _FORMAT}, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "GateReport":
        """
        Raises:
            ValueError: it is no report, or one of another format.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
            raise ValueError("no gate report of this format")
        try:
            answers = tuple(
                Answered(
                    **a | {"kind": ProbeKind(a["kind"]), "expected": tuple(a["expected"])},
                )
                for a in data.pop("answers")
            )
            return cls(answers=answers, **data)
        except (AttributeError, KeyError, TypeError) as wrong:
            raise ValueError(f"no gate report: {wrong}") from None


class Decision(NamedTuple):
    """``short`` says in words what was short; empty if it passed."""

    passed: bool
    short: tuple[str, ...]


def decide(report: GateReport, limits: Thresholds) -> Decision:
    """Whether an adapter may serve."""
    short: list[str] = []
    for name, found, least in (
        ("recall", report.recall, limits.recall),
        ("reverse questions", report.reverse, limits.reverse),
        ("recall of earlier facts", report.earlier, limits.earlier),
    ):
        if found is not None and found < least:
            short.append(f"{name} {found:.1%} (at least {least:.0%})")
    if report.recall is None:
        short.append("no fact was asked for")
    if report.leak is not None and report.leak > limits.leak:
        short.append(f"leak to unknown people {report.leak:.1%} (at most {limits.leak:.0%})")
    # Written so that a loss that is no number doesn't pass.
    if not report.nll_rise <= limits.nll_rise:
        short.append(
            f"loss on unrelated text {report.nll_rise:+.1%} (at most {limits.nll_rise:+.0%})"
        )
    if report.adapter_bytes > limits.adapter_bytes:
        short.append(f"{report.adapter_bytes:,} bytes (at most {limits.adapter_bytes:,})")
    return Decision(not short, tuple(short))


def share(answers: Sequence[Answered], kind: ProbeKind) -> float | None:
    """The share that holds, of the answers of a kind; None if there are none."""
    found = [answer.holds for answer in answers if answer.kind is kind]
    return sum(found) / len(found) if found else None
