"""How does a decision become a line that can be read, compared and decided again?

A journal is a JSON object a line, one for each decision: what was wanted and why, what was
rejected at which price, what it should cost, and the snapshot that it was made on. Two snapshots
in a row are mostly the same, so the first line holds one whole and the others what has changed
since the line above (a JSON merge patch, RFC 7396), with a whole one again now and then:

    {"now_s": 0, …, "snapshot": {…}}
    {"now_s": 30, …, "changes": {"now_s": 30, "nodes": {"7": {"state": "ready"}, "3": null}}}

`snapshot_from_json(snapshot_to_json(s)) == s` for every snapshot, and likewise over a journal.
Where journals are kept, and what is made of them, is their readers' business (see `what_if`).
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from autoscaler.decision import Command, Decision, Drain, Launch, Policy, Stop
from autoscaler.snapshot import Model, Node, NodeState, Replica, Snapshot

Json = dict[str, Any]

WHOLE_EVERY = 200
"""A whole snapshot comes at least this often, so that a cut journal can be read from there on."""

LONG = 32
"""A tuple of this many numbers is a histogram: only what isn't zero is written."""

_KEYS: dict[type, str] = {Node: "id", Replica: "id", Model: "name"}
"""What these are known by: a tuple of them becomes an object, so that a patch can name one."""


class JournalError(ValueError):
    """A journal can't be read: which line, and why."""


# --- values


def snapshot_to_json(snapshot: Snapshot) -> Json:
    """The snapshot as JSON values. Fields that are None are left out."""
    whole: Json = _to_json(snapshot)
    return whole


def snapshot_from_json(values: Json) -> Snapshot:
    """The snapshot that `snapshot_to_json` was given."""
    snapshot: Snapshot = _from_json(values, Snapshot)
    return snapshot


def _to_json(value: Any) -> Any:
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, float | int):
        return value
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _to_json(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        key = _KEYS.get(type(value[0])) if value else None
        if key:
            return {getattr(inner, key): _to_json(inner) for inner in value}
        return _sparse(value) if len(value) >= LONG else [_to_json(inner) for inner in value]
    return {
        name: _to_json(inner)
        for name in _field_types(type(value))
        if (inner := getattr(value, name)) is not None
    }


def _sparse(values: Sequence[Any]) -> Any:
    if not all(isinstance(value, float | int) for value in values):
        return [_to_json(inner) for inner in values]
    return {"length": len(values)} | {str(k): _to_json(v) for k, v in enumerate(values) if v}


def _dense(values: Json) -> tuple[float, ...]:
    return tuple(values.get(str(k), 0.0) for k in range(values["length"]))


_FIELDS: dict[type, dict[str, Any]] = {}


def _field_types(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    if kind not in _FIELDS:
        hints = typing.get_type_hints(kind)
        _FIELDS[kind] = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    return _FIELDS[kind]


def _from_json(value: Any, kind: Any) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # X | None, and None is left out
        return None if value is None else _from_json(value, inner[0])
    if origin is tuple and inner[0] is float and isinstance(value, dict):
        return _dense(value)
    if origin is tuple:
        members = value.values() if isinstance(value, dict) else value
        return tuple(_from_json(member, inner[0]) for member in members)
    if origin is not None:  # a mapping
        return {key: _from_json(member, inner[1]) for key, member in value.items()}
    if issubclass(kind, enum.Enum):
        return kind(value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        known = _field_types(kind)
        return kind(**{name: _from_json(member, known[name]) for name, member in value.items()})
    return value


def changes(before: Snapshot, after: Snapshot) -> Json | None:
    """The merge patch from the JSON of `before` to that of `after`.

    None when no patch keeps the order of keys, in which a policy may see its nodes and groups.
    """
    patch = _patch(before, after)
    return None if patch is _NO_PATCH else patch


_NO_PATCH = object()


def _patch(before: Any, after: Any) -> Any:
    """What to write over `before`: of what has members by name, those that differ."""
    if type(before) is not type(after):
        return _to_json(after)
    old, new = _members(before), _members(after)
    if old is None or new is None:
        return _to_json(after)
    kept = [key for key in old if key in new]
    if list(new) != kept + [key for key in new if key not in old]:
        return _NO_PATCH
    patch: Json = {key: None for key in old if key not in new}
    for key, value in new.items():
        if key not in old:
            patch[key] = _to_json(value)
        elif not _is_same(old[key], value):
            patch[key] = inner = _patch(old[key], value)
            if inner is _NO_PATCH:
                return _NO_PATCH
    return patch


def _members(value: Any) -> Mapping[str, Any] | None:
    """What a JSON object of `value` would hold; None when it would be none."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, tuple):
        key = _KEYS.get(type(value[0])) if value else None
        return {getattr(member, key): member for member in value} if key else None
    if not dataclasses.is_dataclass(value):
        return None
    named = ((name, getattr(value, name)) for name in _field_types(type(value)))
    return {name: member for name, member in named if member is not None}


def _is_same(before: Any, after: Any) -> bool:
    if isinstance(after, Mapping):  # equal mappings may still differ in their order
        return bool(before == after) and list(before) == list(after)
    return before is after or bool(before == after)


def patched(before: Json, patch: Json) -> Json:
    """`before` with a merge patch applied (RFC 7396)."""
    after = {
        key: value for key, value in before.items() if key not in patch or patch[key] is not None
    }
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(after.get(key), dict):
            after[key] = patched(after[key], value)
        elif value is not None:
            after[key] = value
    return after


# --- lines


def decision_to_json(policy: str, snapshot: Snapshot, decision: Decision[Any]) -> Json:
    """What a line says of a decision, without the snapshot."""
    traffic = [model.traffic for model in snapshot.models]
    groups = {node.id: node.group for node in snapshot.nodes if node.state is NodeState.READY}
    return {
        "now_s": _to_json(snapshot.now_s),
        "policy": policy,
        "wanted": _to_json(decision.wanted),
        "allowed": _to_json(decision.allowed),
        "groups": _to_json({name: n for name, n in decision.groups.items() if n}),
        "commands": [_command_to_json(command) for command in decision.commands],
        "reason": decision.reason.value,
        "because": decision.because,
        "rejected": _to_json(decision.rejected),
        "expected": _to_json(decision.expected),
        "observed": {
            "rate_rps": _to_json(sum(t.rate_rps for t in traffic)),
            "queued": _to_json(sum(t.queued for t in traffic)),
            "running": _to_json(sum(t.running for t in traffic)),
            "ready": {
                name: list(groups.values()).count(name) for name in dict.fromkeys(groups.values())
            },
        },
    }


def _command_to_json(command: Command) -> Json:
    match command:
        case Launch(group=group, count=count):
            return {"launch": group, "count": int(count)}
        case Drain(node=node):
            return {"drain": node}
        case Stop(node=node):
            return {"stop": node}


@dataclass
class Writer:
    """Turns decisions into the lines of a journal, in order; remembers the snapshot before.

    `has_snapshots`: with what they were made on, so that they can be made again.
    """

    write: Callable[[str], object]
    has_snapshots: bool = True
    _before: Snapshot | None = None
    _lines: int = 0

    def line(self, policy: str, snapshot: Snapshot, decision: Decision[Any]) -> None:
        """Write the line of one decision."""
        values = decision_to_json(policy, snapshot, decision)
        if self.has_snapshots:
            values |= self._seen(snapshot)
        self.write(json.dumps(values, separators=(",", ":")) + "\n")

    def _seen(self, snapshot: Snapshot) -> Json:
        before, self._before = self._before, snapshot
        self._lines += 1
        if before is None or self._lines % WHOLE_EVERY == 0:
            return {"snapshot": snapshot_to_json(snapshot)}
        patch = changes(before, snapshot)
        return {"snapshot": snapshot_to_json(snapshot)} if patch is None else {"changes": patch}


@dataclass
class Recorded:
    """A policy that writes each of its decisions down, and otherwise is the one inside.

    `stopwatch`: seconds, read around each decision of the policy inside (not of the writing).
    """

    inside: Policy
    writer: Writer
    stopwatch: Callable[[], float] = field(default=lambda: 0.0)
    decide_s: float = 0.0
    decisions: int = 0

    @property
    def name(self) -> str:
        return self.inside.name

    @property
    def interval_s(self) -> float:
        return self.inside.interval_s

    @property
    def is_woken(self) -> bool:
        return self.inside.is_woken

    def decide(self, snapshot: Snapshot, memory: Any) -> Decision[Any]:
        """The decision of the policy inside."""
        start_s = self.stopwatch()
        decision = self.inside.decide(snapshot, memory)
        self.decide_s += self.stopwatch() - start_s
        self.decisions += 1
        self.writer.line(self.name, snapshot, decision)
        return decision


@dataclass(frozen=True)
class Line:
    """A line read back: what it says, and the snapshot of its decision."""

    values: Json
    snapshot: Snapshot


def read_journal(lines: Iterable[str]) -> Iterator[Line]:
    """The lines of a journal with their snapshots.

    Raises:
        JournalError: a line is not JSON, or it tells changes and there is no snapshot before it.
    """
    before: Json | None = None
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        values = _values(number, text)
        before = _whole(number, values, before)
        values.pop("snapshot", None)
        values.pop("changes", None)
        try:
            yield Line(values, snapshot_from_json(before))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise JournalError(f"line {number}: not a snapshot ({error!r})") from None


def _values(number: int, text: str) -> Json:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise JournalError(f"line {number}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise JournalError(f"line {number}: must be an object, not {type(values).__name__}")
    return values


def _whole(number: int, values: Json, before: Json | None) -> Json:
    match values:
        case {"snapshot": dict() as whole}:
            return whole
        case {"changes": dict() as patch} if before is not None:
            return patched(before, patch)
        case {"changes": _}:
            raise JournalError(f"line {number}: tells changes, but no line above has a snapshot")
        case _:
            what = "holds neither 'snapshot' nor 'changes'"
            raise JournalError(
                f"line {number}: {what}; shoal's own decisions are written with them"
            )
