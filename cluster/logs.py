"""What a replica printed, from whichever node it ran on."""

from __future__ import annotations


def replica_logs(actor: str, lines: int) -> list[str]:
    """The last lines of the actor's output and errors; empty when they can't be had any more."""
    import ray
    from ray.util.state import get_log
    from ray.util.state.exception import RayStateApiException

    address = ray.get_runtime_context().gcs_address  # other clusters may run on this host
    found: list[str] = []
    for suffix in ("out", "err"):
        try:
            parts = get_log(address=address, actor_id=actor, suffix=suffix, tail=lines, timeout=10)
            found += [line for part in parts for line in part.splitlines()]
        except (RayStateApiException, OSError, ValueError, RuntimeError) as error:
            found.append(f"({suffix}: {type(error).__name__}: {str(error).splitlines()[0][:200]})")
    return found[-lines:]
