"""Is the OpenAPI document true?

Schemathesis makes requests from it, right ones and wrong ones, sends them to a live server with
every dialect, and compares what comes back with what the document says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from deployments.inference import Engine
from deployments.serving import openapi
from deployments.serving.admin import Admin
from deployments.serving.application import Application
from deployments.serving.http import Dialect, HttpRequest, HttpResponse, Route
from deployments.serving.openapi_operations import OPERATIONS
from deployments.serving.protocols import oip, openai, tfserving
from tests.deployments.serving.engines import SingleCatalog, WordsEngine, sum_engine
from tests.deployments.serving.live import Live, live


async def answer(action: str, arguments: Mapping[str, Any], actor: str) -> Any:
    """What stands for the controller: the admin API passes its answers on."""
    return {"action": action}


async def hold(request: HttpRequest) -> HttpResponse:
    return HttpResponse(200, b"{}")


def dialects(engine: Engine, own: Engine | None) -> list[Dialect]:
    catalog = SingleCatalog(engine)
    return [
        oip.OpenInference(catalog, own),
        tfserving.TensorFlowServing(catalog, own),
        openai.OpenAI(catalog, own),
        Admin(answer),
    ]


def application(engine: Engine) -> Application:
    made = dialects(engine, engine)
    return Application(
        SingleCatalog(engine), engine, made, ready=lambda: True, routes=openapi.routes(made)
    )


HELD = [
    Route("POST", template, hold)
    for template in (
        *oip.INFERENCE_TEMPLATES,
        *tfserving.INFERENCE_TEMPLATES,
        *openai.INFERENCE_TEMPLATES,
    )
]


def all_routes(own: Engine | None) -> list[Route]:
    return [r for d in dialects(sum_engine(), own) for r in d.routes()]


def made_document() -> dict[str, Any]:
    """The document, whose path parts are most often those of the model that is served."""
    document = openapi.document(all_routes(sum_engine()))
    for methods in document["paths"].values():
        for operation in methods.values():
            for parameter in operation.get("parameters", []):
                known = {"model": ["sum", "words"], "version": ["3", "1"]}
                schema = parameter["schema"]
                examples = {"type": "string", "enum": known.get(parameter["name"], ["a"])}
                parameter["schema"] = {"anyOf": [examples, examples, schema]}
    return document


# --- the document


def test_the_desk_and_a_replica_describe_the_same_routes() -> None:
    desk = openapi.document([*all_routes(None), *HELD])
    replica = openapi.document(all_routes(sum_engine()))
    assert desk == replica


def test_every_route_is_described_and_nothing_else() -> None:
    described = {
        (method.upper(), path)
        for path, methods in openapi.document(all_routes(sum_engine()))["paths"].items()
        for method in methods
    }
    there = {(r.method, r.template) for r in all_routes(sum_engine())}
    assert described == there | {("GET", path) for path in openapi.OWN_PATHS}
    entries = {id(openapi.operation_of(*route)) for route in described}
    assert entries == {id(operation) for operation in OPERATIONS.values()}


def test_operations_have_names_of_their_own() -> None:
    document = openapi.document(all_routes(sum_engine()))
    names = [o["operationId"] for methods in document["paths"].values() for o in methods.values()]
    assert len(names) == len(set(names))


def test_every_schema_is_used_and_every_name_is_a_schema() -> None:
    def names(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"].rpartition("/")[2]
            for part in value.values():
                yield from names(part)
        elif isinstance(value, list):
            for part in value:
                yield from names(part)

    document = openapi.document(all_routes(sum_engine()))
    assert set(names(document)) == set(document["components"]["schemas"])


# --- the page


def test_the_page_shows_every_route_and_loads_nothing(servers: Mapping[str, Live]) -> None:
    answer = httpx.get(f"{servers['sum'].url}/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    for path in openapi.document(all_routes(None))["paths"]:
        assert path in answer.text
    assert "<script" not in answer.text
    assert "//" not in answer.text.replace("//-", "")


def test_the_document_is_served(servers: Mapping[str, Live]) -> None:
    document = httpx.get(f"{servers['sum'].url}/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    assert document["paths"].keys() == made_document()["paths"].keys()


# --- schemathesis


@pytest.fixture(scope="module")
def servers() -> Iterator[Mapping[str, Live]]:
    with live(application(sum_engine())) as tensors, live(application(WordsEngine())) as words:
        yield {"sum": tensors, "words": words}


schema = schemathesis.openapi.from_dict(
    made_document(), config=SchemathesisConfig.from_dict({"headers": {"x-shoal-role": "admin"}})
)
CHECKS = [content_type_conformance, response_schema_conformance, status_code_conformance]


@schema.parametrize()
@settings(max_examples=8, suppress_health_check=list(HealthCheck), derandomize=True)
def test_answers_are_as_the_document_says(
    case: schemathesis.Case[Any], servers: Mapping[str, Live]
) -> None:
    model = str((case.path_parameters or {}).get("model", ""))
    server = servers["words" if model == "words" or "completions" in case.path else "sum"]
    response = case.call(base_url=server.url, timeout=20)
    case.validate_response(response, checks=CHECKS)
    if response.status_code != 501:
        case.validate_response(response, checks=[not_a_server_error])
