"""Is the same question answered from memory, and another one never?"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from numpy.typing import NDArray

from deployments.inference import InferenceRequest, InferenceResponse
from deployments.serving.cache import ResponseCache


def an_answer(value: float) -> InferenceResponse:
    return InferenceResponse({"y": np.array([value])})


def a_question(*values: float, **others: Any) -> InferenceRequest:
    return InferenceRequest({"x": np.array(values, "f4")}, **others)


def texts(*elements: bytes) -> InferenceRequest:
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    return InferenceRequest({"x": array})


def value_of(response: InferenceResponse | None) -> float | None:
    return None if response is None else float(response.outputs["y"][0])


def test_an_equal_question_hits() -> None:
    cache = ResponseCache(10, 60)
    cache.put(cache.key(a_question(1, 2)), an_answer(3), 0)
    assert value_of(cache.get(cache.key(a_question(1, 2)), 1)) == 3


@pytest.mark.parametrize(
    "other",
    [
        a_question(1, 3),
        a_question(1),
        InferenceRequest({"z": np.array([1, 2], "f4")}),
        InferenceRequest({"x": np.array([1, 2], "f8")}),
        InferenceRequest({"x": np.array([1, 2], "f4").view("u4")}),
        InferenceRequest({"x": np.array([[1, 2]], "f4")}),
        InferenceRequest({"x": np.array([1, 2], "f4"), "z": np.array([1, 2], "f4")}),
        a_question(1, 2, outputs=("y",)),
        a_question(1, 2, outputs=()),
        a_question(1, 2, parameters={"top": 1}),
    ],
)
def test_another_question_misses(other: InferenceRequest) -> None:
    cache = ResponseCache(10, 60)
    assert cache.key(other) != cache.key(a_question(1, 2))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (texts(b"ab", b"c"), texts(b"a", b"bc")),
        (texts(b"ab", b""), texts(b"", b"ab")),
        (texts(b"a"), texts(b"a", b"")),
        (a_question(1, parameters={"k": 1}), a_question(1, parameters={"k": True})),
        (a_question(1, parameters={"k": 1}), a_question(1, parameters={"k": 1.0})),
        (a_question(1, parameters={"k": 1}), a_question(1, parameters={"k": "1"})),
        (a_question(1, outputs=("a", "b")), a_question(1, outputs=("ab",))),
        (a_question(1, outputs=("a",), parameters={}), a_question(1, parameters={"a": "a"})),
    ],
)
def test_questions_that_look_alike_have_different_keys(
    one: InferenceRequest, other: InferenceRequest
) -> None:
    cache = ResponseCache(10, 60)
    assert cache.key(one) != cache.key(other)


@pytest.mark.parametrize(
    "change",
    [
        {"id": "another"},
        {"deadline_s": 12.0},
        {"parameters": {"binary_data_output": True, "priority": 3, "timeout": 9}},
    ],
)
def test_what_does_not_change_the_answer_does_not_change_the_key(change: Any) -> None:
    cache = ResponseCache(10, 60)
    assert cache.key(replace(a_question(1), **change)) == cache.key(a_question(1))


def test_the_order_of_names_and_the_layout_in_memory_do_not_matter() -> None:
    cache = ResponseCache(10, 60)
    x, z = np.arange(6, dtype="f4").reshape(2, 3), np.arange(2)
    one = InferenceRequest({"x": x, "z": z}, parameters={"a": 1, "b": 2})
    other = InferenceRequest(
        {"z": z.copy(), "x": np.asfortranarray(x)}, parameters={"b": 2, "a": 1}
    )
    assert cache.key(one) == cache.key(other)


def test_an_answer_is_forgotten_when_its_time_has_passed() -> None:
    cache = ResponseCache(10, 60)
    key = cache.key(a_question(1))
    cache.put(key, an_answer(3), 100)
    assert value_of(cache.get(key, 159.9)) == 3
    assert cache.get(key, 160) is None
    assert len(cache) == 0


def test_an_answer_that_shares_memory_with_a_batch_is_copied_out_of_it() -> None:
    cache = ResponseCache(10, 60)
    batch = np.arange(1000.0)
    cache.put(b"k", InferenceResponse({"y": batch[3:4]}), 0)
    kept = cache.get(b"k", 0)
    assert kept is not None
    assert kept.outputs["y"].base is None
    assert kept.outputs["y"].tolist() == [3.0]


def test_the_callers_id_is_not_kept() -> None:
    cache = ResponseCache(10, 60)
    cache.put(b"k", InferenceResponse({}, id="secret"), 0)
    kept = cache.get(b"k", 0)
    assert kept is not None
    assert kept.id == ""


@given(
    st.lists(st.tuples(st.sampled_from("gp"), st.integers(0, 6), st.integers(0, 3))),
    st.integers(1, 4),
)
def test_it_remembers_what_a_plain_model_of_it_remembers(
    steps: list[tuple[str, int, int]], entries_max: int
) -> None:
    cache, ttl_s, now_s = ResponseCache(entries_max, 5), 5, 0
    known: OrderedDict[int, tuple[int, int]] = OrderedDict()
    for number, (action, item, wait_s) in enumerate(steps):
        now_s += wait_s
        key = cache.key(a_question(item))
        if action == "p":
            cache.put(key, an_answer(number), now_s)
            known[item] = (number, now_s + ttl_s)
            known.move_to_end(item)
            while len(known) > entries_max:
                known.popitem(last=False)
        else:
            value, until_s = known.get(item, (None, 0))
            is_fresh = now_s < until_s
            assert value_of(cache.get(key, now_s)) == (value if is_fresh else None)
            if is_fresh:
                known.move_to_end(item)
            else:
                known.pop(item, None)
        assert len(cache) <= entries_max


arrays: st.SearchStrategy[NDArray[Any]] = st.one_of(
    st_numpy.arrays(
        st.sampled_from(["?", "i1", "u1", "i4", "f4", "f8"]),
        st_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
        elements=st.integers(0, 1),
    ),
    st.lists(st.binary(max_size=2), max_size=4).map(lambda e: texts(*e).inputs["x"]),
)
requests = st.builds(
    InferenceRequest,
    inputs=st.dictionaries(st.sampled_from(["a", "b", "ab"]), arrays, max_size=2),
    outputs=st.none() | st.lists(st.sampled_from(["a", "b", "ab"]), max_size=2).map(tuple),
    parameters=st.dictionaries(
        st.sampled_from(["a", "b", "ab"]),
        st.booleans() | st.integers(0, 1) | st.sampled_from([0.0, 1.0, "", "0", "a", "True"]),
        max_size=2,
    ),
)


def plainly(request: InferenceRequest) -> Any:
    """Everything that the answer depends on, as a value that Python compares strictly."""
    return (
        sorted((n, a.dtype.str, a.shape, repr(a.tolist())) for n, a in request.inputs.items()),
        request.outputs,
        sorted((n, type(v).__name__, repr(v)) for n, v in request.parameters.items()),
    )


@settings(max_examples=500)
@given(requests, requests)
def test_two_different_questions_never_share_an_answer_and_equal_ones_always_do(
    one: InferenceRequest, other: InferenceRequest
) -> None:
    cache = ResponseCache(10, 60)
    assert (cache.key(one) == cache.key(other)) == (plainly(one) == plainly(other))


@given(requests)
def test_a_copy_of_a_question_hits(request: InferenceRequest) -> None:
    cache = ResponseCache(10, 60)
    copy = replace(request, inputs={n: a.copy() for n, a in request.inputs.items()})
    assert cache.key(copy) == cache.key(request)
