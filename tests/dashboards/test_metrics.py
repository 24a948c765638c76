"""Is the catalogue of metrics sound, and do live series follow it?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dashboards.metrics import (
    BATCH_ROWS,
    CATALOGUE,
    HELD,
    HELD_REQUESTS,
    QUEUE_REQUESTS,
    REPLICAS,
    REPORTERS,
    REQUESTS,
    Kind,
    Meters,
    Metric,
    MetricError,
    document,
    forget_process,
)
from deployments.inference import VersionState

ROOT = Path(__file__).parents[2]
EVERY_METRIC = [pytest.param(metric, id=name) for name, metric in CATALOGUE.items()]


@pytest.fixture
def meters() -> Meters:
    return Meters()


def samples(text: bytes) -> dict[str, float]:
    """Values by name and labels, as a scraper reads them."""
    return dict(_samples(text))


def _samples(text: bytes) -> Iterator[tuple[str, float]]:
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            yield f"{sample.name}{{{labels}}}", sample.value


@pytest.mark.parametrize("metric", EVERY_METRIC)
def test_a_name_says_the_product_the_thing_and_the_unit(metric: Metric) -> None:
    assert re.fullmatch(r"shoal_[a-z]+(_[a-z]+)*", metric.name)
    if metric.kind is Kind.COUNTER:
        assert metric.name.endswith("_total")
    else:
        assert metric.name.endswith(f"_{metric.unit}")


@pytest.mark.parametrize("metric", EVERY_METRIC)
def test_every_metric_says_what_it_means_in_one_line(metric: Metric) -> None:
    assert metric.help
    assert metric.unit
    assert "|" not in metric.help
    assert "\n" not in metric.help


@pytest.mark.parametrize("metric", EVERY_METRIC)
def test_buckets_rise_and_belong_to_histograms_alone(metric: Metric) -> None:
    assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
    assert list(metric.buckets) == sorted(set(metric.buckets))


@pytest.mark.parametrize("metric", EVERY_METRIC)
def test_no_label_names_a_replica_or_a_caller(metric: Metric) -> None:
    assert not {"replica", "replica_id", "node", "pid", "key", "request_id"} & set(metric.labels)


def test_no_metric_is_declared_twice() -> None:
    assert len(CATALOGUE) == sum(len(metrics) for metrics in REPORTERS.values())


def test_the_page_about_metrics_is_current() -> None:
    written = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert written == document(), "docs/metrics.md is old: run `make docs`"


def test_every_declared_metric_can_be_reported_side_by_side(meters: Meters) -> None:
    for metric in CATALOGUE.values():
        labels = dict.fromkeys(metric.labels, "x")
        match metric.kind:
            case Kind.COUNTER:
                meters.counter(metric, **labels).inc()
            case Kind.GAUGE:
                meters.gauge(metric, **labels).set(1)
            case Kind.HISTOGRAM:
                meters.histogram(metric, **labels).observe(1)
    reported = {key.partition("{")[0] for key in samples(meters.exposition())}
    assert reported == {series for metric in CATALOGUE.values() for series in metric.series}


def test_a_counter_counts_by_its_labels(meters: Meters) -> None:
    answered = meters.counter(REQUESTS, model="m", version="1", protocol="oip", outcome="ok")
    refused = meters.counter(REQUESTS, model="m", version="1", protocol="oip", outcome="overloaded")
    answered.inc()
    answered.inc()
    refused.inc()
    assert samples(meters.exposition()) == {
        "shoal_requests_total{model=m,outcome=ok,protocol=oip,version=1}": 2,
        "shoal_requests_total{model=m,outcome=overloaded,protocol=oip,version=1}": 1,
    }


def test_a_histogram_uses_the_declared_buckets(meters: Meters) -> None:
    meters.histogram(BATCH_ROWS, model="m", version="1").observe(3)
    values = samples(meters.exposition())
    assert values["shoal_batch_rows_bucket{le=2.0,model=m,version=1}"] == 0
    assert values["shoal_batch_rows_bucket{le=4.0,model=m,version=1}"] == 1
    assert values["shoal_batch_rows_sum{model=m,version=1}"] == 3


def test_asking_twice_gives_the_same_child(meters: Meters) -> None:
    meters.gauge(HELD_REQUESTS, model="m").inc()
    meters.gauge(HELD_REQUESTS, model="m").inc()
    assert samples(meters.exposition()) == {"shoal_held_requests{model=m}": 2}


def test_a_metric_without_labels_needs_none(meters: Meters) -> None:
    failures = CATALOGUE["shoal_controller_step_failures_total"]
    meters.counter(failures).inc()
    assert samples(meters.exposition()) == {"shoal_controller_step_failures_total{}": 1}


def test_what_is_dropped_is_reported_no_more(meters: Meters) -> None:
    for state in VersionState:
        meters.gauge(REPLICAS, model="m", version="1", state=state.value).set(1)
    for state in VersionState:
        if state is not VersionState.READY:
            meters.drop(REPLICAS, model="m", version="1", state=state.value)
    assert samples(meters.exposition()) == {"shoal_replicas{model=m,state=ready,version=1}": 1}


def test_two_sets_of_meters_do_not_mix(meters: Meters) -> None:
    meters.counter(HELD, model="m", outcome="ok").inc()
    assert Meters().exposition() == b""


def test_a_metric_is_not_reported_as_another_kind(meters: Meters) -> None:
    with pytest.raises(MetricError, match="shoal_requests_total is a counter, not a gauge"):
        meters.gauge(REQUESTS, model="m", version="1", protocol="oip", outcome="ok")


def test_missing_and_unknown_labels_are_refused(meters: Meters) -> None:
    with pytest.raises(MetricError, match="has the labels model, version; given were model"):
        meters.gauge(QUEUE_REQUESTS, model="m")
    with pytest.raises(MetricError, match="given were model, version, node"):
        meters.gauge(QUEUE_REQUESTS, model="m", version="1", node="n")


def test_a_metric_that_is_not_in_the_catalogue_is_refused(meters: Meters) -> None:
    stray = Metric("shoal_stray_total", Kind.COUNTER, "strays", (), "Not declared")
    with pytest.raises(MetricError, match="shoal_stray_total is not declared"):
        meters.counter(stray)


def test_importing_the_catalogue_leaves_prometheus_alone() -> None:
    code = "import dashboards.metrics, sys; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


SHARING_PROCESS = """
import os, sys
from pathlib import Path
from dashboards.metrics import BATCH_ROWS, ONGOING_REQUESTS, REQUESTS, Meters
meters = Meters(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]))
version = {"model": "m", "version": "1"}
meters.counter(REQUESTS, **version, protocol="oip", outcome="ok").inc(2)
meters.gauge(ONGOING_REQUESTS, **version).set(3)
meters.histogram(BATCH_ROWS, **version).observe(4)
print(os.getpid())
"""


def run_sharing_process(shared: Path) -> int:
    """A process that reports into `shared` and ends; its process id."""
    done = subprocess.run(
        [sys.executable, "-c", SHARING_PROCESS],
        cwd=ROOT,
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(shared)},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_processes_that_share_a_folder_add_up_and_the_dead_leave_only_counts(
    tmp_path: Path,
) -> None:
    first, _ = run_sharing_process(tmp_path), run_sharing_process(tmp_path)
    reader = Meters(tmp_path)
    values = samples(reader.exposition())
    answered = "shoal_requests_total{model=m,outcome=ok,protocol=oip,version=1}"
    assert values[answered] == 4
    assert values["shoal_ongoing_requests{model=m,version=1}"] == 6
    assert values["shoal_batch_rows_count{model=m,version=1}"] == 2

    forget_process(first, tmp_path)
    values = samples(reader.exposition())
    assert values[answered] == 4
    assert values["shoal_ongoing_requests{model=m,version=1}"] == 3
