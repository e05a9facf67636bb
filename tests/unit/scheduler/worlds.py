"""Small worlds for tests of policies."""

from typing import Any

from memcube.cube import Kind
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import State
from memcube.scheduler.actions import Medium, Place, Tier
from memcube.scheduler.planner import Plan, Planner
from memcube.scheduler.settings import MoveLimits, Profile, Profiles
from memcube.scheduler.world import Capacity, CubeFacts, Held, Node, World

NOW = 1_000_000.0
A, B = TenantId("a"), TenantId("b")
GB = 1 << 30


def text(node: str) -> Place:
    return Place(Tier.PLAINTEXT, Medium.DISK, node)


def kv(node: str, medium: Medium = Medium.DEVICE) -> Place:
    return Place(Tier.ACTIVATION, medium, node)


class Small:
    """A world of nodes ``n1`` and ``n2`` with text, KV on the device and on disk; cubes used twice a day."""

    def __init__(self, *, device_bytes: int = GB, nodes: tuple[str, ...] = ("n1", "n2")) -> None:
        self.world = World(kv_bytes_per_token=1_000)
        self.now = NOW
        self._made = 0
        for name in nodes:
            self.world.set_node(Node(name=name))
            self.world.set_place(text(name), Capacity(num_bytes=GB))
            self.world.set_place(kv(name), Capacity(num_bytes=device_bytes))
            self.world.set_place(kv(name, Medium.DISK), Capacity(num_bytes=GB))

    def add(self, *held: Place, tenant: TenantId = A, **more: Any) -> CubeId:
        """A hot, stable cube; of text at ``n1`` where no place is named."""
        self._made += 1
        id = CubeId(f"{self._made:04d}")
        given: dict[str, Any] = {
            "version": 1,
            "indexed_version": 1,
            "epoch": 0,
            "num_bytes": 1_000,
            "tokens": 500,
            "changed_at": NOW - 1e6,
            "created_at": NOW - 1e6,
            "state": State.ACTIVATED,
            "kind": Kind.FACT,
            "rate": 10.0,
            "used_at": self.now,
            "owner": held[0] if held else text("n1"),
            **more,
        }
        places = [
            Held(place, 1, 500_000 if place.tier is Tier.ACTIVATION else 1_000)
            for place in held or (text("n1"),)
        ]
        self.world.put(CubeFacts(id=id, tenant=tenant, **given), places)
        return id

    def plan(self, profile: Profile | None = None, **more: Any) -> Plan:
        limits = more.pop("limits", None) or MoveLimits()
        tenants = more.pop("tenants", {})
        profiles = Profiles(default=profile or Profile(), tenants=tenants)
        return Planner(profiles, limits).plan(self.world, self.now, **more)
