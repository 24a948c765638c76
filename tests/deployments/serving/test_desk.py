"""Does the front desk hold what must wait, send it on, and answer everything else itself?"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from dashboards.metrics import Meters
from deployments.edge.routing import ModelRoute, Server, VersionRoute
from deployments.inference import (
    Engine,
    Fault,
    InferenceError,
    ModelStatus,
    VersionState,
    VersionStatus,
)
from deployments.serving.application import Application
from deployments.serving.desk import Desk, DeskOrder
from deployments.serving.holding import View
from deployments.serving.meter import DeskMeter
from deployments.serving.protocols.oip import OpenInference
from deployments.serving.protocols.openai import OpenAI
from deployments.serving.protocols.tfserving import TensorFlowServing
from tests.deployments.serving.engines import SUM, SingleCatalog, WordsEngine, sum_engine
from tests.deployments.serving.live import Live, eventually, live

TOKEN = "secret"
INFER = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}
ROWS = {"instances": [[1, 2, 3]]}
WORDS = {"model": "words", "prompt": "a b c", "stream": True}


class Door:
    """A server for all tests of this module; what is behind it changes."""

    def __init__(self) -> None:
        self.app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


@dataclass
class Scene:
    """A desk at its door, two replicas' doors, and a controller that writes down what it hears."""

    desk_live: Live
    desk_door: Door
    replica_lives: list[Live]
    replica_doors: list[Door]
    places_max: int = 4
    woken: list[str] = field(default_factory=list)
    asked: list[tuple[str, Mapping[str, Any], str]] = field(default_factory=list)
    refusal: InferenceError | None = None

    def __post_init__(self) -> None:
        self.meters = Meters(None)
        self.desk = self.desk_live.call(self._made)
        self.desk_door.app = self.desk.application

    def _made(self) -> Desk:
        order = DeskOrder("127.0.0.1", TOKEN, self.places_max, 1.0)
        return Desk(order, self._ask, self._wake, DeskMeter(self.meters))

    async def _ask(self, action: str, arguments: Mapping[str, Any], actor: str) -> Any:
        self.asked.append((action, arguments, actor))
        if self.refusal is not None:
            raise self.refusal
        return {"done": action}

    async def _wake(self, backend: str) -> None:
        self.woken.append(backend)

    def replica(self, engine: Engine, number: int = 0) -> Server:
        """A replica that serves `engine`."""
        catalog = SingleCatalog(engine)
        dialects = (
            OpenInference(catalog, engine),
            TensorFlowServing(catalog, engine),
            OpenAI(catalog, engine),
        )
        self.replica_doors[number].app = Application(
            catalog, engine, dialects, edge_token=TOKEN, ready=lambda: True
        )
        return self.server(number)

    def server(self, number: int = 0) -> Server:
        """Where a replica is."""
        return Server(f"r-{number}", "127.0.0.1", self.replica_lives[number].port)

    def says(self, *servers: Server, model: str = "sum", reason: str = "", **route: Any) -> None:
        """The controller says which servers version 3 of the model has, or why it failed."""
        state = VersionState.FAILED if reason else VersionState.IDLE
        status = VersionStatus("3", state, SUM, reason, labels=("stable",))
        versions = (VersionRoute("3", f"{model}--3", servers, labels=("stable",), **route),)
        view = View(1, (ModelStatus(model, (status,)),), (ModelRoute(model, versions, {"3": 100}),))
        self.desk_live.call(lambda: self.desk.update(view))

    def series(self, name: str) -> dict[str, float]:
        """A metric's values by its labels."""
        text = self.meters.exposition().decode()
        return {
            labels: float(value)
            for labels, value in re.findall(rf"^{name}{{(.*?)}} (\S+)$", text, re.MULTILINE)
        }

    @property
    def held(self) -> dict[str, int]:
        return self.desk_live.call(lambda: self.desk.room.held)


@pytest.fixture(scope="module")
def doors() -> Iterator[list[tuple[Live, Door]]]:
    with ExitStack() as stack:
        made = [Door() for _ in range(3)]
        yield [(stack.enter_context(live(door)), door) for door in made]


@pytest.fixture
def scene(doors: list[tuple[Live, Door]]) -> Iterator[Scene]:
    (desk_live, desk_door), *replicas = doors
    made = Scene(desk_live, desk_door, [r for r, _ in replicas], [d for _, d in replicas])
    yield made
    desk_live.run(made.desk.close())


@pytest.fixture
async def client(scene: Scene) -> AsyncIterator[httpx.AsyncClient]:
    async with a_client(scene) as made:
        yield made


@asynccontextmanager
async def a_client(scene: Scene) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.AsyncHTTPTransport(verify=False)
    async with httpx.AsyncClient(
        base_url=scene.desk_live.url,
        headers={"x-shoal-edge": TOKEN},
        transport=transport,
        timeout=20,
    ) as made:
        yield made


async def becomes(claim: Callable[[], bool]) -> None:
    await asyncio.to_thread(eventually, claim)


async def send(client: httpx.AsyncClient, path: str, body: Any, **options: Any) -> httpx.Response:
    return await client.post(path, json=body, **options)


# what it answers itself


async def test_it_is_ready_once_the_controller_has_said_something(
    scene: Scene, client: httpx.AsyncClient
) -> None:
    assert (await client.get("/readyz")).status_code == 503
    scene.says()
    assert (await client.get("/readyz")).status_code == 200


async def test_it_tells_of_all_models(scene: Scene, client: httpx.AsyncClient) -> None:
    scene.says()
    assert (await client.get("/v2/models")).json() == {"models": ["sum"]}
    assert (await client.get("/v2/models/sum")).json()["inputs"][0]["name"] == "x"
    assert (await client.get("/v1/models")).json()["data"][0]["id"] == "sum"


async def test_its_documents_are_there(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/v2/models/{model}/infer", "/v1/embeddings", "/admin/v1/keys"} <= paths.keys()
    assert "Shoal" in (await client.get("/docs")).text


async def test_nobody_goes_round_the_edge(scene: Scene, client: httpx.AsyncClient) -> None:
    scene.says()
    for token in ("", "wrong"):
        answer = await client.get("/v2/models", headers={"x-shoal-edge": token})
        assert answer.status_code == 403


async def test_admin_actions_go_to_the_controller(scene: Scene, client: httpx.AsyncClient) -> None:
    client.headers.update({"x-shoal-role": "admin", "x-shoal-key": "k1"})
    answer = await client.delete("/admin/v1/models/sum")
    assert answer.json() == {"done": "delete"}
    assert scene.asked == [("delete", {"name": "sum"}, "k1")]
    scene.refusal = InferenceError(Fault.CONFLICT, "not now")
    assert (await client.get("/admin/v1/keys")).status_code == 409


async def test_loading_and_unloading_go_to_the_controller_for_models_that_there_are(
    scene: Scene, client: httpx.AsyncClient
) -> None:
    scene.says()
    for verb in ("load", "unload"):
        path = f"/v2/repository/models/%s/{verb}"
        assert (await client.post(path % "sum")).status_code == 200
        assert (await client.post(path % "other")).status_code == 404
    assert [(a, b["name"]) for a, b, _ in scene.asked] == [("load", "sum"), ("unload", "sum")]


# sending on


async def test_a_request_is_answered_by_a_replica_that_is_there(
    scene: Scene, client: httpx.AsyncClient
) -> None:
    scene.says(scene.replica(sum_engine()))
    answer = await send(client, "/v2/models/sum/infer", {**INFER, "id": "7"})
    assert answer.status_code == 200
    assert (answer.json()["id"], answer.json()["outputs"][0]["data"]) == ("7", [6])
    assert scene.woken == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/models/sum/infer", INFER),
        ("/v2/models/sum/versions/3/infer", INFER),
        ("/v1/models/sum:predict", ROWS),
        ("/v1/models/sum/versions/3:predict", ROWS),
        ("/v1/models/sum/labels/stable:predict", ROWS),
        ("/V1/Models/sum:predict", ROWS),
    ],
)
async def test_every_way_to_ask_for_a_version_finds_it(
    scene: Scene, client: httpx.AsyncClient, path: str, body: Any
) -> None:
    engine = sum_engine()
    scene.says(scene.replica(engine))
    answer = await send(client, path, body, headers={"x-shoal-backend": "sum--3"})
    assert len(engine.requests) == 1, answer.text


@pytest.mark.parametrize("model", ["words", "words@3", "words@stable"])
async def test_openais_model_may_name_a_version_or_a_label(
    scene: Scene, client: httpx.AsyncClient, model: str
) -> None:
    engine = WordsEngine(version="3")
    scene.says(scene.replica(engine), model="words")
    body = {"model": model, "prompt": "a b"}
    answer = await send(client, "/v1/completions", body, headers={"x-shoal-backend": "words--3"})
    assert answer.json()["choices"][0]["text"] == "A B"


async def test_the_edges_choice_is_worth_more_than_the_name(
    scene: Scene, client: httpx.AsyncClient
) -> None:
    scene.says(scene.replica(sum_engine()))
    chosen = {"x-shoal-backend": "sum--3"}
    assert (await send(client, "/v2/models/sum/infer", INFER, headers=chosen)).status_code == 200
    gone = {"x-shoal-backend": "sum--2"}  # and where it is gone, the name counts again
    assert (await send(client, "/v2/models/sum/infer", INFER, headers=gone)).status_code == 200


@pytest.mark.parametrize(
    ("checked", "status"),
    [({"x-shoal-model": "sum"}, 200), ({"x-shoal-model": "mine"}, 404), ({}, 404)],
)
async def test_a_key_opens_only_the_model_that_the_edge_checked_it_for(
    scene: Scene, client: httpx.AsyncClient, checked: dict[str, str], status: int
) -> None:
    scene.says(scene.replica(sum_engine()))
    headers = {"x-shoal-key": "k1", **checked}
    answer = await send(client, "/v2/models/sum/infer", INFER, headers=headers)
    assert answer.status_code == status


async def test_a_replicas_refusal_is_the_callers_answer(
    scene: Scene, client: httpx.AsyncClient
) -> None:
    engine = sum_engine()
    engine.failure = InferenceError(Fault.OVERLOADED, "busy", retry_after_s=3)
    scene.says(scene.replica(engine))
    answer = await send(client, "/v2/models/sum/infer", INFER)
    assert (answer.status_code, answer.json()) == (429, {"error": "busy"})
    assert answer.headers["retry-after"] == "3"
    assert len(engine.requests) == 1


async def test_a_stream_flows_through(scene: Scene, client: httpx.AsyncClient) -> None:
    scene.says(scene.replica(WordsEngine(version="3")), model="words")
    answer = await send(client, "/v1/completions", WORDS)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")
    assert scene.held == {}


async def test_a_caller_who_leaves_a_stream_ends_it_at_the_replica(
    scene: Scene, client: httpx.AsyncClient
) -> None:
    engine = WordsEngine(version="3")
    engine.gate = asyncio.Event()
    scene.says(scene.replica(engine), model="words")
    async with client.stream("POST", "/v1/completions", json=WORDS) as answer:
        assert "A" in await anext(answer.aiter_text())
    await becomes(lambda: engine.closed == 1)


# holding


async def test_a_request_for_a_sleeping_model_wakes_it_and_is_answered(
    scene: Scene, client: httpx.AsyncClient
) -> None:
    scene.says()
    waiting = asyncio.create_task(send(client, "/v2/models/sum/infer", INFER))
    await becomes(lambda: scene.woken == ["sum--3"] and scene.held == {"sum": 1})
    assert scene.series("shoal_held_requests") == {'model="sum"': 1}
    scene.says(scene.replica(sum_engine()))
    assert (await waiting).json()["outputs"][0]["data"] == [6]
    assert scene.held == {}
    assert scene.series("shoal_held_requests") == {'model="sum"': 0}
    assert scene.series("shoal_held_total") == {'model="sum",outcome="ok"': 1}
    assert scene.series("shoal_wake_seconds_count") == {'model="sum"': 1}


def message(error: Any) -> str:
    """The words of an error in OpenAI's form or in everybody else's."""
    return str(error["message"] if isinstance(error, dict) else error)


@pytest.mark.parametrize(
    ("path", "body", "form"),
    [
        ("/v2/models/sum/infer", INFER, str),
        ("/v1/models/sum:predict", ROWS, str),
        ("/v1/embeddings", {"model": "sum", "input": "x"}, dict),
    ],
)
async def test_a_full_room_is_too_many_requests_in_the_callers_protocol(
    scene: Scene, client: httpx.AsyncClient, path: str, body: Any, form: type
) -> None:
    scene.says()
    waiting = [asyncio.create_task(send(client, path, body)) for _ in range(scene.places_max)]
    await becomes(lambda: scene.held == {"sum": scene.places_max})
    answer = await send(client, path, body)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
    error = answer.json()["error"]
    assert isinstance(error, form)
    assert message(error) == "4 requests already wait for models to wake; try again later"
    for task in waiting:
        task.cancel()
    await becomes(lambda: scene.held == {})


async def test_a_caller_who_goes_away_frees_the_place(
    scene: Scene, client: httpx.AsyncClient
) -> None:
    scene.says()
    waiting = asyncio.create_task(send(client, "/v2/models/sum/infer", INFER))
    await becomes(lambda: scene.held == {"sum": 1})
    waiting.cancel()
    await becomes(lambda: scene.held == {})
    assert scene.series("shoal_held_total") == {'model="sum",outcome="cancelled"': 1}


async def test_a_caller_who_can_not_wait_is_told_in_time(
    scene: Scene, client: httpx.AsyncClient
) -> None:
    scene.says()
    headers = {"x-request-timeout-ms": "30"}
    answer = await send(client, "/v2/models/sum/infer", INFER, headers=headers)
    assert (answer.status_code, scene.held) == (504, {})


async def test_a_versions_own_limit_ends_the_waiting_too(
    scene: Scene, client: httpx.AsyncClient
) -> None:
    scene.says(timeout_ms=30)
    headers = {"x-request-timeout-ms": "60000"}
    answer = await send(client, "/v2/models/sum/infer", INFER, headers=headers)
    assert answer.status_code == 504


async def test_a_replica_that_is_too_slow_is_a_deadline_and_is_freed(
    scene: Scene, client: httpx.AsyncClient
) -> None:
    engine = sum_engine()
    engine.gate = asyncio.Event()
    scene.says(scene.replica(engine), idempotent=False)
    headers = {"x-request-timeout-ms": "50"}
    answer = await send(client, "/v2/models/sum/infer", INFER, headers=headers)
    assert answer.status_code == 504
    assert len(engine.requests) == 1
    await becomes(lambda: engine.cancelled == 1)


@pytest.mark.parametrize("timeout", ["soon", "-1", "0", "nan"])
async def test_a_limit_that_is_none_is_the_callers_fault(
    scene: Scene, client: httpx.AsyncClient, timeout: str
) -> None:
    scene.says()
    headers = {"x-request-timeout-ms": timeout}
    answer = await send(client, "/v2/models/sum/infer", INFER, headers=headers)
    assert answer.status_code == 400
    assert "x-request-timeout-ms" in answer.json()["error"]


async def test_a_version_that_can_not_be_loaded_says_why(
    scene: Scene, client: httpx.AsyncClient
) -> None:
    scene.says(reason="no file weights.onnx")
    answer = await send(client, "/v2/models/sum/infer", INFER)
    assert answer.status_code == 503
    assert "could not be loaded: no file weights.onnx" in answer.json()["error"]
    assert scene.series("shoal_held_total") == {'model="sum",outcome="unavailable"': 1}


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v2/models/other/infer", INFER, "'other' is not found"),
        ("/v2/models/sum/versions/9/infer", INFER, "'sum' version '9' is not found"),
        ("/v1/models/sum/labels/x:predict", ROWS, "'sum' version 'x' is not found"),
        ("/v1/embeddings", {"model": "other@2", "input": "x"}, "'other' version '2' is not found"),
    ],
)
async def test_a_model_that_there_is_not_is_not_found(
    scene: Scene, client: httpx.AsyncClient, path: str, body: Any, said: str
) -> None:
    scene.says()
    answer = await send(client, path, body)
    assert answer.status_code == 404
    assert f"Request for unknown model: {said}" in answer.text


@pytest.mark.parametrize("body", [{}, {"model": 5}, {"model": ""}, []])
async def test_a_body_that_names_no_model_is_the_callers_fault(
    scene: Scene, client: httpx.AsyncClient, body: Any
) -> None:
    scene.says()
    assert (await send(client, "/v1/chat/completions", body)).status_code == 400


# replicas that go away


async def test_a_replica_that_is_gone_leaves_its_requests_to_another(
    scene: Scene, client: httpx.AsyncClient
) -> None:
    gone = Server("r-gone", "127.0.0.1", 1)
    scene.says(gone, scene.replica(sum_engine()), idempotent=False)
    for _ in range(4):
        answer = await send(client, "/v2/models/sum/infer", INFER)
        assert answer.status_code == 200


async def test_a_replica_that_dies_over_a_request_leaves_it_to_another(
    scene: Scene, client: httpx.AsyncClient
) -> None:
    engine = sum_engine()
    async with dying() as (mortal, requests):
        scene.says(mortal, scene.replica(engine))
        async with asyncio.timeout(10):
            while not requests:
                assert (await send(client, "/v2/models/sum/infer", INFER)).status_code == 200
    assert engine.requests


async def test_a_request_that_must_not_be_sent_twice_is_not(
    scene: Scene, client: httpx.AsyncClient
) -> None:
    async with dying() as (mortal, requests):
        scene.says(mortal, idempotent=False)
        answer = await send(client, "/v2/models/sum/infer", INFER)
    assert answer.status_code == 503
    assert "idempotent: false" in answer.json()["error"]
    assert len(requests) == 1


@pytest.mark.parametrize(
    ("path", "body", "form"),
    [
        ("/v1/completions", WORDS, dict),
        ("/v2/models/words/generate_stream", {"text_input": "a"}, str),
    ],
)
async def test_a_stream_that_breaks_says_so_in_the_callers_protocol(
    scene: Scene, client: httpx.AsyncClient, path: str, body: Any, form: type
) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked"
    async with dying(head + b"\r\n\r\n9\r\ndata: 1\n\n\r\n") as (mortal, _):
        scene.says(mortal, model="words")
        answer = await send(client, path, body)
    first, last, end = answer.text.split("\n\n")
    assert (first, end) == ("data: 1", "")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert isinstance(error, form)
    assert message(error) == "the replica went away in the middle of its answer"


@asynccontextmanager
async def dying(sent: bytes = b"") -> AsyncIterator[tuple[Server, list[bytes]]]:
    """A replica that reads a request, answers `sent`, and dies."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(sent)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield Server("r-dying", "127.0.0.1", server.sockets[0].getsockname()[1]), requests
