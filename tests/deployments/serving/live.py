"""How does a test get a real server for an ASGI app?

`live(app)` serves it with uvicorn (httptools, uvloop) on a free port of 127.0.0.1, in a thread with
its own event loop, as a replica does, and stops it at the end of the block.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import uvicorn
import uvloop

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Live:
    """A running server. `run` executes a coroutine on its event loop and waits for it."""

    host: str
    port: int
    loop: asyncio.AbstractEventLoop

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def call(self, function: Callable[[], T]) -> T:
        async def on_loop() -> T:
            return function()

        return self.run(on_loop())


@contextmanager
def live(app: Any) -> Iterator[Live]:
    """Serve `app` while the block runs."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", lifespan="off", log_level="warning", access_log=False
    )
    server = uvicorn.Server(config)
    with running_loop() as loop:
        served = asyncio.run_coroutine_threadsafe(server.serve(sockets=[listener]), loop)
        eventually(lambda: server.started or served.done())
        if served.done():
            served.result()
        try:
            yield Live("127.0.0.1", port, loop)
        finally:
            server.should_exit = True
            server.force_exit = True
            served.result(10)


@contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in a thread of its own while the block runs."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="live", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def eventually(claim: Callable[[], bool], within_s: float = 10) -> None:
    """Poll until `claim()` holds; fail when it has not within `within_s`."""
    deadline_s = time.monotonic() + within_s
    while not claim():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"did not become true within {within_s} s")
        time.sleep(0.005)
