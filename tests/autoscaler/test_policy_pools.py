"""Do models that share a cluster share its nodes, and not count them twice?"""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings

from autoscaler.snapshot import NodeState, Resources, Snapshot
from tests.autoscaler.snapshots import (
    SPOT_A,
    a_curve,
    a_group,
    a_machine,
    a_model,
    a_snapshot,
    a_spot_group_in,
    an_on_demand_group,
    nodes_in,
    replicas_on,
    some_groups,
)
from tests.autoscaler.test_policy import first, given_back, launched, small_models, snapshots


@settings(max_examples=50)
@given(snapshots())
def test_models_together_never_ask_for_more_than_a_group_has(snapshot: Snapshot) -> None:
    held = Counter(node.group for node in snapshot.nodes)
    for group, count in launched(first(snapshot).commands).items():
        quota = snapshot.groups[group].nodes_max
        assert quota is None or held[group] + count <= quota


def test_a_shortage_is_met_with_what_there_is() -> None:
    groups = [
        a_spot_group_in("a", 1.0, 2),
        a_spot_group_in("b", 1.1, 2),
        an_on_demand_group(3.0, 1),
    ]
    assert sum(launched(first(a_snapshot(groups=groups)).commands).values()) == 5


def test_starting_nodes_without_replicas_are_not_launched_again() -> None:
    coming = nodes_in(SPOT_A, 10, state=NodeState.STARTING, started_s=-15, ready_s=105)
    models = [a_model("a"), a_model("b", rate_rps=20.0)]
    decision = first(a_snapshot(models=models, nodes=coming, replicas=[]))
    assert not launched(decision.commands)


def test_no_node_is_counted_for_two_pools() -> None:
    nodes = nodes_in(SPOT_A, 12)
    models = [a_model("a"), *small_models(2)]
    gone = given_back(first(a_snapshot(models=models, nodes=nodes, replicas=[])).commands)
    assert len(set(gone)) == len(gone)
    few = nodes_in(SPOT_A, 7)
    assert launched(first(a_snapshot(models=models, nodes=few, replicas=[])).commands)


def test_nodes_of_a_model_that_is_gone_serve_another_or_go() -> None:
    nodes = nodes_in(SPOT_A, 7)
    decision = first(
        a_snapshot(models=[a_model("b")], nodes=nodes, replicas=replicas_on(nodes, "gone"))
    )
    assert not launched(decision.commands)


def test_without_models_nodes_are_given_back() -> None:
    assert given_back(first(a_snapshot(models=[], nodes=nodes_in(SPOT_A, 3))).commands)


def test_a_model_without_curves_stops_nobody() -> None:
    assert launched(first(a_snapshot(models=[a_model(curves={}), a_model("b")])).commands)


def test_nodes_of_a_machine_type_that_nobody_uses_any_more_go_once_all_are_served() -> None:
    machines = [a_machine(), a_machine("old", price_usd_h=5.0)]
    groups = [*some_groups(), a_group("old/spot/a", machine="old", price_usd_h=9.0)]
    old = nodes_in("old/spot/a", 3)
    curves = {"m": a_curve(), "old": a_curve()}
    models = [
        a_model(f"s{i}", rate_rps=10.0, resources=Resources(cpu=0.25), curves=curves)
        for i in range(3)
    ]
    before = first(a_snapshot(machines=machines, groups=groups, nodes=old, models=models))
    assert launched(before.commands)
    assert not given_back(before.commands)
    new = nodes_in(SPOT_A, 2)
    after = first(a_snapshot(machines=machines, groups=groups, nodes=[*old, *new], models=models))
    assert given_back(after.commands)
    assert set(given_back(after.commands)) <= {node.id for node in old}
