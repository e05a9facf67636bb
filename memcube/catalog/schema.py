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
