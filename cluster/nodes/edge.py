"""The edge's keeper on one node: starts HAProxy, hands it every new routing, serves its figures.

HAProxy itself is a process of its own that outlives this actor; a new actor adopts it. So a keeper
may die at any time without a request being lost.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import urllib.request
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil
import ray

from cluster.config import Settings, edge_settings
from cluster.serve import metrics_folder
from dashboards import metrics
from deployments.edge.configuration import RoutingError
from deployments.edge.process import Edge, EdgeError
from deployments.edge.routing import Routing
from deployments.serving.meter import process_meters
from deployments.serving.reports import NAMESPACE

logger = logging.getLogger(__name__)

CERTIFICATE_PERIOD_S = 2.0


@dataclass(frozen=True, slots=True)
class Applied:
    """How a routing came into force: kind `runtime`, `reload` or `none`; or why it did not."""

    kind: str
    error: str = ""


class EdgeAgent:
    """The actor, one a node. Its folder is `HOME/edge`."""

    def __init__(self, settings: Settings, edge_token: str) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        self._settings = settings
        self._edge = Edge(settings.home / "edge", edge_settings(settings, edge_token))
        self._routing: Routing | None = None
        self._certificate_error = ""
        self._lock = threading.Lock()
        self._meters = process_meters()
        self._serve_metrics()
        threading.Thread(target=self._watch, name="certificate", daemon=True).start()

    @staticmethod
    def of(settings: Settings, edge_token: str) -> Any:
        """The agent of this node, made if it is not there."""
        node = ray.get_runtime_context().get_node_id()
        actor = ray.remote(EdgeAgent).options(
            name=f"shoal-edge-{node[:16]}",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=-1,
            num_cpus=0,
            label_selector={"ray.io/node-id": node},
            runtime_env={"env_vars": {"PROMETHEUS_MULTIPROC_DIR": str(metrics_folder(settings))}},
        )
        return actor.remote(settings, edge_token)

    async def apply(self, routing: Routing) -> Applied:
        """Bring `routing` into force. What was in force stays if HAProxy refuses it."""
        if routing == self._routing and self._edge.is_running:
            return Applied("none")
        try:
            kind = await asyncio.to_thread(self._apply, routing)
        except (EdgeError, RoutingError, OSError) as error:
            self._meters.counter(metrics.EDGE_APPLY_ERRORS).inc()
            return Applied("none", str(error))
        self._routing = routing
        self._meters.counter(metrics.EDGE_APPLIES, kind=kind).inc()
        return Applied(kind)

    async def status(self) -> dict[str, Any]:
        """Whether the edge runs, and where it listens."""
        ports = ("port", "grpc_port", "metrics_port", "https_port", "tensorflow_port")
        return {
            "is_running": self._edge.is_running,
            "host": self._settings.host,
            **{name: getattr(self._settings, name) for name in ports},
            "certificate_error": self._certificate_error,
        }

    def _apply(self, routing: Routing) -> str:
        with self._lock:
            if self._edge.is_running or self._edge.adopt():
                return self._edge.apply(routing).kind
            self._edge.start(routing)
            return "start"

    def _watch(self) -> None:
        """Take a new certificate into use when its file changes; a bad one is refused."""
        while self._settings.tls_pem is not None:
            time.sleep(CERTIFICATE_PERIOD_S)
            try:
                with self._lock:
                    if self._edge.is_running:
                        self._edge.refresh_certificate()
                self._certificate_error = ""
            except (EdgeError, OSError) as error:
                if str(error) != self._certificate_error:
                    logger.error("the old certificate stays in use: %s", error)
                self._certificate_error = str(error)

    def _forget_dead(self) -> None:
        """Take the gauges of processes that have ended out of the node's sums."""
        folder = metrics_folder(self._settings)
        pids = {int(f.stem.rpartition("_")[2]) for f in folder.glob("gauge_live*_*.db")}
        for pid in pids:
            if not psutil.pid_exists(pid):
                metrics.forget_process(pid, folder)

    def _serve_metrics(self) -> None:
        """Answer `/metrics` for the node: Shoal's series and HAProxy's own."""
        agent = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_known = self.path.split("?")[0] == "/metrics"
                body = agent._exposition() if is_known else b"see /metrics\n"
                self.send_response(200 if is_known else 404)
                self.send_header("content-type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, text: str, *args: Any) -> None:
                logger.debug(text, *args)

        address = (self._settings.metrics_host, self._settings.metrics_port)
        server = ThreadingHTTPServer(address, Handler)
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()

    def _exposition(self) -> bytes:
        self._forget_dead()
        own = self._meters.exposition()
        try:
            url = f"http://127.0.0.1:{self._settings.edge_metrics_port}/metrics"
            with urllib.request.urlopen(url, timeout=2) as answer:
                return own + bytes(answer.read())
        except OSError:
            return own  # the edge is starting; its series are absent, not zero
