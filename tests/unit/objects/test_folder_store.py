"""The contract on a folder, and what only a folder can go through."""

import asyncio
import errno
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memcube.errors import Conflict, StorageFull, Unavailable
from memcube.objects import folder
from memcube.objects.folder import FolderStore
from memcube.testing.kills import acknowledged_until_killed
from memcube.testing.objects_contract import ODD_NAMES, ObjectsContract, body, names_in

WRITER = """
import asyncio, itertools, sys
from pathlib import Path
from memcube.objects.folder import FolderStore
from memcube.testing.objects_contract import body

async def main():
    store = FolderStore.open(Path(sys.argv[1]))
    print("ready", flush=True)
    for number in itertools.count():
        name = f"{sys.argv[2]}/{number}"
        await store.put(name, body(name), if_absent=number % 3 == 0)
        await store.put("hot", body("hot", seed=number))
        print(name, flush=True)

asyncio.run(main())
"""


class TestFolderStore(ObjectsContract):
    @pytest.fixture
    def store(self, tmp_path):
        return FolderStore.open(tmp_path / "objects")


def files_in(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


async def test_what_put_returned_from_survives_kill_9_and_none_is_torn(tmp_path):
    seed = random.Random(3)
    acknowledged: set[str] = set()
    for kill in range(15):
        acknowledged |= await asyncio.to_thread(
            acknowledged_until_killed,
            *(WRITER, str(tmp_path), f"kill-{kill}"),
            after_s=seed.uniform(0.0, 0.08),
        )
    left = files_in(tmp_path / ".tmp")
    store = FolderStore.open(tmp_path)
    for name in await names_in(store, "kill-"):
        assert await store.get(name) == body(name)
        acknowledged.discard(name)
    assert acknowledged == set()
    hot = await store.get("hot")
    assert hot == body("hot", seed=int(hot.split()[0]))
    assert files_in(tmp_path / ".tmp") == [], left


async def test_a_write_that_lives_is_not_taken_for_a_leftover(tmp_path):
    store = FolderStore.open(tmp_path)
    (tmp_path / ".tmp" / "left").write_bytes(b"half")
    path, handle = folder._new_temporary(tmp_path / ".tmp")
    FolderStore.open(tmp_path)
    assert files_in(tmp_path / ".tmp") == [path.name]
    os.close(handle)
    FolderStore.open(tmp_path)
    assert files_in(tmp_path) == []
    await store.put("x", b"still in use")
    assert await store.get("x") == b"still in use"


async def test_files_and_folders_are_the_owners_alone(tmp_path):
    store = FolderStore.open(tmp_path / "objects")
    await store.put("a/b", b"secret")
    modes = {
        p.relative_to(tmp_path).as_posix(): p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")
    }
    assert modes == {
        "objects": 0o700,
        "objects/.tmp": 0o700,
        "objects/a": 0o700,
        "objects/a/b": 0o600,
    }


async def test_deleting_the_last_object_of_a_folder_leaves_no_trace_of_its_name(tmp_path):
    store = FolderStore.open(tmp_path)
    await store.put("canary/one/x", b"1")
    await store.put("canary/y", b"2")
    await store.delete("canary/one/x")
    assert files_in(tmp_path) == ["canary/y"]
    assert not (tmp_path / "canary" / "one").exists()
    await store.delete("canary/y")
    assert [p.name for p in tmp_path.iterdir()] == [".tmp"]


async def test_puts_and_deletes_in_one_folder_do_not_trip_over_each_other(tmp_path):
    store = FolderStore.open(tmp_path)

    async def churn(number: int) -> None:
        for _ in range(20):
            await store.put(f"a/b/{number}", b"x", if_absent=True)
            await store.delete(f"a/b/{number}")

    await asyncio.gather(*map(churn, range(8)))
    assert await names_in(store) == {}


async def test_a_name_in_a_folders_place_is_a_conflict(tmp_path):
    store = FolderStore.open(tmp_path)
    await store.put("a/b", b"1")
    for name in ("a", "a/b/c", "a/b/c/d"):
        with pytest.raises(Conflict, match="folder"):
            await store.put(name, b"2")
        with pytest.raises(Conflict):
            await store.put(name, b"2", if_absent=True)


async def test_files_that_are_no_objects_are_not_listed(tmp_path):
    store = FolderStore.open(tmp_path)
    await store.put("a/x", b"1")
    for name in ("README", "a/Upper", "a/=zz", "a/=61", "a/é", "a/.hidden"):
        (tmp_path / name).write_text("stray")
    assert await names_in(store) == {"a/x": 1}


async def test_a_path_stays_inside_and_is_of_lower_case_ascii(tmp_path):
    for name in ODD_NAMES:
        path = folder._encoded(name)
        assert path.isascii()
        assert path == path.lower()
        assert all(0 < len(part) <= 202 for part in path.split("/"))
        assert not {".", "..", ".tmp"} & {*path.split("/")}
        assert folder._decoded(Path(path)) == name


_TEXT = st.text(st.one_of(st.sampled_from("aA.=+/"), st.characters(codec="utf-8")), min_size=1)


@settings(max_examples=300, deadline=None)
@given(_TEXT, _TEXT)
def test_two_names_never_have_one_path(one, other):
    if one != other:
        assert folder._encoded(one) != folder._encoded(other)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["write", "replace", "mkdir"])
async def test_a_failed_write_leaves_the_old_object_and_no_leftover(
    tmp_path, monkeypatch, call, number
):
    store = FolderStore.open(tmp_path)
    await store.put("a/x", b"old")

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    kind = Unavailable if number == errno.EIO else StorageFull
    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(kind):
            await store.put("new/x" if call == "mkdir" else "a/x", b"new" * 1000)
        assert await store.get("a/x") == b"old"
    assert files_in(tmp_path) == ["a/x"]
    await store.put("a/x", b"later")
    assert await store.get("a/x") == b"later"


async def test_short_writes_are_gone_on_with(tmp_path, monkeypatch):
    store = FolderStore.open(tmp_path)
    whole = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: whole(handle, data[:7]))
    await store.put("x", bytes(range(256)))
    assert await store.get("x") == bytes(range(256))


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
async def test_after_a_failed_fsync_nothing_is_written_until_it_is_opened_anew(
    tmp_path, monkeypatch, failing
):
    """Of the file, its folder, the one above, and the root, in turn: none is acknowledged."""
    store = FolderStore.open(tmp_path)
    await store.put("other/x", b"old")
    calls = 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing + 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(Unavailable):
        await store.put("a/b/x", b"new")
    assert calls == failing + 1
    with pytest.raises(Unavailable, match="read-only since fsync failed"):
        await store.put("other/x", b"new")
    assert calls == failing + 1
    assert await store.get("other/x") == b"old"
    store = FolderStore.open(tmp_path)
    await store.put("other/x", b"new")
    assert await store.get("other/x") == b"new"


@pytest.mark.parametrize("if_absent", [False, True])
async def test_a_loss_of_power_at_any_point_takes_nothing_that_was_acknowledged(
    tmp_path, monkeypatch, if_absent
):
    """What a file system may forget, by the record of what was done: a file's bytes until it was
    fsynced, a name until its folder was."""
    done: list[tuple[str, str]] = []
    path_of: dict[int, str] = {}
    whole = {
        name: getattr(os, name) for name in ("open", "write", "fsync", "replace", "link", "mkdir")
    }

    def open_(path, *given, **kinds):
        handle = whole["open"](path, *given, **kinds)
        path_of[handle] = str(path)
        return handle

    def recorded(name):
        def call(first, *rest, **kinds):
            at = path_of.get(first, str(first)) if isinstance(first, int) else str(first)
            done.append((name, str(rest[0]) if name in ("replace", "link") else at))
            return whole[name](first, *rest, **kinds)

        return call

    store = FolderStore.open(tmp_path)
    monkeypatch.setattr(os, "open", open_)
    for name in ("write", "fsync", "replace", "link", "mkdir"):
        monkeypatch.setattr(os, name, recorded(name))
    await store.put("a/b/x", b"new", if_absent=if_absent)
    places = [name for name, _ in done]
    placed = places.index("link" if if_absent else "replace")
    temporary = done[places.index("write")][1]
    assert ("fsync", temporary) in done[places.index("write") : placed]
    for made in (tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "x"):
        assert ("fsync", str(made.parent)) in done[placed:]
