"""What came of it, for people and for programs, and is each goal met?

    attainment   at least 0.99 wherever any policy that can't see the future reaches it
    ratio        mean cost by the certified bound at most 1.15
    SkyServe     at least 20 % below it at equal attainment
    static peak  at least 50 % below it

Each goal is judged in each combination, by request trace, and overall; the latter two by the mean
over combinations, each counting the same. So one kind of traffic can't hide behind another. A goal
that can't be judged is said to be open, not met.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.autoscaling.combinations import COMBINATIONS, TARGET
from benchmarks.autoscaling.comparison import (
    Beside,
    Estimate,
    Floats,
    Sheet,
    beside_frontier,
    mean_of,
    ratio_of,
)
from benchmarks.autoscaling.policies import FRONTIER, POLICIES, SHOAL, STATIC_PEAK
from benchmarks.autoscaling.rows import Row

RATIO_MOST, SKYSERVE_MOST, STATIC_MOST = 1.15, 0.80, 0.50
GOALS = ("attainment", "ratio", "skyserve", "static peak")
WORDS = {True: "met", False: "**missed**", None: "open"}


@dataclass(frozen=True, slots=True)
class Told:
    """One policy in one combination, or over all of them. Means over windows."""

    policy: str
    windows: int
    attainment: Estimate
    cost_usd: Estimate
    ratio: Estimate
    ratio_own: Estimate
    windows_on_target: int
    p50_ms: float
    p99_ms: float
    failed: float
    preemptions: float
    decide_ms: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """Shoal in one combination. `met`: by goal; None where nothing can be said.

    `reached_by`: the policies without foresight that reach the target on average;
    `windows_lost`: windows in which one of them does and Shoal doesn't.
    """

    combination: str
    shoal: Told
    reached_by: tuple[str, ...]
    windows_lost: int
    skyserve: Beside | None
    static_peak: Estimate | None
    met: Mapping[str, bool | None]


@dataclass(frozen=True, slots=True)
class Overall:
    """Means over combinations, each of them counting once.

    `skyserve`: over those in which something can be said. `skyserve_equal`: in how many SkyServe
    attains as much as Shoal, or the target. `met_in`: by goal, where it is met, and judged at all.
    """

    policies: tuple[Told, ...]
    skyserve: Estimate | None
    skyserve_equal: int
    static_peak: Estimate | None
    met: Mapping[str, bool | None]
    met_in: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that is reported."""

    about: Mapping[str, Any]
    combinations: Mapping[str, tuple[Told, ...]]
    verdicts: tuple[Verdict, ...]
    overall: Overall | None
    by_requests: Mapping[str, Overall]


def results(rows: Sequence[Row], about: Mapping[str, Any]) -> Results:
    """The report on rows that count (see `rows.latest`)."""
    sheet = Sheet(rows, [combination.name for combination in COMBINATIONS])
    played = {
        name: tuple(
            _told(sheet, policy, [name]) for policy in _ordered(sheet) if sheet.row(name, policy)
        )
        for name in sheet.combinations
    }
    costs: dict[str, Floats] = {}
    verdicts = tuple(
        _verdict(sheet, name, told, costs)
        for name, told in played.items()
        if any(one.policy == SHOAL for one in told)
    )
    overall = _overall(sheet, verdicts, costs) if verdicts else None
    several: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        several.setdefault(verdict.combination.rpartition("-")[2], []).append(verdict)
    groups = {name: _overall(sheet, group, costs) for name, group in several.items()}
    return Results(about, played, verdicts, overall, groups)


def _ordered(sheet: Sheet) -> list[str]:
    known = [name for name in POLICIES if name in sheet.policies]
    return known + [name for name in sheet.policies if name not in known]


def _told(sheet: Sheet, policy: str, combinations: Sequence[str]) -> Told:
    def values(field: str) -> Floats:
        return sheet.all_of(policy, field, combinations)

    def mean(field: str) -> float:
        return mean_of(values(field), sheet.drawn).mean

    attained = values("attainment")
    return Told(
        policy=policy,
        windows=int((~np.isnan(attained)).sum()),
        attainment=mean_of(attained, sheet.drawn),
        cost_usd=mean_of(values("cost_usd"), sheet.drawn),
        ratio=mean_of(values("ratio"), sheet.drawn),
        ratio_own=mean_of(values("ratio_own"), sheet.drawn),
        windows_on_target=int((attained >= TARGET).sum()),
        p50_ms=mean("p50_ms"),
        p99_ms=mean("p99_ms"),
        failed=mean("failed"),
        preemptions=mean("preemptions"),
        decide_ms=mean("decide_ms_mean"),
    )


def _verdict(sheet: Sheet, name: str, told: Sequence[Told], costs: dict[str, Floats]) -> Verdict:
    (shoal,) = [one for one in told if one.policy == SHOAL]
    causal = [one for one in told if one.policy != STATIC_PEAK]
    reached_by = tuple(one.policy for one in causal if one.attainment.mean >= TARGET)
    frontier = [policy for policy in FRONTIER if sheet.row(name, policy)]
    found = beside_frontier(sheet, name, SHOAL, frontier) if frontier else None
    skyserve = None
    if found is not None:
        skyserve, costs[name] = found
    static = None
    if sheet.row(name, STATIC_PEAK):
        own, peak = (sheet.of(policy, "cost_usd", name) for policy in (SHOAL, STATIC_PEAK))
        static = ratio_of(own, peak, sheet.drawn)
    met = {
        "attainment": SHOAL in reached_by if reached_by else None,
        "ratio": _at_most(shoal.ratio, RATIO_MOST),
        "skyserve": _beats(skyserve),
        "static peak": _at_most(static, STATIC_MOST),
    }
    lost = _windows_lost(sheet, name, [one.policy for one in causal])
    return Verdict(name, shoal, reached_by, lost, skyserve, static, met)


def _beats(beside: Beside | None) -> bool | None:
    """Where SkyServe attains less than it would have to, being dearer still says enough, and being
    cheaper says nothing.
    """
    if beside is None:
        return None
    is_below = _at_most(beside.cost_ratio, SKYSERVE_MOST)
    return is_below if beside.is_equal or is_below else None


def _at_most(estimate: Estimate | None, most: float) -> bool | None:
    if estimate is None or np.isnan(estimate.mean):
        return None
    return estimate.mean <= most


def _windows_lost(sheet: Sheet, name: str, causal: Sequence[str]) -> int:
    own = sheet.of(SHOAL, "attainment", name)
    others = np.array([sheet.of(policy, "attainment", name) for policy in causal])
    return int(((others >= TARGET).any(axis=0) & (own < TARGET)).sum())


def _overall(sheet: Sheet, verdicts: Sequence[Verdict], costs: Mapping[str, Floats]) -> Overall:
    names = [verdict.combination for verdict in verdicts]
    told = tuple(
        _told(sheet, policy, played)
        for policy in _ordered(sheet)
        if (played := [name for name in names if sheet.row(name, policy)])
    )
    (shoal,) = [one for one in told if one.policy == SHOAL]
    skyserve = _ratio_over(
        sheet,
        {v.combination: costs[v.combination] for v in verdicts if v.met["skyserve"] is not None},
    )
    peaks = {n: sheet.of(STATIC_PEAK, "cost_usd", n) for n in names if sheet.row(n, STATIC_PEAK)}
    static = _ratio_over(sheet, peaks)
    judged = [met for v in verdicts if (met := v.met["attainment"]) is not None]
    return Overall(
        policies=told,
        skyserve=skyserve,
        skyserve_equal=sum(v.skyserve is not None and v.skyserve.is_equal for v in verdicts),
        static_peak=static,
        met={
            "attainment": all(judged) if judged else None,
            "ratio": _at_most(shoal.ratio, RATIO_MOST),
            "skyserve": _at_most(skyserve, SKYSERVE_MOST),
            "static peak": _at_most(static, STATIC_MOST),
        },
        met_in={
            goal: (
                sum(verdict.met[goal] is True for verdict in verdicts),
                sum(verdict.met[goal] is not None for verdict in verdicts),
            )
            for goal in GOALS
        },
    )


def _ratio_over(sheet: Sheet, costs: Mapping[str, Floats]) -> Estimate | None:
    """Shoal's cost by another's, averaged over combinations."""
    if not costs:
        return None
    own = sheet.all_of(SHOAL, "cost_usd", list(costs))
    return ratio_of(own, np.array(list(costs.values())), sheet.drawn)
