"""Nodes and shards; what lies in the plaintext tier is located by its shard.

Revision: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "nodes",
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("alive", sa.Boolean(), nullable=False),
        sa.Column("is_head", sa.Boolean(), nullable=False),
        sa.Column(
            "draining", sa.Boolean(), nullable=False, comment="takes nothing new; to be emptied"
        ),
        sa.Column("since", sa.BigInteger(), nullable=False, comment="alive or draining changed"),
        sa.Column("seen_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_nodes")),
    )
    op.create_table(
        "shards",
        sa.Column("shard", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("home", sa.String(length=255), nullable=False, comment="the node it belongs on"),
        sa.Column(
            "node", sa.String(length=255), nullable=False, comment="where it was opened last"
        ),
        sa.Column("location", sa.Text(), nullable=False, comment="of its files"),
        sa.Column("epoch", sa.BigInteger(), nullable=False, comment="0: it was never opened"),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("shard", name=op.f("pk_shards")),
    )
    # Of a cube that was listed at several places of the tier the newest row stays.
    op.execute(
        """
        DELETE FROM residency WHERE tier = 'plaintext' AND EXISTS (
            SELECT 1 FROM residency AS newer
            WHERE newer.cube = residency.cube AND newer.tier = 'plaintext'
            AND (newer.updated_at > residency.updated_at
                 OR (newer.updated_at = residency.updated_at
                     AND newer.location > residency.location)))
        """
    )
    op.execute(
        """
        UPDATE residency SET location = (
            SELECT 'shard-' || tenants.shard FROM tenants
            JOIN cubes ON cubes.tenant = tenants.id WHERE cubes.id = residency.cube)
        WHERE tier = 'plaintext'
        """
    )
    op.create_index("ix_residency_updated_at", "residency", ["updated_at"], unique=False)
