"""What is known of each run: one line of JSON for a policy in a window.

`runs.jsonl` only grows: a job appends its lines when it is over, so a killed benchmark loses no
finished job, and what has been played again stands below what it replaces. A line that a kill cut
short is passed over. The last line of a (combination, window, policy) counts, provided that it
comes from the same world as the newest line of its window: policies are only compared on the same
requests in the same market.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One policy in one window of one combination.

    `world`, `how`: digests of what was played, and of the settings and the version that played it;
    `bound`: of the code that bounded it. `bound_usd`: the certified bound at the target;
    `bound_own_usd`: at the policy's own attainment where that is lower. `took_s`: the simulation.
    """

    combination: str
    window: int
    policy: str
    world: str
    how: str
    bound: str
    cost_usd: float
    bound_usd: float
    bound_own_usd: float
    attainment: float
    requests: int
    p50_ms: float
    p99_ms: float
    failed: int
    preemptions: int
    launches: Mapping[str, int]
    node_hours: Mapping[str, float]
    decide_ms_mean: float
    took_s: float

    @property
    def key(self) -> tuple[str, int, str]:
        return self.combination, self.window, self.policy

    @property
    def ratio(self) -> float | None:
        """Cost by the bound at the target; None where nothing has to be paid."""
        return self.cost_usd / self.bound_usd if self.bound_usd > 0 else None

    @property
    def ratio_own(self) -> float | None:
        """Cost by the bound at what was attained, at most the target."""
        return self.cost_usd / self.bound_own_usd if self.bound_own_usd > 0 else None


def read_rows(path: Path) -> list[Row]:
    """All complete lines of the file, in order; none where there is no file."""
    if not path.exists():
        return []
    names = {field.name for field in fields(Row)}
    found = (_object(line) for line in path.read_text().splitlines())
    return [Row(**value) for value in found if value.keys() == names]


def _object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return {}  # cut short by a kill
    return value if isinstance(value, dict) else {}


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add lines at the end, on a line of their own whatever stands there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + text if is_torn else text)


def latest(rows: Sequence[Row]) -> list[Row]:
    """The rows that count: the last of each policy from the newest world of each window."""
    world = {(row.combination, row.window): row.world for row in rows}
    kept = {row.key: row for row in rows if row.world == world[row.combination, row.window]}
    return list(kept.values())
