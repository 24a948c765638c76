"""Does a held request reach its replica whole, and its answer come back as it was?"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from deployments.edge.routing import Server
from deployments.inference import Fault, InferenceError
from deployments.serving.application import Application
from deployments.serving.forwarding import Forwarder, Unanswered
from deployments.serving.http import HttpRequest, HttpResponse, HttpStream, Route
from tests.deployments.serving.engines import SingleCatalog, sum_engine
from tests.deployments.serving.live import Live, eventually, live


class Upstream:
    """What a replica got, and what it answers."""

    def __init__(self) -> None:
        self.requests: list[HttpRequest] = []
        self.answer: HttpResponse | HttpStream = HttpResponse(200, b"{}")
        self.cancelled = 0
        self.streaming = 0
        self.hangs = False

    async def handle(self, request: HttpRequest) -> HttpResponse | HttpStream:
        self.requests.append(request)
        if self.hangs:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled += 1
        return self.answer

    async def endless(self) -> AsyncIterator[bytes]:
        self.streaming += 1
        try:
            while True:
                yield b"data: x\n\n"
                await asyncio.sleep(0.001)
        finally:
            self.streaming -= 1

    def application(self) -> Application:
        paths = ("/v2/models/{model}/infer", "/x")
        return Application(
            SingleCatalog(sum_engine()),
            None,
            [],
            ready=lambda: True,
            routes=[Route("POST", path, self.handle) for path in paths],
        )


@pytest.fixture(scope="module")
def door() -> Iterator[tuple[Live, list[Upstream]]]:
    """One server for all tests; its replica is the last of the list."""
    upstreams: list[Upstream] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await upstreams[-1].application()(scope, receive, send)

    with live(app) as server:
        yield server, upstreams


@pytest.fixture
def upstream(door: tuple[Live, list[Upstream]]) -> Upstream:
    door[1].append(Upstream())
    return door[1][-1]


@pytest.fixture
def replica(door: tuple[Live, list[Upstream]], upstream: Upstream) -> Server:
    return Server("r-1", door[0].host, door[0].port)


@pytest.fixture
async def forwarder() -> AsyncIterator[Forwarder]:
    made = Forwarder(grace_s=0.1)
    yield made
    await made.close()


def a_request(path: str = "/x", **changes: Any) -> HttpRequest:
    made: dict[str, Any] = {"query": b"", "headers": [], "body": b"{}", "parameters": {}}
    return HttpRequest("POST", path, **{**made, **changes})


async def pieces(answer: HttpResponse | HttpStream) -> list[bytes]:
    assert isinstance(answer, HttpStream)
    return [piece async for piece in answer.pieces]


# whole answers


async def test_the_replica_gets_body_query_and_headers_as_they_were(
    forwarder: Forwarder, replica: Server, upstream: Upstream
) -> None:
    headers = [
        (b"content-type", b"application/octet-stream"),
        (b"inference-header-content-length", b"7"),
        (b"x-shoal-edge", b"token"),
        (b"x-user", b"\xe9"),
        (b"x-twice", b"1"),
        (b"x-twice", b"2"),
    ]
    body = bytes(range(256)) * 1000
    await forwarder.send(a_request(query=b"a=1&b=%20", headers=headers, body=body), replica, 5)
    (got,) = upstream.requests
    assert (got.method, got.path, got.query, got.body) == ("POST", "/x", b"a=1&b=%20", body)
    assert sorted(h for h in got.headers if h in headers) == sorted(headers)


async def test_what_belongs_to_the_callers_connection_is_not_passed_on(
    forwarder: Forwarder, replica: Server, upstream: Upstream
) -> None:
    headers = [
        (b"host", b"models.example"),
        (b"connection", b"close"),
        (b"transfer-encoding", b"chunked"),
        (b"content-length", b"999"),
        (b"content-encoding", b"gzip"),  # the body has been inflated
        (b"accept-encoding", b"gzip"),
        (b"expect", b"100-continue"),
        (b"te", b"trailers"),
    ]
    answer = await forwarder.send(a_request(headers=headers), replica, 5)
    assert answer.status == 200
    (got,) = upstream.requests
    assert not [h for h in got.headers if h in headers]
    assert got.header(b"accept-encoding") == b"identity"
    assert got.header(b"content-type") == b"application/json"


async def test_the_replica_learns_how_much_of_the_callers_time_is_left(
    forwarder: Forwarder, replica: Server, upstream: Upstream
) -> None:
    request = a_request(headers=[(b"x-request-timeout-ms", b"60000")])
    await forwarder.send(request, replica, 1.5)
    (got,) = upstream.requests
    assert [v for k, v in got.headers if k == b"x-request-timeout-ms"] == [b"1500"]


@pytest.mark.parametrize("model", ["fraud", "a b", "é", "100%", "a?b", "a+b;c"])
async def test_a_path_arrives_as_it_was_meant(
    forwarder: Forwarder, replica: Server, upstream: Upstream, model: str
) -> None:
    await forwarder.send(a_request(f"/v2/models/{model}/infer"), replica, 5)
    assert upstream.requests[0].parameters == {"model": model}


@pytest.mark.parametrize("query", [b"a=\xff", b"a=" + b"x" * 70_000, b"a\x00"])
async def test_a_query_that_is_no_part_of_a_url_is_the_callers_fault(
    forwarder: Forwarder, replica: Server, upstream: Upstream, query: bytes
) -> None:
    with pytest.raises(InferenceError) as refused:
        await forwarder.send(a_request(query=query), replica, 5)
    assert refused.value.fault is Fault.INVALID
    assert upstream.requests == []


@pytest.mark.parametrize("status", [200, 204, 400, 404, 429, 500, 503, 504])
async def test_an_answer_comes_back_with_status_body_and_headers(
    forwarder: Forwarder, replica: Server, upstream: Upstream, status: int
) -> None:
    body = b"" if status == 204 else bytes(range(256))
    headers = [(b"retry-after", b"3"), (b"inference-header-content-length", b"9")]
    upstream.answer = HttpResponse(status, body, b"application/octet-stream", headers)
    answer = await forwarder.send(a_request(), replica, 5)
    assert isinstance(answer, HttpResponse)
    assert (answer.status, answer.body) == (status, body)
    assert answer.content_type == b"application/octet-stream"
    assert list(answer.headers) == headers


async def test_large_bodies_go_both_ways(
    forwarder: Forwarder, replica: Server, upstream: Upstream
) -> None:
    body = b"x" * 3_000_000
    upstream.answer = HttpResponse(200, body)
    answer = await forwarder.send(a_request(body=body), replica, 5)
    assert isinstance(answer, HttpResponse)
    assert answer.body == body == upstream.requests[0].body


# streams


async def test_a_stream_comes_piece_by_piece(
    forwarder: Forwarder, replica: Server, upstream: Upstream
) -> None:
    upstream.answer = HttpStream(upstream.endless(), 200)
    answer = await forwarder.send(a_request(), replica, 5)
    assert isinstance(answer, HttpStream)
    assert answer.content_type.startswith(b"text/event-stream")
    assert (await anext(answer.pieces)).startswith(b"data: x\n\n")
    assert upstream.streaming == 1
    await answer.pieces.aclose()  # type: ignore[attr-defined]
    await asyncio.to_thread(eventually, lambda: upstream.streaming == 0)


async def test_a_stream_that_nobody_begins_to_read_is_let_go_too(
    forwarder: Forwarder, replica: Server, upstream: Upstream
) -> None:
    upstream.answer = HttpStream(upstream.endless(), 200)
    answer = await forwarder.send(a_request(), replica, 5)
    assert isinstance(answer, HttpStream)
    await answer.pieces.aclose()  # type: ignore[attr-defined]
    await asyncio.to_thread(eventually, lambda: upstream.streaming == 0)


# replicas that go away


@asynccontextmanager
async def cut_after(sent: bytes) -> AsyncIterator[Server]:
    """A replica that reads a request, answers `sent`, and dies."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield Server("r-1", "127.0.0.1", server.sockets[0].getsockname()[1])


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\n"
EVENTS = HEAD % b"text/event-stream" + b"transfer-encoding: chunked\r\n\r\n"


async def test_a_replica_that_is_not_there_never_got_the_request(forwarder: Forwarder) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = Server("r-1", *unused.getsockname())
        with pytest.raises(Unanswered) as unanswered:
            await forwarder.send(a_request(), nobody, 5)
    assert not unanswered.value.was_sent


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent",
        HEAD % b"application/json" + b"content-length: 10\r\n\r\n{",
        HEAD % b"application/json" + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n",
        b"nonsense\r\n\r\n",
    ],
)
async def test_a_replica_that_dies_before_it_has_answered_may_have_worked(
    forwarder: Forwarder, sent: bytes
) -> None:
    async with cut_after(sent) as replica:
        with pytest.raises(Unanswered) as unanswered:
            await forwarder.send(a_request(), replica, 5)
    assert unanswered.value.was_sent


async def test_a_stream_whose_replica_dies_says_so_at_its_end(forwarder: Forwarder) -> None:
    async with cut_after(EVENTS + b"3\r\none\r\n3\r\ntwo\r\n") as replica:
        answer = await forwarder.send(a_request(), replica, 5, broken=b"data: broken\n\n")
        assert b"".join(await pieces(answer)) == b"onetwodata: broken\n\n"


async def test_a_stream_that_is_complete_ends_as_it_ended(forwarder: Forwarder) -> None:
    async with cut_after(EVENTS + b"3\r\none\r\n0\r\n\r\n") as replica:
        answer = await forwarder.send(a_request(), replica, 5, broken=b"data: broken\n\n")
        assert b"".join(await pieces(answer)) == b"one"


async def test_a_replica_that_says_nothing_is_given_up_a_little_after_the_deadline(
    forwarder: Forwarder, replica: Server, upstream: Upstream
) -> None:
    upstream.hangs = True
    start_s = time.monotonic()
    with pytest.raises(Unanswered) as unanswered:
        await forwarder.send(a_request(), replica, 0.05)
    assert unanswered.value.was_sent
    assert 0.14 < time.monotonic() - start_s < 2
    await asyncio.to_thread(eventually, lambda: upstream.cancelled == 1)


async def test_a_caller_who_goes_away_frees_the_replica(
    forwarder: Forwarder, replica: Server, upstream: Upstream
) -> None:
    upstream.hangs = True
    task = asyncio.create_task(forwarder.send(a_request(), replica, 30))
    await asyncio.to_thread(eventually, lambda: bool(upstream.requests))
    task.cancel()
    await asyncio.to_thread(eventually, lambda: upstream.cancelled == 1)
    assert task.cancelled()


async def test_connections_are_used_again(
    forwarder: Forwarder, replica: Server, upstream: Upstream
) -> None:
    for _ in range(20):
        await forwarder.send(a_request(), replica, 5)
    assert len(upstream.requests) == 20
