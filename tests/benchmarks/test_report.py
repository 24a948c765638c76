"""Do the tables say what the points say?"""

from __future__ import annotations

import json
import math
from pathlib import Path

from benchmarks.serving.measure import Point, Start
from benchmarks.serving.report import Results

TITLES = {"a": "System A", "b": "System B"}


def a_point(system: str = "a", connections: int = 64, **fields: object) -> Point:
    values: dict[str, object] = {
        "workload": "noop",
        "round": 0,
        "requests_per_s": 100.0,
        "p50_ms": 1.0,
        "p90_ms": 2.0,
        "p99_ms": 3.0,
        "answered": 200,
        "errors": {},
        "checked": 4,
        "wrong": 0,
        "cpu_ms": 0.5,
        "rss_mb": 50.0,
        "processes": 1,
        "load_cpu_us": 30.0,
        "others_cpu_fraction": 0.02,
    }
    return Point(system=system, connections=connections, **{**values, **fields})  # type: ignore[arg-type]


def row(text: str, title: str) -> list[str]:
    """The cells of the line of `title`."""
    (line,) = [line for line in text.split("\n") if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_figure_is_the_median_of_its_rounds() -> None:
    points = [a_point(round=n, requests_per_s=rate) for n, rate in enumerate((90.0, 500.0, 110.0))]
    assert row(Results(points=points).markdown(TITLES), "System A")[1] == "110"


def test_every_system_has_a_line_and_every_number_of_connections_a_column() -> None:
    points = [a_point(s, n, requests_per_s=n * 10.0) for s in ("a", "b") for n in (1, 16, 512)]
    text = Results(points=points).markdown(TITLES)
    for title in ("System A", "System B"):
        assert row(text, title)[1:4] == ["10.0", "160", "5120"]


def test_errors_and_wrong_answers_of_all_rounds_are_added_up() -> None:
    points = [
        a_point(errors={"status 503": 2}),
        a_point(round=1, errors={"status 503": 3, "closed": 1}, wrong=4),
    ]
    cells = row(Results(points=points).markdown(TITLES), "System A")
    assert cells[3] == "5 status 503, 1 closed, 4 wrong"


def test_a_system_that_answered_nothing_has_a_dash_and_not_a_number() -> None:
    silent = a_point(requests_per_s=0.0, p50_ms=math.nan, p99_ms=math.nan, cpu_ms=math.nan)
    cells = row(Results(points=[silent]).markdown(TITLES), "System A")
    assert cells[2] == "– / –"


def test_the_limit_without_a_server_stands_above_its_table() -> None:
    raw = [{"workload": "noop", "rows_per_s": rate} for rate in (100.0, 300.0, 200.0)]
    text = Results(points=[a_point()], raw=raw).markdown(TITLES)
    assert "**200 rows/s**" in text


def test_what_could_not_be_measured_is_said() -> None:
    text = Results(problems=["round 1 of a: it did not start"]).markdown(TITLES)
    assert "it did not start" in text


def test_the_written_json_holds_every_point(tmp_path: Path) -> None:
    results = Results(points=[a_point(), a_point("b")], starts=[Start("a", "noop", 0, 1.5)])
    results.write(tmp_path, TITLES)
    document = json.loads((tmp_path / "results.json").read_text())
    assert [point["system"] for point in document["points"]] == ["a", "b"]
    assert document["starts"][0]["cold_start_s"] == 1.5
    assert (tmp_path / "results.md").read_text().startswith("# Serving")
