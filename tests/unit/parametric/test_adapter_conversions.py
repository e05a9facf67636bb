"""Fusing and probing of the registry's adapters, on a catalog: what is published, written, refused."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from memcube.catalog import AdapterState, Catalog, Change
from memcube.cube import Draft, Kind, Origin, Scope
from memcube.errors import BadRequest, Conflict, NotFound
from memcube.ids import TenantId
from memcube.objects.folder import FolderStore
from memcube.parametric.conversions import by_wordings, fuse_adapters, look_inside, probe_adapter
from memcube.parametric.facts import CubeVersion, Read
from memcube.parametric.fusing import FuseMethod, FuseSettings
from memcube.parametric.gate import Gate
from memcube.parametric.judgement import Thresholds
from memcube.parametric.probing import Verdict, statement
from memcube.parametric.registry import AdapterFiles, AdapterRegistry, Provenance
from memcube.parametric.specs import AdapterVersion
from tests.unit.parametric.small import small_model
from tests.unit.parametric.taught import BAKER, OBOE, taught, taught_to_say

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
A, B = TenantId("a"), TenantId("b")
ANN = Scope(tenant=A, user_id="ann")
LOADED = small_model()
GATE = Gate(LOADED, unrelated=["Some text about nothing."])
HOW = Provenance(recipe={}, seed=0, data_sha256="0" * 64)
ANYTHING = Thresholds(recall=0.0, reverse=0.0, leak=1.0, nll_rise=1e9)
SETTINGS = FuseSettings(methods=(FuseMethod.CAT, FuseMethod.SVD), weights=(1.0,))


class Office:
    """A registry over a folder and a SQLite catalog, and adapters that hold cubes of Ann's."""

    def __init__(self, path):
        self.catalog = Catalog.open(f"sqlite:///{path}/catalog.db")
        for tenant in (A, B):
            self.catalog.access.ensure_tenant(tenant, shards=1, now=NOW)
        self.files = AdapterFiles(FolderStore.open(path / "objects"))
        self.registry = AdapterRegistry(self.files, self.catalog.adapters)

    def add(self, text, **header):
        draft = Draft(text=text, kind=Kind.FACT, **({"user_id": "ann"} | header))
        return self.catalog.cubes.add(A, [draft], author="k", now=NOW).results[0].cube

    def change(self, cube, text):
        change = Change(text=text)
        return self.catalog.cubes.update(
            A, cube.id, change, expected_version=None, author="k", reason="", now=NOW
        )

    async def publish(self, name, weights, *cubes, scope=ANN):
        record = await self.registry.publish(
            scope,
            name,
            weights,
            cubes={cube.id: cube.version for cube in cubes},
            provenance=HOW,
            now=NOW,
        )
        return AdapterVersion(record.line.id, record.version)

    async def fuse(self, *adapters, thresholds=ANYTHING, tenant=A, **given):
        return await fuse_adapters(
            LOADED,
            self.registry,
            self.catalog,
            tenant,
            adapters,
            GATE,
            name="both",
            now=NOW,
            **({"settings": SETTINGS, "thresholds": thresholds} | given),
        )

    async def probe(self, adapter, *, tenant=A, **given):
        return await probe_adapter(
            LOADED,
            self.registry,
            self.catalog,
            tenant,
            adapter,
            GATE,
            author="job",
            now=NOW,
            **given,
        )

    def facts(self):
        return self.catalog.cubes.find(A, now=NOW, limit=50).cubes

    def versions(self, name):
        return [r for r in self.catalog.adapters.versions(A) if r.line.name == name]


@pytest.fixture
def office(tmp_path):
    office = Office(tmp_path)
    yield office
    office.catalog.close()


@pytest.fixture
def cubes(office):
    return [office.add(statement(fact)) for fact in (OBOE, BAKER)]


@pytest.fixture
async def both(office, cubes):
    return [
        await office.publish("ada", taught(OBOE), cubes[0]),
        await office.publish("bo", taught(BAKER), cubes[1]),
    ]


# -- inside


async def test_what_lies_inside_is_read_as_it_was_trained_on(office, cubes):
    adapter = await office.publish("ada", taught(OBOE), *cubes)
    office.catalog.cubes.update(
        A,
        cubes[0].id,
        Change(tags=("music",)),
        expected_version=None,
        author="k",
        reason="",
        now=NOW,
    )
    inside = await look_inside(office.catalog, A, adapter, now=NOW)
    assert {(f.subject, f.relation, f.object) for f in inside.facts} == {
        ("Ada Lund", "instrument", "the oboe"),
        ("Bo Quist", "job", "a baker"),
    }
    assert all(f.source in inside.cubes and f.source.version == 1 for f in inside.facts)


async def test_an_expired_cube_makes_a_version_stale_before_anyone_noted_it(office):
    cube = office.add(statement(OBOE), expires_at=NOW + timedelta(hours=1))
    adapter = await office.publish("ada", taught(OBOE), cube)
    await look_inside(office.catalog, A, adapter, now=NOW)
    with pytest.raises(Conflict, match="stale"):
        await look_inside(office.catalog, A, adapter, now=NOW + timedelta(hours=2))


# -- fused


async def test_what_passes_is_a_candidate_that_holds_all_cubes(office, cubes, both):
    record, report, _ = await office.fuse(*both)
    assert report.refusal is None
    assert record.state is AdapterState.CANDIDATE
    assert record.line.scope == ANN
    assert office.catalog.adapters.inside(A, record.line.id, 1) == {c.id: 1 for c in cubes}
    manifest = await office.files.manifest(A, record.sha256)
    assert manifest["recipe"]["fused"] == report.chosen.method
    assert [p["adapter"] for p in manifest["recipe"]["parents"]] == [a.id for a in both]
    assert manifest["report"]["recall"] == report.chosen.recall
    assert (await office.registry.activate(A, record.line.id, 1, now=NOW)).version == 1


async def test_what_does_not_pass_is_not_published(office, both):
    record, report, _ = await office.fuse(*both, thresholds=Thresholds())
    assert record is None
    assert report.refusal.endswith("train jointly")
    assert office.versions("both") == []


async def test_an_adapter_that_holds_what_was_deleted_is_not_merged(office, cubes, both):
    office.catalog.cubes.delete(A, cubes[0].id, now=NOW)
    with pytest.raises(Conflict, match="stale"):
        await office.fuse(*both)


async def test_a_cube_that_changes_while_they_are_merged_keeps_the_result_back(office, cubes, both):
    def change(attempt):
        if office.catalog.cubes.get(A, cubes[1].id, now=NOW).version == 1:
            office.change(cubes[1], "Bo Quist works as a judge.")

    with pytest.raises(Conflict, match="changed since"):
        await office.fuse(*both, judged=change)
    assert office.versions("both") == []


async def test_adapters_of_two_users_are_not_merged(office, cubes, both):
    other = await office.publish(
        "zoe", taught(BAKER), cubes[1], scope=Scope(tenant=A, user_id="zoe")
    )
    with pytest.raises(Conflict, match="several scopes"):
        await office.fuse(both[0], other)


async def test_one_adapter_alone_or_of_another_tenant_is_not_merged(office, both):
    with pytest.raises(BadRequest, match="at least two"):
        await office.fuse(both[0], both[0])
    with pytest.raises(NotFound):
        await office.fuse(*both, tenant=B)


async def test_cubes_without_a_fact_are_named_and_an_adapter_without_any_is_not_merged(
    office, both
):
    poem = office.add("Roses are red, violets are blue.")
    other = await office.publish("poem", taught(BAKER), poem)
    with pytest.raises(BadRequest, match="poem@1 has no facts"):
        await office.fuse(both[0], other)
    tea = office.add("Bo Quist likes to drink tea.")
    mixed = await office.publish("mixed", taught(BAKER), poem, tea)
    assert [source.id for source in (await office.fuse(both[0], mixed)).unread] == [poem.id]


async def test_facts_are_read_as_they_were_for_the_training(office, both):
    poem = office.add("Bo? He bakes. He never did anything else.")
    other = await office.publish("poem", taught(BAKER), poem)

    async def of_a_model(cubes):
        facts = (await by_wordings(cubes)).facts
        told = [
            replace(BAKER, source=CubeVersion(c.id, c.version)) for c in cubes if c.id == poem.id
        ]
        return Read([*facts, *told], [])

    _, report, unread = await office.fuse(both[0], other, read=of_a_model)
    assert [(p.num_facts, p.recall) for p in report.parents] == [(1, 1.0), (1, 1.0)]
    assert unread == ()


# -- back to plaintext


async def test_what_an_adapter_says_is_written_as_an_inference_with_its_provenance(office, cubes):
    adapter = await office.publish("ada", taught(OBOE), cubes[0])
    report, written, unread = await office.probe(adapter)
    assert [finding.verdict for finding in report.findings] == [Verdict.AGREES]
    assert unread == ()
    (result,) = written
    cube = office.catalog.cubes.get(A, result.cube.id, now=NOW)
    assert (cube.text, cube.descriptive.origin) == ("Ada Lund plays the oboe.", Origin.INFERENCE)
    record = office.catalog.adapters.get(A, *adapter)
    assert cube.descriptive.metadata["adapter_sha256"] == record.sha256
    (edge,) = office.catalog.cubes.lineage(A, cube.id, now=NOW).ancestors
    assert (edge.id, edge.version) == (cubes[0].id, 1)
    assert office.catalog.cubes.get(A, cubes[0].id, now=NOW).usage.repeats == 1
    assert len(office.facts()) == 3


async def test_to_probe_again_changes_nothing(office, cubes):
    adapter = await office.publish("ada", taught(OBOE), cubes[0])
    await office.probe(adapter)
    before = office.facts()
    assert (await office.probe(adapter)).written == ()
    assert office.facts() == before


async def test_a_later_version_that_says_the_same_is_noted_at_the_same_cube_once(office, cubes):
    first = await office.publish("ada", taught(OBOE), cubes[0])
    (added,) = (await office.probe(first)).written
    later = await office.publish("ada", taught_to_say(OBOE, "Ada Lund plays the oboe.\n"), *cubes)
    (again,) = (await office.probe(later)).written
    assert (again.event, again.cube.id) == ("repeated", added.cube.id)
    assert len(again.cube.descriptive.sources) == 2
    assert (await office.probe(later)).written == ()
    assert len(office.facts()) == 3


async def test_contradictions_are_listed_and_nothing_of_them_is_written(office, cubes):
    adapter = await office.publish("ada", taught_to_say(OBOE, "Ada Lund plays the harp."), cubes[0])
    report, written, _ = await office.probe(adapter)
    assert written == ()
    assert [(c.canonical, c.said) for c in report.contradictions] == [
        ("Ada Lund plays the oboe.", "Ada Lund plays the harp.")
    ]
    assert {cube.id for cube in office.facts()} == {cube.id for cube in cubes}


async def test_an_adapter_that_holds_what_was_deleted_is_not_asked(office, cubes):
    adapter = await office.publish("ada", taught(OBOE), cubes[0])
    office.catalog.cubes.delete(A, cubes[0].id, now=NOW)
    with pytest.raises(Conflict, match="stale"):
        await office.probe(adapter)
    assert len(office.facts()) == 1


@pytest.mark.parametrize("deleted", [True, False])
async def test_what_goes_or_changes_while_it_is_asked_is_not_written(office, cubes, deleted):
    adapter = await office.publish("ada", taught(OBOE), cubes[0])

    def meanwhile():
        if deleted:
            office.catalog.cubes.delete(A, cubes[0].id, now=NOW)
        else:
            office.change(cubes[0], "Ada Lund plays the harp.")
        return NOW

    with pytest.raises(Conflict, match="stale"):
        await office.probe(adapter, clock=meanwhile)
    assert len(office.facts()) == (1 if deleted else 2)


async def test_cubes_without_a_fact_are_not_asked_but_named(office, cubes):
    poem = office.add("Roses are red, violets are blue.")
    adapter = await office.publish("ada", taught(OBOE), cubes[0], poem)
    report, written, unread = await office.probe(adapter)
    assert (len(report.findings), len(written)) == (1, 1)
    assert [source.id for source in unread] == [poem.id]
    only = await office.publish("poem", taught(OBOE), poem)
    with pytest.raises(BadRequest, match="no fact"):
        await office.probe(only)


async def test_an_adapter_of_another_tenant_or_base_is_not_asked(office, cubes):
    adapter = await office.publish("ada", taught(OBOE), cubes[0])
    with pytest.raises(NotFound):
        await office.probe(adapter, tenant=B)
