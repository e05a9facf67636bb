"""The one excuse of the simulation's checker: a drop whose other copy was lost around its commit.

Before a drop commits its leader reads another copy. A fault may take that copy after the read and before the
commit, as nobody can read a node and write the catalog at one instant: then a cube has no copy on the list,
while the bytes that were struck are still there. Excused is only this: the leader that committed had heard, of
a read made after the drop was journaled, that the other copy was good, and an injected fault took that copy
after the read. The bytes must then stay until they are listed again or the cube has changed, unless a read after
the commit found another copy, or a node was down for so long that the drop was given up.
"""

from collections import Counter
from datetime import timedelta
from typing import NamedTuple

from memcube.catalog.action_rows import ActionRecord
from memcube.ids import CubeId, TenantId
from memcube.scheduler.actions import ActionState, Tier
from memcube.testing.sim_actors import Cluster
from memcube.testing.sim_kernel import START
from memcube.testing.sim_nodes import Read, Slot

Key = tuple[TenantId, CubeId]


class _Commit(NamedTuple):
    at_s: float
    leader: int


class DropWatch:
    """What leaders read before and after drops commit, and what faults took since."""

    def __init__(self, cluster: Cluster, counts: Counter[str]) -> None:
        self._cluster = cluster
        self._counts = counts
        self._reads: dict[str, list[Read]] = {}
        """By drop: where a leader heard that a copy is good."""
        self._taken_s: dict[Slot, float] = {}
        """When a fault took a good copy."""
        self._journaled_s: dict[str, float] = {}
        self._commits: dict[str, _Commit] = {}
        self._journaled: dict[Key, str] = {}
        self._struck: dict[Key, str] = {}
        """The latest drops of a cube, and the latest that committed."""
        self._at_risk: dict[Key, str] = {}
        """Cubes without a listed copy, and the drop that is excused for it."""

    def journaled(self, drop: ActionRecord) -> None:
        if (key := _key(drop)) is not None:
            self._journaled[key] = drop.id
            self._journaled_s[drop.id] = self._cluster.kernel.now_s
            self._reads[drop.id] = []

    def committed(self, drop: ActionRecord, leader: int) -> None:
        if (key := _key(drop)) is not None:
            self._struck[key] = drop.id
            self._commits[drop.id] = _Commit(self._cluster.kernel.now_s, leader)

    def heard(self, read: Read) -> None:
        """A leader heard that a place has a payload."""
        self._reads[self._journaled[read.slot[1:]]].append(read)

    def took(self, slot: Slot) -> None:
        """A fault took a good copy."""
        self._taken_s[slot] = self._cluster.kernel.now_s

    def holds(self, key: Key) -> bool:
        """Whether bytes that an open drop has struck are a good copy of a cube."""
        id = self._struck.get(key)
        if id is None:
            return False
        record = self._cluster.catalog.actions.get(id)
        return record.is_open and self._is_there(record)

    def excuses(self, key: Key) -> bool:
        """Whether a cube may be without a listed copy. To be asked after each event that touched one."""
        id = self._at_risk.get(key) or self._lost_since_read(key)
        if id is None:
            return False
        if key not in self._at_risk:
            self._at_risk[key] = id
            self._counts["drops whose other copy was lost"] += 1
        record = self._cluster.catalog.actions.get(id)
        if record.state is ActionState.FAILED:
            return self._was_down(record)
        if record.state is ActionState.UNDONE:
            return False
        return (record.is_open and self._is_there(record)) or self._was_lost(
            record, since_commit=True
        )

    def forget(self, key: Key) -> None:
        """A cube has a listed copy, or needs none."""
        if (id := self._at_risk.pop(key, None)) is not None:
            state = self._cluster.catalog.actions.get(id).state
            self._counts["of them listed again"] += state is ActionState.UNDONE

    @property
    def at_risk(self) -> list[Key]:
        return list(self._at_risk)

    def _lost_since_read(self, key: Key) -> str | None:
        """The open drop whose other copy was lost after its leader read it."""
        id = self._struck.get(key)
        if id is None:
            return None
        record = self._cluster.catalog.actions.get(id)
        return id if record.is_open and self._was_lost(record, since_commit=False) else None

    def _was_lost(self, record: ActionRecord, *, since_commit: bool) -> bool:
        """Whether a fault took another copy after a read of it: by the leader that committed, since the drop
        was journaled; or by whoever leads, since it committed."""
        commit = self._commits[record.id]
        since_s = commit.at_s if since_commit else self._journaled_s[record.id]
        return any(
            read.at_s >= since_s
            and read.version == record.version
            and read.slot[0] != record.source
            and (since_commit or read.leader == commit.leader)
            and self._taken_s.get(read.slot, -1.0) >= read.at_s
            for read in self._reads[record.id]
        )

    def _is_there(self, record: ActionRecord) -> bool:
        place, cube = record.source, record.cube
        if place is None or cube is None:
            return False
        current = self._cluster.catalog.store.cubes[record.tenant, cube].version
        slot = place, record.tenant, cube
        return record.version == current and self._cluster.nodes[place.node].has(slot, current)

    def _was_down(self, record: ActionRecord) -> bool:
        """Whether a node that the drop needs an answer from was down since the commit, and not lost."""
        reads = self._reads[record.id]
        places = [record.source, *(read.slot[0] for read in reads)]
        nodes = [self._cluster.nodes[place.node] for place in places if place is not None]
        at = (START + timedelta(seconds=self._commits[record.id].at_s)).timestamp()
        return any(
            not node.is_lost and (not node.is_up or self._cluster.since.get(node.name, 0.0) >= at)
            for node in nodes
        )


def _key(drop: ActionRecord) -> Key | None:
    """The cube whose plaintext is dropped; None for other drops, which nothing is read for."""
    if drop.cube is None or drop.source is None or drop.source.tier is not Tier.PLAINTEXT:
        return None
    return drop.tenant, drop.cube
