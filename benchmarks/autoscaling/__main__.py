"""The benchmark's command: which combinations, which policies, which windows?

    python -m benchmarks.autoscaling                                    everything, for hours
    python -m benchmarks.autoscaling --combinations v100-16-servegen --windows 0-2
    python -m benchmarks.autoscaling --policies shoal --version tuned   play Shoal again, and merge
    python -m benchmarks.autoscaling --report                           only write the tables anew

What has been played is kept in `runs.jsonl` of `--out`, so the command goes on where it was
stopped. A row is played again when its world, its policy's settings or `--version` differ.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autoscaler.what_if import ChangeError, read_settings
from benchmarks.autoscaling.combinations import HOURS, TRACES, WINDOWS, TracesMissing
from benchmarks.autoscaling.jobs import Plan, play
from benchmarks.autoscaling.options import BOUNDS, BY_NAME, HERE, known, tell, windows
from benchmarks.autoscaling.policies import POLICIES
from benchmarks.autoscaling.report import markdown, write
from benchmarks.autoscaling.results import results
from benchmarks.autoscaling.rows import latest, read_rows


@dataclass(frozen=True, slots=True)
class Command:
    """What to do: play `plan` into `out`, or only report."""

    plan: Plan
    out: Path
    processes: int
    is_report: bool


def parse(arguments: Sequence[str]) -> Command:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoscaling", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--traces", type=Path, default=TRACES, help="folder with requests/ and spot/")
    add("--combinations", default=",".join(BY_NAME), help="%(default)s")
    add("--policies", default=",".join(POLICIES), help="%(default)s")
    add("--windows", default=f"0-{WINDOWS - 1}", help="such as 0,3 or 0-4 (%(default)s)")
    add("--window-h", type=float, default=HOURS, help="hours of a window (%(default)s)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of Shoal's")
    add("--version", default="1", help="a word for the code; another one plays all again")
    add("--processes", type=int, default=2, help="%(default)s")
    add("--out", type=Path, default=HERE / "results", help="where runs.jsonl and tables lie")
    add("--report", action="store_true", help="play nothing, write the tables anew")
    chosen = parser.parse_args(arguments)
    if not chosen.window_h > 0 or chosen.processes < 1:
        parser.error("--window-h and --processes must be positive")
    try:
        read_settings(chosen.set)
    except ChangeError as error:
        parser.error(f"--set: {error}")
    plan = Plan(
        combinations=tuple(
            BY_NAME[n] for n in known(parser, "combinations", chosen.combinations, list(BY_NAME))
        ),
        policies=known(parser, "policies", chosen.policies, POLICIES),
        windows=windows(parser, chosen.windows),
        traces=chosen.traces,
        hours=chosen.window_h,
        settings=tuple(chosen.set),
        version=chosen.version,
        bounds=BOUNDS,
    )
    return Command(plan, chosen.out, chosen.processes, chosen.report)


def report(out: Path) -> str:
    """Write the tables about everything that has been played; the page."""
    rows = latest(read_rows(out / "runs.jsonl"))
    about = {
        "combinations": len({row.combination for row in rows}),
        "windows played": len({(row.combination, row.window) for row in rows}),
        "runs": len(rows),
        "requests in them": f"{sum(row.requests for row in rows):,}",
    }
    told = results(rows, about)
    write(told, out)
    return markdown(told)


def main(arguments: Sequence[str] | None = None) -> int:
    """Play and report; 0 when everything went well, 1 when a window didn't, 2 for a wrong file."""
    command = parse(sys.argv[1:] if arguments is None else arguments)
    runs = command.out / "runs.jsonl"
    problems: list[str] = []
    try:
        if not command.is_report:
            problems = play(command.plan, runs, processes=command.processes, tell=tell)
    except TracesMissing as error:
        tell(str(error))
        return 2
    finally:
        if runs.exists():
            page = report(command.out)
            tell(f"tables in {command.out / 'results.md'}")
            print(page.partition("\n![")[0])
    for problem in problems:
        tell(f"not played: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
