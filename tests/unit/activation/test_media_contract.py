"""What host, disk and object store have in common, and what each does alone."""

import errno
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from memcube.activation import disk as disk_module
from memcube.activation.disk import MAX_QUARANTINED, DiskMedium
from memcube.activation.keyring import Keyring
from memcube.activation.medium import HostMedium, LocalArrays, Record
from memcube.activation.packs import ObjectMedium, remove_models
from memcube.activation.payload import read, write
from memcube.errors import Corrupt, StorageFull, Unavailable
from memcube.ids import TenantId
from memcube.testing.kills import acknowledged_until_killed
from memcube.testing.kv import LAYOUT, MODEL, Objects, item, payload, same

EXPECTED = {"model": MODEL, "layout": LAYOUT}


def record(key: str, *, members: tuple[str, ...] = ("cube",), **given) -> Record:
    return Record(item=item(key, **given), members=frozenset(members))


def put(medium, *keys: str, **given) -> None:
    for key in keys:
        medium.put(payload(key), record(key, **given))


def keys_of(medium) -> set[str]:
    return {held.key for held in medium.records()}


@pytest.fixture
def objects(tmp_path):
    objects = Objects(tmp_path / "objects")
    yield objects
    objects.close()


def pack_medium(objects, writer: str = "node-1", **given) -> ObjectMedium:
    return ObjectMedium(objects, writer=writer, **(EXPECTED | given))


@pytest.fixture(params=["host", "disk", "object", "object, written"])
def medium(request, tmp_path):
    if request.param == "host":
        yield HostMedium()
    elif request.param == "disk":
        disk = DiskMedium.open(tmp_path / "disk", **EXPECTED, reserve_bytes=0)
        yield disk
        disk.close()
    else:
        pack_bytes = 1 if "written" in request.param else 10_000
        yield pack_medium(request.getfixturevalue("objects"), pack_bytes=pack_bytes)


def test_what_was_put_is_got(medium):
    put(medium, "a1", "b/2", "C")
    for key in ("a1", "b/2", "C"):
        assert key in medium
        assert same(medium.get(key), key)
    assert medium.get("none") is None
    assert keys_of(medium) == {"a1", "b/2", "C"}
    assert 3 * 256 <= medium.used_bytes < 3 * 3000


def test_a_second_put_replaces_and_is_counted_once(medium):
    put(medium, "a")
    used = medium.used_bytes
    put(medium, "a")
    assert medium.used_bytes == used
    assert same(medium.get("a"), "a")
    assert len(medium.records()) == 1


@pytest.mark.parametrize("how", ["evict", "delete"])
def test_what_was_evicted_or_deleted_is_gone_and_the_rest_is_not(medium, how):
    put(medium, "a", "b", "c", "d")
    getattr(medium, how)(["a", "c", "never"])
    assert keys_of(medium) == {"b", "d"}
    assert [medium.get(key) is not None for key in "abcd"] == [False, True, False, True]
    assert "a" not in medium
    medium.delete(["a", "b", "d"])
    assert medium.used_bytes == 0
    put(medium, "a")
    assert same(medium.get("a"), "a")


def test_a_record_is_what_was_given(medium):
    given_ = Record(
        item=replace(item("a", tenant="t", group="chat"), parent="p"),
        members=frozenset({"x", "y"}),
    )
    medium.put(payload("a"), given_)
    assert medium.records() == [given_]
    assert Record.of_note("x", "a", json.loads(json.dumps(given_.note()))) == given_


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": None},
        {"group": 1},
        {"saves_s": "1"},
        {"num_bytes": -1},
        {"num_bytes": True},
        {"parent": 3},
        {"members": "ab"},
        {"members": [1]},
    ],
)
def test_a_note_that_is_none_is_corrupt(change):
    with pytest.raises(Corrupt):
        Record.of_note("x", "a", record("a").note() | change)


class TestHost:
    def test_arrays_mapped_from_a_file_are_taken_into_memory(self, tmp_path):
        path = tmp_path / "x"
        write(path, payload("a"))
        mapped = read(path, key="a", **EXPECTED)
        host = HostMedium()
        host.put(mapped, record("a"))
        path.write_bytes(bytes(path.stat().st_size))  # in place: what a map would show
        assert same(host.get("a"), "a")

    def test_shared_arrays_are_asked_and_told(self):
        class Shared(LocalArrays):
            dropped: list[object] = []  # noqa: RUF012
            lost = False

            def get(self, handle):
                return None if self.lost else handle

            def drop(self, handle):
                self.dropped.append(handle)

        shared = Shared()
        host = HostMedium(shared)
        put(host, "a", "b")
        handle = host.handle("a")
        assert np.array_equal(handle["kv"], payload("a").arrays["kv"])
        assert host.handle("none") is None
        host.evict(["a"])
        assert len(shared.dropped) == 1
        shared.lost = True
        assert host.get("b") is None
        assert "b" not in host
        assert host.used_bytes == 0


class TestDisk:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        return tmp_path / "disk"

    @pytest.fixture
    def opened(self, folder):
        """Opens the folder again and again; what was opened before is closed."""
        held: list[DiskMedium] = []

        def open_(**given) -> DiskMedium:
            while held:
                held.pop().close()
            held.append(DiskMedium.open(folder, **(EXPECTED | {"reserve_bytes": 0} | given)))
            return held[-1]

        yield open_
        while held:
            held.pop().close()

    def test_a_start_reads_headers_alone_and_keeps_the_order_of_use(self, opened, monkeypatch):
        disk = opened()
        put(disk, "a", "b", "c")
        for number, key in enumerate("bca"):
            os.utime(disk.path_of(key), (number, number))
        disk.get("c")
        sizes: list[int] = []
        pread = os.pread
        monkeypatch.setattr(os, "pread", lambda h, n, at: sizes.append(n) or pread(h, n, at))
        monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("a body was read"))
        disk = opened()
        assert [held.key for held in disk.records()] == ["b", "a", "c"]
        assert max(sizes) < 1000
        monkeypatch.undo()
        assert same(disk.get("a"), "a")

    def test_a_folder_is_one_processes(self, opened, folder):
        opened()
        with pytest.raises(Unavailable, match="another process"):
            DiskMedium.open(folder, **EXPECTED)

    @pytest.mark.parametrize(
        "harm", ["flip", "cut", "empty", "pickle", "foreign key", "folder", "gone"]
    )
    @pytest.mark.parametrize("when", ["open", "restart"])
    def test_a_bad_file_is_a_miss_and_set_aside(self, opened, folder, harm, when):
        disk = opened()
        put(disk, "aa" * 8, "bb" * 8)
        path = disk.path_of("aa" * 8)
        whole = path.read_bytes()
        if harm == "flip":
            path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:])
        elif harm == "cut":
            path.write_bytes(whole[:-5])
        elif harm in ("empty", "pickle"):
            path.write_bytes(b"" if harm == "empty" else b"\x80\x04cos\nsystem\n(S'true'\ntR." * 9)
        elif harm == "foreign key":
            shutil.copy(disk.path_of("bb" * 8), path)
        else:
            path.unlink()
            if harm == "folder":
                path.mkdir()
        if when == "restart":
            disk = opened()
        assert disk.get("aa" * 8) is None
        assert "aa" * 8 not in disk
        assert same(disk.get("bb" * 8), "bb" * 8)
        aside = [p.name for p in (folder / "quarantine").iterdir()]
        assert len(aside) == (harm != "gone")
        assert sum(disk.quarantined.values()) == len(aside)
        put(disk, "aa" * 8)  # built anew
        assert same(disk.get("aa" * 8), "aa" * 8)
        disk.delete(["aa" * 8])
        assert [p.name for p in (folder / "quarantine").iterdir()] == []

    def test_files_of_an_old_model_or_layout_are_set_aside_at_the_start(self, opened):
        put(opened(), "a", "b")
        for change in ({"model": "m@2"}, {"layout": type(LAYOUT)(2, 1, 8, "float32")}):
            put(opened(), "a", "b")
            disk = opened(**change)
            assert disk.quarantined == {"foreign": 2}
            assert keys_of(disk) == set()

    def test_what_is_set_aside_is_bounded_and_goes_with_any_tenant(self, opened, folder):
        disk = opened()
        for number in range(MAX_QUARANTINED + 5):
            put(disk, f"{number}")
            disk.path_of(f"{number}").write_bytes(b"bad")
            disk.get(f"{number}")
        assert len(list((folder / "quarantine").iterdir())) == MAX_QUARANTINED
        disk.delete_tenant("someone")
        assert list((folder / "quarantine").iterdir()) == []

    def test_what_was_set_aside_a_day_ago_is_removed(self, opened, folder, monkeypatch):
        disk = opened()
        put(disk, "a")
        disk.path_of("a").write_bytes(b"bad")
        disk.get("a")
        assert len(list((folder / "quarantine").iterdir())) == 1
        later = disk_module.time.time() + 25 * 3600
        monkeypatch.setattr(disk_module.time, "time", lambda: later)
        opened()
        assert list((folder / "quarantine").iterdir()) == []

    def test_a_full_disk_is_told_and_nothing_is_left(self, opened, folder, monkeypatch):
        disk = opened()
        put(disk, "a")

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", full)
            with pytest.raises(StorageFull):
                put(disk, "b")
        assert [p.name for p in folder.rglob("*.new")] == []
        assert same(disk.get("a"), "a")
        assert "b" not in disk
        put(disk, "b")
        assert same(disk.get("b"), "b")

    def test_room_is_left_for_others(self, opened):
        disk = opened(reserve_bytes=1 << 60)
        with pytest.raises(StorageFull):
            put(disk, "a")

    def test_deleted_files_are_gone_before_the_call_returns_and_after_a_start(
        self, opened, monkeypatch
    ):
        disk = opened()
        put(disk, "a", "b")
        synced: list[str] = []
        fsync = os.fsync
        monkeypatch.setattr(
            os, "fsync", lambda h: synced.append(os.readlink(f"/proc/self/fd/{h}")) or fsync(h)
        )
        disk.delete(["a"])
        assert not disk.path_of("a").exists()
        assert synced == [str(disk.path_of("a").parent)]
        assert keys_of(opened()) == {"b"}

    def test_a_delete_that_fails_can_be_repeated(self, opened, monkeypatch):
        disk = opened()
        put(disk, "a")

        def fail(*_, **__):
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", fail)
            with pytest.raises(Unavailable):
                disk.delete(["a"])
        assert disk.get("a") is None
        disk.delete(["a"])
        assert not disk.path_of("a").exists()

    def test_with_a_keyring_files_are_noise_without_the_tenants_key(self, opened, tmp_path):
        ring = Keyring(tmp_path / "keyring.json")
        disk = opened(keyring=ring)
        put(disk, "a", tenant="t")
        put(disk, "b", tenant="u")
        assert payload("a").arrays["kv"].tobytes()[:12] not in disk.path_of("a").read_bytes()
        assert same(disk.get("a"), "a")
        disk = opened(keyring=Keyring(tmp_path / "keyring.json"))
        assert same(disk.get("a"), "a")
        copy = disk.path_of("a").read_bytes()
        ring.forget(TenantId("t"))
        assert disk.get("a") is None
        put(disk, "c", tenant="t")  # a new key
        disk.path_of("a").write_bytes(copy)  # a copy that someone kept
        disk = opened(keyring=ring)
        assert disk.get("a") is None
        assert same(disk.get("b"), "b")
        assert same(disk.get("c"), "c")

    def test_with_a_keyring_a_file_that_is_not_sealed_is_foreign_and_the_other_way(
        self, opened, tmp_path
    ):
        put(opened(), "a", tenant="t")
        ring = Keyring(tmp_path / "keyring.json")
        ring.get(TenantId("t"))
        assert opened(keyring=ring).get("a") is None
        put(opened(keyring=ring), "a", tenant="t")
        disk = opened()
        assert disk.get("a") is None
        assert disk.quarantined == {"foreign": 1}

    def test_kill_9_leaves_whole_files_or_none(self, folder, opened):
        program = (
            "import itertools, sys; from pathlib import Path\n"
            "from memcube.activation.disk import DiskMedium\n"
            "from memcube.activation.medium import Record\n"
            "from memcube.testing.kv import LAYOUT, MODEL, item, payload\n"
            "disk = DiskMedium.open(Path(sys.argv[1]), model=MODEL, layout=LAYOUT, reserve_bytes=0)\n"
            "print('ready', flush=True)\n"
            "for n in itertools.count():\n"
            "    key = f'{sys.argv[2]}-{n}'\n"
            "    disk.put(payload(key, 512), Record(item=item(key, num_tokens=512)))\n"
            "    print(key, flush=True)\n"
        )
        seed = random.Random(7)
        told: set[str] = set()
        for kill in range(3):
            after_s = seed.uniform(0.01, 0.1)
            told |= acknowledged_until_killed(program, str(folder), f"{kill}", after_s=after_s)
        disk = opened()
        assert not list(folder.rglob("*.new"))
        assert told <= keys_of(disk)
        assert all(same(disk.get(key), key, 512) for key in keys_of(disk))
        assert not disk.quarantined


class TestPacks:
    def test_small_payloads_share_an_object(self, objects):
        packs = pack_medium(objects, pack_bytes=20_000)
        put(packs, *(f"k{number}" for number in range(10)))
        assert len(objects.list()) == 0
        packs.flush()
        assert sorted(found.name.rpartition(".")[2] for found in objects.list()) == [
            "index",
            "pack",
        ]
        assert all(same(packs.get(f"k{number}"), f"k{number}") for number in range(10))

    def test_a_full_pack_is_written_without_being_asked(self, objects):
        packs = pack_medium(objects, pack_bytes=3000)
        put(packs, *(f"k{number}" for number in range(20)))
        assert len(objects.list()) >= 8
        assert len(packs._waiting) < 5

    def test_a_new_start_and_another_node_find_what_was_written(self, objects):
        packs, other = pack_medium(objects), pack_medium(objects, "node-2")
        put(packs, "a", "b")
        packs.close()
        assert all(same(pack_medium(objects).get(key), key) for key in "ab")
        assert other.get("a") is None
        other.refresh()
        assert same(other.get("a"), "a")
        assert pack_medium(objects, "node-2", model="m@2").get("a") is None

    def bytes_in(self, objects) -> bytes:
        return b"".join(objects.get(found.name) for found in objects.list())

    def test_deleted_bytes_are_gone_when_the_call_returns_and_the_rest_is_readable(self, objects):
        packs = pack_medium(objects)
        put(packs, "a", "b", "c")
        packs.flush()
        put(packs, "d")
        canaries = {key: payload(key).arrays["kv"].tobytes() for key in "abcd"}
        assert canaries["a"] in self.bytes_in(objects)
        packs.delete(["a", "d"])
        left = self.bytes_in(objects)
        assert [canary in left for canary in canaries.values()] == [False, True, True, False]
        assert [same(packs.get(key), key) for key in "bc"] == [True, True]
        assert keys_of(pack_medium(objects)) == {"b", "c"}

    def test_an_evicted_payload_is_deleted_like_others(self, objects):
        """Its bytes are in its pack yet, and a new start would find it again."""
        packs = pack_medium(objects)
        put(packs, "a", "b", "c")
        packs.flush()
        packs.evict(["a"])
        assert packs.get("a") is None
        packs.delete(["a"])
        assert payload("a").arrays["kv"].tobytes() not in self.bytes_in(objects)
        assert keys_of(pack_medium(objects)) == {"b", "c"}

    def test_another_nodes_payload_is_deleted_with_its_pack(self, objects):
        packs, other = pack_medium(objects), pack_medium(objects, "node-2")
        put(packs, "a", "b")
        packs.flush()
        other.delete(["a"])
        assert objects.list() == []
        assert packs.get("a") is None
        assert packs.get("b") is None
        assert "b" not in packs

    def test_a_reader_follows_a_pack_that_was_made_anew(self, objects):
        packs, other = pack_medium(objects), pack_medium(objects, "node-2")
        put(packs, "a", "b")
        packs.flush()
        other.refresh()
        packs.delete(["a"])
        assert other.get("a") is None
        assert other.get("b") is None
        other.refresh()
        assert same(other.get("b"), "b")

    def test_a_mostly_dead_pack_is_made_anew(self, objects):
        packs = pack_medium(objects)
        put(packs, "a", "b", "c", "d")
        packs.flush()
        size = sum(found.num_bytes for found in objects.list())
        packs.evict(["a", "b"])
        packs.flush()
        assert sum(found.num_bytes for found in objects.list()) == size
        packs.evict(["c"])
        packs.flush()
        assert sum(found.num_bytes for found in objects.list()) < size / 3
        assert same(packs.get("d"), "d")
        assert keys_of(pack_medium(objects)) == {"d"}

    def test_a_tenant_is_deleted_in_all_models_and_of_all_writers(self, objects):
        packs = pack_medium(objects)
        for number, model in enumerate((MODEL, "m@0")):
            older = pack_medium(objects, f"node-{number}", model=model)
            for tenant in "tu":
                key = f"{model} {tenant}"
                one = payload(key)
                one = type(one)(
                    **{name: getattr(one, name) for name in one.__slots__} | {"model": model}
                )
                older.put(one, record(key, tenant=tenant))
                older.flush()
        packs.delete_tenant("t")
        assert {
            k
            for n, m in ((0, MODEL), (1, "m@0"))
            for k in keys_of(pack_medium(objects, f"node-{n}", model=m))
        } == {f"{MODEL} u", "m@0 u"}
        assert remove_models(objects, keep=[MODEL]) == 2
        assert same(pack_medium(objects).get(f"{MODEL} u"), f"{MODEL} u")

    def test_what_a_crash_left_is_removed_at_the_start(self, objects):
        packs = pack_medium(objects)
        put(packs, "a")
        packs.flush()
        own = objects.list()[0].name.rpartition("/")[0]
        objects.put(f"{own}/half.pack", b"without an index")
        objects.put(f"{own}/bad.index", b"torn")
        objects.put(f"{own}/bad.pack", b"of a torn index")
        packs = pack_medium(objects)
        assert same(packs.get("a"), "a")
        assert len(objects.list()) == 2

    @pytest.mark.parametrize("ending", [".pack", ".index"])
    def test_damage_in_the_store_is_a_miss(self, objects, ending):
        packs = pack_medium(objects)
        put(packs, "a")
        packs.flush()
        (name,) = [found.name for found in objects.list() if found.name.endswith(ending)]
        whole = objects.get(name)
        other = "node-2"
        for place in range(0, len(whole), 7):
            bad = bytearray(whole)
            bad[place] ^= 16
            objects.put(name, bad)
            assert pack_medium(objects, other).get("a") is None
        objects.put(name, whole[: len(whole) // 2])
        assert pack_medium(objects, other).get("a") is None
        objects.put(name, whole)
        assert same(pack_medium(objects, other).get("a"), "a")

    def test_a_store_that_is_down_loses_what_waits_and_nothing_else(self, objects):
        packs = pack_medium(objects)
        put(packs, "a")
        packs.flush()
        objects.down = True
        put(packs, "b")
        with pytest.raises(Unavailable):
            packs.flush()
        assert "b" not in packs
        with pytest.raises(Unavailable):
            packs.get("a")
        packs.close()
        objects.down = False
        assert same(packs.get("a"), "a")

    def test_a_delete_that_fails_serves_nothing_and_can_be_repeated(self, objects):
        packs = pack_medium(objects)
        put(packs, "a", "b")
        packs.flush()
        objects.down = True
        with pytest.raises(Unavailable):
            packs.delete(["a"])
        assert "a" not in packs
        objects.down = False
        packs.delete(["a"])
        assert payload("a").arrays["kv"].tobytes() not in self.bytes_in(objects)
        assert same(packs.get("b"), "b")

    def test_a_pack_is_sealed_by_tenant(self, objects, tmp_path):
        ring = Keyring(tmp_path / "keyring.json")
        packs = pack_medium(objects, keyring=ring)
        put(packs, "a", tenant="t")
        put(packs, "b", tenant="u")
        packs.flush()
        assert payload("a").arrays["kv"].tobytes()[:12] not in self.bytes_in(objects)
        assert same(packs.get("a"), "a")
        ring.forget(TenantId("t"))
        assert packs.get("a") is None
        assert same(packs.get("b"), "b")
