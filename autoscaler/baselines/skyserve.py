"""How would SkyServe (SpotHedge) scale and place?

Three parts, decided every 20 s. *How many*: requests a second over the last minute divided by what
a replica should get; a wish above the target must hold for 300 s, one below it for 1,200 s, counted
in decisions. *On which market*: one spot replica more than the target; and for each of those that
is not ready, an on-demand one at once, up to the target, until spot is ready again. *Where*: each
zone is active or preempted; a preemption or a failed launch makes it preempted, a launch that came
makes it active; when fewer than two are active, all are again.

    target 3        spot wanted 4      spot ready 4 → on-demand 0
                                       spot ready 2 → on-demand 2
                                       spot ready 0 → on-demand 3

The next spot replica goes to the cheapest active zone that has none yet, and when all have one, to
the cheapest active zone. (It doesn't go to the one with the fewest.) Ties of price are broken in
its favour: by the fewest replicas, so that a market with one price spreads.

Facts from skypilot-org/skypilot 0.14.1 (Apache-2.0): `sky/serve/autoscalers.py`
(`FallbackRequestRateAutoscaler`, `_AutoscalerWithHysteresis`,
`_select_nonterminal_replicas_to_scale_down`), `sky/serve/spot_placer.py`
(`DynamicFallbackSpotPlacer`), `sky/serve/replica_managers.py` (when zones change), and
`sky/serve/constants.py`; the setting `num_overprovision: 1` from MaoZiming/spothedge_ae (Mao et
al., "SkyServe", EuroSys'25), `e2e/spot_hedge.yaml`.

It hears of preemptions when a replica no longer answers: notices are not read. One machine type, as
its placer demands: the one that is cheapest on spot by rate when it starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from autoscaler.baselines.placement import (
    answer,
    away,
    cheapest_machine,
    in_order_to_go,
    nodes_in,
    ready_in,
    spot_groups,
    steady_commands,
    within,
)
from autoscaler.baselines.window import Window, arrival_spans
from autoscaler.decision import Command, Decision, Launch
from autoscaler.snapshot import Event, EventKind, Group, Market, Snapshot

ZONES_ACTIVE_MIN = 2


@dataclass(frozen=True)
class SkyServeMemory:
    """`machine`: the one type; `rate`: arrivals of the last minute; `ups`, `downs`: decisions in a
    row with a wish above or below `target`; `preempted`: spot groups that are not active.
    """

    machine: str
    rate: Window
    target: int
    ups: int = 0
    downs: int = 0
    preempted: frozenset[str] = frozenset()


@dataclass(frozen=True)
class SkyServe:
    """Request-rate autoscaler with dynamic on-demand fallback and the dynamic spot placer.

    `target_rps_per_replica`: None is what a replica carries within the SLO, times `target_scale`.
    """

    replica_rate_rps: Mapping[str, float]
    target_rps_per_replica: float | None = None
    target_scale: float = 1.0
    window_s: float = 60.0
    delay_up_s: float = 300.0
    delay_down_s: float = 1200.0
    overprovision: int = 1
    on_demand_base: int = 0
    replicas_min: int = 1
    name: str = "skyserve"
    interval_s: float = 20.0
    is_woken: bool = False

    def decide(self, snapshot: Snapshot, memory: SkyServeMemory | None) -> Decision[SkyServeMemory]:
        """One round of autoscaler and placer."""
        before = memory or self._first(snapshot)
        zones = spot_groups(snapshot, before.machine)
        traffic = snapshot.models[0].traffic
        spans = arrival_spans(snapshot.now_s, traffic.arrivals, traffic.bin_s)
        seen = replace(
            before,
            rate=before.rate.then_all(spans),
            preempted=zones_after(before.preempted, zones, snapshot.events),
        )
        wish = self._wish(snapshot, seen)
        told = self._damped(seen, wish)
        ready_spot = ready_in(nodes_in(snapshot, zones))
        spot = told.target + self.overprovision - self.on_demand_base
        on_demand = min(told.target, self.on_demand_base + max(0, spot - ready_spot))
        commands = self._spot_commands(snapshot, zones, told.preempted, spot)
        commands += steady_commands(snapshot, told.machine, on_demand)
        return answer(
            snapshot,
            told,
            wanted=wish,
            allowed=told.target,
            commands=sorted(commands, key=lambda command: not isinstance(command, Launch)),
            because=f"{spot} spot, of which {ready_spot} ready, and {on_demand} on-demand"
            f"; {len(told.preempted)} of {len(zones)} zones preempted",
        )

    def _first(self, snapshot: Snapshot) -> SkyServeMemory:
        machine = cheapest_machine(snapshot, self.replica_rate_rps, Market.SPOT)
        least = within(snapshot.models[0], 0, self.replicas_min)
        return SkyServeMemory(machine, Window(self.window_s), least)

    def _wish(self, snapshot: Snapshot, memory: SkyServeMemory) -> int:
        per_replica_rps = self.target_rps_per_replica
        if per_replica_rps is None:
            per_replica_rps = self.target_scale * self.replica_rate_rps[memory.machine]
        rate_rps = memory.rate.mean_of_whole(snapshot.now_s)
        count = math.ceil(rate_rps / per_replica_rps - 1e-9)
        return within(snapshot.models[0], count, self.replicas_min)

    def _damped(self, memory: SkyServeMemory, wish: int) -> SkyServeMemory:
        """A delay is a count of decisions, cut to a whole one, as theirs is."""
        if wish > memory.target:
            told = replace(memory, ups=memory.ups + 1, downs=0)
            is_due = told.ups >= int(self.delay_up_s / self.interval_s)
            return replace(told, ups=0, target=wish) if is_due else told
        if wish < memory.target:
            told = replace(memory, downs=memory.downs + 1, ups=0)
            is_due = told.downs >= int(self.delay_down_s / self.interval_s)
            return replace(told, downs=0, target=wish) if is_due else told
        return replace(memory, ups=0, downs=0)

    def _spot_commands(
        self, snapshot: Snapshot, zones: list[Group], preempted: frozenset[str], wanted: int
    ) -> list[Command]:
        nodes = nodes_in(snapshot, zones)
        if len(nodes) >= wanted:
            return away(in_order_to_go(nodes)[: len(nodes) - wanted])
        held = {zone.name: 0 for zone in zones}
        for node in snapshot.nodes:
            if node.group in held:
                held[node.group] += 1
        launches: dict[str, int] = {}
        for _ in range(wanted - len(nodes)):
            name = next_zone(zones, preempted, held)
            held[name] += 1
            launches[name] = launches.get(name, 0) + 1
        return [Launch(name, count) for name, count in launches.items()]


def zones_after(
    preempted: frozenset[str], zones: list[Group], events: Iterable[Event]
) -> frozenset[str]:
    """The preempted ones of `zones` after `events`, taken in the order of time."""
    names = {zone.name for zone in zones}
    for event in sorted(events, key=lambda event: event.at_s):
        if event.group not in names:
            continue
        if event.kind is EventKind.LAUNCHED:
            preempted -= {event.group}
        elif event.kind in (EventKind.RECLAIMED, EventKind.LAUNCH_FAILED):
            preempted |= {event.group}
            if len(names) - len(preempted) < ZONES_ACTIVE_MIN:
                preempted = frozenset()
    return preempted


def next_zone(zones: list[Group], preempted: frozenset[str], held: Mapping[str, int]) -> str:
    """The cheapest active zone without a replica or, when each has one, the cheapest active one."""
    active = [zone for zone in zones if zone.name not in preempted]
    free = [zone for zone in active if not held[zone.name]]
    return min(free or active, key=lambda z: (z.price_usd_h, held[z.name], z.name)).name
