"""How would Knative's pod autoscaler (KPA) scale?

It divides the concurrency seen by the concurrency wanted on each pod, twice: over a stable window
of 60 s and over a panic window of a tenth of it. Mostly the stable answer counts. When the panic
answer reaches twice the ready pods, it panics: the larger of the two counts, and nothing is taken
away until the panic has been over for a whole stable window.

    stable wish    2 2 2 3 4 5 6 6 6 … 3 2 2
    panic wish     2 2 8 8 8 4 3 2 2 … 2 2 2
    ready          2 2 2 2 2 2 8 8 8 … 8 8 8
    decided        2 2 8 8 8 8 8 8 8 … 8 4 2       panic holds 60 s after its last cause

Facts from knative/serving (Apache-2.0): `pkg/autoscaler/scaling/autoscaler.go` (`Scale`,
`newAutoscaler`), `pkg/autoscaler/config/config.go` and `config/core/configmaps/autoscaler.yaml`
(the defaults), `pkg/reconciler/autoscaling/resources/target.go` (target = container concurrency ×
0.7), `pkg/reconciler/autoscaling/kpa/scaler.go` (`handleScaleToZero`).

Left out: the activator and its burst capacity (requests wait at the edge instead, nothing is lost),
and pods that never become ready. On-demand nodes of the cheapest type, one pod a node.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from autoscaler.baselines.placement import (
    answer,
    cheapest_machine,
    nodes_in,
    ready_in,
    steady_commands,
    steady_groups,
    within,
)
from autoscaler.baselines.window import Window
from autoscaler.decision import Decision
from autoscaler.snapshot import Model, Snapshot

TARGET_UTILIZATION = 0.7
"""`container-concurrency-target-percentage`."""


@dataclass(frozen=True)
class KnativeMemory:
    """`panic_s`: the last time that there was cause to panic, None in the stable mode;
    `panic_pods`: the most that were decided in this panic. `active_s`: since when there have been
    pods; `idle_s`: since when none has been wanted, None while some are. `scale`: pods decided
    last.
    """

    concurrency: Window
    seen_s: float
    scale: int
    panic_s: float | None
    panic_pods: int
    active_s: float
    idle_s: float | None = None


@dataclass(frozen=True)
class Knative:
    """The KPA on concurrency. `target`: concurrent requests wanted on each pod; None: 70 % of what
    a replica takes at once (concurrency × batch of its service curve).
    """

    replica_rate_rps: Mapping[str, float]
    target: float | None = None
    stable_window_s: float = 60.0
    panic_window_fraction: float = 0.1
    panic_threshold: float = 2.0
    scale_up_rate_max: float = 1000.0
    scale_down_rate_max: float = 2.0
    zero_grace_s: float = 30.0
    name: str = "knative"
    interval_s: float = 2.0
    is_woken: bool = False

    def decide(self, snapshot: Snapshot, memory: KnativeMemory | None) -> Decision[KnativeMemory]:
        """One tick of the autoscaler and its scaler."""
        now_s, model = snapshot.now_s, snapshot.models[0]
        machine = cheapest_machine(snapshot, self.replica_rate_rps)
        ready = ready_in(nodes_in(snapshot, steady_groups(snapshot, machine)))
        seen = self._seen(snapshot, memory, ready)
        stable, panic = self._wishes(seen.concurrency, now_s, self._target(model, machine), ready)
        panicking = self._panic(seen, panic / max(1, ready), now_s)
        desired = self._clipped(stable, ready)
        if panicking.panic_s is not None:
            desired = max(desired, self._clipped(panic, ready), panicking.panic_pods)
            panicking = replace(panicking, panic_pods=desired)
        told = self._scaled(panicking, within(model, desired), now_s)
        return answer(
            snapshot,
            told,
            wanted=desired,
            allowed=told.scale,
            commands=steady_commands(snapshot, machine, told.scale),
            because=f"{'panic' if told.panic_s is not None else 'stable'}: "
            f"stable window {stable}, panic window {panic} for {ready} ready",
        )

    def _seen(self, snapshot: Snapshot, memory: KnativeMemory | None, ready: int) -> KnativeMemory:
        now_s = snapshot.now_s
        if memory is None:
            return KnativeMemory(
                concurrency=Window(self.stable_window_s),
                seen_s=now_s,
                scale=within(snapshot.models[0], max(1, ready)),
                # Over more than one pod it starts in panic: it has no history to scale down on.
                panic_s=now_s if ready > 1 else None,
                panic_pods=ready,
                active_s=now_s,
            )
        mean = snapshot.models[0].traffic.ongoing_mean
        concurrency = memory.concurrency.then(memory.seen_s, now_s, mean)
        return replace(memory, seen_s=now_s, concurrency=concurrency)

    def _target(self, model: Model, machine: str) -> float:
        if self.target is not None:
            return self.target
        curve = model.curves[machine]
        return TARGET_UTILIZATION * curve.concurrency * curve.batch_size_max

    def _wishes(
        self, concurrency: Window, now_s: float, target: float, ready: int
    ) -> tuple[int, int]:
        panic_s = self.panic_window_fraction * self.stable_window_s
        stable = math.ceil(concurrency.mean(now_s) / target)
        return stable, math.ceil(concurrency.mean(now_s, panic_s) / target)

    def _clipped(self, wish: int, ready: int) -> int:
        """A tick may multiply the ready pods by the one rate and divide them by the other."""
        pods = max(1, ready)
        least = math.floor(pods / self.scale_down_rate_max)
        return min(max(wish, least), math.ceil(self.scale_up_rate_max * pods))

    def _panic(self, memory: KnativeMemory, load: float, now_s: float) -> KnativeMemory:
        if load >= self.panic_threshold:
            return replace(memory, panic_s=now_s)
        if memory.panic_s is not None and memory.panic_s + self.stable_window_s < now_s:
            return replace(memory, panic_s=None, panic_pods=0)
        return memory

    def _scaled(self, memory: KnativeMemory, desired: int, now_s: float) -> KnativeMemory:
        """To none only after a stable window with pods and a grace period without need of any."""
        if desired > 0:
            woken = memory.scale == 0
            active_s = now_s if woken else memory.active_s
            return replace(memory, scale=desired, active_s=active_s, idle_s=None)
        if memory.idle_s is None:
            if now_s - memory.active_s < self.stable_window_s:
                return replace(memory, scale=min(memory.scale, 1))
            return replace(memory, idle_s=now_s)
        is_over = now_s - memory.idle_s >= self.zero_grace_s
        return replace(memory, scale=0 if is_over else memory.scale)
