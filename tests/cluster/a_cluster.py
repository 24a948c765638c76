"""How do commands get a cluster to talk to, without Ray?

`ACluster` is a real HTTP server on 127.0.0.1 with Shoal's own admin API over a real store. What
needs a controller is played: `GET models` shows the versions in the states that the story gave
them. Keys are two words, as the edge would know them: `boss` may everything, `caller` may call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from cluster.administration import Administration, Refused
from cluster.store import Entry, Store
from deployments.inference import InferenceError
from deployments.serving.admin import Admin
from deployments.serving.application import Application
from deployments.serving.http import HttpRequest, HttpResponse, Route
from tests.deployments.serving.engines import SingleCatalog, sum_engine
from tests.deployments.serving.live import live

ROLES = {"boss": b"admin", "caller": b"caller"}
READY = ("ready", "")
_ANSWERS = (
    "/v1/models/{model}:predict",
    "/v1/models/{model}/versions/{version}:predict",
    "/v2/models/{model}/infer",
    "/v2/models/{model}/versions/{version}/infer",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
)


@dataclass
class ACluster:
    """A cluster that does what the story says.

    `states`: state and reason by version, ready when nothing is said. `polls_late`: how often
    `models` shows what was before a change. `halted`: why traffic goes no further.
    """

    store: Store
    url: str = ""
    states: dict[str, tuple[str, str]] = field(default_factory=dict)
    halted: str = ""
    polls_late: int = 0
    on_poll: Callable[[], object] = field(default=lambda: None)
    answer: HttpResponse = field(default_factory=lambda: HttpResponse(200, b'{"ok": true}'))
    asked: list[tuple[str, Any]] = field(default_factory=list)  # what models were sent

    def __post_init__(self) -> None:
        self.administration = Administration(self.store, time.time)

    async def ask(self, action: str, arguments: Mapping[str, Any], actor: str) -> Any:
        """What the controller would answer."""
        played = getattr(self, f"_{action}", None)
        try:
            if played is not None:
                return played(arguments)
            return getattr(self.administration, action)(arguments, actor)
        except Refused as refused:
            raise InferenceError(refused.fault, refused.message) from None

    def _models(self, arguments: Mapping[str, Any]) -> Any:
        self.on_poll()
        is_seen, self.polls_late = self.polls_late <= 0, self.polls_late - 1
        return [self._shown(e, is_seen) for e in self.store.in_force().values()]

    def _status(self, arguments: Mapping[str, Any]) -> Any:
        desk = {"replica": "r-desk", "backend": "shoal-desk", "state": "ready", "host": "127.0.0.1",
                "port": 1, "pid": 2, "ongoing": 0, "queued": 0, "requests": 0}  # fmt: skip
        return {
            "models": self._models(arguments),
            "desks": [desk],
            "leaving": [],
            "controller": {"steps": 3, "failures": {"edge": "it [refuses] :smile:"}},
        }

    def _logs(self, arguments: Mapping[str, Any]) -> Any:
        replica = {"replica": "r-1", "backend": "fraud--1--ab", "state": "ready"}
        lines = [f"line [{n}]" for n in range(int(arguments["lines"]))]
        version = arguments.get("version", "any")
        return {"reasons": {version: "no room"}, "replicas": [{**replica, "lines": lines}]}

    def _shown(self, entry: Entry, is_seen: bool) -> Any:
        document = entry.document or {}
        states = {v: self.states.get(v, READY) for v in document["versions"]}
        is_settled = is_seen and all(
            states[v][0] == "ready" for v, p in document["traffic"].items() if p
        )
        return {
            "name": entry.model,
            "row": entry.id,
            "is_seen": is_seen,
            "is_settled": is_settled or bool(self.halted),
            "halted": self.halted if is_seen else "",
            "problem": "",
            "wanted_traffic": document["traffic"],
            "versions": [
                {"version": v, "state": state, "reason": reason, "requests": 7,
                 "percent": document["traffic"].get(v, 0), "labels": []}
                for v, (state, reason) in states.items()
            ],
            "replicas": [
                {"replica": f"r-{v}", "backend": f"{entry.model}--{v}--ab", "state": state,
                 "host": "127.0.0.1", "port": 9, "pid": 3, "ongoing": 0, "queued": 0, "requests": 7}
                for v, (state, _) in states.items()
            ],
        }  # fmt: skip

    async def infer(self, request: HttpRequest) -> HttpResponse:
        """Any model's answer to anything."""
        self.asked.append((request.path, json.loads(request.body)))
        return self.answer

    def application(self) -> Any:
        """The HTTP side, with what an edge does about keys in front of it."""
        inside = Application(
            SingleCatalog(sum_engine()),
            None,
            [Admin(self.ask)],
            ready=lambda: True,
            routes=[Route("POST", template, self.infer) for template in _ANSWERS],
        )

        async def edge(scope: Any, receive: Any, send: Any) -> None:
            headers = [(k, v) for k, v in scope["headers"] if not k.startswith(b"x-shoal-")]
            sent = dict(headers).get(b"authorization", b"").decode().removeprefix("Bearer ")
            if sent not in ROLES:
                body = orjson.dumps({"error": "this needs a key"})
                head = [(b"content-type", b"application/json")]
                await send({"type": "http.response.start", "status": 401, "headers": head})
                await send({"type": "http.response.body", "body": body})
                return
            known = [(b"x-shoal-role", ROLES[sent]), (b"x-shoal-key", sent.encode())]
            await inside({**scope, "headers": [*headers, *known]}, receive, send)

        return edge


class Door:
    """A server whose cluster each test makes anew."""

    def __init__(self) -> None:
        self.url = ""
        self._app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)

    @contextmanager
    def a_cluster(self, folder: Path) -> Iterator[ACluster]:
        """A cluster that answers while the block runs."""
        cluster = ACluster(Store(f"sqlite:///{folder / 'shoal.db'}"), self.url)
        self._app = cluster.application()
        yield cluster
        cluster.store.close()


@contextmanager
def a_door() -> Iterator[Door]:
    """A door on 127.0.0.1 while the block runs."""
    door = Door()
    with live(door) as server:
        door.url = server.url
        yield door
