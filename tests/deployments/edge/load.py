"""A closed-loop crowd of callers that takes every broken answer for a failure.

Raw HTTP/1.1 over asyncio: no retries of its own, and cheap enough for thousands of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Load:
    """`callers` send one request after the other until told to end."""

    port: int
    path: str = "/v2/models/fraud/infer"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b'{"inputs": []}'
    callers: int = 16
    tls: ssl.SSLContext | None = None
    answers: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    is_over: bool = False

    @contextlib.contextmanager
    def running(self) -> Iterator[Load]:
        """The load, in a thread of its own, until the block ends."""
        thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.is_over = True
            thread.join(30)

    @property
    def sent(self) -> int:
        return sum(self.answers.values()) + len(self.errors)

    async def _run(self) -> None:
        await asyncio.gather(*(self._caller() for _ in range(self.callers)))

    async def _caller(self) -> None:
        connection: Connection | None = None
        while not self.is_over:
            try:
                connection = connection or await self._connect()
                status, keeps = await asyncio.wait_for(self._once(connection), 20)
                self.answers[status] += 1
                if keeps:
                    continue
            except (OSError, EOFError, ValueError, TimeoutError) as error:
                self.errors.append(repr(error))
            if connection:
                connection[1].close()
            connection = None

    async def _connect(self) -> Connection:
        return await asyncio.open_connection(
            "127.0.0.1", self.port, ssl=self.tls, server_hostname="localhost" if self.tls else None
        )

    async def _once(self, connection: Connection) -> tuple[str, bool]:
        reader, writer = connection
        lines = [f"POST {self.path} HTTP/1.1", "host: edge", f"content-length: {len(self.body)}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + self.body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        await reader.readexactly(int(fields["content-length"]))
        return head.split(" ")[1], fields.get("connection") != "close"
