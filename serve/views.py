"""Cubes and results as JSON values; the schemas are in ``serve.models``."""

from datetime import datetime
from typing import Any

from memcube.catalog import KeyInfo, KvPlace, Lineage, Page
from memcube.chat.migration import Migrated
from memcube.cube import MemCube, Residency, Version
from memcube.retrieval.ranker import Hit
from memcube.service import AddOutcome


def moment(value: datetime | None) -> str | None:
    return None if value is None else value.isoformat()


def location(of: str, *, whole: bool) -> str:
    """A payload's place. Where on its host that is, is only for who runs the system."""
    return of if whole else of.rpartition("/plaintext/")[2]


def cube(
    cube: MemCube, residency: list[Residency] | None = None, *, whole_locations: bool = False
) -> dict[str, Any]:
    d, g, u = cube.descriptive, cube.governance, cube.usage
    view = {
        "id": cube.id,
        "shape": cube.shape,
        "state": cube.state,
        "version": cube.version,
        "text": cube.text,
        "members": list(cube.members),
        "parents": [
            {"id": p.id, "version": p.version, "relation": p.relation} for p in cube.parents
        ],
        "kind": d.kind,
        "origin": d.origin,
        "role": d.role,
        "speaker": d.speaker,
        "user_id": d.user_id,
        "agent_id": d.agent_id,
        "run_id": d.run_id,
        "tags": list(d.tags),
        "metadata": d.metadata,
        "created_at": moment(d.created_at),
        "event_time": moment(d.event_time),
        "updated_at": moment(cube.updated_at),
        "sources": [
            {
                "ref": s.ref,
                "role": s.role,
                "speaker": s.speaker,
                "time": moment(s.time),
                "text": s.text,
            }
            for s in d.sources
        ],
        "owner": g.owner,
        "sensitivity": g.sensitivity,
        "priority": g.priority,
        "expires_at": moment(g.expires_at),
        "frozen": g.frozen,
        "repeats": u.repeats,
        "uses": u.uses,
        "last_used_at": moment(u.last_used_at),
        "rate": u.rate,
        "indexed": cube.indexed,
    }
    if residency is not None:
        view["residency"] = [
            _residency(r, r.tier, location(r.location, whole=whole_locations), r.version, r.epoch)
            for r in residency
        ]
    return view


def _residency(
    place: Residency | KvPlace, tier: str, location: str, version: int, epoch: int
) -> dict[str, Any]:
    return {
        "tier": tier,
        "medium": place.medium,
        "location": location,
        "version": version,
        "size_bytes": place.size_bytes,
        "epoch": epoch,
    }


def migrated(done: Migrated, tier: str) -> dict[str, Any]:
    return {
        "id": done.cube.id,
        "tier": tier,
        "version": done.cube.version,
        "cubes": done.num_cubes,
        "tokens": done.num_tokens,
        "built_tokens": done.built_tokens,
        "size_bytes": sum(place.size_bytes for place in done.kv),
        "dropped_bytes": done.dropped_bytes,
        "engine": done.engine,
        "residency": [
            _residency(place, tier, place.location, done.cube.version, 0) for place in done.kv
        ],
    }


def added(outcome: AddOutcome) -> dict[str, Any]:
    view: dict[str, Any] = {
        "results": [
            {
                "id": r.cube.id,
                "event": r.event,
                "version": r.version,
                "text": r.cube.text,
                "indexed": r.cube.id in outcome.indexed,
            }
            for r in outcome.results
        ]
    }
    if outcome.fallback is not None:
        view["fallback"] = outcome.fallback
    return view


def hit(found: Hit) -> dict[str, Any]:
    payload = found.cube.payload
    view = {
        "id": found.id,
        "text": found.cube.text,
        "score": round(found.score, 6),
        "version": found.cube.version,
        "tags": payload.get("tags", []),
        "metadata": payload["metadata"],
        "created_at": moment(payload["created_at"]),
        "event_time": moment(payload.get("event_time")),
    }
    for name in ("kind", "role", "speaker", "user_id", "agent_id", "run_id"):
        view[name] = payload.get(name)
    if found.explain is not None:
        view["explain"] = dict(found.explain)
    return view


def page(page: Page) -> dict[str, Any]:
    return {"results": [cube(c) for c in page.cubes], "next_cursor": page.next_cursor}


def version(v: Version) -> dict[str, Any]:
    return {
        "version": v.version,
        "text": v.text,
        "members": list(v.members),
        "metadata": v.metadata,
        "tags": list(v.tags),
        "created_at": moment(v.created_at),
        "author": v.author,
        "reason": v.reason,
    }


def lineage(found: Lineage) -> dict[str, Any]:
    def edges(side: str) -> list[dict[str, Any]]:
        return [
            {"id": e.id, "version": e.version, "relation": e.relation, "child": e.child}
            for e in getattr(found, side)
        ]

    return {"ancestors": edges("ancestors"), "descendants": edges("descendants")}


def key(info: KeyInfo, secret: str | None = None) -> dict[str, Any]:
    view = {
        "id": info.id,
        "tenant": info.tenant,
        "name": info.name,
        "role": info.role,
        "hint": info.hint,
        "created_at": moment(info.created_at),
        "expires_at": moment(info.expires_at),
        "revoked_at": moment(info.revoked_at),
    }
    return view if secret is None else view | {"key": secret}
