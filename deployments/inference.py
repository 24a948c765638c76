"""What every door and every model agree on.

Each wire protocol turns bytes into an `InferenceRequest` (tensors) or a `GenerationRequest` (text)
and turns the answer back; nothing behind the door knows which door it was.

    bytes ─ protocol ─► InferenceRequest ─ Engine ─► InferenceResponse ─ protocol ─► bytes

An `Engine` answers for one model version (a replica). A `Catalog` knows which models there are
(the front desk knows all of them, a replica itself alone). Errors are `InferenceError` with a
`Fault`; each protocol has a table from faults to its own status codes and forms.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[Any]]
"""Tensors by name, in order. BYTES tensors are object arrays of `bytes`."""


DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(object),
}
"""The numpy type of each of the protocol's datatypes. BYTES are objects: `bytes`."""


class Fault(enum.Enum):
    """Why a request got no answer; the values are metric labels and log words."""

    INVALID = "invalid"  # the request can never succeed as it is
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not found"
    TOO_LARGE = "too large"
    UNSUPPORTED_MEDIA = "unsupported media"  # content type or encoding
    METHOD_NOT_ALLOWED = "method not allowed"
    CONFLICT = "conflict"
    OVERLOADED = "overloaded"  # a bound was reached; try later
    UNIMPLEMENTED = "unimplemented"
    UNAVAILABLE = "unavailable"  # not ready, draining, waking
    DEADLINE = "deadline"  # passed before the answer was ready
    INTERNAL = "internal"  # the model or Shoal failed


class InferenceError(Exception):
    """A request's end without an answer.

    `retry_after_s` (OVERLOADED, UNAVAILABLE) says when to come back. `field` names the offending
    part of the request where there is one (OpenAI's `param`).
    """

    def __init__(
        self,
        fault: Fault,
        message: str,
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.fault = fault
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Tensor:
    """The declared form of one input or output.

    `datatype` is an Open Inference Protocol name (BOOL, UINT8…UINT64, INT8…INT64, FP16, BF16, FP32,
    FP64, BYTES); `shape` includes the batch dimension, -1 = any length.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model takes and gives. `labels` name the classes for `classify`, if known."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    platform: str = "python"
    labels: tuple[str, ...] = ()


@dataclass(slots=True)
class InferenceRequest:
    """One caller's rows. All inputs share the length of their first axis (the rows).

    `outputs`: names wanted, None = all. `deadline_s`: on `time.monotonic()`'s clock, None = the
    model's own limit. `parameters`: string, number or bool, passed by the caller.
    """

    inputs: Tensors
    outputs: tuple[str, ...] | None = None
    id: str = ""
    parameters: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    deadline_s: float | None = None


@dataclass(slots=True)
class InferenceResponse:
    """The outputs asked for, in the model's order, rows in the caller's order."""

    outputs: Tensors
    id: str = ""
    parameters: Mapping[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(slots=True)
class GenerationRequest:
    """Text to continue: either `prompt` or chat `messages` (OpenAI's form, `role` and `content`).

    `options` are OpenAI's sampling fields that the caller sent (temperature, top_p, stop, seed …).
    """

    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    max_tokens: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """A piece of text. The last chunk has a `finish_reason` ("stop" or "length") and the counts."""

    text: str
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Engine(Protocol):
    """One loaded model version that answers; the replica implements it.

    Both methods raise `InferenceError` and nothing else.
    """

    model: str
    version: str
    signature: Signature
    generates: bool  # whether `generate` works (a language model)

    async def infer(self, request: InferenceRequest) -> InferenceResponse: ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]: ...


class VersionState(enum.Enum):
    """Where a version stands; the values are what operators see."""

    STARTING = "starting"
    READY = "ready"
    IDLE = "idle"  # scaled to zero; the next request wakes it
    FAILED = "failed"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts since the replica started (summed over replicas by the front desk); times in ns."""

    inference_count: int = 0  # rows answered
    execution_count: int = 0  # batches run
    success_count: int = 0  # requests answered
    success_ns: int = 0
    fail_count: int = 0
    fail_ns: int = 0
    queue_ns: int = 0
    compute_ns: int = 0
    cache_hit_count: int = 0
    cache_hit_ns: int = 0
    cache_miss_count: int = 0
    cache_miss_ns: int = 0
    last_inference_ms: int = 0  # UNIX time of the last answer
    batches: tuple[tuple[int, int, int], ...] = ()  # (batch size, count, compute_ns)


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """One version of one model, as the cluster sees it now."""

    version: str
    state: VersionState
    signature: Signature | None  # None while it has never been loaded
    reason: str = ""  # why it failed, in words
    created_s: int = 0  # UNIX time
    labels: tuple[str, ...] = ()
    percent: int = 0  # share of the model's unversioned traffic
    generates: bool = False
    batch_size_max: int = 1
    statistics: Statistics = Statistics()


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model: its name and its versions, oldest first."""

    name: str
    versions: tuple[VersionStatus, ...]

    @property
    def is_ready(self) -> bool:
        """Whether an unversioned request would be answered (waking an idle version counts)."""
        answering = (VersionState.READY, VersionState.IDLE)
        serving = [v for v in self.versions if v.percent] or self.versions
        return any(v.state in answering for v in serving)

    def version(self, name: str | None) -> VersionStatus | None:
        """The version asked for; None asks for the one with the most traffic."""
        if name is not None:
            return next((v for v in self.versions if v.version == name), None)
        return max(self.versions, key=lambda v: v.percent, default=None)


class Catalog(Protocol):
    """Which models there are. Synchronous: answers from memory.

    `load` and `unload` (Triton's repository routes) raise `InferenceError` (UNIMPLEMENTED in a
    replica, NOT_FOUND for an unknown model).
    """

    def models(self) -> Sequence[ModelStatus]: ...

    def model(self, name: str) -> ModelStatus | None: ...

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None: ...

    async def unload(self, name: str, parameters: Mapping[str, Any]) -> None: ...
