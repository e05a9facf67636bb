"""What the scheduler knows: cubes and where their payloads lie, places and how full they are, nodes.

In columns, so that a round over a million cubes is some passes over arrays, and with the set of what
changed, so that a steady round looks at that alone. ``World`` is kept up to date from the catalog; it may
lag behind it, since every action is conditional on the cube's epoch there.

Times are seconds since 1970 and always arguments. One thread.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from memcube.cube import Kind, Sensitivity
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import SEARCHABLE, State
from memcube.scheduler.actions import Medium, Place, Tier
from memcube.scheduler.columns import NONE, Columns, Names

STATES = list(State)
KINDS = list(Kind)
SENSITIVITIES = list(Sensitivity)
TIERS = list(Tier)
MEDIA = list(Medium)
_STATE_NUMBERS = {state: number for number, state in enumerate(STATES)}
_KIND_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
_SENSITIVITY_NUMBERS = {one: number for number, one in enumerate(SENSITIVITIES)}
NEVER = np.inf
AFFINITY_HALF_LIFE_S = 900.0
"""How fast it fades that a cube was close to what its tenant talked about."""

_CUBES: dict[str, tuple[str, object]] = {
    "tenant": ("i4", NONE),
    "scope": ("i4", NONE),
    "labels": ("i4", NONE),
    "owner": ("i2", NONE),
    "state": ("u1", 0),
    "kind": ("u1", 0),
    "sensitivity": ("u1", 0),
    "searchable": ("?", False),
    "frozen": ("?", False),
    "pinned": ("?", False),
    "consents": ("?", False),
    "session_bound": ("?", False),
    "version": ("i4", 0),
    "indexed_version": ("i4", 0),
    "epoch": ("i8", 0),
    "rate": ("f4", 0.0),
    "affinity": ("f4", 0.0),
    "tokens": ("i4", 0),
    "num_bytes": ("i8", 0),
    "used_at": ("f8", 0.0),
    "affine_at": ("f8", 0.0),
    "changed_at": ("f8", 0.0),
    "created_at": ("f8", 0.0),
    "expires_at": ("f8", NEVER),
    "moved_at": ("f8", -NEVER),
    "due": ("f8", NEVER),
    "alive": ("?", False),
    "busy": ("?", False),
    "dirty": ("?", False),
    "first": ("i4", NONE),
    "plaintext": ("u1", 0),
    "activation": ("u1", 0),
    "parametric": ("u1", 0),
    "outdated": ("u1", 0),
    "kv_medium": ("u1", 255),
}
_HELD: dict[str, tuple[str, object]] = {
    "cube": ("i4", NONE),
    "next": ("i4", NONE),
    "place": ("i2", NONE),
    "version": ("i4", 0),
    "num_bytes": ("i8", 0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CubeFacts:
    """What the catalog says of a cube. ``owner`` is who takes its writes, where that is noted; ``rate`` is uses per day as of ``used_at``; ``tokens`` its text's;
    ``consents``: its owner lets it be trained; ``session_bound``: it belongs to one run alone."""

    id: CubeId
    tenant: TenantId
    version: int
    epoch: int
    num_bytes: int
    tokens: int
    changed_at: float
    created_at: float
    state: State = State.GENERATED
    kind: Kind = Kind.EPISODE
    sensitivity: Sensitivity = Sensitivity.NORMAL
    scope: str = ""
    labels: frozenset[str] = frozenset()
    frozen: bool = False
    pinned: bool = False
    consents: bool = False
    session_bound: bool = False
    indexed_version: int = 0
    rate: float = 0.0
    used_at: float = 0.0
    expires_at: float = NEVER
    moved_at: float = -NEVER
    busy: bool = False
    owner: Place | None = None


class Held(NamedTuple):
    """A payload that the catalog lists."""

    place: Place
    version: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node of the cluster. One that drains takes nothing new; one that is not alive has no payload
    that can be read, and may come back with what lies on its disk. ``since`` is when that last changed."""

    name: str
    labels: frozenset[str] = frozenset()
    alive: bool = True
    draining: bool = False
    since: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Room at a place, and its watermarks: over ``high`` it is emptied down to ``low``. ``load_s_per_byte``
    is what it takes to bring a byte from there to compute."""

    num_bytes: int
    low: float = 0.85
    high: float = 0.95
    load_s_per_byte: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.low <= self.high <= 1.0:
            raise ValueError("watermarks are fractions with 0 < low <= high <= 1")


class World:
    """The scheduler's picture of cubes, places and nodes."""

    def __init__(self, *, kv_bytes_per_token: int = 46_080, half_life_s: float = 7 * 86_400.0):
        self.kv_bytes_per_token = kv_bytes_per_token
        self.kv_least_tokens = 1
        self.kv_most_tokens = np.iinfo(np.int32).max
        """What is shorter leaves nothing in an engine, what is longer doesn't fit its window."""
        self.half_life_s = half_life_s
        self.cubes = Columns(_CUBES)
        self.held = Columns(_HELD)
        self.ids: list[tuple[TenantId, CubeId]] = []
        self.tenants: Names[TenantId] = Names()
        self.scopes: Names[tuple[TenantId, str]] = Names()
        self.labels: Names[frozenset[str]] = Names()
        self.places: Names[Place] = Names()
        self.capacities: list[Capacity] = []
        self.used_bytes: list[int] = []
        self.reserved_bytes: list[int] = []
        """By place: what copies under way will take."""
        self.nodes: dict[str, Node] = {}
        self.down: set[Place] = set()
        """Places that don't answer now, on nodes that do: nothing is read there, and nothing planned."""
        self.tenant_epochs: dict[TenantId, int] = {}
        """Of what a tenant has in the plaintext tier, where it moves as one."""
        self.tenant_places: dict[TenantId, Place] = {}
        """Where tenants lie that move as one, those without a cube too."""
        self.moving_tenants: set[TenantId] = set()
        self.proposed: dict[tuple[TenantId, str], int] = {}
        """By scope the period in which its consolidation was last proposed."""
        self._rows: dict[tuple[TenantId, CubeId], int] = {}
        self._dirty: list[int] = []
        self._free_held: list[int] = []

    # -- nodes and places ----------------------------------------------------------------------

    def set_node(self, node: Node) -> None:
        """Add or change a node. When its labels or its fitness change, what lies there is looked at again; when
        it takes new payloads from now on, all is."""
        before, self.nodes[node.name] = self.nodes.get(node.name), node
        took = before is not None and before.alive and not before.draining
        if node.alive and not node.draining and not took:
            self._touch_everything()
        elif before is not None and before != node:
            for number, place in enumerate(self.places):
                if place.node == node.name:
                    self._touch_all(self.at(number)[0])

    def remove_node(self, name: str) -> None:
        """Forget a node that will not come back, and what was listed there."""
        self.nodes.pop(name, None)
        for number, place in enumerate(self.places):
            if place.node == name:
                self._empty(number)

    def remove_location(self, location: str) -> None:
        """Forget a location that will not come back, and what was listed there; a node with all its parts."""
        if location in self.nodes:
            self.remove_node(location)
            return
        for number, place in enumerate(self.places):
            if place.location == location:
                self._empty(number)

    def _empty(self, number: int) -> None:
        place = self.places[number]
        for row in self.at(number)[0].tolist():
            self.set_held(row, [h for h in self.held_by(row) if h.place != place])
        self.capacities[number] = Capacity(num_bytes=0)

    def set_place(self, place: Place, capacity: Capacity) -> int:
        """Add a place or change its capacity; its number. Where there was no room before, all cubes are looked
        at again."""
        number = self.places.number(place)
        if capacity.num_bytes and (
            number == len(self.capacities) or not self.capacities[number].num_bytes
        ):
            self._touch_everything()
        if number == len(self.capacities):
            self.capacities.append(capacity)
            self.used_bytes.append(0)
            self.reserved_bytes.append(0)
        else:
            self.capacities[number] = capacity
        return number

    def set_down(self, place: Place, is_down: bool) -> None:
        """Note whether a place answers. When it does again, all cubes are looked at again."""
        if is_down:
            self.down.add(place)
        elif place in self.down:
            self.down.remove(place)
            self._touch_everything()

    def _touch_everything(self) -> None:
        self._touch_all(np.flatnonzero(self.cubes["alive"]))

    def _place(self, place: Place) -> int:
        """A place's number; one that was not told of has no room."""
        found = self.places.get(place)
        return self.set_place(place, Capacity(num_bytes=0)) if found == NONE else found

    def is_fit(self, place: int) -> bool:
        """Whether a place may take new payloads."""
        node = self.nodes.get(self.places[place].node)
        return self.is_readable(place) and node is not None and not node.draining

    def is_readable(self, place: int) -> bool:
        """Whether what lies at a place can be read now."""
        where = self.places[place]
        node = self.nodes.get(where.node)
        return node is not None and node.alive and where not in self.down

    def owns(self, place: int) -> bool:
        """Whether a place takes the writes of any cube."""
        return bool((self.cubes["owner"] == place).any())

    # -- cubes ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, tenant: TenantId, id: CubeId) -> int:
        """A cube's row, or ``NONE``."""
        return self._rows.get((tenant, id), NONE)

    def put(self, facts: CubeFacts, held: Sequence[Held]) -> int:
        """Note a cube and all that is listed of it, in place of what was known; its row."""
        name = (facts.tenant, facts.id)
        row = self._rows.get(name, NONE)
        if row == NONE:
            row = self._rows[name] = self.cubes.add()
            self.ids.append(name)
        values: dict[str, object] = {column: getattr(facts, column) for column in _AS_GIVEN}
        values["tenant"] = self.tenants.number(facts.tenant)
        values["scope"] = self.scopes.number((facts.tenant, facts.scope))
        values["labels"] = self.labels.number(facts.labels)
        values["state"] = _STATE_NUMBERS[facts.state]
        values["kind"] = _KIND_NUMBERS[facts.kind]
        values["sensitivity"] = _SENSITIVITY_NUMBERS[facts.sensitivity]
        values["searchable"] = facts.state in SEARCHABLE
        values["owner"] = NONE if facts.owner is None else self._place(facts.owner)
        values["alive"] = True
        self.cubes.put(row, values)
        self.set_held(row, held)
        return row

    def load(
        self,
        ids: Sequence[tuple[TenantId, CubeId]],
        columns: Mapping[str, np.ndarray | float],
    ) -> np.ndarray:
        """Note many new cubes at once, with the columns of ``_CUBES`` as arrays; their rows."""
        first = self.cubes.add(len(ids))
        rows = np.arange(first, first + len(ids))
        self.ids.extend(ids)
        self._rows.update(zip(ids, rows.tolist(), strict=True))
        for name, values in columns.items():
            self.cubes[name][first:] = values
        self.cubes["alive"][first:] = True
        self._touch_all(rows)
        return rows

    def remove(self, tenant: TenantId, id: CubeId) -> None:
        """Forget a cube that is gone. Its row stays empty."""
        row = self._rows.pop((tenant, id), NONE)
        if row != NONE:
            self.set_held(row, ())
            self.cubes["alive"][row] = False

    def cubes_of(self, tenant: TenantId) -> list[tuple[TenantId, CubeId]]:
        """All cubes of a tenant."""
        number = self.tenants.get(tenant)
        rows = np.flatnonzero((self.cubes["tenant"] == number) & self.cubes["alive"])
        return [self.ids[row] for row in rows.tolist()] if number != NONE else []

    def set_held(self, row: int, held: Sequence[Held]) -> None:
        """Note where a cube's payloads lie, in place of what was known."""
        h = self.held
        number = int(self.cubes["first"][row])
        while number != NONE:
            self.used_bytes[h["place"][number]] -= int(h["num_bytes"][number])
            h["cube"][number] = NONE
            self._free_held.append(number)
            number = int(h["next"][number])
        first = NONE
        for one in held:
            number = self._free_held.pop() if self._free_held else h.add()
            place = self._place(one.place)
            h.put(
                number,
                {
                    "cube": row,
                    "next": first,
                    "place": place,
                    "version": one.version,
                    "num_bytes": one.num_bytes,
                },
            )
            self.used_bytes[place] += one.num_bytes
            first = number
        self.cubes["first"][row] = first
        self._count(row)
        self.touch(row)

    def load_held(
        self, rows: np.ndarray, place: int, num_bytes: np.ndarray, versions: np.ndarray
    ) -> None:
        """Note one more payload of each of many cubes, all at one place."""
        h, c = self.held, self.cubes
        first = h.add(len(rows))
        numbers = np.arange(first, first + len(rows))
        h["cube"][first:] = rows
        h["next"][first:] = c["first"][rows]
        h["place"][first:] = place
        h["version"][first:] = versions
        h["num_bytes"][first:] = num_bytes
        c["first"][rows] = numbers
        self.used_bytes[place] += int(num_bytes.sum())
        where = self.places[place]
        current = versions == c["version"][rows]
        c[where.tier][rows] += current.astype("u1")
        c["outdated"][rows] += (~current).astype("u1")
        if where.tier is Tier.ACTIVATION:
            nearest = np.where(current, MEDIA.index(where.medium), 255).astype("u1")
            c["kv_medium"][rows] = np.minimum(c["kv_medium"][rows], nearest)

    def held_by(self, row: int) -> list[Held]:
        """The payloads of a cube, of old versions too."""
        h = self.held
        found = []
        number = int(self.cubes["first"][row])
        while number != NONE:
            place = self.places[h["place"][number]]
            found.append(Held(place, int(h["version"][number]), int(h["num_bytes"][number])))
            number = int(h["next"][number])
        return found

    def bytes_at(self, row: int, place: int) -> int:
        """The bytes of a cube at a place."""
        h, total = self.held, 0
        number = int(self.cubes["first"][row])
        while number != NONE:
            if h["place"][number] == place:
                total += int(h["num_bytes"][number])
            number = int(h["next"][number])
        return total

    def at(self, place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows of the cubes with a payload at a place, and the bytes and the version of each there."""
        h = self.held
        here = np.flatnonzero((h["place"] == place) & (h["cube"] != NONE))
        return h["cube"][here], h["num_bytes"][here], h["version"][here]

    # -- usage ---------------------------------------------------------------------------------

    def use(self, row: int, uses: int, now: float) -> None:
        """Count uses, as the catalog does."""
        c = self.cubes
        faded = 0.5 ** (max(now - c["used_at"][row], 0.0) / self.half_life_s)
        c["rate"][row] = c["rate"][row] * faded + uses * 0.6931 * 86_400.0 / self.half_life_s
        c["used_at"][row] = now
        self.touch(row)

    def set_affinity(self, scores: Mapping[int, float], now: float) -> None:
        """How close cubes (by row) are to what their tenant talks about, from 0 to 1: the scores of its
        latest searches. It fades by half in ``AFFINITY_HALF_LIFE_S``."""
        for row, score in scores.items():
            self.cubes["affinity"][row] = score
            self.cubes["affine_at"][row] = now
            self.touch(row)

    def touch(self, row: int) -> None:
        """Look at a cube again in the next round."""
        if not self.cubes["dirty"][row]:
            self.cubes["dirty"][row] = True
            self._dirty.append(row)

    def _touch_all(self, rows: Iterable[int] | np.ndarray) -> None:
        rows = np.asarray(rows)
        fresh = np.unique(rows[~self.cubes["dirty"][rows]]) if len(rows) else rows
        self.cubes["dirty"][fresh] = True
        self._dirty.extend(fresh.tolist())

    def _count(self, row: int) -> None:
        """Count the copies of a cube's present version by tier."""
        c, h = self.cubes, self.held
        version = c["version"][row]
        counts = dict.fromkeys(TIERS, 0)
        nearest, outdated = 255, 0
        number = int(c["first"][row])
        while number != NONE:
            if h["version"][number] == version:
                place = self.places[h["place"][number]]
                counts[place.tier] += 1
                if place.tier is Tier.ACTIVATION:
                    nearest = min(nearest, MEDIA.index(place.medium))
            else:
                outdated += 1
            number = int(h["next"][number])
        c.put(row, {**counts, "kv_medium": nearest, "outdated": outdated})

    # -- what is to be looked at ---------------------------------------------------------------

    def pending(self, now: float, *, full: bool = False) -> np.ndarray:
        """The rows that changed, or whose time has come: what the next round looks at. With ``full`` all."""
        c = self.cubes
        if full:
            return np.flatnonzero(c["alive"])
        rows = np.flatnonzero(c["due"] <= now)
        if self._dirty:
            rows = np.union1d(rows, np.asarray(self._dirty))
        return rows[c["alive"][rows]]

    def looked_at(self, rows: np.ndarray, due: np.ndarray) -> None:
        """Note that a round has looked at rows, and when each is to be looked at again."""
        self.cubes["dirty"][rows] = False
        self.cubes["due"][rows] = due
        self._dirty = [row for row in self._dirty if self.cubes["dirty"][row]]

    def look_again(self, row: int, at: float) -> None:
        """Look at a cube again at a time, if not before."""
        self.cubes["due"][row] = min(self.cubes["due"][row], at)

    @property
    def num_bytes(self) -> int:
        """What the columns take."""
        return self.cubes.num_bytes + self.held.num_bytes


_AS_GIVEN = (
    "frozen",
    "pinned",
    "consents",
    "session_bound",
    "version",
    "indexed_version",
    "epoch",
    "rate",
    "used_at",
    "tokens",
    "num_bytes",
    "changed_at",
    "created_at",
    "expires_at",
    "moved_at",
    "busy",
)
