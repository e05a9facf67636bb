"""Who is told of adapters that have stopped, and what a sweep finds."""

import pytest

from memcube.activation.contract import AdapterRef
from memcube.catalog import AdapterRecord, NewAdapter, Principal
from memcube.chat.forgetting import gone, sweep
from memcube.cube import Scope
from memcube.ids import CubeId
from memcube.parametric.registry import reference
from memcube.reader.messages import Header
from memcube.service import AddRequest
from memcube.testing.chat import ScriptedModel
from memcube.testing.local import LocalSystem, migrated_catalog


class Holder:
    """An engine that holds adapters."""

    def __init__(self, held: dict[str, set[str]]) -> None:
        self.held = held

    async def adapters_held(self) -> dict[str, set[str]]:
        return self.held

    async def forget(self, cubes=(), tenant=None) -> int:
        for names in self.held.values():
            names.difference_update(cubes)
        return 0


class Told(ScriptedModel):
    """Remembers what it was told to forget."""

    def __init__(self) -> None:
        super().__init__()
        self.forgotten: list[list[str]] = []

    async def forget(self, cubes, tenant) -> int:
        self.forgotten.append(list(cubes))
        return await super().forget(cubes, tenant)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return migrated_catalog(tmp_path_factory.mktemp("template"))


@pytest.fixture
def system(tmp_path, template):
    opened = LocalSystem.open(tmp_path, template=template)
    opened.engines[:] = [Told(), Told()]
    yield opened
    opened.close()


@pytest.fixture
def who(system) -> Principal:
    return system.principal()


async def remembered(system: LocalSystem, who: Principal, text: str, **header) -> CubeId:
    adds = [AddRequest(text=text, header=Header(user_id="ann", **header))]
    (outcome,) = await system.service.add(who, adds, wait_indexed=False)
    return outcome.results[0].cube.id


def adapter(system: LocalSystem, who: Principal, *cubes: CubeId, sha: str = "a") -> AdapterRecord:
    new = NewAdapter(
        name="ann",
        scope=Scope(tenant=who.tenant, user_id="ann"),
        base="f" * 64,
        sha256=sha * 64,
        size_bytes=1,
        rank=1,
        cubes=dict.fromkeys(cubes, 1),
    )
    book, now = system.catalog.adapters, system.clock()
    made = book.add(who.tenant, new, now=now)
    return book.activate(who.tenant, made.line.id, made.version, now=now)


async def test_engines_are_told_of_the_adapters_that_stop_with_a_memory(system, who):
    kept, dropped = [await remembered(system, who, text) for text in ("tea", "milk")]
    stopped = reference(adapter(system, who, dropped))
    await system.service.delete(who, dropped)
    for engine in system.engines:
        assert engine.forgotten == [[dropped, stopped.name]]
    # One that was away then is told with the next change, and not for ever.
    await system.service.delete(who, kept)
    assert system.engines[0].forgotten[1:] == [[kept, stopped.name]]
    system.clock.advance(601)
    await system.forgetting(who.tenant, ())
    assert len(system.engines[0].forgotten) == 2


async def test_one_that_took_the_place_of_another_is_not_forgotten(system, who):
    cube = await remembered(system, who, "tea")
    first, second = (adapter(system, who, cube, sha=sha) for sha in "ab")
    await system.forgetting(who.tenant, ())
    assert system.engines[0].forgotten == [[reference(first).name]]
    names = [reference(record).name for record in (first, second)]
    assert gone(system.catalog, who.tenant, [*names, cube], now=system.clock()) == names[:1]


async def test_an_engine_that_is_down_does_not_fail_the_change(system, who):
    cube = await remembered(system, who, "tea")
    system.engines[0].down = True
    stopped = reference(adapter(system, who, cube))
    await system.service.delete(who, cube)
    assert system.engines[1].forgotten == [[cube, stopped.name]]


async def test_a_sweep_forgets_what_has_stopped_or_expired_and_nothing_else(system, who):
    cube = await remembered(system, who, "tea")
    first, second = (adapter(system, who, cube, sha=sha) for sha in "ab")
    other = AdapterRef("of another tenant's", "c" * 64).name
    holder = Holder({who.tenant: {reference(r).name for r in (first, second)}, "other": {other}})
    assert await sweep(holder, system.catalog, now=system.clock()) == 2
    assert holder.held == {who.tenant: {reference(second).name}, "other": set()}
    assert await sweep(holder, system.catalog, now=system.clock()) == 0
    system.catalog.cubes.delete(who.tenant, cube, now=system.clock())
    assert await sweep(holder, system.catalog, now=system.clock()) == 1
