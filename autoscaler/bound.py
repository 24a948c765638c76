"""What is the least that any policy could have paid in this world, had it known the future?

A linear program that may do everything a policy may, and more: it knows every request and every
machine that will be taken, rents fractions of nodes, and cuts requests into pieces. What it can't
do is what nobody can: rent spot nodes where there are none, have a node before its cold start is
over, serve a request before it came, or leave more of them late than the objective allows.

    nodes   │      ┌───┐ capacity, less what can't be up yet      time is cut into steps; a group
            │  ┌───┘ ▒ └──┐                                       (machine × market × zone) has
            │──┘▒▒▒▒▒▒▒▒▒▒└──                                     ready nodes at each edge, new ones
            └───┴───┴───┴───► steps                               within each step, and a mean
    work    │        ╱ arrived ─┐
            │      ╱╱           │ what is done by an edge lies between what came by then and what
            │    ╱╱ due ────────┘ was due by then (one SLO later), less what was skipped
            └────────────────►

- Ready nodes now were alive a whole cold start ago, so capacity counts from its least since then.
- A node that stays is paid for; one that leaves and comes back pays its cold start again.
- Where the SLO is shorter than a step, the nodes of the step must bear its steepest bursts, and
  those nodes are whole: the rows say so by mixed-integer rounding.
- Machines differ: any prices σ give each request the value min over machines of σ · seconds there,
  and a worker of machine m then makes at most σ_m of value a second. Exact where machines differ
  by a factor only; otherwise the best of a few σ is taken (each is a bound).
- The budget of late requests has a price λ, so that windows of a long trace are apart:
  Σ over windows of min(cost + λ · skipped) − λ · budget is a bound for each λ ≥ 0 (Lagrange), and
  one set of solved λ serves every attainment. The best λ is found from tangents (Kelley 1960).
- A window begins with any nodes for nothing, and with all that had come by then done.

What is reported is never the solver's primal cost. Its row prices y ≤ 0, whatever their quality,
give b·y + Σ min over the bounds of (c − Aᵀy)·x ≤ optimum, since each variable has two finite
bounds (weak duality); that sum is computed here, less an allowance for rounding.

Not here, since all of it can only cost more: billing by whole increments, failed launches, nodes
that are whole everywhere (`integer_plan` has those), requests in one piece, queueing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from autoscaler.snapshot import Group, Market
from autoscaler.world import Floats, Ints, World

STEP_LEAST_S, STEP_MOST_S = 10.0, 60.0
STEPS_USUAL = 4320  # a day of 20 s, 15 days of 5 minutes
STEPS_S = (10.0, 12.0, 15.0, 20.0, 30.0, 60.0, 120.0, 150.0, 200.0, 300.0, 600.0, 900.0, 1800.0)
"""Traces are by the minute or by ten: steps that cut a minute elsewhere see its peaks halved."""

WINDOW_STEPS, WINDOW_LEAST_S = 720, 24 * 3600.0
"""The solver's time grows faster than a window; each window gives away a fleet's cold starts."""

SOLVE_MOST_S = 60.0
LAMBDAS_MOST = 14
GAP_FRACTION = 1e-3
"""The search for the best λ ends when no other could raise the bound by more than this."""

SKIP_RANKS = (0.0, 0.03, 0.1, 0.25, 0.5, 0.75)
"""Where the curve of most work by requests skipped is touched, as shares of a step's requests."""

BURST_LENGTHS = 5
"""Lengths between the SLO and a step of spans that are looked at for bursts."""

FRACTION_LEAST = 0.05
"""A burst needs this much of one more node before the node counts as whole (for the numerics)."""

TIE_S = 1e-8
ROUNDING = 1e-11
"""What is taken off each certified value, as a share of its terms."""

SUMS = 1e-9
"""What is taken off the bound for rounding in sums over millions of requests, as a share."""


# --- answers


@dataclass(frozen=True)
class Bound:
    """A certified lower bound on cost, for every attainment at once.

    `certified_usd[i]`: Σ over windows of the dual value at `lambdas_usd[i]` a skipped request,
    without reserved nodes. `requests`: how many there were, `impossible` of which no machine can
    serve within the SLO. `node_means[i]`: the plan's mean nodes by group, to explain, not to
    certify. `step_s`: mean width of a step.
    """

    step_s: float
    windows: int
    requests: int
    impossible: int
    reserved_usd: float
    lambdas_usd: tuple[float, ...]
    certified_usd: tuple[float, ...]
    skipped: tuple[float, ...]
    node_means: tuple[Mapping[str, float], ...]
    markets: Mapping[str, Market]

    def at(self, attainment: float) -> float:
        """USD that no policy can beat with that share of requests on time."""
        values = self._values(attainment)
        return self.reserved_usd + max(0.0, *values) if values else self.reserved_usd

    def nodes_by_market(self, attainment: float) -> dict[Market, float]:
        """Mean ready nodes, rented that is, in the relaxed plan behind the bound."""
        totals: dict[Market, float] = {}
        values = self._values(attainment)
        if values:
            for group, nodes in self.node_means[int(np.argmax(values))].items():
                totals[self.markets[group]] = totals.get(self.markets[group], 0.0) + nodes
        return totals

    def budget(self, attainment: float) -> float:
        """How many requests may still be skipped, after those that can't be on time anyway."""
        return max((1.0 - attainment) * self.requests - self.impossible, 0.0)

    def _values(self, attainment: float) -> list[float]:
        budget = self.budget(attainment) * (1 + SUMS)
        return [
            (1 - SUMS) * value - price * budget
            for price, value in zip(self.lambdas_usd, self.certified_usd, strict=True)
        ]


@dataclass(frozen=True)
class IntegerPlan:
    """What the same program costs with whole nodes.

    `cost_usd`: of the best plan found, None when the time was too short for any. `bound_usd`: what
    the solver proved that no plan of whole nodes beats. `relaxed_usd`: the linear program on the
    same steps; cost less this is the price of whole nodes. All with reserved nodes.
    """

    step_s: float
    cost_usd: float | None
    bound_usd: float
    relaxed_usd: float


def bound(
    world: World,
    *,
    attainments: Sequence[float],
    step_s: float | None = None,
    window_s: float | None = None,
) -> Bound:
    """The bound on cost in `world`, tight at `attainments` and true at every other.

    `step_s`: about how long a step is (default: a sixth of a cold start, 10 to 60 s, and longer
    where that made more than 4,320 steps).
    `window_s`: about how long a window is (default: 720 steps, or a day if that is longer).
    Shorter steps and longer windows most often give higher bounds, and take longer.

    Raises:
        ValueError: a step or a window that isn't positive, an attainment outside 0..1.
    """
    _check(attainments, step_s, window_s)
    step_s = step_s or _usual_step_s(world)
    window_s = window_s or max(WINDOW_STEPS * step_s, WINDOW_LEAST_S)
    values = _best_values(world, attainments[0] if attainments else 1.0)
    stage = _stage(world, values, step_s)
    cuts = _cuts(stage.demand.due, max(round(window_s / step_s), 1))
    search = _Search(stage, tuple(_programs(stage, cuts)), _first_lambda(stage))
    for attainment in attainments:
        search.refine(attainment)
    return search.answer()


def integer_plan(
    world: World,
    *,
    attainment: float,
    step_s: float | None = None,
    time_limit_s: float = 20.0,
) -> IntegerPlan:
    """The program with whole nodes, over the whole trace at once (default: 96 steps).

    Raises:
        ValueError: as `bound` does.
    """
    _check([attainment], step_s, None)
    step_s = step_s or max(world.duration_s / 96, 1.0)
    stage = _stage(world, _best_values(world, attainment), step_s)
    (program,) = _programs(stage, [0, len(stage.demand.due)])
    budget = max((1 - attainment) * stage.demand.requests - stage.demand.impossible, 0.0)
    whole = program.within(budget)
    relaxed = whole.solve(0.0).value
    found = _solve_whole(whole, time_limit_s)
    cost, least = (None if found[0] is None else found[0] + stage.reserved_usd), found[1]
    return IntegerPlan(
        stage.step_s,
        cost,
        stage.reserved_usd + max(least, relaxed),
        stage.reserved_usd + max(relaxed, 0.0),
    )


def integer_plan_usd(world: World, *, attainment: float, **options: float) -> float:
    """The cost of `integer_plan`; infinite when none was found in its time."""
    cost = integer_plan(world, attainment=attainment, **options).cost_usd
    return math.inf if cost is None else cost


def _check(attainments: Sequence[float], step_s: float | None, window_s: float | None) -> None:
    for name, value in (("step_s", step_s), ("window_s", window_s)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: {value} must be a positive number of seconds")
    for attainment in attainments:
        if not 0 <= attainment <= 1:
            raise ValueError(f"attainment: {attainment} must lie in 0..1")


def _usual_step_s(world: World) -> float:
    """A sixth of the shortest cold start, so that coming and going within a step gains nothing."""
    colds = [_cold_least_s(world, m.type.name) for m in world.profile.machines]
    fine_s = min(max(min(colds) / 6, STEP_LEAST_S), STEP_MOST_S)
    least_s = max(fine_s, world.duration_s / STEPS_USUAL)
    return next((step_s for step_s in STEPS_S if step_s >= least_s), least_s)


# --- what is constant between changes


@dataclass(frozen=True)
class Staircase:
    """Values, a row a time and a column a zone, from `t_s[j]` on; the first ones also before."""

    t_s: Floats
    values: Floats

    def row(self, at_s: Floats) -> Ints:
        found: Ints = np.maximum(np.searchsorted(self.t_s, at_s, side="right") - 1, 0)
        return found

    def at(self, at_s: Floats) -> Floats:
        """Values at these times, right after changes."""
        return self.values[self.row(at_s)]

    def least(self, start_s: Floats, end_s: Floats) -> Floats:
        """The least values in each [start, end), or at start where that is empty."""
        return self._over(np.minimum, start_s, end_s, "left")

    def greatest(self, start_s: Floats, end_s: Floats) -> Floats:
        """The greatest values in each [start, end]."""
        return self._over(np.maximum, start_s, end_s, "right")

    def _over(
        self, extreme: np.ufunc, start_s: Floats, end_s: Floats, side: Literal["left", "right"]
    ) -> Floats:
        first = self.row(start_s)
        last = np.searchsorted(self.t_s, end_s, side=side) - 1
        pairs = np.column_stack([first, np.maximum(last, first) + 1]).ravel()
        padded = np.vstack([self.values, self.values[-1:]])  # an end beyond the last row
        found: Floats = extreme.reduceat(padded, pairs, axis=0)[::2]
        return found

    def mean(self, edges_s: Floats) -> Floats:
        """The mean over each step between neighbouring edges, exactly."""
        inside = self.t_s[(self.t_s > edges_s[0]) & (self.t_s < edges_s[-1])]
        knots = np.unique(np.concatenate([edges_s, inside]))
        areas = self.at(knots[:-1]) * np.diff(knots)[:, None]
        sums = np.vstack([np.zeros((1, areas.shape[1])), np.cumsum(areas, axis=0)])
        whole = sums[np.searchsorted(knots, edges_s)]
        mean: Floats = np.diff(whole, axis=0) / np.diff(edges_s)[:, None]
        return mean

    def eroded(self, length_s: float) -> Staircase:
        """At each time the least value of the last `length_s`."""
        if length_s <= 0 or len(self.t_s) < 2:
            return self
        changes = self.t_s[1:]
        breaks = np.unique(np.concatenate([changes, changes + length_s]))
        middles = np.append((breaks[:-1] + breaks[1:]) / 2, breaks[-1] + 1.0)
        values = np.vstack([self.values[:1], self.least(middles - length_s, middles)])
        return Staircase(np.append(breaks[0] - 1.0, breaks), values)

    @property
    def changes_s(self) -> Floats:
        """When any value changes."""
        moved = (np.diff(self.values, axis=0) != 0).any(axis=1)
        times: Floats = self.t_s[1:][moved]
        return times


# --- what requests are worth


@dataclass(frozen=True)
class Values:
    """What each request is worth, and what a worker second is worth by machine (σ)."""

    of_request: Floats
    of_worker: Mapping[str, float]
    is_possible: NDArray[np.bool_]


def _shares(world: World) -> dict[str, Floats]:
    """The least worker seconds of each request by machine; infinite where it can't be on time."""
    slo_s = world.slo.latency_ms / 1e3
    shares: dict[str, Floats] = {}
    for machine in world.profile.machines:
        work = world.work[machine.type.name]
        batch = _batch_most(work.fixed_s, work.variable_s, machine.batch_size_max, slo_s)
        share = work.fixed_s / batch + work.variable_s
        shares[machine.type.name] = np.where(share <= slo_s * (1 + 1e-9), share, np.inf)
    return shares


def _batch_most(fixed_s: Floats, variable_s: Floats, batch_max: int, slo_s: float) -> int:
    """The largest batch that can end within the SLO: of the smallest request there is."""
    if not len(fixed_s) or batch_max <= 1:
        return 1
    left_s, each_s = slo_s * (1 + 1e-9) - float(fixed_s.min()), float(variable_s.min())
    return batch_max if each_s * batch_max <= left_s else max(int(left_s // each_s), 1)


def _values(shares: Mapping[str, Floats], of_worker: Mapping[str, float]) -> Values:
    least = np.min([of_worker[m] * share for m, share in shares.items()], axis=0)
    is_possible = np.isfinite(least)
    return Values(np.where(is_possible, least, 0.0), dict(of_worker), is_possible)


def _candidates(world: World, shares: Mapping[str, Floats]) -> list[Values]:
    """Different σ: the quantiles of how much faster each machine is than the first."""
    names = list(shares)
    reference = shares[names[0]]
    usable = {m: np.isfinite(reference) & np.isfinite(share) for m, share in shares.items()}
    ratios = {m: reference[usable[m]] / np.maximum(shares[m][usable[m]], 1e-300) for m in names}
    quantiles = (0.5, 0.0, 0.2, 0.8, 1.0)
    options = [
        {m: float(np.quantile(ratio, q)) if len(ratio) else 1.0 for m, ratio in ratios.items()}
        for q in quantiles
    ]
    price = {m.type.name: m.type.price_on_demand_usd_h / m.concurrency
             for m in world.profile.machines}  # fmt: skip
    if min(price.values()) > 0:
        options.append({m: price[m] / price[names[0]] for m in names})
    spread = max(
        (float(r.max() - r.min()) / max(float(r.max()), 1e-300) for r in ratios.values() if len(r)),
        default=0.0,
    )
    return [_values(shares, o) for o in (options[:1] if spread < 1e-9 else options)]


def _ratios(reference: Floats, share: Floats) -> Floats:
    is_told = np.isfinite(reference) & np.isfinite(share) & (reference > 0) & (share > 0)
    ratios: Floats = reference[is_told] / share[is_told]
    return ratios


def _best_values(world: World, attainment: float) -> Values:
    """The candidate with the highest bound on coarse steps."""
    candidates = _candidates(world, _shares(world))
    if len(candidates) == 1:
        return candidates[0]
    step_s = max(world.duration_s / 60, _usual_step_s(world))
    return max(candidates, key=lambda values: _coarse_usd(world, values, step_s, attainment))


def _coarse_usd(world: World, values: Values, step_s: float, attainment: float) -> float:
    stage = _stage(world, values, step_s)
    search = _Search(
        stage, tuple(_programs(stage, [0, len(stage.demand.due)])), _first_lambda(stage)
    )
    search.refine(attainment, most=5)
    return search.answer().at(attainment)


# --- demand by step


@dataclass(frozen=True)
class Demand:
    """What requests ask of each of K steps, in value.

    `due`: what must be done by the end of the step and by no earlier edge. `ahead`: what had come
    by each of the K + 1 edges and wasn't due yet. `skip_value`, `skip_count` (K × S): each of S
    segments takes away up to so much value, by so many requests. `bursts`: rows (step, seconds,
    value): so much came and was due within so long.
    """

    due: Floats
    ahead: Floats
    skip_value: Floats
    skip_count: Floats
    bursts: Floats
    requests: int
    impossible: int


def _demand(world: World, values: Values, edges_s: Floats) -> Demand:
    possible = values.is_possible
    arrival, value = world.requests.arrival_s[possible], values.of_request[possible]
    slo_s = world.slo.latency_ms / 1e3
    sums = np.concatenate([[0.0], np.cumsum(value)])
    came = sums[np.searchsorted(arrival, edges_s, side="right")]
    due_by = np.searchsorted(arrival, edges_s - slo_s - TIE_S / 2, side="right")
    skip_value, skip_count = _skips(value, due_by)
    return Demand(
        np.diff(sums[due_by]),
        np.maximum(came - sums[due_by], 0.0),
        skip_value,
        skip_count,
        _bursts(arrival, sums, edges_s, slo_s),
        len(possible),
        int(len(possible) - possible.sum()),
    )


def _skips(value: Floats, due_by: Ints) -> tuple[Floats, Floats]:
    """Segments of the most value that n skipped requests take away, by step of their deadline."""
    steps = len(due_by) - 1
    is_flat = len(value) == 0 or float(np.ptp(value)) <= 1e-12 * float(value.max())
    width = 1 if is_flat else len(SKIP_RANKS)
    takes, counts = np.zeros((steps, width)), np.zeros((steps, width))
    for k in range(steps):
        part = value[due_by[k] : due_by[k + 1]]
        if not len(part):
            continue
        if is_flat:
            takes[k, 0], counts[k, 0] = part.sum(), len(part)
        else:
            take, count = _concave_segments(np.sort(part)[::-1])
            takes[k, : len(take)], counts[k, : len(count)] = take, count
    return takes, counts


def _concave_segments(falling: Floats) -> tuple[Floats, Floats]:
    """A concave polygon above T(n), the sum of the n largest, as (rise, run) of its segments.

    It is the least of some of the lines that T itself is made of, and of T's end.
    """
    total = np.concatenate([[0.0], np.cumsum(falling)])
    ranks = np.unique((np.array(SKIP_RANKS) * len(falling)).astype(np.int64))
    slope = falling[ranks]
    keep = np.append(True, np.diff(slope) < -1e-12 * slope[0])
    ranks, slope = ranks[keep & (slope > 0)], slope[keep & (slope > 0)]
    if not len(ranks):
        return np.zeros(0), np.zeros(0)
    offset = total[ranks] - slope * ranks  # each line is offset + slope · n
    corners = np.append(np.diff(offset) / -np.diff(slope), (total[-1] - offset[-1]) / slope[-1])
    runs = np.diff(corners, prepend=0.0)
    return slope * runs, runs


def _bursts(arrival_s: Floats, sums: Floats, edges_s: Floats, slo_s: float) -> Floats:
    """The fullest spans of a few lengths in each step that came and were due within it."""
    widths = np.diff(edges_s)
    if not len(arrival_s) or slo_s >= widths.max():
        return np.zeros((0, 3))
    lengths = np.geomspace(slo_s, widths.max(), BURST_LENGTHS + 2)[1:-1]
    rows = [_fullest(arrival_s, sums, edges_s, slo_s, float(length)) for length in lengths]
    return np.vstack([*rows, _whole_steps(arrival_s, sums, edges_s, slo_s)])


def _fullest(
    arrival_s: Floats, sums: Floats, edges_s: Floats, slo_s: float, length_s: float
) -> Floats:
    """Row (step, length, value) of the span of that length with most value, by step."""
    steps = len(edges_s) - 1
    step = np.minimum(np.searchsorted(edges_s, arrival_s, side="right") - 1, steps - 1)
    first = np.flatnonzero(arrival_s + length_s <= edges_s[step + 1])
    last = np.searchsorted(arrival_s, arrival_s[first] + length_s - slo_s - TIE_S, side="right")
    most = np.zeros(steps)
    np.maximum.at(most, step[first], sums[last] - sums[first])
    found = np.flatnonzero(most > 0)
    return np.column_stack([found, np.full(len(found), length_s), most[found]])


def _whole_steps(arrival_s: Floats, sums: Floats, edges_s: Floats, slo_s: float) -> Floats:
    """Row (step, width, value) of what came after a step's begin and was due before its end."""
    begin, end = edges_s[:-1], edges_s[1:]
    first = np.searchsorted(arrival_s, begin, side="left")
    last = np.searchsorted(arrival_s, end - slo_s - TIE_S, side="right")
    value = sums[np.maximum(last, first)] - sums[first]
    found = np.flatnonzero(value > 0)
    return np.column_stack([found, (end - begin)[found], value[found]])


# --- supply by step


@dataclass(frozen=True)
class Supply:
    """What G rented groups can give in each of K steps; prices are the least that can be paid.

    `power`: value a node second. The most nodes that can be ready: on average (`ready_mean`,
    G × K), at an edge (`ready_edge`, G × K+1), all through a step (`ready_least`, G × K), at some
    time of it (`ready_peak`, G × K).
    `price_usd_s`, `start_usd` (G × K): of a ready node a second, of a cold start that ends here.
    """

    groups: tuple[Group, ...]
    power: Floats
    ready_mean: Floats
    ready_edge: Floats
    ready_least: Floats
    ready_peak: Floats
    price_usd_s: Floats
    start_usd: Floats


@dataclass(frozen=True)
class Stage:
    """One world on one grid of steps. `reserved_power`: value a second that is there anyway."""

    edges_s: Floats
    demand: Demand
    supply: Supply
    reserved_power: float
    reserved_usd: float

    @property
    def step_s(self) -> float:
        return float(self.edges_s[-1] / (len(self.edges_s) - 1))


def _stage(world: World, values: Values, step_s: float) -> Stage:
    edges_s = _edges(world, step_s)
    power = {m.type.name: m.concurrency * values.of_worker[m.type.name]
             for m in world.profile.machines}  # fmt: skip
    reserved = [g for g in world.groups.values() if g.market is Market.RESERVED]
    return Stage(
        edges_s,
        _demand(world, values, edges_s),
        _supply(world, power, edges_s),
        sum(power[g.machine] * (g.nodes_max or 0) for g in reserved),
        sum(g.price_usd_h * (g.nodes_max or 0) * world.duration_s / 3600 for g in reserved),
    )


def _edges(world: World, step_s: float) -> Floats:
    """Even steps, each edge moved to the next time at which other nodes can be ready, if any."""
    edges = np.append(np.arange(0.0, world.duration_s - step_s / 8, step_s), world.duration_s)
    count = len(edges) - 1
    colds = {_cold_least_s(world, m.type.name) for m in world.profile.machines if m.has_spot}
    ready = [_capacity(world).eroded(cold_s).changes_s for cold_s in colds]
    changes = np.unique(np.concatenate([np.zeros(0), *ready]))
    near = np.rint(changes / step_s).astype(np.int64)
    inside = (near > 0) & (near < count)
    moved, first = np.unique(near[inside], return_index=True)
    edges[moved] = changes[inside][first]
    wide = np.append(np.diff(edges) > step_s / 8, True)
    wide[0] = True
    kept: Floats = edges[wide]
    return kept


def _cold_least_s(world: World, machine: str) -> float:
    """No node comes up faster: the simulation draws within two deviations."""
    of = next(m for m in world.profile.machines if m.type.name == machine)
    return max((of.boot_s + of.load_s) * (1 - 2 * of.type.cold_start_cv), 0.0)


def _capacity(world: World) -> Staircase:
    return Staircase(world.market.capacity_t_s, world.market.capacity.astype(np.float64))


def _supply(world: World, power: Mapping[str, float], edges_s: Floats) -> Supply:
    groups = tuple(
        g for g in world.groups.values() if g.market is not Market.RESERVED and power[g.machine] > 0
    )
    powers = np.array([power[g.machine] for g in groups])
    ready = [_ready(world, group, edges_s) for group in groups]
    prices = [_prices(world, group, edges_s) for group in groups]
    steps = len(edges_s) - 1
    return Supply(
        groups,
        powers,
        *_stacked(ready, (steps, steps + 1, steps, steps)),
        *_stacked(prices, (steps, steps)),
    )


def _stacked(parts: Sequence[tuple[Floats, ...]], widths: Sequence[int]) -> list[Floats]:
    """Each kind of row under one another; no rows, but as wide, without parts."""
    return [
        np.array([part[i] for part in parts]).reshape(len(parts), width)
        for i, width in enumerate(widths)
    ]


def _ready(world: World, group: Group, edges_s: Floats) -> tuple[Floats, ...]:
    """The most nodes that can be ready: mean, at edges, all through each step, at some time."""
    most = math.inf if group.nodes_max is None else float(group.nodes_max)
    begin, end = edges_s[:-1], edges_s[1:]
    if group.market is not Market.SPOT:
        always = np.full(len(begin), most)
        return always, np.full(len(edges_s), most), always, always
    all_zones, column = _capacity(world), world.market.zones.index(group.zone)
    zone = Staircase(all_zones.t_s, np.minimum(all_zones.values[:, [column]], most))
    ready = zone.eroded(_cold_least_s(world, group.machine))
    parts = ready.mean(edges_s), ready.at(edges_s), ready.least(begin, end)
    return tuple(part[:, 0] for part in (*parts, ready.greatest(begin, end)))


def _prices(world: World, group: Group, edges_s: Floats) -> tuple[Floats, Floats]:
    """USD a second of a ready node, and USD of a cold start that ends in the step.

    What was paid before time 0 doesn't count, so early cold starts cost less.
    """
    cold_s = _cold_least_s(world, group.machine)
    times = _price_times_s(world, group)
    rows = np.array([[world.price_usd_h(group, float(t))] for t in times]) / 3600
    price = Staircase(times, rows)
    begin, end = edges_s[:-1], edges_s[1:]
    lowest = price.least(np.maximum(begin - cold_s, 0.0), end)[:, 0]
    return price.least(begin, end)[:, 0], lowest * np.minimum(cold_s, begin)


def _price_times_s(world: World, group: Group) -> Floats:
    market = world.market
    if group.market is not Market.SPOT or market.price_t_s is None or market.price_usd_h is None:
        return np.zeros(1)
    column = market.price_usd_h[:, market.zones.index(group.zone)]
    times: Floats = market.price_t_s[np.append(True, np.diff(column) != 0)]
    return times


# --- the program of one window


@dataclass(frozen=True)
class Solved:
    """`value`: certified USD. `skipped`: requests. `ready`: node seconds by group."""

    value: float
    skipped: float
    ready: Floats


@dataclass(frozen=True)
class Program:
    """min (cost + λ · skips) · x over rows · x ≤ limits, 0 ≤ x ≤ most.

    `unit_usd`: what 1 is in `cost`, so that numbers are near 1. The columns are `_Columns`.
    """

    cost: Floats
    skips: Floats
    rows: Any
    limits: Floats
    most: Floats
    unit_usd: float
    widths_s: Floats
    groups: int

    def solve(self, lambda_usd: float) -> Solved:
        """The dual value at that price of a skipped request."""
        cost = self.cost + self.skips * (lambda_usd / self.unit_usd)
        found = self._optimum(cost)
        steps = len(self.widths_s)
        ready = found.x[: self.groups * steps].reshape(self.groups, steps) @ self.widths_s
        value = certified(cost, self.rows, self.limits, self.most, found.ineqlin.marginals)
        return Solved(value * self.unit_usd, float(self.skips @ found.x), ready)

    def _optimum(self, cost: Floats) -> Any:
        """The dual simplex is the fastest here; where it is stuck, the interior point is not.

        Raises:
            ArithmeticError: neither had an answer.
        """
        bounds, message = np.column_stack([np.zeros(len(cost)), self.most]), ""
        for method in ("highs-ds", "highs-ipm"):
            found = linprog(
                cost, A_ub=self.rows, b_ub=self.limits, bounds=bounds, method=method,
                options={"time_limit": SOLVE_MOST_S},
            )  # fmt: skip
            if found.status == 0:
                return found
            message = found.message
        raise ArithmeticError(f"no optimum in {SOLVE_MOST_S:g} s: {message}")

    def within(self, budget: float) -> Program:
        """The same with the budget as a row in place of a price."""
        rows = sparse.vstack([self.rows, sparse.csr_array(self.skips[None, :])], format="csr")
        limits = np.append(self.limits, budget)
        return replace(self, rows=rows, limits=limits, skips=np.zeros_like(self.skips))


def certified(cost: Floats, rows: Any, limits: Floats, most: Floats, prices: Floats) -> float:
    """A value that min cost·x over rows·x ≤ limits, 0 ≤ x ≤ most is not below, from any prices.

    For each y ≤ 0: cost·x ≥ y·limits + (cost − rowsᵀy)·x (weak duality), and each term of the
    second sum is least at one of the bounds of x. Rounding is taken off.
    """
    y = np.minimum(prices, 0.0)
    rest = np.minimum(cost - rows.T @ y, 0.0) * most
    terms = np.concatenate([y * limits, rest])
    return float(terms.sum() - ROUNDING * np.abs(terms).sum())


@dataclass
class _Rows:
    """Rows of a sparse matrix in the making: blocks of (row, column, value) triples."""

    triples: list[tuple[Ints, Ints, Floats]] = field(default_factory=list)
    limits: list[Floats] = field(default_factory=list)
    count: int = 0

    def add(self, limits: Floats, *terms: tuple[Ints, float | Floats]) -> None:
        """As many rows as limits. Each term: a column of each row (or several, as a 2-d array with
        a row each), and what it is multiplied by.
        """
        rows = self.count + np.arange(len(limits))
        for columns, factor in terms:
            shape = columns.shape
            where = rows if columns.ndim == 1 else np.broadcast_to(rows[:, None], shape)
            value = np.broadcast_to(np.asarray(factor, dtype=np.float64), shape)
            self.triples.append((where.ravel(), columns.ravel(), value.ravel()))
        self.limits.append(np.asarray(limits, dtype=np.float64))
        self.count += len(limits)

    def matrix(self, columns: int) -> Any:
        row, column, value = (np.concatenate(parts) for parts in zip(*self.triples, strict=True))
        return sparse.csr_array((value, (row, column)), shape=(self.count, columns))


def _programs(stage: Stage, cuts: Sequence[int]) -> Iterator[Program]:
    for first, last in itertools.pairwise(cuts):
        yield _program(stage, first, last)


@dataclass(frozen=True)
class _Columns:
    """Where the variables of a program are: (G × K) but for `ahead` (K+1), `skip` (K × S) and
    `alive` (M × K), the value a second of all nodes of a machine type, M of them.
    """

    groups: int
    steps: int
    segments: int
    machines: int

    @cached_property
    def ends(self) -> Ints:
        per_group = self.groups * self.steps
        sizes = [0, per_group, per_group, per_group, self.steps + 1,
                 self.steps * self.segments, self.machines * self.steps]  # fmt: skip
        ends: Ints = np.cumsum(sizes)
        return ends

    def _block(self, i: int, *shape: int) -> Ints:
        return np.arange(self.ends[i], self.ends[i + 1]).reshape(shape)

    @cached_property
    def ready(self) -> Ints:
        return self._block(0, self.groups, self.steps)

    @cached_property
    def edge(self) -> Ints:
        return self._block(1, self.groups, self.steps)

    @cached_property
    def new(self) -> Ints:
        return self._block(2, self.groups, self.steps)

    @cached_property
    def ahead(self) -> Ints:
        return self._block(3, self.steps + 1)

    @cached_property
    def skip(self) -> Ints:
        return self._block(4, self.steps, self.segments)

    @cached_property
    def alive(self) -> Ints:
        return self._block(5, self.machines, self.steps)

    @property
    def count(self) -> int:
        return int(self.ends[-1])


@dataclass(frozen=True)
class _Window:
    """Steps `first` to `last` (excluded) of a stage, in units that keep numbers near 1."""

    stage: Stage
    first: int
    last: int

    @cached_property
    def unit_s(self) -> float:
        return float(np.diff(self.stage.edges_s[self.first : self.last + 1]).mean())

    @cached_property
    def unit_power(self) -> float:
        return float(max(self.stage.supply.power.max(initial=0.0), self.stage.reserved_power)) or 1

    @cached_property
    def unit_value(self) -> float:
        return self.unit_s * self.unit_power

    @cached_property
    def unit_usd(self) -> float:
        prices = self.stage.supply.price_usd_s[:, self.span]
        return float(prices.max(initial=0.0)) * self.unit_s or 1.0

    @property
    def span(self) -> slice:
        return slice(self.first, self.last)

    @property
    def span_edges(self) -> slice:
        return slice(self.first, self.last + 1)

    @cached_property
    def width(self) -> Floats:
        width: Floats = np.diff(self.stage.edges_s[self.span_edges]) / self.unit_s
        return width

    @cached_property
    def due(self) -> Floats:
        return self.stage.demand.due[self.span] / self.unit_value

    @cached_property
    def ahead(self) -> Floats:
        return self.stage.demand.ahead[self.span_edges] / self.unit_value

    @cached_property
    def takes(self) -> Floats:
        return self.stage.demand.skip_value[self.span] / self.unit_value

    @cached_property
    def power(self) -> Floats:
        return self.stage.supply.power / self.unit_power

    @cached_property
    def reserved(self) -> float:
        return self.stage.reserved_power / self.unit_power

    @cached_property
    def bursts(self) -> tuple[Ints, Floats, Floats]:
        """Step in the window, length and value of each burst."""
        rows = self.stage.demand.bursts
        rows = rows[(rows[:, 0] >= self.first) & (rows[:, 0] < self.last)]
        step = rows[:, 0].astype(np.int64) - self.first
        return step, rows[:, 1] / self.unit_s, rows[:, 2] / self.unit_value

    @cached_property
    def alone(self) -> Floats:
        """Nodes of a group (G) that would serve everything alone: more are of no use."""
        _, length, value = self.bursts
        rates = np.concatenate([(self.due + self.ahead[1:]) / self.width, value / length, [1e-9]])
        nodes: Floats = np.ceil(rates.max() / self.power)
        return nodes

    def most(self, nodes: Floats) -> Floats:
        return np.minimum(nodes, self.alone[:, None])

    @cached_property
    def ready_most(self) -> Floats:
        return self.most(self.stage.supply.ready_mean[:, self.span])

    @cached_property
    def edge_most(self) -> Floats:
        return self.most(self.stage.supply.ready_edge[:, self.span_edges])

    @cached_property
    def new_most(self) -> Floats:
        return self.most(self.stage.supply.ready_peak[:, self.span])

    @cached_property
    def machines(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(group.machine for group in self.stage.supply.groups))

    @cached_property
    def is_of(self) -> Floats:
        """1 where a group (column) is of a machine type (row)."""
        of = [group.machine for group in self.stage.supply.groups]
        return np.array([[float(m == name) for m in of] for name in self.machines])


def _program(stage: Stage, first: int, last: int) -> Program:
    window = _Window(stage, first, last)
    columns = _Columns(
        len(stage.supply.groups), last - first, window.takes.shape[1], len(window.machines)
    )
    rows = _Rows()
    _add_service(rows, columns, window)
    _add_nodes(rows, columns, window)
    _add_bursts(rows, columns, window)
    cost, skips = _costs(columns, window)
    return Program(
        cost,
        skips,
        rows.matrix(columns.count),
        np.concatenate(rows.limits),
        _most(columns, window),
        window.unit_usd,
        window.width * window.unit_s,
        columns.groups,
    )


def _costs(columns: _Columns, window: _Window) -> tuple[Floats, Floats]:
    supply, counts = window.stage.supply, window.stage.demand.skip_count[window.span]
    cost, skips = np.zeros(columns.count), np.zeros(columns.count)
    width_s = window.width * window.unit_s
    cost[columns.ready] = supply.price_usd_s[:, window.span] * width_s / window.unit_usd
    cost[columns.new] = supply.start_usd[:, window.span] / window.unit_usd
    takes = window.takes
    skips[columns.skip] = np.divide(counts, takes, out=np.zeros_like(takes), where=takes > 0)
    return cost, skips


def _most(columns: _Columns, window: _Window) -> Floats:
    edge_most = window.edge_most[:, :-1]
    return np.concatenate([
        window.ready_most.ravel(),
        edge_most.ravel(),
        window.new_most.ravel(),
        window.ahead,
        window.takes.ravel(),
        (window.is_of @ (edge_most + window.new_most)).ravel(),
    ])  # fmt: skip


def _add_service(rows: _Rows, columns: _Columns, window: _Window) -> None:
    """What is done within a step is done by ready nodes, or skipped."""
    rows.add(
        window.reserved * window.width - window.due,
        (columns.ahead[1:], 1.0),
        (columns.ahead[:-1], -1.0),
        (columns.skip, -1.0),
        (columns.ready.T, -window.power[None, :] * window.width[:, None]),
    )


def _add_nodes(rows: _Rows, columns: _Columns, window: _Window) -> None:
    """A node is ready because it was at the edge before, or became so within the step.

    At the next edge: the new ones, and the others only if they stayed ready (and paid) all through.
    """
    ready, edge, new = columns.ready, columns.edge, columns.new
    rows.add(np.zeros(ready.size), (ready.ravel(), 1.0), (edge.ravel(), -1.0),
             (new.ravel(), -1.0))  # fmt: skip
    after, came = edge[:, 1:], new[:, :-1]
    for before in (edge[:, :-1], ready[:, :-1]):
        rows.add(np.zeros(after.size), (after.ravel(), 1.0), (before.ravel(), -1.0),
                 (came.ravel(), -1.0))  # fmt: skip
    stay = window.most(window.stage.supply.ready_least[:, window.span])[:, :-1]
    edge_most = window.edge_most
    binds = stay < np.minimum(edge_most[:, :-2], edge_most[:, 1:-1]) - 1e-12
    rows.add(stay[binds], (after[binds], 1.0), (came[binds], -1.0))


def _add_bursts(rows: _Rows, columns: _Columns, window: _Window) -> None:
    """Enough whole nodes in a step for each burst of it, less what is skipped in the step.

    Nodes x_m with power p_m and skipped value z must give Σ p_m x_m + z / length ≥ b. Divided by
    one machine's power and rounded (mixed-integer rounding, Nemhauser and Wolsey 1990): with
    f = b − ⌊b⌋, Σ (f ⌊p_m⌋ + min(f, p_m − ⌊p_m⌋)) x_m + z / length ≥ f ⌈b⌉ holds for whole x.
    """
    step, length, value = window.bursts
    if not len(step):
        return
    power = np.array([window.power[of > 0][0] for of in window.is_of])
    for i, of in enumerate(window.is_of > 0):
        held = np.concatenate([columns.edge[of], columns.new[of]]).T
        rows.add(np.zeros(columns.steps), (columns.alive[i], 1.0), (held, -1.0))
    asked = value / length - window.reserved
    for unit in np.unique(power) if len(power) <= 3 else power.max(keepdims=True):
        factors, floor = _rounded(power / unit, asked / unit)
        kept = _telling(step, length, floor)
        rows.add(
            -floor[kept],
            (columns.alive.T[step[kept]], -factors[kept]),
            (columns.skip[step[kept]], -1.0 / (length[kept] * unit)[:, None]),
        )


def _rounded(power: Floats, asked: Floats) -> tuple[Floats, Floats]:
    """Factors (row × machine) and right-hand side of Σ factor · x + rest ≥ side, for whole x, from
    Σ power · x + rest ≥ asked with rest ≥ 0; as they stand where rounding would gain little.
    """
    fraction = asked - np.floor(asked)
    is_worth = (fraction >= FRACTION_LEAST) & (asked > 0)
    f = np.where(is_worth, fraction, 1.0)[:, None]
    whole = np.floor(power)
    factors = np.where(is_worth[:, None], f * whole + np.minimum(f, power - whole), power)
    side = np.where(is_worth, fraction * np.ceil(asked), asked)
    return factors, side


def _telling(step: Ints, length: Floats, side: Floats) -> Ints:
    """The rows that ask for something that no longer span of the same step asks for already."""
    order = np.lexsort((-length, step))
    best = np.full(int(step.max(initial=0)) + 1, 1e-9)
    kept: list[int] = []
    for row in order.tolist():
        if side[row] > best[step[row]]:
            best[step[row]] = side[row]
            kept.append(row)
    return np.array(kept, dtype=np.int64)


def _cuts(due: Floats, window: int) -> list[int]:
    """Edges that part windows of about so many steps, each where little is asked."""
    count = max(round(len(due) / window), 1)
    cuts = [0]
    for i in range(1, count):
        middle, reach = round(i * len(due) / count), len(due) // (6 * count)
        around = range(max(middle - reach, cuts[-1] + 1), min(middle + reach, len(due) - 1) + 1)
        cuts.append(min(around, key=lambda k: (due[k - 1] + due[k], abs(k - middle))))
    return [*cuts, len(due)]


def _solve_whole(program: Program, time_limit_s: float) -> tuple[float | None, float]:
    """USD of the best plan with whole nodes at edges and whole new ones; and what was proved."""
    size = len(program.cost)
    block = program.groups * len(program.widths_s)
    integrality = np.zeros(size)
    integrality[block : 3 * block] = 1
    most = program.most.copy()
    most[block : 3 * block] = np.ceil(most[block : 3 * block] - 1e-9)
    found = milp(
        program.cost,
        constraints=LinearConstraint(program.rows, -np.inf, program.limits),
        bounds=Bounds(np.zeros(size), most),
        integrality=integrality,
        options={"time_limit": time_limit_s},
    )
    least = found.mip_dual_bound
    proved = 0.0 if least is None or not math.isfinite(least) else float(least) * program.unit_usd
    return (None if found.x is None else float(found.fun) * program.unit_usd), proved


# --- the price of a late request


def _first_lambda(stage: Stage) -> float:
    """About what a request costs on the cheapest machine that can always be had; not 0."""
    supply = stage.supply
    dear = max(stage.demand.requests - stage.demand.impossible, 1)
    value = float(stage.demand.due.sum()) / dear
    prices = supply.price_usd_s.mean(axis=1) / supply.power if len(supply.groups) else np.zeros(0)
    return 2.0 * float(prices.max(initial=0.0)) * value or 1e-6


@dataclass
class _Search:
    """The λ that were tried, and what each gave: a concave function of λ, known by its tangents."""

    stage: Stage
    programs: tuple[Program, ...]
    guess: float
    tried: dict[float, Solved] = field(default_factory=dict)

    def refine(self, attainment: float, most: int = LAMBDAS_MOST) -> None:
        """Try λ until none can raise the bound at `attainment` by much."""
        demand = self.stage.demand
        budget = max((1 - attainment) * demand.requests - demand.impossible, 0.0)
        for _ in range(most):
            price, hope = self._next(budget)
            best = max((s.value - p * budget for p, s in self.tried.items()), default=0.0)
            if price in self.tried or hope <= best + GAP_FRACTION * max(best, 1e-12):
                return
            self.tried[price] = self._solve(price)

    def _next(self, budget: float) -> tuple[float, float]:
        """Where the least of all tangents is highest, and how high it is there."""
        asked = float(self.stage.demand.skip_count.sum())
        lines = [(0.0, asked - budget)]  # everything skipped: nothing paid
        lines += [(s.value - p * s.skipped, s.skipped - budget) for p, s in self.tried.items()]
        if not self.tried:
            return self.guess, math.inf
        flat = 1e-9 * max(asked, 1.0)
        if all(slope > flat for _, slope in lines):
            return 4.0 * max(self.tried), math.inf
        crossings = [(b - a) / (p - q) for a, p in lines for b, q in lines if p > flat >= q]
        heights = [min(a + p * x for a, p in lines) for x in crossings]
        i = int(np.argmax(heights)) if heights else 0
        return (crossings[i], heights[i]) if heights else (0.0, 0.0)

    def _solve(self, price: float) -> Solved:
        parts = [program.solve(price) for program in self.programs]
        return Solved(
            sum(part.value for part in parts),
            sum(part.skipped for part in parts),
            np.sum([part.ready for part in parts], axis=0),
        )

    def answer(self) -> Bound:
        stage, tried = self.stage, sorted(self.tried.items())
        names = [group.name for group in stage.supply.groups]
        duration_s = float(stage.edges_s[-1])
        return Bound(
            step_s=stage.step_s,
            windows=len(self.programs),
            requests=stage.demand.requests,
            impossible=stage.demand.impossible,
            reserved_usd=stage.reserved_usd,
            lambdas_usd=tuple(price for price, _ in tried),
            certified_usd=tuple(solved.value for _, solved in tried),
            skipped=tuple(solved.skipped for _, solved in tried),
            node_means=tuple(
                dict(zip(names, (solved.ready / duration_s).tolist(), strict=True))
                for _, solved in tried
            ),
            markets={group.name: group.market for group in stage.supply.groups},
        )
