"""How long does one decision take for 10 to 1,000 models and 100 to 10,000 nodes?

    a synthetic cluster ─► decisions 10 s apart ─► median and slowest ─► fitted growth
    plain references    ─► same process, between them                ─► ratios

A cluster has four machine types in six zones on three markets, models that take 0.1 to 1 of a
machine, and nodes that are full of replicas. Each size is decided on several times in a row, a
forecast's step among them, each time with new traffic and a few notices; the first decisions warm
up and don't count. What is slow on a slow machine is compared with what Python needs there for a
sort and for a pass over the nodes.

`python -m benchmarks.autoscaling.scale --help` says how. Whether the decisions are any good is
`autoscaler simulate`'s question.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from autoscaler import damping, forecast, hazard, queueing
from autoscaler.decision import Decision
from autoscaler.policy import Memory, Settings, decide
from autoscaler.queueing import Curves
from autoscaler.snapshot import (
    Event,
    EventKind,
    Group,
    MachineType,
    Market,
    Model,
    Node,
    NodeState,
    Replica,
    Resources,
    ServiceCurve,
    Slo,
    Snapshot,
    Traffic,
)

DIAGONAL = ((10, 100), (30, 300), (100, 1_000), (300, 3_000), (1_000, 10_000))
CORNERS = ((10, 10_000), (1_000, 100))
GOAL_S = 1.0
"""For the largest size."""

ROUNDS = 7
"""Decisions timed a size: a minute and more, so that a step of the forecast is among them."""

INTERVAL_S = 10.0
UTILISATION = 0.6
RESULTS = Path(__file__).parent / "results"

MACHINES = {
    name: MachineType(name, price, cold_start_s, 0.2, Resources(cpu, gpu, memory_mb))
    for name, price, cold_start_s, cpu, gpu, memory_mb in (
        ("c8", 0.4, 60.0, 8.0, 0.0, 16_000.0),
        ("c16", 0.8, 60.0, 16.0, 0.0, 32_000.0),
        ("m16", 1.0, 90.0, 16.0, 0.0, 64_000.0),
        ("g8", 3.0, 180.0, 8.0, 1.0, 32_000.0),
    )
}
ZONES = ("us-east-1a", "us-east-1b", "us-east-1c", "us-west-2a", "us-west-2b", "eu-west-1a")


@dataclass(frozen=True, slots=True)
class Row:
    """One size. Times in seconds; `n`: models, nodes and replicas together."""

    models: int
    nodes: int
    replicas: int
    groups: int
    n: int
    decide_s: float
    decide_max_s: float
    first_s: float
    commands: int
    sort_s: float
    pass_s: float

    @property
    def ratio_sort(self) -> float:
        return self.decide_s / self.sort_s

    @property
    def ratio_pass(self) -> float:
        return self.decide_s / self.pass_s


@dataclass(frozen=True, slots=True)
class Part:
    """One step by itself."""

    name: str
    size: str
    seconds: float


# ── a synthetic cluster ───────────────────────────────────────────────────────────────────────


def the_groups(nodes: int) -> dict[str, Group]:
    """Every machine type on spot in each zone, on demand in each region, two of them reserved."""
    groups = [
        Group(
            f"{name}/spot/{zone}", name, Market.SPOT, zone,
            round(kind.price_on_demand_usd_h * (0.3 + 0.03 * k), 4), nodes, 120.0,
        )
        for name, kind in MACHINES.items()
        for k, zone in enumerate(ZONES)
    ]  # fmt: skip
    for name, kind in MACHINES.items():
        price = kind.price_on_demand_usd_h
        groups += [
            Group(f"{name}/on-demand/{zone}", name, Market.ON_DEMAND, zone, price * (1 + k / 10))
            for k, zone in enumerate(ZONES[::3])
        ]
    groups += [
        Group(f"{name}/reserved", name, Market.RESERVED, ZONES[0], 0.6, max(nodes // 50, 1))
        for name in ("c8", "c16")
    ]
    return {group.name: group for group in groups}


def the_nodes(count: int, groups: dict[str, Group], rng: np.random.Generator) -> list[Node]:
    """Ready nodes, mostly on spot, but for one in fifty that starts."""
    names = list(groups)
    weight = np.array(
        [{"spot": 6.0, "on-demand": 1.0}.get(groups[g].market.value, 0) for g in names]
    )
    weight += np.array([0.5 * (groups[g].machine != "g8") for g in names])
    placed = rng.choice(len(names), count, p=weight / weight.sum())
    nodes = []
    for i, (place, age_s) in enumerate(zip(placed, rng.uniform(600, 86_400, count), strict=True)):
        starts = i % 50 == 49
        begin_s = -30.0 if starts else -float(age_s)
        nodes.append(
            Node(
                f"n{i}",
                names[place],
                NodeState.STARTING if starts else NodeState.READY,
                begin_s,
                begin_s + 90.0,
            )
        )
    return nodes


@dataclass(frozen=True, slots=True)
class Plain:
    """A model before it has traffic."""

    name: str
    resources: Resources
    curves: dict[str, ServiceCurve]
    slo: Slo


def a_plain_model(i: int, rng: np.random.Generator) -> Plain:
    """0.05 to 1 of a machine; one in ten needs a GPU; curves by machine type."""
    needs_gpu = i % 10 == 9
    cpu = 8.0 if needs_gpu else float(rng.choice([0.8, 4.0, 8.0, 8.0, 12.0, 16.0]))
    fixed_ms, item_ms = float(rng.uniform(5, 60)), float(rng.uniform(1, 10))
    bins = np.zeros(280)
    middle = int(40 * (math.log10(fixed_ms + item_ms) + 1))
    bins[middle - 6 : middle + 7] = [1, 2, 4, 8, 16, 24, 30, 20, 10, 6, 3, 2, 1]
    curves = {
        name: ServiceCurve(
            fixed_ms * (0.8 if name == "m16" else 1.0),
            item_ms,
            1,
            8,
            0.3,
            tuple(bins) if i % 2 else (),
        )
        for name in MACHINES
        if (name == "g8") == needs_gpu
    }
    slow_ms = max(curve.batch_ms(8) for curve in curves.values())
    return Plain(
        f"model-{i}", Resources(cpu, float(needs_gpu), cpu * 1000), curves, Slo(6 * slow_ms)
    )


class Cluster:
    """Snapshots of one cluster, 10 s apart."""

    def __init__(self, models: int, nodes: int, seed: int = 0) -> None:
        self.rng = np.random.default_rng([seed, models, nodes])
        self.groups = the_groups(nodes)
        self.nodes = the_nodes(nodes, self.groups, self.rng)
        self.plain = [a_plain_model(i, self.rng) for i in range(models)]
        self.replicas = self._placed()
        held = np.zeros(models)
        for replica in self.replicas:
            held[int(replica.model.rpartition("-")[2])] += 1
        top = [next(iter(p.curves.values())).rate_max_rps for p in self.plain]
        self.rate_rps = np.maximum(held, 0.3) * np.array(top) * UTILISATION

    def _placed(self) -> tuple[Replica, ...]:
        """Models in turn on each node, until one doesn't fit any more."""
        placed: list[Replica] = []
        turn = {True: 9, False: 0}
        for node in self.nodes:
            machine = self.groups[node.group].machine
            free, gpu = MACHINES[machine].resources.cpu, machine == "g8"
            while True:
                i = turn[gpu]
                turn[gpu] = self._next(i, gpu)
                plain = self.plain[i]
                if machine not in plain.curves or plain.resources.cpu > free:
                    break
                free -= plain.resources.cpu
                placed.append(
                    Replica(
                        f"r{len(placed)}",
                        plain.name,
                        node.id,
                        node.state is NodeState.READY,
                        node.ready_s,
                    )
                )
        return tuple(placed)

    def _next(self, i: int, gpu: bool) -> int:
        step = 10 if gpu else 1
        i = (i + step) % len(self.plain)
        return (i + 1) % len(self.plain) if not gpu and i % 10 == 9 else i

    def at(self, now_s: float) -> Snapshot:
        """The cluster at `now_s`: new arrivals, and a notice for one node in two thousand."""
        step = int(now_s / INTERVAL_S)
        bins = self.rng.poisson(self.rate_rps[:, None] * 5.0, (len(self.plain), 2))
        models = tuple(
            self._with_traffic(i, row.tolist()) for i, row in enumerate(bins.astype(np.float64))
        )
        taken = range(step % 7, len(self.nodes), 2_000)
        nodes = list(self.nodes)
        for k in taken:
            old = nodes[k]
            nodes[k] = Node(old.id, old.group, old.state, old.started_s, old.ready_s, now_s + 110)
        events = tuple(Event(EventKind.NOTICED, nodes[k].group, now_s - 5.0) for k in taken)
        return Snapshot(now_s, MACHINES, self.groups, tuple(nodes), models, self.replicas, events)

    def _with_traffic(self, i: int, arrivals: list[float]) -> Model:
        """One request in two hundred is late; one model in twenty has a safe replica."""
        plain, count = self.plain[i], int(sum(arrivals))
        traffic = Traffic(tuple(arrivals), 5.0, 0, 2, 3.0, count, count // 200)
        return Model(
            plain.name, plain.slo, traffic, plain.curves, plain.resources,
            on_demand_min=int(i % 20 == 0),
        )  # fmt: skip


# ── measuring ─────────────────────────────────────────────────────────────────────────────────


def timed(work: Callable[[], object], rounds: int = 5) -> float:
    """The median time of `work` in seconds."""
    return float(np.median([_once(work) for _ in range(rounds)]))


def _once(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def decisions(cluster: Cluster, rounds: int) -> Iterator[tuple[float, Decision[Memory]]]:
    """Decisions in a row, and how long each took."""
    memory: Memory | None = None
    settings = Settings()
    for k in range(rounds):
        snapshot = cluster.at(k * INTERVAL_S)
        gc.collect()
        begin = time.perf_counter()
        decision = decide(snapshot, memory, settings)
        yield time.perf_counter() - begin, decision
        memory = decision.memory


def measured(models: int, nodes: int, rounds: int = ROUNDS) -> Row:
    """One size, and beside it what a sort and a pass over the nodes take here and now."""
    cluster = Cluster(models, nodes)
    taken, found = zip(*decisions(cluster, rounds + 1), strict=True)
    n = models + nodes + len(cluster.replicas)
    floats = np.random.default_rng(0).random(n).tolist()
    return Row(
        models=models,
        nodes=nodes,
        replicas=len(cluster.replicas),
        groups=len(cluster.groups),
        n=n,
        decide_s=float(np.median(taken[1:])),
        decide_max_s=max(taken[1:]),
        first_s=taken[0],
        commands=len(found[-1].commands),
        sort_s=timed(lambda: sorted(floats)),
        pass_s=timed(lambda: [node for node in cluster.nodes if node.state is NodeState.READY]),
    )


def exponent(rows: Sequence[Row]) -> float:
    """The slope of log time over log n: 1 is linear, n log n is about 1.1 here."""
    n, seconds = np.array([(row.n, row.decide_s) for row in rows]).T
    return float(np.polyfit(np.log(n), np.log(seconds), 1)[0])


def exponent_n_log_n(rows: Sequence[Row]) -> float:
    """The slope that n log n would have over the same sizes."""
    n = np.array([row.n for row in rows], dtype=np.float64)
    return float(np.polyfit(np.log(n), np.log(n * np.log(n)), 1)[0])


# ── single steps ──────────────────────────────────────────────────────────────────────────────


def parts() -> list[Part]:
    """The steps of a decision, one by one, at the size of a thousand models."""
    return [
        *(Part("hazard: observe", f"{k:,} groups", _hazard_s(k)[0]) for k in (40, 1_000)),
        *(Part("hazard: scenarios", f"{k:,} groups", _hazard_s(k)[1]) for k in (40, 1_000)),
        Part("damping: damped", "1,000 models", _damping_s(1_000)),
        Part("damping: scale in", "10,000 nodes", _scale_in_s(10_000)),
        Part("forecast: observe, 60 s", "1,000 models", _forecast_s(1_000)[0]),
        Part("forecast: predict", "1,000 models", _forecast_s(1_000)[1]),
        Part("queueing: replicas needed", "1,000 models", _sizing_s(1_000)),
    ]


def _hazard_s(size: int) -> tuple[float, float]:
    """To observe 15 s with a notice, and to draw scenarios."""
    settings = hazard.HazardSettings()
    groups = {
        f"g{i}": Group(f"g{i}", "c8", Market.SPOT, f"r{i // 3}-1{'abc'[i % 3]}", 1.0)
        for i in range(size)
    }
    nodes = [
        Node(f"{name}-{k}", name, NodeState.READY, -600.0, -500.0)
        for name in groups
        for k in range(3)
    ]
    memory = hazard.observe(hazard.HazardMemory(settings), groups, nodes, (), 0.0, settings)
    rng, gap_s = np.random.default_rng(0), np.full(size, 120.0)
    observed, drawn = [], []
    for k in range(1, 20):
        now_s = 15.0 * k
        events = [Event(EventKind.NOTICED, f"g{k}", now_s - 5)]
        begin = time.perf_counter()
        memory = hazard.observe(memory, groups, nodes, events, now_s, settings)
        observed.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        hazard.scenarios(memory, groups, gap_s, now_s, rng, 16)
        drawn.append(time.perf_counter() - begin)
    return float(np.median(observed)), float(np.median(drawn))


def _damping_s(models: int) -> float:
    memory, settings = damping.DampingMemory(), damping.DampingSettings()
    taken = []
    for k in range(30):
        wanted = {f"m{i}": (i * 7 + k * k) % 13 for i in range(models)}
        begin = time.perf_counter()
        memory, _ = damping.damped(memory, wanted, k * 10.0, settings, 300.0)
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken))


def _scale_in_s(size: int) -> float:
    cluster = Cluster(100, size)
    surplus = dict.fromkeys(cluster.groups, size // len(cluster.groups) // 3)
    settings = damping.DampingSettings()
    return timed(
        lambda: damping.scale_in(
            cluster.nodes, cluster.replicas, surplus, 0.0, cluster.groups, MACHINES, settings
        )
    )


def _forecast_s(models: int) -> tuple[float, float]:
    """To observe one step (6 decisions with 2 bins each), and to predict."""
    settings = forecast.ForecastSettings()
    rng = np.random.default_rng(0)
    memory = forecast.fresh(models, settings)
    observed, predicted = [], []
    for step in range(6):
        observed.append(0.0)
        for k in range(6):
            counts = rng.poisson(50.0, (models, 2))
            begin = time.perf_counter()
            memory = forecast.observe(memory, counts, 5.0, 60.0 * step + 10.0 * (k + 1), settings)
            observed[-1] += time.perf_counter() - begin
        begin = time.perf_counter()
        forecast.predict(memory, (0.0, 72.0, 108.0, 216.0))
        predicted.append(time.perf_counter() - begin)
    return float(np.median(observed)), float(np.median(predicted))


def _sizing_s(models: int) -> float:
    rng = np.random.default_rng(0)
    plain = [a_plain_model(i, rng) for i in range(models)]
    curves = [next(iter(p.curves.values())) for p in plain]
    rate = np.array([curve.rate_max_rps for curve in curves]) * rng.uniform(0.5, 20, models)
    slo = np.array([p.slo.latency_ms for p in plain])
    late = np.full(models, 0.005)
    return timed(lambda: queueing.replicas_needed(rate, Curves.of(curves), slo, late, 1.5))


# ── telling ───────────────────────────────────────────────────────────────────────────────────


def table(rows: Sequence[Row], steps: Sequence[Part]) -> str:
    """What was measured, as a page of Markdown."""
    diagonal = [row for row in rows if (row.models, row.nodes) in DIAGONAL]
    largest = max(rows, key=lambda row: row.n)
    lines = [
        "# How long does a decision take?",
        "",
        f"{largest.models:,} models and {largest.nodes:,} nodes: {largest.decide_s:.2f} s"
        f" (goal: {GOAL_S:g} s). Time grows as n^{exponent(diagonal):.2f}; n log n would be"
        f" n^{exponent_n_log_n(diagonal):.2f} over the same sizes.",
        "",
        "One process; medians of decisions in a row. `sort`: Python sorts n floats, n being models,"
        " nodes and replicas. `pass`: a list of the ready nodes.",
        "",
        "| models | nodes | replicas | groups | ms | slowest | first | ms / sort | ms / pass |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {r.models:,} | {r.nodes:,} | {r.replicas:,} | {r.groups} | {1e3 * r.decide_s:.0f}"
            f" | {1e3 * r.decide_max_s:.0f} | {1e3 * r.first_s:.0f} | {r.ratio_sort:.0f}"
            f" | {r.ratio_pass:.0f} |"
            for r in rows
        ),
        "",
    ]
    if steps:
        lines += ["| step | size | ms |", "|---|---|---:|"]
        lines += [f"| {p.name} | {p.size} | {1e3 * p.seconds:.2f} |" for p in steps]
        lines.append("")
    return "\n".join(lines)


def as_json(rows: Sequence[Row], steps: Sequence[Part]) -> str:
    """The same for programs."""
    diagonal = [row for row in rows if (row.models, row.nodes) in DIAGONAL]
    whole = {
        "exponent": round(exponent(diagonal), 3),
        "exponent_n_log_n": round(exponent_n_log_n(diagonal), 3),
        "rows": [asdict(row) for row in rows],
        "parts": [asdict(part) for part in steps],
    }
    return json.dumps(whole, indent=1) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the autoscaler's decisions.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for scale.json and .md")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="decisions a size")
    given = parser.parse_args(arguments)
    rows = [measured(models, nodes, given.rounds) for models, nodes in (*DIAGONAL, *CORNERS)]
    steps = parts()
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "scale.json").write_text(as_json(rows, steps))
    (given.out / "scale.md").write_text(table(rows, steps))
    print(table(rows, steps))


if __name__ == "__main__":
    main()
