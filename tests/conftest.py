"""What holds for every test: marks by folder, warnings that are errors, sizes after the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from tests import source

HERE = Path(__file__).parent

PURE = ("autoscaler", "dashboards", "cluster/test_reconciliation.py", "test_tidy.py")
"""Tests of what decides and describes: a warning there is an error."""

settings.register_profile("shoal", deadline=None)  # the machine may be busy with something else
settings.load_profile("shoal")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE / "e2e"):
            item.add_marker(pytest.mark.e2e)
        if any(item.path.is_relative_to(HERE / pure) for pure in PURE):
            item.add_marker(pytest.mark.filterwarnings("error"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = (report for found in terminalreporter.stats.values() for report in found)
    if not any("test_tidy.py" in getattr(report, "nodeid", "") for report in reports):
        return
    terminalreporter.section("sizes (a trend, not a rule)")
    terminalreporter.line(
        f"{'':12}{'files':>7}{'lines':>8}{'functions':>11}{'median':>8}{'in >50':>8}"
    )
    for size in source.sizes():
        terminalreporter.line(
            f"{size.package:12}{size.files:7}{size.lines:8}{size.functions:11}"
            f"{size.median_lines:8.0f}{size.long_fraction:8.0%}"
        )
