"""Ray Serve in a cluster of its own; one application a workload, deployed on request.

Reads lines from stdin (`deploy WORKLOAD`, `delete WORKLOAD`) and answers each with one line of
JSON on stdout; ends when stdin does. As it comes: everything at its default, save what the
documentation says batches need. Behind HAProxy: the mode is chosen by Ray's own environment
variables, and replicas may take as many requests as they get.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.serving.peers import models


def noop_app(options: dict[str, Any]) -> Any:
    @serve.deployment(**options)
    class Noop:
        async def __call__(self, request: Request) -> dict[str, Any]:
            body = await request.json()
            return {"y": body["x"]}

    return Noop.bind()  # type: ignore[attr-defined]


batched: Any = serve.batch(
    max_batch_size=models.BATCH_SIZE_MAX, batch_wait_timeout_s=models.BATCH_WAIT_S
)


def model_app(workload: str, options: dict[str, Any]) -> Any:
    @serve.deployment(**options)
    class Model:
        def __init__(self) -> None:
            self.predict = models.load(workload)

        @batched  # type: ignore[untyped-decorator]
        async def batch(self, rows: list[Any]) -> list[Any]:
            return await asyncio.to_thread(self.predict, rows)

        async def __call__(self, request: Request) -> dict[str, Any]:
            body = await request.json()
            answers = await asyncio.gather(*(self.batch(row) for row in body["x"]))
            return {"y": list(answers)}

    return Model.bind()  # type: ignore[attr-defined]


def deploy(workload: str, ongoing_max: int | None) -> None:
    options: dict[str, Any] = {"num_replicas": 1}
    if ongoing_max is not None:
        options["max_ongoing_requests"] = ongoing_max
    elif workload != "noop":
        options["max_ongoing_requests"] = 100  # the default of 5 would never fill a batch
    app = noop_app(options) if workload == "noop" else model_app(workload, options)
    serve.run(app, name=workload, route_prefix=f"/{workload}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--temp-dir", required=True)
    parser.add_argument("--ongoing-max", type=int)
    arguments = parser.parse_args()
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        _temp_dir=arguments.temp_dir,
        object_store_memory=100_000_000,
        log_to_driver=False,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
    for line in sys.stdin:
        command, workload = line.split()
        if command == "deploy":
            deploy(workload, arguments.ongoing_max)
        else:
            serve.delete(workload)
        print(json.dumps({"done": line.strip()}), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
