"""BentoML: adaptive batching for the models, none for the no-op; one worker.

bentoml serve benchmarks.serving.peers.bentoml_service:SERVICE    (BENCHMARK_WORKLOAD=digits)
"""

from __future__ import annotations

import os
from typing import Any

import bentoml  # type: ignore[import-not-found]

from benchmarks.serving.peers import models

_WORKLOAD = os.environ["BENCHMARK_WORKLOAD"]
_TRAFFIC = {"timeout": 120, "max_concurrency": 2000}
_LOGGING = {"access": {"enabled": False}}
_BATCHING = {"batchable": True, "max_batch_size": models.BATCH_SIZE_MAX, "max_latency_ms": 60_000}


@bentoml.service(workers=1, traffic=_TRAFFIC, logging=_LOGGING)
class Noop:
    @bentoml.api(route="/predict")  # type: ignore[untyped-decorator]
    async def predict(self, x: list[list[float]]) -> dict[str, Any]:
        return {"y": x}


@bentoml.service(workers=1, traffic=_TRAFFIC, logging=_LOGGING)
class Digits:
    def __init__(self) -> None:
        self.rows = models.load("digits")

    @bentoml.api(route="/predict", **_BATCHING)  # type: ignore[untyped-decorator]
    def predict(self, x: list[list[float]]) -> list[int]:
        return self.rows(x)


@bentoml.service(workers=1, traffic=_TRAFFIC, logging=_LOGGING)
class Minilm:
    def __init__(self) -> None:
        self.sentences = models.load("minilm")

    @bentoml.api(route="/predict", **_BATCHING)  # type: ignore[untyped-decorator]
    def predict(self, x: list[str]) -> list[list[float]]:
        return self.sentences(x)


SERVICE = {"noop": Noop, "digits": Digits, "minilm": Minilm}[_WORKLOAD]
