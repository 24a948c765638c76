"""Does the application keep its promises around every handler?"""

from __future__ import annotations

import asyncio
import gzip
import logging
import socket
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import httpx
import orjson
import pytest

from deployments.inference import Fault, InferenceError
from deployments.serving.application import Application
from deployments.serving.delegation import ASGIApp, Receive, Send
from deployments.serving.http import Handler, HttpRequest, HttpResponse, HttpStream, Route
from tests.deployments.serving.engines import SingleCatalog, sum_engine
from tests.deployments.serving.live import Live, eventually, live

LIMIT = 4096


class Parrot:
    """A dialect whose handlers show what the application gave them."""

    name = "parrot"
    prefixes: Sequence[str] = ("/parrot", "/parrot/quiet")

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.cancelled = 0
        self.closed = 0

    def routes(self) -> list[Route]:
        def route(method: str, template: str, handler: Handler) -> Route:
            return Route(method, f"/parrot/{template}", handler)

        return [
            route("GET", "of/{model}/say/{word}", self.say),
            route("GET", "of/{model}", self.say),
            route("POST", "echo", self.echo),
            route("POST", "large", self.large),
            route("POST", "wait", self.wait),
            route("POST", "stream", self.stream),
            route("POST", "broken", self.broken),
            route("POST", "busy", self.busy),
        ]

    def error(self, error: InferenceError) -> HttpResponse:
        return HttpResponse(
            {Fault.NOT_FOUND: 404, Fault.METHOD_NOT_ALLOWED: 405, Fault.INTERNAL: 500}.get(
                error.fault, 418
            ),
            f"squawk: {error.message}".encode(),
            b"text/plain",
        )

    async def say(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, orjson.dumps(dict(request.parameters)))

    async def echo(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, request.body, b"application/octet-stream")

    async def large(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, b"polly " * 1000, b"text/plain", [(b"x-more", b"yes")])

    async def wait(self, request: HttpRequest) -> HttpResponse:
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return HttpResponse(200, b"done")

    async def stream(self, request: HttpRequest) -> HttpStream:
        return HttpStream(self.pieces())

    async def pieces(self) -> AsyncIterator[bytes]:
        try:
            yield b"one"
            await self.gate.wait()
            yield b"two"
        finally:
            self.closed += 1

    async def broken(self, request: HttpRequest) -> HttpResponse:
        raise RuntimeError("the secret recipe")

    async def busy(self, request: HttpRequest) -> HttpResponse:
        raise InferenceError(Fault.OVERLOADED, "come back", retry_after_s=3)


class Hawk:
    """A second dialect, for what happens where two meet."""

    name = "hawk"
    prefixes: Sequence[str] = ("/hawk",)
    ignores_case = True

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/parrot/of/{model}", self.scream),
            Route("GET", "/Hawk/{model}:hunt", self.scream),
        ]

    def error(self, error: InferenceError) -> HttpResponse:
        return HttpResponse(400, b"screech")

    async def scream(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, f"scream {request.parameters['model']}".encode())


@dataclass(frozen=True, slots=True)
class Served:
    """A live application and ways to look into it."""

    application: Application
    parrot: Parrot
    live: Live
    http: httpx.Client
    seen: list[tuple[str, Fault | None, float]]


@contextmanager
def served(
    *,
    edge_token: str | None = None,
    routes: Sequence[Route] = (),
    ready: bool = True,
    delegates: Mapping[str, ASGIApp] = MappingProxyType({}),
) -> Iterator[Served]:
    seen: list[tuple[str, Fault | None, float]] = []
    parrot = Parrot()
    engine = sum_engine(model="polly", version="7")
    application = Application(
        SingleCatalog(engine),
        engine,
        [parrot, Hawk()],
        ready=lambda: ready,
        edge_token=edge_token,
        body_bytes_max=LIMIT,
        routes=routes,
        delegates=delegates,
        observe=lambda *figures: seen.append(figures),
    )
    with live(application) as server, httpx.Client(base_url=server.url) as http:
        yield Served(application, parrot, server, http, seen)


@pytest.fixture(scope="module")
def here() -> Iterator[Served]:
    with served() as made:
        yield made


def test_own_and_other_models_reach_the_handler_with_their_names(here: Served) -> None:
    for path, values in {
        "/parrot/of/polly": {"model": "polly"},
        "/parrot/of/other": {"model": "other"},
        "/parrot/of/polly/say/hi": {"model": "polly", "word": "hi"},
        "/parrot/of/with%20space/say/x": {"model": "with space", "word": "x"},
        "/parrot/of/polly/": {"model": "polly"},
    }.items():
        assert here.http.get(path).json() == values


def test_errors_look_like_the_dialect_that_owns_the_path(here: Served) -> None:
    assert here.http.get("/parrot/nothing").text.startswith("squawk: nothing is at GET")
    assert here.http.get("/parrot/nothing").status_code == 404
    assert here.http.get("/hawk/nothing").text == "screech"
    assert here.http.get("/parrots").json() == {"error": "nothing is at GET /parrots"}


def test_a_wrong_method_is_405_and_says_which_are_right(here: Served) -> None:
    answer = here.http.put("/parrot/of/polly")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD"
    assert answer.text.startswith("squawk: PUT is not possible")
    assert here.http.get("/parrot/echo").headers["allow"] == "POST"
    assert here.http.post("/healthz").json()["error"].startswith("POST is not possible")


def test_head_is_get_without_a_body(here: Served) -> None:
    answer = here.http.head("/parrot/of/polly")
    assert answer.status_code == 200
    assert answer.headers["content-length"] == str(len(here.http.get("/parrot/of/polly").content))
    assert answer.content == b""


def test_a_named_dialect_goes_first_and_ignores_case_where_it_says_so(here: Served) -> None:
    as_hawk = {"x-shoal-dialect": "hawk"}
    assert here.http.get("/parrot/of/polly").json() == {"model": "polly"}
    assert here.http.get("/parrot/of/polly", headers=as_hawk).text == "scream polly"
    assert here.http.get("/parrot/of/polly/say/hi", headers=as_hawk).json()["word"] == "hi"
    assert here.http.get("/nothing", headers=as_hawk).text == "screech"
    assert here.http.get("/hAWK/Polly:HUNT").text == "scream Polly"


def test_a_body_may_be_as_large_as_the_limit_and_no_larger(here: Served) -> None:
    most = b"x" * LIMIT
    assert here.http.post("/parrot/echo", content=most).content == most
    for too_large in (most + b"x", iter([most, b"x"])):
        answer = here.http.post("/parrot/echo", content=too_large)
        assert answer.status_code == 418
        assert answer.text == "squawk: the body has more than the 4096 bytes allowed"


def test_a_body_in_many_chunks_arrives_whole(here: Served) -> None:
    pieces = [bytes([n]) * 100 for n in range(20)]
    assert here.http.post("/parrot/echo", content=iter(pieces)).content == b"".join(pieces)


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


@pytest.mark.parametrize(
    ("coding", "packed"),
    [
        ("gzip", gzip.compress(b"hello")),
        ("GZip", gzip.compress(b"hel") + gzip.compress(b"lo")),
        ("deflate", zlib.compress(b"hello")),
        ("deflate", raw_deflate(b"hello")),
        ("identity", b"hello"),
    ],
)
def test_compressed_bodies_are_inflated(here: Served, coding: str, packed: bytes) -> None:
    headers = {"content-encoding": coding}
    assert here.http.post("/parrot/echo", content=packed, headers=headers).content == b"hello"


@pytest.mark.parametrize(
    ("coding", "packed", "words"),
    [
        ("gzip", b"hello", "is not gzip"),
        ("gzip", gzip.compress(b"hello")[:-4], "ends too early"),
        ("gzip", gzip.compress(b"hello") + b"junk", "is not gzip"),
        ("deflate", b"\xff\xff", "is not deflate"),
        ("gzip", gzip.compress(b"x" * (LIMIT + 1)), "inflates to more than 4096 bytes"),
        ("br", b"hello", "'br' must be gzip, deflate or identity"),
        ("gzip, gzip", b"hello", "must be gzip, deflate or identity"),
    ],
)
def test_bodies_that_can_not_be_inflated_are_refused(
    here: Served, coding: str, packed: bytes, words: str
) -> None:
    answer = here.http.post("/parrot/echo", content=packed, headers={"content-encoding": coding})
    assert answer.status_code == 418
    assert words in answer.text


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_large_answer_is_compressed_for_who_asks_for_one_coding(
    here: Served, coding: str
) -> None:
    plain = b"polly " * 1000
    answer = here.http.post("/parrot/large", headers={"accept-encoding": coding})
    assert answer.headers["content-encoding"] == coding
    assert int(answer.headers["content-length"]) < len(plain)
    assert answer.content == plain
    assert answer.headers["x-more"] == "yes"


@pytest.mark.parametrize("accepted", ["gzip, deflate, br", "identity", "gzip;q=0"])
def test_no_other_answer_is_compressed(here: Served, accepted: str) -> None:
    answer = here.http.post("/parrot/large", headers={"accept-encoding": accepted})
    assert "content-encoding" not in answer.headers
    small = here.http.post("/parrot/echo", content=b"x", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in small.headers


def test_the_request_id_comes_back_when_it_is_plain(here: Served) -> None:
    def echoed(value: bytes) -> str | None:
        answer = here.http.get("/healthz", headers={b"x-request-id": value})
        return dict(answer.headers).get("x-request-id")

    assert echoed(b"abc-123") == "abc-123"
    assert echoed(b"a b") is None
    assert echoed(b"\xff") is None
    assert echoed(b"x" * 200) is None


def test_a_broken_handler_is_logged_and_tells_nothing(
    here: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        answer = here.http.post("/parrot/broken", headers={"x-request-id": "r1"})
    assert answer.status_code == 500
    assert answer.text.startswith("squawk: internal error")
    assert "recipe" not in answer.text
    assert "the secret recipe" in caplog.text
    assert "'r1'" in caplog.text


def test_a_request_without_the_edges_token_is_refused_everywhere_but_on_probes() -> None:
    with served(edge_token="secret", ready=False) as there:
        assert there.http.get("/parrot/of/polly").status_code == 418
        assert "edge" in there.http.get("/parrot/of/polly").text
        assert there.http.get("/nowhere").status_code == 403
        wrong = {"x-shoal-edge": "wrong"}
        assert there.http.get("/parrot/of/polly", headers=wrong).status_code == 418
        right = {"x-shoal-edge": "secret"}
        assert there.http.get("/parrot/of/polly", headers=right).status_code == 200
        assert there.http.get("/healthz").status_code == 200
        assert there.http.get("/readyz").status_code == 503


def test_readiness_follows_the_callable(here: Served) -> None:
    assert here.http.get("/readyz").json() == {"ready": True}
    with served(ready=False) as there:
        assert there.http.get("/readyz").json() == {"ready": False}


def test_plain_routes_are_served_too() -> None:
    async def docs(request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, b"<p>docs", b"text/html")

    with served(routes=[Route("GET", "/docs", docs)]) as there:
        assert there.http.get("/docs").headers["content-type"] == "text/html"
        assert there.http.post("/docs").json()["error"].startswith("POST is not possible")


def test_a_plain_route_below_a_dialects_prefix_fails_in_its_form() -> None:
    async def hold(request: HttpRequest) -> HttpResponse:
        raise InferenceError(Fault.OVERLOADED, f"no place for {request.parameters['model']}")

    with served(routes=[Route("POST", "/hawk/{model}:Catch", hold)]) as there:
        assert there.http.post("/hawk/mouse:catch").text == "screech"


def test_what_is_posted_to_a_dialect_is_observed_with_its_fault() -> None:
    with served() as there:
        for path in ("echo", "busy", "broken"):
            there.http.post(f"/parrot/{path}")
        there.http.post("/parrot/echo", content=b"x" * (LIMIT + 1))
        there.http.get("/parrot/of/polly")
        there.http.get("/healthz")
        eventually(lambda: there.application.ongoing == 0)
        faults = [None, Fault.OVERLOADED, Fault.INTERNAL, Fault.TOO_LARGE]
        assert [(p, f) for p, f, _ in there.seen] == [("parrot", f) for f in faults]
        assert all(0 <= seconds < 10 for _, _, seconds in there.seen)


async def lent(scope: Any, receive: Receive, send: Send) -> None:
    """An app of another library's, that answers with what it got."""
    message = await receive()
    length = dict(scope["headers"])[b"content-length"]
    if message["body"] == b"no place":
        raise InferenceError(Fault.OVERLOADED, "full")
    if message["body"] == b"break":
        raise RuntimeError("the secret recipe")
    status = 404 if message["body"] == b"miss" else 200
    await send({"type": "http.response.start", "status": status, "headers": []})
    if message["body"] == b"break off":
        raise RuntimeError("later")
    await send({"type": "http.response.body", "body": length + b" " + message["body"]})


def test_a_delegate_answers_instead_of_the_handler() -> None:
    with served(delegates={"/parrot/echo": lent}, edge_token="secret") as there:
        assert there.http.post("/parrot/echo").status_code == 418
        there.http.headers["x-shoal-edge"] = "secret"
        packed = {"content-encoding": "gzip"}
        answer = there.http.post("/parrot/echo", content=gzip.compress(b"hello"), headers=packed)
        assert answer.text == "5 hello"
        assert there.http.post("/parrot/echo", content=b"x" * (LIMIT + 1)).status_code == 418
        assert there.http.post("/parrot/echo", content=b"no place").text == "squawk: full"
        assert there.http.post("/parrot/echo", content=b"miss").status_code == 404
        broken = there.http.post("/parrot/echo", content=b"break")
        assert (broken.status_code, "recipe" in broken.text) == (500, False)
        with pytest.raises(httpx.RemoteProtocolError):
            there.http.post("/parrot/echo", content=b"break off")
        eventually(lambda: there.application.ongoing == 0)
        assert [fault for _, fault, _ in there.seen] == [
            None, Fault.TOO_LARGE, Fault.OVERLOADED, Fault.NOT_FOUND, Fault.INTERNAL
        ]  # fmt: skip


def test_a_delegate_hears_when_its_client_hangs_up() -> None:
    heard: list[str] = []

    async def listening(scope: Any, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            heard.append(message["type"])
            if message["type"] == "http.disconnect":
                return

    with served(delegates={"/parrot/echo": listening}) as there:
        begin(there, "/parrot/echo").close()
        eventually(lambda: there.application.ongoing == 0)
        assert heard == ["http.request", "http.disconnect"]


def begin(here: Served, path: str) -> socket.socket:
    """A request whose answer is not waited for."""
    client = socket.create_connection((here.live.host, here.live.port))
    client.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode())
    eventually(lambda: here.application.ongoing == 1)
    return client


def test_a_client_that_hangs_up_frees_its_place() -> None:
    with served() as there:
        begin(there, "/parrot/wait").close()
        eventually(lambda: there.parrot.cancelled == 1)
        eventually(lambda: there.application.ongoing == 0)


def test_a_client_that_stays_is_answered_however_long_it_takes() -> None:
    with served() as there, begin(there, "/parrot/wait") as client:
        listening = there.application._clients._waiting
        eventually(lambda: any(w.listener is not None for w in listening))
        there.live.call(there.parrot.gate.set)
        assert client.recv(1000).endswith(b"done")
        eventually(lambda: there.application.ongoing == 0)
        assert there.parrot.cancelled == 0


def test_a_stream_whose_reader_hangs_up_is_closed() -> None:
    with served() as there:
        client = begin(there, "/parrot/stream")
        received = b""
        while b"one" not in received:
            received += client.recv(1000)
        client.close()
        eventually(lambda: there.parrot.closed == 1)
        eventually(lambda: there.application.ongoing == 0)


def test_a_stream_is_sent_piece_by_piece() -> None:
    with served() as there, there.http.stream("POST", "/parrot/stream") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        pieces = answer.iter_raw()
        assert next(pieces) == b"one"
        assert there.application.ongoing == 1
        there.live.call(there.parrot.gate.set)
        assert list(pieces) == [b"two"]
        eventually(lambda: there.application.ongoing == 0)


def test_a_client_that_hangs_up_within_its_body_leaves_nothing_behind() -> None:
    with served() as there:
        client = socket.create_connection((there.live.host, there.live.port))
        client.sendall(b"POST /parrot/echo HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nabc")
        eventually(lambda: there.application.ongoing == 1)
        client.close()
        eventually(lambda: there.application.ongoing == 0)


async def test_lifespan_is_agreed_to_and_websockets_are_closed() -> None:
    engine = sum_engine()
    application = Application(SingleCatalog(engine), engine, [], ready=lambda: True)
    events = iter(["lifespan.startup", "lifespan.shutdown"])
    sent: list[str] = []

    async def receive() -> dict[str, str]:
        return {"type": next(events)}

    async def send(message: object) -> None:
        assert isinstance(message, dict)
        sent.append(message["type"])

    await application({"type": "lifespan"}, receive, send)
    await application({"type": "websocket"}, receive, send)
    assert sent == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
        "websocket.close",
    ]
