# ruff: noqa: ANN001, ANN201 - LitServe makes a route of the annotations of these methods.
"""LitServe: its own batching for the models, none for the no-op; one worker."""

from __future__ import annotations

import argparse
from typing import Any

import litserve  # type: ignore[import-not-found]

from benchmarks.serving.peers import models


class Noop(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self.predict_rows = models.load("noop")

    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return request["x"]

    def predict(self, rows: Any) -> Any:
        return self.predict_rows(rows)

    def encode_response(self, output):  # type: ignore[no-untyped-def]
        return {"y": output}


class Model(litserve.LitAPI):  # type: ignore[misc]
    def __init__(self, workload: str) -> None:
        super().__init__(max_batch_size=models.BATCH_SIZE_MAX, batch_timeout=models.BATCH_WAIT_S)
        self.workload = workload

    def setup(self, device: str) -> None:
        self.predict_rows = models.load(self.workload)

    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return request["x"][0]

    def batch(self, inputs: list[Any]) -> list[Any]:
        return list(inputs)

    def predict(self, rows: list[Any]) -> list[Any]:
        return self.predict_rows(rows)

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output):  # type: ignore[no-untyped-def]
        return {"y": [output]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workload", required=True)
    arguments = parser.parse_args()
    api = Noop() if arguments.workload == "noop" else Model(arguments.workload)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=120)
    server.run(
        host="127.0.0.1", port=arguments.port, generate_client_file=False, log_level="warning"
    )


if __name__ == "__main__":
    main()
