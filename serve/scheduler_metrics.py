"""Prometheus metrics of the scheduler: what its host says at the time of a scrape.

Each gateway tells the same of the same scheduler: take the maximum over gateways, not the sum. Counters
begin anew with the scheduler's process. Labels are ours: policies, reasons, tiers, kinds, states, parts.
"""

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from memcube.catalog import QueueStats


def text(told: Mapping[str, Any] | None, queue: QueueStats, *, now: datetime) -> bytes:
    """The exposition. ``told`` are the host's details, None where it doesn't answer."""
    registry = CollectorRegistry()
    registry.register(_Scheduler(told, queue, now))
    return generate_latest(registry)


class _Scheduler(Collector):
    def __init__(self, told: Mapping[str, Any] | None, queue: QueueStats, now: datetime) -> None:
        self._told = told
        self._queue = queue
        self._now = now

    def collect(self) -> Iterator[Metric]:
        tasks = GaugeMetricFamily(
            "memcube_scheduler_tasks", "Tasks of the queue by state.", labels=("state",)
        )
        for state, count in self._queue.by_state.items():
            tasks.add_metric((state,), count)
        due = self._queue.oldest_due
        age_s = 0.0 if due is None else max((self._now - due).total_seconds(), 0.0)
        yield tasks
        yield GaugeMetricFamily(
            "memcube_scheduler_oldest_task_seconds",
            "How long the oldest task waits that may run.",
            value=age_s,
        )
        leading = self._told is not None and self._told["epoch"] is not None
        yield GaugeMetricFamily(
            "memcube_scheduler_leading", "Whether the scheduler answers and leads.", value=leading
        )
        if self._told is not None:
            yield from self._moves(self._told)
            yield from self._parts(self._told["parts"])

    @staticmethod
    def _moves(told: Mapping[str, Any]) -> Iterator[Metric]:
        decisions = CounterMetricFamily(
            "memcube_scheduler_decisions",
            "What became of proposed actions: planned, passed, or why they were refused.",
            labels=("policy", "outcome"),
        )
        for one in told["decisions"]:
            decisions.add_metric((one["policy"], one["outcome"]), one["count"])
        moves = CounterMetricFamily(
            "memcube_scheduler_moves",
            "Actions that ended, by the state that they ended in.",
            labels=("tier", "action", "state"),
        )
        for one in told["moves"]:
            moves.add_metric((one["tier"], one["action"], one["state"]), one["count"])
        moved = CounterMetricFamily(
            "memcube_scheduler_moved_bytes", "Bytes of copies that are done.", labels=("tier",)
        )
        for tier, num_bytes in told["moved_bytes"].items():
            moved.add_metric((tier,), num_bytes)
        yield from (decisions, moves, moved)
        yield GaugeMetricFamily(
            "memcube_scheduler_moves_open", "Actions under way.", value=told["moves_open"]
        )
        yield GaugeMetricFamily(
            "memcube_scheduler_moves_waiting",
            "Those of them that wait for their turn.",
            value=told["moves_waiting"],
        )

    def _parts(self, parts: Mapping[str, Any]) -> Iterator[Metric]:
        failures = CounterMetricFamily(
            "memcube_scheduler_part_failures", "Rounds of a part that failed.", labels=("part",)
        )
        ages = GaugeMetricFamily(
            "memcube_scheduler_part_age_seconds",
            "Since a part's last round ended, well or not.",
            labels=("part",),
        )
        for name, part in parts.items():
            failures.add_metric((name,), part["failures"])
            if part["ended_at"] is not None:
                ended_at = datetime.fromisoformat(part["ended_at"])
                ages.add_metric((name,), max((self._now - ended_at).total_seconds(), 0.0))
        yield from (failures, ages)
