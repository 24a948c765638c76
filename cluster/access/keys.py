"""Who may call: API keys, what each may do, and how one is replaced without a gap.

A key is `shoal_ID_SECRET` with 256 random bits of secret, so its plain SHA-256 can be kept and
looked up. Only the hash is stored; the key itself is shown once. During a rotation two hashes
belong to the same key until the old one expires.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from random import Random

from deployments.edge.routing import KeyRoute
from deployments.model import NAME

ROLES = ("caller", "admin")
LIMIT_MAX = 1_000_000_000
"""The largest rate or concurrency; HAProxy and the store count in 32 bits."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class KeyRefused(ValueError):
    """A key request that can't be granted; the message names the field and what would be right."""


@dataclass(frozen=True, slots=True)
class Key:
    """One caller. `models` empty = all; limits None = none; times are UNIX seconds."""

    id: str
    name: str
    role: str = "caller"
    models: tuple[str, ...] = ()
    rate_rps: int | None = None
    concurrency_max: int | None = None
    created_s: float = 0.0
    revoked_s: float | None = None


@dataclass(frozen=True, slots=True)
class KeyHash:
    """One secret of a key: valid until `expires_s` (None = until revoked)."""

    sha256: str
    key_id: str
    created_s: float
    expires_s: float | None = None


def new_secret(key_id: str, rng: Random) -> tuple[str, str]:
    """A fresh key for `key_id` and its hash. `rng` must be unpredictable (`SystemRandom`)."""
    text = f"shoal_{key_id}_{rng.getrandbits(256):064x}"
    return text, hash_of(text)


def hash_of(key: str) -> str:
    """SHA-256 in hex, as the edge looks it up."""
    return hashlib.sha256(key.encode()).hexdigest()


def checked(key: Key) -> Key:
    """`key`, or `KeyRefused` naming the field that can't be."""
    if not _NAME.fullmatch(key.name):
        raise KeyRefused(
            f"name {key.name!r} must be 1 to 64 letters, digits, '.', '_', '@' or '-', "
            "beginning with a letter or digit"
        )
    if key.role not in ROLES:
        raise KeyRefused(f"role {key.role!r} must be one of {', '.join(ROLES)}")
    for model in key.models:
        if not NAME.fullmatch(model):
            raise KeyRefused(f"models: {model!r} can't be a model's name")
    for field in ("rate_rps", "concurrency_max"):
        value = getattr(key, field)
        if value is not None and not _is_limit(value):
            raise KeyRefused(f"{field} must be a whole number from 1 to {LIMIT_MAX}, not {value!r}")
    return key


def _is_limit(value: object) -> bool:
    return type(value) is int and 1 <= value <= LIMIT_MAX


def routes(keys: list[Key], hashes: list[KeyHash], now_s: float) -> tuple[KeyRoute, ...]:
    """What the edge must know of the keys that are valid at `now_s`."""
    valid: dict[str, list[str]] = {}
    for item in hashes:
        if item.expires_s is None or item.expires_s > now_s:
            valid.setdefault(item.key_id, []).append(item.sha256)
    return tuple(
        KeyRoute(
            id=key.id,
            hashes=tuple(sorted(valid[key.id])),
            models=key.models,
            is_admin=key.role == "admin",
            rate_rps=key.rate_rps,
            concurrency_max=key.concurrency_max,
        )
        for key in sorted(keys, key=lambda k: k.id)
        if key.revoked_s is None and key.id in valid
    )
