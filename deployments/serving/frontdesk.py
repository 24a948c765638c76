"""What HAProxy cannot do: hold requests for a sleeping model, the admin API, lists and docs.

The front desk is a Serve app with a door of its own, like a replica. The edge sends it everything
that is not an inference request for a living version. It is never between a client and a running
model: if it is away, models answer on.

    edge ─┬─ GET lists, metadata, health ──► catalog (what the controller last said)
          ├─ request without a live replica ► waiting room ─ wake ─► controller; then ─► replica
          └─ /admin/v1 ────────────────────► controller
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from deployments.edge.routing import Server
from deployments.inference import Fault, InferenceError
from deployments.serving import openapi, reporter
from deployments.serving.admin import Admin
from deployments.serving.application import Application
from deployments.serving.catalog import ClusterCatalog
from deployments.serving.forwarding import Forwarder, Unanswered
from deployments.serving.grpc_forwarding import GrpcForwarder
from deployments.serving.holding import View, WaitingRoom
from deployments.serving.http import HttpRequest, HttpResponse, HttpStream, Route
from deployments.serving.listener import Listener
from deployments.serving.meter import DeskMeter, process_meters
from deployments.serving.protocols import oip, openai, openai_messages, tfserving
from deployments.serving.protocols.oip_grpc import start_server
from deployments.serving.reports import CONTROLLER, DESK, NAMESPACE, ReplicaState, Report

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class DeskOrder:
    """What a front desk needs to know; `held_requests_max` bounds its waiting room."""

    host: str
    edge_token: str
    held_requests_max: int
    drain_timeout_s: float


class FrontDesk:
    """The body of the front desk's Serve deployment."""

    def __init__(self, order: DeskOrder) -> None:
        self._order = order
        self._is_ready = False
        self._application: Application | None = None
        self._server: Server | None = None
        self._listener = Listener()
        self._listener.run(self._open())
        self._reporter = reporter.Reporter(self._report)
        self._reporter.start()
        self._reporter.tell(ReplicaState.READY)

    async def _open(self) -> None:
        order = self._order
        self._meter = DeskMeter(process_meters())
        self._room = WaitingRoom(order.held_requests_max, self._wake)
        self._catalog = ClusterCatalog(self._switch)
        self._forwarder = Forwarder()
        dialects = (
            oip.OpenInference(self._catalog, None),
            tfserving.TensorFlowServing(self._catalog, None),
            openai.OpenAI(self._catalog, None),
            Admin(self._ask),
        )
        templates = (
            *oip.INFERENCE_TEMPLATES,
            *tfserving.INFERENCE_TEMPLATES,
            *openai.INFERENCE_TEMPLATES,
        )
        routes = [Route("POST", template, self._hold) for template in templates]
        self._application = Application(
            self._catalog,
            None,
            dialects,
            edge_token=order.edge_token,
            ready=lambda: self._is_ready,
            routes=[*routes, *openapi.routes(dialects, routes)],
        )
        port = await self._listener.serve_http(self._application, order.host)
        self._grpc, grpc_port = await start_server(
            self._catalog,
            None,
            order.host,
            0,
            edge_token=order.edge_token,
            ready=lambda: self._is_ready,
            count=self._application.count,
            forwarder=GrpcForwarder(self._room, self._meter, order.edge_token),
        )
        self._server = Server(reporter.replica_name(), order.host, port, grpc_port)
        self._following = asyncio.create_task(self._follow())

    # what the controller says

    async def _follow(self) -> None:
        """Take every new view of the controller; keep the last one while it is away."""
        known = 0
        while True:
            try:
                view: View = await _answer(_controller().view.remote(known))
            except reporter.AWAY as error:
                logger.info("the controller is away, the last view stays: %s", error)
                await asyncio.sleep(0.5)
                known = 0
                continue
            if view.number != known:
                known = view.number
                self._catalog.update(view.models)
                self._room.update(view)
                self._is_ready = True

    async def _wake(self, backend: str) -> None:
        try:
            _controller().wake.remote(backend)
        except reporter.AWAY as error:  # asked again in a moment
            logger.info("the controller did not hear the wake-up: %s", error)

    async def _switch(self, name: str, is_on: bool) -> None:
        await self._ask("load" if is_on else "unload", {"name": name}, "")

    async def _ask(self, action: str, arguments: Mapping[str, Any], actor: str) -> Any:
        """The controller's answer to an admin action. Raises `InferenceError`."""
        try:
            reply = await _answer(_controller().administer.remote(action, dict(arguments), actor))
        except reporter.AWAY as error:
            logger.warning("the controller did not answer %s: %s", action, error)
            raise InferenceError(
                Fault.UNAVAILABLE,
                "the controller is away (models go on answering); try again",
                retry_after_s=2,
            ) from None
        if reply.fault is not None:
            raise InferenceError(Fault(reply.fault), reply.message)
        return reply.value

    # held requests

    async def _hold(self, request: HttpRequest) -> HttpResponse | HttpStream:
        """Wait for a replica of the version that is meant, then let it answer."""
        backend = self._backend(request)
        start_s = time.monotonic()
        timeout_s = self._room.timeout_s(backend)
        deadline_s = min(request.deadline_s() or float("inf"), start_s + timeout_s)
        with self._room.place(backend), self._meter.holding(self._room, backend):
            return await self._answered(request, backend, deadline_s)

    async def _answered(
        self, request: HttpRequest, backend: str, deadline_s: float
    ) -> HttpResponse | HttpStream:
        refused: list[str] = []
        while True:
            server = await self._room.server(backend, deadline_s, refused)
            try:
                return await self._forwarder.send(
                    request, server, max(0.1, deadline_s - time.monotonic())
                )
            except Unanswered as error:
                if error.was_sent and not self._room.is_idempotent(backend):
                    raise InferenceError(
                        Fault.UNAVAILABLE,
                        "the replica went away while it answered, and the model's file forbids "
                        "to send a request twice (idempotent: false)",
                    ) from None
                refused.append(server.name)

    def _backend(self, request: HttpRequest) -> str:
        """The backend that the edge chose, or that the request names. Raises NOT_FOUND."""
        chosen = (request.header(b"x-shoal-backend") or b"").decode("latin-1")
        if chosen and self._room.knows(chosen):
            return chosen
        model, version = _named(request)
        backend = self._room.backend_of(model, version)
        if backend is None:
            what = f"'{model}' version '{version}'" if version else f"'{model}'"
            raise InferenceError(
                Fault.NOT_FOUND, f"Request for unknown model: {what} is not found", field="model"
            )
        return backend

    def _report(self, state: ReplicaState, reason: str) -> Report:
        return Report(
            replica=reporter.replica_name(),
            backend=DESK,
            state=state,
            pid=os.getpid(),
            node=reporter.node_id(),
            actor=reporter.actor_id(),
            server=self._server,
            ongoing=self._application.ongoing if self._application else 0,
            reason=reason,
        )

    async def check_health(self) -> None:
        """Serve asks: does the door's event loop turn?"""
        turn = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._listener.loop)
        await asyncio.wait_for(asyncio.wrap_future(turn), 10)

    async def __del__(self) -> None:
        """Serve stops this desk: leave the edges, finish what is inside."""
        if self._application is None:
            return
        deadline_s = time.monotonic() + self._order.drain_timeout_s
        self._is_ready = False
        await asyncio.to_thread(self._reporter.tell, ReplicaState.DRAINING)
        while self._application.ongoing and time.monotonic() < deadline_s:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self._reporter.tell, ReplicaState.GONE)
        self._reporter.stop()


def _controller() -> Any:
    return ray.get_actor(CONTROLLER, namespace=NAMESPACE)


async def _answer(reference: Any) -> Any:
    """The result of an actor call, awaited on any event loop."""
    future = asyncio.wrap_future(reference.future())
    return await asyncio.wait_for(future, ANSWER_TIMEOUT_S)


def _named(request: HttpRequest) -> tuple[str, str | None]:
    """Model and version as the path or the body says. Raises INVALID if neither does."""
    if "model" in request.parameters:
        version = request.parameters.get("version") or request.parameters.get("label")
        return request.parameters["model"], version
    model, _, version = openai_messages.model_of(openai_messages.parsed(request.body)).partition(
        "@"
    )
    return model, version or None
