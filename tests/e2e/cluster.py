"""How does a test use a real cluster? Through the `shoal` command, as users do.

`Cluster` runs commands and reads their JSON; `load` drives bounded traffic from a process of its
own while the test does something to the cluster.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import yaml

from benchmarks.serving.load import Exchange, Load, Outcome, to_json

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Done:
    """A command that ended: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def value(self) -> Any:
        """The JSON on standard output."""
        return json.loads(self.out)


@dataclass
class Cluster:
    """A cluster in `home`, by its commands."""

    home: Path
    flags: Sequence[str] = ()
    url: str = ""
    key: str = ""
    status: dict[str, Any] = field(default_factory=dict)

    def run(self, *words: str, timeout_s: float = 240, stdin: str = "") -> Done:
        """`shoal WORDS --home HOME --json`."""
        done = subprocess.run(
            [sys.executable, "-m", "cluster", *words, "--home", str(self.home), "--json"],
            cwd=ROOT,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def ok(self, *words: str, **options: Any) -> Any:
        """The JSON of a command that must succeed."""
        done = self.run(*words, **options)
        assert done.code == 0, f"shoal {' '.join(words)}: {done.out}\n{done.err}"
        return done.value

    def up(self) -> Any:
        """Start it; its addresses."""
        value = self.ok("up", *self.flags)
        self.url = value["url"]
        self.key = (self.home / "admin.key").read_text().strip()
        return value

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 80

    def deploy(self, document: Mapping[str, Any] | Path, *words: str) -> Any:
        """Deploy a model file, or what one would hold."""
        return self.ok("deploy", str(self.file(document)), "--timeout-s", "120", *words)

    def file(self, document: Mapping[str, Any] | Path) -> Path:
        """A model file with `document`."""
        if isinstance(document, Path):
            return document
        file = self.home / f"{document['name']}.yaml"
        file.write_text(yaml.safe_dump(dict(document)))
        return file

    def model(self, name: str) -> dict[str, Any]:
        """The model as `shoal models` shows it."""
        found: dict[str, Any] = next(m for m in self.ok("models") if m["name"] == name)
        return found

    def replicas(self, name: str) -> list[dict[str, Any]]:
        """The model's replicas that are ready."""
        return [r for r in self.model(name)["replicas"] if r["state"] == "ready"]

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """One request with the admin key."""
        options.setdefault("headers", self.headers)
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **options)

    def example(self, name: str) -> dict[str, Any]:
        """An example's request: path, body and what the reply must hold."""
        value: dict[str, Any] = json.loads((EXAMPLES / "requests" / f"{name}.json").read_text())
        return value

    def exchange(self, name: str, key: str | None = None) -> Exchange:
        """An example's request as bytes for a load, its first output as the right answer."""
        request = self.example(name)
        body = json.dumps(request["body"]).encode()
        head = (
            f"POST {request['path']} HTTP/1.1\r\nhost: localhost\r\n"
            f"authorization: Bearer {key or self.key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        right = request["expect"]["outputs"][0]["data"]
        return Exchange(head.encode() + body, ("outputs", 0, "data"), tuple(right))

    @contextmanager
    def load(
        self, exchanges: Sequence[Exchange], requests: int, connections: int = 16, **options: Any
    ) -> Iterator[Traffic]:
        """Drive `requests` requests while the block runs; ask the traffic how it went."""
        options.setdefault("port", self.port)
        load = Load(
            connections=connections,
            exchanges=tuple(exchanges),
            seconds=180,
            warm_s=0.01,
            requests_max=requests,
            check_every=1,
            **options,
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving.load"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if process.stdin is None:
            raise RuntimeError("the load has no standard input")
        process.stdin.write(to_json(load))
        process.stdin.close()
        traffic = Traffic(process)
        try:
            yield traffic
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


class Traffic:
    """A load under way."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def is_going(self) -> bool:
        """Whether it still sends."""
        return self._process.poll() is None

    def outcome(self) -> Outcome:
        """How it went, once it has ended."""
        values = [json.loads(line) for line in self._process.stdout or ()]
        self._process.wait(60)
        outcome: dict[str, Any] = values[-1]["outcome"]
        return Outcome(**outcome)


def until(claim: Callable[[], Result], timeout_s: float = 60, period_s: float = 0.1) -> Result:
    """The first true value of `claim`; fails after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := claim()):
        assert time.monotonic() < deadline_s, f"not true within {timeout_s:g} s"
        time.sleep(period_s)
    return value


def is_alive(pid: int) -> bool:
    """Whether a process lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
