"""Do clients of TF Serving and KServe V1 get what they are used to?"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.inference import (
    Engine,
    Fault,
    InferenceError,
    Signature,
    Tensor,
    Tensors,
    VersionState,
)
from deployments.serving.application import Application
from deployments.serving.http import Dialect
from deployments.serving.protocols.openai import OpenAI
from deployments.serving.protocols.tfserving import TensorFlowServing
from tests.deployments.serving.engines import (
    DATATYPES,
    NumpyEngine,
    SingleCatalog,
    WordsEngine,
    classes_engine,
    every_engine,
    sum_engine,
)
from tests.deployments.serving.live import live

TENSORFLOW = {"x-shoal-dialect": "tensorflow"}


@contextmanager
def served(engine: Engine, catalog: SingleCatalog | None = None) -> Iterator[httpx.Client]:
    catalog = catalog or SingleCatalog(engine)
    dialects: list[Dialect] = [TensorFlowServing(catalog, engine), OpenAI(catalog, engine)]
    app = Application(catalog, engine, dialects, ready=lambda: True)
    with live(app) as server, httpx.Client(base_url=server.url) as client:
        yield client


@pytest.fixture(scope="module")
def total() -> Iterator[httpx.Client]:
    with served(sum_engine()) as client:
        yield client


@pytest.fixture(scope="module")
def every() -> Iterator[httpx.Client]:
    with served(every_engine()) as client:
        yield client


@pytest.fixture(scope="module")
def colours() -> Iterator[httpx.Client]:
    with served(classes_engine()) as client:
        yield client


def an_engine(
    inputs: list[Tensor], outputs: list[Tensor], values: Any = None, *, model: str = "m"
) -> NumpyEngine:
    """A model that gives `values`, or its inputs back under the outputs' names."""

    def compute(tensors: Tensors) -> Tensors:
        if values is not None:
            return dict(zip((t.name for t in outputs), values, strict=True))
        return dict(zip((t.name for t in outputs), tensors.values(), strict=True))

    return NumpyEngine(Signature(tuple(inputs), tuple(outputs)), compute, model=model, version="1")


def texts(*elements: bytes) -> Any:
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    return array


def ok(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def refusal(answer: httpx.Response, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert list(body) == ["error"]
    assert isinstance(body["error"], str)
    return body["error"]


# Predict


def test_rows_come_back_as_rows_with_names_when_there_are_several_outputs(
    total: httpx.Client,
) -> None:
    answer = total.post("/v1/models/sum:predict", json={"instances": [[1, 2, 3], [4, 5, 6]]})
    assert ok(answer) == {
        "predictions": [{"total": 6.0, "label": "row 0"}, {"total": 15.0, "label": "row 1"}]
    }


def test_columns_come_back_as_columns(total: httpx.Client) -> None:
    answer = total.post("/v1/models/sum:predict", json={"inputs": {"x": [[1, 2, 3], [4, 5, 6]]}})
    assert ok(answer) == {"outputs": {"total": [6.0, 15.0], "label": ["row 0", "row 1"]}}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"instances": [[1, 2, 3]]}, {"predictions": [[1.0, 2.0, 3.0]]}),
        ({"instances": [{"x": [1, 2, 3]}]}, {"predictions": [[1.0, 2.0, 3.0]]}),
        ({"inputs": [[1, 2, 3]]}, {"outputs": [[1.0, 2.0, 3.0]]}),
        ({"inputs": {"x": [[1, 2, 3]]}}, {"outputs": [[1.0, 2.0, 3.0]]}),
        (
            {"instances": [[1, 2, 3]], "signature_name": "serving_default", "unknown": 1},
            {"predictions": [[1.0, 2.0, 3.0]]},
        ),
    ],
)
def test_a_single_output_goes_without_its_name(
    colours: httpx.Client, body: Any, expected: Any
) -> None:
    assert ok(colours.post("/v1/models/colours:predict", json=body)) == expected


def test_every_datatype_travels_both_ways(every: httpx.Client) -> None:
    one: dict[str, Any] = {
        f"in_{d.lower()}": [1.5, -2.0] if d.startswith("FP") else [3, 4] for d in DATATYPES
    }
    one["in_bool"], one["in_bytes"] = [True, False], ["text", "ünïcode"]
    expected = {n.replace("in_", "out_"): v for n, v in one.items()}
    expected["out_bytes"] = [{"b64": "dGV4dA=="}, {"b64": "w7xuw69jb2Rl"}]
    row = ok(every.post("/v1/models/every:predict", json={"instances": [one]}))
    assert row == {"predictions": [expected]}
    columns = {"inputs": {n: [v] for n, v in one.items()}}
    column = ok(every.post("/v1/models/every:predict", json=columns))
    assert column == {"outputs": {n: [v] for n, v in expected.items()}}


def test_bytes_travel_as_base64_and_come_back_so_when_the_name_says_bytes() -> None:
    engine = an_engine([Tensor("image", "BYTES", (-1,))], [Tensor("image_bytes", "BYTES", (-1,))])
    raw = bytes(range(256))
    b64 = {"b64": base64.b64encode(raw).decode()}
    with served(engine) as client:
        for body in ({"instances": [b64]}, {"instances": [{"image": b64}]}):
            assert ok(client.post("/v1/models/m:predict", json=body)) == {"predictions": [b64]}
        for columns in ({"inputs": [b64]}, {"inputs": {"image": [b64]}}):
            assert ok(client.post("/v1/models/m:predict", json=columns)) == {"outputs": [b64]}
    assert engine.requests[0].inputs["image"].tolist() == [raw]


def test_text_is_plain_and_what_is_no_text_is_base64() -> None:
    engine = an_engine([Tensor("x", "BYTES", (-1, 2))], [Tensor("y", "BYTES", (-1, 2))])
    with served(engine) as client:
        body = {"instances": [["a", {"b64": "/w=="}]]}
        answer = ok(client.post("/v1/models/m:predict", json=body))
    assert answer == {"predictions": [["a", {"b64": "/w=="}]]}


def test_not_a_number_and_infinity_are_legal_in_both_directions(colours: httpx.Client) -> None:
    body = b'{"instances": [[NaN, Infinity, -Infinity], [0.1, 1, 2]]}'
    answer = colours.post("/v1/models/colours:predict", content=body)
    assert answer.status_code == 200
    assert b"[NaN,Infinity,-Infinity]" in answer.content
    assert b"[0.1,1.0,2.0]" in answer.content
    first = json.loads(answer.content)["predictions"][0]
    assert math.isnan(first[0])
    assert first[1:] == [math.inf, -math.inf]


def test_not_a_number_is_legal_in_named_rows_and_scores(colours: httpx.Client) -> None:
    engine = an_engine(
        [Tensor("x", "FP64", (-1,)), Tensor("z", "FP64", (-1,))],
        [Tensor("a", "FP64", (-1,)), Tensor("b", "FP64", (-1,))],
    )
    with served(engine) as client:
        answer = client.post(
            "/v1/models/m:predict", content=b'{"instances": [{"x": NaN, "z": 2.5}]}'
        )
        assert answer.content == b'{"predictions":[{"a":NaN,"b":2.5}]}'
    answer = colours.post(
        "/v1/models/colours:classify", content=b'{"examples": [{"x": [1, Infinity, 3]}]}'
    )
    assert answer.content == b'{"results":[[["red",1.0],["green",Infinity],["blue",3.0]]]}'


def test_several_inputs_must_be_named() -> None:
    inputs = [Tensor("a", "FP32", (-1,)), Tensor("b", "INT64", (-1,))]
    engine = an_engine(inputs, [Tensor("c", "FP32", (-1,)), Tensor("d", "INT64", (-1,))])
    with served(engine) as client:

        def post(body: Any) -> httpx.Response:
            return client.post("/v1/models/m:predict", json=body)

        assert ok(post({"instances": [{"b": 1, "a": 0.5}]})) == {
            "predictions": [{"c": 0.5, "d": 1}]
        }
        assert ok(post({"inputs": {"a": [1], "b": [2]}})) == {"outputs": {"c": [1.0], "d": [2]}}
        assert "name them: a, b" in refusal(post({"instances": [1]}))
        assert "name them: a, b" in refusal(post({"inputs": [1]}))
        assert "lacks 'b'" in refusal(post({"instances": [{"a": 1}]}))
        assert "instances[1]" in refusal(post({"instances": [{"a": 1, "b": 1}, {"a": 1}]}))
        assert '"z"' in refusal(post({"instances": [{"a": 1, "b": 1, "z": 1}]}))
        assert '"z"' in refusal(post({"inputs": {"a": [1], "b": [1], "z": [1]}}))
        assert "same number of rows" in refusal(post({"inputs": {"a": [1, 2], "b": [1]}}))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "JSON Parse error"),
        (b"{", "JSON Parse error"),
        (b"[" * 100_000, "JSON Parse error"),
        (b'{"a": NaN, "b": ' + b"[" * 100_000, "JSON Parse error"),
        (b'{"instances": ["\\ud800", NaN]}', "JSON Parse error"),
        (b"\xff", "JSON Parse error"),
        (b"3", "must be an object"),
        ({}, "neither"),
        ({"instances": [[1, 2, 3]], "inputs": [[1, 2, 3]]}, "both"),
        ({"instances": []}, "at least one row"),
        ({"instances": 3}, "at least one row"),
        ({"instances": None}, "at least one row"),
        ({"instances": [[1, 2, 3], [1, 2]]}, "ragged"),
        ({"instances": [[1, 2, [3]]]}, "ragged"),
        ({"instances": [[1, 2, 3], 4]}, "ragged"),
        ({"instances": [[1, 2]]}, "expected [-1, 3], got [1, 2]"),
        ({"instances": [1, 2, 3]}, "expected [-1, 3], got [3]"),
        ({"instances": [[[1, 2, 3]]]}, "expected [-1, 3], got [1, 1, 3]"),
        ({"instances": [[1, 2, "3"]]}, '"3"; FP32 takes numbers'),
        ({"instances": [[1, 2, True]]}, "true; FP32 takes numbers"),
        ({"instances": [[1, 2, None]]}, "null; FP32 takes numbers"),
        ({"instances": [[1, 2, 1e39]]}, "outside the range of FP32"),
        ({"instances": [[1, 2, {"b64": "AA=="}]]}, "takes numbers"),
        ({"instances": [{"y": [1, 2, 3]}]}, "it takes 'x'"),
        ({"instances": [{}]}, "lacks 'x'"),
        ({"instances": [{"x": [1, 2, 3]}, [1, 2, 3]]}, "instances[1] is a plain value"),
        ({"instances": [[1, 2, 3], {"x": [1, 2, 3]}]}, "instances[1] is an object"),
        ({"inputs": {}}, "lacks 'x'"),
        ({"inputs": []}, "expected [-1, 3], got [0]"),
        ({"inputs": 3}, "expected [-1, 3], got []"),
        ({"instances": [[1, 2, 3]], "signature_name": "other"}, "serving_default"),
        ({"instances": [[1, 2, 3]], "signature_name": 3}, "serving_default"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(
    colours: httpx.Client, body: bytes | dict[str, Any], words: str
) -> None:
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    answer = colours.post("/v1/models/colours:predict", content=content)
    assert words in refusal(answer)


@pytest.mark.parametrize(
    ("datatype", "value", "words"),
    [
        ("INT64", 1.5, "whole numbers"),
        ("INT64", 1.0, "whole numbers"),
        ("UINT8", 256, "outside the range"),
        ("UINT8", -1, "outside the range"),
        ("FP16", 70000, "outside the range"),
        ("INT64", 10**30, "INT64"),
        ("BOOL", 1, "true or false"),
        ("BYTES", 1, "strings"),
        ("BYTES", {"b64": "?"}, "not base64"),
        ("BYTES", {"b64": 3}, "b64"),
        ("BYTES", {"b64": "AA==", "c": 1}, "b64"),
    ],
)
def test_a_value_that_is_not_of_its_type_is_refused(datatype: str, value: Any, words: str) -> None:
    engine = an_engine([Tensor("x", datatype, (-1,))], [Tensor("y", datatype, (-1,))])
    with served(engine) as client:
        answer = client.post("/v1/models/m:predict", content=json.dumps({"inputs": {"x": [value]}}))
        assert words in refusal(answer)


def test_a_text_model_says_that_it_takes_no_tensors_of_that_kind() -> None:
    engine = an_engine([], [])
    with served(engine) as client:
        answer = client.post("/v1/models/m:predict", json={"instances": [1]})
        assert "takes no tensors" in refusal(answer)


# Classify and regress


def test_classify_gives_each_class_and_its_score(colours: httpx.Client) -> None:
    body = {"examples": [{"x": [0.5, 0.25, 0.125]}, {"x": [1, 2, 3]}]}
    assert ok(colours.post("/v1/models/colours:classify", json=body)) == {
        "results": [
            [["red", 0.5], ["green", 0.25], ["blue", 0.125]],
            [["red", 1.0], ["green", 2.0], ["blue", 3.0]],
        ]
    }


def test_classes_without_names_are_numbered() -> None:
    scores = np.array([[0.25, 0.75]])
    engine = an_engine(
        [Tensor("x", "FP32", (-1,))],
        [Tensor("label", "INT64", (-1,)), Tensor("probability", "FP64", (-1, 2))],
        [np.array([1]), scores],
    )
    with served(engine) as client:
        answer = client.post("/v1/models/m:classify", json={"examples": [{"x": [3]}]})
        assert ok(answer) == {"results": [[["0", 0.25], ["1", 0.75]]]}
    assert engine.requests[0].outputs == ("probability",)
    assert engine.requests[0].inputs["x"].tolist() == [3.0]


def test_regress_gives_one_number_for_each_example(total: httpx.Client) -> None:
    body = {"examples": [{"x": [1, 2, 3]}, {"x": [4, 5, 6]}], "signature_name": "serving_default"}
    assert ok(total.post("/v1/models/sum:regress", json=body)) == {"results": [6.0, 15.0]}


def test_a_context_holds_features_of_every_example() -> None:
    inputs = [Tensor("a", "FP32", (-1, 1)), Tensor("word", "BYTES", (-1,))]
    engine = an_engine(inputs, [Tensor("value", "FP32", (-1, 1))], [np.array([[1.5], [2.5]])])
    with served(engine) as client:
        body = {"context": {"word": "w", "a": 0}, "examples": [{"a": 1}, {"a": [2], "word": ["v"]}]}
        assert ok(client.post("/v1/models/m:regress", json=body)) == {"results": [1.5, 2.5]}
    assert engine.requests[0].inputs["a"].tolist() == [[1.0], [2.0]]
    assert engine.requests[0].inputs["word"].tolist() == [b"w", b"v"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "examples must be"),
        ({"examples": []}, "examples must be"),
        ({"examples": {"x": [1, 2, 3]}}, "examples must be"),
        ({"examples": [3]}, "examples[0]"),
        ({"examples": [{"x": [1, 2, 3]}], "context": 3}, "context"),
        ({"examples": [{"y": 1}]}, "'x'"),
        ({"examples": [{}]}, "lacks 'x'"),
        ({"examples": [{"x": [1, 2]}]}, "got [1, 2]"),
        ({"examples": [{"x": [1, 2, 3]}, {"x": 3}]}, "ragged"),
    ],
)
def test_what_is_wrong_with_examples_is_said(
    colours: httpx.Client, body: dict[str, Any], words: str
) -> None:
    assert words in refusal(colours.post("/v1/models/colours:classify", json=body))


def test_a_model_without_scores_or_a_value_says_so(
    total: httpx.Client, colours: httpx.Client
) -> None:
    body = {"examples": [{"x": [1, 2, 3]}]}
    assert "classify needs" in refusal(total.post("/v1/models/sum:classify", json=body))
    assert "regress needs" in refusal(colours.post("/v1/models/colours:regress", json=body))


# Paths


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/sum:predict",
        "/V1/Models/sum:PREDICT",
        "/v1/models/sum/versions/3:predict",
        "/v1/models/sum/Versions/3:Predict",
        "/v1/models/sum/labels/stable:predict",
    ],
)
def test_paths_name_versions_and_labels_in_any_case(path: str) -> None:
    engine = sum_engine()
    with served(engine, Labelled(engine)) as client:
        answer = ok(client.post(path, json={"instances": [[1, 2, 3]]}))
    assert answer["predictions"][0]["total"] == 6


class Labelled(SingleCatalog):
    """Its version is called stable, too."""

    def models(self) -> Any:
        model = super().models()[0]
        version = model.versions[0]
        return [replace(model, versions=(replace(version, labels=("stable",)),))]


def test_the_edge_knows_which_version_a_label_means(total: httpx.Client) -> None:
    path, body = "/v1/models/sum/labels/blue:predict", {"instances": [[1, 2, 3]]}
    assert "label: blue" in refusal(total.post(path, json=body))
    headers = {"x-shoal-backend": "sum--3--1a2b3c4d"}
    assert ok(total.post(path, json=body, headers=headers))
    other = {"x-shoal-backend": "sum--4--1a2b3c4d"}
    assert refusal(total.post(path, json=body, headers=other))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/models/other:predict", "Servable not found for request: Latest(other)"),
        ("/v1/models/SUM:predict", "Servable not found for request: Latest(SUM)"),
        ("/v1/models/sum/versions/9:predict", "Could not find version 9 of model sum"),
        ("/v1/models/sum:invent", ""),
    ],
)
def test_what_is_not_there_is_404(total: httpx.Client, path: str, words: str) -> None:
    answer = total.post(path, json={"instances": [[1, 2, 3]]}, headers=TENSORFLOW)
    assert words in refusal(answer, 404 if "invent" not in path else answer.status_code)
    assert answer.status_code in (404, 405)


def test_there_are_no_explanations(total: httpx.Client) -> None:
    answer = total.post("/v1/models/sum:explain", json={"instances": [[1, 2, 3]]})
    assert "no explainer" in refusal(answer, 501)
    refusal(total.post("/v1/models/other:explain", json={}), 404)


def test_a_model_that_does_not_exist_has_no_status_nor_metadata(total: httpx.Client) -> None:
    for page in ("", "/metadata"):
        answer = total.get(f"/v1/models/other{page}", headers=TENSORFLOW)
        assert refusal(answer, 404) == "Could not find any versions of model other"
        answer = total.get(f"/v1/models/sum/versions/9{page}", headers=TENSORFLOW)
        assert refusal(answer, 404) == "Could not find version 9 of model sum"


# Status and metadata


def test_the_status_on_its_own_listener_is_tf_servings_alone(total: httpx.Client) -> None:
    expected = {
        "model_version_status": [
            {
                "version": "3",
                "state": "AVAILABLE",
                "status": {"error_code": "OK", "error_message": ""},
            }
        ]
    }
    for path in ("/v1/models/sum", "/v1/models/sum/versions/3"):
        assert ok(total.get(path, headers=TENSORFLOW)) == expected
    assert ok(total.get("/v1/models/sum/versions/3")) == expected
    assert "Missing model name" in refusal(total.get("/v1/models", headers=TENSORFLOW))


def test_the_status_on_the_shared_port_carries_the_keys_of_all(total: httpx.Client) -> None:
    page = ok(total.get("/v1/models/sum"))
    assert (page["name"], page["ready"]) == ("sum", True)
    assert (page["id"], page["object"]) == ("sum", "model")
    assert page["model_version_status"][0]["state"] == "AVAILABLE"
    assert ok(total.get("/v1/models"))["models"] == ["sum"]
    assert ok(total.get("/")) == {"status": "alive"}


@pytest.mark.parametrize(
    ("state", "shown", "status"),
    [
        (VersionState.STARTING, "LOADING", 503),
        (VersionState.READY, "AVAILABLE", 200),
        (VersionState.IDLE, "AVAILABLE", 200),
        (VersionState.FAILED, "END", 503),
        (VersionState.STOPPING, "UNLOADING", 503),
    ],
)
def test_the_state_is_told_and_kserve_reads_503_when_it_is_not_ready(
    state: VersionState, shown: str, status: int
) -> None:
    engine = sum_engine()
    with served(engine, SingleCatalog(engine, state=state)) as client:
        own = ok(client.get("/v1/models/sum", headers=TENSORFLOW))
        shared = client.get("/v1/models/sum")
    version = own["model_version_status"][0]
    assert version["state"] == shown
    assert version["status"]["error_code"] == ("INTERNAL" if shown == "END" else "OK")
    assert shared.status_code == status
    assert shared.json()["ready"] is (status == 200)


def test_metadata_describes_the_signature(colours: httpx.Client) -> None:
    def tensor(name: str) -> dict[str, Any]:
        dims = [{"size": "-1", "name": ""}, {"size": "3", "name": ""}]
        shape = {"dim": dims, "unknown_rank": False}
        return {"dtype": "DT_FLOAT", "tensor_shape": shape, "name": f"{name}:0"}

    for path in ("/v1/models/colours/metadata", "/v1/models/colours/versions/1/METADATA"):
        assert ok(colours.get(path)) == {
            "model_spec": {"name": "colours", "signature_name": "", "version": "1"},
            "metadata": {
                "signature_def": {
                    "signature_def": {
                        "serving_default": {
                            "inputs": {"x": tensor("x")},
                            "outputs": {"scores": tensor("scores")},
                            "method_name": "tensorflow/serving/predict",
                            "defaults": {},
                        }
                    }
                }
            },
        }


# Failures


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (Fault.INVALID, 400),
        (Fault.UNAUTHENTICATED, 401),
        (Fault.FORBIDDEN, 403),
        (Fault.NOT_FOUND, 404),
        (Fault.CONFLICT, 409),
        (Fault.OVERLOADED, 429),
        (Fault.UNIMPLEMENTED, 501),
        (Fault.UNAVAILABLE, 503),
        (Fault.DEADLINE, 504),
        (Fault.INTERNAL, 500),
    ],
)
def test_each_fault_has_its_status(fault: Fault, status: int) -> None:
    engine = sum_engine()
    engine.failure = InferenceError(fault, "why it failed", retry_after_s=3)
    with served(engine) as client:
        answer = client.post("/v1/models/sum:predict", json={"instances": [[1, 2, 3]]})
    assert refusal(answer, status) == "why it failed"
    assert answer.headers["retry-after"] == "3"


def test_the_callers_deadline_reaches_the_engine() -> None:
    engine = sum_engine()
    with served(engine) as client:
        body = {"instances": [[1, 2, 3]]}
        headers = {"x-request-timeout-ms": "1500"}
        ok(client.post("/v1/models/sum:predict", json=body, headers=headers))
        headers = {"x-request-timeout-ms": "soon"}
        refusal(client.post("/v1/models/sum:predict", json=body, headers=headers))
    assert engine.requests[0].deadline_s is not None
    assert len(engine.requests) == 1


def test_without_an_engine_inference_is_left_to_the_front_desk() -> None:
    catalog = SingleCatalog(WordsEngine())
    app = Application(catalog, None, [TensorFlowServing(catalog, None)], ready=lambda: True)
    with live(app) as server, httpx.Client(base_url=server.url) as client:
        assert ok(client.get("/v1/models/words/metadata"))
        answer = client.post("/v1/models/words:predict", json={})
        assert answer.status_code in (404, 405)


# Whatever comes, nothing breaks

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["x", "b64", "AA=="]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["x", "b64", "in_int8", "instances"]) | st.text(max_size=3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)
bodies = anything | st.dictionaries(
    st.sampled_from(["instances", "inputs", "examples", "context", "signature_name"]), anything
)
VERBS = ("predict", "classify", "regress", "explain")


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=bodies, verb=st.sampled_from(VERBS))
def test_any_json_gets_an_answer_or_a_reason(
    total: httpx.Client, every: httpx.Client, body: Any, verb: str
) -> None:
    content = json.dumps(body).encode()
    for client, model in ((total, "sum"), (every, "every")):
        answer = client.post(f"/v1/models/{model}:{verb}", content=content)
        assert answer.status_code < 500 or answer.status_code == 501
        if answer.status_code >= 400:
            refusal(answer, answer.status_code)


@settings(deadline=None, max_examples=100)
@given(content=st.binary(max_size=60), verb=st.sampled_from(VERBS[:3]))
def test_any_bytes_get_an_answer_or_a_reason(
    total: httpx.Client, content: bytes, verb: str
) -> None:
    answer = total.post(f"/v1/models/sum:{verb}", content=content)
    refusal(answer, 400)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(*(st.floats(width=32, allow_nan=False, allow_infinity=False),) * 3),
        min_size=1,
        max_size=5,
    )
)
def test_numbers_come_back_as_they_went(
    colours: httpx.Client, rows: list[tuple[float, ...]]
) -> None:
    answer = ok(colours.post("/v1/models/colours:predict", json={"instances": rows}))
    assert np.array(answer["predictions"], "f4").tolist() == [list(r) for r in rows]
