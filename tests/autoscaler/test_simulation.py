"""Does the simulator keep its own laws: of queues, of markets and of money?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.decision import Command, Decision, Drain, Launch, Stop
from autoscaler.ledger import RESERVATION, billed_s
from autoscaler.simulation import MODEL, Rental, Run, simulate, summary
from autoscaler.snapshot import EventKind, NodeState, Slo, Snapshot
from autoscaler.world import World
from tests.autoscaler.worlds import (
    ON_DEMAND,
    RESERVED,
    SPOT_A,
    SPOT_B,
    FixedFleet,
    a_machine,
    a_market,
    a_profile,
    a_small_world,
    requests_at,
    requests_when,
)

INSTANT = a_profile(a_machine(boot_s=0.0, load_s=0.0))


@dataclass
class Script:
    """A policy that gives commands at set times, and keeps what it saw."""

    commands: dict[float, list[Command]] = field(default_factory=dict)
    at_once: Callable[[Snapshot], list[Command]] | None = None
    interval_s: float = 10.0
    is_woken: bool = False
    name: str = "script"
    seen: list[Snapshot] = field(default_factory=list)

    def decide(self, snapshot: Snapshot, memory: Any) -> Decision[int]:
        self.seen.append(snapshot)
        commands = list(self.commands.get(snapshot.now_s, []))
        if self.at_once is not None:
            commands += self.at_once(snapshot)
        return Decision((memory or 0) + 1, commands=tuple(commands))

    def events(self, kind: EventKind) -> list[tuple[float, int]]:
        return [(e.at_s, e.count) for s in self.seen for e in s.events if e.kind is kind]


def one_node(group: str = ON_DEMAND, **changes: Any) -> Script:
    """A single node from the beginning."""
    return Script({-300.0: [Launch(group, 1)]}, **changes)


def waits_s(run: Run) -> list[float]:
    return [round(float(wait), 6) for wait in run.start_s - run.arrival_s]


# -- requests ----------------------------------------------------------------------------------


def test_requests_on_one_worker_are_served_in_order_of_arrival_one_after_the_other() -> None:
    world = a_small_world(requests=requests_when([301.0, 301.0, 301.05, 302.0]))
    assert waits_s(simulate(world, one_node())) == [0.0, 0.1, 0.15, 0.0]


def test_a_free_worker_takes_a_full_batch_from_the_head_of_the_queue() -> None:
    machine = a_machine(fixed_ms=100, per_item_ms=10, batch_size_max=3)
    world = a_small_world(
        profile=a_profile(machine), requests=requests_when([301.0, 301.01, 301.02, 301.03, 301.04])
    )
    run = simulate(world, one_node())
    assert [round(float(t) - 301, 6) for t in run.start_s] == [0.0, 0.11, 0.11, 0.11, 0.24]
    assert [round(float(t) - 301, 6) for t in run.finish_s] == [0.11, 0.24, 0.24, 0.24, 0.35]


def test_a_request_prefers_the_fastest_machine_and_there_the_least_busy_node() -> None:
    profile = a_profile(
        a_machine("slow", fixed_ms=1000, concurrency=2, boot_s=0, load_s=0),
        a_machine("fast", fixed_ms=500, concurrency=2, boot_s=0, load_s=0),
    )
    world = a_small_world(profile=profile, requests=requests_when(np.linspace(301, 301.1, 6)))
    fleet = FixedFleet({"slow/on-demand": 1, "fast/on-demand": 2})
    run = simulate(world, fleet)
    names = [run.ledger[k].node for k in run.node]
    fast_a, fast_b = sorted({n for n in names if n.startswith("fast")})
    slow = next(n for n in names if n.startswith("slow"))
    assert names == [fast_a, fast_b, fast_a, fast_b, slow, slow]


def test_a_request_not_started_by_its_deadline_is_given_up_at_that_moment() -> None:
    world = a_small_world(requests=requests_when([100.0, 130.0]), deadline_s=40.0)
    run = simulate(world, Script({150.0: [Launch(ON_DEMAND, 1)]}))
    assert run.finish_s.tolist() == [140.0, 170.0]
    assert not run.ok.any()
    assert run.node.tolist() == [-1, -1]
    assert np.isnan(run.start_s).all()
    assert run.failed == 2


def test_a_request_that_waits_for_a_node_is_served_when_it_is_ready() -> None:
    world = a_small_world(requests=requests_when([100.0]), deadline_s=140.0)
    run = simulate(world, Script({150.0: [Launch(ON_DEMAND, 1)]}))
    assert run.start_s.tolist() == [240.0]
    assert run.ok.all()


def test_requests_on_a_node_that_is_taken_go_back_to_the_head_of_the_queue() -> None:
    profile = a_profile(a_machine(fixed_ms=20_000, concurrency=2, boot_s=0, load_s=0), notice_s=0.0)
    world = a_small_world(
        profile=profile,
        market=a_market(a=[(0, 1), (310, 0)]),
        requests=requests_when([301.0, 302.0, 303.0, 304.0]),
        deadline_s=100.0,
    )
    run = simulate(world, Script({0.0: [Launch(SPOT_A, 1)], 320.0: [Launch(ON_DEMAND, 1)]}))
    assert run.start_s.tolist() == [320.0, 320.0, 340.0, 340.0]
    assert {run.ledger[k].market for k in run.node} == {"on-demand"}
    assert run.ok.all()


def test_a_retry_past_its_deadline_is_given_up_when_its_node_is_taken() -> None:
    profile = a_profile(a_machine(fixed_ms=60_000, boot_s=0, load_s=0), notice_s=0.0)
    world = a_small_world(
        profile=profile,
        market=a_market(a=[(0, 1), (350, 0)]),
        requests=requests_when([301.0]),
        deadline_s=30.0,
    )
    run = simulate(world, FixedFleet({SPOT_A: 1, ON_DEMAND: 0}))
    assert (run.finish_s.tolist(), run.ok.tolist()) == ([350.0], [False])


def test_what_waits_at_the_end_is_served_by_the_nodes_that_are_ready() -> None:
    world = a_small_world(requests=requests_when([599.9, 599.95, 599.96, 599.99]))
    run = simulate(world, one_node())
    assert run.ok.all()
    assert run.finish_s.tolist() == pytest.approx([600.0, 600.1, 600.2, 600.3])
    assert [r.end_s for r in run.ledger] == [600.0]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    nodes=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    rate_rps=st.sampled_from([3.0, 10.0, 30.0]),
)
def test_the_compiled_queue_agrees_with_the_rules_written_plainly(
    seed: int, nodes: tuple[int, int], rate_rps: float
) -> None:
    profile = a_profile(
        a_machine("fast", fixed_ms=200, per_item_ms=50, batch_size_max=4, spread=0.7, boot_s=0,
                  load_s=0),
        a_machine("slow", fixed_ms=400, concurrency=3, spread=0.7, boot_s=0, load_s=0),
    )  # fmt: skip
    world = a_small_world(
        profile=profile, requests=requests_at(rate_rps, 30.0, seed), prelude_s=0.0, deadline_s=2.0
    )
    fleet = {"fast/on-demand": nodes[0], "slow/on-demand": nodes[1]}
    assert simulate(world, FixedFleet(fleet)).start_s.tolist() == pytest.approx(
        plainly(world, ["fast"] * nodes[0] + ["slow"] * nodes[1]), nan_ok=True
    )


def plainly(world: World, nodes: list[str]) -> list[float]:
    """When each request starts on these nodes, by the rules and without any cleverness."""
    profiles = {m.type.name: m for m in world.profile.machines}
    free_s = {n: [0.0] * profiles[name].concurrency for n, name in enumerate(nodes)}
    arrival_s = world.requests.arrival_s.tolist()
    start_s, waiting = [math.nan] * len(arrival_s), list(range(len(arrival_s)))
    now_s = 0.0
    while waiting and nodes:
        waiting = [i for i in waiting if arrival_s[i] + world.deadline_s >= now_s]
        here = [i for i in waiting if arrival_s[i] <= now_s]
        busy = {n: sum(t > now_s for t in workers) for n, workers in free_s.items()}
        able = [n for n in free_s if busy[n] < len(free_s[n])]
        if here and able:
            best = min(able, key=lambda n: (nodes[n] != "fast", busy[n], n))
            batch = here[: profiles[nodes[best]].batch_size_max]
            work = world.work[nodes[best]]
            took_s = float(work.fixed_s[batch].mean() + work.variable_s[batch].sum())
            worker = min(range(len(free_s[best])), key=lambda k: free_s[best][k])
            free_s[best][worker] = now_s + took_s
            for i in batch:
                start_s[i] = now_s
            waiting = [i for i in waiting if i not in batch]
        else:
            later = [t for workers in free_s.values() for t in workers if t > now_s]
            later += [arrival_s[i] for i in waiting if arrival_s[i] > now_s]
            now_s = min(later, default=math.inf)
    return start_s


def test_waiting_in_a_queue_with_many_workers_matches_erlang() -> None:
    """M/M/c: P(wait) = C(c, a), mean wait = C / (c μ - λ) (Erlang 1917)."""
    world = a_small_world(
        profile=a_profile(a_machine(concurrency=2, boot_s=0, load_s=0)),
        requests=requests_at(32.0, 20_000.0, seed=3),
        deadline_s=1e4,
    )
    rng = np.random.default_rng(5)
    world.work["m"].fixed_s[:] = rng.exponential(0.1, len(world.requests.arrival_s))
    run = simulate(world, FixedFleet({ON_DEMAND: 2}))
    c, load = 4, 3.2
    terms = [load**k / np.prod(range(1, k + 1)) for k in range(c + 1)]
    tail = terms[c] * c / (c - load)
    erlang_c = tail / (sum(terms[:c]) + tail)
    wait = run.start_s - run.arrival_s
    assert float((wait > 0).mean()) == pytest.approx(erlang_c, rel=0.03)
    assert float(wait.mean()) == pytest.approx(erlang_c / (c * 10 - 32), rel=0.05)


def test_waiting_for_constant_service_matches_pollaczek_and_khinchine() -> None:
    """M/D/1: mean wait = ρ s / (2 (1 - ρ))."""
    requests = requests_at(7.0, 50_000.0, seed=4)
    world = a_small_world(profile=INSTANT, requests=requests, deadline_s=1e4)
    run = simulate(world, FixedFleet({ON_DEMAND: 1}))
    expected = 0.7 * 0.1 / (2 * 0.3)
    assert float((run.start_s - run.arrival_s).mean()) == pytest.approx(expected, rel=0.04)


# -- nodes -------------------------------------------------------------------------------------


def test_a_node_is_ready_after_its_cold_start_and_not_before() -> None:
    world = a_small_world(requests=requests_when([100.0, 140.0]), deadline_s=200.0)
    script = Script({100.0: [Launch(ON_DEMAND, 1)]})
    run = simulate(world, script)
    assert (run.ledger[0].start_s, run.ledger[0].ready_s) == (100.0, 190.0)
    states = {s.now_s: s.nodes[0].state for s in script.seen if s.nodes}
    assert states[180.0] is NodeState.STARTING
    assert states[190.0] is NodeState.READY
    assert run.start_s.tolist() == [190.0, 190.1]


def test_cold_starts_spread_around_their_mean_and_snapshots_expect_the_mean() -> None:
    profile = a_profile(a_machine(cold_start_cv=0.3))
    script = Script({0.0: [Launch(ON_DEMAND, 400)]})
    run = simulate(a_small_world(profile=profile, requests=requests_when([])), script)
    cold_s = np.array([r.ready_s - r.start_s for r in run.ledger])
    assert float(cold_s.mean()) == pytest.approx(90.0, rel=0.05)
    assert float(cold_s.std()) == pytest.approx(27.0, rel=0.15)
    assert float(cold_s.max()) <= 90 * 1.6 + 1e-9
    starting = [n for s in script.seen for n in s.nodes if n.state is NodeState.STARTING]
    assert {n.ready_s for n in starting} == {90.0}


def test_a_drained_node_answers_what_it_has_and_then_goes() -> None:
    profile = a_profile(a_machine(fixed_ms=15_000, concurrency=2, boot_s=0, load_s=0))
    world = a_small_world(profile=profile, requests=requests_when([301.0, 308.0, 311.0]))

    def drain(snapshot: Snapshot) -> list[Command]:
        return [Drain(snapshot.nodes[0].id)] if snapshot.now_s == 310.0 else []

    script = Script({0.0: [Launch(ON_DEMAND, 1)]}, at_once=drain)
    run = simulate(world, script)
    assert (run.ledger[0].end_s, run.ledger[0].end_reason) == (323.0, "drained")
    assert run.ok.tolist() == [True, True, False]
    assert {s.nodes[0].state for s in script.seen if s.now_s == 320} == {NodeState.DRAINING}


def test_a_drained_node_that_is_idle_goes_at_once() -> None:
    def drain(snapshot: Snapshot) -> list[Command]:
        return [Drain(n.id) for n in snapshot.nodes] if snapshot.now_s == 300.0 else []

    script = Script({0.0: [Launch(ON_DEMAND, 2)]}, at_once=drain)
    run = simulate(a_small_world(requests=requests_when([])), script)
    assert [(r.end_s, r.end_reason) for r in run.ledger] == [(300.0, "drained")] * 2


def test_a_node_that_starts_can_be_stopped_and_one_that_serves_is_drained_instead() -> None:
    def stop(snapshot: Snapshot) -> list[Command]:
        return [Stop(n.id) for n in snapshot.nodes] if snapshot.now_s == 300.0 else []

    script = Script({0.0: [Launch(ON_DEMAND, 1)], 290.0: [Launch(ON_DEMAND, 1)]}, at_once=stop)
    run = simulate(a_small_world(requests=requests_when([])), script)
    assert [r.end_reason for r in run.ledger] == ["drained", "stopped"]
    assert [r.end_s for r in run.ledger] == [300.0, 300.0]


def test_commands_for_nodes_that_are_gone_are_ignored() -> None:
    script = Script({0.0: [Drain("nobody"), Stop("nobody")]})
    assert simulate(a_small_world(requests=requests_when([])), script).ledger == ()


def test_a_launch_in_a_place_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(KeyError, match="nowhere"):
        simulate(a_small_world(), Script({0.0: [Launch("nowhere", 1)]}))


# -- the market --------------------------------------------------------------------------------


def test_spot_launches_beyond_the_capacity_fail_and_the_policy_learns_it_later() -> None:
    world = a_small_world(market=a_market(a=[(0, 2)]))
    script = Script({100.0: [Launch(SPOT_A, 5)]})
    run = simulate(world, script)
    assert script.events(EventKind.LAUNCHED) == [(100.0, 2)]
    assert script.events(EventKind.LAUNCH_FAILED) == [(115.0, 3)]
    assert [s.now_s for s in script.seen if s.events] == [110.0, 120.0]
    assert (len(run.ledger), run.launches_failed) == (2, 3)


@pytest.mark.parametrize("group", [ON_DEMAND, RESERVED])
def test_launches_beyond_a_quota_or_a_reservation_fail(group: str) -> None:
    world = a_small_world(profile=a_profile(a_machine(reserved=2), on_demand_max=2))
    script = Script({100.0: [Launch(group, 5)]})
    simulate(world, script)
    assert script.events(EventKind.LAUNCHED) == [(100.0, 2)]
    assert script.events(EventKind.LAUNCH_FAILED) == [(115.0, 3)]


def test_nodes_above_a_falling_capacity_get_notice_and_die_when_it_falls() -> None:
    world = a_small_world(market=a_market(a=[(0, 4), (400, 1)]))
    script = Script({0.0: [Launch(SPOT_A, 4)]})
    run = simulate(world, script)
    assert script.events(EventKind.NOTICED) == [(280.0, 3)]
    assert script.events(EventKind.RECLAIMED) == [(400.0, 3)]
    told = {s.now_s: [n.reclaim_s for n in s.nodes].count(400.0) for s in script.seen}
    assert (told[270.0], told[280.0], told[390.0], told[400.0]) == (0, 3, 3, 0)
    assert sorted((r.end_s, r.end_reason) for r in run.ledger) == [
        (400.0, "reclaimed"), (400.0, "reclaimed"), (400.0, "reclaimed"), (600.0, "end"),
    ]  # fmt: skip
    assert run.preemptions == 3


def test_a_node_launched_after_the_notice_dies_without_one() -> None:
    world = a_small_world(market=a_market(a=[(0, 4), (400, 0)]))
    script = Script({350.0: [Launch(SPOT_A, 1)]})
    simulate(world, script)
    assert script.events(EventKind.NOTICED) == []
    assert script.events(EventKind.RECLAIMED) == [(400.0, 1)]


def test_a_noticed_node_may_be_drained_before_it_is_taken() -> None:
    def flee(snapshot: Snapshot) -> list[Command]:
        return [Drain(n.id) for n in snapshot.nodes if n.reclaim_s is not None]

    world = a_small_world(market=a_market(a=[(0, 4), (400, 1)]), requests=requests_when([]))
    run = simulate(world, Script({0.0: [Launch(SPOT_A, 2)]}, at_once=flee))
    assert sorted((r.end_s, r.end_reason) for r in run.ledger) == [
        (280.0, "drained"), (600.0, "end"),
    ]  # fmt: skip


def test_a_noticed_node_dies_even_when_others_have_left_in_the_meantime() -> None:
    def leave(snapshot: Snapshot) -> list[Command]:
        untold = [n.id for n in snapshot.nodes if n.reclaim_s is None]
        return [Drain(n) for n in untold] if snapshot.now_s == 350.0 else []

    world = a_small_world(market=a_market(a=[(0, 2), (400, 1)]), requests=requests_when([]))
    run = simulate(world, Script({0.0: [Launch(SPOT_A, 2)]}, at_once=leave))
    assert sorted((r.end_s, r.end_reason) for r in run.ledger) == [
        (350.0, "drained"), (400.0, "reclaimed"),
    ]  # fmt: skip


def test_a_noticed_node_gets_no_request_that_it_would_not_finish() -> None:
    profile = a_profile(a_machine(fixed_ms=5000, boot_s=0, load_s=0))
    world = a_small_world(
        profile=profile,
        market=a_market(a=[(0, 1), (400, 0)]),
        requests=requests_when([394.0, 396.0]),
        deadline_s=50.0,
    )
    script = Script({0.0: [Launch(SPOT_A, 1)], 410.0: [Launch(ON_DEMAND, 1)]})
    run = simulate(world, script)
    assert run.start_s.tolist() == [394.0, 410.0]  # at 399 the node was free, but closed


def test_a_zone_that_fails_leaves_the_others_alone() -> None:
    world = a_small_world(market=a_market(a=[(0, 2), (400, 0)], b=[(0, 2)]))
    run = simulate(world, Script({0.0: [Launch(SPOT_A, 2), Launch(SPOT_B, 2)]}))
    assert {r.zone for r in run.ledger if r.end_reason == "reclaimed"} == {"a"}


def test_a_policy_that_wants_it_is_woken_by_notices_losses_and_failures() -> None:
    world = a_small_world(market=a_market(a=[(0, 2), (404, 1)]))
    commands: dict[float, list[Command]] = {0.0: [Launch(SPOT_A, 3)]}
    sleeper, waker = Script(commands), Script(commands, is_woken=True)
    simulate(world, sleeper)
    simulate(world, waker)
    extra = {s.now_s for s in waker.seen} - {s.now_s for s in sleeper.seen}
    assert extra == {15.0, 284.0, 404.0}  # launch failed, notice, reclaim


def test_wakes_are_at_least_a_second_apart() -> None:
    world = a_small_world(
        market=a_market(a=[(0, 3), (401.2, 2), (401.4, 1), (401.6, 0)]),
        profile=a_profile(notice_s=0.0),
    )
    script = Script({0.0: [Launch(SPOT_A, 3)]}, is_woken=True)
    simulate(world, script)
    asked = [s.now_s for s in script.seen if 400 <= s.now_s < 410]
    assert asked == pytest.approx([400.0, 401.2, 402.2])


# -- money -------------------------------------------------------------------------------------


def test_a_node_costs_the_price_of_each_moment() -> None:
    market = a_market({"a": [(0, 1.0), (300, 2.0), (400, 4.0)]}, a=[(0, 9)])
    profile = a_profile(a_machine(boot_s=0, load_s=0))

    def drain(snapshot: Snapshot) -> list[Command]:
        return [Drain(n.id) for n in snapshot.nodes] if snapshot.now_s == 410.0 else []

    world = a_small_world(profile=profile, market=market, requests=requests_when([]))
    run = simulate(world, Script({200.0: [Launch(SPOT_A, 1)]}, at_once=drain))
    assert run.cost_usd == pytest.approx((100 * 1 + 100 * 2 + 10 * 4) / 3600)


@pytest.mark.parametrize(
    ("increment_s", "minimum_s", "used_s", "paid_s"),
    [(1, 60, 5, 60), (1, 60, 60.2, 61), (3600, 0, 10, 3600), (0, 0, 7.5, 7.5), (1, 0, 7, 7)],
)
def test_rentals_are_paid_in_whole_increments_and_for_no_less_than_the_minimum(
    increment_s: float, minimum_s: float, used_s: float, paid_s: float
) -> None:
    machine = a_machine(billing_increment_s=increment_s, billing_minimum_s=minimum_s).type
    assert billed_s(machine, used_s) == paid_s


def test_reserved_nodes_are_paid_once_whether_used_or_not() -> None:
    world = a_small_world(profile=a_profile(a_machine(reserved=3)))
    idle, used = simulate(world, FixedFleet({})), simulate(world, FixedFleet({RESERVED: 2}))
    assert idle.cost_usd == used.cost_usd == pytest.approx(3 * 2.0 * 600 / 3600)
    assert [r.end_reason for r in idle.ledger] == [RESERVATION] * 3
    assert (idle.launches["reserved"], used.launches["reserved"]) == (0, 2)
    assert used.node_hours["reserved"] == pytest.approx(2 * 600 / 3600)


# -- the prelude -------------------------------------------------------------------------------


def test_nothing_of_the_prelude_is_counted_and_its_nodes_are_handed_over() -> None:
    world = a_small_world(prelude_s=900.0)
    run = simulate(world, FixedFleet({SPOT_A: 2}))
    assert run.journal[0].now_s == -900.0
    assert run.requests == len(world.requests.arrival_s)
    assert [(r.start_s, r.ready_s) for r in run.ledger] == [(0.0, 0.0)] * 2
    assert run.cost_usd == pytest.approx(2 * 600 / 3600)


def test_the_prelude_repeats_the_traffic_of_the_first_minutes_at_their_mean_rate() -> None:
    world = a_small_world(
        requests=requests_when([*np.arange(0.5, 300), 301.0]), prelude_s=900.0, seed=3
    )
    script = Script()
    simulate(world, script)
    seen = {s.now_s: sum(s.models[0].traffic.arrivals) for s in script.seen if s.now_s <= 0}
    by_third = [sum(n for t, n in seen.items() if a < t <= a + 300) for a in (-900, -600, -300)]
    assert sum(by_third) == 900
    assert all(abs(n - 300) < 4 * 300**0.5 for n in by_third)


def test_without_a_prelude_the_policy_is_first_asked_at_zero() -> None:
    script = Script()
    simulate(a_small_world(prelude_s=0.0), script)
    assert [s.now_s for s in script.seen][:2] == [0.0, 10.0]


# -- what the policy sees ----------------------------------------------------------------------


def test_the_snapshot_tells_what_happened_since_the_last_decision() -> None:
    world = a_small_world(requests=requests_when([302.0, 306.0, 307.0, 309.95]))
    script = one_node()
    simulate(world, script)
    traffic = next(s for s in script.seen if s.now_s == 310.0).models[0].traffic
    assert traffic.arrivals == (1.0, 3.0)
    assert (traffic.bin_s, traffic.rate_rps) == (5.0, 0.4)
    assert (traffic.queued, traffic.running, traffic.finished, traffic.late) == (0, 1, 3, 0)
    assert traffic.latency_p99_ms == pytest.approx(100.0)
    assert traffic.ongoing_mean == pytest.approx((3 * 0.1 + 0.05) / 10)


def test_the_mean_number_in_the_system_is_littles_law() -> None:
    world = a_small_world(requests=requests_at(9.5, 3000.0), deadline_s=1.0)
    script = one_node()
    run = simulate(world, script)
    seen = [s.models[0].traffic.ongoing_mean for s in script.seen if s.now_s > 0]
    ended = run.finish_s <= 2990.0
    assert np.mean(seen) * 2990 == pytest.approx(run.latency_s[ended].sum(), rel=0.01)
    assert not run.ok.all()  # some were given up, and those count as long as they waited


def test_one_replica_fills_a_machine_and_service_times_are_measured() -> None:
    script = one_node()
    simulate(a_small_world(), script)
    model = script.seen[-1].models[0]
    machine = script.seen[-1].machines["m"]
    assert (model.name, model.resources.share_of(machine.resources)) == (MODEL, 1.0)
    histogram = model.curves["m"].histogram
    assert (
        sum(histogram) == sum(histogram[119:121]) > 1000
    )  # 100 ms is three decades of 40 bins above 0.1
    replica, node = script.seen[-1].replicas[0], script.seen[-1].nodes[0]
    assert (replica.node, replica.is_ready, node.state) == (node.id, True, NodeState.READY)


def test_prices_in_the_snapshot_are_those_of_the_moment() -> None:
    script = Script()
    market = a_market({"a": [(0, 1.0), (295, 2.5)]}, a=[(0, 9)])
    simulate(a_small_world(market=market), script)
    prices = {s.now_s: s.groups[SPOT_A].price_usd_h for s in script.seen}
    assert (prices[-300.0], prices[290.0], prices[300.0]) == (1.0, 1.0, 2.5)


def test_memory_comes_back_and_the_stopwatch_times_decisions() -> None:
    ticks = iter(range(10_000))
    script = Script()
    run = simulate(a_small_world(), script, stopwatch=lambda: float(next(ticks)))
    assert (run.decisions, run.decide_s, run.decide_ms_mean) == (90, 90.0, 1000.0)
    assert simulate(a_small_world(), Script()).decide_s == 0.0


# -- laws --------------------------------------------------------------------------------------


@dataclass
class Restless:
    """A policy that launches, drains and stops at random (by its own seed)."""

    seed: int
    name: str = "restless"
    interval_s: float = 7.0
    is_woken: bool = True

    def decide(self, snapshot: Snapshot, memory: Any) -> Decision[Any]:
        rng = memory or np.random.default_rng(self.seed)
        commands: list[Command] = [Launch(g, int(rng.integers(0, 3))) for g in snapshot.groups]
        for node in snapshot.nodes:
            fate = rng.random()
            commands += [Drain(node.id)] if fate < 0.1 else [Stop(node.id)] if fate < 0.2 else []
        return Decision(rng, commands=tuple(commands))


def a_rough_world(seed: int, notice_s: float = 30.0) -> World:
    """Two machine types, two zones that come and go, prices that move, batches, overload."""
    rng = np.random.default_rng(seed)
    times = [0.0, *np.sort(rng.uniform(1, 199, 8)).tolist()]
    zones = {z: [(t, int(rng.integers(0, 4))) for t in times] for z in "ab"}
    prices = {z: [(t, float(rng.uniform(0.5, 2))) for t in times] for z in "ab"}
    profile = a_profile(
        a_machine(fixed_ms=900, spread=1.0, concurrency=2, cold_start_cv=0.5, boot_s=10, load_s=5),
        a_machine("n", fixed_ms=400, per_item_ms=100, batch_size_max=3, spread=0.5, boot_s=20,
                  load_s=5, reserved=1, billing_increment_s=60.0),
        notice_s=notice_s,
        on_demand_max=2,
    )  # fmt: skip
    return a_small_world(
        profile=profile,
        market=a_market(prices, **zones),
        requests=requests_at(12.0, 200.0, seed=seed),
        seed=seed,
        slo=Slo(2000.0),
        deadline_s=8.0,
        prelude_s=50.0,
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), notice_s=st.sampled_from([0.0, 5.0, 30.0]))
def test_in_a_rough_world_every_law_holds(seed: int, notice_s: float) -> None:
    world = a_rough_world(seed, notice_s)
    run = simulate(world, Restless(seed))
    every_request_is_answered_or_given_up(run)
    no_node_serves_before_it_is_ready_or_after_its_end(run)
    no_node_does_more_than_its_workers_can(run)
    no_zone_holds_more_than_its_capacity(run)
    the_cost_follows_from_ledger_and_prices(run)


def every_request_is_answered_or_given_up(run: Run) -> None:
    assert (run.arrival_s == run.world.requests.arrival_s).all()
    given_up = ~run.ok
    assert (run.node[given_up] == -1).all()
    assert (run.node[run.ok] >= 0).all()
    assert (run.start_s[run.ok] >= run.arrival_s[run.ok]).all()
    assert (run.finish_s[given_up] >= run.arrival_s[given_up] + run.world.deadline_s).all()
    started_s = run.start_s[run.ok] - run.arrival_s[run.ok]
    assert (started_s <= run.world.deadline_s + 1e-9).all()


def no_node_serves_before_it_is_ready_or_after_its_end(run: Run) -> None:
    for start, finish, k in zip(run.start_s, run.finish_s, run.node, strict=True):
        if k >= 0:
            rental = run.ledger[k]
            end_s = math.inf if rental.end_reason == "end" else rental.end_s  # the run's end
            assert rental.ready_s <= start <= finish <= end_s


def no_node_does_more_than_its_workers_can(run: Run) -> None:
    profiles = {m.type.name: m for m in run.world.profile.machines}
    for k, rental in enumerate(run.ledger):
        mine = run.node == k
        machine = profiles[rental.machine]
        steps = [(t, 1) for t in run.start_s[mine]] + [(t, -1) for t in run.finish_s[mine]]
        running = np.cumsum([step for _, step in sorted(steps)])
        assert running.max(initial=0) <= machine.concurrency * machine.batch_size_max


def no_zone_holds_more_than_its_capacity(run: Run) -> None:
    spot = [r for r in run.ledger if r.market == "spot"]
    times = [*run.world.market.capacity_t_s, *(r.start_s for r in spot)]
    for t in times:
        capacity = dict(zip(run.world.market.zones, run.world.capacity_at(t), strict=True))
        for name, group in run.world.groups.items():
            alive = sum(r.start_s <= t < r.end_s for r in spot if r.group == name)
            assert alive <= capacity.get(group.zone, 0)


def the_cost_follows_from_ledger_and_prices(run: Run) -> None:
    for rental in run.ledger:
        assert rental.cost_usd == pytest.approx(recomputed_usd(run.world, rental), abs=1e-9)


def recomputed_usd(world: World, rental: Rental) -> float:
    """By hand: piece by piece between the moments at which the price changes."""
    group = world.groups[rental.group]
    if rental.market == "reserved":
        paid = rental.end_reason == RESERVATION
        return group.price_usd_h * world.duration_s / 3600 if paid else 0.0
    changes = world.market.price_t_s if world.market.price_t_s is not None else np.empty(0)
    inner = [t for t in changes if rental.start_s < t < rental.end_s]
    borders = [rental.start_s, *inner, rental.end_s]
    pieces = [(b - a) * world.price_usd_h(group, a) for a, b in pairwise(borders)]
    used_s = rental.end_s - rental.start_s
    extra_s = billed_s(world.machines[rental.machine], used_s) - used_s
    return float(sum(pieces) + extra_s * world.price_usd_h(group, rental.end_s)) / 3600


def bytes_of(run: Run) -> bytes:
    arrays = (run.arrival_s, run.start_s, run.finish_s, run.node, run.ok)
    return b"".join(a.tobytes() for a in arrays) + repr((run.ledger, run.journal)).encode()


def test_the_same_seed_gives_the_same_run_to_the_byte() -> None:
    first, again, other = (simulate(a_rough_world(seed), Restless(seed)) for seed in (7, 7, 8))
    assert bytes_of(first) == bytes_of(again)
    assert bytes_of(first) != bytes_of(other)


def test_many_nodes_share_the_queue_as_few_do() -> None:
    """More slots than the queue begins with."""
    profile = a_profile(a_machine(fixed_ms=1000.0))
    world = a_small_world(profile=profile, requests=requests_at(95.0, 400.0), deadline_s=1e3)
    run = simulate(world, FixedFleet({ON_DEMAND: 100}))
    assert run.ok.all()
    assert len(set(run.node.tolist())) == 100


# -- the summary -------------------------------------------------------------------------------


def test_the_summary_follows_from_requests_and_ledger() -> None:
    run = simulate(a_rough_world(3), Restless(3))
    row = summary(run, bound_usd=run.cost_usd / 2)
    latency = run.finish_s - run.arrival_s
    assert list(row) == [
        "policy", "cost_usd", "bound_usd", "ratio", "requests", "slo_attainment",
        "latency_p50_ms", "latency_p99_ms", "failed", "preemptions", "launches", "node_hours",
        "decide_ms_mean",
    ]  # fmt: skip
    assert row["ratio"] == pytest.approx(2.0)
    assert row["slo_attainment"] == np.mean(run.ok & (latency <= 2.0))
    assert row["latency_p99_ms"] == pytest.approx(float(np.quantile(latency, 0.99)) * 1e3)
    assert row["failed"] == int((~run.ok).sum()) > 0
    assert sum(row["launches"].values()) == len(run.ledger) - 1  # one row pays a reservation
    assert set(row["node_hours"]) == {"reserved", "on-demand", "spot"}


def test_a_run_without_requests_or_bound_has_a_summary() -> None:
    row = summary(simulate(a_small_world(requests=requests_when([])), FixedFleet({})), None)
    assert (row["ratio"], row["bound_usd"], row["cost_usd"]) == (None, None, 0.0)
    assert (row["slo_attainment"], row["latency_p99_ms"]) == (1.0, 0.0)
