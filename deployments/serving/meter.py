"""Where a process's figures go: the declared metrics, with the labels filled in once.

On the request path a figure costs a dictionary look-up and a method call. All processes of a node
share a folder (PROMETHEUS_MULTIPROC_DIR), from which the node's edge agent answers `/metrics`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dashboards import metrics
from dashboards.metrics import Meters
from deployments.inference import Fault, InferenceError
from deployments.serving.holding import WaitingRoom


def process_meters() -> Meters:
    """The metrics of this process, shared with its node if the environment names a folder."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return Meters(Path(folder) if folder else None)


class ReplicaMeter:
    """The figures of one replica; an engine's `Meter` and an application's observer."""

    def __init__(self, meters: Meters, model: str, version: str) -> None:
        labels = {"model": model, "version": version}
        self._meters, self._labels = meters, labels
        self._batch_rows = meters.histogram(metrics.BATCH_ROWS, **labels).observe
        self._batch_seconds = meters.histogram(metrics.BATCH_SECONDS, **labels).observe
        self.queued = meters.histogram(metrics.QUEUE_SECONDS, **labels).observe
        self._hits = meters.counter(metrics.CACHE_HITS, **labels).inc
        self._misses = meters.counter(metrics.CACHE_MISSES, **labels).inc
        self._ongoing = meters.gauge(metrics.ONGOING_REQUESTS, **labels).set
        self._queue = meters.gauge(metrics.QUEUE_REQUESTS, **labels).set
        self._prompt_tokens = meters.counter(metrics.PROMPT_TOKENS, **labels).inc
        self._generated_tokens = meters.counter(metrics.GENERATED_TOKENS, **labels).inc
        self.loaded = meters.histogram(metrics.LOAD_SECONDS, **labels).observe
        self._requests: dict[tuple[str, Fault | None], Any] = {}
        self._seconds: dict[str, Any] = {}

    def batch(self, rows: int, seconds: float) -> None:
        """The model ran `rows` in `seconds`."""
        self._batch_rows(rows)
        self._batch_seconds(seconds)

    def cached(self, hit: bool) -> None:
        """The response cache was asked."""
        (self._hits if hit else self._misses)()

    def tokens(self, prompt: int, completion: int) -> None:
        """A text was made."""
        self._prompt_tokens(prompt)
        self._generated_tokens(completion)

    def load(self, ongoing: int, queued: int) -> None:
        """What is inside now."""
        self._ongoing(ongoing)
        self._queue(queued)

    def request(self, protocol: str, fault: Fault | None, seconds: float) -> None:
        """A request of `protocol` ended after `seconds`; `fault` None = answered."""
        count = self._requests.get((protocol, fault))
        if count is None:
            count = self._request_counter(protocol, fault)
        count()
        observe = self._seconds.get(protocol)
        if observe is None:
            child = self._meters.histogram(
                metrics.REQUEST_SECONDS, protocol=protocol, **self._labels
            )
            observe = self._seconds[protocol] = child.observe
        observe(seconds)

    def _request_counter(self, protocol: str, fault: Fault | None) -> Any:
        outcome = "ok" if fault is None else fault.value
        child = self._meters.counter(
            metrics.REQUESTS, protocol=protocol, outcome=outcome, **self._labels
        )
        self._requests[protocol, fault] = child.inc
        return child.inc


class DeskMeter:
    """The figures of a front desk."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters

    @contextmanager
    def holding(self, room: WaitingRoom, backend: str) -> Iterator[None]:
        """Count a request as held while the block runs, and how that ended."""
        model = room.model_of(backend)
        gauge = self._meters.gauge(metrics.HELD_REQUESTS, model=model)
        outcome = "cancelled"
        gauge.inc()
        try:
            yield
            outcome = "ok"
        except InferenceError as error:
            outcome = error.fault.value
            raise
        except Exception:
            outcome = Fault.INTERNAL.value
            raise
        finally:
            gauge.dec()
            self._meters.counter(metrics.HELD, model=model, outcome=outcome).inc()

    def woken(self, model: str, seconds: float) -> None:
        """A held request waited for `seconds` until there was a replica."""
        self._meters.histogram(metrics.WAKE_SECONDS, model=model).observe(seconds)
