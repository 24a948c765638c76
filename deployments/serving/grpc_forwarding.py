"""How the front desk holds a gRPC call and sends it on, message by message, unread.

Only the first message is looked at, for the model's name, where the edge did not say which backend
it had chosen.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from deployments.edge.routing import Server
from deployments.inference import Fault, InferenceError
from deployments.serving.holding import WaitingRoom
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
        with self._room.place(backend), self._meter.holding(self._room, backend):
            async for data in self._answers(backend, method, first, requests, deadline_s):
                yield data

    def _backend(self, metadata: Metadata, first: bytes) -> str:
        chosen = dict(metadata).get("x-shoal-backend", "")
        if isinstance(chosen, str) and self._room.knows(chosen):
            return chosen
        sent = message(service_pb2.ModelInferRequest, first)
        backend = self._room.backend_of(sent.model_name, sent.model_version or None)
        if backend is None:
            raise InferenceError(
                Fault.NOT_FOUND, f"Request for unknown model: '{sent.model_name}' is not found"
            )
        return backend

    async def _answers(
        self,
        backend: str,
        method: str,
        first: bytes,
        rest: AsyncIterator[bytes],
        deadline_s: float,
    ) -> AsyncIterator[bytes]:
        """The answers of the first replica that gives any; others are asked if it is away."""
        refused: list[str] = []
        while True:
            server = await self._room.server(backend, deadline_s, refused)
            began = False
            try:
                async for data in self._call(server, backend, method, first, rest, deadline_s):
                    began = True
                    yield data
                return
            except grpc.aio.AioRpcError as error:
                is_away = error.code() is grpc.StatusCode.UNAVAILABLE
                if began or not is_away or not self._room.is_idempotent(backend):
                    raise
                refused.append(server.name)

    async def _call(
        self,
        server: Server,
        backend: str,
        method: str,
        first: bytes,
        rest: AsyncIterator[bytes],
        deadline_s: float,
    ) -> AsyncIterator[bytes]:
        async def messages() -> AsyncIterator[bytes]:
            yield first
            async for data in rest:
                yield data

        address = f"{server.host}:{server.grpc_port}"
        options: dict[str, Any] = {
            "metadata": (("x-shoal-edge", self._token), ("x-shoal-backend", backend)),
            "timeout": max(0.1, deadline_s - time.monotonic()),
        }
        async with grpc.aio.insecure_channel(address, options=_LIMITS) as channel:
            async for data in channel.stream_stream(method)(messages(), **options):
                yield data
