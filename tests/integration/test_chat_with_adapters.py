"""Adapters over a running system: by scope and by name, until a memory inside is deleted or a file is
damaged. Their weights are made up: they change the answers, and know nothing."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoConfig

from memcube.activation.models import local_folder, weights_fingerprint
from memcube.catalog import AdapterRecord, Catalog
from memcube.client import MemCubeClient
from memcube.config import Config
from memcube.cube import Scope
from memcube.ids import CubeId, TenantId
from memcube.objects.folder import FolderStore
from memcube.parametric.registry import AdapterFiles, AdapterRegistry, Provenance
from memcube.parametric.weights import AdapterWeights, LoraPair
from memcube.testing.process import SystemProcess

pytestmark = pytest.mark.long

MODEL = "SmolLM2-135M-Instruct"
TEXTS = {
    "ann": ["Ann moved to Oslo in May.", "Ann has a dog called Rex."],
    "ben": ["Ben lives in Rome.", "Ben plays the cello."],
}


def random_weights(seed: int) -> AdapterWeights:
    """An adapter of the packaged model's queries, large enough to be heard."""
    config = Config()
    folder = local_folder(config.model, config.model_folder())
    shape = AutoConfig.from_pretrained(folder, local_files_only=True)
    generator = torch.Generator().manual_seed(seed)

    def factor(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * 0.2

    size = shape.hidden_size
    pairs = {
        f"model.layers.{n}.self_attn.q_proj": LoraPair(factor(8, size), factor(size, 8))
        for n in range(shape.num_hidden_layers)
    }
    base = weights_fingerprint(folder, config.model_folder())
    return AdapterWeights(base=base, rank=8, alpha=16.0, pairs=pairs)


class House:
    """A running system with four memories of two users, and what a test does with it."""

    def __init__(self, system: SystemProcess) -> None:
        self.system = system
        self.catalog = Catalog.open(f"sqlite:///{system.data_dir}/catalog.db")
        self.client = MemCubeClient(system.url, system.key)
        now = datetime.now(UTC)
        self.tenant: TenantId = self.catalog.access.authenticate(system.key, now=now).tenant
        self.cubes: dict[str, list[CubeId]] = {}
        self.adapters: dict[str, AdapterRecord] = {}
        for seed, (user, texts) in enumerate(TEXTS.items()):
            ids = [id for text in texts for id in self.client.add(text, user_id=user).ids]
            self.cubes[user] = [CubeId(id) for id in ids]
            self.adapters[user] = asyncio.run(self.published(user, seed))

    def close(self) -> None:
        self.client.close()
        self.catalog.close()

    async def published(self, user: str, seed: int) -> AdapterRecord:
        """A new version of a user's adapter, which serves."""
        objects = FolderStore.open(self.system.data_dir / "objects")
        try:
            registry = AdapterRegistry(AdapterFiles(objects), self.catalog.adapters)
            now = datetime.now(UTC)
            record = await registry.publish(
                Scope(tenant=self.tenant, user_id=user),
                f"{user}-knows",
                random_weights(seed),
                cubes=dict.fromkeys(self.cubes[user], 1),
                provenance=Provenance(recipe={}, seed=seed, data_sha256="0" * 64),
                now=now,
            )
            return await registry.activate(self.tenant, record.line.id, record.version, now=now)
        finally:
            await objects.close()

    def file(self, adapter: AdapterRecord) -> Path:
        (found,) = self.system.data_dir.glob(f"objects/**/{adapter.sha256}.safetensors")
        return found

    def chat(self, user: str | None, model: str = MODEL, **memory: Any) -> httpx.Response:
        asked = {
            "model": model,
            "messages": [{"role": "user", "content": "Where is it?"}],
            "max_tokens": 8,
            "temperature": 0,
            "memory": {"user_id": user, **memory} if user else False,
        }
        return httpx.post(
            f"{self.system.url}/v1/chat/completions",
            json=asked,
            headers={"X-API-Key": self.system.key},
            timeout=120,
        )

    def report(self, user: str, model: str = MODEL, **memory: Any) -> dict[str, Any]:
        answer = self.chat(user, model, **memory)
        assert answer.status_code == 200, answer.text
        return answer.json()["memory"]

    def models(self, key: str | None = None) -> list[str]:
        """The names that may be asked, but for the embedder's."""
        headers = {"X-API-Key": key or self.system.key}
        listed = httpx.get(f"{self.system.url}/v1/models", headers=headers).json()["data"]
        return [model["id"] for model in listed if model["id"].startswith(MODEL)]

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.system.url}/metrics").text
        found = [line for line in text.splitlines() if line.startswith(name)]
        return float(found[0].rpartition(" ")[2]) if found else 0.0


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with SystemProcess(
        tmp_path_factory.mktemp("adapted") / "data",
        # The sweep must not do what the test waits for.
        ["activation.sweep_s=3600", "activation.disk_mb=0", "scheduler.interval_s=0.5"],
        chat=True,
    ) as system:
        opened = House(system)
        yield opened
        opened.close()


def test_each_scope_is_answered_by_its_own_adapter_and_by_name(house: House):
    plain = house.chat(None).json()["choices"][0]["message"]["content"]
    said = {plain}
    for user, adapter in house.adapters.items():
        told = house.report(user)
        assert told["adapter"] == {
            "id": adapter.line.id,
            "name": f"{user}-knows",
            "version": 1,
        }
        assert {use["id"] for use in told["cubes"]} == set(house.cubes[user])
        assert all(use["in_adapter"] for use in told["cubes"])
        by_name = house.chat(None, f"{MODEL}:{user}-knows").json()
        assert by_name["memory"]["adapter"]["id"] == adapter.line.id
        said.add(by_name["choices"][0]["message"]["content"])
    assert len(said) == 3
    assert house.metric("memcube_adapter_resident{") == 2
    assert house.metric("memcube_adapter_loads_total{") == 2
    assert house.models() == [MODEL, f"{MODEL}:ann-knows", f"{MODEL}:ben-knows"]


def test_the_adapter_answers_instead_of_the_text(house: House):
    told = house.report("ben", parametric="instead")
    assert {use["id"]: use["form"] for use in told["cubes"]} == dict.fromkeys(
        house.cubes["ben"], "parametric"
    )
    assert told["tokens_prefilled"] + told["tokens_attached"] < 60


def test_the_second_chat_attaches_the_kv_that_the_first_one_built_with_the_adapter(house: House):
    house.report("ben")
    assert house.report("ben")["tokens_attached"] > 0
    # Nobody has asked the base model, whose KV of the same text is another.
    plain = house.report("ben", cube_ids=house.cubes["ben"])
    assert plain["adapter"] is None
    assert {use["form"] for use in plain["cubes"]} == {"text"}


def test_another_tenants_key_finds_no_adapter(house: House):
    other = house.client.keys.create("other", tenant="other").key
    asked = {"model": f"{MODEL}:ann-knows", "messages": [{"role": "user", "content": "Hi"}]}
    url, headers = house.system.url, {"X-API-Key": other}
    answer = httpx.post(f"{url}/v1/chat/completions", json=asked, headers=headers, timeout=60)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert house.models(other) == [MODEL]


def test_a_deleted_memory_stops_its_adapter_at_once_and_takes_it_off_the_engine(house: House):
    house.report("ann")
    house.client.delete(house.cubes["ann"][0])
    # At once: the next requests of each kind see it, however fast they come.
    assert house.models() == [MODEL, f"{MODEL}:ben-knows"]
    told = house.report("ann")
    assert (told["adapter"], told["adapter_refused"]) == (None, None)
    assert {use["id"] for use in told["cubes"]} == {house.cubes["ann"][1]}
    assert house.chat(None, f"{MODEL}:ann-knows").status_code == 404
    assert house.metric("memcube_adapter_resident{") == 1


def test_a_damaged_file_falls_back_and_a_new_version_serves_at_once(house: House):
    broken = asyncio.run(house.published("ben", 7))
    file = house.file(broken)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    for _ in range(2):
        told = house.report("ben", parametric="instead")
        assert told["adapter"] is None
        assert told["adapter_refused"]["code"] == "corrupt"
        assert {use["form"] for use in told["cubes"]} <= {"text", "exact_kv"}
    assert house.metric('memcube_chat_adapter_refused_total{code="corrupt"}') == 2
    assert house.metric("memcube_adapter_refused_total{") == 1
    named = house.chat("ben", f"{MODEL}:ben-knows")
    assert named.json()["code"] == "corrupt"
    asyncio.run(house.published("ben", 8))
    assert house.report("ben")["adapter"]["version"] == 3
