"""Which nodes are launched, drained and stopped, in which order?

From counts to commands, for one pool. What is firm is launched before what is a probe; reserved
before spot before on-demand. What is too many goes in `damping`'s order, but never so that less
stays ready than the present needs: a node that is to be replaced serves until its replacement does.
In a shortage, the starting nodes that will end it soonest are kept whatever is cheaper elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from autoscaler.damping import DampingSettings, scale_in
from autoscaler.decision import Command, Drain, Launch, Stop
from autoscaler.snapshot import Market, Node, NodeState, Snapshot

_ORDER = {Market.RESERVED: 0, Market.SPOT: 1, Market.ON_DEMAND: 2}


def ordered(
    snapshot: Snapshot,
    nodes: Sequence[Node],
    counts: Mapping[str, int],
    probes: Mapping[str, int],
    capacity: Mapping[str, float],
    ready_needed: float,
    settings: DampingSettings,
) -> tuple[Command, ...]:
    """Commands that turn `nodes` (those that stay) into `counts` by group, and try `probes`.

    `capacity`: of a node, by group; `ready_needed` in the same unit must stay ready.
    """
    held = Counter(node.group for node in nodes)
    launches = [
        *_launches({g: n - held[g] for g, n in counts.items()}, snapshot),
        *_launches(probes, snapshot),
    ]
    surplus = {group: held[group] - counts.get(group, 0) for group in held}
    going = scale_in(
        nodes, snapshot.replicas, surplus, snapshot.now_s, snapshot.groups, snapshot.machines,
        settings,
    )  # fmt: skip
    return (*launches, *_spared(going, nodes, capacity, ready_needed))


def _launches(missing: Mapping[str, int], snapshot: Snapshot) -> list[Launch]:
    groups = snapshot.groups
    launches = [Launch(group, count) for group, count in missing.items() if count > 0]
    return sorted(
        launches,
        key=lambda one: (
            _ORDER[groups[one.group].market], groups[one.group].price_usd_h, one.group,
        ),
    )  # fmt: skip


def _spared(
    going: Sequence[Stop | Drain],
    nodes: Sequence[Node],
    capacity: Mapping[str, float],
    ready_needed: float,
) -> list[Stop | Drain]:
    """Those of `going` that the present can do without."""
    by_id = {node.id: node for node in nodes}
    ready = sum(capacity[node.group] for node in nodes if node.state is NodeState.READY)
    awaited = _awaited(nodes, capacity, ready_needed - ready)
    kept: list[Stop | Drain] = []
    for command in going:
        node = by_id[command.node]
        size = capacity[node.group]
        if isinstance(command, Drain):
            if ready - size < ready_needed - 1e-9:
                continue
            ready -= size
        elif node.id in awaited:
            continue
        kept.append(command)
    return kept


def _awaited(
    nodes: Sequence[Node], capacity: Mapping[str, float], missing: float
) -> frozenset[str]:
    """The starting nodes that will be the first to fill what is `missing` now."""
    awaited: list[str] = []
    starting = [node for node in nodes if node.state is NodeState.STARTING]
    for node in sorted(starting, key=lambda node: (node.ready_s, node.id)):
        if missing <= 1e-9:
            break
        awaited.append(node.id)
        missing -= capacity[node.group]
    return frozenset(awaited)
