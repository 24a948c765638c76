"""How does Shoal speak the Open Inference Protocol over gRPC?

The service `inference.GRPCInferenceService` with the messages of Triton's own client, so that
clients of Triton, KServe and MLServer find what they know. Requests are parsed here rather than by
gRPC, which would call a garbled message an internal error: it is the caller's, INVALID_ARGUMENT.

    ModelInfer        one request, one answer
    ModelStreamInfer  many requests on a stream; models that generate answer each in pieces
    the rest          from the catalog

Who must hold requests until a model is awake (the front desk) gives a `Forwarder`: it gets the
inference calls as bytes, and nothing of them is parsed here.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import grpc
from tritonclient.grpc import service_pb2

from deployments.inference import Catalog, Engine, Fault, InferenceError
from deployments.serving.deadlines import deadline_in
from deployments.serving.protocols.oip_proto import data_of, message
from deployments.serving.protocols.oip_servicer import Observe, Servicer, metadata_value

SERVICE = "/inference.GRPCInferenceService/"
HEALTH = "/grpc.health.v1.Health/Check"
MESSAGE_BYTES_MAX = 256 * 1024 * 1024

STATUS: Mapping[Fault, Any] = {
    Fault.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Fault.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Fault.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    Fault.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Fault.TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Fault.UNSUPPORTED_MEDIA: grpc.StatusCode.INVALID_ARGUMENT,
    Fault.METHOD_NOT_ALLOWED: grpc.StatusCode.UNIMPLEMENTED,
    Fault.CONFLICT: grpc.StatusCode.ABORTED,
    Fault.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Fault.UNIMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
    Fault.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Fault.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Fault.INTERNAL: grpc.StatusCode.INTERNAL,
}
"""The gRPC status of each fault."""

_SERVING, _NOT_SERVING = b"\x08\x01", b"\x08\x02"  # HealthCheckResponse
_DETAILS_MAX = 1000  # they travel in a header
_log = logging.getLogger(__name__)

Metadata = Sequence[tuple[str, str | bytes]]
Count = Callable[[int], None]


class Forwarder(Protocol):
    """Answers inference calls elsewhere, message by message.

    Raises `InferenceError`, or `grpc.aio.AioRpcError` whose status goes to the caller as it is.
    """

    def __call__(
        self,
        method: str,
        metadata: Metadata,
        requests: AsyncIterator[bytes],
        deadline_s: float | None,
    ) -> AsyncIterator[bytes]: ...


async def start_server(
    catalog: Catalog,
    engine: Engine | None,
    host: str,
    port: int,
    *,
    edge_token: str | None = None,
    server_name: str = "shoal",
    ready: Callable[[], bool] | None = None,
    message_bytes_max: int = MESSAGE_BYTES_MAX,
    observe: Observe | None = None,
    count: Count | None = None,
    forwarder: Forwarder | None = None,
) -> tuple[grpc.aio.Server, int]:
    """Answer gRPC on the running event loop; the server and the port that was bound.

    Whoever calls keeps the server: without a reference it stops. `await server.stop(grace_s)` ends
    it after its calls. `observe("grpc", fault, seconds)` hears of each inference request, and
    `count(+1)`, `count(-1)` of the calls that begin and end. Raises `OSError` if it can't bind.
    """
    servicer = Servicer(catalog, engine, server_name, ready, observe or _unobserved)
    calls = _Calls(servicer, edge_token, count, forwarder)
    server = grpc.aio.server(
        handlers=[calls],
        options=[
            ("grpc.max_receive_message_length", message_bytes_max),
            ("grpc.max_send_message_length", message_bytes_max),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
        ],
    )
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise OSError(f"can't bind {host}:{port} for gRPC: {error}") from None
    await server.start()
    return server, bound


def _unobserved(protocol: str, fault: Fault | None, seconds: float) -> None:
    """Nobody counts."""


class _Calls(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Finds a call's method; checks its token, counts it and turns its errors into statuses."""

    def __init__(
        self,
        servicer: Servicer,
        edge_token: str | None,
        count: Count | None,
        forwarder: Forwarder | None,
    ) -> None:
        self._servicer = servicer
        self._token = None if edge_token is None else edge_token.encode()
        self._count = count
        self._forwarder = forwarder
        self._handlers = self._made_handlers()

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a method; None makes gRPC answer UNIMPLEMENTED."""
        return self._handlers.get(handler_call_details.method)

    def _made_handlers(self) -> dict[str, Any]:
        servicer = self._servicer
        handlers: dict[str, Any] = {
            f"{SERVICE}{name}": grpc.unary_unary_rpc_method_handler(self._unary(kind, method))
            for name, kind, method in (
                ("ServerLive", service_pb2.ServerLiveRequest, servicer.server_live),
                ("ServerReady", service_pb2.ServerReadyRequest, servicer.server_ready),
                ("ModelReady", service_pb2.ModelReadyRequest, servicer.model_ready),
                ("ServerMetadata", service_pb2.ServerMetadataRequest, servicer.server_metadata),
                ("ModelMetadata", service_pb2.ModelMetadataRequest, servicer.model_metadata),
                ("ModelConfig", service_pb2.ModelConfigRequest, servicer.model_config),
                ("ModelStatistics", service_pb2.ModelStatisticsRequest, servicer.model_statistics),
                ("RepositoryIndex", service_pb2.RepositoryIndexRequest, servicer.repository_index),
                (
                    "RepositoryModelLoad",
                    service_pb2.RepositoryModelLoadRequest,
                    servicer.repository_load,
                ),
                (
                    "RepositoryModelUnload",
                    service_pb2.RepositoryModelUnloadRequest,
                    servicer.repository_unload,
                ),
            )
        }
        handlers[HEALTH] = grpc.unary_unary_rpc_method_handler(self._health)
        handlers[f"{SERVICE}ModelInfer"] = grpc.unary_unary_rpc_method_handler(
            self._guarded(servicer.infer)
        )
        handlers[f"{SERVICE}ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self._guarded(servicer.stream_infer)
        )
        if self._forwarder is not None:
            for name in ("ModelInfer", "ModelStreamInfer"):
                handlers[f"{SERVICE}{name}"] = grpc.stream_stream_rpc_method_handler(
                    self._guarded(self._forwarding(f"{SERVICE}{name}", self._forwarder))
                )
        return handlers

    def _unary(self, kind: Any, method: Callable[[Any], Awaitable[Any]]) -> Any:
        async def answer(data: bytes, context: Any) -> bytes:
            return data_of(await method(message(kind, data)))

        return self._guarded(answer)

    def _forwarding(self, name: str, forwarder: Forwarder) -> Any:
        async def forward(requests: AsyncIterator[bytes], context: Any) -> None:
            deadline_s = deadline_in(context.time_remaining())
            metadata = tuple(context.invocation_metadata() or ())
            async for data in forwarder(name, metadata, requests, deadline_s):
                await context.write(data)

        return forward

    def _guarded(self, behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Any:
        """The behaviour of one call, whose errors are statuses and tell nothing of our insides."""

        async def call(request: Any, context: Any) -> Any:
            if self._count is not None:
                self._count(1)
            try:
                if self._token is not None:
                    self._check_edge(context)
                return await behaviour(request, context)
            except InferenceError as error:
                await _abort(context, error)
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details() or "")
            except grpc.aio.AbortError:
                raise
            except Exception:  # noqa: BLE001  # the last resort: nobody hears of our insides
                _log.exception("a gRPC call failed")
                await context.abort(
                    grpc.StatusCode.INTERNAL, "internal error; the server's log says more"
                )
            finally:
                if self._count is not None:
                    self._count(-1)
            return None

        return call

    async def _health(self, data: bytes, context: Any) -> bytes:
        """For probes, which know no token."""
        return _SERVING if self._servicer.is_ready() else _NOT_SERVING

    def _check_edge(self, context: Any) -> None:
        token = metadata_value(context, "x-shoal-edge")
        if not hmac.compare_digest(token.encode(), self._token or b""):
            raise InferenceError(
                Fault.FORBIDDEN, "this port answers the edge only; send requests to the edge"
            )


async def _abort(context: Any, error: InferenceError) -> None:
    trailing: tuple[tuple[str, str], ...] = ()
    if error.retry_after_s is not None:
        trailing = (("retry-after", str(max(1, round(error.retry_after_s)))),)
    await context.abort(STATUS[error.fault], error.message[:_DETAILS_MAX], trailing)
