"""Do real models answer official clients through the edge, and do versions come and go safely?"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
import yaml

from deployments.registry import Registry
from tests.e2e.cluster import EXAMPLES, Cluster, is_alive, until

DIGITS = str(EXAMPLES / "weights" / "digits.joblib")


def a_model(name: str, **fields: Any) -> dict[str, Any]:
    """A small model file over the digits forest; `versions` are its versions' names."""
    versions = fields.pop("versions", ("1",))
    spec = {
        "runtime": "sklearn",
        "source": DIGITS,
        "resources": {"cpu": 0.1},
        "inputs": [{"name": "pixels", "datatype": "FP32", "shape": [-1, 64]}],
    }
    named = versions if isinstance(versions, dict) else {v: {} for v in versions}
    return {
        "name": name,
        "versions": {v: {**spec, **(own or {})} for v, own in named.items()},
        **fields,
    }


PIXELS = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 64], "data": [0.0] * 64}]}


def test_every_example_gives_the_right_answer(cluster: Cluster) -> None:
    names = [f.stem for f in (EXAMPLES / "requests").glob("*.json") if f.stem != "smollm2"]
    files = [*EXAMPLES.glob("*.yaml"), *EXAMPLES.glob("*/*.yaml")]
    shared = {"digits", "smollm2"}
    deployed = [f for f in files if yaml.safe_load(f.read_text())["name"] not in shared]
    for file in deployed:
        cluster.ok("deploy", str(file), "--no-wait")
    for name in set(names) - shared:
        until(lambda name=name: cluster.model(name)["is_settled"], 180)  # type: ignore[misc]
        request = cluster.example(name)
        reply = cluster.post(request["path"], request["body"])
        assert reply.status_code == 200, (name, reply.text)
        from examples.send import holds

        assert holds(reply.json(), request["expect"]), name
    for name in set(names) - shared - {"minilm"}:
        cluster.ok("delete", name)


def test_official_triton_clients_are_answered_through_the_edge(digits: Cluster) -> None:
    http = triton_http.InferenceServerClient(digits.url.removeprefix("http://"))
    assert http.is_server_ready()
    assert http.is_model_ready("digits", headers=dict(digits.headers))
    tensor = triton_http.InferInput("pixels", [2, 64], "FP32")
    tensor.set_data_from_numpy(np.zeros((2, 64), np.float32))
    by_http = http.infer("digits", [tensor], headers=dict(digits.headers)).as_numpy("label")

    grpc = triton_grpc.InferenceServerClient(digits.status["grpc"])
    assert grpc.is_model_ready("digits", headers=dict(digits.headers))
    tensor = triton_grpc.InferInput("pixels", [2, 64], "FP32")
    tensor.set_data_from_numpy(np.zeros((2, 64), np.float32))
    by_grpc = grpc.infer("digits", [tensor], headers=dict(digits.headers)).as_numpy("label")
    assert by_http.tolist() == by_grpc.tolist()
    index = http.get_model_repository_index(headers=dict(digits.headers))
    assert {"name": "digits", "version": "1", "state": "READY", "reason": ""} in index


def test_the_openai_client_lists_models_and_gets_embeddings(cluster: Cluster) -> None:
    cluster.deploy(EXAMPLES / "minilm.yaml")
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=cluster.key)
    assert "minilm" in [m.id for m in client.models.list()]
    vectors = client.embeddings.create(model="minilm", input=["a cat", "a kitten", "tax law"])
    a, b, c = (np.array(item.embedding) for item in vectors.data)
    assert a @ b > a @ c
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="nobody", input="x")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="wrong").models.list()


def test_tensorflow_serving_clients_find_their_own_listener(digits: Cluster) -> None:
    base = digits.status["tensorflow"]
    reply = httpx.post(
        f"{base}/v1/models/digits:predict",
        json={"signature_name": "serving_default", "instances": [{"pixels": [0.0] * 64}]},
        headers=digits.headers,
        timeout=30,
    )
    assert reply.status_code == 200, reply.text
    assert len(reply.json()["predictions"]) == 1
    status = httpx.get(f"{base}/v1/models/digits", headers=digits.headers).json()
    assert [v["state"] for v in status["model_version_status"]] == ["AVAILABLE"]


def test_a_version_that_fails_exits_1_with_its_reason_and_the_old_one_serves(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.deploy(a_model("steady"))
    (tmp_path / "broken.joblib").write_bytes(b"not a forest")
    bad = a_model("steady", versions={"1": {}, "2": {"source": str(tmp_path / "broken.joblib")}})
    done = cluster.run("deploy", str(cluster.file(bad)))
    assert done.code == 1
    assert "broken.joblib" in done.value["error"]
    assert "version 2" in done.value["error"]
    answers = [cluster.post("/v2/models/steady/infer", PIXELS).json() for _ in range(20)]
    assert {a["model_version"] for a in answers} == {"1"}
    assert "broken.joblib" in json.dumps(cluster.ok("logs", "steady")["reasons"])
    cluster.ok("delete", "steady")


def test_a_bad_model_file_exits_2_and_changes_nothing(cluster: Cluster) -> None:
    wrong = a_model("typo")
    wrong["versions"]["1"]["batchin"] = {}
    done = cluster.run("deploy", str(cluster.file(wrong)))
    assert done.code == 2
    assert "did you mean 'batching'" in done.value["error"]
    assert "typo" not in [m["name"] for m in cluster.ok("models")]


def test_a_canary_gets_its_share_then_is_promoted_and_rolled_back(cluster: Cluster) -> None:
    versions = {"1": {"labels": ["stable"]}, "2": {"labels": ["candidate"]}}
    cluster.deploy(a_model("canary", versions=versions, traffic={"1": 80, "2": 20}))

    def served(count: int = 200) -> dict[str, int]:
        found: dict[str, int] = {}
        with httpx.Client(headers=cluster.headers, timeout=30) as client:
            for _ in range(count):
                reply = client.post(f"{cluster.url}/v2/models/canary/infer", json=PIXELS).json()
                found[reply["model_version"]] = found.get(reply["model_version"], 0) + 1
        return found

    assert 20 <= served()["2"] <= 65  # 40 expected; 4 standard deviations are 23
    by_label = cluster.post(
        "/v1/models/canary/labels/candidate:predict", {"instances": [[0.0] * 64]}
    )
    assert by_label.status_code == 200, by_label.text
    cluster.ok("promote", "canary", "2", "--steps", "50", "--interval-s", "1")
    assert served(40) == {"2": 40}
    before = cluster.replicas("canary")
    start_s = time.monotonic()
    cluster.ok("rollback", "canary")
    assert time.monotonic() - start_s < 10
    assert served()["1"] > 100
    assert {r["pid"] for r in cluster.replicas("canary")} == {r["pid"] for r in before}
    cluster.ok("delete", "canary")


def test_deleting_a_model_ends_its_processes_and_its_routes(cluster: Cluster) -> None:
    cluster.deploy(a_model("gone"))
    pids = [r["pid"] for r in cluster.replicas("gone")]
    assert pids
    cluster.ok("delete", "gone")
    until(lambda: not any(is_alive(pid) for pid in pids), 30)
    reply = cluster.post("/v2/models/gone/infer", PIXELS)
    assert reply.status_code == 404
    assert reply.json()["error"].startswith("Request for unknown model")


def test_a_sleeping_model_holds_requests_until_it_is_up_again(cluster: Cluster) -> None:
    scaling = {"replicas_min": 0, "idle_to_zero_s": 2}
    cluster.deploy(a_model("sleepy", scaling=scaling))

    def state() -> str:
        return str(cluster.model("sleepy")["versions"][0]["state"])

    until(lambda: state() == "idle", 30)
    until(lambda: not cluster.model("sleepy")["replicas"], 30)
    assert (
        httpx.get(f"{cluster.url}/v2/models/sleepy/ready", headers=cluster.headers).status_code
        == 200
    )
    replies: list[int] = []

    def ask() -> None:
        replies.append(cluster.post("/v2/models/sleepy/infer", PIXELS).status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert replies == [200] * 8
    cluster.ok("delete", "sleepy")


def test_a_model_comes_from_the_registry_by_version(cluster: Cluster) -> None:
    registry = Registry(f"sqlite:///{cluster.home / 'registry.db'}", cluster.home / "artifacts")
    number = registry.register("forest", Path(DIGITS), runtime="sklearn")
    source = {"1": {"source": f"models:/forest/{number}"}}
    cluster.deploy(a_model("registered", versions=source))
    assert cluster.post("/v2/models/registered/infer", PIXELS).status_code == 200
    cluster.ok("delete", "registered")


def test_loading_and_unloading_over_tritons_routes_works(cluster: Cluster) -> None:
    cluster.deploy(a_model("switch"))
    client = triton_http.InferenceServerClient(cluster.url.removeprefix("http://"))
    client.unload_model("switch", headers=dict(cluster.headers))
    until(lambda: not cluster.model("switch")["replicas"], 30)
    client.load_model("switch", headers=dict(cluster.headers))
    until(lambda: cluster.replicas("switch"), 60)
    assert cluster.post("/v2/models/switch/infer", PIXELS).status_code == 200
    cluster.ok("delete", "switch")
