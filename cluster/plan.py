"""What would a new model file change, in words, before it is done?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from deployments.model import ModelFile, Version


@dataclass(frozen=True, slots=True)
class Change:
    """One line of a plan. `kind`: add, replace, stop, keep, traffic or setting."""

    kind: str
    what: str
    detail: str = ""

    def as_json(self) -> dict[str, str]:
        """For the admin API."""
        return asdict(self)


def changes(old: ModelFile | None, new: ModelFile) -> list[Change]:
    """What deploying `new` would change of `old` (None: the model is not there yet)."""
    before = old.versions if old else {}
    lines = [_version(name, before.get(name), spec) for name, spec in new.versions.items()]
    lines += [
        Change("stop", f"version {name}", "stays for the rollback window, then stops")
        for name in before
        if name not in new.versions
    ]
    return lines + _traffic(old, new) + _settings(old, new)


def _version(name: str, old: Version | None, new: Version) -> Change:
    if old is None:
        return Change("add", f"version {name}", f"{new.runtime} from {new.source}")
    if old.digest == new.digest:
        return Change("keep", f"version {name}")
    differs = _differences(old.model_dump(mode="json"), new.model_dump(mode="json"))
    return Change("replace", f"version {name}", f"new replicas beside the old: {differs}")


def _traffic(old: ModelFile | None, new: ModelFile) -> list[Change]:
    before = _shares(old.traffic) if old else "nothing"
    after = _shares(new.traffic)
    if before == after:
        return []
    how = " at once when ready"
    if old and new.rollout.steps:
        steps = ", ".join(f"{p} %" for p in new.rollout.steps)
        how = f" in steps of {steps}, {new.rollout.interval_s:g} s apart"
    return [Change("traffic", f"{before} → {after}", how.strip())]


def _shares(traffic: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {percent} %" for name, percent in traffic.items() if percent)


def _settings(old: ModelFile | None, new: ModelFile) -> list[Change]:
    if old is None:
        return []
    lines = []
    for field in ("scaling", "rollout", "slo", "sticky_header"):
        a, b = old.model_dump(mode="json")[field], new.model_dump(mode="json")[field]
        if a != b:
            lines.append(Change("setting", field, _differences(_flat(a), _flat(b))))
    return lines


def _flat(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"value": value}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    changed = [
        f"{key} {old.get(key)!r} → {new.get(key)!r}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]
    return "; ".join(changed)
