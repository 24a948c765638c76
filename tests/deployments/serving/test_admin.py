"""Does the admin API pass on what it is asked, by those who may, and refuse the rest in JSON?"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.inference import Fault, InferenceError
from deployments.serving.admin import STATUS, Admin
from deployments.serving.application import Application
from tests.deployments.serving.engines import SingleCatalog, sum_engine


class Controller:
    """What was asked, and what is answered."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Mapping[str, Any], str]] = []
        self.answer: Any = {"done": True}

    async def ask(self, action: str, arguments: Mapping[str, Any], actor: str) -> Any:
        self.asked.append((action, arguments, actor))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def a_client(controller: Controller, role: str = "admin") -> httpx.AsyncClient:
    """A client of the admin API, as the edge hands its requests on."""
    admin = Admin(controller.ask)
    app = Application(SingleCatalog(sum_engine()), None, [admin], ready=lambda: True)
    headers = {"x-shoal-key": "k1", **({"x-shoal-role": role} if role else {})}
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://desk/admin/v1", headers=headers)


@pytest.fixture
def controller() -> Controller:
    return Controller()


@pytest.fixture
async def client(controller: Controller) -> AsyncIterator[httpx.AsyncClient]:
    async with a_client(controller) as made:
        yield made


ROUTES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("GET", "/status", "status", {}),
    ("GET", "/models", "models", {}),
    ("GET", "/models/fraud", "model", {"name": "fraud"}),
    ("POST", "/plan", "plan", {}),
    ("PUT", "/models/fraud", "deploy", {"name": "fraud"}),
    ("DELETE", "/models/fraud", "delete", {"name": "fraud"}),
    ("POST", "/models/fraud/promote", "promote", {"name": "fraud"}),
    ("POST", "/models/fraud/rollback", "rollback", {"name": "fraud"}),
    ("GET", "/models/fraud/logs", "logs", {"name": "fraud"}),
    ("GET", "/keys", "keys", {}),
    ("POST", "/keys", "key_create", {}),
    ("POST", "/keys/app/rotate", "key_rotate", {"key": "app"}),
    ("DELETE", "/keys/app", "key_revoke", {"key": "app"}),
    ("GET", "/audit", "audit", {}),
]
every_route = pytest.mark.parametrize(
    ("method", "path", "action", "arguments"), ROUTES, ids=[r[2] for r in ROUTES]
)


@every_route
async def test_a_route_asks_for_its_action_in_the_name_of_the_key(
    controller: Controller,
    client: httpx.AsyncClient,
    method: str,
    path: str,
    action: str,
    arguments: dict[str, Any],
) -> None:
    answer = await client.request(method, path)
    assert (answer.status_code, answer.json()) == (200, {"done": True})
    assert controller.asked == [(action, arguments, "k1")]


@every_route
@pytest.mark.parametrize("role", ["", "caller", "Admin", "admin "])
async def test_only_keys_of_role_admin_may_ask(
    controller: Controller,
    method: str,
    path: str,
    action: str,
    arguments: dict[str, Any],
    role: str,
) -> None:
    async with a_client(controller, role) as client:
        answer = await client.request(
            method, path, content=b"not JSON" if method != "GET" else None
        )
    assert (answer.status_code, answer.json()) == (
        403,
        {"error": "this needs a key of role admin"},
    )
    assert controller.asked == []


@every_route
async def test_what_is_not_known_is_refused_with_what_is(
    controller: Controller,
    client: httpx.AsyncClient,
    method: str,
    path: str,
    action: str,
    arguments: dict[str, Any],
) -> None:
    answer = await client.request(method, path, params={"wish": "1"})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("parameter 'wish' is not known here; known: ")
    if method != "GET":
        answer = await client.request(method, path, json={"wish": 1})
        assert answer.status_code == 400
        assert answer.json()["error"].startswith("field 'wish' is not known here; known: ")
    assert controller.asked == []


async def test_a_bodys_fields_and_a_querys_parameters_are_arguments(
    controller: Controller, client: httpx.AsyncClient
) -> None:
    body = {"version": "2", "percent": 5, "steps": [1], "interval_s": 2.5}
    await client.post("/models/fraud/promote", json=body)
    await client.get("/models/fraud/logs", params={"lines": "5", "version": ""})
    await client.get("/audit?limit=7")
    assert [asked[1] for asked in controller.asked] == [
        {"name": "fraud", **body},
        {"name": "fraud", "lines": "5", "version": ""},
        {"limit": "7"},
    ]


async def test_the_paths_name_can_not_be_talked_over(
    controller: Controller, client: httpx.AsyncClient
) -> None:
    for answer in (
        await client.delete("/models/fraud", params={"name": "other"}),
        await client.put("/models/fraud", json={"name": "other"}),
    ):
        assert answer.status_code == 400
    assert controller.asked == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "the body is not JSON: "),
        (b"\xff", "the body is not JSON: "),
        (b"[1]", "the body must be a JSON object"),
        (b"null", "the body must be a JSON object"),
        (b'"x"', "the body must be a JSON object"),
        (b"{} {}", "the body is not JSON: "),
        (b'{"document": NaN}', "the body is not JSON: "),
        (b"[" * 5000, "the body is not JSON: "),
    ],
)
async def test_a_body_that_is_no_json_object_is_the_callers_fault(
    controller: Controller, client: httpx.AsyncClient, body: bytes, said: str
) -> None:
    answer = await client.post("/plan", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(said)
    assert controller.asked == []


@settings(max_examples=50)
@given(st.binary(max_size=40), st.sampled_from(ROUTES))
async def test_no_body_makes_it_fail(body: bytes, route: tuple[str, str, str, Any]) -> None:
    method, path, _, _ = route
    async with a_client(Controller()) as client:
        answer = await client.request(method, path, content=body)
    assert answer.status_code in (200, 400)
    assert answer.json()


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/status", "GET, HEAD"),
        ("PATCH", "/models/fraud", "DELETE, GET, HEAD, PUT"),
        ("GET", "/models/fraud/promote", "POST"),
        ("PUT", "/keys", "GET, HEAD, POST"),
    ],
)
async def test_another_method_is_refused_with_those_that_there_are(
    client: httpx.AsyncClient, method: str, path: str, allowed: str
) -> None:
    answer = await client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert "is not possible on" in answer.json()["error"]


@pytest.mark.parametrize("path", ["", "/", "/nothing", "/models/a/b/c", "/models//promote"])
async def test_other_paths_are_not_found_in_the_same_form(
    client: httpx.AsyncClient, path: str
) -> None:
    answer = await client.get(path)
    assert answer.status_code == 404
    assert list(answer.json()) == ["error"]


@pytest.mark.parametrize("fault", list(Fault))
async def test_every_fault_has_its_status_and_its_words(
    controller: Controller, client: httpx.AsyncClient, fault: Fault
) -> None:
    controller.answer = InferenceError(fault, "so not", retry_after_s=2.4)
    answer = await client.get("/status")
    assert (answer.status_code, answer.json()) == (STATUS[fault], {"error": "so not"})
    assert answer.headers["retry-after"] == "2"


async def test_what_breaks_inside_is_not_told(
    controller: Controller, client: httpx.AsyncClient
) -> None:
    controller.answer = KeyError("secret")
    answer = await client.get("/status")
    assert answer.status_code == 500
    assert "secret" not in answer.text
