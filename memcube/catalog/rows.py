"""Rows of the catalog as cubes, and drafts as rows."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from memcube.catalog.schema import micros, micros_or_none, moment, moment_or_none
from memcube.cube import (
    Descriptive,
    Draft,
    Governance,
    Kind,
    MemCube,
    Origin,
    Parent,
    Relation,
    Sensitivity,
    Shape,
    Source,
    Usage,
    Version,
)
from memcube.errors import NotFound
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import State


def row_by_id(
    connection: sa.Connection,
    table: sa.Table,
    id: str,
    *,
    what: str,
    tenant: TenantId | None = None,
    lock: bool = False,
) -> Mapping[Any, Any]:
    """The row of an id; with ``tenant``, of its own alone. ``lock`` holds it until the transaction ends.

    Raises:
        NotFound: there is none.
    """
    query = sa.select(table).where(table.c.id == id)
    if tenant is not None:
        query = query.where(table.c.tenant == tenant)
    if lock:
        query = query.with_for_update()
    row = connection.execute(query).mappings().first()
    if row is None:
        raise NotFound(what, id[:64])
    return row


def cube_of(row: Mapping[Any, Any]) -> MemCube:
    """The cube of a row of ``cubes``."""
    return MemCube(
        id=CubeId(row["id"]),
        tenant=TenantId(row["tenant"]),
        shape=Shape(row["shape"]),
        state=State(row["state"]),
        version=row["version"],
        text=row["text"],
        members=tuple(row["members"]),
        parents=tuple(
            Parent(id=CubeId(id), version=version, relation=Relation(relation))
            for id, version, relation in row["parents"]
        ),
        descriptive=Descriptive(
            kind=Kind(row["kind"]),
            origin=Origin(row["origin"]),
            user_id=row["user_id"],
            agent_id=row["agent_id"],
            run_id=row["run_id"],
            role=row["role"],
            speaker=row["speaker"],
            tags=tuple(row["tags"]),
            metadata=row["metadata"],
            created_at=moment(row["created_at"]),
            event_time=moment_or_none(row["event_time"]),
            thread=row["thread"],
            seq=row["seq"],
            sources=tuple(_source(source) for source in row["sources"]),
        ),
        governance=Governance(
            owner=row["owner"],
            sensitivity=Sensitivity(row["sensitivity"]),
            priority=row["priority"],
            expires_at=moment_or_none(row["expires_at"]),
            frozen=row["frozen"],
        ),
        usage=Usage(
            repeats=row["repeats"],
            uses=row["uses"],
            last_used_at=moment_or_none(row["last_used_at"]),
            rate=row["rate"],
        ),
        updated_at=moment(row["updated_at"]),
        indexed=row["searchable"] and row["indexed_version"] == row["version"],
    )


def row_of(
    draft: Draft,
    *,
    id: CubeId,
    tenant: TenantId,
    author: str,
    now: datetime,
    content_hash: str | None,
    thread: str | None,
    seq: int | None,
) -> dict[str, Any]:
    """The row of a new cube."""
    at = micros(now)
    return {
        "id": id,
        "tenant": tenant,
        "shape": str(draft.shape),
        "state": str(State.GENERATED),
        "version": 1,
        "text": draft.text,
        "content_hash": content_hash,
        "user_id": draft.user_id,
        "agent_id": draft.agent_id,
        "run_id": draft.run_id,
        "kind": str(draft.kind),
        "origin": str(draft.origin),
        "role": draft.role,
        "speaker": draft.speaker,
        "tags": list(draft.tags),
        "metadata": dict(draft.metadata),
        "sources": [source_row(source) for source in draft.sources],
        "parents": [[p.id, p.version, str(p.relation)] for p in draft.parents],
        "members": list(draft.members),
        "created_at": at,
        "updated_at": at,
        "event_time": micros_or_none(draft.event_time),
        "thread": thread,
        "seq": seq,
        "owner": author,
        "sensitivity": str(draft.sensitivity),
        "priority": draft.priority,
        "expires_at": micros_or_none(draft.expires_at),
        "frozen": False,
        "repeats": 1,
        "uses": 0,
        "last_used_at": None,
        "rate": 0.0,
        "changed_at": at,
        "searchable": True,
        "indexed_version": 0,
        "indexed_as": None,
    }


def version_row(row: Mapping[str, Any], *, author: str, reason: str) -> dict[str, Any]:
    """The entry of a cube's present content in its version chain."""
    return {
        "cube": row["id"],
        "version": row["version"],
        "text": row["text"],
        "members": row["members"],
        "tags": row["tags"],
        "metadata": row["metadata"],
        "created_at": row["updated_at"],
        "author": author,
        "reason": reason,
    }


def version_of(row: Mapping[Any, Any]) -> Version:
    return Version(
        version=row["version"],
        text=row["text"],
        members=tuple(row["members"]),
        metadata=row["metadata"],
        tags=tuple(row["tags"]),
        created_at=moment(row["created_at"]),
        author=row["author"],
        reason=row["reason"],
    )


def source_row(source: Source) -> list[Any]:
    return [source.ref, source.role, source.speaker, micros_or_none(source.time), source.text]


def _source(row: list[Any]) -> Source:
    ref, role, speaker, time, text = row
    return Source(ref=ref, role=role, speaker=speaker, time=moment_or_none(time), text=text)
