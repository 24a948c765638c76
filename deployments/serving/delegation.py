"""How does an ASGI app inside this one answer a request whose body has been read?

A model's own server (vLLM's for OpenAI's API) answers without anything between it and the socket:
it gets the scope, the whole body as one message, and sends what it likes. Only the first message it
sends is looked at, for its status.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from deployments.inference import Fault
from deployments.serving.http import HttpRequest

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_FAULTS = {
    401: Fault.UNAUTHENTICATED,
    403: Fault.FORBIDDEN,
    404: Fault.NOT_FOUND,
    409: Fault.CONFLICT,
    413: Fault.TOO_LARGE,
    415: Fault.UNSUPPORTED_MEDIA,
    429: Fault.OVERLOADED,
    500: Fault.INTERNAL,
    501: Fault.UNIMPLEMENTED,
    503: Fault.UNAVAILABLE,
    504: Fault.DEADLINE,
}
_CHANGED = (b"content-encoding", b"content-length", b"transfer-encoding")


class Replay:
    """The ASGI side of a request that has been read: `scope`, `receive` and `send` for the app.

    `status` is the app's, None while it has not begun to answer.
    """

    def __init__(self, request: HttpRequest, receive: Receive, send: Send) -> None:
        self._body: bytes | None = request.body
        self._receive = receive
        self._send = send
        self.status: int | None = None

    def scope(self, scope: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """The scope, whose headers tell of the body as it is now."""
        headers = [(k, v) for k, v in scope["headers"] if k not in _CHANGED]
        headers.append((b"content-length", b"%d" % len(self._body or b"")))
        return {**scope, "headers": headers}

    async def receive(self) -> Message:
        """The body at first, then what the client does (it hangs up)."""
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        """On to the client."""
        if self.status is None and message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    @property
    def fault(self) -> Fault | None:
        """How the answer ended, as its status says."""
        if self.status is None or self.status < 400:
            return None
        return _FAULTS.get(self.status, Fault.INVALID if self.status < 500 else Fault.INTERNAL)
