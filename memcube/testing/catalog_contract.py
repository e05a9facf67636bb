"""What the catalog must do on every engine. An engine's tests inherit ``CatalogContract`` and give
a ``catalog`` fixture: an empty, migrated catalog."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest
from sqlalchemy import event

from memcube.catalog import Added, Catalog, Change, Idempotency, KvPlace, NodeSeen, Role
from memcube.catalog.cubes import IDEMPOTENCY_KEPT_S, MAX_NESTING, MAX_SOURCES
from memcube.catalog.fence import LEASE
from memcube.catalog.schema import metadata
from memcube.cube import Draft, MemCube, Parent, Relation, Shape, Source
from memcube.errors import (
    BadRequest,
    Conflict,
    Frozen,
    IdempotencyMismatch,
    IllegalMove,
    LimitExceeded,
    NotFound,
    StaleEpoch,
    Unauthenticated,
    VersionMismatch,
)
from memcube.ids import CubeId, TenantId, uuid7
from memcube.lifecycle import Event, State

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
SECOND, DAY = timedelta(seconds=1), timedelta(days=1)
A, B = TenantId("a"), TenantId("b")
INDEX = "embedder@1"
T = TypeVar("T")


def at(seconds: float) -> datetime:
    """That many seconds after NOW."""
    return NOW + timedelta(seconds=seconds)


def add(
    catalog: Catalog, *drafts: Draft, tenant: TenantId = A, now: datetime = NOW, **rest: Any
) -> Added:
    return catalog.cubes.add(tenant, drafts, author="key", now=now, **rest)


def add_one(catalog: Catalog, text: str = "tea", *, now: datetime = NOW, **draft: Any) -> MemCube:
    tenant = draft.pop("tenant", A)
    return add(catalog, Draft(text=text, **draft), tenant=tenant, now=now).results[0].cube


def composite(catalog: Catalog, *members: CubeId, **draft: Any) -> MemCube:
    draft.setdefault("text", "")
    return add_one(catalog, shape=Shape.COMPOSITE, members=members, **draft)


def update(
    catalog: Catalog, id: CubeId, *, expected: int | None = None, now: datetime = NOW, **change: Any
) -> MemCube:
    return catalog.cubes.update(
        A, id, Change(**change), expected_version=expected, author="key", reason="edit", now=now
    )


def index(catalog: Catalog, *cubes: MemCube, version: int | None = None) -> None:
    """Note that the index holds these cubes."""
    catalog.index.mark(
        cubes[0].tenant,
        {cube.id: cube.version if version is None else version for cube in cubes},
        sizes={cube.id: 100 for cube in cubes},
        index=INDEX,
        shard=0,
        epoch=1,
        now=NOW,
    )


def pending(catalog: Catalog, *, limit: int = 100) -> list[CubeId]:
    return [c.id for c in catalog.index.pending(shard=0, before=NOW + 9 * DAY, limit=limit)]


def mark_kv(catalog: Catalog, cube: MemCube, *members: MemCube) -> list[CubeId]:
    """Note that a cube's KV, built of these members, lies on a device."""
    versions = {one.id: one.version for one in (cube, *members)}
    places = [KvPlace(medium="device", location="node-1/engine-0", size_bytes=7)]
    return catalog.kv.mark(cube.tenant, cube.id, versions, places, now=NOW)


def kv_of(catalog: Catalog, cube: MemCube) -> list[tuple[str, str, int, int]]:
    return [
        (place.medium, place.location, place.version, place.size_bytes)
        for place in catalog.cubes.residency(cube.tenant, cube.id, now=NOW)
        if place.tier == "activation"
    ]


def removals(catalog: Catalog) -> list[CubeId]:
    return [removal.id for removal in catalog.index.removals(shard=0, limit=100)]


def at_once(work: Sequence[Callable[[], T]]) -> list[T]:
    """The results of all calls, begun together on a thread each; an error of one is raised."""
    gate = threading.Barrier(len(work))

    def begin(call: Callable[[], T]) -> T:
        gate.wait()
        return call()

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(begin, work))


def explained(catalog: Catalog, how: str, *, before: str = "SELECT 1") -> list[str]:
    """The engine's plans of the queries for pending work and for removals."""
    seen: list[tuple[str, Any]] = []
    engine = catalog._database._engine

    def note(_connection: object, _cursor: object, sql: str, given: Any, *_: object) -> None:
        seen.append((sql, given))

    event.listen(engine, "before_cursor_execute", note)
    pending(catalog)
    removals(catalog)
    event.remove(engine, "before_cursor_execute", note)
    plans = []
    for sql, given in [one for one in seen if one[0].startswith("SELECT")]:
        with catalog._database.reading() as connection:
            connection.exec_driver_sql(before)
            plans.append(str(connection.exec_driver_sql(how + sql, given).all()))
    return plans


class CatalogContract:
    """Inherit, and give ``catalog``."""

    @pytest.fixture(autouse=True)
    def two_tenants(self, catalog: Catalog) -> None:
        for tenant in (A, B):
            catalog.access.ensure_tenant(tenant, shards=1, now=NOW)

    # -- tenants, keys, leases -----------------------------------------------------------------

    def test_a_tenant_keeps_the_shard_it_was_created_on(self, catalog: Catalog):
        made = catalog.access.ensure_tenant("acme", shards=8, now=NOW)
        assert catalog.access.ensure_tenant("acme", shards=3, now=at(5)) == made
        assert 0 <= made.shard < 8
        assert [t.id for t in catalog.access.tenants()] == ["a", "acme", "b"]

    @pytest.mark.parametrize(
        "name", ["", "A", "_a", "a/b", "a b", "a&b", "a" * 64, "ä", "a\n", "a\x00", "a%2fb"]
    )
    def test_a_tenant_name_outside_the_alphabet_is_refused(self, catalog: Catalog, name: str):
        with pytest.raises(BadRequest):
            catalog.access.ensure_tenant(name, shards=1, now=NOW)

    def test_many_threads_make_one_tenant(self, catalog: Catalog):
        made = at_once(
            [lambda: catalog.access.ensure_tenant("new", shards=4, now=NOW) for _ in range(8)]
        )
        assert len(set(made)) == 1

    def test_a_key_tells_its_tenant_role_and_shard(self, catalog: Catalog):
        info, secret = self._key(catalog, role=Role.WRITER)
        principal = catalog.access.authenticate(secret, now=NOW)
        assert (principal.tenant, principal.role, principal.key_id) == (A, Role.WRITER, info.id)
        assert principal.shard == 0
        assert secret.startswith("mk_")
        assert secret.endswith(info.hint)
        assert catalog.access.keys(A) == [info]
        assert catalog.access.keys(B) == []

    def test_the_secret_itself_is_not_stored(self, catalog: Catalog):
        _, secret = self._key(catalog)
        with catalog._database.reading() as connection:
            rows = connection.exec_driver_sql("SELECT * FROM api_keys").all()
        assert secret not in str(rows)

    @pytest.mark.parametrize("secret", ["", "mk_", "mk_unknown", "\x00", "\ud800", "ä" * 9999])
    def test_an_unknown_secret_is_unauthenticated(self, catalog: Catalog, secret: str):
        self._key(catalog)
        with pytest.raises(Unauthenticated):
            catalog.access.authenticate(secret, now=NOW)

    def test_an_expired_key_is_unauthenticated(self, catalog: Catalog):
        _, secret = self._key(catalog, expires_at=at(10))
        catalog.access.authenticate(secret, now=at(9.999999))
        with pytest.raises(Unauthenticated):
            catalog.access.authenticate(secret, now=at(10))

    def test_a_revoked_key_is_unauthenticated_at_once(self, catalog: Catalog):
        info, secret = self._key(catalog)
        catalog.access.revoke_key(A, info.id, now=at(1))
        catalog.access.revoke_key(A, info.id, now=at(2))
        with pytest.raises(Unauthenticated):
            catalog.access.authenticate(secret, now=at(1))
        assert catalog.access.keys(A)[0].revoked_at == at(1)

    def test_another_tenants_key_cannot_be_revoked(self, catalog: Catalog):
        info, secret = self._key(catalog)
        with pytest.raises(NotFound):
            catalog.access.revoke_key(B, info.id, now=NOW)
        catalog.access.authenticate(secret, now=NOW)

    def test_a_key_needs_a_tenant_that_exists(self, catalog: Catalog):
        with pytest.raises(NotFound):
            self._key(catalog, tenant=TenantId("nobody"))

    def test_a_role_allows_the_smaller_ones(self):
        assert Role.ADMIN.allows(Role.READER)
        assert Role.WRITER.allows(Role.WRITER)
        assert not Role.READER.allows(Role.WRITER)

    def test_a_lease_is_held_by_one_and_passes_on_with_a_new_epoch(self, catalog: Catalog):
        first = catalog.leases.acquire("scheduler", "x", now=NOW, ttl_s=10)
        with pytest.raises(Conflict):
            catalog.leases.acquire("scheduler", "y", now=at(9), ttl_s=10)
        assert catalog.leases.renew(first, now=at(5), ttl_s=10).expires_at == at(15)
        second = catalog.leases.acquire("scheduler", "y", now=at(15), ttl_s=10)
        assert second.epoch == first.epoch + 1
        with pytest.raises(StaleEpoch):
            catalog.leases.renew(first, now=at(15), ttl_s=10)

    def test_what_became_of_nodes_shards_and_the_lead_is_logged(self, catalog: Catalog):
        epoch = catalog.leases.acquire(LEASE, "x", now=NOW, ttl_s=10).epoch
        catalog.leases.acquire("another", "x", now=NOW, ttl_s=10)
        book, log = catalog.shards, catalog.cluster_log
        alone = [NodeSeen(name="a", labels={}, alive=True)]
        book.note_nodes(alone, leader=epoch, now=at(1))
        for n, is_up in enumerate((True, False, True), 2):
            seen = [*alone, NodeSeen(name="b", labels={}, alive=is_up)]
            book.note_nodes(seen, leader=epoch, now=at(n))
        book.drain("b", True, now=at(5))
        book.drain("b", True, now=at(6))
        book.opened(0, node="a", location="x", epoch=2, now=at(7))
        book.opened(0, node="b", location="y", epoch=1, now=at(8))  # it is late
        book.note_nodes(alone, leader=epoch, now=at(9))
        book.forget_node("b", now=at(10))
        told = [(str(one.kind), one.node, one.at) for one in reversed(log.page())]
        assert told == [
            ("leader", "", NOW),
            ("node_up", "a", at(1)),
            ("node_up", "b", at(2)),
            ("node_down", "b", at(3)),
            ("node_up", "b", at(4)),
            ("node_drains", "b", at(5)),
            ("shard_opened", "a", at(7)),
            ("node_down", "b", at(9)),
            ("node_forgotten", "b", at(10)),
        ]
        newest, older = log.page(limit=2)
        assert log.page(before=newest.id, limit=1) == [older]
        assert log.get(older.id).reason == "it left, as it was to drain"
        with pytest.raises(NotFound):
            log.get("nothing")
        assert log.prune(before=at(5)) == 5
        assert len(log.page()) == 4

    def test_a_lease_is_told_as_it_is_noted(self, catalog: Catalog):
        assert catalog.leases.get("l") is None
        assert catalog.leases.epoch("l") == 0
        held = catalog.leases.acquire("l", "one", now=NOW, ttl_s=10)
        assert catalog.leases.get("l") == held
        held = catalog.leases.renew(held, now=at(60), ttl_s=10)
        assert catalog.leases.get("l") == held

    def test_a_released_lease_is_free_at_once(self, catalog: Catalog):
        first = catalog.leases.acquire("scheduler", "x", now=NOW, ttl_s=10)
        catalog.leases.release(first)
        assert catalog.leases.acquire("scheduler", "y", now=NOW, ttl_s=10).epoch > first.epoch

    def test_of_many_that_race_for_a_lease_one_wins(self, catalog: Catalog):
        def take(holder: str) -> bool:
            try:
                catalog.leases.acquire("scheduler", holder, now=NOW, ttl_s=10)
            except Conflict:
                return False
            return True

        won = at_once([lambda n=n: take(f"holder {n}") for n in range(8)])
        assert won.count(True) == 1

    def test_epochs_of_racing_starts_are_all_different(self, catalog: Catalog):
        epochs = at_once([lambda: catalog.leases.next_epoch("shard/0", "pid") for _ in range(8)])
        assert sorted(epochs) == list(range(1, 9))

    # -- add -----------------------------------------------------------------------------------

    def test_a_cube_reads_back_as_it_was_added(self, catalog: Catalog):
        source = Source(
            ref="D1:3", role="user", speaker="Ann", time=at(0.000001), text="I like tea"
        )
        made = add_one(
            catalog,
            "I like tea\n\U0001f375",
            user_id="u",
            agent_id="g",
            run_id="r",
            role="user",
            speaker="Ann",
            tags=("x", "y"),
            metadata={"n": 1, "f": 0.5, "deep": {"list": [None, True, "ü"]}},
            event_time=at(-0.000001),
            sources=(source,),
            threaded=True,
            priority=-3,
            expires_at=at(99),
        )
        read = catalog.cubes.get(A, made.id, now=at(1))
        assert read == made
        assert read.version == 1
        assert read.state is State.GENERATED
        assert read.descriptive.sources == (source,)
        assert read.descriptive.created_at == read.updated_at == NOW
        assert read.governance.owner == "key"
        assert not read.indexed

    def test_messages_take_consecutive_places_in_the_thread_of_their_scope(self, catalog: Catalog):
        one = add(catalog, *self._talk("a", "b"), *self._talk("other", run_id="2"))
        two = add(catalog, *self._talk("c"), Draft(text="a fact", user_id="u", run_id="1"))
        places = [r.cube.descriptive for r in (*one.results, *two.results)]
        assert [d.seq for d in places] == [0, 1, 0, 2, None]
        assert places[0].thread == places[1].thread == places[3].thread
        assert len({d.thread for d in places}) == 3

    def test_many_threads_of_writers_leave_a_message_stream_without_gaps(self, catalog: Catalog):
        added = at_once(
            [
                lambda n=n: [add(catalog, *self._talk(f"{n} {i}", f"{n} {i}b")) for i in range(6)]
                for n in range(20)
            ]
        )
        cubes = [r.cube for adds in added for one in adds for r in one.results]
        assert sorted(c.descriptive.seq or 0 for c in cubes) == list(range(240))

    def test_an_exact_repeat_is_counted_and_takes_no_place(self, catalog: Catalog):
        first, again, other = add(
            catalog, *self._talk("hello", "  hello ", "bye", refs=("1", "2", "3"))
        ).results
        assert [first.event, again.event, other.event] == ["added", "repeated", "added"]
        assert again.cube.id == first.cube.id
        assert other.cube.descriptive.seq == 1
        third = add(catalog, *self._talk("hello", refs=("4",)), now=at(5)).results[0]
        assert third.event == "repeated"
        read = catalog.cubes.get(A, first.cube.id, now=at(5))
        assert read.usage.repeats == 3
        assert read.version == 1
        assert [s.ref for s in read.descriptive.sources] == ["1", "2", "4"]

    def test_a_repeat_keeps_a_bounded_number_of_sources(self, catalog: Catalog):
        made = [
            add(catalog, *self._talk("hello", refs=(str(n),))).results[0].cube
            for n in range(MAX_SOURCES + 5)
        ]
        assert len(catalog.cubes.get(A, made[-1].id, now=NOW).descriptive.sources) == MAX_SOURCES

    @pytest.mark.parametrize(
        ("first", "second", "wins"),
        [(10, 20, 20), (20, 10, 20), (10, None, None), (None, 10, None)],
    )
    def test_the_later_expiry_of_repeats_wins(
        self, catalog: Catalog, first: int | None, second: int | None, wins: int | None
    ):
        def until(seconds: int | None) -> datetime | None:
            return None if seconds is None else at(seconds)

        add_one(catalog, expires_at=until(first))
        again = add_one(catalog, expires_at=until(second))
        assert again.governance.expires_at == until(wins)
        assert catalog.cubes.get(A, again.id, now=NOW).governance.expires_at == until(wins)

    def test_a_repeat_of_a_frozen_cube_is_counted_but_changes_no_sources(self, catalog: Catalog):
        made = add(catalog, *self._talk("hello", refs=("1",))).results[0].cube
        catalog.cubes.set_frozen(A, made.id, True, now=NOW)
        again = add(catalog, *self._talk("hello", refs=("2",))).results[0].cube
        assert again.usage.repeats == 2
        assert [s.ref for s in again.descriptive.sources] == ["1"]

    @pytest.mark.parametrize(
        "other",
        [
            {"user_id": "v"},
            {"agent_id": "g"},
            {"run_id": "r"},
            {"speaker": "Bob"},
            {"role": "user"},
            {"text": "Tea"},
            {"tenant": B},
        ],
    )
    def test_the_same_text_elsewhere_is_another_cube(self, catalog: Catalog, other: dict):
        described: dict[str, Any] = {"text": "tea", "user_id": "u"}
        one = add_one(catalog, **described)
        two = add_one(catalog, **(described | other))
        assert one.id != two.id

    def test_the_text_of_a_cube_that_is_gone_is_no_repeat(self, catalog: Catalog):
        archived = add_one(catalog, "one")
        catalog.cubes.transition(A, archived.id, Event.ARCHIVE, author="key", now=NOW)
        expired = add_one(catalog, "two", expires_at=at(1))
        deleted = add_one(catalog, "three")
        catalog.cubes.delete(A, deleted.id, now=NOW)
        again = [add_one(catalog, text, now=at(1)).id for text in ("one", "two", "three")]
        assert not set(again) & {archived.id, expired.id, deleted.id}

    def test_one_of_many_same_texts_at_once_is_stored(self, catalog: Catalog):
        added = at_once([lambda: add_one(catalog, "same") for _ in range(8)])
        assert len({cube.id for cube in added}) == 1
        assert catalog.cubes.get(A, added[0].id, now=NOW).usage.repeats == 8

    def test_an_add_that_fails_leaves_nothing(self, catalog: Catalog):
        broken = Draft(text="", shape=Shape.COMPOSITE, members=(uuid7(NOW),))
        with pytest.raises(NotFound):
            add(catalog, Draft(text="tea"), broken, idempotency=Idempotency(key="k", body_hash="h"))
        assert self._all(catalog) == []
        assert catalog.cubes.replayed(A, Idempotency(key="k", body_hash="other"), now=NOW) is None

    @pytest.mark.parametrize(
        "draft",
        [
            {"text": "a\x00b"},
            {"user_id": "\x00"},
            {"tags": ("\x00",)},
            {"speaker": "a\x00"},
            {"text": "\ud800"},
            {"tags": ("\udfff",)},
            {"metadata": {"n": float("nan")}},
            {"metadata": {"n": float("inf")}},
        ],
        ids=repr,
    )
    def test_what_one_engine_cannot_hold_is_refused_by_all(self, catalog: Catalog, draft: dict):
        described: dict[str, Any] = {"text": "tea"} | draft
        with pytest.raises(BadRequest):
            add_one(catalog, **described)
        assert self._all(catalog) == []

    def test_a_text_of_a_million_characters_reads_back(self, catalog: Catalog):
        text = "日本" * 500_000
        assert catalog.cubes.get(A, add_one(catalog, text).id, now=NOW).text == text

    # -- idempotency ---------------------------------------------------------------------------

    def test_a_retry_answers_as_the_first_time_and_changes_nothing(self, catalog: Catalog):
        key = Idempotency(key="key 1", body_hash="hash")
        drafts = self._talk("one", "one", "two")
        first = add(catalog, *drafts, idempotency=key, groups=(2, 1))
        again = add(catalog, *drafts, idempotency=key, groups=(2, 1), now=at(60))
        assert not first.replayed
        assert again.replayed
        assert again.groups == first.groups == (2, 1)
        assert self._outcome(again) == self._outcome(first)
        assert catalog.cubes.get(A, first.results[0].cube.id, now=NOW).usage.repeats == 2
        assert catalog.cubes.replayed(A, key, now=NOW) == again

    def test_a_retry_answers_the_same_after_updates_and_deletes(self, catalog: Catalog):
        key = Idempotency(key="key 1", body_hash="hash")
        first = add(catalog, Draft(text="one"), Draft(text="two"), idempotency=key)
        update(catalog, first.results[0].cube.id, text="changed")
        catalog.cubes.delete(A, first.results[1].cube.id, now=NOW)
        again = add(catalog, Draft(text="one"), Draft(text="two"), idempotency=key)
        assert again.replayed
        assert self._outcome(again) == self._outcome(first)
        assert again.results[0].cube.text == "one"
        assert again.results[1].cube.text == ""
        assert len(self._all(catalog)) == 1

    def test_a_retry_tells_a_composite_as_it_was_made(self, catalog: Catalog):
        key = Idempotency(key="key 1", body_hash="hash")
        one, two = add_one(catalog, "1").id, add_one(catalog, "2").id
        draft = Draft(text="both", shape=Shape.COMPOSITE, members=(one, two), tags=("x",))
        made = add(catalog, draft, idempotency=key).results[0].cube
        update(catalog, made.id, members=(two,), tags=(), metadata={"n": 1}, now=at(5))
        again = add(catalog, draft, idempotency=key, now=at(9)).results[0].cube
        assert again == made

    def test_a_key_with_another_body_is_refused(self, catalog: Catalog):
        add(catalog, Draft(text="one"), idempotency=Idempotency(key="k", body_hash="h"))
        with pytest.raises(IdempotencyMismatch):
            add(catalog, Draft(text="two"), idempotency=Idempotency(key="k", body_hash="g"))
        with pytest.raises(IdempotencyMismatch):
            catalog.cubes.replayed(A, Idempotency(key="k", body_hash="g"), now=NOW)
        assert len(self._all(catalog)) == 1

    def test_a_key_is_the_tenants_own(self, catalog: Catalog):
        key = Idempotency(key="k", body_hash="h")
        one = add(catalog, Draft(text="one"), idempotency=key)
        two = add(catalog, Draft(text="one"), tenant=B, idempotency=key)
        assert not two.replayed
        assert one.results[0].cube.id != two.results[0].cube.id

    def test_retries_at_once_have_one_effect(self, catalog: Catalog):
        key = Idempotency(key="k", body_hash="h")
        drafts = self._talk("one", "two")
        added = at_once([lambda: add(catalog, *drafts, idempotency=key) for _ in range(8)])
        assert [one.replayed for one in added].count(False) == 1
        assert len({str(self._outcome(one)) for one in added}) == 1
        assert {c.usage.repeats for c in self._all(catalog)} == {1}

    def test_retry_keys_are_kept_for_two_days(self, catalog: Catalog):
        key = Idempotency(key="k", body_hash="h")
        add(catalog, Draft(text="one"), idempotency=key)
        assert catalog.cubes.prune(now=at(IDEMPOTENCY_KEPT_S)) == 0
        assert catalog.cubes.prune(now=at(IDEMPOTENCY_KEPT_S + 1)) == 1
        assert not add(catalog, Draft(text="one"), idempotency=key, now=at(9e5)).replayed

    # -- read ----------------------------------------------------------------------------------

    def test_unknown_foreign_deleted_and_expired_ids_read_alike(self, catalog: Catalog):
        foreign = add_one(catalog, tenant=B).id
        deleted = add_one(catalog, "deleted").id
        catalog.cubes.delete(A, deleted, now=NOW)
        expired = add_one(catalog, "expired", expires_at=at(1)).id
        swept = add_one(catalog, "swept", expires_at=at(1), user_id="u").id
        for id in (uuid7(NOW), foreign, deleted, expired, swept, CubeId("no uuid")):
            for call in self._calls_on(catalog, id, now=at(1)):
                with pytest.raises(NotFound) as refused:
                    call()
                assert refused.value.args == ("cube", id)
        assert catalog.cubes.get(B, foreign, now=NOW).text == "tea"

    def test_many_are_read_in_the_order_asked(self, catalog: Catalog):
        one, two, three = (add_one(catalog, text).id for text in ("1", "2", "3"))
        foreign = add_one(catalog, tenant=B).id
        asked = [three, uuid7(NOW), one, foreign, two]
        assert [c.id for c in catalog.cubes.get_many(A, asked, now=NOW)] == [three, one, two]

    def test_pages_go_from_new_to_old_and_hold_each_cube_once(self, catalog: Catalog):
        made = [add_one(catalog, f"{n}", now=at(n)).id for n in range(25)]
        seen: list[CubeId] = []
        cursor, pages = None, 0
        while True:
            pages += 1
            page = catalog.cubes.find(A, now=at(30), limit=10, cursor=cursor)
            seen += [c.id for c in page.cubes]
            cursor = page.next_cursor
            if cursor is None:
                break
        assert seen == made[::-1]
        assert pages == 3

    def test_a_page_keeps_the_order_of_one_call(self, catalog: Catalog):
        made = [r.cube.id for r in add(catalog, *(Draft(text=f"{n}") for n in range(40))).results]
        assert [c.id for c in catalog.cubes.find(A, now=NOW, limit=50).cubes] == made[::-1]

    def test_a_page_that_ends_exactly_has_no_next(self, catalog: Catalog):
        for n in range(4):
            add_one(catalog, f"{n}")
        assert catalog.cubes.find(A, now=NOW, limit=4).next_cursor is None

    @pytest.mark.parametrize(
        "where",
        [
            {"user_id": "u"},
            {"agent_id": "g"},
            {"run_id": "r"},
            {"kind": "fact"},
            {"tag": "x"},
            {"state": "archived"},
            {"user_id": "u", "tag": "x"},
        ],
        ids=repr,
    )
    def test_a_list_is_narrowed_by_its_conditions(self, catalog: Catalog, where: dict):
        wanted = add_one(catalog, "one", user_id="u", agent_id="g", run_id="r", tags=("x", "y"))
        update_kind = Draft(text="two", kind=type(wanted.descriptive.kind)("fact"))
        fact = add(catalog, update_kind).results[0].cube
        archived = add_one(catalog, "three", user_id="v", tags=("z",))
        catalog.cubes.transition(A, archived.id, Event.ARCHIVE, author="key", now=NOW)
        add_one(catalog, "one", tenant=B, user_id="u", tags=("x",))
        found = [c.id for c in catalog.cubes.find(A, now=NOW, limit=10, **where).cubes]
        expected = {"kind": fact, "state": archived}.get(next(iter(where)), wanted)
        assert found == [expected.id]

    @pytest.mark.parametrize("cursor", ["", "!", "é", "AAAA", "eHg", "%00", "a" * 5000])
    def test_a_made_up_cursor_is_refused(self, catalog: Catalog, cursor: str):
        with pytest.raises(BadRequest):
            catalog.cubes.find(A, now=NOW, limit=10, cursor=cursor)
        whole = composite(catalog, add_one(catalog).id)
        with pytest.raises(BadRequest):
            catalog.cubes.members(A, whole.id, now=NOW, limit=10, cursor=cursor)

    def test_live_versions_leave_out_what_a_search_may_not_return(self, catalog: Catalog):
        live, archived, deleted = (add_one(catalog, text).id for text in "123")
        expired = add_one(catalog, "4", expires_at=at(1)).id
        foreign = add_one(catalog, "5", tenant=B).id
        catalog.cubes.transition(A, archived, Event.ARCHIVE, author="key", now=NOW)
        catalog.cubes.delete(A, deleted, now=NOW)
        asked = [live, archived, deleted, expired, foreign]
        assert catalog.cubes.live_versions(A, asked, now=at(1)) == {live: 1}
        assert catalog.cubes.live_versions(A, [], now=NOW) == {}

    def test_live_versions_are_told_of_more_cubes_than_a_statement_takes(self, catalog: Catalog):
        live = add_one(catalog).id
        asked = [CubeId(f"orphan-{n}") for n in range(66_000)]
        assert catalog.cubes.live_versions(A, [*asked, live], now=NOW) == {live: 1}

    # -- versions ------------------------------------------------------------------------------

    def test_an_update_is_a_new_version_and_the_old_ones_stay_readable(self, catalog: Catalog):
        made = add_one(catalog, "v1", tags=("x",), metadata={"n": 1})
        second = update(catalog, made.id, text="v2", now=at(10))
        third = update(catalog, made.id, tags=("y",), metadata={"n": 2}, now=at(20))
        assert (second.version, third.version) == (2, 3)
        get = catalog.cubes.get
        assert get(A, made.id, now=at(30)) == third
        assert third.text == "v2"
        old = get(A, made.id, now=at(30), version=1)
        assert (old.text, old.descriptive.tags, old.version) == ("v1", ("x",), 1)
        assert old.updated_at == NOW
        assert [get(A, made.id, now=at(30), as_of=at(s)).version for s in (0, 9, 10, 19.9, 25)] == [
            *(1, 1, 2, 2, 3)
        ]
        history = catalog.cubes.history(A, made.id, now=at(30))
        assert [v.version for v in history] == [1, 2, 3]
        assert [v.text for v in history] == ["v1", "v2", "v2"]
        assert [v.reason for v in history] == ["add", "edit", "edit"]
        assert [v.created_at for v in history] == [NOW, at(10), at(20)]

    @pytest.mark.parametrize("which", [{"version": 2}, {"version": 0}, {"as_of": at(-1)}])
    def test_a_version_that_is_not_there_is_not_found(self, catalog: Catalog, which: dict):
        made = add_one(catalog)
        with pytest.raises(NotFound):
            catalog.cubes.get(A, made.id, now=NOW, **which)

    def test_an_update_to_the_same_content_changes_nothing(self, catalog: Catalog):
        made = add_one(catalog, "tea", tags=("x",), metadata={"n": 1})
        index(catalog, made)
        same = update(catalog, made.id, text="tea", tags=("x",), metadata={"n": 1}, now=at(5))
        assert same == catalog.cubes.get(A, made.id, now=NOW)
        assert same.version == 1
        assert same.indexed
        assert len(catalog.cubes.history(A, made.id, now=NOW)) == 1

    def test_an_update_from_an_older_version_is_refused(self, catalog: Catalog):
        made = add_one(catalog)
        update(catalog, made.id, text="2", expected=1)
        with pytest.raises(VersionMismatch) as refused:
            update(catalog, made.id, text="3", expected=1)
        assert refused.value.current == 2

    def test_of_racing_updates_from_one_version_one_wins(self, catalog: Catalog):
        made = add_one(catalog)

        def change(n: int) -> bool:
            try:
                update(catalog, made.id, text=f"text {n}", expected=1)
            except VersionMismatch:
                return False
            return True

        assert at_once([lambda n=n: change(n) for n in range(8)]).count(True) == 1
        assert len(catalog.cubes.history(A, made.id, now=NOW)) == 2

    def test_racing_updates_each_make_a_version(self, catalog: Catalog):
        made = add_one(catalog)
        at_once([lambda n=n: update(catalog, made.id, text=f"text {n}") for n in range(8)])
        history = catalog.cubes.history(A, made.id, now=NOW)
        assert [v.version for v in history] == list(range(1, 10))
        assert catalog.cubes.get(A, made.id, now=NOW).text == history[-1].text

    def test_repeats_follow_the_changed_text(self, catalog: Catalog):
        made = add_one(catalog, "tea")
        update(catalog, made.id, text="coffee")
        assert add_one(catalog, "coffee").id == made.id
        assert add_one(catalog, "tea").id != made.id

    def test_an_update_to_the_text_of_another_cube_keeps_both(self, catalog: Catalog):
        one, two = add_one(catalog, "tea"), add_one(catalog, "coffee")
        changed = update(catalog, two.id, text="tea")
        assert changed.text == "tea"
        assert add_one(catalog, "tea").id == one.id
        assert {c.id for c in self._all(catalog)} == {one.id, two.id}

    def test_an_expiry_can_be_set_and_taken_away_without_a_version(self, catalog: Catalog):
        made = add_one(catalog)
        assert update(catalog, made.id, expires_at=at(5)).governance.expires_at == at(5)
        never = update(catalog, made.id, expires_at=None)
        assert never.governance.expires_at is None
        assert never.version == 1

    def test_a_rollback_is_a_new_version_with_the_old_content(self, catalog: Catalog):
        made = add_one(catalog, "v1", tags=("x",))
        update(catalog, made.id, text="v2", tags=("y",))
        back = catalog.cubes.rollback(A, made.id, 1, author="key", now=at(9))
        assert (back.version, back.text, back.descriptive.tags) == (3, "v1", ("x",))
        assert catalog.cubes.find(A, now=at(9), limit=5, tag="x").cubes == [back]
        assert catalog.cubes.find(A, now=at(9), limit=5, tag="y").cubes == []
        assert catalog.cubes.history(A, made.id, now=at(9))[-1].reason == "rollback to 1"
        with pytest.raises(NotFound):
            catalog.cubes.rollback(A, made.id, 9, author="key", now=at(9))

    def test_a_clock_that_goes_back_leaves_the_chain_in_order(self, catalog: Catalog):
        made = add_one(catalog, "v1", now=at(100))
        changed = update(catalog, made.id, text="v2", now=at(50))
        assert changed.updated_at == at(100)
        assert catalog.cubes.get(A, made.id, now=at(50), as_of=at(100)).text == "v2"

    # -- lifecycle -----------------------------------------------------------------------------

    def test_a_restored_cube_is_a_new_version_of_the_same_content(self, catalog: Catalog):
        made = add_one(catalog)
        archived = self._event(catalog, made.id, Event.ARCHIVE)
        assert archived.state is State.ARCHIVED
        assert archived.version == 1
        with pytest.raises(IllegalMove):
            update(catalog, made.id, text="new")
        restored = self._event(catalog, made.id, Event.RESTORE)
        assert (restored.state, restored.version, restored.text) == (State.ACTIVATED, 2, "tea")
        assert catalog.cubes.history(A, made.id, now=NOW)[-1].reason == "restore"
        assert add_one(catalog, "tea").id == made.id

    def test_a_restored_cube_whose_text_came_again_stays_beside_it(self, catalog: Catalog):
        first = add_one(catalog)
        self._event(catalog, first.id, Event.ARCHIVE)
        second = add_one(catalog)
        self._event(catalog, first.id, Event.RESTORE)
        assert add_one(catalog).id == second.id
        assert len(self._all(catalog)) == 2

    def test_a_move_outside_the_table_is_refused(self, catalog: Catalog):
        made = add_one(catalog)
        with pytest.raises(IllegalMove):
            self._event(catalog, made.id, Event.RESTORE)
        assert catalog.cubes.get(A, made.id, now=NOW) == made

    @pytest.mark.parametrize("event", [Event.DELETE, Event.EXPIRE, Event.USE, Event.UPDATE])
    def test_moves_that_have_a_method_of_their_own_are_refused_as_transitions(
        self, catalog: Catalog, event: Event
    ):
        made = add_one(catalog)
        with pytest.raises(BadRequest):
            self._event(catalog, made.id, event)
        assert catalog.cubes.get(A, made.id, now=NOW) == made

    def test_a_frozen_cube_refuses_every_change_until_it_is_thawed(self, catalog: Catalog):
        made, other = add_one(catalog), add_one(catalog, "other")
        assert catalog.cubes.set_frozen(A, made.id, True, now=NOW).governance.frozen
        catalog.cubes.set_frozen(A, made.id, True, now=NOW)
        fused = Draft(text="both")
        for call in (
            lambda: update(catalog, made.id, text="new"),
            lambda: catalog.cubes.rollback(A, made.id, 1, author="key", now=NOW),
            lambda: catalog.cubes.delete(A, made.id, now=NOW),
            lambda: catalog.cubes.delete_scope(
                A, user_id=None, agent_id=None, run_id=None, now=NOW
            ),
            lambda: self._event(catalog, made.id, Event.ARCHIVE),
            lambda: self._event(catalog, made.id, Event.MERGE),
            lambda: catalog.cubes.fuse(A, [other.id, made.id], fused, author="key", now=NOW),
        ):
            with pytest.raises(Frozen):
                call()
        assert {c.text for c in self._all(catalog)} == {"tea", "other"}
        assert {c.state for c in self._all(catalog)} == {State.GENERATED}
        catalog.cubes.set_frozen(A, made.id, False, now=NOW)
        catalog.cubes.delete(A, made.id, now=NOW)

    # -- composites, fusion, lineage -----------------------------------------------------------

    def test_members_keep_their_order_and_come_in_pages(self, catalog: Catalog):
        ids = [add_one(catalog, f"{n}").id for n in range(7)]
        order = (ids[3], *ids[:3], *ids[4:])
        whole = composite(catalog, *order)
        assert catalog.cubes.get(A, whole.id, now=NOW).members == order
        seen, cursor = [], None
        while True:
            page = catalog.cubes.members(A, whole.id, now=NOW, limit=3, cursor=cursor)
            seen += [c.id for c in page.cubes]
            if (cursor := page.next_cursor) is None:
                break
        assert tuple(seen) == order

    def test_a_member_must_be_the_tenants_own(self, catalog: Catalog):
        foreign = add_one(catalog, tenant=B).id
        with pytest.raises(NotFound):
            composite(catalog, foreign)
        whole = composite(catalog, add_one(catalog).id)
        with pytest.raises(NotFound):
            update(catalog, whole.id, members=(foreign,))

    def test_a_parent_must_be_the_tenants_own(self, catalog: Catalog):
        foreign = add_one(catalog, tenant=B).id
        edge = Parent(id=foreign, version=1, relation=Relation.DERIVED)
        with pytest.raises(NotFound):
            add_one(catalog, "child", parents=(edge,))

    def test_a_composite_cannot_hold_itself_at_any_depth(self, catalog: Catalog):
        inner = composite(catalog, add_one(catalog).id)
        middle = composite(catalog, inner.id)
        outer = composite(catalog, middle.id)
        for members in ((inner.id,), (outer.id,)):
            with pytest.raises(BadRequest):
                update(catalog, inner.id, members=members)
        assert catalog.cubes.get(A, inner.id, now=NOW).version == 1

    def test_composites_nest_to_a_stated_depth_from_above_and_below(self, catalog: Catalog):
        bottom = chain = [composite(catalog, add_one(catalog).id)]
        while len(chain) < MAX_NESTING:
            chain.append(composite(catalog, chain[-1].id))
        with pytest.raises(LimitExceeded):
            composite(catalog, chain[-1].id)
        with pytest.raises(LimitExceeded):
            update(catalog, bottom[0].id, members=(composite(catalog, add_one(catalog).id).id,))
        assert catalog.cubes.get(A, bottom[0].id, now=NOW).version == 1
        update(catalog, bottom[0].id, members=(add_one(catalog, "other").id,))

    def test_a_leaf_takes_no_members(self, catalog: Catalog):
        one, two = add_one(catalog, "1"), add_one(catalog, "2")
        with pytest.raises(BadRequest):
            update(catalog, one.id, members=(two.id,))

    def test_new_members_are_a_new_version_and_the_old_list_stays(self, catalog: Catalog):
        one, two = add_one(catalog, "1").id, add_one(catalog, "2").id
        whole = composite(catalog, one)
        assert update(catalog, whole.id, members=(two, one), now=at(1)).version == 2
        assert catalog.cubes.get(A, whole.id, now=at(1), version=1).members == (one,)
        back = catalog.cubes.rollback(A, whole.id, 1, author="key", now=at(2))
        assert back.members == (one,)

    def test_a_deleted_member_leaves_its_composites(self, catalog: Catalog):
        one, two = add_one(catalog, "1").id, add_one(catalog, "2").id
        whole = composite(catalog, one, two, one)
        catalog.cubes.delete(A, one, now=NOW)
        assert catalog.cubes.get(A, whole.id, now=NOW).members == (two,)
        page = catalog.cubes.members(A, whole.id, now=NOW, limit=10)
        assert [c.id for c in page.cubes] == [two]
        again = update(catalog, whole.id, members=(two, add_one(catalog, "3").id))
        assert len(again.members) == 2

    def test_a_rollback_leaves_out_members_that_are_gone(self, catalog: Catalog):
        one, two = add_one(catalog, "1").id, add_one(catalog, "2").id
        whole = composite(catalog, one, two)
        update(catalog, whole.id, members=(two,))
        catalog.cubes.delete(A, one, now=NOW)
        update(catalog, whole.id, members=())
        assert catalog.cubes.rollback(A, whole.id, 1, author="key", now=NOW).members == (two,)

    def test_expanding_a_composite_names_all_below_it_once(self, catalog: Catalog):
        leaf, other = add_one(catalog, "1").id, add_one(catalog, "2").id
        inner = composite(catalog, leaf, other)
        outer = composite(catalog, inner.id, leaf)
        found = catalog.cubes.expand(A, [outer.id], now=NOW, limit=10)
        assert found == [outer.id, inner.id, leaf, other]
        with pytest.raises(BadRequest):
            catalog.cubes.expand(A, [outer.id], now=NOW, limit=3)

    def test_fusing_makes_one_cube_and_merges_its_parents(self, catalog: Catalog):
        one, two = add_one(catalog, "1"), add_one(catalog, "2")
        two = update(catalog, two.id, text="2b")
        fused = self._fuse(catalog, one, two)
        states = {c.id: c.state for c in self._all(catalog)}
        assert states == {
            one.id: State.MERGED,
            two.id: State.MERGED,
            fused.id: State.GENERATED,
        }
        assert {(p.id, p.version) for p in fused.parents} == {(one.id, 1), (two.id, 2)}
        lineage = catalog.cubes.lineage(A, fused.id, now=NOW)
        assert {(e.id, e.version, e.child) for e in lineage.ancestors} == {
            (one.id, 1, fused.id),
            (two.id, 2, fused.id),
        }
        assert lineage.descendants == []
        below = catalog.cubes.lineage(A, one.id, now=NOW).descendants
        assert [(e.child, e.relation) for e in below] == [(fused.id, Relation.FUSED)]

    def test_a_fusion_whose_text_is_already_there_is_a_cube_of_its_own(self, catalog: Catalog):
        present = add_one(catalog, "both")
        one, two = add_one(catalog, "1"), add_one(catalog, "2")
        fused = self._fuse(catalog, one, two)
        assert fused.id != present.id
        assert len(catalog.cubes.lineage(A, fused.id, now=NOW).ancestors) == 2

    def test_a_retried_fusion_has_one_effect(self, catalog: Catalog):
        one, two = add_one(catalog, "1"), add_one(catalog, "2")
        key = Idempotency(key="k", body_hash="h")
        first = self._fuse(catalog, one, two, idempotency=key)
        assert self._fuse(catalog, one, two, idempotency=key).id == first.id
        assert len(self._all(catalog)) == 3

    def test_a_fusion_with_a_foreign_cube_changes_nothing(self, catalog: Catalog):
        one, foreign = add_one(catalog, "1"), add_one(catalog, "2", tenant=B)
        with pytest.raises(NotFound):
            self._fuse(catalog, one, foreign)
        assert catalog.cubes.get(A, one.id, now=NOW).state is State.GENERATED

    def test_lineage_goes_all_the_way_and_survives_deletion(self, catalog: Catalog):
        chain = [add_one(catalog, "0")]
        for n in range(1, 30):
            edge = Parent(id=chain[-1].id, version=1, relation=Relation.DERIVED)
            chain.append(add_one(catalog, f"{n}", parents=(edge,)))
        catalog.cubes.delete(A, chain[10].id, now=NOW)
        up = catalog.cubes.lineage(A, chain[-1].id, now=NOW).ancestors
        assert [edge.id for edge in up] == [c.id for c in chain[-2::-1]]
        down = catalog.cubes.lineage(A, chain[0].id, now=NOW).descendants
        assert [edge.child for edge in down] == [c.id for c in chain[1:]]

    # -- forget --------------------------------------------------------------------------------

    def test_nothing_of_a_deleted_cube_stays_in_any_table(self, catalog: Catalog):
        made = add_one(
            catalog,
            "canary-1 text",
            user_id="canary-2",
            speaker="canary-3",
            role="canary-4",
            tags=("canary-5",),
            metadata={"canary-6": "canary-7"},
            sources=(Source(ref="canary-8", text="canary-9"),),
        )
        update(catalog, made.id, text="canary-10")
        assert catalog.cubes.delete(A, made.id, now=NOW) == 2
        assert "canary" not in self._dump(catalog)

    def test_a_scope_is_deleted_whole_and_alone(self, catalog: Catalog):
        mine = [add_one(catalog, f"{n}", user_id="u", run_id=f"r{n}") for n in range(3)]
        update(catalog, mine[0].id, text="changed")
        other = add_one(catalog, "4", user_id="v")
        foreign = add_one(catalog, "5", tenant=B, user_id="u")
        scope = {"user_id": "u", "agent_id": None, "run_id": None}
        gone = catalog.cubes.delete_scope(A, **scope, now=NOW)
        assert gone == {mine[0].id: 2, mine[1].id: 1, mine[2].id: 1}
        assert self._all(catalog) == [other]
        assert catalog.cubes.get(B, foreign.id, now=NOW) == foreign
        assert catalog.cubes.delete_scope(A, **scope, now=NOW) == {}

    def test_what_has_run_out_is_wiped_frozen_or_not(self, catalog: Catalog):
        kept = add_one(catalog, "kept", expires_at=at(11))
        for text in ("canary one", "canary two"):
            made = add_one(catalog, text, expires_at=at(10))
        catalog.cubes.set_frozen(A, made.id, True, now=NOW)
        assert catalog.cubes.expire_due(now=at(9), limit=10) == 0
        assert catalog.cubes.expire_due(now=at(10), limit=1) == 1
        assert catalog.cubes.expire_due(now=at(10), limit=10) == 1
        assert "canary" not in self._dump(catalog)
        assert catalog.index.stats(A).cubes_by_state == {"expired": 2, "generated": 1}
        assert self._all(catalog) == [kept]

    # -- use -----------------------------------------------------------------------------------

    def test_the_first_use_activates_a_cube(self, catalog: Catalog):
        made, other = add_one(catalog), add_one(catalog, "other")
        assert catalog.cubes.record_uses(A, {made.id: 2}, now=at(5)) == {made.id: 1}
        assert catalog.cubes.record_uses(A, {made.id: 1}, now=at(6)) == {}
        used = catalog.cubes.get(A, made.id, now=at(6))
        assert used.state is State.ACTIVATED
        assert (used.usage.uses, used.usage.last_used_at) == (3, at(6))
        assert catalog.cubes.get(A, other.id, now=at(6)).usage.uses == 0

    def test_the_rate_of_use_halves_in_seven_days(self, catalog: Catalog):
        one, two = add_one(catalog, "1").id, add_one(catalog, "2").id
        catalog.cubes.record_uses(A, {one: 8, two: 1}, now=NOW)
        catalog.cubes.record_uses(A, {one: 1}, now=NOW + 7 * DAY)
        rates = [catalog.cubes.get(A, id, now=NOW).usage.rate for id in (one, two)]
        assert rates[0] / rates[1] == pytest.approx(5)

    def test_uses_of_what_is_gone_or_foreign_are_not_counted(self, catalog: Catalog):
        gone, foreign = add_one(catalog), add_one(catalog, tenant=B)
        catalog.cubes.delete(A, gone.id, now=NOW)
        assert catalog.cubes.record_uses(A, {gone.id: 1, foreign.id: 1}, now=NOW) == {}
        assert catalog.cubes.get(B, foreign.id, now=NOW) == foreign
        assert catalog.index.stats(A).cubes_by_state == {"deleted": 1}

    def test_uses_and_deletes_at_once_never_bring_a_cube_back(self, catalog: Catalog):
        ids = [add_one(catalog, f"{n}").id for n in range(20)]

        def use() -> None:
            for id in ids:
                catalog.cubes.record_uses(A, {id: 1}, now=NOW)

        def delete() -> None:
            for id in ids:
                catalog.cubes.delete(A, id, now=NOW)

        at_once([use, use, delete])
        assert catalog.index.stats(A).cubes_by_state == {"deleted": 20}

    # -- the index's bookkeeping ---------------------------------------------------------------

    def test_a_cube_is_pending_until_the_index_holds_its_version(self, catalog: Catalog):
        made = add_one(catalog)
        assert pending(catalog) == [made.id]
        index(catalog, made)
        assert pending(catalog) == []
        assert catalog.cubes.get(A, made.id, now=NOW).indexed
        (place,) = catalog.cubes.residency(A, made.id, now=NOW)
        assert (place.tier, place.medium, place.location) == ("plaintext", "disk", "shard-0")
        assert (place.version, place.size_bytes, place.epoch) == (1, 100, 1)
        update(catalog, made.id, text="new")
        assert pending(catalog) == [made.id]
        assert not catalog.cubes.get(A, made.id, now=NOW).indexed

    def test_a_late_word_of_an_old_version_leaves_the_cube_pending(self, catalog: Catalog):
        made = add_one(catalog)
        update(catalog, made.id, text="new")
        index(catalog, made, version=1)
        assert pending(catalog) == [made.id]

    def test_a_late_word_about_a_deleted_cube_gives_it_no_residency(self, catalog: Catalog):
        made = add_one(catalog)
        catalog.cubes.delete(A, made.id, now=NOW)
        catalog.index.mark_removed(A, [made.id])
        index(catalog, made)
        with catalog._database.reading() as connection:
            assert connection.exec_driver_sql("SELECT * FROM residency").all() == []

    def test_a_word_about_a_foreign_cube_changes_nothing(self, catalog: Catalog):
        foreign = add_one(catalog, tenant=B)
        catalog.index.mark(
            A,
            {foreign.id: 1},
            sizes={foreign.id: 1},
            index=INDEX,
            shard=0,
            epoch=1,
            now=NOW,
        )
        catalog.index.unmark(A, [foreign.id], now=NOW)
        assert catalog.cubes.get(B, foreign.id, now=NOW) == foreign
        assert catalog.cubes.residency(B, foreign.id, now=NOW) == []

    def test_pending_work_comes_oldest_first_after_a_pause(self, catalog: Catalog):
        ids = [add_one(catalog, f"{n}", now=at(n)).id for n in range(5)]
        assert pending(catalog, limit=2) == ids[:2]
        old = catalog.index.pending(shard=0, before=at(3), limit=10)
        assert [c.id for c in old] == ids[:3]
        assert catalog.index.pending(shard=1, before=at(9), limit=10) == []

    # -- the activation tier's bookkeeping -----------------------------------------------------

    def test_kv_is_noted_once_and_by_its_own_cube(self, catalog: Catalog):
        leaf = add_one(catalog)
        whole = composite(catalog, leaf.id)
        for _ in range(2):
            assert mark_kv(catalog, whole, leaf) == []
        assert kv_of(catalog, whole) == [("device", "node-1/engine-0", 1, 7)]
        assert kv_of(catalog, leaf) == []
        catalog.kv.drop(A, [whole.id], now=NOW)
        assert kv_of(catalog, whole) == []

    @pytest.mark.parametrize("how", ["update", "archive", "delete", "members", "drop", "fuse"])
    def test_kv_is_noted_no_more_once_a_member_at_any_depth_is_changed(
        self, catalog: Catalog, how: str
    ):
        leaf, other = add_one(catalog, "tea"), add_one(catalog, "milk")
        inner = composite(catalog, leaf.id)
        whole = composite(catalog, inner.id, other.id)
        apart = composite(catalog, other.id)
        mark_kv(catalog, whole, inner, leaf, other)
        mark_kv(catalog, apart, other)
        mark_kv(catalog, leaf)
        if how == "update":
            update(catalog, leaf.id, text="coffee")
        elif how == "archive":
            catalog.cubes.transition(A, leaf.id, Event.ARCHIVE, author="key", now=NOW)
        elif how == "delete":
            catalog.cubes.delete(A, leaf.id, now=NOW)
        elif how == "members":
            update(catalog, inner.id, members=())
        elif how == "fuse":
            third = add_one(catalog, "bread")
            catalog.cubes.fuse(A, [leaf.id, third.id], Draft(text="both"), author="key", now=NOW)
        else:
            catalog.kv.drop(A, [leaf.id], now=NOW)
        assert kv_of(catalog, whole) == []
        assert kv_of(catalog, apart) != []
        if how != "delete":
            assert bool(kv_of(catalog, leaf)) == (how == "members")

    def test_kv_of_what_has_moved_on_is_not_noted(self, catalog: Catalog):
        leaf = add_one(catalog)
        whole = composite(catalog, leaf.id)
        foreign = add_one(catalog, tenant=B)
        update(catalog, leaf.id, text="coffee")
        assert mark_kv(catalog, whole, leaf) == [leaf.id]
        assert mark_kv(catalog, whole, foreign) == [foreign.id]
        assert kv_of(catalog, whole) == []

    def test_a_foreign_cubes_kv_stays_noted(self, catalog: Catalog):
        foreign = add_one(catalog, tenant=B)
        mark_kv(catalog, foreign)
        catalog.kv.drop(A, [foreign.id], now=NOW)
        assert kv_of(catalog, foreign) != []

    def test_a_composite_without_text_is_never_pending(self, catalog: Catalog):
        leaf = add_one(catalog)
        composite(catalog, leaf.id)
        titled = composite(catalog, leaf.id, text="about tea")
        assert set(pending(catalog)) == {leaf.id, titled.id}

    def test_what_leaves_the_search_is_to_be_removed_from_the_index(self, catalog: Catalog):
        deleted, archived, _expired, merged = made = [
            add_one(catalog, f"{n}", expires_at=at(5) if n == 2 else None) for n in range(4)
        ]
        index(catalog, *made)
        assert removals(catalog) == []
        catalog.cubes.delete(A, deleted.id, now=NOW)
        self._event(catalog, archived.id, Event.ARCHIVE)
        catalog.cubes.expire_due(now=at(5), limit=10)
        self._event(catalog, merged.id, Event.MERGE)
        assert set(removals(catalog)) == {c.id for c in made}
        assert pending(catalog) == []
        catalog.index.mark_removed(A, [c.id for c in made])
        assert removals(catalog) == []

    def test_a_cube_restored_before_its_removal_is_pending_again(self, catalog: Catalog):
        made = add_one(catalog)
        index(catalog, made)
        self._event(catalog, made.id, Event.ARCHIVE)
        restored = self._event(catalog, made.id, Event.RESTORE)
        catalog.index.mark_removed(A, [made.id])
        assert pending(catalog) == [made.id]
        index(catalog, restored)
        assert pending(catalog) == removals(catalog) == []

    def test_what_the_index_lost_is_pending_again(self, catalog: Catalog):
        made = add_one(catalog)
        index(catalog, made)
        catalog.index.unmark(A, [made.id], now=at(1))
        assert pending(catalog) == [made.id]

    def test_another_embedder_makes_everything_pending(self, catalog: Catalog):
        made = [add_one(catalog, f"{n}") for n in range(3)]
        index(catalog, *made)
        assert catalog.index.adopt(index=INDEX, shard=0, now=NOW) == 0
        assert catalog.index.adopt(index="embedder@2", shard=0, now=NOW) == 3
        assert set(pending(catalog)) == {c.id for c in made}

    def test_the_held_versions_are_those_that_were_marked(self, catalog: Catalog):
        one, two = add_one(catalog, "1"), add_one(catalog, "2", tenant=B)
        add_one(catalog, "3")
        index(catalog, one)
        index(catalog, two)
        assert set(catalog.index.held(shard=0)) == {(A, one.id, 1), (B, two.id, 1)}
        assert list(catalog.index.held(shard=1)) == []

    def test_a_longer_expiry_by_a_repeat_is_told_to_the_index(self, catalog: Catalog):
        made = add_one(catalog, expires_at=at(10))
        index(catalog, made)
        add_one(catalog, expires_at=at(20))
        assert pending(catalog) == [made.id]

    def test_stats_count_states_and_waiting_work(self, catalog: Catalog):
        one, two = add_one(catalog, "1", now=at(3)), add_one(catalog, "2", now=at(4))
        add_one(catalog, "3", tenant=B)
        index(catalog, one)
        catalog.cubes.delete(A, one.id, now=at(5))
        stats = catalog.index.stats(A)
        assert stats.cubes_by_state == {"generated": 1, "deleted": 1}
        assert (stats.pending_index, stats.pending_removal) == (1, 1)
        assert stats.oldest_pending == two.updated_at
        assert catalog.index.stats().cubes_by_state == {"generated": 2, "deleted": 1}

    def test_the_queries_for_waiting_work_walk_their_own_index(self, catalog: Catalog):
        index(catalog, *(add_one(catalog, f"{n}") for n in range(50)))
        plans = self._plans(catalog)
        assert "ix_cubes_pending" in plans[0]
        assert "ix_cubes_removal" in plans[1]

    def test_the_open_catalog_answers(self, catalog: Catalog):
        catalog.ping()

    # -- how the tests above say it ------------------------------------------------------------

    def _plans(self, catalog: Catalog) -> list[str]:
        """How the engine runs the queries for pending work and for removals: the engine's tests say,
        by ``explained``."""
        raise AssertionError(f"{type(self).__name__} gives no plans")

    @staticmethod
    def _key(catalog: Catalog, **given: Any):
        values = {"tenant": A, "name": "k", "role": Role.READER, "expires_at": None, "now": NOW}
        return catalog.access.create_key(**(values | given))

    @staticmethod
    def _talk(*texts: str, run_id: str = "1", refs: Sequence[str] = ()) -> list[Draft]:
        sources = [(Source(ref=ref),) for ref in refs] or [()] * len(texts)
        return [
            Draft(text=text, user_id="u", run_id=run_id, threaded=True, sources=source)
            for text, source in zip(texts, sources, strict=True)
        ]

    @staticmethod
    def _all(catalog: Catalog) -> list[MemCube]:
        return catalog.cubes.find(A, now=NOW, limit=1000).cubes

    @staticmethod
    def _outcome(added: Added) -> list[tuple[CubeId, str, int]]:
        return [(result.cube.id, result.event, result.version) for result in added.results]

    @staticmethod
    def _event(catalog: Catalog, id: CubeId, event: Event) -> MemCube:
        return catalog.cubes.transition(A, id, event, author="key", now=NOW)

    @staticmethod
    def _fuse(catalog: Catalog, *parents: MemCube, **rest: Any) -> MemCube:
        draft = Draft(
            text="both",
            parents=tuple(
                Parent(id=p.id, version=p.version, relation=Relation.FUSED) for p in parents
            ),
        )
        ids = [p.id for p in parents]
        return catalog.cubes.fuse(A, ids, draft, author="key", now=NOW, **rest)

    @staticmethod
    def _dump(catalog: Catalog) -> str:
        """All rows of all tables as text."""
        with catalog._database.reading() as connection:
            return "\n".join(
                str(connection.execute(table.select()).all()) for table in metadata.sorted_tables
            )

    @staticmethod
    def _calls_on(catalog: Catalog, id: CubeId, *, now: datetime) -> list[Callable[[], object]]:
        """Every way to reach a cube by its id."""
        cubes = catalog.cubes
        change = Change(text="new")
        return [
            lambda: cubes.get(A, id, now=now),
            lambda: cubes.get(A, id, now=now, version=1),
            lambda: cubes.get(A, id, now=now, as_of=now),
            lambda: cubes.history(A, id, now=now),
            lambda: cubes.members(A, id, now=now, limit=5),
            lambda: cubes.expand(A, [id], now=now, limit=5),
            lambda: cubes.lineage(A, id, now=now),
            lambda: cubes.residency(A, id, now=now),
            lambda: cubes.update(
                A, id, change, expected_version=None, author="key", reason="edit", now=now
            ),
            lambda: cubes.rollback(A, id, 1, author="key", now=now),
            lambda: cubes.transition(A, id, Event.ARCHIVE, author="key", now=now),
            lambda: cubes.set_frozen(A, id, True, now=now),
            lambda: cubes.fuse(A, [id], Draft(text="both"), author="key", now=now),
            lambda: cubes.delete(A, id, now=now),
        ]
