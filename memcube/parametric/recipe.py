"""How an adapter is trained, in numbers. No torch in here: whoever queues a job needs it too."""

from dataclasses import dataclass
from typing import Any, Self

from memcube.errors import BadRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train: as it stands, about 20 facts (``for_facts`` for others). The learning rate rises,
    stays, and falls to nothing over the last ``decay_steps``.

    The fall begins as soon as a check while training passes, and at the latest so that it ends with
    ``steps``. ``layers`` is the share of the model's layers, from the last down, that are adapted.
    ``kl_weight`` weighs the distance to the base model on general text; ``distil_weight`` that of the answers to
    what the base model would say with the memories in its prompt (context distillation, arXiv 2209.15189),
    which takes a further pass of it over longer rows.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | tuple[str, ...] = "all-linear"
    layers: float = 1.0
    lr: float = 2e-3
    warmup_steps: int = 5
    decay_steps: int = 40
    weight_decay: float = 0.0
    clip: float = 1.0
    steps: int = 75
    row_tokens: int = 320
    rows: int = 2
    replay_tokens: int = 80
    kl_weight: float = 1.0
    distil_weight: float = 0.0
    check_steps: int = 0
    first_check: int = 40
    checkpoint_steps: int = 20
    autocast: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.steps < 1 or self.rows < 1 or self.row_tokens < 1:
            raise BadRequest("rank, steps, rows and row_tokens are at least 1", "recipe")
        if not 0 < self.layers <= 1:
            raise BadRequest("a share above 0 and up to 1", "recipe.layers")
        if self.lr <= 0 or min(self.kl_weight, self.distil_weight) < 0:
            raise BadRequest("lr is above 0, kl_weight and distil_weight not below", "recipe")

    @classmethod
    def for_facts(cls, num_facts: int, **given: Any) -> Self:
        """The recipe for so many facts, but for what is given. A fact more takes fewer steps than one
        of the first, as the wordings of a relation are learned for all its facts."""
        steps = given.pop("steps", round(45 + 1.5 * num_facts))
        return cls(**{"steps": steps, "decay_steps": round(steps * 8 / 15)} | given)

    def rate(self, step: int, decay_from: int) -> float:
        """The learning rate of a step, when the fall begins at ``decay_from``."""
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))
        fall = max(0.0, 1 - max(0, step - decay_from) / max(1, self.decay_steps))
        return self.lr * rise * fall
