import asyncio
import json
import random
import signal
import subprocess
import sys
import time

import pytest

from memcube.errors import Conflict, Corrupt, Unavailable
from memcube.testing.plaintext_contract import NOW, SPEC, A, PlaintextContract, cube, found, unit
from memcube.tiers.edge import EdgeStore
from memcube.tiers.plaintext import IndexSpec


class TestEdgeStore(PlaintextContract):
    @pytest.fixture
    async def store(self, tmp_path):
        store = EdgeStore.open(tmp_path / "index", SPEC)
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


async def test_searches_go_on_while_the_graph_is_built_and_later_writes_are_kept(tmp_path):
    store = EdgeStore.open(tmp_path, SPEC)
    kept = [cube(f"kept {i}", unit(1, i / 500)) for i in range(500)]
    gone = cube("gone")
    await store.put([*kept, gone])
    building = asyncio.ensure_future(store.optimise())
    searches = 0
    while not building.done():
        assert await store.search_dense(A, unit(1.0), where=None, now=NOW, limit=5)
        searches += 1
        if searches == 20:
            await store.put([cube("later")])
            await store.delete(A, {gone.id: 1})
        await asyncio.sleep(0)
    assert building.result() is True
    assert searches > 20
    expected = {c.text for c in kept} | {"later"}
    assert await found(store, None) == expected
    await store.close()
    store = EdgeStore.open(tmp_path, SPEC)
    assert await found(store, None) == expected
    await store.close()


async def test_a_crash_during_the_build_leaves_the_old_folder_whole(tmp_path):
    store = EdgeStore.open(tmp_path, SPEC)
    await store.put([cube("kept")])
    await store.close()
    # What a crash between the copy and the switch leaves behind.
    (tmp_path / "engine-000001").mkdir()
    (tmp_path / "engine-000001" / "half").write_text("copied")
    store = EdgeStore.open(tmp_path, SPEC)
    assert await found(store, None) == {"kept"}
    assert not (tmp_path / "engine-000001").exists()
    await store.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from memcube.testing.plaintext_contract import SPEC, cube
from memcube.tiers.edge import EdgeStore

async def main():
    store = EdgeStore.open(Path(sys.argv[1]), SPEC)
    print("open", flush=True)
    n = 0
    while True:
        batch = [cube(f"{sys.argv[2]} {n + i}") for i in range(7)]
        await store.put(batch)
        n += 7
        print("\\n".join(c.text for c in batch), flush=True)

asyncio.run(main())
"""


async def test_what_put_returned_from_survives_kill_9(tmp_path):
    seed = random.Random(5)
    acknowledged: set[str] = set()
    for round_number in range(6):
        writer = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", WRITER, str(tmp_path), f"r{round_number}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        until = time.monotonic() + seed.uniform(0.02, 0.3)
        while time.monotonic() < until:
            acknowledged.add(writer.stdout.readline().rstrip("\n"))
        writer.send_signal(signal.SIGKILL)
        # A line that the kill cut short was not acknowledged.
        acknowledged.update(line.rstrip("\n") for line in writer.stdout if line.endswith("\n"))
        writer.wait()
    store = EdgeStore.open(tmp_path, SPEC)
    texts = set()
    ids = [id async for _, id, _ in store.versions()]
    for start in range(0, len(ids), 500):
        texts |= {c.text for c in await store.get(A, ids[start : start + 500])}
    await store.close()
    assert acknowledged - texts == set()
    assert len(acknowledged) > 100


async def test_the_spec_on_disk_says_what_built_it(tmp_path):
    await EdgeStore.open(tmp_path, SPEC).close()
    assert json.loads((tmp_path / "spec.json").read_text()) == {"embedder": "test@1", "dim": 8}
