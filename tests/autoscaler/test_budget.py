"""Does what was saved make lateness cheap, and what was overspent make it dear?"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler import budget
from autoscaler.budget import Budget, BudgetSettings

SETTINGS = BudgetSettings()
HOUR_S = 3600.0


def after(finished: float, late: float, now_s: float = 60.0) -> Budget:
    """One model's budget after so many requests."""
    return budget.spent(
        Budget.fresh(1, 0.0), np.array([finished]), np.array([late]), now_s, SETTINGS
    )


def price(seen: Budget, rate_rps: float = 10.0, attainment: float = 0.99) -> float:
    return float(budget.price(seen, np.array([rate_rps]), np.array([attainment]), SETTINGS)[0])


def reserve_s(seen: Budget, rate_rps: float = 10.0, attainment: float = 0.99) -> float:
    return float(budget.reserve_s(seen, np.array([rate_rps]), np.array([attainment]), SETTINGS)[0])


def planned(attainment: float) -> float:
    return float(budget.planned_share(np.array([attainment]), SETTINGS)[0])


def test_before_anything_was_seen_lateness_has_its_base_price() -> None:
    assert price(Budget.fresh(1, 0.0)) == 1.0
    assert reserve_s(Budget.fresh(1, 0.0)) == 0.0


def test_less_is_planned_to_be_late_than_the_objective_allows() -> None:
    assert planned(0.99) == pytest.approx(0.01 * (1 - SETTINGS.margin))
    assert 0 < planned(1.0) < 1e-3


def test_who_is_late_as_planned_pays_the_base_price() -> None:
    share = planned(0.99)
    assert price(after(10_000, 10_000 * share)) == pytest.approx(1.0)


def test_an_hour_without_lateness_saves_an_hour() -> None:
    seen = after(10.0 * HOUR_S, 0.0, now_s=HOUR_S)
    assert reserve_s(seen) == pytest.approx(HOUR_S)
    assert price(seen) < 1.0


def test_a_debt_is_as_dear_as_a_reserve_is_cheap() -> None:
    share = planned(0.99)
    saved, owed = after(36_000, 0.0), after(36_000, 2 * 36_000 * share)
    assert price(saved) * price(owed) == pytest.approx(1.0)


def test_no_reserve_and_no_debt_moves_the_price_without_end() -> None:
    much, more = after(1e8, 0.0), after(1e9, 0.0)
    assert 0.001 < price(more) == price(much) < 0.5
    much, more = after(1e8, 1e8), after(1e9, 1e9)
    assert 2.0 < price(much) == price(more) < 1000.0


def test_a_strict_objective_is_dearer_after_the_same_lateness() -> None:
    seen = after(36_000, 200)
    assert price(seen, attainment=0.999) > 1.0 > price(seen, attainment=0.99)
    assert price(seen, attainment=0.99) >= price(seen, attainment=0.9)


@given(st.integers(0, 10**6), st.integers(0, 10**4), st.integers(1, 10**4), st.floats(0.1, 1e3))
def test_more_lateness_never_makes_lateness_cheaper(
    finished: int, late: int, more: int, rate_rps: float
) -> None:
    few, many = after(finished, late), after(finished, late + more)
    assert price(many, rate_rps) >= price(few, rate_rps)


@given(st.integers(0, 10**6), st.integers(0, 10**4), st.integers(1, 10**6))
def test_more_requests_in_time_never_make_lateness_dearer(
    finished: int, late: int, more: int
) -> None:
    assert price(after(finished + more, late)) <= price(after(finished, late))


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0.0, 1e4), st.floats(0.0, 1.0))
def test_a_price_is_always_positive_and_finite(
    finished: int, late: int, rate_rps: float, attainment: float
) -> None:
    assert 0 < price(after(finished, late), rate_rps, attainment) < math.inf


def test_what_happened_fades() -> None:
    none = np.zeros(1)
    old = after(36_000, 3_000)
    later = budget.spent(old, none, none, 60.0 + SETTINGS.window_s, SETTINGS)
    assert later.seen[0] == pytest.approx(old.seen[0] / math.e)
    assert later.late[0] == pytest.approx(old.late[0] / math.e)
    assert 1.0 < price(later) <= price(old) + 1e-9


@given(st.floats(0.0, 1e6), st.floats(0.0, 1e6))
def test_fading_in_two_steps_is_fading_in_one(first_s: float, second_s: float) -> None:
    none, old = np.zeros(1), after(1_000, 20, now_s=0.0)
    middle = budget.spent(old, none, none, first_s, SETTINGS)
    twice = budget.spent(middle, none, none, first_s + second_s, SETTINGS)
    once = budget.spent(old, none, none, first_s + second_s, SETTINGS)
    assert twice.seen == pytest.approx(once.seen)
    assert twice.late == pytest.approx(once.late)


def test_models_that_move_keep_their_budget_and_new_ones_begin() -> None:
    seen = Budget(np.array([10.0, 20.0]), np.array([1.0, 2.0]), 5.0)
    moved = budget.reindexed(seen, np.array([1, -1, 0]))
    assert moved.seen.tolist() == [20.0, 0.0, 10.0]
    assert moved.late.tolist() == [2.0, 0.0, 1.0]
    assert moved.at_s == 5.0
    assert budget.reindexed(moved, np.array([2, 0])).seen.tolist() == seen.seen.tolist()
