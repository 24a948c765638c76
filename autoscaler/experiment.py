"""What comes out when several policies meet one world, from files to files?

    requests, market, profile ─► World ─┬─► simulate, policy by policy ─┬─► DIR/<policy>/…
                                        └─► bound ──────────────────────┴─► summary, report

The folder holds all that it takes to compute the summary again: `ledger.csv`, `requests.csv` and
`journal.jsonl` of each policy, `experiment.json` with what was asked. A file appears under its name
when it is complete, so what a killed run leaves behind is whole or isn't there. The same seed gives
the same bytes, but for `decide_ms_mean`, which a stopwatch from outside measures.

A policy's bound is the least that its own share of punctual requests can cost where it missed the
target, so that nobody beats the bound by being late.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from autoscaler.baselines import BASELINES, Sizing
from autoscaler.bound import bound
from autoscaler.decision import Policy
from autoscaler.journal import Recorded, Writer
from autoscaler.ledger import Rental, Run, summary
from autoscaler.policy import Shoal
from autoscaler.profile import read_profile
from autoscaler.queueing import rate_max_rps
from autoscaler.simulation import simulate
from autoscaler.snapshot import ServiceCurve, Slo
from autoscaler.traces import read_market, read_requests
from autoscaler.what_if import read_settings
from autoscaler.world import Floats, World, a_world

POLICIES: tuple[str, ...] = ("shoal", *BASELINES)
"""The policies that can be asked for by name."""

BINS = 240  # of the pictures
FLEET = 10  # replicas in the fleet whose rate is that of a replica, ten times

Tell = Callable[[str], object]
Stopwatch = Callable[[], float]


class ExperimentError(ValueError):
    """What was asked for can't be run; the message says what could be."""


@dataclass(frozen=True)
class Experiment:
    """What is asked: files, policies, objective, windows and scales (see the command's help).

    `settings`: of Shoal's own policy, as KEY=VALUE.
    """

    requests: Path
    market: Path
    profile: Path
    slo_ms: float
    policies: tuple[str, ...] = ("shoal",)
    attainment: float = 0.99
    seed: int = 0
    requests_scale: float = 1.0
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    nodes_scale: float | None = None
    zones: tuple[str, ...] = ()
    start_s: float = 0.0
    market_start_s: float = 0.0
    duration_s: float | None = None
    deadline_s: float | None = None
    prelude_s: float = 1800.0
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.policies:
            if name not in POLICIES:
                near = difflib.get_close_matches(name, POLICIES, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(POLICIES)}"
                raise ExperimentError(f"no policy {name!r}; {hint}")
        if not self.policies:
            raise ExperimentError(f"no policy asked for; known: {', '.join(POLICIES)}")
        _expect(math.isfinite(self.slo_ms) and self.slo_ms > 0, "slo-ms", self.slo_ms, "positive")
        _expect(0 < self.attainment <= 1, "attainment", self.attainment, "in (0, 1]")
        _expect(self.seed >= 0, "seed", self.seed, "0 or more")
        _expect(self.prelude_s >= 0, "prelude-s", self.prelude_s, "0 or more")
        _expect(min(self.input_tokens, self.output_tokens) >= 0, "tokens", "below 0", "0 or more")
        read_settings(self.settings)
        if self.deadline_s is not None:
            _expect(self.deadline_s > 0, "deadline-s", self.deadline_s, "positive")

    def as_json(self) -> dict[str, Any]:
        """Plain values, without what belongs to one machine's folders but their last names."""
        plain = {key: list(v) if isinstance(v, tuple) else v for key, v in vars(self).items()}
        return {k: v.name if isinstance(v, Path) else v for k, v in plain.items()}


def _expect(is_right: bool, name: str, value: object, right: str) -> None:
    if not is_right:
        raise ExperimentError(f"{name}: must be {right}, not {value}")


@dataclass(frozen=True)
class Outcome:
    """What a policy made of the world, as far as a report shows it.

    `row`: its object in the summary. `late`: requests too late or failed, by bin of arrival (as
    `demand` of the report).
    """

    row: dict[str, Any]
    ledger: tuple[Rental, ...]
    late: Floats


# --- the world


def read_world(experiment: Experiment) -> World:
    """The world that the experiment's files and numbers describe.

    Raises:
        TraceError, ProfileError: a file can't be used.
        ExperimentError: the files don't fit each other.
    """
    profile = read_profile(experiment.profile)
    market = read_market(
        experiment.market,
        start_s=experiment.market_start_s,
        duration_s=experiment.duration_s,
        nodes_scale=experiment.nodes_scale,
        zones=experiment.zones or None,
    )
    for machine in profile.machines:
        if machine.has_spot and machine.price_spot_usd_h is None and market.price_usd_h is None:
            what = f"{experiment.market} has no price_usd_h.csv"
            where = f"{experiment.profile} no price_spot_usd_h of {machine.type.name}"
            raise ExperimentError(f"no spot prices: {what}, {where}; one of them is needed")
    requests = read_requests(
        experiment.requests,
        scale=experiment.requests_scale,
        seed=experiment.seed,
        start_s=experiment.start_s,
        duration_s=experiment.duration_s,
        input_tokens=experiment.input_tokens,
        output_tokens=experiment.output_tokens,
    )
    return a_world(
        profile,
        market,
        requests,
        Slo(experiment.slo_ms, experiment.attainment),
        seed=experiment.seed,
        deadline_s=experiment.deadline_s,
        prelude_s=experiment.prelude_s,
    )


def remarks(experiment: Experiment, world: World) -> Iterator[str]:
    """What a person should know of the world before believing a result."""
    market_s, most = float(world.market.capacity_t_s[-1]), int(world.market.capacity.max())
    arrivals = len(world.requests.arrival_s)
    yield (
        f"{arrivals:,} requests in {world.duration_s / 3600:.1f} h, "
        f"{len(world.market.zones)} zones of up to {most} nodes, {len(world.groups)} groups"
    )
    if not arrivals:
        yield "there are no requests in the window"
    if market_s < world.duration_s * 0.95 and len(world.market.capacity_t_s) > 1:
        yield f"the market ends after {market_s / 3600:.1f} h: its last row holds from there on"
    if most == 1 and experiment.nodes_scale is None:
        yield "capacity is 0 or 1 everywhere: --nodes-scale says how many nodes a 1 stands for"
    for machine in world.profile.machines:
        alone_ms = np.median(world.work[machine.type.name].fixed_s) * 1e3 if arrivals else 0.0
        if alone_ms > experiment.slo_ms:
            yield f"on {machine.type.name} a request takes longer than the SLO even alone"


def sizing(world: World) -> Sizing:
    """What the baselines are told: the rate that a replica carries in a fleet of ten within the
    SLO, at most 0.9 of what it can do at all; and the highest mean of any minute.
    """
    slo = world.slo
    return Sizing(
        {name: _replica_rate_rps(curve, slo) for name, curve in world.curves.items()},
        peak_rate_rps(world),
        slo.latency_ms,
    )


def _replica_rate_rps(curve: ServiceCurve, slo: Slo) -> float:
    within = rate_max_rps(FLEET, curve, slo.latency_ms, max(1 - slo.attainment, 1e-4))
    rate = float(np.ravel(within)[0]) / FLEET
    return min(rate, 0.9 * curve.rate_max_rps) if rate > 0 else 0.9 * curve.rate_max_rps


def peak_rate_rps(world: World) -> float:
    """The highest mean rate of any minute; of the whole where it is shorter than one."""
    minutes = np.floor(world.requests.arrival_s / 60).astype(np.int64)
    most = int(np.bincount(minutes).max()) if len(minutes) else 0
    return most / min(60.0, world.duration_s)


def a_policy(name: str, world: World, settings: Sequence[str] = ()) -> Policy:
    """A new policy of that name for `world`; `settings` are for Shoal's own."""
    return Shoal(read_settings(settings)) if name == "shoal" else BASELINES[name](sizing(world))


# --- one policy


def play(world: World, policy: Policy, folder: Path, stopwatch: Stopwatch) -> Outcome:
    """Run one policy and write its ledger, requests and journal into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "journal.jsonl") as journal:
        has_snapshots = policy.name == "shoal"  # the one that can be asked again
        recorded = Recorded(policy, Writer(journal.write, has_snapshots), stopwatch)
        run = simulate(world, recorded)
    with replacing(folder / "ledger.csv") as file:
        file.writelines(ledger_lines(run.ledger))
    with replacing(folder / "requests.csv") as file:
        file.writelines(request_lines(run))
    row = summary(run, None)
    row["decide_ms_mean"] = recorded.decide_s / max(recorded.decisions, 1) * 1e3
    return Outcome(row, run.ledger, _late(run))


def _late(run: Run) -> Floats:
    is_late = ~(run.ok & (run.latency_s <= run.world.slo.latency_ms / 1e3))
    return binned(run.arrival_s[is_late], run.world.duration_s)


def binned(at_s: Floats, duration_s: float) -> Floats:
    """How many fall into each of `BINS` equal parts of the time."""
    return np.histogram(at_s, bins=BINS, range=(0.0, duration_s))[0].astype(np.float64)


def ledger_lines(ledger: Iterable[Rental]) -> Iterator[str]:
    """The ledger as CSV."""
    names = [f.name for f in dataclasses.fields(Rental)]
    yield ",".join(names) + "\n"
    for rental in ledger:
        yield ",".join(_cell(getattr(rental, name)) for name in names) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return repr(float(value))
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\n') else text


def request_lines(run: Run, chunk: int = 100_000) -> Iterator[str]:
    """The requests as CSV, many lines at a time. Of those given up, `start_s` and `node` are empty;
    `ok` is 1 or 0.
    """
    nodes = [_cell(rental.node) for rental in run.ledger]
    yield "arrival_s,start_s,finish_s,node,ok\n"
    for first in range(0, run.requests, chunk):
        part = slice(first, first + chunk)
        rows = zip(
            run.arrival_s[part].tolist(),
            run.start_s[part].tolist(),
            run.finish_s[part].tolist(),
            run.node[part].tolist(),
            run.ok[part].tolist(),
            strict=True,
        )
        yield "".join(
            f"{arrival!r},{start!r},{finish!r},{nodes[node]},{ok:d}\n"
            if node >= 0
            else f"{arrival!r},,{finish!r},,{ok:d}\n"
            for arrival, start, finish, node, ok in rows
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A text file that takes its name when the block ends well, and else disappears."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value for people and programs."""
    with replacing(path) as file:
        json.dump(value, file, indent=2)
        file.write("\n")


# --- all of them


def run_experiment(
    experiment: Experiment,
    out: Path,
    *,
    has_bound: bool = True,
    has_plots: bool = True,
    jobs: int = 1,
    tell: Tell,
    stopwatch: Stopwatch,
) -> list[dict[str, Any]]:
    """Play every policy, bound the cost, and write everything into `out`; the summary's rows.

    `tell` is handed lines of progress, `stopwatch` gives seconds of any origin. With `jobs` above 1
    policies run side by side, each in a process of its own.

    Raises:
        TraceError, ProfileError, ExperimentError: something that was given can't be used.
    """
    world = read_world(experiment)
    for remark in remarks(experiment, world):
        tell(remark)
    write_json(out / "experiment.json", _described(experiment, world))
    outcomes = list(
        _played(experiment, world, out, min(jobs, len(experiment.policies)), tell, stopwatch)
    )
    rows = [outcome.row for outcome in outcomes]
    if has_bound:
        tell("bound: the least that any policy could have paid")
        _add_bounds(world, rows)
    write_json(out / "summary.json", rows)
    if has_plots:
        from autoscaler.report import write_report

        tell("report")
        write_report(out, world, _described(experiment, world), outcomes)
    return rows


def _described(experiment: Experiment, world: World) -> dict[str, Any]:
    told = sizing(world)
    return {
        **experiment.as_json(),
        "duration_s": world.duration_s,
        "deadline_s": world.deadline_s,
        "replica_rate_rps": dict(told.replica_rate_rps),
        "peak_rate_rps": told.peak_rate_rps,
    }


def _played(
    experiment: Experiment, world: World, out: Path, jobs: int, tell: Tell, stopwatch: Stopwatch
) -> Iterator[Outcome]:
    if jobs <= 1:
        for name in experiment.policies:
            tell(f"{name}: running")
            start_s = stopwatch()
            policy = a_policy(name, world, experiment.settings)
            yield _told(play(world, policy, out / name, stopwatch), tell, stopwatch() - start_s)
        return
    # A new interpreter each, which builds the same world again: nothing large is handed over.
    tell(f"{len(experiment.policies)} policies, {jobs} at a time")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        several = [(experiment, name, out / name, stopwatch) for name in experiment.policies]
        for outcome in pool.map(_play_alone, several):
            yield _told(outcome, tell, None)


def _play_alone(what: tuple[Experiment, str, Path, Stopwatch]) -> Outcome:
    experiment, name, folder, stopwatch = what
    world = read_world(experiment)
    return play(world, a_policy(name, world, experiment.settings), folder, stopwatch)


def _told(outcome: Outcome, tell: Tell, took_s: float | None) -> Outcome:
    row = outcome.row
    took = "" if took_s is None else f" [{took_s:.0f} s]"
    tell(f"{row['policy']}: {row['cost_usd']:.2f} USD, {row['slo_attainment']:.3%} on time{took}")
    return outcome


def _add_bounds(world: World, rows: Sequence[dict[str, Any]]) -> None:
    """To each row the bound at what it attained (at most the target), and at the target."""
    target = world.slo.attainment
    attained = {row["policy"]: min(target, row["slo_attainment"]) for row in rows}
    certified = bound(world, attainments=list(dict.fromkeys([target, *attained.values()])))
    for row in rows:
        least = certified.at(attained[row["policy"]])
        row["bound_usd"] = least
        row["ratio"] = row["cost_usd"] / least if least > 0 else None
        row["bound_target_usd"] = certified.at(target)
