"""Prometheus metrics of one gateway process. No label names a tenant or holds what callers sent."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memcube.chat.service import Report

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
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
        self.scheduler_rounds = Gauge(
            "memcube_scheduler_rounds", "Rounds of the reconcile loop.", registry=self.registry
        )
        self.scheduler_epoch = Gauge(
            "memcube_scheduler_epoch", "Epoch of the scheduler's lease.", registry=self.registry
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

    def answered(self, report: Report) -> None:
        """Count a chat's answer."""
        usage = report.usage
        self.ttft_seconds.observe(usage.ttft_s)
        for how, tokens in (
            ("attached", usage.attached_exact),
            ("composed", usage.attached_composed),
            ("prefilled", usage.prefilled),
        ):
            self.prompt_tokens.labels(how).inc(tokens)

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
