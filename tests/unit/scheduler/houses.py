"""Two nodes and one cube, with a real enactor and no faults but those that a test makes."""

from typing import Any

from memcube.catalog.fence import LEASE
from memcube.ids import CubeId, TenantId
from memcube.scheduler.actions import Copy, Drop, Medium, Place
from memcube.scheduler.enact import Enactor
from memcube.scheduler.world import Capacity
from memcube.testing.sim_actors import Cluster
from memcube.testing.sim_catalog import About, SimCatalog, activation, plaintext
from memcube.testing.sim_kernel import Process
from memcube.testing.sim_nodes import SimNode

A = TenantId("a")
N1, N2 = plaintext("n1"), plaintext("n2")
KV2 = activation("n2", Medium.DISK)


class House:
    """Two nodes, and one cube at the first."""

    def __init__(self) -> None:
        self.cluster = Cluster(0, SimCatalog)
        self.cluster.kernel.is_faulty = False
        for name in ("n1", "n2"):
            self.cluster.nodes[name] = SimNode(name=name, capacity_bytes=10_000)
            self.cluster.capacities[plaintext(name)] = Capacity(num_bytes=10_000)
        self.catalog = self.cluster.catalog
        about = About(tokens=10, num_bytes=100, created_at=0.0, changed_at=0.0)
        self.cube = self.catalog.add(A, about)
        self.put(N1)
        about.indexed_version = 1

    def put(self, place: Place) -> None:
        slot = place, A, self.cube
        self.cluster.nodes[place.node].put(slot, 1, 0, 100, 0.0)
        self.catalog.store.cubes[A, self.cube].listed[place] = 1, 100

    def lead(self, name: str, enactor_class: type[Enactor] = Enactor) -> tuple[Enactor, Process]:
        kernel = self.cluster.kernel
        now = kernel.time()
        lease = self.catalog.leases.acquire(LEASE, name, now=now, ttl_s=0.0)
        process = Process(name)
        enactor = enactor_class(
            self.cluster.port(),
            self.catalog.actions,
            leader=lease.epoch,
            clock=kernel.time,
            spawn=process.start,
            call=self.cluster.ask,
        )
        return enactor, process

    def succeed(self, name: str) -> Enactor:
        """Another leads, and has taken up what was under way."""
        enactor, process = self.lead(name)

        async def recover() -> None:
            await enactor.recover()
            enactor.pump()

        process.start(recover())
        self.run()
        return enactor

    def run(self, seconds: float = 30.0) -> None:
        self.cluster.kernel.run(self.cluster.kernel.now_s + seconds)

    def has(self, place: Place) -> bool:
        return self.cluster.nodes[place.node].has((place, A, self.cube), 1)


def copy(cube: CubeId, target: Place, source: Place | None, **more: Any) -> Copy:
    return Copy(
        tenant=A, cube=cube, version=1, epoch=0, source=source, target=target, num_bytes=50, **more
    )


def drop(cube: CubeId) -> Drop:
    return Drop(tenant=A, cube=cube, version=1, epoch=0, place=N1, num_bytes=100)
