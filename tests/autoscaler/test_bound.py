"""Is the bound below everything that anybody could do, and no lower than it must be?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.bound import (
    Bound,
    Staircase,
    _concave_segments,
    _rounded,
    bound,
    certified,
    integer_plan,
)
from autoscaler.decision import Command, Decision, Drain, Launch
from autoscaler.simulation import simulate
from autoscaler.snapshot import Market, NodeState, Slo, Snapshot
from autoscaler.world import ProfileMachine, Requests, World
from tests.autoscaler.worlds import (
    ON_DEMAND,
    SPOT_A,
    SPOT_B,
    FixedFleet,
    a_machine,
    a_market,
    a_profile,
    a_small_world,
    requests_at,
    requests_when,
)

HOUR_S = 3600.0


def even(rate_rps: float, duration_s: float = HOUR_S) -> Requests:
    """Requests at even distances."""
    count = int(rate_rps * duration_s)
    return requests_when((np.arange(count) + 0.5) / rate_rps, duration_s)


def a_world_of(
    *machines: ProfileMachine,
    nodes: float = 2.0,
    duration_s: float = HOUR_S,
    slo_s: float = 2.0,
    **rest: Any,
) -> World:
    """Requests of one second each on a machine that does one at a time keep so many nodes busy."""
    rest = {"market": a_market(a=[(0, 0)]), "requests": even(nodes, duration_s), **rest}
    return a_small_world(
        profile=a_profile(*(machines or (a_machine(fixed_ms=1000.0),))),
        slo=Slo(slo_s * 1e3),
        **rest,
    )


def usd(world: World, attainment: float = 1.0, **options: float) -> float:
    return bound(world, attainments=[attainment], **options).at(attainment)


# --- known answers


def test_constant_demand_costs_the_nodes_that_it_keeps_busy() -> None:
    world = a_world_of(nodes=2.0)  # 3 USD/h
    assert 6.0 * (1 - 4 / HOUR_S) <= usd(world) <= 6.0


def test_half_a_node_of_steady_demand_costs_a_whole_one() -> None:
    world = a_world_of(nodes=0.5)
    assert usd(world) == pytest.approx(3.0, rel=0.02)
    assert usd(world) <= 3.0


def test_spot_is_used_while_there_is_some_and_on_demand_must_pay_for_the_rest() -> None:
    away = a_market(a=[(0, 4), (HOUR_S, 0), (2 * HOUR_S, 4)])
    world = a_world_of(duration_s=3 * HOUR_S, market=away)
    spot_h, cold_h = 2.0 - 90 / HOUR_S, 90 / HOUR_S  # spot is back only after its cold start
    least = 2 * (spot_h * 1.0 + (1 + cold_h) * 3.0)
    cold_starts = 2 * cold_h * (3.0 + 1.0)
    assert usd(world) == pytest.approx(least + cold_starts, rel=2e-3)


def test_nodes_by_market_tell_what_the_plan_rents() -> None:
    away = a_market(a=[(0, 4), (HOUR_S, 0)])
    found = bound(a_world_of(duration_s=2 * HOUR_S, market=away), attainments=[1.0])
    nodes = found.nodes_by_market(1.0)
    assert nodes[Market.SPOT] == pytest.approx(1.0, abs=0.02)
    assert nodes[Market.ON_DEMAND] == pytest.approx(1.0, abs=0.02)


def test_a_cold_start_is_paid_when_demand_rises_and_not_when_it_was_there_at_the_start() -> None:
    first, second = even(2.0, HOUR_S), even(2.0, HOUR_S)
    late = requests_when(HOUR_S + second.arrival_s, 2 * HOUR_S)
    soon = requests_when(first.arrival_s, 2 * HOUR_S)
    cold_usd = 2 * 90 / HOUR_S * 3.0
    assert usd(a_world_of(requests=late)) == pytest.approx(6.0 + cold_usd, rel=2e-3)
    assert usd(a_world_of(requests=soon)) == pytest.approx(6.0, rel=2e-3)


def test_a_cold_start_that_can_be_short_by_chance_is_taken_as_short() -> None:
    late = requests_when(HOUR_S + even(2.0).arrival_s, 2 * HOUR_S)
    machine = a_machine(fixed_ms=1000.0, cold_start_cv=0.25)
    cold_usd = 2 * 45 / HOUR_S * 3.0
    assert usd(a_world_of(machine, requests=late)) == pytest.approx(6.0 + cold_usd, rel=2e-3)


def test_nodes_are_held_through_a_lull_that_is_shorter_than_a_cold_start() -> None:
    arrival = even(1.0, 1200.0).arrival_s
    lull = requests_when(arrival[(arrival < 480) | (arrival >= 540)], 1200.0)  # 60 s of 90 s
    assert usd(a_world_of(requests=lull)) == pytest.approx(1200 / HOUR_S * 3.0, rel=0.01)


def test_late_requests_are_left_out_where_that_saves_most() -> None:
    arrival = np.concatenate([even(2.0).arrival_s, 600 + even(1.0, 60.0).arrival_s])
    burst = a_world_of(requests=requests_when(np.sort(arrival), HOUR_S))
    share = 60 / len(arrival)
    assert usd(burst, 1.0) > 6.1
    assert usd(burst, 1.0 - share) <= 6.0


def test_one_percent_late_saves_one_percent_of_many_nodes() -> None:
    world = a_world_of(nodes=100.0)
    assert usd(world, 0.99) == pytest.approx(0.99 * usd(world, 1.0), rel=2e-3)


def test_a_cheaper_hour_is_paid_at_its_price() -> None:
    market = a_market({"a": [(0, 1.0), (HOUR_S, 0.5)]}, a=[(0, 4)])
    world = a_world_of(duration_s=2 * HOUR_S, market=market)
    assert usd(world) == pytest.approx(2 * 1.0 + 2 * 0.5, rel=2e-3)


def test_reserved_nodes_are_paid_and_serve_first() -> None:
    machine = a_machine(fixed_ms=1000.0, reserved=2, price_reserved_usd_h=2.0)
    assert usd(a_world_of(machine, nodes=2.0)) == pytest.approx(4.0, rel=1e-9)
    assert usd(a_world_of(machine, nodes=0.1)) == pytest.approx(4.0, rel=1e-9)
    assert usd(a_world_of(machine, nodes=3.0)) == pytest.approx(4.0 + 3.0, rel=3e-3)


def test_the_cheaper_of_two_machine_types_bears_the_demand() -> None:
    slow = a_machine("slow", price_usd_h=3.0, fixed_ms=1000.0, spot_usd_h=None)
    fast = a_machine("fast", price_usd_h=5.0, fixed_ms=500.0, spot_usd_h=None)
    assert usd(a_world_of(slow, fast, nodes=4.0)) == pytest.approx(2 * 5.0, rel=3e-3)


def test_each_request_is_served_where_it_is_cheapest_when_ratios_differ() -> None:
    world = a_world_of(
        a_machine("one", fixed_ms=1000.0, price_usd_h=3.0, spot_usd_h=None),
        a_machine("two", fixed_ms=1000.0, price_usd_h=3.0, spot_usd_h=None),
        nodes=4.0,
    )
    half = np.arange(len(world.requests.arrival_s)) % 2 == 0
    work = dict(world.work)
    for name, quick in (("one", half), ("two", ~half)):
        fixed = np.where(quick, 0.5, 1.0)
        work[name] = type(work[name])(fixed, np.zeros(len(half)))
    mixed = World(**{**vars(world), "work": work})
    assert usd(mixed) == pytest.approx(2 * 3.0, rel=3e-3)


def test_a_full_batch_shares_its_fixed_time() -> None:
    machine = a_machine(fixed_ms=900.0, per_item_ms=100.0, batch_size_max=9, spot_usd_h=None)
    world = a_world_of(machine, nodes=10.0, slo_s=5.0)  # 0.2 s each in batches of 9
    assert usd(world) == pytest.approx(2 * 3.0, rel=5e-3)


def test_batches_that_end_too_late_do_not_count() -> None:
    machine = a_machine(fixed_ms=900.0, per_item_ms=100.0, batch_size_max=90, spot_usd_h=None)
    world = a_world_of(machine, nodes=10.0, slo_s=1.8)  # batches of 9 end in time, of 10 don't
    assert usd(world) == pytest.approx(2 * 3.0, rel=5e-3)


def test_requests_that_nobody_can_serve_in_time_use_up_the_budget() -> None:
    world = a_world_of(nodes=2.0)
    long = world.work["m"].fixed_s.copy()
    long[::100] = 60.0
    slow = World(**{**vars(world), "work": {"m": type(world.work["m"])(long, 0 * long)}})
    found = bound(slow, attainments=[0.99])
    assert found.impossible == len(long[::100])
    assert found.budget(0.99) == pytest.approx(0.0, abs=1e-9)
    assert 0.99 * 5.99 <= found.at(0.99) <= 6.0


def test_work_may_wait_for_cheaper_nodes_as_long_as_the_slo() -> None:
    market = a_market({"a": [(0, 2.0), (1800.0, 1.0)]}, a=[(0, 40)])
    world = a_world_of(market=market, slo_s=1800.0, prelude_s=0.0)
    # The first half waits for the second, in which half of it may end after the trace.
    assert usd(world) <= 2 * 0.5 * 1.0 + 0.05
    assert usd(a_world_of(market=market)) == pytest.approx(2 * (0.5 * 2 + 0.5 * 1), rel=5e-3)


def test_nodes_that_come_and_go_within_a_step_may_bear_its_burst() -> None:
    machine = a_machine(fixed_ms=1000.0, price_usd_h=1000.0, boot_s=5.0, load_s=0.0)
    capacity = [(0.0, 0), (181.0, 1), (190.0, 4), (205.0, 0)]  # an edge can't be at all of them
    burst = requests_when(np.repeat(np.arange(196.0, 204.0), 4), 600.0)
    world = a_world_of(machine, market=a_market(a=capacity), requests=burst, slo_s=1.0)
    assert 31 / HOUR_S <= usd(world, step_s=60.0) <= 4 * 15 / HOUR_S  # 1 USD/h


def test_a_world_without_requests_costs_its_reservation() -> None:
    machine = a_machine(reserved=1, price_reserved_usd_h=2.0)
    assert usd(a_world_of(machine, requests=requests_when([], HOUR_S))) == pytest.approx(2.0)


# --- laws


def test_more_attainment_never_costs_less() -> None:
    world = a_small_world(requests=requests_at(20.0, 1800.0))
    found = bound(world, attainments=[0.95, 0.99])
    values = [found.at(a) for a in (0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0)]
    assert values == sorted(values)
    assert values[0] == 0.0 < values[1]


def test_one_bound_serves_other_attainments_as_truly_as_its_own() -> None:
    world = a_small_world(requests=requests_at(20.0, 1800.0))
    elsewhere = bound(world, attainments=[0.9]).at(0.99)
    here = bound(world, attainments=[0.99]).at(0.99)
    assert 0.8 * here <= elsewhere <= here * (1 + 2e-3)


def a_day_of_waves() -> World:
    rng = np.random.default_rng(5)
    duration_s = 8 * HOUR_S
    times = np.sort(rng.uniform(0, duration_s, 30_000))
    kept = rng.random(len(times)) < 0.5 + 0.5 * np.sin(times / HOUR_S * math.pi)
    market = a_market(a=[(0, 4), (9000, 1), (12_345, 5)], b=[(0, 1), (15_000, 3)])
    return a_world_of(
        a_machine(fixed_ms=1000.0, spot_usd_h=1.0),
        requests=requests_when(times[kept], duration_s),
        market=market,
        slo_s=10.0,
    )


def test_windows_lose_little_and_never_add() -> None:
    world = a_day_of_waves()
    whole = bound(world, attainments=[0.99], step_s=120, window_s=1e9)
    parts = bound(world, attainments=[0.99], step_s=120, window_s=2 * HOUR_S)
    assert (whole.windows, parts.windows) == (1, 4)
    assert 0.97 * whole.at(0.99) <= parts.at(0.99) <= whole.at(0.99) * (1 + 2e-3)


def test_an_slo_longer_than_steps_and_windows_is_still_a_bound() -> None:
    world = a_world_of(nodes=2.0, slo_s=900.0)
    whole = usd(world, step_s=60)
    assert usd(world, step_s=60, window_s=600) <= whole
    assert whole == pytest.approx(6.0 * 0.75, rel=0.01)


@pytest.mark.parametrize("bad", [{"step_s": 0.0}, {"window_s": -1.0}, {"attainments": [1.5]}])
def test_what_makes_no_sense_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        bound(a_small_world(), **{"attainments": [0.99], **bad})


# --- whole nodes


def cheapest_by_hand(needed: tuple[int, ...], step_s: float, cold_s: float) -> float:
    """USD at 3 USD/h of the best whole fleet by step: every one of them is tried."""
    best = math.inf
    for fleet in itertools.product(range(max(needed) + 1), repeat=len(needed)):
        if any(have < need for have, need in zip(fleet, needed, strict=True)):
            continue
        starts = sum(
            max(after - before, 0) * min(cold_s, (k + 1) * step_s)
            for k, (before, after) in enumerate(itertools.pairwise(fleet))
        )
        best = min(best, (sum(fleet) * step_s + starts) * 3.0 / HOUR_S)
    return best


STEP_S = 200.0


def steps_of_demand(needed: tuple[int, ...]) -> World:
    """So many nodes are busy in each step, and nothing is due in the next one."""
    arrival = [
        k * STEP_S + np.repeat(np.arange(STEP_S - 1.0), nodes) for k, nodes in enumerate(needed)
    ]
    requests = requests_when(np.concatenate(arrival), STEP_S * len(needed))
    return a_world_of(requests=requests, slo_s=1.0)


@pytest.mark.parametrize(
    "needed",
    [(1, 1, 1), (0, 0, 2, 0, 1), (2, 1, 2, 0, 2), (1, 0, 0, 1), (0, 0, 3, 1, 3), (2, 0, 2)],
)
def test_tiny_cases_cost_what_trying_everything_finds(needed: tuple[int, ...]) -> None:
    world, by_hand = steps_of_demand(needed), cheapest_by_hand(needed, STEP_S, 90.0)
    lost = 1 / STEP_S  # the last second of a step has no demand
    assert usd(world, step_s=STEP_S) == pytest.approx(by_hand, rel=2 * lost)
    assert usd(world, step_s=STEP_S) <= by_hand * (1 + 1e-9)
    assert integer_plan(world, attainment=1.0, step_s=STEP_S).bound_usd <= by_hand * (1 + 1e-6)


def test_an_integer_plan_costs_at_least_its_relaxation_and_proves_its_cost() -> None:
    world = a_small_world(requests=requests_at(7.0, 1200.0))
    plan = integer_plan(world, attainment=0.99, step_s=60.0)
    assert plan.cost_usd is not None
    assert plan.relaxed_usd <= plan.bound_usd <= plan.cost_usd * (1 + 1e-6)
    assert plan.bound_usd == pytest.approx(plan.cost_usd, rel=1e-3)
    assert plan.relaxed_usd == pytest.approx(usd(world, 0.99, step_s=60.0), rel=3e-3)


# --- what carries the certificate


@given(
    prices=st.lists(st.floats(-5, 5), min_size=3, max_size=3),
    cost=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    seed=st.integers(0, 999),
)
def test_any_prices_whatever_certify_no_more_than_any_feasible_plan_costs(
    prices: list[float], cost: list[float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, most, x = rng.normal(size=(3, 4)), rng.uniform(0.5, 3, 4), rng.uniform(0, 0.5, 4)
    limits = rows @ x + rng.uniform(0, 1, 3)
    value = certified(np.array(cost), rows, limits, most, np.array(prices))
    assert value <= float(np.array(cost) @ x) + 1e-9


@given(works=st.lists(st.floats(0.01, 100), min_size=1, max_size=60))
def test_the_skip_curve_lies_above_the_sum_of_the_largest_and_meets_it_at_the_ends(
    works: list[float],
) -> None:
    falling = np.sort(works)[::-1]
    rise, run = _concave_segments(falling)
    largest = np.concatenate([[0.0], np.cumsum(falling)])
    n = np.arange(len(works) + 1)
    curve = np.interp(n, np.append(0, np.cumsum(run)), np.append(0, np.cumsum(rise)))
    assert (curve >= largest * (1 - 1e-9)).all()
    assert rise.sum() == pytest.approx(largest[-1])
    assert (np.diff(rise / np.maximum(run, 1e-300)) <= 1e-6 * falling[0]).all()


@given(
    power=st.lists(st.floats(0.1, 3), min_size=2, max_size=2),
    nodes=st.lists(st.integers(0, 6), min_size=2, max_size=2),
    asked=st.floats(0.0, 9.0),
)
def test_rounding_takes_away_no_whole_plan(
    power: list[float], nodes: list[int], asked: float
) -> None:
    rest = max(asked - float(np.dot(power, nodes)), 0.0)
    factors, side = _rounded(np.array(power), np.array([asked]))
    assert float(factors[0] @ nodes) + rest >= side[0] - 1e-9


@given(
    values=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    gaps=st.lists(st.floats(0.5, 50), min_size=8, max_size=8),
    length=st.floats(0, 60),
    at=st.floats(0, 300),
)
def test_erosion_is_the_least_of_the_last_seconds(
    values: list[int], gaps: list[float], length: float, at: float
) -> None:
    stairs = Staircase(
        np.cumsum([0.0, *gaps[: len(values) - 1]]), np.array(values, dtype=float)[:, None]
    )
    times = np.linspace(at - length, at, 4001)
    brute = float(stairs.at(times).min())
    eroded = float(stairs.eroded(length).at(np.array([at]))[0, 0])
    narrow = length / 4000 + 1e-6  # a value may hold for less than the grid sees
    close = float(stairs.at(np.array([max(at - length, 0) - narrow, at + narrow])).min())
    assert eroded <= brute
    assert eroded >= min(brute, close) or min(gaps) < narrow


def test_means_and_extremes_of_a_staircase_are_exact() -> None:
    stairs = Staircase(np.array([0.0, 10.0, 25.0]), np.array([[2.0], [6.0], [1.0]]))
    edges = np.array([0.0, 20.0, 40.0])
    assert stairs.mean(edges)[:, 0] == pytest.approx([4.0, (5 * 6 + 15) / 20])
    assert stairs.least(edges[:-1], edges[1:])[:, 0].tolist() == [2.0, 1.0]
    assert stairs.greatest(edges[:-1], edges[1:])[:, 0].tolist() == [6.0, 6.0]


# --- nobody beats it


@dataclass(frozen=True)
class Wanderer:
    """A policy that wants another random fleet every minute: mostly wasteful, sometimes lucky."""

    seed: int
    most: Mapping[str, int]
    name: str = "wanderer"
    interval_s: float = 20.0
    is_woken: bool = True

    def decide(self, snapshot: Snapshot, memory: Any) -> Decision[None]:
        minute = int(snapshot.now_s // 60)
        rng = np.random.default_rng([self.seed, abs(minute), int(minute < 0)])
        commands: list[Command] = []
        for group, most in self.most.items():
            held = [
                node.id
                for node in snapshot.nodes
                if node.group == group and node.state is not NodeState.DRAINING
            ]
            wanted = int(rng.integers(0, most + 1))
            if wanted > len(held):
                commands.append(Launch(group, wanted - len(held)))
            commands.extend(Drain(node) for node in held[wanted:])
        return Decision(None, commands=tuple(commands))


@cache
def a_rough_world(seed: int) -> tuple[World, Bound]:
    """Waves of demand, capacity that changes within steps, and a different machine each time."""
    rng = np.random.default_rng(seed)
    zones = {
        zone: [(0.0, int(rng.integers(0, 4)))]
        + [(float(t), int(rng.integers(0, 5))) for t in np.sort(rng.uniform(20, 1800, 25))]
        for zone in "ab"
    }
    times = np.sort(rng.uniform(0, 1800, 4000))
    kept = rng.random(len(times)) < 0.4 + 0.4 * np.sin(times / 300 + seed)
    machine = a_machine(
        fixed_ms=float(rng.uniform(100, 900)),
        per_item_ms=float(rng.uniform(0, 200)),
        spread=float(rng.choice([0.0, 0.7])),
        concurrency=int(rng.integers(1, 4)),
        batch_size_max=int(rng.choice([1, 4])),
        boot_s=float(rng.uniform(0, 120)),
        load_s=0.0,
        cold_start_cv=0.3,
        reserved=int(rng.integers(0, 2)),
        billing_minimum_s=0.0,
        billing_increment_s=0.0,
    )
    world = a_small_world(
        profile=a_profile(machine, notice_s=30.0),
        market=a_market(None, **zones),
        requests=requests_when(times[kept], 1800.0),
        slo=Slo(float(rng.choice([1500.0, 5000.0, 100_000.0]))),
        seed=seed,
        deadline_s=200.0,
    )
    return world, bound(world, attainments=[0.9, 0.99], step_s=60.0)


@settings(max_examples=40, deadline=None)
@given(world_seed=st.integers(0, 7), seed=st.integers(0, 10_000), scale=st.integers(1, 4))
def test_no_random_plan_costs_less_than_the_bound_at_what_it_attains(
    world_seed: int, seed: int, scale: int
) -> None:
    world, found = a_rough_world(world_seed)
    run = simulate(world, Wanderer(seed, {SPOT_A: scale, SPOT_B: scale, ON_DEMAND: scale}))
    assert found.at(run.slo_attainment) <= run.cost_usd * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
def test_no_fixed_fleet_beats_the_bound(seed: int, nodes: int) -> None:
    world, found = a_rough_world(seed)
    for fleet in ({ON_DEMAND: nodes}, {SPOT_A: nodes, ON_DEMAND: 1}, {SPOT_A: nodes, SPOT_B: 2}):
        run = simulate(world, FixedFleet(fleet))
        assert found.at(min(0.99, run.slo_attainment)) <= run.cost_usd * (1 + 1e-9)


def test_a_perfectly_sized_fleet_is_close_to_the_bound() -> None:
    world = a_world_of(nodes=1.8, prelude_s=1800.0)
    run = simulate(world, FixedFleet({ON_DEMAND: 2}))
    assert run.slo_attainment > 0.95  # a queue that the prelude left is worked off first
    assert usd(world) <= run.cost_usd <= 1.01 * usd(world)
