"""Who is cheaper, at what attainment, and how sure is that?

    rows ─► sheet [combination, policy, window] ─► means ─► intervals (bootstrap over windows)
                                                └─► Shoal / SkyServe at equal attainment

Windows are drawn again together for all policies and all combinations (Efron and Tibshirani 1993,
percentile intervals): a window that was hard for one was hard for the others, and only the
difference counts. Ten windows of one trace are few and not independent, so an interval says how
much the windows differ, not how much other traces would.

SkyServe's variants are points (attainment, cost). Whoever uses one of them for a part of the time
and another for the rest reaches every point between, so at Shoal's attainment SkyServe costs what
the cheapest such mix does. That favours SkyServe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.autoscaling.combinations import TARGET
from benchmarks.autoscaling.rows import Row

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DRAWS = 2000
SURE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its interval; `low` and `high` are NaN where there is one window only."""

    mean: float
    low: float
    high: float

    def as_json(self) -> list[float | None]:
        return [None if np.isnan(v) else float(v) for v in (self.mean, self.low, self.high)]


@dataclass(frozen=True, slots=True)
class Mix:
    """`share` of the time `dearer`, the rest `cheaper` (share 1: `dearer` alone)."""

    cheaper: str
    dearer: str
    share: float
    attainment: float
    cost_usd: float

    @property
    def label(self) -> str:
        if self.share >= 1:
            return self.dearer
        return f"{1 - self.share:.0%} {self.cheaper}, {self.share:.0%} {self.dearer}"


def least_mix(points: Mapping[str, tuple[float, float]], attainment: float) -> Mix | None:
    """The cheapest mix of `points` (attainment, cost) that attains as much; None if none does.

    A linear program with two rows: at most two points take part.
    """
    mixes = [
        Mix(name, name, 1.0, attained, cost)
        for name, (attained, cost) in points.items()
        if attained >= attainment
    ]
    for low, (less, cheap) in points.items():
        for high, (more, dear) in points.items():
            if less < attainment <= more:
                share = (attainment - less) / (more - less)
                mixes.append(Mix(low, high, share, attainment, share * dear + (1 - share) * cheap))
    return min(mixes, key=lambda mix: (mix.cost_usd, mix.share), default=None)


def draws(windows: int, count: int = DRAWS, seed: int = 0) -> Ints:
    """`count` times `windows` windows, drawn with replacement; always the same ones."""
    return np.random.default_rng(seed).integers(0, windows, (count, windows))


def mean_of(values: Floats, drawn: Ints) -> Estimate:
    """The mean over windows (the last axis) and then over the rest; NaN: no such window."""
    if values.ndim == 1:
        values = values[None]
    return _estimate(_means(values).mean(), _means(values[:, drawn]).mean(axis=0), values)


def ratio_of(above: Floats, below: Floats, drawn: Ints) -> Estimate:
    """Mean of `above` by mean of `below` over the windows that both have, paired: one row [W], or
    one a combination [C, W], whose ratios are averaged.
    """
    both = ~(np.isnan(above) | np.isnan(below))
    above, below = (np.where(both, values, np.nan) for values in (above, below))
    if above.ndim == 1:
        above, below = above[None], below[None]
    told = (_means(above) / _means(below)).mean()
    again = (_means(above[:, drawn]) / _means(below[:, drawn])).mean(axis=0)
    return _estimate(told, again, above)


def _means(values: Floats) -> Floats:
    """Means over the last axis of what is known; NaN where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis=-1)
    total = np.where(known, values, 0.0).sum(axis=-1)
    means: Floats = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return means


def _estimate(told: float, again: Floats, values: Floats) -> Estimate:
    again = again[~np.isnan(again)]
    if not len(again) or int((~np.isnan(values)).any(axis=0).sum()) < 2:
        return Estimate(float(told), np.nan, np.nan)
    low, high = np.quantile(again, [(1 - SURE) / 2, (1 + SURE) / 2])
    return Estimate(float(told), float(low), float(high))


class Sheet:
    """Rows as arrays: `of(field)[combination, window]` for a policy, NaN where it wasn't played."""

    def __init__(self, rows: Sequence[Row], order: Sequence[str] = ()) -> None:
        present = dict.fromkeys(row.combination for row in rows)
        self.combinations = [name for name in order if name in present]
        self.combinations += [name for name in present if name not in order]
        self.policies = list(dict.fromkeys(row.policy for row in rows))
        self.windows = sorted({row.window for row in rows})
        self._rows = {row.key: row for row in rows}
        self.drawn = draws(max(len(self.windows), 1))

    def row(self, combination: str, policy: str) -> list[Row]:
        """The rows of one policy in one combination."""
        keys = ((combination, window, policy) for window in self.windows)
        return [self._rows[key] for key in keys if key in self._rows]

    def of(self, policy: str, field: str, combination: str) -> Floats:
        """A field of `Row` by window."""
        rows = (self._rows.get((combination, window, policy)) for window in self.windows)
        values = (np.nan if row is None else getattr(row, field) for row in rows)
        return np.array([np.nan if v is None else v for v in values], dtype=np.float64)

    def all_of(self, policy: str, field: str, combinations: Sequence[str]) -> Floats:
        """The same for several combinations [combination, window]."""
        return np.array([self.of(policy, field, name) for name in combinations]).reshape(
            len(combinations), len(self.windows)
        )

    def with_policy(self, policy: str) -> list[str]:
        """The combinations in which it was played."""
        return [name for name in self.combinations if self.row(name, policy)]


@dataclass(frozen=True, slots=True)
class Beside:
    """Shoal beside one rival in one combination: cost by cost, over windows that both have.

    `is_equal`: the rival attains at least what it has to; else it is the one that attains most.
    """

    label: str
    attainment: float
    cost_ratio: Estimate
    is_equal: bool


def beside_frontier(
    sheet: Sheet, combination: str, policy: str, frontier: Sequence[str]
) -> tuple[Beside, Floats] | None:
    """`policy` beside the cheapest mix of `frontier` that attains as much (or the target, if that
    is less), and that mix's cost by window; None where one of them wasn't played.
    """
    own = sheet.of(policy, "cost_usd", combination)
    costs = {name: sheet.of(name, "cost_usd", combination) for name in frontier}
    shared = ~np.isnan(np.array([own, *costs.values()])).any(axis=0)
    if not shared.any():
        return None
    attained = {n: float(sheet.of(n, "attainment", combination)[shared].mean()) for n in frontier}
    points = {n: (attained[n], float(costs[n][shared].mean())) for n in frontier}
    asked = min(float(sheet.of(policy, "attainment", combination)[shared].mean()), TARGET)
    mix = least_mix(points, asked)
    if mix is None:
        best = max(points, key=lambda name: (attained[name], -points[name][1]))
        chosen = Mix(best, best, 1.0, *points[best])
    else:
        chosen = mix
    cost = chosen.share * costs[chosen.dearer] + (1 - chosen.share) * costs[chosen.cheaper]
    cost = np.where(shared, cost, np.nan)
    ratio = ratio_of(own, cost, sheet.drawn)
    return Beside(chosen.label, chosen.attainment, ratio, mix is not None), cost
