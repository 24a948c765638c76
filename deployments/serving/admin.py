"""The admin API: routes under `/admin/v1` that ask the controller, and answer in JSON.

It holds no state and takes no decision. `ask(action, arguments, actor)` is the controller's answer;
what a path, a query and a body mean is all that is known here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

import orjson

from deployments.inference import Fault, InferenceError
from deployments.serving.http import (
    Handler,
    HttpRequest,
    HttpResponse,
    Route,
    retry_after,
)

Ask = Callable[[str, Mapping[str, Any], str], Awaitable[Any]]

STATUS = {
    Fault.INVALID: 400,
    Fault.UNAUTHENTICATED: 401,
    Fault.FORBIDDEN: 403,
    Fault.NOT_FOUND: 404,
    Fault.METHOD_NOT_ALLOWED: 405,
    Fault.CONFLICT: 409,
    Fault.TOO_LARGE: 413,
    Fault.UNSUPPORTED_MEDIA: 415,
    Fault.OVERLOADED: 429,
    Fault.INTERNAL: 500,
    Fault.UNIMPLEMENTED: 501,
    Fault.UNAVAILABLE: 503,
    Fault.DEADLINE: 504,
}

_PROMOTION = ("version", "percent", "steps", "interval_s")
_KEY = ("name", "role", "models", "rate_rps", "concurrency_max")

# method, path, action, the body's fields, the query's
_ACTIONS: Sequence[tuple[str, str, str, tuple[str, ...], tuple[str, ...]]] = (
    ("GET", "/admin/v1/status", "status", (), ()),
    ("GET", "/admin/v1/models", "models", (), ()),
    ("GET", "/admin/v1/models/{name}", "model", (), ()),
    ("POST", "/admin/v1/plan", "plan", ("document",), ()),
    ("PUT", "/admin/v1/models/{name}", "deploy", ("document",), ()),
    ("DELETE", "/admin/v1/models/{name}", "delete", (), ()),
    ("POST", "/admin/v1/models/{name}/promote", "promote", _PROMOTION, ()),
    ("POST", "/admin/v1/models/{name}/rollback", "rollback", (), ()),
    ("GET", "/admin/v1/models/{name}/logs", "logs", (), ("lines", "version")),
    ("GET", "/admin/v1/keys", "keys", (), ()),
    ("POST", "/admin/v1/keys", "key_create", _KEY, ()),
    ("POST", "/admin/v1/keys/{key}/rotate", "key_rotate", ("overlap_s",), ()),
    ("DELETE", "/admin/v1/keys/{key}", "key_revoke", (), ()),
    ("GET", "/admin/v1/audit", "audit", (), ("limit",)),
)


class Admin:
    """The dialect of the admin API; errors are `{"error": text}`."""

    prefixes: Sequence[str] = ("/admin",)

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def routes(self) -> Sequence[Route]:
        """All routes, each for keys of role admin only."""
        return [
            Route(method, path, self._handler(action, fields, asked))
            for method, path, action, fields, asked in _ACTIONS
        ]

    def error(self, error: InferenceError) -> HttpResponse:
        """The error as JSON."""
        body = orjson.dumps({"error": error.message})
        return HttpResponse(STATUS[error.fault], body, headers=retry_after(error))

    def _handler(self, action: str, fields: tuple[str, ...], asked: tuple[str, ...]) -> Handler:
        async def handle(request: HttpRequest) -> HttpResponse:
            if request.header(b"x-shoal-role") != b"admin":
                raise InferenceError(Fault.FORBIDDEN, "this needs a key of role admin")
            arguments = {
                **_query(request, asked),
                **_body(request, fields),
                **request.parameters,
            }
            actor = (request.header(b"x-shoal-key") or b"").decode("latin-1")
            answer = await self._ask(action, arguments, actor)
            return HttpResponse(200, orjson.dumps(answer))

        return handle


def _query(request: HttpRequest, known: tuple[str, ...]) -> dict[str, Any]:
    """The query's parameters. Raises INVALID for one that is not known."""
    query = dict(parse_qsl(request.query.decode("latin-1"), keep_blank_values=True))
    _check_known("parameter", query, known)
    return query


def _body(request: HttpRequest, fields: tuple[str, ...]) -> dict[str, Any]:
    """The body's fields. Raises INVALID for what is not a JSON object or not known."""
    if not request.body:
        return {}
    try:
        body = orjson.loads(request.body)
    except orjson.JSONDecodeError as error:
        raise InferenceError(Fault.INVALID, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise InferenceError(Fault.INVALID, "the body must be a JSON object")
    _check_known("field", body, fields)
    return body


def _check_known(what: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise InferenceError(
                Fault.INVALID, f"{what} {name!r} is not known here; known: {listed}", field=name
            )
