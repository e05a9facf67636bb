"""A leader's rounds: what it hears while it is busy is not lost."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from memcube.errors import Unavailable
from memcube.ids import CubeId, TenantId
from memcube.scheduler.control import Control
from memcube.scheduler.planner import Planner
from memcube.scheduler.world import CubeFacts, World

A, CUBE = TenantId("a"), CubeId("c")


class Feed:
    """A catalog with one cube. ``on_read`` is called while it is read."""

    def __init__(self) -> None:
        self.rate = 0.0
        self.on_read = lambda: None

    def changed(self, cursor: int) -> tuple[Sequence[tuple[TenantId, CubeId]], int]:
        return ([] if cursor else [(A, CUBE)]), 1

    def read(self, keys: Sequence[tuple[TenantId, CubeId]]) -> Any:
        facts = CubeFacts(
            id=CUBE,
            tenant=A,
            version=1,
            epoch=0,
            num_bytes=1,
            tokens=1,
            changed_at=0.0,
            created_at=0.0,
            rate=self.rate,
        )
        on_read, self.on_read = self.on_read, lambda: None
        on_read()
        return [(facts, ()) for key in keys if key == (A, CUBE)]


class NoMoves:
    """An enactor with nothing to do."""

    is_deposed = False
    num_failures = num_waiting = num_open = 0

    def __init__(self) -> None:
        self.closed: list[Any] = []
        self.suspects: dict[Any, None] = {}

    async def recover(self) -> list[Any]:
        return []

    async def submit(self, actions: Sequence[Any]) -> list[Any]:
        return []

    def pump(self) -> int:
        return 0


async def at_once(call: Any, *given: Any, **named: Any) -> Any:
    return call(*given, **named)


def control_of(feed: Feed) -> Control:
    return Control(
        World(),
        Planner(policies=[]),
        NoMoves(),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        feed,
        leader=1,
        clock=lambda: datetime(2026, 1, 1, tzinfo=UTC),
        call=at_once,
    )


def rate_of(control: Control) -> float:
    return float(control.world.cubes["rate"][control.world.row(A, CUBE)])


async def test_a_use_that_is_told_of_while_the_catalog_is_read_is_read_in_the_next_round():
    feed = Feed()
    control = control_of(feed)

    def used_meanwhile() -> None:
        feed.rate = 9.0
        control.used(A, [CUBE])

    feed.on_read = used_meanwhile
    await control.round()
    assert rate_of(control) == 0.0
    await control.round()
    assert rate_of(control) == 9.0


async def test_what_could_not_be_read_is_read_in_a_later_round():
    feed = Feed()
    control = control_of(feed)

    def fail() -> None:
        raise Unavailable("the catalog")

    feed.on_read = fail
    with pytest.raises(Unavailable):
        await control.round()
    await control.round()
    assert len(control.world) == 1
