"""Real HAProxy and real upstreams, and builders that state only what matters."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.edge.process import Edge
from deployments.edge.routing import (
    EdgeSettings,
    KeyRoute,
    Listener,
    ModelRoute,
    Routing,
    Server,
    VersionRoute,
)
from tests.deployments.edge.ports import free_port
from tests.deployments.edge.upstream import GrpcUpstream, Upstream


def a_key(name: str = "anna", secret: str = "secret", **fields: Any) -> KeyRoute:
    return KeyRoute(name, (hash_of(secret),), **fields)


def hash_of(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def a_server(port: int, grpc_port: int | None = None, name: str = "") -> Server:
    return Server(name or f"r{port}", "127.0.0.1", port, grpc_port)


def a_version(version: str, *servers: Server, model: str = "fraud", **fields: Any) -> VersionRoute:
    return VersionRoute(version, f"{model}--{version}--aa", servers, **fields)


def a_model(
    *versions: VersionRoute, split: dict[str, int] | None = None, name: str = "fraud", **fields: Any
) -> ModelRoute:
    return ModelRoute(name, versions, split or {versions[-1].version: 100}, **fields)


def a_routing(*models: ModelRoute, **fields: Any) -> Routing:
    return Routing(models=models, **{"needs_key": bool(fields.get("keys")), **fields})


def wait_until(claim: Callable[[], object], wait_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + wait_s
    while not claim():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.01)


@dataclass
class Lab:
    """One edge with the upstreams behind it."""

    folder: Path
    edges: list[Edge] = field(default_factory=list)
    upstreams: list[Upstream | GrpcUpstream] = field(default_factory=list)

    def upstream(self, name: str = "r") -> Upstream:
        upstream = Upstream(name).start()
        self.upstreams.append(upstream)
        return upstream

    def grpc_upstream(self, name: str = "r") -> GrpcUpstream:
        upstream = GrpcUpstream(name)
        self.upstreams.append(upstream)
        return upstream

    def settings(self, **fields: Any) -> EdgeSettings:
        http = Listener("127.0.0.1", free_port())
        return EdgeSettings(**{"http": http, "token": "edge-token", **fields})

    def start(self, routing: Routing, **fields: Any) -> Edge:
        edge = Edge(self.folder / f"edge{len(self.edges)}", self.settings(**fields))
        self.edges.append(edge)
        edge.start(routing)
        return edge

    def end(self) -> None:
        for edge in self.edges:
            edge.stop(grace_s=0.2)
            assert edge.pids() == []
        for upstream in self.upstreams:
            upstream.stop()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    try:
        yield lab
    finally:
        lab.end()


@pytest.fixture(scope="module")
def shared_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("edge"))
    try:
        yield lab
    finally:
        lab.end()


def client_of(edge: Edge, **fields: Any) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{edge.settings.http.port}", **fields)
