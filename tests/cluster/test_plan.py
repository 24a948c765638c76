"""Does a plan say, in words, what will change and nothing else?"""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cluster.plan import Change, changes
from deployments.model import ModelFile
from tests.cluster.timeline import a_file


def lines(old: ModelFile | None, new: ModelFile) -> list[str]:
    """The plan, a change a line."""
    return [
        f"{c.kind} {c.what}" + (f" ({c.detail})" if c.detail else "") for c in changes(old, new)
    ]


def test_a_new_model_adds_its_versions_and_says_where_from() -> None:
    assert lines(None, a_file(("3", "4"), traffic={"3": 90, "4": 10})) == [
        "add version 3 (sklearn from weights-3)",
        "add version 4 (sklearn from weights-4)",
        "traffic nothing → 3: 90 %, 4: 10 % (at once when ready)",
    ]


def test_the_same_file_changes_nothing() -> None:
    file = a_file(("1", "2"))
    assert lines(file, file) == ["keep version 1", "keep version 2"]


def test_a_changed_version_names_what_differs() -> None:
    old = a_file({"1": {"resources": {"cpu": 1}}})
    new = a_file({"1": {"resources": {"cpu": 2}, "source": "elsewhere"}})
    (line,) = lines(old, new)
    assert line.startswith("replace version 1 (new replicas beside the old: ")
    assert "source 'weights-1' → 'elsewhere'" in line
    assert "'cpu': 2.0" in line


def test_a_changed_label_needs_no_new_replicas() -> None:
    old, new = a_file({"1": {}}), a_file({"1": {"labels": ["stable"]}})
    assert lines(old, new) == ["keep version 1"]


def test_a_version_that_is_left_out_stops() -> None:
    old, new = a_file(("1", "2")), a_file(("2",))
    assert lines(old, new) == [
        "keep version 2",
        "stop version 1 (stays for the rollback window, then stops)",
    ]


def test_traffic_that_moves_in_steps_says_so() -> None:
    old = a_file(("1", "2"), traffic={"1": 100})
    rollout = {"steps": [5, 50], "interval_s": 7.5}
    new = a_file(("1", "2"), traffic={"2": 100}, rollout=rollout)
    assert "traffic 1: 100 % → 2: 100 % (in steps of 5 %, 50 %, 7.5 s apart)" in lines(old, new)


def test_traffic_of_nothing_is_not_told() -> None:
    old = a_file(("1", "2"), traffic={"1": 0, "2": 100})
    assert lines(old, a_file(("1", "2"), traffic={"2": 100})) == [
        "keep version 1",
        "keep version 2",
    ]


def test_settings_that_change_are_told_field_by_field() -> None:
    old = a_file(scaling={"replicas_min": 1}, sticky_header=None)
    new = a_file(scaling={"replicas_min": 2}, sticky_header="x-user", slo={"latency_p99_ms": 100})
    assert lines(old, new)[1:] == [
        "setting scaling (replicas_min 1 → 2)",
        "setting slo (latency_p99_ms None → 100.0; attainment None → 0.99)",
        "setting sticky_header (value None → 'x-user')",
    ]


def test_a_change_is_json_for_the_admin_api() -> None:
    assert Change("add", "version 1").as_json() == {
        "kind": "add",
        "what": "version 1",
        "detail": "",
    }


versions = st.dictionaries(
    st.sampled_from("123"), st.fixed_dictionaries({"source": st.sampled_from("ab")}), min_size=1
)


@given(versions, versions)
def test_every_version_of_either_file_has_exactly_one_line(
    old: dict[str, Any], new: dict[str, Any]
) -> None:
    told = {
        c.what.removeprefix("version "): c.kind
        for c in changes(a_file(old), a_file(new))
        if c.what.startswith("version ")
    }
    assert told == {
        v: "stop"
        if v not in new
        else "add"
        if v not in old
        else "keep"
        if old[v] == new[v]
        else "replace"
        for v in {**old, **new}
    }
