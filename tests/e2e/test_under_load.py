"""Is a request ever lost while replicas die, versions roll, keys rotate and certificates change?"""

from __future__ import annotations

import os
import signal
import ssl
import time
from pathlib import Path

import trustme
import yaml

from tests.e2e.cluster import EXAMPLES, Cluster, until

REQUESTS = 5000


def test_killing_a_replica_under_load_fails_no_request(digits: Cluster) -> None:
    victim = digits.replicas("digits")[0]
    with digits.load([digits.exchange("digits")], REQUESTS, 32) as traffic:
        os.kill(victim["pid"], signal.SIGKILL)
        outcome = traffic.outcome()
    assert (outcome.failures, outcome.answered_total) == (0, REQUESTS), outcome

    def pids() -> set[int]:
        return {r["pid"] for r in digits.replicas("digits")}

    until(lambda: len(pids()) == 2 and victim["pid"] not in pids())


def test_killing_the_only_replica_holds_requests_until_another_is_up(cluster: Cluster) -> None:
    document = yaml.safe_load((EXAMPLES / "digits.yaml").read_text())
    document["name"] = "lonely"
    document["versions"][1]["source"] = str(EXAMPLES / "weights" / "digits.joblib")
    cluster.deploy(document)
    exchange = cluster.exchange("digits")
    lonely = type(exchange)(
        exchange.request.replace(b"/models/digits/", b"/models/lonely/"),
        exchange.path,
        exchange.expected,
    )
    (victim,) = cluster.replicas("lonely")
    with cluster.load([lonely], 1500, 8) as traffic:
        os.kill(victim["pid"], signal.SIGKILL)
        outcome = traffic.outcome()
    assert (outcome.failures, outcome.answered_total) == (0, 1500), outcome
    cluster.ok("delete", "lonely")


def test_rolling_a_version_over_under_load_fails_no_request(digits: Cluster) -> None:
    document = yaml.safe_load((digits.home / "digits.yaml").read_text())
    document["versions"][1]["batching"] = {"batch_size_max": 64}
    document["rollout"] = {"rollback_window_s": 0}
    before = {r["pid"] for r in digits.replicas("digits")}
    with digits.load([digits.exchange("digits")], 2 * REQUESTS, 16) as traffic:
        digits.deploy(document)
        until(lambda: not before & {r["pid"] for r in digits.model("digits")["replicas"]}, 60)
        is_rolled_under_load = traffic.is_going
        outcome = traffic.outcome()
    assert (outcome.failures, outcome.answered_total) == (0, 2 * REQUESTS), outcome
    assert is_rolled_under_load or outcome.window_s > 5


def test_rotating_a_key_under_load_fails_no_request(digits: Cluster) -> None:
    key = digits.ok("keys", "create", "rotating")["key"]
    until(lambda: _is_let_in(digits, key), 10)
    with digits.load([digits.exchange("digits", key)], REQUESTS, 16) as traffic:
        new = digits.ok("keys", "rotate", "rotating", "--overlap-s", "600")["key"]
        until(lambda: _is_let_in(digits, new), 10)
        outcome = traffic.outcome()
    assert (outcome.failures, outcome.answered_total) == (0, REQUESTS), outcome
    digits.ok("keys", "rotate", "rotating", "--overlap-s", "0")
    until(lambda: not _is_let_in(digits, new), 10)
    digits.ok("keys", "revoke", "rotating")


def test_a_key_is_held_to_its_models_its_rate_and_its_role(digits: Cluster) -> None:
    limited = digits.ok("keys", "create", "limited", "--rate-rps", "5")["key"]
    other = digits.ok("keys", "create", "elsewhere", "--models", "minilm")["key"]
    until(lambda: _is_let_in(digits, limited), 10)
    request = digits.example("digits")
    replies = [
        digits.post(request["path"], request["body"], headers={"x-api-key": limited})
        for _ in range(30)
    ]
    refused = [r for r in replies if r.status_code == 429]
    assert refused
    assert refused[0].headers["retry-after"]
    assert refused[0].json()["error"]
    assert not _is_let_in(digits, other)
    reply = digits.post("/admin/v1/keys", {"name": "x"}, headers={"x-api-key": limited})
    assert reply.status_code in (403, 429)
    digits.ok("keys", "revoke", "limited")
    until(lambda: not _is_let_in(digits, limited), 10)


def test_a_new_certificate_is_taken_into_use_under_load_without_a_failed_request(
    digits: Cluster, authority: trustme.CA, tmp_path: Path
) -> None:
    port = int(digits.status["https"].rsplit(":", 1)[1])
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    pem = digits.home.parent / "server.pem"
    before = ssl.get_server_certificate(("127.0.0.1", port))
    load = {"port": port, "ca_pem": str(ca), "reuse_max": 20}
    with digits.load([digits.exchange("digits")], REQUESTS, 16, **load) as traffic:
        fresh = pem.with_suffix(".new")
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(fresh))
        fresh.replace(pem)
        until(lambda: ssl.get_server_certificate(("127.0.0.1", port)) != before, 20)
        outcome = traffic.outcome()
    assert (outcome.failures, outcome.answered_total) == (0, REQUESTS), outcome


def test_a_bad_certificate_is_refused_and_the_old_one_stays(digits: Cluster) -> None:
    port = int(digits.status["https"].rsplit(":", 1)[1])
    pem = digits.home.parent / "server.pem"
    good = pem.read_text()
    before = ssl.get_server_certificate(("127.0.0.1", port))
    try:
        pem.write_text("not a certificate")
        until(lambda: digits.ok("status")["edge"]["certificate_error"], 20)
        assert ssl.get_server_certificate(("127.0.0.1", port)) == before
    finally:
        pem.write_text(good)
    until(lambda: not digits.ok("status")["edge"]["certificate_error"], 20)


def test_a_queue_at_its_bound_answers_429_with_retry_after_and_loses_nothing(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\n\n\nclass Slow:\n    def predict(self, inputs):\n"
        "        time.sleep(0.2)\n        return {'y': inputs['x']}\n"
    )
    tensor = {"name": "x", "datatype": "FP32", "shape": [-1]}
    version = {
        "runtime": "python",
        "source": str(tmp_path / "slow.py"),
        "resources": {"cpu": 0.1},
        "batching": {"batch_size_max": 1, "queue_requests_max": 4},
        "inputs": [tensor],
        "outputs": [{**tensor, "name": "y"}],
    }
    cluster.deploy({"name": "slow", "versions": {"1": version}})
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0]}]}
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(24) as pool:
        start_s = time.monotonic()
        replies = list(pool.map(lambda _: cluster.post("/v2/models/slow/infer", body), range(24)))
    codes = sorted({r.status_code for r in replies})
    assert codes == [200, 429]
    assert all(r.headers["retry-after"] for r in replies if r.status_code == 429)
    assert time.monotonic() - start_s < 20
    late = cluster.post(
        "/v2/models/slow/infer", body, headers={**cluster.headers, "x-request-timeout-ms": "50"}
    )
    assert late.status_code == 504
    cluster.ok("delete", "slow")


def _is_let_in(cluster: Cluster, key: str) -> bool:
    request = cluster.example("digits")
    reply = cluster.post(request["path"], request["body"], headers={"x-api-key": key})
    return reply.status_code == 200
