"""LoRA adapters in packed rows: against the model with the adapter merged, and against PEFT."""

import asyncio
import threading
import time
from copy import deepcopy

import pytest
import torch

from memcube.activation.adapters import ResidentAdapters
from memcube.activation.contract import AdapterRef, GenerateRequest, Mode
from memcube.activation.engine import Engine, EngineLimits
from memcube.activation.forward import KvBuffer, PackedModel, Row
from memcube.activation.lora import LoraAdapter
from memcube.errors import AdapterUnusable, BadRequest, LimitExceeded, NotFound, TooBusy
from memcube.parametric.weights import AdapterWeights, LoraPair
from memcube.testing.kv import TinyLru
from memcube.testing.tiny_lm import tiny_model
from tests.unit.activation.tiny import CONFIGS, Reference, some_ids
from tests.unit.parametric.tiny_adapters import random_adapter

CLOSE = {"rtol": 0.0, "atol": 1e-4}


class House:
    """A tiny model taken over, with four adapters ready, and the plain model to compare with."""

    def __init__(self, config):
        self.reference = Reference(config)
        self.packed = PackedModel(self.reference.loaded())
        kinds = [None, None, ("q_proj", "v_proj"), ("up_proj", "down_proj")]
        self.weights = [
            random_adapter(self.reference.model, seed=seed, kinds=kind, scale=0.1)
            for seed, kind in enumerate(kinds)
        ]
        self.adapters = [self.packed.lora.ready(weights) for weights in self.weights]

    def row(self, ids, adapter=None, **given):
        return Row(KvBuffer(self.packed.layout, "cpu"), ids, adapter=adapter, **given)

    def logits(self, *rows):
        return self.packed.forward(list(rows))

    def merged(self, weights, ids):
        """What a copy of the plain model gives with the adapter added to its weights."""
        model = deepcopy(self.reference.model)
        for name, (a_RI, b_OR) in weights.pairs.items():
            layer = model.get_submodule(name)
            layer.weight.data += weights.alpha / weights.rank * (b_OR @ a_RI)
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0]


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def house(request):
    return House(CONFIGS[request.param])


@pytest.fixture(scope="module")
def llama():
    return House(CONFIGS["llama"])


def test_a_row_with_an_adapter_equals_the_model_with_it_merged(house):
    ids = some_ids(40)
    for weights, adapter in zip(house.weights, house.adapters, strict=True):
        (found_TV,) = house.logits(house.row(ids, adapter, logits="all"))
        torch.testing.assert_close(found_TV, house.merged(weights, ids), rtol=1e-5, atol=1e-4)
        plain_TV = house.reference.logits(ids)
        assert (found_TV - plain_TV).abs().mean() > 0.05


def test_a_row_with_an_adapter_equals_pefts_own_forward(llama):
    peft = pytest.importorskip("peft")
    weights, ids = llama.weights[0], some_ids(40)
    config = peft.LoraConfig(
        r=weights.rank, lora_alpha=weights.alpha, target_modules=list(weights.targets)
    )
    wrapped = peft.get_peft_model(deepcopy(llama.reference.model), config).eval()
    loaded = peft.set_peft_model_state_dict(wrapped, weights.tensors())
    assert not loaded.unexpected_keys
    with torch.inference_mode():
        expected_TV = wrapped(torch.tensor([ids])).logits[0]
    (found_TV,) = llama.logits(llama.row(ids, llama.adapters[0], logits="all"))
    torch.testing.assert_close(found_TV, expected_TV, rtol=1e-5, atol=1e-4)


def test_rows_with_four_adapters_and_none_equal_one_at_a_time(house):
    order = [None, 0, 0, 1, 2, 2, 3, None, 1]
    rows = [(some_ids(5 + n, seed=n), i) for n, i in enumerate(order)]
    adapters = [None if i is None else house.adapters[i] for i in order]
    given = [house.row(ids, a, logits="all") for (ids, _), a in zip(rows, adapters, strict=True)]
    found = house.logits(*given)
    for (ids, _), adapter, found_TV in zip(rows, adapters, found, strict=True):
        (alone_TV,) = house.logits(house.row(ids, adapter, logits="all"))
        torch.testing.assert_close(found_TV, alone_TV, **CLOSE)
    # And on: a token more of each, from what lies in the buffers.
    more = house.logits(*(Row(row.buffer, [7], adapter=row.adapter) for row in given))
    for (ids, _), adapter, found_1V in zip(rows, adapters, more, strict=True):
        (alone_TV,) = house.logits(house.row([*ids, 7], adapter))
        torch.testing.assert_close(found_1V, alone_TV, **CLOSE)


def test_a_row_without_an_adapter_is_bit_for_bit_as_before(llama):
    fresh, ids = PackedModel(llama.reference.loaded()), some_ids(20)
    (before_TV,) = fresh.forward([Row(KvBuffer(fresh.layout, "cpu"), ids, logits="all")])
    llama.logits(llama.row(ids, llama.adapters[0]))
    (after_TV,) = llama.logits(llama.row(ids, logits="all"))
    assert torch.equal(before_TV, after_TV)


def test_a_failed_step_leaves_no_adapter_behind(llama):
    ids = some_ids(20)
    (before_TV,) = llama.logits(llama.row(ids, logits="all"))
    with pytest.raises(IndexError):
        llama.logits(llama.row([10**6], llama.adapters[0]))
    assert torch.equal(llama.logits(llama.row(ids, logits="all"))[0], before_TV)


def test_an_adapter_for_other_layers_is_refused(llama):
    head = {"lm_head": LoraPair(torch.zeros(2, 64), torch.zeros(199, 2))}
    name = "model.layers.0.self_attn.q_proj"
    other = {name: LoraPair(torch.zeros(2, 65), torch.zeros(64, 2))}
    for pairs in (head, other):
        with pytest.raises(BadRequest, match="adapter"):
            llama.packed.lora.ready(AdapterWeights(base="x", rank=2, alpha=2.0, pairs=pairs))


# -- the resident set


class Shelf:
    """A loader of adapters of ten bytes, that can be held back."""

    def __init__(self):
        self.calls = []
        self.open = threading.Event()
        self.open.set()

    def __call__(self, tenant, ref):
        self.calls.append((tenant, ref.id))
        assert self.open.wait(10)
        if ref.id == "none":
            raise NotFound("adapter", ref.id)
        return LoraAdapter({}, 1000 if ref.id == "huge" else 10)


def ref(id):
    return AdapterRef(id, "0" * 64)


@pytest.fixture
def shelf():
    return Shelf()


@pytest.fixture
def resident(shelf):
    resident = ResidentAdapters(shelf, max_bytes=25)
    yield resident
    resident.close()


async def use(resident, id, tenant="a"):
    async with resident.held(tenant, ref(id)) as adapter:
        return adapter


async def test_an_adapter_is_loaded_once_and_the_least_recently_used_goes(resident, shelf):
    for id in ("1", "2", "1", "3", "1", "2"):
        await use(resident, id)
    assert [id for _, id in shelf.calls] == ["1", "2", "3", "2"]
    assert (resident.stats().resident, resident.stats().resident_bytes) == (2, 20)
    assert resident.stats().evictions == 2


async def test_those_that_ask_at_once_wait_for_one_load(resident, shelf):
    shelf.open.clear()
    asking = [asyncio.create_task(use(resident, "1")) for _ in range(4)]
    await asyncio.sleep(0)
    asking[0].cancel()
    shelf.open.set()
    found = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert len(set(map(id, found[1:]))) == 1
    assert len(shelf.calls) == 1


async def test_what_is_in_use_is_not_given_up(resident):
    async with resident.held("a", ref("1")), resident.held("a", ref("2")):
        with pytest.raises(TooBusy):
            await use(resident, "3")
    await use(resident, "3")


async def test_a_failed_load_is_tried_again(resident, shelf):
    for _ in range(2):
        with pytest.raises(NotFound):
            await use(resident, "none")
    with pytest.raises(LimitExceeded):
        await use(resident, "huge")
    assert len(shelf.calls) == 3
    assert resident.stats().resident == 0
    assert resident.stats().refused == {"not_found": 2, "limit_exceeded": 1}


async def test_waits_are_told_apart_by_whether_the_adapter_was_there(resident):
    for id in ("1", "1", "1", "2"):
        await use(resident, id)
    told = resident.stats().wait_s
    assert {kind: found.count for kind, found in told.items()} == {"resident": 2, "loaded": 2}


async def test_tenants_share_no_entry_and_are_forgotten_apart(resident, shelf):
    await use(resident, "1", "a")
    await use(resident, "1", "b")
    resident.forget(tenant="a")
    await use(resident, "1", "b")
    assert shelf.calls == [("a", "1"), ("b", "1")]


# -- the engine


LOADED = tiny_model()
MODEL = PackedModel(LOADED)
PROMPT = tuple(some_ids(50))


class Works:
    """An engine with four adapters, named by their numbers."""

    def __init__(self):
        self.loading = threading.Event()
        self.loading.set()
        self.load_error = None
        self.engine = Engine(
            MODEL,
            LOADED,
            policy=TinyLru(1 << 24),
            limits=EngineLimits(block_tokens=16, max_running=16),
            adapters=ResidentAdapters(self.load, max_bytes=1 << 24),
        )

    def load(self, _tenant, ref):
        assert self.loading.wait(20)
        if self.load_error is not None:
            raise self.load_error
        weights = random_adapter(LOADED.model, seed=int(ref.id), scale=0.1)
        return MODEL.lora.ready(weights)

    async def ask(self, adapter=None, *, prompt=PROMPT, version="v", **options):
        options = {"max_tokens": 12, "stop_ids": frozenset()} | options
        request = GenerateRequest(
            prompt_ids=prompt,
            tenant="a",
            salt="a",
            adapter=None if adapter is None else AdapterRef(str(adapter), version),
            **options,
        )
        pieces = [piece async for piece in self.engine.generate(request)]
        return [token for piece in pieces for token in piece.token_ids], pieces[-1].usage


@pytest.fixture
async def works():
    works = Works()
    yield works
    works.loading.set()
    await works.engine.close()


async def test_many_adapters_in_one_batch_answer_as_each_alone(works):
    names = [None, 0, 1, 2, 3, 0, None, 3]
    alone = [(await works.ask(name, mode=Mode.OFF))[0] for name in names]
    assert len(set(map(tuple, alone))) == 5
    together = await asyncio.gather(*(works.ask(name, mode=Mode.OFF) for name in names))
    assert [tokens for tokens, _ in together] == alone


async def test_kv_built_under_one_adapter_serves_that_one_alone(works):
    plain, _ = await works.ask(mode=Mode.OFF)
    for name in (None, 0, 1):
        tokens, usage = await works.ask(name)
        assert usage.attached_exact == 0
        again, usage = await works.ask(name)
        assert usage.attached_exact > 40
        assert again == tokens
        assert (tokens == plain) == (name is None)
    _, usage = await works.ask(0, version="w")
    assert usage.attached_exact == 0


async def test_kv_under_an_adapter_can_be_built_ahead(works):
    request = GenerateRequest(prompt_ids=PROMPT, tenant="a", salt="a", adapter=AdapterRef("2", "v"))
    assert (await works.engine.build(request)).prefilled == len(PROMPT)
    tokens, usage = await works.ask(2)
    assert usage.attached_exact >= 48
    assert tokens == (await works.ask(2, mode=Mode.OFF))[0]


async def test_a_forgotten_adapter_goes_with_the_kv_that_was_built_with_it(works):
    for name in (None, 0, 1):
        await works.ask(name)
    names = [AdapterRef(str(n), "v").name for n in range(2)]
    assert await works.engine.adapters_held() == {"a": set(names)}
    assert await works.engine.forget(names[:1]) > 0
    assert await works.engine.adapters_held() == {"a": set(names[1:])}
    assert works.engine.adapter_stats().resident == 1
    found = [(await works.ask(name))[1].attached_exact > 0 for name in (None, 0, 1)]
    assert found == [True, False, True]


async def test_an_answer_that_began_before_leaves_no_kv_of_a_forgotten_adapter(works):
    name = AdapterRef("0", "v").name
    pieces = works.engine.generate(
        GenerateRequest(
            prompt_ids=PROMPT,
            tenant="a",
            salt="a",
            adapter=AdapterRef("0", "v"),
            max_tokens=40,
            stop_ids=frozenset(),
        )
    )
    await anext(pieces)
    await works.engine.forget([name])
    assert len([piece async for piece in pieces]) > 0
    assert await works.engine.adapters_held() == {}


async def test_others_go_on_while_an_adapter_is_loaded(works):
    works.loading.clear()
    waiting = asyncio.create_task(works.ask(1))
    for seed in range(3):
        await works.ask(prompt=tuple(some_ids(20, seed=seed)))
    assert not waiting.done()
    works.loading.set()
    assert len((await waiting)[0]) == 12
    assert works.engine.adapter_stats().resident == 1


async def test_one_that_can_not_be_loaded_fails_its_own_request(works):
    with pytest.raises(ValueError, match="invalid literal"):
        await works.ask("none")
    assert len((await works.ask(1))[0]) == 12


async def test_why_an_adapter_can_not_be_used_is_told_before_anything_is_said(works):
    works.load_error = NotFound("adapter", "1")
    for ask in (
        works.ask(1),
        works.engine.build(
            GenerateRequest(prompt_ids=PROMPT, tenant="a", salt="a", adapter=AdapterRef("1", "v"))
        ),
    ):
        with pytest.raises(AdapterUnusable) as unusable:
            await ask
        assert unusable.value.why is works.load_error
    works.load_error = None
    assert len((await works.ask(1))[0]) == 12


async def test_a_resident_adapter_is_swapped_in_at_once(works):
    for name in (0, 1):
        await works.ask(name)
    began = time.perf_counter()
    async with works.engine._adapters.held("a", AdapterRef("0", "v")):
        pass
    assert time.perf_counter() - began < 0.005
