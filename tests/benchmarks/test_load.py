"""Does the load generator count exactly what happened?

Against a small server in the same event loop, whose behaviour each test states.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from benchmarks.serving.load import (
    Exchange,
    Load,
    Outcome,
    drive,
    from_json,
    is_right,
    percentile,
    rate,
    read_reply,
    to_json,
)

REQUEST = b"POST /answer HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}"
Answer = Callable[[int], Awaitable[bytes]]


def a_reply(body: object, status: int = 200, more: str = "") -> bytes:
    text = json.dumps(body).encode()
    return f"HTTP/1.1 {status} X\r\ncontent-length: {len(text)}\r\n{more}\r\n".encode() + text


async def always_42(count: int) -> bytes:
    return a_reply({"y": [[42.0]]})


def expects(value: float) -> Exchange:
    return Exchange(REQUEST, path=("y",), expected=(value,))


async def a_run(answer: Answer, exchange: Exchange = expects(42), **fields: object) -> Outcome:
    """Apply a load to a server that answers request number `count` with `answer(count)`."""
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        try:
            while await reader.readexactly(len(REQUEST)):
                count += 1
                reply = await answer(count)
                writer.write(reply)
                if not reply or b"connection: close" in reply:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=512)
    port = server.sockets[0].getsockname()[1]
    defaults = {"connections": 4, "seconds": 5.0, "warm_s": 0.01, "grace_s": 1.0}
    load = Load(port=port, exchanges=(exchange,), **{**defaults, **fields})  # type: ignore[arg-type]
    try:
        return await drive(load)
    finally:
        server.close()


@pytest.mark.parametrize("connections", [1, 7, 64])
async def test_a_bounded_run_sends_exactly_as_many_requests_as_asked(connections: int) -> None:
    seen = 0

    async def answer(count: int) -> bytes:
        nonlocal seen
        seen = count
        return await always_42(count)

    outcome = await a_run(answer, connections=connections, requests_max=500)
    assert (outcome.answered_total, seen, outcome.failures) == (500, 500, 0)


async def test_a_run_ends_by_itself_after_its_seconds() -> None:
    started_s = asyncio.get_running_loop().time()
    outcome = await a_run(always_42, seconds=0.2)
    assert 0.2 <= asyncio.get_running_loop().time() - started_s < 1.5
    assert 0 < outcome.answered <= outcome.answered_total


async def test_there_are_never_more_requests_under_way_than_connections() -> None:
    under_way, most = 0, 0

    async def answer(count: int) -> bytes:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001)
        under_way -= 1
        return await always_42(count)

    await a_run(answer, connections=5, requests_max=100)
    assert most == 5


async def test_other_statuses_are_errors_and_not_answers() -> None:
    async def answer(count: int) -> bytes:
        return a_reply({}, 503) if count % 10 == 0 else await always_42(count)

    outcome = await a_run(answer, requests_max=100)
    assert outcome.errors == {"status 503": 10}
    assert outcome.answered_total == 90


async def test_a_connection_closed_before_its_answer_is_an_error_and_is_replaced() -> None:
    async def answer(count: int) -> bytes:
        return b"" if count == 3 else await always_42(count)

    outcome = await a_run(answer, connections=1, requests_max=20)
    assert outcome.errors == {"closed": 1}
    assert outcome.answered_total == 19


async def test_a_connection_closed_after_its_answer_is_replaced_without_error() -> None:
    async def answer(count: int) -> bytes:
        return a_reply({"y": [[42.0]]}, more="connection: close\r\n")

    outcome = await a_run(answer, connections=3, requests_max=30)
    assert (outcome.answered_total, outcome.failures) == (30, 0)


async def test_a_request_that_is_never_answered_is_counted() -> None:
    never = asyncio.Event()

    async def answer(count: int) -> bytes:
        if count == 2:
            await never.wait()
        return await always_42(count)

    outcome = await a_run(answer, connections=2, requests_max=10, seconds=0.2, grace_s=0.1)
    never.set()
    assert outcome.errors == {"unanswered": 1}
    assert outcome.answered_total == 9


async def test_every_nth_answer_is_checked_and_wrong_ones_counted() -> None:
    async def answer(count: int) -> bytes:
        return a_reply({"y": [[41.0]]})

    outcome = await a_run(answer, connections=1, requests_max=21, check_every=5)
    assert (outcome.checked, outcome.wrong) == (5, 5)  # the first, 5th, 10th, 15th and 20th


async def test_nothing_listening_is_counted_as_connect_errors() -> None:
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    load = Load(port, connections=2, exchanges=(expects(42),), seconds=0.2, warm_s=0.01)
    outcome = await drive(load)
    assert outcome.answered_total == 0
    assert set(outcome.errors) == {"connect"}


async def test_latencies_are_those_that_the_server_gave() -> None:
    async def answer(count: int) -> bytes:
        await asyncio.sleep(0.2 if count % 10 == 0 else 0.02)
        return await always_42(count)

    outcome = await a_run(answer, connections=1, requests_max=30, warm_s=0.001)
    assert 20 <= outcome.p50_ms < 100
    assert 200 <= outcome.p99_ms < 400


def test_percentiles_are_nearest_rank() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [percentile(values, f) for f in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([], 0.5) != percentile([], 0.5)  # NaN


def test_bursts_at_the_edges_of_the_window_do_not_change_the_rate() -> None:
    bursts = [t for t in range(20) for _ in range(32)]  # 32 answers once a second
    rates = {rate(bursts, opened, opened + 5.9) for opened in (2.1, 2.5, 2.9)}
    assert rates == {32.0}


def test_a_reply_is_read_only_when_it_is_whole() -> None:
    whole = a_reply({"y": 1}) + b"next"
    for cut in range(len(whole) - 4):
        assert read_reply(whole[:cut]) is None
    reply = read_reply(whole)
    assert reply is not None
    assert (reply.status, reply.body, whole[reply.size :]) == (200, b'{"y": 1}', b"next")


def test_a_chunked_reply_is_put_together() -> None:
    data = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n"
    )
    for cut in range(len(data)):
        assert read_reply(data[:cut]) is None
    reply = read_reply(data)
    assert reply is not None
    assert (reply.body, reply.size) == (b"abcde", len(data))


def test_what_is_not_http_is_refused() -> None:
    with pytest.raises(ValueError, match=r"HTTP/1\."):
        read_reply(b"SSH-2.0\r\n\r\n")


@pytest.mark.parametrize(
    ("body", "right"),
    [
        (b'{"y": [[42.0004]]}', True),
        (b'{"y": 42}', True),
        (b'{"y": [[42.1]]}', False),
        (b'{"y": [42, 42]}', False),
        (b'{"y": ["42"]}', False),
        (b'{"x": [42]}', False),
        (b"not json", False),
    ],
)
def test_an_answer_is_right_when_its_numbers_are(body: bytes, right: bool) -> None:
    assert is_right(expects(42), body) is right


def test_a_load_survives_the_way_to_another_process() -> None:
    binary = Exchange(REQUEST + bytes(range(256)), ("a", 0), (1.0, "word"), 0.5)
    load = Load(port=1, connections=2, exchanges=(binary, Exchange(REQUEST)), requests_max=7)
    assert from_json(to_json(load)) == load


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"host": "10.0.0.1"}, "host"),
        ({"exchanges": ()}, "exchanges"),
        ({"connections": 0}, "connections"),
        ({"seconds": 0.0}, "seconds"),
    ],
)
def test_a_load_that_is_unbounded_or_aimed_elsewhere_is_refused(
    fields: dict[str, object], problem: str
) -> None:
    right: dict[str, object] = {"port": 1, "connections": 1, "exchanges": (Exchange(b"x"),)}
    with pytest.raises(ValueError, match=problem):
        Load(**{**right, **fields})  # type: ignore[arg-type]
