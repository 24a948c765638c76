"""What is a late request worth now?

An objective of 99 % is a budget: one request in a hundred may be late. It is kept on the average of
days, not at every moment, so `fleet` is given a price for each late request instead of a limit: it
buys punctuality where it is cheap (a spare spot node) and does without where it is dear (a second
fleet on demand in case a zone falls). The price follows the budget's reserve, in hours of what may
be late:

    planned = (1 − attainment) · (1 − margin)
    reserve = (planned · seen − late) / (planned · rate)
    price   = base · exp(−reserve / patience)

What was saved makes lateness cheap until it is spent, what was overspent makes it dear until it is
paid back. (The price is the multiplier of a constraint on an average, found by dual ascent: Neely,
Stochastic Network Optimization, 2010, ch. 4; error budgets: Beyer et al., Site Reliability
Engineering, 2016, ch. 3.) Counts are forgotten slowly, so that a calm month is no licence for a bad
day.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BudgetSettings:
    """`margin`: the part of the budget that is never planned to be spent. `patience_s`: the reserve
    that makes the price fall to 1/e; less while less has been seen, `patience_part` of that time
    but `patience_min_s` at least (a step size that shrinks with time). The price stays between
    `multiple_min` and `multiple_max` of its base. `window_s`: after which what happened counts
    1/e.
    """

    margin: float = 0.25
    patience_s: float = 3 * 3600.0
    patience_min_s: float = 1800.0
    patience_part: float = 0.25
    multiple_min: float = 0.075
    multiple_max: float = 7.5
    window_s: float = 7 * 86400.0


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


def planned_share(attainment: Floats, settings: BudgetSettings) -> Floats:
    """The share of requests that is planned to be late."""
    share: Floats = np.maximum((1 - attainment) * (1 - settings.margin), 1e-6)
    return share


def reserve_s(
    budget: Budget, rate_rps: Floats, attainment: Floats, settings: BudgetSettings
) -> Floats:
    """For how long, by model, requests could be late at the planned share and be paid for by what
    was saved; negative for a debt.
    """
    planned = planned_share(attainment, settings)
    saved: Floats = (planned * budget.seen - budget.late) / np.maximum(planned * rate_rps, 1e-9)
    return saved


def price(budget: Budget, rate_rps: Floats, attainment: Floats, settings: BudgetSettings) -> Floats:
    """What a late request costs, by model, as a multiple of its base price."""
    seen_s = budget.seen / np.maximum(rate_rps, 1e-9)
    patience_s = np.clip(
        settings.patience_part * seen_s, settings.patience_min_s, settings.patience_s
    )
    saved = reserve_s(budget, rate_rps, attainment, settings) / patience_s
    least, most = np.log(settings.multiple_min), np.log(settings.multiple_max)
    multiple: Floats = np.exp(np.clip(-saved, least, most))
    return multiple


def reindexed(budget: Budget, places: NDArray[np.int64]) -> Budget:
    """The same for another list of models: `places` [models] in the old list, -1 for a new one."""
    known = places >= 0
    seen, late = np.zeros(len(places)), np.zeros(len(places))
    seen[known], late[known] = budget.seen[places[known]], budget.late[places[known]]
    return Budget(seen, late, budget.at_s)
