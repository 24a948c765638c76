"""What happens between a socket and a protocol?

One ASGI application serves all HTTP dialects, in replicas and at the front desk. It looks the path
up, reads the body within its bound, inflates it, calls the dialect's handler, and sends what comes
back, whole or in pieces; errors take the form of the dialect that owns the path.

    scope ─► came through the edge? ─► target ─► body ─► handler ─► answer
                     403           404, 405   413, 415   InferenceError: the dialect's form

A model that does nothing must cost next to nothing here, hence no framework, no task and no
middleware for a request. What a tensor is, and what batches are, others know.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

from deployments.inference import Catalog, Engine, Fault, InferenceError
from deployments.serving.delegation import ASGIApp, Replay
from deployments.serving.disconnects import Disconnects, Receive, Waiting
from deployments.serving.encoding import COMPRESS_BYTES_MIN, coding_wanted, compress, inflate
from deployments.serving.http import (
    Dialect,
    Headers,
    HttpRequest,
    HttpResponse,
    HttpStream,
    Route,
)
from deployments.serving.protocols.oip import error_response
from deployments.serving.routes import ErrorForm, RouteGroup, RouteTable, Target

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

BODY_BYTES_MAX = 256 * 1024 * 1024

_log = logging.getLogger(__name__)
_OPEN_PATHS = frozenset({"/healthz", "/readyz"})  # for probes that know no token
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
_PRINTABLE = re.compile(rb"[!-~]{1,128}")


class Application:
    """An ASGI application over the dialects' routes.

    `engine` None: the dialects answer from the catalog, for many models. `routes`: others beside
    the dialects'; below a dialect's prefix, their errors have its form. `ongoing` counts the
    requests that are being answered, so that a drain can wait for none. `observe(protocol, fault,
    seconds)` hears of each POST to a dialect that was answered (fault None) or refused.

    `delegates`: ASGI apps that answer a POST to their path in the dialect's stead, such as vLLM's
    for OpenAI's; they get the whole body, inflated, in one message, and may raise `InferenceError`
    before they answer.

    A dialect may have a `name`: requests with that `x-shoal-dialect` look in its routes first (the
    edge's TF Serving listener says `tensorflow`); and `ignores_case` for its paths.
    """

    def __init__(
        self,
        catalog: Catalog,
        engine: Engine | None,
        dialects: Sequence[Dialect],
        *,
        ready: Callable[[], bool],
        edge_token: str | None = None,
        body_bytes_max: int = BODY_BYTES_MAX,
        routes: Sequence[Route] = (),
        delegates: Mapping[str, ASGIApp] = MappingProxyType({}),
        observe: Callable[[str, Fault | None, float], None] | None = None,
    ) -> None:
        self.catalog = catalog
        self.ongoing = 0
        self._observe = observe
        self._delegates = delegates
        self._ready = ready
        self._token = None if edge_token is None else edge_token.encode()
        self._body_bytes_max = body_bytes_max
        self._clients = Disconnects()
        self._dialects = _by_prefix(dialects)
        self._named = {d.name.encode(): d for d in dialects if hasattr(d, "name")}
        first = [RouteGroup(self._own_routes(), error_response)]
        first += [_plain_group(route, self._owner(route.template)) for route in routes]
        rest = [_group(d) for d in dialects]
        self._table = RouteTable([*first, *rest], engine)
        self._tables = {
            name: RouteTable([*first, _group(d), *rest], engine) for name, d in self._named.items()
        }

    def count(self, change: int) -> None:
        """Count requests that came through another door (gRPC) as ongoing."""
        self.ongoing += change

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _not_http(scope, receive, send)
            return
        self.ongoing += 1
        try:
            await self._serve(scope, receive, send)
        finally:
            self.ongoing -= 1

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        target: Target | None = None
        waiting: Waiting | None = None
        answer: HttpResponse | HttpStream | HttpRequest
        start_s = 0.0  # when the whole request was there
        fault: Fault | None = None
        try:
            try:
                if self._token is not None:
                    self._check_edge(headers, scope["path"])
                target = self._target(scope, headers)
                request = await self._request(scope, receive, headers, target)
                start_s = time.perf_counter()
                if self._delegates and request.path in self._delegates:
                    answer = request
                else:
                    waiting = self._clients.enter(receive)
                    answer = await target.handler(request)
            except InferenceError as error:
                fault = error.fault
                answer = self._refusal(scope, headers, target, error)
            except Exception:  # noqa: BLE001  # the last resort: nobody hears of our insides
                fault = Fault.INTERNAL
                answer = self._failure(scope, headers, target)
            if isinstance(answer, HttpResponse):
                await self._send(headers, answer, send)
            elif isinstance(answer, HttpStream):
                await self._stream(headers, answer, send)
            else:
                fault = await self._delegate(scope, headers, target, answer, receive, send)
            self._tell(target, fault, start_s)
        except asyncio.CancelledError:
            if waiting is None or not waiting.is_gone:
                raise
        except _GoneError:
            pass
        finally:
            if waiting is not None:
                self._clients.leave(waiting)

    def _tell(self, target: Target | None, fault: Fault | None, start_s: float) -> None:
        """Let the observer know how a request ended."""
        if self._observe is not None and target is not None and target.protocol:
            seconds = time.perf_counter() - start_s if start_s else 0.0
            self._observe(target.protocol, fault, seconds)

    async def _delegate(
        self,
        scope: Scope,
        headers: Mapping[bytes, bytes],
        target: Target | None,
        request: HttpRequest,
        receive: Receive,
        send: Send,
    ) -> Fault | None:
        """Let the path's own app answer; how that ended, as far as its status says."""
        replay = Replay(request, receive, send)
        try:
            await self._delegates[request.path](replay.scope(scope), replay.receive, replay.send)
        except Exception as error:
            if replay.status is not None:
                raise  # it had begun to answer: the server cuts the connection
            if isinstance(error, InferenceError):
                fault, answer = error.fault, self._refusal(scope, headers, target, error)
            else:
                fault, answer = Fault.INTERNAL, self._failure(scope, headers, target)
            await self._send(headers, answer, send)
            return fault
        return replay.fault

    def _check_edge(self, headers: Mapping[bytes, bytes], path: str) -> None:
        token = headers.get(b"x-shoal-edge", b"")
        if not hmac.compare_digest(token, self._token or b"") and path not in _OPEN_PATHS:
            raise InferenceError(
                Fault.FORBIDDEN, "this port answers the edge only; send requests to the edge"
            )

    def _target(self, scope: Scope, headers: Mapping[bytes, bytes]) -> Target:
        methods = self._table_for(headers).find(scope["path"])
        method = scope["method"]
        target = methods.get(method)
        if target is None and method == "HEAD":
            target = methods.get("GET")
        if target is not None:
            return target
        if methods:
            allowed = ", ".join(_with_head(methods))
            raise InferenceError(
                Fault.METHOD_NOT_ALLOWED,
                f"{method} is not possible on {scope['path']}; it takes {allowed}",
            )
        raise InferenceError(Fault.NOT_FOUND, f"nothing is at {method} {scope['path']}")

    def _table_for(self, headers: Mapping[bytes, bytes]) -> RouteTable:
        dialect = headers.get(b"x-shoal-dialect")
        return self._table if dialect is None else self._tables.get(dialect, self._table)

    async def _request(
        self, scope: Scope, receive: Receive, headers: Mapping[bytes, bytes], target: Target
    ) -> HttpRequest:
        method = scope["method"]
        body = b""
        if method not in _BODILESS:
            body = await self._body(receive, headers)
            coding = headers.get(b"content-encoding")
            if coding is not None:
                body = await inflate(body, coding, self._body_bytes_max)
        return HttpRequest(
            method,
            scope["path"],
            scope["query_string"],
            scope["headers"],
            body,
            target.parameters,
        )

    async def _body(self, receive: Receive, headers: Mapping[bytes, bytes]) -> bytes:
        length = headers.get(b"content-length")
        if length is not None and length.isdigit() and int(length) > self._body_bytes_max:
            raise self._too_large()
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        body: bytes = message.get("body", b"")
        if message.get("more_body", False):
            return await self._rest(body, receive)
        if len(body) > self._body_bytes_max:
            raise self._too_large()
        return body

    async def _rest(self, first: bytes, receive: Receive) -> bytes:
        """The whole of a body that comes in several messages."""
        pieces = [first]
        size = len(first)
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self._body_bytes_max:
                raise self._too_large()
            more = message.get("more_body", False)
        return b"".join(pieces)

    def _too_large(self) -> InferenceError:
        return InferenceError(
            Fault.TOO_LARGE, f"the body has more than the {self._body_bytes_max} bytes allowed"
        )

    def _form(
        self, scope: Scope, headers: Mapping[bytes, bytes], target: Target | None
    ) -> ErrorForm:
        """How errors look: as the target's dialect has them, else as the path's owner does."""
        if target is not None:
            return target.error
        dialect = self._named.get(headers.get(b"x-shoal-dialect", b""))
        owner = dialect or self._owner(scope["path"])
        return error_response if owner is None else owner.error

    def _owner(self, path: str) -> Dialect | None:
        """The dialect below whose longest prefix the path lies."""
        for prefix, dialect in self._dialects:
            if path == prefix or path.startswith(f"{prefix}/"):
                return dialect
        return None

    def _refusal(
        self,
        scope: Scope,
        headers: Mapping[bytes, bytes],
        target: Target | None,
        error: InferenceError,
    ) -> HttpResponse:
        """The answer when a request can't be answered, in its dialect's form."""
        answer = self._form(scope, headers, target)(error)
        if target is None and error.fault is Fault.METHOD_NOT_ALLOWED:
            methods = self._table_for(headers).find(scope["path"])
            allowed = ", ".join(_with_head(methods)).encode()
            answer.headers = [*answer.headers, (b"allow", allowed)]
        return answer

    def _failure(
        self, scope: Scope, headers: Mapping[bytes, bytes], target: Target | None
    ) -> HttpResponse:
        """The answer when a handler broke; its traceback goes to the log."""
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        _log.exception("%s %s failed (request %r)", scope["method"], scope["path"], request_id)
        error = InferenceError(Fault.INTERNAL, "internal error; the server's log says more")
        return self._form(scope, headers, target)(error)

    async def _send(self, headers: Mapping[bytes, bytes], answer: HttpResponse, send: Send) -> None:
        body = answer.body
        coding = None
        if len(body) >= COMPRESS_BYTES_MIN:
            coding = coding_wanted(headers.get(b"accept-encoding"))
            if coding is not None:
                body = await compress(body, coding)
        sent = _sent_headers(headers, answer, b"%d" % len(body))
        if coding is not None:
            sent += [(b"content-encoding", coding), (b"vary", b"accept-encoding")]
        await send({"type": "http.response.start", "status": answer.status, "headers": sent})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, headers: Mapping[bytes, bytes], answer: HttpStream, send: Send) -> None:
        sent = _sent_headers(headers, answer, None)
        if not any(name == b"cache-control" for name, _ in answer.headers):
            sent.append((b"cache-control", b"no-cache"))
        try:
            await send({"type": "http.response.start", "status": answer.status, "headers": sent})
            async for piece in answer.pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            close = getattr(answer.pieces, "aclose", None)
            if close is not None:
                await close()

    def _own_routes(self) -> list[Route]:
        return [
            Route("GET", "/healthz", self._health),
            Route("GET", "/readyz", self._readiness),
        ]

    async def _health(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, b'{"alive":true}')

    async def _readiness(self, request: HttpRequest) -> HttpResponse:
        if self._ready():
            return HttpResponse(200, b'{"ready":true}')
        return HttpResponse(503, b'{"ready":false}')


class _GoneError(Exception):
    """The client hung up before its request was complete."""


def _group(dialect: Dialect) -> RouteGroup:
    return RouteGroup(
        dialect.routes(),
        dialect.error,
        getattr(dialect, "ignores_case", False),
        getattr(dialect, "name", ""),
    )


def _plain_group(route: Route, owner: Dialect | None) -> RouteGroup:
    """A route that no dialect brought, in the form of the dialect whose paths it joins."""
    if owner is None:
        return RouteGroup([route], error_response)
    return RouteGroup([route], owner.error, getattr(owner, "ignores_case", False))


def _by_prefix(dialects: Sequence[Dialect]) -> list[tuple[str, Dialect]]:
    """Which dialect owns which paths, the longest prefix first."""
    owners = [(prefix.rstrip("/"), d) for d in dialects for prefix in d.prefixes]
    return sorted(owners, key=lambda owner: -len(owner[0]))


def _with_head(methods: Mapping[str, Target]) -> list[str]:
    return sorted({*methods, "HEAD"} if "GET" in methods else methods)


def _sent_headers(
    headers: Mapping[bytes, bytes], answer: HttpResponse | HttpStream, length: bytes | None
) -> Headers:
    sent = [(b"content-type", answer.content_type)]
    if length is not None:
        sent.append((b"content-length", length))
    sent += answer.headers
    request_id = headers.get(b"x-request-id")
    if request_id is None or any(name == b"x-request-id" for name, _ in answer.headers):
        return sent
    if _PRINTABLE.fullmatch(request_id):
        sent.append((b"x-request-id", request_id))
    return sent


async def _not_http(scope: Scope, receive: Receive, send: Send) -> None:
    """Lifespan events are agreed to; websockets are closed."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    while scope["type"] == "lifespan":
        event = (await receive())["type"].removeprefix("lifespan.")
        await send({"type": f"lifespan.{event}.complete"})
        if event == "shutdown":
            return
