"""How far may the model's idea of lateness be trusted?

The share of late requests that a fleet should show is worked out from forecasts, queues and
hazards, each of them on the safe side, and none of them right. So what was predicted is compared
with what was measured, in calm times and after shocks apart, and later predictions are multiplied
by the ratio:

    factor = (late requests measured + prior) / (late requests predicted + prior)

with both sums forgotten slowly. The prior is half an hour of what may be late, so that a quiet
first hour, or one unlucky minute, doesn't decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """`memory_s`: after which what happened counts 1/e. `prior_s`: the time whose allowed late
    requests are the prior. The factors stay within their bounds; shocks are rare, so a quiet day
    says less about them.
    """

    memory_s: float = 12 * 3600.0
    prior_s: float = 1800.0
    calm_min: float = 0.1
    shock_min: float = 0.5
    factor_max: float = 3.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """Late requests by model, as measured and as predicted, in calm times and after shocks."""

    calm_seen: Floats
    calm_told: Floats
    shock_seen: Floats
    shock_told: Floats

    @classmethod
    def fresh(cls, models: int) -> Calibration:
        """Nothing compared yet."""
        return cls(*(np.zeros(models) for _ in range(4)))


@dataclass(frozen=True, slots=True)
class Factors:
    """What predicted late shares are multiplied by, by model."""

    calm: Floats
    shock: Floats


def compared(
    before: Calibration,
    finished: Floats,
    late: Floats,
    is_calm: bool,
    told_calm: Floats,
    told_shock: Floats,
    elapsed_s: float,
    settings: CalibrationSettings,
) -> Calibration:
    """What is known after `finished` requests, of which `late` were late.

    `is_calm`: no shock has hit lately. `told_calm`, `told_shock`: the shares that the model itself
    predicted for calm times, and what shocks add to them on average.
    """
    kept = float(np.exp(-elapsed_s / settings.memory_s))
    quiet = 1.0 if is_calm else 0.0
    return Calibration(
        before.calm_seen * kept + late * quiet,
        before.calm_told * kept + finished * told_calm * quiet,
        before.shock_seen * kept + late * (1 - quiet),
        before.shock_told * kept + finished * told_shock,
    )


def factors(
    calibration: Calibration, allowed_rps: Floats, settings: CalibrationSettings
) -> Factors:
    """The factors; `allowed_rps` [models]: late requests a second that the objective allows."""
    prior = np.maximum(allowed_rps * settings.prior_s, 1.0)
    calm = (calibration.calm_seen + prior) / (calibration.calm_told + prior)
    shock = (calibration.shock_seen + prior) / (calibration.shock_told + prior)
    return Factors(
        np.clip(calm, settings.calm_min, settings.factor_max),
        np.clip(shock, settings.shock_min, settings.factor_max),
    )
