import asyncio
import fcntl
from dataclasses import replace

import pytest
import torch

from memcube.activation import gate as gates
from memcube.activation.contract import GenerateRequest, Mode
from memcube.activation.engine import Engine, EngineLimits
from memcube.activation.fidelity import measure_fidelity
from memcube.activation.fidelity_report import Fidelity, FidelityReport, Thresholds
from memcube.activation.forward import KvBuffer, PackedModel, Row
from memcube.activation.gate import FidelityGate, GateState, report_key
from memcube.errors import Unavailable
from memcube.files import replace_file
from memcube.testing.kv import TinyLru
from memcube.testing.tiny_lm import tiny_model

LOADED = tiny_model()
MODEL = PackedModel(LOADED)
GOOD = Fidelity(kl=0.01, top1=0.99, recall=1.0, share=0.15, num_tokens=99, num_facts=9)
REPORT = FidelityReport(
    model=LOADED.fingerprint,
    dtype=LOADED.layout.dtype,
    asked=9,
    recalled=9,
    modes={Mode.BLEND: GOOD, Mode.FAST: replace(GOOD, kl=0.4)},
    passed=(Mode.BLEND,),
)


class Composes:
    """An engine that only remembers what it may compose."""

    def __init__(self, loaded=LOADED):
        self.loaded = loaded
        self.allowed = None

    def idle_model(self, pause):
        self.pause = pause
        return MODEL

    def allow_composing(self, modes):
        self.allowed = tuple(modes)


@pytest.fixture
def measured(monkeypatch):
    """How often the gate was measured, which gives REPORT at once."""
    calls = []

    def measure(loaded, model, *, num_cases, measured):
        calls.append(num_cases)
        measured(num_cases)
        return REPORT

    monkeypatch.setattr(gates, "measure_fidelity", measure)
    return calls


def make(engine, folder, num_cases=2):
    return FidelityGate(engine, folder, num_cases=num_cases)


async def test_what_passes_is_composed_and_the_report_says_what_does_not(measured, tmp_path):
    engine = Composes()
    gate = make(engine, tmp_path)
    assert (gate.status.state, engine.allowed) == (GateState.MEASURING, None)
    await gate.run()
    assert engine.allowed == (Mode.BLEND,)
    assert gate.status.state is GateState.DONE
    assert gate.status.modes == (Mode.BLEND,)
    assert gate.status.why == "fast: KL 0.4000 (at most 0.15), 15.0% computed again (at most 0%)"
    assert gate.status.num_measured == 2
    assert gate.status.report == REPORT


async def test_a_model_is_measured_once(measured, tmp_path):
    await make(Composes(), tmp_path).run()
    again = Composes()
    await make(again, tmp_path).run()
    assert again.allowed == (Mode.BLEND,)
    assert measured == [2]
    assert [path.suffix for path in sorted((tmp_path / "fidelity").iterdir())] == [".json", ".lock"]


@pytest.mark.parametrize("damage", ["", "{}", '{"format": 1', "\x00\xff"])
async def test_a_damaged_report_is_made_anew(measured, tmp_path, damage):
    await make(Composes(), tmp_path).run()
    (path,) = (tmp_path / "fidelity").glob("*.json")
    path.write_text(damage)
    await make(Composes(), tmp_path).run()
    assert FidelityReport.from_json(path.read_text()) == REPORT
    assert len(measured) == 2


async def test_a_report_of_another_model_is_not_believed(measured, tmp_path):
    await make(Composes(), tmp_path).run()
    (path,) = (tmp_path / "fidelity").glob("*.json")
    path.write_text(replace(REPORT, model="other", passed=(Mode.FAST,)).to_json())
    engine = Composes()
    await make(engine, tmp_path).run()
    assert engine.allowed == (Mode.BLEND,)


def test_the_reports_name_depends_on_model_settings_and_constants(monkeypatch):
    key = report_key(LOADED, 8)
    assert key == report_key(replace(LOADED, name="called otherwise"), 8)
    others = [
        report_key(LOADED, 9),
        report_key(replace(LOADED, fingerprint="x"), 8),
        report_key(replace(LOADED, tokenizer_fingerprint="x"), 8),
    ]
    monkeypatch.setattr(gates, "GATE_VERSION", gates.GATE_VERSION + 1)
    others.append(report_key(LOADED, 8))
    assert len({key, *others}) == 5


async def test_a_model_that_cannot_be_composed_is_served_exactly_and_the_report_says_why(tmp_path):
    engine = Composes(replace(LOADED, why_not="it has a sliding window"))
    gate = make(engine, tmp_path)
    await gate.run()
    assert engine.allowed == ()
    assert gate.status.why == "it has a sliding window"
    assert gate.status.state is GateState.DONE


async def test_of_two_engines_on_a_node_the_second_waits_for_the_firsts_report(
    measured, tmp_path, monkeypatch
):
    monkeypatch.setattr(gates, "_LOOK_S", 0.001)
    first, second = Composes(), Composes()
    gate = make(second, tmp_path)
    folder = tmp_path / "fidelity"
    folder.mkdir()
    with gate._path.with_suffix(".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = asyncio.create_task(gate.run())
        await asyncio.sleep(0.02)
        assert second.allowed is None
        replace_file(gate._path, REPORT.to_json())
    await waiting
    assert second.allowed == (Mode.BLEND,)
    assert measured == []
    assert first.allowed is None


@pytest.mark.parametrize(
    ("failed", "why"),
    [(RuntimeError("out of memory"), "RuntimeError: out of memory"), (Unavailable("shut"), "shut")],
)
async def test_a_gate_that_fails_composes_nothing(tmp_path, monkeypatch, failed, why):
    def measure(*_, **__):
        raise failed

    monkeypatch.setattr(gates, "measure_fidelity", measure)
    engine = Composes()
    gate = make(engine, tmp_path)
    await gate.run()
    assert engine.allowed is None
    assert gate.status.state is GateState.FAILED
    assert why in gate.status.why
    assert not list((tmp_path / "fidelity").glob("*.json"))


# -- on an engine


class Slow:
    """The real model, which counts its calls and lets the test in between them."""

    layout, device = MODEL.layout, MODEL.device

    def __init__(self):
        self.sizes = []
        self.between = lambda: None

    def forward(self, rows):
        self.between()
        self.sizes.append(sum(len(row.token_ids) for row in rows))
        return MODEL.forward(rows)

    def taken(self, row):
        return MODEL.taken(row)


@pytest.fixture
async def slow():
    model = Slow()
    model.engine = Engine(
        model,
        LOADED,
        policy=TinyLru(1 << 30),
        limits=EngineLimits(block_tokens=16, step_tokens=64, background_tokens=32),
    )
    yield model
    await model.engine.close()


def request(seed=3):
    ids = tuple(torch.randint(0, 250, (100,), generator=torch.Generator().manual_seed(seed)))
    return GenerateRequest(
        prompt_ids=tuple(int(id) for id in ids), tenant="a", salt="a", max_tokens=2
    )


async def test_the_idle_model_computes_in_pieces_what_the_model_does_at_once(slow):
    ids = list(request().prompt_ids)
    idle, buffers = slow.engine.idle_model(), [KvBuffer(MODEL.layout, "cpu") for _ in range(2)]
    for positions, logits in [(None, "all"), ([3, 50, *range(100, 198)], "last")]:
        given = [Row(buffer, ids, positions, logits) for buffer in buffers]
        (expected,) = MODEL.forward(given[:1])
        (found,) = await asyncio.to_thread(idle.forward, given[1:])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(buffers[1].view(), buffers[0].view(), atol=1e-4, rtol=1e-4)
    assert max(slow.sizes) == 32
    (nothing,) = await asyncio.to_thread(idle.forward, [Row(buffers[0], ids, logits="none")])
    assert nothing is None
    row = Row(buffers[0], ids[:20])
    taken_N = await asyncio.to_thread(idle.taken, row)
    torch.testing.assert_close(taken_N, MODEL.taken(row))


async def test_a_request_goes_before_idle_calls(slow):
    done = []

    async def ask():
        async for piece in slow.engine.generate(request()):
            if piece.usage:
                done.append("request")

    loop = asyncio.get_running_loop()
    asked = []

    def ask_once():
        if not asked:
            asked.append(asyncio.run_coroutine_threadsafe(ask(), loop))

    slow.between = ask_once
    buffer = KvBuffer(MODEL.layout, "cpu")
    idle = slow.engine.idle_model()

    def work():
        idle.forward([Row(buffer, [5] * 32 * 40)])
        done.append("idle")

    await asyncio.to_thread(work)
    await asyncio.wrap_future(asked[0])
    assert done == ["request", "idle"]


async def test_an_idle_call_that_fails_fails_alone(slow):
    idle = slow.engine.idle_model()
    with pytest.raises(ValueError, match="nothing to compute"):
        await asyncio.to_thread(idle.forward, [])
    assert [piece async for piece in slow.engine.generate(request())]


async def test_who_waits_for_idle_time_hears_that_the_engine_closed(slow):
    idle = slow.engine.idle_model()
    entered, go = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold():
        loop.call_soon_threadsafe(entered.set)
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result()
        slow.between = lambda: None

    slow.between = hold
    buffer = KvBuffer(MODEL.layout, "cpu")
    working = asyncio.create_task(asyncio.to_thread(idle.forward, [Row(buffer, [5] * 320)]))
    await entered.wait()
    closing = asyncio.create_task(slow.engine.close())
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(Unavailable):
        await working
    await closing
    with pytest.raises(Unavailable):
        idle.taken(Row(buffer, [5]))


async def test_the_gate_runs_on_a_serving_engine_and_gives_what_it_gives_alone(slow, tmp_path):
    gate = make(slow.engine, tmp_path, num_cases=1)
    running = asyncio.create_task(gate.run())
    answers = [piece async for piece in slow.engine.generate(request())]
    assert answers[-1].usage.prefilled == 100
    await running
    alone = measure_fidelity(LOADED, MODEL, num_cases=1)
    found = gate.status.report
    assert found.modes[Mode.BLEND].kl == pytest.approx(alone.modes[Mode.BLEND].kl, rel=1e-2)
    assert found.modes[Mode.BLEND].num_tokens == alone.modes[Mode.BLEND].num_tokens
    assert gate.status.state is GateState.DONE


async def test_thresholds_that_a_random_model_reaches_let_it_compose(slow, tmp_path, monkeypatch):
    lenient = Thresholds(kl=1e9, top1=0.0, recall=0.0, share=1.0)
    for module in (gates, __import__("memcube.activation.fidelity", fromlist=["x"])):
        monkeypatch.setattr(module, "THRESHOLDS", dict.fromkeys((Mode.BLEND, Mode.FAST), lenient))
    gate = make(slow.engine, tmp_path, num_cases=1)
    await gate.run()
    # It recalls no fact, and that is refused whatever the limits.
    assert gate.status.why.count("a full prefill recalls no fact either") == 2
    monkeypatch.setattr(Fidelity, "misses", lambda figures, limits: [])
    (path,) = (tmp_path / "fidelity").glob("*.json")
    path.unlink()
    again = make(slow.engine, tmp_path, num_cases=1)
    await again.run()
    assert slow.engine._batcher.composing.modes == {Mode.BLEND, Mode.FAST}


async def test_the_gate_waits_while_others_need_the_machine(tmp_path, measured, monkeypatch):
    monkeypatch.setattr(gates, "_LOOK_S", 0.001)
    busy, engine = [True, True, False], Composes()
    gate = FidelityGate(engine, tmp_path, num_cases=2, is_busy=lambda: busy.pop(0))
    await gate.run()
    engine.pause()
    assert busy == []


async def test_a_gate_that_was_ended_waits_no_longer(tmp_path, measured):
    engine = Composes()
    gate = FidelityGate(engine, tmp_path, num_cases=2, is_busy=lambda: True)
    await gate.run()
    gate.end()
    with pytest.raises(Unavailable, match="was ended"):
        engine.pause()


def test_the_idle_model_pauses_before_each_piece(slow):
    paused = []
    idle = slow.engine.idle_model(lambda: paused.append(1))
    idle.forward([Row(KvBuffer(MODEL.layout, "cpu"), [5] * 80)])
    assert len(paused) == 3
