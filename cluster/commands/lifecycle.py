"""`shoal up`, `down` and `status`: the embedded cluster's life."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.commands.terminal import (
    HomeOption,
    JsonOption,
    client,
    command,
    home_of,
    note,
    out,
    progress,
    show,
    table,
)


@command
def up(
    home: HomeOption = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings.")] = None,
    host: Annotated[str | None, typer.Option(help="The address that the edge binds.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="HTTP (0 = any free one) [default: 8000].")
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="gRPC [default: 8001].")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Prometheus [default: 8002].")
    ] = None,
    tensorflow_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="A listener that is TF Serving only.")
    ] = None,
    https_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="TLS (needs --tls-pem).")
    ] = None,
    tls_pem: Annotated[
        Path | None, typer.Option(help="Certificate and key; a new file is taken into use.")
    ] = None,
    auth: Annotated[
        bool | None, typer.Option("--auth/--no-auth", help="Whether callers need a key.")
    ] = None,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="CPUs in the cluster's books [default: 4 a core].")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs [default: all].")] = None,
    is_json: JsonOption = False,
) -> None:
    """Start a cluster on this machine; harmless when it runs already."""
    from cluster import embedded
    from cluster.config import read_settings

    flags: dict[str, Any] = {
        "home": home_of(home),
        "host": host,
        "port": port,
        "grpc_port": grpc_port,
        "metrics_port": metrics_port,
        "tensorflow_port": tensorflow_port,
        "https_port": https_port,
        "tls_pem": tls_pem,
        "needs_key": auth,
        "cpus": cpus,
        "gpus": gpus,
    }
    start_s = time.monotonic()
    with progress("starting a cluster") as tell:
        running, is_new = embedded.up(read_settings(config, flags), tell)
    value = {
        **_addresses(running),
        "started": is_new,
        "seconds": round(time.monotonic() - start_s, 1),
    }
    show(value, is_json, lambda: _greet(value))


@command
def down(home: HomeOption = None, is_json: JsonOption = False) -> None:
    """End the cluster that 'shoal up' started here, and nothing else."""
    from cluster import embedded

    with progress("stopping the cluster") as tell:
        was_there = embedded.down(home_of(home), tell)
    text = "the cluster is down" if was_there else "no cluster was running"
    show({"stopped": was_there}, is_json, lambda: out.print(text))


@command
def status(home: HomeOption = None, is_json: JsonOption = False) -> None:
    """What runs: addresses, models, replicas, nodes."""
    from cluster import embedded

    reached = client(home)
    value = reached.admin("GET", "status")
    running = embedded.find(home_of(home))
    if running is not None and running.url == reached.url:
        value = {**_addresses(running), **value}
    else:
        value = {"url": reached.url, **value}
    show(value, is_json, lambda: _status(value))


def _addresses(running: Any) -> dict[str, Any]:
    settings = running.settings
    host = settings.host
    return {
        "url": running.url,
        "grpc": f"{host}:{settings.grpc_port}",
        "metrics": f"http://{host}:{settings.metrics_port}/metrics",
        "tensorflow": _url("http", host, settings.tensorflow_port),
        "https": _url("https", host, settings.https_port),
        "docs": f"{running.url}/docs",
        "dashboard": running.dashboard_url,
        "home": str(settings.home),
        "key_file": str(settings.home / "admin.key"),
    }


def _url(scheme: str, host: str, port: int | None) -> str | None:
    return f"{scheme}://{host}:{port}" if port is not None else None


def _greet(value: dict[str, Any]) -> None:
    began = f"is up after {value['seconds']:.0f} s" if value["started"] else "was up already"
    note(f"the cluster {began}")
    for name in ("url", "grpc", "https", "tensorflow", "metrics", "docs", "key_file"):
        if value[name]:
            note(f"  {name:10} {value[name]}")
    note("next: shoal deploy FILE")


def _status(value: dict[str, Any]) -> None:
    for name in ("url", "grpc", "https", "tensorflow", "metrics", "docs"):
        if value.get(name):
            note(f"{name:10} {value[name]}")
    from cluster.commands.models import models_table

    out.print()
    models_table(value["models"])
    replicas = [r for m in value["models"] for r in m["replicas"]] + value["desks"]
    out.print()
    table(
        ("REPLICA", "OF", "STATE", "ADDRESS", "PID", "ONGOING", "QUEUED", "REQUESTS"),
        [
            (r["replica"], r["backend"], r["state"], f"{r['host']}:{r['port']}", r["pid"],
             r["ongoing"], r["queued"], r["requests"])
            for r in replicas
        ],
        "no replicas",
    )  # fmt: skip
    for part, text in value["controller"]["failures"].items():
        note(f"failing: {part}: {text}")
