"""Which clients have gone while they waited for their answer?

A server only learns that a client hung up by listening to it, and a task that listens costs more
than a fast answer. So nobody listens at first: a sweep, 20 times a second, finds the requests that
have been waiting since the sweep before, and starts to listen for those alone. When such a client
is gone, its task is cancelled, which frees its place in every queue.

    request   ├─ answered within a sweep or two: two set operations, no task
    request   ├──── sweep ──── sweep ─ listen … gone ─► cancel
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

SWEEP_S = 0.05


class Waiting:
    """One request whose body has been read and whose answer is not complete."""

    __slots__ = ("is_gone", "is_old", "listener", "receive", "task")

    def __init__(self, task: asyncio.Task[Any] | None, receive: Receive) -> None:
        self.task = task
        self.receive = receive
        self.is_old = False
        self.is_gone = False
        self.listener: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        """Wait for the client to hang up, then cancel the request."""
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        if self.task is not None:
            self.task.cancel()


class Disconnects:
    """The requests of one application that wait now."""

    def __init__(self) -> None:
        self._waiting: set[Waiting] = set()
        self._sweeping = False

    def enter(self, receive: Receive) -> Waiting:
        """The current task waits from now on."""
        waiting = Waiting(asyncio.current_task(), receive)
        self._waiting.add(waiting)
        if not self._sweeping:
            self._sweeping = True
            asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)
        return waiting

    def leave(self, waiting: Waiting) -> None:
        """Its answer is complete, or it failed."""
        self._waiting.discard(waiting)
        if waiting.listener is not None:
            waiting.listener.cancel()

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        for waiting in self._waiting:
            if not waiting.is_old:
                waiting.is_old = True
            elif waiting.listener is None:
                waiting.listener = loop.create_task(waiting.listen())
        self._sweeping = bool(self._waiting)
        if self._sweeping:
            loop.call_later(SWEEP_S, self._sweep)
