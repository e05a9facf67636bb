"""Tenants that move as one between shards: what each has there, and the action that moves it."""

from collections import Counter

import numpy as np

from memcube.ids import TenantId
from memcube.scheduler.actions import Copy, Place
from memcube.scheduler.world import World


def bytes_by_tenant(world: World, place: Place) -> Counter[TenantId]:
    """What tenants have at a place, as far as it is listed."""
    rows, sizes, _ = world.at(world.places.get(place))
    sums = np.bincount(world.cubes["tenant"][rows], weights=sizes)
    return Counter({world.tenants[n]: int(sums[n]) for n in np.flatnonzero(sums).tolist()})


def move_tenant(
    world: World, tenant: TenantId, target: Place, num_bytes: int, *, policy: str, reason: str
) -> Copy:
    """All that a tenant has in its shard to another one, which takes its writes from then on."""
    return Copy(
        tenant=tenant,
        cube=None,
        version=0,
        epoch=world.tenant_epochs.get(tenant, 0),
        source=world.tenant_places[tenant],
        target=target,
        num_bytes=num_bytes,
        takes_over=True,
        policy=policy,
        reason=reason,
    )
