"""The header of a cube that is made of several."""

from collections.abc import Sequence

from memcube.cube import Draft, Kind, MemCube, Origin, Parent, Relation


def fused_draft(text: str, parents: Sequence[MemCube]) -> Draft:
    """The fused cube keeps what all parents agree on, and the strictest of their governance."""
    first = parents[0]
    d = first.descriptive

    def agreed(name: str) -> str | None:
        values = {getattr(parent.descriptive, name) for parent in parents}
        return values.pop() if len(values) == 1 else None

    order = {"public": 0, "normal": 1, "secret": 2}
    expiries = [p.governance.expires_at for p in parents if p.governance.expires_at is not None]
    tags = tuple(dict.fromkeys(tag for parent in parents for tag in parent.descriptive.tags))
    return Draft(
        text=text,
        parents=tuple(
            Parent(id=parent.id, version=parent.version, relation=Relation.FUSED)
            for parent in parents
        ),
        user_id=agreed("user_id"),
        agent_id=agreed("agent_id"),
        run_id=agreed("run_id"),
        kind=d.kind if agreed("kind") else Kind.FACT,
        origin=Origin.INFERENCE,
        speaker=agreed("speaker"),
        role=agreed("role"),
        tags=tags,
        event_time=max(
            (p.descriptive.event_time for p in parents if p.descriptive.event_time), default=None
        ),
        sources=tuple(source for parent in parents for source in parent.descriptive.sources)[:32],
        sensitivity=max((p.governance.sensitivity for p in parents), key=lambda s: order[s]),
        priority=max(parent.governance.priority for parent in parents),
        expires_at=min(expiries, default=None),
    )
