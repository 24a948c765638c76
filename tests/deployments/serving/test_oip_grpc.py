"""Do the official gRPC clients of the Open Inference Protocol find what they know?"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from deployments.inference import Engine, Fault, InferenceError, Signature, Statistics, Tensor
from deployments.serving.protocols.oip_grpc import Forwarder, Metadata, start_server
from tests.deployments.serving.engines import (
    NumpyEngine,
    SingleCatalog,
    WordsEngine,
    classes_engine,
    every_engine,
    sum_engine,
)
from tests.deployments.serving.live import eventually, running_loop

ROWS = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
SERVICE = "/inference.GRPCInferenceService/"
MESSAGE_BYTES_MAX = 1 << 20


@dataclass(slots=True)
class Served:
    """A live gRPC server and ways to call it."""

    catalog: SingleCatalog
    address: str
    loop: asyncio.AbstractEventLoop
    triton: Any
    channel: Any
    ongoing: int = 0
    seen: list[Fault | None] = field(default_factory=list)

    def count(self, change: int) -> None:
        self.ongoing += change

    def infer(self, request: Any, **options: Any) -> Any:
        """ModelInfer with a message, or with any bytes."""
        data = request if isinstance(request, bytes) else request.SerializeToString()
        call = self.channel.unary_unary(f"{SERVICE}ModelInfer")
        return service_pb2.ModelInferResponse.FromString(call(data, timeout=20, **options))

    def refusal(self, request: Any, **options: Any) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as raised:
            self.infer(request, **options)
        return raised.value.code(), raised.value.details()

    def on_loop(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)


@contextmanager
def served(
    engine: Engine,
    *,
    edge_token: str | None = None,
    forwarder: Forwarder | None = None,
) -> Iterator[Served]:
    catalog = SingleCatalog(engine)
    with running_loop() as loop:
        made = Served(catalog, "", loop, None, None)
        server, port = made.on_loop(
            start_server(
                catalog,
                None if forwarder else engine,
                "127.0.0.1",
                0,
                edge_token=edge_token,
                message_bytes_max=MESSAGE_BYTES_MAX,
                observe=lambda protocol, fault, seconds: made.seen.append(fault),
                count=made.count,
                forwarder=forwarder,
            )
        )
        made.address = f"127.0.0.1:{port}"
        made.triton = triton.InferenceServerClient(made.address)
        made.channel = grpc.insecure_channel(made.address)
        try:
            yield made
        finally:
            made.triton.close()
            made.channel.close()
            made.on_loop(server.stop(0))


@pytest.fixture(scope="module")
def here() -> Iterator[Served]:
    with served(sum_engine()) as made:
        yield made


@pytest.fixture(scope="module")
def words() -> Iterator[Served]:
    with served(WordsEngine()) as made:
        yield made


def tensor(name: str, values: NDArray[Any], datatype: str) -> Any:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values)
    return made


def text(prompt: bytes) -> Any:
    return tensor("text_input", np.array([prompt], object), "BYTES")


def typed(**changes: Any) -> Any:
    """A request with typed contents: one row for the summing model."""
    contents = service_pb2.InferTensorContents(fp32_contents=[1, 2, 3])
    form = {"name": "x", "datatype": "FP32", "shape": [1, 3], "contents": contents, **changes}
    entry = service_pb2.ModelInferRequest.InferInputTensor(
        **{k: v for k, v in form.items() if v is not None}
    )
    return service_pb2.ModelInferRequest(model_name="sum", inputs=[entry])


# --- tritonclient


def test_triton_finds_server_and_model(here: Served) -> None:
    client = here.triton
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("sum")
    assert not client.is_model_ready("sum", "9")
    assert not client.is_model_ready("other")
    metadata = client.get_server_metadata()
    assert metadata.name == "shoal"
    assert "statistics" in metadata.extensions
    model = client.get_model_metadata("sum")
    assert (model.name, list(model.versions), model.platform) == ("sum", ["3"], "numpy")
    assert [(t.name, t.datatype, list(t.shape)) for t in model.inputs] == [("x", "FP32", [-1, 3])]


def test_triton_infers(here: Served) -> None:
    answer = here.triton.infer("sum", [tensor("x", ROWS, "FP32")], request_id="r7")
    assert answer.as_numpy("total").tolist() == [6, 15]
    assert answer.as_numpy("label").tolist() == [b"row 0", b"row 1"]
    message = answer.get_response()
    assert (message.id, message.model_name, message.model_version) == ("r7", "sum", "3")
    one = here.triton.infer(
        "sum", [tensor("x", ROWS, "FP32")], outputs=[triton.InferRequestedOutput("label")]
    )
    assert [o.name for o in one.get_response().outputs] == ["label"]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_triton_compresses(here: Served, algorithm: str) -> None:
    inputs = [tensor("x", np.ones((500, 3), np.float32), "FP32")]
    answer = here.triton.infer("sum", inputs, compression_algorithm=algorithm)
    assert answer.as_numpy("total").tolist() == [3] * 500


def test_triton_infers_asynchronously(here: Served) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    for row in range(8):
        here.triton.async_infer(
            "sum",
            [tensor("x", ROWS[:1] * row, "FP32")],
            callback=lambda result, error: answers.put((result, error)),
            request_id=str(row),
        )
    for _ in range(8):
        result, error = answers.get(timeout=20)
        assert error is None
        assert result.as_numpy("total").tolist() == [6 * int(result.get_response().id)]


def test_triton_aio_infers_and_streams(here: Served) -> None:
    async def talk() -> tuple[list[float], list[float]]:
        async with triton_aio.InferenceServerClient(here.address) as client:
            one = await client.infer("sum", [tensor("x", ROWS, "FP32")])

            async def requests() -> AsyncIterator[dict[str, Any]]:
                for row in range(5):
                    yield {"model_name": "sum", "inputs": [tensor("x", ROWS[:1] * row, "FP32")]}

            totals = []
            async for result, error in client.stream_infer(requests()):
                assert error is None
                totals += result.as_numpy("total").tolist()
            return one.as_numpy("total").tolist(), totals

    assert here.on_loop(talk()) == ([6, 15], [0, 6, 12, 18, 24])


def test_triton_sends_every_datatype_and_gets_it_back() -> None:
    engine = every_engine()
    with served(engine) as there:
        values = {
            form.name: np.array([[0, 1]]).astype(_numpy(form.datatype))
            for form in engine.signature.inputs
        }
        values["in_bytes"] = np.array([[b"a\0", b"\xff"]], object)
        answer = there.triton.infer(
            "every",
            [tensor(f.name, values[f.name], f.datatype) for f in engine.signature.inputs],
        )
        for name, sent in values.items():
            back = answer.as_numpy(name.replace("in_", "out_"))
            assert back.dtype == sent.dtype
            assert back.tolist() == sent.tolist()


def _numpy(datatype: str) -> str:
    names = {"BOOL": "bool", "FP16": "float16", "FP32": "float32", "FP64": "float64"}
    return names.get(datatype, "object" if datatype == "BYTES" else datatype.lower())


def test_triton_gets_top_classes() -> None:
    with served(classes_engine()) as there:
        answer = there.triton.infer(
            "colours",
            [tensor("x", np.array([[0.1, 0.7, 0.2]], np.float32), "FP32")],
            outputs=[triton.InferRequestedOutput("scores", class_count=1)],
        )
        assert answer.as_numpy("scores").tolist() == [[b"0.700000:1:green"]]


def test_triton_passes_its_parameters_on(here: Served) -> None:
    engine = here.catalog.engine
    assert isinstance(engine, NumpyEngine)
    here.triton.infer(
        "sum",
        [tensor("x", ROWS, "FP32")],
        priority=2,
        timeout=10_000_000,
        client_timeout=5,
        parameters={"colour": "red", "n": 2},
    )
    request = engine.requests[-1]
    assert dict(request.parameters) == {"priority": 2, "colour": "red", "n": 2}
    assert request.deadline_s is not None
    plain = here.infer(typed())
    assert plain.model_name == "sum"
    assert engine.requests[-1].deadline_s is not None  # the call's own, of 20 s
    assert 10 < engine.requests[-1].deadline_s - request.deadline_s < 20


def test_triton_reads_statistics_configuration_and_index(here: Served) -> None:
    here.catalog.statistics = Statistics(
        inference_count=9, success_count=5, success_ns=50, batches=((8, 1, 20),)
    )
    (stats,) = here.triton.get_inference_statistics("sum").model_stats
    assert stats.inference_count == 9
    assert (stats.inference_stats.success.count, stats.inference_stats.success.ns) == (5, 50)
    assert stats.batch_stats[0].compute_infer.ns == 20
    assert len(here.triton.get_inference_statistics().model_stats) == 1
    config = here.triton.get_model_config("sum").config
    assert config.max_batch_size == 8
    assert list(config.input[0].dims) == [3]
    (entry,) = here.triton.get_model_repository_index().models
    assert (entry.name, entry.version, entry.state) == ("sum", "3", "READY")


def status_of(call: Callable[[], object]) -> str:
    with pytest.raises(InferenceServerException) as raised:
        call()
    return str(raised.value.status())


def test_what_is_unknown_or_impossible_has_its_status(here: Served) -> None:
    x = [tensor("x", ROWS, "FP32")]
    client = here.triton
    unknown: list[Callable[[], object]] = [
        lambda: client.infer("other", x),
        lambda: client.infer("sum", x, model_version="9"),
        lambda: client.get_model_metadata("other"),
        lambda: client.get_model_config("other"),
        lambda: client.get_inference_statistics("other"),
    ]
    assert {status_of(call) for call in unknown} == {"StatusCode.NOT_FOUND"}
    impossible: list[Callable[[], object]] = [
        lambda: client.load_model("sum"),
        lambda: client.unload_model("sum"),
        client.get_trace_settings,
        lambda: client.register_system_shared_memory("r", "/key", 64),
    ]
    assert {status_of(call) for call in impossible} == {"StatusCode.UNIMPLEMENTED"}
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'other'"):
        client.infer("other", x)


# --- messages


def test_typed_contents_are_answered_in_kind(here: Served) -> None:
    answer = here.infer(typed())
    assert list(answer.outputs[0].contents.fp32_contents) == [6]
    assert list(answer.outputs[1].contents.bytes_contents) == [b"row 0"]
    assert not answer.raw_output_contents


def test_typed_contents_of_every_datatype_come_back() -> None:
    engine = every_engine()
    fields = {
        "bool": [True, False], "uint": [1, 2], "uint64": [2**64 - 1, 0], "int": [-1, 2],
        "int64": [-(2**63), 1], "fp32": [float("inf"), 0.5], "fp64": [1e300, -1.0],
        "bytes": [b"a\0", b"\xff"],
    }  # fmt: skip
    signature = engine.signature
    forms = [t for t in signature.inputs if t.datatype != "FP16"]
    engine.signature = Signature(tuple(forms), signature.outputs)
    request = service_pb2.ModelInferRequest(model_name="every")
    for form in forms:
        kind = {"UINT8": "uint", "UINT16": "uint", "UINT32": "uint"}.get(
            form.datatype,
            {"INT8": "int", "INT16": "int", "INT32": "int"}.get(
                form.datatype, form.datatype.lower()
            ),
        )
        entry = request.inputs.add(name=form.name, datatype=form.datatype, shape=[1, 2])
        getattr(entry.contents, f"{kind}_contents").extend(fields[kind])
    with served(engine) as there:
        answer = there.infer(request)
        for sent, back in zip(request.inputs, answer.outputs, strict=True):
            assert back.contents == sent.contents
            assert list(back.shape) == [1, 2]


def test_an_answer_with_fp16_is_raw_as_a_whole() -> None:
    signature = Signature((Tensor("x", "FP32", (-1, 3)),), ())
    engine = NumpyEngine(
        signature, lambda inputs: {"h": inputs["x"].astype(np.float16), "x": inputs["x"]}
    )
    with served(engine) as there:
        answer = there.infer(typed())
        assert [len(raw) for raw in answer.raw_output_contents] == [6, 12]


def contents(**values: Any) -> Any:
    return service_pb2.InferTensorContents(**values)


def raw(*entries: bytes, **changes: Any) -> Any:
    request = typed(**{"contents": None, **changes})
    request.raw_input_contents.extend(entries)
    return request


def with_parameter(request: Any, name: str, **value: Any) -> Any:
    request.parameters[name].CopyFrom(service_pb2.InferParameter(**value))
    return request


def with_output(request: Any, name: str, **parameters: Any) -> Any:
    output = request.outputs.add(name=name)
    for parameter, value in parameters.items():
        output.parameters[parameter].CopyFrom(service_pb2.InferParameter(**value))
    return request


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (b"\xff\xff", "no inference.ModelInferRequest"),
        (service_pb2.ModelInferRequest(model_name="sum"), "needs 'x'"),
        (typed(name="z"), "unexpected inference input 'z'"),
        (typed(datatype="FP8"), "must be one of"),
        (typed(datatype="INT32"), "expects 'FP32'"),
        (typed(shape=[2, 3]), "holds 3 elements"),
        (typed(shape=[-1, 3]), "shape [-1,3]"),
        (typed(shape=[3, 1]), "expected [-1, 3]"),
        (typed(contents=None), "holds 0 elements"),
        (typed(contents=contents(int_contents=[1, 2, 3])), "belongs in fp32_contents"),
        (
            typed(contents=contents(fp32_contents=[1, 2, 3], int_contents=[1])),
            "not in int_contents",
        ),
        (raw(b"\0" * 11), "has 11 bytes"),
        (raw(b"\0" * 12, b""), "2 entries for 1 inputs"),
        (raw(b"\0" * 12, contents=contents(fp32_contents=[1])), "send one"),
        (with_parameter(typed(), "a"), "parameter 'a' has no value"),
        (with_parameter(typed(), "timeout", string_param="1"), "microseconds"),
        (with_parameter(typed(), "triton_x", bool_param=True), "reserved"),
        (with_output(typed(), "z"), "unexpected inference output 'z'"),
        (with_output(typed(), "total", classification={"bool_param": True}), "of classes"),
        (
            with_output(typed(), "total", shared_memory_region={"string_param": "r"}),
            "shared memory",
        ),
    ],
)
def test_a_refused_message_is_told_why(here: Served, request_: Any, words: str) -> None:
    code, details = here.refusal(request_)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert words in details


@pytest.mark.parametrize(
    ("datatype", "values", "words"),
    [
        ("INT8", {"int_contents": [128, 0]}, "outside the range of INT8"),
        ("UINT16", {"uint_contents": [1, 65536]}, "element 1 is 65536"),
        ("FP16", {"fp32_contents": [1, 2]}, "no typed contents"),
    ],
)
def test_typed_values_keep_to_their_datatype(
    datatype: str, values: dict[str, Any], words: str
) -> None:
    with served(NumpyEngine(Signature((), ()), lambda inputs: inputs)) as there:
        code, details = there.refusal(
            typed(datatype=datatype, shape=[2], contents=contents(**values))
        )
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert words in details


@settings(max_examples=150)
@given(data=st.data())
def test_no_message_makes_the_server_fail(here: Served, data: st.DataObject) -> None:
    method = data.draw(
        st.sampled_from(["ModelInfer", "ModelReady", "ModelConfig", "RepositoryModelLoad"])
    )
    whole = typed().SerializeToString()
    cut = data.draw(st.integers(0, len(whole)))
    body = data.draw(
        st.binary(max_size=60) | st.binary(max_size=4).map(lambda b: whole[:cut] + b + whole[cut:])
    )
    call = here.channel.unary_unary(f"{SERVICE}{method}").future(body, timeout=20)
    assert call.code() in {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.UNIMPLEMENTED,
    }


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault.OVERLOADED, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Fault.DEADLINE, grpc.StatusCode.DEADLINE_EXCEEDED),
        (Fault.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_the_engines_faults_have_their_status(fault: Fault, code: grpc.StatusCode) -> None:
    engine = sum_engine()
    engine.failure = InferenceError(fault, "no " + "x" * 5000, retry_after_s=3)
    with served(engine) as there:
        with pytest.raises(grpc.RpcError) as raised:
            there.infer(typed())
        assert raised.value.code() is code
        assert raised.value.details().startswith("no x")
        assert dict(raised.value.trailing_metadata())["retry-after"] == "3"
        assert there.seen == [fault]


def test_a_broken_engine_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    engine = sum_engine()
    engine.failure = RuntimeError("the secret recipe")
    with served(engine) as there:
        code, details = there.refusal(typed())
        assert code is grpc.StatusCode.INTERNAL
        assert "recipe" not in details
        assert "the secret recipe" in caplog.text
        assert there.seen == [Fault.INTERNAL]


def test_a_message_above_the_limit_is_refused(here: Served) -> None:
    code, _ = here.refusal(raw(b"\0" * (MESSAGE_BYTES_MAX + 1)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_call_without_the_edges_token_is_refused_everywhere_but_on_probes() -> None:
    with served(sum_engine(), edge_token="secret") as there:
        assert there.refusal(typed())[0] is grpc.StatusCode.PERMISSION_DENIED
        wrong = [("x-shoal-edge", "wrong")]
        assert there.refusal(typed(), metadata=wrong)[0] is grpc.StatusCode.PERMISSION_DENIED
        assert there.infer(typed(), metadata=[("x-shoal-edge", "secret")]).model_name == "sum"
        assert status_of(there.triton.is_server_live) == "StatusCode.PERMISSION_DENIED"
        probe = there.channel.unary_unary("/grpc.health.v1.Health/Check")
        assert probe(b"", timeout=20) == b"\x08\x01"


def test_a_label_means_what_the_edge_says(here: Served) -> None:
    request = typed()
    request.model_version = "stable"
    assert here.refusal(request)[0] is grpc.StatusCode.NOT_FOUND
    chosen = [("x-shoal-backend", "sum--3--1a2b3c4d")]
    assert here.infer(request, metadata=chosen).model_version == "3"


def test_a_caller_that_gives_up_frees_its_place() -> None:
    engine = sum_engine()
    with served(engine) as there:

        async def close_gate() -> None:
            engine.gate = asyncio.Event()

        there.on_loop(close_gate())
        call = there.channel.unary_unary(f"{SERVICE}ModelInfer").future(typed().SerializeToString())
        eventually(lambda: len(engine.requests) == 1)
        assert there.ongoing == 1
        call.cancel()
        eventually(lambda: engine.cancelled == 1)
        eventually(lambda: there.ongoing == 0)


# --- streams


@dataclass(slots=True)
class Talk:
    """A tritonclient stream and what came back on it."""

    client: Any
    answers: queue.Queue[tuple[Any, Any]] = field(default_factory=queue.Queue)

    def ask(self, model: str, inputs: list[Any], request_id: str, **options: Any) -> None:
        self.client.async_stream_infer(model, inputs, request_id=request_id, **options)

    def next(self) -> Any:
        result, error = self.answers.get(timeout=20)
        return error if result is None else result.get_response()

    def texts(self, count: int) -> list[str]:
        return [self.next().raw_output_contents[0][4:].decode() for _ in range(count)]


@contextmanager
def talking(there: Served) -> Iterator[Talk]:
    client = triton.InferenceServerClient(there.address)
    talk = Talk(client)
    client.start_stream(lambda result, error: talk.answers.put((result, error)))
    try:
        yield talk
    finally:
        client.stop_stream()
        client.close()


def test_a_stream_answers_in_order_with_errors_in_their_place(here: Served) -> None:
    with talking(here) as talk:
        talk.ask("sum", [tensor("x", ROWS, "FP32")], "a")
        talk.ask("sum", [tensor("x", ROWS[:, :2].copy(), "FP32")], "b")
        talk.ask("other", [tensor("x", ROWS, "FP32")], "c")
        talk.ask("sum", [tensor("x", ROWS, "FP32")], "d", enable_empty_final_response=True)
        first, wrong, unknown, last = [talk.next() for _ in range(4)]
    assert (first.id, last.id) == ("a", "d")
    assert "unexpected shape" in wrong.message()
    assert unknown.message().startswith("Request for unknown model")
    assert "triton_final_response" not in first.parameters
    assert last.parameters["triton_final_response"].bool_param
    assert len(last.outputs) == 2


def test_a_generating_model_streams_a_response_a_chunk(words: Served) -> None:
    with talking(words) as talk:
        talk.ask("words", [text(b"a b c")], "1")
        assert talk.texts(3) == ["A", " B", " C"]
        talk.ask("words", [text(b"x y")], "2", enable_empty_final_response=True)
        x, y, end = [talk.next() for _ in range(3)]
    assert not x.parameters["triton_final_response"].bool_param
    assert not y.parameters["triton_final_response"].bool_param
    assert end.parameters["triton_final_response"].bool_param
    assert (end.id, len(end.outputs)) == ("2", 0)


def test_a_generating_model_answers_whole_without_a_stream(words: Served) -> None:
    inputs = [text(b"a b c"), tensor("max_tokens", np.array([2], np.int32), "INT32")]
    answer = words.triton.infer("words", inputs, request_id="w")
    assert answer.as_numpy("text_output").tolist() == [b"A B"]
    assert answer.get_response().id == "w"


def test_a_generation_that_fails_says_so_in_the_stream() -> None:
    engine = WordsEngine()
    engine.fail_after = 1
    with served(engine) as there, talking(there) as talk:
        talk.ask("words", [text(b"a b")], "1")
        assert talk.texts(1) == ["A"]
        assert talk.next().message() == "the model lost its words"
        eventually(lambda: there.seen == [Fault.INTERNAL])


def test_a_garbled_message_ends_its_stream_after_the_answers_before_it(here: Served) -> None:
    call = here.channel.stream_stream(f"{SERVICE}ModelStreamInfer")
    answers = call(iter([typed().SerializeToString(), b"\xff"]), timeout=20)
    first = service_pb2.ModelStreamInferResponse.FromString(next(answers))
    assert first.infer_response.model_name == "sum"
    with pytest.raises(grpc.RpcError) as raised:
        next(answers)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_reader_that_leaves_a_stream_ends_the_generation() -> None:
    engine = WordsEngine()
    with served(engine) as there:

        async def close_gate() -> None:
            engine.gate = asyncio.Event()

        there.on_loop(close_gate())
        with talking(there) as talk:
            talk.ask("words", [text(b"a b")], "1")
            assert talk.texts(1) == ["A"]
            talk.client.stop_stream(cancel_requests=True)
        eventually(lambda: engine.closed == 1)
        eventually(lambda: there.ongoing == 0)


# --- the front desk


async def echoing(
    method: str, metadata: Metadata, requests: AsyncIterator[bytes], deadline_s: float | None
) -> AsyncIterator[bytes]:
    """Answers each message with an answer of that id."""
    assert deadline_s is not None
    assert dict(metadata)["x-shoal-backend"] == "sum--3--1a2b3c4d"
    async for data in requests:
        sent = service_pb2.ModelInferRequest.FromString(data)
        if sent.id == "full":
            raise InferenceError(Fault.OVERLOADED, "no place")
        answer = service_pb2.ModelInferResponse(id=sent.id)
        if method.endswith("ModelStreamInfer"):
            answer = service_pb2.ModelStreamInferResponse(infer_response=answer)
        yield answer.SerializeToString()


def test_a_forwarder_gets_the_inference_calls_as_they_are() -> None:
    held = [("x-shoal-backend", "sum--3--1a2b3c4d")]
    request = service_pb2.ModelInferRequest(id="i")
    with served(sum_engine(), forwarder=echoing) as there:
        assert there.infer(request, metadata=held).id == "i"
        stream = there.channel.stream_stream(f"{SERVICE}ModelStreamInfer")
        requests = [service_pb2.ModelInferRequest(id=i).SerializeToString() for i in "abc"]
        answers = [
            service_pb2.ModelStreamInferResponse.FromString(a).infer_response.id
            for a in stream(iter(requests), metadata=held, timeout=20)
        ]
        assert answers == ["a", "b", "c"]
        full = service_pb2.ModelInferRequest(id="full")
        code, details = there.refusal(full, metadata=held)
        assert (code, details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "no place")
        assert there.triton.get_model_metadata("sum").platform == "numpy"


def test_a_forwarders_own_status_goes_to_the_caller() -> None:
    with served(sum_engine()) as replica:

        async def relaying(
            method: str,
            metadata: Metadata,
            requests: AsyncIterator[bytes],
            deadline_s: float | None,
        ) -> AsyncIterator[bytes]:
            async with grpc.aio.insecure_channel(replica.address) as channel:
                async for answer in channel.stream_stream(method)(requests):
                    yield answer

        with served(sum_engine(), forwarder=relaying) as desk:
            assert list(desk.infer(typed()).outputs[0].contents.fp32_contents) == [6]
            code, details = desk.refusal(typed(name="z"))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "unexpected inference input 'z'" in details
