"""What the scheduler is told of cubes, from the real catalog."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from memcube.catalog import Catalog, Change, KvPlace
from memcube.cube import Draft, Kind
from memcube.ids import CubeId
from memcube.scheduler.actions import Copy, Medium, Place, Tier
from memcube.scheduler.world import NEVER, Held, World
from memcube.testing.scheduling_contract import KV1, N1, NOW, A, CatalogBooks, at, carry, lead


class FeedContract:
    """Inherit, and give ``catalog``."""

    def test_a_cube_is_told_with_what_is_listed_of_it(self, catalog: Catalog):
        books = CatalogBooks(catalog)
        cube = books.add()
        copy = Copy(tenant=A, cube=cube, version=1, epoch=0, source=None, target=KV1, num_bytes=70)
        carry(books, copy, lead(books))
        feed = catalog.world_feed(clock=lambda: NOW, consents=lambda tenant: tenant == A)
        keys, _ = feed.changed(0)
        ((facts, held),) = feed.read(keys)
        assert (facts.id, facts.tenant, facts.version, facts.epoch) == (cube, A, 1, 1)
        assert (facts.num_bytes, facts.tokens) == (len("cube 1"), 2)
        assert (facts.consents, facts.session_bound, facts.expires_at) == (True, False, NEVER)
        assert facts.indexed_version == 1
        assert facts.moved_at == NOW.timestamp()
        assert sorted(held) == [Held(KV1, 1, 70), Held(N1, 1, 100)]

    def test_times_scopes_and_tags_are_told(self, catalog: Catalog):
        CatalogBooks(catalog)
        drafts = [
            Draft(
                text="x",
                user_id="ann",
                run_id="r",
                tags=("vip",),
                kind=Kind.FACT,
                expires_at=at(60),
            ),
            Draft(text="y", user_id="bob"),
        ]
        added = catalog.cubes.add(A, drafts, author="t", now=NOW)
        ids = [result.cube.id for result in added.results]
        catalog.cubes.record_uses(A, {ids[0]: 3}, now=at(1))
        feed = catalog.world_feed(clock=lambda: NOW)
        facts = {one.id: one for one, _ in feed.read([(A, id) for id in ids])}
        first = facts[ids[0]]
        assert (first.session_bound, first.labels, first.kind) == (True, {"vip"}, Kind.FACT)
        assert first.expires_at == at(60).timestamp()
        assert first.used_at == at(1).timestamp()
        assert first.rate > 0
        assert first.scope != facts[ids[1]].scope

    def test_kv_that_an_operator_migrated_or_dropped_is_told(self, catalog: Catalog):
        books = CatalogBooks(catalog)
        cube = books.add()
        clock = [at(100)]
        feed = catalog.world_feed(clock=lambda: clock[0])
        _, cursor = feed.changed(0)
        assert feed.changed(cursor)[0] == []
        place = KvPlace(medium=KV1.medium, location=KV1.location, size_bytes=7)
        assert catalog.kv.mark(A, cube, {cube: 1}, [place], now=at(110)) == []
        assert feed.changed(cursor)[0] == [(A, cube)]
        ((facts, held),) = feed.read([(A, cube)])
        assert Held(KV1, 1, 7) in held
        # So it has time to be used before it can be found hardly used.
        assert facts.moved_at == at(110).timestamp()
        clock[0] = at(200)
        _, cursor = feed.changed(cursor)
        catalog.kv.drop(A, [cube], now=at(210))
        assert feed.changed(cursor)[0] == [(A, cube)]

    def test_a_tenants_owner_is_its_cubes_owner(self, catalog: Catalog):
        books = CatalogBooks(catalog)
        cube = books.add()
        n2 = Place(Tier.PLAINTEXT, Medium.DISK, "n2")
        whole = Copy(
            tenant=A,
            cube=None,
            version=0,
            epoch=0,
            source=N1,
            target=n2,
            num_bytes=1,
            takes_over=True,
        )
        carry(books, whole, lead(books))
        ((facts, held),) = catalog.world_feed(clock=lambda: NOW).read([(A, cube)])
        assert facts.owner == n2
        assert held == [Held(n2, 1, 100)]

    def test_after_a_cursor_only_what_was_written_is_told(self, catalog: Catalog):
        books = CatalogBooks(catalog)
        old, changed = books.add(), books.add()
        later = NOW + timedelta(hours=1)
        feed = catalog.world_feed(clock=lambda: later)
        keys, cursor = feed.changed(0)
        assert {id for _, id in keys} == {old, changed}
        catalog.cubes.update(
            A,
            changed,
            Change(text="new"),
            expected_version=None,
            author="t",
            reason="",
            now=later,
        )
        assert feed.changed(cursor)[0] == [(A, changed)]
        assert feed.changed(cursor)[0] == [], "it was told of, and not written since"

    def test_a_payload_that_was_listed_late_is_told(self, catalog: Catalog):
        CatalogBooks(catalog)
        added = catalog.cubes.add(A, [Draft(text="x")], author="t", now=NOW)
        cube = added.results[0].cube
        feed = catalog.world_feed(clock=lambda: at(600))
        _, cursor = feed.changed(0)
        assert feed.changed(cursor)[0] == []
        catalog.index.mark(
            A, {cube.id: 1}, sizes={cube.id: 9}, index="i", shard=0, epoch=0, now=at(601)
        )
        assert feed.changed(cursor)[0] == [(A, cube.id)]
        assert feed.changed(cursor)[0] == []
        catalog.index.unmark(A, [cube.id], now=at(602))
        assert feed.changed(cursor)[0] == [(A, cube.id)]

    def test_what_is_gone_is_left_out(self, catalog: Catalog):
        books = CatalogBooks(catalog)
        cube = books.add()
        books.delete(A, cube)
        feed = catalog.world_feed(clock=lambda: NOW)
        assert feed.changed(0)[0] == []
        assert feed.read([(A, cube), (A, CubeId("unknown"))]) == []

    def test_a_world_can_be_made_of_it(self, catalog: Catalog):
        books = CatalogBooks(catalog)
        cube = books.add()
        feed, world = catalog.world_feed(clock=lambda: NOW), World()
        for facts, held in feed.read(feed.changed(0)[0]):
            world.put(facts, held)
        assert world.held_by(world.row(A, cube)) == [Held(N1, 1, 100)]
        assert world.used_bytes == [100]


class TestFeedOnSQLite(FeedContract):
    @pytest.fixture
    def catalog(self, tmp_path: Path) -> Iterator[Catalog]:
        catalog = Catalog.open(f"sqlite:///{tmp_path}/catalog.db")
        yield catalog
        catalog.close()


class TestFeedOnPostgreSQL(FeedContract):
    @pytest.fixture
    def catalog(self, postgres_url: str) -> Iterator[Catalog]:
        catalog = Catalog.open(postgres_url)
        yield catalog
        catalog.close()
