"""How is every policy played in every window, and what of it is already there?

    plans ─► jobs ─► processes ─┬─ world, once ──► each policy that is missing ──► rows
     │  what rows.jsonl lacks   └─ bound, once (kept on disk)
     └─ a row whose bound is of older code is only bounded anew

One job is one window of one combination. It runs in a process of its own with low priority; the
parent alone writes. Windows go round the combinations, so that what a benchmark has after an hour
is balanced.
"""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import autoscaler.bound
from autoscaler.bound import Bound, bound
from autoscaler.experiment import Experiment, read_world, replacing
from autoscaler.ledger import Run
from autoscaler.simulation import simulate
from autoscaler.world import World
from benchmarks.autoscaling.combinations import (
    HOURS,
    TARGET,
    TRACES,
    WINDOWS,
    Combination,
    experiment,
    world_digest,
)
from benchmarks.autoscaling.policies import SHOAL, participant
from benchmarks.autoscaling.rows import Row, append_rows, latest, read_rows

NICE = 10
ATTAINMENTS = (TARGET, 0.9)
"""Where the bound is made tight; it is true at every other attainment too."""

Tell = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to play. `version`: a word for the code as it is: another one plays all again.

    `settings` are of Shoal's policy (KEY=VALUE); `bounds` is the folder of kept bounds.
    """

    combinations: tuple[Combination, ...]
    policies: tuple[str, ...]
    bounds: Path
    windows: tuple[int, ...] = tuple(range(WINDOWS))
    traces: Path = TRACES
    hours: float = HOURS
    settings: tuple[str, ...] = ()
    version: str = "1"


@dataclass(frozen=True, slots=True)
class Job:
    """One window: `policies` to be played, `stale` rows to be bounded anew."""

    combination: str
    window: int
    experiment: Experiment
    world: str
    policies: tuple[str, ...]
    hows: tuple[str, ...]
    stale: tuple[Row, ...]
    bounds: Path


# --- what is missing


def jobs(plan: Plan, rows: Sequence[Row]) -> list[Job]:
    """What of the plan `rows` don't have yet, window by window.

    Raises:
        TracesMissing: a trace isn't there.
    """
    known = {row.key: row for row in latest(rows)}
    several = (
        _job(plan, combination, window, known)
        for window in plan.windows
        for combination in plan.combinations
    )
    return [job for job in several if job.policies or job.stale]


def _job(
    plan: Plan, combination: Combination, window: int, known: dict[tuple[str, int, str], Row]
) -> Job:
    asked = experiment(
        combination, window, traces=plan.traces, hours=plan.hours, settings=plan.settings
    )
    world, code = world_digest(combination, asked), bound_digest()
    hows = {name: how_digest(name, plan.settings, plan.version) for name in plan.policies}
    here = {name: known.get((combination.name, window, name)) for name in plan.policies}
    done = {
        name: row
        for name, row in here.items()
        if row is not None and (row.world, row.how) == (world, hows[name])
    }
    left = tuple(name for name in plan.policies if name not in done)
    stale = tuple(row for row in done.values() if row.bound != code)
    how = tuple(hows[name] for name in left)
    return Job(combination.name, window, asked, world, left, how, stale, plan.bounds)


def how_digest(policy: str, settings: Sequence[str], version: str) -> str:
    """A short name of how a policy is played; settings count for Shoal only."""
    facts = [version, *(settings if policy == SHOAL else ())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


@cache
def bound_digest() -> str:
    """A short name of the bound's code, whatever its comments."""
    tree = ast.parse(Path(autoscaler.bound.__file__).read_text())
    return hashlib.sha256(f"{ATTAINMENTS}{ast.dump(tree)}".encode()).hexdigest()[:12]


# --- playing


def perform(job: Job) -> list[Row]:
    """Play and bound one window; its rows."""
    world = read_world(job.experiment)
    least = kept_bound(world, job.bounds / f"{job.world}-{bound_digest()}.json")
    rows = [_bounded(row, least) for row in job.stale]
    for name, how in zip(job.policies, job.hows, strict=True):
        began_s = time.perf_counter()
        policy = participant(name, world, job.experiment.settings)
        run = simulate(world, policy, stopwatch=time.perf_counter)
        rows.append(_bounded(_row(job, how, run, time.perf_counter() - began_s), least))
    return rows


def _row(job: Job, how: str, run: Run, took_s: float) -> Row:
    return Row(
        combination=job.combination,
        window=job.window,
        policy=run.policy,
        world=job.world,
        how=how,
        bound="",
        cost_usd=run.cost_usd,
        bound_usd=0.0,
        bound_own_usd=0.0,
        attainment=run.slo_attainment,
        requests=run.requests,
        p50_ms=run.latency_p50_ms,
        p99_ms=run.latency_p99_ms,
        failed=run.failed,
        preemptions=run.preemptions,
        launches=run.launches,
        node_hours=run.node_hours,
        decide_ms_mean=run.decide_ms_mean,
        took_s=took_s,
    )


def _bounded(row: Row, least: Bound) -> Row:
    return replace(
        row,
        bound=bound_digest(),
        bound_usd=least.at(TARGET),
        bound_own_usd=least.at(min(TARGET, row.attainment)),
    )


def kept_bound(world: World, path: Path) -> Bound:
    """The world's bound, from `path` if it is there, and else worked out and left there."""
    if path.exists():
        kept = json.loads(path.read_text())
        facts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
        return Bound(**facts, node_means=({},) * len(facts["lambdas_usd"]), markets={})
    least = bound(world, attainments=ATTAINMENTS)
    kept = asdict(replace(least, node_means=(), markets={}))
    del kept["node_means"], kept["markets"]  # they explain, and certify nothing
    with replacing(path) as file:
        json.dump(kept, file)
    return least


# --- all of it


def play(plan: Plan, path: Path, *, processes: int, tell: Tell) -> list[str]:
    """Play what `path` lacks and append it there; what went wrong, a line a job."""
    todo = jobs(plan, read_rows(path))
    asked = len(plan.combinations) * len(plan.windows)
    tell(f"{asked - len(todo)} of {asked} windows are there, {len(todo)} to play")
    if not todo:
        return []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=step_back) as pool:
        try:
            return list(_collected(pool, todo, path, processes, tell))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def step_back() -> None:
    """Let everything else on the machine go first."""
    os.nice(NICE)


def _collected(
    pool: ProcessPoolExecutor, todo: Sequence[Job], path: Path, processes: int, tell: Tell
) -> Iterator[str]:
    began_s = time.monotonic()
    started: dict[Future[tuple[list[Row], float]], Job] = {
        pool.submit(_timed, job): job for job in todo
    }
    left = list(todo)
    seconds: dict[str, list[float]] = defaultdict(list)
    for future in as_completed(started):
        job = started[future]
        left.remove(job)
        error = future.exception()
        if error is not None:
            tell(f"{job.combination}, window {job.window}: {error!r}")
            yield f"{job.combination}, window {job.window}: {error!r}"
            continue
        rows, took_s = future.result()
        append_rows(path, rows)
        seconds[job.combination].append(took_s)
        tell(
            f"{job.combination}, window {job.window}: {took_s / 60:.1f} min; "
            f"{len(todo) - len(left)} of {len(todo)} after {_span(time.monotonic() - began_s)}, "
            f"about {_span(left_s(left, seconds) / processes)} left"
        )


def _timed(job: Job) -> tuple[list[Row], float]:
    began_s = time.perf_counter()
    return perform(job), time.perf_counter() - began_s


def left_s(left: Sequence[Job], seconds: dict[str, list[float]]) -> float:
    """How long the jobs left take one after another: as those of their combination so far, or as
    the average one where there were none.
    """
    everything = [one for several in seconds.values() for one in several]
    usual = sum(everything) / len(everything) if everything else 0.0
    means = {name: sum(several) / len(several) for name, several in seconds.items() if several}
    return sum(means.get(job.combination, usual) for job in left)


def _span(span_s: float) -> str:
    return f"{span_s / 3600:.1f} h" if span_s >= 3600 else f"{span_s / 60:.0f} min"
