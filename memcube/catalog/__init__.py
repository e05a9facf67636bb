"""The catalog: tenants, keys, cubes and their versions, and what the index holds of them.

It is the truth: an acknowledged write is a committed transaction here, and everything in a tier can
be rebuilt from it. Calls are synchronous and safe from many threads and processes; async callers
run them in a thread. SQLite on one machine, PostgreSQL on a cluster, one contract suite
(``memcube.testing.catalog_contract``) for both.
"""

from memcube.catalog.access import Access, KeyInfo, Lease, Leases, Principal, Role, Tenant
from memcube.catalog.adapters import (
    AdapterBook,
    AdapterLine,
    AdapterRecord,
    AdapterState,
    Holding,
    NewAdapter,
)
from memcube.catalog.cubes import (
    UNSET,
    Added,
    AddResult,
    Change,
    Cubes,
    Edge,
    Idempotency,
    Lineage,
    Page,
)
from memcube.catalog.engine import Database
from memcube.catalog.index_book import IndexBook, Removal, Stats
from memcube.catalog.kv_book import KvBook, KvPlace
from memcube.ids import IdSource, uuid7


class Catalog:
    """One open catalog, by its six parts."""

    def __init__(self, database: Database, *, new_id: IdSource = uuid7) -> None:
        self._database = database
        self.access = Access(database, new_id=new_id)
        self.leases = Leases(database)
        self.cubes = Cubes(database, new_id=new_id)
        self.index = IndexBook(database)
        self.kv = KvBook(database)
        self.adapters = AdapterBook(database, new_id=new_id)

    @classmethod
    def open(cls, url: str, *, new_id: IdSource = uuid7) -> "Catalog":
        """Open the catalog at a SQLAlchemy URL and bring its schema up to date.

        Raises:
            BadRequest: an engine that is not built.
            Conflict: written by a newer release.
            Unavailable: the database does not answer.
        """
        database = Database(url)
        database.migrate()
        return cls(database, new_id=new_id)

    def ping(self) -> None:
        """Return if the database answers; raise Unavailable if not."""
        with self._database.reading() as connection:
            connection.exec_driver_sql("SELECT 1")

    def close(self) -> None:
        """Release all connections."""
        self._database.close()


__all__ = [
    "UNSET",
    "Access",
    "AdapterBook",
    "AdapterLine",
    "AdapterRecord",
    "AdapterState",
    "AddResult",
    "Added",
    "Catalog",
    "Change",
    "Cubes",
    "Database",
    "Edge",
    "Holding",
    "Idempotency",
    "IndexBook",
    "KeyInfo",
    "KvBook",
    "KvPlace",
    "Lease",
    "Leases",
    "Lineage",
    "NewAdapter",
    "Page",
    "Principal",
    "Removal",
    "Role",
    "Stats",
    "Tenant",
]
