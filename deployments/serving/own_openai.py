"""What stands between OpenAI's routes and a model that answers them itself (vLLM)?

    POST /v1/chat/completions ─► is it our model? a place? ─► the model's own app

Its own app knows the model by its plain name, while callers may write `name@version` or
`name@label`; and it takes any number of requests, while the model file sets a bound.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import orjson

from deployments.inference import Catalog, Engine
from deployments.serving.delegation import ASGIApp, Message, Receive, Send
from deployments.serving.protocols import openai_messages
from deployments.serving.protocols.descriptions import model_status, version_status
from deployments.serving.protocols.openai_messages import unknown_model


class OwnOpenAI:
    """An ASGI app for `Application`'s `delegates`. `place()` holds one of the engine's places."""

    def __init__(
        self,
        catalog: Catalog,
        engine: Engine,
        app: ASGIApp,
        place: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._catalog = catalog
        self._engine = engine
        self._app = app
        self._place = place

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer, or raise `InferenceError`."""
        message = await receive()
        document = openai_messages.parsed(message["body"])
        model = openai_messages.model_of(document)
        if model != self._engine.model:
            self._check(model, scope["headers"])
            message["body"] = orjson.dumps({**document, "model": self._engine.model})
            scope = _resized(scope, len(message["body"]))
        with self._place():
            await self._app(scope, _first(message, receive), send)

    def _check(self, model: str, headers: list[tuple[bytes, bytes]]) -> None:
        """Refuse a model or version that is not the engine's."""
        engine = self._engine
        name, _, version = model.partition("@")
        if name != engine.model or not version:
            raise unknown_model(model)
        backend = dict(headers).get(b"x-shoal-backend", b"").decode("latin-1")
        if version == engine.version or backend.split("--")[:2] == [name, engine.version]:
            return
        status = version_status(model_status(self._catalog, name), version)
        if status.version != engine.version:
            raise unknown_model(model)


def _resized(scope: Any, size: int) -> Any:
    headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", b"%d" % size)]}


def _first(message: Message, receive: Receive) -> Receive:
    """`receive` with `message` put back before what comes."""
    waiting = [message]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again
