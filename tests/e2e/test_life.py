"""Does a cluster start once, end wholly, and keep serving while parts of it die?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

from tests.e2e.cluster import Cluster, is_alive, until


def test_a_second_up_changes_nothing(cluster: Cluster) -> None:
    pids = [r["pid"] for r in cluster.ok("status")["desks"]]
    again = cluster.ok("up", *cluster.flags)
    assert (again["started"], again["url"]) == (False, cluster.url)
    assert [r["pid"] for r in cluster.ok("status")["desks"]] == pids


def test_commands_say_that_no_cluster_runs_and_exit_3(tmp_path: Path) -> None:
    done = Cluster(tmp_path / "nowhere").run("status")
    assert done.code == 3
    assert "shoal up" in done.value["error"]
    assert Cluster(tmp_path / "nowhere").run("down").value == {"stopped": False}


def test_a_port_in_use_is_an_error_that_names_it_and_starts_nothing(
    cluster: Cluster, tmp_path: Path
) -> None:
    done = Cluster(tmp_path / "other").run("up", "--port", str(cluster.port))
    assert done.code == 2
    assert str(cluster.port) in done.value["error"]
    assert not (tmp_path / "other" / "cluster.json").exists()


def test_two_clusters_live_side_by_side_and_down_ends_only_its_own(
    digits: Cluster, tmp_path: Path
) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    flags = ("--port", "0", "--grpc-port", "0", "--metrics-port", "0")
    other = Cluster(tmp_path / "home", flags)
    try:
        value = other.up()
        assert value["started"]
        status = other.ok("status")
        mine = [r["pid"] for r in status["desks"]]
        assert httpx.get(f"{other.url}/v2/health/ready").status_code == 200
    finally:
        assert other.ok("down") == {"stopped": True}
        left = bystander.poll()
        bystander.kill()
        bystander.wait()
    assert left is None
    assert not any(is_alive(pid) for pid in mine)
    words = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    assert not [line for line in words if str(tmp_path) in line]
    request = digits.example("digits")
    assert digits.post(request["path"], request["body"]).status_code == 200


def test_models_answer_on_while_the_controller_is_away_and_it_comes_back(digits: Cluster) -> None:
    (pid,) = [
        p.pid
        for p in psutil.process_iter(["cmdline", "environ"])
        if (p.info["cmdline"] or [""])[0].startswith("ray::Controller")
        and str(digits.home) in (p.info["environ"] or {}).get("RAY_AUTH_TOKEN_PATH", "")
    ]
    with digits.load([digits.exchange("digits")], 3000) as traffic:
        os.kill(pid, signal.SIGKILL)
        outcome = traffic.outcome()
    assert (outcome.failures, outcome.answered_total) == (0, 3000)
    until(lambda: digits.run("status").code == 0)
    assert digits.model("digits")["is_settled"]
    assert len(digits.replicas("digits")) == 2


def test_figures_of_shoal_and_of_the_edge_are_in_prometheus_form(digits: Cluster) -> None:
    request = digits.example("digits")
    digits.post(request["path"], request["body"])

    def figures() -> str:
        text = httpx.get(digits.status["metrics"]).text
        return text if 'shoal_requests_total{model="digits"' in text else ""

    text = until(figures, 10)
    assert 'outcome="ok"' in text
    assert "haproxy_backend_http_responses_total" in text
    assert "shoal_controller_steps_total" in text
    assert "r-" not in {part for part in text.split('"') if part.startswith("r-")}


def test_help_answers_at_once() -> None:
    start_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "--help"], capture_output=True, text=True
    )
    assert "deploy" in done.stdout
    assert time.monotonic() - start_s < 3
