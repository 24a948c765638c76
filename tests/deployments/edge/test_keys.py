"""Who may do what, how much of it, and in which words is it refused?"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from deployments.edge.process import Edge
from deployments.edge.routing import KeyRoute, Routing
from tests.deployments.edge.conftest import (
    Lab,
    a_key,
    a_model,
    a_routing,
    a_server,
    a_version,
    client_of,
    hash_of,
    wait_until,
)
from tests.deployments.edge.load import Load


@pytest.fixture(scope="module")
def edge(shared_lab: Lab) -> Edge:
    replica = a_server(shared_lab.upstream("replica").port)
    desk = a_server(shared_lab.upstream("desk").port)
    routing = a_routing(
        a_model(a_version("4", replica)),
        a_model(a_version("1", replica, model="chat"), name="chat"),
        desks=(desk,),
        keys=(
            a_key("anna", "anna-secret", models=("fraud",)),
            a_key("ben", "ben-secret"),
            a_key("root", "root-secret", is_admin=True),
        ),
    )
    replica_of_chat = a_server(replica.port, name="chat-1")
    chat = a_model(a_version("1", replica_of_chat, model="chat"), name="chat")
    return shared_lab.start(
        Routing((routing.models[0], chat), routing.keys, routing.desks, needs_key=True)
    )


@pytest.fixture(scope="module")
def client(edge: Edge) -> Iterator[httpx.Client]:
    with client_of(edge) as client:
        yield client


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@pytest.mark.parametrize(
    "headers",
    [bearer("anna-secret"), {"x-api-key": "anna-secret"}, {"AUTHORIZATION": "bearer anna-secret"}],
)
def test_a_key_opens_and_goes_no_further(client: httpx.Client, headers: dict[str, str]) -> None:
    answer = client.post("/v2/models/fraud/infer", headers=headers)
    assert answer.status_code == 200
    seen = answer.json()["headers"]
    assert (seen["x-shoal-key"], seen["x-shoal-role"]) == ("anna", "caller")
    assert not {"authorization", "x-api-key"} & set(seen)
    assert "anna-secret" not in str(seen)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        {"authorization": "Basic YW5uYTpzZWNyZXQ="},
        {"authorization": hash_of("anna-secret")},
        {"x-api-key": ""},
        {"x-shoal-key": "anna", "x-shoal-role": "admin"},
    ],
)
def test_without_a_known_key_nothing_opens(client: httpx.Client, headers: dict[str, str]) -> None:
    for method, path in [
        ("POST", "/v2/models/fraud/infer"),
        ("GET", "/v2/models/fraud"),
        ("GET", "/admin/v1/models"),
        ("GET", "/healthz/../admin"),
        ("GET", "/nowhere"),
    ]:
        answer = client.request(method, path, headers=headers)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == 'Bearer realm="shoal"'


@pytest.mark.parametrize(
    "path",
    ["/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"],
)
def test_health_and_documents_need_no_key(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/models/chat/infer", {}),
        ("/v2/models/ch%61t/infer", {}),
        ("/v2/models/chat/versions/1/infer", {}),
        ("/v2%2Fmodels/chat", {}),
        ("/v1/models/chat:predict", {}),
        ("/V1/MODELS/chat", {}),
        ("/v1/chat/completions", {"model": "chat"}),
        ("/v1/chat/completions", {"model": "chat@1"}),
    ],
)
def test_a_key_for_some_models_is_no_key_for_others(
    client: httpx.Client, path: str, body: dict[str, str]
) -> None:
    refused = client.post(path, json=body, headers=bearer("anna-secret"))
    assert refused.status_code == 403
    assert "chat" in str(refused.json()["error"])
    assert client.post(path, json=body, headers=bearer("ben-secret")).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/admin",
        "/admin/v1/keys",
        "/Admin/v1/keys",
        "/%61dmin/v1",
        "/v2/repository/models/fraud/load",
    ],
)
def test_administration_needs_an_admin_key(client: httpx.Client, path: str) -> None:
    assert client.post(path, headers=bearer("ben-secret")).status_code == 403
    answer = client.post(path, headers=bearer("root-secret"))
    assert answer.json()["headers"]["x-shoal-role"] == "admin"


FORMS = [
    ("/v2/models/fraud/infer", ["error"]),
    ("/v1/models/fraud:predict", ["error"]),
    ("/somewhere", ["error"]),
    ("/v1/chat/completions", ["error", "message"]),
    ("/v1/embeddings", ["error", "message"]),
    ("/v1/models", ["error", "message"]),
]


@pytest.mark.parametrize(("path", "where"), FORMS)
def test_a_refusal_has_the_form_of_its_protocol(
    client: httpx.Client, path: str, where: list[str]
) -> None:
    answer = client.post(path, json={}, headers=bearer("wrong"))
    text = answer.json()
    for name in where:
        text = text[name]
    assert text == "this key is not known, or no longer valid"
    assert answer.headers["content-type"] == "application/json"
    if len(where) > 1:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_what_a_caller_writes_can_not_break_the_form(client: httpx.Client) -> None:
    for path in ('/v2/models/a"%20%5C%00%0A%C3%A4%25[var]/infer', "/v2/models/%22}/infer"):
        answer = client.post(path, headers=bearer("anna-secret"))
        assert (answer.status_code, list(answer.json())) == (403, ["error"])


def test_paths_and_headers_have_a_length(client: httpx.Client) -> None:
    assert client.get("/v2/" + "x" * 9000).json()["error"].startswith("the path")
    answer = client.get("/v2", headers={f"x-{i}": "v" * 8000 for i in range(5)})
    assert (answer.status_code, list(answer.json())) == (400, ["error"])


def test_a_refused_upload_still_gets_its_answer(client: httpx.Client) -> None:
    answer = client.post("/v2/models/fraud/infer", content=b"x" * 3_000_000)
    assert answer.status_code == 401


def with_limits(lab: Lab, replica_port: int, *keys: KeyRoute) -> Edge:
    return lab.start(a_routing(a_model(a_version("4", a_server(replica_port))), keys=keys))


def test_the_rate_of_a_key_is_bounded_and_others_are_not_hit(lab: Lab) -> None:
    replica = lab.upstream()
    edge = with_limits(
        lab, replica.port, a_key("anna", "a", rate_rps=50), a_key("ben", "b", rate_rps=1000)
    )
    load = Load(edge.settings.http.port, headers=bearer("a"), callers=4)
    with load.running():
        started_s = time.monotonic()
        while time.monotonic() - started_s < 3:
            with client_of(edge, headers=bearer("b")) as ben:
                assert ben.post("/v2/models/fraud/infer").status_code == 200
    assert set(load.answers) == {"200", "429"}
    assert not load.errors
    seconds = time.monotonic() - started_s
    assert 50 <= load.answers["200"] <= 50 * (seconds + 1)  # the first second may start full
    with client_of(edge, headers=bearer("a")) as anna:
        answers = [anna.post("/v2/models/fraud/infer") for _ in range(60)]
    answer = answers[-1]
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"].endswith("in a second is 50")


def test_the_requests_in_flight_of_a_key_are_bounded(lab: Lab) -> None:
    replica = lab.upstream()
    replica.delay_s = 0.5
    edge = with_limits(lab, replica.port, a_key("anna", "a", concurrency_max=3))
    url = f"http://127.0.0.1:{edge.settings.http.port}/v2/models/fraud/infer"

    async def crowd() -> Counter[int]:
        async with httpx.AsyncClient(headers=bearer("a")) as client:
            answers = await asyncio.gather(*(client.post(url) for _ in range(10)))
        assert all("in flight is 3" in a.text for a in answers if a.status_code == 429)
        return Counter(a.status_code for a in answers)

    assert asyncio.run(crowd()) == {200: 3, 429: 7}
    assert asyncio.run(crowd()) == {200: 3, 429: 7}  # places come back
    assert replica.seen == 6


def test_a_caller_who_leaves_frees_the_place(lab: Lab) -> None:
    replica = lab.upstream()
    replica.delay_s = 3
    edge = with_limits(lab, replica.port, a_key("anna", "a", concurrency_max=1))
    with client_of(edge, headers=bearer("a"), timeout=0.2) as client:
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):  # it was let in
                client.post("/v2/models/fraud/infer")
            wait_until(lambda: "conn_cur=0" in edge.runtime.send("show table limits"), 2)


def test_a_key_is_rotated_under_load_and_nobody_notices(lab: Lab) -> None:
    replica = a_server(lab.upstream().port)

    def routing(*secrets: str) -> Routing:
        key = KeyRoute("anna", tuple(hash_of(s) for s in secrets), rate_rps=100_000)
        return a_routing(a_model(a_version("4", replica)), keys=(key,))

    edge = lab.start(routing("old"))
    load = Load(edge.settings.http.port, headers=bearer("old"), callers=8)
    with load.running():
        while load.sent < 300:
            time.sleep(0.01)
        assert edge.apply(routing("old", "new")).kind == "runtime"
        load.headers = bearer("new")
        for round_number in range(20):  # many keys come and go beside it
            others = [f"{round_number}-{i}" for i in range(50)]
            edge.apply(routing("old", "new", *others))
        with client_of(edge, headers=bearer("old")) as client:
            assert client.post("/v2/models/fraud/infer").status_code == 200
        sent = load.sent
        while load.sent < sent + 300:
            time.sleep(0.01)
        assert edge.apply(routing("new")).kind == "runtime"
        sent = load.sent
        while load.sent < sent + 300:
            time.sleep(0.01)
    assert (set(load.answers), load.errors) == ({"200"}, [])
    with client_of(edge, headers=bearer("old")) as client:
        assert client.post("/v2/models/fraud/infer").status_code == 401
