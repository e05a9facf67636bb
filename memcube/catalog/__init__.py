"""The catalog: tenants, keys, cubes and their versions, and what the index holds of them.

It is the truth: an acknowledged write is a committed transaction here, and everything in a tier can
be rebuilt from it. Calls are synchronous and safe from many threads and processes; async callers
run them in a thread. SQLite on one machine, PostgreSQL on a cluster, one contract suite
(``memcube.testing.catalog_contract``) for both.
"""

from collections.abc import Callable
from datetime import datetime

from memcube.catalog.access import Access, KeyInfo, Lease, Leases, Principal, Role, Tenant
from memcube.catalog.action_rows import ActionRecord
from memcube.catalog.adapters import (
    AdapterBook,
    AdapterLine,
    AdapterRecord,
    AdapterState,
    Holding,
    NewAdapter,
)
from memcube.catalog.archives import ArchiveBook, ArchiveRecord
from memcube.catalog.cluster_log import ClusterEvent, ClusterEventKind, ClusterLog
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
from memcube.catalog.jobs import Job, JobBook, JobKind, JobState, LogLine, NewJob
from memcube.catalog.kv_book import KvBook, KvPlace
from memcube.catalog.past import (
    ChangeKind,
    Comparison,
    CubeVersion,
    Difference,
    Forgotten,
    Past,
    RolledBack,
)
from memcube.catalog.placing import Placement
from memcube.catalog.proposals import (
    NewProposal,
    Proposal,
    ProposalBook,
    ProposalKind,
    ProposalState,
)
from memcube.catalog.scheduling import ActionBook, Passed
from memcube.catalog.shard_book import NodeRecord, NodeSeen, ShardBook, ShardRecord
from memcube.catalog.snapshots import Snapshot, SnapshotBook
from memcube.catalog.tasks import NewTask, QueueStats, Task, TaskQueue, TaskState
from memcube.catalog.world_feed import WorldFeed
from memcube.ids import IdSource, TenantId, uuid7


class Catalog:
    """One open catalog, by its parts."""

    def __init__(self, database: Database, *, new_id: IdSource = uuid7) -> None:
        self._database = database
        self.access = Access(database, new_id=new_id)
        self.leases = Leases(database, new_id=new_id)
        self.cubes = Cubes(database, new_id=new_id)
        self.index = IndexBook(database)
        self.kv = KvBook(database)
        self.adapters = AdapterBook(database, new_id=new_id)
        self.jobs = JobBook(database, new_id=new_id)
        self.snapshots = SnapshotBook(database, new_id=new_id)
        self.past = Past(database, self.cubes)
        self.archives = ArchiveBook(database)
        self.proposals = ProposalBook(database, self.cubes, new_id=new_id)
        self.actions = ActionBook(database, new_id=new_id)
        self.tasks = TaskQueue(database, new_id=new_id)
        self.shards = ShardBook(database, new_id=new_id)
        self.cluster_log = ClusterLog(database)

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

    def world_feed(
        self,
        *,
        clock: Callable[[], datetime],
        consents: Callable[[TenantId], bool] = lambda tenant: False,
    ) -> WorldFeed:
        """What the scheduler is told of cubes."""
        return WorldFeed(self._database, clock=clock, consents=consents)

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
    "ActionBook",
    "ActionRecord",
    "AdapterBook",
    "AdapterLine",
    "AdapterRecord",
    "AdapterState",
    "AddResult",
    "Added",
    "ArchiveBook",
    "ArchiveRecord",
    "Catalog",
    "Change",
    "ChangeKind",
    "ClusterEvent",
    "ClusterEventKind",
    "ClusterLog",
    "Comparison",
    "CubeVersion",
    "Cubes",
    "Database",
    "Difference",
    "Edge",
    "Forgotten",
    "Holding",
    "Idempotency",
    "IndexBook",
    "Job",
    "JobBook",
    "JobKind",
    "JobState",
    "KeyInfo",
    "KvBook",
    "KvPlace",
    "Lease",
    "Leases",
    "Lineage",
    "LogLine",
    "NewAdapter",
    "NewJob",
    "NewProposal",
    "NewTask",
    "NodeRecord",
    "NodeSeen",
    "Page",
    "Passed",
    "Past",
    "Placement",
    "Principal",
    "Proposal",
    "ProposalBook",
    "ProposalKind",
    "ProposalState",
    "QueueStats",
    "Removal",
    "Role",
    "RolledBack",
    "ShardBook",
    "ShardRecord",
    "Snapshot",
    "SnapshotBook",
    "Stats",
    "Task",
    "TaskQueue",
    "TaskState",
    "Tenant",
    "WorldFeed",
]
