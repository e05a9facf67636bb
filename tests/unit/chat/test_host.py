"""A chat's host over a real engine with a tiny model: what is built ahead, attached and told."""

import pytest

from memcube.activation.contract import Mode, Sampling
from memcube.activation.engine import Engine, EngineLimits
from memcube.activation.forward import PackedModel
from memcube.chat.contract import ChatPrompt, MemorySegment, Turn
from memcube.chat.host import BuildRequest, ChatHost
from memcube.chat.prompt import PromptBuilder
from memcube.ids import CubeId, TenantId
from memcube.testing.kv import TinyLru
from memcube.testing.tiny_lm import tiny_model

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
LOADED = tiny_model()
LOADED.tokenizer.chat_template = TEMPLATE
MODEL = PackedModel(LOADED)
MEMORIES = [
    MemorySegment(text=f"{name} " * 40 + "\n", cubes=(CubeId(f"cube-{name}"),))
    for name in ("tea", "milk", "cake")
]


@pytest.fixture
async def engine():
    engine = Engine(
        MODEL,
        LOADED,
        policy=TinyLru(1 << 30),
        limits=EngineLimits(block_tokens=16, step_tokens=128, default_max_tokens=4),
    )
    yield engine
    await engine.close()


@pytest.fixture
def host(engine):
    return ChatHost(engine, PromptBuilder(LOADED.tokenizer))


def prompt(order, mode, question="What is there?"):
    return ChatPrompt(
        turns=(Turn(role="user", content=question),),
        segments=tuple(MEMORIES[n] for n in order),
        tenant=TenantId("t"),
        salt="t",
        group="",
        mode=mode,
        sampling=Sampling(),
        max_tokens=3,
        stop=(),
        deadline_s=30.0,
    )


def ahead(order, mode):
    segments = tuple(MEMORIES[n] for n in order)
    return BuildRequest(segments=segments, tenant="t", salt="t", group="", mode=mode)


async def told(host, *asked):
    pieces = [piece async for piece in host.chat(prompt(*asked))]
    return pieces[-1]


def forms(piece):
    return [use.form for use in piece.uses]


async def test_memories_built_for_composing_serve_in_any_order_and_are_told_as_composed(
    engine, host
):
    engine.allow_composing([Mode.BLEND, Mode.FAST])
    built = await host.build(ahead([0, 1, 2], Mode.BLEND))
    assert built.prefilled >= sum(len(one.text) for one in MEMORIES)
    for mode in (Mode.BLEND, Mode.FAST):
        last = await told(host, [2, 0, 1], mode)
        assert forms(last) == ["exact_kv", "composed_kv", "composed_kv"]
        assert last.usage.attached_composed == len(MEMORIES[0].text) + len(MEMORIES[1].text)
        assert (last.usage.recomputed > 0) == (mode is Mode.BLEND)
    assert (await host.build(ahead([1, 0], Mode.BLEND))).prefilled == 0


async def test_exact_and_off_never_compose(engine, host):
    engine.allow_composing([Mode.BLEND, Mode.FAST])
    await host.build(ahead([0, 1, 2], Mode.BLEND))
    exact = await told(host, [2, 0, 1], Mode.EXACT)
    assert exact.usage.attached_composed == 0
    assert forms(exact) == ["text"] * 3
    assert forms(await told(host, [2, 0, 1], Mode.EXACT)) == ["exact_kv"] * 3
    off = await told(host, [2, 0, 1], Mode.OFF)
    assert off.usage.prefilled == off.usage.prompt_tokens
    assert forms(off) == ["text"] * 3


async def test_before_the_gate_has_passed_a_composed_mode_is_built_and_served_exactly(host):
    await host.build(ahead([0, 1, 2], Mode.BLEND))
    same = await told(host, [0, 1, 2], Mode.BLEND)
    assert forms(same) == ["exact_kv"] * 3
    other = await told(host, [2, 0, 1], Mode.BLEND)
    assert other.usage.attached_composed == 0


async def test_a_blend_of_what_no_one_built_is_read_once_and_composed_from_then_on(engine, host):
    engine.allow_composing([Mode.BLEND])
    assert forms(await told(host, [0, 1, 2], Mode.BLEND)) == ["text"] * 3
    while engine.stats().background:
        await engine.between_steps(lambda: None)
    assert forms(await told(host, [2, 1, 0], Mode.BLEND)) == [
        "exact_kv",
        "composed_kv",
        "composed_kv",
    ]
