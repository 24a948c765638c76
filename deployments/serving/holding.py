"""Requests that wait for a model to wake: bounded, in words of the caller's own protocol.

A held request takes a place in the waiting room, asks the controller to wake the model, waits until
a replica takes requests, and is sent there. Its place is free again when it has been answered, when
its deadline has passed, or when its caller has gone (the task is cancelled).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from deployments.edge.routing import ModelRoute, Server, VersionRoute
from deployments.inference import Fault, InferenceError, ModelStatus, VersionState

RETRY_AFTER_S = 5.0
ASK_AGAIN_S = 2.0


@dataclass(frozen=True, slots=True)
class View:
    """What the controller tells the front desks; `number` grows with every change."""

    number: int
    models: tuple[ModelStatus, ...] = ()
    routes: tuple[ModelRoute, ...] = ()


def refuse_unchecked(model: str, key: bytes | None, checked: bytes | None) -> None:
    """Refuse a model other than the one for which the edge checked the caller's key.

    The edge reads a body more simply than a parser does; where the two find different names, the
    caller may have meant them to. Raises NOT_FOUND.
    """
    if key is not None and model.encode() != (checked or b""):
        raise InferenceError(
            Fault.NOT_FOUND,
            f"Request for unknown model: '{model}' is not the model that the edge read; name it "
            "once, in plain JSON, or in the header x-shoal-model too",
            field="model",
        )


class WaitingRoom:
    """Who waits for which backend. Used on one event loop.

    `wake(backend)` tells the controller, again after each `ask_again_s`.
    """

    def __init__(
        self,
        places_max: int,
        wake: Callable[[str], Awaitable[None]],
        ask_again_s: float = ASK_AGAIN_S,
    ) -> None:
        self._ask_again_s = ask_again_s
        self._places_max = places_max
        self._wake = wake
        self._held: dict[str, int] = {}
        self._view = View(0)
        self._routes: dict[str, tuple[str, VersionRoute]] = {}
        self._changed = asyncio.Event()

    @property
    def held(self) -> dict[str, int]:
        """Requests that wait, by model."""
        return dict(self._held)

    def update(self, view: View) -> None:
        """Take the controller's new view and let everybody look again."""
        self._view = view
        self._routes = {
            version.backend: (model.name, version)
            for model in view.routes
            for version in model.versions
        }
        self._changed.set()
        self._changed = asyncio.Event()

    def backend_of(self, model: str, version: str | None) -> str | None:
        """The backend that a request for `model` means, None if there is no such thing."""
        route = next((m for m in self._view.routes if m.name == model), None)
        if route is None:
            return None
        if version is None:
            version = max(route.split, key=lambda v: route.split[v], default=None)
        named = [v for v in route.versions if v.version == version]
        named += [v for v in route.versions if version in v.labels]
        return named[0].backend if named else None

    def knows(self, backend: str) -> bool:
        """Whether there is such a backend now."""
        return backend in self._routes

    def model_of(self, backend: str) -> str:
        """The model's name, for figures."""
        route = self._routes.get(backend)
        return route[0] if route else backend

    def is_idempotent(self, backend: str) -> bool:
        """Whether a request for `backend` may be sent twice."""
        route = self._routes.get(backend)
        return route[1].idempotent if route else True

    def timeout_s(self, backend: str) -> float:
        """The longest that a request for `backend` may take."""
        route = self._routes.get(backend)
        return route[1].timeout_ms / 1000 if route else 60.0

    @contextmanager
    def place(self, backend: str) -> Iterator[None]:
        """A place in the room while the block runs. Raises OVERLOADED when it is full."""
        name = self.model_of(backend)
        if sum(self._held.values()) >= self._places_max:
            raise InferenceError(
                Fault.OVERLOADED,
                f"{self._places_max} requests already wait for models to wake; try again later",
                retry_after_s=RETRY_AFTER_S,
            )
        self._held[name] = self._held.get(name, 0) + 1
        try:
            yield
        finally:
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]

    async def server(self, backend: str, deadline_s: float, refused: Sequence[str] = ()) -> Server:
        """A replica of `backend` that takes requests, none of those that `refused`.

        Raises UNAVAILABLE if the version can't be had, DEADLINE when `deadline_s` (monotonic)
        passes first.
        """
        while True:
            self._refuse_failed(backend)
            if (left_s := deadline_s - time.monotonic()) <= 0:
                raise InferenceError(
                    Fault.DEADLINE, "the model did not answer before the request's deadline"
                )
            route = self._routes.get(backend)
            free = [s for s in (route[1].servers if route else ()) if s.name not in refused]
            if free:
                return free[time.monotonic_ns() % len(free)]
            await self._wait(backend, left_s)
            refused = ()  # a replica that refused once may have come back

    async def _wait(self, backend: str, left_s: float) -> None:
        """Ask for a wake-up and wait for news, a while at most."""
        changed = self._changed
        await self._wake(backend)
        try:
            await asyncio.wait_for(changed.wait(), min(left_s, self._ask_again_s))
        except TimeoutError:
            return

    def _refuse_failed(self, backend: str) -> None:
        known = self._routes.get(backend)
        if known is None:
            raise InferenceError(
                Fault.UNAVAILABLE, "the model was removed", retry_after_s=RETRY_AFTER_S
            )
        model, route = known
        status = next((m for m in self._view.models if m.name == model), None)
        version = status.version(route.version) if status else None
        if version is not None and version.state is VersionState.FAILED:
            raise InferenceError(
                Fault.UNAVAILABLE,
                f"version {version.version!r} of model {model!r} could not be loaded: "
                f"{version.reason}",
            )
