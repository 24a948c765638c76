"""One real cluster for all tests of this folder; the models that they share."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.e2e.cluster import EXAMPLES, Cluster


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def cluster(authority: trustme.CA) -> Iterator[Cluster]:
    """A running cluster with TLS and a TF Serving listener; ended, and nothing left, at the end."""
    subprocess.run([sys.executable, str(EXAMPLES / "build.py")], check=True)
    folder = Path(tempfile.mkdtemp(prefix="shoal-e2e-"))
    pem = folder / "server.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(pem))
    ports = ("port", "grpc-port", "metrics-port", "tensorflow-port", "https-port")
    flags = [word for name in ports for word in (f"--{name}", "0")]
    made = Cluster(folder / "home", (*flags, "--tls-pem", str(pem)))
    try:
        made.up()
        made.status = made.ok("status")
        yield made
    finally:
        done = made.run("down")
        logs = folder / "home" / "logs"
        if done.code:
            for log in logs.glob("*.log"):
                sys.stderr.write(f"{log.name}: {log.read_text(errors='replace')[-2000:]}\n")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def digits(cluster: Cluster) -> Cluster:
    """The cluster with the digits forest on two replicas."""
    import yaml

    document = yaml.safe_load((EXAMPLES / "digits.yaml").read_text())
    document["scaling"] = {"replicas_min": 2, "replicas_max": 4}
    document["versions"][1]["source"] = str(EXAMPLES / "weights" / "digits.joblib")
    cluster.deploy(document)
    return cluster
