"""What should the fleet be now? From a snapshot to a decision, in six steps.

    snapshot ─► observed   what the traffic and the markets taught            demand, hazard
             ─► demanded   replicas for each model, now and a cold start away demand
             ─► damped     what of that the cluster follows                   damping
             ─► pooled     which models share machines, in which groups       packing
             ─► chosen     nodes by group, at the least expected cost         fleet
                steadied   no better place before it was better for a while   damping
             ─► ordered    launches, drains and stops, and why                orders, explanation

A model whose replica fills a machine is decided on by itself, over all machine types at once; the
others (and, where there are many models, all) share pools by machine type, each model on the type
that carries it at the lowest price. Launches in a place that has just refused are probes: firm
capacity is rented beside them, and given back when the probe comes.

Pure: the same snapshot, memory and settings give the same decision, in the controller, in the
simulator and in a what-if.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from autoscaler import damping, demand, fleet, forecast, hazard
from autoscaler.damping import DampingMemory, DampingSettings
from autoscaler.decision import Command, Decision, Expected, Launch
from autoscaler.demand import Demand, DemandMemory, DemandSettings, Predict
from autoscaler.explanation import because, reason_for, rejected
from autoscaler.fleet import Choice, Needs, Option, Problem, Shocks
from autoscaler.hazard import HazardMemory, HazardSettings
from autoscaler.orders import ordered
from autoscaler.packing import Packed, nodes_needed, spread
from autoscaler.snapshot import Group, MachineType, Market, Model, Node, NodeState, Snapshot

Floats = NDArray[np.float64]

SLACK_SHARE = 0.8
"""The part of the slack that a backlog may take: the rest is for its being worked off."""

BEHIND_SHARE = 0.3
"""Where the queue has used up this part of the slack, nothing is given back."""

DEDICATED_SHARE = 0.5
"""A replica that takes more of a machine has it for itself."""


FOLLOW_SHARE = 0.5
"""A demand that surprises a cold start ahead was half as surprising half-way there."""

EXPLAINED_MAX = 4
"""Of so many pools the rejected options are told."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that an operator may turn. Times in seconds.

    `interval_s`: how often to decide. `use_s`: for how long a node is expected to be of use, over
    which its cold start is spread. `firm_probability`: a spot launch that is less likely than this
    to succeed is a probe. `scenarios`: how many states of the market are looked at.
    `thorough_every`: every so many decisions, and after each event, the fleet is looked for anew
    and not only round the one that is held. `joint_max`: up to so many models are decided on one
    by one. `zone_fraction_max`: the largest part of a pool's capacity in one zone. `harm_factor`:
    the base price of a late request, as a multiple of serving it on demand. `late_max`: more than
    this is never expected to be late by choice. `reaction_s`: from an event to the decision that
    answers it. `hold_factor`: for how many cold starts what is no longer needed is kept.
    `cost_tolerance`, `late_tolerance`: the part of its rent, or of what its late requests cost, by
    which the fleet may be worse than the best and still stay.
    """

    demand: DemandSettings = field(default_factory=DemandSettings)
    hazard: HazardSettings = field(default_factory=HazardSettings)
    damping: DampingSettings = field(default_factory=DampingSettings)
    interval_s: float = 15.0
    use_s: float = 3600.0
    firm_probability: float = 0.5
    scenarios: int = 12
    thorough_every: int = 4
    joint_max: int = 4
    zone_fraction_max: float = 1.0
    harm_factor: float = 1.35
    late_max: float = 0.3
    reaction_s: float = 5.0
    hold_factor: float = 1.0
    late_tolerance: float = 0.3
    cost_tolerance: float = 0.02
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """What Shoal remembers from decision to decision. `damping`: of the models' wishes; `holding`:
    of the nodes that were chosen for each pool and group.
    """

    demand: DemandMemory
    hazard: HazardMemory
    damping: DampingMemory = field(default_factory=DampingMemory)
    holding: DampingMemory = field(default_factory=DampingMemory)
    step: int = 0


@dataclass(frozen=True, slots=True)
class Shoal:
    """Shoal's own policy, in the form that the simulator asks for."""

    settings: Settings = Settings()
    name: str = "shoal"
    is_woken: bool = True

    @property
    def interval_s(self) -> float:
        return self.settings.interval_s

    def decide(self, snapshot: Snapshot, memory: Memory | None) -> Decision[Memory]:
        return decide(snapshot, memory, self.settings)


@dataclass(frozen=True, slots=True)
class Place:
    """A group as it looks now: what a node really costs there and whether more can be had.

    `cost_usd_h`: rent and expected replacement (reserved: 0, it is paid for anyway). `free`: more
    nodes to ask for. `gap_s`: how long what a shock takes is missing.
    """

    group: Group
    cost_usd_h: float
    launch_usd_h: float
    free: float
    is_firm: bool
    gap_s: float
    shock_rate_per_h: float


@dataclass(frozen=True, slots=True)
class Pool:
    """Models that share nodes, and the nodes that they have.

    `unit`: the machine type that needs are counted in. `capacity`: of a node, by group, in that
    unit; `ready_needed`, in that unit: what must stay ready; `load`: what the arrivals keep busy.
    `late_price`: of a late request, as a multiple of its base price. `safe_min`: nodes that nobody
    may reclaim. `is_behind`: a queue is
    being worked off. `packed`: the models' replicas, as many as are allowed.
    """

    name: str
    unit: str
    rows: tuple[int, ...]
    capacity: Mapping[str, float]
    nodes: tuple[Node, ...]
    needs: Needs
    ready_needed: float
    safe_min: int
    late_price: float
    load: float
    calm_factor: float
    shock_factor: float
    slack_s: float
    is_behind: bool
    packed: tuple[Packed, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What was chosen for a pool: firm counts by group, and probes beside them."""

    pool: Pool
    choice: Choice
    problem: Problem
    probes: Mapping[str, int]


def decide(
    snapshot: Snapshot,
    memory: Memory | None,
    settings: Settings,
    predict: Predict = forecast.predict,
) -> Decision[Memory]:
    """The decision for `snapshot`. `memory` is what the last one returned, None the first time.

    `predict`: the forecast; another one is for asking what a better one would be worth.
    """
    memory = _observed(snapshot, memory, settings)
    if not snapshot.models:
        return Decision(memory, commands=_leftover(snapshot, (), settings))
    wish = demand.demanded(snapshot, memory.demand, settings.demand, predict)
    places = _places(snapshot, memory.hazard, settings)
    damped, allowed = _damped(snapshot, memory.damping, wish, settings)
    pools = _pooled(snapshot, wish, allowed, places, settings)
    survival, weight = _survival(snapshot, memory, places, settings)
    is_thorough = bool(snapshot.events) or memory.step % settings.thorough_every == 0
    wishes: list[Plan] = []
    left = places
    for pool in pools:
        plan = _chosen(pool, left, survival, weight, settings, is_thorough=is_thorough)
        wishes.append(plan)
        left = _less(left, plan)
    holding, plans = _steadied(snapshot, memory.holding, wishes, settings)
    learned = demand.told_late(wish, snapshot, memory.demand, *_told(plans, wish))
    memory = Memory(learned, memory.hazard, damped, holding, memory.step + 1)
    return _decision(snapshot, memory, wish, allowed, plans, places, settings)


def _less(places: Mapping[str, Place], plan: Plan) -> dict[str, Place]:
    """What there is for the next pool: no two are promised the same nodes."""
    held = Counter(node.group for node in plan.pool.nodes)
    asked = Counter(plan.probes)
    for group, count in plan.choice.counts.items():
        asked[group] += max(count - held[group], 0)
    return {
        name: replace(place, free=max(place.free - asked[name], 0.0)) if asked[name] else place
        for name, place in places.items()
    }


def _leftover(snapshot: Snapshot, plans: Sequence[Plan], settings: Settings) -> tuple[Command, ...]:
    """What to do with nodes that no pool counts (their model is gone, or moved to another machine
    type): they go, once every pool has what must be ready.
    """
    counted = {node.id for plan in plans for node in plan.pool.nodes}
    nodes = [n for n in snapshot.nodes if is_staying(n) and n.id not in counted]
    is_served = all(
        sum(p.capacity[n.group] for n in p.nodes if n.state is NodeState.READY) >= p.ready_needed
        for p in (plan.pool for plan in plans)
    )
    if not nodes or not is_served:
        return ()
    size = dict.fromkeys(snapshot.groups, 1.0)
    return ordered(snapshot, nodes, {}, {}, size, 0.0, settings.damping)


def _told(plans: Sequence[Plan], wish: Demand) -> tuple[Floats, Floats]:
    """The late shares [models] that the model itself predicts for the fleets that were chosen: in
    calm times, and what shocks add.
    """
    calm, shock = np.zeros(len(wish.models)), np.zeros(len(wish.models))
    for plan in plans:
        rows, choice, pool = list(plan.pool.rows), plan.choice, plan.pool
        calm[rows] = (choice.late - choice.late_shock) / pool.calm_factor
        shock[rows] = choice.late_shock / plan.problem.shock_factor
    return calm, shock


def _decision(
    snapshot: Snapshot,
    memory: Memory,
    wish: Demand,
    allowed: Mapping[str, Mapping[int, int]],
    plans: Sequence[Plan],
    places: Mapping[str, Place],
    settings: Settings,
) -> Decision[Memory]:
    groups = Counter[str]()
    commands: list[Command] = []
    for plan in plans:
        groups.update(plan.choice.counts)
        pool = plan.pool
        commands += ordered(
            snapshot, pool.nodes, plan.choice.counts, plan.probes, pool.capacity,
            math.inf if pool.is_behind else pool.ready_needed, settings.damping,
        )  # fmt: skip
    commands += _leftover(snapshot, plans, settings)
    counts = {name: count for name, count in groups.items() if count}
    unit = {row: _unit(row, plans, wish) for row in range(len(wish.models))}
    rates = {name: place.shock_rate_per_h for name, place in places.items()}
    closed = {
        name: "no capacity there at the moment"
        for name, place in places.items()
        if place.free <= 0 and not groups[name]
    }
    return Decision(
        memory=memory,
        wanted={m.name: int(wish.wanted[unit[row]][row]) for row, m in enumerate(wish.models)},
        allowed={m.name: allowed[unit[row]][row] for row, m in enumerate(wish.models)},
        groups=counts,
        replicas=_replicas(plans, snapshot),
        commands=_limited(commands, snapshot),
        reason=reason_for(snapshot, wish, [plan.choice for plan in plans], commands),
        because=because(snapshot, wish, counts, commands, rates),
        rejected=tuple(
            option
            for plan in plans[:EXPLAINED_MAX]
            for option in rejected(snapshot, plan.problem, plan.choice, closed)
        ),
        expected=_expected(plans, snapshot, wish),
    )


def _unit(row: int, plans: Sequence[Plan], wish: Demand) -> str:
    """The machine type in whose replicas a model's counts are told."""
    for plan in plans:
        if row in plan.pool.rows:
            return plan.pool.unit
    return next(iter(wish.wanted))


def _observed(snapshot: Snapshot, memory: Memory | None, settings: Settings) -> Memory:
    traffic = demand.observed(snapshot, memory.demand if memory else None, settings.demand)
    markets = hazard.observe(
        memory.hazard if memory else HazardMemory(settings.hazard),
        snapshot.groups, snapshot.nodes, snapshot.events, snapshot.now_s, settings.hazard,
    )  # fmt: skip
    if memory is None:
        return Memory(traffic, markets)
    return replace(memory, demand=traffic, hazard=markets)


def _places(snapshot: Snapshot, memory: HazardMemory, settings: Settings) -> dict[str, Place]:
    """Every group, judged."""
    groups, now_s = snapshot.groups, snapshot.now_s
    rates = hazard.shock_rate_per_h(memory, groups, now_s)
    lost = hazard.fraction_lost(memory, groups)
    can = hazard.launchable(memory, groups, now_s)
    places = {}
    for i, (name, group) in enumerate(groups.items()):
        machine = snapshot.machines[group.machine]
        price = 0.0 if group.market is Market.RESERVED else group.price_usd_h
        start_usd = price * machine.cold_start_s / 3600
        losses_per_h = float(rates[i] * lost[i])
        life_h = 1 / max(3600 / settings.use_s, losses_per_h)
        places[name] = Place(
            group=group,
            cost_usd_h=price + losses_per_h * start_usd,
            launch_usd_h=start_usd / life_h,
            free=float(can.believed_free[i]) if can.retry_at_s[i] <= now_s else 0.0,
            is_firm=bool(can.success_probability[i] >= settings.firm_probability),
            gap_s=max(_slow_start_s(machine) + settings.reaction_s - group.notice_s, 0.0),
            shock_rate_per_h=float(rates[i]),
        )
    return places


def _slow_start_s(machine: MachineType) -> float:
    """A cold start that is one standard deviation slower than the mean."""
    return machine.cold_start_s * (1 + machine.cold_start_cv)


def _damped(
    snapshot: Snapshot,
    memory: DampingMemory,
    wish: Demand,
    settings: Settings,
) -> tuple[DampingMemory, dict[str, dict[int, int]]]:
    """Replicas that each model may have, by machine type and row."""
    wanted = {
        f"{machine}/{wish.models[row].name}": int(counts[row])
        for machine, counts in wish.wanted.items()
        for row in range(len(wish.models))
    }
    hold_s = {
        machine: settings.hold_factor * damping.break_even_hold_s(1.0, kind.cold_start_s, 0.0)
        for machine, kind in snapshot.machines.items()
    }
    holds = {key: hold_s[key.rpartition("/")[0]] for key in wanted}
    memory, held = damping.damped(memory, wanted, snapshot.now_s, settings.damping, holds)
    allowed = {
        machine: {
            row: _bounded(held[f"{machine}/{model.name}"], model)
            for row, model in enumerate(wish.models)
        }
        for machine in wish.wanted
    }
    return memory, allowed


def _bounded(count: int, model: Model) -> int:
    most = count if model.replicas_max is None else min(count, model.replicas_max)
    return max(most, model.replicas_min)


def _within(needs: Floats, model: Model) -> Floats:
    """Fractional needs within the model's bounds."""
    most = np.inf if model.replicas_max is None else float(model.replicas_max)
    bounded: Floats = np.clip(needs, float(model.replicas_min), max(most, model.replicas_min))
    return bounded


def _pooled(
    snapshot: Snapshot,
    wish: Demand,
    allowed: Mapping[str, Mapping[int, int]],
    places: Mapping[str, Place],
    settings: Settings,
) -> list[Pool]:
    """Who shares which nodes. A model that fits no machine is in no pool."""
    shares = [
        {
            name: share
            for name, machine in snapshot.machines.items()
            if name in model.curves
            and (share := model.resources.share_of(machine.resources)) <= 1
            and any(place.group.machine == name for place in places.values())
        }
        for model in wish.models
    ]
    is_alone = len(wish.models) <= settings.joint_max
    alone = [
        row
        for row, by_machine in enumerate(shares)
        if is_alone and by_machine and min(by_machine.values()) > DEDICATED_SHARE
    ]
    pools = []
    owned, free = _owned(snapshot, [wish.models[row].name for row in alone])
    is_only = len(alone) == sum(bool(by_machine) for by_machine in shares) == 1
    for row in alone:
        mine, machines = owned[wish.models[row].name], tuple(shares[row])
        fits = [n for n in free if snapshot.groups[n.group].machine in shares[row]]
        short = max(allowed[machines[0]][row] - len(mine), 0)
        mine += fits if is_only else fits[:short]
        taken = {n.id for n in mine}
        free = [n for n in free if n.id not in taken]
        pools.append(_alone(row, machines, mine, snapshot, wish, allowed, places))
    chosen = {
        row: _machine_for(row, by_machine, wish, places)
        for row, by_machine in enumerate(shares)
        if row not in alone and by_machine
    }
    for machine in sorted(set(chosen.values())):
        rows = tuple(row for row, taken in chosen.items() if taken == machine)
        mine = [n for n in free if snapshot.groups[n.group].machine == machine]
        pools.append(_shared(machine, rows, shares, mine, snapshot, wish, allowed, places))
    return pools


def _owned(snapshot: Snapshot, names: Sequence[str]) -> tuple[dict[str, list[Node]], list[Node]]:
    """The staying nodes of the models of these names, and all others."""
    owner = {replica.node: replica.model for replica in snapshot.replicas}
    owned: dict[str, list[Node]] = {name: [] for name in names}
    free: list[Node] = []
    for node in snapshot.nodes:
        if is_staying(node):
            owned.get(owner.get(node.id, ""), free).append(node)
    return owned, free


def is_staying(node: Node) -> bool:
    """Whether a node is there to be counted on: not leaving by itself or by a notice."""
    return node.state is not NodeState.DRAINING and node.reclaim_s is None


def _machine_for(
    row: int, shares: Mapping[str, float], wish: Demand, places: Mapping[str, Place]
) -> str:
    """The machine type that carries the model at the lowest price, where more can be had."""
    prices = {
        name: min(
            (p.cost_usd_h for p in places.values() if p.group.machine == name and p.free > 0),
            default=math.inf,
        )
        for name in shares
    }
    return min(shares, key=lambda m: (prices[m] * shares[m] * max(int(wish.wanted[m][row]), 1), m))


def _alone(
    row: int,
    machines: Sequence[str],
    nodes: Sequence[Node],
    snapshot: Snapshot,
    wish: Demand,
    allowed: Mapping[str, Mapping[int, int]],
    places: Mapping[str, Place],
) -> Pool:
    """One model on nodes of its own, of any machine type; needs in nodes of the first one."""
    model = wish.models[row]
    unit = machines[0]
    rate = {name: max(float(wish.node_rps[name][row]), 1e-9) for name in machines}
    needs = _within(wish.needs[unit][row], model)
    follow_s = snapshot.machines[unit].cold_start_s
    gap_s = np.where(wish.levels <= 0.5, np.inf, follow_s * FOLLOW_SHARE)
    return Pool(
        name=f"model {model.name}",
        unit=unit,
        rows=(row,),
        capacity={
            name: rate[place.group.machine] / rate[unit]
            for name, place in places.items()
            if place.group.machine in rate
        },
        nodes=tuple(n for n in nodes if snapshot.groups[n.group].machine in rate),
        needs=Needs(needs, _by_requests(wish.weight, needs), gap_s),
        ready_needed=float(_bounded(int(wish.present[unit][row]), model)),
        safe_min=model.on_demand_min,
        late_price=float(wish.late_price[row]),
        load=float(wish.rate_rps[row] / model.curves[unit].rate_max_rps),
        calm_factor=float(wish.calm_factor[row]),
        shock_factor=float(wish.shock_factor[row]),
        slack_s=max(float(wish.slack_s[row]) * SLACK_SHARE - float(wish.wait_s[row]), 0.0),
        is_behind=bool(wish.wait_s[row] > BEHIND_SHARE * wish.slack_s[row]),
        packed=(Packed(model.name, 1.0, allowed[unit][row], model.on_demand_min),),
    )


def _by_requests(weight: Floats, needs: Floats) -> Floats:
    """Weights of time turned into weights of requests: a busy minute holds more of them."""
    busy = weight * np.maximum(needs, 1e-9)
    shares: Floats = busy / busy.sum()
    return shares


def _shared(
    machine: str,
    rows: Sequence[int],
    shares: Sequence[Mapping[str, float]],
    nodes: Sequence[Node],
    snapshot: Snapshot,
    wish: Demand,
    allowed: Mapping[str, Mapping[int, int]],
    places: Mapping[str, Place],
) -> Pool:
    """Models packed on nodes of one type; needs in nodes."""
    packed = tuple(
        Packed(
            model.name, max(shares[row][machine], 1e-6), allowed[machine][row], model.on_demand_min
        )
        for row in rows
        for model in (wish.models[row],)
    )
    present = [
        (p.share, min(p.count, int(wish.present[machine][row])))
        for p, row in zip(packed, rows, strict=True)
    ]
    rates = np.maximum(wish.rate_rps[list(rows)], 1e-9)
    need = float(nodes_needed([(p.share, p.count) for p in packed]))
    return Pool(
        name=f"machine {machine}",
        unit=machine,
        rows=tuple(rows),
        capacity={name: 1.0 for name, p in places.items() if p.group.machine == machine},
        nodes=tuple(nodes),
        needs=Needs.certain(need),
        ready_needed=float(nodes_needed(present)),
        safe_min=nodes_needed([(p.share, p.safe) for p in packed]),
        late_price=float(np.average(wish.late_price[list(rows)], weights=rates)),
        load=need,
        calm_factor=1.0,
        shock_factor=float(np.average(wish.shock_factor[list(rows)], weights=rates)),
        slack_s=float(wish.slack_s[list(rows)].min()) * SLACK_SHARE,
        is_behind=False,
        packed=packed,
    )


def _survival(
    snapshot: Snapshot, memory: Memory, places: Mapping[str, Place], settings: Settings
) -> tuple[dict[str, Floats], Floats]:
    """What may survive of each group in the states of the market that are looked at."""
    rng = np.random.default_rng([settings.seed, memory.step])
    gap_s = np.array([place.gap_s for place in places.values()])
    found = hazard.scenarios(
        memory.hazard, snapshot.groups, gap_s, snapshot.now_s, rng, settings.scenarios
    )
    return dict(zip(places, found.survival.T, strict=True)), found.weight


def _chosen(
    pool: Pool,
    places: Mapping[str, Place],
    survival: Mapping[str, Floats],
    weight: Floats,
    settings: Settings,
    *,
    is_thorough: bool,
) -> Plan:
    """The firm fleet, and what would be cheaper where a launch may well fail: probes."""
    held = Counter(node.group for node in pool.nodes)
    firm = _problem(pool, places, held, survival, weight, settings, with_probes=False)
    choice = _settled(firm, fleet.choose(firm, is_thorough=is_thorough), settings)
    doubtful = [g for g in pool.capacity if not places[g].is_firm and places[g].free > 0]
    if not doubtful:
        return Plan(pool, choice, firm, {})
    hopeful = fleet.choose(
        _problem(pool, places, held, survival, weight, settings, with_probes=True),
        is_thorough=is_thorough,
    )
    probes = {
        group: int(min(hopeful.counts[group] - choice.counts.get(group, 0), places[group].free))
        for group in doubtful
        if hopeful.counts[group] > max(choice.counts.get(group, 0), held[group])
    }
    return Plan(pool, choice, firm, probes)


def _steadied(
    snapshot: Snapshot, memory: DampingMemory, plans: Sequence[Plan], settings: Settings
) -> tuple[DampingMemory, list[Plan]]:
    """The plans, but that ready nodes of a group stay until no plan within the hold has wanted
    them: hazards and forecasts tremble, and a better place must be so for a whole cold start.
    """
    chosen, holds = {}, {}
    for plan in plans:
        cold_s = snapshot.machines[plan.pool.unit].cold_start_s
        hold_s = settings.hold_factor * damping.break_even_hold_s(1.0, cold_s, 0.0)
        for option in plan.problem.options:
            key = f"{plan.pool.name}/{option.group}"
            chosen[key], holds[key] = plan.choice.counts[option.group], hold_s
    memory, held = damping.damped(memory, chosen, snapshot.now_s, settings.damping, holds)
    return memory, [_kept(plan, held) for plan in plans]


def _kept(plan: Plan, held: Mapping[str, int]) -> Plan:
    """The plan with no ready node given up before its time."""
    pool, problem, counts = plan.pool, plan.problem, plan.choice.counts
    ready = Counter(n.group for n in pool.nodes if n.state is NodeState.READY)
    least = {
        o.group: max(o.count_min, min(ready[o.group], held[f"{pool.name}/{o.group}"]))
        for o in problem.options
    }
    if all(counts[group] >= count for group, count in least.items()):
        return plan
    options = tuple(
        replace(o, count_min=least[o.group], count_max=max(o.count_max, least[o.group]))
        for o in problem.options
    )
    bound = replace(problem, options=options)
    return replace(plan, problem=bound, choice=fleet.choose(bound, is_thorough=False))


def _settled(problem: Problem, best: Choice, settings: Settings) -> Choice:
    """The fleet as it is, if it is nearly as good as the best: hazards and forecasts tremble, and
    each change costs a cold start.
    """
    held = [option.held for option in problem.options]
    now = fleet.judged(problem, held)
    is_kept = all(h >= o.count_min for h, o in zip(held, problem.options, strict=True))
    harm_usd_h = problem.harm_usd_h * (now.late - best.late)
    bearable_usd_h = max(
        settings.cost_tolerance * best.cost_usd_h,
        settings.late_tolerance * problem.harm_usd_h * best.late,
    )
    is_near = now.cost_usd_h + harm_usd_h <= best.cost_usd_h + bearable_usd_h
    return now if is_kept and is_near and best.is_feasible and now.is_feasible else best


def _problem(
    pool: Pool,
    places: Mapping[str, Place],
    held: Mapping[str, int],
    survival: Mapping[str, Floats],
    weight: Floats,
    settings: Settings,
    *,
    with_probes: bool,
) -> Problem:
    need = float(pool.needs.capacity.max())
    starting = _protected(pool, places, need)
    names = [
        name
        for name in pool.capacity
        if held[name] or (places[name].free > 0 and (with_probes or places[name].is_firm))
    ]
    options = tuple(
        _option(pool, places[name], held[name], starting[name], need, with_probes=with_probes)
        for name in names
    )
    prices = [o.cost_usd_h / max(o.capacity, 1e-9) for o in options if not o.zone]
    states = (
        np.stack([survival[name] for name in names], axis=1) if names else np.ones((len(weight), 0))
    )
    gap_s = np.array([places[name].gap_s for name in names])
    shocks = Shocks(states, weight, np.where(states < 1, gap_s, 0.0).max(axis=1, initial=0.0))
    return Problem(
        options=_with_floor(options, pool, places),
        needs=pool.needs,
        shocks=shocks,
        late_max=settings.late_max,
        slack_s=pool.slack_s,
        harm_usd_h=settings.harm_factor * pool.late_price * max(prices, default=0.0) * pool.load,
        zone_fraction_max=settings.zone_fraction_max,
        calm_factor=pool.calm_factor,
        shock_factor=pool.shock_factor,
    )


def _protected(pool: Pool, places: Mapping[str, Place], need: float) -> Counter[str]:
    """Starting nodes by group that are not given up for a better place: the time that they have
    been starting is lost with them. As many as are more than any need may go, the dearest first.
    """
    starting = Counter(n.group for n in pool.nodes if n.state is NodeState.STARTING)
    spare = sum(pool.capacity[node.group] for node in pool.nodes) - need
    for group in sorted(starting, key=lambda g: (-places[g].cost_usd_h / pool.capacity[g], g)):
        size = max(pool.capacity[group], 1e-9)
        freed = min(starting[group], max(math.floor(spare / size + 1e-9), 0))
        starting[group] -= freed
        spare -= freed * size
    return starting


def _option(
    pool: Pool, place: Place, held: int, starting: int, need: float, *, with_probes: bool
) -> Option:
    capacity = pool.capacity[place.group.name]
    most = 2 * math.ceil(need / max(capacity, 1e-9)) + 2
    free = place.free if with_probes or place.is_firm else 0.0
    return Option(
        group=place.group.name,
        capacity=capacity,
        cost_usd_h=place.cost_usd_h,
        count_max=int(min(held + free, max(most, held))),
        launch_usd_h=place.launch_usd_h,
        held=held,
        count_min=starting,
        zone=place.group.zone if place.group.market is Market.SPOT else "",
    )


def _with_floor(
    options: tuple[Option, ...], pool: Pool, places: Mapping[str, Place]
) -> tuple[Option, ...]:
    """Safe nodes that the models ask for: reserved ones first, then the cheapest on demand."""
    left = pool.safe_min
    if not left:
        return options
    floors: dict[str, int] = {}
    safe = [o for o in options if places[o.group].group.market is not Market.SPOT]
    for option in sorted(safe, key=lambda o: (o.cost_usd_h / o.capacity, o.group)):
        floors[option.group] = min(left, option.count_max)
        left -= floors[option.group]
    return tuple(replace(o, count_min=max(floors.get(o.group, 0), o.count_min)) for o in options)


def _replicas(plans: Sequence[Plan], snapshot: Snapshot) -> dict[str, dict[str, int]]:
    safe = frozenset(n for n, g in snapshot.groups.items() if g.market is not Market.SPOT)
    placed: dict[str, dict[str, int]] = {}
    for plan in plans:
        counts = plan.choice.counts
        if len(plan.pool.rows) == 1 and plan.pool.packed[0].share > DEDICATED_SHARE:
            placed[plan.pool.packed[0].model] = {g: n for g, n in counts.items() if n}
        else:
            placed |= spread(plan.pool.packed, counts, safe)
    return placed


def _limited(commands: Sequence[Command], snapshot: Snapshot) -> tuple[Command, ...]:
    """Launches that the whole cluster's limit leaves room for, in order."""
    if snapshot.nodes_max is None:
        return tuple(commands)
    room = max(snapshot.nodes_max - len(snapshot.nodes), 0)
    kept: list[Command] = []
    for command in commands:
        if isinstance(command, Launch):
            count = min(command.count, room)
            room -= count
            if count:
                kept.append(Launch(command.group, count))
        else:
            kept.append(command)
    return tuple(kept)


def _expected(plans: Sequence[Plan], snapshot: Snapshot, wish: Demand) -> Expected:
    cost = sum(
        snapshot.groups[group].price_usd_h * count
        for plan in plans
        for group, count in plan.choice.counts.items()
    )
    late = np.ones(len(wish.models))
    for plan in plans:
        rows = list(plan.pool.rows)
        late[rows] = min(plan.choice.late, 1.0)
    rates = np.maximum(wish.rate_rps, 1e-12)
    return Expected(float(cost), float(1 - np.average(late, weights=rates)))
