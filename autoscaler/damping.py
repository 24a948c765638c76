"""How fast may the cluster follow a wish, and which node goes first?

`queueing` says how many replicas a model would like right now. Right now is noisy, so a wish is let
through only after it has pointed the same way for a whole delay: short on the way up, because
waiting requests cost more than an idle replica, long on the way down, because a cold start costs
more still.

    wish     5 5 5 5 2 2 5 2 2 3 2 2 2 2      delay_up_s = 0, hold_down_s = 30
    allowed  5 5 5 5 5 5 5 5 5 5 3 3 3 2      one column is 10 s

That is a sliding maximum over the hold of a sliding minimum over the delay, both exact: on the way
down it steps to what was still wanted, and it turns no more often than the wish does. How long a
hold pays is a ski rental problem; `break_even_hold_s` is its answer.

When nodes must go, those go first that would be missed least: the ones that leave anyway, then
those that serve nobody yet, then those with the fewest replicas; and not too many at once.

Time arrives as an argument, and the memory between two calls is a value that the caller keeps. How
many nodes are too many is not decided here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from autoscaler.decision import Drain, Stop
from autoscaler.snapshot import Group, MachineType, Node, NodeState, Replica


@dataclass(frozen=True, slots=True)
class DampingSettings:
    """`delay_up_s`: for how long more must have been wanted before more is allowed.
    `drain_fraction_max`: the share of the ready nodes that may be draining at a time.
    """

    delay_up_s: float = 0.0
    drain_fraction_max: float = 0.25


class _Past(NamedTuple):
    """A value that was in force, and until when."""

    until_s: float
    value: int


class _Track(NamedTuple):
    """One model's wish, what the delay made of it, and the past that may still matter."""

    wanted: int
    raised: int
    lows: tuple[_Past, ...]
    highs: tuple[_Past, ...]


@dataclass(frozen=True)
class DampingMemory:
    """What was wanted lately; a new one holds nothing down. Only this module looks inside."""

    tracks: Mapping[str, _Track] = field(default_factory=dict)


def damped(
    memory: DampingMemory,
    wanted: Mapping[str, int],
    now_s: float,
    settings: DampingSettings,
    hold_down_s: Mapping[str, float] | float,
) -> tuple[DampingMemory, dict[str, int]]:
    """The memory from now on, and how many replicas each model may have.

    `hold_down_s`: by model (none named: 0), or one for all. With `delay_up_s` = 0 no model gets
    less than it wants. A model that isn't wanted any more is forgotten, and a new one gets its
    wish. Amortised constant time a model, but for the steps of a staircase within one hold.
    """
    tracks: dict[str, _Track] = {}
    allowed: dict[str, int] = {}
    for model, wish in wanted.items():
        hold_s = hold_down_s.get(model, 0.0) if isinstance(hold_down_s, Mapping) else hold_down_s
        track = _moved_on(memory.tracks.get(model), wish, now_s, settings.delay_up_s, hold_s)
        tracks[model] = track
        allowed[model] = max(track.raised, track.highs[0].value) if track.highs else track.raised
    return DampingMemory(tracks), allowed


def _moved_on(
    track: _Track | None, wish: int, now_s: float, delay_s: float, hold_s: float
) -> _Track:
    if track is None:
        return _Track(wish, wish, (), ())
    lows = _window(track.lows, track.wanted, now_s, delay_s, sign=-1) if delay_s > 0 else ()
    raised = min(wish, lows[0].value) if lows else wish
    highs = _window(track.highs, track.raised, now_s, hold_s, sign=1)
    return _Track(wish, raised, lows, highs)


def _window(
    past: tuple[_Past, ...], ended: int, now_s: float, length_s: float, sign: int
) -> tuple[_Past, ...]:
    """The past that may still be an extreme, its extreme first, once `ended` has ended now.

    A monotone queue: what is older and no more extreme than a later value never matters again.
    """
    begin, end = 0, len(past)
    while begin < end and past[begin].until_s <= now_s - length_s:
        begin += 1
    while begin < end and sign * past[end - 1].value <= sign * ended:
        end -= 1
    return (*past[begin:end], _Past(now_s, ended)) if length_s > 0 else ()


def break_even_hold_s(
    price_usd_h: float,
    cold_start_s: float,
    harm_usd: float,
    return_rate_per_h: float | None = None,
    trust: float = 0.5,
) -> float:
    """For how long to keep an idle node: until idling has cost what launching it again would.

    Launching again costs the cold start at the node's price, and `harm_usd` for being short
    meanwhile. Holding for that long never costs more than twice what one who knows the future
    pays, the best that is possible without chance or forecasts (ski rental; Karlin, Manasse,
    Rudolph and Sleator 1988, "Competitive snoopy caching").

    With `return_rate_per_h`, how often demand is expected to come back, the hold is divided by
    `trust` (0 < trust ≤ 1) if that is before the break-even and multiplied by it if not: never
    worse than 1 + 1/trust times the optimum, and 1 + trust where the forecast is right (Purohit,
    Svitkina and Kumar 2018, "Improving online algorithms via ML predictions"). Infinite for a node
    that costs nothing.
    """
    if price_usd_h <= 0:
        return math.inf
    hold_s = cold_start_s + harm_usd / price_usd_h * 3600.0
    if return_rate_per_h is None:
        return hold_s
    returns_in_time = return_rate_per_h * hold_s > 3600.0
    return hold_s / trust if returns_in_time else hold_s * trust


def scale_in(
    nodes: Sequence[Node],
    replicas: Sequence[Replica],
    surplus: Mapping[str, int],
    now_s: float,
    groups: Mapping[str, Group],
    machines: Mapping[str, MachineType],
    settings: DampingSettings,
) -> tuple[Stop | Drain, ...]:
    """Which nodes to give back, the first to go first.

    `surplus`: by group, how many of its nodes that aren't draining yet are too many. In this order:
    nodes with a notice, then starting ones (the one that is furthest from ready first), then those
    with the fewest replicas, with the least paid time left, the youngest. No running node goes
    while a starting one of its group could.

    At most `drain_fraction_max` of the ready nodes drain at a time, but at least one may: what the
    budget leaves waits for the next decision. Nodes with a notice don't count, nor starting ones.
    """
    on_node = Counter(replica.node for replica in replicas)
    going = [n for n in nodes if surplus.get(n.group, 0) > 0 and n.state is not NodeState.DRAINING]
    machine_of = {name: machines[groups[name].machine] for name in {n.group for n in going}}
    going.sort(key=lambda n: _rank(n, on_node.get(n.id, 0), machine_of[n.group], now_s))
    budget = _drain_budget(nodes, settings.drain_fraction_max)
    left = dict(surplus)
    commands: list[Stop | Drain] = []
    for node in going:
        is_free = node.reclaim_s is not None or node.state is NodeState.STARTING
        if left[node.group] <= 0 or (budget <= 0 and not is_free):
            continue
        left[node.group] -= 1
        budget -= not is_free
        commands.append(Stop(node.id) if node.state is NodeState.STARTING else Drain(node.id))
    return tuple(commands)


def _drain_budget(nodes: Sequence[Node], fraction_max: float) -> int:
    """How many more nodes may begin to drain."""
    draining = sum(n.state is NodeState.DRAINING for n in nodes if n.reclaim_s is None)
    base = draining + sum(n.state is NodeState.READY for n in nodes if n.reclaim_s is None)
    return max(1, math.floor(fraction_max * base + 1e-9)) - draining


def _rank(
    node: Node, replicas: int, machine: MachineType, now_s: float
) -> tuple[float, float, float, float, str]:
    """Lower goes first."""
    if node.reclaim_s is not None:
        return (0, node.reclaim_s, 0, 0, node.id)
    if node.state is NodeState.STARTING:
        return (1, -node.ready_s, 0, -node.started_s, node.id)
    return (2, replicas, _paid_s(node, machine, now_s), -node.started_s, node.id)


def _paid_s(node: Node, machine: MachineType, now_s: float) -> float:
    """For how much longer the node is paid for already; 0 where nobody pays ahead by more than a
    minute.
    """
    step_s, least_s = machine.billing_increment_s, machine.billing_minimum_s
    if step_s <= 60.0 and least_s <= 60.0:
        return 0.0
    age_s = max(now_s - node.started_s, 0.0)
    steps = math.ceil(age_s / step_s) * step_s if step_s > 60.0 else age_s
    return max(steps, least_s) - age_s
