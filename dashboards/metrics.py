"""Which series does Shoal report, and what does each one mean?

Every metric is declared here once: name, kind, unit, labels, help. Code, dashboards, alerts and
`docs/metrics.md` all take it from here, and tests hold them together.

    REQUESTS = Metric(…)  ─ Meters().counter(REQUESTS, model=…) ─► a child: .inc(), nothing else
                          ─ document() ─► docs/metrics.md

A child is looked up once and kept: on the request path a report costs one method call. Names end
in their unit, labels never name a replica (a histogram for each would cost a hundred series), and
`outcome` is "ok" or the value of a `Fault`.

prometheus_client is imported late: on import it chooses between memory and shared files by
PROMETHEUS_MULTIPROC_DIR, which a process that shares its series sets first. Where the values are
served, and who scrapes them, is for the caller to say.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Kind(enum.Enum):
    """How values behave; the words are Prometheus's own."""

    COUNTER = "counter"  # only grows; a rate is what says something
    GAUGE = "gauge"  # goes up and down; processes add up
    HISTOGRAM = "histogram"  # counts in buckets; quantiles come from rates of those


@dataclass(frozen=True, slots=True)
class Metric:
    """One declared series. `buckets` are a histogram's upper bounds, without infinity."""

    name: str
    kind: Kind
    unit: str
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """The names that a query may use."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)


class MetricError(ValueError):
    """A metric was used otherwise than it is declared; the message says how."""


# fmt: off
_VERSION = ("model", "version")
_LATENCY_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_STARTING_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

REQUESTS = Metric(
    "shoal_requests_total", Kind.COUNTER, "requests", ("model", "version", "protocol", "outcome"),
    "Requests that ended, answered or not",
)
REQUEST_SECONDS = Metric(
    "shoal_request_seconds", Kind.HISTOGRAM, "seconds", ("model", "version", "protocol"),
    "From a request's last byte in to its answer's last byte out", _LATENCY_S,
)
QUEUE_SECONDS = Metric(
    "shoal_queue_seconds", Kind.HISTOGRAM, "seconds", _VERSION,
    "How long a request waited for its batch to start", _LATENCY_S,
)
QUEUE_REQUESTS = Metric(
    "shoal_queue_requests", Kind.GAUGE, "requests", _VERSION,
    "Requests waiting for a batch now",
)
ONGOING_REQUESTS = Metric(
    "shoal_ongoing_requests", Kind.GAUGE, "requests", _VERSION,
    "Requests taken and not yet answered, waiting ones included",
)
BATCH_ROWS = Metric(
    "shoal_batch_rows", Kind.HISTOGRAM, "rows", _VERSION,
    "Rows in each batch that ran", _ROWS,
)
BATCH_SECONDS = Metric(
    "shoal_batch_seconds", Kind.HISTOGRAM, "seconds", _VERSION,
    "How long the model took over each batch", _LATENCY_S,
)
CACHE_HITS = Metric(
    "shoal_cache_hits_total", Kind.COUNTER, "hits", _VERSION,
    "Requests answered from the response cache",
)
CACHE_MISSES = Metric(
    "shoal_cache_misses_total", Kind.COUNTER, "misses", _VERSION,
    "Requests that the response cache could not answer",
)
LOAD_SECONDS = Metric(
    "shoal_load_seconds", Kind.HISTOGRAM, "seconds", _VERSION,
    "From a replica's start to ready: weights fetched, loaded, warmed up", _STARTING_S,
)
PROMPT_TOKENS = Metric(
    "shoal_prompt_tokens_total", Kind.COUNTER, "tokens", _VERSION,
    "Tokens read by language models",
)
GENERATED_TOKENS = Metric(
    "shoal_generated_tokens_total", Kind.COUNTER, "tokens", _VERSION,
    "Tokens written by language models",
)

HELD_REQUESTS = Metric(
    "shoal_held_requests", Kind.GAUGE, "requests", ("model",),
    "Requests held now, until their model is awake",
)
HELD = Metric(
    "shoal_held_total", Kind.COUNTER, "requests", ("model", "outcome"),
    "Requests that were held, by how that ended",
)
WAKE_SECONDS = Metric(
    "shoal_wake_seconds", Kind.HISTOGRAM, "seconds", ("model",),
    "From the first held request to a ready replica", _STARTING_S,
)

EDGE_APPLIES = Metric(
    "shoal_edge_applies_total", Kind.COUNTER, "applies", ("kind",),
    "Routing changes put into an edge, over its socket (`runtime`) or by a `reload`",
)
EDGE_APPLY_ERRORS = Metric(
    "shoal_edge_apply_errors_total", Kind.COUNTER, "errors", (),
    "Routing changes that an edge refused; it keeps the routing that it has",
)

CONTROLLER_STEPS = Metric(
    "shoal_controller_steps_total", Kind.COUNTER, "steps", (),
    "Rounds of observe, decide, reconcile",
)
CONTROLLER_STEP_FAILURES = Metric(
    "shoal_controller_step_failures_total", Kind.COUNTER, "failures", (),
    "Rounds that failed; the last decision stays in force",
)
CONTROLLER_STEP_SECONDS = Metric(
    "shoal_controller_step_seconds", Kind.HISTOGRAM, "seconds", (),
    "How long a round took", _LATENCY_S,
)
REPLICAS = Metric(
    "shoal_replicas", Kind.GAUGE, "replicas", ("model", "version", "state"),
    "Replicas of each version by state, as the controller sees them",
)
# fmt: on

REPORTERS: dict[str, tuple[Metric, ...]] = {
    "replica": (
        REQUESTS, REQUEST_SECONDS, QUEUE_SECONDS, QUEUE_REQUESTS, ONGOING_REQUESTS, BATCH_ROWS,
        BATCH_SECONDS, CACHE_HITS, CACHE_MISSES, LOAD_SECONDS, PROMPT_TOKENS, GENERATED_TOKENS,
    ),
    "front desk": (HELD_REQUESTS, HELD, WAKE_SECONDS),
    "edge": (EDGE_APPLIES, EDGE_APPLY_ERRORS),
    "controller": (CONTROLLER_STEPS, CONTROLLER_STEP_FAILURES, CONTROLLER_STEP_SECONDS, REPLICAS),
}  # fmt: skip
"""Who reports what."""

CATALOGUE: dict[str, Metric] = {
    metric.name: metric for metrics in REPORTERS.values() for metric in metrics
}
"""Every metric by name."""


class Meters:
    """The declared metrics as live series of this process.

    `shared`: the folder that PROMETHEUS_MULTIPROC_DIR names, if processes share their series; set
    it in the environment before the first of these is made. Each metric is made when first asked
    for, so a process shows only what it reports.
    """

    def __init__(self, shared: Path | None = None) -> None:
        import prometheus_client

        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._client = prometheus_client
        self._registry: CollectorRegistry = prometheus_client.CollectorRegistry()
        self._shared = shared
        self._parents: dict[str, Any] = {}

    def counter(self, metric: Metric, **labels: str) -> Counter:
        """The child of a counter: `.inc(amount)`."""
        child: Counter = self._child(metric, Kind.COUNTER, labels)
        return child

    def gauge(self, metric: Metric, **labels: str) -> Gauge:
        """The child of a gauge: `.set(value)`, `.inc()`, `.dec()`."""
        child: Gauge = self._child(metric, Kind.GAUGE, labels)
        return child

    def histogram(self, metric: Metric, **labels: str) -> Histogram:
        """The child of a histogram: `.observe(value)`."""
        child: Histogram = self._child(metric, Kind.HISTOGRAM, labels)
        return child

    def drop(self, metric: Metric, **labels: str) -> None:
        """Stop reporting the child with these labels (a version that is gone).

        Shared series can't be dropped: what a process wrote stays in its file.
        """
        if self._shared is None and metric.name in self._parents:
            self._parents[metric.name].remove(*_values(metric, labels))

    def exposition(self) -> bytes:
        """The values in Prometheus's text format: this process's, or all sharing processes'."""
        registry = self._registry
        if self._shared is not None:
            from prometheus_client import multiprocess

            registry = self._client.CollectorRegistry()
            multiprocess.MultiProcessCollector(registry, path=str(self._shared))  # type: ignore[no-untyped-call]
        return self._client.generate_latest(registry)

    def _child(self, metric: Metric, kind: Kind, labels: dict[str, str]) -> Any:
        if metric.kind is not kind:
            raise MetricError(f"{metric.name} is a {metric.kind.value}, not a {kind.value}")
        values = _values(metric, labels)
        parent = self._parents.get(metric.name)
        if parent is None:
            parent = self._parents[metric.name] = self._made(metric)
        return parent.labels(*values) if values else parent

    def _made(self, metric: Metric) -> Any:
        if CATALOGUE.get(metric.name) is not metric:
            raise MetricError(f"{metric.name} is not declared in dashboards/metrics.py")
        named: dict[str, Any] = {"labelnames": metric.labels, "registry": self._registry}
        if metric.kind is Kind.COUNTER:
            return self._client.Counter(metric.name, metric.help, **named)
        if metric.kind is Kind.GAUGE:
            named["multiprocess_mode"] = "livesum"
            return self._client.Gauge(metric.name, metric.help, **named)
        return self._client.Histogram(metric.name, metric.help, buckets=metric.buckets, **named)


def forget_process(pid: int, shared: Path) -> None:
    """Take the gauges of a process that has ended out of the shared sums; its counts stay."""
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(pid, path=str(shared))  # type: ignore[no-untyped-call]


def _values(metric: Metric, labels: dict[str, str]) -> list[str]:
    """The labels' values in the declared order."""
    if labels.keys() != set(metric.labels):
        declared, given = ", ".join(metric.labels) or "none", ", ".join(labels) or "none"
        raise MetricError(f"{metric.name} has the labels {declared}; given were {given}")
    return [labels[name] for name in metric.labels]


def document() -> str:
    """The catalogue as the page `docs/metrics.md`."""
    lines = ["# Metrics", "", "Made from `dashboards/metrics.py` by `make docs`; do not edit."]
    for reporter, metrics in REPORTERS.items():
        lines += ["", f"## Reported by the {reporter}", "", *_table(metrics)]
    return "\n".join(lines) + "\n"


def _table(metrics: Iterable[Metric]) -> list[str]:
    rows = ["| Name | Kind | Unit | Labels | What it says |", "|---|---|---|---|---|"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "none"
        rows.append(
            f"| `{metric.name}` | {metric.kind.value} | {metric.unit} | {labels} | {metric.help} |"
        )
    return rows


if __name__ == "__main__":
    sys.stdout.write(document())
