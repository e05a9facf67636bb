"""The parts of a scheduler, made of a system: what runs under the lease beside the moves."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

from memcube.activation.contract import Mode
from memcube.catalog import Catalog
from memcube.config import Config
from memcube.errors import Unavailable
from memcube.indexing import Clock, Indexer
from memcube.parametric.forgetting import queue_retraining
from memcube.parametric.settings import TrainingSettings
from memcube.reconcile import Reconciler
from memcube.scheduler import tenant_moves
from memcube.scheduler.actions import Tier
from memcube.scheduler.engine_port import EnginePort, Engines, EngineTopology, LedEngine
from memcube.scheduler.host import (
    QUEUE,
    Moves,
    MoveSettings,
    SchedulerHost,
    Topology,
    UsesInbox,
    Work,
)
from memcube.scheduler.lease import LeaseKeeper
from memcube.scheduler.port import TierPort
from memcube.scheduler.tier_ports import TierPorts
from memcube.scheduler.work import Consolidations, CubeTasks, Does, TaskWorker
from memcube.settling import Settling
from memcube.sweep import LifecycleSweep


def scheduler_host(
    catalog: Catalog,
    config: Config,
    keeper: LeaseKeeper,
    *,
    reconciler: Reconciler,
    indexer: Indexer,
    sweep: LifecycleSweep,
    engines: Sequence[LedEngine],
    plaintext: tuple[Topology, TierPort] | None,
    clock: Clock,
) -> SchedulerHost:
    """A host with all parts of a configuration. ``plaintext`` knows the shards and moves tenants between
    them; without it they stay where they are."""
    uses = UsesInbox()
    moves = _moves(catalog, config, engines, plaintext, clock=clock)

    async def count_uses(_epoch: int, now: datetime) -> None:
        counts, scores = uses.take()
        try:
            await reconciler.record_uses(counts, now)
        except Unavailable:
            uses.put(counts, scores)
            raise
        else:
            for tenant, cubes in counts.items():
                moves.used(tenant, cubes)
            for tenant, near in scores.items():
                moves.near(tenant, near, now)

    async def reconcile(_epoch: int, now: datetime) -> Mapping[str, Any]:
        return asdict(await reconciler.step(now))

    async def lifecycle(_epoch: int, now: datetime) -> Mapping[str, Any]:
        return asdict(await sweep.step(now))

    async def retrain(_epoch: int, now: datetime) -> Mapping[str, Any]:
        jobs = await asyncio.to_thread(queue_retraining, catalog, settings, now=now)
        return {"jobs": len(jobs)}

    settings = TrainingSettings.of(config)
    parts: dict[str, Work] = {"uses": count_uses, "reconcile": reconcile, "lifecycle": lifecycle}
    if config.training.retrain and config.activation.actors:
        parts["retrain"] = retrain
    worker = TaskWorker(
        catalog,
        {
            **_kinds(catalog, config, indexer, settings, clock=clock),
            tenant_moves.KIND: tenant_moves.TenantMoves(catalog.shards, moves).move,
        },
        clock=clock,
    )
    parts[QUEUE] = worker.step
    return SchedulerHost(
        keeper, parts, moves, uses, clock=clock, interval_s=config.scheduler.interval_s
    )


def consolidations(catalog: Catalog, config: Config) -> Consolidations:
    """What becomes of proposals to consolidate."""
    return Consolidations(
        catalog,
        TrainingSettings.of(config),
        applies=config.scheduler.consolidate == "apply",
        max_open_jobs=config.training.max_open_jobs,
    )


def _kinds(
    catalog: Catalog,
    config: Config,
    indexer: Indexer,
    settings: TrainingSettings,
    *,
    clock: Clock,
) -> dict[str, Does]:
    tasks = CubeTasks(
        catalog,
        indexer,
        Settling(catalog, indexer, clock=clock),
        expired_kept=timedelta(seconds=config.scheduler.expired_kept_s),
        batch=config.scheduler.batch,
    )
    return {**tasks.kinds(), **consolidations(catalog, config).kinds()}


def _moves(
    catalog: Catalog,
    config: Config,
    engines: Sequence[LedEngine],
    plaintext: tuple[Topology, TierPort] | None,
    *,
    clock: Clock,
) -> Moves:
    topologies: dict[Tier, Topology] = {}
    ports: dict[Tier, TierPort] = {}
    if plaintext is not None:
        topologies[Tier.PLAINTEXT], ports[Tier.PLAINTEXT] = plaintext
    known = Engines(engines)
    topologies[Tier.ACTIVATION] = EngineTopology(known)
    ports[Tier.ACTIVATION] = EnginePort(
        known,
        catalog,
        mode=Mode(config.chat.mode),
        clock=clock,
        max_members=config.limits.members,
    )
    wanted = config.scheduler
    return Moves(
        catalog,
        TierPorts(ports),
        topologies,
        MoveSettings(
            profiles=wanted.profiles(),
            limits=wanted.move_limits(),
            consents=wanted.consents_to_training,
            # Without engines nothing trains, and nothing could serve what was trained.
            consolidates=wanted.consolidate != "off" and bool(engines),
            compare_every_s=wanted.compare_s,
            kept=timedelta(days=wanted.kept_days),
        ),
        clock=clock,
        is_gone=known.is_gone,
    )
