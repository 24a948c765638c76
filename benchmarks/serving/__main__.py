"""The benchmark's command: which systems, which workloads, how long?

    python -m benchmarks.serving                                      everything, within 35 minutes
    python -m benchmarks.serving --systems shoal,fastapi --workloads noop --connections 64

Rounds go over the systems, each round in another order, one system alive at a time; every figure
reported is the median of its rounds. A run never lasts longer than `--minutes`: what has not been
started by then is left out and said to be missing.
"""

from __future__ import annotations

import argparse
import platform
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.serving import chat, environments, raw, systems, workloads
from benchmarks.serving.measure import (
    Point,
    Start,
    WrongAnswerError,
    check,
    measure,
    wait_until_right,
)
from benchmarks.serving.report import Results
from benchmarks.serving.shoal_system import Shoal, ShoalReplica
from benchmarks.serving.systems import System
from benchmarks.serving.workloads import Workload

_ALL: tuple[type[System], ...] = (Shoal, *systems.PEERS, ShoalReplica)
SYSTEMS = {system.name: system for system in _ALL}
_START_TIMEOUT_S = 120.0
_SLOW = {"minilm": 2.0}
"""Workloads whose batches take so long that they need a longer window."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run."""

    systems: tuple[str, ...]
    workloads: tuple[str, ...]
    connections: tuple[int, ...]
    seconds: float
    rounds: int
    minutes: float
    out: Path


def parse(arguments: Sequence[str]) -> Plan:
    """The plan that the command line asks for."""
    known = (*workloads.WORKLOADS, "chat")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = (*SYSTEMS, *chat.SYSTEMS)
    parser.add_argument("--systems", default=",".join(dict.fromkeys(names)), help="%(default)s")
    parser.add_argument("--workloads", default=",".join(known), help="%(default)s")
    parser.add_argument("--connections", default="1,16,64,512", help="%(default)s")
    parser.add_argument("--seconds", type=float, default=2.0, help="a window (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="%(default)s")
    parser.add_argument("--minutes", type=float, default=35.0, help="at most (%(default)s)")
    parser.add_argument("--out", type=Path, default=environments.HERE / "results")
    chosen = parser.parse_args(arguments)
    return Plan(
        systems=_known(parser, "systems", chosen.systems, names),
        workloads=_known(parser, "workloads", chosen.workloads, known),
        connections=tuple(int(n) for n in chosen.connections.split(",")),
        seconds=chosen.seconds,
        rounds=chosen.rounds,
        minutes=chosen.minutes,
        out=chosen.out,
    )


def _known(
    parser: argparse.ArgumentParser, field: str, text: str, names: Sequence[str]
) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    for name in chosen:
        if name not in names:
            parser.error(f"--{field}: {name!r} is not one of {', '.join(dict.fromkeys(names))}")
    return chosen


def run(plan: Plan) -> Results:
    """All rounds, or as many as fit into the time."""
    results = Results(about=_about(plan))
    deadline_s = time.monotonic() + plan.minutes * 60
    tables = [workloads.read(name) for name in plan.workloads if name != "chat"]
    talkers = [name for name in plan.systems if name in chat.SYSTEMS]
    if "chat" in plan.workloads and talkers:
        chat.run(talkers, plan.rounds, results)
        results.write(plan.out, _titles())
    for number in range(plan.rounds if tables else 0):
        for table in tables:
            results.raw += raw.measure(table.name, plan.seconds * _SLOW.get(table.name, 1))
        for name in _rotated([n for n in plan.systems if n in SYSTEMS], number):
            if time.monotonic() > deadline_s:
                results.problems.append(f"round {number + 1} of {name}: no time left")
                continue
            _round(plan, SYSTEMS[name](), tables, number, results)
            results.write(plan.out, _titles())
    return results


def _rotated(names: list[str], number: int) -> list[str]:
    """Another order in each round, so that no system is always the one after the slow one."""
    at = 3 * number % len(names) if names else 0
    return names[at:] + names[:at]


def _round(
    plan: Plan, system: System, tables: Sequence[Workload], number: int, results: Results
) -> None:
    """One system, all workloads, one after another."""
    try:
        for table in tables:
            _workload(plan, system, table, number, results)
    except (OSError, RuntimeError, WrongAnswerError) as error:
        words = f"round {number + 1} of {system.name}: {error}"
        results.problems.append(words)
        print(f"! {words}\n{system.last_words()}", file=sys.stderr, flush=True)
    finally:
        system.stop()


def _workload(plan: Plan, system: System, table: Workload, number: int, results: Results) -> None:
    """Start, time, check, measure, finish."""
    began_s = time.monotonic()
    endpoint = system.start(table.name)
    wait_until_right(endpoint, table.exchanges(endpoint)[0], system.tree, _START_TIMEOUT_S)
    cold_start_s = time.monotonic() - began_s
    results.starts.append(Start(system.name, table.name, number, cold_start_s))
    check(endpoint, table)
    for connections in plan.connections:
        point = measure(
            system.name,
            system.tree,
            endpoint,
            table,
            connections=connections,
            seconds=plan.seconds * _SLOW.get(table.name, 1),
            number=number,
        )
        results.points.append(point)
        print(_line(point, cold_start_s), flush=True)
    system.finish(table.name)


def _line(point: Point, cold_start_s: float) -> str:
    """One point, as it is printed while the run goes on."""
    return (
        f"{point.round + 1} {point.system:14} {point.workload:7} {point.connections:4} connections "
        f"{point.requests_per_s:8.1f} req/s  p50 {point.p50_ms:8.2f}  p99 {point.p99_ms:8.2f} ms  "
        f"CPU {point.cpu_ms:6.2f} ms  RSS {point.rss_mb:5.0f} MB  start {cold_start_s:4.1f} s  "
        f"errors {point.errors or 0}  wrong {point.wrong}  "
        f"(load {point.load_cpu_us:.0f} µs, others {100 * point.others_cpu_fraction:.0f} %)"
    )


def _titles() -> dict[str, str]:
    return {name: system.title for name, system in (chat.SYSTEMS | SYSTEMS).items()}


def _about(plan: Plan) -> dict[str, str]:
    cores = environments.cores()
    return {
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{cores} cores ({platform.machine()}), shared by system and load generator",
        "window": f"{plan.seconds} s, medians of {plan.rounds} rounds",
        "replicas": "one each",
    }


def main() -> None:
    plan = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything started is ended
    results = run(plan)
    results.write(plan.out, _titles())
    print(results.markdown(_titles()))
    wrong = any(point.wrong for point in results.points)
    sys.exit(1 if wrong or not (results.points or results.chat) else 0)


if __name__ == "__main__":
    main()
