"""How many replicas does each model need, now and when a machine launched now is ready?

    arrivals ─► forecast ─► rates by quantile ┐
    error budget ─► share that may be late ───┼─► queueing ─► replicas by machine type
    service times, burstiness, residual ──────┘               and quantile

A `Demand` is what `policy` hands to `fleet` or packs on machines. Where few models are decided on,
each quantile of the forecast is sized (a distribution of needs); where there are many, only the one
that matches the share that may be late. Prices, markets and what runs already play no part here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from autoscaler import budget, forecast, queueing
from autoscaler.budget import Budget, BudgetSettings
from autoscaler.forecast import Forecast, ForecastMemory, ForecastSettings
from autoscaler.queueing import Curves, Dispersion, Residual
from autoscaler.snapshot import SERVICE_EDGES_MS, Model, NodeState, ServiceCurve, Snapshot

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
R = TypeVar("R", Dispersion, Residual)

MODELS_FEW = 8
"""Up to so many models, every quantile of the forecast is sized."""

SLACK_PART = 0.5
"""The part of the slack that a backlog may use up before more is added for it."""

WARM_UP_S = 120.0
"""For so long after a replica has become ready, measured times teach nothing."""

BEGIN_S = 300.0
"""For so long after a model's first replica has become ready, what is late is its start's."""

_PRESENT_LEVEL = 2
"""The quantile of the present rate (0.9) that must stay served when nodes are given back."""

QUEUE_SHARE = 0.5
"""The part of the lateness allowed that a queue in balance may use; the rest is for shortages."""


@dataclass(frozen=True, slots=True)
class DemandSettings:
    """`budget`, `forecast`: of those modules. `clear_s`: within which a backlog is worked off."""

    forecast: ForecastSettings = field(default_factory=ForecastSettings)
    budget: BudgetSettings = field(default_factory=BudgetSettings)
    clear_s: float = 60.0


@dataclass(frozen=True, slots=True)
class DemandMemory:
    """What is remembered of the models' traffic; arrays have a row a model, in `names`' order.

    `late_told` [M]: the late share predicted for the replicas that were ready last time.
    """

    names: tuple[str, ...]
    forecast: ForecastMemory
    dispersion: Dispersion
    budget: Budget
    residual: Residual
    late_told: Floats


@dataclass(frozen=True, slots=True)
class Demand:
    """Needs by model (rows) in replicas.

    `levels` [J]: quantiles of the forecast; `weight` [J]: the probability that each stands for.
    `needs`: by machine type [M, J], 0 where a model can't run on it. `wanted`: by machine type [M],
    at the share that may be late. `present`: by machine type [M], for what arrives right now.
    `node_rps`: by machine type [M], the rate that one replica carries in such company.
    `slack_s` [M]: how long most requests can wait and still be on time; `queue_excess` [M]:
    requests that have no hope of that unless more is added.
    """

    models: tuple[Model, ...]
    levels: Floats
    weight: Floats
    needs: Mapping[str, Ints]
    wanted: Mapping[str, Ints]
    present: Mapping[str, Ints]
    node_rps: Mapping[str, Floats]
    rate_rps: Floats
    rate_peak_rps: Floats
    late_allowed: Floats
    slack_s: Floats
    queue_excess: Floats
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
    steady = np.array([t.queued <= t.running for t in traffic]) & _is_warm(snapshot, models)
    return DemandMemory(
        names,
        past,
        dispersion,
        budget.spent(
            memory.budget, finished, np.where(_has_begun(snapshot), late, 0.0), now_s,
            settings.budget,
        ),
        queueing.observe_residual(memory.residual, finished, late, memory.late_told, steady),
        memory.late_told,
    )


def demanded(snapshot: Snapshot, memory: DemandMemory, settings: DemandSettings) -> Demand:
    """The needs of all models of `snapshot`, which must be those that `memory` has observed."""
    models = snapshot.models
    horizons = {
        name: m.cold_start_s * (1 + m.cold_start_cv) for name, m in snapshot.machines.items()
    }
    times = tuple(sorted({0.0, *horizons.values()}))
    told = forecast.predict(memory.forecast, times)
    attainment = np.array([model.slo.attainment for model in models])
    rate = told.rate_mean[:, 0]
    allowed = budget.late_allowed(memory.budget, rate, attainment, settings.budget)
    sizing = _Sizing(snapshot, memory, told, allowed, settings)
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
        late_allowed=allowed,
        slack_s=sizing.slack_s,
        queue_excess=sizing.excess,
        is_covered=told.is_covered,
        because=told.because,
    )


def told_late(demand: Demand, snapshot: Snapshot, memory: DemandMemory) -> DemandMemory:
    """`memory` with the late share that the replicas which are ready now should show."""
    late = np.array(
        [
            _late_now(model, snapshot, float(rate))
            for model, rate in zip(snapshot.models, demand.rate_rps, strict=True)
        ]
    )
    return replace(memory, late_told=late)


def _late_now(model: Model, snapshot: Snapshot, rate_rps: float) -> float:
    ready = _ready_by_machine(snapshot).get(model.name, {})
    kinds = [(model.curves[machine], count) for machine, count in ready.items()]
    if len(kinds) == 1:
        curve, count = kinds[0]
        return float(queueing.late_fraction(rate_rps, count, curve, model.slo.latency_ms))
    return queueing.late_fraction_mixed(rate_rps, kinds, model.slo.latency_ms)


@dataclass(frozen=True, slots=True)
class _Sized:
    needs: Ints
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
        allowed: Floats,
        settings: DemandSettings,
    ) -> None:
        self.models = snapshot.models
        self.told = told
        self.settings = settings
        self.queue_late = allowed * QUEUE_SHARE
        self.risk_level = 1 - allowed * (1 - QUEUE_SHARE)
        self.slo_ms = np.array([model.slo.latency_ms for model in self.models])
        self.dispersion = memory.dispersion.index()
        self.residual = memory.residual
        self.is_uniform = len(snapshot.machines) == 1
        self.slack_s = np.array([_slack_s(model) for model in self.models])
        self.excess = np.array(
            [
                _excess(m, s, m.traffic.running)
                for m, s in zip(self.models, self.slack_s, strict=True)
            ]
        )

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
        needs = np.zeros((count, levels), dtype=np.int64)
        wanted, present = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        node_rps = np.zeros(count)
        if not hosts.any():
            return _Sized(needs, wanted, present, node_rps)
        rows = np.flatnonzero(hosts)
        more = self.excess[rows] / self.settings.clear_s
        peak = self.told.rate_rps[rows, : place + 1].max(axis=1) + more[:, None]
        risk = self.at_risk(place)[rows] + more
        now = self.told.rate_rps[rows, 0, _PRESENT_LEVEL] + more
        sized = self._sized_few if count <= MODELS_FEW else self._sized_many
        counts = sized(machine, rows, np.column_stack([risk, now, peak]))
        wanted[rows], present[rows], needs[rows] = counts[:, 0], counts[:, 1], counts[:, 2:]
        node_rps[rows] = self._node_rps(machine, rows, wanted[rows])
        return _Sized(needs, wanted, present, node_rps)

    def _sized_few(self, machine: str, rows: Ints, rates: Floats) -> Ints:
        """Replicas for `rates` [rows, rates], a model at a time: every rate is sized."""
        return np.stack(
            [
                queueing.replicas_needed(
                    rates[k],
                    self._curves(machine, [row]),
                    self.slo_ms[row],
                    self.queue_late[row],
                    self.dispersion[row],
                    residual=self.residual.late[row],
                ).replicas
                for k, row in enumerate(rows)
            ]
        )

    def _sized_many(self, machine: str, rows: Ints, rates: Floats) -> Ints:
        """The same for many models at once: the first two rates are sized, the first serves for
        all others.
        """
        curves = self._curves(machine, rows)
        risk, now = (
            queueing.replicas_needed(
                rates[:, column],
                curves,
                self.slo_ms[rows],
                self.queue_late[rows],
                self.dispersion[rows],
                residual=self.residual.late[rows],
            ).replicas
            for column in (0, 1)
        )
        return np.column_stack([risk, now, *[risk] * (rates.shape[1] - 2)])

    def _node_rps(self, machine: str, rows: Ints, replicas: Ints) -> Floats:
        """What one of `replicas` carries. With one machine type nobody compares: its maximum."""
        curves = self._curves(machine, rows)
        if self.is_uniform:
            return np.broadcast_to(curves.rate_max_rps, (len(rows),)).astype(np.float64)
        count = np.maximum(replicas, 1)
        carried = queueing.rate_max_rps(
            count, curves, self.slo_ms[rows], np.maximum(self.queue_late[rows], 1e-3),
            self.dispersion[rows],
        )  # fmt: skip
        return np.asarray(carried / count)

    def _curves(self, machine: str, rows: Sequence[int] | Ints) -> Curves:
        return Curves.of([self.models[row].curves[machine] for row in rows])


def _ready_by_machine(snapshot: Snapshot) -> dict[str, Counter[str]]:
    """Ready replicas by model and machine type."""
    machine = {
        node.id: snapshot.groups[node.group].machine
        for node in snapshot.nodes
        if node.state is not NodeState.DRAINING
    }
    ready: dict[str, Counter[str]] = {}
    for replica in snapshot.replicas:
        if replica.is_ready and replica.node in machine:
            ready.setdefault(replica.model, Counter())[machine[replica.node]] += 1
    return ready


def _slack_s(model: Model) -> float:
    """How long nine requests in ten may wait: the SLO less the service that 90 % stay below."""
    slow_ms = max(_service_p90_ms(curve) for curve in model.curves.values())
    return max(model.slo.latency_ms - slow_ms, 0.0) / 1e3


def _service_p90_ms(curve: ServiceCurve) -> float:
    if not curve.histogram:
        return curve.batch_ms(1) * (1 + 1.3 * curve.cv)
    cumulated = np.cumsum(curve.histogram)
    place = int(np.searchsorted(cumulated, 0.9 * cumulated[-1]))
    return SERVICE_EDGES_MS[min(place + 1, len(SERVICE_EDGES_MS) - 1)]


def _excess(model: Model, slack_s: float, busy: int) -> float:
    """Requests queued beyond what the slack lets wait: at `busy` requests in service, those that
    can be taken up within the slack are no excess.
    """
    service_s = min(curve.batch_ms(1) for curve in model.curves.values()) / 1e3
    patient = busy * slack_s * SLACK_PART / max(service_s, 1e-9)
    return max(model.traffic.queued - patient, 0.0)


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


def _has_begun(snapshot: Snapshot) -> NDArray[np.bool_]:
    """Models that have had a ready replica for some time. What was late while the first one came up
    says nothing about the fleet, and is no debt.
    """
    since: dict[str, float] = {}
    for replica in snapshot.replicas:
        if replica.is_ready:
            since[replica.model] = min(since.get(replica.model, np.inf), replica.ready_s)
    began_s = snapshot.now_s - BEGIN_S
    return np.array([since.get(m.name, np.inf) <= began_s for m in snapshot.models], dtype=bool)


def _fresh(names: tuple[str, ...], now_s: float, settings: DemandSettings) -> DemandMemory:
    count = len(names)
    return DemandMemory(
        names,
        forecast.fresh(count, settings.forecast),
        queueing.dispersion_memory(count),
        Budget.fresh(count, now_s),
        queueing.residual_memory(count),
        np.zeros(count),
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
    )


def _moved(record: R, places: Ints) -> R:
    """A record of arrays whose last axis is the models, for other models."""
    arrays = {
        f.name: value
        for f in fields(record)
        if isinstance(value := getattr(record, f.name), np.ndarray)
    }
    return replace(record, **{name: _picked(value, places) for name, value in arrays.items()})


def _picked(values: NDArray[Any], places: Ints) -> NDArray[Any]:
    padded = (
        np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
        if values.shape[-1]
        else np.zeros((*values.shape[:-1], 1), values.dtype)
    )
    picked: NDArray[Any] = padded[..., np.where(places >= 0, places, padded.shape[-1] - 1)]
    return picked
