"""Are commands in an order in which nobody is left without?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.damping import DampingSettings
from autoscaler.decision import Command, Drain, Launch, Stop
from autoscaler.orders import ordered
from autoscaler.snapshot import Node, NodeState
from tests.autoscaler.snapshots import (
    ON_DEMAND,
    RESERVED,
    SPOT_A,
    SPOT_B,
    a_node,
    a_reserved_group,
    a_snapshot,
    a_spot_group_in,
    an_on_demand_group,
    nodes_in,
)

GROUPS = [
    a_spot_group_in("a", 1.0), a_spot_group_in("b", 0.9), an_on_demand_group(), a_reserved_group(9),
]  # fmt: skip
AT_ONCE = DampingSettings(drain_fraction_max=1.0)


def orders(
    nodes: Sequence[Node],
    counts: Mapping[str, int],
    *,
    probes: Mapping[str, int] | None = None,
    capacity: Mapping[str, float] | None = None,
    ready_needed: float = 0.0,
    damping: DampingSettings = AT_ONCE,
) -> tuple[Command, ...]:
    """Commands, in a world where a quarter more or less is no matter unless told."""
    sizes = dict.fromkeys((group.name for group in GROUPS), 1.0) | dict(capacity or {})
    snapshot = a_snapshot(groups=GROUPS, nodes=nodes)
    return ordered(snapshot, nodes, counts, probes or {}, sizes, ready_needed, damping)


def starting(group: str, ready_s: Sequence[float]) -> list[Node]:
    return [
        a_node(f"{group}+{at:g}", group, state=NodeState.STARTING, started_s=-60.0, ready_s=at)
        for at in ready_s
    ]


def test_what_is_held_already_needs_no_command() -> None:
    assert orders(nodes_in(SPOT_A, 3), {SPOT_A: 3}) == ()


def test_reserved_comes_before_spot_before_on_demand_and_cheap_before_dear() -> None:
    counts = {ON_DEMAND: 1, SPOT_A: 2, RESERVED: 3, SPOT_B: 4}
    assert orders([], counts) == (
        Launch(RESERVED, 3), Launch(SPOT_B, 4), Launch(SPOT_A, 2), Launch(ON_DEMAND, 1),
    )  # fmt: skip


def test_what_is_firm_is_launched_before_what_is_a_probe() -> None:
    assert orders([], {ON_DEMAND: 2}, probes={SPOT_A: 1}) == (
        Launch(ON_DEMAND, 2), Launch(SPOT_A, 1),
    )  # fmt: skip


def test_a_group_that_is_not_named_is_given_back() -> None:
    commands = orders(nodes_in(SPOT_A, 2), {})
    assert sorted(c.node for c in commands if isinstance(c, Drain)) == [
        n.id for n in nodes_in(SPOT_A, 2)
    ]


def test_a_node_serves_until_its_replacement_does() -> None:
    old = nodes_in(ON_DEMAND, 3)
    commands = orders(old, {SPOT_A: 3}, ready_needed=3.0)
    assert commands == (Launch(SPOT_A, 3),)
    coming = starting(SPOT_A, [60.0, 60.0 + 1, 60.0 + 2])
    assert orders([*old, *coming], {SPOT_A: 3}, ready_needed=3.0) == ()
    there = nodes_in(SPOT_A, 3)
    assert len(orders([*old, *there], {SPOT_A: 3}, ready_needed=3.0)) == 3


def test_one_replacement_that_is_ready_lets_one_node_go() -> None:
    nodes = [*nodes_in(ON_DEMAND, 3), *nodes_in(SPOT_A, 1)]
    commands = orders(nodes, {SPOT_A: 3}, ready_needed=3.0)
    assert [type(command) for command in commands] == [Launch, Drain]


def test_a_large_node_is_not_given_back_for_a_small_one() -> None:
    nodes = [*nodes_in(ON_DEMAND, 1), *nodes_in(SPOT_A, 1)]
    sizes = {ON_DEMAND: 4.0}
    assert orders(nodes, {SPOT_A: 1}, capacity=sizes, ready_needed=2.0) == ()
    assert len(orders(nodes, {SPOT_A: 1}, capacity=sizes, ready_needed=1.0)) == 1


def test_starting_nodes_are_stopped_before_ready_ones_are_drained() -> None:
    nodes = [*nodes_in(SPOT_A, 2), *starting(SPOT_A, [30.0, 60.0])]
    commands = orders(nodes, {SPOT_A: 1})
    assert commands[:2] == (Stop(f"{SPOT_A}+60"), Stop(f"{SPOT_A}+30"))
    assert isinstance(commands[2], Drain)


def test_in_a_shortage_the_nodes_that_end_it_soonest_are_waited_for() -> None:
    nodes = [*nodes_in(SPOT_A, 1), *starting(ON_DEMAND, [20.0, 30.0, 90.0])]
    commands = orders(nodes, {SPOT_A: 4}, ready_needed=3.0)
    assert commands == (Launch(SPOT_A, 3), Stop(f"{ON_DEMAND}+90"))


def test_not_too_many_drain_at_a_time() -> None:
    commands = orders(nodes_in(SPOT_A, 8), {}, damping=DampingSettings(drain_fraction_max=0.25))
    assert len(commands) == 2


@st.composite
def fleets(draw: st.DrawFn) -> list[Node]:
    """Ready and starting nodes in four groups."""
    rows = draw(
        st.lists(
            st.tuples(
                st.sampled_from([SPOT_A, SPOT_B, ON_DEMAND, RESERVED]),
                st.sampled_from([NodeState.READY, NodeState.STARTING]),
                st.integers(1, 90),
            ),
            max_size=20,
        )
    )
    return [
        a_node(
            f"n{i}", group, state=state,
            ready_s=float(s) if state is NodeState.STARTING else -float(s),
        )
        for i, (group, state, s) in enumerate(rows)
    ]  # fmt: skip


counts_by_group = st.dictionaries(
    st.sampled_from([SPOT_A, SPOT_B, ON_DEMAND, RESERVED]), st.integers(0, 8)
)


@settings(deadline=None)
@given(fleets(), counts_by_group, st.floats(0.0, 20.0), st.sampled_from([0.5, 1.0, 3.0]))
def test_commands_never_leave_less_ready_than_there_was_or_is_needed(
    nodes: list[Node], counts: dict[str, int], ready_needed: float, size: float
) -> None:
    sizes = {SPOT_A: size, ON_DEMAND: 2.0}
    commands = orders(nodes, counts, capacity=sizes, ready_needed=ready_needed)
    drained = {command.node for command in commands if isinstance(command, Drain)}

    def ready(gone: set[str]) -> float:
        return sum(
            sizes.get(node.group, 1.0)
            for node in nodes
            if node.state is NodeState.READY and node.id not in gone
        )

    assert ready(drained) >= min(ready(set()), ready_needed) - 1e-6


@settings(deadline=None)
@given(fleets(), counts_by_group)
def test_without_needs_the_commands_lead_to_the_counts(
    nodes: list[Node], counts: dict[str, int]
) -> None:
    after = Counter(node.group for node in nodes)
    group = {node.id: node.group for node in nodes}
    for command in orders(nodes, counts):
        if isinstance(command, Launch):
            after[command.group] += command.count
        else:
            after[group[command.node]] -= 1
    assert +after == +Counter(counts)


@settings(deadline=None)
@given(fleets(), counts_by_group, st.floats(0.0, 20.0))
def test_no_group_grows_and_shrinks_at_once_and_no_node_goes_twice(
    nodes: list[Node], counts: dict[str, int], ready_needed: float
) -> None:
    commands = orders(nodes, counts, ready_needed=ready_needed)
    group = {node.id: node.group for node in nodes}
    gone = [command.node for command in commands if isinstance(command, Drain | Stop)]
    grown = {command.group for command in commands if isinstance(command, Launch)}
    assert len(set(gone)) == len(gone)
    assert not grown & {group[node] for node in gone}


@pytest.mark.parametrize("listed", [slice(None), slice(None, None, -1)])
def test_the_order_in_which_nodes_are_listed_changes_nothing(listed: slice) -> None:
    nodes = [*nodes_in(SPOT_A, 4), *starting(SPOT_B, [10.0, 20.0, 30.0])]
    expected = orders(nodes, {SPOT_A: 2, SPOT_B: 1}, ready_needed=3.0)
    assert orders(nodes[listed], {SPOT_A: 2, SPOT_B: 1}, ready_needed=3.0) == expected
