"""Until when is an answer wanted, and how long did one take?

All on the monotonic clock, as `InferenceRequest.deadline_s` is.
"""

from __future__ import annotations

import time


def now_s() -> float:
    """The monotonic clock."""
    return time.monotonic()


def deadline_in(timeout_s: float | None) -> float | None:
    """The deadline `timeout_s` from now, None when there is none."""
    return None if timeout_s is None else time.monotonic() + timeout_s


def sooner(deadline_s: float | None, timeout_us: float) -> float | None:
    """The earlier of a deadline and a timeout from now; 0 = no timeout."""
    if not timeout_us:
        return deadline_s
    timeout_s = time.monotonic() + timeout_us / 1e6
    return timeout_s if deadline_s is None else min(deadline_s, timeout_s)
