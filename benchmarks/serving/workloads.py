"""What is asked of every system, in its own words, and what the right answers are.

Inputs and reference answers were written by `peers/raw.py prepare` with no server in between. A
dialect turns one row into one HTTP request and says where in the reply the answer stands.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.serving import environments
from benchmarks.serving.load import Exchange, flatten

WORKLOADS = ("noop", "digits", "minilm")

_TOLERANCE = {"noop": 1e-5, "digits": 0.0, "minilm": 2e-3}
"""Sentence vectors differ in the last digits with the padding of the batch they ran in."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a row travels: `body` makes the request's JSON, `path` leads to the answer."""

    body: Callable[[str, Any], Any]
    path: tuple[str | int, ...]


def _plain(workload: str, row: Any) -> Any:
    return {"x": [row]}


def _open_inference(workload: str, row: Any) -> Any:
    if workload == "minilm":
        tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [row]}
    else:
        tensor = {"name": "x", "shape": [1, len(row)], "datatype": "FP32", "data": row}
    return {"inputs": [tensor]}


PLAIN = Dialect(_plain, ("y",))
"""What one writes by hand: {"x": [row]} -> {"y": [answer]}."""
BARE_REPLY = Dialect(_plain, ())
"""The same request; the reply is the list of answers itself."""
OPEN_INFERENCE = Dialect(_open_inference, ("outputs", 0, "data"))
"""Open Inference Protocol, JSON tensors."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how a started system answers one workload."""

    port: int
    path: str
    dialect: Dialect
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Workload:
    """Inputs and the answers that are right for them."""

    name: str
    rows: tuple[Any, ...]
    answers: tuple[tuple[float | str, ...], ...]

    def exchanges(self, endpoint: Endpoint) -> tuple[Exchange, ...]:
        """One HTTP exchange for each row."""
        return tuple(
            Exchange(
                request=http_post(endpoint, endpoint.dialect.body(self.name, row)),
                path=endpoint.dialect.path,
                expected=answer,
                tolerance=_TOLERANCE[self.name],
            )
            for row, answer in zip(self.rows, self.answers, strict=True)
        )


def http_post(endpoint: Endpoint, body: Any) -> bytes:
    """The bytes of a POST of `body` as JSON."""
    content = json.dumps(body, separators=(",", ":")).encode()
    headers = {
        "host": f"127.0.0.1:{endpoint.port}",
        "content-type": "application/json",
        "content-length": str(len(content)),
        **endpoint.headers,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {endpoint.path} HTTP/1.1\r\n{lines}\r\n".encode() + content


def read(name: str) -> Workload:
    """The workload `name`; its inputs and references are made first if they are not there."""
    file = environments.DATA / "reference.json"
    if not file.exists():
        subprocess.run(
            [environments.python("fastapi"), "-m", "benchmarks.serving.peers.raw", "prepare"],
            check=True,
            env=environments.variables("fastapi"),
        )
    reference = json.loads(file.read_text())[name]
    return Workload(
        name=name,
        rows=tuple(reference["rows"]),
        answers=tuple(tuple(flatten(answer)) for answer in reference["answers"]),
    )
