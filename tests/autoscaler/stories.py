"""What does a policy do in a world of a few nodes that a test tells, round by round?

A `Story` keeps nodes and time, asks a policy at its interval, and performs what it commands: a node
is listed from its launch on and ready after `cold_start_s`; a launch beyond a zone's capacity fails
at once; a drained node is gone. A test says how much traffic there is, and takes nodes away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from autoscaler.decision import Decision, Launch, Policy
from autoscaler.snapshot import (
    Event,
    EventKind,
    Group,
    MachineType,
    Market,
    Model,
    Node,
    NodeState,
    ServiceCurve,
    Slo,
    Snapshot,
    Traffic,
)

RATES_RPS = {"m": 10.0}
TEN_AT_ONCE = ServiceCurve(100.0, concurrency=10)


def groups_of(
    machine: str = "m",
    *,
    on_demand_usd_h: float = 3.0,
    spot_usd_h: Mapping[str, float] | None = None,
    on_demand_max: int | None = None,
    reserved: int = 0,
) -> dict[str, Group]:
    """On-demand, spot by zone and, if any, reserved groups of one machine type."""
    groups = [Group(f"{machine}/on-demand", machine, Market.ON_DEMAND, "any", on_demand_usd_h,
                    on_demand_max)]  # fmt: skip
    for zone, price in (spot_usd_h or {}).items():
        groups.append(Group(f"{machine}/spot/{zone}", machine, Market.SPOT, zone, price))
    if reserved:
        groups.append(Group(f"{machine}/reserved", machine, Market.RESERVED, "any", 2.0, reserved))
    return {group.name: group for group in groups}


@dataclass
class Story:
    """The state of the told world; `capacity` limits spot groups (none named: no limit)."""

    policy: Policy
    groups: Mapping[str, Group] = field(default_factory=groups_of)
    cold_start_s: float = 60.0
    capacity: dict[str, int] = field(default_factory=dict)
    curve: ServiceCurve = TEN_AT_ONCE
    now_s: float = 0.0
    memory: Any = None
    nodes: list[Node] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    born: int = 0

    def tick(self, rate_rps: float = 0.0, ongoing: float = 0.0) -> Decision[Any]:
        """One interval with that traffic, and the decision at its end."""
        self.now_s += self.policy.interval_s
        return self.ask(rate_rps, ongoing)

    def until(self, at_s: float, rate_rps: float = 0.0, ongoing: float = 0.0) -> Decision[Any]:
        """Ticks up to and with `at_s`; the last decision."""
        decision = self.tick(rate_rps, ongoing)
        while self.now_s + self.policy.interval_s <= at_s + 1e-6:
            decision = self.tick(rate_rps, ongoing)
        return decision

    def ask(self, rate_rps: float = 0.0, ongoing: float = 0.0) -> Decision[Any]:
        """A decision now."""
        decision = self.policy.decide(self.snapshot(rate_rps, ongoing), self.memory)
        self.memory = decision.memory
        self.events.clear()
        for command in decision.commands:
            if isinstance(command, Launch):
                self.launch(command.group, command.count)
            else:
                self.nodes = [node for node in self.nodes if node.id != command.node]
        asked = {g: n for g, n in decision.groups.items() if g not in self.capacity}
        got = {g: n for g, n in self.held().items() if g not in self.capacity}
        assert asked == got, "a decision says what its commands lead to"
        return decision

    def snapshot(self, rate_rps: float = 0.0, ongoing: float = 0.0) -> Snapshot:
        """What the policy is shown."""
        self.nodes = [
            replace(node, state=NodeState.READY) if node.ready_s <= self.now_s else node
            for node in self.nodes
        ]
        bin_s = min(5.0, self.policy.interval_s)
        bins = (rate_rps * bin_s,) * round(self.policy.interval_s / bin_s)
        model = Model(
            "model",
            Slo(500.0),
            Traffic(bins, bin_s, ongoing_mean=ongoing),
            {group.machine: self.curve for group in self.groups.values()},
        )
        return Snapshot(
            now_s=self.now_s,
            machines={
                group.machine: MachineType(group.machine, 3.0, self.cold_start_s)
                for group in self.groups.values()
            },
            groups=self.groups,
            nodes=tuple(self.nodes),
            models=(model,),
            events=tuple(self.events),
        )

    def launch(self, group: str, count: int = 1) -> None:
        """Nodes that start now, as far as there is capacity."""
        for _ in range(count):
            is_full = self.held().get(group, 0) >= self.capacity.get(group, 1_000)
            kind = EventKind.LAUNCH_FAILED if is_full else EventKind.LAUNCHED
            self.events.append(Event(kind, group, self.now_s))
            if not is_full:
                self.born += 1
                ready_s = self.now_s + self.cold_start_s
                self.nodes.append(
                    Node(f"n{self.born}", group, NodeState.STARTING, self.now_s, ready_s)
                )

    def start_with(self, group: str, count: int) -> None:
        """Nodes that have long been ready."""
        self.launch(group, count)
        self.nodes = [replace(n, state=NodeState.READY, ready_s=self.now_s) for n in self.nodes]
        self.events.clear()

    def take(self, group: str) -> None:
        """The market takes every node of `group`."""
        taken = [node for node in self.nodes if node.group == group]
        self.nodes = [node for node in self.nodes if node.group != group]
        if taken:
            self.events.append(Event(EventKind.RECLAIMED, group, self.now_s, len(taken)))

    def held(self) -> dict[str, int]:
        """Nodes by group."""
        counts: dict[str, int] = {}
        for node in self.nodes:
            counts[node.group] = counts.get(node.group, 0) + 1
        return counts
