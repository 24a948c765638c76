"""How do the results look on a page?

`results.json` for programs, `results.md` for people, `frontier.png` for a glance: cost by bound
against the share of requests that were late, a small dot a combination, a large one a policy's
mean. Figures come from `results`; here they only get their form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoscaler.experiment import replacing, write_json
from benchmarks.autoscaling.comparison import Beside, Estimate
from benchmarks.autoscaling.policies import SHOAL
from benchmarks.autoscaling.results import GOALS, WORDS, Overall, Results, Told, Verdict

LATE_LEAST = 1e-4
"""Where the picture's axis of late requests ends."""

GOAL_WORDS = {
    "attainment": "0.99 on time wherever a policy without foresight reaches it",
    "ratio": "mean cost / bound ≤ 1.15",
    "skyserve": "≥ 20 % below SkyServe at equal attainment",
    "static peak": "≥ 50 % below static peak",
}
HEAD = (
    "policy", "on time", "windows ≥ 0.99", "cost USD", "cost / bound", "cost / bound at own share",
    "p50 ms", "p99 ms", "failed", "reclaimed", "decide ms",
)  # fmt: skip


def write(results: Results, folder: Path) -> None:
    """Write results.json, results.md and frontier.png into `folder`."""
    write_json(folder / "results.json", document(results))
    with replacing(folder / "results.md") as file:
        file.write(markdown(results))
    draw(results, folder / "frontier.png")


# --- for programs


def document(results: Results) -> dict[str, Any]:
    """Everything as plain values; an estimate is [mean, low, high]."""
    verdicts = {verdict.combination: _verdict_json(verdict) for verdict in results.verdicts}
    return {
        "about": dict(results.about),
        "overall": None if results.overall is None else _overall_json(results.overall),
        "by_requests": {name: _overall_json(one) for name, one in results.by_requests.items()},
        "combinations": {
            name: {
                "policies": {one.policy: _told_json(one) for one in told},
                "shoal": verdicts.get(name),
            }
            for name, told in results.combinations.items()
        },
    }


def _told_json(told: Told) -> dict[str, Any]:
    names = (name for name in told.__slots__ if name != "policy")
    return {name: _plain(getattr(told, name)) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value.as_json()
    return None if isinstance(value, float) and math.isnan(value) else value


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "met": dict(verdict.met),
        "reached_by": list(verdict.reached_by),
        "windows_lost": verdict.windows_lost,
        "skyserve": None if verdict.skyserve is None else _beside_json(verdict.skyserve),
        "static_peak": _plain(verdict.static_peak),
    }


def _beside_json(beside: Beside) -> dict[str, Any]:
    return {
        "who": beside.label,
        "attainment": beside.attainment,
        "is_equal_attainment": beside.is_equal,
        "cost_ratio": beside.cost_ratio.as_json(),
    }


def _overall_json(overall: Overall) -> dict[str, Any]:
    return {
        "policies": {one.policy: _told_json(one) for one in overall.policies},
        "skyserve_cost_ratio": _plain(overall.skyserve),
        "skyserve_at_equal_attainment_in": overall.skyserve_equal,
        "static_peak_cost_ratio": _plain(overall.static_peak),
        "met": dict(overall.met),
        "met_in": {goal: list(counts) for goal, counts in overall.met_in.items()},
    }


# --- for people


def markdown(results: Results) -> str:
    """All tables."""
    parts = ["# Every policy on every combination", _about(results)]
    if results.overall is not None:
        parts += [_goals(results.overall, results.verdicts), "![cost and lateness](frontier.png)"]
        parts += ["## Shoal, by request trace", _groups(results.by_requests)]
        parts += ["## Shoal, by combination", _verdicts(results.verdicts)]
        parts += ["## Every policy, mean over combinations", _table(results.overall.policies, "")]
    for name, told in results.combinations.items():
        parts += [f"## {name}", _table(told, "cost USD")]
    return "\n\n".join(parts) + "\n"


def _about(results: Results) -> str:
    lines = [f"- {key}: {value}" for key, value in results.about.items()]
    lines.append("- [low, high]: 95 % bootstrap over windows; bold: missed; open: can't be judged")
    return "\n".join(lines)


def _goals(overall: Overall, verdicts: Sequence[Verdict]) -> str:
    shoal, found = _shoal(overall), _found(overall)
    rows = [
        [GOAL_WORDS[goal], found[goal], WORDS[overall.met[goal]], _counts(overall, goal)]
        for goal in GOALS
    ]
    lost = sum(verdict.windows_lost for verdict in verdicts)
    return (
        f"{_grid(('goal', 'Shoal overall', 'met overall', 'met in combinations'), rows)}\n\n"
        f"Windows in which some policy without foresight is on target and Shoal is not: {lost} of "
        f"{shoal.windows}. SkyServe's variants attain as much as Shoal (or the target) in "
        f"{overall.skyserve_equal} of {len(verdicts)} combinations; in the others Shoal is set "
        "against the one that attains most, and where that one is cheaper by attaining less, "
        "nothing is judged and the combination is left out of that line."
    )


def _shoal(overall: Overall) -> Told:
    return next(one for one in overall.policies if one.policy == SHOAL)


def _found(overall: Overall) -> dict[str, str]:
    shoal = _shoal(overall)
    return {
        "attainment": share(shoal.attainment),
        "ratio": number(shoal.ratio),
        "skyserve": _below(overall.skyserve),
        "static peak": _below(overall.static_peak),
    }


def _groups(groups: Mapping[str, Overall]) -> str:
    rows = [
        [name, *(f"{told} {WORDS[one.met[goal]]}" for goal, told in _found(one).items())]
        for name, one in groups.items()
    ]
    head = ("requests", "on time", "cost / bound", "below SkyServe", "below static peak")
    return _grid(head, rows)


def _counts(overall: Overall, goal: str) -> str:
    met, judged = overall.met_in[goal]
    return f"{met} of {judged} judged"


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    head = (
        "combination", "on time", "cost / bound", "below SkyServe", "which SkyServe",
        "below static peak", *GOALS,
    )  # fmt: skip
    return _grid(head, [_verdict_line(verdict) for verdict in verdicts])


def _verdict_line(verdict: Verdict) -> list[str]:
    beside = verdict.skyserve
    return [
        verdict.combination,
        share(verdict.shoal.attainment),
        number(verdict.shoal.ratio),
        _below(beside.cost_ratio if beside else None),
        _who(beside),
        _below(verdict.static_peak),
        *(WORDS[verdict.met[goal]] for goal in GOALS),
    ]


def _who(beside: Beside | None) -> str:
    if beside is None:
        return "–"
    if beside.is_equal:
        return beside.label
    return f"none attains as much; {beside.label} at {beside.attainment:.4f}"


def _table(told: Sequence[Told], cost: str) -> str:
    """Over several combinations a mean cost says nothing, and is left out (`cost` empty)."""
    rows = [_told_line(one) for one in told]
    head = list(HEAD)
    if not cost:
        place = head.index("cost USD")
        head.pop(place)
        for row in rows:
            row.pop(place)
    return _grid(head, rows)


def _told_line(told: Told) -> list[str]:
    return [
        told.policy,
        share(told.attainment),
        f"{told.windows_on_target} of {told.windows}",
        number(told.cost_usd),
        number(told.ratio),
        number(told.ratio_own),
        *(f"{v:,.0f}" for v in (told.p50_ms, told.p99_ms, told.failed, told.preemptions)),
        f"{told.decide_ms:.2f}",
    ]


def share(estimate: Estimate) -> str:
    """A share of requests, with its interval."""
    return _with_interval(estimate, "{:.4f}")


def number(estimate: Estimate) -> str:
    """A ratio or a cost, with its interval."""
    return _with_interval(estimate, "{:,.2f}")


def _below(ratio: Estimate | None) -> str:
    """By how much less than 1."""
    if ratio is None:
        return "–"
    return _with_interval(Estimate(1 - ratio.mean, 1 - ratio.high, 1 - ratio.low), "{:.0%}")


def _with_interval(estimate: Estimate, form: str) -> str:
    if math.isnan(estimate.mean):
        return "–"
    told = form.format(estimate.mean)
    if math.isnan(estimate.low):
        return told
    return f"{told} [{form.format(estimate.low)}, {form.format(estimate.high)}]"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- for a glance


def draw(results: Results, path: Path) -> None:
    """Cost by bound against lateness, on two logarithmic axes: down and to the right is better."""
    if results.overall is None:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.0, 4.2), dpi=90)
    for place, mean in enumerate(results.overall.policies):
        color = f"C{place % 10}"
        points = [
            (_late(one), one.ratio.mean)
            for told in results.combinations.values()
            for one in told
            if one.policy == mean.policy and not math.isnan(one.ratio.mean)
        ]
        marker = "*" if mean.policy == SHOAL else "os^v"[place // 10]
        late, ratios = [x for x, _ in points], [y for _, y in points]
        axes.scatter(late, ratios, s=9, color=color, alpha=0.45, marker=marker)
        size = 170 if mean.policy == SHOAL else 55
        axes.scatter(
            [_late(mean)], [mean.ratio.mean], s=size, color=color, marker=marker,
            edgecolors="black", linewidths=0.6, label=mean.policy, zorder=3,
        )  # fmt: skip
    axes.axvline(0.01, color="grey", linewidth=0.8, linestyle=":")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="late requests (share)", ylabel="cost / bound")
    axes.invert_xaxis()
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _late(told: Told) -> float:
    return max(1 - told.attainment.mean, LATE_LEAST)
