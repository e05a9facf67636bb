"""Wires the parts of the lifecycle that routes stand on. The scheduler's is ``memcube.sweep``."""

from dataclasses import dataclass

from memcube.archive import archive_of
from memcube.catalog import Catalog
from memcube.config import Config
from memcube.doctor import AdapterCheck, ArchiveCheck, Check, Doctor, IndexCheck
from memcube.history import TimeMachine
from memcube.indexing import Clock, Indexer, Shards
from memcube.merging import Merging
from memcube.objects import OpenObjects
from memcube.settling import Changed, Settling


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecycleParts:
    """What the routes of the lifecycle stand on."""

    time_machine: TimeMachine
    merging: Merging
    doctor: Doctor


def lifecycle_parts(
    catalog: Catalog,
    indexer: Indexer,
    shards: Shards,
    config: Config,
    *,
    clock: Clock,
    open_objects: OpenObjects,
    changed: Changed | None = None,
) -> LifecycleParts:
    """A gateway's parts. ``open_objects`` is called by the doctor, which closes what it opened."""
    settling = Settling(catalog, indexer, changed, clock=clock)
    checks: list[Check] = [
        IndexCheck(catalog, indexer, shards, num_shards=config.plaintext.shards),
        AdapterCheck(catalog, open_objects),
        ArchiveCheck(catalog, open_objects, lambda objects: archive_of(catalog, objects, config)),
    ]
    return LifecycleParts(
        time_machine=TimeMachine(catalog, settling, clock=clock, limits=config.limits),
        merging=Merging(catalog, shards, settling, config.lifecycle, clock=clock),
        doctor=Doctor(checks),
    )
