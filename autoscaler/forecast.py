"""How much demand is to be expected when a machine launched now is ready?

    arrivals ─► rate now (three speeds) ─► members ─► quantiles each ─► weighted ─► calibrated
                                           last, fast, slow, trends,    by recent   conformal
                                           day ago, week ago, usual,    pinball
                                           quantile regression          loss

Rates are handled as logarithms: demand doubles and halves. Each member forecasts the rate some
steps ahead; trends are local linear ones, tracked by Kalman filters that know the Poisson noise of
a count (Harvey 1989, Forecasting, Structural Time Series Models). The quantiles round a forecast
follow from its own residuals, whose scale and shape are tracked step by step. Members are mixed
with weights that fall with their recent pinball loss (Koenker and Bassett 1978), and what the
mixture still gets wrong is taken out by adaptive conformal inference (Gibbs and Candès 2021): each
level has a correction that rises after a miss and falls after a hit, so that a stated 95 % covers
95 % in the long run, whatever the demand does.

A count shows the rate only through Poisson noise, which `queueing` reckons with already. So the
variance that the noise alone would explain is taken out of the band.

When the band has been missed far too often lately, the forecast says so and is never below the
recent maximum, with a margin: reactive, until its coverage is back.

All arrays have a row a model; nothing here knows prices, machines or replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]

STEPS_AHEAD = (1, 2, 3, 5, 8, 13)
"""The horizons that are learned, in steps."""

MEMBERS = (
    "last", "fast", "slow", "steady trend", "trend", "lively trend", "day", "week", "regression",
    "usual",
)  # fmt: skip
LAST, FAST, SLOW, TREND, _, _, DAY, WEEK, REGRESSION, USUAL = range(len(MEMBERS))

TREND_NOISE: Floats = np.array([1e-11, 4e-10, 1e-8])
"""How lively the three trends are: variance a second of the slope of the log rate, by second."""
LEVEL_NOISE = 1e-6
"""Variance a second of the log rate's own level."""
TREND_LASTS_S = 600.0
"""A slope is expected to die away in about this time."""

SEASONAL: NDArray[np.bool_] = np.isin(np.arange(len(MEMBERS)), (DAY, WEEK))
# How strongly shares follow losses: within a family, and between families over a day and lately.
EAGER, EAGER_DAY, EAGER_NOW = 16.0, 8.0, 2.0
FEATURES = 5
RECENT = 10
COARSE_STEPS = 10
DAY_S, WEEK_S = 86_400.0, 7 * 86_400.0
_PENDING = STEPS_AHEAD[-1] + 1


@dataclass(frozen=True, slots=True)
class ForecastSettings:
    """`levels`: the quantiles that are forecast, rising. `step_s`: what is forecast is the mean
    rate of such a step. `fast_s`, `last_s`, `slow_s`: time constants of the smoothed rates;
    `usual_steps`: over how many steps the usual level is taken. `scale_prior`: the standard
    deviation of the log rate ahead before anything was seen. `coverage_min`: less than this part of
    the stated 95 % is a lost coverage.
    """

    levels: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.975, 0.99, 0.995)
    step_s: float = 60.0
    fast_s: float = 20.0
    last_s: float = 60.0
    slow_s: float = 240.0
    scale_prior: float = 0.06
    memory_steps: float = 60.0
    usual_steps: float = 360.0
    conformal_rate: float = 0.05
    coverage_min: float = 0.8
    floor_margin: float = 1.1
    horizon_days: int = 8


@dataclass(frozen=True, eq=False)
class ForecastMemory:
    """What is remembered; M models, H horizons, K members, L levels, F features, P pending steps.

    `smooth` [M, 3]: smoothed rates; `smooth_weight` [M, 3]: what of each is real. `trend`
    [M, 3, 5]: by filter, level and slope of the log rate and their covariance (11, 12, 22).
    `usual` [M]: its mean over hours. `recent` [M, RECENT]: log rates of the last steps. `coarse`
    [M, C]: log rates of the last days in ten-step means, NaN where unknown, slot `coarse_at` next.
    `pending_*`: forecasts that wait for their step. `shape`, `scale`: the members' residuals;
    `loss`, `loss_daily`: their pinball losses, lately and over a day.
    """

    settings: ForecastSettings
    steps: int
    now_s: float
    part_s: float
    part: Floats
    smooth: Floats
    smooth_weight: Floats
    trend: Floats
    usual: Floats
    recent: Floats
    coarse: Floats
    coarse_at: int
    coarse_sum: Floats
    coarse_steps: int
    pending_point: Floats
    pending_features: Floats
    pending_quantile: Floats
    shape: Floats
    scale: Floats
    loss: Floats
    loss_daily: Floats
    beta: Floats
    correction: Floats
    hits: Floats
    hits_weight: Floats


@dataclass(frozen=True, slots=True)
class Forecast:
    """Rates ahead, in requests a second: `rate_rps` [models, horizons, levels], rising along the
    levels; `rate_mean` [models, horizons]. `coverage` [models]: the share of recent steps within
    the stated 95 %.
    """

    levels: tuple[float, ...]
    rate_rps: Floats
    rate_mean: Floats
    coverage: Floats
    is_covered: bool
    because: str


def fresh(models: int, settings: ForecastSettings) -> ForecastMemory:
    """A memory of nothing."""
    horizons, members, levels = len(STEPS_AHEAD), len(MEMBERS), len(settings.levels)
    z = special.ndtri(np.asarray(settings.levels))
    growth = np.sqrt(np.asarray(STEPS_AHEAD, dtype=np.float64))
    scale = settings.scale_prior * growth[None, :, None]
    slots = int(settings.horizon_days * DAY_S / (COARSE_STEPS * settings.step_s))
    return ForecastMemory(
        settings=settings,
        steps=0,
        now_s=0.0,
        part_s=0.0,
        part=np.zeros(models),
        smooth=np.zeros((models, 3)),
        smooth_weight=np.zeros((models, 3)),
        trend=np.zeros((models, len(TREND_NOISE), 5)),
        usual=np.full(models, np.nan),
        recent=np.full((models, RECENT), np.nan),
        coarse=np.full((models, slots), np.nan),
        coarse_at=0,
        coarse_sum=np.zeros(models),
        coarse_steps=0,
        pending_point=np.full((models, _PENDING, horizons, members), np.nan),
        pending_features=np.zeros((models, _PENDING, FEATURES)),
        pending_quantile=np.full((models, _PENDING, horizons, levels), np.nan),
        shape=np.broadcast_to(z, (models, horizons, members, levels)).copy(),
        scale=np.broadcast_to(scale, (models, horizons, members)).copy(),
        loss_daily=np.full((models, horizons, members), 0.1) * settings.scale_prior,
        loss=np.full((models, horizons, members), 0.1) * settings.scale_prior,
        beta=np.zeros((models, horizons, levels, FEATURES))
        + (scale * z)[..., None] * (np.arange(FEATURES) == 0),
        correction=np.zeros((models, horizons, levels)),
        hits=np.zeros(models),
        hits_weight=np.zeros(models),
    )


def observe(
    memory: ForecastMemory,
    counts: NDArray[Any],
    bin_s: float,
    now_s: float,
    settings: ForecastSettings,
) -> ForecastMemory:
    """`memory` after arrivals `counts` [models, bins] in bins of `bin_s`, the last ending now."""
    memory = replace(memory, settings=settings, now_s=now_s)
    for k, count in enumerate(np.asarray(counts, dtype=np.float64).T):
        memory = _smoothed(memory, count / bin_s, bin_s)
        memory = replace(memory, part=memory.part + count, part_s=memory.part_s + bin_s)
        if memory.part_s >= settings.step_s - 1e-6:
            ended_s = now_s - (counts.shape[1] - 1 - k) * bin_s
            memory = _stepped(memory, ended_s)
    return memory


def _smoothed(memory: ForecastMemory, rate: Floats, bin_s: float) -> ForecastMemory:
    settings = memory.settings
    part = -np.expm1(-bin_s / np.array([settings.last_s, settings.fast_s, settings.slow_s]))
    smooth = memory.smooth * (1 - part) + rate[:, None] * part
    return replace(
        memory,
        smooth=smooth,
        smooth_weight=memory.smooth_weight * (1 - part) + part,
        trend=_filtered(memory, rate, bin_s),
    )


def _filtered(memory: ForecastMemory, rate: Floats, bin_s: float) -> Floats:
    """The trends' filters after a bin with `rate` [M]: predict, then correct."""
    seen = np.log(rate + 0.5 / bin_s)[:, None]
    is_new = memory.smooth_weight[:, :1] == 0
    level, slope, p11, p12, p22 = np.moveaxis(memory.trend, -1, 0)
    kept = np.exp(-bin_s / TREND_LASTS_S)
    level = np.where(is_new, seen, level + slope * bin_s)
    p11 = np.where(is_new, 0.1, p11 + bin_s * (2 * p12 + bin_s * p22) + LEVEL_NOISE * bin_s)
    p12 = (p12 + bin_s * p22) * kept
    p22 = np.where(is_new, 1e-6, p22 * kept**2 + TREND_NOISE * bin_s)
    slope = slope * kept
    noise = 1.0 / np.maximum(np.exp(np.minimum(level, 30.0)) * bin_s, 0.5)
    surprise = np.clip(seen - level, -3.0, 3.0)
    gain1, gain2 = p11 / (p11 + noise), p12 / (p11 + noise)
    return np.stack(
        [
            level + gain1 * surprise,
            np.clip(slope + gain2 * surprise, -0.02, 0.02),
            p11 * (1 - gain1),
            p12 * (1 - gain1),
            p22 - gain2 * p12,
        ],
        axis=-1,
    )


def _log_rates(memory: ForecastMemory) -> Floats:
    """Log of the smoothed rates [M, 3] (last, fast, slow), without the bias of their start."""
    floor = 0.5 / memory.settings.step_s
    logs: Floats = np.log(memory.smooth / np.maximum(memory.smooth_weight, 1e-12) + floor)
    return logs


# ── one step over: score what was forecast for it, learn, forecast anew ─────────────────────────


def _stepped(memory: ForecastMemory, ended_s: float) -> ForecastMemory:
    settings = memory.settings
    y = np.log(memory.part / memory.part_s + 0.5 / settings.step_s)
    memory = _scored(memory, y)
    memory = _remembered(memory, y)
    points = _points(memory, ended_s)
    features = _features(memory)
    quantiles = _mixed(memory, points, features)
    slot = memory.steps % _PENDING
    pending_point = memory.pending_point.copy()
    pending_features = memory.pending_features.copy()
    pending_quantile = memory.pending_quantile.copy()
    pending_point[:, slot] = points
    pending_features[:, slot] = features
    pending_quantile[:, slot] = quantiles
    return replace(
        memory,
        steps=memory.steps + 1,
        part=np.zeros_like(memory.part),
        part_s=0.0,
        pending_point=pending_point,
        pending_features=pending_features,
        pending_quantile=pending_quantile,
    )


def _scored(memory: ForecastMemory, y: Floats) -> ForecastMemory:
    """Learn from the step that has ended with log rate `y` [M]."""
    shape, scale, loss = memory.shape.copy(), memory.scale.copy(), memory.loss.copy()
    daily = memory.loss_daily.copy()
    beta, correction = memory.beta.copy(), memory.correction.copy()
    levels = np.asarray(memory.settings.levels)
    keep = 1 - 1 / memory.settings.memory_steps
    for h, ahead in enumerate(STEPS_AHEAD):
        if memory.steps < ahead:
            continue
        slot = (memory.steps - ahead) % _PENDING
        points, features = memory.pending_point[:, slot, h], memory.pending_features[:, slot]
        residual = y[:, None] - points  # [M, K]
        known = ~np.isnan(residual)
        residual = np.where(known, residual, 0.0)
        spread = scale[:, h, :, None] * shape[:, h]
        straight = (beta[:, h] * features[:, None, :]).sum(axis=-1)  # [M, L]
        spread[:, REGRESSION] = straight
        is_under = residual[..., None] <= spread
        pinball = (residual[..., None] - spread) * (levels - is_under)
        fresh_loss = pinball.mean(axis=-1)
        pace = max(0.05, 1.0 / (memory.steps - ahead + 2))
        loss[:, h] = np.where(
            known, loss[:, h] + max(1 - keep, pace / 4) * (fresh_loss - loss[:, h]), loss[:, h]
        )
        day_pace = max(memory.settings.step_s / DAY_S, 1 / (memory.steps - ahead + 2))
        daily[:, h] = np.where(
            known, daily[:, h] + day_pace * (fresh_loss - daily[:, h]), 1.2 * daily[:, h, :1]
        )  # who has said nothing yet begins a little behind the last rate
        shape[:, h] += np.where(known[..., None], 0.05 * (levels - is_under), 0.0)
        size = np.abs(residual) * 1.2533  # of a normal one: the standard deviation
        scale[:, h] += np.where(known, max(1 - keep, pace / 4) * (size - scale[:, h]), 0.0)
        step = 0.1 * scale[:, h, REGRESSION, None] * (levels - is_under[:, REGRESSION])
        norm = 1.0 + (features[:, 1:] ** 2).sum(axis=-1)
        beta[:, h] += step[..., None] * features[:, None, :] / norm[:, None, None]
        told = memory.pending_quantile[:, slot, h]
        miss = levels - (y[:, None] <= told)
        correction[:, h] += np.where(
            np.isnan(told), 0.0, memory.settings.conformal_rate * scale[:, h, LAST, None] * miss
        )
    hits, weight = _hits(memory, y)
    scale = np.maximum(scale, 1e-3)
    return replace(
        memory, shape=shape, scale=scale, loss=loss, loss_daily=daily, beta=beta,
        correction=correction, hits=hits, hits_weight=weight,
    )  # fmt: skip


def _hits(memory: ForecastMemory, y: Floats) -> tuple[Floats, Floats]:
    """How often the stated 95 % has held lately, three steps ahead."""
    h = STEPS_AHEAD.index(3)
    if memory.steps < STEPS_AHEAD[h]:
        return memory.hits, memory.hits_weight
    level = int(np.argmin(np.abs(np.asarray(memory.settings.levels) - 0.95)))
    told = memory.pending_quantile[:, (memory.steps - STEPS_AHEAD[h]) % _PENDING, h, level]
    part = np.where(np.isnan(told), 0.0, 1 / 40)
    return memory.hits * (1 - part) + part * (y <= told), memory.hits_weight * (1 - part) + part


def _remembered(memory: ForecastMemory, y: Floats) -> ForecastMemory:
    """Recent steps and the days' memory with one more step."""
    recent = np.concatenate([memory.recent[:, 1:], y[:, None]], axis=1)
    before = np.where(np.isnan(memory.usual), y, memory.usual)
    pace = max(1 / (memory.steps + 1), 1 / memory.settings.usual_steps)
    usual = before + pace * (y - before)
    total, steps = memory.coarse_sum + y, memory.coarse_steps + 1
    coarse, at = memory.coarse, memory.coarse_at
    if steps == COARSE_STEPS:
        coarse = coarse.copy()
        coarse[:, at % coarse.shape[1]] = total / steps
        total, steps, at = np.zeros_like(total), 0, at + 1
    return replace(
        memory, usual=usual, recent=recent, coarse=coarse, coarse_at=at,
        coarse_sum=total, coarse_steps=steps,
    )  # fmt: skip


# ── members ─────────────────────────────────────────────────────────────────────────────────────


def _points(memory: ForecastMemory, now_s: float) -> Floats:
    """Each member's log rate [M, H, K]; NaN where it has nothing to say."""
    logs = _log_rates(memory)
    points = np.full((len(logs), len(STEPS_AHEAD), len(MEMBERS)), np.nan)
    points[:, :, LAST] = points[:, :, REGRESSION] = logs[:, :1]
    points[:, :, FAST] = logs[:, 1:2]
    points[:, :, SLOW] = logs[:, 2:]
    points[:, :, USUAL] = memory.usual[:, None]
    ahead_s = (np.asarray(STEPS_AHEAD) - 0.5) * memory.settings.step_s
    lasting_s = TREND_LASTS_S * -np.expm1(-ahead_s / TREND_LASTS_S)
    level, slope = memory.trend[:, None, :, 0], memory.trend[:, None, :, 1]
    rise = np.clip(slope * lasting_s[None, :, None], -1.5, 1.5)
    points[:, :, TREND : TREND + len(TREND_NOISE)] = level + rise
    for member, period_s in ((DAY, DAY_S), (WEEK, WEEK_S)):
        change = _change_before(memory, period_s)
        points[:, :, member] = logs[:, :1] + change
    return points


def _change_before(memory: ForecastMemory, period_s: float) -> Floats:
    """How the log rate changed over each horizon one period ago [M, H]; NaN where unknown."""
    coarse_s = COARSE_STEPS * memory.settings.step_s
    slots = memory.coarse.shape[1]
    back = period_s / coarse_s
    # The newest whole slot is `coarse_at` - 1; its middle lies half a slot and a part ago.
    here = memory.coarse_at - 0.5 + memory.coarse_steps / COARSE_STEPS - back
    ahead = np.asarray(STEPS_AHEAD, dtype=np.float64) / COARSE_STEPS
    if here < 0.5 or memory.coarse_at - here > slots - 1:
        return np.full((len(memory.coarse), len(ahead)), np.nan)
    then = _between(memory, np.array([here]))
    change: Floats = _between(memory, here + ahead) - then
    return change


def _between(memory: ForecastMemory, at: Floats) -> Floats:
    """The days' memory between slots [M, len(at)]; a slot`s middle is at its number + 0.5."""
    low = np.floor(at - 0.5).astype(np.int64)
    part = at - 0.5 - low
    slots = memory.coarse.shape[1]
    first, second = memory.coarse[:, low % slots], memory.coarse[:, (low + 1) % slots]
    found: Floats = first * (1 - part) + second * part
    return found


def _features(memory: ForecastMemory) -> Floats:
    """[M, F]: a constant, what moves fast, what moves slowly, the trend, and yesterday's change."""
    logs = _log_rates(memory)
    day = _change_before(memory, DAY_S)[:, STEPS_AHEAD.index(3)]
    columns = [
        np.ones(len(logs)),
        np.clip(logs[:, 1] - logs[:, 0], -2, 2),
        np.clip(logs[:, 0] - logs[:, 2], -2, 2),
        np.clip(600 * memory.trend[:, 1, 1], -2, 2),
        np.clip(np.nan_to_num(day), -2, 2),
    ]
    return np.stack(columns, axis=1)


def _mixed(memory: ForecastMemory, points: Floats, features: Floats) -> Floats:
    """Quantiles of the log rate [M, H, L]: members mixed by their losses, calibrated, in order."""
    spread = memory.scale[..., None] * memory.shape
    spread[:, :, REGRESSION] = np.einsum("mhlf,mf->mhl", memory.beta, features)
    quantiles = points[..., None] + spread  # [M, H, K, L]
    weight = _weights(memory, points)
    mixed = np.einsum("mhk,mhkl->mhl", weight, np.nan_to_num(quantiles)) + memory.correction
    ordered: Floats = np.maximum.accumulate(mixed, axis=-1)
    return ordered


def _weights(memory: ForecastMemory, points: Floats) -> Floats:
    """The members' shares [M, H, K]: exponential in the excess over the least loss.

    Two families, what has just been and what repeats, are weighed within by their losses lately,
    and against each other mostly by those over about a day: what repeats is right where it matters
    for minutes a day only, and no better at other times.
    """
    known = ~np.isnan(points)
    raw = np.zeros_like(points)
    for family in (SEASONAL, ~SEASONAL):
        own = known & family
        raw += own * np.exp(
            -EAGER * _excess(memory.loss, own, own)
            - EAGER_DAY * _excess(memory.loss_daily, known, own, is_best=True)
            - EAGER_NOW * _excess(memory.loss, known, own, is_best=True)
        )
    shares: Floats = raw / raw.sum(axis=-1, keepdims=True)
    return shares


def _excess(
    loss: Floats, among: NDArray[np.bool_], of: NDArray[np.bool_], is_best: bool = False
) -> Floats:
    """By what part the losses (the least of them, if `is_best`) `of` some members exceed the least
    one `among` others; 50 at most.
    """
    least = np.where(among, loss, np.inf).min(axis=-1, keepdims=True)
    own = np.where(of, loss, np.inf)
    own = own.min(axis=-1, keepdims=True) if is_best else own
    return np.asarray(np.minimum(own / np.clip(least, 1e-9, 1e9) - 1, 50.0))


# ── what is expected ────────────────────────────────────────────────────────────────────────────


def predict(memory: ForecastMemory, horizons_s: Sequence[float]) -> Forecast:
    """Rates at each of `horizons_s` (0 counts as one step ahead; beyond the last, the last)."""
    settings = memory.settings
    points = _points(memory, memory.now_s)
    logs = _mixed(memory, points, _features(memory))
    logs = _raised(memory, _without_noise(memory, logs))
    steps = np.asarray(horizons_s, dtype=np.float64) / settings.step_s
    places = np.minimum(np.searchsorted(STEPS_AHEAD, steps - 1e-9), len(STEPS_AHEAD) - 1)
    floor = 0.5 / settings.step_s
    rates = np.maximum(np.exp(logs[:, places]) - floor, 0.0)
    coverage = memory.hits / np.maximum(memory.hits_weight, 1e-9)
    is_lost = (coverage < 0.95 * settings.coverage_min) & (memory.hits_weight > 0.2)
    because = ""
    if is_lost.any():
        recent = np.exp(np.nanmax(memory.recent[is_lost], axis=1)) * settings.floor_margin
        rates[is_lost] = np.maximum(rates[is_lost], recent[:, None, None])
        worst = float(coverage[is_lost].min())
        because = f"forecast: 95 % covered only {100 * worst:.0f} % lately, floor at recent maximum"
    return Forecast(
        levels=settings.levels,
        rate_rps=rates,
        rate_mean=rates[:, :, 0],
        coverage=coverage,
        is_covered=not bool(is_lost.any()),
        because=because,
    )


def _raised(memory: ForecastMemory, logs: Floats) -> Floats:
    """All quantiles moved up by as much as the fast rate, less 3 standard deviations of its count,
    is above the highest one of the step to come: a burst is seen before its step is over.
    """
    settings = memory.settings
    rate = memory.smooth[:, FAST] / np.maximum(memory.smooth_weight[:, FAST], 1e-12)
    sure = rate - 3 * np.sqrt(rate / (2 * settings.fast_s))  # the variance of such a smoothing
    burst = np.log(np.maximum(sure, 0.0) + 0.5 / settings.step_s) - logs[:, 0, -1]
    return np.asarray(logs + np.maximum(burst, 0.0)[:, None, None])


def _without_noise(memory: ForecastMemory, logs: Floats) -> Floats:
    """Quantiles of the rate from those of a step's count. A Poisson count with mean n has quantiles
    near (√(n + 3/8) + z/2)² − 3/8 (Anscombe 1948), and independent variances add.
    """
    z = special.ndtri(np.asarray(memory.settings.levels))
    middle = logs[..., :1]
    count = np.maximum(np.exp(middle) * memory.settings.step_s - 0.5, 0.0)
    noisy = np.maximum((np.sqrt(count + 0.375) + z / 2) ** 2 - 0.375, count)
    noise = np.log((noisy + 0.5) / (count + 0.5))
    rate: Floats = middle + np.sqrt(np.maximum((logs - middle) ** 2 - noise**2, 0.0))
    return np.maximum.accumulate(rate, axis=-1)


def reindexed(
    memory: ForecastMemory, before: Sequence[str], after: Sequence[str]
) -> ForecastMemory:
    """The same for another list of models: known ones keep their past, new ones begin."""
    row = {name: i for i, name in enumerate(before)}
    new = fresh(len(after), memory.settings)
    kept = [(i, row[name]) for i, name in enumerate(after) if name in row]
    to, of = [i for i, _ in kept], [k for _, k in kept]
    changed: dict[str, Any] = {}
    for field in fields(memory):
        value = getattr(memory, field.name)
        if isinstance(value, np.ndarray):
            moved = getattr(new, field.name)
            moved[to] = value[of]
            changed[field.name] = moved
    return replace(memory, **changed)
