"""The shell of a training's worker, in this process: a tiny model, no Ray."""

import asyncio
import os

import pytest

from actors import adapter_trainer
from actors.adapter_trainer import AdapterTrainerActor
from memcube.config import Config, TrainingConfig
from memcube.errors import Conflict, Unavailable
from memcube.parametric.training import Outcome
from memcube.parametric.work import Phase
from tests.unit.parametric.small import small_model
from tests.unit.parametric.test_training_work import small_work


@pytest.fixture
def actor(tmp_path, monkeypatch):
    def made(**training) -> AdapterTrainerActor:
        config = Config(training=TrainingConfig(engine="torch", nice=0, **training))
        return AdapterTrainerActor(config, small_work(), str(tmp_path / "run"), 0)

    monkeypatch.setattr(adapter_trainer, "load_model", lambda *_: small_model())
    return made


async def test_it_answers_while_it_trains(actor):
    worker = actor()
    assert await worker.load() is None
    assert await worker.progress() is None
    run = asyncio.ensure_future(worker.run(None))
    seen = []
    while not run.done():
        seen.append(await worker.progress())
        await asyncio.sleep(0.01)
    assert (await run).outcome is Outcome.DONE
    assert Phase.TRAINING in {told.phase for told in seen if told is not None}


async def test_it_stops_when_it_is_told(actor):
    worker = actor()
    await worker.load()
    await worker.stop()
    assert (await worker.run(None)).outcome is Outcome.CANCELLED


async def test_it_stops_when_nobody_asks_for_it_any_more(actor):
    worker = actor(timeout_s=1e-9)
    await worker.load()
    await asyncio.sleep(0.01)
    assert (await worker.run(None)).outcome is Outcome.CANCELLED


async def test_its_threads_go_behind_those_that_serve(tmp_path, monkeypatch):
    priorities = []

    def load(*_):
        priorities.append(os.getpriority(os.PRIO_PROCESS, 0))
        return small_model()

    monkeypatch.setattr(adapter_trainer, "load_model", load)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    config = Config(training=TrainingConfig(engine="torch", nice=1))
    await AdapterTrainerActor(config, small_work(), str(tmp_path), 0).load()
    assert priorities == [min(19, before + 1)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


async def test_of_several_failures_the_cause_is_told():
    async def failed(error: Exception) -> None:
        raise error

    runs = [asyncio.ensure_future(failed(e)) for e in (Unavailable("gone"), Conflict("other"))]
    await asyncio.wait(runs)
    with pytest.raises(Conflict):
        adapter_trainer._raise_cause(runs)
    with pytest.raises(Unavailable):
        adapter_trainer._raise_cause(runs[:1])
