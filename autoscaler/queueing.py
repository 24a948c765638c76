"""How late are requests with so many replicas, and how few replicas are enough?

A request is late when its wait and its service together exceed the SLO. All workers (replicas ×
concurrency) are taken for one queue, which is what sending to the least loaded comes close to:

    arrivals λ, in bursts ──► queue ──► c workers, each takes what waits, up to B at a time
                              wait W        service t(b) = fixed + per_item · b

    P(late) = (1 − C) · P(S > slo)  +  C · P(W + S > slo),      W given a wait: exponential

- Batching never waits for company, so with exponential times the queue that is met when all
  workers are busy is geometric: its ratio r solves λ = (c / t(b)) · r · b, b = 1 + r + … + r^(B−1)
  (Gross and Harris, Fundamentals of Queueing Theory, "bulk service"; the cut equations give it for
  c workers too). b is the mean batch at that load. With B = 1 all of it is Erlang's M/M/c.
- C, the chance of a wait, is Erlang's, of c / z workers and a / z load (Hayward) where z, the
  peakedness of the arrivals, is 1 + (Ca² − 1) / (1 + Cs²): exact for Poisson arrivals, for constant
  times, and for exponential ones in heavy traffic.
- The mean wait of those who wait is scaled by (Ca² + Cs²) / 2 (Allen and Cunneen).
- Ca² is the index of dispersion of counts, measured over spans like those a queue remembers.
- S has the shape of the measured histogram, or is lognormal, in `SHAPE_CELLS` cells; W + S is
  integrated in each cell exactly.

More than a queue in balance: `late_share_during` lets a backlog or an overload grow as a fluid.
What the formulas still get wrong is learned by `Residual`, from what was measured.

Everything is vectorised: arguments broadcast, one row a model. Nothing here forecasts demand, knows
prices, or remembers: `Dispersion` and `Residual` are values that the caller keeps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from autoscaler.snapshot import SERVICE_EDGES_MS, ServiceCurve

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

SHAPE_CELLS = 32
REPLICAS_END = 10_000_000
"""More replicas than this nobody is told to have."""
EXCESS_FRACTION = 0.1
"""Where service alone nearly breaks the objective, waits may add this part of `late_max`."""

_LEVELS = special.ndtr(np.linspace(-3.5, 4.5, SHAPE_CELLS + 1))
_MASS: Floats = np.diff(_LEVELS) / (_LEVELS[-1] - _LEVELS[0])
_SIGMAS: Floats = np.linspace(-3.5, 4.5, SHAPE_CELLS + 1)
_SIGMA_MIN = 1e-3
_MIDDLES_MS: Floats = np.sqrt(np.asarray(SERVICE_EDGES_MS[1:]) * np.asarray(SERVICE_EDGES_MS[:-1]))
_EDGES_MS: Floats = np.asarray(SERVICE_EDGES_MS)
_LOADS = 64
_MODELS_AT_ONCE = 32  # what is worked out for so many stays in the processor's cache
_STRETCHES: Floats = np.array([-np.inf, 0.0, 0.75, 1.5, 2.25, 3.0, np.inf])
_STRETCH_SHARE: Floats = np.diff(special.ndtr(_STRETCHES))
_STRETCH_SIGMAS: Floats = -np.diff(np.exp(-(_STRETCHES**2) / 2)) / np.sqrt(2 * np.pi)
_STRETCH_SIGMAS /= _STRETCH_SHARE
_GALLOP: Floats = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64], dtype=np.float64)
_PARTS: Floats = np.arange(1, 13) / 12.0


@dataclass(frozen=True, eq=False)
class Curves:
    """Service curves made ready for arithmetic; all fields have the shape S of the curves, [models]
    or (), and some one more axis.

    `edges` [S, cells + 1] of the service time as a multiple of its mean; `bends` [S, cells + 1]:
    how much the density drops at each edge. `evens`: 1/2 where the shape is of one request, and so
    narrows by √b in a batch of b; 0 where batches themselves were measured. `spare_log`
    [S, loads + 1]: log((1 − r) / (1 − u)) at evenly spaced loads u in 0..1; None where no curve
    batches.
    """

    fixed_ms: Floats
    item_ms: Floats
    workers: Floats
    batch_max: Floats
    cv2: Floats
    edges: Floats
    bends: Floats
    evens: Floats
    spare_log: Floats | None

    @classmethod
    def of(cls, curves: ServiceCurve | Curves | Sequence[ServiceCurve]) -> Curves:
        """Ready curves of one (shape ()) or of several (shape [n]); cheap for ones seen before."""
        if isinstance(curves, Curves):
            return curves
        if isinstance(curves, ServiceCurve):
            return _curves_of_one(curves)
        return _curves_of(tuple(curves))

    @functools.cached_property
    def alone_ms(self) -> Floats:
        """The mean time of a request served alone."""
        return np.asarray(self.fixed_ms + self.item_ms)

    @functools.cached_property
    def rate_max_rps(self) -> Floats:
        """Requests a second that one replica can finish at most."""
        full_ms = self.fixed_ms + self.item_ms * self.batch_max
        return np.asarray(1e3 * self.workers * self.batch_max / full_ms)

    @functools.cached_property
    def _table(self) -> tuple[Ints, Floats]:
        """Where each curve's row of `spare_log` begins, and all rows one after the other."""
        table = np.zeros(1) if self.spare_log is None else self.spare_log
        rows = np.arange(self.fixed_ms.size, dtype=np.int64) * (_LOADS + 1)
        return rows.reshape(self.fixed_ms.shape), table.ravel()

    def slowed(self, factor: ArrayLike) -> Curves:
        """The same with all times multiplied by `factor` (for instance `Residual.service`)."""
        by = np.asarray(factor, dtype=np.float64)
        return replace(self, fixed_ms=self.fixed_ms * by, item_ms=self.item_ms * by)

    def _part(self, rows: slice) -> Curves:
        """Those of some models; all of them where one curve serves for all."""
        if self.fixed_ms.size == 1:
            return self
        return Curves(
            self.fixed_ms[rows],
            self.item_ms[rows],
            self.workers[rows],
            self.batch_max[rows],
            self.cv2[rows],
            self.edges[rows],
            self.bends[rows],
            self.evens[rows],
            None if self.spare_log is None else self.spare_log[rows],
        )

    def _with_axis(self) -> Curves:
        """The same, to broadcast against [models, candidates]."""
        return Curves(
            self.fixed_ms[..., None],
            self.item_ms[..., None],
            self.workers[..., None],
            self.batch_max[..., None],
            self.cv2[..., None],
            self.edges[..., None, :],
            self.bends[..., None, :],
            self.evens[..., None],
            None if self.spare_log is None else self.spare_log[..., None, :],
        )


@functools.lru_cache(maxsize=4096)
def _curves_of_one(curve: ServiceCurve) -> Curves:
    many = _curves_of((curve,))
    return Curves(
        many.fixed_ms[0],
        many.item_ms[0],
        many.workers[0],
        many.batch_max[0],
        many.cv2[0],
        many.edges[0],
        many.bends[0],
        many.evens[0],
        None if many.spare_log is None else many.spare_log[0],
    )


@functools.lru_cache(maxsize=8)
def _curves_of(curves: tuple[ServiceCurve, ...]) -> Curves:
    columns = np.array(
        [(c.fixed_ms, c.per_item_ms, c.concurrency, c.batch_size_max, c.cv) for c in curves],
        dtype=np.float64,
    ).reshape(-1, 5)
    fixed, item, workers, batch_max, cv = columns.T.copy()
    sigma = np.maximum(np.sqrt(np.log1p(cv**2)), _SIGMA_MIN)
    edges = np.exp(sigma[:, None] * _SIGMAS)
    cv2, evens = cv**2, np.full(len(curves), 0.5)
    for row, curve in enumerate(curves):
        if curve.histogram and (counts := np.asarray(curve.histogram)).sum() > 0:
            edges[row], mean_ms, cv2[row] = _shape_of(counts)
            evens[row] = 0.0
            if curve.batch_size_max == 1:  # else the sizes of the measured batches are not known
                fixed[row], item[row] = mean_ms, 0.0
    edges /= ((edges[:, 1:] + edges[:, :-1]) / 2 @ _MASS)[:, None]
    density = np.zeros((len(curves), SHAPE_CELLS + 2))
    density[:, 1:-1] = _MASS / np.diff(edges, axis=1)
    spare = _spare_log(fixed, item, batch_max) if (batch_max > 1).any() else None
    bends = density[:, :-1] - density[:, 1:]
    return Curves(fixed, item, workers, batch_max, cv2, edges, bends, evens, spare)


def _shape_of(counts: Floats) -> tuple[Floats, float, float]:
    """Edges of the cells of equal mass to a lognormal's, mean in ms, and cv² of a histogram."""
    share = counts / counts.sum()
    mean = float(share @ _MIDDLES_MS)
    cv2 = float(share @ (_MIDDLES_MS - mean) ** 2) / mean**2
    seen = np.flatnonzero(counts)
    first, last = int(seen[0]), int(seen[-1]) + 1
    below = np.concatenate(([0.0], np.cumsum(share[first:last])))
    levels = (_LEVELS - _LEVELS[0]) / (_LEVELS[-1] - _LEVELS[0])
    edges = np.interp(levels, below, _EDGES_MS[first : last + 1])
    widths = np.maximum(np.diff(edges), 1e-6 * mean)  # a cell of no width has no density
    return edges[0] + np.concatenate(([0.0], np.cumsum(widths))), mean, cv2


def _spare_log(fixed: Floats, item: Floats, batch_max: Floats) -> Floats:
    """log((1 − r) / (1 − u)) for loads u = 0, 1/64, … 1, by bisection of u(r) = r·b/t(b) · t(B)/B.

    Tabulated because it depends on the curve only, and smooth to both ends, where 1 − r is not.
    """
    load = np.linspace(0.0, 1.0, _LOADS + 1)[1:-1]
    size = batch_max[:, None]
    full = size / (fixed[:, None] + item[:, None] * size)
    low, high = np.zeros((len(fixed), _LOADS - 1)), np.ones((len(fixed), _LOADS - 1))
    for _ in range(44):
        middle = (low + high) / 2
        batch = _batch_size(middle, middle**size)
        is_below = middle * batch / (fixed[:, None] + item[:, None] * batch) < load * full
        low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
    table = np.zeros((len(fixed), _LOADS + 1))
    table[:, 1:-1] = np.log((1 - low) / (1 - load))
    # At the full load both vanish; their ratio is 1 / u'(r) at r = 1, with b' = B (B − 1) / 2.
    full_ms = fixed + item * batch_max
    table[:, -1] = -np.log(1 + (batch_max - 1) / 2 * fixed / full_ms)
    return table


def _batch_size(ratio: Floats, ratio_power: Floats) -> Floats:
    """1 + r + … + r^(B−1), the mean size of a batch that is taken from a geometric queue."""
    return np.asarray((1 - ratio_power) / np.maximum(1 - ratio, 1e-300))


def erlang_b(servers: ArrayLike, load: ArrayLike) -> Floats:
    """The share of Poisson arrivals that `servers` (a real number ≥ 0) without a queue turn away.

    1/B = Γ(c+1, a) eᵃ / a^c (Jagerman 1974), stable to 10,000 servers and beyond.
    """
    c, a = np.asarray(servers, dtype=np.float64), np.asarray(load, dtype=np.float64)
    safe = np.maximum(a, 1e-300)
    tail = special.gammaincc(c + 1, safe)
    density = np.exp(c * np.log(safe) - safe - special.gammaln(c + 1))
    if (is_deep := tail < 1e-200).any():  # far more load than servers: the fluid's 1 − c/a, nearly
        blocked = np.where(is_deep, 1 - c / safe, density / np.where(is_deep, 1.0, tail))
    else:
        blocked = density / tail
    return np.asarray(np.minimum(np.maximum(blocked, 0.0), 1.0))


def erlang_c(servers: ArrayLike, load: ArrayLike) -> Floats:
    """The share of Poisson arrivals that wait for one of `servers`; 1 where load ≥ servers."""
    c, a = np.asarray(servers, dtype=np.float64), np.asarray(load, dtype=np.float64)
    blocked = erlang_b(c, a)
    used = np.minimum(a / np.maximum(c, 1e-300), 1.0)
    return _delayed(blocked, 1 - used)


def _delayed(blocked: Floats, spare: Floats) -> Floats:
    """From a share turned away to the share that waits, if what waits is geometric, 1 − r `spare`.

    The balance of M/M[1,B]/c: p(c, q) = p(c, 0) · r^q; with B = 1, Erlang C from Erlang B.
    """
    return np.asarray(blocked / np.maximum(blocked + spare * (1 - blocked), 1e-300))


def late_fraction(
    rate_rps: ArrayLike,
    replicas: ArrayLike,
    curve: Curves | ServiceCurve,
    slo_ms: ArrayLike,
    dispersion: ArrayLike = 1.0,
    rate_cv: ArrayLike = 0.0,
) -> Floats:
    """The share of requests that take longer than `slo_ms`; arguments broadcast to its shape.

    In 0..1; falls with `replicas`, rises with `rate_rps`, and is 1 where the load is 1 or more.
    Without requests it is what service alone would make late, whatever the replicas. `rate_cv`:
    standard deviation / mean of a rate that moves more slowly than the queue; it is taken to be
    lognormal and the shares of the rates are averaged.
    """
    curves = Curves.of(curve)
    slo = np.asarray(slo_ms, dtype=np.float64)
    return _late(
        np.asarray(rate_rps, dtype=np.float64),
        np.asarray(replicas, dtype=np.float64),
        curves,
        slo,
        np.asarray(dispersion, dtype=np.float64),
        unavoidable_fraction(curves, slo),
        np.asarray(rate_cv, dtype=np.float64),
    )


def unavoidable_fraction(curve: Curves | ServiceCurve, slo_ms: ArrayLike) -> Floats:
    """The share that is late however many replicas there are: service alone takes too long."""
    curves = Curves.of(curve)
    slo = np.asarray(slo_ms, dtype=np.float64) / curves.alone_ms
    over = np.maximum(curves.edges - slo[..., None], 0.0)
    return np.asarray(np.minimum(np.maximum((curves.bends * over).sum(axis=-1), 0.0), 1.0))


def _late(
    rate: Floats,
    replicas: Floats,
    curves: Curves,
    slo_ms: Floats,
    dispersion: Floats,
    calm: Floats,
    rate_cv: Floats,
) -> Floats:
    """The late share of the requests, of which more come when the rate is high (size-biased)."""
    if not rate_cv.any():
        return _late_steady(rate, replicas, curves, slo_ms, dispersion, calm)
    sigma = np.sqrt(np.log1p(rate_cv[..., None] ** 2))
    rates = rate[..., None] * np.exp(sigma * _STRETCH_SIGMAS + sigma**2 / 2)
    late = _late_steady(
        rates,
        replicas[..., None],
        curves._with_axis(),
        slo_ms[..., None],
        dispersion[..., None],
        calm[..., None],
    )
    return np.asarray(late @ _STRETCH_SHARE)


def _late_steady(
    rate: Floats, replicas: Floats, curves: Curves, slo_ms: Floats, dispersion: Floats, calm: Floats
) -> Floats:
    some = np.maximum(replicas, 1e-9)
    workers = some * curves.workers
    load = rate / (some * curves.rate_max_rps)
    spare, batch, power = _queue_met(curves, np.minimum(load, 1.0))
    peak = np.maximum(1 + (dispersion - 1) / (1 + curves.cv2), 0.05)
    erlangs = rate * (curves.alone_ms / 1e3)
    delayed = _delayed(erlang_b(workers / peak, erlangs / peak), spare)
    wait_ms = _wait_ms(curves, workers, batch, power, dispersion)
    seen = np.minimum(curves.batch_max, 2 * batch - 1)  # larger batches hold more of the requests
    tail = _tail(curves, wait_ms, seen, slo_ms)
    late = np.minimum(calm + delayed * np.maximum(tail - calm, 0.0), 1.0)
    return np.asarray(np.where(rate > 0, np.where(load < 1, late, 1.0), calm))


def _queue_met(curves: Curves, load: Floats) -> tuple[Floats, Floats, Floats]:
    """1 − r, the mean batch, and r^B at a load 0..1."""
    spare = 1 - load
    if curves.spare_log is None:
        return spare, np.ones_like(load), load
    at = load * _LOADS
    cell = np.minimum(at.astype(np.int64), _LOADS - 1)
    row, table = curves._table
    low, high = table[row + cell], table[row + cell + 1]
    spare = spare * np.exp(low + (high - low) * (at - cell))
    power = np.exp(curves.batch_max * np.log1p(-np.minimum(spare, 1 - 1e-15)))
    batch = (1 - power) / np.maximum(spare, 1e-9)
    return spare, np.where(spare > 1e-9, np.maximum(batch, 1.0), curves.batch_max), power


def _wait_ms(
    curves: Curves, workers: Floats, batch: Floats, power: Floats, dispersion: Floats
) -> Floats:
    """The mean wait of those who wait: for the next free worker, then for full batches ahead.

    The part ahead is scaled by (Ca² + Cs²) / (1 + b): both variances for one request, against
    those of M/M[1,b]. b = 1 gives Allen and Cunneen's formula.
    """
    spread = dispersion + curves.cv2
    ahead = power / np.maximum(1 - power, 1e-12)
    turn_ms = (curves.fixed_ms + curves.item_ms * batch) / workers
    return np.asarray(turn_ms * (spread * (0.5 + ahead / (1 + batch))))


def _tail(curves: Curves, wait_ms: Floats, batch: Floats, slo_ms: Floats) -> Floats:
    """P(W + S > slo), W exponential, S uniform in each cell of its shape; in units of E[S]."""
    service_ms = curves.fixed_ms + curves.item_ms * batch
    pace = np.asarray(service_ms / np.maximum(wait_ms, 1e-9 * service_ms))[..., None]
    pace = np.maximum(pace, 1e-9)
    room = np.asarray(slo_ms / service_ms)[..., None]
    if curves.spare_log is None:
        room = room - curves.edges
        narrow = np.ones_like(service_ms)
    else:
        # No narrower than leaves the longest times as long as alone: more load is never better.
        narrow = np.minimum(batch**curves.evens, service_ms / curves.alone_ms)
        room = (room - 1) - (curves.edges - 1) / narrow[..., None]
    risen = np.expm1(-pace * np.maximum(room, 0.0)) / pace + np.maximum(-room, 0.0)
    return np.asarray((curves.bends * risen).sum(axis=-1) * narrow)


@dataclass(frozen=True, eq=False)
class Sizing:
    """How many replicas, by model.

    `late`: what they should make late. `is_attainable`: whether the objective can be held at all;
    where service alone uses up 90 % of `late_max` or more it is False, and `replicas` keep the
    share that waiting adds within a tenth of `late_max`.
    """

    replicas: Ints
    late: Floats
    is_attainable: Bools


def replicas_needed(
    rate_rps: ArrayLike,
    curve: Curves | ServiceCurve,
    slo_ms: ArrayLike,
    late_max: ArrayLike,
    dispersion: ArrayLike = 1.0,
    backlog: ArrayLike = 0.0,
    clear_s: ArrayLike = 30.0,
    residual: ArrayLike = 1.0,
    rate_cv: ArrayLike = 0.0,
) -> Sizing:
    """The fewest replicas that keep the late share within `late_max`, by model; none for no rate.

    `backlog`: requests queued beyond what is usual, to be worked off within `clear_s` beside what
    arrives. `residual`: by how much late shares are known to exceed the formula's (`Residual`).
    """
    curves = Curves.of(curve)
    rate, slo, target, spread, queued, within, excess, moving = _rows(
        curves, rate_rps, slo_ms, late_max, dispersion, backlog, clear_s, residual, rate_cv
    )
    calm = unavoidable_fraction(curves, slo)
    slack = EXCESS_FRACTION * target / excess
    is_attainable = calm + slack <= target / excess
    aim = np.maximum(target / excess, calm + slack)
    replicas, late = np.empty((2, len(rate)))
    for begin in range(0, len(rate), _MODELS_AT_ONCE):
        rows = slice(begin, begin + _MODELS_AT_ONCE)
        columns = (column[rows] for column in (rate, slo, spread, calm, moving, aim))
        replicas[rows], late[rows] = _Search(curves._part(rows), *columns).fewest()
    if (queued > 0).any():
        flow = (rate + queued / np.maximum(within, 1e-9)) / curves.rate_max_rps
        replicas = np.maximum(replicas, np.where(queued > 0, np.ceil(flow), 0.0))
        late = _late(rate, replicas, curves, slo, spread, calm, moving)
    return Sizing(replicas.astype(np.int64), np.minimum(late * excess, 1.0), is_attainable)


def _rows(curves: Curves, *values: ArrayLike) -> list[Floats]:
    """All values as arrays of one shape [models]."""
    arrays = [np.asarray(value, dtype=np.float64) for value in values]
    models = max(curves.fixed_ms.size, *(array.size for array in arrays))
    full = [np.full(models, array) if array.ndim == 0 else array for array in arrays]
    return [row if row.size == models else np.broadcast_to(row, (models,)) for row in full]


@dataclass(frozen=True, eq=False)
class _Search:
    """The fewest replicas, for all models at once: a gallop, then 12 parts at a time.

    A dozen candidates in one evaluation cost one model hardly more than one candidate.
    """

    curves: Curves
    rate: Floats
    slo: Floats
    dispersion: Floats
    calm: Floats
    rate_cv: Floats
    target: Floats

    def fewest(self) -> tuple[Floats, Floats]:
        """How many, and what they make late."""
        low = np.floor(self.rate / self.curves.rate_max_rps)  # too few: the load is 1 or more
        step = np.ceil(0.2 * np.sqrt(low * np.maximum(self.dispersion, 1.0)) + 0.5)
        low, high, late = self._bracket(low, low[:, None] + step[:, None] * _GALLOP)
        while (is_open := np.isinf(high) & (low < REPLICAS_END)).any():
            step = step * 8
            low_too, high_too, late_too = self._bracket(low, low[:, None] + step[:, None] * _GALLOP)
            low = np.where(is_open, low_too, low)
            high, late = np.where(is_open, high_too, high), np.where(is_open, late_too, late)
        high = np.minimum(high, low + 64 * step)
        while (width := high - low).max() > 1:
            parts = np.minimum(low[:, None] + np.ceil(width[:, None] * _PARTS), high[:, None])
            low, high, late = self._bracket(low, parts)
        return np.where(self.rate > 0, high, 0.0), late

    def _bracket(self, low: Floats, candidates: Floats) -> tuple[Floats, Floats, Floats]:
        """The last candidate that is too few (`low` if none), the first that is enough (inf if
        none), and what the latter makes late. Candidates rise.
        """
        late = _late(
            self.rate[:, None],
            candidates,
            self._wide,
            self.slo[:, None],
            self.dispersion[:, None],
            self.calm[:, None],
            self.rate_cv[:, None],
        )
        first = (late > self.target[:, None]).sum(axis=1)  # late shares fall with the candidates
        rows, last = np.arange(len(low)), candidates.shape[1] - 1
        few = np.where(first > 0, candidates[rows, np.maximum(first - 1, 0)], low)
        at = np.minimum(first, last)
        return few, np.where(first > last, np.inf, candidates[rows, at]), late[rows, at]

    @functools.cached_property
    def _wide(self) -> Curves:
        return self.curves._with_axis()


def rate_max_rps(
    replicas: ArrayLike,
    curve: Curves | ServiceCurve,
    slo_ms: ArrayLike,
    late_max: ArrayLike,
    dispersion: ArrayLike = 1.0,
    rate_cv: ArrayLike = 0.0,
) -> Floats:
    """The largest rate that so many replicas carry within `late_max`, to 1 part in 20,000.

    0 where service alone makes more late.
    """
    curves = Curves.of(curve)
    count, slo, target, spread, moving = _rows(
        curves, replicas, slo_ms, late_max, dispersion, rate_cv
    )
    calm = unavoidable_fraction(curves, slo)
    low, width = np.zeros(count.shape), np.ones(count.shape)
    full = count * curves.rate_max_rps
    wide = curves._with_axis()
    for _ in range(4):
        loads = low[:, None] + width[:, None] * _PARTS
        late = _late(
            full[:, None] * loads,
            count[:, None],
            wide,
            slo[:, None],
            spread[:, None],
            calm[:, None],
            moving[:, None],
        )
        is_good = late <= target[:, None]
        low = np.where(is_good, loads, low[:, None]).max(axis=1)
        width = width / len(_PARTS)
    return np.asarray(low * full)


def late_fraction_mixed(
    rate_rps: float,
    replicas: Sequence[tuple[ServiceCurve, float]],
    slo_ms: float,
    dispersion: float = 1.0,
) -> float:
    """The late share of one model whose replicas run on different machines: (curve, how many).

    An approximation in two parts. A request that need not wait goes to the fastest free worker, so
    each machine type is offered what all faster ones turn away (Erlang B, one after the other). A
    request that waits is taken by whoever is free first: by machine types in proportion to how
    fast they finish; its wait is that of alike workers of the mean pace. Exact for one type.
    """
    kinds = sorted(
        ((Curves.of(curve), float(count)) for curve, count in replicas if count > 0),
        key=lambda kind: float(kind[0].alone_ms),
    )
    if rate_rps <= 0 or not kinds:
        return float(unavoidable_fraction(kinds[0][0], slo_ms)) if kinds and rate_rps <= 0 else 1.0
    capacity = np.array([count * curves.rate_max_rps for curves, count in kinds])
    load = rate_rps / float(capacity.sum())
    if load >= 1:
        return 1.0
    share = capacity / capacity.sum()
    met = [np.array(_queue_met(curves, np.asarray(load))) for curves, _ in kinds]
    spare, batch, power = np.einsum("k,kv->v", share, np.array(met))
    workers = np.array([count * curves.workers for curves, count in kinds])
    pace = workers / np.array([float(curves.alone_ms) for curves, _ in kinds])
    cv2 = float(share @ np.array([float(curves.cv2) for curves, _ in kinds]))
    peak = max(1 + (dispersion - 1) / (1 + cv2), 0.05)
    erlangs = rate_rps / 1e3 * float(workers.sum() / pace.sum())
    delayed = float(_delayed(erlang_b(workers.sum() / peak, erlangs / peak), np.asarray(spare)))
    offered, calm_late, taken_all, waited_late = rate_rps, 0.0, 0.0, 0.0
    turn_rate = sum(
        count * float(curves.workers) / float(curves.fixed_ms + curves.item_ms * batch)
        for curves, count in kinds
    )
    wait_ms = (dispersion + cv2) / turn_rate * (0.5 + power / (1 - power) / (1 + batch))
    for (curves, _), part, servers in zip(kinds, share, workers, strict=True):
        turned_away = offered * float(erlang_b(servers, offered * curves.alone_ms / 1e3))
        calm = float(unavoidable_fraction(curves, slo_ms))
        calm_late += (offered - turned_away) * calm
        taken_all += offered - turned_away
        offered = turned_away
        seen = np.minimum(curves.batch_max, 2 * batch - 1)
        tail = float(_tail(curves, np.asarray(wait_ms), seen, np.asarray(slo_ms)))
        waited_late += float(part) * max(tail, calm)
    late = (1 - delayed) * calm_late / max(taken_all, 1e-300) + delayed * waited_late
    return float(np.clip(late, 0.0, 1.0))


def late_share_during(
    rate_rps: ArrayLike,
    replicas: ArrayLike,
    curve: Curves | ServiceCurve,
    slo_ms: ArrayLike,
    lasting_s: ArrayLike,
    backlog: ArrayLike = 0.0,
    dispersion: ArrayLike = 1.0,
) -> Floats:
    """The late share of the requests that arrive within `lasting_s`, with `backlog` ones queued.

    A fluid: the queue moves by λ − cμ a second, and who finds Q waiting waits Q / (cμ). While that
    and the mean service exceed the SLO all are late; at other times, the queue in balance.
    """
    curves = Curves.of(curve)
    rate, count, lasting, queued = (
        np.asarray(value, dtype=np.float64) for value in (rate_rps, replicas, lasting_s, backlog)
    )
    capacity = count * curves.rate_max_rps
    room_s = np.maximum(np.asarray(slo_ms, dtype=np.float64) - curves.alone_ms, 0.0) / 1e3
    gap = room_s * capacity - queued  # how far the queue is from making everybody late
    growth = rate - capacity
    turn_s = np.where(growth != 0, gap / np.where(growth != 0, growth, 1.0), np.inf)
    before = np.clip(turn_s, 0.0, lasting) / np.maximum(lasting, 1e-9)
    is_late_first = gap < 0
    share = np.where(
        growth > 0,
        np.where(is_late_first, 1.0, 1 - before),
        np.where(is_late_first, np.where(growth < 0, before, 1.0), 0.0),
    )
    balanced = late_fraction(rate, count, curves, slo_ms, dispersion)
    calm = np.where(growth < 0, balanced, unavoidable_fraction(curves, slo_ms))
    return np.asarray(np.where(rate > 0, share + (1 - share) * calm, 0.0))


def dispersion_of(counts: ArrayLike, bins: int = 1, window: int = 32) -> float:
    """The index of dispersion of counts: variance / mean of arrivals, 1 for Poisson ones.

    `bins` neighbours are pooled first: choose spans like the SLO or the time a queue takes to
    empty. The variance is that around a straight line through each `window` of pooled counts, so a
    ramp is no burst; 1 where there is no whole window or nothing arrived.
    """
    flat = np.asarray(counts, dtype=np.float64).ravel()
    whole = flat[: len(flat) // (bins * window) * bins * window].reshape(-1, window, bins).sum(-1)
    if not len(whole) or whole.sum() <= 0:
        return 1.0
    line = np.arange(window) - (window - 1) / 2
    line = line / np.sqrt(line @ line)
    left = whole - whole.mean(axis=1, keepdims=True)
    left = left - (left @ line)[:, None] * line
    return float((left**2).sum() / (window - 2) / len(whole) / whole.mean())


@dataclass(frozen=True, eq=False)
class Dispersion:
    """Memory of how bursty arrivals are, by model, at the scales of 1 and of 4 bins.

    `level`, `slope` [2, models]: the line that counts are expected on (Brown's double smoothing,
    over `WINDOW_S`), after `seen` counts. `square`, `mean` [2, models]: forgetful sums of squared
    distances from the line, and of counts; `weight` [models]: over how many bins. `pooled`
    [models]: what of 4 bins has come, `phase` of them. `bin_s`: the width of a bin (0: nothing
    seen yet). The last axis of all arrays is the models; zeros are a model not seen before.
    """

    level: Floats
    slope: Floats
    seen: Floats
    square: Floats
    mean: Floats
    weight: Floats
    pooled: Floats
    bin_s: float = 0.0
    phase: int = 0

    def index(self) -> Floats:
        """Of bursts shorter than a bin: for the `dispersion` of `late_fraction`; 0.1..100.

        Near 1 until more than some 20 requests have been seen.
        """
        near, far = self._excess
        moved = np.clip((far - near) / 3, 0.0, np.maximum(near, 0.0))
        return np.asarray(np.clip(1 + near - moved, 0.1, 100.0))

    def rate_cv(self) -> Floats:
        """Of moves of the rate that last longer than a bin: for the `rate_cv` of `late_fraction`;
        0..2. Slower moves than `WINDOW_S` are left to the forecast.

        A burst that comes at once adds the same to the index of dispersion at all scales; a
        moving rate adds cv² · λ · span. So two scales tell one from the other.
        """
        near, far = self._excess
        moved = np.clip((far - near) / 3, 0.0, np.maximum(near, 0.0))
        count = self.mean[0] / np.maximum(self.weight, 1e-9)
        return np.asarray(np.minimum(np.sqrt(moved / np.maximum(count, 1e-9)), 2.0))

    @property
    def _excess(self) -> tuple[Floats, Floats]:
        near, far = (self.square + _PRIOR) / (self.mean + _PRIOR) - 1
        return near, far


WINDOW_S = 120.0
"""What moves more slowly than this is demand, and the forecast's; what is faster is burstiness."""
_PRIOR = 20.0
_FOUR = 4
_WARM = 8


def dispersion_memory(models: int) -> Dispersion:
    """A memory of nothing."""
    level, slope, seen, square, mean = np.zeros((5, 2, models))
    return Dispersion(level, slope, seen, square, mean, np.zeros(models), np.zeros(models))


def observe_dispersion(
    memory: Dispersion, counts: ArrayLike, bin_s: float, half_life_s: float = 1800.0
) -> Dispersion:
    """Folds arrivals [models, bins] in; another `bin_s` than before starts anew."""
    rows = np.atleast_2d(np.asarray(counts, dtype=np.float64))
    if memory.bin_s != bin_s:
        memory = replace(dispersion_memory(rows.shape[0]), bin_s=bin_s)
    keep = 0.5 ** (bin_s / half_life_s)
    for count in rows.T:
        is_warm = memory.seen[0] >= _WARM
        memory = replace(
            _folded(memory, 0, count, keep),
            weight=memory.weight * keep + is_warm,
            pooled=memory.pooled + count,
            phase=memory.phase + 1,
        )
        if memory.phase == _FOUR:
            memory = replace(
                _folded(memory, 1, memory.pooled, keep**_FOUR),
                pooled=np.zeros_like(memory.pooled),
                phase=0,
            )
    return memory


def _folded(memory: Dispersion, scale: int, count: Floats, keep: float) -> Dispersion:
    """With one count more. Its distance from the line is larger than from the true mean by what
    the line itself errs: by α (1 + 4β + 5β²) / (1 + β)³ of the variance, β = 1 − α (Brown 1963).
    """
    level, slope, seen, square, mean = (
        memory.level.copy(),
        memory.slope.copy(),
        memory.seen.copy(),
        memory.square.copy(),
        memory.mean.copy(),
    )
    span_s = memory.bin_s * (_FOUR if scale else 1)
    part = np.maximum(min(span_s / WINDOW_S, 0.5), 1 / (seen[scale] + 1))
    rest = 1 - part
    missed = count - (level[scale] + slope[scale])
    own = part * (1 + 4 * rest + 5 * rest**2) / (1 + rest) ** 3
    is_warm = seen[scale] >= _WARM
    square[scale] = square[scale] * keep + is_warm * missed**2 / (1 + own)
    mean[scale] = mean[scale] * keep + is_warm * count
    level[scale] += slope[scale] + (1 - rest**2) * missed
    slope[scale] += part**2 * missed * (seen[scale] > 1)
    seen[scale] += 1
    return replace(memory, level=level, slope=slope, seen=seen, square=square, mean=mean)


@dataclass(frozen=True, eq=False)
class Residual:
    """What the formulas get wrong, by model, learned from what was measured.

    Forgetful sums of late requests and of mean service times, as measured and as predicted.
    """

    late_seen: Floats
    late_told: Floats
    service_seen: Floats
    service_told: Floats

    @property
    def late(self) -> Floats:
        """Factor on predicted late shares, 1/4..4; near 1 until about five were late or due."""
        return np.clip((self.late_seen + 5.0) / (self.late_told + 5.0), 0.25, 4.0)

    @property
    def service(self) -> Floats:
        """Factor on service times, 1/2..3; near 1 until some 50 requests were measured."""
        return np.clip((self.service_seen + 50.0) / (self.service_told + 50.0), 0.5, 3.0)


def residual_memory(models: int) -> Residual:
    """A memory of nothing: all factors are 1."""
    return Residual(*(np.zeros(models) for _ in range(4)))


def observe_residual(
    memory: Residual,
    finished: ArrayLike,
    late: ArrayLike,
    late_predicted: ArrayLike,
    is_steady: ArrayLike = True,
    service_factor: ArrayLike = 1.0,
    forget: float = 0.98,
) -> Residual:
    """Folds one interval in, by model.

    `late_predicted`: the share that `late_fraction` told for the replicas that were ready.
    `is_steady`: False leaves the interval out (replicas warm up, a backlog clears, capacity is
    short: none of that is the formula's error). `service_factor`: measured mean service / the
    curve's. `forget`: what is kept of the past each interval.
    """
    use = np.asarray(is_steady, dtype=np.float64)
    count = np.asarray(finished, dtype=np.float64) * use
    keep = np.where(use > 0, forget, 1.0)
    told = np.asarray(late_predicted, dtype=np.float64)
    return Residual(
        memory.late_seen * keep + np.asarray(late, dtype=np.float64) * use,
        memory.late_told * keep + count * told,
        memory.service_seen * keep + count * np.asarray(service_factor, dtype=np.float64),
        memory.service_told * keep + count,
    )
