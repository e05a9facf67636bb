"""Whatever happened to a scope: each past reads as it was, and going back to it makes it so again."""

import contextlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from memcube.catalog import Catalog, Database
from memcube.cube import Draft, Scope
from memcube.errors import IllegalMove
from memcube.ids import CubeId
from memcube.lifecycle import Event
from memcube.testing.catalog_contract import A, at, composite, update

ANN = Scope(tenant=A, user_id="ann")
STEPS, LATER = 40, 10_000
Picture = dict[CubeId, tuple[str, tuple[str, ...], tuple[CubeId, ...], str]]


@pytest.fixture
def catalog(tmp_path: Path, catalog_template: Path) -> Iterator[Catalog]:
    shutil.copy(catalog_template, tmp_path / "catalog.db")
    opened = Catalog(Database(f"sqlite:///{tmp_path / 'catalog.db'}"))
    opened.access.ensure_tenant(A, shards=1, now=at(0))
    yield opened
    opened.close()


def place(state: str) -> str:
    return state if state in ("merged", "archived") else "in search"


def picture(catalog: Catalog, seconds: float) -> Picture:
    """What the scope holds now."""
    page = catalog.cubes.find(A, now=at(seconds), user_id="ann", limit=500)
    return {c.id: (c.text, c.descriptive.tags, c.members, place(c.state)) for c in page.cubes}


def as_of(catalog: Catalog, seconds: float) -> Picture:
    page = catalog.past.find(ANN, as_of=at(seconds), now=at(LATER), limit=500)
    return {c.id: (c.text, c.descriptive.tags, c.members, place(c.state)) for c in page.cubes}


def happen(catalog: Catalog, draw: random.Random, step: int) -> None:
    """Anything that may happen to a scope."""
    now = at(step)
    known = list(picture(catalog, step))
    some = draw.sample(sorted(known), min(len(known), 2))
    match draw.choice(["add"] * 4 + ["edit"] * 4 + ["move"] * 3 + ["fuse", "hold", "delete"]):
        case "add":
            text = f"text {draw.randrange(12)}"
            catalog.cubes.add(A, [Draft(text=text, user_id="ann")], author="k", now=now)
        case "edit" if some:
            change = draw.choice([{"text": f"text {draw.randrange(12)}"}, {"tags": (f"t{step}",)}])
            update(catalog, some[0], now=now, **change)
        case "move" if some:
            event = draw.choice([Event.ARCHIVE, Event.RESTORE])
            catalog.cubes.transition(A, some[0], event, author="k", now=now)
        case "fuse" if len(some) == 2:
            draft = Draft(text=f"both {step}", user_id="ann")
            catalog.cubes.fuse(A, some, draft, author="k", now=now)
        case "hold" if some:
            composite(catalog, *some, now=now, user_id="ann")
        case "delete" if some:
            catalog.cubes.delete(A, some[0], now=now)


@pytest.mark.parametrize("seed", range(12))
def test_every_past_is_read_and_reached_again(catalog: Catalog, seed: int):
    draw = random.Random(seed)
    pasts: dict[int, Picture] = {}
    deleted_at: dict[CubeId, int] = {}
    for step in range(1, STEPS):
        with contextlib.suppress(IllegalMove):  # then nothing happened
            happen(catalog, draw, step)
        pasts[step] = picture(catalog, step)
        for gone in pasts.get(step - 1, {}).keys() - pasts[step].keys():
            deleted_at[gone] = step

    def still(past: Picture) -> Picture:
        """Without what was deleted since, also as members."""
        return {
            id: (text, tags, tuple(m for m in members if m not in deleted_at), state)
            for id, (text, tags, members, state) in past.items()
            if id not in deleted_at
        }

    for step, past in pasts.items():
        shown = as_of(catalog, step)
        assert still(shown) == still(past)
        assert shown.keys() == past.keys() - deleted_at.keys()
    for number, step in enumerate(draw.sample(sorted(pasts), 4), 1):
        now = 1000 * number
        done = catalog.past.rollback(ANN, to=at(step), author="k", now=at(now), limit=500)
        assert {one.id for one in done.cannot_restore} == {
            id for id, when in deleted_at.items() if id in pasts[step] and when > step
        }
        after = picture(catalog, now)
        wanted = still(pasts[step])
        assert {id: after[id] for id in wanted} == wanted
        assert {after[id][3] for id in after.keys() - wanted.keys()} <= {"merged", "archived"}
        again = catalog.past.rollback(ANN, to=at(step), author="k", now=at(now + 1), limit=500)
        assert (again.changed, again.out) == ((), ())
