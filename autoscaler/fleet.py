"""Which machines, in which markets and zones, carry the load at the least expected cost?

The joint choice: counts n of nodes by option (machine type × market × zone) that

    minimise    Σ n · (rent + expected replacement) + Σ new · launch + harm · late(n)
    subject to  late(n) ≤ late_max,  count_min ≤ n ≤ count_max,  no zone above its share

late(n) is the expected share of late requests over two kinds of bad luck, which are enumerated
and not averaged away: a demand above the expected one (`Needs`), and zones that fall as a whole
(`Shocks`). A shortage makes requests late only once the queue that it builds is longer than the
slack in the SLO, and goes on doing so while the queue is worked off:

    queue after the gap, in seconds of work    q = (1 − surviving capacity / need) · gap
    late time, as a multiple of the gap        (1 + recovery / gap) · (1 − slack / q) if q > slack

So a short gap in a patient service needs no hedge, and losing a third of the nodes three times does
less harm than losing all of them once: nodes are spread. A shock's gap ends when what it took is
replaced; a surprising demand's, when the fleet has followed; the demand that is expected stays, so
it has no gap to sit out.

All of late(n) is in the tail, so the constraint bounds the conditional value at risk of the
shortfall with the stated weights. Small problems are enumerated (exact); large ones descend from
several starts by moves of one, two, four … nodes, and swaps between two options. What is asked of a
real machine room, order and damping, is `policy`'s and `damping`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EXACT_MAX = 2_000
"""Problems with at most so many combinations are enumerated."""

UNEVEN_MAX = 6
"""Up to so many options, one node is also swapped for two, and two of two groups for one."""

RECOVERY_S = 60.0
"""Within about this time a queue is worked off once what was missing is there."""

INFEASIBLE_USD_H = 1e6
"""What a broken constraint weighs against money: more than any fleet costs."""


@dataclass(frozen=True, slots=True)
class Option:
    """One group as a choice.

    `capacity`: of one node, in the unit of the needs. `cost_usd_h`: rent and expected replacement
    of a node. `launch_usd_h`: what a node beyond the `held` ones costs more: its cold start, spread
    over the time that it is expected to be of use. `zone`: "" for one that doesn't fall as a whole.
    """

    group: str
    capacity: float
    cost_usd_h: float
    count_max: int
    launch_usd_h: float = 0.0
    held: int = 0
    count_min: int = 0
    zone: str = ""


@dataclass(frozen=True, slots=True)
class Needs:
    """Possible needs: capacity [J] that carries the demand within the SLO, weight [J], and how
    long a shortage against it would last, `gap_s` [J] (infinite for a demand that stays).
    """

    capacity: Floats
    weight: Floats
    gap_s: Floats

    @classmethod
    def certain(cls, capacity: float) -> Needs:
        """One need, known, that stays."""
        return cls(np.array([capacity], dtype=np.float64), np.ones(1), np.full(1, np.inf))


@dataclass(frozen=True, slots=True)
class Shocks:
    """What may fall: survival [S, O] of the options' nodes (0..1), weight [S], and how long the
    shortage lasts, `gap_s` [S].
    """

    survival: Floats
    weight: Floats
    gap_s: Floats

    @classmethod
    def none(cls, options: int) -> Shocks:
        """Nothing falls."""
        return cls(np.ones((1, options)), np.ones(1), np.zeros(1))


@dataclass(frozen=True, slots=True)
class Problem:
    """A fleet to choose. `slack_s`: how long a request may wait and still be on time.

    `harm_usd_h`: what it would cost if every request were late. `zone_fraction_max`: the largest
    part of the capacity that one zone may hold (1: no cap). `calm_factor`, `shock_factor`: what
    late shares have been, measured, as multiples of what this model makes of them (`calibration`).
    """

    options: tuple[Option, ...]
    needs: Needs
    shocks: Shocks
    late_max: float
    slack_s: float = 0.0
    harm_usd_h: float = 0.0
    zone_fraction_max: float = 1.0
    calm_factor: float = 1.0
    shock_factor: float = 1.0

    def weights(self) -> Floats:
        """What each state counts with each need [S, J]. Lateness that is only a risk counts by the
        factors; that of a demand which stays is certain.
        """
        is_calm = self.shocks.survival.min(axis=1, initial=1.0) >= 1.0
        calm = np.where(np.isinf(self.needs.gap_s), 1.0, self.calm_factor)
        trust = np.where(is_calm[:, None], calm[None, :], self.shock_factor)
        weights: Floats = self.shocks.weight[:, None] * self.needs.weight[None, :] * trust
        return weights


@dataclass(frozen=True, slots=True)
class Choice:
    """Counts by group, what they cost an hour (rent, replacement, launches), and the expected
    share of late requests; `late_shock`: of that, what the states add in which something falls.
    `is_feasible`: whether they keep every constraint.
    """

    counts: dict[str, int]
    cost_usd_h: float
    late: float
    is_feasible: bool
    late_shock: float = 0.0


def choose(problem: Problem, *, is_thorough: bool = True) -> Choice:
    """The cheapest fleet that keeps the constraints; without one, the least late it can have.

    Not `is_thorough`: the descent begins at the fleet that is held, and by small steps: enough
    where little has changed.
    """
    judge = _Judge(problem)
    if not problem.options:
        return judge.choice(np.zeros(0, dtype=np.int64))
    if not is_thorough:
        held = judge.held.clip(judge.low, judge.high)
        return judge.choice(_descent(judge, held, is_thorough=False))
    span = math.prod(float(o.count_max - o.count_min + 1) for o in problem.options)
    counts = _enumerated(judge) if span <= EXACT_MAX else _descended(judge)
    return judge.choice(counts)


def judged(problem: Problem, counts: Sequence[int]) -> Choice:
    """What a given fleet would cost and bring: for options that were not chosen."""
    return _Judge(problem).choice(np.asarray(counts, dtype=np.int64))


class _Judge:
    """Costs and late shares of many candidate fleets at once (rows of counts [N, O])."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        options = problem.options
        self.low = np.array([o.count_min for o in options], dtype=np.int64)
        self.high = np.array([max(o.count_max, o.count_min) for o in options], dtype=np.int64)
        self.held = np.array([o.held for o in options], dtype=np.int64)
        self.capacity = np.array([o.capacity for o in options], dtype=np.float64)
        self.cost = np.array([o.cost_usd_h for o in options], dtype=np.float64)
        self.launch = np.array([o.launch_usd_h for o in options], dtype=np.float64)
        self.surviving = (problem.shocks.survival * self.capacity).T.copy()  # [O, S]
        zones = sorted({o.zone for o in options if o.zone})
        self.zones = (
            np.array([[o.capacity if o.zone == z else 0.0 for z in zones] for o in options])
            if zones and problem.zone_fraction_max < 1
            else None
        )
        needs, shocks = problem.needs, problem.shocks
        self.slack_s = max(problem.slack_s, 1e-3)
        self.need = needs.capacity.reshape(1, 1, -1)
        self.weight = problem.weights()
        self.shock_gap = np.maximum(shocks.gap_s, 1e-9).reshape(1, -1, 1)
        self.need_gap = np.clip(needs.gap_s, 1e-9, 1e9).reshape(1, 1, -1)

    def cost_usd_h(self, counts: NDArray[np.int64]) -> Floats:
        new = np.maximum(counts - self.held, 0)
        cost: Floats = counts @ self.cost + new @ self.launch
        return cost

    def late_and_shortfall(self, counts: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Expected late share, and expected relative shortfall (which also tells far from near)."""
        shocked, late = self._late(counts)
        late_mean: Floats = np.einsum("nsj,sj->n", late, self.weight)
        shortfall_mean: Floats = np.einsum("nsj,sj->n", shocked, self.weight)
        return late_mean, shortfall_mean

    def _late(self, counts: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """What is missing of each need, and late time [N, S, J], in each state."""
        shocked = self._missing((counts @ self.surviving)[:, :, None])
        whole = self._missing((counts @ self.capacity)[:, None, None])
        late = self._late_time(shocked, self.shock_gap)
        return shocked, np.maximum(late, self._late_time(whole, self.need_gap), out=late)

    def _late_time(self, missing: Floats, gap_s: Floats) -> Floats:
        queue_s = np.maximum(missing * gap_s, 1e-12)
        late: Floats = (1.0 + RECOVERY_S / gap_s) * np.maximum(1.0 - self.slack_s / queue_s, 0.0)
        return late

    def _shock_part(self, counts: NDArray[np.int64]) -> float:
        """Of the late share of one fleet, what is more than if nothing fell."""
        _, late = self._late(counts[None, :])
        whole = self._missing((counts[None, :] @ self.capacity)[:, None, None])
        added = late - self._late_time(whole, self.need_gap)
        return float(np.einsum("nsj,sj->n", added, self.weight)[0])

    def _missing(self, capacity: Floats) -> Floats:
        missing: Floats = np.where(self.need > 0, 1.0 - capacity / np.maximum(self.need, 1e-9), 0.0)
        return np.maximum(missing, 0.0, out=missing)

    def broken(self, counts: NDArray[np.int64]) -> Floats:
        """How far a zone is above its share (0: kept)."""
        if self.zones is None:
            return np.zeros(len(counts))
        whole = np.maximum(counts @ self.capacity, 1e-9)
        over = (counts @ self.zones) / whole[:, None] - self.problem.zone_fraction_max
        beyond: Floats = np.maximum(over.max(axis=1) - 1e-9, 0.0)
        return beyond

    def score(self, counts: NDArray[np.int64]) -> Floats:
        """What is minimised: money when feasible, else money and a weight that outdoes it."""
        late, shortfall = self.late_and_shortfall(counts)
        problem = self.problem
        score = self.cost_usd_h(counts) + problem.harm_usd_h * late
        over = np.maximum(late - problem.late_max, 0.0)
        over = np.where(over > 1e-12, over + shortfall, 0.0) + self.broken(counts)
        total: Floats = score + INFEASIBLE_USD_H * over
        return total

    def choice(self, counts: NDArray[np.int64]) -> Choice:
        rows = counts[None, :]
        late = float(self.late_and_shortfall(rows)[0][0]) if len(counts) else 1.0
        return Choice(
            counts={o.group: int(n) for o, n in zip(self.problem.options, counts, strict=True)},
            cost_usd_h=float(self.cost_usd_h(rows)[0]) if len(counts) else 0.0,
            late=late,
            is_feasible=late <= self.problem.late_max + 1e-12
            and bool(self.broken(rows)[0] == 0 if len(counts) else False),
            late_shock=self._shock_part(counts) if len(counts) else 0.0,
        )


def _enumerated(judge: _Judge) -> NDArray[np.int64]:
    axes = [np.arange(low, high + 1) for low, high in zip(judge.low, judge.high, strict=True)]
    every = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
    best: NDArray[np.int64] = every[int(np.argmin(judge.score(every)))]
    return best


def _descended(judge: _Judge) -> NDArray[np.int64]:
    """The best end of descents from the fleet that is held, a cheap one and a spread one."""
    starts = np.unique(np.array([judge.held, *_filled(judge)]).clip(judge.low, judge.high), axis=0)
    ends = np.array([_descent(judge, start) for start in starts])
    best: NDArray[np.int64] = ends[int(np.argmin(judge.score(ends)))]
    return best


def _filled(judge: _Judge) -> list[NDArray[np.int64]]:
    """Starts that cover the largest need: from the cheapest on, and spread over the cheap ones."""
    need = float(judge.problem.needs.capacity.max())
    price = (judge.cost + judge.launch) / np.maximum(judge.capacity, 1e-9)
    order = np.argsort(price, kind="stable")
    cheap = [int(i) for i in order if price[i] <= 1.5 * price[order[0]]]
    return [_fill(judge, order, need, 1), _fill(judge, order, need, len(cheap))]


def _fill(judge: _Judge, order: NDArray[np.int64], need: float, ways: int) -> NDArray[np.int64]:
    counts = judge.low.copy()
    missing = need - float(counts @ judge.capacity)
    for place, option in enumerate(order):
        if missing <= 0:
            break
        part = missing / max(ways - place, 1)
        asked = math.ceil(part / max(float(judge.capacity[option]), 1e-9))
        added = min(asked, int(judge.high[option] - counts[option]))
        counts[option] += added
        missing -= added * float(judge.capacity[option])
    return counts


def _descent(
    judge: _Judge, counts: NDArray[np.int64], *, is_thorough: bool = True
) -> NDArray[np.int64]:
    """Best-improving moves until none improves."""
    size = int(max(judge.high.max(), 1))
    step = 1 << max(int(math.log2(max(counts.max(), 1))) - 1, 0)
    step = min(step, size) if is_thorough else min(2, size)
    best = float(judge.score(counts[None])[0])
    moves = _moves(len(counts), is_thorough)
    while step >= 1:
        candidates = (counts + step * moves).clip(judge.low, judge.high)
        scores = judge.score(candidates)
        place = int(np.argmin(scores))
        if scores[place] < best - 1e-9:
            counts, best = candidates[place], float(scores[place])
        else:
            step //= 2
    return counts


@cache
def _moves(options: int, is_thorough: bool) -> NDArray[np.int64]:
    """One more, one less, each swap of one for one; of few options, if `is_thorough`, for two."""
    one = np.eye(options, dtype=np.int64)
    pairs = [(a, b) for a in range(options) for b in range(options) if a != b]
    swaps = [one[a] - one[b] for a, b in pairs]
    if is_thorough and options <= UNEVEN_MAX:
        swaps += [one[a] - 2 * one[b] for a, b in pairs] + [2 * one[a] - one[b] for a, b in pairs]
        swaps += [one[a] - one[b] - one[c] for a, b in pairs for c in range(b) if c != a]
    return np.concatenate([one, -one, np.array(swaps, dtype=np.int64).reshape(-1, options)])
