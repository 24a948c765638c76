"""How does a test tell a story of deploys, replicas and time?

A `Timeline` plays the world around `reconcile`: Serve starts what it is told to start, replicas
become ready (or fail) when the story says so, and every step's traffic can be read as a line.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cluster import reconciliation
from cluster.observation import App, AppState, Memory, Snapshot, Wanted, backend_name
from cluster.reconciliation import Delete, Deploy, Scale, Step
from deployments.edge.configuration import render
from deployments.edge.routing import EdgeSettings, Listener, Routing, Server
from deployments.model import ModelFile, parse_model_file
from deployments.serving.reports import ReplicaState, Report

EDGE = EdgeSettings(http=Listener("127.0.0.1", 8000), token="t" * 32)


def a_file(
    versions: dict[str, Any] | tuple[str, ...] = ("1",), name: str = "fraud", **fields: Any
) -> ModelFile:
    """A model file; a version may have its own fields."""
    named = versions if isinstance(versions, dict) else {v: {} for v in versions}
    specs = {v: {"runtime": "sklearn", "source": f"weights-{v}", **own} for v, own in named.items()}
    return parse_model_file({"name": name, "versions": specs, **fields})


class Timeline:
    """A cluster that does what it is told, one second at a time."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.memory = Memory()
        self.wanted: dict[str, Wanted] = {}
        self.apps: dict[str, App] = {}
        self.reports: dict[str, Report] = {}
        self.done: list[str] = []
        self.last: Step | None = None
        self._rows = 0

    def put(self, file: ModelFile, *, at_once: bool = False) -> None:
        """Put a file in force; a rollback is `at_once`."""
        self._rows += 1
        self.wanted[file.name] = Wanted(file, self._rows, at_once)

    def remove(self, name: str) -> None:
        """Delete a model."""
        del self.wanted[name]

    def step(self, seconds: float = 1.0) -> Step:
        """Let time pass, reconcile, and do what it says."""
        self.now_s += seconds
        reports = tuple(self.reports.values())
        snapshot = Snapshot(self.now_s, self.wanted, self.apps, reports)
        self.last = step = reconciliation.reconcile(snapshot, self.memory)
        self.memory = step.memory
        render(Routing(models=step.routes, needs_key=False), EDGE)  # raises for what edges refuse
        for command in step.commands:
            self._perform(command)
        return step

    def ready(self, version: str, name: str = "fraud") -> None:
        """A replica of the version in force takes requests."""
        self._report(self.backend(version, name), ReplicaState.READY)

    def fail(self, version: str, reason: str, name: str = "fraud") -> None:
        """A replica of the version in force can't load its weights."""
        self._report(self.backend(version, name), ReplicaState.FAILED, reason=reason)

    def lose(self, version: str, name: str = "fraud") -> None:
        """The version's replicas die."""
        self.reports.pop(self.backend(version, name), None)

    def ask(self, version: str, name: str = "fraud") -> None:
        """A request is answered by the version."""
        backend = self.backend(version, name)
        before = self.reports[backend]
        self.reports[backend] = replace(before, requests=before.requests + 1)

    def busy(self, version: str, name: str = "fraud") -> None:
        """The version works at a request."""
        backend = self.backend(version, name)
        self.reports[backend] = replace(self.reports[backend], ongoing=1)

    def backend(self, version: str, name: str = "fraud") -> str:
        """The backend of a version in force."""
        return backend_name(name, version, self.wanted[name].file.versions[version])

    def traffic(self, name: str = "fraud") -> str:
        """The traffic that edges serve, as `1:90 2:10`."""
        assert self.last is not None
        route = next(r for r in self.last.routes if r.name == name)
        return " ".join(f"{v}:{p}" for v, p in sorted(route.split.items()))

    def state(self, version: str, name: str = "fraud") -> str:
        """The state of a version in words."""
        assert self.last is not None
        status = next(s for s in self.last.statuses if s.name == name)
        found = status.version(version)
        assert found is not None
        return found.state.value

    def _report(self, backend: str, state: ReplicaState, reason: str = "") -> None:
        server = Server(f"r-{backend}", "127.0.0.1", 9000)
        self.reports[backend] = Report(
            f"r-{backend}", backend, state, 1, "node", server=server, reason=reason
        )

    def _perform(self, command: reconciliation.Command) -> None:
        match command:
            case Deploy():
                self.apps[command.backend] = App(AppState.DEPLOYING, command.replicas)
                self.done.append(f"deploy {command.version}")
            case Scale():
                self.apps[command.backend] = replace(
                    self.apps[command.backend], replicas=command.replicas
                )
                if not command.replicas:
                    self.reports.pop(command.backend, None)
                self.done.append(f"scale {command.backend.split('--')[1]} to {command.replicas}")
            case Delete():
                del self.apps[command.backend]
                self.reports.pop(command.backend, None)
                self.done.append(f"delete {command.backend.split('--')[1]}")
