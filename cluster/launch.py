"""The part of a start that needs Ray: join the cluster, make the controller, wait for it.

Run by `cluster.embedded` (and by a cluster's head at its start) in a process that already has
Ray's variables; prints a line for each stage.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cluster import embedded
from deployments.serving.reports import NAMESPACE

START_TIMEOUT_S = 240.0


def main(home: Path) -> None:
    """Bring the controller of the cluster in `home` up."""
    running = embedded.find(home)
    if running is None:
        raise SystemExit(f"{home} holds no cluster.json")
    import ray

    ray.init(address=running.ray_address, namespace=NAMESPACE, log_to_driver=False)
    from cluster import controller

    _tell("starting the controller")
    actor = controller.create(running.settings, embedded.edge_token(home))
    _tell("starting Ray Serve, the front desk and the edge")
    try:
        ray.get(actor.start.remote(), timeout=START_TIMEOUT_S)
    except ray.exceptions.RayTaskError as error:
        raise SystemExit(str(error.cause)) from None
    except ray.exceptions.GetTimeoutError:
        raise SystemExit(f"the cluster was not ready after {START_TIMEOUT_S:.0f} s") from None
    ray.shutdown()


def _tell(stage: str) -> None:
    sys.stdout.write(f"{stage}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
