"""A small replica to route to: says who it is and what reached it.

In a thread of the test (`Upstream`), or as a process to be killed (`python -m … PORT GRPC_PORT`).
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
import uvicorn
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deployments.serving.listener import JoinedWrites
from tests.deployments.edge.ports import free_port

Message = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


@dataclass
class Replica:
    """An ASGI application. `status`, `delay_s` and `ready` may change while it runs."""

    name: str
    status: int = 200
    delay_s: float = 0.0
    is_ready: bool = True
    seen: int = 0
    last: dict[str, str] = field(default_factory=dict)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/readyz":
            await self._answer(send, 200 if self.is_ready else 503, {})
            return
        body = await _body(receive)
        self.seen += 1
        self.last = {k.decode(): v.decode("latin-1") for k, v in scope["headers"]}
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        seen = {"name": self.name, "path": scope["path"], "body_bytes": len(body)}
        await self._answer(send, self.status, {**seen, "headers": self.last})

    async def _answer(self, send: Send, status: int, content: Message) -> None:
        body = json.dumps(content).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def _body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if not message.get("more_body"):
            return body


def _server(replica: Replica, port: int) -> uvicorn.Server:
    config = uvicorn.Config(
        replica,
        host="127.0.0.1",
        port=port,
        http=JoinedWrites,
        log_level="error",
        timeout_keep_alive=120,
        lifespan="off",
    )
    return uvicorn.Server(config)


class Upstream(Replica):
    """A replica in a thread; `start` returns when it answers."""

    def start(self) -> Upstream:
        self.port = free_port()
        self._uvicorn = _server(self, self.port)
        self._thread = threading.Thread(target=self._uvicorn.run, daemon=True)
        self._thread.start()
        while not self._uvicorn.started:
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        self._uvicorn.should_exit = True
        self._uvicorn.force_exit = True
        self._thread.join(10)


class GrpcUpstream(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The gRPC side of a replica: its name is the answer's id."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.metadata: dict[str, str] = {}
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None)

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.metadata = dict(context.invocation_metadata())
        return service_pb2.ModelInferResponse(
            model_name=request.model_name, model_version=request.model_version, id=self.name
        )

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        for request in requests:
            answer = self.ModelInfer(request, context)
            yield service_pb2.ModelStreamInferResponse(infer_response=answer)

    def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)

    def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelMetadataResponse(name=request.name, platform=self.name)


class AsyncGrpc(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """As a replica does it: head, message and trailer of an answer leave in one piece."""

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelInferResponse(model_name=request.model_name)


async def _serve(port: int, grpc_port: int) -> None:
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(AsyncGrpc(), server)
    server.add_insecure_port(f"127.0.0.1:{grpc_port}")
    await server.start()
    await _server(Replica("killable"), port).serve()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2])))
