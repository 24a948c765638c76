"""Does the cluster follow a wish up at once and down late, and do the right nodes go first?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.damping import (
    DampingMemory,
    DampingSettings,
    break_even_hold_s,
    damped,
    scale_in,
)
from autoscaler.decision import Drain, Stop
from autoscaler.snapshot import Group, MachineType, Market, Node, NodeState, Replica

COLUMN_S = 10.0


def followed(
    wishes: Sequence[int], hold_s: float = 30.0, delay_up_s: float = 0.0
) -> tuple[int, ...]:
    memory, allowed = DampingMemory(), []
    for column, wish in enumerate(wishes):
        memory, now = damped(
            memory, {"m": wish}, column * COLUMN_S, DampingSettings(delay_up_s), hold_s
        )
        allowed.append(now["m"])
    return tuple(allowed)


def strip(text: str, hold_s: float = 30.0, delay_up_s: float = 0.0) -> str:
    return "".join(str(n) for n in followed([int(c) for c in text], hold_s, delay_up_s))


def turns(values: Sequence[int]) -> int:
    """How often the direction changes."""
    steps = [b - a for a, b in itertools.pairwise(values) if a != b]
    return sum((a > 0) != (b > 0) for a, b in itertools.pairwise(steps))


# ── strips of time: one column is 10 s, the hold is three of them ─────────────────────────────


@pytest.mark.parametrize(
    ("wish", "allowed"),
    [
        ("5222222", "5555222"),
        ("55552252222222", "55555555552222"),
        ("2255", "2255"),
        ("543211111", "555543211"),
        ("5222322222", "5555333322"),
        ("0000", "0000"),
    ],
)
def test_a_wish_is_followed_up_at_once_and_down_after_the_hold(wish: str, allowed: str) -> None:
    assert strip(wish) == allowed


def test_the_strip_in_the_module_docstring_is_true() -> None:
    assert strip("55552252232222") == "55555555553332"


def test_without_a_hold_every_wish_is_followed() -> None:
    assert strip("5214", hold_s=0.0) == "5214"


def test_with_a_delay_up_a_short_spike_is_ignored_and_a_long_one_is_followed() -> None:
    assert strip("2922222", hold_s=0.0, delay_up_s=20.0) == "2222222"
    assert strip("2999999", hold_s=0.0, delay_up_s=20.0) == "2229999"


def test_each_model_has_a_hold_of_its_own_and_none_where_none_is_named() -> None:
    settings = DampingSettings()
    memory, _ = damped(DampingMemory(), {"a": 5, "b": 5}, 0.0, settings, {"a": 60.0})
    _, allowed = damped(memory, {"a": 1, "b": 1}, 10.0, settings, {"a": 60.0})
    assert allowed == {"a": 5, "b": 1}


def test_a_model_that_comes_back_is_not_held_to_its_former_wish() -> None:
    settings = DampingSettings()
    memory, _ = damped(DampingMemory(), {"a": 5}, 0.0, settings, 60.0)
    memory, _ = damped(memory, {}, 10.0, settings, 60.0)
    _, allowed = damped(memory, {"a": 1}, 20.0, settings, 60.0)
    assert allowed == {"a": 1}


# ── laws ──────────────────────────────────────────────────────────────────────────────────────

wish_lists = st.lists(st.integers(0, 9), min_size=1, max_size=60)
holds_s = st.sampled_from([0.0, 5.0, 10.0, 25.0, 30.0, 100.0])


@given(wish_lists, holds_s)
def test_no_model_is_allowed_less_than_it_wants(wishes: list[int], hold_s: float) -> None:
    allowed = followed(wishes, hold_s)
    assert all(a >= w for a, w in zip(allowed, wishes, strict=True))


@given(wish_lists, holds_s)
def test_what_is_allowed_is_exactly_the_most_wanted_within_the_hold(
    wishes: list[int], hold_s: float
) -> None:
    for k, allowed in enumerate(followed(wishes, hold_s)):
        ended_lately = [w for i, w in enumerate(wishes[:k]) if (k - i - 1) * COLUMN_S < hold_s]
        assert allowed == max([wishes[k], *ended_lately])


@given(wish_lists, holds_s, holds_s)
def test_what_is_allowed_never_turns_more_often_than_the_wish(
    wishes: list[int], hold_s: float, delay_up_s: float
) -> None:
    assert turns(followed(wishes, hold_s, delay_up_s)) <= turns(wishes)


@given(wish_lists, holds_s, st.integers(0, 9))
def test_constant_demand_settles_within_the_hold_and_stays(
    wishes: list[int], hold_s: float, level: int
) -> None:
    settled = followed([*wishes, *[level] * 40], hold_s)[len(wishes) :]
    after = math.ceil(hold_s / COLUMN_S)
    assert settled[after:] == (level,) * (40 - after)


@given(st.lists(st.sampled_from([4, 5, 6]), min_size=2, max_size=120))
def test_noise_around_a_level_gives_up_a_node_at_most_once_a_hold(wishes: list[int]) -> None:
    allowed = followed(wishes, hold_s=100.0)
    downs = [k for k, (a, b) in enumerate(itertools.pairwise(allowed)) if b < a]
    returns = [
        (down, up)
        for down, up in itertools.pairwise(downs)
        if any(b > a for a, b in itertools.pairwise(allowed[down + 1 : up + 1]))
    ]
    assert all((up - down) * COLUMN_S >= 100.0 for down, up in returns)


# ── how long a hold pays ──────────────────────────────────────────────────────────────────────


def test_without_harm_a_node_is_held_for_as_long_as_it_takes_to_start() -> None:
    assert break_even_hold_s(3.0, 120.0, 0.0) == 120.0


def test_a_free_node_is_held_for_ever() -> None:
    assert break_even_hold_s(0.0, 120.0, 1.0) == math.inf


@given(st.floats(0.1, 50), st.floats(0, 900), st.floats(0, 5), st.floats(0, 1e5))
def test_holding_to_the_break_even_costs_at_most_twice_what_knowing_the_future_does(
    price_usd_h: float, cold_start_s: float, harm_usd: float, return_s: float
) -> None:
    hold_s = break_even_hold_s(price_usd_h, cold_start_s, harm_usd)
    again_usd = price_usd_h * cold_start_s / 3600 + harm_usd
    paid_usd = price_usd_h * min(return_s, hold_s) / 3600 + again_usd * (return_s > hold_s)
    best_usd = min(price_usd_h * return_s / 3600, again_usd)
    assert paid_usd <= 2 * best_usd + 1e-9


def test_a_forecast_of_soon_or_late_lengthens_or_shortens_the_hold() -> None:
    plain = break_even_hold_s(3.0, 120.0, 0.1)
    assert break_even_hold_s(3.0, 120.0, 0.1, return_rate_per_h=60.0) == 2 * plain
    assert break_even_hold_s(3.0, 120.0, 0.1, return_rate_per_h=0.1) == plain / 2


# ── who goes first ────────────────────────────────────────────────────────────────────────────

HOURLY = MachineType("hourly", 1.0, 60.0, billing_increment_s=3600.0)
SECONDS = MachineType("seconds", 1.0, 60.0)
MACHINES = {"hourly": HOURLY, "seconds": SECONDS}
GROUPS = {
    "a": Group("a", "seconds", Market.SPOT, "z-1a", 1.0),
    "b": Group("b", "hourly", Market.ON_DEMAND, "z-1b", 1.0),
}
NO_LIMIT = DampingSettings(drain_fraction_max=1.0)


def a_node(
    name: str,
    state: NodeState = NodeState.READY,
    *,
    group: str = "a",
    started_s: float = 0.0,
    ready_s: float = 0.0,
    reclaim_s: float | None = None,
) -> Node:
    return Node(name, group, state, started_s, ready_s, reclaim_s)


def on(node: str, count: int) -> list[Replica]:
    return [Replica(f"{node}-{i}", "m", node, True, 0.0) for i in range(count)]


def gone(
    nodes: Sequence[Node],
    surplus: dict[str, int],
    replicas: Sequence[Replica] = (),
    settings: DampingSettings = NO_LIMIT,
    now_s: float = 1000.0,
) -> list[str]:
    commands = scale_in(nodes, replicas, surplus, now_s, GROUPS, MACHINES, settings)
    return [command.node for command in commands]


def test_nodes_with_a_notice_go_first_then_starting_then_running_ones() -> None:
    nodes = [
        a_node("running"),
        a_node("starting", NodeState.STARTING, ready_s=1050.0),
        a_node("noticed", reclaim_s=1060.0),
    ]
    assert gone(nodes, {"a": 3}) == ["noticed", "starting", "running"]


def test_a_starting_node_is_stopped_and_a_running_one_is_drained() -> None:
    nodes = [a_node("running"), a_node("starting", NodeState.STARTING)]
    assert scale_in(nodes, (), {"a": 2}, 0.0, GROUPS, MACHINES, NO_LIMIT) == (
        Stop("starting"),
        Drain("running"),
    )


def test_of_starting_nodes_the_one_furthest_from_ready_goes_first() -> None:
    nodes = [a_node(f"in {s}", NodeState.STARTING, ready_s=1000.0 + s) for s in (5, 50, 20)]
    assert gone(nodes, {"a": 2}) == ["in 50", "in 20"]


def test_of_running_nodes_the_one_with_the_fewest_replicas_goes_first() -> None:
    nodes = [a_node("three"), a_node("one"), a_node("two")]
    replicas = [*on("three", 3), *on("one", 1), *on("two", 2)]
    assert gone(nodes, {"a": 2}, replicas) == ["one", "two"]


def test_of_nodes_paid_by_the_hour_the_one_with_the_least_paid_time_left_goes_first() -> None:
    nodes = [a_node(f"paid since {s}", group="b", started_s=float(s)) for s in (0, 600, 4000)]
    assert gone(nodes, {"b": 3}, now_s=7100.0) == [
        "paid since 0",
        "paid since 4000",
        "paid since 600",
    ]


def test_of_nodes_paid_by_the_second_the_youngest_goes_first() -> None:
    nodes = [a_node(f"since {s}", started_s=float(s)) for s in (0, 900, 400)]
    assert gone(nodes, {"a": 2}) == ["since 900", "since 400"]


def test_no_node_is_drained_when_the_disruption_budget_is_spent() -> None:
    nodes = [a_node(f"n{i}") for i in range(7)] + [a_node("leaving", NodeState.DRAINING)]
    assert gone(nodes, {"a": 5}, settings=DampingSettings(drain_fraction_max=0.125)) == []
    assert len(gone(nodes, {"a": 5}, settings=DampingSettings(drain_fraction_max=0.5))) == 3


def test_one_node_may_always_drain_however_small_the_budget() -> None:
    nodes = [a_node("x"), a_node("y")]
    assert len(gone(nodes, {"a": 2}, settings=DampingSettings(drain_fraction_max=0.01))) == 1


def test_noticed_and_starting_nodes_do_not_spend_the_budget() -> None:
    nodes = [
        *[a_node(f"noticed {i}", reclaim_s=1100.0) for i in range(3)],
        *[a_node(f"starting {i}", NodeState.STARTING) for i in range(3)],
        *[a_node(f"ready {i}") for i in range(3)],
    ]
    assert len(gone(nodes, {"a": 9}, settings=DampingSettings(drain_fraction_max=0.1))) == 7


states = st.sampled_from(list(NodeState))
node_lists = st.lists(
    st.tuples(st.sampled_from("ab"), states, st.integers(0, 900), st.booleans()), max_size=30
).map(
    lambda rows: [
        a_node(f"n{i}", state, group=group, started_s=float(s), reclaim_s=2000.0 if taken else None)
        for i, (group, state, s, taken) in enumerate(rows)
    ]
)


@given(node_lists, st.integers(0, 12), st.integers(0, 12), st.floats(0.0, 1.0))
def test_no_running_node_goes_while_a_starting_one_of_its_group_could(
    nodes: list[Node], too_many_a: int, too_many_b: int, fraction: float
) -> None:
    surplus = {"a": too_many_a, "b": too_many_b}
    commands = scale_in(
        nodes, (), surplus, 1000.0, GROUPS, MACHINES, DampingSettings(0.0, fraction)
    )
    by_id = {node.id: node for node in nodes}
    gone_nodes = [by_id[command.node] for command in commands]
    for group, too_many in surplus.items():
        going = [n for n in gone_nodes if n.group == group]
        assert len(going) <= too_many
        stays = [n for n in nodes if n.group == group and n not in going]
        if any(n.state is NodeState.READY and n.reclaim_s is None for n in going):
            assert not [n for n in stays if n.state is NodeState.STARTING]
    serving = [n for n in nodes if n.reclaim_s is None and n.state is not NodeState.STARTING]
    draining = [n for n in serving if n.state is NodeState.DRAINING or n in gone_nodes]
    before = [n for n in serving if n.state is NodeState.DRAINING]
    assert len(draining) <= max(1, len(before), fraction * len(serving) + 1e-6)
    assert not [n for n in gone_nodes if n.state is NodeState.DRAINING]


@given(node_lists, st.data())
def test_the_order_in_which_nodes_are_listed_changes_nothing(
    nodes: list[Node], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(nodes))
    assert gone(shuffled, {"a": 3, "b": 3}) == gone(nodes, {"a": 3, "b": 3})
