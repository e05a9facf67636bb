"""When cubes were in which state, what is pinned, archived or proposed.

Revision: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "proposals",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("tenant", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column(
            "fingerprint",
            sa.String(length=64),
            nullable=False,
            comment="of the kind and the versions",
        ),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("why", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("decided_at", sa.BigInteger(), nullable=True),
        sa.Column("decided_by", sa.Text(), nullable=True),
        sa.Column("result", sa.String(length=36), nullable=True, comment="the fused cube"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], name=op.f("fk_proposals_tenant")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_proposals")),
    )
    op.create_index("ix_proposals_state", "proposals", ["tenant", "state", "id"], unique=False)
    op.create_index("uq_proposals_fingerprint", "proposals", ["tenant", "fingerprint"], unique=True)
    op.create_table(
        "snapshots",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("tenant", sa.String(length=63), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("user_id", sa.Text(), nullable=True),
        sa.Column("agent_id", sa.Text(), nullable=True),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], name=op.f("fk_snapshots_tenant")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_snapshots")),
    )
    op.create_index("uq_snapshots_name", "snapshots", ["tenant", "name"], unique=True)
    op.create_table(
        "archives",
        sa.Column("cube", sa.String(length=36), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False, comment="of the object's bytes"),
        sa.Column("tenant", sa.String(length=63), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column(
            "content_sha256", sa.String(length=64), nullable=False, comment="of what it holds"
        ),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("doomed", sa.Boolean(), nullable=False, comment="the object is to be removed"),
        sa.ForeignKeyConstraint(["cube"], ["cubes.id"], name=op.f("fk_archives_cube")),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], name=op.f("fk_archives_tenant")),
        sa.PrimaryKeyConstraint("cube", "sha256", name=op.f("pk_archives")),
    )
    op.create_index(
        "ix_archives_doomed",
        "archives",
        ["created_at"],
        unique=False,
        sqlite_where=sa.text("doomed = 1"),
        postgresql_where=sa.text("doomed"),
    )
    op.create_table(
        "cube_states",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("cube", sa.String(length=36), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False, comment="that a move led to"),
        sa.ForeignKeyConstraint(["cube"], ["cubes.id"], name=op.f("fk_cube_states_cube")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_cube_states")),
    )
    op.create_index("ix_cube_states_cube", "cube_states", ["cube", "at"], unique=False)
    op.create_table(
        "forgotten",
        sa.Column("cube", sa.String(length=36), nullable=False),
        sa.Column("tenant", sa.String(length=63), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column(
            "user_id", sa.String(length=64), nullable=True, comment="a digest, as are the next two"
        ),
        sa.Column("agent_id", sa.String(length=64), nullable=True),
        sa.Column("run_id", sa.String(length=64), nullable=True),
        sa.ForeignKeyConstraint(["cube"], ["cubes.id"], name=op.f("fk_forgotten_cube")),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], name=op.f("fk_forgotten_tenant")),
        sa.PrimaryKeyConstraint("cube", name=op.f("pk_forgotten")),
    )
    op.create_index("ix_forgotten_tenant", "forgotten", ["tenant", "at"], unique=False)
    op.create_table(
        "proposal_cubes",
        sa.Column("proposal", sa.String(length=36), nullable=False),
        sa.Column("cube", sa.String(length=36), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["cube"], ["cubes.id"], name=op.f("fk_proposal_cubes_cube")),
        sa.ForeignKeyConstraint(
            ["proposal"], ["proposals.id"], name=op.f("fk_proposal_cubes_proposal")
        ),
        sa.PrimaryKeyConstraint("proposal", "cube", name=op.f("pk_proposal_cubes")),
    )
    op.create_index(op.f("ix_proposal_cubes_cube"), "proposal_cubes", ["cube"], unique=False)
    # When a cube left the search was not noted before; the last change of it is as near as we know.
    op.execute(
        "INSERT INTO cube_states (cube, at, state) SELECT id, changed_at, state FROM cubes "
        "WHERE state IN ('merged', 'archived')"
    )


def downgrade() -> None:
    for table in (
        "proposal_cubes",
        "proposals",
        "archives",
        "snapshots",
        "forgotten",
        "cube_states",
    ):
        op.drop_table(table)
