"""Does one loaded model answer what fits it, refuse the rest in words, and count what it did?"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from deployments.inference import (
    Fault,
    GenerationChunk,
    GenerationRequest,
    InferenceError,
    InferenceRequest,
    Signature,
    Statistics,
    Tensor,
    Tensors,
)
from deployments.model import Version
from deployments.serving.engine import ReplicaEngine, sample_tensor
from tests.deployments.serving.runtimes import PAIR, TEXTS, TensorModel, TextModel, pair

A = np.array([[1, 2], [3, 4]], np.float32)
B = np.array([10, 20], np.int64)


@dataclass
class Tally:
    """What an engine tells its meter."""

    batches: list[int] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)
    texts: list[tuple[int, int]] = field(default_factory=list)

    def batch(self, rows: int, seconds: float) -> None:
        self.batches.append(rows)

    def queued(self, seconds: float) -> None:
        assert seconds >= 0

    def cached(self, hit: bool) -> None:
        self.hits.append(hit)

    def tokens(self, prompt: int, completion: int) -> None:
        self.texts.append((prompt, completion))


def an_engine(
    runtime: TensorModel | TextModel | None = None,
    *,
    signature: Signature | None = None,
    meter: Tally | None = None,
    **spec: Any,
) -> ReplicaEngine:
    """An engine; `spec` are fields of its version."""
    runtime = TensorModel() if runtime is None else runtime
    version = Version.model_validate({"runtime": "python", "source": "here", **spec})
    if signature is None:
        signature = TEXTS if isinstance(runtime, TextModel) else PAIR
    return ReplicaEngine("fraud", "3", version, runtime, signature, meter or Tally())


def a_request(**changes: Any) -> InferenceRequest:
    return InferenceRequest(**{"inputs": {"a": A, "b": B}, **changes})


async def refusal(engine: ReplicaEngine, **changes: Any) -> InferenceError:
    with pytest.raises(InferenceError) as refused:
        await engine.infer(a_request(**changes))
    return refused.value


async def written(engine: ReplicaEngine, prompt: str, **fields: Any) -> list[str]:
    """The pieces of a text."""
    request = GenerationRequest(prompt, **fields)
    return [chunk.text async for chunk in engine.generate(request)]


# tensors


async def test_a_request_gets_its_rows_and_its_id_back() -> None:
    answer = await an_engine().infer(a_request(id="7"))
    assert answer.id == "7"
    assert list(answer.outputs) == ["total", "rows"]
    assert answer.outputs["total"].tolist() == [13, 27]


async def test_only_the_outputs_asked_for_come_in_the_order_asked_for() -> None:
    answer = await an_engine().infer(a_request(outputs=("rows", "total")))
    assert list(answer.outputs) == ["rows", "total"]
    assert list((await an_engine().infer(a_request(outputs=("rows",)))).outputs) == ["rows"]
    assert (await an_engine().infer(a_request(outputs=()))).outputs == {}


@pytest.mark.parametrize(
    ("inputs", "field_", "said"),
    [
        ({"a": A}, "b", "expected 2 inputs but got 1 inputs for model 'fraud'; missing: 'b'"),
        ({}, "a", "expected 2 inputs but got 0 inputs for model 'fraud'; missing: 'a'"),
        (
            {"a": A, "b": B, "c": B}, "c",
            "unexpected inference input 'c' for model 'fraud'; it takes 'a', 'b'",
        ),
        ({"a": A, "x": B}, "x", "unexpected inference input 'x' for model 'fraud'"),
        ({"a": A.astype("f8"), "b": B}, "a", "input 'a' must have datatype FP32, not float64"),
        ({"a": A, "b": B.astype("i4")}, "b", "input 'b' must have datatype INT64, not int32"),
        ({"a": A[:, :1], "b": B}, "a", "for input 'a': expected [-1, 2], got [2, 1]"),
        ({"a": A[0], "b": B}, "a", "for input 'a': expected [-1, 2], got [2]"),
        ({"a": A, "b": B[:, None]}, "b", "for input 'b': expected [-1], got [2, 1]"),
        ({"a": A, "b": np.int64(1) + B[:0].sum()}, "b", "expected [-1], got []"),
        ({"a": A, "b": B[:1]}, "b", "input 'b' has 1 rows, the inputs before it have 2"),
        ({"a": A[:0], "b": B[:0]}, "a", "input 'a' has no rows; send at least 1"),
    ],
)  # fmt: skip
async def test_what_does_not_fit_is_refused_by_its_name_before_it_runs(
    inputs: Tensors, field_: str, said: str
) -> None:
    model = TensorModel()
    error = await refusal(an_engine(model), inputs={n: np.asarray(v) for n, v in inputs.items()})
    assert (error.fault, error.field) == (Fault.INVALID, field_)
    assert said in error.message
    assert model.batches == []


async def test_an_output_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    error = await refusal(an_engine(), outputs=("total", "wish"))
    assert (error.fault, error.field) == (Fault.INVALID, "wish")
    assert "'wish' for model 'fraud'; it has 'rows', 'total'" in error.message


async def test_a_dimension_of_any_length_takes_any_length() -> None:
    signature = Signature((Tensor("x", "FP32", (-1, -1)),), (Tensor("y", "FP32", (-1,)),))
    engine = an_engine(TensorModel(lambda t: {"y": t["x"].sum(axis=1)}), signature=signature)
    for width in (1, 5, 0):
        answer = await engine.infer(InferenceRequest({"x": np.ones((2, width), np.float32)}))
        assert answer.outputs["y"].tolist() == [width, width]


async def test_a_model_without_tensors_says_where_its_texts_are() -> None:
    error = await refusal(an_engine(TextModel(), signature=Signature((), ())), inputs={"a": A})
    assert error.fault is Fault.INVALID
    assert "takes no tensors; use its text routes" in error.message


arrays = np_st.arrays(
    st.sampled_from([np.float32, np.int64, np.object_]),
    np_st.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    elements=st.just(1),
)


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from("abc"), arrays, max_size=3))
def test_whatever_comes_is_answered_or_invalid(inputs: Tensors) -> None:
    fits = (
        inputs.keys() == {"a", "b"}
        and inputs["a"].dtype == np.float32
        and inputs["b"].dtype == np.int64
        and inputs["a"].shape[1:] == (2,)
        and inputs["b"].ndim == 1
        and inputs["a"].shape[:1] == inputs["b"].shape != (0,)
    )
    try:
        answer = asyncio.run(an_engine().infer(InferenceRequest(inputs)))
    except InferenceError as error:
        assert error.fault is Fault.INVALID  # noqa: PT017  # either outcome may be right
        assert not fits
    else:
        assert fits
        assert answer.outputs["total"].tolist() == pair(inputs)["total"].tolist()


# deadlines


async def test_a_request_whose_deadline_has_passed_is_not_run() -> None:
    model = TensorModel()
    error = await refusal(an_engine(model), deadline_s=time.monotonic() - 1)
    assert error.fault is Fault.DEADLINE
    assert model.batches == []


async def test_a_request_without_a_deadline_gets_that_of_its_version() -> None:
    request = a_request()
    before_s = time.monotonic()
    await an_engine(timeout_ms=5000).infer(request)
    assert request.deadline_s is not None
    assert before_s + 4.9 < request.deadline_s < time.monotonic() + 5.1


async def test_a_model_that_takes_too_long_is_a_deadline() -> None:
    def slow(inputs: Tensors) -> Tensors:
        time.sleep(0.1)  # what a slow model does
        return pair(inputs)

    error = await refusal(an_engine(TensorModel(slow), timeout_ms=10))
    assert error.fault is Fault.DEADLINE


# the cache


async def test_the_same_question_is_run_once_and_each_answer_has_its_own_id() -> None:
    model, tally = TensorModel(), Tally()
    engine = an_engine(model, meter=tally, cache={})
    answers = [await engine.infer(a_request(id=i)) for i in "123"]
    assert [a.id for a in answers] == ["1", "2", "3"]
    assert [a.outputs["total"].tolist() for a in answers] == [[13, 27]] * 3
    assert len(model.batches) == 1
    assert tally.hits == [False, True, True]


async def test_another_question_is_run() -> None:
    model = TensorModel()
    engine = an_engine(model, cache={})
    for changes in ({}, {"outputs": ("total",)}, {"inputs": {"a": A, "b": B + 1}}):
        await engine.infer(a_request(**changes))
    assert len(model.batches) == 3


async def test_a_failure_is_not_kept() -> None:
    failing = True

    def sometimes(inputs: Tensors) -> Tensors:
        if failing:
            raise ValueError("not today")
        return pair(inputs)

    engine = an_engine(TensorModel(sometimes), cache={})
    assert (await refusal(engine)).fault is Fault.INTERNAL
    failing = False
    assert (await engine.infer(a_request())).outputs["total"].tolist() == [13, 27]


async def test_hits_and_misses_are_counted_and_a_hit_is_an_answer() -> None:
    engine = an_engine(cache={})
    for _ in range(3):
        await engine.infer(a_request())
    counts = engine.statistics()
    assert (counts.cache_hit_count, counts.cache_miss_count) == (2, 1)
    assert (counts.success_count, counts.execution_count, counts.inference_count) == (3, 1, 2)
    assert counts.cache_miss_ns > 0
    assert counts.success_ns > counts.cache_hit_ns > 0


# texts


async def test_a_text_comes_piece_by_piece_and_its_tokens_are_counted() -> None:
    tally = Tally()
    engine = an_engine(TextModel(), meter=tally)
    assert engine.generates
    assert await written(engine, "a b c") == ["a", "b", "c"]
    assert tally.texts == [(3, 3)]
    counts = engine.statistics()
    assert (counts.success_count, counts.inference_count, counts.fail_count) == (1, 1, 0)
    assert counts.success_ns > 0
    assert abs(counts.last_inference_ms - time.time() * 1000) < 10_000


async def test_a_model_of_tensors_writes_no_text() -> None:
    engine = an_engine()
    assert not engine.generates
    with pytest.raises(InferenceError, match="does not generate text; use infer") as refused:
        await written(engine, "a")
    assert refused.value.fault is Fault.INVALID


async def test_texts_in_the_making_are_bounded_and_their_places_come_back() -> None:
    model = TextModel()
    model.gate = asyncio.Event()
    engine = an_engine(model, batching={"queue_requests_max": 2})
    tasks = [asyncio.create_task(written(engine, "a b")) for _ in range(2)]
    await until(lambda: engine.ongoing == 2)
    with pytest.raises(InferenceError, match="queue_requests_max is 2") as refused:
        await written(engine, "a b")
    assert (refused.value.fault, refused.value.retry_after_s) == (Fault.OVERLOADED, 1)
    model.gate.set()
    assert await asyncio.gather(*tasks) == [["a", "b"]] * 2
    assert engine.ongoing == 0
    assert await written(engine, "c") == ["c"]


async def test_a_caller_who_goes_away_ends_the_text_and_frees_its_place() -> None:
    model = TextModel()
    engine = an_engine(model)
    text = engine.generate(GenerationRequest("a b c"))
    assert (await anext(text)).text == "a"
    assert (model.open, engine.ongoing) == (1, 1)
    await text.aclose()  # type: ignore[attr-defined]
    assert (model.open, engine.ongoing) == (0, 0)
    assert engine.statistics().success_count == 0


async def test_a_cancelled_caller_ends_the_text_and_frees_its_place() -> None:
    model = TextModel()
    model.gate = asyncio.Event()
    engine = an_engine(model)
    task = asyncio.create_task(written(engine, "a b"))
    await until(lambda: model.open == 1)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert (model.open, engine.ongoing) == (0, 0)


async def test_a_text_that_fails_is_counted_and_frees_its_place() -> None:
    model = TextModel()
    model.failure = InferenceError(Fault.INTERNAL, "lost its words")
    engine = an_engine(model)
    with pytest.raises(InferenceError, match="lost its words"):
        await written(engine, "a b")
    assert engine.ongoing == 0
    assert engine.statistics().fail_count == 1


async def test_a_text_that_is_not_complete_at_its_deadline_ends_there() -> None:
    model = TextModel()
    model.gate = asyncio.Event()
    engine = an_engine(model)
    with pytest.raises(InferenceError) as refused:
        await written(engine, "a b", deadline_s=time.monotonic() + 0.02)
    assert refused.value.fault is Fault.DEADLINE
    assert (model.open, engine.ongoing) == (0, 0)


async def test_a_versions_own_limit_holds_for_texts_too() -> None:
    model = TextModel()
    model.gate = asyncio.Event()
    with pytest.raises(InferenceError) as refused:
        await written(an_engine(model, timeout_ms=20), "a b", deadline_s=time.monotonic() + 60)
    assert refused.value.fault is Fault.DEADLINE


async def test_a_text_whose_deadline_has_passed_is_not_begun() -> None:
    model = TextModel()
    with pytest.raises(InferenceError) as refused:
        await written(an_engine(model), "a b", deadline_s=time.monotonic() - 1)
    assert refused.value.fault is Fault.DEADLINE
    assert model.prompts == []


async def test_a_slow_reader_is_never_interrupted_in_what_it_does_itself() -> None:
    """The deadline passes while the caller is busy with the first piece: it hears of it after."""
    engine = an_engine(TextModel())
    deadline_s = time.monotonic() + 0.02
    text = engine.generate(GenerationRequest("a b", deadline_s=deadline_s))
    got: list[GenerationChunk] = []

    async def read() -> None:
        async for chunk in text:
            await until(lambda: time.monotonic() > deadline_s)  # it is busy with this piece
            got.append(chunk)

    with pytest.raises(InferenceError) as refused:
        await read()
    assert refused.value.fault is Fault.DEADLINE
    assert [chunk.text for chunk in got] == ["a"]


# probes


@pytest.mark.parametrize(
    ("tensor", "shape", "dtype"),
    [
        (Tensor("x", "FP32", (-1, 3)), (2, 3), np.float32),
        (Tensor("x", "BOOL", (-1,)), (2,), np.bool_),
        (Tensor("x", "INT8", (-1, -1, 4)), (2, 1, 4), np.int8),
        (Tensor("x", "BF16", (-1, 2)), (2, 2), ml_dtypes.bfloat16),
        (Tensor("x", "BYTES", (-1, 1)), (2, 1), np.object_),
    ],
)
def test_a_made_up_value_fits_what_is_declared(
    tensor: Tensor, shape: tuple[int, ...], dtype: Any
) -> None:
    sample = sample_tensor(tensor, 2)
    assert (sample.shape, sample.dtype) == (shape, np.dtype(dtype))
    assert sample.reshape(-1)[0] == (b"warm up" if tensor.datatype == "BYTES" else 0)


async def test_a_warm_up_runs_small_and_full_batches_and_is_not_counted() -> None:
    model, tally = TensorModel(), Tally()
    engine = an_engine(model, meter=tally, cache={})
    await engine.warm_up(4)
    assert {len(batch["b"]) for batch in model.batches} == {1, 4}
    assert engine.statistics() == Statistics()
    assert (engine.requests, tally.hits) == (0, [])
    await engine.infer(a_request())
    assert (engine.requests, engine.statistics().success_count) == (1, 1)


async def test_a_model_that_refuses_made_up_values_has_answered() -> None:
    def picky(inputs: Tensors) -> Tensors:
        if not inputs["a"].any():
            raise InferenceError(Fault.INVALID, "zeros are no measurements")
        return pair(inputs)

    engine = an_engine(TensorModel(picky))
    await engine.warm_up(4)
    await engine.probe()
    assert (await engine.infer(a_request())).outputs["total"].tolist() == [13, 27]


async def test_a_model_that_breaks_on_made_up_values_fails_its_probe() -> None:
    def broken(inputs: Tensors) -> Tensors:
        raise RuntimeError("no GPU")

    with pytest.raises(InferenceError, match="RuntimeError: no GPU") as failed:
        await an_engine(TensorModel(broken)).warm_up(4)
    assert failed.value.fault is Fault.INTERNAL


async def test_a_language_model_is_probed_by_a_short_text() -> None:
    model = TextModel()
    await an_engine(model).probe()
    assert model.prompts == ["Hi"]
    assert model.open == 0


# the end


@pytest.mark.parametrize("model", [TensorModel(), TextModel()], ids=["tensors", "texts"])
async def test_a_closed_engine_lets_its_model_go(model: TensorModel | TextModel) -> None:
    await an_engine(model).close()
    assert model.is_closed


async def until(claim: Any) -> None:
    """Let others run until `claim()` holds."""
    async with asyncio.timeout(5):
        while not claim():
            await asyncio.sleep(0)
