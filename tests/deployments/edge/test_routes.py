"""Where does a request go? Asked of a real HAProxy, in all ways to name a model."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from deployments.edge.process import Edge
from deployments.edge.routing import Listener
from tests.deployments.edge.conftest import (
    Lab,
    a_model,
    a_routing,
    a_server,
    a_version,
    client_of,
    wait_until,
)
from tests.deployments.edge.ports import free_port
from tests.deployments.edge.upstream import Upstream


@pytest.fixture(scope="module")
def edge(shared_lab: Lab) -> Edge:
    ports = {name: shared_lab.upstream(name).port for name in ("v3", "v4", "chat", "desk")}
    fraud = a_model(
        a_version("3", a_server(ports["v3"]), labels=("stable",)),
        a_version("4", a_server(ports["v4"])),
        split={"4": 100},
    )
    chat = a_model(a_version("1", a_server(ports["chat"]), model="chat"), name="chat")
    asleep = a_model(a_version("1", model="asleep"), name="asleep")
    routing = a_routing(fraud, chat, asleep, desks=(a_server(ports["desk"]),))
    return shared_lab.start(
        routing,
        tensorflow=Listener("127.0.0.1", free_port()),
        metrics=Listener("127.0.0.1", free_port()),
    )


@pytest.fixture(scope="module")
def client(edge: Edge) -> Iterator[httpx.Client]:
    with client_of(edge) as client:
        yield client


PATHS = [
    ("POST", "/v2/models/fraud/infer", "v4"),
    ("POST", "/v2/models/fraud/versions/3/infer", "v3"),
    ("POST", "/v2/models/fraud/versions/3/generate", "v3"),
    ("POST", "/v2/models/fraud/generate_stream", "v4"),
    ("POST", "/v2/models/%66raud/infer", "v4"),
    ("POST", "/v2/models/fraud/infer?x=/v2/models/chat/infer", "v4"),
    ("POST", "/v1/models/fraud:predict", "v4"),
    ("POST", "/V1/Models/fraud/Versions/3:Predict", "v3"),
    ("POST", "/v1/models/fraud/labels/stable:classify", "v3"),
    ("POST", "/v1/models/fraud/versions/4:regress", "v4"),
    # everything else
    ("POST", "/v2/models/asleep/infer", "desk"),
    ("POST", "/v2/models/nobody/infer", "desk"),
    ("POST", "/v2/models/fraud/versions/9/infer", "desk"),
    ("POST", "/v2/models/fraud/versions/stable/infer", "desk"),
    ("POST", "/v1/models/fraud/labels/other:predict", "desk"),
    ("POST", "/v2/models/fraud/extra/versions/3/infer", "desk"),
    ("POST", "/v2/models/fraud/infer/more", "desk"),
    ("POST", "/v2/models/fraud%2F0/infer", "desk"),
    ("POST", "/v2/models/%3F/infer", "desk"),
    ("POST", "/v2/repository/index", "desk"),
    ("POST", "/v2/repository/models/fraud/load", "desk"),
    ("POST", "/v1/models/fraud:explain", "desk"),
    ("GET", "/v2/models/fraud/infer", "desk"),
    ("GET", "/v2/models/fraud", "desk"),
    ("GET", "/v2/models/fraud/ready", "desk"),
    ("GET", "/v1/models", "desk"),
    ("GET", "/", "desk"),
    ("GET", "/docs", "desk"),
    ("GET", "/metrics", "desk"),
    ("DELETE", "/admin/v1/models/fraud", "desk"),
]


@pytest.mark.parametrize(("method", "path", "expected"), PATHS)
def test_the_path_says_who_answers(
    client: httpx.Client, method: str, path: str, expected: str
) -> None:
    assert client.request(method, path, content=b"{}").json()["name"] == expected


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("chat", "chat"),
        ("fraud", "v4"),
        ("fraud@3", "v3"),
        ("fraud@9", "desk"),
        ("nobody", "desk"),
        (7, "desk"),
        (None, "desk"),
    ],
)
def test_the_body_names_the_model_for_openai(
    client: httpx.Client, path: str, model: object, expected: str
) -> None:
    body = {"messages": [{"role": "user", "content": 'say "model": "chat"'}], "model": model}
    answer = client.post(path, json=body).json()
    assert (answer["name"], answer["body_bytes"]) == (expected, len(_compact(body)))


def _compact(body: object) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def test_a_header_names_the_model_of_a_body_too_large_to_be_read(client: httpx.Client) -> None:
    body = {"messages": ["x" * 200_000], "model": "chat"}
    refused = client.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert "x-shoal-model" in refused.json()["error"]["message"]
    answer = client.post("/v1/chat/completions", json=body, headers={"x-shoal-model": "fraud@3"})
    assert (answer.json()["name"], answer.json()["body_bytes"]) == ("v3", len(_compact(body)))


def test_a_large_body_arrives_whole(client: httpx.Client) -> None:
    answer = client.post("/v2/models/fraud/infer", content=b"x" * 5_000_000)
    assert answer.json()["body_bytes"] == 5_000_000
    pieces = itertools.repeat(b"y" * 50_000, 40)
    assert client.post("/v2/models/fraud/infer", content=pieces).json()["body_bytes"] == 2_000_000


def test_the_replica_learns_what_the_edge_knows(client: httpx.Client) -> None:
    headers = client.post("/v2/models/fraud/infer", json={}).json()["headers"]
    assert headers["x-shoal-edge"] == "edge-token"
    assert headers["x-shoal-backend"] == "fraud--4--aa"
    assert headers["x-shoal-role"] == "admin"  # no keys are needed here
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["x-forwarded-proto"] == "http"
    assert len(headers["x-request-id"]) == 36
    assert "x-shoal-key" not in headers
    assert "x-shoal-dialect" not in headers


def test_the_desk_learns_which_backend_was_meant(client: httpx.Client) -> None:
    asleep = client.post("/v2/models/asleep/infer", json={}).json()["headers"]
    assert asleep["x-shoal-backend"] == "asleep--1--aa"
    assert "x-shoal-backend" not in client.post("/v2/models/nobody/infer").json()["headers"]


def test_headers_that_steer_are_not_taken_from_callers(client: httpx.Client) -> None:
    sent = {
        "X-Shoal-Edge": "guess",
        "x-shoal-role": "owner",
        "x-shoal-key": "somebody",
        "x-shoal-backend": "chat--1--aa",
        "x-shoal-dialect": "tensorflow",
        "x-shoal-whatever": "1",
        "x-request-timeout-seconds": "0",
        "x-request-disconnect-disabled": "?1",
        "serve_multiplexed_model_id": "other",
        "x-session-id": "s",
        "authorization": "Bearer secret",
        "x-api-key": "secret",
        "upgrade": "h2c",
        "proxy-authorization": "Basic x",
        "x-request-id": "no spaces please",
        "x-shoal-model": "another",
        "x-own": "kept",
    }
    headers = client.post("/v2/models/fraud/infer", json={}, headers=sent).json()["headers"]
    assert headers["x-own"] == "kept"
    assert headers["x-shoal-model"] == "fraud"  # what the edge read, not what the caller says
    changed = {
        "x-shoal-edge",
        "x-shoal-role",
        "x-shoal-backend",
        "x-shoal-model",
        "x-request-id",
    }
    assert all(headers[name] not in sent.values() for name in changed)
    gone = {name.lower() for name in sent} - changed - {"x-own"}
    assert gone.isdisjoint(headers)


def test_a_callers_own_request_id_is_kept(client: httpx.Client) -> None:
    sent = {"x-request-id": "job-7/row.12"}
    answer = client.post("/v2/models/fraud/infer", json={}, headers=sent)
    assert answer.json()["headers"]["x-request-id"] == "job-7/row.12"


def test_the_tensorflow_listener_is_named_to_the_replica(edge: Edge) -> None:
    listener = edge.settings.tensorflow
    assert listener is not None
    url = f"http://127.0.0.1:{listener.port}/v1/models/fraud:predict"
    assert httpx.post(url, json={}).json()["headers"]["x-shoal-dialect"] == "tensorflow"


def test_metrics_have_a_listener_of_their_own_and_nothing_else_is_there(edge: Edge) -> None:
    assert edge.settings.metrics is not None
    url = f"http://127.0.0.1:{edge.settings.metrics.port}"
    metrics = httpx.get(f"{url}/metrics").text
    assert 'haproxy_backend_http_requests_total{proxy="fraud--4--aa"}' in metrics
    assert httpx.post(f"{url}/v2/models/fraud/infer").status_code == 404


@pytest.mark.parametrize("percent", [1, 30, 50])
def test_the_split_is_exact_in_percent(lab: Lab, percent: int) -> None:
    v3, v4 = lab.upstream("v3"), lab.upstream("v4")
    fraud = a_model(
        a_version("3", a_server(v3.port)),
        a_version("4", a_server(v4.port)),
        split={"3": 100 - percent, "4": percent},
    )
    edge = lab.start(a_routing(fraud))
    slots = Counter(edge.runtime.map("slots").values())
    assert slots == {"fraud--3--aa": 100 - percent, "fraud--4--aa": percent}
    with client_of(edge) as client:
        names = Counter(client.post("/v2/models/fraud/infer").json()["name"] for _ in range(1000))
    deviation = (1000 * percent / 100 * (1 - percent / 100)) ** 0.5
    assert abs(names["v4"] - 10 * percent) < 5 * deviation


def test_a_sticky_caller_stays_on_one_version(lab: Lab) -> None:
    v3, v4 = lab.upstream("v3"), lab.upstream("v4")

    def split(percent: int) -> object:
        return a_routing(
            a_model(
                a_version("3", a_server(v3.port)),
                a_version("4", a_server(v4.port)),
                split={"3": 100 - percent, "4": percent},
                sticky_header="X-Session-Id",
            )
        )

    edge = lab.start(split(20))  # type: ignore[arg-type]
    with client_of(edge) as client:

        def version_of(caller: int) -> str:
            headers = {"x-session-id": f"caller-{caller}"}
            answer = client.post("/v2/models/fraud/infer", headers=headers).json()
            assert answer["headers"]["x-session-id"] == f"caller-{caller}"
            return str(answer["name"])

        first = [version_of(i) for i in range(200)]
        assert [version_of(i) for i in range(200)] == first
        assert 15 < first.count("v4") < 70
        assert edge.apply(split(60)).kind == "runtime"  # type: ignore[arg-type]
        later = [version_of(i) for i in range(200)]
        assert all(b == "v4" for a, b in zip(first, later, strict=True) if a == "v4")
        unnamed = {client.post("/v2/models/fraud/infer").json()["name"] for _ in range(50)}
        assert unnamed == {"v3", "v4"}


def test_a_replica_that_is_not_ready_gets_nothing(lab: Lab) -> None:
    good, bad = lab.upstream("good"), lab.upstream("bad")
    bad.is_ready = False
    edge = lab.start(a_routing(a_model(a_version("4", a_server(good.port), a_server(bad.port)))))
    wait_until(lambda: f"r{bad.port} is DOWN" in "\n".join(edge.events()))
    with client_of(edge) as client:
        names = {client.post("/v2/models/fraud/infer").json()["name"] for _ in range(20)}
    assert names == {"good"}


def test_the_callers_deadline_shortens_the_wait(lab: Lab) -> None:
    slow: Upstream = lab.upstream("slow")
    slow.delay_s = 5
    edge = lab.start(a_routing(a_model(a_version("4", a_server(slow.port)))))
    with client_of(edge, timeout=20) as client:
        answer = client.post("/v2/models/fraud/infer", headers={"x-request-timeout-ms": "200"})
    assert answer.status_code == 504
    assert answer.elapsed.total_seconds() < 3
    assert slow.seen == 1  # its time is over: it is not tried again
