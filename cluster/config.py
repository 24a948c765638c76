"""What an operator can set, read once and handed down as frozen values.

The only module that reads the environment. Settings come from defaults, then the cluster's YAML
file (`--config`), then `SHOAL_…` variables, then command-line flags. Everything that belongs to
one cluster lives in its home folder, so that two clusters on one machine never meet:

    HOME/cluster.json   what runs: addresses, pids     HOME/shoal.db      models, keys, audit
    HOME/admin.key      the first admin key (0600)     HOME/edge/         HAProxy's files
    HOME/secrets.json   tokens inside the cluster      HOME/logs/         what the processes print
"""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import yaml

from deployments.edge.routing import EdgeSettings, Listener


class ConfigError(ValueError):
    """A setting that can't be used; the message names it, its value and what would be right."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One cluster's settings.

    `host` is the address that the edge binds; a port of 0 = any free one. `metrics_port` (on
    `metrics_host`, without a key) answers for the whole node, `edge_metrics_port` is HAProxy's
    part of it. `cpus` is how much work the embedded node takes on in Ray's books (None: 4 for each
    core, at least 16: small models share cores). `registry` and `store` are SQLAlchemy
    URLs, empty = SQLite in the home folder. `edge_threads`: HAProxy's (None: a quarter of the
    cores; on few cores one thread answers more than two that share them with the models).
    """

    home: Path
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    metrics_host: str = "127.0.0.1"
    edge_metrics_port: int = 0
    tensorflow_port: int | None = None
    https_port: int | None = None
    tls_pem: Path | None = None
    needs_key: bool = True
    cpus: int | None = None
    gpus: int | None = None
    object_store_mb: int = 512
    held_requests_max: int = 256
    drain_timeout_s: float = 60.0
    store: str = ""
    registry: str = ""
    retry_body_kb: int = 64
    edge_threads: int | None = None

    @property
    def store_url(self) -> str:
        """Where desired state, keys and audit live."""
        return self.store or f"sqlite:///{self.home / 'shoal.db'}"

    @property
    def registry_url(self) -> str:
        """The MLflow registry of models."""
        return self.registry or f"sqlite:///{self.home / 'registry.db'}"

    @property
    def ray_folder(self) -> Path:
        """Ray's session files: short, because Unix socket paths end at 107 characters."""
        digest = sha256(str(self.home).encode()).hexdigest()[:10]
        return Path(tempfile.gettempdir()) / f"shoal-{digest}"

    def logical_cpus(self) -> int:
        """How many CPUs the embedded node offers in Ray's books."""
        return self.cpus if self.cpus is not None else max(16, 4 * (os.cpu_count() or 1))


def read_settings(
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """The settings in force. Raises `ConfigError`, also for a key that is not known."""
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    if file is not None:
        values.update(_checked_keys(_document(file), str(file)))
    values.update(_from_environment(environment))
    values.update({k: v for k, v in (flags or {}).items() if v is not None})
    values.setdefault("home", default_home(environment))
    typed = {name: _typed(name, value) for name, value in values.items()}
    return _consistent(replace(Settings(home=typed.pop("home")), **typed))


def default_home(environment: Mapping[str, str] | None = None) -> Path:
    """Where a cluster lives when nobody says otherwise."""
    environment = os.environ if environment is None else environment
    return Path(environment.get("SHOAL_HOME") or Path.home() / ".shoal")


def client_settings(environment: Mapping[str, str] | None = None) -> tuple[str | None, str | None]:
    """The URL and key by which commands reach a cluster that was not started from here."""
    environment = os.environ if environment is None else environment
    return environment.get("SHOAL_URL"), environment.get("SHOAL_KEY")


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that Shoal starts: this one's, with `extra` on top."""
    return {**os.environ, **extra}


def edge_settings(settings: Settings, edge_token: str) -> EdgeSettings:
    """What the edge is told once, of the cluster's settings."""

    def listener(port: int | None) -> Listener | None:
        return None if port is None else Listener(settings.host, port)

    return EdgeSettings(
        http=Listener(settings.host, settings.port),
        token=edge_token,
        grpc=listener(settings.grpc_port),
        tensorflow=listener(settings.tensorflow_port),
        metrics=Listener("127.0.0.1", settings.edge_metrics_port),
        https=listener(settings.https_port),
        tls_pem=str(settings.tls_pem) if settings.tls_pem else None,
        retry_body_bytes_max=settings.retry_body_kb * 1024,
        threads=settings.edge_threads or max(1, (os.cpu_count() or 1) // 4),
    )


def _document(file: Path) -> Mapping[str, Any]:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(document, Mapping | None):
        raise ConfigError(f"{file}: must be a mapping of settings, not a {type(document).__name__}")
    return document or {}


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The `SHOAL_…` variables that are settings; one that nearly is one is refused."""
    found = {name: environment.get(f"SHOAL_{name.upper()}", "") for name in _NAMES}
    others = {v for v in environment if v.startswith("SHOAL_")} - _OTHER_VARIABLES
    for variable in sorted(others - {f"SHOAL_{name.upper()}" for name in _NAMES}):
        name = variable.removeprefix("SHOAL_").lower()
        if near := difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.7):
            raise ConfigError(
                f"environment: unknown setting {variable}; did you mean SHOAL_{near[0].upper()}?"
            )
    return {name: text for name, text in found.items() if text}  # set to nothing = not set


def _checked_keys(document: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    for key in document:
        if key not in _NAMES:
            near = difflib.get_close_matches(str(key), _NAMES, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_NAMES)}"
            raise ConfigError(f"{where}: unknown setting {key!r}; {hint}")
    return document


_TYPES = {f.name: str(f.type) for f in fields(Settings)}
_NAMES = list(_TYPES)
_OTHER_VARIABLES = {"SHOAL_URL", "SHOAL_KEY", "SHOAL_CLUSTER"}
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
PORTS = tuple(name for name in _NAMES if name == "port" or name.endswith("_port"))
_BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(PORTS, (0, 65535)),
    "cpus": (1, 100_000),
    "gpus": (0, 100_000),
    "object_store_mb": (75, 100_000_000),  # Ray takes no less
    "held_requests_max": (1, 1_000_000),
    "drain_timeout_s": (0, 86_400),
    "retry_body_kb": (1, 65_536),
    "edge_threads": (1, 64),  # HAProxy takes no more in one group
}


def _typed(name: str, value: Any) -> Any:
    kind = _TYPES[name]
    if value is None and "None" in kind:
        return None
    word, read = _KINDS[kind.split()[0]]
    try:
        return read(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ConfigError(f"setting {name} must be {word}, not {value!r}") from None


def _path(value: Any) -> Path:
    if value == "":
        raise ValueError(value)
    return Path(value).expanduser().resolve()


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(value)
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError(value)
    return int(value)


def _truth(value: Any) -> bool:
    text = str(value).lower()
    if text not in _TRUE + _FALSE:
        raise ValueError(value)
    return text in _TRUE


_KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "Path": ("a path", _path),
    "int": ("a whole number", _whole),
    "float": ("a number", _number),
    "bool": ("true or false", _truth),
    "str": ("text", _text),
}


def _consistent(settings: Settings) -> Settings:
    for name, (low, high) in _BOUNDS.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            what = "a port " if name in PORTS else ""
            raise ConfigError(f"setting {name} must be {what}from {low} to {high}, not {value}")
    for name in ("host", "metrics_host"):
        _check_address(name, getattr(settings, name))
    _check_ports_differ(settings)
    if settings.https_port is not None and settings.tls_pem is None:
        raise ConfigError("setting https_port needs tls_pem: a file with certificate and key")
    if settings.tls_pem is not None and not settings.tls_pem.is_file():
        raise ConfigError(f"setting tls_pem names {str(settings.tls_pem)!r}, which is not a file")
    return settings


def _check_address(name: str, host: str) -> None:
    try:
        IPv4Address(host)
    except ValueError:
        raise ConfigError(
            f"setting {name} must be an IPv4 address such as 127.0.0.1, not {host!r}"
        ) from None


def _check_ports_differ(settings: Settings) -> None:
    taken: dict[int, str] = {}
    for name in PORTS:
        port = getattr(settings, name)
        if port in taken:
            raise ConfigError(
                f"settings {taken[port]} and {name} are both {port}; each needs a port of its own"
            )
        if port:
            taken[port] = name
