"""Does a replica need a listener of its own, or is Serve's direct ingress as good?

The same raw ASGI no-op in the same Ray cluster, asked in turn behind both (`peers/ingress_app.py`).
The difference in CPU a request is what Serve does around each one.

    python -m benchmarks.serving.ingress [--seconds 3 --rounds 3 --connections 1,64]
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import IO, cast

from benchmarks.serving import workloads
from benchmarks.serving.measure import Point, measure, wait_until_right
from benchmarks.serving.processes import free_port
from benchmarks.serving.systems import MODULES, RayHaProxy
from benchmarks.serving.workloads import PLAIN, Endpoint


class Cluster(RayHaProxy):
    """Direct ingress with throughput settings and no proxy in front."""

    name = "ingress"
    title = "One no-op behind two listeners"

    def open(self) -> dict[str, Endpoint]:
        """Start; both endpoints by name."""
        settings = {**self.settings(), "RAY_SERVE_ENABLE_HA_PROXY": "0"}
        driver = self.tree.start(
            [
                *(str(self.program("python")), "-m", f"{MODULES}.ingress_app"),
                *("--port", str(free_port()), "--temp-dir", str(self.folder)),
            ],
            log=self.log,
            environment=self.variables(
                RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", **settings
            ),
            talks=True,
        )
        for line in cast("IO[bytes]", driver.stdout):
            if line.startswith(b'{"serve"'):
                ports = json.loads(line)
                return {
                    "serve": Endpoint(ports["serve"], "/_/noop/predict", PLAIN),
                    "own": Endpoint(ports["own"], "/predict", PLAIN),
                }
        raise RuntimeError(f"the cluster ended:\n{self.last_words()}")


def run(connections: tuple[int, ...], seconds: float, rounds: int) -> list[Point]:
    """All points, both listeners in turn."""
    workload = workloads.read("noop")
    cluster = Cluster()
    points: list[Point] = []
    try:
        endpoints = cluster.open()
        for endpoint in endpoints.values():
            wait_until_right(endpoint, workload.exchanges(endpoint)[0], cluster.tree, 60)
        for number in range(rounds):
            for count in connections:
                points += [
                    measure(
                        name,
                        cluster.tree,
                        endpoint,
                        workload,
                        connections=count,
                        seconds=seconds,
                        number=number,
                    )
                    for name, endpoint in endpoints.items()
                ]
    finally:
        cluster.stop()
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", default="1,16,64,512")
    chosen = parser.parse_args()
    connections = tuple(int(count) for count in chosen.connections.split(","))
    points = run(connections, chosen.seconds, chosen.rounds)
    for name in ("serve", "own"):
        for count in connections:
            own = [p for p in points if (p.system, p.connections) == (name, count)]
            print(
                f"{name:6} {count:4} connections "
                f"{statistics.median(p.requests_per_s for p in own):8.0f} req/s  "
                f"p99 {statistics.median(p.p99_ms for p in own):7.2f} ms  "
                f"CPU {statistics.median(p.cpu_ms for p in own):.3f} ms a request  "
                f"errors {sum(sum(p.errors.values()) for p in own)}  "
                f"others {100 * max(p.others_cpu_fraction for p in own):.0f} %"
            )


if __name__ == "__main__":
    main()
