"""What did the rounds say, in a form that a person can read?

Points of all rounds become medians; medians become one table a workload, systems down,
connections across. Pure: rows in, text out.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.serving.measure import Point, Start, as_row


@dataclass(slots=True)
class Results:
    """Everything that a run has seen. `raw` and `chat` are rows of their own kind; `problems`
    says which system could not be measured, and why."""

    about: dict[str, Any] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    raw: list[dict[str, Any]] = field(default_factory=list)
    chat: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def write(self, folder: Path, titles: Mapping[str, str]) -> None:
        """Write results.json and results.md into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "about": self.about,
            "points": [as_row(point) for point in self.points],
            "starts": [as_row(start) for start in self.starts],
            "raw": self.raw,
            "chat": self.chat,
            "problems": self.problems,
        }
        (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n")
        (folder / "results.md").write_text(self.markdown(titles))

    def markdown(self, titles: Mapping[str, str]) -> str:
        """All tables."""
        parts = [_about(self.about)]
        for workload in _in_order(point.workload for point in self.points):
            points = [point for point in self.points if point.workload == workload]
            parts.append(
                f"## {workload}\n\n{self._raw_line(workload)}{self._table(points, titles)}"
            )
        if self.chat:
            parts.append(f"## chat\n\n{_chat_table(self.chat, titles)}")
        parts.append(_noise(self.points))
        if self.problems:
            parts.append("## Not measured\n\n" + "\n".join(f"- {line}" for line in self.problems))
        return "\n\n".join(part for part in parts if part) + "\n"

    def _raw_line(self, workload: str) -> str:
        rates = [row["rows_per_s"] for row in self.raw if row["workload"] == workload]
        if not rates:
            return ""
        return (
            "Without any server, in-process, batches of 32: "
            f"**{_number(statistics.median(rates))} rows/s**.\n\n"
        )

    def _table(self, points: Sequence[Point], titles: Mapping[str, str]) -> str:
        connections = sorted({point.connections for point in points})
        wide = [f"{n} conn." for n in connections]
        head = [
            "system",
            *(f"req/s, {w}" for w in wide),
            *(f"p50 / p99 ms, {w}" for w in wide),
            "errors",
            "CPU ms a request",
            "RSS MB",
            "cold start s",
        ]
        rows = []
        for system in _in_order(point.system for point in points):
            own = [point for point in points if point.system == system]
            rows.append([titles.get(system, system), *self._cells(own, connections)])
        return _grid(head, rows)

    def _cells(self, points: Sequence[Point], connections: Sequence[int]) -> list[str]:
        by_count = {n: [p for p in points if p.connections == n] for n in connections}
        busy = by_count.get(64) or by_count[connections[-1]]
        first = points[0]
        starts = [
            s.cold_start_s
            for s in self.starts
            if (s.system, s.workload) == (first.system, first.workload)
        ]
        return [
            *(_median(by_count[n], "requests_per_s") for n in connections),
            *(_latencies(by_count[n]) for n in connections),
            _errors(points),
            _median(busy, "cpu_ms"),
            _median(busy, "rss_mb"),
            _number(statistics.median(starts)) if starts else "–",
        ]


def _about(about: Mapping[str, Any]) -> str:
    lines = [f"- {key}: {value}" for key, value in about.items()]
    return "# Serving, side by side\n\n" + "\n".join(lines)


def _chat_table(rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    head = ["system", "connections", "tokens/s", "TTFT p50 ms", "TTFT p99 ms", "requests", "errors"]
    lines = []
    for system in _in_order(row["system"] for row in rows):
        for connections in _in_order(row["connections"] for row in rows):
            own = [r for r in rows if (r["system"], r["connections"]) == (system, connections)]
            if not own:
                continue
            medians = [
                _number(statistics.median([row[name] for row in own]))
                for name in ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms")
            ]
            counts = [str(sum(row[name] for row in own)) for name in ("requests", "errors")]
            lines.append([titles.get(system, system), str(connections), *medians, *counts])
    return _grid(head, lines)


def _noise(points: Sequence[Point]) -> str:
    """A line that says how far the figures can be trusted."""
    if not points:
        return ""
    others = statistics.median(point.others_cpu_fraction for point in points)
    own = statistics.median(point.load_cpu_us for point in points if point.answered)
    return (
        f"The load generator itself used {own:.0f} µs of CPU a request (median); other processes, "
        f"{100 * others:.0f} % of the machine (median), "
        f"{100 * max(point.others_cpu_fraction for point in points):.0f} % at worst."
    )


def _errors(points: Sequence[Point]) -> str:
    total: dict[str, int] = {}
    for point in points:
        for kind, count in point.errors.items():
            total[kind] = total.get(kind, 0) + count
        if point.wrong:
            total["wrong"] = total.get("wrong", 0) + point.wrong
    return ", ".join(f"{count} {kind}" for kind, count in total.items()) or "0"


def _latencies(points: Sequence[Point]) -> str:
    return f"{_median(points, 'p50_ms')} / {_median(points, 'p99_ms')}"


def _median(points: Sequence[Point], name: str) -> str:
    values = [getattr(point, name) for point in points]
    values = [value for value in values if not math.isnan(value)]
    return _number(statistics.median(values)) if values else "–"


def _number(value: float) -> str:
    """Three figures that mean something, no more."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _in_order(values: Iterable[Any]) -> list[Any]:
    """Distinct values in the order of their first appearance."""
    return list(dict.fromkeys(values))


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
