"""Who leads, checked within the transaction that acts on it."""

import sqlalchemy as sa

from memcube.catalog import schema
from memcube.errors import StaleEpoch

LEASE = "scheduler"
"""The lease of who plans and enacts."""


def fence(connection: sa.Connection, lease: str, epoch: int) -> None:
    """Refuse a transaction of an epoch that is not the lease's. Until it commits nobody takes the lease over.

    Raises:
        StaleEpoch: it was taken over.
    """
    table = schema.leases
    query = sa.select(table.c.epoch).where(table.c.name == lease).with_for_update(read=True)
    current = connection.scalar(query) or 0
    if current != epoch:
        raise StaleEpoch(epoch, current)
