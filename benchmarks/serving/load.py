"""How fast, and how right, does a server answer when N callers never pause?

A closed loop: each connection sends a request, waits for the whole answer, sends the next. One
process, one event loop, a hand-written HTTP/1.1 client, so that the generator costs a fraction
of what it measures (its own CPU is part of the result).

    warm-up            window                      grace
    ├─────────────────┼───────────────────────────┼──────────┤
    answers ignored    counted                     only answers to requests sent in the window

Throughput is counted from the last answer before the window to the last answer in it, so that a
server that answers in bursts (batches of 32) isn't charged for half a batch at either end.
Latencies are those of the requests *sent* in the window, whenever they were answered: the slow
ones are not lost when the window closes.

It measures; it starts no server and knows no protocol: what to send and what a right answer
looks like arrive as values (`Exchange`). `python -m benchmarks.serving.load` reads a `Load` as
JSON on stdin and writes events and the `Outcome` as JSON lines on stdout.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import math
import re
import resource
import ssl
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import uvloop

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[^\r]*chunked", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[ \t]*close", re.IGNORECASE)
_REDIAL_DELAY_S = 0.05
"""Before dialling again after a failure, so that a dead server is not hammered."""

Nested = float | str | Sequence["Nested"]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One HTTP request, byte for byte, and the answer that is right for it.

    `path` leads through the reply's JSON to the numbers or words compared with `expected` (flat;
    numbers within `tolerance`). No `expected` = only the status is checked.
    """

    request: bytes
    path: tuple[str | int, ...] = ()
    expected: tuple[float | str, ...] | None = None
    tolerance: float = 1e-3


@dataclass(frozen=True, slots=True)
class Load:
    """What to do. Ends after `seconds` or `requests_max` answers, whichever comes first.

    `check_every`: every Nth answer is compared with what is expected. `reuse_max`: requests on one
    connection before a new one is opened (None = keep it). `ca_pem`: verify TLS with this
    certificate and connect as `server_name`; None = plain HTTP.
    """

    port: int
    connections: int
    exchanges: tuple[Exchange, ...]
    seconds: float = 3.0
    warm_s: float = 0.5
    grace_s: float = 15.0
    requests_max: int | None = None
    check_every: int = 50
    reuse_max: int | None = None
    ca_pem: str | None = None
    server_name: str = "localhost"
    host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        if self.host not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(f"host must be this machine (127.0.0.1), not {self.host!r}")
        if not self.exchanges:
            raise ValueError("exchanges is empty; it needs at least one request to send")
        if not 1 <= self.connections <= 4096:
            raise ValueError(f"connections must be 1 to 4096, not {self.connections}")
        if not 0 < self.seconds <= 3600:
            raise ValueError(f"seconds must be above 0 and at most 3600, not {self.seconds}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it.

    `answered`: requests answered with 200 in the window. `errors` by kind (`status 503`, `closed`,
    `connect`, `unanswered`) and `wrong` count over the whole run, warm-up and grace included.
    """

    requests_per_s: float
    answered: int
    answered_total: int
    errors: dict[str, int]
    checked: int
    wrong: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    longest_ms: float
    window_s: float
    own_cpu_us: float

    @property
    def failures(self) -> int:
        """Requests without a right answer."""
        return sum(self.errors.values()) + self.wrong


def percentile(sorted_values: Sequence[float], fraction: float) -> float:
    """The nearest-rank percentile: the smallest value with at least `fraction` at or below it."""
    if not sorted_values:
        return math.nan
    return sorted_values[max(0, math.ceil(fraction * len(sorted_values)) - 1)]


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole HTTP reply and how many bytes of the buffer it took."""

    status: int
    body: bytes
    size: int
    closes: bool


def read_reply(data: bytes) -> Reply | None:
    """The reply at the start of `data`, or None while it is not whole yet.

    Raises `ValueError` when `data` can't be HTTP/1.1 with a length or chunks.
    """
    head_end = data.find(b"\r\n\r\n")
    if head_end < 0:
        return None
    if not data.startswith(b"HTTP/1."):
        raise ValueError("the reply does not begin with HTTP/1.")
    status = int(data[9:12])
    start = head_end + 4
    closes = _CLOSE.search(data, 0, start) is not None
    length = _LENGTH.search(data, 0, start)
    if length is not None:
        end = start + int(length[1])
        return Reply(status, data[start:end], end, closes) if len(data) >= end else None
    if _CHUNKED.search(data, 0, start):
        whole = _read_chunks(data, start)
        return None if whole is None else Reply(status, whole[0], whole[1], closes)
    if status in (204, 304):
        return Reply(status, b"", start, closes)
    raise ValueError("the reply has neither content-length nor chunks")


def _read_chunks(data: bytes, at: int) -> tuple[bytes, int] | None:
    """The body whose chunks begin at `at`, and where it ends."""
    pieces: list[bytes] = []
    while True:
        line_end = data.find(b"\r\n", at)
        if line_end < 0:
            return None
        size = int(data[at:line_end].split(b";")[0], 16)
        begin = line_end + 2
        if len(data) < begin + size + 2:
            return None
        at = begin + size + 2
        if size == 0:
            return b"".join(pieces), at
        pieces.append(data[begin : begin + size])


def flatten(value: Any) -> Iterator[float | str]:
    """The leaves of nested lists, in order."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from flatten(item)
    else:
        yield value


def is_right(exchange: Exchange, body: bytes) -> bool:
    """Whether `body` holds the answer that `exchange` expects."""
    if exchange.expected is None:
        return True
    try:
        value: Any = json.loads(body)
        for step in exchange.path:
            value = value[step]
        found = list(flatten(value))
    except (ValueError, KeyError, IndexError, TypeError):
        return False
    if len(found) != len(exchange.expected):
        return False
    return all(
        _is_same(a, b, exchange.tolerance) for a, b in zip(found, exchange.expected, strict=True)
    )


def _is_same(found: float | str, expected: float | str, tolerance: float) -> bool:
    if isinstance(expected, str) or isinstance(found, str):
        return found == expected
    return abs(found - expected) <= tolerance


class _Run:
    """The counters that all connections share."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.exchanges = itertools.cycle(load.exchanges)
        self.is_sending = True
        self.sent = 0
        self.in_flight = 0
        self.answered = 0
        self.checked = 0
        self.wrong = 0
        self.errors: Counter[str] = Counter()
        self.sent_s = array("d")
        self.finished_s = array("d")
        self.done = asyncio.Event()

    def next(self) -> Exchange | None:
        """The next request to send, or None when there is none left."""
        if not self.is_sending or self.sent == self.load.requests_max:
            return None
        self.sent += 1
        self.in_flight += 1
        return next(self.exchanges)

    def settle(self) -> None:
        """One request has come to its end."""
        self.in_flight -= 1
        if self.in_flight == 0 and (not self.is_sending or self.sent == self.load.requests_max):
            self.done.set()

    def record(self, exchange: Exchange, reply: Reply, sent_s: float, now_s: float) -> None:
        """Count an answer."""
        if reply.status != 200:
            self.errors[f"status {reply.status}"] += 1
            return
        self.answered += 1
        self.sent_s.append(sent_s)
        self.finished_s.append(now_s)
        if self.answered % self.load.check_every == 0 or self.answered == 1:
            self.checked += 1
            self.wrong += not is_right(exchange, reply.body)

    def stop_sending(self) -> None:
        self.is_sending = False
        if self.in_flight == 0:
            self.done.set()


class _Connection(asyncio.Protocol):
    """One caller: at most one request under way."""

    def __init__(self, run: _Run, redial: Callable[[float], None]) -> None:
        self.run = run
        self.redial = redial
        self.transport: asyncio.Transport
        self.exchange: Exchange | None = None
        self.buffer = b""
        self.sent_s = 0.0
        self.uses_left = run.load.reuse_max or sys.maxsize

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.send()

    def send(self) -> None:
        if self.uses_left == 0:
            self.transport.close()
            self.redial(0.0)
            return
        self.exchange = self.run.next()
        if self.exchange is None:
            self.transport.close()
            return
        self.uses_left -= 1
        self.sent_s = time.perf_counter()
        self.transport.write(self.exchange.request)

    def data_received(self, data: bytes) -> None:
        if self.exchange is None:
            return
        if self.buffer:
            data = self.buffer + data
        try:
            reply = read_reply(data)
        except ValueError:
            self.fail("not HTTP")
            return
        if reply is None:
            self.buffer = data
            return
        self.buffer = b""
        exchange, self.exchange = self.exchange, None
        self.run.record(exchange, reply, self.sent_s, time.perf_counter())
        self.run.settle()
        if reply.closes:
            self.uses_left = 0
        self.send()

    def fail(self, kind: str) -> None:
        """The request under way gets no answer; go on with a new connection."""
        self.exchange = None
        self.run.errors[kind] += 1
        self.transport.abort()
        self.run.settle()
        self.redial(_REDIAL_DELAY_S)

    def connection_lost(self, error: Exception | None) -> None:
        if self.exchange is not None:
            self.fail("closed")


class _Dialler:
    """Keeps the wanted number of connections open while there is something to send."""

    def __init__(self, run: _Run, loop: asyncio.AbstractEventLoop) -> None:
        self.run = run
        self.loop = loop
        self.tasks: set[asyncio.Task[None]] = set()
        pem = run.load.ca_pem
        self.tls = ssl.create_default_context(cafile=pem) if pem else None

    def dial(self, delay_s: float) -> None:
        if self.run.is_sending and self.run.sent != self.run.load.requests_max:
            task = self.loop.create_task(self._dial(delay_s))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _dial(self, delay_s: float) -> None:
        load = self.run.load
        if delay_s:
            await asyncio.sleep(delay_s)
        try:
            await self.loop.create_connection(
                lambda: _Connection(self.run, self.dial),
                load.host,
                load.port,
                ssl=self.tls,
                server_hostname=load.server_name if self.tls else None,
            )
        except OSError:
            self.run.errors["connect"] += 1
            self.dial(_REDIAL_DELAY_S)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def drive(load: Load, tell: Callable[[str], None] = lambda event: None) -> Outcome:
    """Apply `load` and return what came of it; `tell` hears "window" and "end" as they happen."""
    loop = asyncio.get_running_loop()
    run = _Run(load)
    dialler = _Dialler(run, loop)
    for _ in range(load.connections):
        dialler.dial(0.0)
    await _sleep_or_done(run, load.warm_s)
    opened_s, cpu_s = time.perf_counter(), _cpu_s()
    tell("window")
    await _sleep_or_done(run, load.seconds)
    closed_s, cpu_s = time.perf_counter(), _cpu_s() - cpu_s
    tell("end")
    run.stop_sending()
    await _sleep_or_done(run, load.grace_s)
    if run.in_flight:
        run.errors["unanswered"] += run.in_flight
    for task in dialler.tasks:
        task.cancel()
    return _summary(run, opened_s, closed_s, cpu_s)


async def _sleep_or_done(run: _Run, seconds: float) -> None:
    """Return after `seconds`, or sooner when every request has come to its end."""
    try:
        await asyncio.wait_for(run.done.wait(), seconds)
    except TimeoutError:
        return


def rate(finished_s: Sequence[float], opened_s: float, closed_s: float) -> float:
    """Answers a second, from the last answer before the window to the last one in it."""
    before = [t for t in finished_s if t < opened_s]
    inside = [t for t in finished_s if opened_s <= t <= closed_s]
    if not inside:
        return 0.0
    start_s = max(before) if before else opened_s
    return len(inside) / max(max(inside) - start_s, 1e-9)


def _summary(run: _Run, opened_s: float, closed_s: float, cpu_s: float) -> Outcome:
    pairs = zip(run.sent_s, run.finished_s, strict=True)
    latencies = sorted((f - s) * 1000 for s, f in pairs if opened_s <= s <= closed_s)
    answered = sum(opened_s <= t <= closed_s for t in run.finished_s)
    return Outcome(
        requests_per_s=rate(run.finished_s, opened_s, closed_s),
        answered=answered,
        answered_total=run.answered,
        errors=dict(run.errors),
        checked=run.checked,
        wrong=run.wrong,
        p50_ms=percentile(latencies, 0.50),
        p90_ms=percentile(latencies, 0.90),
        p99_ms=percentile(latencies, 0.99),
        longest_ms=latencies[-1] if latencies else math.nan,
        window_s=closed_s - opened_s,
        own_cpu_us=1e6 * cpu_s / answered if answered else math.nan,
    )


def to_json(load: Load) -> str:
    """`load` as text for `from_json` in another process."""
    fields = {k: v for k, v in _fields(load).items() if k != "exchanges"}
    exchanges = [{**_fields(e), "request": e.request.decode("latin-1")} for e in load.exchanges]
    return json.dumps({**fields, "exchanges": exchanges})


def _fields(value: Load | Exchange) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}


def from_json(text: str) -> Load:
    """The `Load` that `to_json` wrote."""
    fields = json.loads(text)
    exchanges = tuple(_exchange(e) for e in fields.pop("exchanges"))
    return Load(exchanges=exchanges, **fields)


def _exchange(fields: dict[str, Any]) -> Exchange:
    expected = fields["expected"]
    return Exchange(
        request=fields["request"].encode("latin-1"),
        path=tuple(fields["path"]),
        expected=None if expected is None else tuple(expected),
        tolerance=fields["tolerance"],
    )


def main() -> None:
    """Run the load on stdin; one JSON line for each event, the last one holds the outcome."""
    load = from_json(sys.stdin.read())
    gc.disable()
    outcome = uvloop.run(drive(load, lambda event: print(json.dumps({"event": event}), flush=True)))
    print(json.dumps({"event": "outcome", "outcome": asdict(outcome)}), flush=True)


if __name__ == "__main__":
    main()
