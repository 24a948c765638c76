"""What does Shoal pay for not knowing the future, and for what exactly?

Shoal plays the same window three times, each time told more:

    (a) as it is                                         cost(a) - cost(b)   the forecast
    (b) the demand a cold start ahead is known exactly   cost(b) - cost(c)   the spot market
    (c) and every reclaim is announced a slow cold       whole nodes - LP    integrality
        start and a minute before it comes               the rest            queues, holds, starts

All in shares of the certified bound. The bound is the same for all three: a notice changes nothing
for a plan that knows everything. Integrality is the best plan of whole nodes less the linear
program, on the same coarse steps of the window's first hours, as a share of the program.

Not everything is taken apart. (c) knows what will be taken, not where launches will fail, so what
failed launches cost is in the rest. The three runs attain different shares on time, which are told
beside the costs: a run that is told more may also spend it on being punctual, and a negative share
says just that.

    python -m benchmarks.autoscaling.regret --combinations v100-16-servegen --windows 0-2
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from autoscaler import forecast, policy
from autoscaler.bound import integer_plan
from autoscaler.decision import Decision
from autoscaler.experiment import Experiment, read_world, replacing, write_json
from autoscaler.forecast import Forecast, ForecastMemory
from autoscaler.ledger import Run
from autoscaler.policy import Memory, Settings, Shoal
from autoscaler.simulation import simulate
from autoscaler.snapshot import Snapshot
from autoscaler.what_if import read_settings
from autoscaler.world import Floats, World, a_world
from benchmarks.autoscaling.combinations import (
    HOURS,
    TARGET,
    TRACES,
    TracesMissing,
    experiment,
    world_digest,
)
from benchmarks.autoscaling.jobs import bound_digest, kept_bound, step_back
from benchmarks.autoscaling.options import BOUNDS, BY_NAME, HERE, known, tell, windows

FIRST_S = 300.0
"""Before time 0 the known rate is the mean of so much of the beginning, which is then repeated."""

AHEAD_S = 60.0
"""By so much more than a slow cold start a reclaim is known before it comes."""

INTEGER_HOURS = 2.0
INTEGER_LIMIT_S = 30.0

HEAD = (
    "combination", "window", "cost / bound", "forecast", "spot", "integrality", "rest",
    "on time (a)", "(b)", "(c)",
)  # fmt: skip


# --- what is told


@dataclass(frozen=True, eq=False)
class Known:
    """The rates that will be, in the form of a forecast."""

    arrival_s: Floats
    duration_s: float

    def predict(self, memory: ForecastMemory, horizons_s: Sequence[float]) -> Forecast:
        """As `forecast.predict`, but true: at every quantile the mean rate of the step that begins
        at the horizon (of the last step, where that would lie beyond the end).
        """
        told = forecast.predict(memory, horizons_s)
        step_s = memory.settings.step_s
        rates = np.array([self.rate_rps(memory.now_s + h, step_s) for h in horizons_s])
        return replace(
            told,
            rate_rps=np.broadcast_to(rates[None, :, None], told.rate_rps.shape).copy(),
            rate_mean=np.broadcast_to(rates, told.rate_mean.shape).copy(),
            is_covered=True,
            because="the demand is known",
        )

    def rate_rps(self, from_s: float, step_s: float) -> float:
        """Mean arrivals a second in the step from then on."""
        step_s = min(step_s, self.duration_s)
        if from_s < 0:
            from_s, step_s = 0.0, min(FIRST_S, self.duration_s)
        from_s = min(from_s, self.duration_s - step_s)
        first, last = np.searchsorted(self.arrival_s, [from_s, from_s + step_s])
        return float(last - first) / step_s


@dataclass(frozen=True, eq=False)
class Foresight:
    """Shoal that is told the demand instead of forecasting it."""

    known: Known
    settings: Settings
    name: str = "shoal, demand known"
    is_woken: bool = True

    @property
    def interval_s(self) -> float:
        return self.settings.interval_s

    def decide(self, snapshot: Snapshot, memory: Memory | None) -> Decision[Memory]:
        decide: Callable[..., Decision[Memory]] = policy.decide
        return decide(snapshot, memory, self.settings, predict=self.known.predict)


def announced(world: World) -> World:
    """The same world, in which each reclaim is known a slow cold start and a minute ahead."""
    machines = [machine.type for machine in world.profile.machines]
    slowest_s = max(m.cold_start_s * (1 + 2 * m.cold_start_cv) for m in machines)
    notice_s = max(world.profile.notice_s, slowest_s + AHEAD_S)
    return a_world(
        replace(world.profile, notice_s=notice_s),
        world.market,
        world.requests,
        world.slo,
        seed=world.seed,
        deadline_s=world.deadline_s,
        prelude_s=world.prelude_s,
    )


# --- what it costs


@dataclass(frozen=True, slots=True)
class Played:
    """What one of the three runs paid and attained."""

    cost_usd: float
    attainment: float


@dataclass(frozen=True, slots=True)
class Split:
    """One window's regret. `integrality`: share of the linear program, None where no plan of whole
    nodes was found in time; then the rest holds it.
    """

    combination: str
    window: int
    bound_usd: float
    as_is: Played
    demand_known: Played
    spot_known: Played
    integrality: float | None

    @property
    def forecast(self) -> float:
        return (self.as_is.cost_usd - self.demand_known.cost_usd) / self.bound_usd

    @property
    def spot(self) -> float:
        return (self.demand_known.cost_usd - self.spot_known.cost_usd) / self.bound_usd

    @property
    def rest(self) -> float:
        return self.spot_known.cost_usd / self.bound_usd - 1 - (self.integrality or 0.0)

    @property
    def ratio(self) -> float:
        return self.as_is.cost_usd / self.bound_usd


@dataclass(frozen=True, slots=True)
class Task:
    """A window to take apart; `short` is its beginning."""

    combination: str
    window: int
    asked: Experiment
    short: Experiment
    bound: Path


def split(task: Task) -> Split:
    """Play and take apart one window."""
    world = read_world(task.asked)
    settings = read_settings(task.asked.settings)
    foresight = Foresight(Known(world.requests.arrival_s, world.duration_s), settings)
    return Split(
        combination=task.combination,
        window=task.window,
        bound_usd=kept_bound(world, task.bound).at(TARGET),
        as_is=_played(simulate(world, Shoal(settings))),
        demand_known=_played(simulate(world, foresight)),
        spot_known=_played(simulate(announced(world), foresight)),
        integrality=integrality(read_world(task.short)),
    )


def _played(run: Run) -> Played:
    return Played(run.cost_usd, run.slo_attainment)


def integrality(world: World) -> float | None:
    """What whole nodes cost more than fractions, as a share."""
    plan = integer_plan(world, attainment=TARGET, time_limit_s=INTEGER_LIMIT_S)
    if plan.cost_usd is None or plan.relaxed_usd <= 0:
        return None
    return plan.cost_usd / plan.relaxed_usd - 1


# --- what is told of it


def markdown(splits: Sequence[Split]) -> str:
    """The table, and what its columns mean."""
    lines = [HEAD, ["---"] * len(HEAD), *(_line(one) for one in splits), _mean_line(splits)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (
        "# What Shoal's regret is made of\n\nShares of the certified bound: cost / bound = 1 + "
        "forecast + spot + integrality + rest. (a) as it is, (b) with the demand known, (c) and "
        "every reclaim known a slow cold start ahead; the rest is queueing, holds, cold starts and "
        f"failed launches. See `regret.py` for what this does not separate.\n\n{table}\n"
    )


def _line(one: Split) -> list[str]:
    runs = (one.as_is, one.demand_known, one.spot_known)
    return [
        one.combination,
        str(one.window),
        f"{one.ratio:.3f}",
        *(_share(part) for part in (one.forecast, one.spot, one.integrality, one.rest)),
        *(f"{run.attainment:.4f}" for run in runs),
    ]


def _mean_line(splits: Sequence[Split]) -> list[str]:
    def mean(values: Sequence[float]) -> float:
        return math.fsum(values) / len(values) if values else math.nan

    parts = [
        mean([one.forecast for one in splits]),
        mean([one.spot for one in splits]),
        mean([one.integrality or 0.0 for one in splits]),
        mean([one.rest for one in splits]),
    ]
    ratio = mean([one.ratio for one in splits])
    return ["**mean**", "", f"{ratio:.3f}", *(_share(part) for part in parts), "", "", ""]


def _share(part: float | None) -> str:
    return "not found" if part is None else f"{part:+.1%}"


def write(splits: Sequence[Split], out: Path) -> None:
    """Write regret.json and regret.md into `out`."""
    parts = ("ratio", "forecast", "spot", "rest")
    rows = [asdict(one) | {part: getattr(one, part) for part in parts} for one in splits]
    write_json(out / "regret.json", rows)
    with replacing(out / "regret.md") as file:
        file.write(markdown(splits))


# --- the command


def tasks(options: argparse.Namespace, names: Sequence[str], numbers: Sequence[int]) -> list[Task]:
    """The windows that are asked for."""
    several = []
    for name in names:
        for window in numbers:
            asked = experiment(
                BY_NAME[name], window, traces=options.traces, hours=options.window_h,
                settings=tuple(options.set),
            )  # fmt: skip
            digest = world_digest(BY_NAME[name], asked)
            short_s = min(asked.duration_s or math.inf, options.integer_h * 3600)
            path = BOUNDS / f"{digest}-{bound_digest()}.json"
            several.append(Task(name, window, asked, replace(asked, duration_s=short_s), path))
    return several


def main(arguments: Sequence[str] | None = None) -> int:
    """Take windows apart; 0 when all went well, 2 when a trace is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.autoscaling.regret",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--traces", type=Path, default=TRACES, help="folder with requests/ and spot/")
    add("--combinations", default=",".join(BY_NAME), help="%(default)s")
    add("--windows", default="0", help="such as 0,3 or 0-4 (%(default)s)")
    add("--window-h", type=float, default=HOURS, help="hours of a window (%(default)s)")
    add("--integer-h", type=float, default=INTEGER_HOURS, help="with whole nodes (%(default)s)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of Shoal's")
    add("--processes", type=int, default=2, help="%(default)s")
    add("--out", type=Path, default=HERE / "results", help="where regret.json and .md are written")
    options = parser.parse_args(arguments)
    names = known(parser, "combinations", options.combinations, list(BY_NAME))
    try:
        todo = tasks(options, names, windows(parser, options.windows))
    except TracesMissing as error:
        tell(str(error))
        return 2
    splits = _collected(todo, options.processes, options.out)
    print(markdown(splits))
    return 0


def _collected(todo: Sequence[Task], processes: int, out: Path) -> list[Split]:
    began_s, order = time.monotonic(), {(t.combination, t.window): k for k, t in enumerate(todo)}
    splits: list[Split] = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=step_back) as pool:
        for future in as_completed([pool.submit(split, task) for task in todo]):
            splits.append(future.result())
            splits.sort(key=lambda one: order[one.combination, one.window])
            write(splits, out)
            after_min = (time.monotonic() - began_s) / 60
            tell(f"{len(splits)} of {len(todo)} windows after {after_min:.0f} min")
    return splits


if __name__ == "__main__":
    sys.exit(main())
