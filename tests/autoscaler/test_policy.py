"""Does Shoal hold what the demand needs, at the lowest price, and keep still when nothing moves?"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.decision import Command, Decision, Drain, Launch, Reason, Stop
from autoscaler.policy import Memory, Settings, Shoal, decide
from autoscaler.snapshot import (
    Event,
    EventKind,
    Model,
    Node,
    NodeState,
    Replica,
    Resources,
    Slo,
    Snapshot,
)
from tests.autoscaler.snapshots import (
    ON_DEMAND,
    RESERVED,
    SPOT_A,
    SPOT_B,
    Cluster,
    a_cluster,
    a_curve,
    a_group,
    a_machine,
    a_model,
    a_reserved_group,
    a_snapshot,
    a_spot_group_in,
    an_on_demand_group,
    nodes_in,
    replicas_on,
    some_groups,
)

SERVICE_S = 0.1


def first(snapshot: Snapshot) -> Decision[Memory]:
    """What is decided without a memory."""
    return decide(snapshot, None, Settings())


def launched(commands: Sequence[Command]) -> Counter[str]:
    """Launches by group."""
    counts = Counter[str]()
    for command in commands:
        if isinstance(command, Launch):
            counts[command.group] += command.count
    return counts


def given_back(commands: Sequence[Command]) -> list[str]:
    return [command.node for command in commands if isinstance(command, Drain | Stop)]


def busy(rate_rps: float) -> int:
    """Nodes that work all the time at such a rate: fewer can't keep up, whatever the SLO."""
    return math.ceil(rate_rps * SERVICE_S - 1e-9)


# ── the first decision ────────────────────────────────────────────────────────────────────────


def test_the_first_decision_rents_what_the_demand_needs_on_cheap_spot() -> None:
    decision = first(a_snapshot())
    assert set(decision.groups) <= {SPOT_A, SPOT_B}
    assert launched(decision.commands) == decision.groups
    assert busy(50.0) < decision.groups[SPOT_A] < 2 * busy(50.0)
    assert decision.wanted["model"] > busy(50.0)
    assert decision.expected.attainment >= 0.9  # the model's own opinion, before it is calibrated


def test_reserved_nodes_come_first_whatever_they_cost() -> None:
    groups = [a_reserved_group(3, price_usd_h=9.0), *some_groups()]
    commands = first(a_snapshot(groups=groups)).commands
    assert commands[0] == Launch(RESERVED, 3)
    assert launched(commands)[SPOT_A] > 0


def test_spot_that_is_dearer_than_on_demand_is_left_alone() -> None:
    groups = [a_spot_group_in("a", 4.0), an_on_demand_group(3.0)]
    assert set(first(a_snapshot(groups=groups)).groups) == {ON_DEMAND}


def test_the_machine_type_that_carries_most_for_its_price_is_taken() -> None:
    machines = [a_machine(), a_machine("fast", price_usd_h=6.0)]
    groups = [*some_groups(), a_group("fast/spot/a", machine="fast", price_usd_h=2.0)]
    model = a_model(curves={"m": a_curve(100.0), "fast": a_curve(25.0)})
    assert set(first(a_snapshot(machines=machines, groups=groups, models=[model])).groups) == {
        "fast/spot/a"
    }
    dear = [*some_groups(), a_group("fast/spot/a", machine="fast", price_usd_h=9.0)]
    decision = first(a_snapshot(machines=machines, groups=dear, models=[model]))
    assert "fast/spot/a" not in decision.groups


def test_a_snapshot_without_models_asks_for_nothing() -> None:
    decision = first(a_snapshot(models=[]))
    assert (decision.groups, decision.commands, decision.wanted) == ({}, (), {})
    again = decide(a_snapshot(now_s=15.0), decision.memory, Settings())
    assert launched(again.commands)


def test_a_model_that_fits_no_machine_takes_nothing_from_the_others() -> None:
    alone = first(a_snapshot())
    models = [a_model(), a_model("whale", resources=Resources(cpu=2.0))]
    decision = first(a_snapshot(models=models))
    assert launched(decision.commands) == launched(alone.commands)
    assert not decision.replicas.get("whale")
    assert decision.expected.attainment < 0.6


# ── what a model may ask for ──────────────────────────────────────────────────────────────────


def test_safe_replicas_are_on_machines_that_nobody_reclaims() -> None:
    decision = first(a_snapshot(models=[a_model(on_demand_min=2)]))
    assert decision.groups[ON_DEMAND] == decision.replicas["model"][ON_DEMAND] == 2


def test_a_reserved_node_is_safe_enough() -> None:
    groups = [a_reserved_group(2), *some_groups()]
    decision = first(a_snapshot(groups=groups, models=[a_model(on_demand_min=2)]))
    assert decision.groups[RESERVED] == 2
    assert ON_DEMAND not in decision.groups


def test_a_model_that_nobody_asks_keeps_its_minimum() -> None:
    decision = first(a_snapshot(models=[a_model(rate_rps=0.0, replicas_min=3)]))
    assert decision.allowed["model"] == sum(decision.groups.values()) == 3


def test_no_model_gets_more_than_its_maximum() -> None:
    decision = first(a_snapshot(models=[a_model(rate_rps=500.0, replicas_max=4)]))
    assert decision.wanted["model"] > 50
    assert decision.allowed["model"] == sum(launched(decision.commands).values()) == 4


def test_the_cluster_never_grows_beyond_its_limit() -> None:
    nodes = nodes_in(SPOT_A, 2)
    decision = first(a_snapshot(nodes=nodes, nodes_max=4))
    assert sum(launched(decision.commands).values()) == 2


def test_a_group_is_never_asked_for_more_than_it_has() -> None:
    groups = [a_spot_group_in("a", 1.0, 2), a_spot_group_in("b", 1.1, 3), an_on_demand_group()]
    decision = first(a_snapshot(groups=groups))
    assert decision.groups[SPOT_A] == 2
    assert decision.groups[SPOT_B] == 3
    assert decision.groups[ON_DEMAND] > 0


# ── markets that move ─────────────────────────────────────────────────────────────────────────


def test_more_demand_is_met_where_nodes_are_cheap() -> None:
    cluster = a_cluster(lambda now_s: 50.0 if now_s < 1800 else 100.0)
    cluster.run(1800)
    held = len(cluster.nodes)
    _, decision = cluster.run(60)[1]
    assert decision.reason in {Reason.QUEUE_GROWING, Reason.DEMAND_RISING}
    assert sum(decision.groups.values()) >= held + 4
    assert set(decision.groups) <= {SPOT_A, SPOT_B}


def test_a_noticed_node_is_replaced_in_the_same_decision_and_counts_no_more() -> None:
    cluster = a_cluster()
    cluster.run(1800)
    snapshot = cluster.snapshot()
    taken, *rest = snapshot.nodes
    taken = replace(taken, reclaim_s=snapshot.now_s + 120)
    event = Event(EventKind.NOTICED, taken.group, snapshot.now_s)
    noticed = replace(snapshot, nodes=(taken, *rest), events=(event,))
    decision = decide(noticed, cluster.memory, cluster.settings)
    assert decision.reason is Reason.NOTICE
    assert sum(decision.groups.values()) >= len(snapshot.nodes)
    assert sum(launched(decision.commands).values()) == sum(decision.groups.values()) - len(rest)
    assert not given_back(decision.commands)


def test_a_failed_launch_is_made_up_for_on_demand_at_once() -> None:
    cluster = a_cluster(shut=[SPOT_A, SPOT_B])
    cluster.step()
    _, second = cluster.step()
    assert second.reason is Reason.LAUNCH_FAILED
    assert launched(second.commands)[ON_DEMAND] > busy(50.0)


def test_a_place_that_refused_is_probed_again_but_not_pestered() -> None:
    cluster = a_cluster(shut=[SPOT_A, SPOT_B])
    steps = cluster.run(3 * 3600)
    for group in (SPOT_A, SPOT_B):
        asked_s = [s.now_s for s, d in steps if launched(d.commands)[group]]
        assert 5 <= len(asked_s) <= 40
        assert max(b - a for a, b in itertools.pairwise(asked_s)) <= 1800
        assert min(b - a for a, b in itertools.pairwise(asked_s)) >= 30
        assert all(launched(d.commands)[group] <= 1 for s, d in steps if s.now_s > 600)


def ready(nodes: Sequence[Node], gone: Sequence[str] = ()) -> int:
    return sum(node.state is NodeState.READY and node.id not in gone for node in nodes)


def test_on_demand_nodes_go_only_when_the_spot_nodes_that_replace_them_are_ready() -> None:
    cluster = a_cluster(shut=[SPOT_A, SPOT_B])
    cluster.run(3600)
    held = Counter(node.group for node in cluster.nodes.values())
    assert set(held) == {ON_DEMAND}
    cluster.shut.clear()
    steps = cluster.run(3600)
    assert {node.group for node in cluster.nodes.values()} <= {SPOT_A, SPOT_B}
    for snapshot, decision in steps:
        assert ready(snapshot.nodes, given_back(decision.commands)) > busy(50.0)


def test_a_cheaper_place_is_worth_a_cold_start_only_if_it_is_much_cheaper() -> None:
    nodes = nodes_in(SPOT_A, 7)
    for price_usd_h, moves in ((0.99, False), (0.3, True)):
        groups = [a_spot_group_in("a", 1.0), a_spot_group_in("b", price_usd_h)]
        decision = first(a_snapshot(groups=groups, nodes=nodes))
        assert bool(launched(decision.commands)[SPOT_B]) is moves


def test_starting_nodes_are_stopped_before_running_ones_are_drained() -> None:
    nodes = [
        *nodes_in(SPOT_A, 9),
        *nodes_in(SPOT_A, 3, state=NodeState.STARTING, started_s=-30.0, ready_s=90.0),
    ]
    commands = first(a_snapshot(nodes=nodes)).commands
    assert [type(command) for command in commands[:3]] == [Stop, Stop, Stop]
    assert all(isinstance(command, Drain) for command in commands[3:])


def test_starting_nodes_that_are_needed_are_waited_for() -> None:
    starting = nodes_in(ON_DEMAND, 7, state=NodeState.STARTING, started_s=-30.0, ready_s=90.0)
    decision = first(a_snapshot(nodes=starting))
    assert not given_back(decision.commands)


# ── several models ────────────────────────────────────────────────────────────────────────────


def test_each_large_model_has_nodes_of_its_own() -> None:
    quiet, loud = first(a_snapshot(models=[a_model("a", rate_rps=20.0)])), first(a_snapshot())
    both = first(a_snapshot(models=[a_model("a", rate_rps=20.0), a_model("b")]))
    assert both.groups[SPOT_A] == quiet.groups[SPOT_A] + loud.groups[SPOT_A]
    assert sum(both.replicas["a"].values()) == quiet.groups[SPOT_A]
    assert sum(both.replicas["b"].values()) == loud.groups[SPOT_A]


def test_no_large_model_gives_back_the_nodes_of_another() -> None:
    mine, others = nodes_in(SPOT_A, 12), nodes_in(SPOT_B, 3)
    models = [a_model("a"), a_model("b", rate_rps=20.0)]
    replicas = [*replicas_on(mine, "a"), *replicas_on(others, "b")]
    decision = first(a_snapshot(nodes=[*mine, *others], models=models, replicas=replicas))
    assert set(given_back(decision.commands)) <= {node.id for node in mine}
    assert given_back(decision.commands)


def small_models(count: int, rate_rps: float = 10.0) -> list[Model]:
    return [
        a_model(f"small-{i}", rate_rps=rate_rps, resources=Resources(cpu=0.25))
        for i in range(count)
    ]


def test_small_models_share_nodes() -> None:
    models = small_models(8)
    decision = first(a_snapshot(models=models))
    replicas = sum(decision.allowed.values())
    assert replicas >= 8
    assert sum(decision.groups.values()) == math.ceil(replicas / 4)
    for model in models:
        assert sum(decision.replicas[model.name].values()) == decision.allowed[model.name]
        assert set(decision.replicas[model.name]) <= set(decision.groups)


def test_a_model_is_remembered_while_others_come_and_go() -> None:
    a, b = a_model("a"), a_model("b", rate_rps=20.0)

    def wanted(models: Sequence[Sequence[Model]]) -> int:
        memory: Memory | None = None
        decision = first(a_snapshot())
        for k, present in enumerate(models):
            snapshot = a_snapshot(now_s=60.0 * k, models=present)
            decision = decide(snapshot, memory, Settings())
            memory = decision.memory
        return decision.wanted["a"]

    steady = wanted([[a]] * 20)
    assert wanted([[a]] * 10 + [[b, a]] * 5 + [[a]] * 5) == steady
    assert first(a_snapshot(models=[a])).wanted["a"] > steady


# ── keeping still ─────────────────────────────────────────────────────────────────────────────


def signs(steps: Sequence[tuple[Snapshot, Decision[Memory]]]) -> list[int]:
    """+1 for each decision that launches, -1 for each that gives back."""
    moves = [
        (bool(launched(d.commands)) - bool(given_back(d.commands)), bool(d.commands))
        for _, d in steps
    ]
    return [sign for sign, is_move in moves if is_move]


@pytest.mark.parametrize("rate_rps", [0.0, 3.0, 50.0, 400.0])
def test_constant_demand_comes_to_rest(rate_rps: float) -> None:
    cluster = a_cluster(rate_rps, settings=replace(Settings(), interval_s=30.0))
    before = signs(cluster.run(2 * 3600))
    assert len([1 for a, b in itertools.pairwise(before) if a != b]) <= 1
    after = cluster.run(3600)
    assert [d.commands for _, d in after] == [()] * len(after)
    assert {d.reason for _, d in after} == {Reason.STEADY}
    assert len(cluster.nodes) >= max(busy(rate_rps), 1)


def test_a_day_and_night_turn_the_fleet_once_each() -> None:
    def rate(now_s: float) -> float:
        return 60.0 + 40.0 * math.sin(2 * math.pi * now_s / (6 * 3600))

    cluster = a_cluster(rate, settings=replace(Settings(), interval_s=60.0))
    cluster.run(3600)
    moves = signs(cluster.run(6 * 3600))
    assert sum(a != b for a, b in itertools.pairwise(moves)) <= 8


def test_the_same_snapshot_and_memory_give_the_same_decision() -> None:
    memory: Memory | None = None
    for k in range(5):
        snapshot = a_snapshot(now_s=60.0 * k, nodes=nodes_in(SPOT_A, 3 + k))
        one, two = (decide(snapshot, memory, Settings()) for _ in range(2))
        assert repr(one) == repr(two)
        memory = one.memory


def test_the_policy_decides_as_the_function_does() -> None:
    shoal = Shoal(replace(Settings(), interval_s=20.0))
    assert shoal.interval_s == 20.0
    decision = shoal.decide(a_snapshot(), None)
    assert decision.commands == decide(a_snapshot(), None, shoal.settings).commands


# ── what is told ──────────────────────────────────────────────────────────────────────────────


def test_the_reason_names_what_is_held_launched_and_at_what_price() -> None:
    decision = first(a_snapshot())
    count = decision.groups[SPOT_A]
    assert f"{count} × {SPOT_A} at 1 USD/h" in decision.because
    assert f"launch {count} in {SPOT_A}" in decision.because
    assert "50 requests/s now" in decision.because


def test_the_expected_cost_is_what_the_groups_cost() -> None:
    groups = [a_reserved_group(2, price_usd_h=2.0), *some_groups()]
    decision = first(a_snapshot(groups=groups, models=[a_model(on_demand_min=3)]))
    prices = {group.name: group.price_usd_h for group in groups}
    assert decision.expected.cost_usd_h == pytest.approx(
        sum(prices[group] * count for group, count in decision.groups.items())
    )


def test_rejected_options_have_their_price() -> None:
    decision = first(a_snapshot())
    told = {option.option: option for option in decision.rejected}
    count = decision.groups[SPOT_A]
    assert told["on-demand only"].cost_usd_h >= 3.0 * busy(50.0)
    assert told[f"one {SPOT_A} less"].cost_usd_h == pytest.approx(count - 1, rel=0.3)
    assert all(option.why and option.cost_usd_h >= 0 for option in decision.rejected)


def test_a_place_without_capacity_is_told_among_the_rejected() -> None:
    cluster = a_cluster(shut=[SPOT_A, SPOT_B])
    cluster.step()
    _, decision = cluster.step()
    told = {option.option: option.why for option in decision.rejected}
    assert "no capacity" in told[SPOT_A]


# ── laws ──────────────────────────────────────────────────────────────────────────────────────

GROUPS = [a_reserved_group(2), a_spot_group_in("a"), a_spot_group_in("b", 1.1, 5),
          an_on_demand_group()]  # fmt: skip


@st.composite
def node_lists(draw: st.DrawFn) -> list[Node]:
    """Nodes of all groups in all states."""
    rows = draw(
        st.lists(
            st.tuples(
                st.sampled_from([RESERVED, SPOT_A, SPOT_A, SPOT_B, ON_DEMAND]),
                st.sampled_from([*NodeState, NodeState.READY, NodeState.READY]),
                st.sampled_from([None, None, None, 100.0]),
            ),
            max_size=25,
        )
    )
    nodes = []
    for i, (group, state, reclaim_s) in enumerate(rows):
        starts = state is NodeState.STARTING
        nodes.append(
            Node(
                f"n{i}", group, state, -30.0 if starts else -7200.0,
                90.0 if starts else -7080.0, reclaim_s if group in {SPOT_A, SPOT_B} else None,
            )
        )  # fmt: skip
    return nodes


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """One to six models, large and small, and any nodes."""
    nodes = draw(node_lists())
    models = [
        a_model(
            f"m{i}",
            rate_rps=draw(st.sampled_from([0.0, 2.0, 20.0, 60.0])),
            slo=Slo(draw(st.sampled_from([150.0, 500.0, 5000.0])), 0.99),
            resources=Resources(cpu=draw(st.sampled_from([0.2, 0.5, 1.0]))),
            replicas_min=draw(st.integers(0, 2)),
            replicas_max=draw(st.sampled_from([None, 2, 8])),
            on_demand_min=draw(st.integers(0, 2)),
        )
        for i in range(draw(st.integers(1, 6)))
    ]
    replicas = [
        Replica(f"r{i}", f"m{i % len(models)}", node.id, node.state is not NodeState.STARTING,
                node.ready_s)
        for i, node in enumerate(nodes)
    ]  # fmt: skip
    kinds = st.sampled_from(list(EventKind))
    events = [
        Event(kind, group, -1.0)
        for kind, group in draw(
            st.lists(st.tuples(kinds, st.sampled_from([SPOT_A, SPOT_B, ON_DEMAND])), max_size=3)
        )
    ]
    limit = draw(st.sampled_from([None, 0, 10, 30]))
    return a_snapshot(
        groups=GROUPS, nodes=nodes, models=models, replicas=replicas, events=events,
        nodes_max=limit,
    )  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(snapshots())
def test_every_decision_is_one_that_can_be_performed(snapshot: Snapshot) -> None:
    decision = first(snapshot)
    nodes = {node.id: node for node in snapshot.nodes}
    gone = given_back(decision.commands)
    assert len(set(gone)) == len(gone)
    assert set(gone) <= set(nodes)
    for command in decision.commands:
        if isinstance(command, Stop):
            assert nodes[command.node].state is NodeState.STARTING
        elif isinstance(command, Drain):
            assert nodes[command.node].state is NodeState.READY
        else:
            assert command.count > 0
    more = launched(decision.commands)
    if snapshot.nodes_max is not None:
        room = max(snapshot.nodes_max - len(snapshot.nodes), 0)
        assert sum(more.values()) <= room


@settings(max_examples=80, deadline=None)
@given(snapshots())
def test_every_decision_says_what_holds_together(snapshot: Snapshot) -> None:
    decision = first(snapshot)
    names = {model.name for model in snapshot.models}
    assert set(decision.groups) <= set(snapshot.groups)
    assert all(count > 0 for count in decision.groups.values())
    assert 0.0 <= decision.expected.attainment <= 1.0
    assert decision.expected.cost_usd_h >= 0.0
    assert set(decision.wanted) == set(decision.allowed) == names
    assert set(decision.replicas) <= names
    for model in snapshot.models:
        allowed = decision.allowed[model.name]
        assert allowed >= model.replicas_min
        if model.replicas_max is not None:
            assert allowed <= max(model.replicas_max, model.replicas_min)
        placed = decision.replicas.get(model.name, {})
        assert set(placed) <= set(decision.groups)
        assert all(count > 0 for count in placed.values())
    assert decision.because


@settings(max_examples=80, deadline=None)
@given(node_lists(), st.sampled_from([2.0, 20.0, 60.0]), st.booleans())
def test_shoal_never_drains_below_what_the_present_needs(
    nodes: list[Node], rate_rps: float, is_patient: bool
) -> None:
    model = a_model(rate_rps=rate_rps, slo=Slo(5000.0 if is_patient else 300.0))
    snapshot = a_snapshot(groups=GROUPS, nodes=nodes, models=[model])
    decision = first(snapshot)
    staying = [node for node in nodes if node.reclaim_s is None]
    before, after = ready(staying), ready(staying, given_back(decision.commands))
    assert after >= min(before, busy(rate_rps))


@settings(max_examples=60, deadline=None)
@given(node_lists(), st.sampled_from([2.0, 20.0, 60.0]))
def test_no_group_is_ever_asked_for_more_than_its_quota(nodes: list[Node], rate_rps: float) -> None:
    snapshot = a_snapshot(groups=GROUPS, nodes=nodes, models=[a_model(rate_rps=rate_rps)])
    held = Counter(node.group for node in nodes)
    for group, count in launched(first(snapshot).commands).items():
        quota = snapshot.groups[group].nodes_max
        assert quota is None or held[group] + count <= quota


Story = Callable[[], Cluster]


@pytest.mark.parametrize(
    "story",
    [
        lambda: a_cluster(lambda t: 80.0 if 1800 <= t < 5400 else 20.0),
        lambda: a_cluster(lambda t: 5.0 + 95.0 * (t >= 3600)),
        lambda: a_cluster(40.0, groups=[a_spot_group_in("a", 1.0, 3), an_on_demand_group()]),
    ],
)
def test_through_a_story_no_drain_leaves_less_than_is_busy(story: Story) -> None:
    cluster = story()
    for snapshot, decision in cluster.run(2 * 3600):
        gone = given_back(decision.commands)
        rate_rps = cluster.rates_rps["model"](snapshot.now_s)
        if any(isinstance(command, Drain) for command in decision.commands):
            assert ready(snapshot.nodes, gone) >= busy(rate_rps)
