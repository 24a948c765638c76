"""What is wanted, and why?

A `Decision` is what a policy answers to a `Snapshot`: how many nodes each group should hold, how
many replicas each model should have where, what to launch, to drain and to stop in which order, the
reason in the operator's words, the options that were rejected and at what price, and what the
choice should cost and attain. Whoever asked performs it; nothing here acts.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from autoscaler.snapshot import Snapshot

M = TypeVar("M")


class Reason(enum.Enum):
    """Why a decision changes something, or does not. The words that operators see."""

    STEADY = "steady"
    DEMAND_RISING = "demand rising"
    DEMAND_FALLING = "demand falling"
    QUEUE_GROWING = "queue growing"
    NOTICE = "reclaim notice"
    RECLAIM = "nodes reclaimed"
    LAUNCH_FAILED = "launch failed"
    CHEAPER = "cheaper elsewhere"
    BUDGET_LOW = "error budget low"
    COVERAGE_LOST = "forecast coverage lost"
    FLOOR = "configured minimum"
    CEILING = "configured maximum"
    SHORT = "capacity short"


@dataclass(frozen=True, slots=True)
class Launch:
    """Rent `count` nodes of `group`."""

    group: str
    count: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Give `node` no new requests, and give it back when it has answered the last."""

    node: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Give `node` back at once: it serves nobody yet."""

    node: str


Command = Launch | Drain | Stop


@dataclass(frozen=True, slots=True)
class Rejected:
    """An option that was not taken: what it would have cost, and why it was not."""

    option: str
    cost_usd_h: float
    why: str


@dataclass(frozen=True, slots=True)
class Expected:
    """What a decision should cost and bring."""

    cost_usd_h: float
    attainment: float


@dataclass(frozen=True, slots=True)
class Decision(Generic[M]):
    """A policy's answer. `memory`: what it wants to be handed with the next snapshot.

    `wanted`: replicas by model that the demand asks for; `allowed`: what damping and limits leave
    of that. `groups`: nodes by group that should be held (none named: zero). `replicas`: by model,
    then group. `commands` are in the order in which to perform them.
    """

    memory: M
    wanted: Mapping[str, int] = field(default_factory=dict)
    allowed: Mapping[str, int] = field(default_factory=dict)
    groups: Mapping[str, int] = field(default_factory=dict)
    replicas: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    commands: tuple[Command, ...] = ()
    reason: Reason = Reason.STEADY
    because: str = ""
    rejected: tuple[Rejected, ...] = ()
    expected: Expected = Expected(0.0, 1.0)


class Policy(Protocol):
    """Anything that decides: Shoal's own policy and the baselines.

    `interval_s`: how often it wants to be asked. `is_woken`: it also wants to be asked at once when
    a notice comes, a node is lost or a launch fails. `memory` is None the first time.
    """

    @property
    def name(self) -> str: ...

    @property
    def interval_s(self) -> float: ...

    @property
    def is_woken(self) -> bool: ...

    def decide(self, snapshot: Snapshot, memory: Any) -> Decision[Any]: ...
