"""What the controller knows at one moment, as plain values.

Replicas report themselves (`deployments.serving.reports`), Serve lists its applications, the store
holds what is wanted. A `Snapshot` puts the three side by side; nothing here asks anybody.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from deployments.inference import Signature
from deployments.model import ModelFile, Version
from deployments.serving.reports import ReplicaState, Report


class AppState(enum.Enum):
    """Where Serve stands with one application."""

    DEPLOYING = "deploying"
    RUNNING = "running"
    FAILED = "failed"
    DELETING = "deleting"


@dataclass(frozen=True, slots=True)
class App:
    """One Serve application: one revision of one version. `replicas` is the count it aims at."""

    state: AppState
    replicas: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model as its users want it: the file in force and the history line that says so.

    `at_once`: the line is a rollback, which takes no steps.
    """

    file: ModelFile
    row: int
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class Revision:
    """One version with one spec, as long as Shoal keeps it; times are UNIX seconds.

    `retired_s`: when it stopped being wanted, None while it is. `failed_row`: the history line
    under which it failed to load; a newer line tries again. `is_unloaded`: somebody asked to give
    its replicas back; a load or a request wakes it.
    """

    model: str
    version: str
    spec: Version
    created_s: float
    was_ready: bool = False
    had_traffic: bool = False
    last_request_s: float = 0.0
    requests_seen: int = 0
    retired_s: float | None = None
    failed_row: int | None = None
    reason: str = ""
    signature: Signature | None = None
    generates: bool = False
    is_unloaded: bool = False

    @property
    def backend(self) -> str:
        """Its name as Serve application, HAProxy backend and metric label."""
        return backend_name(self.model, self.version, self.spec)


def backend_name(model: str, version: str, spec: Version) -> str:
    """The name of a revision: changes with everything that needs new replicas."""
    return f"{model}--{version}--{spec.digest}"


@dataclass(frozen=True, slots=True)
class Shift:
    """A model's traffic on its way: percent by backend.

    `base` is what served before the history line `row`; `effective` is what edges serve now.
    """

    row: int
    base: Mapping[str, int] = field(default_factory=dict)
    effective: Mapping[str, int] = field(default_factory=dict)
    step: int = 0
    step_since_s: float = 0.0
    is_done: bool = False
    halted: str = ""


@dataclass(frozen=True, slots=True)
class Memory:
    """What the controller carries from step to step and over its own restart."""

    revisions: Mapping[str, Revision] = field(default_factory=dict)
    shifts: Mapping[str, Shift] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that a step decides on."""

    now_s: float
    wanted: Mapping[str, Wanted]
    apps: Mapping[str, App]
    reports: tuple[Report, ...] = ()
    _by_backend: dict[str, list[Report]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_backend: dict[str, list[Report]] = {}
        for report in self.reports:
            by_backend.setdefault(report.backend, []).append(report)
        object.__setattr__(self, "_by_backend", by_backend)

    def ready(self, backend: str) -> list[Report]:
        """The replicas of `backend` that take requests."""
        return [r for r in self.of(backend) if r.state is ReplicaState.READY]

    def of(self, backend: str) -> list[Report]:
        """All reports of replicas of `backend`."""
        return self._by_backend.get(backend, [])
