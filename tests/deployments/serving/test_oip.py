"""Do the official HTTP clients of the Open Inference Protocol find what they know?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from deployments.inference import (
    Engine,
    Fault,
    InferenceError,
    InferenceResponse,
    Signature,
    Statistics,
    Tensor,
    VersionState,
)
from deployments.serving.application import Application
from deployments.serving.protocols.oip import INFERENCE_TEMPLATES, OpenInference
from deployments.serving.protocols.oip_messages import top_classes
from tests.deployments.serving.engines import (
    NumpyEngine,
    SingleCatalog,
    WordsEngine,
    classes_engine,
    every_engine,
    sum_engine,
)
from tests.deployments.serving.live import Live, eventually, live

ROWS = np.array([[1, 2, 3], [4, 5, 6]], np.float32)


class Shelf(SingleCatalog):
    """A catalog whose models can be loaded and unloaded, as the front desk's."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.asked: list[tuple[str, str, Mapping[str, Any]]] = []

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        self._ask("load", name, parameters)

    async def unload(self, name: str, parameters: Mapping[str, Any]) -> None:
        self._ask("unload", name, parameters)

    def _ask(self, verb: str, name: str, parameters: Mapping[str, Any]) -> None:
        if self.model(name) is None:
            raise InferenceError(Fault.NOT_FOUND, f"Request for unknown model: {name!r}")
        self.asked.append((verb, name, parameters))


@dataclass(frozen=True, slots=True)
class Served:
    """A model behind a live server, and two clients of it."""

    catalog: Shelf
    live: Live
    triton: Any
    http: httpx.Client

    def infer(self, path: str = "sum/infer", **changes: Any) -> httpx.Response:
        """A JSON request with two rows, and what the test changes in it."""
        x = {"name": "x", "shape": [2, 3], "datatype": "FP32", "data": ROWS.tolist()}
        return self.http.post(f"/v2/models/{path}", json={"inputs": [x], **changes})


@contextmanager
def served(engine: Engine, *, with_engine: bool = True) -> Iterator[Served]:
    catalog = Shelf(engine)
    own = engine if with_engine else None
    application = Application(
        catalog, own, [OpenInference(catalog, own)], ready=lambda: True, body_bytes_max=1 << 20
    )
    with live(application) as server, httpx.Client(base_url=server.url) as http:
        client = triton.InferenceServerClient(server.address)
        yield Served(catalog, server, client, http)
        client.close()


@pytest.fixture(scope="module")
def here() -> Iterator[Served]:
    with served(sum_engine()) as made:
        yield made


def tensor(name: str, values: NDArray[Any], datatype: str, *, binary: bool = True) -> Any:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, binary_data=binary)
    return made


# --- tritonclient


def test_triton_finds_server_and_model(here: Served) -> None:
    client = here.triton
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("sum")
    assert client.is_model_ready("sum", "3")
    assert not client.is_model_ready("sum", "4")
    assert not client.is_model_ready("other")
    metadata = client.get_server_metadata()
    assert metadata["name"] == "shoal"
    assert "binary_tensor_data" in metadata["extensions"]
    assert client.get_model_metadata("sum", "3") == {
        "name": "sum",
        "versions": ["3"],
        "platform": "numpy",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
        "outputs": [
            {"name": "total", "datatype": "FP32", "shape": [-1]},
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
        ],
    }


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_triton_infers_with_binary_and_json_tensors(
    here: Served, binary_in: bool, binary_out: bool | None
) -> None:
    wanted = None
    if binary_out is not None:
        wanted = [triton.InferRequestedOutput(n, binary_out) for n in ("total", "label")]
    inputs = [tensor("x", ROWS, "FP32", binary=binary_in)]
    answer = here.triton.infer("sum", inputs, outputs=wanted, request_id="r7")
    assert answer.as_numpy("total").tolist() == [6, 15]
    assert answer.as_numpy("total").dtype == np.float32
    labels = answer.as_numpy("label").tolist()
    assert [e if isinstance(e, bytes) else e.encode() for e in labels] == [b"row 0", b"row 1"]
    assert answer.get_response()["id"] == "r7"
    assert answer.get_response()["model_version"] == "3"


def test_triton_may_want_one_output_binary_and_another_as_json(here: Served) -> None:
    wanted = [
        triton.InferRequestedOutput("total", binary_data=True),
        triton.InferRequestedOutput("label", binary_data=False),
    ]
    answer = here.triton.infer("sum", [tensor("x", ROWS, "FP32")], outputs=wanted)
    total, label = answer.get_response()["outputs"]
    assert total["parameters"] == {"binary_data_size": 8}
    assert label["data"] == ["row 0", "row 1"]


@pytest.mark.parametrize("packed", [None, "gzip", "deflate"])
@pytest.mark.parametrize("wanted", [None, "gzip", "deflate"])
def test_triton_compresses_either_way(here: Served, packed: str | None, wanted: str | None) -> None:
    rows = np.ones((2000, 3), np.float32)
    answer = here.triton.infer(
        "sum",
        [tensor("x", rows, "FP32")],
        request_compression_algorithm=packed,
        response_compression_algorithm=wanted,
    )
    assert answer.as_numpy("total").tolist() == [3] * 2000


def test_triton_sends_every_datatype_and_gets_it_back() -> None:
    engine = every_engine()
    values: dict[str, NDArray[Any]] = {}
    for form in engine.signature.inputs:
        values[form.name] = np.array([[0, 1]]).astype(np.dtype(_numpy(form.datatype)))
    values["in_bytes"] = np.array([[b"a\0", b"\xff"]], object)
    with served(engine) as there:
        inputs = [
            tensor(form.name, values[form.name], form.datatype) for form in engine.signature.inputs
        ]
        answer = there.triton.infer("every", inputs)
        for form in engine.signature.inputs:
            back = answer.as_numpy(form.name.replace("in_", "out_"))
            assert back.dtype == values[form.name].dtype
            assert back.tolist() == values[form.name].tolist()


def _numpy(datatype: str) -> str:
    names = {"BOOL": "bool", "FP16": "float16", "FP32": "float32", "FP64": "float64"}
    return names.get(datatype, "object" if datatype == "BYTES" else datatype.lower())


def test_triton_sends_bf16() -> None:
    signature = Signature((Tensor("x", "BF16", (-1, 2)),), (Tensor("y", "BF16", (-1, 2)),))
    engine = NumpyEngine(signature, lambda inputs: {"y": inputs["x"] + inputs["x"]}, model="twice")
    with served(engine) as there:
        answer = there.triton.infer(
            "twice", [tensor("x", ROWS[:, :2].astype(ml_dtypes.bfloat16), "BF16")]
        )
        assert engine.requests[0].inputs["x"].dtype == ml_dtypes.bfloat16
        assert answer.as_numpy("y").tolist() == [[2, 4], [8, 10]]


def test_triton_gets_top_classes() -> None:
    with served(classes_engine()) as there:
        answer = there.triton.infer(
            "colours",
            [tensor("x", np.array([[0.1, 0.7, 0.2]], np.float32), "FP32")],
            outputs=[triton.InferRequestedOutput("scores", class_count=2)],
        )
        assert answer.as_numpy("scores").tolist() == [[b"0.700000:1:green", b"0.200000:2:blue"]]


def test_triton_passes_its_parameters_on(here: Served) -> None:
    engine = here.catalog.engine
    assert isinstance(engine, NumpyEngine)
    here.triton.infer(
        "sum",
        [tensor("x", ROWS, "FP32")],
        priority=2,
        sequence_id=5,
        sequence_start=True,
        timeout=10_000_000,
        parameters={"colour": "red"},
    )
    request = engine.requests[-1]
    assert request.deadline_s is not None
    assert dict(request.parameters) == {
        "priority": 2,
        "sequence_id": 5,
        "sequence_start": True,
        "sequence_end": False,
        "colour": "red",
    }


def test_triton_reads_statistics_configuration_and_index(here: Served) -> None:
    here.catalog.statistics = Statistics(
        inference_count=9, execution_count=2, success_count=5, success_ns=50, queue_ns=7,
        compute_ns=30, last_inference_ms=1234, batches=((1, 1, 10), (8, 1, 20)),
    )  # fmt: skip
    for model, version in (("", ""), ("sum", ""), ("sum", "3")):
        (stats,) = here.triton.get_inference_statistics(model, version)["model_stats"]
        assert (stats["name"], stats["version"]) == ("sum", "3")
        assert stats["inference_count"] == 9
        assert stats["inference_stats"]["success"] == {"count": 5, "ns": 50}
        assert stats["batch_stats"][1]["compute_infer"] == {"count": 1, "ns": 20}
    config = here.triton.get_model_config("sum")
    assert config["max_batch_size"] == 8
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [3]}]
    assert config["output"][1]["data_type"] == "TYPE_STRING"
    assert here.triton.get_model_repository_index() == [
        {"name": "sum", "version": "3", "state": "READY", "reason": ""}
    ]


def test_triton_loads_and_unloads(here: Served) -> None:
    here.triton.load_model("sum", config='{"max_batch_size": 4}', files={"file:1/m": b"weights"})
    here.triton.unload_model("sum", unload_dependents=True)
    (_, _, loaded), unloaded = here.catalog.asked
    assert loaded["config"] == '{"max_batch_size": 4}'
    assert set(loaded) == {"config", "file:1/m"}
    assert unloaded == ("unload", "sum", {"unload_dependents": True})
    with pytest.raises(InferenceServerException, match="unknown model"):
        here.triton.load_model("other")


def test_triton_reads_settings_that_are_kept_elsewhere(here: Served) -> None:
    assert here.triton.get_trace_settings()["trace_level"] == ["OFF"]
    assert here.triton.get_trace_settings("sum")["trace_mode"] == "triton"
    assert here.triton.get_log_settings()["log_info"] is True
    assert here.triton.get_system_shared_memory_status() == []
    assert here.triton.get_cuda_shared_memory_status() == []
    here.triton.unregister_system_shared_memory()
    refusals: list[Callable[[], object]] = [
        lambda: here.triton.update_trace_settings(settings={"trace_rate": "1"}),
        lambda: here.triton.update_log_settings({"log_info": False}),
        lambda: here.triton.register_system_shared_memory("r", "/key", 64),
        lambda: here.triton.register_cuda_shared_memory("r", b"handle", 0, 64),
    ]
    for refused in refusals:
        with pytest.raises(InferenceServerException) as raised:
            refused()
        assert raised.value.status() == "501"


def test_an_unknown_model_is_404_in_the_words_that_triton_looks_for(here: Served) -> None:
    inputs = [tensor("x", ROWS, "FP32")]
    calls: list[Callable[[], object]] = [
        lambda: here.triton.infer("other", inputs),
        lambda: here.triton.infer("sum", inputs, model_version="9"),
        lambda: here.triton.get_model_metadata("other"),
        lambda: here.triton.get_model_config("other"),
        lambda: here.triton.get_inference_statistics("other"),
    ]
    for call in calls:
        with pytest.raises(InferenceServerException) as raised:
            call()
        assert raised.value.status() == "404"
        assert raised.value.message().startswith("Request for unknown model")


async def test_triton_aio_infers(here: Served) -> None:
    async with triton_aio.InferenceServerClient(here.live.address) as client:
        assert await client.is_model_ready("sum")
        answer = await client.infer("sum", [tensor("x", ROWS, "FP32")])
        assert answer.as_numpy("total").tolist() == [6, 15]


def test_triton_sends_raw_bodies(here: Served) -> None:
    one = np.array([1, 2, 3], np.float32).tobytes()
    raw = {"inference-header-content-length": "0"}
    answer = here.http.post("/v2/models/sum/infer", content=one, headers=raw)
    size = int(answer.headers["inference-header-content-length"])
    header = json.loads(answer.content[:size])
    assert [o["parameters"]["binary_data_size"] for o in header["outputs"]] == [4, 9]
    assert answer.content[size:] == np.float32(6).tobytes() + b"\5\0\0\0row 0"
    with served(WordsEngine()) as there:
        refused = there.http.post("/v2/models/words/infer", content=one, headers=raw)
        assert "exactly one input" in refused.json()["error"]


def test_a_raw_body_fills_the_one_variable_length() -> None:
    signature = Signature((Tensor("x", "INT16", (-1, 2, -1)),), ())
    engine = NumpyEngine(signature, lambda inputs: {"shape": np.array(inputs["x"].shape)})
    raw = {"inference-header-content-length": "0"}
    with served(engine) as there:
        sent = there.http.post("/v2/models/sum/infer", content=b"\0" * 12, headers=raw)
        assert sent.status_code == 200
        assert engine.requests[0].inputs["x"].shape == (1, 2, 3)
        wrong = there.http.post("/v2/models/sum/infer", content=b"\0" * 13, headers=raw)
        assert "needs 12" in wrong.json()["error"]


# --- kserve (its messages have the names of Triton's, so that one process can't hold both)

KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceRESTClient, RESTConfig, InferRequest, InferInput

async def main(url):
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    found = [
        await client.is_server_live(url),
        await client.is_server_ready(url),
        await client.is_model_ready(url, "sum"),
    ]
    for binary in (False, True):
        x = InferInput("x", [2, 3], "FP32")
        x.set_data_from_numpy(np.array([[1, 2, 3], [4, 5, 6]], np.float32), binary_data=binary)
        request = InferRequest("sum", [x], request_id="k1")
        answer = await client.infer(url, request, model_name="sum")
        found.append([answer.id, answer.outputs[0].as_numpy().tolist()])
    print(json.dumps(found))

asyncio.run(main(sys.argv[1]))
"""


def test_kserve_finds_the_model_and_infers(here: Served) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KSERVE, here.live.url], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers == [True, True, True, ["k1", [6, 15]], ["k1", [6, 15]]]


def test_kserve_lists_models_and_reads_ready_bodies(here: Served) -> None:
    assert here.http.get("/v2/models").json() == {"models": ["sum"]}
    assert here.http.get("/v2/health/live").json() == {"live": True}
    assert here.http.get("/v2/health/ready").json() == {"ready": True}
    assert here.http.get("/v2/models/sum/ready").json() == {"name": "sum", "ready": True}
    assert here.http.get("/v2/").json()["name"] == "shoal"


# --- plain requests


def test_flat_and_nested_data_mean_the_same(here: Served) -> None:
    flat = {"name": "x", "shape": [2, 3], "datatype": "FP32", "data": [1, 2, 3, 4, 5, 6]}
    for answer in (here.infer(id="a"), here.infer(id="a", inputs=[flat])):
        assert answer.json() == {
            "model_name": "sum",
            "model_version": "3",
            "id": "a",
            "outputs": [
                {"name": "total", "datatype": "FP32", "shape": [2], "data": [6.0, 15.0]},
                {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["row 0", "row 1"]},
            ],
        }


def test_only_the_outputs_asked_for_come_back(here: Served) -> None:
    names = [o["name"] for o in here.infer(outputs=[{"name": "total"}]).json()["outputs"]]
    assert names == ["total"]
    assert len(here.infer(outputs=[]).json()["outputs"]) == 2


def x(**changes: Any) -> list[dict[str, Any]]:
    form = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
    return [{k: v for k, v in {**form, **changes}.items() if v is not ...}]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inputs": None}, "inputs is missing"),
        ({"inputs": []}, "needs 'x'"),
        ({"inputs": [1]}, "each of inputs must be an object"),
        ({"inputs": x(name=...)}, "must have a name"),
        ({"inputs": x(name="z")}, "unexpected inference input 'z' for model 'sum'"),
        ({"inputs": x() + x()}, "given twice"),
        ({"inputs": x(datatype="FP8")}, "'FP8' must be one of"),
        ({"inputs": x(datatype="FP64")}, "expects 'FP32'"),
        ({"inputs": x(shape=[3, 1])}, "expected [-1, 3], got [3, 1]"),
        ({"inputs": x(shape="1")}, "must be a list of at most"),
        ({"inputs": x(data=...)}, "data null must be a list"),
        ({"inputs": x(data=[1, 2])}, "holds 2 elements"),
        ({"inputs": x(parameters=1)}, "parameters must be an object"),
        ({"inputs": x(parameters={"binary_data_size": -1})}, "must be a number of bytes"),
        ({"inputs": x(parameters={"binary_data_size": 12})}, "both data and binary_data_size"),
        ({"inputs": x(parameters={"binary_data_size": 12}, data=...)}, "only 0 bytes are left"),
        ({"inputs": x(parameters={"shared_memory_region": "r"})}, "shared memory"),
        ({"outputs": 1}, "outputs must be a list"),
        ({"outputs": [1]}, "each of outputs"),
        ({"outputs": [{"name": "z"}]}, "unexpected inference output 'z'"),
        ({"outputs": [{"name": "total", "parameters": {"binary_data": 1}}]}, "true or false"),
        ({"outputs": [{"name": "total", "parameters": {"classification": "2"}}]}, "of classes"),
        ({"outputs": [{"name": "label", "parameters": {"classification": 2}}]}, "no classes"),
        ({"id": 5}, "id 5 must be a string"),
        ({"parameters": []}, "parameters must be an object"),
        ({"parameters": {"a": [1]}}, "parameter 'a' must be"),
        ({"parameters": {"timeout": "soon"}}, "microseconds"),
        ({"parameters": {"priority": -1}}, "whole number"),
        ({"parameters": {"binary_data_output": 1}}, "true or false"),
        ({"parameters": {"triton_x": 1}}, "reserved"),
    ],
)
def test_a_refused_request_is_told_why(here: Served, changes: dict[str, Any], words: str) -> None:
    answer = here.infer(**changes)
    assert answer.status_code == 400
    assert words in answer.json()["error"]


@pytest.mark.parametrize(
    ("length", "words"),
    [
        ("abc", "must be a number of bytes"),
        ("-1", "must be a number of bytes"),
        ("5000", "is 5000 but the body has 2 bytes"),
        ("1", "not JSON"),
        ("2", "inputs is missing"),
    ],
)
def test_a_wrong_header_length_is_refused(here: Served, length: str, words: str) -> None:
    headers = {"inference-header-content-length": length}
    answer = here.http.post("/v2/models/sum/infer", content=b"{}", headers=headers)
    assert answer.status_code == 400
    assert words in answer.json()["error"]


def test_binary_data_that_belong_to_nobody_are_refused(here: Served) -> None:
    header = json.dumps({"inputs": x(parameters={"binary_data_size": 12}, data=...)}).encode()
    for surplus in (b"", b"\0"):
        answer = here.http.post(
            "/v2/models/sum/infer",
            content=header + b"\0" * 12 + surplus,
            headers={"inference-header-content-length": str(len(header))},
        )
        assert answer.status_code == (400 if surplus else 200)


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (Fault.OVERLOADED, 429),
        (Fault.DEADLINE, 504),
        (Fault.UNAVAILABLE, 503),
        (Fault.INVALID, 400),
    ],
)
def test_the_engines_faults_have_their_status(fault: Fault, status: int) -> None:
    engine = sum_engine()
    engine.failure = InferenceError(fault, "no", retry_after_s=2.4)
    with served(engine) as there:
        answer = there.infer()
        assert answer.status_code == status
        assert answer.json() == {"error": "no"}
        assert answer.headers["retry-after"] == "2"


def test_the_sooner_of_header_and_timeout_is_the_deadline(here: Served) -> None:
    engine = here.catalog.engine
    assert isinstance(engine, NumpyEngine)
    here.http.headers["x-request-timeout-ms"] = "5000"
    try:
        here.infer(parameters={"timeout": 60_000_000})
        later = engine.requests[-1].deadline_s
        here.infer(parameters={"timeout": 1})
        sooner = engine.requests[-1].deadline_s
        here.infer(parameters={"timeout": 0})
        none = engine.requests[-1].deadline_s
    finally:
        del here.http.headers["x-request-timeout-ms"]
    assert later is not None
    assert sooner is not None
    assert none is not None
    assert 4 < later - sooner < 6
    assert 4 < none - sooner < 6


def test_a_label_means_what_edge_or_catalog_say(here: Served) -> None:
    assert here.infer("sum/versions/stable/infer").status_code == 404
    here.http.headers["x-shoal-backend"] = "sum--3--1a2b3c4d"
    assert here.infer("sum/versions/stable/infer").status_code == 200
    here.http.headers["x-shoal-backend"] = "sum--4--1a2b3c4d"
    assert here.infer("sum/versions/stable/infer").status_code == 404
    del here.http.headers["x-shoal-backend"]


def test_what_is_not_ready_says_so() -> None:
    engine = sum_engine()
    with served(engine) as there:
        there.catalog.state = VersionState.FAILED
        assert there.http.get("/v2/models/sum/ready").status_code == 503
        assert there.http.get("/v2/health/ready").status_code == 503
        assert there.http.post("/v2/repository/index", json={"ready": True}).json() == []
        (entry,) = there.http.post("/v2/repository/index").json()
        assert entry["state"] == "UNAVAILABLE"
        assert there.http.post("/v2/repository/index", json={"ready": 1}).status_code == 400


def test_infinite_outputs_need_the_binary_form() -> None:
    engine = NumpyEngine(
        sum_engine().signature, lambda inputs: {"total": inputs["x"][:, 0] * np.float32(np.inf)}
    )
    with served(engine) as there:
        answer = there.infer()
        assert answer.status_code == 400
        assert "binary_data" in answer.json()["error"]
        binary = there.infer(parameters={"binary_data_output": True})
        assert binary.status_code == 200


def test_the_front_desk_answers_all_but_inference() -> None:
    with served(sum_engine(), with_engine=False) as there:
        assert there.triton.get_model_metadata("sum")["platform"] == "numpy"
        assert there.triton.is_server_ready()
        for template in INFERENCE_TEMPLATES:
            path = template.replace("{model}", "sum").replace("{version}", "3")
            assert there.http.post(path).status_code == 404


def test_a_version_that_was_never_loaded_has_no_metadata_yet() -> None:
    class Unknown(Shelf):
        def models(self) -> list[Any]:
            (model,) = super().models()
            return [replace(model, versions=(replace(model.versions[0], signature=None),))]

    engine = sum_engine()
    catalog = Unknown(engine)
    application = Application(catalog, None, [OpenInference(catalog, None)], ready=lambda: True)
    with live(application) as server:
        answer = httpx.get(f"{server.url}/v2/models/sum")
        assert answer.status_code == 503
        assert "never been loaded" in answer.json()["error"]


# --- text


@pytest.fixture(scope="module")
def words() -> Iterator[Served]:
    with served(WordsEngine()) as made:
        yield made


def generate(words: Served, verb: str = "generate", **body: Any) -> httpx.Response:
    return words.http.post(f"/v2/models/words/{verb}", json={"text_input": "a b c", **body})


def test_text_is_generated_whole(words: Served) -> None:
    assert generate(words, id="g1").json() == {
        "model_name": "words",
        "model_version": "1",
        "text_output": "A B C",
        "id": "g1",
        "details": {"finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 3},
    }


def test_options_stand_beside_the_text_or_in_parameters(words: Served) -> None:
    engine = words.catalog.engine
    assert isinstance(engine, WordsEngine)
    for body in (
        {"max_tokens": 2, "temperature": 0.5, "stop": ["x"], "stream": False},
        {"parameters": {"max_tokens": 2, "temperature": 0.5, "stop": ["x"]}},
    ):
        assert generate(words, **body).json()["text_output"] == "A B"
        assert engine.requests[-1].options == {"temperature": 0.5, "stop": ["x"]}


def test_text_is_streamed_in_events(words: Served) -> None:
    answer = generate(words, "generate_stream")
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert [e["text_output"] for e in events] == ["A", " B", " C"]
    assert "details" not in events[0]
    assert events[-1]["details"]["finish_reason"] == "stop"


def test_a_stream_that_fails_later_ends_with_an_error_event() -> None:
    engine = WordsEngine()
    engine.fail_after = 2
    with served(engine) as there:
        last = generate(there, "generate_stream").text.strip().split("\n\n")[-1]
        assert last == 'data: {"error":"the model lost its words"}'
        engine.fail_after = 0
        at_once = generate(there, "generate_stream")
        assert at_once.status_code == 500
        assert at_once.json() == {"error": "the model lost its words"}
        eventually(lambda: engine.closed == 2)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"text_input": 1}, "text_input, which is a string"),
        ({"max_tokens": 0}, "max_tokens 0 must be"),
        ({"max_tokens": True}, "max_tokens True must be"),
        ({"parameters": []}, "parameters must be an object"),
        ({"parameters": {"a": {}}}, "parameter 'a'"),
        ({"stop": [{}]}, "list of strings or numbers"),
        ({"id": 1}, "id 1 must be"),
        ({"timeout": -1}, "microseconds"),
    ],
)
def test_a_refused_text_request_is_told_why(words: Served, body: dict[str, Any], said: str) -> None:
    for verb in ("generate", "generate_stream"):
        answer = generate(words, verb, **body)
        assert answer.status_code == 400
        assert said in answer.json()["error"]


def test_triton_generates_with_tensors(words: Served) -> None:
    inputs = [
        tensor("text_input", np.array([[b"a b c"]], object), "BYTES"),
        tensor("max_tokens", np.array([[2]], np.int32), "INT32"),
        tensor("sampling_parameters", np.array([b'{"temperature": 0}'], object), "BYTES"),
    ]
    answer = words.triton.infer("words", inputs, request_id="t")
    assert answer.as_numpy("text_output").tolist() == [b"A B"]
    assert answer.get_response()["id"] == "t"
    for wrong in (inputs[1:], [tensor("text_input", np.array([b"a", b"b"], object), "BYTES")]):
        with pytest.raises(InferenceServerException, match="text_input"):
            words.triton.infer("words", wrong)


def test_a_model_without_text_refuses_to_generate(here: Served) -> None:
    answer = here.http.post("/v2/models/sum/generate", json={"text_input": "a"})
    assert answer.status_code == 400
    assert "does not generate" in answer.json()["error"]


# --- pieces


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (np.array([[0.25, 0.75]], np.float32), [[b"0.750000:1:no", b"0.250000:0:yes"]]),
        (np.array([0.5, 0.25]), [[b"0.500000:0:yes"], [b"0.250000:0:yes"]]),
        (np.array([[3, 9, 9]], np.int32), [[b"9:1:no", b"9:2"]]),
        (np.empty((0, 2), np.float32), []),
    ],
)
def test_top_classes_are_the_highest_scores(scores: NDArray[Any], expected: list[Any]) -> None:
    assert top_classes("y", scores, 2, ("yes", "no")).tolist() == expected


def test_the_engines_own_parameters_come_back() -> None:
    class Telling(NumpyEngine):
        async def infer(self, request: Any) -> InferenceResponse:
            answer = await super().infer(request)
            answer.parameters = {"cached": True}
            return answer

    made = sum_engine()
    engine = Telling(made.signature, made._compute)
    with served(engine) as there:
        assert there.infer().json()["parameters"] == {"cached": True}
