"""The hierarchy: what goes down, what comes up, what stays, and what is never seen again."""

import errno
import itertools
import os
import random
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memcube.activation.disk import DiskMedium
from memcube.activation.keyring import Keyring
from memcube.activation.media import AsyncMedia, MediaHierarchy
from memcube.activation.medium import HostMedium, Record
from memcube.activation.packs import ObjectMedium
from memcube.errors import Unavailable
from memcube.policies.retention import Retention
from memcube.testing.kv import LAYOUT, MODEL, Objects, TinyLru, item, payload, same

EXPECTED = {"model": MODEL, "layout": LAYOUT}
HOST = 256  # bytes of a payload in memory, as it is counted
BELOW = HOST + 2048  # and in a file or a pack


class House:
    """A hierarchy over a folder, that can be closed and opened again."""

    def __init__(
        self,
        path: Path,
        host: int = 2,
        disk: int | None = 3,
        objects: int | None = None,
        *,
        sealed: bool = False,
        policy: type = TinyLru,
    ):
        self.path, self.objects, self.now, self.policy = path, None, 0.0, policy
        self.sizes = host, disk, objects
        self.ring = Keyring(path / "keyring.json") if sealed else None
        if objects is not None:
            self.objects = Objects(path / "objects")
        self.open()

    def open(self) -> "House":
        host, disk, objects = self.sizes
        media = [(HostMedium(), self.policy(host * HOST))]
        given = {**EXPECTED, "keyring": self.ring}
        if disk is not None:
            self.disk = DiskMedium.open(self.path / "disk", **given, reserve_bytes=0)
            media.append((self.disk, self.policy(disk * BELOW)))
        if objects is not None:
            self.packs = ObjectMedium(self.objects, writer="node", **given)
            media.append((self.packs, self.policy(objects * BELOW)))
        self.policies = [policy for _, policy in media]
        ticks = itertools.count()  # each reading of the clock is 0.1 µs after the one before
        self.media = MediaHierarchy(
            media, now=self.now, keyring=self.ring, clock=lambda: next(ticks) * 1e-7
        )
        return self

    def restart(self) -> "House":
        self.media.close()
        return self.open()

    def close(self) -> None:
        self.media.close()
        if self.objects is not None:
            self.objects.close()

    def put(self, *keys: str, members=(), **given) -> None:
        for key in keys:
            self.now += 1
            self.media.put(payload(key), item(key, **given), self.now, members=members)

    def get(self, key: str) -> bool:
        """Whether it is served, and then as it was put."""
        self.now += 1
        found = self.media.get(key, self.now)
        assert found is None or same(found, key)
        return found is not None

    def where(self, *keys: str) -> list[str]:
        return [" ".join(self.media.where(key)) for key in keys]

    def bytes_anywhere(self) -> bytes:
        return b"".join(p.read_bytes() for p in self.path.rglob("*") if p.is_file())


@pytest.fixture
def house(tmp_path):
    built: list[House] = []

    def build(**given) -> House:
        built.append(House(tmp_path, **given))
        return built[-1]

    yield build
    for one in built:
        one.close()


def test_a_victim_goes_one_medium_down_and_comes_up_when_it_is_hit(house):
    h = house(host=2, disk=2, objects=4)
    h.put(*"abcdef")
    assert h.where(*"abcdef") == ["object", "object", "disk", "disk", "host", "host"]
    assert h.get("c")
    assert h.where("c") == ["host disk"]
    assert h.where("e") == ["disk"]
    assert h.get("a")
    assert h.where("a", "f") == ["host object", "disk"]
    assert all(map(h.get, "abcdef"))


def test_what_is_below_already_is_not_written_again(house, monkeypatch):
    h = house(host=1, disk=4)
    h.put("a", "b")
    written: list[str] = []
    put = h.disk.put
    monkeypatch.setattr(h.disk, "put", lambda p, r: written.append(p.key) or put(p, r))
    for _ in range(3):
        assert h.get("a")
        assert h.get("b")
    assert written == ["b"]


def test_what_no_medium_admits_is_dropped_and_known_no_more(house):
    h = house(host=1, disk=1)
    h.put(*"abc")
    assert h.where(*"abc") == ["", "disk", "host"]
    assert not h.get("a")
    assert len(h.media._entries) == 2
    assert h.media.put(payload("big", 4000), item("big", num_tokens=4000), 9.0) is False
    assert "big" not in h.media
    assert h.where("b", "c") == ["disk", "host"]


def test_what_the_host_refuses_may_go_to_the_disk(house):
    h = house(host=1, disk=9)
    h.put("a")
    h.media.pin("a")
    h.put("b")
    assert h.where("a", "b") == ["host", "disk"]
    assert h.get("b")
    assert h.where("b") == ["disk"]


def test_a_pinned_payload_stays_until_it_is_unpinned(house):
    h = house(host=2, disk=2)
    h.media.pin("a")  # before it is there
    h.put(*"abcde")
    assert "host" in h.where("a")[0]
    h.media.pin("a")
    h.media.unpin("a")
    h.put("f", "g")
    assert "host" in h.where("a")[0]
    h.media.unpin("a")
    h.put("h", "i")
    assert "host" not in h.where("a")[0]


def test_policies_are_told_to_forget_what_was_deleted_and_not_what_they_let_go(house, monkeypatch):
    """A policy may remember the uses of what it evicted, for the day that it comes back."""
    h = house(host=1, disk=1)
    told: list[str] = []
    for policy in h.policies:
        monkeypatch.setattr(
            policy, "forget", lambda key, whole=policy.forget: (told.append(key), whole(key))
        )
    h.put(*"abcd")
    assert told == []
    h.media.delete(["a", "d"])
    assert sorted(told) == ["a", "a", "d", "d"]


def test_a_pin_is_passed_on_once_and_so_is_its_end(house, monkeypatch):
    h = house(host=2, disk=None)
    told: list[str] = []
    for name in ("pin", "unpin"):
        monkeypatch.setattr(h.policies[0], name, lambda key, name=name: told.append(name))
    h.media.pin("a")
    h.put("a", "a")
    h.media.pin("a")
    h.media.unpin("a")
    assert told == ["pin"]
    h.media.unpin("a")
    assert told == ["pin", "unpin"]


def test_a_second_put_changes_nothing(house):
    h = house()
    h.put("a", "a", "a")
    assert h.media.stats()[0].num_payloads == 1
    assert h.media.stats()[0].used_bytes == HOST


def test_a_payload_of_two_cubes_with_the_same_text_goes_with_either(house):
    h = house(host=2, disk=9)
    for first, second in ("xy", "yx"):
        h.put("a", members=(first,))
        h.put("a", members=(second,))
        assert h.media.residency([first]) == h.media.residency([second]) == {"host": HOST}
        assert h.media.delete_members([first]) == 1
        assert not h.get("a")
        assert h.media.residency([second]) == {}


@pytest.mark.parametrize("sealed", [False, True])
def test_deleted_payloads_are_gone_from_all_media_when_the_call_returns(house, sealed):
    h = house(host=2, disk=3, objects=9, sealed=sealed)
    h.put(*"abcdefgh")
    h.media.flush()
    assert h.where("a", "d", "h") == ["object", "disk", "host"]
    assert h.get("a")  # in two media now
    canaries = {key: payload(key).arrays["kv"].tobytes() for key in "abd"}
    h.media.delete(["a", "d", "h", "never"])
    assert [h.get(key) for key in "adh"] == [False] * 3
    assert all(map(h.get, "bcefg"))
    left = h.bytes_anywhere()
    assert canaries["a"] not in left
    assert canaries["d"] not in left
    h.restart()
    assert [h.get(key) for key in "adh"] == [False] * 3


def test_payloads_that_hold_a_changed_cube_are_deleted(house):
    h = house(host=1, disk=9)
    h.put("a", members=("x", "y"))
    h.put("b", members=("y",))
    h.put("c", members=("z",), tenant="other")
    h.put("d", members=("y",), tenant="other")
    assert h.media.delete_members(["x"]) == 1
    assert [h.get(key) for key in "abcd"] == [False, True, True, True]
    assert h.media.delete_members(["y"], tenant="a") == 1
    assert [h.get(key) for key in "bcd"] == [False, True, True]
    h.restart()
    assert h.media.delete_members(["y", "none"]) == 1
    assert [h.get(key) for key in "cd"] == [True, False]


def test_residency_tells_the_bytes_of_a_cube_by_medium(house):
    h = house(host=2, disk=9)
    h.put("a", "b", members=("x",))
    h.put("c", members=("x", "y"))
    assert h.media.residency(["x"]) == {"host": 2 * HOST, "disk": BELOW}
    assert h.media.residency(["y"]) == {"host": HOST}
    assert h.media.residency(["none"]) == {}
    h.put("d", members=("z",), tenant="other")
    assert h.media.members() == {"a": {"x", "y"}, "other": {"z"}}


@pytest.mark.parametrize("sealed", [False, True])
def test_a_deleted_tenant_leaves_no_byte(house, sealed):
    h = house(host=1, disk=3, objects=9, sealed=sealed)
    h.put(*"abcdef", tenant="canary-tenant")
    h.put(*"uvwxyz", tenant="other")
    h.media.flush()
    h.disk.path_of("x").write_bytes(b"damaged")
    h.get("x")
    assert b"canary-tenant" in h.bytes_anywhere()
    h.media.delete_tenant("canary-tenant")
    assert not any(map(h.get, "abcdef"))
    assert b"canary-tenant" not in h.bytes_anywhere()
    assert all(map(h.get, "uvwyz"))
    assert list((h.path / "disk" / "quarantine").iterdir()) == []
    h.restart()
    assert not any(map(h.get, "abcdef"))
    assert [stats.bytes_by_tenant.get("canary-tenant", 0) for stats in h.media.stats()] == [0, 0, 0]


def test_with_its_key_a_tenants_payloads_go_even_where_their_bytes_can_not_be_reached(house):
    h = house(host=1, disk=2, objects=9, sealed=True)
    h.put(*"abcdef", tenant="t")
    h.media.flush()
    kept = h.bytes_anywhere()
    h.objects.down = True
    with pytest.raises(Unavailable):
        h.media.delete_tenant("t")
    assert not any(map(h.get, "abcdef"))
    h.objects.down = False
    h.restart()  # the index is there yet, the key is not
    assert not any(map(h.get, "abcdef"))
    h.media.delete_tenant("t")
    assert h.objects.list() == []
    assert payload("a").arrays["kv"].tobytes() not in kept


def test_a_delete_that_failed_is_finished_by_the_next(house):
    h = house(host=1, disk=1, objects=9)
    h.put(*"abcd", members=("x",))
    h.media.flush()
    h.objects.down = True
    with pytest.raises(Unavailable):
        h.media.delete_members(["x"])
    assert not any(map(h.get, "abcd"))
    h.objects.down = False
    h.media.delete_members(["x"])
    assert h.objects.list() == []


def test_a_restart_knows_what_lies_on_disk_and_in_the_store(house):
    h = house(host=1, disk=2, objects=9)
    h.put(*"abcdef")
    h.media.flush()
    h.restart()
    assert h.where(*"abcdef") == ["object", "object", "object", "disk", "disk", ""]
    assert [h.get(key) for key in "abcdef"] == [True] * 5 + [False]


def test_a_smaller_disk_keeps_what_was_used_last(house):
    h = house(host=1, disk=5)
    h.put(*"abcdef")
    for number, key in enumerate("baced"):
        os.utime(h.disk.path_of(key), (number, number))
    h.sizes = (1, 2, None)
    h.restart()
    assert [key for key in "abcdef" if h.media.where(key)] == ["d", "e"]
    assert len(h.disk.records()) == 2


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_admits_nothing_and_takes_nothing_along(house, monkeypatch):
    h = house(host=2, disk=9)
    h.put("a", "b", "c")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        h.put("d", "e")
        assert h.where(*"de") == ["host", "host"]
        assert h.get("a")
        assert h.get("e")
        asked: list[object] = []
        patched.setattr(h.disk, "put", asked.append)
        h.put("f")
        assert asked == []  # it is left alone for a while
    events = h.media.stats()[1].events
    assert events["failed: StorageFull"] == 1
    assert events["refused: closed"] >= 1
    assert h.get("f")
    h.now += 31
    h.put("g", "h", "i")
    assert "disk" in h.where("g")


def test_behind_a_full_disk_the_object_store_takes_over(house, monkeypatch):
    h = house(host=1, disk=9, objects=9)
    h.put("a")
    monkeypatch.setattr(os, "replace", full)
    # The store's folder is on that disk too: its packs wait in memory.
    h.put("b", "c")
    assert h.where(*"abc") == ["object", "object", "host"]
    assert all(map(h.get, "abc"))


def test_a_store_that_is_down_is_left_alone_and_misses(house):
    h = house(host=1, disk=1, objects=9)
    h.put(*"abcd")
    h.media.flush()
    assert h.where("a") == ["object"]
    h.objects.down = True
    assert not h.get("a")
    h.objects.down = False
    assert not h.get("a")
    assert h.where("a") == ["object"]
    h.now += 31
    assert h.get("a")
    assert h.media.stats()[2].events["failed: Unavailable"] == 1


def test_a_damaged_file_is_a_miss_that_is_counted_and_can_be_put_again(house):
    h = house(host=1, disk=5)
    h.put(*"abc")
    h.disk.path_of("a").write_bytes(b"\x80\x04.")
    h.disk.path_of("b").unlink()
    assert not h.get("a")
    assert not h.get("b")
    assert h.get("c")
    assert h.media.stats()[1].events["lost"] == 2
    assert h.disk.quarantined == {"corrupt": 1}
    h.put("a")
    assert h.get("a")


def test_a_payload_of_another_key_is_never_served_from_a_swapped_file(house):
    h = house(host=1, disk=5)
    h.put(*"abcd")
    one, other = h.disk.path_of("a"), h.disk.path_of("b")
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)
    assert not h.get("a")
    assert not h.get("b")
    assert h.get("c")


def test_hits_and_misses_are_counted_where_they_were(house):
    h = house(host=1, disk=5)
    h.put("a", "b")
    h.get("a"), h.get("none"), h.get("a")
    host, disk = h.media.stats()
    assert (host.hits, host.misses, disk.hits, disk.hit_tokens) == (1, 2, 1, 4)
    assert host.bytes_by_tenant == {"a": HOST}
    assert disk.load_s_per_mb > 0


def test_hints_reach_every_policy(house):
    h = house()
    h.media.hint("chat", 0.8, 1.0)
    assert [policy.hints for policy in h.policies] == [[("chat", 0.8)], [("chat", 0.8)]]


def test_the_cost_model_is_told_what_loading_takes(house):
    h = house(host=1, disk=9, objects=9)
    h.put(*"abc")
    costs = [policy.items[key].load_s for policy, key in zip(h.policies[:2], "cb", strict=True)]
    assert 0 < costs[0] < costs[1]
    assert h.policies[1].items["b"].num_bytes == BELOW


def test_other_nodes_payloads_are_found_after_a_refresh(house, tmp_path):
    h = house(host=1, disk=1, objects=9)
    other = ObjectMedium(h.objects, writer="other", **EXPECTED)
    other.put(payload("theirs"), Record(item=item("theirs"), members=frozenset({"x"})))
    other.flush()
    assert not h.get("theirs")
    h.media.refresh(h.now)
    assert h.get("theirs")
    assert h.media.residency(["x"]) == {"host": HOST, "object": BELOW}
    other.delete(["theirs"])
    h.media.refresh(h.now)
    assert h.where("theirs") == ["host"]


def test_a_delete_during_a_read_wins(house, monkeypatch):
    """The read had begun; what it found is neither served nor copied up."""
    h = house(host=1, disk=5)
    h.put("a", "b")
    get = h.disk.get

    def slow(key):
        found = get(key)
        h.media.delete([key])
        return found

    monkeypatch.setattr(h.disk, "get", slow)
    assert not h.get("a")
    monkeypatch.undo()
    assert not h.get("a")
    assert h.where("a", "b") == ["", "host"]


def test_a_delete_during_a_demotion_wins(house, monkeypatch):
    h = house(host=1, disk=5)
    h.put("a")
    put = h.disk.put

    def slow(one, record):
        deleter = threading.Thread(target=h.media.delete, args=(["a"],))
        deleter.start()
        while "a" in h.media:
            deleter.join(0.001)
        put(one, record)  # the delete waits for us
        threads.append(deleter)

    threads: list[threading.Thread] = []
    monkeypatch.setattr(h.disk, "put", slow)
    h.put("b")
    threads[0].join()
    assert not h.get("a")
    assert not h.disk.path_of("a").exists()


def known(policy: TinyLru | Retention) -> set[str]:
    """What a policy thinks is there; it must be within the capacity."""
    if isinstance(policy, Retention):
        return set(policy)
    assert sum(held.num_bytes for held in policy.items.values()) <= policy.capacity_bytes
    return set(policy.items)


def consistent(h: House) -> None:
    """What the hierarchy, its policies and its media say is the same, and within capacity."""
    media = h.media
    for number, level in enumerate(media._levels):
        at = {key for key, entry in media._entries.items() if number in entry.at}
        held = {record.key for record in level.medium.records()}
        assert at == held == level.resident == known(level.policy), level.medium.name
    assert all(entry.at for entry in media._entries.values())
    tenants = {entry.record.item.tenant for entry in media._entries.values()}
    assert set(media._by_tenant) == tenants
    members = {m for entry in media._entries.values() for m in entry.record.members}
    assert set(media._by_member) == members


@pytest.mark.parametrize("policy", [TinyLru, Retention])
def test_many_threads_leave_it_consistent_and_see_no_wrong_payload(house, policy):
    h = house(host=3, disk=4, objects=5, policy=policy)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        seed = random.Random(number)
        try:
            for step in range(120):
                key = f"k{seed.randrange(12)}"
                match seed.randrange(10):
                    case 0:
                        h.media.delete([key, f"k{seed.randrange(12)}"])
                    case 1:
                        h.media.delete_members([f"m{seed.randrange(3)}"])
                    case 2:
                        h.media.pin(key)
                        h.media.unpin(key)
                    case 3 | 4 | 5 | 6:
                        members = [f"m{seed.randrange(3)}"]
                        h.media.put(payload(key), item(key), step, members=members)
                    case _:
                        found = h.media.get(key, step)
                        assert found is None or same(found, key)
        except BaseException as failed:  # noqa: BLE001 - told by the test's own thread
            failures.append(failed)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    consistent(h)


async def test_the_async_face_prefetches_until_its_deadline(house):
    h = house(host=2, disk=9)
    h.put(*"abcdef")
    media = AsyncMedia(h.media)
    assert await media.prefetch(["a", "b", "none"], h.now, deadline_s=30) == 2
    assert h.where("a", "b") == ["host disk", "host disk"]
    assert await media.prefetch(["c"], h.now, deadline_s=0) in (0, 1)
    assert same(await media.get("d", h.now), "d")
    assert await media.put(payload("z"), item("z"), h.now, members=["x"])
    assert await media.delete_members(["x"]) == 1
    await media.delete(["a"])
    assert await media.get("a", h.now) is None
    assert await media.delete_tenant("a") > 0
    await media.flush()
    media._threads.shutdown()


KEYS = [f"k{number}" for number in range(8)]
TENANTS = ["t", "u"]


class AnyOrder(RuleBasedStateMachine):
    """What is served was put and not deleted since, whatever the order; capacities hold."""

    @initialize(
        sizes=st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from([None, 0, 3])),
        sealed=st.booleans(),
        policy=st.sampled_from([TinyLru, Retention]),
    )
    def begin(self, sizes, sealed, policy):
        self.folder = tempfile.TemporaryDirectory()
        host, disk, objects = sizes
        self.h = House(
            Path(self.folder.name),
            host=host,
            disk=disk,
            objects=objects,
            sealed=sealed,
            policy=policy,
        )
        self.may_be_there: dict[str, tuple[str, str]] = {}

    @rule(key=st.sampled_from(KEYS), tenant=st.sampled_from(TENANTS), member=st.sampled_from("xyz"))
    def put(self, key, tenant, member):
        if key in self.may_be_there:
            tenant, member = self.may_be_there[key]  # a key is of one content
        self.h.put(key, tenant=tenant, members=(member,))
        self.may_be_there[key] = (tenant, member)

    @rule(key=st.sampled_from(KEYS))
    def get(self, key):
        assert not self.h.get(key) or key in self.may_be_there

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=3))
    def delete(self, keys):
        self.h.media.delete(keys)
        for key in keys:
            self.may_be_there.pop(key, None)

    @rule(member=st.sampled_from("xyz"))
    def delete_member(self, member):
        self.h.media.delete_members([member])
        self.may_be_there = {k: v for k, v in self.may_be_there.items() if v[1] != member}

    @rule(tenant=st.sampled_from(TENANTS))
    def delete_tenant(self, tenant):
        self.h.media.delete_tenant(tenant)
        self.may_be_there = {k: v for k, v in self.may_be_there.items() if v[0] != tenant}

    @rule()
    def restart(self):
        self.h.restart()

    @rule()
    def flush(self):
        self.h.media.flush()

    @precondition(lambda self: self.h.sizes[1] is not None)
    @rule(key=st.sampled_from(KEYS), at=st.integers(0, 10_000))
    def damage(self, key, at):
        path = self.h.disk.path_of(key)
        if path.exists():
            bad = bytearray(path.read_bytes())
            bad[at % len(bad)] ^= 1
            path.write_bytes(bad)

    @invariant()
    def holds(self):
        if hasattr(self, "h"):
            consistent(self.h)

    def teardown(self):
        if hasattr(self, "h"):
            self.h.close()
            self.folder.cleanup()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def test_what_only_the_host_holds_is_copied_down_before_it_ends(house):
    h = house(host=9, disk=9)
    h.put(*"abc")
    assert h.media.copy_down(1.0) == 3
    assert h.media.copy_down(1.0) == 0
    h.restart()
    assert all(h.get(key) for key in "abc")
