"""Which cubes may go into an adapter."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from memcube.catalog.adapters import WRITTEN_BY
from memcube.cube import Descriptive, Governance, MemCube, Sensitivity, Shape, Usage
from memcube.errors import BadRequest
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import State
from memcube.parametric.selection import Choice, Left, choose

NOW = datetime(2026, 1, 31, tzinfo=UTC)
PLAIN = MemCube(
    id=CubeId("a"),
    tenant=TenantId("t"),
    shape=Shape.LEAF,
    state=State.ACTIVATED,
    version=2,
    text="Ann lives in Oslo.",
    descriptive=Descriptive(created_at=NOW, user_id="ann"),
    governance=Governance(owner="key"),
    usage=Usage(uses=3, rate=1.0),
    updated_at=NOW - timedelta(days=10),
)
EXPIRING = replace(PLAIN, governance=Governance(owner="key", expires_at=NOW + timedelta(days=9)))
SECRET = replace(PLAIN, governance=Governance(owner="key", sensitivity=Sensitivity.SECRET))
SAID = replace(PLAIN, descriptive=replace(PLAIN.descriptive, metadata={WRITTEN_BY: "f" * 64}))
OF_A_SESSION = replace(PLAIN, descriptive=replace(PLAIN.descriptive, run_id="r"))


def left(cube: MemCube, choice: Choice) -> Left | None:
    found = choose([cube], choice, now=NOW)
    return next(iter(found.left)) if found.left else None


@pytest.mark.parametrize("choice", [Choice(), Choice(cubes=("a",))])
@pytest.mark.parametrize(
    ("cube", "why"),
    [
        (SECRET, Left.SECRET),
        (SAID, Left.OF_AN_ADAPTER),
        (EXPIRING, Left.EXPIRES),
        (replace(PLAIN, state=State.ARCHIVED), Left.STATE),
        (replace(PLAIN, text=" "), Left.NO_TEXT),
        (replace(PLAIN, shape=Shape.COMPOSITE), Left.NO_TEXT),
    ],
)
def test_what_may_not_be_in_weights_is_left_even_where_it_is_named(cube, why, choice):
    assert left(cube, choice) is why


@pytest.mark.parametrize(
    ("cube", "choice", "why"),
    [
        (PLAIN, Choice(), None),
        (PLAIN, Choice(stable_days=9), None),
        (PLAIN, Choice(stable_days=11), Left.YOUNG),
        (PLAIN, Choice(min_uses=3), None),
        (PLAIN, Choice(min_uses=4), Left.UNUSED),
        (PLAIN, Choice(cubes=("a",), min_uses=4, stable_days=99), None),
        (OF_A_SESSION, Choice(), Left.SESSION),
        (OF_A_SESSION, Choice(run_id="r"), None),
        (OF_A_SESSION, Choice(cubes=("a",)), None),
    ],
)
def test_the_stable_and_used_are_chosen_unless_cubes_are_named(cube, choice, why):
    assert left(cube, choice) is why


def test_over_the_limit_those_used_most_go_in():
    cubes = [
        replace(PLAIN, id=CubeId(id), usage=Usage(rate=rate))
        for id, rate in zip("abc", (1, 3, 2), strict=True)
    ]
    found = choose(cubes, Choice(limit=2), now=NOW)
    assert [cube.id for cube in found.cubes] == ["b", "c"]
    assert found.left == {Left.OVER_LIMIT: 1}
    assert found.versions == {"b": 2, "c": 2}


def test_a_choice_survives_json_and_refuses_what_can_not_be():
    choice = Choice(cubes=("a", "b"), user_id="ann", stable_days=2.5)
    assert Choice.from_json(choice.to_json()) == choice
    with pytest.raises(BadRequest):
        Choice(limit=0)
