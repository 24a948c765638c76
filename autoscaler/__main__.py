"""What can be asked of the autoscaler at a terminal?

    python -m autoscaler simulate    policies in a market, against the bound
    python -m autoscaler what-if     a recorded journal, decided again with something changed
    python -m autoscaler generate    requests, a market and a profile to try it with

Progress goes to standard error, results to standard output. Exit codes: 0 done, 2 something that
was given can't be used (the message says where and what would be right). The clock that times
decisions is read here; no decision sees it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autoscaler.experiment import POLICIES, Experiment, ExperimentError, replacing, run_experiment
from autoscaler.journal import JournalError
from autoscaler.profile import ProfileError
from autoscaler.traces import TraceError
from autoscaler.what_if import ChangeError, read_changes, replay, report_text

WRONG = 2
WRONGS = (TraceError, ProfileError, ExperimentError, JournalError, ChangeError)
"""What a wrong file or option raises; each message is for the person who gave it."""

COLUMNS: tuple[tuple[str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("policy", "<", lambda row: row["policy"]),
    ("cost USD", ">", lambda row: f"{row['cost_usd']:.2f}"),
    ("bound USD", ">", lambda row: _number(row["bound_usd"])),
    ("ratio", ">", lambda row: _number(row["ratio"])),
    ("on time", ">", lambda row: f"{row['slo_attainment']:.3%}"),
    ("p50 ms", ">", lambda row: f"{row['latency_p50_ms']:.0f}"),
    ("p99 ms", ">", lambda row: f"{row['latency_p99_ms']:.0f}"),
    ("failed", ">", lambda row: f"{row['failed']}"),
    ("reclaimed", ">", lambda row: f"{row['preemptions']}"),
    ("node hours", ">", lambda row: f"{sum(row['node_hours'].values()):.1f}"),
    ("spot", ">", lambda row: _spot_share(row["node_hours"])),
    ("decide ms", ">", lambda row: f"{row['decide_ms_mean']:.2f}"),
)


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m autoscaler") -> int:
    """Run one command; its exit code. `program`: the words that its help is called by.

    Raises:
        SystemExit: help was asked for (0), or an option is wrong (2).
    """
    options = _parser(program).parse_args(arguments)
    try:
        code: int = options.run(options)
    except WRONGS as error:
        sys.stderr.write(f"error: {error}\n")
        return WRONG
    except KeyboardInterrupt:
        return 130
    return code


def tell(line: str) -> None:
    """A line of progress."""
    sys.stderr.write(f"… {line}\n")
    sys.stderr.flush()


def say(text: str) -> None:
    """A line of the result."""
    sys.stdout.write(text + "\n")


def summary_table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary as aligned text."""
    cells = [[name for name, _, _ in COLUMNS], *([show(r) for _, _, show in COLUMNS] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligns = [align for _, align, _ in COLUMNS]
    return "\n".join(
        "  ".join(
            f"{cell:{a}{w}}" for cell, a, w in zip(line, aligns, widths, strict=True)
        ).rstrip()
        for line in cells
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _spot_share(hours: dict[str, float]) -> str:
    total = sum(hours.values())
    return f"{hours.get('spot', 0.0) / total:.0%}" if total else "-"


# --- simulate


def simulate(options: argparse.Namespace) -> int:
    """Policies in a market, against the bound."""
    experiment = Experiment(
        requests=options.requests,
        market=options.market,
        profile=options.profile,
        policies=policies(options.policy),
        slo_ms=options.slo_ms,
        attainment=options.attainment,
        seed=options.seed,
        requests_scale=options.requests_scale,
        input_tokens=options.input_tokens,
        output_tokens=options.output_tokens,
        nodes_scale=options.nodes_scale,
        zones=_words(options.zones),
        start_s=options.start_s,
        market_start_s=options.market_start_s,
        duration_s=options.duration_s,
        deadline_s=options.deadline_s,
        prelude_s=options.prelude_s,
        settings=tuple(options.set),
    )
    rows = run_experiment(
        experiment,
        options.out,
        has_bound=options.bound,
        has_plots=options.plots,
        jobs=options.jobs,
        tell=tell,
        stopwatch=time.perf_counter,
    )
    say(summary_table(rows))
    return 0


def policies(text: str) -> tuple[str, ...]:
    """The policies in `a,b,…`, each once; `all` stands for every one."""
    return POLICIES if text.strip() == "all" else _words(text)


def _words(text: str | None) -> tuple[str, ...]:
    words = (word.strip() for word in (text or "").split(","))
    return tuple(dict.fromkeys(word for word in words if word))


# --- what-if


def what_if(options: argparse.Namespace) -> int:
    """A recorded journal, decided again with something changed."""
    changes = read_changes(options.set)
    result = replay(options.journal, changes)
    if options.json:
        say(json.dumps(result.as_json(), indent=2))
    else:
        say(report_text(result, most=options.most))
    return 0


# --- generate


def generate(options: argparse.Namespace) -> int:
    """Requests, a market and a profile that fit each other, in a folder."""
    from autoscaler.profile import profile_text
    from autoscaler.synthetic import (
        EXAMPLE_PROFILE,
        generate_market,
        generate_requests,
        market_lines,
        requests_lines,
    )

    out: Path = options.out
    duration_s = options.hours * 3600
    counts = generate_requests(options.seed, duration_s=duration_s, rate_rps=options.rate_rps)
    market = generate_market(options.seed, duration_s=duration_s, nodes=options.nodes)
    with replacing(out / "requests.csv") as file:
        file.writelines(requests_lines(counts))
    with replacing(out / "market" / "capacity.csv") as file:
        file.writelines(market_lines(market.zones, market.capacity_t_s, market.capacity))
    if market.price_t_s is not None and market.price_usd_h is not None:
        with replacing(out / "market" / "price_usd_h.csv") as file:
            file.writelines(market_lines(market.zones, market.price_t_s, market.price_usd_h))
    with replacing(out / "profile.yaml") as file:
        file.write(profile_text(EXAMPLE_PROFILE))
    say(
        f"python -m autoscaler simulate --requests {out}/requests.csv --market {out}/market "
        f"--profile {out}/profile.yaml --policy shoal,skyserve,static-peak --slo-ms 6000 "
        f"--out {out}/result"
    )
    return 0


# --- the options


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description="Decide fleets in recorded or invented markets."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_simulate(
        commands.add_parser("simulate", help=simulate.__doc__, description=simulate.__doc__)
    )
    _add_what_if(commands.add_parser("what-if", help=what_if.__doc__, description=what_if.__doc__))
    _add_generate(
        commands.add_parser("generate", help=generate.__doc__, description=generate.__doc__)
    )
    return parser


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--requests", type=Path, required=True, help="CSV: a row a request, or counts")
    add("--market", type=Path, required=True, help="folder with capacity.csv, price_usd_h.csv")
    add("--profile", type=Path, required=True, help="YAML: what a replica can do on a machine")
    add("--policy", default="shoal", help=f"all, or some of: {', '.join(POLICIES)}")
    add("--slo-ms", type=float, required=True, help="latency that a request should not exceed")
    add("--attainment", type=float, default=0.99, help="share of requests that keep it [0.99]")
    add("--seed", type=int, default=0, help="the same seed, the same bytes [0]")
    add("--out", type=Path, required=True, help="folder for the results")
    add("--requests-scale", type=float, default=1.0, help="multiplies the traffic [1]")
    add("--input-tokens", type=float, default=0.0, help="a request, where the trace has none [0]")
    add("--output-tokens", type=float, default=0.0, help="a request, where the trace has none [0]")
    add("--nodes-scale", type=float, help="multiplies the market's capacity [1]")
    add("--zones", help="only these zones of the market: a,b,…")
    add("--start-s", type=float, default=0.0, help="where in the request trace to begin [0]")
    add("--market-start-s", type=float, default=0.0, help="where in the market to begin [0]")
    add("--duration-s", type=float, help="how long to run [to the end of the request trace]")
    add("--deadline-s", type=float, help="when a request is given up [5 SLOs, at least 30 s]")
    add("--prelude-s", type=float, default=1800.0, help="time to settle before the start [1800]")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of shoal's")
    add("--jobs", type=int, default=1, help="policies side by side, each in a process [1]")
    add("--no-bound", dest="bound", action="store_false", help="skip the lower bound")
    add("--no-plots", dest="plots", action="store_false", help="skip pictures and report.html")
    parser.set_defaults(run=simulate)


def _add_what_if(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--journal", type=Path, required=True, help="a journal.jsonl that simulate wrote")
    add(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="what to change: slo_ms, attainment, price.GROUP (a number, or x1.5), rate (x1.2), "
        "or one of the policy's settings; may be repeated",
    )  # fmt: skip
    add("--most", type=int, default=20, help="differing decisions to show [20]")
    add("--json", action="store_true", help="print one JSON value for programs")
    parser.set_defaults(run=what_if)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write into")
    add("--seed", type=int, default=0, help="the same seed, the same bytes [0]")
    add("--hours", type=float, default=24.0, help="how long [24]")
    add("--rate-rps", type=float, default=20.0, help="mean requests a second [20]")
    add("--nodes", type=int, default=16, help="nodes in a zone at most [16]")
    parser.set_defaults(run=generate)


if __name__ == "__main__":
    sys.exit(main())
