"""What a replica printed, from whichever node it ran on."""

from __future__ import annotations


def replica_logs(actor: str, lines: int) -> list[str]:
    """The last lines of the actor's output and errors; empty when they can't be had any more."""
    from ray.util.state import get_log
    from ray.util.state.exception import RayStateApiException

    found: list[str] = []
    for suffix in ("out", "err"):
        try:
            for part in get_log(actor_id=actor, suffix=suffix, tail=lines, timeout=10):
                found += part.splitlines()
        except (RayStateApiException, OSError, ValueError, RuntimeError) as error:
            found.append(f"({suffix}: {type(error).__name__}: {str(error).splitlines()[0][:200]})")
    return found[-lines:]
