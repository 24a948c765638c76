"""`shoal demo`: from nothing to models that answer, and what to try next."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.commands.terminal import Exit, Failure, HomeOption, command, home_of, note, progress

EXAMPLES = Path(__file__).parents[2] / "examples"
LLM = "smollm2"
LLM_START_S = 150
"""About how long vLLM takes to come up on two cores."""


@command
def demo(
    llm: Annotated[
        bool, typer.Option("--llm", help="Also a chat model on vLLM (1 to 3 minutes more).")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP (0 = any free one).")] = 8000,
    home: HomeOption = None,
) -> None:
    """Start a cluster, deploy the examples, ask each one something, and say what to try next."""
    from cluster import embedded
    from cluster.config import read_settings

    if not EXAMPLES.is_dir():
        raise Failure(Exit.USAGE, "the examples are not here: run this in a clone of Shoal")
    start_s = time.monotonic()
    note("1. the examples' models: trained here, or inside installed packages")
    _run("build.py")
    note("2. a cluster on this machine")
    flags = {"home": home_of(home), "port": port, "grpc_port": 0 if port == 0 else None,
             "metrics_port": 0 if port == 0 else None}  # fmt: skip
    with progress("starting a cluster") as tell:
        running, _ = embedded.up(read_settings(None, flags), tell)
    key = embedded.admin_key(running.settings.home)
    note("3. each model, and a request as soon as it is ready")
    names = _deployed(running.url, key, llm, start_s)
    note(f"4. {len(names)} models answer at {running.url} after {time.monotonic() - start_s:.0f} s")
    _next(running, llm)


def _deployed(url: str, key: str, llm: bool, start_s: float) -> list[str]:
    """Deploy the examples, asking each as soon as it is ready; their names."""
    from cluster.client import Client
    from deployments.model import read_model_file

    reached = Client(url, key, is_remote=False)
    files = sorted([*EXAMPLES.glob("*.yaml"), *EXAMPLES.glob("*/*.yaml")])
    models = [read_model_file(f) for f in files if llm or f.stem != LLM]
    if llm:
        note(f"   (vLLM takes about {LLM_START_S} s to start on two cores)")
    for model in models:
        document = model.model_dump(mode="json")
        reached.admin("PUT", f"models/{model.name}", {"document": document})
    waiting, deadline_s = {m.name for m in models}, time.monotonic() + 900
    is_first = True
    while waiting:
        for status in reached.admin("GET", "models"):
            if status["name"] in waiting and _is_answering(status):
                waiting.discard(status["name"])
                _run("send.py", url, "--key", key, status["name"])
                if is_first:
                    note(f"   first answer {time.monotonic() - start_s:.0f} s after the start")
                    is_first = False
        if time.monotonic() > deadline_s:
            raise Failure(Exit.FAILED, f"not ready after 900 s: {', '.join(sorted(waiting))}")
        time.sleep(0.3)
    return [m.name for m in models]


def _is_answering(status: dict[str, Any]) -> bool:
    """Whether all of a model's versions are ready. Raises `Failure` when one has failed."""
    for version in status["versions"]:
        if version["state"] == "failed":
            raise Failure(
                Exit.FAILED, f"{status['name']} {version['version']}: {version['reason']}"
            )
    return bool(status["is_settled"]) and all(v["state"] == "ready" for v in status["versions"])


def _run(script: str, *arguments: str) -> None:
    """Run one of the examples' scripts as a user would."""
    done = subprocess.run([sys.executable, str(EXAMPLES / script), *arguments], check=False)
    if done.returncode:
        raise Failure(Exit.FAILED, f"examples/{script} ended with {done.returncode}")


def _next(running: Any, llm: bool) -> None:
    url, home = running.url, running.settings.home
    shoal = Path(sys.executable).parent / "shoal"
    body = '{"model": "minilm", "input": "hello"}'
    lines = [
        "",
        "try next:",
        f"  {shoal} status",
        f"  {shoal} predict breast-cancer examples/requests/breast-cancer.json",
        f'  curl {url}/v1/embeddings -H "authorization: Bearer $(cat {home}/admin.key)" \\',
        f"       -H 'content-type: application/json' -d '{body}'",
        f"  {shoal} promote digits-canary 2 --steps 25,50 --interval-s 5",
        f"  {shoal} rollback digits-canary",
        f"  {shoal} keys create my-app --rate-rps 50",
        f"  open {url}/docs for every route",
        f"  {shoal} down",
    ]
    if not llm:
        lines.insert(2, "  make demo LLM=1   (a chat model on vLLM)")
    for line in lines:
        note(line)
