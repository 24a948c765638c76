"""How would MArk scale: by forecast, greedily over machine types, on spot?

Once a minute it takes the busiest 5 s of the minute, forecasts the next 50 minutes, adds 20 %, and
plans machines until the peak of the next few minutes is covered. Each pick is the kind of machine
with the least cost for each request that is still uncovered, over the time for which the residual
lasts. Launching costs an extra 180 s of rent, so what runs is kept when nothing is much cheaper.

    forecast × 1.2   ▁▂▄▅▆▇▇▇▇▇▇▇        pick until the peak of the head is covered;
                     └head┘└─ tail ─     price each pick over the whole residual

What the plan no longer holds goes only after six plans in a row have done without it.

Facts from Zhang et al., "MArk: Exploiting Cloud Services for Cost-Effective, SLO-Aware Machine
Learning Inference Serving", ATC'19, and its code, marcoszh/MArk-Project: `modules/scheduler.py`
(minute, 5 s windows, factor 1.2, six plans, 180 s), `modules/proactive_controller2.py` (greedy).

Where this differs, and why: its LSTM, trained on its own trace, is a straight line through the last
five minutes, continued over the head and flat after it; a lambda function for what nothing else
covers is left out, as there is none to rent here; its stopped burstable machines, started when spot
is lost, are on-demand ones, rented at once for the shortage. It has one region: here spot goes to
the cheapest zone in which no launch failed in the last five minutes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from autoscaler.baselines.placement import answer, away, in_order_to_go, nodes_in
from autoscaler.decision import Command, Decision, Launch
from autoscaler.snapshot import EventKind, Group, Market, Snapshot, Traffic

Segments = list[tuple[float, int]]
"""A forecast: (rate_rps, minutes that it lasts), in the order of time."""

BUSIEST_S = 5.0
RATE_MIN_RPS = 1e-6
"""The least that is forecast: one node stays when nobody comes."""
TREND_ROUNDS = 5
TIE = 1e-9
"""Costs that differ by less (as a fraction) are equal: the kind listed first is picked."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Something that the plan can pick: a new node of a group, or one of those that run there.

    `count_max` bounds how many; `overhead_usd` is paid once for each.
    """

    group: str
    rate_rps: float
    price_usd_h: float
    overhead_usd: float
    count_max: int
    is_new: bool


@dataclass(frozen=True)
class MarkMemory:
    """`peak_rps`: the busiest 5 s since the last plan; `peaks_rps`: those of the last minutes;
    `plans`: nodes by group of the last plans; `needed_rps`: what the last one covers;
    `failed_s`: by spot group, when a launch last failed or nodes were taken.
    """

    next_round_s: float
    peak_rps: float = 0.0
    peaks_rps: tuple[float, ...] = ()
    plans: tuple[Mapping[str, int], ...] = ()
    needed_rps: float = 0.0
    failed_s: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Mark:
    """MArk's proactive controller over every machine type in `replica_rate_rps`."""

    replica_rate_rps: Mapping[str, float]
    margin: float = 1.2
    steps: int = 50
    steps_head: int = 6
    launch_overhead_s: float = 180.0
    plans_kept: int = 6
    retry_s: float = 300.0
    name: str = "mark"
    interval_s: float = 60.0
    is_woken: bool = True

    def decide(self, snapshot: Snapshot, memory: MarkMemory | None) -> Decision[MarkMemory]:
        """A plan when a minute is over; when woken in between, only cover for what is lost."""
        before = memory or MarkMemory(snapshot.now_s)
        seen = self._seen(snapshot, before)
        if snapshot.now_s + 1e-6 >= before.next_round_s:
            return self._round(snapshot, seen)
        cover, short_rps = self._cover(snapshot, seen.needed_rps)
        count = len(nodes_in(snapshot, snapshot.groups.values())) + sum(c.count for c in cover)
        return answer(
            snapshot,
            replace(seen, plans=_with_cover(seen.plans, cover)),
            wanted=count,
            allowed=count,
            commands=list(cover),
            because=f"short of {short_rps:.1f} rps between two plans",
        )

    def _seen(self, snapshot: Snapshot, memory: MarkMemory) -> MarkMemory:
        failed = {
            group: at_s for group, at_s in memory.failed_s if at_s > snapshot.now_s - self.retry_s
        }
        for event in snapshot.events:
            if event.kind in (EventKind.LAUNCH_FAILED, EventKind.RECLAIMED, EventKind.NOTICED):
                failed[event.group] = event.at_s
        peak_rps = max(memory.peak_rps, busiest_rps(snapshot.models[0].traffic))
        return replace(memory, peak_rps=peak_rps, failed_s=tuple(failed.items()))

    def _round(self, snapshot: Snapshot, memory: MarkMemory) -> Decision[MarkMemory]:
        peaks_rps = (*memory.peaks_rps, memory.peak_rps)[-TREND_ROUNDS:]
        forecast = self.forecast(peaks_rps)
        needed_rps = max(rate for rate, _ in forecast[: self.steps_head])
        launches, plan = self._plan(snapshot, forecast, dict(memory.failed_s))
        plans = (*memory.plans, plan)[-self.plans_kept :]
        commands = [Launch(group, count) for group, count in launches.items()]
        told = MarkMemory(
            next_round_s=snapshot.now_s + self.interval_s,
            peaks_rps=peaks_rps,
            plans=plans,
            needed_rps=needed_rps,
            failed_s=memory.failed_s,
        )
        return answer(
            snapshot,
            told,
            wanted=sum(plan.values()),
            allowed=sum(plan.values()),
            commands=[*commands, *self._unplanned(snapshot, plans)],
            because=f"{needed_rps:.1f} rps forecast for the next {self.steps_head} minutes",
        )

    def forecast(self, peaks_rps: tuple[float, ...]) -> Segments:
        """The rate for each minute of the head and, in one segment, of the rest, with the margin.

        A least-squares line through `peaks_rps`, from the last of them on, within 0 and twice it.
        """
        now_rps, slope = peaks_rps[-1], _slope(peaks_rps)
        head = [
            max(self.margin * min(now_rps + slope * step, 2 * now_rps), RATE_MIN_RPS)
            for step in range(self.steps_head)
        ]
        return [(rate, 1) for rate in head] + [(head[-1], self.steps - self.steps_head)]

    def _plan(
        self, snapshot: Snapshot, forecast: Segments, failed_s: Mapping[str, float]
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Nodes to launch, and nodes planned (launched or kept), by group."""
        kinds = self._kinds(snapshot, failed_s)
        picked = greedy(forecast, self.steps_head, kinds)
        launches = {k.group: n for k, n in picked if k.is_new and n}
        plan: dict[str, int] = {}
        for kind, count in picked:
            if count:
                plan[kind.group] = plan.get(kind.group, 0) + count
        return launches, plan

    def _kinds(self, snapshot: Snapshot, failed_s: Mapping[str, float]) -> list[Kind]:
        staying: dict[str, int] = {}
        for node in nodes_in(snapshot, snapshot.groups.values()):
            if node.reclaim_s is None:
                staying[node.group] = staying.get(node.group, 0) + 1
        kinds = [
            self._kind(snapshot.groups[group], count, is_new=False)
            for group, count in staying.items()
            if snapshot.groups[group].machine in self.replica_rate_rps
        ]
        kinds += [
            self._kind(group, _room(group, staying.get(group.name, 0)), is_new=True)
            for group in self._places(snapshot, failed_s)
        ]
        return [kind for kind in kinds if kind.count_max and kind.rate_rps > 0]

    def _kind(self, group: Group, count_max: int, *, is_new: bool) -> Kind:
        # A reserved node is paid for whether it runs or not.
        price_usd_h = 0.0 if group.market is Market.RESERVED else group.price_usd_h
        overhead_usd = price_usd_h * self.launch_overhead_s / 3600 if is_new else 0.0
        rate_rps = self.replica_rate_rps[group.machine]
        return Kind(group.name, rate_rps, price_usd_h, overhead_usd, count_max, is_new)

    def _places(self, snapshot: Snapshot, failed_s: Mapping[str, float]) -> list[Group]:
        """Where new nodes may go: each machine type on-demand, reserved, and in one spot zone."""
        steady = []
        spot: dict[str, Group] = {}
        for group in snapshot.groups.values():
            if group.machine not in self.replica_rate_rps:
                continue
            if group.market is not Market.SPOT:
                steady.append(group)
            elif group.name not in failed_s:
                best = spot.get(group.machine, group)
                spot[group.machine] = min(best, group, key=lambda g: (g.price_usd_h, g.name))
        return [*spot.values(), *steady]

    def _unplanned(self, snapshot: Snapshot, plans: tuple[Mapping[str, int], ...]) -> list[Command]:
        if len(plans) < self.plans_kept:
            return []
        commands: list[Command] = []
        for group in snapshot.groups.values():
            nodes = nodes_in(snapshot, [group])
            kept = max(plan.get(group.name, 0) for plan in plans)
            commands += away(in_order_to_go(nodes)[: max(0, len(nodes) - kept)])
        return commands

    def _cover(self, snapshot: Snapshot, needed_rps: float) -> tuple[list[Launch], float]:
        """On-demand nodes of the cheapest type for what the nodes that stay don't carry."""
        rates = self.replica_rate_rps
        staying_rps = sum(
            rates.get(snapshot.groups[node.group].machine, 0.0)
            for node in nodes_in(snapshot, snapshot.groups.values())
            if node.reclaim_s is None
        )
        short_rps = needed_rps - staying_rps
        places = [
            group
            for group in snapshot.groups.values()
            if group.market is Market.ON_DEMAND and rates.get(group.machine, 0.0) > 0
        ]
        if short_rps <= 0 or not places:
            return [], max(short_rps, 0.0)
        place = min(places, key=lambda g: (g.price_usd_h / rates[g.machine], g.name))
        room = _room(place, len(nodes_in(snapshot, [place])))
        count = min(math.ceil(short_rps / rates[place.machine] - 1e-9), room)
        return ([Launch(place.name, count)] if count else []), short_rps


def busiest_rps(traffic: Traffic) -> float:
    """The highest rate over about 5 s, or over a bin where bins are longer; a rest is left out."""
    width = max(1, round(BUSIEST_S / traffic.bin_s))
    arrivals = traffic.arrivals
    starts = range(len(arrivals) % width, len(arrivals), width)
    counts = [sum(arrivals[start : start + width]) for start in starts]
    return max(counts, default=0.0) / (width * traffic.bin_s)


def greedy(forecast: Segments, steps_head: int, kinds: list[Kind]) -> list[tuple[Kind, int]]:
    """How many to pick of each kind, so that the head's peak is covered.

    From the peak of the residual on, for as long as it stays above 0, the kind with the least cost
    for each request that it takes off it (MArk-Project, `proactive_controller2.fill`, which picks
    one at a time; here as many at once as don't change what is cheapest). It stops short when
    every kind is used up.
    """
    counts = [0] * len(kinds)
    largest_rps = max((kind.rate_rps for kind in kinds), default=0.0)
    head = [rate for rate, _ in forecast[:steps_head]]
    peak_at = head.index(max(head))
    covered_rps = 0.0
    while head[peak_at] - covered_rps > 1e-9:
        span = _span(forecast[peak_at:], covered_rps)
        costs = [
            (_cost_a_request(kind, span), k)
            for k, kind in enumerate(kinds)
            if counts[k] < kind.count_max
        ]
        if not costs:
            break
        least = min(costs)[0] * (1 + TIE)
        pick = next(k for cost, k in costs if cost <= least)
        kind = kinds[pick]
        # While the least residual fills the largest kind, every kind's cost stays what it is.
        spare_rps = max(0.0, min(rate for rate, _ in span) - largest_rps)
        count = min(1 + int(spare_rps / kind.rate_rps), kind.count_max - counts[pick])
        counts[pick] += count
        covered_rps += count * kind.rate_rps
    return list(zip(kinds, counts, strict=True))


def _span(forecast: Segments, covered_rps: float) -> Segments:
    """The residual from its peak on, until it is covered."""
    span = []
    for rate, steps in forecast:
        if rate < covered_rps:
            break
        span.append((rate - covered_rps, steps))
    return span


def _cost_a_request(kind: Kind, span: Segments) -> float:
    minutes = sum(steps for _, steps in span)
    taken = sum(min(rate, kind.rate_rps) * steps for rate, steps in span) * 60
    return (kind.price_usd_h * minutes / 60 + kind.overhead_usd) / taken


def _slope(values: tuple[float, ...]) -> float:
    """Of the least-squares line through equally spaced `values`."""
    middle = (len(values) - 1) / 2
    squares = sum((k - middle) ** 2 for k in range(len(values)))
    return sum((k - middle) * v for k, v in enumerate(values)) / squares if squares else 0.0


def _with_cover(
    plans: tuple[Mapping[str, int], ...], cover: list[Launch]
) -> tuple[Mapping[str, int], ...]:
    """The last plan with `cover` added, so that it stays while its replacement starts."""
    if not plans or not cover:
        return plans
    last = dict(plans[-1])
    for launch in cover:
        last[launch.group] = last.get(launch.group, 0) + launch.count
    return (*plans[:-1], last)


def _room(group: Group, held: int) -> int:
    return 1_000_000 if group.nodes_max is None else max(0, group.nodes_max - held)
