"""FastAPI as one writes it by hand: bare for the no-op, with micro-batches for the models.

uvicorn --factory benchmarks.serving.peers.fastapi_app:build     (BENCHMARK_WORKLOAD=digits)
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.serving.peers import models


class Numbers(BaseModel):
    x: list[list[float]]


class Words(BaseModel):
    x: list[str]


class Batcher:
    """Collects rows for at most 5 ms or until there are 32, and predicts them in one thread."""

    def __init__(self, predict: models.Predictor) -> None:
        self._predict = predict
        self._waiting: asyncio.Queue[tuple[Any, asyncio.Future[Any]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def __call__(self, row: Any) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((row, answer))
        return await answer

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            deadline_s = loop.time() + models.BATCH_WAIT_S
            while len(batch) < models.BATCH_SIZE_MAX and await self._take(batch, deadline_s):
                pass
            rows = [row for row, _ in batch]
            answers = await loop.run_in_executor(self._thread, self._predict, rows)
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    async def _take(self, batch: list[tuple[Any, asyncio.Future[Any]]], deadline_s: float) -> bool:
        """Add one more to `batch` before the deadline, if one comes."""
        if not self._waiting.empty():
            batch.append(self._waiting.get_nowait())
            return True
        left_s = deadline_s - asyncio.get_running_loop().time()
        if left_s <= 0:
            return False
        try:
            batch.append(await asyncio.wait_for(self._waiting.get(), left_s))
        except TimeoutError:
            return False
        return True


def bare() -> FastAPI:
    """The no-op, with nothing between the framework and the answer."""
    app = FastAPI()

    @app.post("/predict")
    async def predict(body: Numbers) -> dict[str, Any]:
        return {"y": body.x}

    return app


def batching(workload: str) -> FastAPI:
    """A model behind a batcher."""
    batcher = Batcher(models.load(workload))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)

    if workload == "digits":

        @app.post("/predict")
        async def classify(body: Numbers) -> dict[str, Any]:
            return {"y": await asyncio.gather(*map(batcher, body.x))}

    else:

        @app.post("/predict")
        async def embed(body: Words) -> dict[str, Any]:
            return {"y": await asyncio.gather(*map(batcher, body.x))}

    return app


def build() -> FastAPI:
    workload = os.environ["BENCHMARK_WORKLOAD"]
    return bare() if workload == "noop" else batching(workload)
