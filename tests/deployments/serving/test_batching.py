"""Does everybody get their own rows, soon, and within every bound?"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.inference import Fault, InferenceError, InferenceRequest, Tensors
from deployments.serving.batching import Batcher, Closing, Pace
from tests.deployments.serving.virtual_time import World

# When a batch is closed: strips of time


def strip(arrivals: str, *, run: int, wait_max: int = 5, rows_max: int = 32) -> str:
    """The sizes of the batches that are closed, under the moments in which they are.

    A column is a moment; a digit in `arrivals` is how many requests come then. Each batch runs for
    `run` moments, on one worker.
    """
    closing = Closing(rows_max, wait_max)
    waiting = running = busy_until = 0
    batches = ""
    for now, column in enumerate(arrivals):
        if running and now >= busy_until:
            closing.ended(running + waiting)
            running = 0
        waiting += int(column) if column.isdigit() else 0
        batch = 0
        if waiting and not running and closing.wait_s(now, waiting, waiting, run) == 0:
            batch = min(waiting, rows_max)
            closing.closed()
            waiting, running, busy_until = waiting - batch, batch, now + run
        batches += str(batch) if batch else "."
    return batches


def test_a_lone_caller_is_never_kept_waiting() -> None:
    arrivals = "1....1.....1....1..."
    assert strip(arrivals, run=4) == arrivals


def test_callers_that_came_while_the_worker_was_busy_run_together() -> None:
    assert strip("4.2.2.......", run=6) == (
        #         the run of four ends at 6, and a moment's wait might bring them back
        "4........4.."
    )


def test_callers_that_come_back_one_by_one_are_gathered() -> None:
    assert strip("13....1...........1111.......", run=6) == (
        #         1.....4 in the system, so a free worker waits for as many
        "1.....4..............4......."
    )


def test_a_wait_ends_when_half_a_runs_time_has_passed() -> None:
    assert strip("3......2............", run=6) == (
        #         3 are expected
        "3.........2........."
    )


def test_a_wait_never_exceeds_its_limit() -> None:
    assert strip("3....................2......", run=20, wait_max=5) == (
        "3.........................2."
    )


def test_a_wait_that_ended_by_time_lowers_what_is_expected() -> None:
    assert strip("3......2..........2.....", run=6) == (
        #         for the third batch two are enough
        "3.........2.......2....."
    )


def test_a_full_batch_does_not_wait_for_more() -> None:
    assert strip("9.......4....", run=6, rows_max=4) == "4.....4.....4"


def test_waits_that_bring_nobody_become_rare() -> None:
    closing = Closing(32, 0.005)
    waits = 0
    for second in range(256):
        closing.ended(2)  # two at once each time, and then one alone
        if closing.wait_s(float(second), 1, 1, 1.0) > 0:
            waits += 1
            assert closing.wait_s(second + 0.006, 1, 1, 1.0) == 0
        closing.closed()
    assert waits < 20


# Where a batch runs


def test_a_fast_model_moves_to_the_event_loop_after_a_few_runs() -> None:
    pace = Pace()
    places = []
    for _ in range(5):
        places.append(pace.is_inline)
        pace.ran_in_thread(50e-6, 40e-6) if not pace.is_inline else pace.ran_inline(50e-6)
    assert places == [False, False, False, True, True]


def test_a_slow_run_on_the_event_loop_sends_the_model_back_for_longer_each_time() -> None:
    pace = Pace()
    stays = []
    for _ in range(3):
        runs = 0
        while not pace.is_inline:
            pace.ran_in_thread(50e-6, 40e-6)
            runs += 1
        stays.append(runs)
        pace.ran_inline(0.003)
    assert stays == [3, 16, 32]


@pytest.mark.parametrize(
    ("wall_s", "cpu_s"), [(0.003, 0.002), (1.0, 10e-6)], ids=["computes", "sleeps"]
)
def test_a_slow_model_stays_in_its_thread(wall_s: float, cpu_s: float) -> None:
    pace = Pace()
    for _ in range(100):
        pace.ran_in_thread(wall_s, cpu_s)
    assert not pace.is_inline


def test_a_fast_model_that_looks_slow_behind_a_busy_event_loop_comes_back_to_it() -> None:
    pace = Pace()
    pace.ran_in_thread(50e-6, 40e-6)
    for _ in range(2):
        pace.ran_in_thread(0.005, 40e-6)
    assert pace.is_inline


# Batches in virtual time


@dataclass
class Doubler:
    """y = 2 x, at a price for each run and each row; notes what it was given and when."""

    world: World
    run_s: float = 0.010
    row_s: float = 0.0
    batches: list[list[float]] = field(default_factory=list)
    started_s: list[float] = field(default_factory=list)

    def __call__(self, inputs: Tensors) -> Tensors:
        x = inputs["x"]
        self.batches.append([float(v) for v in x.reshape(len(x), -1)[:, 0]])
        self.started_s.append(self.world.clock())
        self.world.compute(self.run_s + self.row_s * len(x))
        if (x < 0).all():
            raise InferenceError(Fault.INVALID, "x must not be negative")
        if (x < 0).any():
            raise ValueError("one bad row spoils the batch")
        return {"y": x * 2}


def a_batcher(
    world: World,
    predict: Callable[[Tensors], Tensors],
    *,
    batch_size_max: int = 32,
    wait_max_ms: float = 5,
    queue_requests_max: int = 1000,
    **others: Any,
) -> Batcher:
    return Batcher(
        predict,
        batch_size_max=batch_size_max,
        wait_max_ms=wait_max_ms,
        queue_requests_max=queue_requests_max,
        workers=world,
        clock=world.clock,
        **others,
    )


def a_request(
    *values: float, columns: int = 1, dtype: str = "f4", deadline_s: float | None = None
) -> InferenceRequest:
    x = np.array(values, dtype).reshape(-1, 1).repeat(columns, axis=1)
    return InferenceRequest({"x": x}, deadline_s=deadline_s)


async def closed_loop(batcher: Batcher, value: float, times: int, think_s: float = 0.0) -> None:
    for _ in range(times):
        outputs = await batcher.submit(a_request(value))
        assert outputs["y"].tolist() == [[2 * value]]
        await asyncio.sleep(think_s)


def test_sixteen_callers_that_come_back_share_batches_of_sixteen() -> None:
    world = World()
    model = Doubler(world)
    batcher = a_batcher(world, model)

    async def main() -> None:
        # each is a little later back than the one before
        await asyncio.gather(*(closed_loop(batcher, n, 10, n * 0.0002) for n in range(16)))

    world.run(main())
    assert [len(b) for b in model.batches[1:-1]] == [16] * (len(model.batches) - 2)


def test_a_lone_callers_answer_takes_one_run_and_nothing_more() -> None:
    world = World()
    model = Doubler(world)
    batcher = a_batcher(world, model)
    world.run(closed_loop(batcher, 1, 20))
    assert world.clock() == pytest.approx(20 * 0.010, rel=0.001)


def test_more_callers_than_a_batch_holds_get_full_batches() -> None:
    world = World()
    model = Doubler(world)
    batcher = a_batcher(world, model, batch_size_max=4)

    async def main() -> None:
        await asyncio.gather(*(closed_loop(batcher, n, 8) for n in range(12)))

    world.run(main())
    assert [len(b) for b in model.batches] == [4] * 24


def test_a_request_larger_than_a_batch_is_run_in_slices_and_put_together() -> None:
    world = World()
    model = Doubler(world)
    batcher = a_batcher(world, model, batch_size_max=4)
    outputs = world.run(batcher.submit(a_request(*range(10))))
    assert outputs["y"].reshape(-1).tolist() == [2 * v for v in range(10)]
    assert [len(b) for b in model.batches] == [4, 4, 2]


def test_several_workers_share_the_slices_of_one_request() -> None:
    world = World(count=3)
    model = Doubler(world)
    batcher = a_batcher(world, model, batch_size_max=4)
    outputs = world.run(batcher.submit(a_request(*range(10))))
    assert outputs["y"].reshape(-1).tolist() == [2 * v for v in range(10)]
    assert world.clock() == pytest.approx(0.010, rel=0.001)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"x": np.zeros((1, 2))}, {"x": np.zeros((1, 3))}),
        ({"x": np.zeros((1, 2))}, {"x": np.zeros((1, 2), np.float32)}),
        ({"x": np.zeros((1, 2))}, {"z": np.zeros((1, 2))}),
        ({"x": np.zeros((1, 2))}, {"x": np.zeros((1, 2)), "z": np.zeros((1, 2))}),
    ],
    ids=["shape", "type", "name", "names"],
)
def test_requests_that_differ_in(one: Tensors, other: Tensors) -> None:
    """… never share a batch."""
    world = World()
    seen: list[Tensors] = []

    def predict(inputs: Tensors) -> Tensors:
        seen.append(inputs)
        world.compute(0.01)
        return {"y": np.zeros(len(next(iter(inputs.values()))))}

    batcher = a_batcher(world, predict)

    async def main() -> None:
        requests = [InferenceRequest(inputs) for inputs in (one, other) * 3]
        await asyncio.gather(*(batcher.submit(r) for r in requests))

    world.run(main())
    forms = [[(n, a.dtype, a.shape) for n, a in inputs.items()] for inputs in seen]
    assert sorted(len(next(iter(inputs.values()))) for inputs in seen) == [3, 3]
    assert forms[0] != forms[1]


def test_a_rare_shape_is_not_starved_by_a_busy_one() -> None:
    world = World()
    model = Doubler(world)
    batcher = a_batcher(world, model, batch_size_max=2)
    waited_s: list[float] = []

    async def rare() -> None:
        await asyncio.sleep(0.1)
        begin_s = world.clock()
        await batcher.submit(a_request(7, columns=3))
        waited_s.append(world.clock() - begin_s)

    async def main() -> None:
        await asyncio.gather(rare(), *(closed_loop(batcher, n, 50) for n in range(8)))

    world.run(main())
    assert waited_s[0] < 0.040


def test_two_shapes_in_equal_parts_do_not_wait_for_each_other() -> None:
    world = World()
    model = Doubler(world)
    batcher = a_batcher(world, model)

    async def wide(value: float) -> None:
        for _ in range(10):
            await batcher.submit(a_request(value, columns=2))

    async def main() -> None:
        loops = [closed_loop(batcher, n, 10) for n in range(4)] + [wide(n) for n in range(4)]
        await asyncio.gather(*loops)

    world.run(main())
    assert len(model.batches) == 20
    assert world.clock() == pytest.approx(20 * 0.010, rel=0.05)


# Bounds


def test_one_request_more_than_the_bound_is_refused_and_told_when_to_return() -> None:
    world = World()
    model = Doubler(world)
    batcher = a_batcher(world, model, batch_size_max=1, queue_requests_max=3)

    async def main() -> None:
        await batcher.submit(a_request(0))  # measures
        tasks = [asyncio.ensure_future(batcher.submit(a_request(n))) for n in range(4)]
        await asyncio.sleep(0.001)
        assert (batcher.queued, batcher.running) == (3, 1)
        with pytest.raises(InferenceError) as refusal:
            await batcher.submit(a_request(9))
        assert refusal.value.fault is Fault.OVERLOADED
        assert refusal.value.retry_after_s == pytest.approx(0.05)
        assert len(await asyncio.gather(*tasks)) == 4

    world.run(main())
    assert len(model.batches) == 5


def test_a_bound_of_one_still_lets_an_idle_worker_start() -> None:
    world = World()
    model = Doubler(world)
    batcher = a_batcher(world, model, queue_requests_max=1)

    async def main() -> None:
        await asyncio.gather(*(batcher.submit(a_request(n)) for n in range(2)))

    world.run(main())
    assert model.batches == [[0], [1]]


def test_a_queued_request_fails_at_its_deadline_and_is_not_run() -> None:
    world = World()
    model = Doubler(world)
    batcher = a_batcher(world, model)

    async def main() -> None:
        first = asyncio.ensure_future(batcher.submit(a_request(1)))
        await asyncio.sleep(0.001)
        with pytest.raises(InferenceError) as late:
            await batcher.submit(a_request(2, deadline_s=0.005))
        assert late.value.fault is Fault.DEADLINE
        assert world.clock() == pytest.approx(0.005, abs=1e-5)
        assert batcher.queued == 0
        await first

    world.run(main())
    assert model.batches == [[1]]


def test_a_request_whose_deadline_has_passed_is_refused_at_the_door() -> None:
    world = World()
    model = Doubler(world)
    batcher = a_batcher(world, model)

    async def main() -> None:
        await asyncio.sleep(1)
        with pytest.raises(InferenceError) as late:
            await batcher.submit(a_request(2, deadline_s=0.5))
        assert late.value.fault is Fault.DEADLINE

    world.run(main())
    assert model.batches == []


def test_a_caller_of_a_model_that_hangs_is_told_at_the_deadline() -> None:
    world = World()
    model = Doubler(world, run_s=1000)
    batcher = a_batcher(world, model)

    async def main() -> None:
        with pytest.raises(InferenceError) as late:
            await batcher.submit(a_request(2, deadline_s=0.5))
        assert late.value.fault is Fault.DEADLINE
        assert world.clock() == pytest.approx(0.5, abs=1e-5)

    world.run(main())


def test_a_cancelled_caller_leaves_the_queue_and_is_not_run() -> None:
    world = World()
    model = Doubler(world)
    batcher = a_batcher(world, model)

    async def main() -> None:
        tasks = [asyncio.ensure_future(batcher.submit(a_request(1)))]
        await asyncio.sleep(0.001)
        tasks += [asyncio.ensure_future(batcher.submit(a_request(n))) for n in (2, 3, 4)]
        await asyncio.sleep(0.001)
        assert batcher.queued == 3
        tasks[2].cancel()
        await asyncio.sleep(0)
        assert batcher.queued == 2
        await asyncio.gather(*tasks, return_exceptions=True)

    world.run(main())
    assert model.batches == [[1], [2, 4]]


def test_a_cancelled_caller_of_a_running_batch_disturbs_nobody() -> None:
    world = World()
    model = Doubler(world)
    batcher = a_batcher(world, model)

    async def main() -> list[Any]:
        tasks = [asyncio.ensure_future(batcher.submit(a_request(n))) for n in range(3)]
        await asyncio.sleep(0.001)
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    one, two, three = world.run(main())
    assert (one["y"].item(), three["y"].item()) == (0, 4)
    assert isinstance(two, asyncio.CancelledError)


# What models do wrong


def test_a_bad_row_is_an_error_for_its_own_caller_only() -> None:
    world = World()
    model = Doubler(world)
    batcher = a_batcher(world, model)

    async def main() -> list[Any]:
        requests = [a_request(1), a_request(-2), a_request(3)]
        return await asyncio.gather(*map(batcher.submit, requests), return_exceptions=True)

    one, two, three = world.run(main())
    assert (one["y"].item(), three["y"].item()) == (2, 6)
    assert isinstance(two, InferenceError)
    assert two.fault is Fault.INVALID
    assert batcher.counts.failures == 1


def test_an_exception_says_what_it_was_and_its_traceback_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()

    def predict(inputs: Tensors) -> Tensors:
        world.compute(0.01)
        raise KeyError("weights")

    batcher = a_batcher(world, predict)

    async def main() -> list[Any]:
        calls = [batcher.submit(a_request(n)) for n in range(3)]
        return await asyncio.gather(*calls, return_exceptions=True)

    with caplog.at_level(logging.ERROR):
        errors = world.run(main())
    assert {(e.fault, e.message) for e in errors} == {
        (Fault.INTERNAL, "the model failed: KeyError: 'weights'")
    }
    assert [r.exc_info is not None for r in caplog.records] == [True]


@pytest.mark.parametrize("wrong", [np.zeros((1, 2)), np.zeros(()), np.zeros((5,))])
def test_an_output_without_a_row_for_each_row_given_is_the_models_fault(wrong: Any) -> None:
    world = World()

    def predict(inputs: Tensors) -> Tensors:
        return {"good": inputs["x"], "y": wrong}

    batcher = a_batcher(world, predict)
    with pytest.raises(InferenceError) as failure:
        world.run(batcher.submit(a_request(1, 2)))
    assert failure.value.fault is Fault.INTERNAL
    assert "output 'y'" in failure.value.message
    assert str(list(wrong.shape)) in failure.value.message
    assert "2 rows" in failure.value.message


@pytest.mark.parametrize("answer", [None, [1, 2], {"y": [1, 2]}])
def test_an_answer_that_is_no_tensors_is_the_models_fault(answer: Any) -> None:
    world = World()
    batcher = a_batcher(world, lambda inputs: answer)
    with pytest.raises(InferenceError) as failure:
        world.run(batcher.submit(a_request(1, 2)))
    assert failure.value.fault is Fault.INTERNAL


@pytest.mark.parametrize("leave", [SystemExit(3), asyncio.CancelledError()])
def test_a_model_that_tries_to_leave_takes_nobody_with_it(leave: BaseException) -> None:
    async def main() -> None:
        batcher = Batcher(predict, batch_size_max=4, wait_max_ms=0, queue_requests_max=9)
        for _ in range(2):
            with pytest.raises(InferenceError) as failure:
                await batcher.submit(a_request(1))
            assert failure.value.fault is Fault.INTERNAL
        batcher.close()

    def predict(inputs: Tensors) -> Tensors:
        raise leave

    asyncio.run(main())


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "no inputs"),
        ({"x": np.zeros(())}, "scalar"),
        ({"x": np.zeros((0, 4))}, "no rows"),
        ({"x": np.zeros((2, 4)), "z": np.zeros((3, 4))}, "'z' has 3 rows"),
    ],
)
def test_inputs_that_are_no_rows_are_the_callers_fault(inputs: Tensors, words: str) -> None:
    world = World()
    batcher = a_batcher(world, lambda t: t)
    with pytest.raises(InferenceError, match=words) as failure:
        world.run(batcher.submit(InferenceRequest(inputs)))
    assert failure.value.fault is Fault.INVALID


# Lanes and counts


def test_a_cheap_model_runs_on_the_event_loop_and_a_slow_call_sends_it_back() -> None:
    world = World()
    model = Doubler(world, run_s=100e-6)
    batcher = a_batcher(world, model)
    starts = 0
    start = world.start

    def counted(work: Callable[[], None], done: Callable[[], None]) -> None:
        nonlocal starts
        starts += 1
        start(work, done)

    world.start = counted  # type: ignore[method-assign]

    async def calls(n: int) -> int:
        before = starts
        for _ in range(n):
            await batcher.submit(a_request(1))
        return starts - before

    async def main() -> None:
        assert await calls(10) == 3
        assert await calls(50) == 0
        model.run_s = 0.002
        assert await calls(1) == 0
        assert await calls(10) == 10

    world.run(main())


def test_a_very_cheap_model_answers_within_the_callers_own_step() -> None:
    world = World()
    batcher = a_batcher(world, Doubler(world, run_s=5e-6))

    async def main() -> None:
        for _ in range(4):
            await batcher.submit(a_request(1))
        step = batcher.submit(a_request(4))
        with pytest.raises(StopIteration) as answer:
            step.send(None)
        assert answer.value.value["y"].item() == 8

    world.run(main())


def test_counts_tell_rows_runs_requests_and_times() -> None:
    world = World()
    batches: list[tuple[int, float]] = []
    waits: list[float] = []
    batcher = a_batcher(
        world,
        Doubler(world, run_s=0.010),
        wait_max_ms=0,
        observe_batch=lambda rows, seconds: batches.append((rows, round(seconds, 4))),
        observe_queue=lambda seconds: waits.append(round(seconds, 4)),
    )

    async def main() -> None:
        first = asyncio.ensure_future(batcher.submit(a_request(1)))
        await asyncio.sleep(0.004)
        await asyncio.gather(first, *(batcher.submit(a_request(n, n)) for n in (2, 3)))

    world.run(main())
    assert batches == [(1, 0.010), (4, 0.010)]
    assert waits == [0, 0.006, 0.006]
    s = batcher.statistics()
    assert (s.inference_count, s.execution_count, s.success_count, s.fail_count) == (5, 2, 3, 0)
    assert s.queue_ns == pytest.approx(12e6, rel=1e-3)
    assert s.compute_ns == pytest.approx(30e6, rel=1e-3)
    assert s.success_ns == pytest.approx(42e6, rel=1e-3)
    assert [(rows, n) for rows, n, _ in s.batches] == [(1, 1), (4, 1)]
    batcher.reset_counts()
    assert batcher.statistics().inference_count == 0


def test_closing_fails_those_who_wait() -> None:
    world = World()
    batcher = a_batcher(world, Doubler(world))

    async def main() -> None:
        tasks = [asyncio.ensure_future(batcher.submit(a_request(n))) for n in (1, 2)]
        await asyncio.sleep(0)
        batcher.close()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        faults = [e.fault for e in errors if isinstance(e, InferenceError)]
        assert faults == [Fault.UNAVAILABLE] * 2

    world.run(main())


def test_another_event_loop_is_refused() -> None:
    batcher = Batcher(lambda t: t, batch_size_max=4, wait_max_ms=0, queue_requests_max=9)

    async def here() -> None:
        await batcher.submit(a_request(1))
        failures: list[str] = []

        async def there() -> None:
            with pytest.raises(RuntimeError, match="one event loop"):
                await batcher.submit(a_request(1))
            failures.append("refused")

        thread = threading.Thread(target=lambda: asyncio.run(there()))
        thread.start()
        await asyncio.to_thread(thread.join)
        assert failures == ["refused"]
        batcher.close()

    asyncio.run(here())


def test_real_threads_give_everybody_their_own_rows() -> None:
    def predict(inputs: Tensors) -> Tensors:
        end_s = time.monotonic() + 0.001
        while time.monotonic() < end_s:
            pass
        return {"y": inputs["x"] * 2}

    async def caller(batcher: Batcher, value: int) -> None:
        for step in range(5):
            x = value * 10 + step
            outputs = await batcher.submit(a_request(*([x] * (value % 3 + 1))))
            assert outputs["y"].reshape(-1).tolist() == [2 * x] * (value % 3 + 1)

    async def main() -> None:
        batcher = Batcher(
            predict, batch_size_max=16, wait_max_ms=2, queue_requests_max=100, threads=2
        )
        await asyncio.gather(*(caller(batcher, n) for n in range(40)))
        assert batcher.counts.successes == 200
        assert batcher.counts.executions < 150
        batcher.close()

    asyncio.run(main())


# Whatever happens, everybody gets their own rows or a reason


@dataclass(frozen=True)
class Call:
    """A request: when it comes, its rows and their shape, whether they are bad, its patience."""

    at_ms: int
    rows: int
    columns: int
    is_bad: bool
    patience_ms: int | None
    cancel_after_ms: int | None


calls = st.builds(
    Call,
    at_ms=st.integers(0, 60),
    rows=st.integers(1, 11),
    columns=st.integers(1, 3),
    is_bad=st.sampled_from([False] * 9 + [True]),
    patience_ms=st.none() | st.integers(1, 60),
    cancel_after_ms=st.none() | st.integers(0, 40),
)


class Rows:
    """A model that knows from each row whose it is, and notes what must not be in any run."""

    def __init__(self, world: World, script: Sequence[Call], run_s: float, batch_max: int) -> None:
        self.world = world
        self.script = script
        self.run_s = run_s
        self.batch_max = batch_max
        self.violations: list[str] = []

    def __call__(self, inputs: Tensors) -> Tensors:
        x = inputs["x"]
        owners = {int(v) for v in x[:, 0] // 100}
        if len(x) > self.batch_max:
            self.violations.append(f"{len(x)} rows in a batch")
        if {self.script[o].columns for o in owners} != {x.shape[1]}:
            self.violations.append("shapes are mixed")
        for owner in owners:
            call = self.script[owner]
            late_ms = call.at_ms + (call.patience_ms or 1e9)
            if self.world.clock() * 1000 >= late_ms:
                self.violations.append(f"request {owner} runs after its deadline")
        self.world.compute(self.run_s)
        if any(self.script[o].is_bad for o in owners):
            raise ValueError("bad row")
        return {"y": x[:, 0] + 0.5}


@settings(deadline=None, max_examples=200)
@given(
    script=st.lists(calls, min_size=1, max_size=25),
    run_ms=st.sampled_from([0.001, 0.05, 0.7, 3, 15]),
    batch_max=st.integers(1, 16),
    bound=st.integers(1, 12),
    workers=st.integers(1, 3),
    wait_max_ms=st.sampled_from([0, 1, 5]),
)
def test_every_caller_gets_exactly_its_own_rows_or_a_reason(
    script: list[Call], run_ms: float, batch_max: int, bound: int, workers: int, wait_max_ms: int
) -> None:
    world = World(workers)
    model = Rows(world, script, run_ms / 1000, batch_max)
    batcher = a_batcher(
        world,
        model,
        batch_size_max=batch_max,
        wait_max_ms=wait_max_ms,
        queue_requests_max=bound,
    )

    refusals: dict[int, InferenceError] = {}

    async def one(number: int, call: Call) -> None:
        await asyncio.sleep(call.at_ms / 1000)
        mine = np.arange(call.rows) + number * 100.0
        x = np.repeat(mine[:, None], call.columns, axis=1)
        patience_s = (call.patience_ms or 1e9) / 1000
        deadline_s = call.at_ms / 1000 + patience_s if call.patience_ms else None
        request = InferenceRequest({"x": x}, deadline_s=deadline_s)
        task = asyncio.ensure_future(batcher.submit(request))
        if call.cancel_after_ms is not None:
            asyncio.get_running_loop().call_later(call.cancel_after_ms / 1000, task.cancel)
        try:
            outputs = await task
        except asyncio.CancelledError:
            assert call.cancel_after_ms is not None
        except InferenceError as error:
            refusals[number] = error
        else:
            assert outputs["y"].tolist() == (mine + 0.5).tolist()
            assert not call.is_bad
        if batcher.queued > bound:
            model.violations.append(f"{batcher.queued} are queued")

    async def main() -> None:
        await asyncio.gather(*(one(n, call) for n, call in enumerate(script)))
        await asyncio.sleep(100)

    world.run(main())
    assert (batcher.queued, batcher.running, world.busy) == (0, 0, 0)
    assert model.violations == []
    assert [n for n, error in refusals.items() if not is_explained(script[n], error)] == []


def is_explained(call: Call, error: InferenceError) -> bool:
    if error.fault is Fault.INTERNAL:
        return call.is_bad and error.message == "the model failed: ValueError: bad row"
    if error.fault is Fault.DEADLINE:
        return call.patience_ms is not None
    return error.fault is Fault.OVERLOADED
