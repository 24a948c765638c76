"""Until when is an answer wanted? On the monotonic clock, as `InferenceRequest.deadline_s` is."""

from __future__ import annotations

import time


def deadline_in(timeout_s: float) -> float:
    """The deadline `timeout_s` from now."""
    return time.monotonic() + timeout_s


def sooner(deadline_s: float | None, timeout_us: float) -> float | None:
    """The earlier of a deadline and a timeout from now; 0 = no timeout."""
    if not timeout_us:
        return deadline_s
    timeout_s = deadline_in(timeout_us / 1e6)
    return timeout_s if deadline_s is None else min(deadline_s, timeout_s)
