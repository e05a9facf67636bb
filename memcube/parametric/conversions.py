"""Adapters of the registry fused into one, and read back into plaintext; for the jobs that do it.

What lies inside a version is read from the catalog as it was trained on. A version whose cubes were
changed, deleted or expired since is refused before any of its weights are used: merged or probed, it
would say what was to be forgotten.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from memcube.activation.models import LoadedModel
from memcube.catalog import AdapterRecord, AddResult, Catalog
from memcube.cube import Draft, MemCube
from memcube.errors import BadRequest, Conflict, NotFound
from memcube.ids import CubeId, TenantId, digest
from memcube.parametric.attaching import attached
from memcube.parametric.facts import CubeVersion, Fact, Read
from memcube.parametric.fusing import (
    FuseSettings,
    FusionAttempt,
    FusionReport,
    Parent,
    fuse_and_judge,
)
from memcube.parametric.gate import Gate
from memcube.parametric.judgement import Thresholds
from memcube.parametric.probing import AdapterIdentity, ProbeReport, probe
from memcube.parametric.registry import AdapterRegistry, Provenance, reference
from memcube.parametric.specs import AdapterVersion
from memcube.parametric.statements import read_cubes
from memcube.parametric.weights import AdapterWeights

FactReader = Callable[[Sequence[MemCube]], Awaitable[Read]]
"""How the facts were read when the adapter was trained. The same must read them again: a fact that it
doesn't find is neither judged nor asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inside:
    """What was trained into a version: its cubes in their versions, and their facts. ``unread`` are
    the cubes that hold none."""

    record: AdapterRecord
    cubes: Mapping[CubeVersion, MemCube]
    facts: tuple[Fact, ...]
    unread: tuple[CubeVersion, ...]


class FusedAdapter(NamedTuple):
    """``record`` is a candidate; None where merging was refused, and nothing was published."""

    record: AdapterRecord | None
    report: FusionReport
    unread: tuple[CubeVersion, ...]


class ProbedAdapter(NamedTuple):
    """``written`` are the cubes that the drafts became; those that were there already are not in it."""

    report: ProbeReport
    written: tuple[AddResult, ...]
    unread: tuple[CubeVersion, ...]


async def by_wordings(cubes: Sequence[MemCube]) -> Read:
    """The facts of cubes without a model."""
    return read_cubes(cubes)


async def look_inside(
    catalog: Catalog,
    tenant: TenantId,
    adapter: AdapterVersion,
    *,
    now: datetime,
    read: FactReader = by_wordings,
) -> Inside:
    """The cubes and facts of a version.

    Raises:
        NotFound: no such version in this tenant.
        Conflict: it is stale, or a cube inside has expired.
    """
    record, cubes = await asyncio.to_thread(_whole, catalog, tenant, adapter, now)
    facts = tuple((await read([*cubes.values()])).facts)
    told = {fact.source for fact in facts}
    return Inside(
        record=record,
        cubes=cubes,
        facts=facts,
        unread=tuple(source for source in cubes if source not in told),
    )


async def fuse_adapters(
    loaded: LoadedModel,
    registry: AdapterRegistry,
    catalog: Catalog,
    tenant: TenantId,
    adapters: Sequence[AdapterVersion],
    gate: Gate,
    *,
    name: str,
    now: datetime,
    settings: FuseSettings | None = None,
    thresholds: Thresholds | None = None,
    read: FactReader = by_wordings,
    judged: Callable[[FusionAttempt], None] = lambda _: None,
) -> FusedAdapter:
    """One adapter of several, published as a candidate if it passes the gate on all their facts.

    The model is as before. ``judged`` is called on another thread.

    Raises:
        BadRequest: fewer than two, or one without any fact to judge it by.
        Conflict: one is stale or of another base; they are of several scopes; a cube changed meanwhile.
        NotFound, Corrupt: a version, or its file.
    """
    if len(set(adapters)) < 2:
        raise BadRequest("fusing needs at least two adapters", "adapters")
    insides = [
        await look_inside(catalog, tenant, adapter, now=now, read=read)
        for adapter in dict.fromkeys(adapters)
    ]
    scopes = {inside.record.line.scope for inside in insides}
    if len(scopes) > 1:
        raise Conflict("the adapters are of several scopes; one would tell the other's memories")
    unread = tuple(source for inside in insides for source in inside.unread)
    parents = [
        Parent(
            name=f"{inside.record.line.name}@{inside.record.version}",
            weights=await _weights(registry, tenant, inside.record, loaded),
            facts=inside.facts,
        )
        for inside in insides
    ]
    settings = settings or FuseSettings()
    weights, report = await asyncio.to_thread(
        lambda: fuse_and_judge(
            loaded,
            parents,
            gate,
            settings=settings,
            thresholds=thresholds,
            limits=registry.files.limits,
            judged=judged,
        )
    )
    chosen = report.chosen
    if weights is None or chosen is None or chosen.report is None:
        return FusedAdapter(None, report, unread)
    origins = [inside.record.sha256 for inside in insides]
    record = await registry.publish(
        scopes.pop(),
        name,
        weights,
        cubes={CubeId(source.id): source.version for inside in insides for source in inside.cubes},
        provenance=Provenance(
            recipe={
                "fused": str(chosen.method),
                "weight": chosen.weight,
                "density": settings.density,
                "parents": [
                    {
                        "adapter": inside.record.line.id,
                        "version": inside.record.version,
                        "sha256": inside.record.sha256,
                    }
                    for inside in insides
                ],
            },
            seed=settings.seed,
            data_sha256=digest("fused", *origins),
            report=chosen.report.figures(),
        ),
        now=now,
    )
    return FusedAdapter(record, report, unread)


async def probe_adapter(
    loaded: LoadedModel,
    registry: AdapterRegistry,
    catalog: Catalog,
    tenant: TenantId,
    adapter: AdapterVersion,
    gate: Gate,
    *,
    author: str,
    now: datetime,
    read: FactReader = by_wordings,
    clock: Callable[[], datetime] | None = None,
) -> ProbedAdapter:
    """What a version says of the facts inside; what agrees with the cubes is written as new cubes.

    Again, it writes nothing that it wrote before. New cubes are pending in the index: the reconcile
    loop takes them in. ``clock`` tells when the answers are in (else ``now``), as probing takes minutes.

    Raises:
        BadRequest: no cube inside holds a fact that can be asked for.
        Conflict: the version is stale, also if it became so meanwhile, or of another base. Nothing is
            written.
        NotFound, Corrupt: the version, or its file.
    """
    inside = await look_inside(catalog, tenant, adapter, now=now, read=read)
    record = inside.record
    weights = await _weights(registry, tenant, record, loaded)
    identity = AdapterIdentity(id=record.line.id, version=record.version, sha256=record.sha256)

    def asked() -> ProbeReport:
        with attached(loaded, {"probed": weights}) as model:
            return probe(model, gate, inside.facts, inside.cubes, identity)

    report = await asyncio.to_thread(asked)
    then = clock() if clock else now
    await asyncio.to_thread(_whole, catalog, tenant, adapter, then)
    written = await asyncio.to_thread(
        lambda: _write(catalog, tenant, report.drafts, author=author, now=then)
    )
    return ProbedAdapter(report, written, inside.unread)


def _whole(
    catalog: Catalog, tenant: TenantId, adapter: AdapterVersion, now: datetime
) -> tuple[AdapterRecord, dict[CubeVersion, MemCube]]:
    """A version and its cubes as they were trained on, if all of them are so still."""
    record = catalog.adapters.get(tenant, adapter.id, adapter.version)
    held = catalog.adapters.inside(tenant, adapter.id, adapter.version)
    try:
        cubes = {
            CubeVersion(id, version): catalog.cubes.get(tenant, id, now=now, version=version)
            for id, version in sorted(held.items())
        }
    except NotFound:
        raise _stale(record) from None
    if record.stale:
        raise _stale(record)
    return record, cubes


def _write(
    catalog: Catalog, tenant: TenantId, drafts: Sequence[Draft], *, author: str, now: datetime
) -> tuple[AddResult, ...]:
    """Write drafts that aren't there yet, all or none."""
    new = [draft for draft in drafts if not _is_written(catalog, tenant, draft, now)]
    if not new:
        return ()
    return catalog.cubes.add(tenant, new, author=author, now=now).results


def _is_written(catalog: Catalog, tenant: TenantId, draft: Draft, now: datetime) -> bool:
    """Whether a draft's cube has been told by the same weights already."""
    (parent,) = draft.parents
    ids = catalog.adapters.written_back(tenant, [parent.id], now=now)
    return any(
        cube.text == draft.text and {*draft.sources} <= {*cube.descriptive.sources}
        for cube in catalog.cubes.get_many(tenant, ids, now=now)
    )


async def _weights(
    registry: AdapterRegistry, tenant: TenantId, record: AdapterRecord, loaded: LoadedModel
) -> AdapterWeights:
    return await registry.files.get(tenant, reference(record), base=loaded.fingerprint)


def _stale(record: AdapterRecord) -> Conflict:
    return Conflict(
        f"version {record.version} of adapter {record.line.name!r} is stale, as cubes inside have "
        "changed or are gone; train it anew"
    )
