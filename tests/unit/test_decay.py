"""How a memory fades."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memcube.cube import Descriptive, Governance, MemCube, Shape, Usage
from memcube.decay import RATE_HALF_LIFE, Decay, priority_at, rate_at, strength
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import State
from memcube.testing.local import START

DAY = timedelta(days=1)
MONTH = 30 * DAY


def cube(*, priority: int = 0, rate: float = 0.0, used: timedelta | None = None) -> MemCube:
    return MemCube(
        id=CubeId("1"),
        tenant=TenantId("a"),
        shape=Shape.LEAF,
        state=State.GENERATED,
        version=1,
        text="tea",
        descriptive=Descriptive(created_at=START),
        governance=Governance(owner="key", priority=priority),
        usage=Usage(rate=rate, last_used_at=None if used is None else START + used),
        updated_at=START,
    )


def test_a_rate_halves_in_a_week_without_a_use():
    used = Usage(rate=4.0, last_used_at=START)
    assert [rate_at(used, START + n * RATE_HALF_LIFE) for n in range(3)] == [4.0, 2.0, 1.0]
    assert rate_at(used, START - DAY) == 4.0
    assert rate_at(Usage(), START) == 0.0


def test_a_positive_priority_fades_and_a_negative_one_stays():
    assert priority_at(cube(priority=8), START + MONTH, MONTH) == 4.0
    assert priority_at(cube(priority=8, used=MONTH), START + MONTH, MONTH) == 8.0
    assert priority_at(cube(priority=-8), START + 9 * MONTH, MONTH) == -8.0


def test_strength_halves_in_each_half_life_and_a_use_renews_it():
    assert [strength(cube(), START + n * MONTH, MONTH) for n in range(3)] == [1.0, 0.5, 0.25]
    assert strength(cube(used=2 * MONTH), START + 2 * MONTH, MONTH) == 1.0
    assert strength(cube(priority=10), START, MONTH) == 11.0
    assert strength(cube(priority=-1), START, MONTH) == 0.5


@given(
    days=st.floats(0, 4000),
    priority=st.integers(-100, 100),
    rate=st.floats(0, 1000),
    below=st.floats(0.001, 0.999),
)
def test_nothing_fades_before_its_least_time_but_for_a_negative_priority(
    days, priority, rate, below
):
    decay = Decay(half_life=MONTH, below=below)
    one = cube(priority=priority, rate=rate, used=timedelta(0))
    if days * DAY < decay.least_idle and priority >= 0:
        assert not decay.faded(one, START + days * DAY)
    later = strength(one, START + (days + 1) * DAY, MONTH)
    assert later < strength(one, START + days * DAY, MONTH)


@pytest.mark.parametrize(("days", "faded"), [(199, False), (200, True)])
def test_a_memory_nobody_asks_for_fades_at_a_known_time(days, faded):
    assert Decay(half_life=MONTH, below=0.01).faded(cube(), START + days * DAY) is faded
