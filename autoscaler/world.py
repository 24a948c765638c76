"""What world does a policy meet in a simulation?

    requests (traces) ─┐
    market   (traces) ─┼─► World ─► simulation (what a policy makes of it)
    profile, SLO, seed ┘        └─► bound      (what nobody can beat in it)

Everything that chance decides and no policy can change is drawn here, once, by the seed: when each
request arrives and how long it takes on each machine type. So policies are compared on the same
requests, and the bound knows exactly what they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autoscaler.snapshot import Group, MachineType, Market, ServiceCurve, Slo

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ANY_ZONE = "any"
"""The zone of on-demand and reserved groups in a simulation: they can be had everywhere."""


@dataclass(frozen=True)
class ServiceTime:
    """How long one machine type takes for a batch of n requests.

        mean_i(fixed_ms · z_i) + Σ_i (per_item_ms + tokens_i · per_token_ms) · z_i

    with z_i drawn once for each request: lognormal, mean 1, standard deviation `spread`.
    """

    fixed_ms: float
    per_item_ms: float = 0.0
    per_input_token_ms: float = 0.0
    per_output_token_ms: float = 0.0
    spread: float = 0.0


@dataclass(frozen=True)
class ProfileMachine:
    """A machine type with one replica on it: what it costs, how it comes up, how fast it answers.

    `boot_s` + `load_s` is the mean cold start; `type.cold_start_cv` its spread. `price_spot_usd_h`:
    where the market folder has no prices. `reserved`: nodes that are paid for, used or not.
    """

    type: MachineType
    service: ServiceTime
    boot_s: float
    load_s: float
    concurrency: int = 1
    batch_size_max: int = 1
    price_spot_usd_h: float | None = None
    has_spot: bool = True
    reserved: int = 0
    price_reserved_usd_h: float = 0.0


@dataclass(frozen=True)
class Profile:
    """What a replica can do on which machines, and on which terms machines are rented."""

    machines: tuple[ProfileMachine, ...]
    notice_s: float = 120.0
    launch_fail_s: float = 15.0
    on_demand_max: int | None = None


@dataclass(frozen=True)
class Requests:
    """A request trace. `arrival_s` is sorted and lies in [0, `duration_s`)."""

    arrival_s: Floats
    input_tokens: Floats
    output_tokens: Floats
    duration_s: float


@dataclass(frozen=True)
class MarketTrace:
    """A spot market: from `capacity_t_s[k]` on, zone z has `capacity[k, z]` nodes to rent; prices
    likewise (None: the profile's). Before the first row the first one holds, after the last the
    last.
    """

    zones: tuple[str, ...]
    capacity_t_s: Floats
    capacity: Ints
    price_t_s: Floats | None = None
    price_usd_h: Floats | None = None


@dataclass(frozen=True)
class Work:
    """What each request needs on one machine type, in seconds: a batch of n takes
    mean(`fixed_s`) + sum(`variable_s`) over its requests; one alone the sum of both.
    """

    fixed_s: Floats
    variable_s: Floats


@dataclass(frozen=True)
class World:
    """One run's world, from 0 to `duration_s`.

    `deadline_s`: after which the edge gives a request up (it failed). `prelude_s`: how long before
    time 0 every policy already ran, on the traffic of the first minutes repeated and the market as
    it was at time 0, so that all begin in their own steady state; nothing of it is counted.
    """

    profile: Profile
    market: MarketTrace
    requests: Requests
    work: Mapping[str, Work]
    slo: Slo
    deadline_s: float
    seed: int
    prelude_s: float = 1800.0
    groups: Mapping[str, Group] = field(default_factory=dict)
    curves: Mapping[str, ServiceCurve] = field(default_factory=dict)

    @property
    def duration_s(self) -> float:
        return self.requests.duration_s

    @property
    def machines(self) -> dict[str, MachineType]:
        return {machine.type.name: machine.type for machine in self.profile.machines}

    def capacity_at(self, at_s: float) -> Ints:
        """Nodes to rent by zone at that time."""
        row = int(np.searchsorted(self.market.capacity_t_s, at_s, side="right")) - 1
        now: Ints = self.market.capacity[max(row, 0)]
        return now

    def price_usd_h(self, group: Group, at_s: float) -> float:
        """What a node of `group` costs an hour at that time."""
        market = self.market
        if (
            group.market is not Market.SPOT
            or market.price_usd_h is None
            or market.price_t_s is None
        ):
            return group.price_usd_h
        row = max(int(np.searchsorted(market.price_t_s, at_s, side="right")) - 1, 0)
        scale = self._spot_scale(group.machine)
        return float(market.price_usd_h[row, market.zones.index(group.zone)]) * scale

    def _spot_scale(self, machine: str) -> float:
        """A market's prices are of the first machine type with spot; others cost in proportion to
        their on-demand prices.
        """
        first = next(m.type for m in self.profile.machines if m.has_spot)
        return self.machines[machine].price_on_demand_usd_h / first.price_on_demand_usd_h


def a_world(
    profile: Profile,
    market: MarketTrace,
    requests: Requests,
    slo: Slo,
    *,
    seed: int,
    deadline_s: float | None = None,
    prelude_s: float = 1800.0,
) -> World:
    """The world of one run; `deadline_s` is, where not given, the larger of 5 SLOs and 30 s."""
    return World(
        profile=profile,
        market=market,
        requests=requests,
        work=_work(profile, requests, np.random.default_rng([seed, 1])),
        slo=slo,
        deadline_s=max(5 * slo.latency_ms / 1e3, 30.0) if deadline_s is None else deadline_s,
        seed=seed,
        prelude_s=prelude_s,
        groups={group.name: group for group in _groups(profile, market)},
        curves=_curves(profile, requests),
    )


def _work(profile: Profile, requests: Requests, rng: np.random.Generator) -> dict[str, Work]:
    draws = rng.standard_normal(len(requests.arrival_s))  # the same request is slow everywhere
    return {m.type.name: _work_on(m.service, requests, draws) for m in profile.machines}


def _work_on(service: ServiceTime, requests: Requests, draws: Floats) -> Work:
    sigma2 = np.log1p(service.spread**2)
    z = np.exp(np.sqrt(sigma2) * draws - sigma2 / 2)  # lognormal, mean 1, deviation `spread`
    tokens_ms = (
        service.per_input_token_ms * requests.input_tokens
        + service.per_output_token_ms * requests.output_tokens
    )
    return Work(service.fixed_ms * z / 1e3, (service.per_item_ms + tokens_ms) * z / 1e3)


def _curves(profile: Profile, requests: Requests) -> dict[str, ServiceCurve]:
    """What an operator would write of a model after a short test: means over the requests."""
    tokens_in = float(requests.input_tokens.mean()) if len(requests.input_tokens) else 0.0
    tokens_out = float(requests.output_tokens.mean()) if len(requests.output_tokens) else 0.0
    return {
        m.type.name: ServiceCurve(
            fixed_ms=m.service.fixed_ms,
            per_item_ms=m.service.per_item_ms
            + m.service.per_input_token_ms * tokens_in
            + m.service.per_output_token_ms * tokens_out,
            concurrency=m.concurrency,
            batch_size_max=m.batch_size_max,
            cv=m.service.spread,
        )
        for m in profile.machines
    }


def _groups(profile: Profile, market: MarketTrace) -> list[Group]:
    """Reserved, on-demand and one spot group a zone, for each machine type."""
    groups: list[Group] = []
    for machine in profile.machines:
        name, price = machine.type.name, machine.type.price_on_demand_usd_h
        if machine.reserved:
            groups.append(
                Group(
                    f"{name}/reserved", name, Market.RESERVED, ANY_ZONE,
                    machine.price_reserved_usd_h, machine.reserved,
                )
            )  # fmt: skip
        groups.append(
            Group(
                f"{name}/on-demand", name, Market.ON_DEMAND, ANY_ZONE, price,
                profile.on_demand_max,
            )
        )  # fmt: skip
        for zone in market.zones if machine.has_spot else ():
            spot = Group(
                f"{name}/spot/{zone}", name, Market.SPOT, zone,
                machine.price_spot_usd_h or 0.0, notice_s=profile.notice_s,
            )  # fmt: skip
            groups.append(spot)
    return groups
