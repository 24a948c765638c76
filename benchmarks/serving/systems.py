"""Who is measured, and how is each started the way its own makers would start it?

One class a system: `start(workload)` returns an `Endpoint` that will answer soon (the caller
polls it and takes the time), `finish(workload)` removes what that workload needed, `stop()` ends
everything. Light systems start one process a workload; those with a cluster keep it for a round
and deploy one model after another. All run one replica, bind 127.0.0.1, and batch up to 32 rows
for 5 ms where they can batch at all.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from benchmarks.serving import environments
from benchmarks.serving.processes import Tree, free_port
from benchmarks.serving.workloads import BARE_REPLY, OPEN_INFERENCE, PLAIN, Endpoint

MODULES = "benchmarks.serving.peers"

_LOG4J = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration><Appenders><Console name="out"><PatternLayout pattern="%d %p %m%n"/></Console>
</Appenders><Loggers><Root level="warn"><AppenderRef ref="out"/></Root></Loggers></Configuration>
"""
"""TorchServe writes several lines a request otherwise."""


class System(ABC):
    """One system under measurement; `tree` is everything that it has started."""

    name: str
    title: str
    environment: str

    def __init__(self) -> None:
        self.tree = Tree()
        self.folder = Path(tempfile.mkdtemp(prefix="sb-"))  # short: sockets live below it
        self.log = self.folder / "log.txt"

    @abstractmethod
    def start(self, workload: str) -> Endpoint:
        """Begin to serve `workload`; it need not answer yet."""

    def finish(self, workload: str) -> None:
        """Stop serving `workload`. Light systems stop altogether."""
        self.tree.end()

    def stop(self) -> None:
        """End all processes and remove all files."""
        self.tree.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def program(self, name: str) -> Path:
        """A program of this system's environment."""
        return environments.python(self.environment).with_name(name)

    def variables(self, **more: str) -> dict[str, str]:
        return environments.variables(self.environment, **more)

    def last_words(self) -> str:
        """The end of the log, for a message about a failure."""
        return self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""


class FastApi(System):
    name = "fastapi"
    title = "FastAPI + uvicorn, by hand"
    environment = "fastapi"

    def start(self, workload: str) -> Endpoint:
        port = free_port()
        command = [
            *(self.program("uvicorn"), "--factory", f"{MODULES}.fastapi_app:build"),
            *("--host", "127.0.0.1", "--port", port, "--loop", "uvloop", "--http", "httptools"),
            *("--no-access-log", "--log-level", "warning"),
        ]
        self.tree.start(
            [str(part) for part in command],
            log=self.log,
            environment=self.variables(BENCHMARK_WORKLOAD=workload),
        )
        return Endpoint(port, "/predict", PLAIN)


class LitServe(System):
    name = "litserve"
    title = "LitServe"
    environment = "litserve"

    def start(self, workload: str) -> Endpoint:
        port = free_port()
        module = f"{MODULES}.litserve_app"
        self.tree.start(
            [self.program("python"), "-m", module, "--port", str(port), "--workload", workload],
            log=self.log,
            environment=self.variables(),
        )
        return Endpoint(port, "/predict", PLAIN)


class BentoMl(System):
    name = "bentoml"
    title = "BentoML"
    environment = "bentoml"

    def start(self, workload: str) -> Endpoint:
        port = free_port()
        service = f"{MODULES}.bentoml_service:SERVICE"
        self.tree.start(
            [self.program("bentoml"), "serve", service, "--host", "127.0.0.1", "-p", str(port)],
            log=self.log,
            environment=self.variables(
                BENTOML_HOME=str(self.folder),
                BENTOML_DO_NOT_TRACK="True",
                BENCHMARK_WORKLOAD=workload,
            ),
            folder=environments.ROOT,
        )
        return Endpoint(port, "/predict", PLAIN if workload == "noop" else BARE_REPLY)


class MlServer(System):
    name = "mlserver"
    title = "MLServer"
    environment = "mlserver"

    def start(self, workload: str) -> Endpoint:
        port = free_port()
        folder = self.folder / workload
        folder.mkdir(exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(self._settings(port, workload)))
        (folder / "model-settings.json").write_text(json.dumps(self._model(workload)))
        self.tree.start(
            [self.program("mlserver"), "start", folder],
            log=self.log,
            environment=self.variables(),
            folder=folder,
        )
        return Endpoint(port, f"/v2/models/{workload}/infer", OPEN_INFERENCE)

    def _settings(self, port: int, workload: str) -> dict[str, Any]:
        return {
            "host": "127.0.0.1",
            "http_port": port,
            "grpc_port": free_port(),
            "metrics_port": free_port(),
            # A worker process costs a no-op more than it gives; models need one.
            "parallel_workers": 0 if workload == "noop" else 1,
            "environments_dir": str(self.folder),
            "debug": False,
        }

    def _model(self, workload: str) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "name": workload,
            "implementation": f"{MODULES}.mlserver_models.{workload.capitalize()}",
        }
        if workload != "noop":
            settings |= {"max_batch_size": 32, "max_batch_time": 0.005}
        return settings


class KServe(System):
    name = "kserve"
    title = "KServe's server"
    environment = "kserve"

    def start(self, workload: str) -> Endpoint:
        port = free_port()
        module = f"{MODULES}.kserve_server"
        self.tree.start(
            [self.program("python"), "-m", module, "--port", str(port), "--workload", workload],
            log=self.log,
            environment=self.variables(),
        )
        return Endpoint(port, f"/v2/models/{workload}/infer", OPEN_INFERENCE)


class TorchServe(System):
    name = "torchserve"
    title = "TorchServe"
    environment = "torchserve"

    def start(self, workload: str) -> Endpoint:
        port = free_port()
        store = self.folder / workload
        store.mkdir(exist_ok=True)
        self._archive(workload, store)
        (store / "config.properties").write_text(self._properties(port))
        (store / "log4j2.xml").write_text(_LOG4J)
        self.tree.start(
            [
                *(self.program("torchserve"), "--start", "--foreground", "--disable-token-auth"),
                *("--no-config-snapshots", "--model-store", store),
                *("--ts-config", store / "config.properties"),
                *("--models", f"{workload}={workload}.mar"),
                *("--log-config", store / "log4j2.xml"),
            ],
            log=self.log,
            environment=self.variables(BENCHMARK_WORKLOAD=workload, TS_WORKFLOW_STORE=str(store)),
            folder=store,
        )
        return Endpoint(port, f"/predictions/{workload}", PLAIN)

    def _archive(self, workload: str, store: Path) -> None:
        size = 1 if workload == "noop" else 32
        (store / "model.yaml").write_text(
            f"minWorkers: 1\nmaxWorkers: 1\nbatchSize: {size}\nmaxBatchDelay: 5\n"
            "responseTimeout: 120\njobQueueSize: 2000\n"
        )
        handler = environments.HERE / "peers" / "torchserve_handler.py"
        self.tree.run(
            [
                *(self.program("torch-model-archiver"), "--force", "--model-name", workload),
                *("--version", "1", "--handler", handler, "--export-path", store),
                *("--config-file", store / "model.yaml"),
            ],
            environment=self.variables(),
            timeout_s=60,
        )

    @staticmethod
    def _properties(port: int) -> str:
        return (
            f"inference_address=http://127.0.0.1:{port}\n"
            f"management_address=http://127.0.0.1:{free_port()}\n"
            f"metrics_address=http://127.0.0.1:{free_port()}\n"
            f"grpc_inference_port={free_port()}\ngrpc_management_port={free_port()}\n"
            "job_queue_size=2000\ndefault_workers_per_model=1\ndisable_system_metrics=true\n"
            "default_response_timeout=120\n"
        )


class Ray(System):
    name = "ray"
    title = "Ray Serve as it comes"
    environment = "ray"

    def __init__(self) -> None:
        super().__init__()
        self.port = free_port()
        self.driver: Any = None

    def start(self, workload: str) -> Endpoint:
        if self.driver is None:
            self.driver = self.tree.start(
                [
                    *(self.program("python"), "-m", f"{MODULES}.ray_app"),
                    *("--port", str(self.port), "--temp-dir", str(self.folder)),
                    *self.arguments(),
                ],
                log=self.log,
                environment=self.variables(
                    RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", **self.settings()
                ),
                talks=True,
            )
        self._tell(f"deploy {workload}")
        return Endpoint(self.port, f"/{workload}", PLAIN)

    def arguments(self) -> list[str]:
        return []

    def settings(self) -> dict[str, str]:
        return {}

    def finish(self, workload: str) -> None:
        self._tell(f"delete {workload}")

    def _tell(self, line: str) -> None:
        """Give the driver an order and wait until it is done."""
        self.driver.stdin.write(f"{line}\n".encode())
        self.driver.stdin.flush()
        for answer in self.driver.stdout:
            if answer.startswith(b'{"done"'):
                return
        raise RuntimeError(f"{self.name} ended at {line!r}:\n{self.last_words()}")


class RayHaProxy(Ray):
    name = "ray-haproxy"
    title = "Ray Serve behind its HAProxy, throughput settings"

    def arguments(self) -> list[str]:
        return ["--ongoing-max", "2000"]

    def settings(self) -> dict[str, str]:
        prefix = "RAY_SERVE_HAPROXY"
        folder = self.folder / "haproxy"
        return {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": "33000",
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": "33200",
            "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": "43000",
            "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": "43200",
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
            f"{prefix}_METRICS_PORT": str(free_port()),
            f"{prefix}_STATS_PORT": str(free_port()),
            f"{prefix}_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            f"{prefix}_SOCKET_PATH": str(folder / "admin.sock"),
            f"{prefix}_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
            f"{prefix}_SERVER_STATE_BASE": str(folder),
            f"{prefix}_SERVER_STATE_FILE": str(folder / "server-state"),
            f"{prefix}_NBTHREAD": "2",
        }


PEERS: tuple[type[System], ...] = (
    FastApi,
    Ray,
    RayHaProxy,
    LitServe,
    BentoMl,
    MlServer,
    KServe,
    TorchServe,
)
