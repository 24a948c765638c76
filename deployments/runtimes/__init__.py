"""How weights of each kind are loaded and run: one file a kind, behind one narrow interface.

`create(spec, weights)` picks the file named by the model file's `runtime`. A runtime loads once,
then answers batches; it knows nothing of HTTP, Ray, queues or versions.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from deployments.inference import GenerationChunk, GenerationRequest, Signature, Tensors

if TYPE_CHECKING:
    from deployments.model import Version

RUNTIMES = ("sklearn", "onnx", "torch", "sentence_transformers", "vllm", "python")


class LoadError(Exception):
    """The weights can't be served; the message names the file or field, and what would be right."""


@runtime_checkable
class Runtime(Protocol):
    """A loaded model that answers batches of tensors.

    `load` (blocking, called once before anything else) returns the signature: the model file's own
    `inputs`/`outputs` where given (checked against the weights), else read from the weights. Raises
    `LoadError`. `predict` (blocking, one call at a time per replica thread) takes all inputs with
    the same first-axis length and returns outputs with that same length; it may raise
    `InferenceError(INVALID)` for a value that it can't take. `close` frees what it holds.
    """

    def load(self) -> Signature: ...

    def predict(self, inputs: Tensors) -> Tensors: ...

    def close(self) -> None: ...


Message = MutableMapping[str, Any]
ASGIApp = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]


@runtime_checkable
class TextRuntime(Protocol):
    """A language model that batches by itself (vLLM), living on the replica's event loop.

    `start` is awaited once on that loop. `openai_app` is an ASGI app that answers OpenAI's routes
    itself (None: Shoal's own adapter over `generate` does). `generate` raises `InferenceError`.
    """

    openai_app: ASGIApp | None

    async def start(self) -> Signature: ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]: ...

    async def close(self) -> None: ...


def create(name: str, version: Version, weights: Path | None) -> Runtime | TextRuntime:
    """The runtime that `version.runtime` names, not loaded yet.

    `name` is the model's name, `weights` the local file or folder that `sources.fetch` returned.
    """
    module = importlib.import_module(f"deployments.runtimes.{version.runtime}")
    runtime: Runtime | TextRuntime = module.create(name, version, weights)
    return runtime
