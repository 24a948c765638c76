"""A replica's own door: HTTP and gRPC servers on an event loop in a thread of their own.

Serve's event loop goes on with health checks and drains while requests come and go here, and
nothing of Serve stands between a socket and the model. `run` hands a coroutine to this loop from
any other thread.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

Result = TypeVar("Result")

KEEP_ALIVE_S = 120
"""Longer than the edge keeps idle connections, so that the edge is the one that closes."""


class Joined:
    """A transport that sends what is written in one turn of the loop in one piece.

    uvicorn writes an answer's head and body apart; a process killed in between has begun an answer
    that the edge can't take back. One piece also saves a system call.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._pieces: list[bytes] = []
        self._soon = asyncio.get_running_loop().call_soon

    def write(self, data: bytes) -> None:
        """Send `data` at the end of this turn."""
        if not self._pieces:
            self._soon(self._flush)
        self._pieces.append(data)

    def close(self) -> None:
        """Send what there is, then close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._pieces:
            self._transport.write(b"".join(self._pieces))
            self._pieces.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class JoinedWrites(HttpToolsProtocol):
    """HTTP/1.1 with an answer's head and body in one segment."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(Joined(transport))  # type: ignore[arg-type]


class Listener:
    """An event loop in a thread, with the servers that live on it."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="listener", daemon=True)
        self._http: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result], timeout_s: float | None = None) -> Result:
        """Do `work` on the listener's loop and wait for it. Not to be called from that loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    async def serve_http(self, app: Any, host: str, port: int = 0) -> int:
        """Answer HTTP/1.1 on `host`; the port that was bound. Raises `OSError`."""
        bound = socket.create_server((host, port), backlog=2048)
        config = uvicorn.Config(
            app,
            http=JoinedWrites,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=5,
        )
        self._http = uvicorn.Server(config)
        self._serving = asyncio.create_task(self._http.serve(sockets=[bound]))
        while not self._http.started:
            if self._serving.done():
                self._serving.result()
                raise RuntimeError("the HTTP server ended before it began")
            await asyncio.sleep(0.01)
        return int(bound.getsockname()[1])

    async def close_http(self) -> None:
        """Stop taking connections and let those with a request finish it."""
        if self._http is not None and self._serving is not None:
            self._http.should_exit = True
            await self._serving

    def close(self) -> None:
        """End the loop and its thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=5)

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
