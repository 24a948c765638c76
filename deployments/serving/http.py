"""What a protocol sees of HTTP: whole requests in, whole answers or streams out.

Sockets, chunks, compression and limits stay in `application`; a protocol is a list of `Route`s and
a way to put an `InferenceError` in its own form.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from deployments.inference import Fault, InferenceError

Headers = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class HttpRequest:
    """A request whose body has arrived. `path` is percent-decoded; header names are lower case.

    `parameters` are the values of the route's `{…}` parts.
    """

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    parameters: Mapping[str, str]

    def header(self, name: bytes) -> bytes | None:
        """The first value of the header `name` (lower case), or None."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def deadline_s(self) -> float | None:
        """The caller's deadline (`x-request-timeout-ms`) on the monotonic clock, or None.

        Raises `InferenceError(INVALID)` when the header is not a positive number.
        """
        text = self.header(b"x-request-timeout-ms")
        if text is None:
            return None
        try:
            timeout_ms = float(text)
        except ValueError:
            timeout_ms = -1.0
        if not 0 < timeout_ms < 1e9:
            raise InferenceError(
                Fault.INVALID,
                f"header x-request-timeout-ms must be a positive number of milliseconds, "
                f"not {text.decode('latin-1')!r}",
            )
        return time.monotonic() + timeout_ms / 1000


@dataclass(slots=True)
class HttpResponse:
    """A whole answer. `headers` come besides content-type and content-length."""

    status: int
    body: bytes
    content_type: bytes = b"application/json"
    headers: Sequence[tuple[bytes, bytes]] = ()


@dataclass(slots=True)
class HttpStream:
    """An answer in pieces, sent as they come. `pieces` may raise nothing: errors go in the stream.

    Closing it (`aclose`) when the client has gone cancels the work behind it.
    """

    pieces: AsyncIterator[bytes]
    status: int = 200
    content_type: bytes = b"text/event-stream; charset=utf-8"
    headers: Sequence[tuple[bytes, bytes]] = ()


Handler = Callable[[HttpRequest], Awaitable[HttpResponse | HttpStream]]


@dataclass(frozen=True, slots=True)
class Route:
    """`template` such as `/v2/models/{model}/infer`; a `{part}` matches one segment, no slash.

    `{model}` in a replica is always its own model, so `application` makes exact paths of it.
    """

    method: str
    template: str
    handler: Handler


class Dialect(Protocol):
    """One protocol's HTTP side."""

    prefixes: Sequence[str]
    """Paths below these get this dialect's error form, even where no route matches."""

    def routes(self) -> Sequence[Route]: ...

    def error(self, error: InferenceError) -> HttpResponse:
        """The error in this protocol's own form, with Retry-After where it says when."""
        ...


def retry_after(error: InferenceError) -> Headers:
    """The Retry-After header (whole seconds, at least 1) for an error that says when to return."""
    if error.retry_after_s is None:
        return []
    return [(b"retry-after", str(max(1, round(error.retry_after_s))).encode())]
