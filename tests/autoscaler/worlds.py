"""Which small worlds and simple policies do the tests of the autoscaler share?

Each builder states a whole that works, and takes as arguments what a test wants otherwise:
`a_small_world(market=a_market(a=[(0, 4), (600, 0)]))` is a world whose zone loses all at 600 s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoscaler.decision import Command, Decision, Drain, Launch
from autoscaler.snapshot import MachineType, NodeState, Slo, Snapshot
from autoscaler.world import (
    MarketTrace,
    Profile,
    ProfileMachine,
    Requests,
    ServiceTime,
    World,
    a_world,
)

SPOT_A, SPOT_B, ON_DEMAND, RESERVED = "m/spot/a", "m/spot/b", "m/on-demand", "m/reserved"


def a_machine(
    name: str = "m",
    *,
    price_usd_h: float = 3.0,
    spot_usd_h: float | None = 1.0,
    fixed_ms: float = 100.0,
    per_item_ms: float = 0.0,
    spread: float = 0.0,
    concurrency: int = 1,
    batch_size_max: int = 1,
    boot_s: float = 60.0,
    load_s: float = 30.0,
    cold_start_cv: float = 0.0,
    reserved: int = 0,
    price_reserved_usd_h: float = 2.0,
    billing_increment_s: float = 1.0,
    billing_minimum_s: float = 60.0,
) -> ProfileMachine:
    """A machine type with one replica; no spot market when `spot_usd_h` is None."""
    return ProfileMachine(
        type=MachineType(
            name,
            price_usd_h,
            boot_s + load_s,
            cold_start_cv,
            billing_increment_s=billing_increment_s,
            billing_minimum_s=billing_minimum_s,
        ),
        service=ServiceTime(fixed_ms, per_item_ms, spread=spread),
        boot_s=boot_s,
        load_s=load_s,
        concurrency=concurrency,
        batch_size_max=batch_size_max,
        price_spot_usd_h=spot_usd_h,
        has_spot=spot_usd_h is not None,
        reserved=reserved,
        price_reserved_usd_h=price_reserved_usd_h,
    )


def a_profile(
    *machines: ProfileMachine,
    notice_s: float = 120.0,
    launch_fail_s: float = 15.0,
    on_demand_max: int | None = None,
) -> Profile:
    """A profile of these machines, or of one plain machine "m"."""
    return Profile(machines or (a_machine(),), notice_s, launch_fail_s, on_demand_max)


def a_market(
    prices: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    **zones: Sequence[tuple[float, int]],
) -> MarketTrace:
    """A spot market by zone: rows (t_s, nodes to rent from then on); `prices` likewise in USD/h.

    `a_market(a=[(0, 4), (600, 0)], b=[(0, 2)])`; without zones, "a" with 10 nodes for ever.
    """
    capacity = zones or {"a": [(0.0, 10)]}
    t_s, table = _steps(capacity)
    if prices is None:
        return MarketTrace(tuple(capacity), t_s, table.astype(np.int64))
    price_t_s, price = _steps({zone: prices[zone] for zone in capacity})
    return MarketTrace(tuple(capacity), t_s, table.astype(np.int64), price_t_s, price)


def _steps(
    columns: Mapping[str, Sequence[tuple[float, float]]],
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]:
    times = np.array(sorted({float(t) for rows in columns.values() for t, _ in rows}))
    table = np.array(
        [[[v for at, v in rows if at <= t or at == rows[0][0]][-1] for rows in columns.values()]
         for t in times],
        dtype=np.float64,
    )  # fmt: skip
    return times, table


def requests_at(rate_rps: float, duration_s: float = 600.0, seed: int = 0) -> Requests:
    """Poisson arrivals at a constant rate."""
    rng = np.random.default_rng(seed)
    count = int(rng.poisson(rate_rps * duration_s))
    return requests_when(np.sort(rng.uniform(0.0, duration_s, count)), duration_s)


def requests_when(arrival_s: Sequence[float] | Any, duration_s: float = 600.0) -> Requests:
    """Requests that arrive exactly then."""
    arrival = np.asarray(arrival_s, dtype=np.float64)
    ones = np.ones(len(arrival))
    return Requests(arrival, ones, ones, duration_s)


def a_small_world(
    *,
    profile: Profile | None = None,
    market: MarketTrace | None = None,
    requests: Requests | None = None,
    slo: Slo | None = None,
    seed: int = 1,
    deadline_s: float | None = None,
    prelude_s: float = 300.0,
) -> World:
    """Ten minutes of 5 requests/s of 100 ms each; 10 spot nodes in zone "a"."""
    return a_world(
        profile or a_profile(),
        market or a_market(),
        requests or requests_at(5.0),
        slo or Slo(500.0),
        seed=seed,
        deadline_s=deadline_s,
        prelude_s=prelude_s,
    )


@dataclass(frozen=True)
class FixedFleet:
    """A policy that holds so many nodes in each group, whatever happens."""

    groups: Mapping[str, int]
    name: str = "fixed"
    interval_s: float = 10.0
    is_woken: bool = False

    def decide(self, snapshot: Snapshot, memory: Any) -> Decision[None]:
        commands: list[Command] = []
        for group in snapshot.groups:
            held = [
                node.id
                for node in snapshot.nodes
                if node.group == group and node.state is not NodeState.DRAINING
            ]
            wanted = self.groups.get(group, 0)
            if wanted > len(held):
                commands.append(Launch(group, wanted - len(held)))
            commands.extend(Drain(node) for node in held[wanted:])
        return Decision(None, {"model": sum(self.groups.values())}, groups=self.groups,
                        commands=tuple(commands))  # fmt: skip
