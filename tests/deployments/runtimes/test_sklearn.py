"""Does a served estimator answer as the library does, and fast?"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import skops.io
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.ensemble import ExtraTreesRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.svm import LinearSVC

from deployments.inference import Fault, InferenceError, Signature, Tensor
from deployments.runtimes import Runtime, create
from tests.deployments.runtimes.builders import a_tensor, a_version, load_error, texts

PIXELS, DIGITS = load_digits(return_X_y=True)
MEASURES, KINDS = load_breast_cancer(return_X_y=True)
WORDS = np.array(["malignant", "benign"])[KINDS]


@pytest.fixture(scope="module")
def forest() -> Any:
    model = RandomForestClassifier(30, random_state=0, n_jobs=2)
    return model.fit(PIXELS[:1000], DIGITS[:1000])


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression()).fit(MEASURES, WORDS)


def served(folder: Path, model: Any, **fields: Any) -> tuple[Runtime, Signature]:
    joblib.dump(model, folder / "model.joblib")
    runtime = create("m", a_version("sklearn", **fields), folder / "model.joblib")
    assert isinstance(runtime, Runtime)
    return runtime, runtime.load()


def test_a_forest_answers_label_and_probability_as_the_library_does(
    tmp_path: Path, forest: Any
) -> None:
    runtime, signature = served(tmp_path, forest)
    assert signature.inputs == (Tensor("x", "FP64", (-1, 64)),)
    assert signature.outputs == (
        Tensor("label", "INT64", (-1,)),
        Tensor("probability", "FP64", (-1, 10)),
    )
    assert signature.labels == tuple("0123456789")
    answer = runtime.predict({"x": PIXELS[1000:]})
    np.testing.assert_array_equal(answer["label"], forest.predict(PIXELS[1000:]))
    np.testing.assert_array_equal(answer["probability"], forest.predict_proba(PIXELS[1000:]))


@pytest.mark.parametrize("kind", [RandomForestRegressor, ExtraTreesRegressor])
def test_a_forest_of_numbers_answers_as_the_library_does(tmp_path: Path, kind: Any) -> None:
    rows, values = load_diabetes(return_X_y=True)
    model = kind(20, random_state=0).fit(rows, values)
    runtime, signature = served(tmp_path, model)
    assert signature.outputs == (Tensor("value", "FP64", (-1,)),)
    np.testing.assert_array_equal(runtime.predict({"x": rows})["value"], model.predict(rows))


def test_a_pipeline_that_ends_in_a_forest_answers_as_the_library_does(tmp_path: Path) -> None:
    model = make_pipeline(StandardScaler(), RandomForestClassifier(20, random_state=0))
    model.fit(MEASURES, WORDS)
    runtime, _ = served(tmp_path, model)
    answer = runtime.predict({"x": MEASURES})
    assert answer["label"].tolist() == [w.encode() for w in model.predict(MEASURES)]
    np.testing.assert_array_equal(answer["probability"], model.predict_proba(MEASURES))


def test_one_row_of_a_forest_starts_no_thread(
    tmp_path: Path, forest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, _ = served(tmp_path, forest)
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", started.append)
    runtime.predict({"x": PIXELS[:1]})
    assert not started


def test_values_that_only_the_library_understands_are_left_to_it(tmp_path: Path) -> None:
    rows = PIXELS.copy()
    rows[::3, 5] = np.nan
    model = RandomForestClassifier(10, random_state=0).fit(rows, DIGITS)
    runtime, _ = served(tmp_path, model)
    np.testing.assert_array_equal(runtime.predict({"x": rows})["label"], model.predict(rows))


def test_a_pipeline_with_text_labels_answers_bytes_and_the_declared_datatypes(
    tmp_path: Path, pipeline: Any
) -> None:
    runtime, signature = served(
        tmp_path,
        pipeline,
        inputs=[a_tensor("measures", "FP64", -1, 30)],
        outputs=[a_tensor("score", "FP32", -1), a_tensor("label", "BYTES", -1)],
    )
    assert [t.name for t in signature.outputs] == ["score", "label"]
    assert signature.labels == ("benign", "malignant")
    answer = runtime.predict({"measures": MEASURES[:50]})
    assert list(answer) == ["score", "label"]
    assert answer["score"].dtype == np.float32
    expected = pipeline.predict_proba(MEASURES[:50])[:, 1]
    np.testing.assert_allclose(answer["score"], expected, rtol=1e-6)
    assert answer["label"].tolist() == [w.encode() for w in pipeline.predict(MEASURES[:50])]


def test_a_classifier_without_probabilities_answers_labels_alone(tmp_path: Path) -> None:
    model = LinearSVC().fit(MEASURES[:100], KINDS[:100])
    runtime, signature = served(tmp_path, model)
    assert [t.name for t in signature.outputs] == ["label"]
    np.testing.assert_array_equal(
        runtime.predict({"x": MEASURES})["label"], model.predict(MEASURES)
    )


def test_a_regressor_answers_under_the_name_that_the_model_file_gives(tmp_path: Path) -> None:
    model = LinearRegression().fit(MEASURES, MEASURES[:, 0])
    runtime, _ = served(tmp_path, model, outputs=[a_tensor("radius", "FP32", -1)])
    np.testing.assert_allclose(
        runtime.predict({"x": MEASURES})["radius"], MEASURES[:, 0], rtol=1e-5
    )


def test_a_clustering_answers_whole_numbers_and_a_transformer_its_matrix(tmp_path: Path) -> None:
    clusters = KMeans(3, n_init=1, random_state=0).fit(MEASURES)
    runtime, signature = served(tmp_path, clusters)
    assert signature.outputs[0].name == "label"
    np.testing.assert_array_equal(
        runtime.predict({"x": MEASURES})["label"], clusters.predict(MEASURES)
    )
    scaler = StandardScaler().fit(MEASURES)
    runtime, signature = served(tmp_path, scaler)
    assert signature.outputs == (Tensor("value", "FP64", (-1, 30)),)


def test_a_model_of_texts_takes_bytes(tmp_path: Path) -> None:
    model = make_pipeline(TfidfVectorizer(), LogisticRegression())
    model.fit(["good fish", "bad fish", "good", "bad"], [1, 0, 1, 0])
    runtime, _ = served(tmp_path, model, inputs=[a_tensor("text", "BYTES", -1)])
    assert runtime.predict({"text": texts("a good day", "a bad day")})["label"].tolist() == [1, 0]
    with pytest.raises(InferenceError) as raised:
        runtime.predict({"text": texts(b"\xff")})
    assert raised.value.fault is Fault.INVALID


def a_table() -> tuple[pd.DataFrame, NDArray[np.int64]]:
    table = pd.DataFrame({"age": [20.0, 30.0, 40.0, 50.0], "city": ["A", "B", "A", "B"]})
    return table, np.array([0, 1, 0, 1])


def test_a_model_of_a_table_takes_one_tensor_for_each_column(tmp_path: Path) -> None:
    table, labels = a_table()
    columns = ColumnTransformer(
        [("n", StandardScaler(), ["age"]), ("c", OneHotEncoder(handle_unknown="ignore"), ["city"])]
    )
    model = make_pipeline(columns, LogisticRegression()).fit(table, labels)
    inputs = [a_tensor("age", "FP32", -1), a_tensor("city", "BYTES", -1)]
    runtime, _ = served(tmp_path, model, inputs=inputs)
    answer = runtime.predict({"city": texts("A", "B"), "age": np.array([20, 50], dtype=np.float32)})
    np.testing.assert_array_equal(answer["label"], [0, 1])


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    table, labels = a_table()
    model = LogisticRegression().fit(table[["age"]].assign(size=[1.0, 2, 3, 4]), labels)
    message = load_error(lambda: served(tmp_path, model, inputs=[a_tensor("age", "FP32", -1)]))
    assert "inputs: the weights also have 'size'" in message


@pytest.mark.filterwarnings("error")
def test_a_matrix_is_fine_for_a_model_that_was_fitted_on_numbers_with_names(
    tmp_path: Path,
) -> None:
    table = pd.DataFrame(MEASURES[:, :2], columns=["a", "b"])
    model = LogisticRegression().fit(table, KINDS)
    runtime, signature = served(tmp_path, model)
    assert signature.inputs == (Tensor("x", "FP64", (-1, 2)),)
    answer = runtime.predict({"x": MEASURES[:9, :2]})
    np.testing.assert_array_equal(answer["label"], model.predict(table[:9]))


def test_skops_weights_load_and_their_untrusted_types_are_named(tmp_path: Path) -> None:
    model = make_pipeline(FunctionTransformer(halved), StandardScaler(), LogisticRegression())
    model.fit(MEASURES, KINDS)
    file = tmp_path / "model.skops"
    skops.io.dump(model, file)
    message = load_error(create_sklearn(file).load)
    assert "not trusted" in message
    assert f"{__name__}.halved" in message
    runtime = create_sklearn(file, trusted=[f"{__name__}.halved"])
    runtime.load()
    np.testing.assert_array_equal(
        runtime.predict({"x": MEASURES})["label"], model.predict(MEASURES)
    )


def halved(rows: NDArray[Any]) -> NDArray[Any]:
    return rows / 2


def create_sklearn(weights: Path, **options: Any) -> Runtime:
    runtime = create("m", a_version("sklearn", options=options), weights)
    assert isinstance(runtime, Runtime)
    return runtime


def test_a_value_that_the_estimator_refuses_is_the_callers_fault(
    tmp_path: Path, pipeline: Any
) -> None:
    runtime, _ = served(tmp_path, pipeline)
    rows = MEASURES[:2].copy()
    rows[1, 3] = np.nan
    with pytest.raises(InferenceError) as raised:
        runtime.predict({"x": rows})
    assert raised.value.fault is Fault.INVALID
    assert "NaN" in raised.value.message


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"inputs": [a_tensor("x", "FP32", -1, 31)]},
            "inputs.x.shape: is [-1, 31], the weights have [-1, 30]",
        ),
        ({"inputs": [a_tensor("x", "BYTES", -1, 30)]}, "can't answer"),
        (
            {"inputs": [a_tensor("a", "FP32", -1), a_tensor("b", "FP32", -1)]},
            "declare one input of shape [-1, 30]",
        ),
        ({"outputs": [a_tensor("labels", "BYTES", -1)]}, "did you mean 'label'?"),
        (
            {"outputs": [a_tensor("label", "INT64", -1)]},
            "outputs.label.datatype: is INT64, the weights have BYTES",
        ),
        ({"options": {"trustd": []}}, "options.trustd: unknown option; did you mean 'trusted'?"),
        ({"options": {"trusted": 3}}, "options.trusted"),
    ],
)
def test_a_model_file_that_does_not_fit_is_told_what_would(
    tmp_path: Path, pipeline: Any, fields: dict[str, Any], expected: str
) -> None:
    assert expected in load_error(lambda: served(tmp_path, pipeline, **fields))


def test_weights_that_are_none_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "broken.joblib").write_bytes(b"no pickle")
    assert "broken.joblib can't be read" in load_error(
        create_sklearn(tmp_path / "broken.joblib").load
    )
    joblib.dump({"a": 1}, tmp_path / "other.joblib")
    assert "holds a dict" in load_error(create_sklearn(tmp_path / "other.joblib").load)
    assert "several" in load_error(create_sklearn(tmp_path).load)
    assert "did you mean 'other.joblib'?" in load_error(
        create_sklearn(tmp_path, file="othr.joblib").load
    )
    (tmp_path / "model.txt").touch()
    assert "this runtime reads" in load_error(create_sklearn(tmp_path / "model.txt").load)
    assert "does not exist" in load_error(create_sklearn(tmp_path / "nothing").load)
