"""Does the report show what happened, and stand alone?"""

from __future__ import annotations

import base64
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.experiment import Outcome, play
from autoscaler.ledger import RESERVATION, Rental
from autoscaler.report import (
    cost_figure,
    fleet_figure,
    market_figure,
    nodes_over_time,
    page,
    png,
    write_report,
)
from autoscaler.world import World
from tests.autoscaler.worlds import SPOT_A, FixedFleet, a_market, a_small_world

PNG = b"\x89PNG\r\n\x1a\n"


def a_rental(start_s: float, end_s: float, market: str = "spot", why: str = "drained") -> Rental:
    return Rental("1", "g", "m", market, "a", start_s, start_s, end_s, why, 1.0)


def a_row(policy: str, cost_usd: float = 2.0, attainment: float = 0.995) -> dict[str, Any]:
    return {
        "policy": policy, "cost_usd": cost_usd, "bound_usd": 1.0, "ratio": cost_usd,
        "requests": 10, "slo_attainment": attainment, "latency_p50_ms": 1.0, "latency_p99_ms": 2.0,
        "failed": 0, "preemptions": 1, "launches": {"spot": 2}, "node_hours": {"spot": 1.5},
        "decide_ms_mean": 0.5, "bound_target_usd": 1.0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def world() -> World:
    return a_small_world(market=a_market(a=[(0, 4), (200, 1), (400, 4)]))


@pytest.fixture(scope="module")
def outcome(world: World, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("fixed")
    return play(world, FixedFleet({SPOT_A: 3}), folder, lambda: 0.0)


class Page(HTMLParser):
    """What a page links to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


# --- numbers


def test_nodes_over_time_are_those_that_were_rented() -> None:
    ledger = [a_rental(0, 100), a_rental(50, 75), a_rental(0, 100, "on-demand")]
    assert nodes_over_time(ledger, "spot", 100.0, bins=4).tolist() == [1, 1, 2, 1]
    assert nodes_over_time(ledger, "on-demand", 100.0, bins=4).tolist() == [1, 1, 1, 1]
    assert nodes_over_time(ledger, "reserved", 100.0, bins=4).tolist() == [0, 0, 0, 0]


def test_what_pays_for_a_reservation_is_no_node() -> None:
    ledger = [a_rental(0, 100, "reserved", RESERVATION), a_rental(0, 50, "reserved")]
    assert nodes_over_time(ledger, "reserved", 100.0, bins=2).tolist() == [1, 0]


spans = st.tuples(st.floats(0, 1000), st.floats(0, 1000)).map(sorted)


@given(st.lists(spans, max_size=30))
def test_node_hours_stay_the_same_however_time_is_cut(pairs: list[list[float]]) -> None:
    ledger = [a_rental(start, end) for start, end in pairs]
    hours = sum(end - start for start, end in pairs)
    for bins in (1, 7):
        nodes = nodes_over_time(ledger, "spot", 1000.0, bins)
        assert nodes.sum() * 1000 / bins == pytest.approx(hours, abs=1e-6)


# --- pictures


def test_pictures_are_drawn_and_repeat_to_the_byte(world: World, outcome: Outcome) -> None:
    rows = [a_row("shoal"), a_row("other", 3.0, 1.0)]
    for draw in (
        partial(cost_figure, rows, 0.99),
        partial(fleet_figure, world, outcome),
        partial(market_figure, world, [outcome]),
    ):
        first, again = png(draw()), png(draw())
        assert first.startswith(PNG)
        assert first == again


def test_the_cost_picture_shows_every_policy_where_it_is_and_the_bound_below() -> None:
    rows = [a_row("shoal", 2.0, 0.995), a_row("late", 1.5, 0.9)]
    axes = cost_figure(rows, 0.99).axes[0]
    lines = {str(line.get_label()): line for line in axes.lines}
    assert lines["shoal"].get_xdata() == pytest.approx([0.005])
    assert np.ravel(lines["shoal"].get_ydata()) == pytest.approx([2.0])
    assert np.asarray(lines["certified bound"].get_xdata()) == pytest.approx([1e-5, 0.01, 0.1])
    assert lines["target 0.99"].get_xdata() == pytest.approx([0.01, 0.01])


def test_without_a_bound_there_is_no_line_of_it() -> None:
    row = {**a_row("shoal"), "bound_usd": None, "ratio": None}
    del row["bound_target_usd"]
    labels = {str(line.get_label()) for line in cost_figure([row], 0.99).axes[0].lines}
    assert "certified bound" not in labels


def test_the_fleet_picture_marks_each_reclaim(world: World, outcome: Outcome) -> None:
    reclaimed = [r.end_s / 3600 for r in outcome.ledger if r.end_reason == "reclaimed"]
    assert reclaimed
    _, fleet, _ = fleet_figure(world, outcome).axes
    assert np.asarray(fleet.lines[0].get_xdata()).tolist() == reclaimed


# --- the page


def test_the_page_stands_alone_and_is_well_formed(world: World) -> None:
    text = page(world, {"market": "m"}, [a_row("shoal")], [("one", PNG), ("two", PNG)])
    read = Page(text)
    assert read.open == []
    assert [source.partition(",")[0] for source in read.sources] == ["data:image/png;base64"] * 2
    assert not re.search(r"https?:|//\w|@import|url\(", text.replace("data:image/png", ""))


def test_the_page_says_who_won_and_escapes_what_it_is_given(world: World) -> None:
    rows = [a_row("shoal", 2.0), a_row("other", 9.0), a_row("<b>", 1.0, 0.5)]
    text = page(world, {"zones": ["<script>"], "none": None}, rows, [("x", PNG)])
    assert "shoal keeps the SLO at the least cost: 2.00 USD" in Page(text).text
    assert "<script>" not in text
    assert "<b>" not in text


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([a_row("shoal", attainment=0.5)], "No policy kept 0.99"),
        ([a_row("shoal"), a_row("b", attainment=0.5)], "shoal alone keeps the SLO"),
    ],
)
def test_the_headline_is_honest(world: World, rows: list[dict[str, Any]], words: str) -> None:
    assert words in page(world, {}, rows, [("x", PNG)])


def test_the_report_holds_the_pictures_that_lie_beside_it(
    world: World, outcome: Outcome, tmp_path: Path
) -> None:
    outcome.row.update(bound_usd=0.1, ratio=2.0, bound_target_usd=0.1)
    write_report(tmp_path, world, {"seed": 1}, [outcome])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == ["cost.png", "fleet-fixed.png", "market.png"]
    for name in names:
        encoded = base64.b64encode((tmp_path / "plots" / name).read_bytes()).decode()
        assert encoded in text
