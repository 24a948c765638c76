"""When does each request start, on which node, and when is it answered?

One queue at the edge, first come first served, and nodes with some workers each, between two
moments at which anything else changes (a node comes or goes). A worker that becomes free takes up
to a full batch from the head; a request that meets free workers starts at once, on the fastest
machine type, there on the node with the fewest busy workers, there on the one rented first.

    retries (a heap) ─┐
                      ├─► workers (a heap by the time at which each is free) ─► finished
    [head, tail) ─────┘
        of the requests, in order of arrival

Requests are numbers in order of arrival, and time limits are the same for all, so those that never
started are one range of numbers: nothing is stored for a request that waits. What was started and
lost with its node is older than all of that range, so a small heap before it keeps the order.

Compiled, on arrays that the caller owns, because a simulated month has a hundred million steps.
No fast-math: the same bytes on every machine. It knows no market, no price and no policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

from autoscaler.snapshot import SERVICE_EDGES_MS
from autoscaler.world import Floats, Ints

F = TypeVar("F", bound=Callable[..., Any])

HEAD, TAIL, RETRIES, WORKING, RUNNING, FREE, OPEN, ENDED, LATE = range(9)
"""What `Queue.counts` holds: the range that waits, how many wait to be retried, how many workers
and requests are busy, free workers and how many nodes are open, and of the requests that ended
since the caller set both to 0: how many, and how many late or given up.
"""
NOW, UNTIL, AREA = range(3)
"""What `Queue.clock` holds: the time, where this step ends, ∫ requests waiting or running dt."""


def compiled(function: F) -> F:
    """`function` as machine code, kept on disk between runs."""
    return cast("F", njit(cache=True)(function))


class Queue(NamedTuple):
    """All state of the queue. n requests, m machine types, s slots for nodes, w workers a slot at
    most, b requests a batch at most. Worker k belongs to slot k // w.
    """

    arrival_s: Floats  # n, sorted
    fixed_s: Floats  # m × n
    variable_s: Floats  # m × n
    start_s: Floats  # n; NaN: not started
    finish_s: Floats  # n; NaN: not ended
    node: NDArray[np.int32]  # n; -1: none
    ok: NDArray[np.bool_]  # n
    batch_size_max: Ints  # m
    slot_machine: Ints  # s
    slot_node: Ints  # s
    slot_workers: Ints  # s
    slot_busy: Ints  # s
    slot_open: NDArray[np.bool_]  # s: takes new requests
    slot_idle_s: Floats  # s: when its last batch finished
    free: Ints  # s × w: a stack of free workers, of height slot_workers - slot_busy
    items: Ints  # (s · w) × b: what each worker works on
    sizes: Ints  # s · w
    heap_s: Floats  # s · w: when the working workers are free, a binary heap
    heap_worker: Ints  # s · w
    order: Ints  # s: open slots, best machine first, then the oldest node
    retries: Ints  # a binary heap of requests
    ended_s: Floats  # n: latencies of what ended since the caller set ENDED to 0
    served: Floats  # m × bins: how many requests were served in which time
    edges_s: Floats  # bins + 1
    limits_s: Floats  # deadline, SLO
    counts: Ints
    clock: Floats


def a_queue(
    arrival_s: Floats,
    fixed_s: Floats,
    variable_s: Floats,
    *,
    batch_size_max: Ints,
    workers_max: int,
    deadline_s: float,
    slo_s: float,
    now_s: float,
    slots: int = 32,
) -> Queue:
    """An empty queue before its first request. `fixed_s` and `variable_s`: machines × requests."""
    n, m, workers = len(arrival_s), len(batch_size_max), slots * workers_max
    return Queue(
        arrival_s, fixed_s, variable_s,
        start_s=np.full(n, np.nan), finish_s=np.full(n, np.nan),
        node=np.full(n, -1, np.int32), ok=np.zeros(n, np.bool_),
        batch_size_max=batch_size_max,
        slot_machine=_ints(slots), slot_node=_ints(slots), slot_workers=_ints(slots),
        slot_busy=_ints(slots), slot_open=np.zeros(slots, np.bool_), slot_idle_s=np.zeros(slots),
        free=np.zeros((slots, workers_max), np.int64),
        items=np.zeros((workers, int(batch_size_max.max())), np.int64), sizes=_ints(workers),
        heap_s=np.zeros(workers), heap_worker=_ints(workers), order=_ints(slots),
        retries=_ints(64), ended_s=np.zeros(n + 1),
        served=np.zeros((m, len(SERVICE_EDGES_MS) - 1)),
        edges_s=np.array(SERVICE_EDGES_MS) / 1e3, limits_s=np.array([deadline_s, slo_s]),
        counts=_ints(9), clock=np.array([now_s, now_s, 0.0]),
    )  # fmt: skip


PER_SLOT = (
    "slot_machine", "slot_node", "slot_workers", "slot_busy", "slot_open", "slot_idle_s", "free",
    "items", "sizes", "heap_s", "heap_worker", "order",
)  # fmt: skip


def _ints(size: int) -> Ints:
    return np.zeros(size, np.int64)


def with_more_slots(queue: Queue) -> Queue:
    """The same queue with twice as many slots; slots and workers keep their numbers."""
    return queue._replace(**{name: _twice(getattr(queue, name)) for name in PER_SLOT})


def with_room_for_retries(queue: Queue, more: int) -> Queue:
    """The same queue, with place for `more` requests to be retried."""
    retries = queue.retries
    while len(retries) < int(queue.counts[RETRIES]) + more:
        retries = _twice(retries)
    return queue if retries is queue.retries else queue._replace(retries=retries)


def _twice(array: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([array, np.zeros_like(array)])


def occupy(queue: Queue, slot: int, machine: int, node: int, workers: int) -> None:
    """Put a node with so many free workers into an empty slot; it is not open yet."""
    width = queue.free.shape[1]
    queue.slot_machine[slot], queue.slot_node[slot] = machine, node
    queue.slot_workers[slot], queue.slot_busy[slot] = workers, 0
    queue.slot_idle_s[slot] = queue.clock[NOW]
    queue.free[slot, :workers] = np.arange(slot * width + workers - 1, slot * width - 1, -1)


@compiled
def open_slots(queue: Queue, slots: Ints) -> None:
    """Exactly these slots take new requests from now on; in order of preference."""
    queue.slot_open[:] = False
    queue.counts[FREE] = 0
    queue.counts[OPEN] = len(slots)
    for k, slot in enumerate(slots):
        queue.order[k] = slot
        queue.slot_open[slot] = True
        queue.counts[FREE] += queue.slot_workers[slot] - queue.slot_busy[slot]
    _start_waiting(queue, queue.clock[NOW])


@compiled
def advance(queue: Queue, until_s: float) -> None:
    """Let time pass to `until_s` (infinity: until all is answered or given up), inclusive."""
    arrival_s, counts, clock = queue.arrival_s, queue.counts, queue.clock
    clock[AREA] += (until_s - clock[NOW]) * (counts[RUNNING] + _waiting(counts))
    clock[UNTIL] = until_s
    while True:
        finish_s = queue.heap_s[0] if counts[WORKING] > 0 else np.inf
        tail = counts[TAIL]
        next_s = arrival_s[tail] if tail < len(arrival_s) else np.inf
        if finish_s <= next_s:
            if finish_s > until_s or finish_s == np.inf:
                break
            _finish_first(queue)
        else:
            if next_s > until_s:
                break
            counts[TAIL] += 1
            clock[AREA] += until_s - next_s
            if counts[FREE] > 0:
                _start_waiting(queue, next_s)
    _give_up(queue, until_s)
    clock[NOW] = until_s


@compiled
def kill(queue: Queue, slot: int) -> None:
    """The node in `slot` is gone: what ran there waits again, before all that came later."""
    counts, now_s, width = queue.counts, queue.clock[NOW], queue.free.shape[1]
    kept = 0
    for k in range(counts[WORKING]):
        worker = queue.heap_worker[k]
        if worker // width != slot:
            queue.heap_s[kept], queue.heap_worker[kept] = queue.heap_s[k], worker
            kept += 1
            continue
        counts[RUNNING] -= queue.sizes[worker]
        for j in range(queue.sizes[worker]):
            _put_back(queue, queue.items[worker, j], now_s)
    counts[WORKING] = kept
    for k in range(kept // 2 - 1, -1, -1):
        _sink_worker(queue.heap_s, queue.heap_worker, k, kept)
    queue.slot_busy[slot] = 0


@compiled
def _waiting(counts: Ints) -> Any:
    return counts[TAIL] - counts[HEAD] + counts[RETRIES]


@compiled
def _put_back(queue: Queue, request: int, now_s: float) -> None:
    queue.start_s[request] = np.nan
    queue.node[request] = -1
    if queue.arrival_s[request] + queue.limits_s[0] < now_s:
        _end(queue, request, now_s, False)
        return
    heap, k = queue.retries, queue.counts[RETRIES]
    queue.counts[RETRIES] += 1
    while k > 0 and heap[(k - 1) // 2] > request:
        heap[k] = heap[(k - 1) // 2]
        k = (k - 1) // 2
    heap[k] = request


@compiled
def _pop(queue: Queue) -> Any:
    """The oldest request that waits, out of the queue."""
    counts, heap = queue.counts, queue.retries
    if counts[RETRIES] == 0:
        counts[HEAD] += 1
        return counts[HEAD] - 1
    first = heap[0]
    counts[RETRIES] -= 1
    size = counts[RETRIES]
    last, k = heap[size], 0
    while 2 * k + 1 < size:
        child = 2 * k + 1
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= last:
            break
        heap[k] = heap[child]
        k = child
    heap[k] = last
    return first


@compiled
def _give_up(queue: Queue, now_s: float) -> None:
    """End all that has waited beyond its deadline, at that deadline."""
    counts, deadline_s = queue.counts, queue.limits_s[0]
    while _waiting(counts) > 0:
        oldest = queue.retries[0] if counts[RETRIES] > 0 else counts[HEAD]
        at_s = queue.arrival_s[oldest] + deadline_s
        if at_s >= now_s:
            break
        _end(queue, _pop(queue), at_s, False)


@compiled
def _end(queue: Queue, request: int, at_s: float, ok: bool) -> None:
    latency_s = at_s - queue.arrival_s[request]
    queue.finish_s[request] = at_s
    queue.ok[request] = ok
    queue.ended_s[queue.counts[ENDED]] = latency_s
    queue.counts[ENDED] += 1
    if not ok or latency_s > queue.limits_s[1]:
        queue.counts[LATE] += 1
    queue.clock[AREA] -= queue.clock[UNTIL] - at_s


@compiled
def _start_waiting(queue: Queue, now_s: float) -> None:
    """Put free workers to work, best first, while anything waits."""
    _give_up(queue, now_s)
    while queue.counts[FREE] > 0 and _waiting(queue.counts) > 0:
        _start(queue, _best_slot(queue), now_s)


@compiled
def _best_slot(queue: Queue) -> Any:
    best, least = -1, np.int64(1 << 60)
    for k in range(queue.counts[OPEN]):
        slot = queue.order[k]
        if best >= 0 and queue.slot_machine[slot] != queue.slot_machine[best]:
            break
        busy = queue.slot_busy[slot]
        if busy < queue.slot_workers[slot] and busy < least:
            best, least = slot, busy
            if busy == 0:
                break
    return best


@compiled
def _start(queue: Queue, slot: int, now_s: float) -> None:
    """A free worker of `slot` takes a batch from the head of the queue."""
    counts, machine = queue.counts, queue.slot_machine[slot]
    worker = queue.free[slot, queue.slot_workers[slot] - queue.slot_busy[slot] - 1]
    size = min(queue.batch_size_max[machine], _waiting(counts))
    fixed_s, variable_s = 0.0, 0.0
    for j in range(size):
        request = _pop(queue)
        queue.items[worker, j] = request
        queue.start_s[request] = now_s
        queue.node[request] = queue.slot_node[slot]
        fixed_s += queue.fixed_s[machine, request]
        variable_s += queue.variable_s[machine, request]
    queue.sizes[worker] = size
    queue.slot_busy[slot] += 1
    counts[FREE] -= 1
    counts[RUNNING] += size
    _push_worker(queue, worker, now_s + fixed_s / size + variable_s)


@compiled
def _finish_first(queue: Queue) -> None:
    """The worker that is free next answers its batch, and takes another one if any waits."""
    counts, worker, now_s = queue.counts, queue.heap_worker[0], queue.heap_s[0]
    slot = worker // queue.free.shape[1]
    size = queue.sizes[worker]
    counts[WORKING] -= 1
    last = counts[WORKING]
    queue.heap_s[0], queue.heap_worker[0] = queue.heap_s[last], queue.heap_worker[last]
    _sink_worker(queue.heap_s, queue.heap_worker, 0, last)
    _count_served(
        queue, queue.slot_machine[slot], now_s - queue.start_s[queue.items[worker, 0]], size
    )
    for j in range(size):
        _end(queue, queue.items[worker, j], now_s, True)
    counts[RUNNING] -= size
    queue.slot_busy[slot] -= 1
    queue.slot_idle_s[slot] = now_s
    queue.free[slot, queue.slot_workers[slot] - queue.slot_busy[slot] - 1] = worker
    if queue.slot_open[slot]:
        counts[FREE] += 1
        _give_up(queue, now_s)
        if _waiting(counts) > 0:
            _start(queue, slot, now_s)


@compiled
def _count_served(queue: Queue, machine: int, service_s: float, size: int) -> None:
    edges_s = queue.edges_s
    at = int(np.searchsorted(edges_s, service_s, side="right")) - 1
    queue.served[machine, min(max(at, 0), len(edges_s) - 2)] += size


@compiled
def _push_worker(queue: Queue, worker: int, free_s: float) -> None:
    heap_s, heap_worker, k = queue.heap_s, queue.heap_worker, queue.counts[WORKING]
    queue.counts[WORKING] += 1
    while k > 0:
        parent = (k - 1) // 2
        if heap_s[parent] <= free_s:
            break
        heap_s[k], heap_worker[k] = heap_s[parent], heap_worker[parent]
        k = parent
    heap_s[k], heap_worker[k] = free_s, worker


@compiled
def _sink_worker(heap_s: Floats, heap_worker: Ints, k: int, size: int) -> None:
    free_s, worker = heap_s[k], heap_worker[k]
    while 2 * k + 1 < size:
        child = 2 * k + 1
        if child + 1 < size and heap_s[child + 1] < heap_s[child]:
            child += 1
        if heap_s[child] >= free_s:
            break
        heap_s[k], heap_worker[k] = heap_s[child], heap_worker[child]
        k = child
    heap_s[k], heap_worker[k] = free_s, worker
