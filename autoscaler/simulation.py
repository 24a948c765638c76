"""What does a policy make of a world?

A market and days of traffic in virtual time, request by request. The policy is the one that runs
live: it is handed a snapshot and answers with a decision, and never learns more than a controller
would. What a market does to it is this module's:

    launch ──► boots (a draw round the mean) ──► ready ──► drained ──► idle: given back
       │ no capacity in the zone: known after launch_fail_s        │
       └ capacity falls at T: notice at T - notice_s, taken at T ◄─┘

Between two moments at which something like that happens, or the policy is asked, the queue runs
alone (`queue_kernel`). What depends on chance is drawn from the world's seed, so a run repeats to
the byte. Before time 0 lies a prelude (see `World`) of which nothing is counted.

At one moment the order is: answers and arrivals; nodes that become ready; capacity that falls;
notices; nodes that close before their reclaim; launches that failed; and last the policy.

It plots nothing and reads no file: `traces` and `report` do.
"""

from __future__ import annotations

import enum
import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscaler import queue_kernel as kernel
from autoscaler.decision import Decision, Drain, Launch, Policy, Stop
from autoscaler.ledger import Entry, Prices, Rental, Run, reservations, summary
from autoscaler.snapshot import (
    SERVICE_EDGES_MS,
    Event,
    EventKind,
    Group,
    MachineType,
    Market,
    Model,
    Node,
    NodeState,
    Replica,
    Resources,
    ServiceCurve,
    Snapshot,
    Traffic,
)
from autoscaler.world import Floats, Ints, Requests, World

__all__ = ["MODEL", "Entry", "Rental", "Run", "simulate", "summary"]

MODEL = "model"
"""The name of the one model of a simulation."""

REPEATED_S = 300.0  # how much of the traffic the prelude repeats
BIN_S = 5.0  # about: bins of arrivals fill the time between two decisions
WAKES_APART_S = 1.0
HALF_LIFE_S = 3600.0  # of measured service times


class _Timer(enum.IntEnum):
    """What a timer can be for, in the order of one moment."""

    READY = 0
    FALL = 1
    NOTICE = 2
    CLOSE = 3
    FAIL = 4


def simulate(world: World, policy: Policy, *, stopwatch: Callable[[], float] | None = None) -> Run:
    """Run `policy` through `world`. `stopwatch` (seconds, any origin) times its decisions.

    Same world, same policy: the same `Run` to the byte, `decide_s` aside. A command for a node
    that is gone is ignored; a launch in a group that the world doesn't have is a KeyError.
    """
    run = _Simulation(world, policy, stopwatch or _no_time)
    run.play()
    return run.result()


def _no_time() -> float:
    return 0.0


@dataclass(slots=True, eq=False)
class _Rented:
    """A node from launch to end, as the market knows it."""

    index: int
    id: str
    group: Group
    start_s: float
    ready_s: float
    expected_s: float
    priority: float  # the lowest are taken first when capacity falls
    slot: int = -1
    state: NodeState = NodeState.STARTING
    is_closed: bool = False
    drained_s: float = 0.0
    reclaim_s: float | None = None
    end_s: float = math.inf
    end_reason: str = "end"

    @property
    def serves(self) -> bool:
        return self.slot >= 0 and self.state is NodeState.READY and not self.is_closed

    def seen(self) -> Node:
        ready_s = self.expected_s if self.state is NodeState.STARTING else self.ready_s
        return Node(self.id, self.group.name, self.state, self.start_s, ready_s, self.reclaim_s)

    def replica(self) -> Replica:
        is_ready = self.state is NodeState.READY
        ready_s = self.expected_s if self.state is NodeState.STARTING else self.ready_s
        return Replica(f"{self.id}/{MODEL}", MODEL, self.id, is_ready, ready_s)


class _Machines:
    """The machine types by number, the fastest first."""

    def __init__(self, world: World) -> None:
        self.names = sorted(world.curves, key=lambda name: world.curves[name].batch_ms(1))
        self.number = {name: k for k, name in enumerate(self.names)}
        profiles = {machine.type.name: machine for machine in world.profile.machines}
        self.profiles = [profiles[name] for name in self.names]
        self.batch_size_max = np.array([p.batch_size_max for p in self.profiles], np.int64)
        self.slow_s = [_slow_s(world, name) for name in self.names]
        # One replica fills a machine, whatever its size.
        self.seen: dict[str, MachineType] = {
            p.type.name: replace(p.type, resources=Resources()) for p in world.profile.machines
        }


def _slow_s(world: World, machine: str) -> float:
    """The 99 % quantile of the time of a request alone."""
    work = world.work[machine]
    alone_s = work.fixed_s + work.variable_s
    return float(np.quantile(alone_s, 0.99)) if len(alone_s) else 0.0


class _Fleet:
    """What is rented, and the slots of the queue that it serves in."""

    def __init__(self, world: World, machines: _Machines, queue: kernel.Queue) -> None:
        self.machines, self.queue = machines, queue
        self.all: list[_Rented] = []
        self.alive: dict[str, _Rented] = {}
        self.draining: dict[str, _Rented] = {}
        self.held: Counter[str] = Counter()
        self._rng = np.random.default_rng([world.seed, 2])
        self._free_slots = list(range(len(queue.slot_node) - 1, -1, -1))
        self._seen: dict[str, tuple[Node, Replica]] = {}
        self._whole: tuple[tuple[Node, ...], tuple[Replica, ...]] | None = None
        self._ready: dict[str, int] | None = None

    def launch(self, group: Group, now_s: float) -> _Rented:
        profile = self.machines.profiles[self.machines.number[group.machine]]
        mean_s = profile.boot_s + profile.load_s
        noise = min(max(float(self._rng.standard_normal()), -2.0), 2.0)
        cold_s = max(mean_s * (1 + profile.type.cold_start_cv * noise), 0.0)
        index = len(self.all)
        node = _Rented(
            index, f"{group.name}#{index}", group, now_s, now_s + cold_s, now_s + mean_s,
            float(self._rng.random()),
        )  # fmt: skip
        self.all.append(node)
        self.alive[node.id] = node
        self.held[group.name] += 1
        self.changed(node)
        return node

    def start_serving(self, node: _Rented) -> None:
        if not self._free_slots:
            size = len(self.queue.slot_node)
            self.queue = kernel.with_more_slots(self.queue)
            self._free_slots = list(range(2 * size - 1, size - 1, -1))
        node.slot, node.state = self._free_slots.pop(), NodeState.READY
        machine = self.machines.number[node.group.machine]
        workers = self.machines.profiles[machine].concurrency
        kernel.occupy(self.queue, node.slot, machine, node.index, workers)
        self.changed(node)

    def drain(self, node: _Rented, now_s: float) -> None:
        """Idle ones end at once, others when `sweep` finds them idle."""
        if node.state is NodeState.DRAINING:
            return
        if node.slot < 0 or self.queue.slot_busy[node.slot] == 0:
            self.end(node, now_s, "drained")
            return
        node.state, node.drained_s = NodeState.DRAINING, now_s
        self.draining[node.id] = node
        self.changed(node)

    def sweep(self) -> None:
        """End the draining nodes that have answered their last request, at that time."""
        for node in list(self.draining.values()):
            if self.queue.slot_busy[node.slot] == 0:
                idle_s = float(self.queue.slot_idle_s[node.slot])
                self.end(node, max(idle_s, node.drained_s), "drained")

    def take(self, node: _Rented, now_s: float) -> None:
        """The market takes a node, and what runs there waits again."""
        if node.slot >= 0:
            busy = int(self.queue.slot_busy[node.slot]) * self.queue.items.shape[1]
            self.queue = kernel.with_room_for_retries(self.queue, busy)
            kernel.kill(self.queue, node.slot)
        self.end(node, now_s, "reclaimed")

    def end(self, node: _Rented, now_s: float, reason: str) -> None:
        node.end_s, node.end_reason = now_s, reason
        if node.slot >= 0:
            self._free_slots.append(node.slot)
        del self.alive[node.id]
        self.draining.pop(node.id, None)
        self.held[node.group.name] -= 1
        self._seen.pop(node.id, None)
        self._whole = self._ready = None

    def changed(self, node: _Rented) -> None:
        self._seen[node.id] = (node.seen(), node.replica())
        self._whole = self._ready = None

    def open(self) -> None:
        """Tell the queue which nodes take requests, the fastest and then the oldest first."""
        serving = [node for node in self.alive.values() if node.serves]
        serving.sort(key=lambda node: (self.machines.number[node.group.machine], node.index))
        kernel.open_slots(self.queue, np.array([node.slot for node in serving], np.int64))

    def seen(self) -> tuple[tuple[Node, ...], tuple[Replica, ...]]:
        if self._whole is None:
            pairs = self._seen.values()
            self._whole = (tuple(node for node, _ in pairs), tuple(copy for _, copy in pairs))
        return self._whole

    def ready(self) -> dict[str, int]:
        if self._ready is None:
            ready = (n.group.name for n in self.alive.values() if n.state is NodeState.READY)
            self._ready = dict(Counter(ready))
        return self._ready


class _Watch:
    """What the edge and the replicas measure, for the snapshots."""

    def __init__(self, world: World, machines: _Machines, before_s: float) -> None:
        self._world, self._machines = world, machines
        self.before_s: float = before_s
        self._is_first = True
        shape = (len(machines.names), len(SERVICE_EDGES_MS) - 1)
        self._counts: NDArray[np.float64] = np.zeros(shape)
        self._curves = dict(world.curves)
        self._prices_row = -2
        self._groups = dict(world.groups)

    def model(self, queue: kernel.Queue, now_s: float) -> Model:
        curves = self._measured(queue, now_s)
        traffic = self._traffic(queue, now_s)
        self.before_s, self._is_first = now_s, False
        return Model(MODEL, self._world.slo, traffic, curves, Resources(), replicas_min=1)

    def groups(self, now_s: float) -> Mapping[str, Group]:
        times = self._world.market.price_t_s
        at_s = max(now_s, 0.0)
        row = -1 if times is None else int(np.searchsorted(times, at_s, side="right")) - 1
        if row != self._prices_row:
            self._prices_row = row
            self._groups = {
                name: _priced(group, self._world.price_usd_h(group, at_s))
                for name, group in self._groups.items()
            }
        return self._groups

    def _measured(self, queue: kernel.Queue, now_s: float) -> Mapping[str, ServiceCurve]:
        self._counts *= 0.5 ** ((now_s - self.before_s) / HALF_LIFE_S)
        for k in np.flatnonzero(queue.served.any(axis=1)):
            self._counts[k] += queue.served[k]
            queue.served[k] = 0.0
        for k in np.flatnonzero(self._counts.any(axis=1)):
            name = self._machines.names[k]
            histogram = tuple(self._counts[k].tolist())
            self._curves[name] = replace(self._curves[name], histogram=histogram)
        return dict(self._curves)

    def _traffic(self, queue: kernel.Queue, now_s: float) -> Traffic:
        counts, elapsed_s = queue.counts, now_s - self.before_s
        ended = int(counts[kernel.ENDED])
        running = int(counts[kernel.RUNNING])
        queued = int(counts[kernel.TAIL] - counts[kernel.HEAD] + counts[kernel.RETRIES])
        bins = 0 if self._is_first else max(round(elapsed_s / BIN_S), 1)
        traffic = Traffic(
            arrivals=_arrivals(queue.arrival_s, self.before_s, now_s, bins),
            bin_s=elapsed_s / bins if bins else BIN_S,
            queued=queued,
            running=running,
            ongoing_mean=float(queue.clock[kernel.AREA]) / elapsed_s if bins else 0.0,
            finished=ended,
            late=int(counts[kernel.LATE]),
            latency_p99_ms=_p99(queue.ended_s[:ended]) * 1e3 if ended else None,
        )
        counts[kernel.ENDED] = counts[kernel.LATE] = 0
        queue.clock[kernel.AREA] = 0.0
        return traffic


def _priced(group: Group, price_usd_h: float) -> Group:
    return group if group.price_usd_h == price_usd_h else replace(group, price_usd_h=price_usd_h)


def _arrivals(arrival_s: Floats, after_s: float, now_s: float, bins: int) -> tuple[float, ...]:
    """Counts in `bins` equal bins of (after_s, now_s]."""
    if not bins:
        return ()
    edges = [after_s + (now_s - after_s) * k / bins for k in range(bins)]
    rows = np.searchsorted(arrival_s, [*edges, now_s], side="right")
    counts: list[float] = np.diff(rows).astype(np.float64).tolist()
    return tuple(counts)


def _p99(values: Floats) -> float:
    k = math.ceil(0.99 * len(values)) - 1
    return float(np.partition(values, k)[k])


def _first(nodes: list[_Rented], count: int) -> list[_Rented]:
    """Those `count` of the nodes (or fewer) that a market takes first."""
    return sorted(nodes, key=lambda node: node.priority)[: max(count, 0)]


class _Simulation:
    def __init__(self, world: World, policy: Policy, stopwatch: Callable[[], float]) -> None:
        self.world, self.policy, self._stopwatch = world, policy, stopwatch
        self.now_s = -world.prelude_s
        self.machines = _Machines(world)
        queue, self._uncounted = _a_queue(world, self.machines)
        self.fleet = _Fleet(world, self.machines, queue)
        self.watch = _Watch(world, self.machines, self.now_s)
        self.events: list[Event] = []
        self.memory: Any = None
        self.journal: list[Entry] = []
        self.decide_s, self.decisions, self.launches_failed = 0.0, 0, 0
        self._decided_s = -math.inf
        self._wake_s: float | None = None
        self._steps = 0
        self._must_open = False
        self._timers: list[tuple[float, _Timer, int, Any]] = []
        self._sequence = 0
        self._foresee_market()

    # -- the clock -----------------------------------------------------------------------------

    def play(self) -> None:
        end_s = self.world.duration_s
        while True:
            ask_s = self._ask_s()
            at_s = min(ask_s, self._timers[0][0] if self._timers else math.inf)
            if at_s >= end_s:
                break
            self._advance(at_s)
            while self._timers and self._timers[0][0] <= at_s:
                _, kind, _, what = heapq.heappop(self._timers)
                self._ring(kind, what)
            self._reopen()
            if self._ask_s() <= at_s:
                self._decide()
        self._finish(end_s)

    def _ask_s(self) -> float:
        """When the policy is asked next."""
        regular_s = -self.world.prelude_s + self._steps * self.policy.interval_s
        if self._wake_s is None:
            return regular_s
        return min(regular_s, max(self._wake_s, self._decided_s + WAKES_APART_S))

    def _advance(self, at_s: float) -> None:
        kernel.advance(self.fleet.queue, float(at_s))
        self.now_s = at_s
        self.fleet.sweep()

    def _finish(self, end_s: float) -> None:
        """No more arrivals: what waits is served by the nodes as they stand."""
        self._advance(end_s)
        for node in self.fleet.alive.values():
            node.end_s = end_s
        kernel.advance(self.fleet.queue, math.inf)

    def _set_timer(self, at_s: float, kind: _Timer, what: Any) -> None:
        self._sequence += 1
        heapq.heappush(self._timers, (at_s, kind, self._sequence, what))

    def _ring(self, kind: _Timer, what: Any) -> None:
        match kind:
            case _Timer.READY:
                self._become_ready(what)
            case _Timer.FALL:
                self._fall(*what)
            case _Timer.NOTICE:
                self._give_notice(*what)
            case _Timer.CLOSE:
                self._close(what)
            case _Timer.FAIL:
                self._learn_of_failure(*what)

    def _reopen(self) -> None:
        if self._must_open:
            self.fleet.open()
            self._must_open = False

    def _tell(self, kind: EventKind, group: Group, count: int, *, wakes: bool = True) -> None:
        self.events.append(Event(kind, group.name, self.now_s, count))
        if wakes and self.policy.is_woken and self._wake_s is None:
            self._wake_s = self.now_s

    # -- the market ----------------------------------------------------------------------------

    def _foresee_market(self) -> None:
        """A timer for each moment at which capacity falls in some zone, and for its notice."""
        market = self.world.market
        spots = [g for g in self.world.groups.values() if g.market is Market.SPOT]
        falls = np.argwhere(np.diff(market.capacity, axis=0) < 0)
        for row, zone in falls:
            at_s, left = float(market.capacity_t_s[row + 1]), int(market.capacity[row + 1, zone])
            for group in spots if at_s > 0 else ():
                if group.zone != market.zones[zone]:
                    continue
                self._set_timer(at_s, _Timer.FALL, (group, left))
                if group.notice_s > 0:
                    notice_s = max(at_s - group.notice_s, -self.world.prelude_s)
                    self._set_timer(notice_s, _Timer.NOTICE, (group, left, at_s))

    def _become_ready(self, node: _Rented) -> None:
        if node.end_s == math.inf:
            self.fleet.start_serving(node)
            self._must_open = True

    def _fall(self, group: Group, left: int) -> None:
        """Capacity fell: those that were told of it die, and whoever is above it still."""
        nodes = self._of(group)
        told = [n for n in nodes if n.reclaim_s is not None and n.reclaim_s <= self.now_s]
        victims = told + _first([n for n in nodes if n not in told], len(nodes) - len(told) - left)
        for node in victims:
            self.fleet.take(node, self.now_s)
            self._must_open = True
        if victims:
            self._tell(EventKind.RECLAIMED, group, len(victims))

    def _give_notice(self, group: Group, left: int, at_s: float) -> None:
        untold = [n for n in self._of(group) if n.reclaim_s is None]
        victims = _first(untold, len(untold) - left)
        slow_s = self.machines.slow_s[self.machines.number[group.machine]]
        close_s = at_s - min(slow_s, group.notice_s / 2)
        for node in victims:
            node.reclaim_s = at_s
            self.fleet.changed(node)
            self._set_timer(max(close_s, self.now_s), _Timer.CLOSE, node)
        if victims:
            self._tell(EventKind.NOTICED, group, len(victims))

    def _close(self, node: _Rented) -> None:
        node.is_closed = True
        self._must_open = True

    def _of(self, group: Group) -> list[_Rented]:
        return [n for n in self.fleet.alive.values() if n.group.name == group.name]

    # -- the policy ----------------------------------------------------------------------------

    def _decide(self) -> None:
        if -self.world.prelude_s + self._steps * self.policy.interval_s <= self.now_s:
            self._steps += 1
        self._wake_s, self._decided_s = None, self.now_s
        snapshot = self._observe()
        began_s = self._stopwatch()
        decision = self.policy.decide(snapshot, self.memory)
        self.decide_s += self._stopwatch() - began_s
        self.decisions += 1
        self.memory = decision.memory
        self._note(snapshot, decision)
        self._perform(decision)

    def _observe(self) -> Snapshot:
        nodes, replicas = self.fleet.seen()
        events, self.events = tuple(self.events), []
        return Snapshot(
            now_s=self.now_s,
            machines=self.machines.seen,
            groups=self.watch.groups(self.now_s),
            nodes=nodes,
            models=(self.watch.model(self.fleet.queue, self.now_s),),
            replicas=replicas,
            events=events,
        )

    def _note(self, snapshot: Snapshot, decision: Decision[Any]) -> None:
        traffic = snapshot.models[0].traffic
        self.journal.append(
            Entry(
                self.now_s, decision.wanted, decision.groups, decision.commands, decision.reason,
                decision.because, decision.rejected, decision.expected, traffic.rate_rps,
                traffic.queued, self.fleet.ready(),
            )
        )  # fmt: skip

    def _perform(self, decision: Decision[Any]) -> None:
        for command in decision.commands:
            match command:
                case Launch(group, count):
                    self._launch(self.world.groups[group], count)
                case Drain(node) | Stop(node):
                    self._give_back(node, isinstance(command, Stop))
        self._reopen()

    def _launch(self, group: Group, count: int) -> None:
        given = min(count, self._room(group))
        for _ in range(given):
            node = self.fleet.launch(group, self.now_s)
            self._set_timer(node.ready_s, _Timer.READY, node)
        if given > 0:
            self._tell(EventKind.LAUNCHED, group, given, wakes=False)
        if count > given:
            known_s = self.now_s + self.world.profile.launch_fail_s
            self._set_timer(known_s, _Timer.FAIL, (group, count - given))

    def _room(self, group: Group) -> int:
        """How many more nodes the group would give now."""
        limits = [] if group.nodes_max is None else [group.nodes_max]
        if group.market is Market.SPOT:
            zone = self.world.market.zones.index(group.zone)
            limits.append(int(self.world.capacity_at(max(self.now_s, 0.0))[zone]))
        held = self.fleet.held[group.name]
        return max(min(limits) - held, 0) if limits else 1 << 30

    def _learn_of_failure(self, group: Group, count: int) -> None:
        if self.now_s >= 0:
            self.launches_failed += count
        self._tell(EventKind.LAUNCH_FAILED, group, count)

    def _give_back(self, name: str, is_stop: bool) -> None:
        node = self.fleet.alive.get(name)
        if node is None:
            return
        self._must_open = self._must_open or node.serves
        if is_stop and node.state is NodeState.STARTING:
            self.fleet.end(node, self.now_s, "stopped")
        else:
            self.fleet.drain(node, self.now_s)

    # -- what is left --------------------------------------------------------------------------

    def result(self) -> Run:
        rentals = [node for node in self.fleet.all if node.end_s > 0]
        row = np.full(len(self.fleet.all) + 1, -1, np.int32)  # the last one for node -1
        row[[node.index for node in rentals]] = np.arange(len(rentals))
        queue, first = self.fleet.queue, self._uncounted
        prices = Prices(self.world)
        return Run(
            policy=self.policy.name,
            world=self.world,
            arrival_s=queue.arrival_s[first:],
            start_s=queue.start_s[first:],
            finish_s=queue.finish_s[first:],
            node=row[queue.node[first:]],
            ok=queue.ok[first:],
            ledger=(*(_entered(node, prices) for node in rentals), *reservations(self.world)),
            journal=tuple(self.journal),
            launches_failed=self.launches_failed,
            decide_s=self.decide_s,
            decisions=self.decisions,
        )


def _entered(node: _Rented, prices: Prices) -> Rental:
    group, start_s = node.group, max(node.start_s, 0.0)
    return Rental(
        node.id, group.name, group.machine, group.market.value, group.zone, start_s,
        max(node.ready_s, 0.0), node.end_s, node.end_reason,
        prices.cost_usd(group, start_s, node.end_s),
    )  # fmt: skip


def _a_queue(world: World, machines: _Machines) -> tuple[kernel.Queue, int]:
    """The queue of all requests, and how many of them belong to the prelude."""
    which, arrival_s = _prelude(world.requests, world.prelude_s, world.seed)
    order = np.concatenate([which, np.arange(len(world.requests.arrival_s))])
    work = [world.work[name] for name in machines.names]
    queue = kernel.a_queue(
        np.concatenate([arrival_s, world.requests.arrival_s]),
        np.stack([w.fixed_s[order] for w in work]),
        np.stack([w.variable_s[order] for w in work]),
        batch_size_max=machines.batch_size_max,
        workers_max=max(p.concurrency for p in machines.profiles),
        deadline_s=world.deadline_s,
        slo_s=world.slo.latency_ms / 1e3,
        now_s=-world.prelude_s,
    )
    return queue, len(which)


def _prelude(requests: Requests, prelude_s: float, seed: int) -> tuple[Ints, Floats]:
    """Which requests arrive when before 0: those of the first minutes, again and again, at random
    times. So their mean rate is that of the first minutes, and steady: what a trace does in its
    first minutes is done once, after 0.
    """
    window_s = min(REPEATED_S, requests.duration_s)
    count = int(np.searchsorted(requests.arrival_s, window_s))
    whole = math.ceil(count * prelude_s / window_s) if window_s > 0 else 0
    rng = np.random.default_rng([seed, 3])
    arrival_s = np.sort(rng.uniform(-prelude_s, 0.0, whole))
    return np.arange(whole) % max(count, 1), arrival_s
