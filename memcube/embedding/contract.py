"""What the system asks of an embedder."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Purpose(StrEnum):
    """Queries go before bulk work, and some models embed them differently."""

    QUERY = "query"
    PASSAGE = "passage"


class Embedder(Protocol):
    """Turns texts into unit vectors."""

    identity: str
    """Name and revision, e.g. ``all-MiniLM-L6-v2@onnx-fp32-3f1c…``. Another identity, another index."""

    dim: int

    async def embed(self, texts: Sequence[str], purpose: Purpose) -> npt.NDArray[np.float32]:
        """Vectors of shape (len(texts), dim), float32, unit length, in the order of the texts.

        A text longer than the model's window is cut at the window's end. The vector of a text
        does not depend on which other texts it is batched with (to float rounding).
        """
        ...
