"""Which small real models do the serving tests talk to?

Each is an `Engine` that computes with numpy, so that a test can check an answer by the same sum.
`SingleCatalog` is what a replica's catalog looks like: its own version and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from deployments.inference import (
    Engine,
    Fault,
    GenerationChunk,
    GenerationRequest,
    InferenceError,
    InferenceRequest,
    InferenceResponse,
    ModelStatus,
    Signature,
    Statistics,
    Tensor,
    Tensors,
    VersionState,
    VersionStatus,
)

Compute = Callable[[Tensors], Tensors]

SUM = Signature(
    inputs=(Tensor("x", "FP32", (-1, 3)),),
    outputs=(Tensor("total", "FP32", (-1,)), Tensor("label", "BYTES", (-1,))),
    platform="numpy",
)
CLASSES = Signature(
    inputs=(Tensor("x", "FP32", (-1, 3)),),
    outputs=(Tensor("scores", "FP32", (-1, 3)),),
    platform="numpy",
    labels=("red", "green", "blue"),
)
TEXT = Signature(
    inputs=(Tensor("text_input", "BYTES", (-1,)),),
    outputs=(Tensor("text_output", "BYTES", (-1,)),),
    platform="words",
)
DATATYPES = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
}
EVERY = Signature(
    inputs=tuple(Tensor(f"in_{d.lower()}", d, (-1, 2)) for d in DATATYPES),
    outputs=tuple(Tensor(f"out_{d.lower()}", d, (-1, 2)) for d in DATATYPES),
    platform="numpy",
)


class NumpyEngine:
    """Computes with one function over named tensors."""

    generates = False

    def __init__(
        self, signature: Signature, compute: Compute, *, model: str = "sum", version: str = "3"
    ) -> None:
        self.model = model
        self.version = version
        self.signature = signature
        self._compute = compute
        self.requests: list[InferenceRequest] = []
        self.cancelled = 0
        self.gate: asyncio.Event | None = None  # set it to an Event to make `infer` wait
        self.failure: Exception | None = None

    async def infer(self, request: InferenceRequest) -> InferenceResponse:
        self.requests.append(request)
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if self.failure is not None:
            raise self.failure
        outputs = self._compute(request.inputs)
        names = request.outputs
        chosen = outputs if names is None else {k: v for k, v in outputs.items() if k in names}
        return InferenceResponse(chosen, id=request.id)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        if not self.generates:
            raise InferenceError(Fault.UNIMPLEMENTED, f"model {self.model!r} does not generate")
        yield GenerationChunk("")


class WordsEngine:
    """A "language model" that says the prompt's words back, one chunk a word, in capitals."""

    signature = TEXT
    generates = True

    def __init__(self, *, model: str = "words", version: str = "1") -> None:
        self.model = model
        self.version = version
        self.requests: list[GenerationRequest] = []
        self.closed = 0  # generators that ended, by themselves or by `aclose`
        self.gate: asyncio.Event | None = None  # waits before every chunk but the first
        self.fail_after: int | None = None  # raise instead of this chunk

    async def infer(self, request: InferenceRequest) -> InferenceResponse:
        prompt = bytes(request.inputs["text_input"].reshape(-1)[0]).decode()
        words = [c.text async for c in self.generate(GenerationRequest(prompt))]
        return InferenceResponse(
            {"text_output": np.array(["".join(words).encode()], dtype=np.object_)}, id=request.id
        )

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        self.requests.append(request)
        words = _prompt(request).split()
        limit = len(words) if request.max_tokens is None else request.max_tokens
        said = words[:limit]
        try:
            for place, word in enumerate(said):
                if place and self.gate is not None:
                    await self.gate.wait()
                if place == self.fail_after:
                    raise InferenceError(Fault.INTERNAL, "the model lost its words")
                last = place == len(said) - 1
                yield GenerationChunk(
                    (" " if place else "") + word.upper(),
                    finish_reason=("length" if len(said) < len(words) else "stop")
                    if last
                    else None,
                    prompt_tokens=len(words) if last else 0,
                    completion_tokens=len(said) if last else 0,
                )
            if not said:
                yield GenerationChunk("", "stop", len(words), 0)
        finally:
            self.closed += 1


class SingleCatalog:
    """A replica's catalog: the one version that its engine serves."""

    def __init__(self, engine: Engine, *, state: VersionState = VersionState.READY) -> None:
        self.engine = engine
        self.state = state
        self.statistics = Statistics()

    def models(self) -> Sequence[ModelStatus]:
        engine = self.engine
        status = VersionStatus(
            version=engine.version,
            state=self.state,
            signature=engine.signature,
            created_s=1_700_000_000,
            percent=100,
            generates=engine.generates,
            batch_size_max=8,
            statistics=self.statistics,
        )
        return [ModelStatus(engine.model, (status,))]

    def model(self, name: str) -> ModelStatus | None:
        return next((m for m in self.models() if m.name == name), None)

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        raise InferenceError(Fault.UNIMPLEMENTED, "a replica can't load models")

    async def unload(self, name: str, parameters: Mapping[str, Any]) -> None:
        raise InferenceError(Fault.UNIMPLEMENTED, "a replica can't unload models")


def sum_engine(model: str = "sum", version: str = "3") -> NumpyEngine:
    """From x (rows of 3 numbers): total, and the label b"row N"."""
    return NumpyEngine(SUM, _sum, model=model, version=version)


def classes_engine(model: str = "colours", version: str = "1") -> NumpyEngine:
    """From x (rows of 3 numbers): the same numbers as scores of red, green and blue."""
    return NumpyEngine(CLASSES, lambda t: {"scores": t["x"]}, model=model, version=version)


def every_engine(model: str = "every", version: str = "1") -> NumpyEngine:
    """An output for each input, of every datatype, with the same values."""
    return NumpyEngine(
        EVERY,
        lambda t: {f"out_{name.removeprefix('in_')}": value for name, value in t.items()},
        model=model,
        version=version,
    )


def _sum(inputs: Tensors) -> Tensors:
    totals = inputs["x"].sum(axis=1, dtype=np.float32)
    labels = np.empty(len(totals), dtype=np.object_)
    labels[:] = [f"row {row}".encode() for row in range(len(totals))]
    return {"total": totals, "label": labels}


def _prompt(request: GenerationRequest) -> str:
    if request.prompt is not None:
        return request.prompt
    content = [str(m.get("content", "")) for m in request.messages or ()]
    return content[-1] if content else ""
