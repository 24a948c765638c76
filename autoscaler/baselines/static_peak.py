"""What does it cost to hold enough for the peak, all the time?

The simplest thing that keeps an SLO: as many on-demand nodes of the cheapest type as the highest
rate of the whole trace needs. It knows the future peak, which nobody does, and nothing else; what
is lost or missing it launches again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autoscaler.baselines.placement import answer, cheapest_machine, steady_commands, within
from autoscaler.decision import Decision
from autoscaler.snapshot import Snapshot


@dataclass(frozen=True)
class StaticPeak:
    """A fixed fleet for `peak_rate_rps`.

    `replica_rate_rps`: by machine type, what one replica carries within the SLO.
    """

    replica_rate_rps: Mapping[str, float]
    peak_rate_rps: float
    name: str = "static-peak"
    interval_s: float = 20.0
    is_woken: bool = True

    def decide(self, snapshot: Snapshot, memory: None) -> Decision[None]:
        """Launches what is missing of the fixed count. It remembers nothing."""
        machine = cheapest_machine(snapshot, self.replica_rate_rps)
        wanted = math.ceil(self.peak_rate_rps / self.replica_rate_rps[machine] - 1e-9)
        allowed = within(snapshot.models[0], wanted, least=1)
        return answer(
            snapshot,
            None,
            wanted=wanted,
            allowed=allowed,
            commands=steady_commands(snapshot, machine, allowed),
            because=f"{allowed} × {machine} for a peak of {self.peak_rate_rps:.1f} rps",
        )
