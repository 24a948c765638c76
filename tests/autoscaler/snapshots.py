"""Which snapshots do the tests of the policy share, and how does a cluster obey it?

Each builder states a whole that works, and takes as arguments what a test wants otherwise:
`a_snapshot(nodes=nodes_in(SPOT_A, 3), models=[a_model(rate_rps=50.0)])`. A `Cluster` is the
plainest world that obeys decisions: nodes come after their cold start unless their group is shut,
nothing is ever lost, and arrivals are as even as a rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autoscaler.decision import Decision, Drain, Launch, Stop
from autoscaler.policy import Memory, Settings, decide
from autoscaler.snapshot import (
    Event,
    EventKind,
    Group,
    MachineType,
    Market,
    Model,
    Node,
    NodeState,
    Replica,
    Resources,
    ServiceCurve,
    Slo,
    Snapshot,
    Traffic,
)

SPOT_A, SPOT_B, ON_DEMAND, RESERVED = "m/spot/a", "m/spot/b", "m/on-demand", "m/reserved"
BIN_S = 5.0


def a_machine(
    name: str = "m",
    *,
    price_usd_h: float = 3.0,
    cold_start_s: float = 120.0,
    resources: Resources | None = None,
) -> MachineType:
    """A machine with one processor."""
    return MachineType(name, price_usd_h, cold_start_s, resources=resources or Resources())


def a_group(
    name: str = SPOT_A,
    *,
    machine: str = "m",
    market: Market = Market.SPOT,
    zone: str = "us-east-1a",
    price_usd_h: float = 1.0,
    nodes_max: int | None = None,
    notice_s: float = 120.0,
) -> Group:
    """Spot in a zone."""
    return Group(name, machine, market, zone, price_usd_h, nodes_max, notice_s)


def a_spot_group_in(zone: str, price_usd_h: float = 1.0, nodes_max: int | None = None) -> Group:
    """ "a" is zone us-east-1a, and so on."""
    return a_group(
        f"m/spot/{zone}", zone=f"us-east-1{zone}", price_usd_h=price_usd_h, nodes_max=nodes_max
    )


def an_on_demand_group(price_usd_h: float = 3.0, nodes_max: int | None = None) -> Group:
    return a_group(ON_DEMAND, market=Market.ON_DEMAND, price_usd_h=price_usd_h, nodes_max=nodes_max)


def a_reserved_group(nodes_max: int, price_usd_h: float = 2.0) -> Group:
    return a_group(RESERVED, market=Market.RESERVED, price_usd_h=price_usd_h, nodes_max=nodes_max)


def some_groups() -> list[Group]:
    """Spot in two zones and on demand."""
    return [a_spot_group_in("a"), a_spot_group_in("b", 1.1), an_on_demand_group()]


def a_node(
    name: str = "n",
    group: str = SPOT_A,
    *,
    state: NodeState = NodeState.READY,
    started_s: float = -7200.0,
    ready_s: float = -7080.0,
    reclaim_s: float | None = None,
) -> Node:
    """One that has been ready for two hours."""
    return Node(name, group, state, started_s, ready_s, reclaim_s)


def nodes_in(
    group: str,
    count: int,
    *,
    state: NodeState = NodeState.READY,
    started_s: float = -7200.0,
    ready_s: float = -7080.0,
    reclaim_s: float | None = None,
) -> list[Node]:
    """`count` alike, with ids of their own."""
    prefix = f"{group}#{state.value}{'' if reclaim_s is None else '!'}"
    one = a_node(group=group, state=state, started_s=started_s, ready_s=ready_s)
    return [replace(one, id=f"{prefix}{i}", reclaim_s=reclaim_s) for i in range(count)]


def a_traffic(
    rate_rps: float = 50.0,
    *,
    duration_s: float = 60.0,
    queued: int = 0,
    running: int | None = None,
    finished: int | None = None,
    late: int = 0,
) -> Traffic:
    """Even arrivals in bins of 5 s, all answered in time."""
    arrivals = (rate_rps * BIN_S,) * round(duration_s / BIN_S)
    served = round(rate_rps * duration_s) if finished is None else finished
    busy = round(rate_rps * 0.1) if running is None else running
    return Traffic(arrivals, BIN_S, queued, busy, float(busy), served, late)


def a_curve(fixed_ms: float = 100.0, cv: float = 0.1, concurrency: int = 1) -> ServiceCurve:
    return ServiceCurve(fixed_ms, concurrency=concurrency, cv=cv)


def a_model(
    name: str = "model",
    *,
    rate_rps: float = 50.0,
    traffic: Traffic | None = None,
    slo: Slo | None = None,
    curves: Mapping[str, ServiceCurve] | None = None,
    resources: Resources | None = None,
    replicas_min: int = 0,
    replicas_max: int | None = None,
    on_demand_min: int = 0,
) -> Model:
    """100 ms a request on machine "m", 99 % within 500 ms; a replica fills a machine."""
    return Model(
        name,
        slo or Slo(500.0),
        a_traffic(rate_rps) if traffic is None else traffic,
        {"m": a_curve()} if curves is None else curves,
        resources or Resources(),
        replicas_min,
        replicas_max,
        on_demand_min,
    )


def replicas_on(nodes: Iterable[Node], model: str = "model") -> list[Replica]:
    """One on each node, ready with it."""
    return [
        Replica(f"{node.id}/{model}", model, node.id, node.state is not NodeState.STARTING,
                node.ready_s)
        for node in nodes
    ]  # fmt: skip


def a_snapshot(
    *,
    now_s: float = 0.0,
    machines: Sequence[MachineType] | None = None,
    groups: Sequence[Group] | None = None,
    nodes: Sequence[Node] = (),
    models: Sequence[Model] | None = None,
    replicas: Sequence[Replica] | None = None,
    events: Sequence[Event] = (),
    nodes_max: int | None = None,
) -> Snapshot:
    """A model with 50 requests/s; unless told, the first model has a replica on each node."""
    machines = [a_machine()] if machines is None else machines
    groups = some_groups() if groups is None else groups
    models = [a_model()] if models is None else models
    if replicas is None:
        replicas = replicas_on(nodes, models[0].name) if models else ()
    return Snapshot(
        now_s,
        {machine.name: machine for machine in machines},
        {group.name: group for group in groups},
        tuple(nodes),
        tuple(models),
        tuple(replicas),
        tuple(events),
        nodes_max,
    )


Rate = Callable[[float], float]


@dataclass
class Cluster:
    """A world that obeys. `shut`: groups in which launches fail. `rates_rps`: by model."""

    groups: list[Group] = field(default_factory=some_groups)
    models: list[Model] = field(default_factory=lambda: [a_model()])
    rates_rps: dict[str, Rate] = field(default_factory=dict)
    machines: list[MachineType] = field(default_factory=lambda: [a_machine()])
    settings: Settings = field(default_factory=Settings)
    shut: set[str] = field(default_factory=set)
    nodes: dict[str, Node] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    memory: Memory | None = None
    now_s: float = 0.0
    launched: int = 0

    def snapshot(self) -> Snapshot:
        """What is there now; nodes whose time has come are ready."""
        for node in self.nodes.values():
            if node.state is NodeState.STARTING and node.ready_s <= self.now_s:
                self.nodes[node.id] = replace(node, state=NodeState.READY)
        nodes = list(self.nodes.values())
        models = [
            replace(model, traffic=a_traffic(rate, duration_s=self.settings.interval_s))
            for model in self.models
            for rate in (self.rates_rps[model.name](self.now_s),)
        ]
        return a_snapshot(
            now_s=self.now_s, machines=self.machines, groups=self.groups, nodes=nodes,
            models=models, events=self.events,
        )  # fmt: skip

    def step(self) -> tuple[Snapshot, Decision[Memory]]:
        """One decision, obeyed; then an interval passes."""
        snapshot = self.snapshot()
        decision = decide(snapshot, self.memory, self.settings)
        self.memory, self.events = decision.memory, []
        for command in decision.commands:
            if isinstance(command, Launch):
                self._launch(command)
            elif isinstance(command, Drain | Stop):
                del self.nodes[command.node]
        self.now_s += self.settings.interval_s
        return snapshot, decision

    def _launch(self, launch: Launch) -> None:
        is_shut = launch.group in self.shut
        kind = EventKind.LAUNCH_FAILED if is_shut else EventKind.LAUNCHED
        self.events.append(Event(kind, launch.group, self.now_s, launch.count))
        if is_shut:
            return
        group = next(group for group in self.groups if group.name == launch.group)
        cold_s = next(m.cold_start_s for m in self.machines if m.name == group.machine)
        for _ in range(launch.count):
            self.launched += 1
            name = f"{launch.group}#{self.launched}"
            self.nodes[name] = a_node(
                name, launch.group, state=NodeState.STARTING,
                started_s=self.now_s, ready_s=self.now_s + cold_s,
            )  # fmt: skip

    def run(self, duration_s: float) -> list[tuple[Snapshot, Decision[Memory]]]:
        """All decisions of so long."""
        end_s = self.now_s + duration_s
        steps = []
        while self.now_s < end_s:
            steps.append(self.step())
        return steps


def a_cluster(
    rate_rps: float | Rate = 50.0,
    *,
    groups: Sequence[Group] | None = None,
    model: Model | None = None,
    machines: Sequence[MachineType] | None = None,
    settings: Settings | None = None,
    shut: Iterable[str] = (),
) -> Cluster:
    """A cluster of one model, with nothing rented yet."""
    model = model or a_model()
    rate = rate_rps if callable(rate_rps) else lambda _: float(rate_rps)
    return Cluster(
        groups=some_groups() if groups is None else list(groups),
        models=[model],
        rates_rps={model.name: rate},
        machines=[a_machine()] if machines is None else list(machines),
        settings=settings or Settings(),
        shut=set(shut),
    )
