"""What follows when a memory inside an adapter changes or goes: it is trained anew without it. (The
files of what held it go too: ``Consolidation.sweep``.)

The version that held it stopped serving in the transaction of the change (``AdapterBook``). Here the
training is queued: steadily, by the scheduler, and as often as it likes, since a job's key says which
version is trained anew, with which cubes and settings. One that the gate refused is not tried again
until the cubes or the settings are others.
"""

import json
from collections.abc import Mapping
from datetime import datetime

from memcube.catalog import AdapterRecord, Catalog, Job, JobKind, NewJob
from memcube.cube import MemCube
from memcube.ids import CubeId, digest
from memcube.parametric.selection import Choice, choose
from memcube.parametric.settings import TrainingSettings
from memcube.parametric.specs import ConsolidateSpec

AUTHOR = "scheduler"


def queue_retraining(
    catalog: Catalog, settings: TrainingSettings, *, now: datetime, limit: int = 100
) -> list[Job]:
    """Jobs for the adapters that hold what has changed or is gone, made or found.

    An adapter of which nothing is left gets none: it just serves no more.
    """
    jobs: list[Job] = []
    for record in catalog.adapters.to_train_anew(limit=limit):
        rest = _rest(catalog, record, now)
        if not rest:
            continue
        scope = record.line.scope
        spec = ConsolidateSpec(
            name=record.line.name,
            settings=settings,
            extend=False,
            choice=Choice(
                cubes=tuple(sorted(rest)),
                user_id=scope.user_id,
                agent_id=scope.agent_id,
                run_id=scope.run_id,
                limit=len(rest),
            ),
        )
        asked = spec.to_json()
        settled = json.dumps(asked, sort_keys=True)
        key = digest("train anew", record.line.id, record.version, settled, *_flat(rest))
        new = NewJob(kind=JobKind.CONSOLIDATE, spec=asked, author=AUTHOR, key=key)
        jobs.append(catalog.jobs.add(scope.tenant, new, now=now))
    return jobs


def _rest(catalog: Catalog, record: AdapterRecord, now: datetime) -> Mapping[CubeId, int]:
    """The cubes inside a version that may go into the next, in their present versions."""
    tenant = record.line.scope.tenant
    held = list(catalog.adapters.inside(tenant, record.line.id, record.version))
    found: list[MemCube] = catalog.cubes.get_many(tenant, held, now=now)
    named = Choice(cubes=tuple(held), limit=max(1, len(held)))
    return choose(found, named, now=now).versions


def _flat(versions: Mapping[CubeId, int]) -> list[str | int]:
    return [part for pair in sorted(versions.items()) for part in pair]
