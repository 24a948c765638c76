"""What would have been decided, had something been otherwise?

A journal holds what each decision was made on, so every one can be made again: with other settings,
another objective, other prices, more traffic. The snapshots stay those that were recorded, that is
the nodes are the ones that the recorded decisions had rented; each line answers "and what now?" at
its own moment, and the policy's memory is carried from line to line as it would have been. Changed
nothing, it repeats the journal to the last digit.

    journal ─► snapshot ─► edited ─► decide(·, memory, settings) ─► difference from what was decided
                                        ▲──────── memory ◄───┘

How the world would have answered to other decisions is not here: that is a simulation's question.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from autoscaler.decision import Decision
from autoscaler.journal import JournalError, Line, decision_to_json, read_journal
from autoscaler.policy import Memory, Settings, decide
from autoscaler.snapshot import Group, Model, Snapshot

WORLD_KEYS = ("slo_ms", "attainment", "rate", "nodes_max")
"""What can be changed of a snapshot by one word; prices are `price.GROUP`."""


class ChangeError(ValueError):
    """A KEY=VALUE can't be used; the message says what could be."""


@dataclass(frozen=True)
class Amount:
    """A number, or a factor to multiply by."""

    value: float
    is_factor: bool = False

    def of(self, before: float) -> float:
        """What `before` becomes."""
        return before * self.value if self.is_factor else self.value


@dataclass(frozen=True)
class Changes:
    """What is otherwise. `prices`: by pattern of group names (`*/spot/*`); the last one counts."""

    settings: Settings = field(default_factory=Settings)
    slo_ms: Amount | None = None
    attainment: Amount | None = None
    rate: Amount | None = None
    nodes_max: Amount | None = None
    prices: Mapping[str, Amount] = field(default_factory=dict)
    words: tuple[str, ...] = ()

    def edited(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot as it would have been seen."""
        for pattern in self.prices:
            if not fnmatch.filter(snapshot.groups, pattern):
                raise ChangeError(
                    f"price.{pattern}: no such group; {_near(pattern, snapshot.groups)}"
                )
        nodes_max = snapshot.nodes_max
        if self.nodes_max is not None:
            nodes_max = round(self.nodes_max.of(nodes_max or 0))
        return replace(
            snapshot,
            groups={name: self._group(group) for name, group in snapshot.groups.items()},
            models=tuple(self._model(model) for model in snapshot.models),
            nodes_max=nodes_max,
        )

    def _group(self, group: Group) -> Group:
        for pattern, amount in reversed(tuple(self.prices.items())):
            if fnmatch.fnmatchcase(group.name, pattern):
                return replace(group, price_usd_h=amount.of(group.price_usd_h))
        return group

    def _model(self, model: Model) -> Model:
        slo, traffic = model.slo, model.traffic
        if self.slo_ms is not None:
            slo = replace(slo, latency_ms=self.slo_ms.of(slo.latency_ms))
        if self.attainment is not None:
            slo = replace(slo, attainment=self.attainment.of(slo.attainment))
        if self.rate is not None:
            traffic = replace(
                traffic, arrivals=tuple(self.rate.of(count) for count in traffic.arrivals)
            )
        return replace(model, slo=slo, traffic=traffic)


# --- KEY=VALUE


def read_changes(words: Iterable[str]) -> Changes:
    """What `KEY=VALUE` words say: slo_ms, attainment, rate, nodes_max, price.GROUP (a number, or x
    and a factor), or a setting of the policy by its path (`demand.clear_s`).

    Raises:
        ChangeError: an unknown key, or a value that is none.
    """
    changes = Changes()
    for word in words:
        key, equals, text = (part.strip() for part in word.partition("="))
        if not equals:
            raise ChangeError(f"{word!r}: must be KEY=VALUE")
        changes = replace(_changed(changes, key, text), words=(*changes.words, word))
    return changes


def _changed(changes: Changes, key: str, text: str) -> Changes:
    if key in WORLD_KEYS:
        amount = _amount(key, text)
        if key == "rate" and not amount.is_factor:
            raise ChangeError(f"rate: must be a factor such as x1.5, not {text!r}")
        if key == "attainment" and not amount.is_factor and not 0 < amount.value <= 1:
            raise ChangeError(f"attainment: must be in (0, 1], not {text!r}")
        told: dict[str, Any] = {key: amount}
        return replace(changes, **told)
    if key.startswith("price."):
        pattern = key.removeprefix("price.")
        return replace(changes, prices={**changes.prices, pattern: _amount(key, text)})
    if key.partition(".")[0] not in (f.name for f in dataclasses.fields(Settings)):
        known = [*WORLD_KEYS, "price.GROUP", *(f.name for f in dataclasses.fields(Settings))]
        raise ChangeError(f"nothing to set by {key!r}; {_near(key, known)}")
    return replace(changes, settings=with_setting(changes.settings, key, text))


def _amount(key: str, text: str) -> Amount:
    is_factor = text[:1] in ("x", "×")
    value = _number(key, text[1:] if is_factor else text)
    if value < 0:
        raise ChangeError(f"{key}: must not be negative, is {text!r}")
    return Amount(value, is_factor)


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ChangeError(f"{key}: must be a number, not {text!r}")
    return value


def read_settings(words: Iterable[str]) -> Settings:
    """The policy's settings with `KEY=VALUE` words on them, and nothing else.

    Raises:
        ChangeError: as `read_changes` does, and for what is no setting of the policy.
    """
    settings = Settings()
    for word in words:
        key, equals, text = (part.strip() for part in word.partition("="))
        if not equals:
            raise ChangeError(f"{word!r}: must be KEY=VALUE")
        settings = with_setting(settings, key, text)
    return settings


def with_setting(settings: Settings, key: str, text: str) -> Settings:
    """`settings` with the value at a path such as `demand.clear_s` changed.

    Raises:
        ChangeError: there is no such setting, or the value doesn't fit it.
    """
    changed: Settings = _replaced(settings, key.split("."), key, text)
    return changed


def _replaced(holder: Any, path: Sequence[str], key: str, text: str) -> Any:
    name, *rest = path
    names = [f.name for f in dataclasses.fields(holder)]
    if name not in names:
        raise ChangeError(f"no setting {key!r}; {_near(name, names)}")
    before = getattr(holder, name)
    if dataclasses.is_dataclass(before):
        if not rest:
            inside = ", ".join(f.name for f in dataclasses.fields(before))
            raise ChangeError(f"{key}: holds several settings ({inside}); name one: {key}.…")
        return replace(holder, **{name: _replaced(before, rest, key, text)})
    if rest:
        raise ChangeError(f"{key}: {name} is one value and holds no {rest[0]!r}")
    return replace(holder, **{name: _like(before, key, text)})


def _like(before: Any, key: str, text: str) -> Any:
    """The text as a value of the kind that is there now."""
    match before:
        case bool():
            if text.lower() not in ("true", "false"):
                raise ChangeError(f"{key}: must be true or false, not {text!r}")
            return text.lower() == "true"
        case int():
            value = _number(key, text)
            if value != int(value):
                raise ChangeError(f"{key}: must be a whole number, not {text!r}")
            return int(value)
        case float():
            return _number(key, text)
        case str():
            return text
        case tuple():
            return tuple(_number(key, part) for part in text.split(","))
        case None:
            return None if text.lower() in ("none", "null") else _number(key, text)
        case _:
            raise ChangeError(f"{key}: can't be set from text")


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"


# --- decided again


@dataclass(frozen=True)
class Side:
    """One of the two decisions of a moment."""

    groups: Mapping[str, int]
    wanted: Mapping[str, int]
    because: str
    cost_usd_h: float
    attainment: float

    @staticmethod
    def of(values: Mapping[str, Any]) -> Side:
        """From a line of a journal."""
        expected = values["expected"]
        groups = {name: count for name, count in values["groups"].items() if count}
        cost, attainment = expected["cost_usd_h"], expected["attainment"]
        return Side(groups, values["wanted"], values["because"], cost, attainment)

    @property
    def is_like(self) -> tuple[dict[str, int], dict[str, int]]:
        """What makes two decisions the same to an operator."""
        return dict(self.groups), dict(self.wanted)


@dataclass(frozen=True)
class Moment:
    """A decision as it was, and as it would have been. `for_s`: until the next one."""

    now_s: float
    for_s: float
    recorded: Side
    now: Side

    @property
    def differs(self) -> bool:
        return self.recorded.is_like != self.now.is_like


@dataclass(frozen=True)
class Replay:
    """All moments of a journal from time 0 on (the prelude is replayed, but not counted)."""

    changed: tuple[str, ...]
    moments: tuple[Moment, ...]

    @property
    def differing(self) -> int:
        return sum(moment.differs for moment in self.moments)

    def cost_usd(self, side: str) -> float:
        """What the decisions of a side ("recorded", "now") expected to cost, over the time."""
        return math.fsum(getattr(m, side).cost_usd_h * m.for_s / 3600 for m in self.moments)

    def attainment(self, side: str) -> float:
        """The mean over time of what a side expected to attain; 1 without any time."""
        total_s = math.fsum(m.for_s for m in self.moments)
        parts = math.fsum(getattr(m, side).attainment * m.for_s for m in self.moments)
        return parts / total_s if total_s else 1.0

    def as_json(self) -> dict[str, Any]:
        """Plain values for programs."""
        return {
            "changed": list(self.changed),
            "decisions": len(self.moments),
            "differing": self.differing,
            "expected_cost_usd": {s: self.cost_usd(s) for s in ("recorded", "now")},
            "expected_attainment": {s: self.attainment(s) for s in ("recorded", "now")},
            "moments": [
                {**dataclasses.asdict(moment), "differs": True}
                for moment in self.moments
                if moment.differs
            ],
        }


def replay(path: Path | str, changes: Changes) -> Replay:
    """Every decision of the journal at `path` made again with `changes`.

    Raises:
        JournalError: the file can't be read, or is not a journal with snapshots.
        ChangeError: a change doesn't fit what was recorded.
    """
    try:
        with Path(path).open(encoding="utf-8") as lines:
            return replayed(read_journal(lines), changes)
    except (OSError, UnicodeDecodeError) as error:
        raise JournalError(f"{path}: can't be read ({error})") from None
    except JournalError as error:
        raise JournalError(f"{path}, {error}") from None


def replayed(lines: Iterable[Line], changes: Changes) -> Replay:
    """As `replay`, of lines."""
    memory: Memory | None = None
    pairs: list[tuple[float, Side, Side]] = []
    for line in lines:
        if (policy := line.values.get("policy", "shoal")) != "shoal":
            raise JournalError(f"only shoal's decisions can be made again, not {policy!r}'s")
        decision: Decision[Memory] = decide(changes.edited(line.snapshot), memory, changes.settings)
        memory = decision.memory
        now = Side.of(decision_to_json("shoal", line.snapshot, decision))
        pairs.append((line.snapshot.now_s, Side.of(line.values), now))
    if not pairs:
        raise JournalError("no decisions in it")
    times = [at for at, _, _ in pairs]
    lengths = [later - at for at, later in pairwise(times)]
    last_s = lengths[-1] if lengths else 0.0
    spans = zip(pairs, [*lengths, last_s], strict=True)
    moments = (Moment(at, for_s, was, now) for (at, was, now), for_s in spans)
    return Replay(changes.words, tuple(moment for moment in moments if moment.now_s >= 0))


# --- told


def report_text(result: Replay, *, most: int = 20) -> str:
    """What a person wants to know of a replay: the sums, and where the decisions part."""
    was, now = result.cost_usd("recorded"), result.cost_usd("now")
    more = f" ({(now - was) / was:+.1%})" if was > 0 else ""
    changed = ", ".join(result.changed) or "no change"
    head = (
        f"{len(result.moments)} decisions made again with {changed}\n"
        f"{result.differing} of them differ\n"
        f"expected cost        {was:.2f} → {now:.2f} USD{more}\n"
        f"expected attainment  {result.attainment('recorded'):.5f} → {result.attainment('now'):.5f}"
    )
    partings = _partings(result.moments)
    shown = "\n".join(_parting(moment) for moment in partings[:most])
    left = f"\n… and {len(partings) - most} more" if len(partings) > most else ""
    return f"{head}\n\n{shown}{left}" if partings else head


def _partings(moments: Iterable[Moment]) -> list[Moment]:
    """Differing moments, one of each run of like ones."""
    partings: list[Moment] = []
    before: object = None
    for moment in moments:
        pair = (moment.recorded.is_like, moment.now.is_like) if moment.differs else None
        if pair is not None and pair != before:
            partings.append(moment)
        before = pair
    return partings


def _parting(moment: Moment) -> str:
    was, now = moment.recorded, moment.now
    hours, seconds = divmod(round(moment.now_s), 3600)
    return (
        f"{hours:4d}:{seconds // 60:02d}:{seconds % 60:02d}  "
        f"{was.cost_usd_h:.2f} → {now.cost_usd_h:.2f} USD/h\n"
        f"    was  {_fleet(was)}: {was.because}\n"
        f"    now  {_fleet(now)}: {now.because}"
    )


def _fleet(side: Side) -> str:
    return ", ".join(f"{count} × {name}" for name, count in side.groups.items()) or "no nodes"
