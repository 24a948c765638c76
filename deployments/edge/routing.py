"""What an edge must know to send a request on: plain frozen values, made by the controller.

    Routing ─ configuration.render ─► haproxy.cfg + maps ─ process ─► HAProxy

Nothing here knows HAProxy's syntax, and nothing here knows Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Server:
    """One replica that takes requests; `name` (letters, digits, `-_.`) is unique among replicas."""

    name: str
    host: str
    port: int
    grpc_port: int | None = None


@dataclass(frozen=True, slots=True)
class VersionRoute:
    """The replicas of one revision of one version; `backend` names it in HAProxy and in metrics.

    No servers = the front desk gets the requests and holds them.
    """

    version: str
    backend: str
    servers: tuple[Server, ...] = ()
    labels: tuple[str, ...] = ()
    timeout_ms: int = 60_000
    idempotent: bool = True


@dataclass(frozen=True, slots=True)
class ModelRoute:
    """A model: its versions and the percent of unversioned requests that each takes (sum 100)."""

    name: str
    versions: tuple[VersionRoute, ...]
    split: Mapping[str, int]
    sticky_header: str | None = None


@dataclass(frozen=True, slots=True)
class KeyRoute:
    """A caller. `hashes`: SHA-256 (hex) of each key that is valid now (two during a rotation).

    `models` empty = all. Limits None = none; the rate is requests a second over this edge.
    """

    id: str
    hashes: tuple[str, ...]
    models: tuple[str, ...] = ()
    is_admin: bool = False
    rate_rps: int | None = None
    concurrency_max: int | None = None


@dataclass(frozen=True, slots=True)
class Routing:
    """Everything that one edge needs. `desks` are the front desk's replicas."""

    models: tuple[ModelRoute, ...] = ()
    keys: tuple[KeyRoute, ...] = ()
    desks: tuple[Server, ...] = ()
    needs_key: bool = True


@dataclass(frozen=True, slots=True)
class Listener:
    """An address that the edge answers on."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class EdgeSettings:
    """What does not change while an edge runs.

    `token`: sent to replicas as `x-shoal-edge`, so that nobody goes round the edge.
    `tls_pem`: path of certificate + key; None = no TLS listener. `retry_body_bytes_max`: bodies up
    to this size can be sent again to another replica. It sizes HAProxy's buffers, one of which is
    copied for each request: 64 KiB cost 5 µs more CPU a request than 16 KiB, 256 KiB cost 40 µs.
    """

    http: Listener
    token: str
    grpc: Listener | None = None
    tensorflow: Listener | None = None
    https: Listener | None = None
    metrics: Listener | None = None
    tls_pem: str | None = None
    retry_body_bytes_max: int = 65_536
    threads: int = 1
    connections_max: int = 8192
