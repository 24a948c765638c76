"""Does the fleet that is chosen cost the least of all that keep the objective?"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler import fleet
from autoscaler.fleet import Choice, Needs, Option, Problem, Shocks, choose, judged

SPOT, ON_DEMAND = 0.918, 3.06


def spot(zone: str, count_max: int = 12, cost_usd_h: float = SPOT, held: int = 0) -> Option:
    return Option(f"spot/{zone}", 1.0, cost_usd_h, count_max, 0.04, held, zone=zone)


def on_demand(count_max: int = 12, held: int = 0) -> Option:
    return Option("on-demand", 1.0, ON_DEMAND, count_max, 0.12, held)


def falling(
    options: int, hits: dict[int, float], *, left: float = 0.0, gap_s: float = 60
) -> Shocks:
    """Each option in `hits` falls alone, with that probability, and keeps `left` of its nodes."""
    survival = np.ones((len(hits) + 1, options))
    for row, option in enumerate(hits, 1):
        survival[row, option] = left
    weight = np.array([1 - sum(hits.values()), *hits.values()])
    return Shocks(survival, weight, np.full(len(weight), gap_s))


def a_problem(
    options: tuple[Option, ...],
    need: float = 6,
    shocks: Shocks | None = None,
    late_max: float = 0.01,
    **fields: float,
) -> Problem:
    shocks = shocks or Shocks.none(len(options))
    return Problem(options, Needs.certain(need), shocks, late_max, **fields)


def brute_force(problem: Problem) -> Choice:
    """The cheapest feasible fleet of all that there are."""
    ranges = [range(o.count_min, o.count_max + 1) for o in problem.options]
    every = (judged(problem, counts) for counts in itertools.product(*ranges))
    return min((c for c in every if c.is_feasible), key=lambda c: c.cost_usd_h)


def test_without_risk_the_cheapest_group_carries_everything() -> None:
    found = choose(a_problem((spot("a"), spot("b", cost_usd_h=1.2), on_demand())))
    assert found.counts == {"spot/a": 6, "spot/b": 0, "on-demand": 0}
    assert found.is_feasible


def test_reserved_nodes_that_are_paid_for_come_before_anything_else() -> None:
    reserved = Option("reserved", 1.0, 0.0, 4, count_min=0)
    found = choose(a_problem((reserved, spot("a"), on_demand())))
    assert found.counts == {"reserved": 4, "spot/a": 2, "on-demand": 0}


def test_on_demand_carries_what_spot_cannot() -> None:
    found = choose(a_problem((spot("a", count_max=2), on_demand())))
    assert found.counts == {"spot/a": 2, "on-demand": 4}


def test_an_on_demand_floor_is_kept() -> None:
    floor = Option("on-demand", 1.0, ON_DEMAND, 12, 0.12, count_min=2)
    found = choose(a_problem((spot("a"), floor)))
    assert found.counts == {"spot/a": 4, "on-demand": 2}


def test_a_zone_that_falls_rarely_enough_needs_no_hedge() -> None:
    options = (spot("a"), spot("b", cost_usd_h=1.2), on_demand())
    found = choose(a_problem(options, shocks=falling(3, {0: 0.005})))
    assert found.counts["spot/a"] == 6


def test_a_zone_that_falls_too_often_is_hedged_by_another() -> None:
    options = (spot("a"), spot("b", cost_usd_h=1.0), on_demand())
    found = choose(a_problem(options, shocks=falling(3, {0: 0.02, 1: 0.005})))
    assert found.is_feasible
    assert found.counts["spot/b"] == 6
    assert found.counts["spot/a"] == 0


def test_when_every_zone_falls_too_often_spare_nodes_are_spread_over_zones() -> None:
    options = (spot("a"), spot("b"), spot("c"), on_demand())
    found = choose(a_problem(options, shocks=falling(4, {0: 0.02, 1: 0.02, 2: 0.02})))
    assert found.is_feasible
    assert sum(found.counts.values()) == 9  # any zone of three may fall and six remain
    assert found.counts["on-demand"] == 0


def test_a_patient_service_outlasts_a_short_gap_without_spare_nodes() -> None:
    options = (spot("a"), spot("b"), on_demand())
    shocks = falling(3, {0: 0.05, 1: 0.05}, left=0.8, gap_s=30)
    hasty = choose(a_problem(options, shocks=shocks, slack_s=0.5))
    patient = choose(a_problem(options, shocks=shocks, slack_s=30))
    assert sum(patient.counts.values()) == 6
    assert hasty.cost_usd_h > patient.cost_usd_h


def test_nodes_that_run_are_kept_while_a_cheaper_place_does_not_pay_its_cold_start() -> None:
    here, there = spot("a", held=6), spot("b", cost_usd_h=SPOT - 0.02)
    assert choose(a_problem((here, there))).counts == {"spot/a": 6, "spot/b": 0}
    there = spot("b", cost_usd_h=SPOT - 0.2)
    assert choose(a_problem((here, there))).counts == {"spot/a": 0, "spot/b": 6}


def test_no_zone_holds_more_than_its_share() -> None:
    options = (spot("a"), spot("b", cost_usd_h=1.2), on_demand())
    found = choose(a_problem(options, zone_fraction_max=0.5))
    assert found.counts["spot/a"] == 3
    assert found.is_feasible


def test_a_faster_machine_is_taken_when_its_capacity_is_cheaper() -> None:
    fast = Option("fast", 3.0, 2.4, 5, 0.04, zone="a")
    found = choose(a_problem((spot("a"), fast, on_demand())))
    assert found.counts["fast"] == 2


def test_what_cannot_be_carried_is_said_and_carried_as_far_as_possible() -> None:
    found = choose(a_problem((spot("a", count_max=2), on_demand(count_max=1))))
    assert not found.is_feasible
    assert found.counts == {"spot/a": 2, "on-demand": 1}
    assert found.late == pytest.approx(1)


def test_a_problem_without_options_is_infeasible_and_costs_nothing() -> None:
    found = choose(a_problem(()))
    assert (found.counts, found.cost_usd_h, found.is_feasible) == ({}, 0.0, False)


def test_a_tail_of_demand_is_covered_only_as_far_as_the_objective_asks() -> None:
    needs = Needs(np.array([4.0, 6.0, 9.0]), np.array([0.9, 0.09, 0.01]), np.full(3, np.inf))
    options = (spot("a"), on_demand())
    loose = choose(Problem(options, needs, Shocks.none(2), 0.02))
    strict = choose(Problem(options, needs, Shocks.none(2), 0.005))
    assert (loose.counts["spot/a"], strict.counts["spot/a"]) == (6, 9)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Small problems with a solution: on-demand nodes alone could carry everything."""
    money = st.floats(0.5, 3, allow_nan=False)
    count = draw(st.integers(1, 3))
    options = [
        Option(
            f"spot/{i}", draw(st.sampled_from([0.5, 1.0, 2.0])), draw(money),
            draw(st.integers(0, 6)), draw(st.floats(0, 0.2)), draw(st.integers(0, 3)), zone=f"z{i}",
        )
        for i in range(count)
    ]  # fmt: skip
    need = np.sort(np.array(draw(st.lists(st.floats(0.5, 8), min_size=2, max_size=4))))
    options.append(Option("on-demand", 1.0, 3.5, int(np.ceil(need.max())), 0.1))
    weight = np.arange(len(need), 0, -1.0) ** 2
    hits = {i: draw(st.floats(0, 0.05)) for i in range(count)}
    shocks = falling(count + 1, hits, left=draw(st.sampled_from([0.0, 0.3])))
    late_max = draw(st.sampled_from([0.005, 0.02, 0.1]))
    needs = Needs(need, weight / weight.sum(), np.full(len(need), 120.0))
    return Problem(tuple(options), needs, shocks, late_max, draw(st.sampled_from([0.0, 5.0, 30.0])))


@given(problems())
@settings(max_examples=60)
def test_small_problems_are_solved_as_brute_force_solves_them(problem: Problem) -> None:
    assert choose(problem).cost_usd_h == pytest.approx(brute_force(problem).cost_usd_h)


@given(problems())
@settings(max_examples=60)
def test_what_is_chosen_keeps_every_constraint(problem: Problem) -> None:
    found = choose(problem)
    assert found.is_feasible
    assert all(o.count_min <= found.counts[o.group] <= o.count_max for o in problem.options)


@given(problems())
@settings(max_examples=60)
def test_the_descent_for_large_problems_is_feasible_and_near_the_optimum(problem: Problem) -> None:
    judge = fleet._Judge(problem)
    found = judge.choice(fleet._descended(judge))
    assert found.is_feasible
    assert found.cost_usd_h <= 1.35 * brute_force(problem).cost_usd_h + 1e-9


def test_the_descent_is_within_two_percent_of_the_optimum_on_average() -> None:
    rng = np.random.default_rng(7)
    ratios = []
    for _ in range(40):
        options = (
            spot("a", 12, rng.uniform(0.8, 1.5), int(rng.integers(6))),
            spot("b", 12, rng.uniform(0.8, 1.5), int(rng.integers(6))),
            on_demand(),
        )
        weight = np.array([0.8, 0.15, 0.04, 0.01])
        needs = Needs(np.sort(rng.uniform(6, 14, 4)), weight, np.full(4, 120.0))
        hits = {0: rng.uniform(0, 0.02), 1: rng.uniform(0, 0.02)}
        problem = Problem(options, needs, falling(3, hits, left=0.3), 0.02, 0.5)
        judge = fleet._Judge(problem)
        found = judge.choice(fleet._descended(judge))
        exact = judge.choice(fleet._enumerated(judge))
        assert found.is_feasible or not exact.is_feasible
        ratios.append(found.cost_usd_h / exact.cost_usd_h)
    assert np.mean(ratios) <= 1.02
    assert np.max(ratios) <= 1.15


def test_thousands_of_nodes_are_chosen_among_twenty_groups() -> None:
    options = (*(spot(f"z{i}", 2_000, 0.8 + 0.03 * i) for i in range(19)), on_demand(12_000))
    hits = dict.fromkeys(range(19), 0.002)
    found = choose(a_problem(options, 10_000, falling(20, hits), late_max=0.02))
    assert found.is_feasible
    assert 10_000 <= sum(found.counts.values()) <= 13_000
