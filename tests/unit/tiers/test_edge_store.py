import json
import os
import tempfile
from pathlib import Path

import pytest

from memcube.errors import Conflict, Corrupt, Unavailable
from memcube.testing.plaintext_contract import SPEC, PlaintextContract, cube, found
from memcube.tiers.edge import EdgeStore
from memcube.tiers.plaintext import IndexSpec

# In memory where the system has such a folder: fsync is what these tests would wait for.
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


class TestEdgeStore(PlaintextContract):
    @pytest.fixture
    async def store(self):
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            store = EdgeStore.open(Path(folder) / "index", SPEC)
            yield store
            await store.close()


async def test_a_reopened_store_has_its_cubes(tmp_path):
    store = EdgeStore.open(tmp_path, SPEC)
    await store.put([cube("kept")])
    await store.close()
    store = EdgeStore.open(tmp_path, SPEC)
    assert await found(store, None) == {"kept"}
    await store.close()


async def test_a_second_opener_is_refused_while_the_first_lives(tmp_path):
    store = EdgeStore.open(tmp_path, SPEC)
    with pytest.raises(Unavailable, match="another process"):
        EdgeStore.open(tmp_path, SPEC)
    await store.close()
    await EdgeStore.open(tmp_path, SPEC).close()


async def test_another_embedder_is_refused(tmp_path):
    await EdgeStore.open(tmp_path, SPEC).close()
    with pytest.raises(Conflict, match=r"test@1.*other@2"):
        EdgeStore.open(tmp_path, IndexSpec(embedder="other@2", dim=8))


@pytest.mark.parametrize("name", ["spec.json", "engine-000000"])
async def test_what_is_missing_is_named_and_never_an_empty_start(tmp_path, name):
    store = EdgeStore.open(tmp_path, SPEC)
    await store.put([cube("kept")])
    await store.close()
    (tmp_path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(Corrupt, match=name):
        EdgeStore.open(tmp_path, SPEC)


async def test_the_spec_on_disk_says_what_built_it(tmp_path):
    await EdgeStore.open(tmp_path, SPEC).close()
    assert json.loads((tmp_path / "spec.json").read_text()) == {"embedder": "test@1", "dim": 8}
