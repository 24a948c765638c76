"""Does gRPC take the same ways? Driven by the official clients, over plain HTTP/2 and over TLS."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from tritonclient import grpc as triton
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deployments.edge.process import Edge
from deployments.edge.routing import Listener
from tests.deployments.edge.conftest import (
    Lab,
    a_key,
    a_model,
    a_routing,
    a_server,
    a_version,
    wait_until,
)
from tests.deployments.edge.ports import free_port
from tests.deployments.edge.upstream import GrpcUpstream

KEY = ("authorization", "Bearer secret")


@pytest.fixture(scope="module")
def replicas(shared_lab: Lab) -> dict[str, GrpcUpstream]:
    return {name: shared_lab.grpc_upstream(name) for name in ("v3", "v4", "long", "desk")}


LONG = "m" + "x" * 62 + "m"


@pytest.fixture(scope="module")
def edge(shared_lab: Lab, replicas: dict[str, GrpcUpstream], authority: trustme.CA) -> Edge:
    http = shared_lab.upstream("http").port  # answers the health checks of all
    servers = {name: a_server(http, replica.port, name=name) for name, replica in replicas.items()}
    routing = a_routing(
        a_model(a_version("3", servers["v3"]), a_version("4", servers["v4"])),
        a_model(a_version(LONG, servers["long"], model="long"), name=LONG),
        a_model(a_version("1", model="asleep"), name="asleep"),
        desks=(servers["desk"],),
        keys=(a_key("anna", "secret"), a_key("ben", "other", models=("else",), rate_rps=2)),
    )
    pem = shared_lab.folder / "edge.pem"
    certificate = authority.issue_cert("localhost")
    pem.write_bytes(
        certificate.private_key_pem.bytes()
        + b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    )
    return shared_lab.start(
        routing,
        grpc=Listener("127.0.0.1", free_port()),
        https=Listener("127.0.0.1", free_port()),
        tls_pem=str(pem),
    )


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module", params=["grpc", "http", "https"])
def channel(request: pytest.FixtureRequest, edge: Edge, authority: trustme.CA) -> Iterator[Any]:
    listener = getattr(edge.settings, request.param)
    target = f"localhost:{listener.port}"
    if request.param == "https":
        root = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        made = grpc.secure_channel(target, root)
    else:
        made = grpc.insecure_channel(target)
    with made:
        yield service_pb2_grpc.GRPCInferenceServiceStub(made)


def a_request(model: str = "fraud", version: str = "", raw: int = 0) -> Any:
    request = service_pb2.ModelInferRequest(model_name=model, model_version=version)
    if raw:
        request.raw_input_contents.append(b"x" * raw)
    return request


@pytest.mark.parametrize(
    ("model", "version", "expected"),
    [
        ("fraud", "", "v4"),
        ("fraud", "3", "v3"),
        (LONG, LONG, "long"),
        ("asleep", "", "desk"),
        ("nobody", "", "desk"),
        ("fraud", "9", "desk"),
        ("", "", "desk"),
    ],
)
@pytest.mark.parametrize("raw", [0, 10, 30_000, 600_000])
def test_the_message_says_who_answers(
    channel: Any, model: str, version: str, expected: str, raw: int
) -> None:
    answer = channel.ModelInfer(a_request(model, version, raw), metadata=[KEY], timeout=10)
    assert answer.id == expected


@pytest.mark.parametrize(("version", "expected"), [("", "v4"), ("3", "v3")])
@pytest.mark.parametrize("raw", [0, 100, 300_000])
def test_a_stream_goes_where_its_first_message_says_and_is_not_held_back(
    channel: Any, version: str, expected: str, raw: int
) -> None:
    requests: queue.Queue[Any] = queue.Queue()
    answers = channel.ModelStreamInfer(iter(requests.get, None), metadata=[KEY], timeout=20)
    for _ in range(3):  # each answer comes before the next request is sent
        requests.put(a_request("fraud", version, raw))
        assert next(answers).infer_response.id == expected
    requests.put(None)
    assert list(answers) == []


def test_the_next_messages_of_a_stream_are_not_read_for_the_first(channel: Any) -> None:
    for size in range(40):  # lengths that look like the tag of a field among them
        crowd = [a_request("fraud", raw=size) for _ in range(20)]
        answers = channel.ModelStreamInfer(iter(crowd), metadata=[KEY], timeout=20)
        assert {a.infer_response.id for a in answers} == {"v4"}


def test_what_is_not_inference_goes_to_the_desk(channel: Any) -> None:
    assert channel.ServerLive(service_pb2.ServerLiveRequest()).live
    request = service_pb2.ModelMetadataRequest(name="fraud")
    assert channel.ModelMetadata(request, metadata=[KEY]).platform == "desk"


def test_the_replica_learns_what_the_edge_knows(
    channel: Any, replicas: dict[str, GrpcUpstream]
) -> None:
    channel.ModelInfer(a_request(), metadata=[KEY, ("x-shoal-key", "root"), ("x-own", "1")])
    seen = replicas["v4"].metadata
    assert seen["x-shoal-key"] == "anna"
    assert seen["x-shoal-edge"] == "edge-token"
    assert seen["x-shoal-backend"] == "fraud--4--aa"
    assert seen["x-own"] == "1"
    assert "authorization" not in seen


@pytest.mark.parametrize(
    ("key", "code", "text"),
    [
        ("wrong", grpc.StatusCode.UNAUTHENTICATED, "this key is not known, or no longer valid"),
        ("other", grpc.StatusCode.PERMISSION_DENIED, "this key may not use the model fraud"),
    ],
)
def test_refusals_are_grpcs_own(channel: Any, key: str, code: grpc.StatusCode, text: str) -> None:
    for call, request in (
        (channel.ModelInfer, a_request()),
        (channel.ModelStreamInfer, iter([a_request()])),
        (channel.ModelMetadata, service_pb2.ModelMetadataRequest(name="fraud")),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            list(_answers(call(request, metadata=[("authorization", f"Bearer {key}")], timeout=5)))
        refused: Any = caught.value
        if refused.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:  # "other" has a rate as well
            assert (refused.code(), refused.details()) == (code, text)


def _answers(answer: Any) -> Any:
    return answer if hasattr(answer, "__iter__") else [answer]


def test_a_rate_that_is_reached_is_said_in_grpc(channel: Any) -> None:
    codes = set()
    for _ in range(20):
        with pytest.raises(grpc.RpcError) as caught:
            channel.ModelInfer(a_request(), metadata=[("authorization", "Bearer other")])
        error: Any = caught.value
        codes.add(error.code())
    assert grpc.StatusCode.RESOURCE_EXHAUSTED in codes


def test_a_compressed_message_is_routed_by_its_metadata(channel: Any) -> None:
    request = a_request("fraud", "3", raw=5000)
    metadata: list[tuple[str, str]] = [KEY]
    gzip = grpc.Compression.Gzip
    with pytest.raises(grpc.RpcError) as caught:
        channel.ModelInfer(request, metadata=metadata, compression=gzip)
    refused: Any = caught.value
    assert refused.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "x-shoal-model" in refused.details()
    metadata.append(("x-shoal-model", "fraud@3"))
    assert channel.ModelInfer(request, metadata=metadata, compression=gzip).id == "v3"


def test_no_live_replica_and_no_desk_is_unavailable(lab: Lab) -> None:
    dead = a_server(free_port(), free_port())
    edge = lab.start(a_routing(a_model(a_version("4", dead))))
    with grpc.insecure_channel(f"localhost:{edge.settings.http.port}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(a_request(), timeout=20)
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert error.details() == "no replica could take the request"


def test_the_official_client_gets_its_answer(edge: Edge) -> None:
    assert edge.settings.grpc is not None
    client = triton.InferenceServerClient(f"localhost:{edge.settings.grpc.port}")
    tensor = triton.InferInput("x", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 4), np.float32))
    headers = dict([KEY])
    answer = client.infer("fraud", [tensor], model_version="3", headers=headers)
    assert answer.get_response().id == "v3"
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put(error or result), headers=headers)
    for _ in range(3):
        client.async_stream_infer("fraud", [tensor])
        assert answers.get(timeout=10).get_response().id == "v4"
    client.stop_stream()
    client.close()
    wait_until(lambda: edge.is_running)
