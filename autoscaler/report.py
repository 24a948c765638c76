"""How does a comparison look to a person who has five minutes?

One page that stands alone (pictures inside it, nothing fetched) and the pictures as files: what
each policy costs against how punctual it is, with the bound that nobody can beat; each policy's
fleet over time by market, over the traffic; where the market had nodes and when they were taken.

Everything shown comes from what a run leaves behind; nothing is computed here that a reader of the
files could not. matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autoscaler.experiment import BINS, Outcome, binned, replacing
from autoscaler.ledger import RESERVATION, Rental
from autoscaler.snapshot import Market
from autoscaler.world import Floats, World

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, LINE, SHOAL = "#1d2733", "#6b7785", "#d9dfe5", "#0b6e75"
MARKET_COLORS = {
    Market.RESERVED.value: "#8a94a0",
    Market.ON_DEMAND.value: "#e0a13c",
    Market.SPOT.value: "#2a9d8f",
}
BAD = "#c8452f"
LATE_LEAST = 1e-5
"""The left edge of a logarithmic axis: fewer late requests than this stand there."""


# --- numbers for the pictures


def nodes_over_time(
    ledger: Iterable[Rental], market: str, duration_s: float, bins: int = BINS
) -> Floats:
    """Mean nodes of `market` that are rented in each of `bins` equal parts of the time.

    The row that pays for a reservation is no rental.
    """
    edges = np.linspace(0.0, duration_s, bins + 1)
    spans = [
        (r.start_s, r.end_s) for r in ledger if r.market == market and r.end_reason != RESERVATION
    ]
    if not spans:
        return np.zeros(bins)
    started = _held_s(np.sort([start for start, _ in spans]), edges)
    ended = _held_s(np.sort([end for _, end in spans]), edges)
    mean: Floats = np.diff(started - ended) / np.diff(edges)
    return np.maximum(mean, 0.0)  # differences of large sums may fall below 0 by rounding


def _held_s(sorted_s: Floats, at_s: Floats) -> Floats:
    """Σ max(at - s, 0): node seconds until each time when a node comes at each s."""
    before = np.concatenate([[0.0], np.cumsum(sorted_s)])
    count = np.searchsorted(sorted_s, at_s, side="right")
    seconds: Floats = count * at_s - before[count]
    return seconds


def _mid_h(duration_s: float) -> Floats:
    edges = np.linspace(0.0, duration_s / 3600, BINS + 1)
    mid: Floats = (edges[1:] + edges[:-1]) / 2
    return mid


# --- pictures


def cost_figure(rows: Sequence[dict[str, Any]], attainment: float) -> Figure:
    """Cost against the share of late requests; the bound is a line, the target another."""
    figure, axes = _figure(8.2, 4.2)
    late = [_late_share(row["slo_attainment"]) for row in rows]
    for row, x, marker in zip(rows, late, cycle("osD^vPX*<>"), strict=False):
        color = SHOAL if row["policy"] == "shoal" else FAINT
        axes.plot(
            x, row["cost_usd"], marker, color=color, markersize=8, label=row["policy"],
            markeredgecolor="white", zorder=3,
        )  # fmt: skip
    target = _late_share(attainment)
    if points := _bound_points(rows, attainment):
        line = [(LATE_LEAST, points[0][1]), *points]
        axes.plot(*zip(*line, strict=True), color=INK, linewidth=1.2, label="certified bound")
        axes.plot(*zip(*points, strict=True), ".", color=INK, markersize=6)
    axes.axvline(
        target, color=BAD, linewidth=1, linestyle=(0, (4, 3)), label=f"target {attainment:.4g}"
    )
    axes.set_xscale("log")
    axes.set_xlim(min([*late, target]) / 2, min(max([*late, target]) * 4, 1.5))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("share of requests late or failed (left edge: that or fewer)")
    axes.set_ylabel("cost, USD")
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure


def _late_share(attainment: float) -> float:
    return max(1 - attainment, LATE_LEAST)


def _bound_points(rows: Sequence[dict[str, Any]], attainment: float) -> list[tuple[float, float]]:
    """(share late, bound) wherever the summary tells a bound, from punctual to late."""
    points = {
        (_late_share(at), usd)
        for row in rows
        for at, usd in (
            (min(attainment, row["slo_attainment"]), row.get("bound_usd")),
            (attainment, row.get("bound_target_usd")),
        )
        if usd is not None
    }
    return sorted(points)


def fleet_figure(world: World, outcome: Outcome) -> Figure:
    """One policy's nodes by market over time, the traffic above, late requests below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.4), layout="constrained")
    traffic, fleet, late = figure.subplots(3, 1, sharex=True, height_ratios=[1, 2.4, 0.7])
    hours, width_s = _mid_h(world.duration_s), world.duration_s / BINS
    came = binned(world.requests.arrival_s, world.duration_s)
    traffic.fill_between(hours, came / width_s, color=LINE, linewidth=0)
    traffic.set_ylabel("requests/s")
    by_market = {
        market: nodes_over_time(outcome.ledger, market, world.duration_s)
        for market in MARKET_COLORS
    }
    shown = {market: nodes for market, nodes in by_market.items() if nodes.any()}
    if shown:
        fleet.stackplot(
            hours,
            *shown.values(),
            labels=list(shown),
            colors=[MARKET_COLORS[m] for m in shown],
            linewidth=0,
        )
        fleet.legend(frameon=False, fontsize=8, loc="upper left", ncols=3)
    taken = [r.end_s / 3600 for r in outcome.ledger if r.end_reason == "reclaimed"]
    fleet.plot(taken, np.zeros(len(taken)), "|", color=BAD, markersize=9, clip_on=False)
    fleet.set_ylabel("nodes rented")
    share = outcome.late / np.maximum(came, 1)
    late.fill_between(hours, share * 100, step="mid", color=BAD, linewidth=0)
    late.set_ylim(0, max(float(share.max()) * 100, (1 - world.slo.attainment) * 200))
    late.set_ylabel("late, %")
    late.set_xlabel("hours")
    for axes in (traffic, fleet, late):
        _plain(axes)
        axes.set_xlim(0, world.duration_s / 3600)
        axes.set_ylim(bottom=0)
    return figure


def market_figure(world: World, outcomes: Sequence[Outcome]) -> Figure:
    """A ribbon a zone: how many nodes it had to rent; a tick where a policy's nodes were taken."""
    from matplotlib.figure import Figure

    zones = world.market.zones
    height = 0.32 * len(zones) + 0.22 * len(outcomes) * (len(zones) > 0) + 1.1
    figure = Figure(figsize=(9.0, max(height, 2.2)), layout="constrained")
    ribbon, ticks = figure.subplots(
        2, 1, sharex=True, height_ratios=[max(len(zones), 2), max(len(outcomes), 1)]
    )
    edges_s = np.linspace(0.0, world.duration_s, 4 * BINS + 1)
    rows = np.maximum(np.searchsorted(world.market.capacity_t_s, edges_s[:-1], side="right") - 1, 0)
    image = ribbon.pcolormesh(
        edges_s / 3600, np.arange(len(zones) + 1), world.market.capacity[rows].T,
        cmap="GnBu", vmin=0, rasterized=True,
    )  # fmt: skip
    figure.colorbar(image, ax=ribbon, label="nodes", pad=0.01)
    ribbon.set_yticks(np.arange(len(zones)) + 0.5, zones, fontsize=8)
    ribbon.invert_yaxis()
    for place, outcome in enumerate(outcomes):
        taken = [r.end_s / 3600 for r in outcome.ledger if r.end_reason == "reclaimed"]
        ticks.plot(taken, np.full(len(taken), place), "|", color=BAD, markersize=8)
    names = [outcome.row["policy"] for outcome in outcomes]
    ticks.set_yticks(range(len(names)), names, fontsize=8)
    ticks.set_ylim(len(names) - 0.5, -0.5)
    ticks.set_xlim(0, world.duration_s / 3600)
    ticks.set_xlabel("hours (ticks: nodes that were reclaimed)")
    for axes in (ribbon, ticks):
        _plain(axes)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.tick_params(colors=FAINT, labelsize=8)
    axes.xaxis.label.set_color(FAINT)
    axes.yaxis.label.set_color(FAINT)


def png(figure: Figure) -> bytes:
    """The picture; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


# --- the page

STYLE = """
:root { color-scheme: light; --ink: #1d2733; --faint: #6b7785; --line: #e3e8ec; --shoal: #0b6e75; }
* { box-sizing: border-box }
body { margin: 0; background: #f7f9fa; color: var(--ink);
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem }
p { margin: .3rem 0; max-width: 46rem } .faint { color: var(--faint) }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 1rem;
        overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { font-weight: 500; color: var(--faint); font-size: .85rem; vertical-align: bottom }
th, td { text-align: right; padding: .4rem .6rem; border-bottom: 1px solid var(--line);
         white-space: nowrap }
th:first-child, td:first-child { text-align: left } tbody tr:last-child td { border-bottom: 0 }
tr.shoal td { color: var(--shoal); font-weight: 600 } td.bad { color: #c8452f }
img { display: block; width: 100%; height: auto } figure { margin: 0 0 1rem }
figcaption { font-weight: 600; margin-bottom: .4rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 0 }
dt { color: var(--faint) } dd { margin: 0; overflow-wrap: anywhere }
"""


def page(
    world: World,
    settings: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    pictures: Sequence[tuple[str, bytes]],
) -> str:
    """The report: `pictures` are (caption, PNG), the first beside the table."""
    first, *others = [_picture(caption, data) for caption, data in pictures]
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Shoal: simulation</title><style>{STYLE}</style></head>
<body><main>
<h1>{html.escape(_headline(rows, world.slo.attainment))}</h1>
<p class="faint">{html.escape(_subtitle(world, settings))}</p>
<h2>Policies</h2>
<div class="card">{_table(rows, world.slo.attainment)}</div>
<p class="faint">Bound: what no policy can beat at that share of punctual requests (at most the
target), had it known the future. Ratio: cost / bound.</p>
<h2>Cost and punctuality</h2>
<div class="card">{first}</div>
<h2>Over time</h2>
<div class="card">{"".join(others)}</div>
<h2>Settings</h2>
<div class="card"><dl>{_settings(settings)}</dl></div>
</main></body>
</html>
"""


def _headline(rows: Sequence[dict[str, Any]], attainment: float) -> str:
    met = [row for row in rows if row["slo_attainment"] >= attainment]
    if not met:
        return f"No policy kept {attainment:.4g} of the requests on time"
    best = min(met, key=lambda row: float(row["cost_usd"]))
    ratio = f", {best['ratio']:.2f} times the bound" if best["ratio"] else ""
    is_alone = len(met) == 1 and len(rows) > 1
    how = "alone keeps the SLO" if is_alone else "keeps the SLO at the least cost"
    return f"{best['policy']} {how}: {best['cost_usd']:.2f} USD{ratio}"


def _subtitle(world: World, settings: dict[str, Any]) -> str:
    return (
        f"{len(world.requests.arrival_s):,} requests in {world.duration_s / 3600:.1f} hours, "
        f"{world.slo.attainment:.4g} of them within {world.slo.latency_ms:g} ms; market "
        f"{settings.get('market', '?')}, {len(world.market.zones)} zones; seed {world.seed}."
    )


def _table(rows: Sequence[dict[str, Any]], attainment: float) -> str:
    heads = (
        "policy", "cost<br>USD", "bound<br>USD", "ratio", "on time<br>%", "p50<br>ms", "p99<br>ms",
        "failed", "reclaimed", "launches", "node hours<br>reserved · on demand · spot",
        "decision<br>ms",
    )  # fmt: skip
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(_row(row, attainment) for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _row(row: dict[str, Any], attainment: float) -> str:
    hours = row["node_hours"]
    cells = [
        (html.escape(row["policy"]), ""),
        (f"{row['cost_usd']:.2f}", ""),
        (_optional(row["bound_usd"]), ""),
        (_optional(row["ratio"]), ""),
        (f"{row['slo_attainment'] * 100:.3f}", "bad" if row["slo_attainment"] < attainment else ""),
        (f"{row['latency_p50_ms']:.0f}", ""),
        (f"{row['latency_p99_ms']:.0f}", ""),
        (f"{row['failed']:,}", ""),
        (f"{row['preemptions']:,}", ""),
        (f"{sum(row['launches'].values()):,}", ""),
        (" · ".join(f"{hours.get(market.value, 0.0):.1f}" for market in Market), ""),
        (f"{row['decide_ms_mean']:.2f}", ""),
    ]
    kind = ' class="shoal"' if row["policy"] == "shoal" else ""
    return (
        f"<tr{kind}>"
        + "".join(
            f"<td class={css!r}>{text}</td>" if css else f"<td>{text}</td>" for text, css in cells
        )
        + "</tr>"
    )


def _optional(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _settings(settings: dict[str, Any]) -> str:
    return "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(_shown(value))}</dd>"
        for key, value in settings.items()
    )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "–"
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _picture(caption: str, data: bytes) -> str:
    source = base64.b64encode(data).decode("ascii")
    text = html.escape(caption)
    return (
        f"<figure><figcaption>{text}</figcaption>"
        f'<img alt="{text}" src="data:image/png;base64,{source}"></figure>'
    )


def write_report(
    out: Path, world: World, settings: dict[str, Any], outcomes: Sequence[Outcome]
) -> None:
    """Write `plots/*.png` and `report.html` into `out`."""
    rows = [outcome.row for outcome in outcomes]
    named = [
        ("cost", "Cost against lateness", cost_figure(rows, world.slo.attainment)),
        ("market", "The market, and who lost nodes when", market_figure(world, outcomes)),
    ]
    for outcome in outcomes:
        name = outcome.row["policy"]
        caption = f"{name}: traffic, nodes, lateness"
        named.append((f"fleet-{name}", caption, fleet_figure(world, outcome)))
    pictures = [(name, caption, png(figure)) for name, caption, figure in named]
    for name, _, data in pictures:
        path = out / "plots" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(data)
        part.replace(path)
    with replacing(out / "report.html") as file:
        file.write(page(world, settings, rows, [(caption, data) for _, caption, data in pictures]))
