"""Tables of the catalog. Times are integers: microseconds since 1970, UTC, exact on every engine.

A change here needs a migration under ``migrations/versions``; a test compares the two.
"""

from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("id", sa.String(63), primary_key=True),
    sa.Column("shard", sa.Integer, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
)

nodes = sa.Table(
    "nodes",
    metadata,
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("labels", sa.JSON, nullable=False),
    sa.Column("alive", sa.Boolean, nullable=False),
    sa.Column("is_head", sa.Boolean, nullable=False),
    sa.Column("draining", sa.Boolean, nullable=False, comment="takes nothing new; to be emptied"),
    sa.Column("since", sa.BigInteger, nullable=False, comment="alive or draining changed"),
    sa.Column("seen_at", sa.BigInteger, nullable=False),
)

shards = sa.Table(
    "shards",
    metadata,
    sa.Column("shard", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("home", sa.String(255), nullable=False, comment="the node it belongs on"),
    sa.Column("node", sa.String(255), nullable=False, comment="where it was opened last"),
    sa.Column("location", sa.Text, nullable=False, comment="of its files"),
    sa.Column("epoch", sa.BigInteger, nullable=False, comment="0: it was never opened"),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
)

keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.id"), nullable=False, index=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("secret_sha256", sa.String(64), nullable=False, unique=True),
    sa.Column("hint", sa.String(8), nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger),
    sa.Column("revoked_at", sa.BigInteger),
)

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("holder", sa.String(128), nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger, nullable=False),
)

cubes = sa.Table(
    "cubes",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("shape", sa.String(16), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("content_hash", sa.String(64), comment="null where a repeat must not find it"),
    sa.Column("user_id", sa.Text),
    sa.Column("agent_id", sa.Text),
    sa.Column("run_id", sa.Text),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("origin", sa.String(16), nullable=False),
    sa.Column("role", sa.Text),
    sa.Column("speaker", sa.Text),
    sa.Column("tags", sa.JSON, nullable=False),
    sa.Column("metadata", sa.JSON, nullable=False),
    sa.Column("sources", sa.JSON, nullable=False),
    sa.Column("parents", sa.JSON, nullable=False),
    sa.Column("members", sa.JSON, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
    sa.Column("event_time", sa.BigInteger),
    sa.Column("thread", sa.String(64)),
    sa.Column("seq", sa.Integer),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("sensitivity", sa.String(16), nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("expires_at", sa.BigInteger),
    sa.Column("frozen", sa.Boolean, nullable=False),
    sa.Column("repeats", sa.Integer, nullable=False),
    sa.Column("uses", sa.Integer, nullable=False),
    sa.Column("last_used_at", sa.BigInteger),
    sa.Column("rate", sa.Float, nullable=False),
    sa.Column("changed_at", sa.BigInteger, nullable=False, comment="last time index work arose"),
    sa.Column("searchable", sa.Boolean, nullable=False),
    sa.Column("indexed_version", sa.Integer, nullable=False, server_default="0"),
    sa.Column("indexed_as", sa.Text, comment="the index that holds indexed_version"),
    sa.Index("uq_cubes_content", "tenant", "content_hash", unique=True),
    sa.Index("ix_cubes_scope", "tenant", "user_id", "agent_id", "run_id", "id"),
    sa.Index("ix_cubes_tenant_id", "tenant", "id"),
    sa.Index("ix_cubes_tenant_state", "tenant", "state"),
    sa.Index("ix_cubes_changed_at", "changed_at"),
    sa.Index("uq_cubes_thread", "thread", "seq", unique=True),
    sa.Index(
        "ix_cubes_expires",
        "expires_at",
        sqlite_where=sa.text("expires_at IS NOT NULL"),
        postgresql_where=sa.text("expires_at IS NOT NULL"),
    ),
    # SQLite takes a partial index only where the query has its very condition, and SQLAlchemy writes
    # a boolean there as "= 1".
    sa.Index(
        "ix_cubes_pending",
        "changed_at",
        sqlite_where=sa.text("searchable = 1 AND indexed_version <> version"),
        postgresql_where=sa.text("searchable AND indexed_version <> version"),
    ),
    sa.Index(
        "ix_cubes_removal",
        "changed_at",
        sqlite_where=sa.text("searchable = 0 AND indexed_version <> 0"),
        postgresql_where=sa.text("NOT searchable AND indexed_version <> 0"),
    ),
)

cube_tags = sa.Table(
    "cube_tags",
    metadata,
    sa.Column("cube", sa.String(36), sa.ForeignKey("cubes.id"), primary_key=True),
    sa.Column("tag", sa.Text, primary_key=True),
    sa.Column("tenant", sa.String(63), nullable=False),
    sa.Index("ix_cube_tags_tenant_tag", "tenant", "tag"),
)

versions = sa.Table(
    "versions",
    metadata,
    sa.Column("cube", sa.String(36), sa.ForeignKey("cubes.id"), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("members", sa.JSON, nullable=False),
    sa.Column("tags", sa.JSON, nullable=False),
    sa.Column("metadata", sa.JSON, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("author", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)

members = sa.Table(
    "members",
    metadata,
    sa.Column("composite", sa.String(36), sa.ForeignKey("cubes.id"), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("member", sa.String(36), sa.ForeignKey("cubes.id"), nullable=False, index=True),
)

edges = sa.Table(
    "lineage",
    metadata,
    sa.Column("child", sa.String(36), sa.ForeignKey("cubes.id"), primary_key=True),
    sa.Column("parent", sa.String(36), sa.ForeignKey("cubes.id"), primary_key=True, index=True),
    sa.Column("parent_version", sa.Integer, primary_key=True),
    sa.Column("relation", sa.String(16), primary_key=True),
)

residency = sa.Table(
    "residency",
    metadata,
    sa.Column("cube", sa.String(36), sa.ForeignKey("cubes.id"), primary_key=True),
    sa.Column("tier", sa.String(16), primary_key=True),
    sa.Column("medium", sa.String(16), primary_key=True),
    sa.Column("location", sa.String(512), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
    sa.Index("ix_residency_updated_at", "updated_at"),
)

idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.id"), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("body_hash", sa.String(64), nullable=False),
    sa.Column("outcome", sa.JSON, nullable=False, comment="ids, events and versions; no text"),
    sa.Column("created_at", sa.BigInteger, nullable=False, index=True),
)

adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("user_id", sa.Text),
    sa.Column("agent_id", sa.Text),
    sa.Column("run_id", sa.Text),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Index("uq_adapters_name", "tenant", "name", unique=True),
)

adapter_versions = sa.Table(
    "adapter_versions",
    metadata,
    sa.Column("adapter", sa.String(36), sa.ForeignKey("adapters.id"), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("reason", sa.String(16), nullable=False, comment="why it serves no more"),
    sa.Column("base", sa.String(64), nullable=False, comment="fingerprint of the model it fits"),
    sa.Column("sha256", sa.String(64), nullable=False, comment="of its file among the objects"),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("activated_at", sa.BigInteger),
    sa.Column("retired_at", sa.BigInteger),
    sa.Column("erased_at", sa.BigInteger, comment="when the files of a stale version were removed"),
    sa.Index(
        "uq_adapter_versions_serving",
        "adapter",
        unique=True,
        sqlite_where=sa.text("state = 'serving'"),
        postgresql_where=sa.text("state = 'serving'"),
    ),
)

adapter_cubes = sa.Table(
    "adapter_cubes",
    metadata,
    sa.Column("adapter", sa.String(36), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("cube", sa.String(36), sa.ForeignKey("cubes.id"), primary_key=True, index=True),
    sa.Column("cube_version", sa.Integer, nullable=False),
    sa.ForeignKeyConstraint(
        ["adapter", "version"], ["adapter_versions.adapter", "adapter_versions.version"]
    ),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("key", sa.String(64), comment="one job of a tenant for each"),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("author", sa.Text, nullable=False),
    sa.Column("held", sa.JSON, comment="the cubes that it works on, each in its version"),
    sa.Column("progress", sa.JSON, nullable=False),
    sa.Column("result", sa.JSON, comment="figures and names; no text of a memory"),
    sa.Column("error", sa.Text),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("is_cancelled", sa.Boolean, nullable=False, comment="asked for, and not yet done"),
    sa.Column("epoch", sa.BigInteger, nullable=False, comment="grows with each runner"),
    sa.Column("runner", sa.Text),
    sa.Column("leased_until", sa.BigInteger, nullable=False),
    sa.Column("keeps_files", sa.Boolean, nullable=False, comment="a folder or report is there"),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("started_at", sa.BigInteger),
    sa.Column("finished_at", sa.BigInteger),
    sa.Index("uq_jobs_key", "tenant", "key", unique=True),
    sa.Index("ix_jobs_tenant", "tenant", "id"),
    sa.Index("ix_jobs_state", "state", "id"),
)

job_logs = sa.Table(
    "job_logs",
    metadata,
    sa.Column("job", sa.String(36), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("text", sa.Text, nullable=False, comment="no text of a memory"),
)

placements = sa.Table(
    "placements",
    metadata,
    sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.id"), primary_key=True),
    sa.Column("cube", sa.String(36), primary_key=True, comment="empty: all of the tenant"),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("owner_medium", sa.String(16), comment="who takes its writes, where that was moved"),
    sa.Column("owner_location", sa.String(512)),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
    sa.Index("ix_placements_cube", "cube"),
)

actions = sa.Table(
    "actions",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("cube", sa.String(36), nullable=False, comment="empty: all of the tenant"),
    sa.Column("action", sa.String(16), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False, comment="of the cube, when it was planned"),
    sa.Column("tier", sa.String(16), nullable=False),
    sa.Column("from_medium", sa.String(16)),
    sa.Column("from_location", sa.String(512)),
    sa.Column("to_medium", sa.String(16)),
    sa.Column("to_location", sa.String(512)),
    sa.Column("takes_over", sa.Boolean, nullable=False),
    sa.Column("urgent", sa.Boolean, nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("checksum", sa.String(64)),
    sa.Column("policy", sa.String(32), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("outcome", sa.Text, nullable=False, comment="why it ended, or was put off"),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("next_at", sa.BigInteger, nullable=False),
    sa.Column(
        "leader", sa.BigInteger, nullable=False, comment="epoch of the lease it is done under"
    ),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
    sa.Column("closed_at", sa.BigInteger),
    sa.Index("ix_actions_tenant_id", "tenant", "id"),
    sa.Index("ix_actions_cube", "cube", "id"),
    sa.Index(
        "uq_actions_open",
        "tenant",
        "cube",
        unique=True,
        sqlite_where=sa.text("closed_at IS NULL"),
        postgresql_where=sa.text("closed_at IS NULL"),
    ),
    sa.Index("ix_actions_closed_at", "closed_at"),
)

tasks = sa.Table(
    "tasks",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("key", sa.String(64), nullable=False, comment="of what is to be done; open once"),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("payload", sa.JSON, nullable=False),
    sa.Column("result", sa.JSON),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("max_attempts", sa.Integer, nullable=False),
    sa.Column("next_at", sa.BigInteger, nullable=False),
    sa.Column("leader", sa.BigInteger, comment="epoch of the lease it is claimed under"),
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
    sa.Column("closed_at", sa.BigInteger),
    sa.Index("ix_tasks_tenant_id", "tenant", "id"),
    sa.Index("ix_tasks_key", "kind", "key"),
    sa.Index(
        "uq_tasks_open",
        "kind",
        "key",
        unique=True,
        sqlite_where=sa.text("closed_at IS NULL"),
        postgresql_where=sa.text("closed_at IS NULL"),
    ),
    sa.Index(
        "ix_tasks_waiting",
        "tenant",
        "priority",
        "next_at",
        sqlite_where=sa.text("state = 'waiting'"),
        postgresql_where=sa.text("state = 'waiting'"),
    ),
    sa.Index("ix_tasks_state", "state", "id"),
    sa.Index("ix_tasks_closed_at", "closed_at"),
)


# -- lifecycle: what was when, what is pinned, archived or proposed --------------------------------

cube_states = sa.Table(
    "cube_states",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("cube", sa.String(36), sa.ForeignKey("cubes.id"), nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("state", sa.String(16), nullable=False, comment="that a move led to"),
    sa.Index("ix_cube_states_cube", "cube", "at"),
)

forgotten = sa.Table(
    "forgotten",
    metadata,
    sa.Column("cube", sa.String(36), sa.ForeignKey("cubes.id"), primary_key=True),
    sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("user_id", sa.String(64), comment="a digest, as are the next two"),
    sa.Column("agent_id", sa.String(64)),
    sa.Column("run_id", sa.String(64)),
    sa.Index("ix_forgotten_tenant", "tenant", "at"),
)

snapshots = sa.Table(
    "snapshots",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("user_id", sa.Text),
    sa.Column("agent_id", sa.Text),
    sa.Column("run_id", sa.Text),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("author", sa.Text, nullable=False),
    sa.Index("uq_snapshots_name", "tenant", "name", unique=True),
)

archives = sa.Table(
    "archives",
    metadata,
    sa.Column("cube", sa.String(36), sa.ForeignKey("cubes.id"), primary_key=True),
    sa.Column("sha256", sa.String(64), primary_key=True, comment="of the object's bytes"),
    sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("content_sha256", sa.String(64), nullable=False, comment="of what it holds"),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("doomed", sa.Boolean, nullable=False, comment="the object is to be removed"),
    sa.Index(
        "ix_archives_doomed",
        "created_at",
        sqlite_where=sa.text("doomed = 1"),
        postgresql_where=sa.text("doomed"),
    ),
)

cluster_events = sa.Table(
    "cluster_events",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("node", sa.String(255), nullable=False, comment="empty: it is about none"),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Index("ix_cluster_events_at", "at"),
)

proposals = sa.Table(
    "proposals",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("fingerprint", sa.String(64), nullable=False, comment="of the kind and the versions"),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("why", sa.JSON, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("decided_at", sa.BigInteger),
    sa.Column("decided_by", sa.Text),
    sa.Column("result", sa.String(36), comment="the fused cube"),
    sa.Index("uq_proposals_fingerprint", "tenant", "fingerprint", unique=True),
    sa.Index("ix_proposals_state", "tenant", "state", "id"),
)

proposal_cubes = sa.Table(
    "proposal_cubes",
    metadata,
    sa.Column("proposal", sa.String(36), sa.ForeignKey("proposals.id"), primary_key=True),
    sa.Column("cube", sa.String(36), sa.ForeignKey("cubes.id"), primary_key=True, index=True),
    sa.Column("version", sa.Integer, nullable=False),
)


def micros(time: datetime) -> int:
    """Whole microseconds since 1970."""
    return (time - _EPOCH) // _MICROSECOND


def unexpired(now: datetime) -> sa.ColumnElement[bool]:
    """The condition on a cube that its time has not come."""
    return sa.or_(cubes.c.expires_at.is_(None), cubes.c.expires_at > micros(now))


def moment(value: int) -> datetime:
    """The time of a stored integer, in UTC."""
    return _EPOCH + timedelta(microseconds=value)


def micros_or_none(time: datetime | None) -> int | None:
    return None if time is None else micros(time)


def moment_or_none(value: int | None) -> datetime | None:
    return None if value is None else moment(value)
