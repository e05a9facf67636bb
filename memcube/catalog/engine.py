"""Opens the catalog's database: pragmas, migrations, and errors in our own words.

SQLite runs in WAL mode with ``synchronous=FULL``: a committed transaction survives ``kill -9`` and
loss of power. Writers take the lock at their start (``BEGIN IMMEDIATE``), so that no transaction
fails half way because another one wrote meanwhile.
"""

import contextlib
import json
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from memcube.errors import (
    BadRequest,
    Conflict,
    Corrupt,
    LimitExceeded,
    MemCubeError,
    StorageFull,
    Unavailable,
)

T = TypeVar("T")

BUSY_TIMEOUT_S = 10.0
MAX_ATTEMPTS = 8
MIGRATION_LOCK = 0x6D656D63
MAX_KEY_BYTES = 2_700
"""What fits a PostgreSQL index entry (a third of a page); tags and scope ids are indexed."""
_RETRY_STATES = frozenset({"40001", "40P01", "55P03", "23505"})
"""PostgreSQL: serialization failure, deadlock, lock not available, and a unique race that a second
look resolves (a content hash, a thread's place or an idempotency key written meanwhile)."""


class Database:
    """One engine, with transactions that are retried when another one was in the way."""

    def __init__(self, url: str) -> None:
        self.url = sa.make_url(url)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        if self.url.get_backend_name() == "postgresql" and self.url.drivername == "postgresql":
            self.url = self.url.set(drivername="postgresql+psycopg")
        if self.url.get_backend_name() not in ("sqlite", "postgresql"):
            raise BadRequest(
                f"{self.url.get_backend_name()!r} is not built; use sqlite:///FILE or postgresql://…",
                "catalog.url",
            )
        self._engine = self._open()
        self._writer = threading.Lock()
        """Threads of this process queue here in order, instead of racing for SQLite's file lock."""

    def _open(self) -> sa.Engine:
        if not self.sqlite:
            return sa.create_engine(
                self.url,
                pool_pre_ping=True,
                pool_size=8,
                max_overflow=16,
                pool_timeout=BUSY_TIMEOUT_S,
                json_serializer=_json,
            )
        if self.url.database in (None, "", ":memory:"):
            raise BadRequest("the catalog needs a file; it holds the truth", "catalog.url")
        Path(self.url.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        engine = sa.create_engine(
            self.url,
            pool_size=8,
            max_overflow=16,
            pool_timeout=BUSY_TIMEOUT_S,
            json_serializer=_json,
            connect_args={"timeout": BUSY_TIMEOUT_S},
        )

        @event.listens_for(engine, "connect")
        def _pragmas(connection: sqlite3.Connection, _record: object) -> None:
            connection.isolation_level = None
            for pragma in (
                "journal_mode=WAL",
                "synchronous=FULL",
                "foreign_keys=ON",
                "secure_delete=ON",
                f"busy_timeout={int(BUSY_TIMEOUT_S * 1000)}",
                "cache_size=-65536",
                "temp_store=MEMORY",
            ):
                connection.execute(f"PRAGMA {pragma}")

        @event.listens_for(engine, "begin")
        def _begin(connection: sa.Connection) -> None:
            options = connection.get_execution_options()
            if not options.get("memcube_single", False):
                writing = options.get("memcube_write", False)
                connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

        @event.listens_for(engine, "before_cursor_execute")
        def _refuse_nul(_connection: object, _cursor: object, _sql: str, given: Any, *_: Any):
            # SQLite would store it, PostgreSQL refuses it: a catalog must move between the two.
            for row in given if isinstance(given, list) else (given,):
                values = row.values() if isinstance(row, dict) else row
                if any(isinstance(value, str) and "\0" in value for value in values):
                    raise BadRequest("a text can't hold a NUL character")

        return engine

    def migrate(self) -> None:
        """Bring the schema to the newest revision; one process at a time.

        Raises:
            Conflict: the database was written by a newer release.
        """
        config = AlembicConfig()
        folder = str(Path(__file__).parent / "migrations")
        config.set_main_option("script_location", folder.replace("%", "%%"))
        script = ScriptDirectory.from_config(config)

        def work(connection: sa.Connection) -> None:
            # On SQLite the write lock is held already; this one ends with the transaction.
            if not self.sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)))
            current = MigrationContext.configure(connection).get_current_revision()
            known = {revision.revision for revision in script.walk_revisions()}
            if current is not None and current not in known:
                raise Conflict(
                    f"the catalog is at schema {current!r}, which this release does not know; "
                    "run the newer release that wrote it"
                )
            if current != script.get_current_head():
                config.attributes["connection"] = connection
                command.upgrade(config, "head")

        self.write(work)

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection for one consistent read, which sees one instant and takes no locks."""
        try:
            with self._translated(), self._engine.connect() as connection:
                if not self.sqlite:
                    connection.execution_options(isolation_level="REPEATABLE READ")
                with connection.begin():
                    yield connection
        except _Contended as contended:
            raise Unavailable(f"the catalog is busy: {contended.args[0]}") from None

    def rows(self, query: sa.Executable, given: Mapping[str, Any]) -> Sequence[Any]:
        """All rows of one query. Alone it sees one instant without a transaction around it, which
        would cost as much again."""
        try:
            with self._translated(), self._engine.connect() as connection:
                single = connection.execution_options(memcube_single=True)
                return single.execute(query, given).all()
        except _Contended as contended:
            raise Unavailable(f"the catalog is busy: {contended.args[0]}") from None

    def write(self, work: Callable[[sa.Connection], T]) -> T:
        """Run ``work`` in one transaction and commit it durably.

        ``work`` may run several times: it must do nothing but read and write the connection.
        """
        for attempt in range(MAX_ATTEMPTS):
            try:
                with self._translated(), self._exclusive(), self._engine.connect() as connection:
                    writing = connection.execution_options(memcube_write=True)
                    with writing.begin():
                        return work(writing)
            except _Contended as contended:
                if attempt + 1 == MAX_ATTEMPTS:
                    raise Unavailable(f"the catalog is busy: {contended.args[0]}") from None
                time.sleep(random.uniform(0, 0.01 * 2**attempt))
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Release all connections. With SQLite the write-ahead log is folded in."""
        if self.sqlite:
            # Another process may still read: then the log stays, which is as durable.
            with contextlib.suppress(OperationalError), self._engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        self._engine.dispose()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self.sqlite:
            yield
            return
        with self._writer:
            yield

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except MemCubeError:
            raise
        except DBAPIError as failed:
            raise _translate(failed, self.url.database or "") from None
        except StatementError as failed:
            if isinstance(failed.orig, MemCubeError):  # of _json, before the statement was sent
                raise failed.orig from None
            raise
        except UnicodeEncodeError:
            raise BadRequest(
                "a text holds half of a surrogate pair, which is no character"
            ) from None
        except OverflowError:
            raise BadRequest("a number is too large to be stored") from None
        except PoolTimeout:
            raise Unavailable("all connections to the catalog are in use") from None


def _json(value: object) -> str:
    """JSON as its standard has it, without NaN and the infinities."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as unfit:
        raise BadRequest(f"metadata can't be stored as JSON: {unfit}") from None


class _Contended(Exception):
    """Another transaction was in the way; a retry resolves it."""


def _translate(failed: DBAPIError, where: str) -> Exception:
    text = str(failed.orig)
    state = getattr(failed.orig, "sqlstate", None)
    if state in _RETRY_STATES or (
        isinstance(failed, OperationalError) and ("locked" in text or "busy" in text)
    ):
        return _Contended(text.splitlines()[0])
    if isinstance(failed, IntegrityError) and "UNIQUE" in text:
        return _Contended(text.splitlines()[0])
    if state == "53100" or "database or disk is full" in text:
        return StorageFull(where)
    if "disk image is malformed" in text or "not a database" in text:
        return Corrupt(where, f"not a readable catalog ({text.splitlines()[0]})")
    if state == "22021" or "NUL (0x00)" in text:
        return BadRequest("a text can't hold a NUL character")
    if state == "54000":
        return LimitExceeded("bytes of a tag or scope id", MAX_KEY_BYTES)
    if state is not None and state.startswith("22"):
        return BadRequest(f"a value can't be stored: {text.splitlines()[0]}")
    if isinstance(failed, OperationalError) or failed.connection_invalidated:
        return Unavailable(f"the catalog did not answer ({text.splitlines()[0]})")
    return failed
