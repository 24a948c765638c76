"""KServe's own server: one process, Open Inference Protocol.

It has no batching (KServe's batcher is a Go sidecar outside of it), so the models answer row by
row, in a thread, which is what its documentation shows for CPU-bound work.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from typing import Any

import numpy as np
import uvicorn
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from kserve.protocol.rest import server as server_module

from benchmarks.serving.peers import models


class Peer(Model):  # type: ignore[misc]
    def __init__(self, workload: str) -> None:
        super().__init__(workload)
        self.predict_rows = models.load(workload)
        self.ready = True

    async def predict(
        self, payload: InferRequest, headers: dict[str, str] | None = None
    ) -> InferResponse:
        array = payload.inputs[0].as_numpy()
        answers = await self.answer(array)
        datatype = "INT64" if answers.dtype == np.int64 else "FP32"
        output = InferOutput(name="y", shape=list(answers.shape), datatype=datatype)
        output.set_data_from_numpy(answers, binary_data=False)
        return InferResponse(
            response_id=payload.id or "", model_name=self.name, infer_outputs=[output]
        )

    async def answer(self, array: np.ndarray) -> np.ndarray:
        if self.name == "noop":
            return array
        if self.name == "digits":
            answers = await asyncio.to_thread(self.predict_rows, list(array))
            return np.asarray(answers, dtype=np.int64)
        sentences = [item.decode() if isinstance(item, bytes) else str(item) for item in array]
        vectors = await asyncio.to_thread(self.predict_rows, sentences)
        return np.asarray(vectors, dtype=np.float32)


class Loopback(uvicorn.Config):
    """KServe listens on all addresses and has no setting for it."""

    def __init__(self, app: Any, **options: Any) -> None:
        super().__init__(app, **{**options, "host": "127.0.0.1", "access_log": False})


def main() -> None:
    server_module.uvicorn.Config = Loopback
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workload", required=True)
    arguments = parser.parse_args()
    server = ModelServer(
        http_port=arguments.port, workers=1, enable_grpc=False, access_log_format=None
    )
    logging.getLogger("kserve.trace").setLevel(logging.WARNING)  # two lines a request otherwise
    server.start([Peer(arguments.workload)])


if __name__ == "__main__":
    main()
