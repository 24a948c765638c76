"""Which markets meet which requests, and when?

    4 markets × 3 request traces = 12 combinations, in 10 windows each

    market    |------[window]---------------|   begins at (i + 0.35) / 10 of what is free
    requests  |------------------[window]---|   begins at ((7 i) mod 10 + 0.2) / 10

The two shifts differ, so that early hours of one trace meet late hours of the other. The traffic
is scaled so that about 12 nodes are busy where up to 16 can be had, and half of that where 4 can.
"Functions" has bursts of several hundred times its median: there it is the 95 % minute that takes
12 nodes, and the median minute less than one.

Where the traces lie is an argument; nothing is played here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from autoscaler.experiment import Experiment

ROOT = Path(__file__).parents[2]
PROFILES = ROOT / "autoscaler" / "profiles"
TRACES = ROOT.parent / "shared" / "traces"

WINDOWS = 10
"""Windows of each combination."""

HOURS = 24.0
"""Of a window, where the request trace is long enough."""

TARGET = 0.99
"""The share of requests that should be answered within the SLO."""

INPUT_TOKENS, OUTPUT_TOKENS = 1155.0, 211.0
"""Of a request where the trace only counts: the means of azure-llm-2023-conv."""

CONV = "azure-llm-2023-conv.csv"
SERVEGEN = "servegen-m-large-per-10min.csv"
FUNCTIONS = "azure-functions-per-minute.csv"
CONV_S = 3500.0


class TracesMissing(FileNotFoundError):
    """The folder with the traces isn't where it was looked for; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Combination:
    """A market and a request trace, and what makes them fit each other.

    `scale` multiplies the requests, `nodes_scale` the market's capacity. `window_s`: how long a
    window is; None: as long as is asked for.
    """

    name: str
    market: str
    requests: str
    profile: str
    slo_ms: float
    scale: float
    nodes_scale: float | None = None
    window_s: float | None = None


_V16, _V4, _V1, _H16 = (
    "aws-v100-16node-2023",
    "aws-v100-4node-2023",
    "aws-v100-1node-2023",
    "gcp-h100-16node-2025",
)
_V, _H = "llm-v100.yaml", "llm-h100.yaml"

COMBINATIONS: tuple[Combination, ...] = (
    Combination("v100-16-conv", _V16, CONV, _V, 20_000.0, 6.0, window_s=CONV_S),
    Combination("v100-16-servegen", _V16, SERVEGEN, _V, 20_000.0, 0.18),
    Combination("v100-16-functions", _V16, FUNCTIONS, _V, 20_000.0, 0.0028),
    Combination("v100-4-conv", _V4, CONV, _V, 20_000.0, 3.0, window_s=CONV_S),
    Combination("v100-4-servegen", _V4, SERVEGEN, _V, 20_000.0, 0.09),
    Combination("v100-4-functions", _V4, FUNCTIONS, _V, 20_000.0, 0.0014),
    Combination("v100-1x16-conv", _V1, CONV, _V, 20_000.0, 6.0, 16.0, CONV_S),
    Combination("v100-1x16-servegen", _V1, SERVEGEN, _V, 20_000.0, 0.18, 16.0),
    Combination("v100-1x16-functions", _V1, FUNCTIONS, _V, 20_000.0, 0.0028, 16.0),
    Combination("h100-16-conv", _H16, CONV, _H, 10_000.0, 30.0, window_s=CONV_S),
    Combination("h100-16-servegen", _H16, SERVEGEN, _H, 10_000.0, 1.0),
    Combination("h100-16-functions", _H16, FUNCTIONS, _H, 10_000.0, 0.0143),
)


def experiment(
    combination: Combination,
    window: int,
    *,
    traces: Path = TRACES,
    hours: float = HOURS,
    settings: tuple[str, ...] = (),
) -> Experiment:
    """What window `window` (0 to 9) of a combination asks of the simulator. `hours`: how long.

    Raises:
        TracesMissing: a file isn't there.
        ValueError: there is no such window.
    """
    if not 0 <= window < WINDOWS:
        raise ValueError(f"window {window}: there are 0 to {WINDOWS - 1}")
    requests = traces / "requests" / combination.requests
    market = traces / "spot" / combination.market
    duration_s = min(hours * 3600, combination.window_s or hours * 3600)
    request_free_s = max(_last_s(requests) - duration_s, 0.0)
    market_free_s = max(_last_s(market / "capacity.csv") - duration_s, 0.0)
    return Experiment(
        requests=requests,
        market=market,
        profile=PROFILES / combination.profile,
        slo_ms=combination.slo_ms,
        attainment=TARGET,
        seed=window + 1,
        requests_scale=combination.scale,
        input_tokens=INPUT_TOKENS,
        output_tokens=OUTPUT_TOKENS,
        nodes_scale=combination.nodes_scale,
        start_s=float(round(request_free_s * ((7 * window) % WINDOWS + 0.2) / WINDOWS)),
        market_start_s=float(round(market_free_s * (window + 0.35) / WINDOWS)),
        duration_s=duration_s,
        settings=settings,
    )


def world_digest(combination: Combination, asked: Experiment) -> str:
    """A short name of the world: it changes when a file or a number behind it does."""
    files = [asked.requests, *sorted(asked.market.glob("*.csv")), asked.profile]
    facts = {
        "combination": asdict(combination),
        "seed": asked.seed,
        "start_s": asked.start_s,
        "market_start_s": asked.market_start_s,
        "duration_s": asked.duration_s,
        "attainment": asked.attainment,
        "tokens": (asked.input_tokens, asked.output_tokens),
        "files": [_digest(path) for path in files],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def _last_s(path: Path) -> float:
    """The time of a trace's last row."""
    if not path.is_file():
        raise TracesMissing(
            f"no trace at {path}; --traces says where the folder with requests/ and spot/ is"
        )
    return float(path.read_text().rstrip().rpartition("\n")[2].partition(",")[0])
