"""Which small loaded models does an engine run in tests?

Each is a real `Runtime` or `TextRuntime` that computes with numpy, and counts what it did.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np

from deployments.inference import (
    GenerationChunk,
    GenerationRequest,
    Signature,
    Tensor,
    Tensors,
)
from deployments.runtimes import ASGIApp

PAIR = Signature(
    inputs=(Tensor("a", "FP32", (-1, 2)), Tensor("b", "INT64", (-1,))),
    outputs=(Tensor("total", "FP32", (-1,)), Tensor("rows", "INT64", (-1,))),
)
TEXTS = Signature((Tensor("prompt", "BYTES", (-1,)),), (Tensor("text", "BYTES", (-1,)),))


def pair(inputs: Tensors) -> Tensors:
    """The sum of each row, and how many rows the batch had."""
    total = inputs["a"].sum(axis=1, dtype=np.float32) + inputs["b"].astype(np.float32)
    return {"total": total, "rows": np.full(len(total), len(total), np.int64)}


class TensorModel:
    """Answers with one function over batches."""

    def __init__(self, predict: Callable[[Tensors], Tensors] = pair) -> None:
        self.batches: list[Tensors] = []
        self.is_closed = False
        self._predict = predict

    def load(self) -> Signature:
        return PAIR

    def predict(self, inputs: Tensors) -> Tensors:
        self.batches.append(inputs)
        return self._predict(inputs)

    def close(self) -> None:
        self.is_closed = True


class TextModel:
    """Says the prompt's words back; `gate`, if set, is waited for before each but the first."""

    openai_app: ASGIApp | None = None

    def __init__(self) -> None:
        self.prompts: list[Any] = []
        self.open = 0  # generations that have begun and not ended
        self.gate: asyncio.Event | None = None
        self.failure: Exception | None = None
        self.is_closed = False

    async def start(self) -> Signature:
        return TEXTS

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        self.prompts.append(request.prompt)
        self.open += 1
        words = (request.prompt or "").split()
        try:
            for place, word in enumerate(words):
                if place and self.gate is not None:
                    await self.gate.wait()
                if place and self.failure is not None:
                    raise self.failure
                if place < len(words) - 1:
                    yield GenerationChunk(word)
                else:
                    yield GenerationChunk(word, "stop", len(words), len(words))
        finally:
            self.open -= 1

    async def close(self) -> None:
        self.is_closed = True
