"""What a replica tells the controller about itself, once a second and at every change."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from deployments.edge.routing import Server
from deployments.inference import Signature, Statistics

CONTROLLER = "shoal-controller"
"""The controller's actor name, in the namespace `NAMESPACE`."""

NAMESPACE = "shoal"

DESK = "shoal-desk"
"""The backend name under which replicas of the front desk report."""


class ReplicaState(enum.Enum):
    """Where a replica stands; the values are metric labels."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Report:
    """One replica at one moment. `reason` says why it failed, in the words of the error.

    `backend` is the revision it runs; `requests` counts the requests since it started.
    """

    replica: str
    backend: str
    state: ReplicaState
    pid: int
    node: str
    actor: str = ""
    server: Server | None = None
    signature: Signature | None = None
    generates: bool = False
    ongoing: int = 0
    queued: int = 0
    requests: int = 0
    load_s: float = 0.0
    statistics: Statistics = Statistics()
    reason: str = ""
