"""Refuses a leader that has been followed by another."""

import threading

from memcube.errors import StaleEpoch


class LeaderFence:
    """The latest leader that one part of the system has heard of. Safe from several threads.

    A part that starts makes it with the epoch of the lease in the catalog, before it serves: a leader that
    was deposed while the part was not there is refused all the same.
    """

    def __init__(self, leader: int = 0) -> None:
        self._leader = leader
        self._guard = threading.Lock()

    @property
    def leader(self) -> int:
        """The latest epoch heard of; 0 is none."""
        return self._leader

    def check(self, leader: int) -> None:
        """Let the present leader, or a later one, pass.

        Raises:
            StaleEpoch: a later one was heard of.
        """
        with self._guard:
            if leader < self._leader:
                raise StaleEpoch(leader, self._leader)
            self._leader = leader
