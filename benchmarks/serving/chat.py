"""How fast does text come: tokens a second, and how long until the first?

The same engine on both sides: `vllm serve` from the environment that Shoal runs in, with the very
arguments of Shoal's model file, against Shoal's full path. Both stay alive and idle while the
other one is asked, because an engine takes a minute to start; the rounds alternate.

Every request streams exactly `TOKENS` tokens (`ignore_eos`), so that speeds can be compared; an
answer with another count, without an end or with another status is an error. Asked one by one
before the load, both must begin in the same words (later ones may part: bfloat16 rounds, and the
greedy choice between two near tokens tips).
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.serving import environments
from benchmarks.serving.load import percentile
from benchmarks.serving.processes import Tree, free_port
from benchmarks.serving.report import Results
from benchmarks.serving.shoal_system import Shoal, model_file
from benchmarks.serving.systems import MODULES, System
from benchmarks.serving.workloads import PLAIN, Endpoint, http_post

TOKENS = 64
CONNECTIONS = (1, 8, 16)
_START_TIMEOUT_S = 300.0
_REQUEST_TIMEOUT_S = 120.0
_SAME = 40
"""Characters in which all systems must agree."""
_TOPICS = ("rivers", "lighthouses", "bread", "clocks", "whales", "bridges", "maps", "glaciers")


class Vllm(System):
    name = "vllm"
    title = "vllm serve"

    def start(self, workload: str) -> Endpoint:
        port = free_port()
        version = model_file("chat")["versions"]["1"]
        weights = self._weights(version["source"])
        options = [
            word
            for name, value in version["options"].items()
            for word in (f"--{name.replace('_', '-')}", *(() if value is True else (str(value),)))
        ]
        self.tree.start(
            [
                *(sys.executable, "-m", f"{MODULES}.vllm_serve", "serve", weights, *options),
                *("--served-model-name", "chat", "--host", "127.0.0.1", "--port", str(port)),
                "--disable-uvicorn-access-log",
            ],
            log=self.log,
            environment=environments.variables(
                Path(sys.prefix).name, VLLM_NO_USAGE_STATS="1", PATH=_path()
            ),
        )
        return Endpoint(port, "/v1/chat/completions", PLAIN)

    def _weights(self, source: str) -> str:
        """The same plain weights that Shoal's replica makes of the package."""
        code = "import sys, pathlib; from deployments.sources import fetch; "
        code += "print(fetch(sys.argv[1], pathlib.Path(sys.argv[2])))"
        printed = self.tree.run(
            [sys.executable, "-c", code, source, environments.DATA],
            environment=environments.variables(Path(sys.prefix).name),
            timeout_s=300,
        )
        return printed.strip().split("\n")[-1]


class ShoalChat(Shoal):
    def endpoint(self, workload: str) -> Endpoint:
        return replace(super().endpoint(workload), path="/v1/chat/completions")


SYSTEMS: dict[str, type[System]] = {"shoal": ShoalChat, "vllm": Vllm}


def _path() -> str:
    return f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"


@dataclass(slots=True)
class Answer:
    """One streamed reply. `error` is empty when it was whole and right."""

    text: str = ""
    tokens: int = 0
    first_s: float = 0.0
    total_s: float = 0.0
    error: str = ""


@dataclass(slots=True)
class _Talker:
    """A started system and what it said when asked alone."""

    system: System
    endpoint: Endpoint
    said: list[str] = field(default_factory=list)


def question(number: int) -> Mapping[str, Any]:
    """The body of request `number`; no two begin alike, so that no prefix is in a cache."""
    topic = _TOPICS[number % len(_TOPICS)]
    text = f"{number}: tell me a long story about {topic}, with as many details as you can."
    return {
        "model": "chat",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def ask(endpoint: Endpoint, body: Mapping[str, Any]) -> Answer:
    """One streamed request on a connection of its own."""
    answer = Answer()
    start_s = time.perf_counter()
    try:
        async with asyncio.timeout(_REQUEST_TIMEOUT_S):
            await _stream(endpoint, body, answer, start_s)
    except (OSError, ValueError, KeyError, EOFError) as error:
        answer.error = answer.error or repr(error)
    answer.total_s = time.perf_counter() - start_s
    if not answer.error and answer.tokens != body["max_tokens"]:
        answer.error = f"{answer.tokens} tokens instead of {body['max_tokens']}"
    return answer


async def _stream(
    endpoint: Endpoint, body: Mapping[str, Any], answer: Answer, start_s: float
) -> None:
    """Read server-sent events into `answer` until [DONE]."""
    reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
    try:
        writer.write(http_post(endpoint, body))
        status = int((await reader.readline()).split()[1])
        if status != 200:
            answer.error = f"status {status}"
            return
        async for line in reader:  # chunk sizes and headers don't begin with "data: "
            if line.startswith(b"data: [DONE]"):
                return
            if line.startswith(b"data: "):
                _take(json.loads(line[6:]), answer, time.perf_counter() - start_s)
        answer.error = "no end"
    finally:
        writer.close()


def _take(event: Mapping[str, Any], answer: Answer, now_s: float) -> None:
    """One event of a stream."""
    if "error" in event:
        answer.error = str(event["error"])
        return
    for choice in event["choices"]:
        piece = choice["delta"].get("content") or ""
        if piece and not answer.text:
            answer.first_s = now_s
        answer.text += piece
    if event.get("usage"):
        answer.tokens = event["usage"]["completion_tokens"]


async def talk(endpoint: Endpoint, connections: int, first: int) -> tuple[list[Answer], float]:
    """Two questions a connection (at least four in all), never more than `connections` at once."""
    count = max(4, 2 * connections)
    numbers = iter(range(first, first + count))

    async def caller() -> list[Answer]:
        return [await ask(endpoint, question(number)) for number in numbers]

    start_s = time.perf_counter()
    told = await asyncio.gather(*(caller() for _ in range(connections)))
    return [answer for answers in told for answer in answers], time.perf_counter() - start_s


def run(names: Sequence[str], rounds: int, results: Results) -> None:
    """Start all, let them agree, then measure in turn."""
    talkers: list[_Talker] = []
    try:
        for name in names:
            _join(SYSTEMS[name](), talkers, results)
        if len({tuple(text[:_SAME] for text in talker.said) for talker in talkers}) > 1:
            said = " / ".join(f"{t.system.name}: {t.said}" for t in talkers)
            results.problems.append(f"chat: the systems don't say the same: {said}")
        for number in range(rounds):
            for talker in talkers[number % 2 :] + talkers[: number % 2]:
                for connections in CONNECTIONS:
                    row = _measure(talker, connections, number)
                    results.chat.append(row)
                    print(f"{number + 1} chat {json.dumps(row)}", flush=True)
    finally:
        for talker in talkers:
            talker.system.stop()


def _join(system: System, talkers: list[_Talker], results: Results) -> None:
    """Start `system` and add it to `talkers` if it speaks."""
    began_s = time.monotonic()
    try:
        endpoint = system.start("chat")
        said = _wait(endpoint, system.tree)
    except (OSError, RuntimeError) as error:
        results.problems.append(f"chat on {system.name}: {error}")
        print(f"! chat on {system.name}: {error}\n{system.last_words()}", file=sys.stderr)
        system.stop()
        return
    except BaseException:
        system.stop()
        raise
    talkers.append(_Talker(system, endpoint, said))
    print(f"  chat: {system.name} speaks after {time.monotonic() - began_s:.0f} s", flush=True)


def _wait(endpoint: Endpoint, tree: Tree) -> list[str]:
    """What it says to three questions, once it speaks at all. Raises `TimeoutError`, and
    `RuntimeError` when it has ended."""
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while (first := asyncio.run(ask(endpoint, question(0)))).error:
        if not tree.members():
            raise RuntimeError("it ended instead of speaking")
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"no text within {_START_TIMEOUT_S:.0f} s; last: {first.error}")
        time.sleep(0.5)
    return [first.text, *(asyncio.run(ask(endpoint, question(n))).text for n in (1, 2))]


def _measure(talker: _Talker, connections: int, number: int) -> dict[str, Any]:
    """One row of the report."""
    before = talker.system.tree.usage()
    first = 1000 * (number + 1) + 100 * connections
    answers, wall_s = asyncio.run(talk(talker.endpoint, connections, first))
    after = talker.system.tree.usage()
    right = [answer for answer in answers if not answer.error]
    tokens = sum(answer.tokens for answer in right)
    first_ms = sorted(1000 * answer.first_s for answer in right)
    return {
        "system": talker.system.name,
        "connections": connections,
        "round": number,
        "requests": len(answers),
        "errors": len(answers) - len(right),
        "tokens_per_s": tokens / wall_s,
        "ttft_p50_ms": percentile(first_ms, 0.5),
        "ttft_p99_ms": percentile(first_ms, 0.99),
        "total_p50_ms": statistics.median([1000 * answer.total_s for answer in answers]),
        "cpu_ms_per_token": 1000 * (after.cpu_s - before.cpu_s) / tokens if tokens else None,
        "rss_mb": after.rss_mb,
    }
