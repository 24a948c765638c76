"""Which routes are there, as an OpenAPI document and as a page?

The document is made from the routes themselves, so it can't name one that isn't there or leave one
out; what each takes and gives is in `openapi_operations`. The page is plain HTML made from the
document: it loads nothing from anywhere.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from deployments.serving.http import Dialect, HttpRequest, HttpResponse, Route
from deployments.serving.openapi_operations import JSON, OPERATIONS, SCHEMAS, Operation, Schema
from deployments.serving.protocols.descriptions import shoal_version

OWN_PATHS = ("/healthz", "/readyz", "/openapi.json", "/docs")

_ABOUT = (
    "Models on a Ray cluster, spoken to in the Open Inference Protocol (KServe V2, Triton), TF "
    "Serving's REST API, KServe V1 and OpenAI's API. A key goes in `Authorization: Bearer` or "
    "`X-API-Key`; `x-request-timeout-ms` says how long an answer is waited for."
)
_VERSIONED = re.compile(r"/(?:versions/\{version\}|labels/\{label\})(?=[:/]|$)")


def routes(dialects: Sequence[Dialect], others: Sequence[Route] = ()) -> list[Route]:
    """The routes of the document and the page, for `Application`'s `routes`.

    `others` are routes beside the dialects', such as the front desk's for held requests.
    """
    made = document([*(r for d in dialects for r in d.routes()), *others])
    text, page = orjson.dumps(made), _page(made).encode()

    async def openapi(request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, text)

    async def docs(request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, page, b"text/html; charset=utf-8")

    return [Route("GET", "/openapi.json", openapi), Route("GET", "/docs", docs)]


def document(routes: Iterable[Route]) -> Schema:
    """The OpenAPI 3.1 document of these routes and of the application's own."""
    known = {(r.method, r.template) for r in routes} | {("GET", path) for path in OWN_PATHS}
    paths: dict[str, dict[str, Any]] = {}
    for method, template in sorted(known, key=lambda route: (route[1], route[0])):
        paths.setdefault(template, {})[method.lower()] = _operation(method, template)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Shoal", "version": shoal_version(), "description": _ABOUT},
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {"key": []}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def operation_of(method: str, template: str) -> Operation:
    """The entry of a route. Raises `KeyError` when it has none."""
    exact = OPERATIONS.get((method, template))
    return exact or OPERATIONS[method, _VERSIONED.sub("", template)]


def _operation(method: str, template: str) -> Schema:
    """One route in OpenAPI's form."""
    operation = operation_of(method, template)
    made: Schema = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{template}").strip("_"),
        "responses": _responses(operation),
    }
    parts = re.findall(r"\{(\w+)\}", template)
    if parts:
        made["parameters"] = [
            {"name": part, "in": "path", "required": True, "schema": _PART} for part in parts
        ]
    if operation.takes:
        made["requestBody"] = {
            "required": not operation.takes_optional,
            "content": _content(operation.takes),
        }
    if template in OWN_PATHS:
        made["security"] = []
    return made


_PART: Schema = {"type": "string", "minLength": 1, "pattern": "^[^/]+$"}


def _responses(operation: Operation) -> Schema:
    errors = _content({JSON: operation.faults})
    made: Schema = {
        "200": {"description": "The answer", "content": _content(operation.gives)},
        "4XX": {"description": "The request can't be answered as it is", "content": errors},
        "5XX": {"description": "No answer could be had now", "content": errors},
    }
    if operation.gives.get(JSON) == "Ready":
        not_ready = {"anyOf": [_reference("Ready"), _reference(operation.faults)]}
        made["503"] = {"description": "Not ready", "content": {JSON: {"schema": not_ready}}}
    if operation.can_be_missing:
        made["501"] = {"description": "Shoal does not do this", "content": errors}
    return made


def _content(kinds: Any) -> Schema:
    return {kind: {"schema": _reference(name)} for kind, name in kinds.items()}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


# The page

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code, pre { font: 13px/1.4 ui-monospace, monospace }
pre { background: #8881; padding: .6rem; overflow: auto; margin: .3rem 0 .6rem }
summary { cursor: pointer; padding: .15rem 0 }
b { display: inline-block; width: 4rem }
h2 { margin: 1.6rem 0 .3rem }
:root { color-scheme: light dark }
"""


def _page(made: Schema) -> str:
    """The document to be read: a line for each route, which opens."""
    tags: dict[str, list[str]] = {}
    for path, methods in made["paths"].items():
        for method, operation in methods.items():
            tags.setdefault(operation["tags"][0], []).append(_entry(path, method, operation))
    sections = "".join(
        f"<h2>{html.escape(tag)}</h2>\n{''.join(entries)}" for tag, entries in tags.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Shoal</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>Shoal {html.escape(made['info']['version'])}</h1><p>{html.escape(_ABOUT)}</p>"
        f'<p><a href="openapi.json">openapi.json</a></p>{sections}</body></html>'
    )


def _entry(path: str, method: str, operation: Schema) -> str:
    takes = operation.get("requestBody", {}).get("content", {})
    gives = operation["responses"]["200"]["content"]
    bodies = "".join(
        f"{title} <code>{html.escape(kind)}</code><pre>{html.escape(_schema_text(body))}</pre>"
        for title, content in (("takes", takes), ("gives", gives))
        for kind, body in content.items()
    )
    return (
        f"<details><summary><b>{method.upper()}</b> <code>{html.escape(path)}</code> "
        f"{html.escape(operation['summary'])}</summary>{bodies}</details>\n"
    )


def _schema_text(body: Schema) -> str:
    name = body["schema"]["$ref"].rpartition("/")[2]
    return json.dumps(SCHEMAS[name], indent=2, ensure_ascii=False)
