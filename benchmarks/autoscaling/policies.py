"""Who takes part?

Shoal, each baseline with its authors' defaults, and SkyServe with three other targets, in multiples
of what a replica carries within the SLO: a lower target attains more and costs more. Together they
draw SkyServe's frontier, on which Shoal is compared at equal attainment instead of with whatever
one setting happens to attain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autoscaler.baselines import BASELINES, SkyServe
from autoscaler.decision import Policy
from autoscaler.experiment import a_policy, sizing
from autoscaler.world import World

SHOAL, STATIC_PEAK = "shoal", "static-peak"
TARGET_SCALES = (0.7, 0.85, 1.15)
FRONTIER: tuple[str, ...] = ("skyserve", *(f"skyserve@{scale:g}" for scale in TARGET_SCALES))
"""SkyServe as it comes and its variants."""

POLICIES: tuple[str, ...] = (
    SHOAL,
    *FRONTIER,
    *(name for name in BASELINES if name not in ("skyserve", STATIC_PEAK)),
    STATIC_PEAK,
)
"""Everybody by name, in the order of the tables."""


def participant(name: str, world: World, settings: Sequence[str] = ()) -> Policy:
    """A new policy of that name; `settings` (KEY=VALUE) are for Shoal's own."""
    scale = name.partition("@")[2]
    if not scale:
        return a_policy(name, world, settings)
    default = SkyServe(sizing(world).replica_rate_rps)
    return replace(default, target_scale=float(scale), name=name)
