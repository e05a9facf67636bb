"""The shell of the activation tier's actor, in this process: a tiny model, no Ray, no media."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from actors import kv_cache
from actors.kv_cache import KVCacheActor
from memcube.activation import gate as gates
from memcube.activation.contract import Mode, Sampling
from memcube.activation.fidelity import Fidelity, FidelityReport
from memcube.activation.gate import GateState
from memcube.chat.contract import ChatPrompt, MemorySegment, Turn
from memcube.chat.host import BuildRequest
from memcube.config import Config
from memcube.ids import CubeId, TenantId
from memcube.testing.tiny_lm import tiny_model
from tests.unit.chat.test_host import TEMPLATE

GOOD = Fidelity(kl=0.01, top1=0.99, recall=1.0, share=0.15, num_tokens=99, num_facts=9)
MEMORIES = tuple(
    MemorySegment(text=f"{name} " * 40 + "\n", cubes=(CubeId(name),)) for name in ("tea", "milk")
)


@pytest.fixture
def loaded():
    loaded = tiny_model()
    loaded.tokenizer.chat_template = TEMPLATE
    return loaded


@pytest.fixture
async def made(monkeypatch, tmp_path, loaded):
    """Makes actors; their models are loaded at once, their gates pass when ``go`` is set."""
    go = threading.Event()
    actors = []

    def measure(model, idle, *, num_cases, measured):
        assert go.wait(30)
        return FidelityReport(
            model=model.fingerprint,
            dtype=model.layout.dtype,
            modes={Mode.BLEND: GOOD},
            passed=(Mode.BLEND,),
        )

    monkeypatch.setattr(gates, "measure_fidelity", measure)
    monkeypatch.setattr(kv_cache, "load_model", lambda spec, folder: loaded)
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr(kv_cache.ray, "get_runtime_context", lambda: context)

    def make(**activation):
        sizes = {"host_mb": 0, "disk_mb": 0, "block_tokens": 16, "buffer_mb": 64}
        config = Config.model_validate({"model_cache": tmp_path, "activation": sizes | activation})
        actors.append(KVCacheActor(config))
        return actors[-1]

    make.go = go
    yield make
    go.set()
    for actor in actors:
        await actor.close()


async def settled(actor):
    await (await actor._opened()).gating
    return await actor.describe()


async def chat(actor, segments, mode):
    prompt = ChatPrompt(
        turns=(Turn(role="user", content="What is there?"),),
        segments=segments,
        tenant=TenantId("t"),
        salt="t",
        group="",
        mode=mode,
        sampling=Sampling(),
        max_tokens=2,
        stop=(),
        deadline_s=30.0,
    )
    pieces = [piece async for piece in actor.chat(prompt)]
    return [use.form for use in pieces[-1].uses]


async def test_an_actor_is_ready_and_answers_exactly_before_its_gate_has_passed(made):
    actor = made()
    info = await actor.describe()
    assert info.composing.state is GateState.MEASURING
    assert await chat(actor, MEMORIES, Mode.BLEND) == ["text", "text"]
    assert await chat(actor, MEMORIES, Mode.BLEND) == ["exact_kv", "exact_kv"]
    made.go.set()
    info = await settled(actor)
    assert info.composing.modes == (Mode.BLEND,)
    assert info.composing.report.modes == {Mode.BLEND: GOOD}


async def test_what_passed_is_composed_from_then_on(made):
    actor = made()
    made.go.set()
    await settled(actor)
    await actor.build(
        BuildRequest(segments=MEMORIES, tenant="t", salt="t", group="", mode=Mode.BLEND)
    )
    assert await chat(actor, MEMORIES[::-1], Mode.BLEND) == ["exact_kv", "composed_kv"]


async def test_a_second_actor_takes_the_report_of_the_first(made, monkeypatch):
    made.go.set()
    await settled(made())
    monkeypatch.setattr(gates, "measure_fidelity", None)
    assert (await settled(made())).composing.modes == (Mode.BLEND,)


async def test_composing_can_be_left_out(made):
    actor = made(composing="off")
    assert (await actor.describe()).composing.state is GateState.OFF


async def test_an_actor_closes_while_its_gate_is_measured(made):
    actor = made()
    assert (await actor.describe()).composing.state is GateState.MEASURING
    await asyncio.wait_for(actor.close(), 30)
