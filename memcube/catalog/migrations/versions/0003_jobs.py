"""Long work as jobs with their logs, and when the files of a stale adapter were removed.

Revision: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("tenant", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column(
            "key", sa.String(length=64), nullable=True, comment="one job of a tenant for each"
        ),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column(
            "held",
            sa.JSON(),
            nullable=True,
            comment="the cubes that it works on, each in its version",
        ),
        sa.Column("progress", sa.JSON(), nullable=False),
        sa.Column(
            "result", sa.JSON(), nullable=True, comment="figures and names; no text of a memory"
        ),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column(
            "is_cancelled", sa.Boolean(), nullable=False, comment="asked for, and not yet done"
        ),
        sa.Column("epoch", sa.BigInteger(), nullable=False, comment="grows with each runner"),
        sa.Column("runner", sa.Text(), nullable=True),
        sa.Column("leased_until", sa.BigInteger(), nullable=False),
        sa.Column(
            "keeps_files", sa.Boolean(), nullable=False, comment="a folder or report is there"
        ),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=True),
        sa.Column("finished_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], name=op.f("fk_jobs_tenant")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    op.create_index("uq_jobs_key", "jobs", ["tenant", "key"], unique=True)
    op.create_index("ix_jobs_tenant", "jobs", ["tenant", "id"], unique=False)
    op.create_index("ix_jobs_state", "jobs", ["state", "id"], unique=False)
    op.create_table(
        "job_logs",
        sa.Column("job", sa.String(length=36), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False, comment="no text of a memory"),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name=op.f("fk_job_logs_job")),
        sa.PrimaryKeyConstraint("job", "seq", name=op.f("pk_job_logs")),
    )
    op.add_column(
        "adapter_versions",
        sa.Column(
            "erased_at",
            sa.BigInteger(),
            nullable=True,
            comment="when the files of a stale version were removed",
        ),
    )


def downgrade() -> None:
    with op.batch_alter_table("adapter_versions") as table:
        table.drop_column("erased_at")
    for table in ("job_logs", "jobs"):
        op.drop_table(table)
