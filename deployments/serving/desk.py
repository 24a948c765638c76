"""What does the front desk do with a request, whoever runs it?

    edge ─┬─ GET lists, metadata, health ──► catalog (what the controller last said)
          ├─ request without a live replica ► waiting room ─ wake ─► controller; then ─► replica
          └─ /admin/v1 ────────────────────► controller

The controller is two arguments: `ask(action, arguments, actor)` answers an action or raises
`InferenceError`, `wake(backend)` tells that a request waits. Its views come in by `update`. Actors
and Ray are `frontdesk`'s.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import grpc

from deployments.inference import Fault, InferenceError
from deployments.serving import openapi
from deployments.serving.admin import Admin, Ask
from deployments.serving.application import Application
from deployments.serving.catalog import ClusterCatalog
from deployments.serving.forwarding import Forwarder, Unanswered
from deployments.serving.grpc_forwarding import GrpcForwarder
from deployments.serving.holding import View, WaitingRoom, refuse_unchecked
from deployments.serving.http import Dialect, HttpRequest, HttpResponse, HttpStream, Route
from deployments.serving.meter import DeskMeter
from deployments.serving.protocols import oip, openai, openai_messages, tfserving
from deployments.serving.protocols.oip_grpc import start_server

Answer = HttpResponse | HttpStream


@dataclass(frozen=True, slots=True)
class DeskOrder:
    """What a front desk needs to know; `held_requests_max` bounds its waiting room."""

    host: str
    edge_token: str
    held_requests_max: int
    drain_timeout_s: float


class Desk:
    """The front desk's HTTP application and gRPC server. Used on one event loop."""

    def __init__(
        self,
        order: DeskOrder,
        ask: Ask,
        wake: Callable[[str], Awaitable[None]],
        meter: DeskMeter,
    ) -> None:
        self.is_ready = False
        self.room = WaitingRoom(order.held_requests_max, wake)
        self._order = order
        self._ask = ask
        self._meter = meter
        self._catalog = ClusterCatalog(self._switch)
        self._forwarder = Forwarder()
        self._grpc: grpc.aio.Server | None = None
        self.application = self._made_application()

    def update(self, view: View) -> None:
        """Take what the controller says now; the desk is ready when it has heard it once."""
        self._catalog.update(view.models)
        self.room.update(view)
        self.is_ready = True

    async def open_grpc(self) -> int:
        """Answer gRPC; the port that was bound."""
        order = self._order
        self._grpc, port = await start_server(
            self._catalog,
            None,
            order.host,
            0,
            edge_token=order.edge_token,
            ready=lambda: self.is_ready,
            count=self.application.count,
            forwarder=GrpcForwarder(self.room, self._meter, order.edge_token),
        )
        return port

    async def close(self) -> None:
        """Answer nothing more."""
        if self._grpc is not None:
            await self._grpc.stop(1)
        await self._forwarder.close()

    def _made_application(self) -> Application:
        catalog = self._catalog
        inference: tuple[tuple[Dialect, tuple[str, ...]], ...] = (
            (oip.OpenInference(catalog, None), oip.INFERENCE_TEMPLATES),
            (tfserving.TensorFlowServing(catalog, None), tfserving.INFERENCE_TEMPLATES),
            (openai.OpenAI(catalog, None), openai.INFERENCE_TEMPLATES),
        )
        dialects = [*(dialect for dialect, _ in inference), Admin(self._ask)]
        routes = [
            Route("POST", template, partial(self._hold, dialect))
            for dialect, templates in inference
            for template in templates
        ]
        return Application(
            catalog,
            None,
            dialects,
            edge_token=self._order.edge_token,
            ready=lambda: self.is_ready,
            routes=[*routes, *openapi.routes(dialects, routes)],
        )

    async def _switch(self, name: str, is_on: bool) -> None:
        await self._ask("load" if is_on else "unload", {"name": name}, "")

    # held requests

    async def _hold(self, dialect: Dialect, request: HttpRequest) -> Answer:
        """Wait for a replica of the version that is meant, then let it answer."""
        backend = self._backend(request)
        limit_s = time.monotonic() + self.room.timeout_s(backend)
        deadline_s = min(request.deadline_s() or limit_s, limit_s)
        with self.room.place(backend), self._meter.holding(self.room, backend):
            return await self._answered(dialect, request, backend, deadline_s)

    async def _answered(
        self, dialect: Dialect, request: HttpRequest, backend: str, deadline_s: float
    ) -> Answer:
        refused: list[str] = []
        start_s = time.monotonic()
        while True:
            server = await self.room.server(backend, deadline_s, refused)
            now_s = time.monotonic()
            if not refused:
                self._meter.woken(self.room.model_of(backend), now_s - start_s)
            left_s = max(0.1, deadline_s - now_s)
            try:
                return await self._forwarder.send(request, server, left_s, _broken(dialect))
            except Unanswered as error:
                is_final = error.was_sent and not self.room.is_idempotent(backend)
                if is_final and time.monotonic() < deadline_s:
                    raise InferenceError(
                        Fault.UNAVAILABLE,
                        "the replica went away while it answered, and the model's file forbids "
                        "to send a request twice (idempotent: false)",
                    ) from None
                refused.append(server.name)

    def _backend(self, request: HttpRequest) -> str:
        """The backend that the edge chose, or that the request names. Raises NOT_FOUND."""
        chosen = (request.header(b"x-shoal-backend") or b"").decode("latin-1")
        if chosen and self.room.knows(chosen):
            return chosen
        model, version = _named(request)
        refuse_unchecked(model, request.header(b"x-shoal-key"), request.header(b"x-shoal-model"))
        backend = self.room.backend_of(model, version)
        if backend is None:
            what = f"'{model}' version '{version}'" if version else f"'{model}'"
            raise InferenceError(
                Fault.NOT_FOUND, f"Request for unknown model: {what} is not found", field="model"
            )
        return backend


def _broken(dialect: Dialect) -> bytes:
    """The last event of a stream whose replica went away, in the caller's protocol."""
    error = InferenceError(Fault.UNAVAILABLE, "the replica went away in the middle of its answer")
    return b"data: " + dialect.error(error).body + b"\n\n"


def _named(request: HttpRequest) -> tuple[str, str | None]:
    """Model and version as the path or the body says. Raises INVALID if neither does."""
    if "model" in request.parameters:
        version = request.parameters.get("version") or request.parameters.get("label")
        return request.parameters["model"], version
    document = openai_messages.parsed(request.body)
    model, _, version = openai_messages.model_of(document).partition("@")
    return model, version or None
