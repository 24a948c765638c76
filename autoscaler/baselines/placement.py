"""How does a number of replicas become commands, where nobody thinks about markets?

The autoscalers that are compared with Shoal know replicas, not rentals. This module rents for them
as a sensible operator would: always the machine type that is cheapest by the rate it carries, one
replica a node, reserved nodes (paid for anyway) before on-demand ones. Whoever has to go goes in
the order that Kubernetes, Ray Serve and SkyServe share: first what is not ready yet, then the
newest; on-demand before reserved.

It takes a launched node for running from the launch on (the snapshot lists it as STARTING).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from autoscaler.decision import Command, Decision, Drain, Expected, Launch, Reason, Stop
from autoscaler.snapshot import EventKind, Group, Market, Model, Node, NodeState, Snapshot

M = TypeVar("M")


def cheapest_machine(
    snapshot: Snapshot, replica_rate_rps: Mapping[str, float], market: Market = Market.ON_DEMAND
) -> str:
    """The machine type that costs least for each request a second that a replica on it carries.

    Prices are those of `market` now, averaged over its zones. Raises ValueError when no machine
    type with a rate can be rented there.
    """
    prices: dict[str, list[float]] = {}
    for group in snapshot.groups.values():
        if group.market is market and replica_rate_rps.get(group.machine, 0.0) > 0:
            prices.setdefault(group.machine, []).append(group.price_usd_h)
    if not prices:
        raise ValueError(f"no machine type with a rate can be rented {market.value}")
    return min(prices, key=lambda m: (sum(prices[m]) / len(prices[m]) / replica_rate_rps[m], m))


def steady_groups(snapshot: Snapshot, machine: str) -> list[Group]:
    """The groups of `machine` that nobody reclaims: reserved ones first, then on-demand."""
    groups = [
        group
        for group in snapshot.groups.values()
        if group.machine == machine and group.market is not Market.SPOT
    ]
    return sorted(groups, key=lambda group: group.market is not Market.RESERVED)


def spot_groups(snapshot: Snapshot, machine: str) -> list[Group]:
    """The groups of `machine` on the spot market, one a zone."""
    return [
        group
        for group in snapshot.groups.values()
        if group.machine == machine and group.market is Market.SPOT
    ]


def nodes_in(snapshot: Snapshot, groups: Iterable[Group]) -> list[Node]:
    """The nodes of `groups` that serve or will: not the draining ones."""
    names = {group.name for group in groups}
    return [
        node
        for node in snapshot.nodes
        if node.group in names and node.state is not NodeState.DRAINING
    ]


def ready_in(nodes: Iterable[Node]) -> int:
    """How many of `nodes` are ready."""
    return sum(node.state is NodeState.READY for node in nodes)


def in_order_to_go(nodes: Sequence[Node]) -> list[Node]:
    """Not ready ones first, then the newest (of equal age: the one listed last)."""
    newest_first = list(reversed(nodes))
    newest_first.sort(key=lambda node: (node.state is NodeState.READY, -node.started_s))
    return newest_first


def away(nodes: Iterable[Node]) -> list[Command]:
    """Commands that give `nodes` back: at once what serves nobody yet, after its last answer
    what does.
    """
    return [
        Drain(node.id) if node.state is NodeState.READY else Stop(node.id)
        for node in nodes
    ]  # fmt: skip


def steady_commands(snapshot: Snapshot, machine: str, wanted: int) -> list[Command]:
    """What brings the reserved and on-demand nodes of `machine` to `wanted`, within their limits.

    Spot nodes are neither counted nor touched.
    """
    groups = steady_groups(snapshot, machine)
    held = {group.name: nodes_in(snapshot, [group]) for group in groups}
    missing = wanted - sum(map(len, held.values()))
    if missing < 0:
        to_go = [node for group in reversed(groups) for node in in_order_to_go(held[group.name])]
        return away(to_go[:-missing])
    commands: list[Command] = []
    for group in groups:
        room = missing if group.nodes_max is None else group.nodes_max - len(held[group.name])
        count = max(0, min(missing, room))
        if count:
            commands.append(Launch(group.name, count))
        missing -= count
    return commands


def within(model: Model, count: int, least: int = 0, most: int | None = None) -> int:
    """`count` within the limits of the policy and of the model (the narrower of each)."""
    for ceiling in (most, model.replicas_max):
        count = count if ceiling is None else min(count, ceiling)
    return max(count, least, model.replicas_min)


def answer(
    snapshot: Snapshot,
    memory: M,
    *,
    wanted: int,
    allowed: int,
    commands: list[Command],
    because: str,
) -> Decision[M]:
    """The decision that performs `commands` for the snapshot's only model."""
    groups = _held_after(snapshot, commands)
    model = snapshot.models[0].name
    cost_usd_h = sum(snapshot.groups[name].price_usd_h * n for name, n in groups.items())
    return Decision(
        memory,
        wanted={model: wanted},
        allowed={model: allowed},
        groups=groups,
        replicas={model: groups},
        commands=tuple(commands),
        reason=_reason(snapshot, commands),
        because=because,
        expected=Expected(cost_usd_h, 1.0),
    )


def _held_after(snapshot: Snapshot, commands: list[Command]) -> dict[str, int]:
    gone = {command.node for command in commands if not isinstance(command, Launch)}
    groups: dict[str, int] = {}
    for node in snapshot.nodes:
        if node.state is not NodeState.DRAINING and node.id not in gone:
            groups[node.group] = groups.get(node.group, 0) + 1
    for command in commands:
        if isinstance(command, Launch):
            groups[command.group] = groups.get(command.group, 0) + command.count
    return groups


def _reason(snapshot: Snapshot, commands: list[Command]) -> Reason:
    if not commands:
        return Reason.STEADY
    if not any(isinstance(command, Launch) for command in commands):
        return Reason.DEMAND_FALLING
    kinds = {event.kind for event in snapshot.events}
    if EventKind.RECLAIMED in kinds:
        return Reason.RECLAIM
    if EventKind.LAUNCH_FAILED in kinds:
        return Reason.LAUNCH_FAILED
    return Reason.DEMAND_RISING
