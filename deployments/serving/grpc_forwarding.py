"""How the front desk holds a gRPC call and sends it on, message by message, unread.

Only the first message is looked at, for the model's name, where the edge did not say which backend
it had chosen.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import closing
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from deployments.edge.routing import Server
from deployments.inference import Fault, InferenceError
from deployments.serving.holding import WaitingRoom, refuse_unchecked
from deployments.serving.meter import DeskMeter
from deployments.serving.protocols.oip_grpc import MESSAGE_BYTES_MAX, Metadata
from deployments.serving.protocols.oip_proto import message

_LIMITS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
]


class GrpcForwarder:
    """A `Forwarder` over a waiting room. `token` opens the replicas' doors."""

    def __init__(self, room: WaitingRoom, meter: DeskMeter, token: str) -> None:
        self._room = room
        self._meter = meter
        self._token = token

    async def __call__(
        self,
        method: str,
        metadata: Metadata,
        requests: AsyncIterator[bytes],
        deadline_s: float | None,
    ) -> AsyncIterator[bytes]:
        """The replica's messages. Raises `InferenceError` and `grpc.aio.AioRpcError`."""
        first = await anext(requests, None)
        if first is None:
            return
        backend = self._backend(metadata, first)
        limit_s = time.monotonic() + self._room.timeout_s(backend)
        deadline_s = limit_s if deadline_s is None else min(deadline_s, limit_s)
        sent = _Sent(first, requests)
        with (
            closing(sent),
            self._room.place(backend),
            self._meter.holding(self._room, backend),
        ):
            async for data in self._answers(backend, method, sent, deadline_s):
                yield data

    def _backend(self, metadata: Metadata, first: bytes) -> str:
        chosen = dict(metadata).get("x-shoal-backend", "")
        if isinstance(chosen, str) and self._room.knows(chosen):
            return chosen
        sent = message(service_pb2.ModelInferRequest, first)
        given = {name: _bytes(value) for name, value in metadata}
        refuse_unchecked(sent.model_name, given.get("x-shoal-key"), given.get("x-shoal-model"))
        backend = self._room.backend_of(sent.model_name, sent.model_version or None)
        if backend is None:
            raise InferenceError(
                Fault.NOT_FOUND, f"Request for unknown model: '{sent.model_name}' is not found"
            )
        return backend

    async def _answers(
        self, backend: str, method: str, sent: _Sent, deadline_s: float
    ) -> AsyncIterator[bytes]:
        """The answers of the first replica that gives any; others are asked if it is away."""
        refused: list[str] = []
        start_s = time.monotonic()
        while True:
            server = await self._room.server(backend, deadline_s, refused)
            if not refused:
                self._meter.woken(self._room.model_of(backend), time.monotonic() - start_s)
            began = False
            try:
                async for data in self._call(server, backend, method, sent, deadline_s):
                    began = True
                    sent.forget()
                    yield data
                return
            except grpc.aio.AioRpcError as error:
                if began or not _is_away(error) or not self._room.is_idempotent(backend):
                    raise
                refused.append(server.name)

    async def _call(
        self,
        server: Server,
        backend: str,
        method: str,
        sent: _Sent,
        deadline_s: float,
    ) -> AsyncIterator[bytes]:
        address = f"{server.host}:{server.grpc_port}"
        options: dict[str, Any] = {
            "metadata": (("x-shoal-edge", self._token), ("x-shoal-backend", backend)),
            "timeout": max(0.1, deadline_s - time.monotonic()),
        }
        async with grpc.aio.insecure_channel(address, options=_LIMITS) as channel:
            async for data in channel.stream_stream(method)(sent.messages(), **options):
                yield data


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _is_away(error: grpc.aio.AioRpcError) -> bool:
    """Whether there was no replica; gRPC has words of its own for one that ends while we write."""
    if error.code() is grpc.StatusCode.INTERNAL:
        return bool(error.details() == "Internal error from Core")
    return error.code() is grpc.StatusCode.UNAVAILABLE


class _Sent:
    """The caller's messages: each replica that is tried gets all of them, from the first one on."""

    def __init__(self, first: bytes, rest: AsyncIterator[bytes]) -> None:
        self._messages: list[bytes | None] = [first]  # None = the caller's end
        self._rest = rest
        self._reading: asyncio.Task[None] | None = None
        self._keeps = True

    def close(self) -> None:
        """The call is over: nobody reads any more."""
        if self._reading is not None:
            self._reading.cancel()

    def forget(self) -> None:
        """A replica has answered: nobody else will be asked, so nothing is kept any more."""
        self._keeps = False

    async def messages(self) -> AsyncIterator[bytes]:
        """All messages; one reader at a time, the one before it may have been cut off."""
        place = 0
        while True:
            while place == len(self._messages):
                if self._reading is None or self._reading.done():
                    self._reading = asyncio.create_task(self._read())
                await asyncio.shield(self._reading)
            message = self._messages[place]
            if message is None:
                return
            yield message
            if self._keeps:
                place += 1
            else:
                del self._messages[: place + 1]
                place = 0

    async def _read(self) -> None:
        self._messages.append(await anext(self._rest, None))
