"""The shell of the activation tier's actor, in this process: a tiny model, no Ray, no media."""

import asyncio
import threading
from datetime import UTC, datetime

import pytest

from actors import kv_opening
from actors.kv_cache import KVCacheActor
from memcube.activation import gate as gates
from memcube.activation.contract import Mode, Sampling
from memcube.activation.fidelity_report import Fidelity, FidelityReport
from memcube.activation.gate import GateState
from memcube.catalog import Catalog
from memcube.catalog.fence import LEASE
from memcube.chat.contract import ChatPrompt, MemorySegment, Turn
from memcube.chat.host import BuildRequest
from memcube.config import Config
from memcube.errors import StaleEpoch
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
    monkeypatch.setattr(kv_opening, "load_model", lambda spec, folder: loaded)
    monkeypatch.setattr(kv_opening, "this_node", lambda: "node")

    def make(**activation):
        sizes = {"host_mb": 0, "disk_mb": 0, "block_tokens": 16, "buffer_mb": 64}
        config = Config.model_validate(
            {"model_cache": tmp_path, "data_dir": tmp_path, "activation": sizes | activation}
        )
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


async def test_a_leader_builds_finds_and_drops_kv_and_one_that_was_followed_is_refused(
    made, tmp_path
):
    catalog = Catalog.open(f"sqlite:///{tmp_path / 'catalog.db'}")
    for holder in ("first", "second"):
        catalog.leases.acquire(LEASE, holder, now=datetime.now(UTC), ttl_s=-1.0)
    catalog.close()
    actor = made(composing="off")
    facts = await actor.facts()
    assert (facts.node, facts.least_tokens) == ("node", 16)
    wanted = BuildRequest(segments=MEMORIES, tenant="t", salt="t", group="g", mode=Mode.EXACT)
    with pytest.raises(StaleEpoch):
        await actor.build(wanted, 1)
    assert await actor.held(["tea", "milk"], 2) == set()
    await actor.build(wanted, 2)
    assert await actor.held(["tea", "milk", "bread"], 2) == {"tea", "milk"}
    await actor.held((), 3)  # a later leader was heard of
    with pytest.raises(StaleEpoch):
        await actor.forget(["tea"], None, 2)
    await actor.forget(["tea"], None, 3)
    assert "tea" not in await actor.held(["tea", "milk"], 3)
    await actor.build(wanted)  # a gateway's call is of no leader
