"""Why this decision, in an operator's words, and what was not done instead?

The reason is the most pressing fact that the decision answers. The text says what was seen, what is
expected, what was chosen and at what price; the rejected options are fleets that an operator would
ask about (one node less, on-demand only, no hedge), judged by the same model as the chosen one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autoscaler.decision import Command, Drain, Launch, Reason, Rejected, Stop
from autoscaler.demand import Demand
from autoscaler.fleet import Choice, Problem, judged
from autoscaler.snapshot import EventKind, Market, NodeState, Snapshot

REJECTED_MAX = 6


def reason_for(
    snapshot: Snapshot, wish: Demand, choices: Sequence[Choice], commands: Sequence[Command]
) -> Reason:
    """The most pressing fact, for a label or a legend.

    A launch into a fleet that needn't grow is a probe, or a move, to where it is cheaper.
    """
    kinds = {event.kind for event in snapshot.events}
    launches = any(isinstance(command, Launch) for command in commands)
    leaves = any(isinstance(command, Drain | Stop) for command in commands)
    staying = sum(
        node.reclaim_s is None and node.state is not NodeState.DRAINING for node in snapshot.nodes
    )
    grows = sum(sum(choice.counts.values()) for choice in choices) > staying
    facts = (
        (not all(choice.is_feasible for choice in choices), Reason.SHORT),
        (EventKind.RECLAIMED in kinds, Reason.RECLAIM),
        (EventKind.NOTICED in kinds, Reason.NOTICE),
        (EventKind.LAUNCH_FAILED in kinds and launches, Reason.LAUNCH_FAILED),
        (not wish.is_covered and launches, Reason.COVERAGE_LOST),
        (launches and bool((wish.queue_excess > 0).any()), Reason.QUEUE_GROWING),
        (launches and (leaves or not grows), Reason.CHEAPER),
        (launches, Reason.DEMAND_RISING),
        (leaves, Reason.DEMAND_FALLING),
    )
    return next((reason for holds, reason in facts if holds), Reason.STEADY)


def because(
    snapshot: Snapshot,
    wish: Demand,
    counts: Mapping[str, int],
    commands: Sequence[Command],
    shock_rates: Mapping[str, float],
) -> str:
    """What was seen, expected, chosen and done, in one line."""
    parts = [
        f"{wish.rate_rps.sum():.3g} requests/s now, {wish.rate_peak_rps.sum():.3g} to be ready for",
        f"late requests at {float(wish.late_price.mean()):.2g} times their base price",
    ]
    held = [_held(name, count, snapshot, shock_rates) for name, count in counts.items() if count]
    parts.append("hold " + (", ".join(held) or "nothing"))
    launches = [f"{c.count} in {c.group}" for c in commands if isinstance(c, Launch)]
    if launches:
        parts.append("launch " + ", ".join(launches))
    leaving = sum(isinstance(c, Drain | Stop) for c in commands)
    if leaving:
        parts.append(f"give {leaving} back")
    if not wish.is_covered and wish.because:
        parts.append(wish.because)
    return "; ".join(parts)


def _held(name: str, count: int, snapshot: Snapshot, shock_rates: Mapping[str, float]) -> str:
    group = snapshot.groups[name]
    text = f"{count} × {name} at {group.price_usd_h:.4g} USD/h"
    if group.market is Market.SPOT:
        text += f" ({shock_rates.get(name, 0.0):.2g} reclaims/h)"
    return text


def rejected(
    snapshot: Snapshot, problem: Problem, choice: Choice, closed: Mapping[str, str]
) -> tuple[Rejected, ...]:
    """Fleets that an operator would ask about. `closed`: groups that can't be had now, and why."""
    options = problem.options
    counts = [choice.counts[o.group] for o in options]
    found: list[Rejected] = []
    for i, option in sorted(enumerate(options), key=lambda pair: -pair[1].cost_usd_h):
        if counts[i] > option.count_min:
            less = judged(problem, [n - (i == k) for k, n in enumerate(counts)])
            why = f"{100 * less.late:.3g} % would be late, {100 * choice.late:.3g} % are to be"
            found.append(Rejected(f"one {option.group} less", less.cost_usd_h, why))
            break
    market = {option.group: snapshot.groups[option.group].market for option in options}
    is_on_spot = any(n and market[group] is Market.SPOT for group, n in choice.counts.items())
    firm = [option for option in options if market[option.group] is Market.ON_DEMAND]
    if firm and is_on_spot:
        need = float(problem.needs.capacity.max())
        best = min(firm, key=lambda o: o.cost_usd_h / max(o.capacity, 1e-9))
        cost = need / max(best.capacity, 1e-9) * best.cost_usd_h
        found.append(Rejected("on-demand only", cost, "costs more at the same objective"))
    for option, count in zip(options, counts, strict=True):
        if count == 0 and len(found) < REJECTED_MAX:
            cost = (
                option.cost_usd_h * float(problem.needs.capacity.max()) / max(option.capacity, 1e-9)
            )
            found.append(Rejected(option.group, cost, "dearer, or too likely to be taken"))
    for group, why in list(closed.items())[: max(REJECTED_MAX - len(found), 0)]:
        found.append(Rejected(group, snapshot.groups[group].price_usd_h, why))
    return tuple(found)
