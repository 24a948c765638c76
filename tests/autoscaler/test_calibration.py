"""Is the model trusted as far as it has been right?"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.calibration import Calibration, CalibrationSettings, compared, factors

SETTINGS = CalibrationSettings()
ALLOWED_RPS = np.array([0.1])


def after(
    late: float,
    told_calm: float,
    *,
    is_calm: bool = True,
    told_shock: float = 0.0,
    hours: int = 6,
    before: Calibration | None = None,
) -> Calibration:
    """What is known after hours of 36,000 requests each, of which the share `late` was late."""
    known = before or Calibration.fresh(1)
    for _ in range(hours):
        finished = np.array([36_000.0])
        known = compared(
            known, finished, late * finished, is_calm, np.array([told_calm]),
            np.array([told_shock]), 3600.0, SETTINGS,
        )  # fmt: skip
    return known


def test_before_anything_was_compared_the_model_is_taken_at_its_word() -> None:
    found = factors(Calibration.fresh(1), ALLOWED_RPS, SETTINGS)
    assert found.calm == found.shock == pytest.approx(1)


def test_a_model_that_is_right_stays_trusted() -> None:
    assert factors(after(0.02, 0.02), ALLOWED_RPS, SETTINGS).calm == pytest.approx(1)


@pytest.mark.parametrize(("late", "told"), [(0.01, 0.04), (0.04, 0.02)])
def test_predictions_are_drawn_to_what_was_measured(late: float, told: float) -> None:
    (found,) = factors(after(late, told), ALLOWED_RPS, SETTINGS).calm
    assert min(late / told, 1) <= found <= max(late / told, 1)
    assert found == pytest.approx(late / told, rel=0.5)


def test_what_is_late_after_a_shock_says_nothing_about_calm_times() -> None:
    found = factors(after(0.2, 0.01, is_calm=False), ALLOWED_RPS, SETTINGS)
    assert found.calm == pytest.approx(1)
    assert found.shock > 1


def test_a_quiet_market_is_trusted_less_than_a_quiet_demand() -> None:
    found = factors(after(0.0, 0.2, told_shock=0.2, hours=48), ALLOWED_RPS, SETTINGS)
    assert found.calm == SETTINGS.calm_min
    assert found.shock == SETTINGS.shock_min


def test_the_past_is_forgotten() -> None:
    wrong = after(0.0, 0.05)
    right = after(0.05, 0.05, hours=48, before=wrong)
    first, later = (factors(c, ALLOWED_RPS, SETTINGS).calm for c in (wrong, right))
    assert first < 0.5 < later


@given(st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_the_factors_stay_within_their_bounds(late: float, told: float, is_calm: bool) -> None:
    found = factors(after(late, told, is_calm=is_calm), ALLOWED_RPS, SETTINGS)
    assert SETTINGS.calm_min <= found.calm <= SETTINGS.factor_max
    assert SETTINGS.shock_min <= found.shock <= SETTINGS.factor_max
