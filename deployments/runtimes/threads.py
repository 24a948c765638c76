"""How many cores may the numerical libraries of this process use?

Replicas share a machine, and OpenMP, BLAS and torch each assume that it is theirs alone. A runtime
caps them at the cores that the model file gives it. OpenMP keeps its limit per calling thread, so
`Threads.cap` is cheap to call again at the beginning of each batch and does its work once a thread.
"""

from __future__ import annotations

import math
import os
import threading


class Threads:
    """A cap of `cpu` cores (rounded up, at least one)."""

    def __init__(self, cpu: float) -> None:
        self.count = max(1, math.ceil(cpu))
        self._here = threading.local()

    def announce(self) -> None:
        """Tell libraries that are not imported yet."""
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(self.count)

    def cap(self) -> None:
        """Cap what is loaded by now, for this thread."""
        if getattr(self._here, "capped", False):
            return
        from threadpoolctl import threadpool_limits

        threadpool_limits(limits=self.count)
        self._here.capped = True
