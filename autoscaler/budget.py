"""How many late requests may the next hours bring?

An objective of 99 % is a budget: one request in a hundred may be late. A fleet that is sized to be
late with that share at every moment pays too much, because its estimates err on the safe side, and
a fleet that has just lost a zone has spent more than its share. So the share that is asked of
`fleet` and `queueing` follows what is left of the budget:

    allowed = e + (e · seen − late) / (rate · horizon)        e = (1 − attainment) · (1 − margin)

what was saved is spent evenly over the horizon, what was overspent is paid back. (Error budgets as
in Beyer et al., Site Reliability Engineering, 2016, ch. 3; the feedback is an integral controller,
which also takes out a steady error of the models behind the sizing.) Counts are forgotten slowly,
so that a calm month is no licence for a bad day.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BudgetSettings:
    """`margin`: the part of the budget that is never planned to be spent. `horizon_s`: over which
    savings are spent. `window_s`: after which what happened counts 1/e. The allowed share stays
    within `planned_fraction_min` of the planned one and `late_max`.
    """

    margin: float = 0.15
    horizon_s: float = 6 * 3600.0
    window_s: float = 7 * 86400.0
    planned_fraction_min: float = 0.4
    late_max: float = 0.1


@dataclass(frozen=True, slots=True)
class Budget:
    """Requests seen and late, by model, as they still count at `at_s`."""

    seen: Floats
    late: Floats
    at_s: float

    @classmethod
    def fresh(cls, models: int, now_s: float) -> Budget:
        """Nothing seen yet."""
        return cls(np.zeros(models), np.zeros(models), now_s)


def spent(
    budget: Budget, finished: Floats, late: Floats, now_s: float, settings: BudgetSettings
) -> Budget:
    """`budget` after `finished` requests [models], of which `late` were late or failed."""
    kept = float(np.exp(-(now_s - budget.at_s) / settings.window_s))
    return Budget(budget.seen * kept + finished, budget.late * kept + late, now_s)


def late_allowed(
    budget: Budget, rate_rps: Floats, attainment: Floats, settings: BudgetSettings
) -> Floats:
    """The share of the coming requests that may be late, by model."""
    planned = (1 - attainment) * (1 - settings.margin)
    saved = planned * budget.seen - budget.late
    coming = np.maximum(rate_rps * settings.horizon_s, 1.0)
    allowed: Floats = np.clip(
        planned + saved / coming, settings.planned_fraction_min * planned, settings.late_max
    )
    return allowed


def reindexed(budget: Budget, places: NDArray[np.int64]) -> Budget:
    """The same for another list of models: `places` [models] in the old list, -1 for a new one."""
    known = places >= 0
    seen, late = np.zeros(len(places)), np.zeros(len(places))
    seen[known], late[known] = budget.seen[places[known]], budget.late[places[known]]
    return Budget(seen, late, budget.at_s)
