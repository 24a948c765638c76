"""How likely is a group of spot nodes to be taken, and will a launch there succeed?

Learned while running, from plain events: each interval that a group held nodes is exposure, each
reclaim (or notice of one) is a shock. What is believed is a product:

    shocks an hour  =  rate of the place  ×  age of its up-run  ×  price now / slow price
                       pooled by zone,       (age + offset)^-γ     bounded
                       region, machine       γ averaged over a grid

The rate is Gamma-Poisson in operational time: exposure is weighted by the other two factors, so
they need no normalising, and counts and exposure fade together, so an old month weighs less than
last night. A place without much data leans on its region, that on its machine type, that on the
prior. The age begins anew with each shock: capacity that has just moved moves again, and both a
fresh zone and the minutes after a partial loss are dangerous (about 20 times as much as a day
later, in traces of AWS).

    zone a   ████████▼███▼█████████████     ▼ own shock
    zone b   ████▼███▼█████████████████     ▽ a shock of the region: `common_fraction` of the
    zone c   ████████▽█████████████▼███       rate, learned from coincidences beyond chance

Scenarios show a random moment: who is short because a shock came less than a cold start ago. The
likely ones are listed exactly, the rest is sampled, and all weights add up to 1.

Launches are Beta-Bernoulli with a short memory. A failed launch and a loss both say that no more
can be had right now; how soon to ask again follows from how long such times have lasted.

Which groups to use is not decided here (`fleet` does), nor is the price of being short.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from autoscaler.snapshot import Event, EventKind, Group, Market, Node

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

AGE_EXPONENTS: Floats = np.array([0.0, 0.2, 0.4, 0.6, 0.8])
"""The γ among which the data choose: 0 is a constant hazard, 0.8 falls 10-fold in 18 hours."""


@dataclass(frozen=True, slots=True)
class HazardSettings:
    """What is believed before anything was seen, and how fast what was seen fades.

    `rate_prior_per_h`: shocks an hour, one hour after the last shock. `pool_strength_h`: hours of
    exposure that the level above is worth; `fraction_strength` and `success_strength` are the same
    in shocks and in launches, `down_strength_h` in hours, `common_strength` in coincidences.
    `age_start_s`: how long a place is taken to have been up when it is first seen.
    `shock_window_s`: losses of a group this close together are one shock; `coincidence_s`: shocks
    of two zones this close together may be one of their region. `down_prior_s`: how long a group
    has no capacity, on average.
    """

    half_life_s: float = 24 * 3600.0
    launch_half_life_s: float = 3600.0
    rate_prior_per_h: float = 0.6
    pool_strength_h: float = 4.0
    age_offset_s: float = 600.0
    age_start_s: float = 2 * 3600.0
    price_half_life_s: float = 24 * 3600.0
    price_ratio_min: float = 0.5
    price_ratio_max: float = 2.0
    shock_window_s: float = 60.0
    fraction_prior: float = 0.75
    fraction_strength: float = 4.0
    coincidence_s: float = 300.0
    common_prior: float = 0.3
    common_strength: float = 10.0
    success_prior_spot: float = 0.7
    success_prior_on_demand: float = 0.98
    success_strength: float = 2.0
    down_prior_s: float = 3600.0
    down_strength_h: float = 2.0
    retry_min_s: float = 30.0
    retry_max_s: float = 900.0


@dataclass(frozen=True)
class _Layout:
    """Which row is which group, and which rows share a region or a pool."""

    names: tuple[str, ...]
    index: Mapping[str, int]
    is_spot: Bools
    region: Ints
    members: tuple[Ints, ...]
    """Spot rows by region."""
    pool: Ints
    """Machine type × market × region of each row."""
    pool_machine: Ints
    """Machine type × market of each pool."""
    machine_is_spot: Bools


@dataclass(frozen=True)
class _Tally:
    """Counts that fade. One row a group, but for the last four."""

    shocks: Floats
    exposure_h: Floats
    """[G, K]: weighted by age (one column for each of `AGE_EXPONENTS`) and price."""
    held_h: Floats
    lost: Floats
    kept: Floats
    succeeded: Floats
    failed: Floats
    recoveries: Floats
    down_h: Floats
    log_age: Floats
    """[K]: sum of the logarithm of the age factor over all shocks."""
    together: float
    apart: float
    by_chance: float


@dataclass(frozen=True)
class _Standing:
    """Where each group stands. Times that never were are -inf, or nan where it says so."""

    held: Ints
    """Nodes without a notice."""
    noticed: Ints
    bad_s: Floats
    """When it was last seen without capacity, or losing some."""
    good_s: Floats
    """Since when it has been seen good after that; nan: not yet."""
    shock_s: Floats
    shock_held: Floats
    shock_fraction: Floats
    success_s: Floats
    fail_s: Floats
    failures: Ints
    """Failed launches in a row."""
    down_s: Floats
    """Up to when its down-run has been counted; nan: not down."""
    believed: Floats
    """How many nodes there seemed to be at the last failure or loss; inf: no bound was met."""
    probe: Floats
    """How many more to ask for once that belief is out of date."""
    price_usd_h: Floats
    """Slow average."""


_FADES_SLOWLY = (
    "shocks", "exposure_h", "held_h", "lost", "kept", "recoveries", "down_h", "log_age",
    "together", "apart", "by_chance",
)  # fmt: skip
_FADES_FAST = ("succeeded", "failed")
_NOT_BY_GROUP = ("log_age", "together", "apart", "by_chance")


def _no_layout() -> _Layout:
    return _layout({})


def _no_tally() -> _Tally:
    return _new_tally(0)


def _no_standing() -> _Standing:
    return _new_standing(0, 0.0, HazardSettings())


@dataclass(frozen=True)
class HazardMemory:
    """What has been learned so far; a new one knows the priors. Only this module looks inside."""

    settings: HazardSettings = HazardSettings()
    now_s: float | None = None
    layout: _Layout = field(default_factory=_no_layout)
    tally: _Tally = field(default_factory=_no_tally)
    standing: _Standing = field(default_factory=_no_standing)


@dataclass(frozen=True)
class Scenarios:
    """Possible states of the world at a random moment, most of the probability listed exactly.

    `survival` [S, G]: the share of a group's nodes that is there, in 0..1. `weight` [S]: adds to 1.
    """

    survival: Floats
    weight: Floats


@dataclass(frozen=True)
class Launchability:
    """What a launch can hope for, by group.

    `success_probability`: that one more node comes, asked for now. `retry_at_s`: don't ask before
    (at or before now: ask whenever). `believed_free`: how many more nodes to ask for at most; inf
    where no bound is known.
    """

    success_probability: Floats
    retry_at_s: Floats
    believed_free: Floats


# ── learning ──────────────────────────────────────────────────────────────────────────────────


def observe(
    memory: HazardMemory,
    groups: Mapping[str, Group],
    nodes: Sequence[Node],
    events: Sequence[Event],
    now_s: float,
    settings: HazardSettings,
) -> HazardMemory:
    """The memory after an interval that ends at `now_s` with `nodes`, in which `events` happened.

    A notice is a shock, and the reclaim that it announced isn't another. Groups may come and go;
    what is known of one that is no longer named is forgotten. Raises ValueError when time runs
    backwards.
    """
    before_s = now_s if memory.now_s is None else memory.now_s
    if now_s < before_s:
        raise ValueError(f"time ran backwards: {now_s} after {before_s}")
    memory = _aligned(dataclasses.replace(memory, settings=settings), groups, before_s)
    prices = _prices(groups)
    standing = _copied(memory.standing)
    tally = _faded(memory.tally, now_s - before_s, settings)
    interval = _Interval(memory.layout, tally, standing, before_s, settings, prices)
    for event in sorted(events, key=_when):
        interval.happened(event)
    tally, standing = interval.ended(nodes, now_s)
    return HazardMemory(settings, now_s, memory.layout, tally, standing)


def _when(event: Event) -> float:
    return event.at_s


class _Interval:
    """The time between two observations, replayed event by event on arrays of its own."""

    def __init__(
        self,
        layout: _Layout,
        tally: _Tally,
        standing: _Standing,
        begin_s: float,
        settings: HazardSettings,
        prices: Floats,
    ) -> None:
        self.layout = layout
        self.tally = tally
        self.standing = standing
        self.begin_s = begin_s
        self.settings = settings
        self.prices = prices
        self.together = self.apart = self.by_chance = 0.0
        self.ratio = _price_ratio(standing.price_usd_h, prices, settings)
        self.held = standing.held.copy()
        self.noticed = standing.noticed.copy()
        self.failed_now: set[int] = set()
        self.exposed_from_s: Floats = np.where(self.held > 0, begin_s, np.inf)

    def happened(self, event: Event) -> None:
        row = self.layout.index.get(event.group)
        if row is None or event.count <= 0:
            return
        if event.kind is EventKind.LAUNCHED:
            self._launched(row, event)
        elif event.kind is EventKind.LAUNCH_FAILED:
            self._failed(row, event)
        elif event.kind is EventKind.NOTICED:
            self.noticed[row] += event.count
            self._taken(row, event.at_s, event.count)
        else:
            announced = min(int(self.noticed[row]), event.count)
            self.noticed[row] -= announced
            if event.count > announced:
                self._taken(row, event.at_s, event.count - announced)

    def _launched(self, row: int, event: Event) -> None:
        standing, at_s = self.standing, event.at_s
        self.tally.succeeded[row] += self._news(row, at_s)
        standing.success_s[row] = at_s
        standing.failures[row] = 0
        standing.probe[row] = max(2.0 * standing.probe[row], 2.0 * event.count)
        if np.isnan(standing.good_s[row]):
            standing.good_s[row] = at_s
        if not np.isnan(standing.down_s[row]):  # it came back at some time since the last failure
            self._down_until(row, at_s, weight=0.5)
            self.tally.recoveries[row] += 1.0
            standing.down_s[row] = np.nan
        if self.held[row] == 0:
            self.exposed_from_s[row] = at_s
        self.held[row] += event.count
        standing.believed[row] = max(standing.believed[row], float(self.held[row]))

    def _failed(self, row: int, event: Event) -> None:
        standing, at_s = self.standing, event.at_s
        self.tally.failed[row] += self._news(row, at_s)
        standing.failures[row] += 1
        self._no_more(row, at_s)
        if self.held[row] == 0:
            standing.bad_s[row], standing.good_s[row] = at_s, np.nan
            self._down_until(row, at_s)

    def _news(self, row: int, at_s: float) -> float:
        """What one more launch tells, in 0..1: a try just after another one tells little."""
        last_s = max(self.standing.fail_s[row], self.standing.success_s[row])
        return float(-np.expm1(-max(at_s - last_s, 0.0) / self.settings.down_prior_s))

    def _taken(self, row: int, at_s: float, count: int) -> None:
        if not self.layout.is_spot[row]:
            return  # a broken machine is no market
        standing = self.standing
        if at_s - standing.shock_s[row] > self.settings.shock_window_s:
            self._shocked(row, at_s, count)
        before = standing.shock_fraction[row]
        after = min(before + count / standing.shock_held[row], 1.0)
        standing.shock_fraction[row] = after
        self.tally.lost[row] += after - before
        self.tally.kept[row] -= after - before
        self.held[row] = max(self.held[row] - count, 0)
        self._no_more(row, at_s)
        if self.held[row] == 0:
            standing.good_s[row] = np.nan
            self.exposed_from_s[row] = np.inf
            self._down_until(row, at_s)

    def _shocked(self, row: int, at_s: float, count: int) -> None:
        """The first loss of a shock: exposure ends here, and the age begins anew."""
        standing, tally = self.standing, self.tally
        self._exposed_until(row, at_s)
        self._coincided(row, at_s)
        age_s = max(at_s - float(_run_start(standing, at_s)[row]), 0.0)
        tally.log_age[:] += np.log(_age_factor(np.array([age_s]), self.settings)[0])
        tally.shocks[row] += 1.0
        tally.kept[row] += 1.0  # all of it, until `_taken` says how much was lost
        standing.shock_s[row] = at_s
        standing.shock_held[row] = max(self.held[row], count)
        standing.shock_fraction[row] = 0.0
        standing.bad_s[row] = standing.good_s[row] = at_s

    def _exposed_until(self, row: int, at_s: float) -> None:
        begin_s = self.exposed_from_s[row]
        if not begin_s < at_s:
            return
        start_s = float(_run_start(self.standing, at_s)[row])
        ages = np.array([begin_s - start_s, at_s - start_s])
        passed = np.diff(_age_integral_h(np.maximum(ages, 0.0), self.settings), axis=0)[0]
        self.tally.exposure_h[row] += passed * self.ratio[row]
        self.tally.held_h[row] += (at_s - begin_s) / 3600.0
        self.exposed_from_s[row] = at_s

    def _coincided(self, row: int, at_s: float) -> None:
        """Compares a shock with the other zones of its region: hit within the same minutes?

        Each coincident pair is seen at its second shock, and counts for both of them.
        """
        window_s = self.settings.coincidence_s
        zones = self.layout.members[self.layout.region[row]]
        others = zones[zones != row]
        is_hit = at_s - self.standing.shock_s[others] <= window_s
        is_there = is_hit | (self.held[others] > 0)
        there = int(is_there.sum())
        if not there:
            return
        share = 2.0 * float(is_hit.sum()) / there
        rows = others[is_there]
        rate_per_h = (self.tally.shocks[rows] + 0.5) / (self.tally.held_h[rows] + 1.0)
        self.together += share
        self.apart += 1.0 - share
        self.by_chance += float(-np.expm1(-rate_per_h * 2 * window_s / 3600.0).mean())

    def _no_more(self, row: int, at_s: float) -> None:
        self.standing.fail_s[row] = at_s
        self.standing.probe[row] = 1.0
        self.standing.believed[row] = float(self.held[row])
        self.failed_now.add(row)

    def _down_until(self, row: int, at_s: float, weight: float = 1.0) -> None:
        """Counts down-time since the last count; long gaps, in which nobody looked, in part."""
        standing = self.standing
        if not np.isnan(standing.down_s[row]):
            passed_s = min(weight * (at_s - standing.down_s[row]), self.settings.down_prior_s)
            self.tally.down_h[row] += max(passed_s, 0.0) / 3600.0
        standing.down_s[row] = at_s

    def ended(self, nodes: Sequence[Node], now_s: float) -> tuple[_Tally, _Standing]:
        """What is known at the end, when the nodes are seen again."""
        held, noticed, first_s = _counted(nodes, self.layout)
        self._all_exposed_until(now_s)
        standing, tally = self.standing, self.tally
        for row in self.failed_now:  # what is really held knows of our own stops, too
            if self.held[row] == standing.believed[row]:
                standing.believed[row] = float(held[row])
        standing.believed[:] = np.maximum(standing.believed, held)
        unseen = (held > 0) & np.isnan(standing.good_s)  # nodes that were there before us
        standing.good_s[unseen] = first_s[unseen]
        idle = (held == 0) & ~np.isnan(standing.good_s)
        standing.good_s[idle] += now_s - self.begin_s  # given back: it doesn't age unseen
        standing.bad_s[idle] += now_s - self.begin_s
        fading = 0.5 ** ((now_s - self.begin_s) / self.settings.price_half_life_s)
        slow = self.prices + (standing.price_usd_h - self.prices) * fading
        tally = dataclasses.replace(
            tally,
            together=tally.together + self.together,
            apart=tally.apart + self.apart,
            by_chance=tally.by_chance + self.by_chance,
        )
        return tally, dataclasses.replace(standing, held=held, noticed=noticed, price_usd_h=slow)

    def _all_exposed_until(self, now_s: float) -> None:
        rows = np.flatnonzero(self.layout.is_spot & (self.exposed_from_s < now_s))
        if not len(rows):
            return
        start_s = _run_start(self.standing, now_s)[rows]
        begin_s = self.exposed_from_s[rows]
        old = _age_integral_h(np.maximum(now_s - start_s, 0.0), self.settings)
        young = _age_integral_h(np.maximum(begin_s - start_s, 0.0), self.settings)
        self.tally.exposure_h[rows] += (old - young) * self.ratio[rows, None]
        self.tally.held_h[rows] += (now_s - begin_s) / 3600.0


def _counted(nodes: Sequence[Node], layout: _Layout) -> tuple[Ints, Ints, Floats]:
    """By group: nodes without notice, nodes with one, and when the first of them was started."""
    size = len(layout.names)
    held, noticed = [0] * size, [0] * size
    first_s = [np.inf] * size
    index = layout.index
    for node in nodes:
        row = index.get(node.group)
        if row is None:
            continue
        if node.reclaim_s is None:
            held[row] += 1
            first_s[row] = min(first_s[row], node.started_s)
        else:
            noticed[row] += 1
    return np.array(held, np.int64), np.array(noticed, np.int64), np.array(first_s)


# ── the age factor ────────────────────────────────────────────────────────────────────────────


def _run_start(standing: _Standing, now_s: float) -> Floats:
    """Since when each group has been up: half-way between the last bad and the first good sign."""
    good_s = np.where(np.isnan(standing.good_s), now_s, standing.good_s)
    start_s: Floats = np.minimum(good_s, (standing.bad_s + good_s) / 2)
    return start_s


def _age_factor(age_s: Floats, settings: HazardSettings) -> Floats:
    """[..., K]: (age + offset)^-γ in hours, so that it is about 1 at an age of one hour.

    The hazard of a Weibull distribution of shape 1 - γ, kept finite at age 0.
    """
    hours = ((age_s + settings.age_offset_s) / 3600.0)[..., None]
    powers: Floats = np.power(hours, -AGE_EXPONENTS)
    return powers


def _age_integral_h(age_s: Floats, settings: HazardSettings) -> Floats:
    """[..., K]: the integral of `_age_factor` from minus the offset to `age_s`, in hours."""
    shape = 1.0 - AGE_EXPONENTS
    hours = ((age_s + settings.age_offset_s) / 3600.0)[..., None]
    integral: Floats = hours**shape / shape
    return integral


def _price_ratio(slow: Floats, now: Floats, settings: HazardSettings) -> Floats:
    ratio = np.divide(now, slow, out=np.ones_like(now), where=slow > 0)
    bounded: Floats = np.clip(ratio, settings.price_ratio_min, settings.price_ratio_max)
    return bounded


def _prices(groups: Mapping[str, Group]) -> Floats:
    return np.array([group.price_usd_h for group in groups.values()], np.float64)


# ── what is believed ──────────────────────────────────────────────────────────────────────────


def shock_rate_per_h(memory: HazardMemory, groups: Mapping[str, Group], now_s: float) -> Floats:
    """[G]: shocks an hour that each group faces now, in the order of `groups`; 0 unless spot.

    The posterior mean of a Gamma-Poisson model with empirical Bayes pooling (Efron and Morris
    1973), averaged over the exponents of the age factor by their likelihood.
    """
    memory = _aligned(memory, groups, now_s)
    settings, tally, standing = memory.settings, memory.tally, memory.standing
    rate = _pooled(
        memory.layout,
        np.repeat(tally.shocks[:, None], len(AGE_EXPONENTS), axis=1),
        tally.exposure_h,
        np.full(len(memory.layout.machine_is_spot), settings.rate_prior_per_h),
        settings.pool_strength_h,
    )
    age_s = np.maximum(now_s - _run_start(standing, now_s), 0.0)
    by_exponent = rate * _age_factor(age_s, settings)
    ratio = _price_ratio(standing.price_usd_h, _prices(groups), settings)
    now: Floats = by_exponent @ _exponent_weights(tally, rate) * ratio * memory.layout.is_spot
    return now


def _exponent_weights(tally: _Tally, rate: Floats) -> Floats:
    """[K]: how well each exponent explains when the shocks came (Poisson process likelihood)."""
    log_rate = np.log(np.maximum(rate, 1e-300))
    likelihood = tally.log_age + tally.shocks @ log_rate - (rate * tally.exposure_h).sum(axis=0)
    weight: Floats = np.exp(likelihood - likelihood.max())
    shares: Floats = weight / weight.sum()
    return shares


def age_exponent(memory: HazardMemory) -> float:
    """The believed γ in hazard ∝ age^-γ, in 0..0.8."""
    layout, tally, settings = memory.layout, memory.tally, memory.settings
    rate = _pooled(
        layout,
        np.repeat(tally.shocks[:, None], len(AGE_EXPONENTS), axis=1),
        tally.exposure_h,
        np.full(len(layout.machine_is_spot), settings.rate_prior_per_h),
        settings.pool_strength_h,
    )
    return float(_exponent_weights(tally, rate) @ AGE_EXPONENTS)


def fraction_lost(memory: HazardMemory, groups: Mapping[str, Group]) -> Floats:
    """[G]: the mean share of a group's nodes that a shock takes, in 0..1 (Beta, pooled)."""
    memory = _aligned(memory, groups, memory.now_s or 0.0)
    tally, settings = memory.tally, memory.settings
    return _pooled(
        memory.layout,
        tally.lost,
        tally.lost + tally.kept,
        np.full(len(memory.layout.machine_is_spot), settings.fraction_prior),
        settings.fraction_strength,
    )


def common_fraction(memory: HazardMemory) -> float:
    """The share of a zone's shocks that hit its whole region, in 0..1.

    Coincidences beyond those that independent zones would show, with a prior.
    """
    tally, settings = memory.tally, memory.settings
    trials = tally.together + tally.apart - tally.by_chance
    beyond = tally.together - tally.by_chance
    share = (settings.common_strength * settings.common_prior + beyond) / (
        settings.common_strength + max(trials, 0.0)
    )
    return float(np.clip(share, 0.0, 1.0))


def launchable(memory: HazardMemory, groups: Mapping[str, Group], now_s: float) -> Launchability:
    """What a launch in each group can hope for now, in the order of `groups`.

    A group has capacity for more or has not, and changes between the two as a Markov chain, whose
    share of time with capacity is the mean of launches that tell something new: the last launch or
    loss says which it was, and wears off. The wait until the next try doubles with
    each failure in a row, up to half of that time. Once it is over one node is asked for, then,
    with every success, twice as many as before.
    """
    memory = _aligned(memory, groups, now_s)
    standing = memory.standing
    down_s = _down_mean_s(memory)
    base = _success_mean(memory)
    last_s = np.maximum(standing.fail_s, standing.success_s)
    faded = np.exp(-np.maximum(now_s - last_s, 0.0) / (down_s * base))
    is_bad = np.isfinite(standing.fail_s) & (standing.fail_s >= standing.success_s)
    chance = base * (1.0 - faded) + faded * ~is_bad
    retry_at_s = np.where(is_bad, standing.fail_s + _wait_s(memory, down_s), -np.inf)
    return Launchability(chance, retry_at_s, _believed_free(memory, groups, retry_at_s, now_s))


def _success_mean(memory: HazardMemory) -> Floats:
    settings, tally = memory.settings, memory.tally
    prior = np.where(
        memory.layout.machine_is_spot, settings.success_prior_spot, settings.success_prior_on_demand
    )
    trials = tally.succeeded + tally.failed
    return _pooled(memory.layout, tally.succeeded, trials, prior, settings.success_strength)


def _down_mean_s(memory: HazardMemory) -> Floats:
    """[G]: how long a group without capacity stays so, on average."""
    settings, tally = memory.settings, memory.tally
    prior = np.full(len(memory.layout.machine_is_spot), 3600.0 / settings.down_prior_s)
    recovery_per_h = _pooled(
        memory.layout, tally.recoveries, tally.down_h, prior, settings.down_strength_h
    )
    return 3600.0 / recovery_per_h


def _wait_s(memory: HazardMemory, down_s: Floats) -> Floats:
    settings = memory.settings
    doublings = np.clip(memory.standing.failures - 1, 0, 30)
    wait_s = np.minimum(settings.retry_min_s * 2.0**doublings, down_s / 2)
    bounded: Floats = np.clip(wait_s, settings.retry_min_s, settings.retry_max_s)
    return bounded


def _believed_free(
    memory: HazardMemory, groups: Mapping[str, Group], retry_at_s: Floats, now_s: float
) -> Floats:
    standing = memory.standing
    free = np.maximum(standing.believed - standing.held, 0.0)
    is_forgotten = now_s - standing.fail_s > memory.settings.launch_half_life_s
    probing = np.where(is_forgotten, np.inf, np.maximum(standing.probe, free))
    free = np.where(now_s >= retry_at_s, probing, free)
    quota = [np.inf if g.nodes_max is None else float(g.nodes_max) for g in groups.values()]
    rest = np.array(quota) - standing.held - standing.noticed
    free_now: Floats = np.minimum(free, np.maximum(rest, 0.0))
    return free_now


def _pooled(
    layout: _Layout, count: Floats, exposure: Floats, prior: Floats, strength: float
) -> Floats:
    """Posterior means of count / exposure, [G] or [G, K].

    Each level is drawn to the one above it (zone, region, machine type, `prior`) with a weight of
    `strength` units of exposure.
    """
    if count.ndim == 2:
        prior = prior[:, None]
    machine = layout.pool_machine[layout.pool]
    machines, pools = len(layout.machine_is_spot), len(layout.pool_machine)
    mean = (strength * prior + _sum_by(machine, count, machines)) / (
        strength + _sum_by(machine, exposure, machines)
    )
    mean = (strength * mean[layout.pool_machine] + _sum_by(layout.pool, count, pools)) / (
        strength + _sum_by(layout.pool, exposure, pools)
    )
    posterior: Floats = (strength * mean[layout.pool] + count) / (strength + exposure)
    return posterior


def _sum_by(index: Ints, values: Floats, size: int) -> Floats:
    """Sums of the rows of `values` with the same index."""
    if values.ndim == 1:
        return np.bincount(index, values, minlength=size).astype(np.float64)
    columns = values.shape[1]
    cells = index[:, None] * columns + np.arange(columns)
    sums = np.bincount(cells.ravel(), values.ravel(), minlength=size * columns)
    return sums.astype(np.float64).reshape(size, columns)


# ── scenarios ─────────────────────────────────────────────────────────────────────────────────


def scenarios(
    memory: HazardMemory,
    groups: Mapping[str, Group],
    gap_s: Floats,
    now_s: float,
    rng: np.random.Generator,
    count: int,
) -> Scenarios:
    """At most `count` (3 or more) states of the world at a random moment.

    `gap_s` [G]: for how long a group misses what a shock took from it: the cold start of its
    successor less the notice. A group is short with probability 1 - exp(-rate · gap), and then by
    its mean fraction lost. Shocks are independent Poisson streams: of single zones and, with the
    common fraction, of whole regions (Marshall and Olkin 1967); where the zones of a region face
    different rates, a shock of the region hits the most endangered ones first.
    """
    if count < 3:
        raise ValueError(f"{count} scenarios are too few: at least 3")
    memory = _aligned(memory, groups, now_s)
    mass = shock_rate_per_h(memory, groups, now_s) * np.maximum(gap_s, 0.0) / 3600.0
    hits, hit_mass = _streams(mass, memory.layout.region, common_fraction(memory))
    chosen, weight = _subsets(hit_mass, count, rng)
    is_hit = (chosen.astype(np.float64) @ hits.astype(np.float64)) > 0
    return Scenarios(1.0 - is_hit * fraction_lost(memory, groups), weight)


def _streams(mass: Floats, region: Ints, common: float) -> tuple[Bools, Floats]:
    """The independent streams of shocks: whom each hits [E, G], and its expected count [E].

    In a region with masses a ≥ b ≥ c the streams that zones share are, nested so that each zone
    has `common` of its own mass in them: {a} with common · (a - b), {a, b} with common · (b - c),
    {a, b, c} with common · c.
    """
    rows = np.lexsort((-mass, region))
    rows = rows[mass[rows] > 0]
    place, ordered = region[rows], mass[rows]
    is_last = np.append(place[1:] != place[:-1], True)[: len(rows)]
    is_first = np.append(True, place[1:] != place[:-1])[: len(rows)]
    step = common * (ordered - np.where(is_last, 0.0, np.append(ordered[1:], 0.0)[: len(rows)]))
    alone = (1.0 - common) * ordered + np.where(is_first, step, 0.0)
    same = place[:, None] == place[None, :]
    shared = same & (np.arange(len(rows))[None, :] <= np.arange(len(rows))[:, None])
    hits = np.zeros((2 * len(rows), len(mass)), np.bool_)
    hits[: len(rows), rows] = np.eye(len(rows), dtype=np.bool_)
    hits[len(rows) :, rows] = shared
    weight = np.concatenate([alone, np.where(is_first, 0.0, step)])
    return hits[weight > 0], weight[weight > 0]


def _subsets(mass: Floats, count: int, rng: np.random.Generator) -> tuple[Bools, Floats]:
    """Which streams have struck, [S, E], and with which probability, [S].

    None and the likeliest single ones are listed, all pairs where they fit; the rest is sampled.
    """
    order = np.argsort(-mass, kind="stable")
    odds = np.expm1(mass[order])
    none = float(np.exp(-mass.sum()))
    singles = min(len(mass), max((count - 1) * 3 // 4, count - 3))
    listed = [np.zeros((1, len(mass)), np.bool_), np.eye(len(mass), dtype=np.bool_)[:singles]]
    weights = [np.array([none]), none * odds[:singles]]
    least = 2
    if singles == len(mass) and len(mass) * (len(mass) - 1) // 2 <= (count - 1 - singles) // 2:
        first, second = np.triu_indices(len(mass), 1)
        listed.append(_marked(np.stack([first, second], axis=1), len(mass)))
        weights.append(none * odds[first] * odds[second])
        least = 3
    room = count - sum(len(rows) for rows in listed)
    sampled, sampled_weight = _rest(mass[order], none * odds, singles, least, room, rng)
    chosen = np.concatenate([*listed, sampled])
    weight = np.concatenate([*weights, sampled_weight])
    back = np.empty_like(chosen)
    back[:, order] = chosen
    return back, weight / weight.sum()


def _marked(columns: Ints, width: int) -> Bools:
    """One row for each row of `columns`, true in these."""
    marked = np.zeros((len(columns), width), np.bool_)
    marked[np.arange(len(columns))[:, None], columns] = True
    return marked


def _rest(
    mass: Floats, single: Floats, listed: int, least: int, room: int, rng: np.random.Generator
) -> tuple[Bools, Floats]:
    """Samples of what isn't listed: single streams after the `listed` first, and `least` or more
    at once.
    """
    tail = _tail_probabilities(-np.expm1(-mass), least)
    many, unlisted = float(tail[0, least]), float(single[listed:].sum())
    if many + unlisted < 1e-12 or room == 0:
        return np.zeros((0, len(mass)), np.bool_), np.zeros(0)
    alone = round(room * unlisted / (many + unlisted))
    alone = min(max(alone, int(unlisted > 1e-12)), room - int(many > 1e-12))
    rows = [_sampled_many(-np.expm1(-mass), tail, least, room - alone, rng)]
    weights = [np.full(room - alone, many / max(room - alone, 1))]
    if alone:
        drawn = rng.choice(len(mass) - listed, size=(alone, 1), p=single[listed:] / unlisted)
        rows.append(_marked(drawn.astype(np.int64) + listed, len(mass)))
        weights.append(np.full(alone, unlisted / alone))
    return np.concatenate(rows), np.concatenate(weights)


def _tail_probabilities(chance: Floats, least: int) -> Floats:
    """[E + 1, least + 1]: that at least r of the streams from i on have struck."""
    tail = np.zeros((len(chance) + 1, least + 1))
    tail[:, 0] = 1.0
    for i in range(len(chance) - 1, -1, -1):
        tail[i, 1:] = chance[i] * tail[i + 1, :-1] + (1.0 - chance[i]) * tail[i + 1, 1:]
    return tail


def _sampled_many(
    chance: Floats, tail: Floats, least: int, size: int, rng: np.random.Generator
) -> Bools:
    """[size, E]: independent streams, given that at least `least` have struck; exact."""
    struck = np.zeros((size, len(chance)), np.bool_)
    need = np.full(size, least)
    draws = rng.random((len(chance), size))
    for i in range(len(chance) if size else 0):
        given = tail[i, need]
        hit = chance[i] * tail[i + 1, np.maximum(need - 1, 0)]
        struck[:, i] = draws[i] * given < hit
        need = np.maximum(need - struck[:, i], 0)
    return struck


# ── rows and groups ───────────────────────────────────────────────────────────────────────────


def _layout(groups: Mapping[str, Group]) -> _Layout:
    regions: dict[str, int] = {}
    machines: dict[tuple[str, Market], int] = {}
    pools: dict[tuple[str, Market, str], int] = {}
    region, pool, members = [], [], list[list[int]]()
    for row, group in enumerate(groups.values()):
        place = group.region
        region.append(regions.setdefault(place, len(regions)))
        machines.setdefault((group.machine, group.market), len(machines))
        pool.append(pools.setdefault((group.machine, group.market, place), len(pools)))
        if len(members) < len(regions):
            members.append([])
        if group.market is Market.SPOT:
            members[region[-1]].append(row)
    return _Layout(
        names=tuple(groups),
        index={name: row for row, name in enumerate(groups)},
        is_spot=np.array([g.market is Market.SPOT for g in groups.values()], np.bool_),
        region=np.array(region, np.int64),
        members=tuple(np.array(rows, np.int64) for rows in members),
        pool=np.array(pool, np.int64),
        pool_machine=np.array([machines[key[:2]] for key in pools], np.int64),
        machine_is_spot=np.array([key[1] is Market.SPOT for key in machines], np.bool_),
    )


def _new_tally(size: int) -> _Tally:
    exponents = len(AGE_EXPONENTS)
    rows = {f.name: np.zeros(size) for f in dataclasses.fields(_Tally)}
    return _Tally(
        **{name: rows[name] for name in rows if name not in (*_NOT_BY_GROUP, "exposure_h")},
        exposure_h=np.zeros((size, exponents)),
        log_age=np.zeros(exponents),
        together=0.0,
        apart=0.0,
        by_chance=0.0,
    )


def _new_standing(size: int, now_s: float, settings: HazardSettings) -> _Standing:
    return _Standing(
        held=np.zeros(size, np.int64),
        noticed=np.zeros(size, np.int64),
        bad_s=np.full(size, now_s - settings.age_start_s),
        good_s=np.full(size, np.nan),
        shock_s=np.full(size, -np.inf),
        shock_held=np.ones(size),
        shock_fraction=np.zeros(size),
        success_s=np.full(size, -np.inf),
        fail_s=np.full(size, -np.inf),
        failures=np.zeros(size, np.int64),
        down_s=np.full(size, np.nan),
        believed=np.full(size, np.inf),
        probe=np.ones(size),
        price_usd_h=np.zeros(size),
    )


def _aligned(memory: HazardMemory, groups: Mapping[str, Group], now_s: float) -> HazardMemory:
    """The memory with exactly the rows of `groups`; new ones know the priors."""
    names = tuple(groups)
    if names == memory.layout.names:
        return memory
    old = memory.layout.index
    into = np.array([row for row, name in enumerate(names) if name in old], np.int64)
    out = np.array([old[name] for name in names if name in old], np.int64)
    tally = _new_tally(len(names))
    standing = _new_standing(len(names), now_s, memory.settings)
    standing.price_usd_h[:] = _prices(groups)
    kept = {name: getattr(memory.tally, name) for name in _NOT_BY_GROUP}
    return dataclasses.replace(
        memory,
        layout=_layout(groups),
        tally=dataclasses.replace(_moved(tally, memory.tally, into, out), **kept),
        standing=_moved(standing, memory.standing, into, out),
    )


R = TypeVar("R", _Tally, _Standing)


def _moved(new: R, old: R, into: Ints, out: Ints) -> R:
    for f in dataclasses.fields(new):
        if f.name not in _NOT_BY_GROUP:
            getattr(new, f.name)[into] = getattr(old, f.name)[out]
    return new


def _copied(standing: _Standing) -> _Standing:
    return _Standing(**{f: getattr(standing, f).copy() for f in _STANDING_FIELDS})


_STANDING_FIELDS = tuple(f.name for f in dataclasses.fields(_Standing))


def _faded(tally: _Tally, passed_s: float, settings: HazardSettings) -> _Tally:
    """A copy in which every count has faded by its half-life."""
    slow = 0.5 ** (passed_s / settings.half_life_s)
    fast = 0.5 ** (passed_s / settings.launch_half_life_s)
    values: dict[str, Any] = {name: getattr(tally, name) * slow for name in _FADES_SLOWLY}
    values.update({name: getattr(tally, name) * fast for name in _FADES_FAST})
    return _Tally(**values)
