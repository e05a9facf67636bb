"""What an ``EdgeStore`` keeps through kill -9, an optimisation, and a damaged folder."""

import asyncio
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memcube.errors import Corrupt, StorageFull, Unavailable
from memcube.testing.plaintext_contract import NOW, SPEC, A, cube, found, unit
from memcube.tiers import edge, optimise
from memcube.tiers.edge import EdgeStore

LEAST_PUT = 40
WRITER = """
import asyncio, sys
from pathlib import Path
from memcube.testing.plaintext_contract import SPEC, cube
from memcube.tiers.edge import EdgeStore

async def main():
    store = EdgeStore.open(Path(sys.argv[1]), SPEC)
    print("open", flush=True)
    building = None
    n = 0
    while True:
        batch = [cube(f"{sys.argv[2]} {n + i}") for i in range(7)]
        await store.put(batch)
        n += 7
        print("\\n".join(c.text for c in batch), flush=True)
        if sys.argv[3] == "optimise" and (building is None or building.done()):
            building = asyncio.ensure_future(store.optimise())
        await asyncio.sleep(0)

asyncio.run(main())
"""


def write_until_killed(path: Path, name: str, work: str, seconds: float) -> set[str]:
    """The texts that a process acknowledged as put, before kill -9 after about ``seconds``, and after
    LEAST_PUT texts, however slow the machine is."""
    acknowledged: set[str] = set()
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name, work], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "open\n"
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(acknowledged) < LEAST_PUT:
        acknowledged.add(writer.stdout.readline().rstrip("\n"))
    writer.send_signal(signal.SIGKILL)
    # A line that the kill cut short was not acknowledged.
    acknowledged.update(line.rstrip("\n") for line in writer.stdout if line.endswith("\n"))
    writer.wait()
    return acknowledged


def open_when_free(path: Path) -> EdgeStore:
    """The store, once the killed process's optimiser, which holds the lock too, has ended."""
    until = time.monotonic() + 10
    while True:
        try:
            return EdgeStore.open(path, SPEC)
        except Unavailable:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


async def texts_of(store: EdgeStore) -> set[str]:
    ids = [id async for _, id, _ in store.versions()]
    return {c.text for c in await store.get(A, ids)}


async def worker_of(store: EdgeStore) -> asyncio.subprocess.Process:
    """The process that optimises the store, once it runs."""
    while (worker := store._worker) is None:  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0)
    return worker


@pytest.mark.parametrize("work", ["put", "optimise"])
async def test_what_put_returned_from_survives_kill_9(tmp_path, work):
    seed = random.Random(5)
    acknowledged: set[str] = set()
    for round_number in range(3):
        longest = 0.3 if work == "put" else 1.0
        acknowledged |= await asyncio.to_thread(
            write_until_killed, tmp_path, f"r{round_number}", work, seed.uniform(0.05, longest)
        )
        await (await asyncio.to_thread(open_when_free, tmp_path)).close()
    store = EdgeStore.open(tmp_path, SPEC)
    assert acknowledged - await texts_of(store) == set()
    assert len(acknowledged) >= 3 * LEAST_PUT
    await store.close()


async def test_searches_go_on_while_a_copy_is_optimised_and_later_writes_are_kept(tmp_path):
    store = EdgeStore.open(tmp_path, SPEC)
    kept = [cube(f"kept {i}", unit(1, i / 500)) for i in range(500)]
    gone, changed = cube("gone"), cube("old text")
    await store.put([*kept, gone, changed])
    building = asyncio.ensure_future(store.optimise())
    searches, longest_s = 0, 0.0
    while not building.done():
        asked = time.perf_counter()
        assert await store.search_dense(A, unit(1.0), where=None, now=NOW, limit=5)
        await asyncio.sleep(0)
        longest_s = max(longest_s, time.perf_counter() - asked)
        searches += 1
        if searches == 20:
            await store.put([cube("later"), cube("new text", id=changed.id, version=2)])
            await store.delete(A, {gone.id: 1})
            await store.set_state(A, [kept[0].id], "archived")
    assert building.result() is True
    assert searches > 20
    assert longest_s < 2
    expected = {c.text for c in kept} | {"later", "new text"}
    assert await found(store, None) == expected
    await store.put([gone])
    await store.close()
    store = EdgeStore.open(tmp_path, SPEC)
    assert await found(store, None) == expected
    assert await found(store, {"state": "archived"}) == {"kept 0"}
    assert len(list(tmp_path.glob("engine-*"))) == 1
    await store.close()


async def test_bm25_scores_are_the_same_after_an_optimisation(tmp_path):
    store = EdgeStore.open(tmp_path, SPEC)
    await store.put([cube(f"kumquat {i} " * (1 + i % 3)) for i in range(50)] + [cube("pear")])

    async def scores() -> list[float]:
        hits = await store.search_sparse(A, "kumquat pear", where=None, now=NOW, limit=99)
        return [hit.score for hit in hits]

    before = await scores()
    assert await store.optimise()
    await store.put([cube("kumquat", tenant="other")])
    assert await scores() == pytest.approx(before, abs=1e-5)
    await store.close()


async def test_a_second_optimisation_and_one_after_close_do_nothing(tmp_path):
    store = EdgeStore.open(tmp_path, SPEC)
    await store.put([cube("kept")])
    first = asyncio.ensure_future(store.optimise())
    await asyncio.sleep(0)
    assert await store.optimise() is False
    assert await first is True
    await store.close()
    assert await store.optimise() is False


async def test_closing_ends_a_running_optimisation_and_frees_the_folder(tmp_path):
    store = EdgeStore.open(tmp_path, SPEC)
    await store.put([cube("kept")])
    building = asyncio.ensure_future(store.optimise())
    await worker_of(store)
    await store.close()
    assert await building is False
    store = EdgeStore.open(tmp_path, SPEC)
    assert await found(store, None) == {"kept"}
    await store.close()


async def test_a_cancelled_optimisation_leaves_the_store_in_use(tmp_path):
    store = EdgeStore.open(tmp_path, SPEC)
    await store.put([cube("kept")])
    building = asyncio.ensure_future(store.optimise())
    await worker_of(store)
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    await store.put([cube("later")])
    assert await store.optimise() is True
    assert await found(store, None) == {"kept", "later"}
    await store.close()


async def test_an_optimisation_that_fails_leaves_the_store_in_use(tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no room')")
    store = EdgeStore.open(tmp_path / "index", SPEC)
    await store.put([cube("kept")])
    monkeypatch.setattr(optimise, "__file__", str(broken))
    with pytest.raises(Unavailable, match="no room"):
        await store.optimise()
    assert await found(store, None) == {"kept"}
    assert len(list((tmp_path / "index").glob("engine-*"))) == 1
    await store.close()


async def test_a_crash_before_the_switch_leaves_the_old_folder(tmp_path):
    store = EdgeStore.open(tmp_path, SPEC)
    await store.put([cube("kept")])
    await store.close()
    (tmp_path / "engine-000001").mkdir()
    (tmp_path / "engine-000001" / "half").write_text("copied")
    store = EdgeStore.open(tmp_path, SPEC)
    assert await found(store, None) == {"kept"}
    assert not (tmp_path / "engine-000001").exists()
    await store.close()


async def test_a_crash_in_the_first_creation_is_begun_anew(tmp_path):
    (tmp_path / "creating").mkdir()
    (tmp_path / "creating" / "half").write_text("made")
    store = EdgeStore.open(tmp_path, SPEC)
    await store.put([cube("kept")])
    assert await found(store, None) == {"kept"}
    await store.close()


@pytest.mark.parametrize(
    "lost", ["current", "engine-*/segments", "engine-*/segments/*", "engine-*/wal"]
)
async def test_what_is_lost_is_named_and_never_an_empty_start(tmp_path, lost):
    store = EdgeStore.open(tmp_path, SPEC)
    await store.put([cube(f"kept {i}") for i in range(50)])
    await store.close()
    (at,) = tmp_path.glob(lost)
    if at.is_dir():
        shutil.rmtree(at)
    else:
        at.unlink()
    with pytest.raises(Corrupt, match="rebuild it from the catalog"):
        EdgeStore.open(tmp_path, SPEC)


@pytest.mark.parametrize(
    "cut", ["mutable_id_tracker.mappings", "segment.json", "page_0.dat", "chunk_0.mmap", "current"]
)
async def test_a_file_that_was_cut_short_is_corrupt(tmp_path, cut):
    store = EdgeStore.open(tmp_path, SPEC)
    await store.put([cube(f"kept {i}") for i in range(50)])
    await store.close()
    for at in tmp_path.rglob(cut):
        at.write_bytes(b"")
    with pytest.raises(Corrupt):
        EdgeStore.open(tmp_path, SPEC)


async def test_a_full_disk_is_told_as_such_and_reads_go_on(tmp_path, monkeypatch):
    class FullDisk:
        def __init__(self, shard):
            self._shard = shard

        def __getattr__(self, name):
            return getattr(self._shard, name)

        def update(self, operation):
            raise Exception("Service internal error: No space left on device (os error 28)")

    store = EdgeStore.open(tmp_path, SPEC)
    await store.put([cube("kept")])
    whole = store._shard
    monkeypatch.setattr(store, "_shard", FullDisk(whole))
    with pytest.raises(StorageFull, match="no space left"):
        await store.put([cube("more")])
    assert await found(store, None) == {"kept"}
    monkeypatch.setattr(store, "_shard", whole)
    await store.close()


async def test_points_that_no_graph_is_worth_are_not_optimised_again(tmp_path, monkeypatch):
    monkeypatch.setattr(edge, "OPTIMISE_ABOVE", 20)
    store = EdgeStore.open(tmp_path, SPEC)
    await store.put([cube(f"t{i}") for i in range(30)])
    asked = [store.needs_optimise]
    await store.optimise()
    asked.append(store.needs_optimise)
    await store.put([cube(f"u{i}") for i in range(30)])
    asked.append(store.needs_optimise)
    await store.close()
    assert asked == [True, False, True]
