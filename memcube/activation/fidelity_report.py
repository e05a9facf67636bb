"""What the fidelity gate found of a model, and what a mode must reach. Without torch, for whoever only reads it."""

import json
from dataclasses import asdict, dataclass, field

from memcube.activation.contract import Mode

_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What a mode must reach. ``recall`` is relative to the full prefill's."""

    kl: float
    top1: float
    recall: float
    share: float


THRESHOLDS = {
    Mode.BLEND: Thresholds(kl=0.03, top1=0.95, recall=0.9, share=0.25),
    Mode.FAST: Thresholds(kl=0.15, top1=0.9, recall=0.8, share=0.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """What was measured of one variant. ``share`` of the attached tokens was computed again."""

    kl: float
    top1: float
    recall: float
    share: float
    num_tokens: int
    num_facts: int

    def passes(self, limits: Thresholds) -> bool:
        return not self.misses(limits)

    def misses(self, limits: Thresholds) -> list[str]:
        """In words, the limits that these figures don't reach."""
        reached = {
            "a full prefill recalls no fact either": self.num_facts > 0,
            f"KL {self.kl:.4f} (at most {limits.kl:g})": self.kl <= limits.kl,
            f"top-1 {self.top1:.1%} (at least {limits.top1:.0%})": self.top1 >= limits.top1,
            f"facts {self.recall:.1%} (at least {limits.recall:.0%})": self.recall >= limits.recall,
            f"{self.share:.1%} computed again (at most {limits.share:.0%})": self.share
            <= limits.share,
        }
        return [words for words, is_reached in reached.items() if not is_reached]


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityReport:
    """One model's figures by mode, and which modes may be served.

    ``why_not`` says why none was measured. ``recalled`` of ``asked`` facts a full prefill recalls.
    """

    model: str
    dtype: str
    asked: int = 0
    recalled: int = 0
    modes: dict[Mode, Fidelity] = field(default_factory=dict)
    passed: tuple[Mode, ...] = ()
    why_not: str | None = None

    def refusals(self) -> str | None:
        """Why the modes that didn't pass are served exactly; None where all passed."""
        found = [
            f"{mode}: {', '.join(figures.misses(THRESHOLDS[mode]))}"
            for mode, figures in self.modes.items()
            if mode not in self.passed
        ]
        return "; ".join(found) or None

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"format": _FORMAT}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "FidelityReport":
        """
        Raises:
            ValueError: it is no report, or one of another format.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
            raise ValueError("no fidelity report of this format")
        try:
            modes = {Mode(mode): Fidelity(**figures) for mode, figures in data.pop("modes").items()}
            passed = tuple(map(Mode, data.pop("passed")))
            return cls(modes=modes, passed=passed, **data)
        except (AttributeError, KeyError, TypeError) as wrong:
            raise ValueError(f"no fidelity report: {wrong}") from None
