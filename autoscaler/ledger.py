"""What happened in a run, and what did it cost?

A `Run` is what a simulation hands back: each counted request, each node rented (the ledger), each
decision (the journal). The summary of it is computed from these alone, and so can anyone who has
them and the market's files.

    requests ─► attainment, latency, failed
    ledger   ─► cost, preemptions, launches, node hours
    journal  ─► what the policy saw, chose, rejected and expected

A node is paid from launch to end at the price of each moment, in whole increments and for no less
than the minimum of its machine type; what rounding adds costs the last price. A run is counted
from time 0, so a node handed over by the prelude is launched at 0 here. Reserved nodes are paid
for the whole run, used or not: one row each with the end reason "reservation", which is no rental,
and a row of no cost for each use.

It decides nothing and moves no request: `simulation` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscaler.decision import Command, Expected, Reason, Rejected
from autoscaler.snapshot import Group, MachineType, Market
from autoscaler.world import Floats, World

RESERVATION = "reservation"
"""The end reason of the row that pays for a reserved node, used or not."""


@dataclass(frozen=True, slots=True)
class Rental:
    """One node rented. `ready_s`: when it became ready, `end_s` or later when it never did.

    `end_reason`: "drained", "stopped", "reclaimed", "end" (of the run), or "reservation".
    """

    node: str
    group: str
    machine: str
    market: str
    zone: str
    start_s: float
    ready_s: float
    end_s: float
    end_reason: str
    cost_usd: float


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision, without the policy's memory, and what it was made on.

    `ready`: nodes that serve, by group (none named: zero).
    """

    now_s: float
    wanted: Mapping[str, int]
    groups: Mapping[str, int]
    commands: tuple[Command, ...]
    reason: Reason
    because: str
    rejected: tuple[Rejected, ...]
    expected: Expected
    rate_rps: float
    queued: int
    ready: Mapping[str, int]


@dataclass(frozen=True)
class Run:
    """What a policy made of a world.

    Requests that arrived from 0 on, in order of arrival: `start_s` is NaN and `node` -1 for those
    given up (`ok` is false, `finish_s` when that was), else `node` is a row of `ledger`. The
    journal begins with the prelude, at negative times. `decide_s` of `decisions` decisions: what
    the stopwatch said, 0 without one.
    """

    policy: str
    world: World
    arrival_s: Floats
    start_s: Floats
    finish_s: Floats
    node: NDArray[np.int32]
    ok: NDArray[np.bool_]
    ledger: tuple[Rental, ...]
    journal: tuple[Entry, ...]
    launches_failed: int = 0
    decide_s: float = 0.0
    decisions: int = 0

    @property
    def requests(self) -> int:
        return len(self.arrival_s)

    @property
    def latency_s(self) -> Floats:
        """From arrival to answer, or until it was given up."""
        latency: Floats = self.finish_s - self.arrival_s
        return latency

    @property
    def failed(self) -> int:
        """Requests given up at their deadline."""
        return int(self.requests - np.count_nonzero(self.ok))

    @property
    def slo_attainment(self) -> float:
        """The share of requests answered within the SLO's latency; 1 without requests."""
        if not self.requests:
            return 1.0
        within = self.ok & (self.latency_s <= self.world.slo.latency_ms / 1e3)
        return int(np.count_nonzero(within)) / self.requests

    @property
    def latency_p50_ms(self) -> float:
        """Of all requests, those given up with the time until then; 0 without requests."""
        return self._latencies_ms[0]

    @property
    def latency_p99_ms(self) -> float:
        """Like `latency_p50_ms`."""
        return self._latencies_ms[1]

    @cached_property
    def _latencies_ms(self) -> tuple[float, float]:
        if not self.requests:
            return (0.0, 0.0)
        p50, p99 = np.quantile(self.latency_s, [0.5, 0.99]) * 1e3
        return (float(p50), float(p99))

    @property
    def cost_usd(self) -> float:
        return math.fsum(rental.cost_usd for rental in self.ledger)

    @property
    def rentals(self) -> tuple[Rental, ...]:
        """The ledger without the rows that pay for reservations."""
        return tuple(rental for rental in self.ledger if rental.end_reason != RESERVATION)

    @property
    def preemptions(self) -> int:
        """Nodes that were reclaimed."""
        return sum(rental.end_reason == "reclaimed" for rental in self.ledger)

    @property
    def launches(self) -> dict[str, int]:
        """Nodes rented, by market; those handed over at time 0 among them."""
        rentals = self.rentals
        return {m.value: sum(r.market == m.value for r in rentals) for m in Market}

    @property
    def node_hours(self) -> dict[str, float]:
        """Hours from launch to end, by market; of reserved nodes those in use."""
        rentals = self.rentals
        return {
            m.value: math.fsum((r.end_s - r.start_s) / 3600 for r in rentals if r.market == m.value)
            for m in Market
        }

    @property
    def decide_ms_mean(self) -> float:
        return self.decide_s / self.decisions * 1e3 if self.decisions else 0.0


def summary(run: Run, bound_usd: float | None) -> dict[str, Any]:
    """The row of `summary.json` for this run. `ratio`: cost / bound, None without a bound."""
    return {
        "policy": run.policy,
        "cost_usd": run.cost_usd,
        "bound_usd": bound_usd,
        "ratio": run.cost_usd / bound_usd if bound_usd else None,
        "requests": run.requests,
        "slo_attainment": run.slo_attainment,
        "latency_p50_ms": run.latency_p50_ms,
        "latency_p99_ms": run.latency_p99_ms,
        "failed": run.failed,
        "preemptions": run.preemptions,
        "launches": run.launches,
        "node_hours": run.node_hours,
        "decide_ms_mean": run.decide_ms_mean,
    }


class Prices:
    """What nodes of each group cost over time, and so what a rental does."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._steps: dict[str, tuple[Floats, Floats, Floats]] = {}

    def cost_usd(self, group: Group, start_s: float, end_s: float) -> float:
        """A rental from `start_s` (0 or later) to `end_s`; 0 for a reserved node, which is paid."""
        if group.market is Market.RESERVED:
            return 0.0
        start_s = max(start_s, 0.0)
        spent = self._integral(group, end_s) - self._integral(group, start_s)
        extra_s = billed_s(self._world.machines[group.machine], end_s - start_s) - (end_s - start_s)
        return (spent + extra_s * self._world.price_usd_h(group, end_s)) / 3600

    def _integral(self, group: Group, at_s: float) -> float:
        """∫ price dt from 0 to `at_s`, in USD/h · s."""
        starts, price, before = self._of(group)
        row = int(np.searchsorted(starts, at_s, side="right")) - 1
        return float(before[row] + price[row] * (at_s - starts[row]))

    def _of(self, group: Group) -> tuple[Floats, Floats, Floats]:
        """Pieces of constant price: when each starts, its price, and the integral before it."""
        if group.name not in self._steps:
            starts = np.concatenate([[0.0], self._changes(group)])
            price = np.array([self._world.price_usd_h(group, at) for at in starts])
            before = np.concatenate([[0.0], np.cumsum(price[:-1] * np.diff(starts))])
            self._steps[group.name] = (starts, price, before)
        return self._steps[group.name]

    def _changes(self, group: Group) -> Floats:
        market = self._world.market
        if (
            group.market is not Market.SPOT
            or market.price_usd_h is None
            or market.price_t_s is None
        ):
            return np.empty(0)
        column = market.price_usd_h[:, market.zones.index(group.zone)]
        at_s = market.price_t_s[1:][np.diff(column) != 0]
        later: Floats = at_s[at_s > 0]
        return later


def billed_s(machine: MachineType, used_s: float) -> float:
    """For how long a rental of `used_s` is paid: whole increments, and no less than the minimum."""
    increment_s = machine.billing_increment_s
    if increment_s > 0:
        used_s = max(math.ceil(used_s / increment_s - 1e-9) * increment_s, used_s)
    return max(used_s, machine.billing_minimum_s)


def reservations(world: World) -> list[Rental]:
    """The rows that pay for reserved nodes, one for each, for the whole run."""
    return [
        Rental(
            f"{group.name}/{k}", group.name, group.machine, group.market.value, group.zone,
            0.0, 0.0, world.duration_s, RESERVATION,
            group.price_usd_h * world.duration_s / 3600,
        )
        for group in world.groups.values() if group.market is Market.RESERVED
        for k in range(group.nodes_max or 0)
    ]  # fmt: skip
