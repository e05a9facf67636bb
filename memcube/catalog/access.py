"""Tenants, API keys and leases.

A key's secret is shown once and stored as its SHA-256 (it has 256 random bits: a slow hash would
add nothing). Authentication reads the catalog every time, so that revoking ends a key at once.
"""

import hashlib
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

import sqlalchemy as sa

from memcube.catalog import schema
from memcube.catalog.cluster_log import ClusterEventKind, note_event
from memcube.catalog.engine import Database
from memcube.catalog.fence import LEASE
from memcube.catalog.schema import micros, micros_or_none, moment, moment_or_none
from memcube.catalog.shard_book import shards_to_choose
from memcube.errors import BadRequest, Conflict, NotFound, StaleEpoch, Unauthenticated
from memcube.ids import IdSource, TenantId, digest64

_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
KEY_PREFIX = "mk_"


class Role(StrEnum):
    """What a key may do; each includes the ones before it. An operator makes tenants and their keys; it
    reads no tenant's memory but its own."""

    READER = "reader"
    WRITER = "writer"
    ADMIN = "admin"
    OPERATOR = "operator"

    def allows(self, needed: "Role") -> bool:
        order = list(Role)
        return order.index(self) >= order.index(needed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A tenant and the shard its cubes lie in, which a move changes (``memcube.scheduler.shard_port``)."""

    id: TenantId
    shard: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who a request is from, as its key says."""

    tenant: TenantId
    role: Role
    key_id: str
    shard: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyInfo:
    """A key without its secret; ``hint`` is the secret's last four characters."""

    id: str
    tenant: TenantId
    name: str
    role: Role
    hint: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to act under a name until ``expires_at``, fenced by its epoch."""

    name: str
    holder: str
    epoch: int
    expires_at: datetime


class Access:
    """Who may come in, and as whom."""

    def __init__(self, database: Database, *, new_id: Callable[[datetime], str]) -> None:
        self._database = database
        self._new_id = new_id

    def ensure_tenant(self, tenant: str, *, shards: int, now: datetime) -> Tenant:
        """The tenant, created if it is new: in one of the shards that are open and take something new, or
        one of the first ``shards`` where none was opened yet.

        Raises:
            BadRequest: the name is not ``[a-z0-9][a-z0-9_-]{0,62}``.
        """
        if not _TENANT.fullmatch(tenant):
            raise BadRequest(
                "1 to 63 of a-z, 0-9, '-' and '_', beginning with a letter or digit", "tenant"
            )
        number = digest64("shard", tenant)

        def work(connection: sa.Connection) -> Tenant:
            query = sa.select(schema.tenants).where(schema.tenants.c.id == tenant)
            found = connection.execute(query).mappings().first()
            if found is None:
                choice = shards_to_choose(connection) or range(shards)
                found = {
                    "id": tenant,
                    "shard": choice[number % len(choice)],
                    "created_at": micros(now),
                }
                connection.execute(sa.insert(schema.tenants), found)
            return _tenant(found)

        return self._database.write(work)

    def tenants(self) -> list[Tenant]:
        """All tenants, by name."""
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(schema.tenants).order_by(schema.tenants.c.id))
            return [_tenant(row) for row in rows.mappings()]

    def create_key(
        self, *, tenant: TenantId, name: str, role: Role, expires_at: datetime | None, now: datetime
    ) -> tuple[KeyInfo, str]:
        """A new key and its secret, which is told this once.

        Raises:
            NotFound: no such tenant.
        """
        secret = KEY_PREFIX + secrets.token_urlsafe(32)
        row = {
            "id": self._new_id(now),
            "tenant": tenant,
            "name": name,
            "role": str(role),
            "secret_sha256": _hash(secret),
            "hint": secret[-4:],
            "created_at": micros(now),
            "expires_at": micros_or_none(expires_at),
            "revoked_at": None,
        }

        def work(connection: sa.Connection) -> None:
            known = sa.select(schema.tenants.c.id).where(schema.tenants.c.id == tenant)
            if connection.execute(known).first() is None:
                raise NotFound("tenant", tenant)
            connection.execute(sa.insert(schema.keys), row)

        self._database.write(work)
        return _key(row), secret

    def authenticate(self, secret: str, *, now: datetime) -> Principal:
        """Who the secret belongs to.

        Raises:
            Unauthenticated: unknown, expired or revoked; the three can't be told apart.
        """
        found = self._database.rows(_AUTHENTICATE, {"hash": _hash(secret)})
        row = found[0] if found else None
        if row is None or row.revoked_at is not None:
            raise Unauthenticated
        if row.expires_at is not None and row.expires_at <= micros(now):
            raise Unauthenticated
        return Principal(
            tenant=TenantId(row.tenant), role=Role(row.role), key_id=row.id, shard=row.shard
        )

    def keys(self, tenant: TenantId) -> list[KeyInfo]:
        """The tenant's keys, oldest first, revoked ones too."""
        query = (
            sa.select(schema.keys).where(schema.keys.c.tenant == tenant).order_by(schema.keys.c.id)
        )
        with self._database.reading() as connection:
            return [_key(row) for row in connection.execute(query).mappings()]

    def revoke_key(self, tenant: TenantId, id: str, *, now: datetime) -> None:
        """End a key; the next request with it is refused. Idempotent.

        Raises:
            NotFound: the tenant has no such key.
        """
        keys = schema.keys

        def work(connection: sa.Connection) -> None:
            done = connection.execute(
                sa.update(keys)
                .where(keys.c.id == id, keys.c.tenant == tenant)
                .values(revoked_at=sa.func.coalesce(keys.c.revoked_at, micros(now)))
            )
            if done.rowcount == 0:
                raise NotFound("key", id)

        self._database.write(work)


_AUTHENTICATE = (
    sa.select(
        schema.keys.c.id,
        schema.keys.c.tenant,
        schema.keys.c.role,
        schema.keys.c.expires_at,
        schema.keys.c.revoked_at,
        schema.tenants.c.shard,
    )
    .join(schema.tenants, schema.tenants.c.id == schema.keys.c.tenant)
    .where(schema.keys.c.secret_sha256 == sa.bindparam("hash"))
)


class Leases:
    """Rights to act, each with an epoch that grows at every take-over."""

    def __init__(self, database: Database, *, new_id: IdSource) -> None:
        self._database = database
        self._new_id = new_id

    def acquire(self, name: str, holder: str, *, now: datetime, ttl_s: float) -> Lease:
        """Take the lease, under a new epoch.

        Raises:
            Conflict: another holder's lease has not run out.
        """
        lease = schema.leases

        def work(connection: sa.Connection) -> Lease:
            found = connection.execute(
                sa.select(lease).where(lease.c.name == name).with_for_update()
            ).first()
            if found is not None and found.holder != holder and found.expires_at > micros(now):
                raise Conflict(
                    f"lease {name!r} is held by {found.holder} until {moment(found.expires_at):%H:%M:%S}"
                )
            taken = Lease(
                name=name,
                holder=holder,
                epoch=1 if found is None else found.epoch + 1,
                expires_at=now + timedelta(seconds=ttl_s),
            )
            values = {
                "holder": holder,
                "epoch": taken.epoch,
                "expires_at": micros(taken.expires_at),
            }
            if found is None:
                connection.execute(sa.insert(lease), {"name": name, **values})
            else:
                connection.execute(sa.update(lease).where(lease.c.name == name).values(**values))
            if name == LEASE:
                note_event(
                    connection,
                    ClusterEventKind.LEADER,
                    reason=f"{holder} leads under epoch {taken.epoch}",
                    new_id=self._new_id,
                    now=now,
                )
            return taken

        return self._database.write(work)

    def renew(self, held: Lease, *, now: datetime, ttl_s: float) -> Lease:
        """Extend a lease that is still ours.

        Raises:
            StaleEpoch: it was taken over.
        """
        lease = schema.leases
        until = now + timedelta(seconds=ttl_s)

        def work(connection: sa.Connection) -> Lease:
            done = connection.execute(
                sa.update(lease)
                .where(lease.c.name == held.name, lease.c.epoch == held.epoch)
                .values(expires_at=micros(until))
            )
            if done.rowcount == 0:
                query = sa.select(lease.c.epoch).where(lease.c.name == held.name)
                raise StaleEpoch(held.epoch, connection.execute(query).scalar() or 0)
            return Lease(name=held.name, holder=held.holder, epoch=held.epoch, expires_at=until)

        return self._database.write(work)

    def release(self, held: Lease) -> None:
        """Let the next holder in at once. A lease that was taken over is left alone."""
        lease = schema.leases
        self._database.write(
            lambda connection: connection.execute(
                sa.update(lease)
                .where(lease.c.name == held.name, lease.c.epoch == held.epoch)
                .values(expires_at=0)
            )
        )

    def get(self, name: str) -> Lease | None:
        """A lease as it is noted, run out or not; None before it was first taken."""
        lease = schema.leases
        with self._database.reading() as connection:
            row = connection.execute(sa.select(lease).where(lease.c.name == name)).first()
        if row is None:
            return None
        return Lease(
            name=name, holder=row.holder, epoch=row.epoch, expires_at=moment(row.expires_at)
        )

    def epoch(self, name: str) -> int:
        """The epoch of a lease; 0 before it was first taken."""
        lease = self.get(name)
        return 0 if lease is None else lease.epoch

    def next_epoch(self, name: str, holder: str) -> int:
        """A new epoch for an actor that starts: whatever was told to earlier ones is stale."""
        lease = schema.leases

        def work(connection: sa.Connection) -> int:
            query = sa.select(lease.c.epoch).where(lease.c.name == name).with_for_update()
            epoch = (connection.execute(query).scalar() or 0) + 1
            values = {"holder": holder, "epoch": epoch, "expires_at": 0}
            if epoch == 1:
                connection.execute(sa.insert(lease), {"name": name, **values})
            else:
                connection.execute(sa.update(lease).where(lease.c.name == name).values(**values))
            return epoch

        return self._database.write(work)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _tenant(row) -> Tenant:
    return Tenant(id=TenantId(row["id"]), shard=row["shard"], created_at=moment(row["created_at"]))


def _key(row) -> KeyInfo:
    return KeyInfo(
        id=row["id"],
        tenant=TenantId(row["tenant"]),
        name=row["name"],
        role=Role(row["role"]),
        hint=row["hint"],
        created_at=moment(row["created_at"]),
        expires_at=moment_or_none(row["expires_at"]),
        revoked_at=moment_or_none(row["revoked_at"]),
    )
