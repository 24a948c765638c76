"""How fast would it be without a server? Asked in the same round as everything else.

The loop itself runs in an environment with the models (`peers/raw.py`); the no-op has none.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

from benchmarks.serving import environments


def measure(workload: str, seconds: float) -> list[dict[str, Any]]:
    """One row: rows a second of the in-process loop in batches of 32; nothing for the no-op."""
    if workload == "noop":
        return []
    done = subprocess.run(
        [
            *(environments.python("fastapi"), "-m", "benchmarks.serving.peers.raw", "measure"),
            *("--workload", workload, "--seconds", str(seconds)),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env=environments.variables("fastapi"),
    )
    rows_per_s = json.loads(done.stdout)["rows_per_s"]
    print(f"  without a server {workload:7} {rows_per_s:8.1f} rows/s", flush=True)
    return [{"workload": workload, "rows_per_s": rows_per_s}]
