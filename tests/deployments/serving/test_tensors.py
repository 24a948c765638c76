"""Do tensors survive the journey as JSON and as bytes, and is everything else refused?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from deployments.inference import DTYPES, Fault, InferenceError, Signature, Tensor
from deployments.serving.protocols import tensors
from deployments.serving.protocols.tensors import Inputs

NUMERIC = sorted(set(DTYPES) - {"BYTES"})
AS_JSON = sorted(set(NUMERIC) - tensors.BINARY_ONLY)
SHAPES = npst.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)


@st.composite
def arrays(draw: st.DrawFn, datatypes: list[str]) -> tuple[str, NDArray[Any]]:
    datatype = draw(st.sampled_from(datatypes))
    shape = draw(SHAPES)
    if datatype == "BF16":
        bits = draw(npst.arrays(np.uint16, shape))
        return datatype, bits.view(ml_dtypes.bfloat16)
    return datatype, draw(npst.arrays(DTYPES[datatype], shape))


def texts_of(shape: tuple[int, ...]) -> st.SearchStrategy[NDArray[Any]]:
    count = int(np.prod(shape))
    texts = st.lists(st.text(max_size=5), min_size=count, max_size=count)
    return texts.map(lambda t: tensors.bytes_array([e.encode() for e in t], shape))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InferenceError) as raised:
        call()
    assert raised.value.fault is Fault.INVALID
    return raised.value.message


def tensor_or_fault(call: Callable[[], NDArray[Any]]) -> NDArray[Any] | Fault:
    try:
        return call()
    except InferenceError as error:
        return error.fault


@given(arrays(NUMERIC))
def test_numbers_come_back_from_bytes_bit_for_bit(made: tuple[str, NDArray[Any]]) -> None:
    datatype, array = made
    back = tensors.from_bytes("x", datatype, array.shape, tensors.to_bytes(array))
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()
    assert tensors.datatype_of(back) == datatype


@given(arrays(AS_JSON), st.booleans())
def test_finite_numbers_come_back_from_json_exactly(
    made: tuple[str, NDArray[Any]], nested: bool
) -> None:
    datatype, array = made
    array = np.where(np.isfinite(array), array, 1).astype(array.dtype)
    data = orjson.loads(orjson.dumps(tensors.to_json("x", array)))
    if nested and array.size:
        data = np.array(data, object).reshape(array.shape).tolist()
    back = tensors.from_json("x", datatype, array.shape, data)
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


@given(SHAPES.flatmap(texts_of))
def test_texts_come_back_both_ways(array: NDArray[Any]) -> None:
    as_bytes = tensors.from_bytes("x", "BYTES", array.shape, tensors.to_bytes(array))
    data = orjson.loads(orjson.dumps(tensors.to_json("x", array)))
    as_json = tensors.from_json("x", "BYTES", array.shape, data)
    for back in (as_bytes, as_json):
        assert back.shape == array.shape
        assert back.tolist() == array.tolist()


@given(st.lists(st.binary(max_size=6), max_size=6))
def test_any_bytes_travel_in_binary_even_those_that_end_with_zeros(elements: list[bytes]) -> None:
    array = tensors.bytes_array([*elements, b"\0\0"], (len(elements) + 1,))
    back = tensors.from_bytes("x", "BYTES", array.shape, tensors.to_bytes(array))
    assert back.tolist() == [*elements, b"\0\0"]


@given(st.binary(max_size=40), st.sampled_from(sorted(DTYPES)), SHAPES)
def test_bytes_of_any_kind_give_a_tensor_or_a_refusal(
    data: bytes, datatype: str, shape: tuple[int, ...]
) -> None:
    array = tensor_or_fault(lambda: tensors.from_bytes("x", datatype, shape, data))
    if isinstance(array, Fault):
        assert array is Fault.INVALID
    else:
        assert array.shape == shape
        assert tensors.to_bytes(array) == data


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=12,
)


@given(JSON, st.sampled_from(sorted(DTYPES)), SHAPES)
def test_json_of_any_kind_gives_a_tensor_or_a_refusal(
    data: Any, datatype: str, shape: tuple[int, ...]
) -> None:
    array = tensor_or_fault(lambda: tensors.from_json("x", datatype, shape, data))
    if isinstance(array, Fault):
        assert array is Fault.INVALID
    else:
        assert array.shape == shape
        assert array.dtype == DTYPES[datatype]


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "words"),
    [
        ("FP32", (2,), [1.0], "holds 1 elements but shape [2] needs 2"),
        ("FP32", (2, 2), [[1, 2], [3]], "rows of 1 and of 2"),
        ("FP32", (2, 2), [[1, 2], 3], "nested unevenly"),
        ("FP32", (3, 2), [[1, 2, 3], [4, 5, 6]], "nested as [2, 3] but shape says [3, 2]"),
        ("FP32", (1,), [True], "element 0 is true; FP32 data must be numbers"),
        ("FP32", (1,), ["1"], 'element 0 is "1"; FP32 data must be numbers'),
        ("FP32", (1,), [None], "element 0 is null; FP32 data must be numbers"),
        ("FP32", (2,), [1, 1e39], "element 1 is 1e+39, outside the range of FP32"),
        ("FP64", (1,), [10**400], "outside the range of FP64"),
        ("INT8", (2,), [1, 128], "element 1 is 128, outside the range of INT8 (-128 to 127)"),
        ("UINT64", (1,), [-1], "element 0 is -1, outside the range of UINT64"),
        ("INT32", (1,), [1.0], "element 0 is 1.0; INT32 data must be whole numbers"),
        ("INT32", (1,), [False], "element 0 is false; INT32 data must be whole numbers"),
        ("BOOL", (1,), [1], "element 0 is 1; BOOL data must be true or false"),
        ("BYTES", (1,), [1], "element 0 is 1; BYTES data must be strings"),
        ("FP16", (1,), [1], "FP16 can't travel as JSON"),
        ("BF16", (1,), [1], "BF16 can't travel as JSON"),
        ("FP32", (1,), {"a": 1}, 'data {"a":1} must be a list'),
    ],
)
def test_a_refused_json_tensor_is_told_why(
    datatype: str, shape: tuple[int, ...], data: Any, words: str
) -> None:
    message = refusal(lambda: tensors.from_json("x", datatype, shape, data))
    assert message.startswith("input 'x'")
    assert words in message


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "words"),
    [
        ("FP32", (2,), b"1234", "has 4 bytes but FP32 of shape [2] needs 8"),
        ("BOOL", (1,), b"\x02", "BOOL is one byte, 0 or 1; the data hold 2"),
        ("BYTES", (1,), b"\x05\0\0\0ab", "ends within element 0"),
        ("BYTES", (1,), b"\x00\0", "ends within element 0"),
        ("BYTES", (2,), b"\x01\0\0\0a", "holds 1 elements but shape needs 2"),
    ],
)
def test_a_refused_binary_tensor_is_told_why(
    datatype: str, shape: tuple[int, ...], data: bytes, words: str
) -> None:
    assert words in refusal(lambda: tensors.from_bytes("x", datatype, shape, data))


@pytest.mark.parametrize("shape", ["2", [True], [-1], [1.0], [2**31], [1] * 33, None, [[1]]])
def test_a_shape_that_is_no_list_of_lengths_is_refused(shape: Any) -> None:
    assert "shape" in refusal(lambda: tensors.checked_shape("x", shape))


@pytest.mark.parametrize("shape", [(0, 2**31 - 1, 2**31 - 1, 2**31 - 1), (2**31 - 1,) * 3])
def test_a_gigantic_shape_costs_nothing_and_is_refused(shape: tuple[int, ...]) -> None:
    refusal(lambda: tensors.from_bytes("x", "FP32", shape, b""))


@pytest.mark.parametrize("datatype", ["FP128", "fp32", 1, None, [], {}])
def test_an_unknown_datatype_is_refused(datatype: Any) -> None:
    assert "must be one of BOOL" in refusal(lambda: tensors.checked_datatype("x", datatype))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([np.inf], np.float32), "holds infinite values"),
        (np.array([1], np.float16), "is FP16"),
        (tensors.bytes_array([b"\xff"], (1,)), "not UTF-8"),
    ],
)
def test_an_output_without_a_json_form_must_be_asked_for_as_binary(
    array: NDArray[Any], words: str
) -> None:
    message = refusal(lambda: tensors.to_json("y", array))
    assert words in message
    assert "binary_data" in message


def test_nan_is_written_as_null() -> None:
    text = orjson.dumps(tensors.to_json("y", np.array([np.nan, 1], np.float32)))
    assert text == b"[null,1.0]"


def test_columns_in_any_memory_order_are_written_row_by_row() -> None:
    array = np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3))
    assert orjson.dumps(tensors.to_json("y", array)) == b"[0,1,2,3,4,5]"
    assert tensors.to_bytes(array) == np.arange(6, dtype=np.int32).tobytes()


def test_what_came_as_bytes_may_be_written_to() -> None:
    array = tensors.from_bytes("x", "FP32", (1,), b"\0\0\0\0")
    array[0] = 1
    assert array.flags.aligned


SIGNATURE = Signature((Tensor("a", "FP32", (-1, 3)), Tensor("b", "INT64", (-1,))), ())


@pytest.mark.parametrize(
    ("name", "datatype", "shape", "words"),
    [
        ("c", "FP32", (1, 3), "unexpected inference input 'c' for model 'm'"),
        ("a", "FP64", (1, 3), "data-type is 'FP64', but model 'm' expects 'FP32'"),
        ("a", "FP32", (1, 2), "expected [-1, 3], got [1, 2]"),
        ("a", "FP32", (3,), "expected [-1, 3], got [3]"),
    ],
)
def test_an_input_that_the_model_does_not_take_is_refused(
    name: str, datatype: str, shape: tuple[int, ...], words: str
) -> None:
    inputs = Inputs("m", SIGNATURE)
    inputs.check("a", "FP32", (7, 3))
    assert words in refusal(lambda: inputs.check(name, datatype, shape))


def test_missing_inputs_and_uneven_rows_are_refused() -> None:
    inputs = Inputs("m", SIGNATURE)
    two, one = np.zeros((2, 3), np.float32), np.zeros(1, np.int64)
    assert "needs 'b'" in refusal(lambda: inputs.check_all({"a": two}))
    assert "same number of rows" in refusal(lambda: inputs.check_all({"a": two, "b": one}))
    inputs.check_all({"a": two, "b": np.zeros(2, np.int64)})


def test_a_model_that_declares_nothing_takes_any_input_but_none() -> None:
    inputs = Inputs("m", Signature((), ()))
    inputs.check("anything", "INT8", (1, 2, 3))
    inputs.check_all({"anything": np.zeros(1)})
    assert "at least one" in refusal(lambda: inputs.check_all({}))
