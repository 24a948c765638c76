"""Does a caller notice when something happens to the cluster?

    load   ├──────────────────────────────────────┤     32 callers who never pause
    event        ▲ a replica is killed · a new version rolls in · a key is rotated ·
                   the TLS certificate is replaced

Each scenario needs at least 5,000 requests and the event to be over before the load is. A failed
request, a wrong answer or a refused connection makes it fail; nothing is asked twice by the load
generator. The cluster is one of its own, started and ended here.

    python -m benchmarks.serving.resilience [--scenarios kill,roll,rotate,certificate]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.serving import workloads
from benchmarks.serving.load import Load, Outcome
from benchmarks.serving.measure import check, events, spawn, wait_until_right
from benchmarks.serving.shoal_system import Shoal, model_file
from benchmarks.serving.workloads import Endpoint

CONNECTIONS = 32
REQUESTS_MIN = 5_000
_CALM_S = 2.0
"""Load before the event, so that there is something to disturb."""
_READY_TIMEOUT_S = 90.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the callers saw. `event_s`: how long the event took, None = it outlasted the load."""

    scenario: str
    requests: int
    failures: int
    errors: dict[str, int]
    wrong: int
    p99_ms: float
    longest_ms: float
    event_s: float | None
    notes: str = ""

    @property
    def is_passed(self) -> bool:
        return self.failures == 0 and self.requests >= REQUESTS_MIN and self.event_s is not None


class Cluster(Shoal):
    """One Shoal with two replicas of the digits forest, and a TLS listener."""

    name = "resilience"

    def open(self) -> Endpoint:
        """Start, deploy, make a key; the plain HTTP endpoint."""
        import trustme

        self.authority = trustme.CA()
        self.certificate = self.folder / "server.pem"
        self.ca_pem = self.folder / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca_pem))
        self.new_certificate()
        self.up("--https-port", "0", "--tls-pem", str(self.certificate))
        self.deploy("1")
        return self.endpoint("digits")

    def new_certificate(self) -> None:
        """Put a fresh certificate of the same authority in place, as a renewal does."""
        issued = self.authority.issue_cert("localhost", "127.0.0.1")
        fresh = self.certificate.with_suffix(".new")
        issued.private_key_and_cert_chain_pem.write_to_path(str(fresh))
        fresh.replace(self.certificate)

    def served_certificate(self) -> str:
        """The certificate that the TLS listener shows now."""
        return ssl.get_server_certificate(("127.0.0.1", self.https_port()))

    def https_port(self) -> int:
        return urlsplit(self.shoal("status")["https"]).port or 443

    def deploy(self, version: str) -> None:
        """Put the forest into force as `version`; returns when it has all the traffic."""
        document = model_file("digits")
        document["scaling"] = {"replicas_min": 2, "replicas_max": 2}
        document["versions"] = {version: document["versions"]["1"]}
        file = self.folder / f"digits-{version}.yaml"
        file.write_text(json.dumps(document))
        self.shoal("deploy", str(file))

    def wait_for_replicas(self, count: int, without_pid: int) -> None:
        """Until `count` replicas are ready, none of them `without_pid`."""
        deadline_s = time.monotonic() + _READY_TIMEOUT_S
        while time.monotonic() < deadline_s:
            pids = {replica["pid"] for replica in self.replicas("digits")}
            if len(pids - {without_pid}) >= count and without_pid not in pids:
                return
            time.sleep(0.3)
        raise TimeoutError(f"{count} replicas were not ready within {_READY_TIMEOUT_S:.0f} s")


def loaded(
    scenario: str, load: Load, event: Callable[[], str], more: Callable[[], Load] | None
) -> Verdict:
    """Run `event` while `load` runs (and `more()` after it, beside the first); what callers saw."""
    processes = [spawn(load)]
    try:
        time.sleep(load.warm_s + _CALM_S)
        notes, took_s = _timed(event)
        if more:
            processes.append(spawn(more()))
        outcomes = [said for p in processes for said in events(p) if isinstance(said, Outcome)]
    finally:
        for process in processes:
            process.kill()
    if took_s is not None and _CALM_S + took_s > load.seconds:
        took_s, notes = None, f"{notes}; the load was over after {load.seconds:.0f} s"
    return _verdict(scenario, outcomes, took_s, notes)


def _timed(event: Callable[[], str]) -> tuple[str, float | None]:
    """What the event says and how long it took; None if it did not come to its end."""
    began_s = time.monotonic()
    try:
        return event(), time.monotonic() - began_s
    except (TimeoutError, RuntimeError) as error:
        return str(error), None


def _verdict(scenario: str, outcomes: list[Outcome], event_s: float | None, notes: str) -> Verdict:
    errors: dict[str, int] = {}
    for outcome in outcomes:
        for kind, count in outcome.errors.items():
            errors[kind] = errors.get(kind, 0) + count
    failures = sum(outcome.failures for outcome in outcomes)
    return Verdict(
        scenario=scenario,
        requests=sum(outcome.answered_total for outcome in outcomes) + sum(errors.values()),
        failures=failures,
        errors=errors,
        wrong=sum(outcome.wrong for outcome in outcomes),
        p99_ms=max(outcome.p99_ms for outcome in outcomes),
        longest_ms=max(outcome.longest_ms for outcome in outcomes),
        event_s=event_s,
        notes=notes,
    )


def a_load(endpoint: Endpoint, seconds: float) -> Load:
    """32 callers of the digits forest; every fifth answer is checked."""
    table = workloads.read("digits")
    return Load(
        port=endpoint.port,
        connections=CONNECTIONS,
        exchanges=table.exchanges(endpoint),
        seconds=seconds,
        check_every=5,
        grace_s=30,
    )


def kill(cluster: Cluster, endpoint: Endpoint) -> Verdict:
    """SIGKILL one of two replicas."""

    def event() -> str:
        pid = cluster.replicas("digits")[0]["pid"]
        os.kill(pid, signal.SIGKILL)
        cluster.wait_for_replicas(2, without_pid=pid)
        return f"killed pid {pid}; two replicas ready again at the end of the event"

    return loaded("kill", a_load(endpoint, 45), event, None)


def roll(cluster: Cluster, endpoint: Endpoint) -> Verdict:
    """Replace the version that everybody uses by a new one."""

    def event() -> str:
        cluster.deploy("2")
        return "version 2 instead of 1"

    return loaded("roll", a_load(endpoint, 45), event, None)


def rotate(cluster: Cluster, endpoint: Endpoint) -> Verdict:
    """Rotate the callers' key; some go on with the old one, others begin with the new one."""
    key = cluster.key

    def event() -> str:
        cluster.key = cluster.shoal("keys", "rotate", "benchmark", "--overlap-s", "60")["key"]
        return "old and new key used side by side"

    def more() -> Load:
        return a_load(cluster.endpoint("digits"), 5)

    old = replace(endpoint, headers={"authorization": f"Bearer {key}"})
    return loaded("rotate", a_load(old, 15), event, more)


def certificate(cluster: Cluster, endpoint: Endpoint) -> Verdict:
    """Replace the certificate file; callers connect anew every 20 requests and verify it."""
    before = cluster.served_certificate()
    load = replace(
        a_load(replace(endpoint, port=cluster.https_port()), 20),
        ca_pem=str(cluster.ca_pem),
        reuse_max=20,
    )

    def event() -> str:
        cluster.new_certificate()
        deadline_s = time.monotonic() + 15
        while cluster.served_certificate() == before and time.monotonic() < deadline_s:
            time.sleep(0.2)
        if cluster.served_certificate() == before:
            raise TimeoutError("the new certificate was not taken into use within 15 s")
        return "the new certificate is shown"

    return loaded("certificate", load, event, None)


SCENARIOS: Mapping[str, Callable[[Cluster, Endpoint], Verdict]] = {
    "kill": kill,
    "rotate": rotate,
    "certificate": certificate,
    "roll": roll,
}


@contextlib.contextmanager
def a_cluster() -> Iterator[tuple[Cluster, Endpoint]]:
    """A running cluster that answers rightly, ended afterwards."""
    cluster = Cluster()
    try:
        endpoint = cluster.open()
        table = workloads.read("digits")
        wait_until_right(endpoint, table.exchanges(endpoint)[0], cluster.tree, 60)
        check(endpoint, table)
        yield cluster, endpoint
    finally:
        cluster.stop()


def run(names: list[str]) -> list[Verdict]:
    """The named scenarios, one after another, on one cluster."""
    verdicts: list[Verdict] = []
    with a_cluster() as (cluster, endpoint):
        for name in names:
            current = replace(endpoint, headers={"authorization": f"Bearer {cluster.key}"})
            verdict = SCENARIOS[name](cluster, current)
            verdicts.append(verdict)
            word = "passed" if verdict.is_passed else "FAILED"
            print(f"{word:6} {json.dumps(asdict(verdict))}", flush=True)
    return verdicts


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--out", type=Path, help="a file for the verdicts as JSON")
    chosen = parser.parse_args()
    names = chosen.scenarios.split(",")
    for name in names:
        if name not in SCENARIOS:
            parser.error(f"--scenarios: {name!r} is not one of {', '.join(SCENARIOS)}")
    verdicts = run(names)
    if chosen.out:
        rows: list[Any] = [asdict(verdict) for verdict in verdicts]
        chosen.out.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(0 if all(verdict.is_passed for verdict in verdicts) else 1)


if __name__ == "__main__":
    main()
