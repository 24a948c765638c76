"""What do others do in the same world?

Each policy here is what its authors describe and ship, written anew as a value that sees the same
`Snapshot` and answers with the same commands as Shoal's own policy, so that the simulator can
compare them. Their defaults are kept, the good and the bad; where something had to be decided that
they leave to an operator, the choice is in their favour and named in the file's first lines.

    static-peak          on-demand   the future peak, held all the time
    on-demand-reactive   on-demand   rate of the last minute
    ray-default          on-demand   ongoing requests
    knative              on-demand   concurrency, with panic
    skyserve             spot, on-demand as fallback, zones
    mark                 all machine types, spot, forecast

They serve one model with one replica a node, and what a replica carries is told to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from autoscaler.baselines.knative import Knative
from autoscaler.baselines.mark import Mark
from autoscaler.baselines.ray_default import RayDefault
from autoscaler.baselines.reactive import OnDemandReactive
from autoscaler.baselines.skyserve import SkyServe
from autoscaler.baselines.static_peak import StaticPeak
from autoscaler.decision import Policy

__all__ = [
    "BASELINES",
    "Knative",
    "Mark",
    "OnDemandReactive",
    "RayDefault",
    "Sizing",
    "SkyServe",
    "StaticPeak",
]


@dataclass(frozen=True)
class Sizing:
    """What an operator would measure or know before deploying any of these.

    `replica_rate_rps`: by machine type, the rate that one replica carries within the SLO;
    `peak_rate_rps`: the highest rate to come.
    """

    replica_rate_rps: Mapping[str, float]
    peak_rate_rps: float
    slo_ms: float


BASELINES: Mapping[str, Callable[[Sizing], Policy]] = MappingProxyType(
    {
        "static-peak": lambda sizing: StaticPeak(sizing.replica_rate_rps, sizing.peak_rate_rps),
        "on-demand-reactive": lambda sizing: OnDemandReactive(sizing.replica_rate_rps),
        "ray-default": lambda sizing: RayDefault(sizing.replica_rate_rps),
        "knative": lambda sizing: Knative(sizing.replica_rate_rps),
        "skyserve": lambda sizing: SkyServe(sizing.replica_rate_rps),
        "mark": lambda sizing: Mark(sizing.replica_rate_rps),
    }
)
"""Each policy by its name, with the defaults of its authors."""
