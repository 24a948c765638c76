"""How can seconds pass in a test without anybody waiting?

`World` is an event loop whose clock jumps to the next timer as soon as nothing else is to be done,
and a pool of workers on the same clock. A model in it calls `compute(seconds)`: in a worker only
the worker is busy meanwhile, on the event loop everything stands still, as in the real world.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

TURN_S = 1e-6
"""What a turn of the event loop costs, so that whoever polls gets somewhere."""


class _Jump(selectors.SelectSelector):
    """A selector that never sleeps: it moves the clock instead."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("everybody waits and no timer is set: this would hang for ever")
        self.now_s += timeout if timeout > 0 else TURN_S
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, jump: _Jump) -> None:
        super().__init__(jump)
        self._jump = jump

    def time(self) -> float:
        return self._jump.now_s


class World:
    """Virtual time, an event loop in it, and `count` workers."""

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self.busy = 0
        self._jump = _Jump()
        self._in_worker = False
        self._ahead_s = 0.0  # how far the worker's clock is ahead of the loop's

    def clock(self) -> float:
        """Seconds since the world began, as seen by whoever asks."""
        return self._jump.now_s + self._ahead_s

    def compute(self, seconds: float) -> None:
        """Spend time, here or in a worker."""
        if self._in_worker:
            self._ahead_s += seconds
        else:
            self._jump.now_s += seconds

    def start(self, work: Callable[[], None], done: Callable[[], None]) -> None:
        """Run `work` in a worker, then `done`."""
        assert self.busy < self.count, "more work than workers"
        self.busy += 1
        self._in_worker = True
        work()
        took_s, self._in_worker, self._ahead_s = self._ahead_s, False, 0.0

        def finish() -> None:
            self.busy -= 1
            done()

        asyncio.get_running_loop().call_later(took_s, finish)

    def close(self) -> None:
        """Nothing to end."""

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run `main` to its end."""
        with asyncio.Runner(loop_factory=lambda: _Loop(self._jump)) as runner:
            return runner.run(main)
