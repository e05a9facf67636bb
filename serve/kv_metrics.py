"""Prometheus metrics of the activation tier: what its engines and media say at the time of a scrape.

Each gateway tells the same of the same engines: take the maximum over gateways, not the sum. Counters
begin anew with an engine. Labels are few: engines, media, nodes, and reasons, which are ours; tenants
by name only where asked for, the largest ``MAX_TENANTS`` of a medium, the others as one.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from memcube.activation.stats import AdapterStats, EngineStats, HistogramData, KvStats

MAX_TENANTS = 20
OTHERS = "(others)"
"""No tenant's name: those have no brackets."""


def text(engines: Sequence[KvStats | None], *, name_tenants: bool) -> bytes:
    """The exposition of these engines, by number; None is one that doesn't answer."""
    registry = CollectorRegistry()
    registry.register(_Kv(engines, name_tenants))
    return generate_latest(registry)


class _Kv(Collector):
    def __init__(self, engines: Sequence[KvStats | None], name_tenants: bool) -> None:
        self._engines = engines
        self._name_tenants = name_tenants

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(
            "memcube_engine_up", "Whether an engine answers.", labels=("engine",)
        )
        for number, moment in enumerate(self._engines):
            up.add_metric((str(number),), float(moment is not None))
        yield up
        answering = [(str(n), moment) for n, moment in enumerate(self._engines) if moment]
        engines = [(engine, moment.engine) for engine, moment in answering]
        yield from _load(engines)
        yield from _tokens(engines)
        yield from _times(engines)
        yield from _adapters([(n, moment.adapters) for n, moment in answering if moment.adapters])
        yield from self._media(answering)

    def _media(self, answering: Sequence[tuple[str, KvStats]]) -> Iterator[Metric]:
        labels = ("medium", "place")
        used = GaugeMetricFamily("memcube_kv_bytes", "Bytes of KV payloads.", labels=labels)
        payloads = GaugeMetricFamily("memcube_kv_payloads", "KV payloads.", labels=labels)
        gone = CounterMetricFamily(
            "memcube_kv_gone",
            "Payloads that left a medium, or were not let in, by reason.",
            labels=(*labels, "reason"),
        )
        hits = CounterMetricFamily("memcube_kv_hits", "Loads that found it.", labels=labels)
        misses = CounterMetricFamily("memcube_kv_misses", "Loads that did not.", labels=labels)
        loaded = CounterMetricFamily("memcube_kv_loaded_tokens", "Tokens loaded.", labels=labels)
        by_tenant: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for engine, moment in answering:
            place = ("device", f"engine-{engine}")
            used.add_metric(place, moment.engine.pool_bytes)
            payloads.add_metric(place, moment.engine.pool_blocks)
            _add_events(gone, place, moment.engine.evictions)
            by_tenant["device"].update(moment.engine.bytes_by_tenant)
        # The engines of a node share its media: each node is told of once.
        for node, moment in {moment.node: moment for _, moment in answering}.items():
            for medium in moment.media:
                place = (medium.name, node[:16])
                used.add_metric(place, medium.used_bytes)
                payloads.add_metric(place, medium.num_payloads)
                _add_events(gone, place, medium.events)
                hits.add_metric(place, medium.hits)
                misses.add_metric(place, medium.misses)
                loaded.add_metric(place, medium.hit_tokens)
                by_tenant[medium.name].update(medium.bytes_by_tenant)
        yield from (used, payloads, gone, hits, misses, loaded)
        if self._name_tenants:
            yield _tenants(by_tenant)


def _load(engines: Sequence[tuple[str, EngineStats]]) -> Iterator[Metric]:
    requests = GaugeMetricFamily(
        "memcube_engine_requests", "Requests in an engine, by state.", labels=("engine", "state")
    )
    speed = GaugeMetricFamily(
        "memcube_engine_tokens_per_second",
        "Tokens a second: generated in the last seconds, and of prefill while it computes.",
        labels=("engine", "kind"),
    )
    ended = CounterMetricFamily(
        "memcube_engine_ended", "Requests that ended, by reason.", labels=("engine", "reason")
    )
    failed = CounterMetricFamily(
        "memcube_engine_failed_steps", "Steps that failed.", labels=("engine",)
    )
    for name, engine in engines:
        for state in ("running", "waiting", "background"):
            requests.add_metric((name, state), getattr(engine, state))
        speed.add_metric((name, "generated"), engine.tokens_per_s)
        speed.add_metric((name, "prefill"), engine.prefill_tokens_per_s)
        failed.add_metric((name,), engine.failed_steps)
        for reason, count in sorted(engine.finished.items()):
            ended.add_metric((name, reason), count)
    yield from (requests, speed, ended, failed)


def _tokens(engines: Sequence[tuple[str, EngineStats]]) -> Iterator[Metric]:
    tokens = CounterMetricFamily(
        "memcube_engine_tokens",
        "Tokens, by what was done: attached exactly or composed, prefilled, generated.",
        labels=("engine", "how"),
    )
    total: Counter[str] = Counter()
    for name, engine in engines:
        read = {kind: engine.attached_tokens.get(kind, 0) for kind in ("exact", "composed")}
        read["none"] = engine.prefilled_tokens
        total.update(read)
        for kind, how in (("exact", "exact"), ("composed", "composed"), ("none", "prefilled")):
            tokens.add_metric((name, how), read[kind])
        tokens.add_metric((name, "generated"), engine.generated_tokens)
    ratio = GaugeMetricFamily(
        "memcube_kv_hit_ratio",
        "Share of all tokens read, by the kind of reuse, since the engines began.",
        labels=("kind",),
    )
    for kind in ("exact", "composed", "none"):
        ratio.add_metric((kind,), total[kind] / max(total.total(), 1))
    yield from (tokens, ratio)


def _times(engines: Sequence[tuple[str, EngineStats]]) -> Iterator[Metric]:
    ttft = HistogramMetricFamily(
        "memcube_engine_ttft_seconds",
        "Time to the first token, by the kind of reuse.",
        labels=("engine", "kind"),
    )
    queue = HistogramMetricFamily(
        "memcube_engine_queue_seconds", "Time in line.", labels=("engine",)
    )
    for name, engine in engines:
        for kind, found in sorted(engine.ttft_s.items()):
            ttft.add_metric((name, kind), _buckets(found), found.sum)
        queue.add_metric((name,), _buckets(engine.queue_s), engine.queue_s.sum)
    yield from (ttft, queue)


def _adapters(engines: Sequence[tuple[str, AdapterStats]]) -> Iterator[Metric]:
    engine = ("engine",)
    resident = GaugeMetricFamily(
        "memcube_adapter_resident", "Adapters that an engine holds ready.", labels=engine
    )
    size = GaugeMetricFamily("memcube_adapter_resident_bytes", "Bytes of these.", labels=engine)
    loads = CounterMetricFamily("memcube_adapter_loads", "Adapters loaded.", labels=engine)
    load_s = CounterMetricFamily(
        "memcube_adapter_load_seconds", "Time that loads took.", labels=engine
    )
    evicted = CounterMetricFamily(
        "memcube_adapter_evictions", "Adapters that made room for others.", labels=engine
    )
    refused = CounterMetricFamily(
        "memcube_adapter_refused",
        "Requests whose adapter could not be used, by the problem's code.",
        labels=("engine", "code"),
    )
    waits = HistogramMetricFamily(
        "memcube_adapter_wait_seconds",
        "Time until a request had its adapter: resident (a swap), or loaded.",
        labels=("engine", "kind"),
    )
    for name, adapters in engines:
        resident.add_metric((name,), adapters.resident)
        size.add_metric((name,), adapters.resident_bytes)
        loads.add_metric((name,), adapters.loads)
        load_s.add_metric((name,), adapters.load_s)
        evicted.add_metric((name,), adapters.evictions)
        for code, count in sorted(adapters.refused.items()):
            refused.add_metric((name, code), count)
        for kind, found in sorted(adapters.wait_s.items()):
            waits.add_metric((name, kind), _buckets(found), found.sum)
    yield from (resident, size, loads, load_s, evicted, refused, waits)


def _buckets(found: HistogramData) -> list[tuple[str, float]]:
    """Cumulative counts, as Prometheus wants them."""
    so_far, buckets = 0, []
    for bound, count in zip((*map(str, found.bounds), "+Inf"), found.counts, strict=True):
        so_far += count
        buckets.append((bound, float(so_far)))
    return buckets


def _add_events(
    gone: CounterMetricFamily, place: tuple[str, str], events: Mapping[str, int]
) -> None:
    for reason, count in sorted(events.items()):
        gone.add_metric((*place, reason), count)


def _tenants(by_medium: Mapping[str, Counter[str]]) -> Metric:
    metric = GaugeMetricFamily(
        "memcube_kv_tenant_bytes", "Bytes of KV payloads.", labels=("medium", "tenant")
    )
    for medium, sizes in by_medium.items():
        for tenant, size in _largest(sizes):
            metric.add_metric((medium, tenant), size)
    return metric


def _largest(sizes: Counter[str]) -> Iterable[tuple[str, int]]:
    shown = sizes.most_common(MAX_TENANTS)
    if others := sizes.total() - sum(size for _, size in shown):
        shown.append((OTHERS, others))
    return shown
