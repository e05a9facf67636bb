"""The scheduler's journal, the epochs and owners of cubes, and the queue of background work.

Revision: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "actions",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("tenant", sa.String(length=63), nullable=False),
        sa.Column("cube", sa.String(length=36), nullable=False, comment="empty: all of the tenant"),
        sa.Column("action", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column(
            "epoch", sa.BigInteger(), nullable=False, comment="of the cube, when it was planned"
        ),
        sa.Column("tier", sa.String(length=16), nullable=False),
        sa.Column("from_medium", sa.String(length=16), nullable=True),
        sa.Column("from_location", sa.String(length=512), nullable=True),
        sa.Column("to_medium", sa.String(length=16), nullable=True),
        sa.Column("to_location", sa.String(length=512), nullable=True),
        sa.Column("takes_over", sa.Boolean(), nullable=False),
        sa.Column("urgent", sa.Boolean(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("checksum", sa.String(length=64), nullable=True),
        sa.Column("policy", sa.String(length=32), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False, comment="why it ended, or was put off"),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_at", sa.BigInteger(), nullable=False),
        sa.Column(
            "leader", sa.BigInteger(), nullable=False, comment="epoch of the lease it is done under"
        ),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("closed_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], name=op.f("fk_actions_tenant")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_actions")),
    )
    op.create_index("ix_actions_closed_at", "actions", ["closed_at"], unique=False)
    op.create_index("ix_actions_cube", "actions", ["cube", "id"], unique=False)
    op.create_index("ix_actions_tenant_id", "actions", ["tenant", "id"], unique=False)
    op.create_index(
        "uq_actions_open",
        "actions",
        ["tenant", "cube"],
        unique=True,
        sqlite_where=sa.text("closed_at IS NULL"),
        postgresql_where=sa.text("closed_at IS NULL"),
    )
    op.create_table(
        "placements",
        sa.Column("tenant", sa.String(length=63), nullable=False),
        sa.Column("cube", sa.String(length=36), nullable=False, comment="empty: all of the tenant"),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column(
            "owner_medium",
            sa.String(length=16),
            nullable=True,
            comment="who takes its writes, where that was moved",
        ),
        sa.Column("owner_location", sa.String(length=512), nullable=True),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], name=op.f("fk_placements_tenant")),
        sa.PrimaryKeyConstraint("tenant", "cube", name=op.f("pk_placements")),
    )
    op.create_index("ix_placements_cube", "placements", ["cube"], unique=False)
    op.create_table(
        "tasks",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("tenant", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column(
            "key", sa.String(length=64), nullable=False, comment="of what is to be done; open once"
        ),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("next_at", sa.BigInteger(), nullable=False),
        sa.Column(
            "leader",
            sa.BigInteger(),
            nullable=True,
            comment="epoch of the lease it is claimed under",
        ),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("closed_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], name=op.f("fk_tasks_tenant")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tasks")),
    )
    op.create_index("ix_tasks_closed_at", "tasks", ["closed_at"], unique=False)
    op.create_index("ix_tasks_key", "tasks", ["kind", "key"], unique=False)
    op.create_index("ix_tasks_state", "tasks", ["state", "id"], unique=False)
    op.create_index("ix_tasks_tenant_id", "tasks", ["tenant", "id"], unique=False)
    op.create_index(
        "ix_tasks_waiting",
        "tasks",
        ["tenant", "priority", "next_at"],
        unique=False,
        sqlite_where=sa.text("state = 'waiting'"),
        postgresql_where=sa.text("state = 'waiting'"),
    )
    op.create_index(
        "uq_tasks_open",
        "tasks",
        ["kind", "key"],
        unique=True,
        sqlite_where=sa.text("closed_at IS NULL"),
        postgresql_where=sa.text("closed_at IS NULL"),
    )
    op.create_index("ix_cubes_changed_at", "cubes", ["changed_at"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_cubes_changed_at", "cubes")
    for table in ("tasks", "placements", "actions"):
        op.drop_table(table)
