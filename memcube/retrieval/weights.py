"""The ranker's weights: a small JSON file, made by ``benchmarks/train_ranker.py``."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memcube.errors import BadRequest
from memcube.retrieval.features import NAMES

_PACKAGED = Path(__file__).with_name("weights.json")


@dataclass(frozen=True, slots=True)
class RankerWeights:
    """One weight a feature, in the order of NAMES, and the line that makes a score a probability."""

    weights: npt.NDArray[np.float64]
    scale: float
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
            scale, offset = float(data["scale"]), float(data["offset"])
        except (OSError, ValueError, KeyError, TypeError) as wrong:
            raise BadRequest(f"no weights of this ranker: {wrong!r}", str(path)) from None
        if set(data["weights"]) != set(NAMES):
            raise BadRequest("holds features that this ranker has not", str(path))
        return cls(np.array(weights), scale, offset)
