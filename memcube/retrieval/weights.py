"""The ranker's weights: a small JSON file, made by ``benchmarks/train_ranker.py``."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memcube.errors import BadRequest
from memcube.retrieval.features import NAMES

_PACKAGED = Path(__file__).with_name("weights.json")


@dataclass(frozen=True, slots=True)
class RankerWeights:
    """One weight a feature, in the order of NAMES, and what makes a score a probability.

    The chance that a cube answers the query is the logistic of
    ``scale * score + best_cosine * (the pool's best cosine) + offset``.
    """

    weights: npt.NDArray[np.float64]
    scale: float
    best_cosine: float
    offset: float

    @classmethod
    def load(cls, path: Path | None = None) -> "RankerWeights":
        """The weights of a file; of the package without one.

        Raises:
            BadRequest: the file can't be read, or is of other features.
        """
        path = path or _PACKAGED
        try:
            data = json.loads(path.read_text())
            weights = [float(data["weights"][name]) for name in NAMES]
            line = [float(data[name]) for name in ("scale", "best_cosine", "offset")]
        except (OSError, ValueError, KeyError, TypeError) as wrong:
            raise BadRequest(f"no weights of this ranker: {wrong!r}", str(path)) from None
        if set(data["weights"]) != set(NAMES):
            raise BadRequest("holds features that this ranker has not", str(path))
        if not all(map(math.isfinite, (*weights, *line))) or line[0] <= 0:
            raise BadRequest("needs finite numbers, and a scale above 0", str(path))
        return cls(np.array(weights), *line)

    def probability(self, score: float, best_cosine: float) -> float:
        """The chance of a candidate with this score, in a pool with this best cosine."""
        logit = self.scale * score + self.best_cosine * best_cosine + self.offset
        return 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, logit))))
