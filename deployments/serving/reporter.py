"""How a replica's reports reach the controller: pushed from a thread, never waited for by requests.

Once a second the newest report goes out and nobody waits for an answer; a change of state (`tell`)
is waited for, so that a replica that drains knows when the edges have let go of it. A controller
that is away loses nothing: the next second's report says the same again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from deployments.inference import Statistics
from deployments.serving.reports import CONTROLLER, NAMESPACE, ReplicaState, Report

logger = logging.getLogger(__name__)

AWAY = (RayError, ValueError, OSError, TimeoutError)
"""What Ray raises when an actor is not there, restarts, or does not answer in time."""

PERIOD_S = 1.0
TELL_TIMEOUT_S = 10.0
NO_STATISTICS = Statistics()


def node_id() -> str:
    """The Ray node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


def actor_id() -> str:
    """The Ray actor that this process is."""
    return str(ray.get_runtime_context().get_actor_id())


def replica_name() -> str:
    """A name for this process that no other replica has."""
    return f"r-{actor_id()[:16]}"


class Reporter:
    """Sends `make(state, reason)` to the controller, every second and at each change."""

    def __init__(self, make: Callable[[ReplicaState, str], Report]) -> None:
        self._make = make
        self._state, self._reason = ReplicaState.LOADING, ""
        self._stopped = threading.Event()
        self._controller: Any = None
        self._order = threading.Lock()  # what is made first is sent first
        self._thread = threading.Thread(target=self._loop, name="reporter", daemon=True)

    def start(self) -> None:
        """Begin to report."""
        self._thread.start()

    def stop(self) -> None:
        """Report no more."""
        self._stopped.set()

    def tell(self, state: ReplicaState, reason: str = "") -> None:
        """Report a change and wait until the controller has acted on it (or for 10 s)."""
        self._state, self._reason = state, reason
        try:
            ray.get(self._send(), timeout=TELL_TIMEOUT_S)
        except AWAY as error:  # the next report says it again
            logger.warning("the controller did not hear %s: %s", state.value, error)
            self._controller = None

    def _loop(self) -> None:
        while not self._stopped.wait(PERIOD_S):
            try:
                self._send()
            except AWAY as error:  # or restarting; try again in a second
                logger.debug("no report was sent: %s", error)
                self._controller = None

    def _send(self) -> Any:
        with self._order:
            if self._controller is None:
                self._controller = ray.get_actor(CONTROLLER, namespace=NAMESPACE)
            return self._controller.report.remote(self._make(self._state, self._reason))
