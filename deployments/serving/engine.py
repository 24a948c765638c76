"""How one loaded model answers: checked, cached, batched, counted.

    InferenceRequest ─ fits the signature? ─ in the cache? ─ batcher ─► runtime ─► outputs asked for

A language model batches by itself, so only its number of requests is bounded here. The engine is
used on one event loop; it knows no protocol and no socket.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np

from deployments.inference import (
    DTYPES,
    Fault,
    GenerationChunk,
    GenerationRequest,
    InferenceError,
    InferenceRequest,
    InferenceResponse,
    Signature,
    Statistics,
    Tensor,
    Tensors,
)
from deployments.model import Version
from deployments.runtimes import ASGIApp, Runtime, TextRuntime
from deployments.serving.batching import Batcher
from deployments.serving.cache import ResponseCache


class Meter(Protocol):
    """Where an engine's figures go; `deployments.serving.meter` sends them to Prometheus."""

    def batch(self, rows: int, seconds: float) -> None: ...

    def queued(self, seconds: float) -> None: ...

    def cached(self, hit: bool) -> None: ...

    def tokens(self, prompt: int, completion: int) -> None: ...


class ReplicaEngine:
    """The `Engine` of one model version over a runtime that has been loaded or started."""

    def __init__(
        self,
        model: str,
        version: str,
        spec: Version,
        runtime: Runtime | TextRuntime,
        signature: Signature,
        meter: Meter,
    ) -> None:
        self.model = model
        self.version = version
        self.signature = signature
        self.generates = isinstance(runtime, TextRuntime)
        self.openai_app: ASGIApp | None = (
            runtime.openai_app if isinstance(runtime, TextRuntime) else None
        )
        self.requests = 0
        self._runtime = runtime
        self._meter = meter
        self._timeout_s = spec.timeout_ms / 1000
        self._generations_max = spec.batching.queue_requests_max
        self._generations = 0
        self._pieces = 0
        self._texts = _Texts()
        self._cache_counts = [0, 0, 0, 0]  # hits, hit ns, misses, miss ns
        self._cache = (
            ResponseCache(spec.cache.entries_max, spec.cache.ttl_s) if spec.cache else None
        )
        self._checks = tuple(_Check(t) for t in signature.inputs)
        self._output_names = frozenset(t.name for t in signature.outputs)
        self._batcher = Batcher(
            self._predict,
            batch_size_max=spec.batching.batch_size_max,
            wait_max_ms=spec.batching.wait_max_ms,
            queue_requests_max=spec.batching.queue_requests_max,
            observe_batch=meter.batch,
            observe_queue=meter.queued,
        )

    @property
    def queued(self) -> int:
        """Requests that wait for a batch."""
        return self._batcher.queued

    @property
    def ongoing(self) -> int:
        """Requests inside: waiting, running or generating."""
        return self._batcher.queued + self._batcher.running + self._generations

    @property
    def progress(self) -> int:
        """A number that changes whenever a batch or a piece of text is done."""
        return self._batcher.counts.executions + self._pieces

    def statistics(self) -> Statistics:
        """What has been answered since the warm-up, from the cache too."""
        hits, hit_ns, misses, miss_ns = self._cache_counts
        batched, texts = self._batcher.statistics(), self._texts
        return replace(
            batched,
            inference_count=batched.inference_count + texts.answered,
            success_count=batched.success_count + hits + texts.answered,
            success_ns=batched.success_ns + hit_ns + texts.answered_ns,
            fail_count=batched.fail_count + texts.failed,
            fail_ns=batched.fail_ns + texts.failed_ns,
            last_inference_ms=max(batched.last_inference_ms, texts.last_ms),
            cache_hit_count=hits,
            cache_hit_ns=hit_ns,
            cache_miss_count=misses,
            cache_miss_ns=miss_ns,
        )

    async def infer(self, request: InferenceRequest) -> InferenceResponse:
        """The outputs for the caller's rows. Raises `InferenceError`."""
        self.requests += 1
        self._checked(request)
        if request.deadline_s is None:
            request.deadline_s = time.monotonic() + self._timeout_s
        if self._cache is not None:
            return await self._through_cache(self._cache, request)
        outputs = await self._batcher.submit(request)
        return InferenceResponse(_selected(outputs, request.outputs), request.id)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """The text, piece by piece. Raises `InferenceError`."""
        if not isinstance(self._runtime, TextRuntime):
            raise InferenceError(
                Fault.INVALID, f"model {self.model!r} does not generate text; use infer"
            )
        with self.generation():
            until_s = time.monotonic() + self._left_s(request.deadline_s)
            chunks = self._runtime.generate(request)
            try:
                while (chunk := await _next(chunks, until_s)) is not None:
                    self._pieces += 1
                    if chunk.finish_reason:
                        self._meter.tokens(chunk.prompt_tokens, chunk.completion_tokens)
                    yield chunk
            finally:
                await _close(chunks)

    def generation(self) -> _Place:
        """A place among the texts in the making. Raises OVERLOADED when all are taken."""
        self.requests += 1
        if self._generations >= self._generations_max:
            raise InferenceError(
                Fault.OVERLOADED,
                f"{self._generations} requests are being answered; "
                f"queue_requests_max is {self._generations_max}",
                retry_after_s=1,
            )
        return _Place(self)

    async def warm_up(self, rows_max: int) -> None:
        """Run probes of one row and of a full batch, several times, and forget their counts."""
        for rows in (1, rows_max, rows_max, *(1,) * 6):
            await self.probe(rows)
        self._batcher.reset_counts()
        self.requests = 0

    async def probe(self, rows: int = 1) -> None:
        """Let the model answer a made-up request. Raises `InferenceError` if it can't.

        A model that refuses the made-up values has answered too.
        """
        if isinstance(self._runtime, TextRuntime):
            request = GenerationRequest(prompt="Hi", max_tokens=1)
            async for _ in self._runtime.generate(request):
                pass
            return
        sample = {t.name: sample_tensor(t, rows) for t in self.signature.inputs}
        try:
            await self._batcher.submit(InferenceRequest(sample))
        except InferenceError as error:
            if error.fault is not Fault.INVALID:
                raise

    async def close(self) -> None:
        """Take no more work and free what the runtime holds."""
        self._batcher.close()
        if isinstance(self._runtime, TextRuntime):
            await self._runtime.close()
        else:
            self._runtime.close()

    def _predict(self, inputs: Tensors) -> Tensors:
        return cast("Runtime", self._runtime).predict(inputs)

    def _left_s(self, deadline_s: float | None) -> float:
        if deadline_s is None:
            return self._timeout_s
        return min(self._timeout_s, deadline_s - time.monotonic())

    def _checked(self, request: InferenceRequest) -> None:
        inputs = request.inputs
        if not self._checks:
            raise InferenceError(
                Fault.INVALID, f"model {self.model!r} takes no tensors; use its text routes"
            )
        if len(inputs) != len(self._checks):
            raise _wrong_names(self.model, self.signature, inputs)
        rows = -1
        for check in self._checks:
            array = inputs.get(check.name)
            if array is None:
                raise _wrong_names(self.model, self.signature, inputs)
            rows = check(array, rows)
        if request.outputs is not None:
            for name in request.outputs:
                if name not in self._output_names:
                    raise InferenceError(
                        Fault.INVALID,
                        f"unexpected inference output '{name}' for model '{self.model}'; "
                        f"it has {_listed(self._output_names)}",
                        field=name,
                    )

    async def _through_cache(
        self, cache: ResponseCache, request: InferenceRequest
    ) -> InferenceResponse:
        """The kept answer, or a fresh one that is kept."""
        start_ns = time.perf_counter_ns()
        key = cache.key(request)
        kept = cache.get(key, time.monotonic())
        self._meter.cached(kept is not None)
        place = 2 if kept is None else 0
        self._cache_counts[place] += 1
        if kept is None:
            outputs = await self._batcher.submit(request)
            kept = InferenceResponse(_selected(outputs, request.outputs))
            cache.put(key, kept, time.monotonic())
        self._cache_counts[place + 1] += time.perf_counter_ns() - start_ns
        return InferenceResponse(kept.outputs, request.id, kept.parameters)


class _Place:
    """A generation's place, given back at the end of a `with`."""

    def __init__(self, engine: ReplicaEngine) -> None:
        self._engine = engine
        self._start_ns = 0

    def __enter__(self) -> None:
        self._engine._generations += 1
        self._start_ns = time.perf_counter_ns()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._engine._generations -= 1
        self._engine._texts.ended(kind, time.perf_counter_ns() - self._start_ns)


@dataclass(slots=True)
class _Texts:
    """What became of the texts; one whose caller went away is neither answered nor failed."""

    answered: int = 0
    answered_ns: int = 0
    failed: int = 0
    failed_ns: int = 0
    last_ms: int = 0

    def ended(self, kind: type[BaseException] | None, took_ns: int) -> None:
        if kind is None:
            self.answered += 1
            self.answered_ns += took_ns
            self.last_ms = int(time.time() * 1000)
        elif issubclass(kind, Exception):
            self.failed += 1
            self.failed_ns += took_ns


async def _next(chunks: AsyncIterator[GenerationChunk], until_s: float) -> GenerationChunk | None:
    """The next piece of a text, None at its end. Raises DEADLINE at `until_s`."""
    timeout = asyncio.timeout(until_s - time.monotonic())
    late = InferenceError(Fault.DEADLINE, "the deadline passed before the text was complete")
    if time.monotonic() >= until_s:
        raise late
    try:
        async with timeout:
            return await anext(chunks, None)
    except TimeoutError:
        if timeout.expired():
            raise late from None
        raise


async def _close(chunks: AsyncIterator[GenerationChunk]) -> None:
    """End a text early, so that nothing goes on writing it."""
    end = getattr(chunks, "aclose", None)
    if end is not None:
        await end()


class _Check:
    """Whether an array fits one declared input."""

    __slots__ = ("_datatype", "_dtype", "_rank", "_shape", "name")

    def __init__(self, tensor: Tensor) -> None:
        self.name = tensor.name
        self._datatype = tensor.datatype
        self._dtype = DTYPES.get(tensor.datatype)
        self._shape = tensor.shape
        self._rank = len(tensor.shape)

    def __call__(self, array: np.ndarray[Any, Any], rows: int) -> int:
        """The number of rows; `rows` are those of the inputs before, -1 = none yet."""
        if self._dtype is not None and array.dtype != self._dtype:
            raise InferenceError(
                Fault.INVALID,
                f"input '{self.name}' must have datatype {self._datatype}, not {array.dtype.name}",
                field=self.name,
            )
        if not _fits(array.shape, self._shape, self._rank):
            raise InferenceError(
                Fault.INVALID,
                f"unexpected shape for input '{self.name}': expected {list(self._shape)}, "
                f"got {list(array.shape)}",
                field=self.name,
            )
        count = array.shape[0]
        if rows not in (-1, count):
            raise InferenceError(
                Fault.INVALID,
                f"input '{self.name}' has {count} rows, the inputs before it have {rows}",
                field=self.name,
            )
        if count == 0:
            raise InferenceError(
                Fault.INVALID, f"input '{self.name}' has no rows; send at least 1", field=self.name
            )
        return int(count)


def _fits(shape: tuple[int, ...], declared: tuple[int, ...], rank: int) -> bool:
    if len(shape) != rank or not shape:
        return False
    for have, want in zip(shape[1:], declared[1:], strict=True):  # noqa: SIM110  # twice as fast
        if want not in (-1, have):
            return False
    return True


def sample_tensor(tensor: Tensor, rows: int) -> np.ndarray[Any, Any]:
    """A made-up value for a declared input: zeros, or a short text."""
    shape = (rows, *(1 if n == -1 else n for n in tensor.shape[1:]))
    if tensor.datatype == "BYTES":
        array = np.empty(shape, dtype=np.object_)
        array.fill(b"warm up")
        return array
    return np.zeros(shape, dtype=DTYPES.get(tensor.datatype, np.dtype(np.float32)))


def _selected(outputs: Tensors, wanted: tuple[str, ...] | None) -> Tensors:
    return outputs if wanted is None else {name: outputs[name] for name in wanted}


def _wrong_names(model: str, signature: Signature, inputs: Tensors) -> InferenceError:
    declared = [t.name for t in signature.inputs]
    for name in inputs:
        if name not in declared:
            return InferenceError(
                Fault.INVALID,
                f"unexpected inference input '{name}' for model '{model}'; "
                f"it takes {_listed(declared)}",
                field=name,
            )
    missing = next(name for name in declared if name not in inputs)
    return InferenceError(
        Fault.INVALID,
        f"expected {len(declared)} inputs but got {len(inputs)} inputs for model '{model}'; "
        f"missing: '{missing}'",
        field=missing,
    )


def _listed(names: Any) -> str:
    return ", ".join(f"'{n}'" for n in sorted(names)) or "none"
