"""What HAProxy cannot do: hold requests for a sleeping model, the admin API, lists and docs.

The front desk is a Serve app with a door of its own, like a replica. The edge sends it everything
that is not an inference request for a living version. It is never between a client and a running
model: if it is away, models answer on. What it does with a request is `desk`'s; here it is an actor
that reports, drains and talks to the controller.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayTaskError

from deployments.edge.routing import Server
from deployments.inference import Fault, InferenceError
from deployments.serving import reporter
from deployments.serving.desk import Desk, DeskOrder
from deployments.serving.holding import View
from deployments.serving.listener import Listener
from deployments.serving.meter import DeskMeter, process_meters
from deployments.serving.reports import CONTROLLER, DESK, NAMESPACE, ReplicaState, Report

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 30.0


class FrontDesk:
    """The body of the front desk's Serve deployment."""

    def __init__(self, order: DeskOrder) -> None:
        self._order = order
        self._server: Server | None = None
        self._listener = Listener()
        self._desk = self._listener.run(self._open())
        self._reporter = reporter.Reporter(self._report)
        self._reporter.start()
        self._reporter.tell(ReplicaState.READY)

    async def _open(self) -> Desk:
        desk = Desk(self._order, _ask, _wake, DeskMeter(process_meters()))
        port = await self._listener.serve_http(desk.application, self._order.host)
        grpc_port = await desk.open_grpc()
        self._server = Server(reporter.replica_name(), self._order.host, port, grpc_port)
        self._following = asyncio.create_task(_follow(desk))
        return desk

    def _report(self, state: ReplicaState, reason: str) -> Report:
        return Report(
            replica=reporter.replica_name(),
            backend=DESK,
            state=state,
            pid=os.getpid(),
            node=reporter.node_id(),
            actor=reporter.actor_id(),
            server=self._server,
            ongoing=self._desk.application.ongoing,
            reason=reason,
        )

    async def check_health(self) -> None:
        """Serve asks: does the door's event loop turn?"""
        if self._following.done():
            raise RuntimeError("the front desk hears nothing of the controller any more")
        turn = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._listener.loop)
        await asyncio.wait_for(asyncio.wrap_future(turn), 10)

    async def __del__(self) -> None:
        """Serve stops this desk: leave the edges, finish what is inside, close."""
        if self._server is None:
            return
        deadline_s = time.monotonic() + self._order.drain_timeout_s
        self._desk.is_ready = False
        await asyncio.to_thread(self._reporter.tell, ReplicaState.DRAINING)
        while self._desk.application.ongoing and time.monotonic() < deadline_s:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self._reporter.tell, ReplicaState.GONE)
        self._reporter.stop()


# what the controller says, and what it is told


async def _follow(desk: Desk) -> None:
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
            desk.update(view)


async def _wake(backend: str) -> None:
    try:
        _controller().wake.remote(backend)
    except reporter.AWAY as error:  # asked again in a moment
        logger.info("the controller did not hear the wake-up: %s", error)


async def _ask(action: str, arguments: Mapping[str, Any], actor: str) -> Any:
    """The controller's answer to an admin action. Raises `InferenceError`."""
    try:
        reply = await _answer(_controller().administer.remote(action, dict(arguments), actor))
    except RayTaskError as error:  # it is there, but broke over this
        logger.exception("the controller failed at %s", action)
        raise InferenceError(
            Fault.INTERNAL, f"the controller failed at {action}: {error.cause}"
        ) from None
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


def _controller() -> Any:
    return ray.get_actor(CONTROLLER, namespace=NAMESPACE)


async def _answer(reference: Any) -> Any:
    """The result of an actor call, awaited on any event loop."""
    future = asyncio.wrap_future(reference.future())
    return await asyncio.wait_for(future, ANSWER_TIMEOUT_S)
