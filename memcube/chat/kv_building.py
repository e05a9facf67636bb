"""What is read into the activation tier for a cube: one way for whoever asks, an operator or the scheduler.

The KV of a cube is that of the prompt which names it by ``cube_ids``: its members (or itself), in their
order, behind the server's system text. It is keyed by what was read, so KV of an old version is found by
nobody; who builds it looks once more at the versions when it is built, and has what moved on forgotten.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from memcube.activation.contract import AdapterRef, Mode
from memcube.catalog import Catalog
from memcube.chat.contract import BuildRequest
from memcube.chat.selection import pack
from memcube.cube import MemCube, Shape
from memcube.errors import Conflict
from memcube.ids import CubeId, TenantId, digest
from memcube.lifecycle import SEARCHABLE


@dataclass(frozen=True, slots=True)
class KvSource:
    """A cube, and the memories whose text a prompt has that names it."""

    cube: MemCube
    members: Sequence[MemCube]

    def checked(self) -> "KvSource":
        """This one.

        Raises:
            Conflict: it holds no text that a prompt may have.
        """
        if not self.members:
            raise Conflict(
                f"cube {self.cube.id!r} is {self.cube.state} and out of search; restore it first"
                if self.cube.state not in SEARCHABLE
                else f"cube {self.cube.id!r} holds no text; there is nothing to build"
            )
        return self

    @property
    def versions(self) -> dict[CubeId, int]:
        """Of the cube and its members, as they were read."""
        return {one.id: one.version for one in (*self.members, self.cube)}

    def request(self, mode: Mode, *, adapter: AdapterRef | None = None) -> BuildRequest:
        """What an engine is asked to build."""
        tenant = self.cube.tenant
        return BuildRequest(
            segments=tuple(packed.segment for packed in pack(self.members, worth=1.0)),
            tenant=tenant,
            salt=tenant,
            group=digest("migrated", tenant, self.cube.id),
            mode=Mode.EXACT if mode is Mode.OFF else mode,
            adapter=adapter,
        )


def read_source(
    catalog: Catalog, tenant: TenantId, id: CubeId, *, now: datetime, limit: int
) -> KvSource:
    """A cube as the catalog has it now; a blocking call.

    Raises:
        NotFound: it is gone. LimitExceeded: it has more than ``limit`` members.
    """
    cube = catalog.cubes.get(tenant, id, now=now)
    if cube.shape is Shape.LEAF:
        found = [cube]
    else:
        ids = catalog.cubes.expand(tenant, [id], now=now, limit=limit)
        found = catalog.cubes.get_many(tenant, ids, now=now)
    return KvSource(cube, [one for one in found if one.text and one.state in SEARCHABLE])


def moved_on(catalog: Catalog, source: KvSource, *, now: datetime) -> list[CubeId]:
    """Those of a source that have changed since it was read, or are out of search; a blocking call."""
    versions = source.versions
    live = catalog.cubes.live_versions(source.cube.tenant, list(versions), now=now)
    return [id for id, version in versions.items() if live.get(id) != version]
