"""What does one system do with one workload at one number of connections?

    start ─► first right answer (cold start) ─► are all right? ─► load, CPU and memory around it

The load runs in a process of its own; this one only reads /proc when the load says that its
window opens and closes. A system that is not right is not measured.
"""

from __future__ import annotations

import http.client
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any, cast

from benchmarks.serving import environments
from benchmarks.serving.load import Exchange, Load, Outcome, is_right, to_json
from benchmarks.serving.processes import Tree, machine_busy_s
from benchmarks.serving.workloads import Endpoint, Workload


class WrongAnswerError(Exception):
    """A system answered, and not what it should have."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement. `others_cpu_fraction`: share of the machine's CPU that neither the system
    nor the load used in the window; above a few percent, somebody else was at work."""

    system: str
    workload: str
    connections: int
    round: int
    requests_per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    answered: int
    errors: dict[str, int]
    checked: int
    wrong: int
    cpu_ms: float
    rss_mb: float
    processes: int
    load_cpu_us: float
    others_cpu_fraction: float


@dataclass(frozen=True, slots=True)
class Start:
    """How long it took from the order to start until the first right answer."""

    system: str
    workload: str
    round: int
    cold_start_s: float


def ask(endpoint: Endpoint, exchange: Exchange, timeout_s: float) -> tuple[int, bytes]:
    """Status and body of one exchange, on a connection of its own."""
    head, _, body = exchange.request.partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode("latin-1").split("\r\n")[1:])
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=timeout_s)
    try:
        connection.request("POST", endpoint.path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def wait_until_right(endpoint: Endpoint, exchange: Exchange, tree: Tree, timeout_s: float) -> None:
    """Ask until the answer is right. Raises `TimeoutError` with the last thing seen, and
    `RuntimeError` when nothing of the system is alive any more."""
    deadline_s = time.monotonic() + timeout_s
    seen = "no connection"
    while time.monotonic() < deadline_s:
        try:
            status, body = ask(endpoint, exchange, timeout_s=30)
        except (OSError, http.client.HTTPException) as error:
            seen = repr(error)
        else:
            if status == 200 and is_right(exchange, body):
                return
            seen = f"status {status}: {body[:300]!r}"
        if not tree.members():
            raise RuntimeError(f"it ended instead of answering; last: {seen}")
        time.sleep(0.05)
    raise TimeoutError(f"no right answer within {timeout_s:.0f} s; last: {seen}")


def check(endpoint: Endpoint, workload: Workload, count: int = 32) -> None:
    """Ask `count` questions one by one. Raises `WrongAnswerError` at the first mistake."""
    for number, exchange in enumerate(workload.exchanges(endpoint)[:count]):
        status, body = ask(endpoint, exchange, timeout_s=30)
        if status != 200 or not is_right(exchange, body):
            raise WrongAnswerError(f"{workload.name} row {number}: status {status}, {body[:300]!r}")


def spawn(load: Load) -> subprocess.Popen[str]:
    """Begin `load` in a process of its own; it writes events, the outcome last, to its stdout."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serving.load"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=environments.ROOT,
    )
    with cast("IO[str]", process.stdin) as stdin:
        stdin.write(to_json(load))
    return process


def events(process: subprocess.Popen[str]) -> Iterator[Outcome | str]:
    """What a spawned load says, as it says it: "window", "end", and the outcome last."""
    try:
        for line in cast("IO[str]", process.stdout):
            event = json.loads(line)
            yield Outcome(**event["outcome"]) if "outcome" in event else event["event"]
    finally:
        process.kill()
        process.wait()


def apply(load: Load, tree: Tree) -> tuple[Outcome, float, float]:
    """Run `load` in a process: its outcome, the tree's CPU s in the window, others' CPU share."""
    samples: list[tuple[float, float]] = []
    for event in events(spawn(load)):
        if isinstance(event, Outcome):
            return event, *_shares(samples, event)
        samples.append((tree.usage().cpu_s, machine_busy_s()))
    raise RuntimeError("the load generator ended without an outcome")


def _shares(samples: list[tuple[float, float]], outcome: Outcome) -> tuple[float, float]:
    """CPU seconds of the tree, and the fraction of the machine that neither it nor we used."""
    (tree_before_s, busy_before_s), (tree_after_s, busy_after_s) = samples
    tree_s = tree_after_s - tree_before_s
    own_s = outcome.own_cpu_us * outcome.answered / 1e6 if outcome.answered else 0.0
    others_s = busy_after_s - busy_before_s - tree_s - own_s
    cores = environments.cores()
    return tree_s, max(0.0, others_s / (outcome.window_s * cores))


def measure(
    system: str,
    tree: Tree,
    endpoint: Endpoint,
    workload: Workload,
    *,
    connections: int,
    seconds: float,
    number: int,
) -> Point:
    """One point: `connections` callers for `seconds`."""
    load = Load(
        port=endpoint.port,
        connections=connections,
        exchanges=workload.exchanges(endpoint),
        seconds=seconds,
        warm_s=min(1.0, seconds / 2),
    )
    outcome, cpu_s, others = apply(load, tree)
    usage = tree.usage()
    served = outcome.requests_per_s * outcome.window_s
    return Point(
        system=system,
        workload=workload.name,
        connections=connections,
        round=number,
        requests_per_s=outcome.requests_per_s,
        p50_ms=outcome.p50_ms,
        p90_ms=outcome.p90_ms,
        p99_ms=outcome.p99_ms,
        answered=outcome.answered,
        errors=outcome.errors,
        checked=outcome.checked,
        wrong=outcome.wrong,
        cpu_ms=1000 * cpu_s / served if served else math.nan,
        rss_mb=usage.rss_mb,
        processes=usage.processes,
        load_cpu_us=outcome.own_cpu_us,
        others_cpu_fraction=others,
    )


def as_row(value: Point | Start) -> dict[str, Any]:
    """A plain mapping for JSON."""
    return asdict(value)
