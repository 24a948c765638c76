"""Do replicas fit on the machines that were counted for them?"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.packing import Packed, nodes_needed, spread
from autoscaler.snapshot import Resources


@pytest.mark.parametrize(
    ("replicas", "nodes"),
    [
        ([], 0),
        ([(1.0, 5)], 5),
        ([(0.5, 5)], 3),
        ([(0.25, 8), (0.5, 2)], 3),
        ([(0.6, 2), (0.4, 2)], 2),
        ([(0.7, 3), (0.3, 3)], 3),
        ([(1 / 3, 9)], 3),
        ([(0.1, 10), (0.9, 3)], 4),
    ],
)
def test_machines_are_counted_as_a_person_would(
    replicas: list[tuple[float, int]], nodes: int
) -> None:
    assert nodes_needed(replicas) == nodes


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.25, 0.5, 0.6, 1.0]), st.integers(0, 30))))
def test_machines_are_enough_and_never_more_than_best_fit_promises(
    replicas: list[tuple[float, int]],
) -> None:
    whole = sum(share * count for share, count in replicas)
    found = nodes_needed(replicas)
    assert found >= math.ceil(whole - 1e-6)
    assert found <= math.ceil(1.7 * whole + 1)  # best fit's bound (Johnson et al., 1974)


@pytest.mark.parametrize(
    ("asked", "share"),
    [
        (Resources(cpu=2, memory_mb=1000), 0.5),
        (Resources(cpu=1, memory_mb=8000), 1.0),
        (Resources(cpu=1, gpu=1), math.inf),
        (Resources(cpu=5), math.inf),
        (Resources(cpu=0), 0.0),
    ],
)
def test_the_scarcest_resource_decides_a_share(asked: Resources, share: float) -> None:
    assert asked.share_of(Resources(cpu=4, memory_mb=8000)) == share


def test_replicas_are_spread_over_groups_by_their_nodes() -> None:
    placed = spread([Packed("m", 1.0, 8)], {"a": 4, "b": 2, "c": 2, "d": 0})
    assert placed == {"m": {"a": 4, "b": 2, "c": 2}}


def test_a_floor_of_safe_replicas_goes_where_nobody_reclaims() -> None:
    models = [Packed("m", 0.5, 4, safe=2)]
    placed = spread(models, {"spot": 3, "od": 1}, safe=frozenset({"od"}))
    assert placed["m"]["od"] >= 2


@given(
    st.lists(st.tuples(st.sampled_from([0.2, 0.5, 1.0]), st.integers(0, 20)), max_size=6),
    st.integers(1, 4),
)
def test_every_replica_is_placed_once(models: list[tuple[float, int]], groups: int) -> None:
    packed = [Packed(f"m{i}", share, count) for i, (share, count) in enumerate(models)]
    placed = spread(packed, {f"g{i}": 5 for i in range(groups)})
    assert {m.model: m.count for m in packed} == {m: sum(g.values()) for m, g in placed.items()}
