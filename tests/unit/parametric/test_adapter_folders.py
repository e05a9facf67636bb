"""Adapters laid out as PEFT reads them."""

import json

import pytest
from safetensors.torch import load_file

from memcube.activation.contract import AdapterRef
from memcube.errors import Conflict, Corrupt, LimitExceeded, NotFound
from memcube.ids import TenantId
from memcube.objects.folder import FolderStore
from memcube.parametric.limits import AdapterLimits
from memcube.parametric.loading import PeftFolders
from memcube.parametric.registry import AdapterFiles
from memcube.testing.tiny_lm import tiny_model
from tests.unit.parametric.tiny_adapters import random_adapter

ACME = TenantId("acme")
MODEL = tiny_model().model


class Shop:
    """An object store with one adapter of the tenant ``acme``, and folders beside it."""

    def __init__(self, path):
        self.path = path
        self.weights = random_adapter(MODEL, base="b" * 64)

    async def opened(self):
        return FolderStore.open(self.path / "objects")

    def folders(self, *, base="b" * 64, max_rank=8):
        limits = AdapterLimits(max_rank=max_rank)
        return PeftFolders(self.opened, self.path / "folders", base=base, limits=limits)

    async def put(self):
        sha256, _ = await AdapterFiles(await self.opened()).put(ACME, self.weights, {})
        return AdapterRef("1", sha256)


@pytest.fixture
def shop(tmp_path):
    return Shop(tmp_path)


async def test_a_folder_holds_the_configuration_and_the_weights(shop):
    ref, folders = await shop.put(), shop.folders()
    folder = await folders("acme", ref)
    told = json.loads((folder / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["peft_type"]) == (4, 8.0, "LORA")
    assert told["target_modules"] == list(shop.weights.targets)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {name: t.tolist() for name, t in tensors.items()} == {
        name: t.tolist() for name, t in shop.weights.tensors().items()
    }
    # Nothing else lies there, and nothing is made twice.
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert await folders("acme", ref) == folder


async def test_peft_reads_it(shop):
    peft = pytest.importorskip("peft")
    folder = await shop.folders()("acme", await shop.put())
    wrapped = peft.PeftModel.from_pretrained(tiny_model().model, str(folder))
    loaded = peft.get_peft_model_state_dict(wrapped)
    assert {name: t.tolist() for name, t in loaded.items()} == {
        name: t.tolist() for name, t in shop.weights.tensors().items()
    }


async def test_what_is_not_whole_or_not_the_tenants_leaves_no_folder(shop):
    ref = await shop.put()
    asked = [
        (shop.folders(), "other", ref, NotFound),
        (shop.folders(base="c" * 64), "acme", ref, Conflict),
        (shop.folders(max_rank=2), "acme", ref, LimitExceeded),
        (shop.folders(), "acme", AdapterRef("1", "0" * 64), NotFound),
    ]
    for folders, tenant, wanted, error in asked:
        with pytest.raises(error):
            await folders(tenant, wanted)
    (file,) = shop.path.glob("objects/**/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(Corrupt):
        await shop.folders()("acme", ref)
    assert not list(shop.path.glob("folders/*"))
