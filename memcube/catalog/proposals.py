"""Proposals to make one cube of several: what the finder noted and what became of it.

An open proposal names cubes in versions. When one of them has moved on it is *outdated*, which is
told at every read and needs no writing down; it can't be applied then. A proposal holds a text of
its cubes, so it goes with the first of them that is wiped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from memcube.catalog import schema
from memcube.catalog.engine import Database
from memcube.catalog.schema import micros, moment, moment_or_none
from memcube.cube import Draft, MemCube
from memcube.errors import Conflict, NotFound
from memcube.ids import CubeId, IdSource, TenantId, digest

if TYPE_CHECKING:
    from memcube.catalog.cubes import Cubes

KEPT = timedelta(days=30)
_CHUNK = 500
_proposals, _named, _cubes = schema.proposals, schema.proposal_cubes, schema.cubes


class ProposalKind(StrEnum):
    """Why the cubes belong together."""

    DUPLICATE = "duplicate"
    CONTRADICTION = "contradiction"


class ProposalState(StrEnum):
    """open → applied or dismissed; outdated once a cube of an open one has changed."""

    OPEN = "open"
    APPLIED = "applied"
    DISMISSED = "dismissed"
    OUTDATED = "outdated"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewProposal:
    """``cubes`` are those to be merged, each in its version; ``text`` is what they would become.
    ``why`` says it in numbers and words, as JSON, without a text of theirs."""

    kind: ProposalKind
    cubes: Mapping[CubeId, int]
    text: str
    why: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A noted one. ``result`` is the cube that applying it made."""

    id: str
    kind: ProposalKind
    state: ProposalState
    cubes: Mapping[CubeId, int]
    text: str
    why: Mapping[str, Any]
    created_at: datetime
    decided_at: datetime | None
    decided_by: str | None
    result: CubeId | None


class ProposalBook:
    """Proposals by tenant. A foreign id is NotFound, as an unknown one is."""

    def __init__(self, database: Database, cubes: "Cubes", *, new_id: IdSource) -> None:
        self._database = database
        self._cubes = cubes
        self._new_id = new_id

    def note(
        self, tenant: TenantId, found: Sequence[NewProposal], *, now: datetime
    ) -> list[Proposal]:
        """Note what is new, and return it: the same of the same versions, decided or not, is not."""

        def work(connection: sa.Connection) -> list[Proposal]:
            fresh = {_fingerprint(one): one for one in found}
            known = sa.select(_proposals.c.fingerprint).where(
                _proposals.c.tenant == tenant, _proposals.c.fingerprint.in_(list(fresh))
            )
            for fingerprint in connection.execute(known).scalars():
                del fresh[fingerprint]
            return [
                self._insert(connection, tenant, one, fingerprint, now)
                for fingerprint, one in fresh.items()
            ]

        return self._database.write(work) if found else []

    def _insert(
        self,
        connection: sa.Connection,
        tenant: TenantId,
        new: NewProposal,
        fingerprint: str,
        now: datetime,
    ) -> Proposal:
        row = {
            "id": self._new_id(now),
            "tenant": tenant,
            "kind": str(new.kind),
            "state": str(ProposalState.OPEN),
            "fingerprint": fingerprint,
            "text": new.text,
            "why": dict(new.why),
            "created_at": micros(now),
            "decided_at": None,
            "decided_by": None,
            "result": None,
        }
        connection.execute(sa.insert(_proposals), row)
        connection.execute(
            sa.insert(_named),
            [{"proposal": row["id"], "cube": id, "version": v} for id, v in new.cubes.items()],
        )
        return _proposal(row, new.cubes, outdated=False)

    def find(
        self,
        tenant: TenantId,
        *,
        state: ProposalState | None = None,
        limit: int,
        after: str | None = None,
        now: datetime,
    ) -> list[Proposal]:
        """Newest first. ``after`` is the last id of the page before."""
        query = sa.select(_proposals).where(_proposals.c.tenant == tenant)
        if state in (ProposalState.APPLIED, ProposalState.DISMISSED):
            query = query.where(_proposals.c.state == str(state))
        elif state is not None:
            moved = _moved_on(now)
            is_so = moved if state is ProposalState.OUTDATED else ~moved
            query = query.where(_proposals.c.state == str(ProposalState.OPEN), is_so)
        if after is not None:
            query = query.where(_proposals.c.id < after)
        query = query.order_by(_proposals.c.id.desc()).limit(limit)
        with self._database.reading() as connection:
            return _read(connection, query, now)

    def get(self, tenant: TenantId, id: str, *, now: datetime) -> Proposal:
        """One.

        Raises:
            NotFound: none in this tenant.
        """
        with self._database.reading() as connection:
            return _one(connection, tenant, id, now)

    def apply(
        self, tenant: TenantId, id: str, draft: Draft, *, author: str, now: datetime
    ) -> tuple[Proposal, MemCube]:
        """Fuse the cubes into ``draft`` and close the proposal, in one transaction. Applied already,
        it is the same answer.

        Raises:
            NotFound: no such proposal.
            Conflict: dismissed, or outdated. Frozen: a cube is frozen. Nothing is changed.
        """

        def work(connection: sa.Connection) -> tuple[Proposal, MemCube | None]:
            found = _locked(connection, tenant, id, now)
            if found.state is ProposalState.APPLIED:
                return found, None
            _check_open(found)
            cube = self._cubes.fuse_in(
                connection,
                tenant,
                found.cubes,
                draft,
                author=author,
                now=now,
                versions=found.cubes,
            )
            _decide(connection, id, ProposalState.APPLIED, author, now, result=cube.id)
            return _one(connection, tenant, id, now), cube

        proposal, cube = self._database.write(work)
        if cube is None:
            assert proposal.result is not None
            cube = self._cubes.get(tenant, proposal.result, now=now)
        return proposal, cube

    def dismiss(self, tenant: TenantId, id: str, *, author: str, now: datetime) -> Proposal:
        """Close a proposal without a change; it is not made again of these versions. Idempotent.

        Raises:
            NotFound: no such proposal. Conflict: it was applied.
        """

        def work(connection: sa.Connection) -> Proposal:
            found = _locked(connection, tenant, id, now)
            if found.state is ProposalState.APPLIED:
                raise Conflict(f"proposal {id!r} was applied; restore its cubes to undo it")
            if found.state is not ProposalState.DISMISSED:
                _decide(connection, id, ProposalState.DISMISSED, author, now)
            return _one(connection, tenant, id, now)

        return self._database.write(work)

    def prune(self, *, now: datetime) -> int:
        """Delete what was decided, or became outdated, and is older than KEPT; returns how many."""
        old = sa.select(_proposals.c.id).where(
            _proposals.c.created_at < micros(now - KEPT),
            sa.or_(_proposals.c.state != str(ProposalState.OPEN), _moved_on(now)),
        )

        def work(connection: sa.Connection) -> int:
            ids = list(connection.execute(old.limit(_CHUNK)).scalars())
            _delete(connection, ids)
            return len(ids)

        return self._database.write(work)


def drop_proposals(connection: sa.Connection, cubes: Sequence[str]) -> None:
    """For the transaction that wipes at most some hundred cubes."""
    query = sa.select(_named.c.proposal).where(_named.c.cube.in_(cubes)).distinct()
    ids = list(connection.execute(query).scalars())
    for start in range(0, len(ids), _CHUNK):
        _delete(connection, ids[start : start + _CHUNK])


def _delete(connection: sa.Connection, ids: Sequence[str]) -> None:
    if ids:
        connection.execute(sa.delete(_named).where(_named.c.proposal.in_(ids)))
        connection.execute(sa.delete(_proposals).where(_proposals.c.id.in_(ids)))


def _moved_on(now: datetime) -> sa.ColumnElement[bool]:
    """The condition on a proposal that a cube of it is not what it was."""
    still = sa.and_(
        _cubes.c.version == _named.c.version, _cubes.c.searchable, schema.unexpired(now)
    )
    return sa.exists().where(
        _named.c.proposal == _proposals.c.id, _named.c.cube == _cubes.c.id, ~still
    )


def _fingerprint(new: NewProposal) -> str:
    cubes = [part for id in sorted(new.cubes) for part in (id, new.cubes[id])]
    return digest("proposal", str(new.kind), *cubes)


def _check_open(found: Proposal) -> None:
    if found.state is ProposalState.OUTDATED:
        raise Conflict(f"proposal {found.id!r} is outdated: a cube of it has changed; find anew")
    if found.state is not ProposalState.OPEN:
        raise Conflict(f"proposal {found.id!r} is {found.state}")


def _decide(
    connection: sa.Connection,
    id: str,
    state: ProposalState,
    author: str,
    now: datetime,
    *,
    result: CubeId | None = None,
) -> None:
    connection.execute(
        sa.update(_proposals)
        .where(_proposals.c.id == id)
        .values(state=str(state), decided_at=micros(now), decided_by=author, result=result)
    )


def _locked(connection: sa.Connection, tenant: TenantId, id: str, now: datetime) -> Proposal:
    query = sa.select(_proposals.c.id).where(_proposals.c.tenant == tenant, _proposals.c.id == id)
    connection.execute(query.with_for_update())
    return _one(connection, tenant, id, now)


def _one(connection: sa.Connection, tenant: TenantId, id: str, now: datetime) -> Proposal:
    query = sa.select(_proposals).where(_proposals.c.tenant == tenant, _proposals.c.id == id)
    found = _read(connection, query, now)
    if not found:
        raise NotFound("proposal", id)
    return found[0]


def _read(connection: sa.Connection, query: sa.Select[Any], now: datetime) -> list[Proposal]:
    moved = _moved_on(now).label("moved_on")
    rows = connection.execute(query.add_columns(moved)).mappings().all()
    cubes: dict[str, dict[CubeId, int]] = {row["id"]: {} for row in rows}
    ids = list(cubes)
    for start in range(0, len(ids), _CHUNK):
        part = sa.select(_named).where(_named.c.proposal.in_(ids[start : start + _CHUNK]))
        for row in connection.execute(part.order_by(_named.c.cube)):
            cubes[row.proposal][CubeId(row.cube)] = row.version
    return [_proposal(row, cubes[row["id"]], outdated=bool(row["moved_on"])) for row in rows]


def _proposal(row: Mapping[Any, Any], cubes: Mapping[CubeId, int], *, outdated: bool) -> Proposal:
    state = ProposalState(row["state"])
    if state is ProposalState.OPEN and outdated:
        state = ProposalState.OUTDATED
    return Proposal(
        id=row["id"],
        kind=ProposalKind(row["kind"]),
        state=state,
        cubes=cubes,
        text=row["text"],
        why=row["why"],
        created_at=moment(row["created_at"]),
        decided_at=moment_or_none(row["decided_at"]),
        decided_by=row["decided_by"],
        result=None if row["result"] is None else CubeId(row["result"]),
    )
