"""Does a request survive what happens to the edge and to the replicas behind it?"""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deployments.edge.process import Edge, EdgeError
from deployments.edge.routing import Listener, Routing, Server
from tests.deployments.edge.conftest import (
    Lab,
    a_key,
    a_model,
    a_routing,
    a_server,
    a_version,
    client_of,
    wait_until,
)
from tests.deployments.edge.load import Load
from tests.deployments.edge.ports import free_port


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def a_process(processes: list[subprocess.Popen[bytes]]) -> Server:
    """A replica that can be killed."""
    port, grpc_port = free_port(), free_port()
    words = [sys.executable, "-m", "tests.deployments.edge.upstream", str(port), str(grpc_port)]
    processes.append(subprocess.Popen(words))
    wait_until(lambda: _answers(port), 30)
    return a_server(port, grpc_port)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_replica_killed_under_load_costs_no_request(
    lab: Lab, processes: list[subprocess.Popen[bytes]]
) -> None:
    killed, survivor = a_process(processes), a_process(processes)
    fraud = a_model(a_version("4", killed, survivor))
    edge = lab.start(a_routing(fraud))
    with Load(edge.settings.http.port, callers=32).running() as load:
        wait_until(lambda: load.sent > 700)
        os.kill(processes[0].pid, signal.SIGKILL)
        wait_until(lambda: load.sent > 2500, 30)
    assert (set(load.answers), load.errors) == ({"200"}, [])
    wait_until(lambda: f"{killed.name} is DOWN" in "\n".join(edge.events()))


def test_a_replica_killed_under_load_costs_hardly_a_grpc_call(
    lab: Lab, processes: list[subprocess.Popen[bytes]]
) -> None:
    """Only an answer that has begun can be lost: HTTP/2 has its head apart, about one kill in 30.

    HAProxy then ends the stream with CANCELLED, which a caller may repeat.
    """
    fraud = a_model(a_version("4", a_process(processes), a_process(processes)))
    edge = lab.start(a_routing(fraud))
    target = f"localhost:{edge.settings.http.port}"
    request = service_pb2.ModelInferRequest(model_name="fraud")
    answered: Counter[int] = Counter()
    lost: list[grpc.StatusCode] = []

    def call(caller: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(target, options=options) as channel:
            stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            while sum(answered.values()) < 1500:
                try:
                    assert stub.ModelInfer(request, timeout=20).model_name == "fraud"
                    answered[caller] += 1
                except grpc.RpcError as error:
                    lost.append(error.code())

    with ThreadPoolExecutor(8) as crowd:
        calls = [crowd.submit(call, caller) for caller in range(8)]
        wait_until(lambda: sum(answered.values()) > 300, 30)
        os.kill(processes[0].pid, signal.SIGKILL)
        for done in calls:
            done.result()
    assert len(lost) <= 2
    assert set(lost) <= {grpc.StatusCode.CANCELLED}


def test_a_replica_that_begins_to_drain_costs_no_request(lab: Lab) -> None:
    leaves, stays = lab.upstream("leaves"), lab.upstream("stays")
    fraud = a_model(a_version("4", a_server(leaves.port), a_server(stays.port)))
    edge = lab.start(a_routing(fraud))
    with Load(edge.settings.http.port, callers=8).running() as load:
        wait_until(lambda: leaves.seen > 100)
        leaves.status, leaves.is_ready = 503, False
        wait_until(lambda: load.sent > 800)
    assert (set(load.answers), load.errors) == ({"200"}, [])


def test_what_must_not_be_repeated_is_not(
    lab: Lab, processes: list[subprocess.Popen[bytes]]
) -> None:
    drains = lab.upstream("drains")
    drains.status = 503
    other = lab.upstream("other")
    servers = (a_server(drains.port), a_server(other.port))
    edge = lab.start(a_routing(a_model(a_version("4", *servers, idempotent=False))))
    with client_of(edge) as client:
        statuses = {client.post("/v2/models/fraud/infer").status_code for _ in range(10)}
        assert statuses == {200, 503}
        refused = a_server(free_port())
        route = a_version("4", refused, servers[1], idempotent=False)
        edge.apply(a_routing(a_model(route)))  # a connection refused is safe to repeat
        statuses = {client.post("/v2/models/fraud/infer").status_code for _ in range(10)}
        assert statuses == {200}


def test_without_a_live_replica_the_desk_gets_the_request(
    lab: Lab, processes: list[subprocess.Popen[bytes]]
) -> None:
    desk = lab.upstream("desk")
    fraud = a_model(a_version("4", a_process(processes)))
    edge = lab.start(a_routing(fraud, desks=(a_server(desk.port),)))
    with Load(edge.settings.http.port, callers=8).running() as load:
        wait_until(lambda: load.sent > 200)
        assert desk.seen == 0
        os.kill(processes[0].pid, signal.SIGKILL)
        wait_until(lambda: desk.seen > 200)
    assert (set(load.answers), load.errors) == ({"200"}, [])


def test_nobody_at_all_is_said_in_the_protocols_form(lab: Lab) -> None:
    edge = lab.start(a_routing(a_model(a_version("4"))))
    with client_of(edge) as client:
        oip = client.post("/v2/models/fraud/infer")
        chat = client.post("/v1/chat/completions", json={"model": "fraud"})
        page = client.get("/docs")
    assert [a.status_code for a in (oip, chat, page)] == [503, 503, 503]
    assert oip.json() == {"error": "no replica could take the request"}
    assert chat.json()["error"]["type"] == "server_error"
    assert oip.headers["retry-after"] == chat.headers["retry-after"] == "1"
    assert "html" not in oip.text + chat.text + page.text


def test_replicas_come_and_go_under_load_without_a_reload(lab: Lab) -> None:
    upstreams = [lab.upstream(f"r{i}") for i in range(3)]
    ports = [upstream.port for upstream in upstreams]

    def routing(*indices: int) -> Routing:
        return a_routing(a_model(a_version("4", *(a_server(ports[i]) for i in indices))))

    edge = lab.start(routing(0))
    before = edge.pids()
    with Load(edge.settings.http.port, callers=8).running() as load:
        for indices in [(0, 1), (1,), (1, 2), (2, 0), (0,), (1, 2), (2,), (0, 1, 2), (0,)] * 3:
            sent = load.sent
            wait_until(lambda sent=sent: load.sent > sent + 30)  # type: ignore[misc]
            assert edge.apply(routing(*indices)).kind == "runtime"
    assert (set(load.answers), load.errors, edge.pids()) == ({"200"}, [], before)
    for upstream in upstreams[1:]:
        upstream.stop()  # and with it the connections that were kept for the next request
    wait_until(lambda: edge.sweep() == 0)
    assert [s.name for s in edge.runtime.servers() if not s.backend.endswith("grpc")] == [
        f"r{ports[0]}"
    ]


def test_a_request_in_flight_on_a_replica_that_leaves_is_answered(lab: Lab) -> None:
    slow = lab.upstream("slow")
    slow.delay_s = 0.6
    edge = lab.start(a_routing(a_model(a_version("4", a_server(slow.port)))))
    with Load(edge.settings.http.port, callers=1).running() as load:
        wait_until(lambda: slow.seen == 1)
        assert edge.apply(a_routing(a_model(a_version("4")))).leaving == 1
        wait_until(lambda: load.answers["503"] > 0)  # the next has nobody left
        assert (load.answers["200"], load.errors) == (1, [])
        # the same replica may come back before it is gone
        assert edge.apply(a_routing(a_model(a_version("4", a_server(slow.port))))).kind == "runtime"
        wait_until(lambda: load.answers["200"] == 2)


def test_reloads_under_load_cost_no_request(lab: Lab) -> None:
    port = lab.upstream().port
    main = a_model(a_version("4", a_server(port)))

    def with_version(number: int) -> Routing:
        other = a_version(str(number), a_server(port, name=f"o{number}"), model="other")
        return a_routing(main, a_model(other, name="other"))

    edge = lab.start(with_version(0), threads=2)
    with Load(edge.settings.http.port, callers=16).running() as load:
        for number in range(1, 8):
            sent = load.sent
            wait_until(lambda sent=sent: load.sent > sent + 200)  # type: ignore[misc]
            applied = edge.apply(with_version(number))
            assert (applied.kind, f"backend other--{number}--aa" in applied.because) == (
                "reload",
                True,
            )
    assert (set(load.answers), load.errors) == ({"200"}, [])
    with client_of(edge) as client:
        assert client.post("/v2/models/other/versions/7/infer").status_code == 200
        assert client.post("/v2/models/other/versions/1/infer").status_code == 503
    wait_until(lambda: len(edge.pids()) == 2)  # the workers before have ended


def test_a_reload_keeps_the_counters_of_the_limits(lab: Lab) -> None:
    """HAProxy hands them on once it has run for five seconds (its wait for a peer's lesson)."""
    server = a_server(lab.upstream().port)
    key = a_key("anna", "a", rate_rps=100_000)

    def routing(version: str) -> Routing:
        return a_routing(a_model(a_version(version, server)), keys=(key,))

    edge = lab.start(routing("1"))
    wait_until(lambda: _peers_have_learnt(edge), 15)
    with client_of(edge, headers={"x-api-key": "a"}) as client:
        for _ in range(20):
            client.post("/v2/models/fraud/infer")
    assert edge.apply(routing("2")).kind == "reload"
    wait_until(lambda: "gpc0=20 " in edge.runtime.send("show table limits"))


def _peers_have_learnt(edge: Edge) -> bool:
    line = edge.runtime.send("show peers").splitlines()[0]
    return int(line.partition("flags=")[2].split()[0], 16) & 3 == 3


def test_a_configuration_that_haproxy_refuses_changes_nothing(
    lab: Lab,
) -> None:
    routing = a_routing(a_model(a_version("4", a_server(lab.upstream().port))))
    edge = lab.start(routing)
    pids, current = edge.pids(), (edge.folder / "current").readlink()
    other = Edge(edge.folder, lab.settings(http=edge.settings.http, threads=-3))
    with pytest.raises(EdgeError, match=r"nbthread.*-3"):
        other.apply(routing)
    taken = Listener("127.0.0.1", lab.upstream("other").port)
    other = Edge(edge.folder, lab.settings(http=edge.settings.http, grpc=taken))
    with pytest.raises(EdgeError, match=rf"cannot bind.*{taken.port}"):
        other.apply(routing)
    assert (edge.pids(), (edge.folder / "current").readlink()) == (pids, current)
    with client_of(edge) as client:
        assert client.post("/v2/models/fraud/infer").status_code == 200
    assert edge.apply(routing).kind == "none"


def test_a_port_in_use_is_named_at_the_start(lab: Lab) -> None:
    taken = Listener("127.0.0.1", lab.upstream().port)
    with pytest.raises(EdgeError, match=rf"cannot bind socket.*{taken.port}"):
        lab.start(a_routing(), http=taken)


def test_the_edge_outlives_its_agent_and_a_new_agent_adopts_it(lab: Lab, tmp_path: Path) -> None:
    port = lab.upstream().port
    routing = a_routing(a_model(a_version("4", a_server(port))))
    edge = lab.start(routing)
    pids = edge.pids()
    heir = Edge(edge.folder, edge.settings)
    assert heir.is_running
    assert heir.adopt()
    assert (heir.apply(routing).kind, heir.pids()) == ("none", pids)
    two = a_routing(a_model(a_version("4", a_server(port), a_server(port, name="twin"))))
    assert heir.apply(two).kind == "runtime"
    with pytest.raises(EdgeError, match="adopt it, or stop it"):
        Edge(edge.folder, edge.settings).start(routing)
    assert not Edge(tmp_path / "nobody", edge.settings).adopt()


def test_a_heir_mends_what_an_agent_left_half_done(lab: Lab) -> None:
    ports = [lab.upstream().port for _ in range(2)]
    routings = [a_routing(a_model(a_version("4", a_server(port)))) for port in ports]
    edge = lab.start(routings[0])
    edge.runtime.perform = _die  # type: ignore[method-assign]  # after the files, before HAProxy
    with pytest.raises(KeyboardInterrupt):
        edge.apply(routings[1])
    heir = Edge(edge.folder, edge.settings)
    assert heir.adopt()
    assert [s.name for s in heir.runtime.servers() if s.is_replica] == [f"r{ports[1]}"]


def _die(command: object) -> None:
    raise KeyboardInterrupt


def test_a_crash_of_haproxy_is_mended_from_the_files(lab: Lab) -> None:
    port = lab.upstream().port
    fraud = a_model(a_version("4"), sticky_header="x-user")
    edge = lab.start(a_routing(fraud, keys=(a_key(),)))
    edge.apply(a_routing(a_model(a_version("4", a_server(port))), keys=(a_key(),)))
    for pid in edge.pids():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not edge.is_running)
    with pytest.raises(EdgeError, match="no edge runs"):
        edge.apply(a_routing())
    wait_until(lambda: not edge.pids())
    edge.start()
    with client_of(edge, headers={"x-api-key": "secret"}) as client:
        assert client.post("/v2/models/fraud/infer").status_code == 200


def test_a_dead_worker_takes_the_master_along_so_that_it_is_seen(lab: Lab) -> None:
    edge = lab.start(a_routing())
    master = int((edge.folder / "edge.pid").read_text())
    for pid in set(edge.pids()) - {master}:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not edge.is_running)


def test_a_long_folder_name_is_no_hindrance_and_others_may_not_look(lab: Lab) -> None:
    lab.folder = lab.folder / ("long" * 40) / "with blanks in it"
    edge = lab.start(a_routing())
    for name in ("edge.sock", "master.sock", "current/haproxy.cfg", "current/maps/models.map"):
        assert (edge.folder / name).stat().st_mode & 0o077 == 0, name
    assert edge.folder.stat().st_mode & 0o077 == 0


def test_stop_ends_all_generations_and_nobody_elses(lab: Lab) -> None:
    slow = lab.upstream()
    slow.delay_s = 30
    edge, other = lab.start(a_routing(a_model(a_version("4", a_server(slow.port))))), None
    other = lab.start(a_routing())
    with Load(edge.settings.http.port, callers=1).running() as load:
        wait_until(lambda: slow.seen == 1)
        edge.apply(a_routing(a_model(a_version("5"))))
        assert len(edge.pids()) == 3  # the old worker still has its request
        edge.stop(grace_s=0.1)
        load.is_over = True
    assert (edge.pids(), edge.is_running) == ([], False)
    assert other.is_running


# --- certificates -------------------------------------------------------------------------------


def write_certificate(authority: trustme.CA, path: Path) -> int:
    """A new certificate at `path`; its serial number."""
    made = authority.issue_cert("localhost")
    chain = b"".join(blob.bytes() for blob in made.cert_chain_pems)
    path.write_bytes(made.private_key_pem.bytes() + b"\n" + chain)
    return _serial(chain.decode())


def _serial(pem: str) -> int:
    from cryptography import x509

    return x509.load_pem_x509_certificate(pem.encode()).serial_number


def serial_shown(port: int) -> int:
    return _serial(ssl.get_server_certificate(("127.0.0.1", port)))


def test_a_certificate_is_changed_under_load_over_tls(lab: Lab, tmp_path: Path) -> None:
    authority, pem = trustme.CA(), tmp_path / "edge.pem"
    first = write_certificate(authority, pem)
    http, replica = lab.upstream(), lab.grpc_upstream()
    https = Listener("127.0.0.1", free_port())
    server = a_server(http.port, replica.port)
    edge = lab.start(
        a_routing(a_model(a_version("4", server))), https=https, tls_pem=str(pem), threads=2
    )
    assert serial_shown(https.port) == first
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    request = service_pb2.ModelInferRequest(model_name="fraud")
    with (
        Load(https.port, callers=8, tls=trust).running() as load,
        grpc.secure_channel(f"localhost:{https.port}", credentials) as channel,  # HTTP/2
    ):
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(3):
            sent = load.sent
            wait_until(lambda sent=sent: load.sent > sent + 100)  # type: ignore[misc]
            serial = write_certificate(authority, pem)
            assert edge.refresh_certificate()
            assert not edge.refresh_certificate()
            assert serial_shown(https.port) == serial
            assert stub.ModelInfer(request).id == "r"
            edge.apply(a_routing(a_model(a_version(f"v{sent}", server))))  # a reload has it too
            assert serial_shown(https.port) == serial
            assert stub.ModelInfer(request).id == "r"
    assert (set(load.answers), load.errors) == ({"200"}, [])


def test_a_bad_certificate_is_refused_and_the_old_one_stays(lab: Lab, tmp_path: Path) -> None:
    authority, pem = trustme.CA(), tmp_path / "edge.pem"
    serial = write_certificate(authority, pem)
    good = pem.read_bytes()
    https = Listener("127.0.0.1", free_port())
    edge = lab.start(a_routing(), https=https, tls_pem=str(pem))
    key = good[: good.index(b"-----BEGIN CERT")]
    mismatched = key + authority.issue_cert("localhost").cert_chain_pems[0].bytes()
    for bad in (
        b"",
        b"not a certificate",
        key,
        good.replace(key, b""),
        mismatched,
    ):
        pem.write_bytes(bad)
        with pytest.raises(EdgeError, match=r"edge\.pem"):
            edge.refresh_certificate()
        assert serial_shown(https.port) == serial
    model = a_model(a_version("1"))
    assert edge.apply(a_routing(model)).kind == "reload"  # a bad file is in nobody's way
    edge.stop()
    edge.start()
    assert serial_shown(https.port) == serial
    pem.unlink()
    with pytest.raises(EdgeError, match=r"edge\.pem"):
        edge.refresh_certificate()


def test_old_tls_is_refused_and_http2_is_offered(lab: Lab, tmp_path: Path) -> None:
    authority, pem = trustme.CA(), tmp_path / "edge.pem"
    write_certificate(authority, pem)
    https = Listener("127.0.0.1", free_port())
    lab.start(a_routing(), https=https, tls_pem=str(pem))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection(("127.0.0.1", https.port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        assert (tls.version(), tls.selected_alpn_protocol()) == ("TLSv1.3", "h2")
    old = subprocess.run(
        ["openssl", "s_client", "-tls1_1", "-connect", f"127.0.0.1:{https.port}"],
        input=b"",
        capture_output=True,
    )
    assert b"Cipher is (NONE)" in old.stdout


def test_a_caller_who_sends_slowly_is_not_waited_for(lab: Lab) -> None:
    edge = lab.start(a_routing(keys=(a_key(),)))
    text = edge.runtime.send("show info")
    assert "Maxconn: 8" in text
    started_s = time.monotonic()
    with socket.create_connection(("127.0.0.1", edge.settings.http.port)) as caller:
        caller.settimeout(10)
        caller.sendall(b"POST /v2/models/fraud/infer HTTP/1.1\r\nhost: x\r\n")
        answer = caller.recv(1000)
    assert answer.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - started_s < 8


def test_smuggled_requests_are_refused(lab: Lab) -> None:
    edge = lab.start(a_routing(a_model(a_version("4", a_server(lab.upstream().port)))))
    for text in (
        "POST /v2/models/fraud/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n"
        "content-length: 5\r\n\r\nabcde",
        "POST /v2/models/fraud/infer HTTP/1.1\r\nhost: x\r\ncontent-length : 4\r\n\r\nabcd",
        "POST /v2/models/fraud/infer HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked, x\r\n\r\n",
        "GET /v2 HTTP/1.1\r\nhost: x\r\nx-a: b\r\n x-shoal-role: admin\nx: y\x00\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", edge.settings.http.port)) as caller:
            caller.settimeout(5)
            caller.sendall(text.encode())
            assert caller.recv(1000).split(b" ")[1][:1] == b"4", text


def test_an_edge_without_a_tls_file_says_so(lab: Lab, tmp_path: Path) -> None:
    https = Listener("127.0.0.1", free_port())
    with pytest.raises(EdgeError, match=r"missing\.pem"):
        lab.start(a_routing(), https=https, tls_pem=str(tmp_path / "missing.pem"))


def test_the_same_routing_changes_nothing(lab: Lab) -> None:
    routing = a_routing(a_model(a_version("4", a_server(lab.upstream().port))))
    edge = lab.start(routing)
    current = (edge.folder / "current").readlink()
    assert edge.apply(routing).kind == "none"
    assert (edge.folder / "current").readlink() == current
    with httpx.Client() as client:
        assert client.get(f"http://127.0.0.1:{edge.settings.http.port}/x").status_code == 503
