"""How the front desk sends a held request on to the replica that woke up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from urllib.parse import quote

import httpx

from deployments.edge.routing import Server
from deployments.inference import Fault, InferenceError
from deployments.serving.http import Headers, HttpRequest, HttpResponse, HttpStream

_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"transfer-encoding",
        b"te",
        b"trailer",
        b"upgrade",
        b"proxy-connection",
        b"content-length",
        b"content-type",
        b"content-encoding",
        b"date",
        b"server",
        b"host",
        b"accept-encoding",
        b"expect",
        b"x-request-timeout-ms",
    )
)


class Unanswered(Exception):
    """The replica went away before it answered; the request may be sent elsewhere.

    `was_sent`: whether it may have begun to work on it.
    """

    def __init__(self, message: str, *, was_sent: bool) -> None:
        super().__init__(message)
        self.was_sent = was_sent


class Forwarder:
    """Sends whole requests to replicas; answers come back whole or as a stream.

    The replica is told how much of the caller's time is left; `grace_s` after that it is given up.
    """

    def __init__(self, grace_s: float = 1.0) -> None:
        self._grace_s = grace_s
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        self._client = httpx.AsyncClient(limits=limits, trust_env=False, verify=False)  # plain HTTP

    async def send(
        self, request: HttpRequest, server: Server, timeout_s: float, broken: bytes = b""
    ) -> HttpResponse | HttpStream:
        """The replica's answer. Raises `Unanswered` when there was none.

        `broken` ends a stream whose replica went away in the middle of it.
        """
        content_type = request.header(b"content-type") or b"application/json"
        headers = [(k, v) for k, v in request.headers if k not in _HOP]
        outgoing = self._client.build_request(
            request.method,
            _target(request, server),
            content=request.body,
            headers=[
                *headers,
                (b"content-type", content_type),
                (b"accept-encoding", b"identity"),
                (b"x-request-timeout-ms", b"%d" % max(1, round(timeout_s * 1000))),
            ],
            timeout=httpx.Timeout(timeout_s + self._grace_s, connect=2.0),
        )
        try:
            answer = await self._client.send(outgoing, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unanswered(str(error), was_sent=False) from None
        except httpx.TransportError as error:
            raise Unanswered(str(error), was_sent=True) from None
        return await _relayed(answer, broken)

    async def close(self) -> None:
        """Let the connections go."""
        await self._client.aclose()


def _target(request: HttpRequest, server: Server) -> httpx.URL:
    """Where the request goes, its path percent-encoded again."""
    path = quote(request.path, safe="/:@!$&'()*+,;=~")
    query = b"?" + request.query if request.query else b""
    try:
        return httpx.URL(
            scheme="http", host=server.host, port=server.port, raw_path=path.encode() + query
        )
    except (httpx.InvalidURL, UnicodeDecodeError):
        raise InferenceError(Fault.INVALID, "the query is no part of a URL") from None


async def _relayed(answer: httpx.Response, broken: bytes) -> HttpResponse | HttpStream:
    content_type = answer.headers.get("content-type", "application/json").encode("latin-1")
    if content_type.startswith(b"text/event-stream"):
        headers = _kept(answer)
        return HttpStream(_Pieces(answer, broken), answer.status_code, content_type, headers)
    try:
        body = await answer.aread()
    except httpx.TransportError as error:
        raise Unanswered(str(error), was_sent=True) from None
    finally:
        await answer.aclose()
    return HttpResponse(answer.status_code, body, content_type, _kept(answer))


def _kept(answer: httpx.Response) -> Headers:
    return [(k.lower(), v) for k, v in answer.headers.raw if k.lower() not in _HOP]


class _Pieces:
    """A stream's pieces as they come; closing it, begun or not, lets its connection go."""

    def __init__(self, answer: httpx.Response, broken: bytes) -> None:
        self._answer = answer
        self._raw = answer.aiter_raw()
        self._broken = broken

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._raw)
        except httpx.TransportError:
            last, self._broken = self._broken, b""
            if last:
                return last
            raise StopAsyncIteration from None

    async def aclose(self) -> None:
        """The caller has all it wants, or has gone."""
        await self._answer.aclose()
