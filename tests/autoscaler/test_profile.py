"""Does a profile say what its file says, and does a wrong file say what is wrong with it?"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.profile import ProfileError, profile_text, read_profile
from autoscaler.snapshot import MachineType, Resources
from autoscaler.synthetic import EXAMPLE_PROFILE
from autoscaler.world import Profile, ProfileMachine, ServiceTime
from tests.source import ROOT

EXAMPLES = sorted((ROOT / "autoscaler" / "profiles").glob("*.yaml"))

WHOLE = """
machines:
  p3.2xlarge:
    price_on_demand_usd_h: 3.06
    price_spot_usd_h: 0.918
    cold_start_s: {node: 90, load: 60, spread: 0.1}
    service_ms: {fixed: 100, per_item: 1, per_input_token: 0.3, per_output_token: 22, spread: 0.2}
    concurrency: 16
    batch_size_max: 4
    resources: {cpu: 8, gpu: 1, memory_mb: 61000}
    billing: {increment_s: 3600, minimum_s: 60}
    reserved: {nodes: 2, price_usd_h: 1.9}
    spot: false
notice_s: 30
launch_fail_s: 10
on_demand_max: 40
"""
LEAST = "machines:\n  m:\n    price_on_demand_usd_h: 1\n    service_ms: {fixed: 10}\n"


def a_file(folder: Path, text: str) -> Path:
    path = folder / "profile.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_profile_is_what_its_file_says(tmp_path: Path) -> None:
    machine = ProfileMachine(
        type=MachineType("p3.2xlarge", 3.06, 150.0, 0.1, Resources(8, 1, 61000), 3600, 60),
        service=ServiceTime(100, 1, 0.3, 22, 0.2),
        boot_s=90,
        load_s=60,
        concurrency=16,
        batch_size_max=4,
        price_spot_usd_h=0.918,
        has_spot=False,
        reserved=2,
        price_reserved_usd_h=1.9,
    )
    assert read_profile(a_file(tmp_path, WHOLE)) == Profile((machine,), 30, 10, 40)


def test_only_price_and_service_must_be_said(tmp_path: Path) -> None:
    profile = read_profile(a_file(tmp_path, LEAST))
    (machine,) = profile.machines
    assert (profile.notice_s, profile.on_demand_max) == (120, None)
    assert (machine.concurrency, machine.batch_size_max, machine.reserved) == (1, 1, 0)
    assert (machine.has_spot, machine.price_spot_usd_h) == (True, None)
    assert (machine.type.billing_increment_s, machine.type.billing_minimum_s) == (1, 60)


numbers = st.floats(0.001, 1e6)
machines = st.builds(
    lambda name, price, boot_s, load_s, cv, service, count, batch, spot, has_spot, reserved: (
        ProfileMachine(
            MachineType(name, price, boot_s + load_s, cv, Resources(2.0, 1.0, 100.0), 60.0, 600.0),
            ServiceTime(*service),
            boot_s,
            load_s,
            count,
            batch,
            spot,
            has_spot,
            reserved,
            price / 3,
        )
    ),
    st.sampled_from(["p3.2xlarge", "a3-highgpu-1g", "on", "1e3", "x: y"]),
    numbers,
    numbers,
    numbers,
    st.floats(0, 5),
    st.tuples(numbers, numbers, numbers, numbers, st.floats(0, 5)),
    st.integers(1, 500),
    st.integers(1, 500),
    st.none() | numbers,
    st.booleans(),
    st.integers(0, 50),
)
profiles = st.builds(
    Profile,
    st.lists(machines, min_size=1, max_size=3, unique_by=lambda m: m.type.name).map(tuple),
    numbers,
    numbers,
    st.none() | st.integers(0, 1000),
)


@given(profile=profiles)
def test_a_profile_written_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, profile: Profile
) -> None:
    assert read_profile(a_file(tmp_path_factory.mktemp("p"), profile_text(profile))) == profile


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_profiles(path: Path) -> None:
    (machine,) = read_profile(path).machines
    assert machine.price_spot_usd_h is not None
    assert machine.price_spot_usd_h < machine.type.price_on_demand_usd_h


def test_the_generated_profile_is_the_example() -> None:
    assert read_profile(ROOT / "autoscaler" / "profiles" / "llm-v100.yaml") == EXAMPLE_PROFILE


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["empty", "machines"]),
        ("a: [1", ["not YAML"]),
        ("- a\n", ["line 1", "must be keys with values", "a list"]),
        ("notice_s: 5\n", ["needs the key 'machines'"]),
        ("machines: {}\n", ["line 1", "machines", "at least one name"]),
        (LEAST + "notise_s: 5\n", ["line 5", "notise_s", "did you mean 'notice_s'?"]),
        (LEAST + "notice_s: soon\n", ["line 5", "notice_s", "a number, 0 or more", "'soon'"]),
        (LEAST + "notice_s: '5'\n", ["line 5", "notice_s", "'5'"]),
        (LEAST + "notice_s: -5\n", ["line 5", "notice_s", "0 or more", "'-5'"]),
        (LEAST + "notice_s: .nan\n", ["line 5", "notice_s"]),
        (LEAST + "notice_s: inf\n", ["line 5", "notice_s"]),
        (LEAST + "notice_s:\n", ["line 5", "notice_s", "nothing"]),
        (LEAST + "notice_s: 1\nnotice_s: 2\n", ["line 6", "notice_s", "twice"]),
        (LEAST + "on_demand_max: 1.5\n", ["line 5", "on_demand_max", "whole", "'1.5'"]),
        (LEAST + "    spot: maybe\n", ["line 5", "machines.m.spot", "true or false", "'maybe'"]),
        (LEAST + "    concurrency: 0\n", ["line 5", "m.concurrency", "1 or more", "'0'"]),
        (LEAST + "    cold_start: 5\n", ["line 5", "did you mean 'cold_start_s'?"]),
        (LEAST + "    cold_start_s: 5\n", ["line 5", "cold_start_s", "keys with values", "'5'"]),
        (LEAST + "    cold_start_s: {nodes: 5}\n", ["cold_start_s.nodes", "'node'"]),
        (LEAST + "    cold_start_s: {spread: 9}\n", ["spread", "from 0 to 5", "'9'"]),
        ("machines:\n  m:\n    service_ms: {fixed: 1}\n",
         ["line 3", "machines.m", "needs the key 'price_on_demand_usd_h'"]),
        ("machines:\n  m:\n    price_on_demand_usd_h: 0\n    service_ms: {fixed: 1}\n",
         ["line 3", "price_on_demand_usd_h"]),
        ("machines:\n  m:\n    price_on_demand_usd_h: 1\n    service_ms: {fixed: 0}\n",
         ["line 4", "service_ms", "no time at all"]),
        ("machines:\n  m: 5\n", ["line 2", "machines.m", "keys with values", "'5'"]),
    ],
)  # fmt: skip
def test_a_wrong_profile_says_where_and_what_would_be_right(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    with pytest.raises(ProfileError) as error:
        read_profile(a_file(tmp_path, text))
    for part in ["profile.yaml", *parts]:
        assert part in str(error.value)


def test_a_profile_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no such file"):
        read_profile(tmp_path / "profile.yaml")
