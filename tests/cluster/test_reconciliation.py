"""Do versions come, take traffic, fail, sleep and go as operators expect?"""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.reconciliation import Delete, reconcile, unloaded, woken
from tests.cluster.timeline import Timeline, a_file


def test_a_first_version_is_started_and_gets_all_traffic_when_it_is_ready() -> None:
    world = Timeline()
    world.put(a_file())
    world.step()
    assert world.done == ["deploy 1"]
    assert world.state("1") == "starting"
    world.ready("1")
    world.step()
    assert (world.state("1"), world.traffic()) == ("ready", "1:100")


def test_requests_for_a_model_that_is_still_starting_have_a_route_without_servers() -> None:
    world = Timeline()
    world.put(a_file())
    step = world.step()
    (route,) = step.routes
    assert route.split == {"1": 100}
    assert route.versions[0].servers == ()


def served(versions: tuple[str, ...] = ("1",), **fields: Any) -> Timeline:
    """A timeline in which the model's versions are ready and serve."""
    world = Timeline()
    world.put(a_file(versions, **fields))
    world.step()
    for version in versions:
        world.ready(version)
    world.step()
    world.done.clear()
    return world


def test_a_new_version_starts_beside_the_old_and_takes_over_only_when_ready() -> None:
    world = served()
    world.put(a_file(("1", "2")))
    world.step()
    assert world.done == ["deploy 2"]
    assert world.traffic() == "1:100"
    world.ready("2")
    world.step()
    assert world.traffic() == "2:100"


def test_a_version_that_fails_to_load_never_takes_traffic_and_says_why() -> None:
    world = served()
    world.put(a_file(("1", "2")))
    world.step()
    world.fail("2", "weights-2 is not a forest")
    step = world.step()
    for _ in range(5):
        step = world.step()
        assert world.traffic() == "1:100"
    assert world.state("2") == "failed"
    assert step.memory.shifts["fraud"].halted == "version 2 failed: weights-2 is not a forest"
    assert world.done == ["deploy 2", "delete 2"]


def test_a_failed_version_is_tried_again_by_the_next_deploy_only() -> None:
    world = served()
    world.put(a_file(("1", "2")))
    world.step()
    world.fail("2", "no such file")
    world.step()
    world.step()
    assert world.done == ["deploy 2", "delete 2"]
    world.put(a_file(("1", "2")))
    world.step()
    assert world.done[-1] == "deploy 2"
    world.ready("2")
    world.step()
    assert world.traffic() == "2:100"


def test_a_canary_takes_its_percent_and_the_old_version_keeps_the_rest() -> None:
    world = served()
    world.put(a_file(("1", "2"), traffic={"1": 90, "2": 10}))
    world.step()
    world.ready("2")
    world.step()
    assert world.traffic() == "1:90 2:10"


def test_traffic_moves_step_by_step_and_waits_the_interval_between_steps() -> None:
    world = served()
    world.put(a_file(("1", "2"), rollout={"steps": [10, 50], "interval_s": 30}))
    world.step()
    world.ready("2")
    strip = []
    for _ in range(8):
        world.step(10)
        strip.append(world.traffic())
    assert strip == ["1:90 2:10"] * 3 + ["1:50 2:50"] * 3 + ["2:100"] * 2


def test_a_new_version_that_dies_on_the_way_gives_its_traffic_back_and_stays_out() -> None:
    world = served()
    world.put(a_file(("1", "2"), rollout={"steps": [10, 50], "interval_s": 30}))
    world.step()
    world.ready("2")
    world.step()
    assert world.traffic() == "1:90 2:10"
    world.lose("2")
    step = world.step()
    assert world.traffic() == "1:100"
    assert "version 2 lost its replicas" in step.memory.shifts["fraud"].halted
    world.ready("2")
    world.step(60)
    assert world.traffic() == "1:100"


def test_a_served_version_that_loses_its_replicas_keeps_its_route_so_that_the_desk_holds() -> None:
    world = served()
    world.lose("1")
    (route,) = world.step().routes
    assert route.split == {"1": 100}
    assert route.versions[0].servers == ()
    assert world.state("1") == "starting"


def test_the_old_version_stays_for_the_rollback_window_and_then_stops() -> None:
    world = served()
    world.put(a_file(("2",), rollout={"rollback_window_s": 100}))
    world.step()
    world.ready("2")
    world.step()
    world.step(90)
    assert world.done == ["deploy 2"]
    world.step(20)
    assert world.done == ["deploy 2", "delete 1"]


def test_a_rollback_within_the_window_moves_traffic_in_one_step_and_starts_nothing() -> None:
    world = served()
    world.put(a_file(("2",)))
    world.step()
    world.ready("2")
    world.step()
    world.step()
    world.put(a_file(("1",)))
    world.step()
    assert world.traffic() == "1:100"
    assert world.done == ["deploy 2"]


def test_a_rollback_takes_no_steps() -> None:
    world = served()
    steps = {"steps": [5, 25, 50], "interval_s": 30}
    world.put(a_file(("1", "2"), rollout=steps))
    world.step()
    world.ready("2")
    for _ in range(5):
        world.step(31)
    assert world.traffic() == "2:100"
    world.put(a_file(("1",), rollout=steps), at_once=True)
    world.step()
    assert world.traffic() == "1:100"


def test_a_version_that_left_the_file_serves_until_the_new_one_is_ready() -> None:
    world = served()
    world.put(a_file(("2",)))
    (route,) = world.step().routes
    (serving,) = (v for v in route.versions if v.version in route.split)
    assert serving.backend.startswith("fraud--1--")
    assert serving.servers


def test_weights_that_were_mended_are_tried_at_the_next_deploy_though_the_old_failure_lingers() -> (
    None
):
    world = served()
    world.put(a_file(("1", "2")))
    world.step()
    world.fail("2", "no such file")
    lingering = world.reports[world.backend("2")]
    world.step()
    world.reports[world.backend("2")] = lingering
    world.put(a_file(("1", "2")))
    world.step()
    assert world.done[-1] == "deploy 2"


def test_a_request_that_takes_long_keeps_its_model_awake() -> None:
    world = served(scaling={"replicas_min": 0, "idle_to_zero_s": 60})
    world.busy("1")
    world.step(50)
    world.step(50)
    assert world.done == []


def test_a_retired_version_gives_its_room_to_a_new_one_that_waits_for_it() -> None:
    world = served()
    world.put(a_file(("2",)))
    world.step()
    world.ready("2")
    world.step()
    world.step()
    world.put(a_file(("3",)))
    world.step()
    world.step(50)
    assert "delete 1" not in world.done
    world.step(15)
    assert "delete 1" in world.done
    assert "delete 2" not in world.done  # it serves


def test_changing_a_spec_replaces_the_replicas_without_a_gap() -> None:
    world = served()
    old = world.backend("1")
    world.put(a_file({"1": {"batching": {"batch_size_max": 8}}}))
    step = world.step()
    assert world.done == ["deploy 1"]
    (route,) = step.routes
    assert [v.backend for v in route.versions if v.servers] == [old]
    world.ready("1")
    (route,) = world.step().routes
    assert route.split == {"1": 100}
    assert route.versions[0].backend == world.backend("1") != old


def test_changing_only_labels_or_scaling_starts_nothing() -> None:
    world = served()
    world.put(a_file({"1": {"labels": ["stable"]}}, scaling={"replicas_max": 9}))
    step = world.step()
    assert world.done == []
    assert step.routes[0].versions[0].labels == ("stable",)


def test_more_replicas_are_asked_for_when_the_file_says_so() -> None:
    world = served()
    world.put(a_file(scaling={"replicas_min": 3}))
    world.step()
    assert world.done == ["scale 1 to 3"]


def test_an_idle_model_goes_to_zero_and_a_request_wakes_it() -> None:
    world = served(scaling={"replicas_min": 0, "idle_to_zero_s": 60})
    world.step(50)
    world.ask("1")
    world.step(1)
    world.step(50)
    assert world.done == []
    world.step(20)
    assert world.done == ["scale 1 to 0"]
    world.step()
    assert world.state("1") == "idle"
    world.memory = woken(world.memory, world.backend("1"), world.now_s)
    world.step()
    assert world.done == ["scale 1 to 0", "scale 1 to 1"]
    assert world.state("1") == "starting"


def test_a_model_without_idle_to_zero_never_sleeps() -> None:
    world = served()
    world.step(1e6)
    assert world.done == []


def test_an_unloaded_model_gives_its_replicas_back_until_it_is_woken() -> None:
    world = served()
    world.memory = unloaded(world.memory, world.backend("1"))
    world.step()
    assert world.done == ["scale 1 to 0"]
    world.memory = woken(world.memory, world.backend("1"), world.now_s)
    world.step()
    assert world.done[-1] == "scale 1 to 1"


def test_a_deleted_model_loses_its_routes_and_its_replicas_at_once() -> None:
    world = served(("1", "2"), traffic={"1": 50, "2": 50})
    world.remove("fraud")
    step = world.step()
    assert step.routes == ()
    assert sorted(world.done) == ["delete 1", "delete 2"]
    assert world.step().memory.revisions == {}


def test_an_application_that_nobody_wants_is_deleted() -> None:
    world = served()
    stray = world.apps[world.backend("1")]
    world.apps["ghost--9--00000000"] = stray
    step = world.step()
    assert step.commands == (Delete("ghost--9--00000000"),)


def test_nothing_is_done_twice_when_nothing_changes() -> None:
    world = served(("1", "2"), traffic={"1": 70, "2": 30})
    before = world.step()
    for _ in range(20):
        step = world.step()
        assert step.commands == ()
        assert (step.routes, step.memory) == (before.routes, before.memory)


VERSIONS = st.sampled_from(("1", "2", "3"))
EVENTS = st.one_of(
    st.tuples(st.just("put"), st.lists(VERSIONS, min_size=1, max_size=3, unique=True)),
    st.tuples(st.just("ready"), VERSIONS),
    st.tuples(st.just("fail"), VERSIONS),
    st.tuples(st.just("lose"), VERSIONS),
    st.tuples(st.just("wait"), st.integers(1, 400)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(EVENTS, max_size=40), st.sampled_from(((), (10, 50))))
def test_traffic_always_adds_up_and_never_goes_to_a_version_that_was_not_ready(
    events: list[tuple[str, Any]], steps: tuple[int, ...]
) -> None:
    world = served()
    been_ready = {world.backend("1")}
    for kind, value in events:
        if kind == "put":
            world.put(a_file(tuple(value), rollout={"steps": list(steps)}))
        elif kind == "wait":
            world.step(value)
        elif value in world.wanted["fraud"].file.versions:
            backend = world.backend(value)
            if kind == "ready" and backend in world.apps:
                world.ready(value)
                been_ready.add(backend)
            elif kind == "fail" and backend in world.apps:
                world.fail(value, "bad weights")
            elif kind == "lose":
                world.lose(value)
        step = world.step()
        (route,) = step.routes
        backends = {v.version: v.backend for v in route.versions}
        assert sum(route.split.values()) == 100
        assert set(route.split) <= set(backends)
        assert {backends[v] for v in route.split} <= been_ready
        deleted = {c.backend for c in step.commands if isinstance(c, Delete)}
        assert not deleted & {backends[v] for v in route.split}


def test_reconcile_takes_the_same_step_from_the_same_facts() -> None:
    world = served()
    world.put(a_file(("1", "2")))
    from cluster.observation import Snapshot

    facts = Snapshot(world.now_s, world.wanted, world.apps, tuple(world.reports.values()))
    assert reconcile(facts, world.memory) == reconcile(facts, world.memory)
