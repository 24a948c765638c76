"""Does a held gRPC call reach a replica whole, first message to last, whoever dies on the way?"""

from __future__ import annotations

import asyncio
import queue
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

from dashboards.metrics import Meters
from deployments.edge.routing import ModelRoute, Server, VersionRoute
from deployments.inference import (
    Engine,
    Fault,
    InferenceError,
    ModelStatus,
    VersionState,
    VersionStatus,
)
from deployments.serving.grpc_forwarding import GrpcForwarder
from deployments.serving.holding import View, WaitingRoom
from deployments.serving.meter import DeskMeter
from deployments.serving.protocols.oip_grpc import start_server
from tests.deployments.serving.engines import NumpyEngine, SingleCatalog, WordsEngine, sum_engine
from tests.deployments.serving.live import eventually, running_loop

TOKEN = "secret"
INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
NOBODY = Server("r-nobody", "127.0.0.1", 1, 1)


def tensor(*rows: Sequence[float]) -> Any:
    values = np.array(rows, np.float32)
    made = triton.InferInput("x", list(values.shape), "FP32")
    made.set_data_from_numpy(values)
    return made


def a_message(request_id: str = "", model: str = "sum", version: str = "") -> bytes:
    """A request for one row, as bytes."""
    contents = service_pb2.InferTensorContents(fp32_contents=[1, 2, 3])
    entry = service_pb2.ModelInferRequest.InferInputTensor(
        name="x", datatype="FP32", shape=[1, 3], contents=contents
    )
    made = service_pb2.ModelInferRequest(
        model_name=model, model_version=version, id=request_id, inputs=[entry]
    )
    return bytes(made.SerializeToString())


def total(data: bytes) -> float:
    """The sum in an answer, which comes raw."""
    answer = service_pb2.ModelInferResponse.FromString(data)
    return float(answer.outputs[0].contents.fp32_contents[0])


@dataclass
class Scene:
    """A desk over gRPC, the replicas behind it, and a client in front of it."""

    loop: asyncio.AbstractEventLoop
    places_max: int = 4
    woken: list[str] = field(default_factory=list)
    servers: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.meters = Meters(None)
        self.room = self.run(self._made_room())
        forwarder = GrpcForwarder(self.room, DeskMeter(self.meters), TOKEN)
        catalog = SingleCatalog(sum_engine())
        server, port = self.run(start_server(catalog, None, "127.0.0.1", 0, forwarder=forwarder))
        self.servers.append(server)
        self.triton = triton.InferenceServerClient(f"127.0.0.1:{port}")
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")

    async def _made_room(self) -> WaitingRoom:
        return WaitingRoom(self.places_max, self._wake)

    async def _wake(self, backend: str) -> None:
        self.woken.append(backend)

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def replica(self, engine: Engine, name: str = "r-1") -> Server:
        """A replica that serves `engine`."""
        server, port = self.run(
            start_server(SingleCatalog(engine), engine, "127.0.0.1", 0, edge_token=TOKEN)
        )
        self.servers.append(server)
        return Server(name, "127.0.0.1", 1, port)

    def failing(self, after: int, code: Any, name: str = "r-bad") -> tuple[Server, list[bytes]]:
        """A replica that takes `after` messages and ends the call without an answer."""
        got: list[bytes] = []

        async def call(requests: AsyncIterator[bytes], context: Any) -> None:
            async for data in requests:
                got.append(data)
                if len(got) == after:
                    await context.abort(code, "so not")

        class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
            def service(self, details: Any) -> Any:
                return grpc.stream_stream_rpc_method_handler(call)

        async def start() -> int:
            server = grpc.aio.server(handlers=[Handlers()])
            port: int = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            self.servers.append(server)
            return port

        return Server(name, "127.0.0.1", 1, self.run(start())), got

    def says(self, *servers: Server, reason: str = "", model: str = "sum", **route: Any) -> None:
        """The controller says which servers version 3 of the model has, or why it failed."""
        state = VersionState.FAILED if reason else VersionState.IDLE
        status = VersionStatus("3", state, None, reason)
        versions = (VersionRoute("3", f"{model}--3", servers, **route),)
        view = View(1, (ModelStatus(model, (status,)),), (ModelRoute(model, versions, {"3": 100}),))

        async def update() -> None:
            self.room.update(view)

        self.run(update())

    def infer(self, message: bytes | None = None, **options: Any) -> bytes:
        """ModelInfer with any bytes."""
        data = a_message() if message is None else message
        options.setdefault("timeout", 20)
        return bytes(self.channel.unary_unary(INFER)(data, **options))

    def refusal(self, message: bytes | None = None, **options: Any) -> tuple[Any, str]:
        with pytest.raises(grpc.RpcError) as refused:
            self.infer(message, **options)
        return refused.value.code(), refused.value.details()

    def stream(self, messages: Iterator[bytes]) -> list[Any]:
        """The answers on a stream, whole."""
        answers = self.channel.stream_stream(STREAM)(messages, timeout=20)
        return [service_pb2.ModelStreamInferResponse.FromString(data) for data in answers]

    @property
    def held(self) -> dict[str, int]:
        return dict(self.room.held)

    def outcomes(self) -> dict[str, float]:
        text = self.meters.exposition().decode()
        found = re.findall(
            r'^shoal_held_total{model="\w+",outcome="(.*?)"} (\S+)$', text, re.MULTILINE
        )
        return {outcome: float(count) for outcome, count in found}

    def close(self) -> None:
        self.triton.close()
        self.channel.close()
        for server in self.servers:
            self.run(server.stop(0))


@contextmanager
def a_scene(**options: Any) -> Iterator[Scene]:
    with running_loop() as loop:
        made = Scene(loop, **options)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def scene() -> Iterator[Scene]:
    with a_scene() as made:
        yield made


class Background(threading.Thread):
    """A call under way; `result()` is its answer."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work, self._answers = work, queue.Queue[Any]()
        self.start()

    def run(self) -> None:
        try:
            self._answers.put(self._work())
        except Exception as error:  # noqa: BLE001  # raised again by whoever asks
            self._answers.put(error)

    def result(self) -> Any:
        answer = self._answers.get(timeout=20)
        if isinstance(answer, Exception):
            raise answer
        return answer


# sending on


def test_tritons_client_gets_a_replicas_answer(scene: Scene) -> None:
    scene.says(scene.replica(sum_engine()))
    answer = scene.triton.infer("sum", [tensor([1, 2, 3], [4, 5, 6])], request_id="7")
    assert answer.as_numpy("total").tolist() == [6, 15]
    assert answer.get_response().id == "7"
    assert scene.held == {}


def test_a_replicas_refusal_is_the_callers(scene: Scene) -> None:
    engine = sum_engine()
    engine.failure = InferenceError(Fault.OVERLOADED, "busy")
    scene.says(scene.replica(engine), NOBODY)
    code, details = scene.refusal()
    assert (code, details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "busy")
    assert len(engine.requests) == 1


def test_a_large_message_goes_both_ways(scene: Scene) -> None:
    scene.says(scene.replica(sum_engine()))
    rows = np.ones((500_000, 3), np.float32)  # 6 MB, more than gRPC takes when nobody says so
    made = triton.InferInput("x", list(rows.shape), "FP32")
    made.set_data_from_numpy(rows)
    out = [triton.InferRequestedOutput("total")]
    answer = scene.triton.infer("sum", [made], outputs=out)
    assert answer.as_numpy("total").sum() == 1_500_000


def test_the_edges_choice_is_worth_more_than_the_name(scene: Scene) -> None:
    engine = sum_engine()
    scene.says(scene.replica(engine))
    chosen = (("x-shoal-backend", "sum--3"),)
    scene.refusal(a_message(model="other"), metadata=chosen)  # the replica itself refuses it
    assert engine.requests == []
    assert total(scene.infer(metadata=(("x-shoal-backend", "gone--1"),))) == 6


@pytest.mark.parametrize(
    ("checked", "code"),
    [("sum", None), ("mine", grpc.StatusCode.NOT_FOUND), ("", grpc.StatusCode.NOT_FOUND)],
)
def test_a_key_opens_only_the_model_that_the_edge_checked_it_for(
    scene: Scene, checked: str, code: Any
) -> None:
    scene.says(scene.replica(sum_engine()))
    metadata = (("x-shoal-key", "k1"), ("x-shoal-model", checked))
    if code is None:
        assert total(scene.infer(metadata=metadata)) == 6
    else:
        assert scene.refusal(metadata=metadata)[0] is code


@pytest.mark.parametrize(
    ("message", "code", "said"),
    [
        (a_message(model="other"), grpc.StatusCode.NOT_FOUND, "'other' is not found"),
        (a_message(version="9"), grpc.StatusCode.NOT_FOUND, "'sum' is not found"),
        (b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT, ""),
        (b"", grpc.StatusCode.NOT_FOUND, "'' is not found"),
    ],
)
def test_what_names_no_model_that_there_is_is_refused(
    scene: Scene, message: bytes, code: Any, said: str
) -> None:
    scene.says(scene.replica(sum_engine()))
    found, details = scene.refusal(message)
    assert (found, said in details) == (code, True)


# streams


def test_a_stream_is_answered_message_by_message_in_order(scene: Scene) -> None:
    scene.says(scene.replica(sum_engine()))
    answers = scene.stream(a_message(str(n)) for n in range(50))
    assert [a.infer_response.id for a in answers] == [str(n) for n in range(50)]


def test_a_stream_is_a_conversation(scene: Scene) -> None:
    """Each question is asked after the answer to the one before."""
    scene.says(scene.replica(sum_engine()))
    answered: queue.Queue[str] = queue.Queue()

    def questions() -> Iterator[bytes]:
        for n in range(5):
            yield a_message(str(n))
            assert answered.get(timeout=20) == str(n)

    for data in scene.channel.stream_stream(STREAM)(questions(), timeout=20):
        answered.put(service_pb2.ModelStreamInferResponse.FromString(data).infer_response.id)
    assert answered.empty()


def test_a_text_comes_piece_by_piece(scene: Scene) -> None:
    scene.says(scene.replica(WordsEngine(version="3")), model="words")
    prompt = triton.InferInput("text_input", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([b"a b c"], object))
    answers: queue.Queue[Any] = queue.Queue()
    scene.triton.start_stream(lambda result, error: answers.put((result, error)))
    scene.triton.async_stream_infer("words", [prompt])
    pieces = [answers.get(timeout=20) for _ in range(3)]
    scene.triton.stop_stream()
    assert [error for _, error in pieces] == [None] * 3
    assert b"".join(r.as_numpy("text_output")[0] for r, _ in pieces) == b"A B C"


def test_a_stream_without_a_question_ends(scene: Scene) -> None:
    scene.says(scene.replica(sum_engine()))
    assert scene.stream(iter(())) == []


# holding


def test_a_call_for_a_sleeping_model_wakes_it_and_is_answered(scene: Scene) -> None:
    scene.says()
    call = Background(scene.infer)
    eventually(lambda: scene.woken == ["sum--3"] and scene.held == {"sum": 1})
    scene.says(scene.replica(sum_engine()))
    assert total(call.result()) == 6
    eventually(lambda: scene.held == {})
    assert scene.outcomes() == {"ok": 1}


def test_a_full_room_is_exhausted() -> None:
    with a_scene(places_max=1) as scene:
        scene.says()
        first = scene.channel.unary_unary(INFER).future(a_message(), timeout=20)
        eventually(lambda: scene.held == {"sum": 1})
        code, details = scene.refusal()
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "1 requests already wait" in details
        first.cancel()
        eventually(lambda: scene.held == {})


def test_a_caller_who_goes_away_frees_the_place(scene: Scene) -> None:
    scene.says()
    call = scene.channel.unary_unary(INFER).future(a_message(), timeout=20)
    eventually(lambda: scene.held == {"sum": 1})
    call.cancel()
    eventually(lambda: scene.held == {})
    assert scene.outcomes() == {"cancelled": 1}


def test_a_caller_who_can_not_wait_is_told_in_time(scene: Scene) -> None:
    scene.says()
    assert scene.refusal(timeout=0.1)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: scene.held == {})


def test_a_versions_own_limit_ends_the_waiting_too(scene: Scene) -> None:
    scene.says(timeout_ms=50)
    assert scene.refusal()[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    assert scene.outcomes() == {"deadline": 1}


def test_the_callers_deadline_reaches_the_replica(scene: Scene) -> None:
    engine = sum_engine()
    engine.gate = scene.run(_an_event())
    scene.says(scene.replica(engine))
    assert scene.refusal(timeout=0.2)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: engine.cancelled == 1)
    assert scene.held == {}


async def _an_event() -> asyncio.Event:
    return asyncio.Event()


def test_a_version_that_can_not_be_loaded_says_why(scene: Scene) -> None:
    scene.says(reason="no file weights.onnx")
    code, details = scene.refusal()
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "could not be loaded: no file weights.onnx" in details
    assert scene.outcomes() == {"unavailable": 1}


# replicas that go away


def test_a_replica_that_is_gone_leaves_its_calls_to_another(scene: Scene) -> None:
    scene.says(NOBODY, scene.replica(sum_engine()))
    assert [total(scene.infer()) for _ in range(4)] == [6] * 4


def asked_until(scene: Scene, got: list[bytes], engine: NumpyEngine, ids: Sequence[str]) -> None:
    """Streams of these questions, until one of them met the replica that fails."""
    while not got:
        engine.requests.clear()
        answers = scene.stream(a_message(i) for i in ids)
        assert [a.infer_response.id for a in answers] == list(ids)
        assert [r.id for r in engine.requests] == list(ids)


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_replica_that_dies_over_a_stream_leaves_all_of_it_to_another(
    scene: Scene, after: int
) -> None:
    engine = sum_engine()
    bad, got = scene.failing(after, grpc.StatusCode.UNAVAILABLE)
    scene.says(bad, scene.replica(engine))
    asked_until(scene, got, engine, [str(n) for n in range(5)])


def test_a_caller_who_asks_on_slowly_loses_no_question_to_a_replica_that_died(
    scene: Scene,
) -> None:
    """The dead replica's reader still waits for the second question when the next one begins."""
    engine = sum_engine()
    bad, got = scene.failing(1, grpc.StatusCode.UNAVAILABLE)
    good = scene.replica(engine)
    scene.says(bad)

    def questions() -> Iterator[bytes]:
        yield a_message("0")
        eventually(lambda: bool(got))
        scene.says(good)
        eventually(lambda: len(engine.requests) == 1)
        yield a_message("1")

    answers = scene.stream(questions())
    assert [a.infer_response.id for a in answers] == ["0", "1"]


def test_a_call_that_must_not_be_sent_twice_is_not(scene: Scene) -> None:
    bad, got = scene.failing(1, grpc.StatusCode.UNAVAILABLE)
    scene.says(bad, idempotent=False)
    assert scene.refusal() == (grpc.StatusCode.UNAVAILABLE, "so not")
    assert len(got) == 1
    eventually(lambda: scene.held == {})


def test_another_failure_is_the_callers_to_know(scene: Scene) -> None:
    bad, got = scene.failing(1, grpc.StatusCode.INTERNAL)
    scene.says(bad)
    assert scene.refusal() == (grpc.StatusCode.INTERNAL, "so not")
    assert len(got) == 1
