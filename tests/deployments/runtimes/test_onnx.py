"""Does a served graph answer as the model that it was made of?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier

from deployments.inference import Fault, InferenceError, Signature, Tensor
from deployments.runtimes import Runtime, create
from tests.deployments.runtimes.builders import a_tensor, a_version, load_error, texts

PIXELS, DIGITS = load_digits(return_X_y=True)
ROWS = PIXELS[1000:].astype(np.float32)


@pytest.fixture(scope="module")
def forest() -> Any:
    return RandomForestClassifier(20, random_state=0).fit(PIXELS[:1000], DIGITS[:1000])


def graph_of(model: Any, *, zipmap: bool) -> bytes:
    made = to_onnx(
        model,
        initial_types=[("pixels", FloatTensorType([None, 64]))],
        options={id(model): {"zipmap": zipmap}},
    )
    return bytes(made.SerializeToString())


def served(folder: Path, graph: bytes, **fields: Any) -> tuple[Runtime, Signature]:
    file = folder / "model.onnx"
    file.write_bytes(graph)
    runtime = create("m", a_version("onnx", **fields), file)
    assert isinstance(runtime, Runtime)
    return runtime, runtime.load()


def a_graph(
    inputs: list[tuple[str, int, list[Any] | None]],
    outputs: list[tuple[str, int, list[Any] | None]],
    *nodes: Any,
) -> bytes:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def test_a_forest_answers_as_scikit_learn_does(tmp_path: Path, forest: Any) -> None:
    runtime, signature = served(tmp_path, graph_of(forest, zipmap=False))
    assert signature.inputs == (Tensor("pixels", "FP32", (-1, 64)),)
    assert signature.outputs == (
        Tensor("label", "INT64", (-1,)),
        Tensor("probabilities", "FP32", (-1, 10)),
    )
    answer = runtime.predict({"pixels": ROWS})
    np.testing.assert_array_equal(answer["label"], forest.predict(ROWS))
    np.testing.assert_allclose(answer["probabilities"], forest.predict_proba(ROWS), atol=1e-5)


def test_a_zipmap_becomes_a_matrix(tmp_path: Path, forest: Any) -> None:
    runtime, signature = served(tmp_path, graph_of(forest, zipmap=True))
    assert signature.outputs[1] == Tensor("output_probability", "FP32", (-1, 10))
    answer = runtime.predict({"pixels": ROWS[:50]})
    np.testing.assert_allclose(
        answer["output_probability"], forest.predict_proba(ROWS[:50]), atol=1e-5
    )


def test_declared_tensors_are_converted_and_the_others_left_out(
    tmp_path: Path, forest: Any
) -> None:
    runtime, signature = served(
        tmp_path,
        graph_of(forest, zipmap=False),
        inputs=[a_tensor("pixels", "UINT8", -1, 64)],
        outputs=[a_tensor("label", "INT32", -1)],
    )
    assert signature.inputs[0].datatype == "UINT8"
    answer = runtime.predict({"pixels": ROWS.astype(np.uint8)})
    assert list(answer) == ["label"]
    assert answer["label"].dtype == np.int32
    np.testing.assert_array_equal(answer["label"], forest.predict(ROWS))


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_a_graph_with_a_fixed_number_of_rows_answers_any_number(tmp_path: Path, rows: int) -> None:
    graph = a_graph(
        [("x", TensorProto.FLOAT, [4, 2])],
        [("y", TensorProto.FLOAT, [4, 2])],
        helper.make_node("Add", ["x", "x"], ["y"]),
    )
    runtime, signature = served(tmp_path, graph)
    assert signature.inputs == (Tensor("x", "FP32", (-1, 2)),)
    x = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)
    np.testing.assert_array_equal(runtime.predict({"x": x})["y"], x * 2)


def test_text_goes_in_and_comes_out_as_bytes(tmp_path: Path) -> None:
    graph = a_graph(
        [("text", TensorProto.STRING, ["n"])],
        [("same", TensorProto.STRING, ["n"])],
        helper.make_node("Identity", ["text"], ["same"]),
    )
    runtime, _ = served(tmp_path, graph)
    given = texts("fish", "naïve 北京")
    assert runtime.predict({"text": given})["same"].tolist() == given.tolist()
    with pytest.raises(InferenceError) as raised:
        runtime.predict({"text": texts(b"\xff\xfe")})
    assert raised.value.fault is Fault.INVALID


def test_an_output_without_rows_is_refused_by_name(tmp_path: Path) -> None:
    graph = a_graph(
        [("x", TensorProto.FLOAT, ["n", 2])],
        [("total", TensorProto.FLOAT, []), ("y", TensorProto.FLOAT, ["n", 2])],
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Identity", ["x"], ["y"]),
    )
    assert "output 'total' has shape [] for 2 rows" in load_error(lambda: served(tmp_path, graph))
    runtime, _ = served(tmp_path, graph, outputs=[a_tensor("y", "FP32", -1, 2)])
    assert list(runtime.predict({"x": np.ones((3, 2), dtype=np.float32)})) == ["y"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"inputs": [a_tensor("pixel", "FP32", -1, 64)]}, "did you mean 'pixels'?"),
        ({"inputs": [a_tensor("pixels", "FP32", -1, 63)]}, "the weights have [-1, 64]"),
        ({"outputs": [a_tensor("lable", "INT64", -1)]}, "did you mean 'label'?"),
        ({"outputs": [a_tensor("label", "BYTES", -1)]}, "the weights have INT64"),
        ({"options": {"thread": 1}}, "did you mean 'threads'?"),
        ({"options": {"optimization": "most"}}, "options.optimization"),
    ],
)
def test_a_model_file_that_does_not_fit_is_told_what_would(
    tmp_path: Path, forest: Any, fields: dict[str, Any], expected: str
) -> None:
    graph = graph_of(forest, zipmap=False)
    assert expected in load_error(lambda: served(tmp_path, graph, **fields))


def test_a_file_that_is_no_graph_is_named(tmp_path: Path) -> None:
    assert "model.onnx is no usable graph" in load_error(lambda: served(tmp_path, b"no graph"))
