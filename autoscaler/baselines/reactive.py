"""What does plain reactive scaling on on-demand machines cost?

The yardstick between holding the peak and anything clever: follow the rate of the last minute, with
a margin, up at once, and down to the highest wish of the last five minutes. This is how the
horizontal pod autoscaler of Kubernetes scales on a rate (a round every 15 s, no delay up, a
stabilisation window of 300 s down; kubernetes/kubernetes, `pkg/controller/podautoscaler`).

It knows no spot machines, and forecasts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autoscaler.baselines.placement import answer, cheapest_machine, steady_commands, within
from autoscaler.baselines.window import Window, arrival_spans
from autoscaler.decision import Decision
from autoscaler.snapshot import Snapshot


@dataclass(frozen=True)
class ReactiveMemory:
    """`rate`: arrivals of the last minute; `wishes`: (when, replicas) within the window down."""

    rate: Window
    wishes: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True)
class OnDemandReactive:
    """Replicas for the rate of the last `window_s`, each loaded to `utilization_fraction`."""

    replica_rate_rps: Mapping[str, float]
    utilization_fraction: float = 0.8
    window_s: float = 60.0
    window_down_s: float = 300.0
    name: str = "on-demand-reactive"
    interval_s: float = 15.0
    is_woken: bool = False

    def decide(self, snapshot: Snapshot, memory: ReactiveMemory | None) -> Decision[ReactiveMemory]:
        """The highest wish of the last `window_down_s`, this one among them."""
        now_s, model = snapshot.now_s, snapshot.models[0]
        before = memory or ReactiveMemory(Window(self.window_s))
        spans = arrival_spans(now_s, model.traffic.arrivals, model.traffic.bin_s)
        rate = before.rate.then_all(spans)
        machine = cheapest_machine(snapshot, self.replica_rate_rps)
        carried_rps = self.utilization_fraction * self.replica_rate_rps[machine]
        wish = math.ceil(rate.mean(now_s) / carried_rps - 1e-9)
        recent = tuple(w for w in before.wishes if w[0] > now_s - self.window_down_s)
        wishes = (*recent, (now_s, wish))
        allowed = within(model, max(count for _, count in wishes), least=1)
        return answer(
            snapshot,
            ReactiveMemory(rate, wishes),
            wanted=wish,
            allowed=allowed,
            commands=steady_commands(snapshot, machine, allowed),
            because=f"{rate.mean(now_s):.1f} rps, {carried_rps:.1f} a replica",
        )
