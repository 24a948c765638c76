"""Which waiting requests run together, and when?

A model answers 32 rows for little more than the price of one, so callers that are there at the
same time share a run. Who is "at the same time" is the question: waiting costs the lone caller,
not waiting costs everybody else.

    16 callers, each sends its next request when it has its answer       time ─►
    run at once       [1][15           ][1][15           ]    two runs for 16 rows
    wait for others   [16             ] · [16             ] ·    · = a moment's wait

`Closing` decides. It remembers how many requests were in the system when the last batch ended:
those callers are likely to come back together, so a free worker waits for that many, but never
longer than half a small batch takes to run, nor than `wait_max_ms`. One caller alone is never kept
waiting. It takes numbers and gives numbers; time is an argument.

`Batcher` is the shell around it: it takes callers on one event loop, keeps those with equal names,
types and trailing shapes in one line (`_Line`), serves the lines in turn, and hands batches to a
worker thread. A model that answers faster than a thread wakes up (`Pace` measures) runs on the
event loop itself, and a very fast one within the caller's own step.

    submit ─► line ─► Closing: now? ─► batch ─► worker: join, predict, split ─► each caller's rows

A batch of several callers that fails is run again one caller at a time, so a bad row is an error
for its own caller only. Nothing here knows what a model is, or a protocol.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np

from deployments.inference import Fault, InferenceError, InferenceRequest, Statistics, Tensors

logger = logging.getLogger(__name__)

Predict = Callable[[Tensors], Tensors]
Clock = Callable[[], float]
LineKey = tuple[tuple[str, Any, tuple[int, ...]], ...]
Outcome = Tensors | InferenceError

WAIT_SERVICE_FRACTION = 0.5
"""The share of a small batch's run that a free worker may spend on waiting for more callers."""

_INLINE_S = 200e-6  # below this a thread hop costs more than the run
_DIRECT_S = 25e-6  # below this even a future costs more than what batching could save
_POLL_S = 1e-3  # timers are coarser than this; shorter waits go round the event loop instead
_LINES_MAX = 256  # lines whose expectation is remembered while nobody stands in them
_TRACEBACKS_MAX = 100  # distinct failures whose traceback is logged

NOT_RUN = InferenceError(Fault.INTERNAL, "the batch was not run")
"""What a piece of a batch holds until its batch has run."""


class Closing:
    """When the requests waiting in one line are closed into a batch.

    Asked only while a worker is free. `expected` is how many requests were in the system when the
    line's last batch ended. After a wait that brought nobody the next ones are skipped, twice as
    many each time.
    """

    __slots__ = (
        "_misses",
        "_present",
        "_rows_max",
        "_since_s",
        "_skips",
        "_wait_max_s",
        "expected",
    )

    def __init__(self, rows_max: int, wait_max_s: float) -> None:
        self.expected = 1
        self._rows_max = rows_max
        self._wait_max_s = wait_max_s
        self._since_s: float | None = None
        self._present = 0
        self._misses = 0
        self._skips = 0

    def wait_s(self, now_s: float, present: int, rows: int, service_s: float) -> float:
        """How long to wait for more callers; 0 = close now.

        `present` counts requests (waiting here, or running in another worker), `rows` those that
        wait; `service_s` is what a small batch takes.
        """
        if present >= self.expected or rows >= self._rows_max:
            return 0.0
        if self._skips:
            self._skips -= 1
            return 0.0
        if self._since_s is None:
            self._since_s, self._present = now_s, present
        limit_s = min(self._wait_max_s, service_s * WAIT_SERVICE_FRACTION)
        left_s = self._since_s + limit_s - now_s
        if left_s > 0:
            return left_s
        self._give_up(present)
        return 0.0

    def closed(self) -> None:
        """A batch was taken from the line; the next wait begins anew."""
        self._since_s = None

    def ended(self, in_system: int) -> None:
        """A batch ended; `in_system` requests were running or waiting until then."""
        self.expected = max(1, in_system)

    def _give_up(self, present: int) -> None:
        self.expected = max(1, present)
        self._misses = min(6, self._misses + 1) if present <= self._present else 0
        self._skips = 2**self._misses - 1


class Pace:
    """How long runs of about one size take, and whether they are short enough for the event loop.

    A run in a worker thread also waits for the interpreter's lock, so a busy event loop makes a
    fast model look slow there. Such a model shows itself by the thread's own CPU time, together
    with a wall time that was short at least once. A few such runs earn a place on the event loop;
    the first slow run there loses it, for longer each time.
    """

    __slots__ = ("_best_s", "_probation", "_runs", "_sentence", "service_s")

    def __init__(self) -> None:
        self.service_s = 0.0
        self._best_s = float("inf")
        self._runs = 0
        self._probation = 3
        self._sentence = 16.0

    @property
    def is_known(self) -> bool:
        """Whether a run of this size has been measured."""
        return self._runs > 0

    @property
    def is_inline(self) -> bool:
        """Whether a run belongs on the event loop."""
        return self._probation <= 0

    @property
    def is_direct(self) -> bool:
        """Whether a run is so short that not even a turn of the event loop is worth it."""
        return self._probation <= 0 and self.service_s < _DIRECT_S

    def ran_in_thread(self, wall_s: float, cpu_s: float) -> None:
        """A run in a worker thread took `wall_s`, of which the thread computed `cpu_s`."""
        self._measured(wall_s)
        if cpu_s < _INLINE_S and self._best_s < _INLINE_S:
            self._probation -= 1
        else:
            self._probation = max(self._probation, 3)

    def ran_inline(self, wall_s: float) -> None:
        """A run on the event loop took `wall_s`."""
        self._measured(wall_s)
        if wall_s >= _INLINE_S:
            self.failed()
        elif self._sentence > 16.0:
            self._sentence *= 0.99

    def failed(self) -> None:
        """A run on the event loop was slow or raised: back to the thread."""
        self._probation = int(self._sentence)
        self._sentence = min(4096.0, self._sentence * 2)

    def _measured(self, wall_s: float) -> None:
        self._best_s = min(self._best_s, wall_s)
        self._runs += 1
        if self._runs == 1:
            self.service_s = wall_s
        elif self._runs <= 4:  # the first runs of a model are slow for reasons that pass
            self.service_s = min(self.service_s, wall_s)
        else:
            self.service_s += 0.2 * (wall_s - self.service_s)


class Workers(Protocol):
    """Where batches run off the event loop: `count` at a time, each `work` followed by `done`."""

    count: int

    def start(self, work: Callable[[], None], done: Callable[[], None]) -> None:
        """Run `work` elsewhere, then `done` on the event loop that called."""
        ...

    def close(self) -> None:
        """No more work will come."""
        ...


class Threads:
    """Worker threads that don't keep the process alive."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._tasks: SimpleQueue[tuple[Callable[[], None], Callable[[], None], Any] | None]
        self._tasks = SimpleQueue()
        self._started = False

    def start(self, work: Callable[[], None], done: Callable[[], None]) -> None:
        """Run `work` in a thread, then `done` on the event loop that called."""
        if not self._started:
            self._started = True
            for number in range(self.count):
                name = f"batch-{number}"
                threading.Thread(target=self._work, name=name, daemon=True).start()
        self._tasks.put((work, done, asyncio.get_running_loop()))

    def close(self) -> None:
        """End the threads when they have done what they have."""
        for _ in range(self.count if self._started else 0):
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            work, done, loop = task
            work()
            try:
                loop.call_soon_threadsafe(done)
            except RuntimeError:  # the event loop is closed: nobody waits any more
                return


@dataclass(slots=True)
class Counts:
    """What has been answered; times are summed over requests, except in `batches`."""

    rows: int = 0
    executions: int = 0
    successes: int = 0
    success_ns: int = 0
    failures: int = 0
    fail_ns: int = 0
    queue_ns: int = 0
    compute_ns: int = 0
    last_s: float = 0.0  # the batcher's clock
    batches: dict[int, list[int]] = field(default_factory=dict)  # rows -> [runs, ns]

    def ran(self, rows: int, seconds: float) -> None:
        """One run of `rows` took `seconds`."""
        self.executions += 1
        counted = self.batches.get(rows)
        if counted is None:
            counted = self.batches[rows] = [0, 0]
        counted[0] += 1
        counted[1] += int(seconds * 1e9)

    def answered(self, rows: int, queue_s: float, compute_s: float, now_s: float) -> None:
        """One request got its rows."""
        self.rows += rows
        self.successes += 1
        self.success_ns += int((queue_s + compute_s) * 1e9)
        self.queue_ns += int(queue_s * 1e9)
        self.compute_ns += int(compute_s * 1e9)
        self.last_s = now_s

    def failed(self, seconds: float) -> None:
        """One request got an error after `seconds`."""
        self.failures += 1
        self.fail_ns += int(seconds * 1e9)


@dataclass(slots=True, eq=False)
class _Caller:
    """One request in the system: `taken` rows are in batches, `answers` have come back."""

    future: asyncio.Future[Tensors]
    inputs: Tensors
    rows: int
    elements: int
    arrived_s: float
    deadline_s: float | None
    line: _Line
    taken: int = 0
    started_s: float = 0.0
    answered: int = 0
    answers: dict[int, Tensors] = field(default_factory=dict)

    def is_expired(self, now_s: float) -> bool:
        return self.deadline_s is not None and self.deadline_s <= now_s


@dataclass(slots=True, eq=False)
class _Line:
    """Callers whose inputs can be joined; `running` requests have all their rows in workers."""

    closing: Closing
    callers: deque[_Caller] = field(default_factory=deque)
    rows: int = 0
    running: int = 0


@dataclass(slots=True, eq=False)
class _Piece:
    """Rows `start` to `stop` of one caller, in one batch."""

    caller: _Caller
    start: int
    stop: int
    outcome: Outcome = NOT_RUN

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def is_last(self) -> bool:
        return self.stop == self.caller.rows

    def inputs(self) -> Tensors:
        if self.rows == self.caller.rows:
            return self.caller.inputs
        return {name: a[self.start : self.stop] for name, a in self.caller.inputs.items()}


@dataclass(slots=True, eq=False)
class _Batch:
    """Pieces of one line that run together."""

    line: _Line
    pieces: list[_Piece]
    rows: int
    pace: Pace
    start_s: float = 0.0
    end_s: float = 0.0
    runs: list[tuple[int, float]] = field(default_factory=list)  # (rows, seconds)


class Batcher:
    """Joins the requests of many callers into batches for `predict`.

    All calls come from one event loop. At most `queue_requests_max` requests wait; the next one is
    refused with OVERLOADED. `observe_batch(rows, seconds)` is told of each run and
    `observe_queue(seconds)` of each request's wait.
    """

    def __init__(
        self,
        predict: Predict,
        *,
        batch_size_max: int,
        wait_max_ms: float,
        queue_requests_max: int,
        threads: int = 1,
        workers: Workers | None = None,
        clock: Clock = time.monotonic,
        observe_batch: Callable[[int, float], None] | None = None,
        observe_queue: Callable[[float], None] | None = None,
    ) -> None:
        self.counts = Counts()
        self._predict = predict
        self._batch_size_max = batch_size_max
        self._wait_max_s = wait_max_ms / 1000
        self._queue_requests_max = queue_requests_max
        self._workers = workers or Threads(threads)
        self._free = self._workers.count
        self._clock = clock
        self._observe_batch = observe_batch
        self._observe_queue = observe_queue
        self._lines: dict[LineKey, _Line] = {}
        self._waiting: deque[_Line] = deque()
        self._queued = 0
        self._running: set[_Batch] = set()
        self._paces = tuple(Pace() for _ in range(64))
        self._request_s = 0.0  # what one request costs a worker, smoothed
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn: asyncio.Handle | None = None
        self._wake: asyncio.TimerHandle | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_s = float("inf")
        self._logged: set[tuple[str, str, int]] = set()

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return self._queued

    @property
    def running(self) -> int:
        """Requests that a worker runs."""
        return sum(line.running for line in self._lines.values())

    def statistics(self) -> Statistics:
        """The counts in the form that the protocols show (without those of the cache)."""
        c = self.counts
        since_s = self._clock() - c.last_s
        return Statistics(
            inference_count=c.rows,
            execution_count=c.executions,
            success_count=c.successes,
            success_ns=c.success_ns,
            fail_count=c.failures,
            fail_ns=c.fail_ns,
            queue_ns=c.queue_ns,
            compute_ns=c.compute_ns,
            last_inference_ms=int((time.time() - since_s) * 1000) if c.successes else 0,
            batches=tuple((rows, n, ns) for rows, (n, ns) in sorted(c.batches.items())),
        )

    def reset_counts(self) -> None:
        """Forget what was counted so far (the warm-up); what was measured stays."""
        self.counts = Counts()

    async def submit(self, request: InferenceRequest) -> Tensors:
        """The outputs for the request's rows, in their order. Raises `InferenceError`."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._bind(loop)
        inputs = request.inputs
        rows, elements = _measures(inputs)
        now_s = self._clock()
        if request.deadline_s is not None and request.deadline_s <= now_s:
            self.counts.failed(0.0)
            raise _too_late()
        pace = self._paces[elements.bit_length()]
        if pace.is_direct and not self._queued and self._free and rows <= self._batch_size_max:
            return self._run_direct(inputs, rows, now_s, pace)
        caller = self._enter(loop, request, rows, elements, now_s)
        try:
            return await caller.future
        except asyncio.CancelledError:
            self._abandon(caller)
            raise

    def close(self) -> None:
        """End the workers; requests that still wait fail with UNAVAILABLE."""
        for line in tuple(self._waiting):
            for caller in tuple(line.callers):
                self._fail(caller, InferenceError(Fault.UNAVAILABLE, "this replica is stopping"))
        for handle in (self._turn, self._wake, self._alarm):
            if handle is not None:
                handle.cancel()
        self._workers.close()

    # Callers come and go

    def _bind(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not None and not self._loop.is_closed():
            raise RuntimeError("a Batcher serves one event loop; submit was called from another")
        self._loop = loop

    def _enter(
        self,
        loop: asyncio.AbstractEventLoop,
        request: InferenceRequest,
        rows: int,
        elements: int,
        now_s: float,
    ) -> _Caller:
        """A new caller at the end of its line."""
        if self._queued >= self._queue_requests_max:
            self._make_room()
        inputs, deadline_s = request.inputs, request.deadline_s
        line = self._line(tuple([(n, a.dtype, a.shape[1:]) for n, a in inputs.items()]))
        caller = _Caller(loop.create_future(), inputs, rows, elements, now_s, deadline_s, line)
        if not line.callers:
            self._waiting.append(line)
        line.callers.append(caller)
        line.rows += rows
        self._queued += 1
        if deadline_s is not None and deadline_s < self._alarm_s:
            self._set_alarm(deadline_s, now_s)
        if self._free and self._turn is None:
            self._turn = loop.call_soon(self._dispatch)
        return caller

    def _make_room(self) -> None:
        """Close a batch early if a worker is free; else refuse the newcomer."""
        if self._free:
            self._start(self._take(self._waiting[0]))
        if self._queued >= self._queue_requests_max:
            self.counts.failed(0.0)
            ahead = self._queued + self.running
            retry_after_s = ahead * self._request_s / self._workers.count
            raise InferenceError(
                Fault.OVERLOADED,
                f"{self._queued} requests are waiting for this model, which is its bound; "
                "try again later",
                retry_after_s=max(0.05, retry_after_s),
            )

    def _line(self, key: LineKey) -> _Line:
        line = self._lines.get(key)
        if line is None:
            if len(self._lines) >= _LINES_MAX:
                busy = {k: v for k, v in self._lines.items() if v.callers or v.running}
                self._lines = busy
            line = _Line(Closing(self._batch_size_max, self._wait_max_s))
            self._lines[key] = line
        return line

    def _leave(self, caller: _Caller) -> None:
        """Take a caller out of its line, if it still stands there."""
        line = caller.line
        if caller.taken < caller.rows:
            line.callers.remove(caller)
            line.rows -= caller.rows - caller.taken
            caller.taken = caller.rows
            self._queued -= 1
            if not line.callers:
                self._waiting.remove(line)

    def _abandon(self, caller: _Caller) -> None:
        if caller.future.done() and not caller.future.cancelled():
            caller.future.exception()  # seen, so that asyncio doesn't complain
        self._leave(caller)

    def _fail(self, caller: _Caller, error: InferenceError) -> None:
        self._leave(caller)
        if not caller.future.done():
            caller.future.set_exception(error)
            self.counts.failed(self._clock() - caller.arrived_s)

    # Deadlines

    def _set_alarm(self, deadline_s: float, now_s: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_s = deadline_s
        loop = asyncio.get_running_loop()
        self._alarm = loop.call_later(max(0.0, deadline_s - now_s), self._on_alarm)

    def _on_alarm(self) -> None:
        """Fail every caller, waiting or running, whose deadline has passed."""
        now_s = self._clock()
        self._alarm, self._alarm_s = None, float("inf")
        for caller in list(self._callers()):
            if caller.is_expired(now_s):
                self._fail(caller, _too_late())
        deadlines = [c.deadline_s for c in self._callers() if c.deadline_s is not None]
        if deadlines:
            self._set_alarm(min(deadlines), now_s)

    def _callers(self) -> Iterator[_Caller]:
        """Everybody who still waits for an answer."""
        for line in self._waiting:
            yield from line.callers
        for batch in self._running:
            yield from (p.caller for p in batch.pieces if not p.caller.future.done())

    # Batches are closed and run

    def _dispatch(self) -> None:
        """Give free workers what is due; see to it that we are called when more is."""
        self._turn = None
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        now_s = self._clock()
        service_s = self._service_small_s()
        soonest_s = float("inf")
        asked = 0  # lines in a row that wait
        while self._free and asked < len(self._waiting):
            line = self._waiting[0]
            present = len(line.callers) + line.running
            wait_s = line.closing.wait_s(now_s, present, line.rows, service_s)
            if wait_s > 0:
                soonest_s = min(soonest_s, wait_s)
                self._waiting.rotate(-1)
                asked += 1
            elif self._start(self._take(line)):
                soonest_s = 0.0
                break
            else:
                soonest_s, asked = float("inf"), 0
        if self._waiting and self._free:
            self._come_back(soonest_s)

    def _come_back(self, wait_s: float) -> None:
        loop = asyncio.get_running_loop()
        if wait_s < _POLL_S:
            self._turn = loop.call_soon(self._dispatch)
        elif wait_s < float("inf"):
            self._wake = loop.call_later(wait_s, self._dispatch)

    def _service_small_s(self) -> float:
        return min((p.service_s for p in self._paces if p.is_known), default=0.0)

    def _take(self, line: _Line) -> _Batch:
        """Close a batch: the first callers of `line`, as many rows as fit.

        Only a request larger than a whole batch is cut.
        """
        pieces: list[_Piece] = []
        room, elements = self._batch_size_max, 0
        while line.callers and room:
            caller = line.callers[0]
            left = caller.rows - caller.taken
            if left > room and caller.rows <= self._batch_size_max:
                break
            rows = min(left, room)
            pieces.append(_Piece(caller, caller.taken, caller.taken + rows))
            elements += caller.elements * rows // caller.rows
            room -= rows
            caller.taken += rows
            if caller.taken == caller.rows:
                line.callers.popleft()
                self._queued -= 1
                line.running += 1
        rows = self._batch_size_max - room
        line.rows -= rows
        self._waiting.remove(line)
        if line.callers:
            self._waiting.append(line)
        line.closing.closed()
        return _Batch(line, pieces, rows, self._paces[elements.bit_length()])

    def _start(self, batch: _Batch) -> bool:
        """Run a batch, here or in a worker; whether it ran here (and has ended)."""
        self._running.add(batch)
        if batch.pace.is_inline:
            self._execute(batch)
            batch.pace.ran_inline(batch.end_s - batch.start_s)
            if any(_is_breakage(p.outcome) for p in batch.pieces):
                batch.pace.failed()
            self._finish(batch)
            return True
        self._free -= 1
        self._workers.start(lambda: self._work(batch), lambda: self._return(batch))
        return False

    def _run_direct(self, inputs: Tensors, rows: int, now_s: float, pace: Pace) -> Tensors:
        """A run of one request within its caller's own step."""
        outcome = self._outcome(inputs, rows)
        end_s = self._clock()
        seconds = end_s - now_s
        pace.ran_inline(seconds)
        self.counts.ran(rows, seconds)
        if self._observe_batch is not None:
            self._observe_batch(rows, seconds)
        if self._observe_queue is not None:
            self._observe_queue(0.0)
        if isinstance(outcome, InferenceError):
            if _is_breakage(outcome):
                pace.failed()
            self.counts.failed(seconds)
            raise outcome
        self.counts.answered(rows, 0.0, seconds, end_s)
        return outcome

    def _return(self, batch: _Batch) -> None:
        """A worker has ended a batch."""
        self._free += 1
        self._finish(batch)
        if self._waiting and self._turn is None:
            self._come_back(0.0)

    def _finish(self, batch: _Batch) -> None:
        """Give each caller of an ended batch its rows."""
        self._running.discard(batch)
        line = batch.line
        line.closing.ended(line.running + len(line.callers))
        line.running -= sum(p.is_last for p in batch.pieces)
        for rows, seconds in batch.runs:
            self.counts.ran(rows, seconds)
            if self._observe_batch is not None:
                self._observe_batch(rows, seconds)
        for piece in batch.pieces:
            self._deliver(piece, batch)
        cost_s = (batch.end_s - batch.start_s) / len(batch.pieces)
        self._request_s += (0.2 if self._request_s else 1.0) * (cost_s - self._request_s)

    def _deliver(self, piece: _Piece, batch: _Batch) -> None:
        caller, outcome = piece.caller, piece.outcome
        if piece.start == 0:
            caller.started_s = batch.start_s
            if self._observe_queue is not None:
                self._observe_queue(max(0.0, batch.start_s - caller.arrived_s))
        if caller.future.done():
            return
        if isinstance(outcome, InferenceError):
            self._fail(caller, outcome)
            return
        if piece.rows != caller.rows:
            caller.answers[piece.start] = outcome
            caller.answered += piece.rows
            if caller.answered < caller.rows:
                return
            outcome = _joined([caller.answers[start] for start in sorted(caller.answers)])
        queue_s = caller.started_s - caller.arrived_s
        self.counts.answered(caller.rows, queue_s, batch.end_s - caller.started_s, batch.end_s)
        caller.future.set_result(outcome)

    # In the worker (nothing below touches lines or futures' results)

    def _work(self, batch: _Batch) -> None:
        cpu_s = time.thread_time()
        self._execute(batch)
        cpu_s = time.thread_time() - cpu_s
        batch.pace.ran_in_thread(batch.end_s - batch.start_s, cpu_s)

    def _execute(self, batch: _Batch) -> None:
        """Run a batch; every piece has an outcome afterwards."""
        batch.start_s = self._clock()
        for piece in batch.pieces:
            if piece.caller.is_expired(batch.start_s):
                piece.outcome = _too_late()
        pieces = [p for p in batch.pieces if p.outcome is NOT_RUN]
        if pieces and not self._run_together(batch, pieces):
            for piece in pieces:
                late = piece.caller.is_expired(self._clock())
                piece.outcome = _too_late() if late else self._run(batch, piece.inputs())
        batch.end_s = self._clock()

    def _run_together(self, batch: _Batch, pieces: Sequence[_Piece]) -> bool:
        """Run `pieces` as one; False = several callers share a failure, so run each alone."""
        joined = _joined([p.inputs() for p in pieces])
        outcome = self._run(batch, joined, is_final=len(pieces) == 1)
        if isinstance(outcome, InferenceError):
            if len(pieces) > 1:
                return False
            pieces[0].outcome = outcome
            return True
        row = 0
        for piece in pieces:
            end = row + piece.rows
            piece.outcome = (
                outcome if len(pieces) == 1 else {n: a[row:end] for n, a in outcome.items()}
            )
            row = end
        return True

    def _run(self, batch: _Batch, inputs: Tensors, *, is_final: bool = True) -> Outcome:
        rows = len(next(iter(inputs.values())))
        start_s = self._clock()
        outcome = self._outcome(inputs, rows, is_final=is_final)
        batch.runs.append((rows, self._clock() - start_s))
        return outcome

    def _outcome(self, inputs: Tensors, rows: int, *, is_final: bool = True) -> Outcome:
        """What `predict` makes of `inputs`: outputs with as many rows, or the error."""
        try:
            return _checked(self._predict(inputs), rows)
        except InferenceError as error:
            return error
        except (Exception, SystemExit, asyncio.CancelledError) as error:  # noqa: BLE001 a user's code
            if is_final:
                self._log(error)
            return InferenceError(
                Fault.INTERNAL, f"the model failed: {type(error).__name__}: {error}"
            )

    def _log(self, error: BaseException) -> None:
        """The traceback, the first time that this kind of failure comes from this line."""
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        code = trace.tb_frame.f_code.co_filename if trace else ""
        place = (type(error).__name__, code, trace.tb_lineno if trace else 0)
        if place in self._logged or len(self._logged) >= _TRACEBACKS_MAX:
            logger.debug("the model failed again: %s: %s", type(error).__name__, error)
            return
        self._logged.add(place)
        logger.error("the model failed", exc_info=error)


def _measures(inputs: Tensors) -> tuple[int, int]:
    """Rows, and elements of all inputs together; inputs that can't be rows are INVALID."""
    rows, elements = -1, 0
    for name, array in inputs.items():
        shape = array.shape
        if not shape or (rows >= 0 and shape[0] != rows):
            raise _not_rows(inputs, name)
        rows = shape[0]
        elements += array.size
    if rows < 1:
        raise _no_rows(inputs)
    return rows, elements


def _not_rows(inputs: Tensors, name: str) -> InferenceError:
    shape = list(inputs[name].shape)
    if not shape:
        text = f"input {name!r} is a scalar; its first axis must be the rows"
    else:
        first, array = next(iter(inputs.items()))
        text = (
            f"input {name!r} has {shape[0]} rows (shape {shape}) but {first!r} has "
            f"{array.shape[0]}; all inputs must have the same first axis"
        )
    return InferenceError(Fault.INVALID, text, field=name)


def _no_rows(inputs: Tensors) -> InferenceError:
    if not inputs:
        return InferenceError(Fault.INVALID, "the request has no inputs", field="inputs")
    name, array = next(iter(inputs.items()))
    text = f"input {name!r} has no rows (shape {list(array.shape)}); at least 1 is needed"
    return InferenceError(Fault.INVALID, text, field=name)


def _is_breakage(outcome: Outcome) -> bool:
    """Whether the model broke; refusing a request is not breaking."""
    return isinstance(outcome, InferenceError) and outcome.fault is Fault.INTERNAL


def _too_late() -> InferenceError:
    return InferenceError(Fault.DEADLINE, "the deadline passed before the model had answered")


def _joined(parts: Sequence[Tensors]) -> Tensors:
    """Tensors one below the other."""
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _checked(outputs: Tensors, rows: int) -> Tensors:
    """`outputs`, if each has a row for every row given."""
    for name, array in outputs.items():
        if array.shape[:1] != (rows,):
            raise InferenceError(
                Fault.INTERNAL,
                f"the model failed: output {name!r} has shape {list(array.shape)} "
                f"for {rows} rows given; its first axis must be {rows}",
            )
    return outputs
