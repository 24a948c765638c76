"""What is known when a decision is made?

A `Snapshot` holds the facts of one moment and what happened since the decision before it: who
arrived, who was late, which machines run in which market and zone, what they cost now, which ones
have been given notice. Whoever observes builds it (the live controller, the simulator); every
policy reads the same one.

    Snapshot ─┬─ machines   what a machine type costs and how long it takes to come up
              ├─ groups     machine type × market × zone: the places where nodes can be rented
              ├─ nodes      what is rented, by group, with age, state and notice
              ├─ models     objective, traffic since the last decision, service curves, replicas
              └─ events     launches that came or failed, nodes that were taken

Plain values only, and no history: what must be remembered is the policy's memory.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

SERVICE_EDGES_MS: tuple[float, ...] = tuple(np.geomspace(0.1, 1e6, 281).tolist())
"""Edges of the histograms of service times: 40 a decade, from 0.1 ms to 1,000 s."""


class Market(enum.Enum):
    """On which terms a machine is rented."""

    RESERVED = "reserved"
    ON_DEMAND = "on-demand"
    SPOT = "spot"


class NodeState(enum.Enum):
    """Where a rented machine stands."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Resources:
    """What a machine has, or what a replica takes of it."""

    cpu: float = 1.0
    gpu: float = 0.0
    memory_mb: float = 0.0

    def share_of(self, whole: Resources) -> float:
        """The fraction of a machine `whole` that this takes; infinite when it doesn't fit.

        The scarcest resource decides, so shares that add up to 1 fit a machine in each single
        resource.
        """
        shares = [
            asked / had if had > 0 else math.inf
            for asked, had in (
                (self.cpu, whole.cpu),
                (self.gpu, whole.gpu),
                (self.memory_mb, whole.memory_mb if whole.memory_mb > 0 else math.inf),
            )
            if asked > 0
        ]
        share = max(shares, default=0.0)
        return share if share <= 1.0 + 1e-9 else math.inf


@dataclass(frozen=True, slots=True)
class MachineType:
    """A kind of machine. `cold_start_s`: from launch to ready, boot and load of weights together.

    `cold_start_cv`: its spread (standard deviation / mean). `billing_increment_s` and
    `billing_minimum_s`: a rental is paid in whole increments, and for no less than the minimum.
    """

    name: str
    price_on_demand_usd_h: float
    cold_start_s: float
    cold_start_cv: float = 0.0
    resources: Resources = Resources()
    billing_increment_s: float = 1.0
    billing_minimum_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Group:
    """A place where nodes of one machine type are rented on one market in one zone.

    `price_usd_h`: of one node, now (for reserved nodes, what one costs whether it runs or not).
    `nodes_max`: how many can be rented there as far as anybody knows (quota, reservation); None
    without a limit. What spot capacity there really is nobody knows: a launch tells.
    `notice_s`: how long before a reclaim its notice comes.
    """

    name: str
    machine: str
    market: Market
    zone: str
    price_usd_h: float
    nodes_max: int | None = None
    notice_s: float = 0.0

    @property
    def region(self) -> str:
        """The zone without its last part: `us-east-1a` → `us-east-1`, `us-west1-b` → `us-west1`."""
        return region_of(self.zone)


def region_of(zone: str) -> str:
    """The region of a zone, by the names that AWS, GCP and Azure give."""
    head, dash, tail = zone.rpartition("-")
    if dash and len(tail) == 1:
        return head  # us-west1-b, eastus-1
    return zone[:-1] if zone[-1:].isalpha() and zone[-2:-1].isdigit() else zone


@dataclass(frozen=True, slots=True)
class Node:
    """One rented machine.

    `ready_s`: when it became ready, or is expected to. `reclaim_s`: when it will be taken, known
    from a notice; None without one.
    """

    id: str
    group: str
    state: NodeState
    started_s: float
    ready_s: float
    reclaim_s: float | None = None


@dataclass(frozen=True, slots=True)
class ServiceCurve:
    """How long a replica on one machine type takes: t(n) = `fixed_ms` + `per_item_ms` · n.

    n is the size of a batch, at most `batch_size_max`; `concurrency` batches run side by side.
    `cv`: standard deviation / mean of the time of one request. `histogram`: counts of measured
    service times by `SERVICE_EDGES_MS` (one bin less than edges), empty when nothing has been
    measured yet; where there are counts they say more than `cv`.
    """

    fixed_ms: float
    per_item_ms: float = 0.0
    concurrency: int = 1
    batch_size_max: int = 1
    cv: float = 0.0
    histogram: tuple[float, ...] = ()

    def batch_ms(self, size: float) -> float:
        """The mean time of a batch of `size` requests."""
        return self.fixed_ms + self.per_item_ms * size

    @property
    def rate_max_rps(self) -> float:
        """Requests a second that one replica can finish at most, with every batch full."""
        return self.concurrency * self.batch_size_max / self.batch_ms(self.batch_size_max) * 1e3


@dataclass(frozen=True, slots=True)
class Slo:
    """The objective: a share `attainment` of the requests is answered within `latency_ms`."""

    latency_ms: float
    attainment: float = 0.99


@dataclass(frozen=True, slots=True)
class Traffic:
    """What happened to a model's requests since the last decision.

    `arrivals`: counts in bins of `bin_s`, the last of which ends at the snapshot's `now_s`.
    `queued`, `running`: waiting and being served, now. `ongoing_mean`: their sum, averaged over
    the time. `finished`, `late`: requests that ended, and how many of them were later than the
    SLO or failed. `latency_p99_ms`: of those that ended, None without any.
    """

    arrivals: tuple[float, ...] = ()
    bin_s: float = 5.0
    queued: int = 0
    running: int = 0
    ongoing_mean: float = 0.0
    finished: int = 0
    late: int = 0
    latency_p99_ms: float | None = None

    @property
    def rate_rps(self) -> float:
        """Mean arrivals a second over the bins; 0 without bins."""
        return sum(self.arrivals) / (len(self.arrivals) * self.bin_s) if self.arrivals else 0.0


@dataclass(frozen=True, slots=True)
class Replica:
    """One copy of a model on a node. `ready_s`: when it became ready, or is expected to."""

    id: str
    model: str
    node: str
    is_ready: bool
    ready_s: float


@dataclass(frozen=True, slots=True)
class Model:
    """One model (version) that serves: objective, traffic, and what a replica takes and can do.

    `curves`: by machine type; a machine without a curve can't host it. `on_demand_min`: replicas
    that must be on machines nobody reclaims (on-demand or reserved).
    """

    name: str
    slo: Slo
    traffic: Traffic
    curves: Mapping[str, ServiceCurve]
    resources: Resources = Resources()
    replicas_min: int = 0
    replicas_max: int | None = None
    on_demand_min: int = 0


class EventKind(enum.Enum):
    """What can happen to nodes of a group."""

    LAUNCHED = "launched"
    LAUNCH_FAILED = "launch failed"
    NOTICED = "noticed"
    RECLAIMED = "reclaimed"


@dataclass(frozen=True, slots=True)
class Event:
    """`count` nodes of `group` at `at_s`. `LAUNCHED`: the cloud gave them, and they boot."""

    kind: EventKind
    group: str
    at_s: float
    count: int = 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that a policy decides on. Times are seconds on one clock of the observer's."""

    now_s: float
    machines: Mapping[str, MachineType]
    groups: Mapping[str, Group]
    nodes: tuple[Node, ...] = ()
    models: tuple[Model, ...] = ()
    replicas: tuple[Replica, ...] = ()
    events: tuple[Event, ...] = ()
    nodes_max: int | None = None
    prices_before_usd_h: Mapping[str, float] = field(default_factory=dict)
