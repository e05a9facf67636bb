"""Keeps the right to lead: takes the lease, renews it in time, and takes it again when it was lost."""

import logging
import threading
from datetime import datetime
from typing import Protocol

from memcube.catalog.access import Lease
from memcube.catalog.fence import LEASE
from memcube.errors import Conflict, StaleEpoch, Unavailable
from memcube.indexing import Clock

TTL_S = 6.0
"""A successor may act so long after its leader was last heard of."""
log = logging.getLogger(__name__)


class Leases(Protocol):
    """``memcube.catalog.Leases``."""

    def acquire(self, name: str, holder: str, *, now: datetime, ttl_s: float) -> Lease: ...
    def renew(self, held: Lease, *, now: datetime, ttl_s: float) -> Lease: ...
    def release(self, held: Lease) -> None: ...


class LeaseKeeper:
    """One holder's hold on the scheduler's lease. Its calls block; they are safe from several threads.

    ``step`` is to be called every ``ttl_s / 3``, by a thread that nothing else can hold up: a round may be
    long, the lease must not run out meanwhile.
    """

    def __init__(self, leases: Leases, *, holder: str, clock: Clock, ttl_s: float = TTL_S) -> None:
        self._leases = leases
        self._holder = holder
        self._clock = clock
        self.ttl_s = ttl_s
        self._lease: Lease | None = None
        self._guard = threading.Lock()
        self._has_ended = False
        self.num_failures = 0
        """How often the catalog did not answer."""

    @property
    def epoch(self) -> int | None:
        """The epoch under which to act now; None: another leads, or nobody. A lease that has run out is no
        reason to stop: all that is done is refused from the moment that another takes it."""
        lease = self._lease
        return None if lease is None else lease.epoch

    @property
    def lease(self) -> Lease | None:
        return self._lease

    def step(self) -> int | None:
        """Renew the lease, or try to take it; the epoch."""
        with self._guard:
            if self._has_ended:
                return None
            now = self._clock()
            try:
                if self._lease is None:
                    self._lease = self._leases.acquire(
                        LEASE, self._holder, now=now, ttl_s=self.ttl_s
                    )
                    log.info("leads under epoch %d", self._lease.epoch)
                else:
                    self._lease = self._leases.renew(self._lease, now=now, ttl_s=self.ttl_s)
            except Conflict:
                self._lease = None
            except StaleEpoch as taken:
                log.warning("the lease was taken over: %s", taken)
                self._lease = None
            except Unavailable as failed:
                self.num_failures += 1
                log.warning("the lease could not be kept: %s", failed)
            return self.epoch

    def lost(self, epoch: int) -> None:
        """Note that something was refused under an epoch: another leads. The next step tries anew."""
        with self._guard:
            if self.epoch == epoch:
                self._lease = None

    def release(self) -> None:
        """Let the next holder in at once, and take the lease no more.

        Raises:
            Unavailable: the catalog does not answer; the lease runs out then.
        """
        with self._guard:
            self._has_ended = True
            lease, self._lease = self._lease, None
            if lease is not None:
                self._leases.release(lease)

    def keep(self, stopping: threading.Event) -> None:
        """Step until the event is set; for a thread of its own."""
        while not stopping.is_set():
            try:
                self.step()
            except Exception:
                self.num_failures += 1
                log.exception("the lease could not be kept")
            stopping.wait(self.ttl_s / 3)
