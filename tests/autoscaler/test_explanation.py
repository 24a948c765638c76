"""Does an operator read what was decided, why, and what the other ways would have cost?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from autoscaler import demand
from autoscaler.decision import Command, Drain, Launch, Reason, Rejected, Stop
from autoscaler.demand import Demand, DemandSettings
from autoscaler.explanation import REJECTED_MAX, because, reason_for, rejected
from autoscaler.fleet import Choice, Needs, Option, Problem, Shocks, choose
from autoscaler.snapshot import Event, EventKind, Snapshot
from tests.autoscaler.snapshots import (
    ON_DEMAND,
    RESERVED,
    SPOT_A,
    SPOT_B,
    a_reserved_group,
    a_snapshot,
    nodes_in,
    some_groups,
)

LAUNCH, DRAIN, STOP = Launch(SPOT_A, 2), Drain("n"), Stop("n")
FINE = Choice({SPOT_A: 9}, 9.0, 0.001, is_feasible=True)


@cache
def a_wish() -> Demand:
    snapshot = a_snapshot()
    memory = demand.observed(snapshot, None, DemandSettings())
    return demand.demanded(snapshot, memory, DemandSettings())


def seen(*kinds: EventKind) -> Snapshot:
    return a_snapshot(events=[Event(kind, SPOT_A, -1.0) for kind in kinds])


def reason(
    commands: Sequence[Command],
    *kinds: EventKind,
    wish: Demand | None = None,
    choice: Choice = FINE,
) -> Reason:
    return reason_for(seen(*kinds), wish or a_wish(), [choice], commands)


QUEUED = replace(a_wish(), queue_excess=np.array([40.0]))
UNCOVERED = replace(a_wish(), is_covered=False, because="coverage 70 % of 95 %")
SHORT = replace(FINE, is_feasible=False)


@pytest.mark.parametrize(
    ("commands", "kinds", "wish", "choice", "expected"),
    [
        ([], [], a_wish(), FINE, Reason.STEADY),
        ([LAUNCH], [], a_wish(), FINE, Reason.DEMAND_RISING),
        ([DRAIN], [], a_wish(), FINE, Reason.DEMAND_FALLING),
        ([STOP], [], a_wish(), FINE, Reason.DEMAND_FALLING),
        ([LAUNCH, DRAIN], [], a_wish(), FINE, Reason.CHEAPER),
        ([LAUNCH], [], QUEUED, FINE, Reason.QUEUE_GROWING),
        ([], [], QUEUED, FINE, Reason.STEADY),
        ([LAUNCH], [], UNCOVERED, FINE, Reason.COVERAGE_LOST),
        ([], [], UNCOVERED, FINE, Reason.STEADY),
        ([LAUNCH], [EventKind.LAUNCH_FAILED], QUEUED, FINE, Reason.LAUNCH_FAILED),
        ([], [EventKind.LAUNCH_FAILED], a_wish(), FINE, Reason.STEADY),
        ([LAUNCH], [EventKind.LAUNCHED], a_wish(), FINE, Reason.DEMAND_RISING),
        ([LAUNCH], [EventKind.NOTICED, EventKind.LAUNCH_FAILED], a_wish(), FINE, Reason.NOTICE),
        ([LAUNCH], [EventKind.RECLAIMED, EventKind.NOTICED], a_wish(), FINE, Reason.RECLAIM),
        ([LAUNCH], [EventKind.RECLAIMED], a_wish(), SHORT, Reason.SHORT),
    ],
)
def test_the_most_pressing_fact_is_the_reason(
    commands: list[Command],
    kinds: list[EventKind],
    wish: Demand,
    choice: Choice,
    expected: Reason,
) -> None:
    assert reason(commands, *kinds, wish=wish, choice=choice) is expected


def test_a_launch_into_a_fleet_that_need_not_grow_is_a_try_for_a_lower_price() -> None:
    held = a_snapshot(nodes=nodes_in(ON_DEMAND, 9))
    assert reason_for(held, a_wish(), [FINE], [LAUNCH]) is Reason.CHEAPER
    fewer = a_snapshot(nodes=nodes_in(ON_DEMAND, 8))
    assert reason_for(fewer, a_wish(), [FINE], [LAUNCH]) is Reason.DEMAND_RISING


def told(commands: Sequence[Command], counts: dict[str, int], wish: Demand | None = None) -> str:
    rates = {SPOT_A: 0.25, SPOT_B: 0.5}
    snapshot = a_snapshot(nodes=nodes_in(SPOT_A, 3))
    return because(snapshot, wish or a_wish(), counts, commands, rates)


def test_the_text_tells_what_is_held_at_which_price_and_hazard() -> None:
    text = told([], {SPOT_A: 4, ON_DEMAND: 1})
    assert f"hold 4 × {SPOT_A} at 1 USD/h (0.25 reclaims/h), 1 × {ON_DEMAND} at 3 USD/h" in text
    assert "50 requests/s now" in text


def test_the_text_tells_what_is_done_and_nothing_that_is_not() -> None:
    quiet, busy = told([], {SPOT_A: 4}), told([LAUNCH, DRAIN, STOP], {SPOT_A: 4})
    assert "launch" not in quiet
    assert "back" not in quiet
    assert f"launch 2 in {SPOT_A}; give 2 back" in busy


def test_a_fleet_of_nothing_is_told_as_nothing() -> None:
    assert "hold nothing" in told([], {SPOT_A: 0})


def test_a_forecast_that_is_not_trusted_is_told() -> None:
    assert told([], {}, UNCOVERED).endswith(UNCOVERED.because)
    assert UNCOVERED.because not in told([], {})


# ── rejected options ──────────────────────────────────────────────────────────────────────────


def a_problem(*, spot_b_usd_h: float = 1.1, need: float = 5.0) -> Problem:
    options = (
        Option(SPOT_A, 1.0, 1.0, 20, zone="us-east-1a"),
        Option(SPOT_B, 1.0, spot_b_usd_h, 20, zone="us-east-1b"),
        Option(ON_DEMAND, 1.0, 3.0, 20),
    )
    return Problem(options, Needs.certain(need), Shocks.none(3), 0.01)


def others(problem: Problem, closed: dict[str, str] | None = None) -> dict[str, Rejected]:
    snapshot = a_snapshot()
    found = rejected(snapshot, problem, choose(problem), closed or {})
    assert len(found) <= REJECTED_MAX
    return {option.option: option for option in found}


def test_one_node_less_has_its_price_and_its_harm() -> None:
    less = others(a_problem())[f"one {SPOT_A} less"]
    assert less.cost_usd_h == pytest.approx(4.0)
    assert "100 % would be late" in less.why


def test_the_same_on_demand_has_its_price() -> None:
    assert others(a_problem())["on-demand only"].cost_usd_h == pytest.approx(15.0)


def test_reserved_nodes_are_no_price_for_a_fleet_on_demand() -> None:
    reserved = Option(RESERVED, 1.0, 0.0, 2)
    problem = replace(a_problem(), options=(*a_problem().options, reserved), shocks=Shocks.none(4))
    groups = [*some_groups(), a_reserved_group(2)]
    found = rejected(a_snapshot(groups=groups), problem, choose(problem), {})
    assert [o.cost_usd_h for o in found if o.option == "on-demand only"] == [pytest.approx(15.0)]


def test_a_group_that_was_passed_over_is_told_at_what_it_would_have_cost() -> None:
    assert others(a_problem())[SPOT_B].cost_usd_h == pytest.approx(5.5)
    assert others(a_problem(spot_b_usd_h=0.5))[SPOT_A].cost_usd_h == pytest.approx(5.0)
    assert SPOT_B not in others(a_problem(spot_b_usd_h=0.5))


def test_a_group_without_capacity_is_told_with_that_reason() -> None:
    problem = replace(a_problem(), options=a_problem().options[1:], shocks=Shocks.none(2))
    assert others(problem, {SPOT_A: "no capacity"})[SPOT_A].why == "no capacity"


def test_where_nothing_is_held_nothing_could_be_less() -> None:
    assert not [name for name in others(a_problem(need=0.0)) if name.endswith("less")]


def test_a_fleet_on_demand_is_not_told_as_an_alternative_to_itself() -> None:
    problem = replace(a_problem(), options=a_problem().options[2:], shocks=Shocks.none(1))
    assert "on-demand only" not in others(problem)
    cheap = Option(ON_DEMAND, 1.0, 0.5, 20)
    problem = replace(a_problem(), options=(*a_problem().options[:2], cheap))
    assert "on-demand only" not in others(problem)
