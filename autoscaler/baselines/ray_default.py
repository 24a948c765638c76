"""How would Ray Serve's default autoscaling scale?

It wants `target_ongoing_requests` on each replica: what waits and is served, averaged over the
look-back, divided by that target and rounded up, is the wish. A wish is followed only after it has
pointed the same way for a whole delay; the count then taken is the wish of that moment. A wish that
turns round or goes away starts the delay anew.

    wish - target   + + + + + + +|0 - - + + + + + + +
    target          2 2 2 2 2 2 5 5 5 5 5 5 5 5 5 5 7      delay up 30 s, one column is 5 s

Facts from Ray 2.60 (Apache-2.0), `serve/autoscaling_policy.py` (`_apply_delay_logic`,
`_core_replica_queue_length_policy`, `_get_cold_start_scale_up_replicas`) and `serve/config.py`
(`AutoscalingConfig.default()`: 1 to 100 replicas, target 2, look-back 30 s, delays 30 s and 600 s,
factors 1). Since then delays are measured in time, no longer in rounds of the control loop.

Ray asks every 0.1 s but its replicas report only every 10 s, so 5 s between decisions lose nothing.
Ray does not choose machines: it gets the cheapest on-demand type, one replica a node.
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
from autoscaler.snapshot import Snapshot

ELAPSED_TOLERANCE_S = 1e-6


@dataclass(frozen=True)
class RayMemory:
    """`target`: replicas decided last; `since_s`: since when the wish has been above (`direction`
    1) or below (-1) it, None when it is neither.
    """

    target: int
    ongoing: Window
    seen_s: float
    direction: int = 0
    since_s: float | None = None


@dataclass(frozen=True)
class RayDefault:
    """Ray Serve's queue-length policy with the defaults of `num_replicas="auto"`."""

    replica_rate_rps: Mapping[str, float]
    target_ongoing_requests: float = 2.0
    look_back_s: float = 30.0
    delay_up_s: float = 30.0
    delay_down_s: float = 600.0
    replicas_min: int = 1
    replicas_max: int = 100
    name: str = "ray-default"
    interval_s: float = 5.0
    is_woken: bool = False

    def decide(self, snapshot: Snapshot, memory: RayMemory | None) -> Decision[RayMemory]:
        """One round of the controller."""
        now_s, model = snapshot.now_s, snapshot.models[0]
        machine = cheapest_machine(snapshot, self.replica_rate_rps)
        nodes = nodes_in(snapshot, steady_groups(snapshot, machine))
        ready = ready_in(nodes)
        seen = self._seen(snapshot, memory, len(nodes))
        ongoing = seen.ongoing.mean(now_s)
        wish = self._wish(ongoing, ready, seen.target)
        is_cold = ready == 0 and wish > 0
        told = replace(seen, target=wish) if is_cold else self._delayed(seen, wish, now_s)
        target = within(model, told.target, self.replicas_min, self.replicas_max)
        return answer(
            snapshot,
            replace(told, target=target),
            wanted=wish,
            allowed=target,
            commands=steady_commands(snapshot, machine, target),
            because=f"{ongoing:.1f} ongoing, {self.target_ongoing_requests:g} a replica",
        )

    def _seen(self, snapshot: Snapshot, memory: RayMemory | None, held: int) -> RayMemory:
        now_s = snapshot.now_s
        if memory is None:
            target = within(snapshot.models[0], held, self.replicas_min)
            return RayMemory(target, Window(self.look_back_s), now_s)
        mean = snapshot.models[0].traffic.ongoing_mean
        ongoing = memory.ongoing.then(memory.seen_s, now_s, mean)
        return replace(memory, seen_s=now_s, ongoing=ongoing)

    def _wish(self, ongoing: float, ready: int, target: int) -> int:
        """Without a ready replica there is nothing to divide by: the target stays, at least 1 when
        somebody waits.
        """
        if ready == 0:
            return max(1, target) if ongoing > 0 else target
        return math.ceil(ongoing / self.target_ongoing_requests)

    def _delayed(self, memory: RayMemory, wish: int, now_s: float) -> RayMemory:
        direction = (wish > memory.target) - (wish < memory.target)
        if direction == 0:
            return replace(memory, direction=0, since_s=None)
        turned = direction != memory.direction or memory.since_s is None
        since_s = now_s if turned or memory.since_s is None else memory.since_s
        delay_s = self.delay_up_s if direction > 0 else self.delay_down_s
        if now_s - since_s + ELAPSED_TOLERANCE_S < delay_s:
            return replace(memory, direction=direction, since_s=since_s)
        # Only a single replica may go to none.
        followed = wish if direction > 0 or memory.target == 1 else max(1, wish)
        return replace(memory, target=followed, direction=0, since_s=None)
