"""Does a journal give back exactly what was seen and decided?"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.decision import Decision, Drain, Expected, Launch, Reason, Rejected, Stop
from autoscaler.journal import (
    WHOLE_EVERY,
    JournalError,
    Recorded,
    Writer,
    changes,
    patched,
    read_journal,
    snapshot_from_json,
    snapshot_to_json,
)
from autoscaler.simulation import simulate
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
from tests.autoscaler.worlds import SPOT_A, FixedFleet, a_small_world

# --- any snapshot

floats = st.floats(allow_nan=False, allow_infinity=False)
names = st.sampled_from(["a", "b", "c", "m/spot/a", "1"])
optional = st.none() | floats
nodes = st.builds(Node, names, names, st.sampled_from(NodeState), floats, floats, optional)
groups = st.builds(
    Group, names, names, st.sampled_from(Market), names, floats, st.none() | st.integers(), floats
)
histograms = st.just(()) | st.lists(
    st.sampled_from([0.0, 0.0, 1.5, math.pi]), min_size=40, max_size=40
).map(tuple)
curves = st.builds(
    ServiceCurve, floats, floats, st.integers(), st.integers(), floats, histogram=histograms
)
traffics = st.builds(
    Traffic, st.lists(floats, max_size=40).map(tuple), st.floats(0.1, 60), st.integers(),
    st.integers(), floats, st.integers(), st.integers(), optional,
)  # fmt: skip
models = st.builds(
    Model, names, st.builds(Slo, floats, floats), traffics, st.dictionaries(names, curves),
    st.builds(Resources, floats, floats, floats), st.integers(), st.none() | st.integers(),
)  # fmt: skip
replicas = st.builds(Replica, names, names, names, st.booleans(), floats)
events = st.builds(Event, st.sampled_from(EventKind), names, floats, st.integers())
machines = st.builds(MachineType, names, floats, floats, floats)
snapshots = st.builds(
    Snapshot,
    floats,
    st.dictionaries(names, machines),
    st.dictionaries(names, groups),
    st.lists(nodes, unique_by=lambda node: node.id).map(tuple),
    st.lists(models, max_size=2, unique_by=lambda model: model.name).map(tuple),
    st.lists(replicas, unique_by=lambda replica: replica.id).map(tuple),
    st.lists(events, max_size=3).map(tuple),
    st.none() | st.integers(),
    st.dictionaries(names, floats),
)


def order(snapshot: Snapshot) -> list[list[str]]:
    return [list(snapshot.groups), list(snapshot.machines), list(snapshot.prices_before_usd_h)]


@given(snapshots)
def test_a_snapshot_comes_back_equal_through_text(snapshot: Snapshot) -> None:
    back = snapshot_from_json(json.loads(json.dumps(snapshot_to_json(snapshot))))
    assert back == snapshot
    assert order(back) == order(snapshot)


@settings(max_examples=50)
@given(snapshots, snapshots)
def test_changes_lead_from_one_snapshot_to_the_next(before: Snapshot, after: Snapshot) -> None:
    patch = changes(before, after)
    if patch is not None:  # None: the order of nodes or groups would be lost
        back = snapshot_from_json(patched(snapshot_to_json(before), json.loads(json.dumps(patch))))
        assert back == after
        assert order(back) == order(after)


@settings(max_examples=30)
@given(st.lists(snapshots, min_size=1, max_size=3))
def test_a_journal_gives_its_snapshots_back(seen: list[Snapshot]) -> None:
    lines: list[str] = []
    writer = Writer(lines.append)
    for snapshot in seen:
        writer.line("shoal", snapshot, Decision(None))
    assert [line.snapshot for line in read_journal(lines)] == seen


def test_nothing_changed_is_an_empty_patch() -> None:
    node = Node("1", "g", NodeState.READY, 0.0, 1.0)
    assert changes(Snapshot(5.0, {}, {}, (node,)), Snapshot(5.0, {}, {}, (node,))) == {}


def test_a_patch_names_only_the_nodes_that_changed() -> None:
    one, two = (Node(name, "g", NodeState.STARTING, 0.0, 1.0) for name in "12")
    before = Snapshot(5.0, {}, {}, (one, two))
    after = Snapshot(6.0, {}, {}, (replace(two, state=NodeState.READY),))
    assert changes(before, after) == {"now_s": 6.0, "nodes": {"1": None, "2": {"state": "ready"}}}


def test_nodes_in_another_order_are_no_patch_but_a_whole_snapshot() -> None:
    one, two = (Node(name, "g", NodeState.READY, 0.0, 1.0) for name in "12")
    before, after = Snapshot(5.0, {}, {}, (one, two)), Snapshot(6.0, {}, {}, (two, one))
    assert changes(before, after) is None


# --- lines


def a_line(decision: Decision[None], nodes: Sequence[Node] = ()) -> dict[str, object]:
    lines: list[str] = []
    Writer(lines.append).line("shoal", Snapshot(7.0, {}, {}, tuple(nodes)), decision)
    line: dict[str, object] = json.loads(lines[0])
    return line


def test_a_line_says_what_was_decided_and_why() -> None:
    decision = Decision(
        None,
        wanted={"fraud": 3},
        groups={"g": 2, "h": 0},
        commands=(Launch("g", 2), Drain("1"), Stop("2")),
        reason=Reason.NOTICE,
        because="two go",
        rejected=(Rejected("h", 3.5, "dearer"),),
        expected=Expected(2.5, 0.995),
    )
    line = a_line(decision, [Node("1", "g", NodeState.READY, 0, 1)])
    assert line["now_s"] == 7.0
    assert line["wanted"] == {"fraud": 3}
    assert line["groups"] == {"g": 2}
    assert line["commands"] == [{"launch": "g", "count": 2}, {"drain": "1"}, {"stop": "2"}]
    assert (line["reason"], line["because"]) == ("reclaim notice", "two go")
    assert line["rejected"] == [{"option": "h", "cost_usd_h": 3.5, "why": "dearer"}]
    assert line["expected"] == {"cost_usd_h": 2.5, "attainment": 0.995}
    assert line["observed"] == {"rate_rps": 0, "queued": 0, "running": 0, "ready": {"g": 1}}


def test_a_journal_cut_at_its_front_is_read_from_the_next_whole_snapshot_on() -> None:
    lines: list[str] = []
    writer = Writer(lines.append)
    for now_s in range(2 * WHOLE_EVERY):
        writer.line("shoal", Snapshot(float(now_s), {}, {}), Decision(None))
    with pytest.raises(JournalError, match="line 1: tells changes, but no line above"):
        list(read_journal(lines[1:]))
    first = next(n for n in range(1, len(lines)) if '"snapshot"' in lines[n])
    assert next(read_journal(lines[first:])).snapshot.now_s == first


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: must be an object, not list"),
        ('{"now_s": 1}', "line 2: holds neither 'snapshot' nor 'changes'"),
        ('{"snapshot": {"now": 1}}', "line 2: not a snapshot"),
        ('{"snapshot": {"now_s": 1, "machines": {}, "groups": 5}}', "line 2: not a snapshot"),
    ],
)
def test_a_wrong_line_is_named(text: str, part: str) -> None:
    with pytest.raises(JournalError) as error:
        list(read_journal(["\n", text]))
    assert part in str(error.value)


# --- recording


def test_a_recorded_policy_does_what_it_would_have_done_and_is_timed() -> None:
    lines: list[str] = []
    clock = iter(float(n) for n in range(10**6))
    world, policy = a_small_world(), FixedFleet({SPOT_A: 2})
    recorded = Recorded(policy, Writer(lines.append), lambda: next(clock))
    run, alone = simulate(world, recorded), simulate(world, policy)
    assert run.finish_s.tobytes() == alone.finish_s.tobytes()
    assert run.ledger == alone.ledger
    assert recorded.decisions == len(lines) == len(run.journal)
    assert recorded.decide_s == recorded.decisions  # one second each, by that clock


def test_a_run_is_told_in_lines_that_grow_only_by_what_changes() -> None:
    lines: list[str] = []
    simulate(a_small_world(), Recorded(FixedFleet({SPOT_A: 2}), Writer(lines.append)))
    seen = [line.snapshot for line in read_journal(lines)]
    assert [s.now_s for s in seen] == sorted(s.now_s for s in seen)
    whole = len(json.dumps(snapshot_to_json(seen[-1])))
    assert sum(map(len, lines[1:])) / len(lines[1:]) < whole


def test_without_snapshots_a_line_is_only_the_decision() -> None:
    lines: list[str] = []
    Writer(lines.append, has_snapshots=False).line("x", Snapshot(0.0, {}, {}), Decision(None))
    assert not {"snapshot", "changes"} & json.loads(lines[0]).keys()
