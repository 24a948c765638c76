"""Does one command lead from files to files that anyone can check?

The summary is computed again here from the ledger, the requests and the market's files, in plain
Python, knowing only what the formats say.
"""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from bisect import bisect_right
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autoscaler.__main__ import main
from autoscaler.experiment import POLICIES, replacing
from cluster.__main__ import app

ALWAYS = ["shoal", "skyserve", "static-peak"]
SLO_MS, DURATION_S = 6000.0, 3600.0

Row = dict[str, str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated folder: requests, a market and a profile."""
    folder = tmp_path_factory.mktemp("inputs")
    command = ["generate", "--out", folder, "--seed", 3, "--hours", 2, "--rate-rps", 12]
    assert main(list(map(str, command))) == 0
    return folder


def arguments(inputs: Path, out: Path, *more: object) -> list[str]:
    words: list[object] = [
        "simulate", "--requests", inputs / "requests.csv", "--market", inputs / "market",
        "--profile", inputs / "profile.yaml", "--slo-ms", SLO_MS, "--seed", 1, "--out", out,
        "--duration-s", DURATION_S, "--prelude-s", 600, *more,
    ]  # fmt: skip
    return list(map(str, words))


@pytest.fixture(scope="module")
def done(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished comparison."""
    out = tmp_path_factory.mktemp("out")
    assert main(arguments(inputs, out, "--policy", ",".join(ALWAYS))) == 0
    return out


def rows_of(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def summary_of(out: Path) -> list[dict[str, Any]]:
    summary: list[dict[str, Any]] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary


# --- the summary, computed again


def test_the_summary_has_an_object_for_each_policy_with_what_is_promised(done: Path) -> None:
    summary = summary_of(done)
    assert [row["policy"] for row in summary] == ALWAYS
    for row in summary:
        assert row.keys() >= {
            "policy", "cost_usd", "bound_usd", "ratio", "requests", "slo_attainment",
            "latency_p50_ms", "latency_p99_ms", "failed", "preemptions", "launches", "node_hours",
            "decide_ms_mean",
        }  # fmt: skip


@pytest.mark.parametrize("policy", ALWAYS)
def test_punctuality_follows_from_the_requests(done: Path, policy: str) -> None:
    row = next(row for row in summary_of(done) if row["policy"] == policy)
    requests = rows_of(done / policy / "requests.csv")
    latency_ms = [(float(r["finish_s"]) - float(r["arrival_s"])) * 1e3 for r in requests]
    on_time = [ms <= SLO_MS and r["ok"] == "1" for ms, r in zip(latency_ms, requests, strict=True)]
    assert len(requests) == row["requests"] > 10_000
    assert sum(on_time) / len(on_time) == row["slo_attainment"]
    assert sum(r["ok"] == "0" for r in requests) == row["failed"]
    cuts = statistics.quantiles(latency_ms, n=100, method="inclusive")
    assert cuts[49] == pytest.approx(row["latency_p50_ms"])
    assert cuts[98] == pytest.approx(row["latency_p99_ms"])


def spot_price(prices: list[Row], zone: str, at_s: float) -> float:
    row = bisect_right([float(price["t_s"]) for price in prices], at_s) - 1
    return float(prices[max(row, 0)][zone])


def price_of(row: Row, prices: list[Row], start_s: float, end_s: float) -> float:
    """USD for a rental: piece by piece of constant price; by the second, a minute at least."""

    def price(at_s: float) -> float:
        return 3.06 if row["market"] == "on-demand" else spot_price(prices, row["zone"], at_s)

    changes = [t for p in prices if start_s < (t := float(p["t_s"])) < end_s]
    paid = sum((b - a) * price(a) for a, b in pairwise([start_s, *changes, end_s]))
    extra_s = max(math.ceil(end_s - start_s - 1e-9), 60.0) - (end_s - start_s)
    return (paid + extra_s * price(end_s)) / 3600


@pytest.mark.parametrize("policy", ALWAYS)
def test_cost_follows_from_the_ledger_and_the_market(done: Path, inputs: Path, policy: str) -> None:
    row = next(row for row in summary_of(done) if row["policy"] == policy)
    ledger = rows_of(done / policy / "ledger.csv")
    prices = rows_of(inputs / "market" / "price_usd_h.csv")
    assert ledger
    for rental in ledger:
        expected = price_of(rental, prices, float(rental["start_s"]), float(rental["end_s"]))
        assert float(rental["cost_usd"]) == pytest.approx(expected)
    assert math.fsum(float(r["cost_usd"]) for r in ledger) == pytest.approx(row["cost_usd"])
    assert sum(r["end_reason"] == "reclaimed" for r in ledger) == row["preemptions"]
    for market in ("on-demand", "spot"):
        here = [r for r in ledger if r["market"] == market]
        hours = math.fsum(float(r["end_s"]) - float(r["start_s"]) for r in here) / 3600
        assert hours == pytest.approx(row["node_hours"][market])
        assert len(here) == row["launches"][market]


@pytest.mark.parametrize("policy", ALWAYS)
def test_no_zone_ever_gave_more_nodes_than_it_had(done: Path, inputs: Path, policy: str) -> None:
    capacity = rows_of(inputs / "market" / "capacity.csv")
    ledger = [r for r in rows_of(done / policy / "ledger.csv") if r["market"] == "spot"]
    for row in capacity:
        at_s = float(row["t_s"])
        held = [r["zone"] for r in ledger if float(r["start_s"]) <= at_s < float(r["end_s"])]
        assert all(held.count(zone) <= int(row[zone]) for zone in set(held))


def test_every_answered_request_was_served_by_a_node_that_was_there(done: Path) -> None:
    for policy in ALWAYS:
        nodes = {r["node"]: r for r in rows_of(done / policy / "ledger.csv")}
        for request in rows_of(done / policy / "requests.csv")[::97]:
            if request["ok"] == "1":
                node = nodes[request["node"]]
                assert float(request["arrival_s"]) <= float(request["start_s"])
                assert float(request["finish_s"]) <= float(node["end_s"]) + 1e-6


def test_nobody_beats_the_bound_however_late(done: Path) -> None:
    for row in summary_of(done):
        assert row["ratio"] == pytest.approx(row["cost_usd"] / row["bound_usd"])
        assert row["ratio"] >= 1
        assert row["bound_usd"] <= row["bound_target_usd"] + 1e-9


# --- what else is written


def test_the_journal_has_a_line_for_each_decision(done: Path) -> None:
    for policy in ALWAYS:
        text = (done / policy / "journal.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        assert len(lines) > DURATION_S / 60
        assert [line["now_s"] for line in lines] == sorted(line["now_s"] for line in lines)
        for line in lines:
            assert line.keys() >= {
                "now_s", "wanted", "groups", "because", "rejected", "expected"
            }  # fmt: skip
            assert line["expected"].keys() == {"cost_usd_h", "attainment"}


def test_the_folder_holds_whole_files_only(done: Path) -> None:
    files = {str(path.relative_to(done)) for path in done.rglob("*") if path.is_file()}
    of_policies = {
        f"{policy}/{name}"
        for policy in ALWAYS
        for name in ("journal.jsonl", "ledger.csv", "requests.csv")
    }
    plots = {f"plots/{name}.png" for name in ("cost", "market", *(f"fleet-{p}" for p in ALWAYS))}
    assert files == {"summary.json", "experiment.json", "report.html", *of_policies, *plots}


def contents(out: Path) -> dict[str, Any]:
    """Every file below `out`, without what the stopwatch said of decisions."""
    found: dict[str, Any] = {}
    for path in (path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if name == "summary.json":
            found[name] = [{**row, "decide_ms_mean": 0} for row in summary_of(out)]
        elif name == "report.html":  # the table's last column
            found[name] = re.sub(r"<td>[0-9.]+</td></tr>", "", path.read_text(encoding="utf-8"))
        else:
            found[name] = path.read_bytes()
    return found


def test_the_same_seed_gives_the_same_bytes(done: Path, inputs: Path, tmp_path: Path) -> None:
    assert main(arguments(inputs, tmp_path, "--policy", ",".join(ALWAYS))) == 0
    first, again = contents(done), contents(tmp_path)
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []


def test_policies_side_by_side_do_what_they_do_alone(inputs: Path, tmp_path: Path) -> None:
    some = ["--policy", "skyserve,static-peak", "--duration-s", "300", "--no-bound", "--no-plots"]
    assert main(arguments(inputs, tmp_path / "one", *some)) == 0
    assert main(arguments(inputs, tmp_path / "two", *some, "--jobs", 2)) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_another_seed_gives_another_world(inputs: Path, tmp_path: Path) -> None:
    some = arguments(inputs, tmp_path, "--policy", "static-peak", "--no-bound", "--no-plots")
    assert main([*some, "--duration-s", "600"]) == 0
    first = (tmp_path / "static-peak" / "requests.csv").read_bytes()
    assert main([*some, "--duration-s", "600", "--seed", "2"]) == 0
    assert (tmp_path / "static-peak" / "requests.csv").read_bytes() != first


def test_without_bound_and_plots_there_are_none(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = arguments(inputs, tmp_path, "--policy", "static-peak", "--no-bound", "--no-plots")
    assert main([*some, "--duration-s", "300"]) == 0
    (row,) = summary_of(tmp_path)
    assert (row["bound_usd"], row["ratio"]) == (None, None)
    assert not (tmp_path / "report.html").exists()
    told = capsys.readouterr()
    assert "static-peak" in told.out
    assert "static-peak: running" in told.err
    assert "running" not in told.out


def test_a_file_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("before")

    def half() -> None:
        with replacing(tmp_path / "a.csv") as file:
            file.write("half")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert (tmp_path / "a.csv").read_text() == "before"


# --- what is wrong


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--policy", "skyserv"], ["no policy 'skyserv'", "did you mean 'skyserve'?"]),
        (["--policy", ","], ["no policy asked for", *POLICIES]),
        (["--slo-ms", "0"], ["slo-ms", "positive"]),
        (["--attainment", "99"], ["attainment", "(0, 1]", "99"]),
        (["--seed", "-1"], ["seed", "0 or more"]),
        (["--requests", "nowhere.csv"], ["nowhere.csv: no such file"]),
        (["--market", "nowhere"], ["nowhere: not a folder"]),
        (["--profile", "nowhere.yaml"], ["nowhere.yaml: no such file"]),
        (["--zones", "east-1z"], ["no zone 'east-1z'", "did you mean 'east-1"]),
        (["--start-s", "1e9"], ["requests.csv", "begins at 1e+09 s"]),
        (["--requests-scale", "0"], ["scale", "positive"]),
        (["--set", "interval=5"], ["'interval'", "did you mean 'interval_s'?"]),
        (["--set", "interval_s=soon"], ["interval_s", "number", "'soon'"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_ends_with_2(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str],
    parts: list[str],
) -> None:  # fmt: skip
    assert main([*arguments(inputs, tmp_path / "out"), *more]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ")
    for part in parts:
        assert part in told
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_world_without_spot_prices_is_refused(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "machines:\n  m:\n    price_on_demand_usd_h: 1\n    service_ms: {fixed: 10}\n"
    (tmp_path / "profile.yaml").write_text(text)
    (tmp_path / "market").mkdir()
    (tmp_path / "market" / "capacity.csv").write_text("t_s,a\n0,1\n")
    words = arguments(inputs, tmp_path / "out", "--profile", tmp_path / "profile.yaml")
    assert main([*words, "--market", str(tmp_path / "market")]) == 2
    told = capsys.readouterr().err
    assert "no spot prices" in told
    assert "price_spot_usd_h of m" in told


def test_shoal_hands_its_words_on(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["simulate", "--help"])
    assert result.exit_code == 0
    assert "--requests" in result.output
    wrong = CliRunner().invoke(app, ["simulate", "--requests", "x"])
    assert wrong.exit_code == 2
    assert CliRunner().invoke(app, ["what-if", "--journal", str(tmp_path / "no")]).exit_code == 2
