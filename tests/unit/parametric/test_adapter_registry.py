import hashlib
import json
import pickle
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from memcube.activation.contract import AdapterRef
from memcube.catalog import Catalog
from memcube.cube import Draft, Scope
from memcube.errors import BadRequest, Conflict, Corrupt, LimitExceeded, NotFound
from memcube.ids import TenantId
from memcube.objects.folder import FolderStore
from memcube.parametric.limits import AdapterLimits
from memcube.parametric.registry import AdapterFiles, AdapterRegistry, Provenance, reference
from memcube.parametric.weights import AdapterWeights, LoraPair, decode, encode
from memcube.testing.tiny_lm import tiny_model
from tests.unit.parametric.tiny_adapters import random_adapter

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
A, B = TenantId("a"), TenantId("b")
BASE = "f" * 64
LIMITS = AdapterLimits()
WEIGHTS = random_adapter(tiny_model().model, base=BASE)
DATA = encode(WEIGHTS, LIMITS)
HOW = Provenance(recipe={"rank": 4}, seed=7, data_sha256="0" * 64, report={"recall": 0.95})


def read(data, *, base=BASE, limits=LIMITS):
    sha256 = hashlib.sha256(data).hexdigest()
    return decode(data, where="adapter x", sha256=sha256, base=base, limits=limits)


def same(found, weights):
    assert (found.base, found.rank, found.alpha) == (weights.base, weights.rank, weights.alpha)
    assert found.pairs.keys() == weights.pairs.keys()
    for name, pair in found.pairs.items():
        for left, right in zip(pair, weights.pairs[name], strict=True):
            assert torch.equal(left, right)


# -- the file


def test_weights_read_back_as_they_were_and_give_the_same_bytes_again():
    same(read(DATA), WEIGHTS)
    assert encode(read(DATA), LIMITS) == DATA
    assert WEIGHTS.targets[0] == "down_proj"


def test_the_hash_covers_the_scaling():
    assert encode(replace(WEIGHTS, alpha=9.0), LIMITS) != DATA


def test_another_base_is_refused():
    with pytest.raises(Conflict, match="trained on model ffffff"):
        read(DATA, base="0" * 64)


@given(place=st.integers(0, len(DATA) - 1), bit=st.integers(0, 7))
@settings(max_examples=40, deadline=None)
def test_a_flipped_bit_anywhere_is_refused(place, bit):
    damaged = bytearray(DATA)
    damaged[place] ^= 1 << bit
    sha256 = hashlib.sha256(DATA).hexdigest()
    with pytest.raises(Corrupt):
        decode(bytes(damaged), where="x", sha256=sha256, base=BASE, limits=LIMITS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 100,
        DATA[:-1],
        DATA + b"x",
        pickle.dumps({"a": 1}),
        save({"a": torch.zeros(2)}),
        save({"a": torch.zeros(2)}, metadata={"memcube": "{}"}),
        save({"a": torch.zeros(2)}, metadata={"memcube": "[" * 9999}),
    ],
)
def test_what_is_no_adapter_is_refused_though_its_hash_is_right(data):
    with pytest.raises(Corrupt):
        read(data)


def test_a_pickle_is_not_opened():
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    with pytest.raises(Corrupt):
        read(pickle.dumps(Bomb()))


def test_an_oversized_adapter_is_refused_both_ways():
    for limits in (AdapterLimits(max_bytes=1000), AdapterLimits(max_rank=3)):
        with pytest.raises(LimitExceeded):
            encode(WEIGHTS, limits)
        with pytest.raises(LimitExceeded):
            read(DATA, limits=limits)


def test_weights_that_are_no_numbers_are_refused():
    pairs = {"q": LoraPair(torch.full((2, 3), torch.nan), torch.zeros(3, 2))}
    with pytest.raises(BadRequest, match="finite"):
        encode(AdapterWeights(base=BASE, rank=2, alpha=1.0, pairs=pairs), LIMITS)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"lm_head.weight": torch.zeros(2, 2)},
        {"base_model.model.q.lora_A.weight": torch.zeros(2, 3)},
        {
            "base_model.model.q.lora_A.weight": torch.zeros(4, 3),
            "base_model.model.q.lora_B.weight": torch.zeros(3, 2),
        },
        {
            "base_model.model.q.lora_A.weight": torch.zeros(2, 3, dtype=torch.int64),
            "base_model.model.q.lora_B.weight": torch.zeros(3, 2),
        },
    ],
)
def test_factors_that_do_not_fit_together_are_refused(tensors):
    with pytest.raises(ValueError):  # noqa: PT011 - each says something else
        AdapterWeights.of_tensors(tensors, base=BASE, rank=2, alpha=1.0)


# -- the registry


class Office:
    """A registry over a folder and a SQLite catalog, and a cube to hold."""

    def __init__(self, path):
        self.path = path / "objects"
        self.catalog = Catalog.open(f"sqlite:///{path}/catalog.db")
        for tenant in (A, B):
            self.catalog.access.ensure_tenant(tenant, shards=1, now=NOW)
        self.files = AdapterFiles(FolderStore.open(self.path))
        self.registry = AdapterRegistry(self.files, self.catalog.adapters)
        self.cube = self.add("tea")

    def add(self, text):
        return self.catalog.cubes.add(A, [Draft(text=text)], author="k", now=NOW).results[0].cube

    async def publish(self, *, seed=0, cubes=None, weights=None):
        return await self.registry.publish(
            Scope(tenant=A, user_id="ann"),
            "ann",
            weights or random_adapter(tiny_model().model, base=BASE, seed=seed),
            cubes={cube.id: cube.version for cube in cubes or [self.cube]},
            provenance=HOW,
            now=NOW,
        )

    async def activate(self, record, *, seconds=0):
        at = NOW + timedelta(seconds=seconds)
        return await self.registry.activate(A, record.line.id, record.version, now=at)

    def file(self, record):
        (found,) = self.path.rglob(f"*{record.sha256[:100]}*.safetensors")
        return found


@pytest.fixture
def office(tmp_path):
    office = Office(tmp_path)
    yield office
    office.catalog.close()


async def test_a_published_adapter_serves_once_it_is_activated(office):
    record = await office.publish(weights=WEIGHTS)
    with pytest.raises(NotFound):
        office.catalog.adapters.serving(A, "ann", base=BASE, now=NOW)
    await office.activate(record)
    serving = office.catalog.adapters.serving(A, "ann", base=BASE, now=NOW)
    same(await office.files.get(A, reference(serving), base=BASE), WEIGHTS)


async def test_the_manifest_says_how_it_came_to_be(office):
    record = await office.publish(weights=WEIGHTS)
    manifest = await office.files.manifest(A, record.sha256)
    assert manifest["recipe"] == {"rank": 4}
    assert manifest["report"] == {"recall": 0.95}
    assert manifest["cubes"] == [[office.cube.id, 1]]
    assert (manifest["base"], manifest["seed"], manifest["parent"]) == (BASE, 7, None)
    assert manifest["size_bytes"] == record.size_bytes == len(DATA)
    assert "tea" not in json.dumps(manifest)


async def test_another_tenants_adapter_is_not_found(office):
    record = await office.publish()
    with pytest.raises(NotFound):
        await office.files.get(B, reference(record), base=BASE)
    with pytest.raises(NotFound):
        await office.files.manifest(B, record.sha256)
    for version in ("", "1", "../" * 20 + "abcd"):
        with pytest.raises(NotFound):
            await office.files.get(A, AdapterRef(record.line.id, version), base=BASE)


async def test_a_damaged_file_is_not_activated_and_what_serves_goes_on(office):
    first, second = await office.publish(seed=1), await office.publish(seed=2)
    await office.activate(first)
    path = office.file(second)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(Corrupt, match="not those that were published"):
        await office.activate(second, seconds=1)
    path.unlink()
    with pytest.raises(NotFound):
        await office.activate(second, seconds=1)
    serving = office.catalog.adapters.serving(A, "ann", base=BASE, now=NOW)
    assert serving.version == 1


async def test_a_rollback_is_one_call(office):
    for seed in (1, 2):
        await office.activate(await office.publish(seed=seed), seconds=seed)
    serving = office.catalog.adapters.serving(A, "ann", base=BASE, now=NOW)
    back = office.catalog.adapters.rollback(A, serving.line.id, now=NOW + timedelta(seconds=9))
    assert (serving.version, back.version) == (2, 1)


async def test_what_holds_a_deleted_memory_is_erased_from_the_objects(office):
    milk = office.add("milk")
    held = await office.publish(seed=1, cubes=[office.cube, milk])
    other = await office.publish(seed=2, cubes=[milk])
    shared = await office.publish(seed=2, cubes=[office.cube])
    assert shared.sha256 == other.sha256
    office.catalog.cubes.delete(A, office.cube.id, now=NOW)
    assert await office.registry.erase_stale(now=NOW) == 2
    assert await office.registry.erase_stale(now=NOW) == 0
    with pytest.raises(NotFound):
        await office.files.get(A, reference(held), base=BASE)
    await office.files.get(A, reference(other), base=BASE)
