"""What the edge says when it answers itself: each refusal and failure in the caller's protocol.

HAProxy picks a text by `STATUS/FORM/WHY` when a request ends at the edge. `FORM` is the protocol
(`oip` also serves TF Serving, whose errors look the same), `WHY` the edge's own reason, empty when
HAProxy itself failed to get an answer.

    heads.map   429/oip/rate   {"error": "too many requests: the most that this key may send …
    (detail)                   100
    tails.map   429/oip/rate   "}

gRPC has no body: `grpc.map` has its status by HTTP status, `texts.map` the message.
Words only; what triggers them is `configuration`'s matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

FORMS = ("oip", "openai")

TEXTS: Mapping[int, Mapping[str, str]] = {
    400: {
        "": "the request could not be understood",
        "path": "the path and query must not be longer than 8192 bytes",
        "headers": "the headers must not be longer than 32768 bytes in all",
        "model": (
            "the body is too large or encoded, so that its model can't be read on the way: "
            "name the model in the header x-shoal-model"
        ),
        "compressed": (
            "the first message is compressed, so that its model can't be read on the way: "
            "name the model in the metadata x-shoal-model"
        ),
    },
    401: {
        "": "a key is needed: send Authorization: Bearer KEY or X-API-Key: KEY",
        "unknown": "this key is not known, or no longer valid",
    },
    403: {
        "": "this key may not do that",
        "model": "this key may not use the model",
        "admin": "this path needs an admin key; this key is not one",
    },
    404: {"": "nothing is here"},
    405: {"": "this method is not allowed here"},
    408: {"": "the request did not arrive in time"},
    413: {"": "the body is too large"},
    429: {
        "": "too many requests",
        "rate": "too many requests: the most that this key may send in a second is",
        "concurrency": "too many requests: the most that this key may have in flight is",
    },
    500: {"": "the edge failed to handle the request"},
    501: {"": "this is not implemented"},
    502: {"": "the replica's answer broke off or was not HTTP"},
    503: {"": "no replica could take the request"},
    504: {"": "the answer did not come in time"},
}
"""What is said, by HTTP status and reason. The edge may add a value (a name, a limit)."""

HEADERS: Mapping[int, tuple[tuple[str, str], ...]] = {
    401: (("www-authenticate", 'Bearer realm="shoal"'),),
    429: (("retry-after", "1"),),
    503: (("retry-after", "1"),),
}
"""Headers that come with a status."""

GRPC: Mapping[int, int] = {
    400: 3,
    401: 16,
    403: 7,
    404: 5,
    405: 12,
    408: 4,
    413: 8,
    429: 8,
    500: 13,
    501: 12,
    502: 14,
    503: 14,
    504: 4,
}
"""gRPC's status for an HTTP one."""

_OPENAI: Mapping[int, tuple[str, str | None]] = {
    400: ("invalid_request_error", None),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "permission_denied"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}
"""OpenAI's `type` and `code`; every other status is the server's fault."""

_MARK = "\N{BULLET}"


def heads() -> dict[str, str]:
    """The body up to where a value may follow, by `STATUS/FORM/WHY`."""
    return {key: body.partition(_MARK)[0] for key, body in _bodies().items()}


def tails() -> dict[str, str]:
    """The rest of the body, by `STATUS/FORM/WHY`."""
    return {key: body.partition(_MARK)[2] for key, body in _bodies().items()}


def grpc_statuses() -> dict[str, str]:
    """The status in gRPC, by HTTP status."""
    return {str(status): str(code) for status, code in GRPC.items()}


def grpc_messages() -> dict[str, str]:
    """The text by `STATUS/WHY`; percent-encoding is not needed, the texts are plain ASCII."""
    return {f"{s}/{why}": text for s, texts in TEXTS.items() for why, text in texts.items()}


def _bodies() -> dict[str, str]:
    return {
        f"{status}/{form}/{why}": _body(form, status, text + _MARK)
        for status, texts in TEXTS.items()
        for why, text in texts.items()
        for form in FORMS
    }


def _body(form: str, status: int, message: str) -> str:
    if form != "openai":
        return json.dumps({"error": message}, ensure_ascii=False)
    kind, code = _OPENAI.get(status, ("server_error", None))
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"error": error}, ensure_ascii=False)
