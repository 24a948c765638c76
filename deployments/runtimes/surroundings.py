"""What must the libraries of this process know before they work?

That they are not alone: replicas share a machine, and OpenMP, BLAS and torch each assume that it is
theirs. And that there is no model hub to ask. Both are said through the environment, which these
libraries read when they are imported (and their subprocesses inherit); a library that is loaded
already is capped through its own call.
"""

from __future__ import annotations

import math
import os
import threading


def cores(cpu: float) -> int:
    """The whole cores that a share of them may use: rounded up, at least one."""
    return max(1, math.ceil(cpu))


def announce_threads(count: int) -> None:
    """Tell libraries that are not imported yet to use `count` threads, which don't spin.

    OpenMP's threads wait for one another by spinning. With two of them and two busy neighbours on
    two cores, MiniLM gave 7 to 10 sentences a second; sleeping instead gives 58 to 109. A lone row
    on idle cores pays for it (about 8.5 ms, not 7). OMP_WAIT_POLICY, where it is set, decides.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(count)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if count > 1 else "false"


def let_choose_threads() -> None:
    """Take back how many threads OpenMP may use, for an engine that binds its own to cores.

    vLLM keeps a core or more for itself; as many threads as Ray says would share them.
    """
    os.environ.pop("OMP_NUM_THREADS", None)


def stay_offline() -> None:
    """Keep Hugging Face's libraries, vLLM and MLflow from asking or telling anyone anything."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS"):
        os.environ[name] = "1"
    os.environ["DO_NOT_TRACK"] = os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


class ThreadCap:
    """A cap on OpenMP's and BLAS's threads.

    OpenMP keeps its limit per calling thread, so `hold` is called at the beginning of each batch;
    it works once a thread.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._here = threading.local()

    def hold(self) -> None:
        if getattr(self._here, "held", False):
            return
        from threadpoolctl import threadpool_limits

        threadpool_limits(limits=self._count)
        self._here.held = True
