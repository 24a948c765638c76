"""Stub."""

from __future__ import annotations

from benchmarks.serving.report import Results

SYSTEMS: dict[str, str] = {}


def run_round(names: list[str], results: Results) -> None: ...
