"""One raw ASGI no-op in one Ray cluster, behind two listeners.

    serve   Serve's direct ingress: the replica's own port, throughput settings
    own     uvicorn in a thread of a Serve replica; Serve is not on the path

Prints one line of JSON with both ports and ends when stdin does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import ray
import uvicorn
from ray import serve

PREFIX = "/_/noop"


Message = dict[str, Any]


class Application:
    """{"x": rows} -> {"y": rows}. An object: Serve takes a function for one that makes an app."""

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        content = json.dumps({"y": json.loads(body)["x"]}).encode()
        length = (b"content-length", b"%d" % len(content))
        headers = [(b"content-type", b"application/json"), length]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})


@serve.deployment(max_ongoing_requests=2000)
@serve.ingress(Application())
class Direct:
    pass


@serve.deployment
class Own:
    """Starts a listener of its own and writes its port to `file`."""

    def __init__(self, file: str) -> None:
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        Path(file).write_text(str(self.socket.getsockname()[1]))
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        config = uvicorn.Config(
            Application(), loop="uvloop", http="httptools", access_log=False, log_level="warning"
        )
        server = uvicorn.Server(config)
        loop = config.get_loop_factory()
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(server.serve(sockets=[self.socket]))


def direct_port() -> int:
    """Where Serve's direct ingress listens for the application `direct`."""
    client: Any = serve.context._get_global_client()
    for _ in range(600):
        details = json.loads(json.dumps(client.get_serve_details(), default=str))
        for group in details.get("target_groups") or []:
            is_http = "HTTP" in str(group["protocol"]).upper()
            if is_http and group.get("app_name") == "direct" and group["targets"]:
                port: int = group["targets"][0]["port"]
                return port
        time.sleep(0.1)
    raise RuntimeError("Serve lists no target for the application 'direct'")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--temp-dir", required=True)
    arguments = parser.parse_args()
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        _temp_dir=arguments.temp_dir,
        object_store_memory=100_000_000,
        log_to_driver=False,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
    serve.run(Direct.bind(), name="direct", route_prefix=PREFIX)  # type: ignore[attr-defined]
    file = Path(arguments.temp_dir) / "own-port"
    serve.run(Own.bind(str(file)), name="own", route_prefix=None)  # type: ignore[attr-defined]
    ports = {"serve": direct_port(), "own": int(file.read_text())}
    print(json.dumps(ports), flush=True)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main()
