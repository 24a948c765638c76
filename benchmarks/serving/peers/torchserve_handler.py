"""TorchServe custom handler: the server's own batching, then one call of the model a batch."""

from __future__ import annotations

import json
import os
from typing import Any

from benchmarks.serving.peers import models


class Handler:
    """TorchServe calls `initialize` once and `handle` with a list of requests."""

    def initialize(self, context: Any) -> None:
        self.predict_rows = models.load(os.environ["BENCHMARK_WORKLOAD"])

    def handle(self, requests: list[dict[str, Any]], context: Any) -> list[Any]:
        rows = [_row(request.get("body", request.get("data"))) for request in requests]
        return [{"y": [answer]} for answer in self.predict_rows(rows)]


def _row(body: Any) -> Any:
    document = json.loads(body) if isinstance(body, bytes | bytearray | str) else body
    return document["x"][0]
