"""Adapters, their versions, and which version of which cube is inside which of them.

Revision: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "adapters",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("tenant", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("user_id", sa.Text(), nullable=True),
        sa.Column("agent_id", sa.Text(), nullable=True),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], name=op.f("fk_adapters_tenant")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapters")),
    )
    op.create_index("uq_adapters_name", "adapters", ["tenant", "name"], unique=True)
    op.create_table(
        "adapter_versions",
        sa.Column("adapter", sa.String(length=36), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.String(length=16), nullable=False, comment="why it serves no more"),
        sa.Column(
            "base", sa.String(length=64), nullable=False, comment="fingerprint of the model it fits"
        ),
        sa.Column(
            "sha256", sa.String(length=64), nullable=False, comment="of its file among the objects"
        ),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("activated_at", sa.BigInteger(), nullable=True),
        sa.Column("retired_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["adapter"], ["adapters.id"], name=op.f("fk_adapter_versions_adapter")
        ),
        sa.PrimaryKeyConstraint("adapter", "version", name=op.f("pk_adapter_versions")),
    )
    op.create_index(
        "uq_adapter_versions_serving",
        "adapter_versions",
        ["adapter"],
        unique=True,
        sqlite_where=sa.text("state = 'serving'"),
        postgresql_where=sa.text("state = 'serving'"),
    )
    op.create_table(
        "adapter_cubes",
        sa.Column("adapter", sa.String(length=36), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("cube", sa.String(length=36), nullable=False),
        sa.Column("cube_version", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter", "version"],
            ["adapter_versions.adapter", "adapter_versions.version"],
            name=op.f("fk_adapter_cubes_adapter"),
        ),
        sa.ForeignKeyConstraint(["cube"], ["cubes.id"], name=op.f("fk_adapter_cubes_cube")),
        sa.PrimaryKeyConstraint("adapter", "version", "cube", name=op.f("pk_adapter_cubes")),
    )
    op.create_index(op.f("ix_adapter_cubes_cube"), "adapter_cubes", ["cube"], unique=False)


def downgrade() -> None:
    for table in ("adapter_cubes", "adapter_versions", "adapters"):
        op.drop_table(table)
