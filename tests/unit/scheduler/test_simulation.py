"""The scheduler among faults: no invariant breaks, planted bugs are found, and a seed replays."""

import os
import subprocess
import sys

import pytest

from memcube.scheduler.enact import Enactor
from memcube.testing.sim_bugs import PLANTED
from memcube.testing.simulation import simulate

NUM_SEEDS, PART = 300, 50


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, PART))
def test_no_invariant_breaks(first: int):
    broken = {}
    for seed in range(first, first + PART):
        if (error := simulate(seed).error) is not None:
            broken[seed] = error
    assert broken == {}


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_found_within_a_hundred_seeds(bug: type[Enactor]):
    assert any(simulate(seed, enactor_class=bug).error is not None for seed in range(100))


def test_a_seed_replays_in_another_process_whatever_the_order_of_its_sets():
    program = (
        "from memcube.testing.simulation import simulate; o = simulate(7);"
        "print(o.num_events, o.at_s, sorted(o.counts.items()))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(told) == 1


def test_faults_really_happen_and_moves_with_them():
    counts = sum((simulate(seed).counts for seed in range(3)), start=simulate(3).counts)
    for name in (
        "scheduler crashes",
        "node crashes",
        "pauses",
        "damages",
        "copy done",
        "drop done",
    ):
        assert counts[name] > 0, name


def test_drops_lose_their_other_copy_around_the_commit_and_are_listed_again():
    counts = sum((simulate(seed).counts for seed in range(30)), start=simulate(30).counts)
    assert counts["of them listed again"] > 0
    assert counts["drops whose other copy was lost"] > counts["of them listed again"]
