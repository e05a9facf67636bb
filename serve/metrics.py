"""Prometheus metrics of one gateway process. No label names a tenant or holds what callers sent."""

import time
from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memcube.catalog import Job, JobState
from memcube.chat.service import Report

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
TRAINING_FIGURES = (
    "step",
    "num_steps",
    "loss",
    "answer_loss",
    "kl",
    "tokens_per_s",
    "eta_s",
)
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The registry and what the gateway counts in it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self.requests = Counter(
            "memcube_http_requests_total", "Requests answered.", labels, registry=self.registry
        )
        self.seconds = Histogram(
            "memcube_http_request_seconds",
            "Time to answer a request.",
            ("method", "route"),
            registry=self.registry,
            buckets=BUCKETS,
        )
        self.in_flight = Gauge(
            "memcube_http_requests_in_flight", "Requests being answered.", registry=self.registry
        )
        self.added = Counter(
            "memcube_cubes_added_total",
            "Cubes added or repeated.",
            ("event",),
            registry=self.registry,
        )
        self.pending_index = Gauge(
            "memcube_index_pending", "Cubes that wait for the index.", registry=self.registry
        )
        self.embedder_waiting = Gauge(
            "memcube_embedder_waiting_texts",
            "Texts that wait to be embedded.",
            registry=self.registry,
        )
        self.shards_down = Gauge(
            "memcube_shards_down",
            "Shards of the plaintext tier that don't answer.",
            registry=self.registry,
        )
        self.scheduler_rounds = Gauge(
            "memcube_scheduler_rounds", "Rounds of the reconcile loop.", registry=self.registry
        )
        self.scheduler_epoch = Gauge(
            "memcube_scheduler_epoch", "Epoch of the scheduler's lease.", registry=self.registry
        )

        self.jobs = Gauge("memcube_jobs", "Jobs by state.", ("state",), registry=self.registry)
        self.training = Gauge(
            "memcube_training",
            "How the training that runs now is doing: step, num_steps, loss, answer_loss, kl, "
            "tokens_per_s, eta_s. None where none runs.",
            ("figure",),
            registry=self.registry,
        )

        self.ttft_seconds = Histogram(
            "memcube_chat_ttft_seconds",
            "Time to the first token of an answer, in the engine.",
            registry=self.registry,
            buckets=BUCKETS,
        )
        self.prompt_tokens = Counter(
            "memcube_chat_prompt_tokens_total",
            "Tokens of prompts, by how they were read.",
            ("how",),
            registry=self.registry,
        )
        self.chats_refused = Counter(
            "memcube_chat_refused_total",
            "Chats that got no answer, by the code of the problem.",
            ("code",),
            registry=self.registry,
        )

        self.adapters_refused = Counter(
            "memcube_chat_adapter_refused_total",
            "Chats answered by the base model as their scope's adapter could not be used, by code.",
            ("code",),
            registry=self.registry,
        )

    def answered(self, report: Report) -> None:
        """Count a chat's answer."""
        usage = report.usage
        self.ttft_seconds.observe(usage.ttft_s)
        if report.refusal is not None:
            self.adapters_refused.labels(report.refusal.code).inc()
        for how, tokens in (
            ("attached", usage.attached_exact),
            ("composed", usage.attached_composed),
            ("prefilled", usage.prefilled),
        ):
            self.prompt_tokens.labels(how).inc(tokens)

    def jobs_are(self, counts: Mapping[JobState, int], running: Sequence[Job]) -> None:
        """Set what is told of jobs: how many, and how far those that run are."""
        for state, count in counts.items():
            self.jobs.labels(state).set(count)
        self.training.clear()
        for job in running:
            for figure in TRAINING_FIGURES:
                if (value := job.progress.get(figure)) is not None:
                    self.training.labels(figure).set(value)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class Measured:
    """Counts and times every request, by its route's template."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started = time.perf_counter()
        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, noting)
        finally:
            self._metrics.in_flight.dec()
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.requests.labels(method, route, str(status)).inc()
            self._metrics.seconds.labels(method, route).observe(time.perf_counter() - started)
