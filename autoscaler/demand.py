"""How many replicas does each model need, now and when a machine launched now is ready?

    arrivals ─► forecast ─► rates by quantile ┐
    error budget ─► share that may be late ───┼─► queueing ─► replicas by machine type
    service times, burstiness, residual ──────┘               and quantile

A `Demand` is what `policy` hands to `fleet` or packs on machines. Where few models are decided on,
each quantile of the forecast is sized (a distribution of needs); where there are many, only the one
that matches the share that may be late. Prices, markets and what runs already play no part here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from autoscaler import budget, calibration, forecast, queueing
from autoscaler.budget import Budget, BudgetSettings
from autoscaler.calibration import Calibration, CalibrationSettings
from autoscaler.forecast import Forecast, ForecastMemory, ForecastSettings
from autoscaler.queueing import Curves, Dispersion, Residual
from autoscaler.snapshot import (
    SERVICE_EDGES_MS,
    EventKind,
    Model,
    NodeState,
    ServiceCurve,
    Snapshot,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Predict = Callable[[ForecastMemory, Sequence[float]], Forecast]
R = TypeVar("R", Dispersion, Residual, Calibration)

MODELS_FEW = 8
"""Up to so many models, every quantile of the forecast is sized."""

SLACK_PART = 0.5
"""The part of the slack that a backlog may use up before more is added for it."""

CLEAR_MAX = 1.0
"""For a backlog no more is added than this multiple of what the arrivals need."""

WARM_UP_S = 120.0
"""For so long after a replica has become ready, measured times teach nothing."""

SHOCK_S = 900.0
"""For so long after nodes were taken, what is late is the shock's."""

_PRESENT_LEVEL = 2
"""The quantile of the present rate (0.9) that must stay served when nodes are given back."""


@dataclass(frozen=True, slots=True)
class DemandSettings:
    """`budget`, `calibration`, `forecast`: of those modules. `clear_s`: within which a backlog is
    worked off.
    """

    forecast: ForecastSettings = field(default_factory=ForecastSettings)
    budget: BudgetSettings = field(default_factory=BudgetSettings)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    clear_s: float = 60.0


@dataclass(frozen=True, slots=True)
class DemandMemory:
    """What is remembered of the models' traffic; arrays have a row a model, in `names`' order.

    `late_told` [M]: the late share predicted for the replicas that were ready last time.
    `told_calm`, `told_shock` [M]: the late shares that were predicted for the fleet chosen last
    time. `has_begun` [M]: whether there was ever a moment without a queue; what is late before,
    while the first replicas come up, says nothing about the fleet, and is no debt. `shock_s`: when
    nodes were last taken or given notice. `at_s`: when the last snapshot was.
    """

    names: tuple[str, ...]
    forecast: ForecastMemory
    dispersion: Dispersion
    budget: Budget
    residual: Residual
    late_told: Floats
    calibration: Calibration
    told_calm: Floats
    told_shock: Floats
    has_begun: NDArray[np.bool_]
    shock_s: float = -np.inf
    at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Demand:
    """Needs by model (rows) in replicas.

    `levels` [J]: quantiles of the forecast; `weight` [J]: the probability that each stands for.
    `needs`: by machine type [M, J], fractions, 0 where a model can't run on it. `wanted`: by
    machine type [M], at the share that may be late. `present`: by machine type [M], for what
    arrives right now. `node_rps`: by machine type [M], the rate that one replica carries in such
    company.
    `slack_s` [M]: how long most requests can wait and still be on time; `wait_s`
    [M]: how long the queue is, by the rate; `queue_excess` [M]:
    requests that have no hope of that unless more is added. `calm_factor`, `shock_factor` [M]: of
    `calibration`. `late_planned` [M]: the share planned to be late, `late_price` [M]: what a late
    request costs, as a multiple of its base price.
    """

    models: tuple[Model, ...]
    levels: Floats
    weight: Floats
    needs: Mapping[str, Floats]
    wanted: Mapping[str, Ints]
    present: Mapping[str, Ints]
    node_rps: Mapping[str, Floats]
    rate_rps: Floats
    rate_peak_rps: Floats
    late_planned: Floats
    late_price: Floats
    slack_s: Floats
    wait_s: Floats
    queue_excess: Floats
    calm_factor: Floats
    shock_factor: Floats
    is_covered: bool = True
    because: str = ""


def observed(
    snapshot: Snapshot, memory: DemandMemory | None, settings: DemandSettings
) -> DemandMemory:
    """What is remembered after this snapshot's traffic."""
    models, now_s = snapshot.models, snapshot.now_s
    names = tuple(model.name for model in models)
    memory = _fresh(names, now_s, settings) if memory is None else _aligned(memory, names)
    if not models:
        return memory
    traffic = [model.traffic for model in models]
    bins = min(len(t.arrivals) for t in traffic)
    past, dispersion = memory.forecast, memory.dispersion
    if bins:
        bin_s = traffic[0].bin_s
        counts = np.array([t.arrivals[len(t.arrivals) - bins :] for t in traffic], dtype=np.float64)
        past = forecast.observe(past, counts, bin_s, now_s, settings.forecast)
        if dispersion.bin_s in (0.0, bin_s):  # decisions out of turn have bins of their own
            dispersion = queueing.observe_dispersion(dispersion, counts, bin_s)
    finished = np.array([t.finished for t in traffic], dtype=np.float64)
    late = np.array([t.late for t in traffic], dtype=np.float64)
    has_begun = memory.has_begun | np.array([t.finished > 0 and not t.queued for t in traffic])
    late = np.where(has_begun, late, 0.0)
    steady = np.array([t.queued <= t.running for t in traffic]) & _is_warm(snapshot, models)
    memory = replace(
        memory,
        forecast=past,
        dispersion=dispersion,
        has_begun=has_begun,
        residual=queueing.observe_residual(
            memory.residual, finished, late, memory.late_told, steady
        ),
    )
    return _charged(snapshot, memory, finished, late, settings)


def _charged(
    snapshot: Snapshot, memory: DemandMemory, finished: Floats, late: Floats, s: DemandSettings
) -> DemandMemory:
    """`memory` after `late` of the `finished` requests were charged to budget and calibration."""
    now_s = snapshot.now_s
    taken = (EventKind.NOTICED, EventKind.RECLAIMED)
    shock_s = max((e.at_s for e in snapshot.events if e.kind in taken), default=memory.shock_s)
    elapsed_s = now_s - memory.at_s if memory.at_s is not None else 0.0
    return replace(
        memory,
        budget=budget.spent(memory.budget, finished, late, now_s, s.budget),
        calibration=calibration.compared(
            memory.calibration, finished, late, now_s - shock_s > SHOCK_S, memory.told_calm,
            memory.told_shock, elapsed_s, s.calibration,
        ),
        shock_s=shock_s,
        at_s=now_s,
    )  # fmt: skip


def demanded(
    snapshot: Snapshot,
    memory: DemandMemory,
    settings: DemandSettings,
    predict: Predict = forecast.predict,
) -> Demand:
    """The needs of all models of `snapshot`, which must be those that `memory` has observed.

    `predict`: the forecast; another one is for asking what a better one would be worth.
    """
    models = snapshot.models
    horizons = {
        name: m.cold_start_s * (1 + m.cold_start_cv) for name, m in snapshot.machines.items()
    }
    times = tuple(sorted({0.0, *horizons.values()}))
    told = predict(memory.forecast, times)
    attainment = np.array([model.slo.attainment for model in models])
    rate = told.rate_mean[:, 0]
    planned = budget.planned_share(attainment, settings.budget)
    sizing = _Sizing(snapshot, memory, told, planned, settings)
    trust = calibration.factors(memory.calibration, planned * rate, settings.calibration)
    sized = {name: sizing.on(name, times.index(h)) for name, h in horizons.items()}
    levels = np.asarray(told.levels, dtype=np.float64)
    return Demand(
        models=models,
        levels=levels,
        weight=np.diff(np.concatenate([[0.0], levels[:-1], [1.0]])),
        needs={name: s.needs for name, s in sized.items()},
        wanted={name: s.wanted for name, s in sized.items()},
        present={name: s.present for name, s in sized.items()},
        node_rps={name: s.node_rps for name, s in sized.items()},
        rate_rps=rate,
        rate_peak_rps=sizing.at_risk(len(times) - 1),
        late_planned=planned,
        late_price=budget.price(memory.budget, rate, attainment, settings.budget),
        slack_s=sizing.slack_s,
        wait_s=np.array([model.traffic.queued for model in models]) / np.maximum(rate, 1e-9),
        queue_excess=sizing.excess,
        calm_factor=trust.calm,
        shock_factor=trust.shock,
        is_covered=told.is_covered,
        because=told.because,
    )


def told_late(
    demand: Demand, snapshot: Snapshot, memory: DemandMemory, calm: Floats, shock: Floats
) -> DemandMemory:
    """`memory` with what is predicted: the late share that the replicas which are ready now should
    show, and those [M] of the fleet that was chosen, in calm times and what shocks add.
    """
    ready = _ready_by_machine(snapshot)
    late = np.array(
        [
            _late_now(model, ready.get(model.name, {}), float(rate))
            for model, rate in zip(snapshot.models, demand.rate_rps, strict=True)
        ]
    )
    return replace(memory, late_told=late, told_calm=calm, told_shock=shock)


def _late_now(model: Model, ready: Mapping[str, int], rate_rps: float) -> float:
    """`ready`: replicas by machine type."""
    kinds = [
        (model.curves[machine], count)
        for machine, count in ready.items()
        if machine in model.curves
    ]
    if len(kinds) == 1:
        curve, count = kinds[0]
        return float(queueing.late_fraction(rate_rps, count, curve, model.slo.latency_ms))
    return queueing.late_fraction_mixed(rate_rps, kinds, model.slo.latency_ms)


_Columns = tuple[Ints, Ints, Floats, Floats]
"""What is worked out by row: wanted, present, needs, node_rps."""


@dataclass(frozen=True, slots=True)
class _Sized:
    needs: Floats
    wanted: Ints
    present: Ints
    node_rps: Floats


class _Sizing:
    """One decision's sizing: what is the same for all machine types is worked out once."""

    def __init__(
        self,
        snapshot: Snapshot,
        memory: DemandMemory,
        told: Forecast,
        planned: Floats,
        settings: DemandSettings,
    ) -> None:
        self.models = snapshot.models
        self.told = told
        self.settings = settings
        self.queue_late = planned
        self.risk_level = 1 - planned
        self.slo_ms = np.array([model.slo.latency_ms for model in self.models])
        self.dispersion = memory.dispersion.index()
        self.residual = memory.residual
        self.slack_s = np.array([_slack_s(model) for model in self.models])
        self.excess = self._excess(snapshot)

    def _excess(self, snapshot: Snapshot) -> Floats:
        """Requests [M] that will wait longer than the slack when a machine launched now is ready:
        they ask for more than what arrives does. While nothing has ever been ready, none.
        """
        servers = _servers(snapshot)
        until_s = snapshot.now_s + min(
            (m.cold_start_s for m in snapshot.machines.values()), default=0.0
        )
        excess = np.zeros(len(self.models))
        for row, model in enumerate(self.models):
            rate = float(self.told.rate_mean[row, 0])
            there = servers.get(model.name, [])
            waiting = backlog_ahead(there, rate, model.traffic.queued, snapshot.now_s, until_s)
            patient = max(rate, 0.0) * float(self.slack_s[row]) * SLACK_PART
            excess[row] = max(waiting - patient, 0.0) if there else 0.0
        return excess

    def at_risk(self, place: int) -> Floats:
        """The rate [M] that is exceeded with the share of time that shortages may take."""
        levels = np.asarray(self.told.levels)
        rates = self.told.rate_rps[:, : place + 1].max(axis=1)
        return np.array(
            [np.interp(at, levels, row) for at, row in zip(self.risk_level, rates, strict=True)]
        )

    def on(self, machine: str, place: int) -> _Sized:
        """Needs on one machine type, for times up to the horizon at `place`."""
        count, levels = len(self.models), len(self.told.levels)
        hosts = np.array([machine in m.curves for m in self.models], dtype=bool)
        needs = np.zeros((count, levels))
        wanted, present = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        node_rps = np.zeros(count)
        rows = np.flatnonzero(hosts)
        if not len(rows):
            return _Sized(needs, wanted, present, node_rps)
        more = self.excess[rows] / self.settings.clear_s
        more = np.minimum(more, CLEAR_MAX * self.told.rate_mean[rows, 0])
        peak = self.told.rate_rps[rows, : place + 1].max(axis=1) + more[:, None]
        risk = self.at_risk(place)[rows] + more
        now = self.told.rate_rps[rows, 0, _PRESENT_LEVEL] + more
        size = self._sized_few if count <= MODELS_FEW else self._sized_many
        size(machine, rows, np.column_stack([risk, now, peak]), (wanted, present, needs, node_rps))
        return _Sized(needs, wanted, present, node_rps)

    def _sized_few(self, machine: str, rows: Ints, rates: Floats, into: _Columns) -> None:
        """A model at a time: each quantile of its rate becomes a need, in fractions of replicas."""
        wanted, present, needs, node_rps = into
        for k, row in enumerate(rows):
            curve = Curves.of(self.models[row].curves[machine])
            told = rates[k]
            whole = queueing.replicas_needed(
                told[:3], curve, self.slo_ms[row], self.queue_late[row], self.dispersion[row],
                residual=self.residual.late[row],
            ).replicas  # fmt: skip
            carried = self._carried(curve, whole[[2, 0]], row)
            wanted[row], present[row], node_rps[row] = whole[0], whole[1], carried[1]
            needs[row] = _parts(told[2:], carried[0], carried[1])

    def _sized_many(self, machine: str, rows: Ints, rates: Floats, into: _Columns) -> None:
        """All models at once: what is wanted at the planned share serves for every quantile."""
        wanted, present, needs, node_rps = into
        curves = self._curves(machine, rows)
        for column, counts in ((0, wanted), (1, present)):
            counts[rows] = queueing.replicas_needed(
                rates[:, column], curves, self.slo_ms[rows], self.queue_late[rows],
                self.dispersion[rows], residual=self.residual.late[rows],
            ).replicas  # fmt: skip
        needs[rows] = wanted[rows, None]
        node_rps[rows] = curves.rate_max_rps

    def _carried(self, curve: Curves, replicas: Ints, row: int) -> Floats:
        """The rate that one of so many replicas carries: the more there are, the more each can."""
        count = np.maximum(replicas, 1)
        carried = queueing.rate_max_rps(
            count, curve, self.slo_ms[row], max(self.queue_late[row], 1e-3), self.dispersion[row]
        )
        each: Floats = carried / count
        return np.where(each > 0, each, 0.9 * curve.rate_max_rps)

    def _curves(self, machine: str, rows: Sequence[int] | Ints) -> Curves:
        return Curves.of([self.models[row].curves[machine] for row in rows])


def _parts(rates: Floats, low_rps: float, high_rps: float) -> Floats:
    """Replicas [J] for rising `rates` [J], as fractions: what each carries lies between `low_rps`,
    at the first rate, and `high_rps`, at the last.
    """
    place = (rates - rates[0]) / max(float(rates[-1] - rates[0]), 1e-12)
    parts: Floats = rates / np.maximum(low_rps + place * (high_rps - low_rps), 1e-12)
    return parts


def _ready_by_machine(snapshot: Snapshot) -> dict[str, Counter[str]]:
    """Ready replicas by model and machine type."""
    machine = {
        node.id: snapshot.groups[node.group].machine
        for node in snapshot.nodes
        if node.state is not NodeState.DRAINING
    }
    ready: dict[str, Counter[str]] = defaultdict(Counter)
    for replica in snapshot.replicas:
        if replica.is_ready and replica.node in machine:
            ready[replica.model][machine[replica.node]] += 1
    return ready


def _slack_s(model: Model) -> float:
    """How long nine requests in ten may wait: the SLO less the service that 90 % stay below."""
    slow_ms = max((_service_p90_ms(curve) for curve in model.curves.values()), default=0.0)
    return max(model.slo.latency_ms - slow_ms, 0.0) / 1e3


def _service_p90_ms(curve: ServiceCurve) -> float:
    if not curve.histogram:
        return curve.batch_ms(1) * (1 + 1.3 * curve.cv)
    cumulated = np.cumsum(curve.histogram)
    place = int(np.searchsorted(cumulated, 0.9 * cumulated[-1]))
    return SERVICE_EDGES_MS[min(place + 1, len(SERVICE_EDGES_MS) - 1)]


@dataclass(frozen=True, slots=True)
class _Server:
    """A replica that serves `rate_rps` at most, from `from_s` to `to_s`."""

    rate_rps: float
    from_s: float
    to_s: float


def _servers(snapshot: Snapshot) -> dict[str, list[_Server]]:
    """What there is to serve each model, and when: what is draining or was given notice goes."""
    nodes = {node.id: node for node in snapshot.nodes}
    models = {model.name: model for model in snapshot.models}
    servers: dict[str, list[_Server]] = {}
    for replica in snapshot.replicas:
        node, model = nodes.get(replica.node), models.get(replica.model)
        if node is None or model is None or node.state is NodeState.DRAINING:
            continue
        curve = model.curves.get(snapshot.groups[node.group].machine)
        if curve is None:
            continue
        from_s = snapshot.now_s if replica.is_ready else max(replica.ready_s, snapshot.now_s)
        to_s = np.inf if node.reclaim_s is None else node.reclaim_s - curve.batch_ms(1) / 1e3
        servers.setdefault(model.name, []).append(_Server(curve.rate_max_rps, from_s, to_s))
    return servers


def backlog_ahead(
    servers: Sequence[_Server], rate_rps: float, queued: float, now_s: float, until_s: float
) -> float:
    """Requests that will wait at `until_s`, as a fluid: they come at `rate_rps`, and the servers
    that there are take them up while they are there.
    """
    turns = sorted({now_s, until_s} | {t for s in servers for t in (s.from_s, s.to_s)})
    turns = [t for t in turns if now_s <= t <= until_s]
    waiting = queued
    for start_s, end_s in pairwise(turns):
        served = sum(s.rate_rps for s in servers if s.from_s <= start_s and s.to_s >= end_s)
        waiting = max(waiting + (rate_rps - served) * (end_s - start_s), 0.0)
    return waiting


def _is_warm(snapshot: Snapshot, models: Sequence[Model]) -> NDArray[np.bool_]:
    """Models without a replica that became ready in the last minutes: their first answers are slow
    and are no error of the formulas.
    """
    young = {
        replica.model
        for replica in snapshot.replicas
        if replica.is_ready and snapshot.now_s - replica.ready_s < WARM_UP_S
    }
    return np.array([model.name not in young for model in models], dtype=bool)


def _fresh(names: tuple[str, ...], now_s: float, settings: DemandSettings) -> DemandMemory:
    count = len(names)
    return DemandMemory(
        names,
        forecast.fresh(count, settings.forecast),
        queueing.dispersion_memory(count),
        Budget.fresh(count, now_s),
        queueing.residual_memory(count),
        np.zeros(count),
        Calibration.fresh(count),
        np.zeros(count),
        np.zeros(count),
        np.zeros(count, dtype=bool),
    )


def _aligned(memory: DemandMemory, names: tuple[str, ...]) -> DemandMemory:
    """`memory` for another list of models: those known keep their past, new ones begin."""
    if names == memory.names:
        return memory
    row = {name: i for i, name in enumerate(memory.names)}
    places = np.array([row.get(name, -1) for name in names], dtype=np.int64)
    return DemandMemory(
        names,
        forecast.reindexed(memory.forecast, memory.names, names),
        _moved(memory.dispersion, places),
        budget.reindexed(memory.budget, places),
        _moved(memory.residual, places),
        _picked(memory.late_told, places),
        _moved(memory.calibration, places),
        _picked(memory.told_calm, places),
        _picked(memory.told_shock, places),
        _picked(memory.has_begun, places),
        memory.shock_s,
        memory.at_s,
    )


def _moved(record: R, places: Ints) -> R:
    """A record of arrays whose last axis is the models, for other models."""
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    arrays: dict[str, Any] = {
        name: _picked(value, places)
        for name, value in values.items()
        if isinstance(value, np.ndarray)
    }
    return replace(record, **arrays)


def _picked(values: NDArray[Any], places: Ints) -> NDArray[Any]:
    padded = (
        np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
        if values.shape[-1]
        else np.zeros((*values.shape[:-1], 1), values.dtype)
    )
    picked: NDArray[Any] = padded[..., np.where(places >= 0, places, padded.shape[-1] - 1)]
    return picked
