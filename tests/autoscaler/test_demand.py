"""Is what is asked for each model what its traffic, its queue and its error budget call for?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler import demand
from autoscaler.demand import Demand, DemandMemory, DemandSettings
from autoscaler.snapshot import Model, Slo, Snapshot
from tests.autoscaler.snapshots import (
    SPOT_A,
    a_curve,
    a_group,
    a_machine,
    a_model,
    a_snapshot,
    a_traffic,
    nodes_in,
    some_groups,
)

SETTINGS = DemandSettings()
SERVICE_S = 0.1


def asked(*snapshots: Snapshot) -> Demand:
    """The demand after these snapshots, one after the other."""
    return last(snapshots)[0]


def last(snapshots: Sequence[Snapshot]) -> tuple[Demand, DemandMemory]:
    memory: DemandMemory | None = None
    for snapshot in snapshots:
        memory = demand.observed(snapshot, memory, SETTINGS)
    assert memory is not None
    return demand.demanded(snapshots[-1], memory, SETTINGS), memory


def wanted(*models: Model) -> int:
    """Replicas of the first of `models`, seen once."""
    return int(asked(a_snapshot(models=models)).wanted["m"][0])


# ── sizing ────────────────────────────────────────────────────────────────────────────────────


def test_wanted_replicas_are_more_than_are_busy_and_not_twice_as_many() -> None:
    busy = 50.0 * SERVICE_S
    assert busy < wanted(a_model(rate_rps=50.0)) < 2 * busy


def test_a_model_that_nobody_asks_wants_at_most_one() -> None:
    assert wanted(a_model(rate_rps=0.0)) <= 1


rates = st.sampled_from([0.0, 0.5, 3.0, 10.0, 30.0, 80.0, 200.0, 600.0])


@settings(deadline=None, max_examples=40)
@given(rates, rates)
def test_more_traffic_never_needs_less(one_rps: float, other_rps: float) -> None:
    low, high = sorted([one_rps, other_rps])
    few, many = (asked(a_snapshot(models=[a_model(rate_rps=rate)])) for rate in (low, high))
    assert few.wanted["m"][0] <= many.wanted["m"][0]
    assert few.present["m"][0] <= many.present["m"][0]
    assert (few.needs["m"] <= many.needs["m"] + 1e-9).all()


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([150.0, 300.0, 1000.0, 10_000.0]), st.sampled_from([0.9, 0.99, 0.999]))
def test_a_stricter_objective_never_needs_less(latency_ms: float, attainment: float) -> None:
    here = wanted(a_model(slo=Slo(latency_ms, attainment)))
    assert wanted(a_model(slo=Slo(latency_ms / 1.3, attainment))) >= here
    assert wanted(a_model(slo=Slo(latency_ms, (1 + attainment) / 2))) >= here


def test_needs_rise_along_the_quantiles_and_their_weights_add_up() -> None:
    found = asked(a_snapshot())
    assert (np.diff(found.needs["m"], axis=1) >= -1e-9).all()
    assert found.weight.sum() == pytest.approx(1.0)
    assert (np.diff(found.levels) > 0).all()
    assert (found.weight > 0).all()


def test_a_faster_machine_needs_fewer_and_each_carries_more() -> None:
    machines = [a_machine(), a_machine("fast")]
    groups = [*some_groups(), a_group("fast/spot/a", machine="fast")]
    model = a_model(curves={"m": a_curve(100.0), "fast": a_curve(50.0)})
    found = asked(a_snapshot(machines=machines, groups=groups, models=[model]))
    assert found.wanted["fast"][0] < found.wanted["m"][0]
    assert found.node_rps["fast"][0] > 1.9 * found.node_rps["m"][0]


def test_a_machine_that_cannot_host_a_model_is_asked_for_none_of_it() -> None:
    machines = [a_machine(), a_machine("gpu")]
    models = [a_model(), a_model("llm", curves={"gpu": a_curve(1000.0)})]
    found = asked(a_snapshot(machines=machines, models=models))
    assert found.wanted["m"][1] == found.wanted["gpu"][0] == 0
    assert (found.needs["m"][1] == 0).all()
    assert found.wanted["gpu"][1] > 0


def test_each_replica_carries_at_most_what_it_can() -> None:
    for rate_rps in (1.0, 20.0, 300.0):
        found = asked(a_snapshot(models=[a_model(rate_rps=rate_rps)]))
        assert 0 < found.node_rps["m"][0] <= 1 / SERVICE_S + 1e-9


@settings(deadline=None, max_examples=20)
@given(st.lists(rates, min_size=1, max_size=4))
def test_many_models_are_each_sized_as_if_they_were_few(rates_rps: list[float]) -> None:
    models = [a_model(f"m{i}", rate_rps=rate) for i, rate in enumerate(rates_rps)]
    crowd = [a_model(f"crowd-{i}", rate_rps=7.0) for i in range(demand.MODELS_FEW)]
    few = asked(a_snapshot(models=models))
    many = asked(a_snapshot(models=[*models, *crowd]))
    count = len(models)
    assert many.wanted["m"][:count].tolist() == few.wanted["m"].tolist()
    assert many.present["m"][:count].tolist() == few.present["m"].tolist()


def test_where_there_are_many_models_all_quantiles_need_what_is_wanted() -> None:
    models = [a_model(f"m{i}", rate_rps=5.0 * i) for i in range(demand.MODELS_FEW + 1)]
    found = asked(a_snapshot(models=models))
    assert (found.needs["m"] == found.wanted["m"][:, None]).all()


# ── queues ────────────────────────────────────────────────────────────────────────────────────


def with_queue(queued: int, latency_ms: float = 500.0, count: int = 8) -> Demand:
    nodes = nodes_in(SPOT_A, count)
    model = a_model(traffic=a_traffic(50.0, queued=queued), slo=Slo(latency_ms))
    return asked(a_snapshot(nodes=nodes, models=[model]))


def test_a_queue_that_will_not_clear_asks_for_more() -> None:
    calm, queued = with_queue(0, count=6), with_queue(2000, count=6)
    assert calm.queue_excess[0] == 0
    assert queued.queue_excess[0] > 0
    assert queued.wanted["m"][0] > calm.wanted["m"][0]
    assert (queued.needs["m"] > calm.needs["m"]).all()


def test_a_queue_that_clears_before_a_machine_could_help_asks_for_nothing() -> None:
    few, many = with_queue(100, count=12), with_queue(0, count=12)
    assert few.queue_excess[0] == 0
    assert few.wanted["m"][0] == many.wanted["m"][0]


def test_who_may_wait_is_not_urgent() -> None:
    assert with_queue(500, latency_ms=120_000.0, count=5).queue_excess[0] == 0
    assert with_queue(500, latency_ms=500.0, count=5).queue_excess[0] > 0


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(5, 12))
@settings(deadline=None, max_examples=30)
def test_a_longer_queue_never_needs_less(one: int, other: int, count: int) -> None:
    short, long = sorted([one, other])
    few, many = with_queue(short, count=count), with_queue(long, count=count)
    assert few.queue_excess[0] <= many.queue_excess[0]
    assert few.wanted["m"][0] <= many.wanted["m"][0]


# ── what is late, and whose it is ─────────────────────────────────────────────────────────────


def late_price(late: int, *, is_starting: bool) -> float:
    """What a late request costs after some minutes in which `late` requests of each were late.

    A model that starts has replicas since a moment, and a queue that they have yet to clear.
    """
    nodes = nodes_in(SPOT_A, 7, ready_s=0.0 if is_starting else -7200.0)
    model = a_model(traffic=a_traffic(50.0, late=late, queued=3000 if is_starting else 0))
    story = [a_snapshot(now_s=60.0 * k, nodes=nodes, models=[model]) for k in range(3)]
    return float(asked(*story).late_price[0])


def test_what_is_late_while_the_first_replicas_come_up_is_no_debt() -> None:
    assert late_price(2000, is_starting=True) == late_price(0, is_starting=True)
    assert late_price(2000, is_starting=False) > late_price(0, is_starting=False)


def test_what_is_late_while_nothing_is_ready_is_no_debt() -> None:
    model = a_model(traffic=a_traffic(50.0, late=2000, queued=1000))
    nothing = [a_snapshot(now_s=60.0 * k, models=[model]) for k in range(3)]
    assert asked(*nothing).late_price[0] <= 1.0


def test_a_later_node_does_not_make_a_model_new() -> None:
    old, young = nodes_in(SPOT_A, 3), nodes_in(SPOT_A + "2", 3, ready_s=-10.0)
    groups = [*some_groups(), a_group(SPOT_A + "2")]
    nodes = [*old, *young]
    prices = []
    for late in (0, 2000):
        model = a_model(traffic=a_traffic(50.0, late=late))
        story = [
            a_snapshot(now_s=60.0 * k, groups=groups, nodes=nodes, models=[model]) for k in range(3)
        ]
        prices.append(float(asked(*story).late_price[0]))
    assert prices[1] > prices[0]


def test_what_was_told_is_remembered_for_the_next_time() -> None:
    nodes = nodes_in(SPOT_A, 5)
    snapshot = a_snapshot(nodes=nodes)
    found, memory = last([snapshot])
    calm, shock = np.array([0.01]), np.array([0.002])
    short = demand.told_late(found, snapshot, memory, calm, shock)
    assert (short.told_calm, short.told_shock) == (calm, shock)
    ample = a_snapshot(nodes=nodes_in(SPOT_A, 20))
    assert demand.told_late(found, ample, memory, calm, shock).late_told < short.late_told
    nothing = a_snapshot()
    assert demand.told_late(found, nothing, memory, calm, shock).late_told[0] == pytest.approx(1.0)


# ── models that come and go ───────────────────────────────────────────────────────────────────


def test_models_in_another_order_are_asked_for_the_same() -> None:
    a, b, c = (a_model(name, rate_rps=rate) for name, rate in (("a", 5), ("b", 50), ("c", 200)))
    memory: DemandMemory | None = None
    for k in range(10):
        memory = demand.observed(a_snapshot(now_s=60.0 * k, models=[a, b, c]), memory, SETTINGS)
    assert memory is not None
    ends = [a_snapshot(now_s=600.0, models=models) for models in ([a, b, c], [c, a, b])]
    one, two = (
        demand.demanded(end, demand.observed(end, memory, SETTINGS), SETTINGS) for end in ends
    )
    assert two.wanted["m"].tolist() == one.wanted["m"][[2, 0, 1]].tolist()
    assert two.late_price == pytest.approx(one.late_price[[2, 0, 1]])
    assert two.rate_rps == pytest.approx(one.rate_rps[[2, 0, 1]])


def test_no_models_are_no_demand_and_no_error() -> None:
    memory = demand.observed(a_snapshot(models=[]), None, SETTINGS)
    assert memory.names == ()
    snapshot = a_snapshot(now_s=60.0)
    memory = demand.observed(snapshot, memory, SETTINGS)
    assert demand.demanded(snapshot, memory, SETTINGS).wanted["m"][0] > 0
