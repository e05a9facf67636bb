"""How the next token is chosen: greedy, or by temperature and top-p with a seed.

A draw is the inverse of the cumulative distribution at one number between 0 and 1, which comes from
the request's own generator. So a seed gives the same tokens whatever else is in the batch, as far
as the logits are the same.
"""

import math
import random
import secrets
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memcube.activation.contract import Sampling

_HEAD = 256
"""The nucleus is looked for among so many tokens first: to sort 49,152 logits takes 5 ms a row on
one core, to find the 256 largest 0.3 ms."""


class Draw(NamedTuple):
    """One row's choice. ``point`` in [0, 1) is where in the distribution; greedy needs none."""

    temperature: float
    top_p: float
    point: float


class Sampler:
    """One request's stream of draws."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._greedy = sampling.temperature == 0.0
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
        self._random = random.Random(seed)

    def draw(self) -> Draw:
        """The next draw."""
        point = 0.0 if self._greedy else self._random.random()
        return Draw(self._sampling.temperature, self._sampling.top_p, point)


def choose(logits_BV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token id a row. What a row gets depends on nothing in the other rows."""
    if logits_BV.shape[0] != len(draws):
        raise ValueError(f"{logits_BV.shape[0]} rows of logits for {len(draws)} draws")
    greedy = [row for row, draw in enumerate(draws) if draw.temperature == 0.0]
    whole = [row for row, draw in enumerate(draws) if draw.temperature > 0.0 and draw.top_p == 1.0]
    nucleus = [row for row, draw in enumerate(draws) if draw.temperature > 0.0 and draw.top_p < 1.0]
    tokens = [0] * len(draws)
    for rows, pick in ((greedy, _largest), (whole, _from_all), (nucleus, _from_nucleus)):
        if rows:
            part_BV = logits_BV if len(rows) == len(draws) else logits_BV[rows]
            found = pick(part_BV, [draws[row] for row in rows])
            for row, token in zip(rows, found, strict=True):
                tokens[row] = token
    return tokens


def _largest(logits_BV: Tensor, draws: Sequence[Draw]) -> list[int]:
    return logits_BV.argmax(-1).tolist()


def _from_all(logits_BV: Tensor, draws: Sequence[Draw]) -> list[int]:
    return _draw(_probabilities(logits_BV, draws), [math.inf] * len(draws), draws).tolist()


def _from_nucleus(logits_BV: Tensor, draws: Sequence[Draw]) -> list[int]:
    probability_BV = _probabilities(logits_BV, draws)
    head_BK, ids_BK = probability_BV.topk(min(_HEAD, logits_BV.shape[1]))
    mass_B = head_BK.sum(-1, dtype=torch.float64).tolist()
    tokens = _from_sorted(head_BK, ids_BK, draws)
    wide = [row for row, draw in enumerate(draws) if mass_B[row] < draw.top_p]
    if wide:
        sorted_BV, ids_BV = torch.sort(probability_BV[wide], dim=-1, descending=True, stable=True)
        found = _from_sorted(sorted_BV, ids_BV, [draws[row] for row in wide])
        for row, token in zip(wide, found, strict=True):
            tokens[row] = token
    return tokens


def _from_sorted(probability_BK: Tensor, ids_BK: Tensor, draws: Sequence[Draw]) -> list[int]:
    place_B = _draw(probability_BK, [draw.top_p for draw in draws], draws)
    return ids_BK.gather(1, place_B.unsqueeze(1)).squeeze(1).tolist()


def _draw(probability_BK: Tensor, mass: list[float], draws: Sequence[Draw]) -> Tensor:
    """A place among the first that reach ``mass`` together, the one that does so included."""
    cumulative_BK = probability_BK.cumsum(-1, dtype=torch.float64)
    mass_B1 = torch.minimum(_column(mass, cumulative_BK), cumulative_BK[:, -1:])
    last_B1 = torch.searchsorted(cumulative_BK, mass_B1)
    point_B1 = _column([draw.point for draw in draws], cumulative_BK)
    # From the right: a place of probability 0 holds no point. The last one is kept to, as the
    # product may be rounded up to all of the mass.
    place_B1 = torch.searchsorted(
        cumulative_BK, point_B1 * cumulative_BK.gather(1, last_B1), right=True
    )
    return torch.minimum(place_B1, last_B1).squeeze(1)


def _probabilities(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    temperature_B1 = _column([draw.temperature for draw in draws], logits_BV).float()
    # Less the largest first: a tiny temperature would make infinities of them all.
    return ((logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature_B1).softmax(-1)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device).unsqueeze(1)
