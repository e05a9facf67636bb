"""The vLLM adapter over a double of vLLM's V1 API: prefix cache with salts, streaming, abort.

The double keeps to what the sources of vLLM 0.27 and later say of ``AsyncLLM.generate``; real vLLM was not run.
"""

import asyncio
import sys
from contextlib import aclosing
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from memcube.activation.contract import (
    AdapterRef,
    FinishReason,
    GenerateRequest,
    Member,
    Mode,
    Sampling,
)
from memcube.config import Config
from memcube.errors import (
    AdapterUnusable,
    BadRequest,
    Corrupt,
    DeadlineExceeded,
    LimitExceeded,
    TooBusy,
    Unavailable,
    UnknownBackend,
)

BLOCK = 4


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class VLLMClientError(Exception):
    pass


class EngineDeadError(Exception):
    pass


class EngineGenerateError(Exception):
    pass


class FakeLlm:
    """Says ``words``, and knows full blocks of prompts by their salt. ``gate`` holds it before each
    word from the second on; ``failing`` is raised instead of the first."""

    def __init__(self, words: tuple[str, ...] = ("In ", "Oslo", ".")) -> None:
        self.words = words
        self.model_config = SimpleNamespace(max_model_len=64)
        self.calls: list[SimpleNamespace] = []
        self.aborted: list[str] = []
        self.gate: asyncio.Event | None = None
        self.failing: Exception | None = None
        self.shut = False
        self.removed: list[int] = []
        self.called = asyncio.Event()
        self._blocks: set[tuple[Any, ...]] = set()

    async def generate(self, prompt, sampling_params, request_id, *, lora_request=None):
        call = SimpleNamespace(prompt=prompt, params=sampling_params, lora=lora_request)
        self.calls.append(call)
        self.called.set()
        try:
            if self.failing is not None:
                raise self.failing
            cached = self._read(prompt, lora_request)
            words = self.words[: sampling_params.max_tokens]
            for number, word in enumerate(words):
                if number and self.gate is not None:
                    await self.gate.wait()
                stopped = next((s for s in sampling_params.stop if s in word), None)
                last = number == len(words) - 1 or stopped is not None
                reason = "length" if len(words) < len(self.words) else "stop"
                yield SimpleNamespace(
                    outputs=[
                        SimpleNamespace(
                            text="" if stopped else word,
                            token_ids=[number],
                            finish_reason=("stop" if stopped else reason) if last else None,
                        )
                    ],
                    finished=last,
                    num_cached_tokens=cached,
                    metrics=SimpleNamespace(queued_ts=1.0, scheduled_ts=1.25),
                )
                if last:
                    return
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request_id)
            raise

    def _read(self, prompt: dict[str, Any], lora: Any) -> int:
        ids, cached, hit = prompt["prompt_token_ids"], 0, True
        for end in range(BLOCK, len(ids) + 1, BLOCK):
            key = (prompt["cache_salt"], lora and lora.lora_int_id, *ids[:end])
            # The last token is always computed.
            hit = hit and key in self._blocks and end < len(ids)
            cached = end if hit else cached
            self._blocks.add(key)
        return cached

    async def remove_lora(self, lora_id: int) -> bool:
        self.removed.append(lora_id)
        return True

    def shutdown(self) -> None:
        self.shut = True


@pytest.fixture
def vllm(monkeypatch) -> dict[str, ModuleType]:
    """The double in the place of the package."""
    parts: dict[str, dict[str, Any]] = {
        "vllm": {
            "__version__": "0.33.0",
            "SamplingParams": SimpleNamespace,
            "TokensPrompt": dict,
        },
        "vllm.sampling_params": {"RequestOutputKind": RequestOutputKind},
        "vllm.exceptions": {"VLLMClientError": VLLMClientError},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": SimpleNamespace},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.exceptions": {
            "EngineDeadError": EngineDeadError,
            "EngineGenerateError": EngineGenerateError,
        },
    }
    modules = {}
    for name, members in parts.items():
        module = ModuleType(name)
        vars(module).update(members)
        modules[name] = module
        monkeypatch.setitem(sys.modules, name, module)
    return modules


@pytest.fixture
def llm() -> FakeLlm:
    return FakeLlm()


@pytest.fixture
def engine(vllm, llm):
    from memcube.activation.vllm_engine import VllmEngine

    return VllmEngine(llm, max_positions=64, max_running=2, max_waiting=1)


def asked(ids=range(1, 11), **more: Any) -> GenerateRequest:
    given = {"prompt_ids": tuple(ids), "tenant": "acme", "salt": "acme"} | more
    return GenerateRequest(**given)


async def answer(engine, request: GenerateRequest):
    pieces = [piece async for piece in engine.generate(request)]
    return "".join(piece.text for piece in pieces), pieces[-1]


async def attached(engine, **more: Any) -> int:
    return (await answer(engine, asked(**more)))[1].usage.attached_exact


async def test_an_answer_streams_and_ends_with_its_report(engine, llm):
    pieces = [piece async for piece in engine.generate(asked())]
    assert [piece.text for piece in pieces] == ["In ", "Oslo", "."]
    assert [piece.usage is None for piece in pieces] == [True, True, False]
    usage = pieces[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (10, 3)
    assert (usage.attached_exact, usage.prefilled, usage.queue_s) == (0, 10, 0.25)
    assert pieces[-1].finish is FinishReason.STOP
    assert llm.calls[0].params.output_kind is RequestOutputKind.DELTA


async def test_the_second_prompt_attaches_what_the_first_one_read(engine):
    assert await attached(engine) == 0
    assert await attached(engine) == 8
    told = engine.stats()
    assert told.attached_tokens == {"exact": 8}
    assert told.prefilled_tokens == 12
    assert told.finished == {"stop": 2}
    assert {kind: data.count for kind, data in told.ttft_s.items()} == {"none": 1, "exact": 1}
    assert (told.running, told.waiting, told.generated_tokens) == (0, 0, 6)


async def test_sampling_and_stops_reach_vllm(engine, llm):
    request = asked(
        sampling=Sampling(temperature=0.5, top_p=0.9, seed=7), max_tokens=2, stop=("x",)
    )
    _, last = await answer(engine, request)
    params = llm.calls[0].params
    assert (params.temperature, params.top_p, params.seed) == (0.5, 0.9, 7)
    assert (params.max_tokens, params.stop) == (2, ["x"])
    assert (params.stop_token_ids, params.ignore_eos) == ([], False)
    assert last.finish is FinishReason.LENGTH
    await answer(engine, asked(stop_ids=frozenset({5, 3})))
    assert (llm.calls[1].params.stop_token_ids, llm.calls[1].params.ignore_eos) == ([3, 5], True)


async def test_a_stop_string_ends_the_answer_without_it(engine):
    said, last = await answer(engine, asked(stop=("Oslo",)))
    assert (said, last.finish) == ("In ", FinishReason.STOP)


# -- who shares what -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [{"tenant": "other"}, {"salt": "other"}, {"tenant": "other", "salt": "other"}],
    ids=str,
)
async def test_no_kv_is_shared_over_a_salt(engine, other):
    await attached(engine)
    assert await attached(engine, **other) == 0


async def test_the_salt_can_not_be_guessed_from_the_tenant(vllm, engine, llm):
    from memcube.activation.vllm_engine import VllmEngine

    await attached(engine)
    await attached(VllmEngine(llm, max_positions=64, max_running=1, max_waiting=0))
    salts = {call.prompt["cache_salt"] for call in llm.calls}
    assert len(salts) == 2
    assert not any("acme" in salt for salt in salts)


async def test_off_attaches_nothing_and_leaves_nothing(engine):
    await attached(engine)
    assert await attached(engine, mode=Mode.OFF) == 0
    assert await attached(engine, mode=Mode.OFF) == 0


@pytest.mark.parametrize("mode", [Mode.BLEND, Mode.FAST])
async def test_composed_modes_are_served_exactly(engine, mode):
    await attached(engine)
    assert await attached(engine, mode=mode) == 8


async def test_what_is_forgotten_is_attached_by_nobody(engine):
    tea = (Member("tea", 2),)
    await attached(engine, members=tea)
    await attached(engine, tenant="other", salt="other")
    assert await engine.forget(["milk"]) == 0
    assert await attached(engine, members=tea) == 8
    assert await engine.forget(["tea", "milk"]) == 1
    assert await attached(engine, members=tea) == 0
    assert await attached(engine, tenant="other", salt="other") == 8
    assert await engine.forget(tenant="other") == 1
    assert await attached(engine, tenant="other", salt="other") == 0


async def test_what_is_forgotten_while_it_is_read_is_attached_by_nobody(engine, llm):
    llm.gate = asyncio.Event()
    tea = (Member("tea", 2),)
    async with aclosing(engine.generate(asked(members=tea))) as pieces:
        await anext(pieces)
        await engine.forget(["tea"])
        llm.gate.set()
        assert [piece.text async for piece in pieces] == ["Oslo", "."]
    assert await attached(engine, members=tea) == 0


async def test_a_salt_with_too_many_cubes_begins_anew(engine, monkeypatch):
    from memcube.activation import vllm_engine

    monkeypatch.setattr(vllm_engine, "MAX_CUBES", 2)
    for n in range(3):
        await attached(engine, members=(Member(f"cube-{n}", 0),))
    assert await attached(engine) == 0


# -- adapters --------------------------------------------------------------------------------------


class Shelf:
    """Folders of adapters, by tenant and version."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.failing: Exception | None = None

    async def __call__(self, tenant: str, ref: AdapterRef) -> Path:
        if self.failing is not None:
            raise self.failing
        folder = self.root / tenant / ref.version
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path)


async def test_an_adapter_is_loaded_by_version_under_a_number_of_its_own(vllm, llm, shelf):
    from memcube.activation.vllm_engine import VllmEngine

    engine = VllmEngine(llm, max_positions=64, max_running=2, max_waiting=1, adapters=shelf)
    refs = [AdapterRef("a", "1"), AdapterRef("a", "2"), AdapterRef("a", "1")]
    found = [await attached(engine, adapter=ref) for ref in refs]
    assert found == [0, 0, 8]
    assert await attached(engine) == 0
    assert [call.lora and call.lora.lora_int_id for call in llm.calls] == [1, 2, 1, None]
    paths = [call.lora.lora_path for call in llm.calls[:2]]
    assert paths == [str(shelf.root / "acme" / n) for n in "12"]
    salts = [call.prompt["cache_salt"] for call in llm.calls]
    assert len(set(salts)) == 3
    assert salts[0] == salts[2]


async def test_one_that_can_not_be_fetched_is_unusable_and_does_no_harm(vllm, llm, shelf):
    from memcube.activation.vllm_engine import VllmEngine

    engine = VllmEngine(llm, max_positions=64, max_running=2, max_waiting=1, adapters=shelf)
    shelf.failing = Corrupt("adapter a", "is damaged")
    with pytest.raises(AdapterUnusable) as unusable:
        await answer(engine, asked(adapter=AdapterRef("a", "1")))
    assert unusable.value.why is shelf.failing
    assert llm.calls == []
    assert engine.stats().running == engine.stats().waiting == 0
    assert await attached(engine) == 0


async def test_a_forgotten_adapter_leaves_vllm_when_no_request_uses_it(vllm, llm, shelf):
    from memcube.activation.vllm_engine import VllmEngine

    engine = VllmEngine(llm, max_positions=64, max_running=2, max_waiting=1, adapters=shelf)
    kept, gone = AdapterRef("a", "1"), AdapterRef("a", "2")
    await attached(engine, adapter=kept)
    llm.gate = asyncio.Event()
    async with aclosing(engine.generate(asked(adapter=gone))) as pieces:
        await anext(pieces)
        await engine.forget([gone.name])
        assert llm.removed == []
        llm.gate.set()
        assert [piece.text async for piece in pieces] == ["Oslo", "."]
    assert llm.removed == [2]
    assert not (shelf.root / "acme" / "2").exists()
    assert (shelf.root / "acme" / "1").exists()
    await attached(engine, adapter=gone)
    assert llm.calls[-1].lora.lora_int_id == 3
    await engine.forget(tenant="acme")
    assert llm.removed == [2, 1, 3]


async def test_without_adapters_one_is_unknown(engine):
    with pytest.raises(UnknownBackend):
        engine.generate(asked(adapter=AdapterRef("a", "1")))


# -- ends ------------------------------------------------------------------------------------------


async def test_to_close_the_answer_aborts_the_request(engine, llm):
    llm.gate = asyncio.Event()
    async with aclosing(engine.generate(asked())) as pieces:
        await anext(pieces)
        assert engine.stats().running == 1
    assert len(llm.aborted) == 1
    assert engine.stats().finished == {"cancelled": 1}
    assert engine.stats().running == 0


async def test_to_cancel_the_task_aborts_the_request(engine, llm):
    llm.gate = asyncio.Event()
    task = asyncio.create_task(answer(engine, asked()))
    await llm.called.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(llm.aborted) == 1


async def test_a_deadline_cuts_an_answer_and_aborts_it(engine, llm):
    llm.gate = asyncio.Event()
    said, last = await answer(engine, asked(deadline_s=0.02))
    assert (said, last.finish) == ("In ", FinishReason.DEADLINE)
    assert last.usage.completion_tokens == 1
    assert len(llm.aborted) == 1


async def test_a_deadline_before_the_first_token_is_an_error(engine, llm, monkeypatch):
    async def silent(*_: Any, **__: Any):
        await asyncio.Event().wait()
        yield

    monkeypatch.setattr(llm, "generate", silent)
    with pytest.raises(DeadlineExceeded):
        await answer(engine, asked(deadline_s=0.02))
    assert engine.stats().finished == {"deadline_exceeded": 1}


async def test_more_than_may_wait_is_refused(engine, llm):
    llm.gate = asyncio.Event()
    running = [engine.generate(asked()) for _ in range(3)]
    for pieces in running:
        await anext(pieces)
    with pytest.raises(TooBusy) as refused:
        await anext(engine.generate(asked()))
    assert refused.value.retry_after_s > 0
    for pieces in running:
        await pieces.aclose()
    llm.gate = None
    assert await attached(engine, mode=Mode.OFF) == 0


@pytest.mark.parametrize(
    ("failing", "error"),
    [
        (ValueError("too long"), BadRequest),
        (VLLMClientError("no such thing"), BadRequest),
        (EngineDeadError(), Unavailable),
        (EngineGenerateError(), Unavailable),
    ],
    ids=str,
)
async def test_what_vllm_refuses_or_fails_at_is_one_of_our_errors(engine, llm, failing, error):
    llm.failing = failing
    with pytest.raises(error):
        await answer(engine, asked())


async def test_what_can_not_fit_is_refused_before_it_is_asked(engine, llm):
    for request in (asked(range(1, 66)), asked(max_tokens=60)):
        with pytest.raises(LimitExceeded):
            engine.generate(request)
    assert llm.calls == []


async def test_a_build_reads_the_prompt_for_the_next_request(engine, llm):
    usage = await engine.build(asked())
    assert (usage.prefilled, usage.completion_tokens) == (10, 0)
    assert llm.calls[0].params.max_tokens == 1
    assert await attached(engine) == 8
    assert await engine.resident_bytes(["tea"]) == 0


async def test_to_close_it_lets_answers_end_and_refuses_others(engine, llm):
    llm.gate = asyncio.Event()
    task = asyncio.create_task(answer(engine, asked()))
    await llm.called.wait()
    closing = asyncio.create_task(engine.close(drain_s=5.0))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await answer(engine, asked())
    llm.gate.set()
    assert (await task)[0] == "In Oslo."
    await closing
    await engine.close()
    assert llm.shut


async def no_objects() -> Any:
    raise AssertionError("no adapter is asked for")


# -- opening ---------------------------------------------------------------------------------------


def test_without_the_package_the_configuration_is_refused(monkeypatch):
    from memcube.activation.vllm_engine import open_vllm

    monkeypatch.setitem(sys.modules, "vllm", None)
    config = Config.model_validate({"activation": {"engine": "vllm"}})
    with pytest.raises(BadRequest, match=r"memcube\[vllm\]"):
        open_vllm(config, no_objects)


@pytest.mark.parametrize("rank", [0, 16])
def test_the_configuration_becomes_vllms_arguments(vllm, monkeypatch, tmp_path, rank):
    from transformers import AutoTokenizer

    from memcube.activation import models
    from memcube.activation.vllm_engine import open_vllm

    made: list[SimpleNamespace] = []

    def from_engine_args(arguments: SimpleNamespace) -> FakeLlm:
        made.append(arguments)
        return FakeLlm()

    for name, members in (
        ("vllm.engine", {}),
        ("vllm.engine.arg_utils", {"AsyncEngineArgs": SimpleNamespace}),
        (
            "vllm.v1.engine.async_llm",
            {"AsyncLLM": SimpleNamespace(from_engine_args=from_engine_args)},
        ),
    ):
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(models, "local_folder", lambda spec, cache: tmp_path / spec.name)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: "the tokenizer")
    wanted = {
        "engine": "vllm",
        "vllm": {"tensor_parallel": 2, "lora_rank": rank, "max_positions": 64},
    }
    folder = tmp_path / "SmolLM2-135M-Instruct"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    told = {"data_dir": tmp_path, "model_cache": tmp_path, "activation": wanted}
    opened = open_vllm(Config.model_validate(told), no_objects)
    (arguments,) = made
    assert arguments.model.endswith("SmolLM2-135M-Instruct")
    assert (arguments.enable_prefix_caching, arguments.trust_remote_code) == (True, False)
    assert (arguments.tensor_parallel_size, arguments.max_model_len) == (2, 64)
    assert getattr(arguments, "max_lora_rank", 0) == rank
    assert (opened.engine.max_positions, opened.tokenizer) == (64, "the tokenizer")
    assert opened.fingerprint == models.weights_fingerprint(folder, tmp_path)
    assert (opened.engine._adapters is None) == (rank == 0)
