"""What could a day of requests and a market look like, where nobody recorded one?

    requests   a daily wave × slow noise × bursts, then Poisson counts a minute
    capacity   zones that are up and down in turn; ages matter; regions share shocks
    prices     a slow walk around each zone's own level

Up-runs are Weibull with a shape below 1, so that a zone which has just come back is the likeliest
to go again and an old one hardly ever; down-runs likewise. What the recorded traces show is in
these shapes (a reclaim rate that falls with age, zones of one region that fail together, drops
that take much of a zone at once), but no number is fitted to any of them. All of it follows from
the seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from autoscaler.snapshot import MachineType, Resources, region_of
from autoscaler.traces import Counts
from autoscaler.world import Floats, Ints, MarketTrace, Profile, ProfileMachine, ServiceTime

ZONES = ("east-1a", "east-1b", "west-2a", "west-2b")
"""Two regions of two zones."""

EXAMPLE_PROFILE = Profile(
    (
        ProfileMachine(
            MachineType("p3.2xlarge", 3.06, 150.0, 0.1, Resources(8.0, 1.0, 61000.0)),
            ServiceTime(100.0, per_input_token_ms=0.3, per_output_token_ms=22.0, spread=0.1),
            boot_s=90.0,
            load_s=60.0,
            concurrency=16,
            price_spot_usd_h=0.918,
        ),
    )
)
"""A language model on one V100, as in autoscaler/profiles/llm-v100.yaml."""

UP_SHAPE, DOWN_SHAPE = 0.6, 0.8


def generate_requests(
    seed: int,
    *,
    duration_s: float = 86400.0,
    interval_s: float = 60.0,
    rate_rps: float = 20.0,
    wave: float = 0.6,
    noise: float = 0.15,
    bursts_per_day: float = 8.0,
    input_tokens: float = 400.0,
    output_tokens: float = 120.0,
) -> Counts:
    """Counts of a service with a daily wave (± `wave` of the mean), noise and bursts.

    `noise`: standard deviation of the logarithm of a slow disturbance (its memory is half an hour).
    A burst multiplies the traffic by up to 3 and fades within some 10 minutes. Tokens are means of
    each interval.
    """
    rng = np.random.default_rng([seed, 10])
    t_s = _times(duration_s, interval_s)
    width_s = np.minimum(interval_s, duration_s - t_s)
    day = 1 + wave * np.sin(2 * np.pi * (t_s / 86400 - 0.3))
    slow = np.exp(noise * _remembering(len(t_s), np.exp(-interval_s / 1800), rng))
    burst = 1 + _bursts(t_s, duration_s, bursts_per_day, rng)
    number = rng.poisson(rate_rps * width_s * day * slow * burst).astype(np.float64)
    tokens = [
        np.round(mean * np.exp(0.1 * rng.standard_normal(len(t_s))))
        for mean in (input_tokens, output_tokens)
    ]
    return Counts(t_s, width_s, number, tokens[0], tokens[1])


def _times(duration_s: float, step_s: float) -> Floats:
    return np.arange(0.0, duration_s, step_s).astype(np.float64)


def _remembering(steps: int, memory: float, rng: np.random.Generator) -> Floats:
    """A stationary series of mean 0 and deviation 1, each step `memory` of the last (AR(1))."""
    shocks = rng.standard_normal(steps) * np.sqrt(1 - memory**2)
    series, now = np.empty(steps), float(rng.standard_normal())
    for step, shock in enumerate(shocks.tolist()):
        now = memory * now + shock
        series[step] = now
    return series


def _bursts(t_s: Floats, duration_s: float, per_day: float, rng: np.random.Generator) -> Floats:
    extra = np.zeros(len(t_s))
    for start_s in rng.uniform(0, duration_s, rng.poisson(per_day * duration_s / 86400)):
        height, fade_s = rng.uniform(0.3, 2.0), rng.uniform(120, 600)
        since_s = np.maximum(t_s - start_s, 0)
        extra += np.where(t_s >= start_s, height * np.exp(-since_s / fade_s), 0)
    return extra


def generate_market(
    seed: int,
    *,
    zones: Sequence[str] = ZONES,
    duration_s: float = 86400.0,
    interval_s: float = 300.0,
    nodes: int = 16,
    up_mean_s: float = 4 * 3600.0,
    down_mean_s: float = 2400.0,
    shocks_per_day: float = 2.0,
    price_usd_h: float = 0.918,
) -> MarketTrace:
    """Capacity and prices of spot zones.

    A zone that is up has from a third of `nodes` to all of them, drawn for each up-run; what it has
    steps down now and then within one. `shocks_per_day`: how often a whole region goes down.
    """
    rng = np.random.default_rng([seed, 11])
    t_s = _times(duration_s, interval_s)
    shocked = {
        region: _shocks(t_s, shocks_per_day, down_mean_s, rng)
        for region in dict.fromkeys(region_of(zone) for zone in zones)
    }
    capacity = np.column_stack(
        [
            _zone(t_s, nodes, up_mean_s, down_mean_s, rng) * ~shocked[region_of(zone)]
            for zone in zones
        ]
    )
    price_t_s = _times(duration_s, 3600.0)
    price = np.column_stack([_prices(len(price_t_s), price_usd_h, rng) for _ in zones])
    return MarketTrace(tuple(zones), t_s, capacity.astype(np.int64), price_t_s, price)


def _zone(t_s: Floats, nodes: int, up_s: float, down_s: float, rng: np.random.Generator) -> Ints:
    level = np.zeros(len(t_s), dtype=np.int64)
    at_s, is_up = -float(rng.uniform(0, up_s)), bool(rng.random() < up_s / (up_s + down_s))
    while at_s < t_s[-1]:
        run_s = _weibull(up_s if is_up else down_s, UP_SHAPE if is_up else DOWN_SHAPE, rng)
        if is_up:
            inside = (t_s >= at_s) & (t_s < at_s + run_s)
            level[inside] = _levels(int(inside.sum()), nodes, rng)
        at_s, is_up = at_s + run_s, not is_up
    return level


def _levels(steps: int, nodes: int, rng: np.random.Generator) -> Ints:
    """Nodes during one up-run: one level, and now and then a fall to a part of it for a while."""
    level = max(1, round(nodes * float(rng.uniform(1 / 3, 1.2))))
    levels = np.full(steps, min(level, nodes), dtype=np.int64)
    for start in np.nonzero(rng.random(steps) < 0.01)[0]:
        stop = start + rng.integers(1, 12)
        levels[start:stop] = np.floor(levels[start:stop] * rng.uniform(0.2, 0.6))
    return levels


def _shocks(
    t_s: Floats, per_day: float, down_s: float, rng: np.random.Generator
) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """When a region is down as a whole."""
    duration_s = float(t_s[-1])
    is_down = np.zeros(len(t_s), dtype=np.bool_)
    for start_s in rng.uniform(0, duration_s, rng.poisson(per_day * duration_s / 86400)):
        is_down |= (t_s >= start_s) & (t_s < start_s + _weibull(down_s, DOWN_SHAPE, rng))
    return is_down


def _weibull(mean_s: float, shape: float, rng: np.random.Generator) -> float:
    """Of mean `mean_s`: the scale is the mean / Γ(1 + 1/shape)."""
    return float(rng.weibull(shape) * mean_s / math.gamma(1 + 1 / shape))


def _prices(hours: int, mean_usd_h: float, rng: np.random.Generator) -> Floats:
    own = mean_usd_h * float(rng.uniform(0.85, 1.5))
    prices: Floats = np.round(own * np.exp(0.08 * _remembering(hours, 0.98, rng)), 4)
    return prices


# --- as files


def requests_lines(counts: Counts) -> Iterator[str]:
    """`t_s,requests` with tokens a request, as `traces.read_requests` reads it."""
    yield "t_s,requests,input_tokens,output_tokens\n"
    columns = (counts.t_s, counts.requests, counts.input_tokens, counts.output_tokens)
    yield from _rows(columns)


def market_lines(zones: Sequence[str], t_s: Floats, values: Floats | Ints) -> Iterator[str]:
    """`t_s,ZONE…` as `traces.read_market` reads it."""
    yield ",".join(["t_s", *zones]) + "\n"
    yield from _rows((t_s, *values.T))


def _rows(columns: Iterable[Floats | Ints]) -> Iterator[str]:
    for row in zip(*(column.tolist() for column in columns), strict=True):
        yield ",".join(f"{value:.10g}" for value in row) + "\n"
