"""What can a replica do on which machine, as an operator writes it down?

A profile is a YAML file; units are in the names of its keys.

    machines:
      p3.2xlarge:
        price_on_demand_usd_h: 3.06
        price_spot_usd_h: 0.918            # where the market folder has no prices
        cold_start_s: {node: 90, load: 60, spread: 0.1}
        service_ms: {fixed: 100, per_item: 0, per_input_token: 0.3, per_output_token: 22,
                     spread: 0.1}          # of a batch; spread = deviation / mean
        concurrency: 16                    # batches side by side
        batch_size_max: 1
        resources: {cpu: 8, gpu: 1, memory_mb: 61000}
        billing: {increment_s: 1, minimum_s: 60}
        reserved: {nodes: 0, price_usd_h: 0}
        spot: true
    notice_s: 120
    launch_fail_s: 15
    on_demand_max: null                    # a quota, where there is one

Only the prices on demand and `service_ms` must be there. What the file may hold is a table (`FILE`
below), so an unknown key, a wrong type and a value out of range are found in one place and said
with their line. Zones and capacity are not here: they come from the market's folder.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from autoscaler.snapshot import MachineType, Resources
from autoscaler.world import Profile, ProfileMachine, ServiceTime


class ProfileError(ValueError):
    """A profile can't be used: file, line, key, what is there, what would be right."""


# --- what may stand in the file


@dataclass(frozen=True)
class Number:
    """A number within [low, high]; `is_whole`: without a fraction; `default` None: none given."""

    low: float = 0.0
    high: float = math.inf
    default: float | None = 0.0
    is_required: bool = False
    is_whole: bool = False

    @property
    def words(self) -> str:
        kind = "a whole number" if self.is_whole else "a number"
        if math.isinf(self.high):
            return f"{kind}, {self.low:g} or more"
        return f"{kind} from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Flag:
    """true or false."""

    default: bool
    is_required: bool = False


@dataclass(frozen=True)
class Section:
    """Keys and what may stand under each."""

    keys: Mapping[str, Number | Flag | Section | Named] = field(default_factory=dict)
    is_required: bool = False


@dataclass(frozen=True)
class Named:
    """Any names, at least one, with the same kind of section under each."""

    each: Section
    is_required: bool = False


Spec = Number | Flag | Section | Named

MACHINE = Section(
    {
        "price_on_demand_usd_h": Number(low=1e-6, is_required=True),
        "price_spot_usd_h": Number(low=1e-6, default=None),
        "cold_start_s": Section({"node": Number(), "load": Number(), "spread": Number(high=5.0)}),
        "service_ms": Section(
            {
                "fixed": Number(),
                "per_item": Number(),
                "per_input_token": Number(),
                "per_output_token": Number(),
                "spread": Number(high=5.0),
            },
            is_required=True,
        ),
        "concurrency": Number(low=1, default=1, is_whole=True),
        "batch_size_max": Number(low=1, default=1, is_whole=True),
        "resources": Section({"cpu": Number(default=1.0), "gpu": Number(), "memory_mb": Number()}),
        "billing": Section(
            {"increment_s": Number(low=1e-3, default=1.0), "minimum_s": Number(default=60.0)}
        ),
        "reserved": Section({"nodes": Number(default=0, is_whole=True), "price_usd_h": Number()}),
        "spot": Flag(default=True),
    }
)
FILE = Section(
    {
        "machines": Named(MACHINE, is_required=True),
        "notice_s": Number(default=120.0),
        "launch_fail_s": Number(default=15.0),
        "on_demand_max": Number(default=None, is_whole=True),
    }
)


# --- from the file to the profile


def read_profile(path: Path | str) -> Profile:
    """The profile in a YAML file.

    Raises:
        ProfileError: there is no such file, or something in it is unknown, missing or out of range.
    """
    path = Path(path)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise ProfileError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: can't be read ({error})") from None
    except yaml.YAMLError as error:
        raise ProfileError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if root is None:
        raise ProfileError(f"{path}: empty; needs at least 'machines'")
    return _profile(_Reader(path).section(root, FILE, ""))


def _profile(values: Mapping[str, Any]) -> Profile:
    return Profile(
        machines=tuple(_machine(name, of) for name, of in values["machines"].items()),
        notice_s=values["notice_s"],
        launch_fail_s=values["launch_fail_s"],
        on_demand_max=values["on_demand_max"],
    )


def _machine(name: str, values: Mapping[str, Any]) -> ProfileMachine:
    cold, service, billing = values["cold_start_s"], values["service_ms"], values["billing"]
    return ProfileMachine(
        type=MachineType(
            name=name,
            price_on_demand_usd_h=values["price_on_demand_usd_h"],
            cold_start_s=cold["node"] + cold["load"],
            cold_start_cv=cold["spread"],
            resources=Resources(**values["resources"]),
            billing_increment_s=billing["increment_s"],
            billing_minimum_s=billing["minimum_s"],
        ),
        service=ServiceTime(
            fixed_ms=service["fixed"],
            per_item_ms=service["per_item"],
            per_input_token_ms=service["per_input_token"],
            per_output_token_ms=service["per_output_token"],
            spread=service["spread"],
        ),
        boot_s=cold["node"],
        load_s=cold["load"],
        concurrency=values["concurrency"],
        batch_size_max=values["batch_size_max"],
        price_spot_usd_h=values["price_spot_usd_h"],
        has_spot=values["spot"],
        reserved=values["reserved"]["nodes"],
        price_reserved_usd_h=values["reserved"]["price_usd_h"],
    )


@dataclass(frozen=True)
class _Reader:
    """Turns YAML nodes into values by their specification; knows the file for its errors."""

    path: Path

    def section(self, node: yaml.Node, spec: Section, where: str) -> dict[str, Any]:
        found = self._pairs(node, where)
        for key, (at, _) in found.items():
            if key not in spec.keys:
                raise self._error(at, _join(where, key), f"unknown key; {_near(key, spec.keys)}")
        values: dict[str, Any] = {}
        for key, inner in spec.keys.items():
            if key in found:
                values[key] = self._value(found[key][1], inner, _join(where, key))
            elif inner.is_required:
                raise self._error(node, where or "the file", f"needs the key {key!r}")
            else:
                values[key] = _default(inner)
        if "fixed" in values and not any(values[k] for k in values if k != "spread"):
            raise self._error(node, where, "says that a request takes no time at all")
        return values

    def _value(self, node: yaml.Node, spec: Spec, where: str) -> Any:
        match spec:
            case Number():
                return self._number(node, spec, where)
            case Flag():
                return self._flag(node, where)
            case Section():
                return self.section(node, spec, where)
            case Named():
                pairs = self._pairs(node, where)
                if not pairs:
                    raise self._error(node, where, "needs at least one name")
                items = pairs.items()
                return {k: self.section(v, spec.each, _join(where, k)) for k, (_, v) in items}

    def _pairs(self, node: yaml.Node, where: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            what = f"must be keys with values, not {_words(node)}"
            raise self._error(node, where or "the file", what)
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, where or "the file", "a key must be a word")
            if key.value in found:
                raise self._error(key, _join(where, key.value), "stands twice")
            found[key.value] = (key, value)
        return found

    def _number(self, node: yaml.Node, spec: Number, where: str) -> float | int | None:
        if spec.default is None and node.tag == "tag:yaml.org,2002:null":
            return None
        value = _as_number(node)
        if value is None or not (spec.low <= value <= spec.high) or math.isinf(value):
            raise self._error(node, where, f"must be {spec.words}, not {_words(node)}")
        if spec.is_whole:
            if value != int(value):
                raise self._error(node, where, f"must be {spec.words}, not {_words(node)}")
            return int(value)
        return value

    def _flag(self, node: yaml.Node, where: str) -> bool:
        if node.tag != "tag:yaml.org,2002:bool":
            raise self._error(node, where, f"must be true or false, not {_words(node)}")
        return str(node.value).lower() in ("true", "yes", "on")

    def _error(self, node: yaml.Node, where: str, what: str) -> ProfileError:
        return ProfileError(f"{self.path}, line {node.start_mark.line + 1}: {where}: {what}")


def _default(spec: Spec) -> Any:
    match spec:
        case Section():
            return {key: _default(inner) for key, inner in spec.keys.items()}
        case Named():
            return {}
        case Number(is_whole=True, default=float() | int() as default):
            return int(default)
        case _:
            return spec.default


def _as_number(node: yaml.Node) -> float | None:
    """The number that a plain (not quoted) scalar stands for; YAML itself takes 1e3 for a word."""
    if not isinstance(node, yaml.ScalarNode) or node.style in ("'", '"'):
        return None
    try:
        return None if math.isnan(number := float(node.value)) else number
    except ValueError:
        return None


def _words(node: yaml.Node) -> str:
    match node:
        case yaml.ScalarNode(value=""):
            return "nothing"
        case yaml.ScalarNode():
            return repr(node.value)
        case yaml.SequenceNode():
            return "a list"
        case _:
            return "keys with values"


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _near(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"


# --- and back


def profile_text(profile: Profile) -> str:
    """The profile as YAML that `read_profile` reads back to an equal one."""
    values = {
        "machines": {machine.type.name: _machine_values(machine) for machine in profile.machines},
        "notice_s": profile.notice_s,
        "launch_fail_s": profile.launch_fail_s,
        "on_demand_max": profile.on_demand_max,
    }
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)


def _machine_values(machine: ProfileMachine) -> dict[str, Any]:
    kind, service = machine.type, machine.service
    return {
        "price_on_demand_usd_h": kind.price_on_demand_usd_h,
        "price_spot_usd_h": machine.price_spot_usd_h,
        "cold_start_s": {
            "node": machine.boot_s,
            "load": machine.load_s,
            "spread": kind.cold_start_cv,
        },
        "service_ms": {
            "fixed": service.fixed_ms,
            "per_item": service.per_item_ms,
            "per_input_token": service.per_input_token_ms,
            "per_output_token": service.per_output_token_ms,
            "spread": service.spread,
        },
        "concurrency": machine.concurrency,
        "batch_size_max": machine.batch_size_max,
        "resources": {
            "cpu": kind.resources.cpu,
            "gpu": kind.resources.gpu,
            "memory_mb": kind.resources.memory_mb,
        },
        "billing": {"increment_s": kind.billing_increment_s, "minimum_s": kind.billing_minimum_s},
        "reserved": {"nodes": machine.reserved, "price_usd_h": machine.price_reserved_usd_h},
        "spot": machine.has_spot,
    }
