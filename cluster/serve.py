"""Ray Serve as Shoal uses it: one application a revision, no proxy, counts decided outside.

Serve starts replicas, watches their health, restarts them and stops them. It never sees a request.
All calls block; the controller makes them from one thread.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.api import RunTarget
from ray.serve.config import ProxyLocation

from cluster.config import Settings
from cluster.observation import App, AppState
from cluster.reconciliation import Command, Delete, Deploy, Scale
from deployments.model import Resources, Version
from deployments.serving.reports import DESK

DEPLOYMENT = "replica"
REPLICA_HOST = "127.0.0.1"
"""Replicas of an embedded cluster answer the edge of their own machine, and nobody else."""

CONSTRUCTOR_ATTEMPTS = 3
"""How often Serve starts a replica that crashes while it loads; a `LoadError` is final at once."""

_STATES = {
    "RUNNING": AppState.RUNNING,
    "DEPLOY_FAILED": AppState.FAILED,
    "DELETING": AppState.DELETING,
}


class ServeApps:
    """Shoal's applications on Serve."""

    def __init__(self, settings: Settings, edge_token: str) -> None:
        self._settings = settings
        self._edge_token = edge_token
        self._is_started = False

    def start(self) -> None:
        """Start Serve and the front desk, unless they are there."""
        if self._is_started:
            return
        serve.start(
            proxy_location=ProxyLocation.Disabled,
            http_options={"host": self._settings.host, "port": 0},
        )
        if DESK not in serve.status().applications:
            self._start_desk()
        self._is_started = True

    def list(self) -> dict[str, App]:
        """The applications of models, by backend."""
        return {
            name: App(_STATES.get(str(app.status.value), AppState.DEPLOYING), -1, _reason(app))
            for name, app in serve.status().applications.items()
            if name != DESK
        }

    def perform(self, command: Command) -> None:
        """Do one command."""
        match command:
            case Deploy():
                self._deploy(command)
            case Scale():
                self._scale(command.backend, command.replicas)
            case Delete():
                serve.delete(command.backend, _blocking=False)

    def _deploy(self, command: Deploy) -> None:
        from deployments.serving.replica import Order, Replica

        order = Order(
            backend=command.backend,
            model=command.model,
            version=command.version,
            spec=command.spec,
            host=REPLICA_HOST,
            edge_token=self._edge_token,
            cache=str(self._settings.home / "cache"),
            drain_timeout_s=self._settings.drain_timeout_s,
            registry=self._settings.registry_url,
            artifacts=str(self._settings.home / "artifacts"),
        )
        deployment = serve.deployment(
            Replica,
            name=DEPLOYMENT,
            num_replicas=command.replicas,
            ray_actor_options=self._actor_options(command.spec),
            max_ongoing_requests=1000,
            max_constructor_retry_count=CONSTRUCTOR_ATTEMPTS,
            health_check_period_s=5,
            health_check_timeout_s=30,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=self._settings.drain_timeout_s + 25,
        )
        _run(command.backend, deployment.bind(order))

    def _scale(self, backend: str, replicas: int) -> None:
        """Post a count. Serve's REST route does the same; it needs the dashboard, this doesn't."""
        from ray.serve._private.common import DeploymentID
        from ray.serve.context import _get_global_client

        client: Any = _get_global_client()
        deployment = DeploymentID(name=DEPLOYMENT, app_name=backend)
        import ray

        ray.get(client._controller.update_deployment_replicas.remote(deployment, replicas))

    def _start_desk(self) -> None:
        from deployments.serving.desk import DeskOrder
        from deployments.serving.frontdesk import FrontDesk

        order = DeskOrder(
            host=REPLICA_HOST,
            edge_token=self._edge_token,
            held_requests_max=self._settings.held_requests_max,
            drain_timeout_s=self._settings.drain_timeout_s,
        )
        deployment = serve.deployment(
            FrontDesk,
            name=DEPLOYMENT,
            num_replicas=1,
            ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": self._variables()}},
            max_surge_percent=100,
            health_check_period_s=5,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=self._settings.drain_timeout_s + 25,
        )
        _run(DESK, deployment.bind(order))

    def _actor_options(self, spec: Version) -> dict[str, Any]:
        resources: Resources = spec.resources
        options: dict[str, Any] = {
            "num_cpus": resources.cpu,
            "runtime_env": {"env_vars": {**self._variables(), **_threads(spec)}},
        }
        if resources.gpu:
            options["num_gpus"] = resources.gpu
        if resources.memory_mb:
            options["memory"] = resources.memory_mb * 2**20
        return options

    def _variables(self) -> dict[str, str]:
        """The environment of replicas and desks."""
        folder = metrics_folder(self._settings)
        return {
            "PROMETHEUS_MULTIPROC_DIR": str(folder),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }


def metrics_folder(settings: Settings) -> Path:
    """Where the processes of a node leave their figures."""
    folder = settings.ray_folder / "metrics"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _threads(spec: Version) -> dict[str, str]:
    """No model takes more threads than the cores that it asked for, nor spins while it waits.

    On cores of its own a lone vLLM stream would be faster with spinning threads (25 tokens/s, not
    18, on two cores); on shared ones its engine then takes over five minutes to start.
    """
    count = str(math.ceil(spec.resources.cpu) or 1)
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {**dict.fromkeys(names, count), "OMP_WAIT_POLICY": "PASSIVE"}


def _run(name: str, application: Any) -> None:
    serve.run_many(
        [RunTarget(application, name=name, route_prefix=None, external_scaler_enabled=True)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def _reason(app: Any) -> str:
    """The last line that says something of a failed application's message."""
    messages = [d.message for d in app.deployments.values() if d.message] or [app.message]
    lines = [line.strip() for text in messages for line in str(text).splitlines()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Died)\b", line)]
    chosen = errors or [line for line in lines if line]
    return chosen[-1][:500] if chosen else ""
