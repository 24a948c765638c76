"""What an operator may ask of a running cluster: one method an action, arguments in, JSON out.

The front desk's admin API names the action; the controller hands it here. Everything that changes
something is written to the audit with the key that asked. Arguments come from outside: each is
checked, and `Refused` says what would be right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from random import SystemRandom
from typing import Any

from cluster import plan
from cluster.access.keys import Key, KeyRefused, checked, new_secret
from cluster.store import Store
from deployments.inference import Fault
from deployments.model import ModelFile, ModelFileError, parse_model_file

OVERLAP_S = 3600.0
"""How long an old key goes on after a rotation that does not say."""

Arguments = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """The outcome of an action: a JSON value, or a fault (a `Fault` value) with its message."""

    value: Any = None
    fault: str | None = None
    message: str = ""


class Refused(Exception):
    """The action can't be done as asked."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault
        self.message = message


class Administration:
    """The actions that read and change the store. `now_s` tells UNIX time."""

    def __init__(self, store: Store, now_s: Callable[[], float]) -> None:
        self._store = store
        self._now_s = now_s
        self._rng = SystemRandom()

    def file(self, name: str) -> ModelFile:
        """The model file in force. Raises `Refused` for a model that is not there."""
        entry = self._store.in_force().get(name)
        if entry is None or entry.document is None:
            raise Refused(Fault.NOT_FOUND, f"there is no model {name!r}")
        return parse_model_file(entry.document, name)

    def plan(self, arguments: Arguments, actor: str) -> Any:
        """What a document would change."""
        new = self._parsed(arguments)
        return {"model": new.name, "changes": self._changes(new)}

    def deploy(self, arguments: Arguments, actor: str) -> Any:
        """Put a document in force; its history line tells when it has come about."""
        new = self._parsed(arguments)
        if new.name != arguments.get("name"):
            raise Refused(
                Fault.INVALID,
                f"the document's name {new.name!r} must be the path's {arguments.get('name')!r}",
            )
        lines = self._changes(new)
        row = self._put(new, "deploy", actor)
        return {"model": new.name, "row": row, "changes": lines}

    def promote(self, arguments: Arguments, actor: str) -> Any:
        """Give a version a share of the traffic; the others keep their proportions."""
        file = self.file(str(arguments.get("name")))
        version = str(arguments.get("version", ""))
        if version not in file.versions:
            known = ", ".join(repr(v) for v in file.versions)
            raise Refused(Fault.NOT_FOUND, f"version {version!r} is not one of {known}")
        percent = _whole("percent", arguments.get("percent", 100), 1, 100)
        traffic = shared(file.traffic, version, percent)
        if traffic[version] != percent:
            raise Refused(
                Fault.INVALID,
                f"percent must be 100, not {percent}: no other version has traffic to share",
            )
        document = {**file.model_dump(mode="json"), "traffic": traffic}
        document["rollout"] |= {"steps": [], **_given(arguments, "steps", "interval_s")}
        new = self._parsed({"document": document})
        lines = self._changes(new)
        row = self._put(new, "promote", actor)
        return {"model": file.name, "row": row, "changes": lines}

    def rollback(self, arguments: Arguments, actor: str) -> Any:
        """Put what was in force before in force again."""
        name = str(arguments.get("name"))
        old = self.file(name)
        entry = self._store.roll_back(name, actor, self._now_s())
        if entry is None or entry.document is None:
            raise Refused(Fault.CONFLICT, f"model {name!r} has nothing to go back to")
        self._audit(actor, "rollback", name, {"row": entry.id})
        new = parse_model_file(entry.document, name)
        lines = [c.as_json() for c in plan.changes(old, new)]
        return {"model": name, "row": entry.id, "changes": lines}

    def delete(self, arguments: Arguments, actor: str) -> Any:
        """End a model: its replicas drain and stop."""
        name = self.file(str(arguments.get("name"))).name
        row = self._store.append(name, "delete", None, actor, self._now_s())
        self._audit(actor, "delete", name, {"row": row})
        return {"model": name, "row": row}

    def keys(self, arguments: Arguments, actor: str) -> Any:
        """All keys, without their secrets."""
        now_s = self._now_s()
        valid: dict[str, list[float | None]] = {}
        for item in self._store.key_hashes():
            if item.expires_s is None or item.expires_s > now_s:
                valid.setdefault(item.key_id, []).append(item.expires_s)
        return [
            {**asdict(key), "models": list(key.models), "secrets": len(valid.get(key.id, []))}
            for key in self._store.all_keys()
        ]

    def key_create(self, arguments: Arguments, actor: str) -> Any:
        """A new key; its secret is in the answer and nowhere else."""
        key = self._checked_key(arguments)
        secret, digest = new_secret(key.id, self._rng)
        try:
            self._store.add_key(key, digest)
        except ValueError as error:
            raise Refused(Fault.CONFLICT, str(error)) from None
        self._audit(actor, "key create", key.name, {"id": key.id, "role": key.role})
        return {**asdict(key), "models": list(key.models), "key": secret}

    def key_rotate(self, arguments: Arguments, actor: str) -> Any:
        """A second secret for a key; the first one goes on for `overlap_s`."""
        key = self._key(str(arguments.get("key")))
        overlap_s = _number("overlap_s", arguments.get("overlap_s", OVERLAP_S), 0, 30 * 86400)
        secret, digest = new_secret(key.id, self._rng)
        now_s = self._now_s()
        self._store.rotate_key(key.id, digest, now_s, overlap_s)
        self._audit(actor, "key rotate", key.name, {"id": key.id, "overlap_s": overlap_s})
        return {"id": key.id, "name": key.name, "key": secret, "old_until_s": now_s + overlap_s}

    def key_revoke(self, arguments: Arguments, actor: str) -> Any:
        """End a key at once. The last admin key stays, or nobody could make another."""
        key = self._key(str(arguments.get("key")))
        admins = [k for k in self._store.all_keys() if k.role == "admin" and k.revoked_s is None]
        if admins == [key]:
            raise Refused(Fault.CONFLICT, f"{key.name!r} is the last admin key; create one first")
        self._store.revoke_key(key.id, self._now_s())
        self._audit(actor, "key revoke", key.name, {"id": key.id})
        return {"id": key.id, "name": key.name}

    def audit(self, arguments: Arguments, actor: str) -> Any:
        """The newest lines of audit."""
        limit = _whole("limit", arguments.get("limit", 100), 1, 10_000)
        return self._store.audit(limit)

    def _parsed(self, arguments: Arguments) -> ModelFile:
        try:
            return parse_model_file(arguments.get("document"), "model file")
        except ModelFileError as error:
            raise Refused(Fault.INVALID, str(error)) from None

    def _changes(self, new: ModelFile) -> list[dict[str, str]]:
        entry = self._store.in_force().get(new.name)
        old = parse_model_file(entry.document, new.name) if entry else None
        return [change.as_json() for change in plan.changes(old, new)]

    def _put(self, file: ModelFile, action: str, actor: str) -> int:
        document = file.model_dump(mode="json")
        row = self._store.append(file.name, action, document, actor, self._now_s())
        self._audit(actor, action, file.name, {"row": row, "traffic": dict(file.traffic)})
        return row

    def _audit(self, actor: str, action: str, target: str, detail: Arguments) -> None:
        self._store.record(actor, action, target, detail, self._now_s())

    def _key(self, wanted: str) -> Key:
        for key in self._store.all_keys():
            if wanted in (key.id, key.name) and key.revoked_s is None:
                return key
        raise Refused(Fault.NOT_FOUND, f"there is no key {wanted!r} (shoal keys list shows them)")

    def _checked_key(self, arguments: Arguments) -> Key:
        models = _given(arguments, "models").get("models", [])
        if not isinstance(models, list) or not all(isinstance(m, str) for m in models):
            raise Refused(Fault.INVALID, f"models must be a list of names, not {models!r}")
        texts = {"name": "", "role": "caller", **_given(arguments, "name", "role")}
        for field, value in texts.items():
            if not isinstance(value, str):
                raise Refused(Fault.INVALID, f"{field} must be text, not {value!r}")
        key = Key(
            id=f"{self._rng.getrandbits(40):010x}",
            **texts,
            models=tuple(models),
            rate_rps=arguments.get("rate_rps"),
            concurrency_max=arguments.get("concurrency_max"),
            created_s=self._now_s(),
        )
        try:
            return checked(key)
        except KeyRefused as error:
            raise Refused(Fault.INVALID, str(error)) from None


def shared(traffic: Mapping[str, int], version: str, percent: int) -> dict[str, int]:
    """Traffic in which `version` has `percent` and the others share the rest as before."""
    others = {v: p for v, p in traffic.items() if v != version and p}
    total = sum(others.values())
    if not total or percent == 100:
        return {version: 100}
    rest = 100 - percent
    shares = {v: p * rest // total for v, p in others.items()}
    first = max(others, key=lambda v: others[v])
    shares[first] += rest - sum(shares.values())
    return {**{v: p for v, p in shares.items() if p}, version: percent}


def _given(arguments: Arguments, *names: str) -> dict[str, Any]:
    """Those of the arguments that say something."""
    return {name: arguments[name] for name in names if arguments.get(name) is not None}


def _whole(name: str, value: Any, low: int, high: int) -> int:
    number = low - 1
    if isinstance(value, str) or type(value) is int:
        with contextlib.suppress(ValueError):
            number = int(value)
    if not low <= number <= high:
        raise Refused(
            Fault.INVALID, f"{name} must be a whole number from {low} to {high}, not {value!r}"
        )
    return number


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Refused(
            Fault.INVALID, f"{name} must be a number from {low:g} to {high:g}, not {value!r}"
        )
    return float(value)
