"""Who comes next: tenants take turns, a tenant's own runs come in their order."""

from collections import deque
from collections.abc import Iterator

from memcube.activation.runs import Run


class WaitingLine:
    """Runs that wait to be admitted."""

    def __init__(self) -> None:
        self._by_tenant: dict[str, deque[Run]] = {}  # whose turn it is first
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Run]:
        return (run for line in self._by_tenant.values() for run in line)

    def add(self, run: Run) -> None:
        """Put a run behind its tenant's others."""
        self._by_tenant.setdefault(run.request.tenant, deque()).append(run)
        self._count += 1

    def next(self) -> Run | None:
        """The first run of the tenant whose turn it is, those left out that load yet."""
        return next((run for run in self if not run.loading), None)

    def take(self, run: Run) -> None:
        """Let a run go in: then it is the other tenants' turn."""
        self.remove(run)
        if line := self._by_tenant.pop(run.request.tenant, None):
            self._by_tenant[run.request.tenant] = line

    def remove(self, run: Run) -> None:
        """Take a run out of the line."""
        line = self._by_tenant[run.request.tenant]
        line.remove(run)
        if not line:
            del self._by_tenant[run.request.tenant]
        self._count -= 1
