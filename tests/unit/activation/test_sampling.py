from collections import Counter

import pytest
import torch

from memcube.activation.contract import Sampling
from memcube.activation.sampling import Draw, Sampler, choose
from memcube.errors import BadRequest


def logits(num_rows=1, vocabulary=1000, seed=0):
    return torch.randn(num_rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def draws(sampling, count):
    sampler = Sampler(sampling)
    return [sampler.draw() for _ in range(count)]


def test_temperature_0_takes_the_largest():
    rows_BV = logits(4)
    assert choose(rows_BV, [Draw(0.0, 1.0, 0.0)] * 4) == rows_BV.argmax(-1).tolist()


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch():
    rows_BV = logits(6)
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=11)
    alone = [choose(rows_BV[[2]], [draw])[0] for draw in draws(sampling, 20)]
    others = Sampler(Sampling(temperature=1.5, seed=3))
    mixed = []
    for draw in draws(sampling, 20):
        batch = [others.draw() for _ in range(6)]
        batch[0] = Draw(0.0, 1.0, 0.0)
        batch[2] = draw
        mixed.append(choose(rows_BV, batch)[2])
    assert mixed == alone
    assert len(set(alone)) > 1


def test_without_a_seed_two_requests_differ():
    first, second = (draws(Sampling(temperature=1.0), 8) for _ in range(2))
    assert first != second


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_tokens_come_as_often_as_their_probability_says(top_p):
    row_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    found = choose(
        row_V.expand(4000, 4), draws(Sampling(temperature=1.0, top_p=top_p, seed=1), 4000)
    )
    share = {token: count / 4000 for token, count in Counter(found).items()}
    if top_p == 1.0:
        want = {0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}
    else:  # the three first reach 0.9; the fourth is cut off
        want = {0: 0.5 / 0.95, 1: 0.3 / 0.95, 2: 0.15 / 0.95}
    assert share == pytest.approx(want, abs=0.03)


def test_a_nucleus_wider_than_the_head_equals_one_found_by_sorting():
    flat_BV = torch.zeros(1, 1000)
    flat_BV[0, 7] = 1.0
    found = choose(
        flat_BV.expand(500, 1000), draws(Sampling(temperature=1.0, top_p=0.95, seed=5), 500)
    )
    assert len(set(found)) > 300


def test_tiny_top_p_and_tiny_temperature_are_greedy():
    rows_BV = logits(3)
    best = rows_BV.argmax(-1).tolist()
    assert choose(rows_BV, draws(Sampling(temperature=1.0, top_p=1e-9, seed=1), 3)) == best
    assert choose(rows_BV, draws(Sampling(temperature=1e-30, seed=1), 3)) == best


@pytest.mark.parametrize("top_p", [1.0, 1.0 - 1e-12, 0.5])
@pytest.mark.parametrize("point", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_distribution_give_tokens_that_can_come(point, top_p):
    row_V = torch.full((600,), -float("inf"))
    row_V[[3, 500]] = 0.0
    assert choose(row_V.unsqueeze(0), [Draw(1.0, top_p, point)])[0] in (3, 500)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": 1e9},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_settings_out_of_range_are_refused(given):
    with pytest.raises(BadRequest):
        Sampling(**given)
