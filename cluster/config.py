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
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from deployments.edge.routing import EdgeSettings, Listener


class ConfigError(ValueError):
    """A setting that can't be used; the message names it, its value and what would be right."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One cluster's settings.

    `host` is the address that edges and replicas bind; a port of 0 = any free one. `metrics_port`
    answers for the whole node, `edge_metrics_port` is HAProxy's part of it. `cpus` is how much
    work the embedded node takes on in Ray's books (None: 4 for each core, at least 16: small models
    share cores). `registry` and `store` are SQLAlchemy URLs, empty = SQLite in the home folder.
    """

    home: Path
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
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
    retry_body_kb: int = 256

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
    for name in _NAMES:
        if (text := environment.get(f"SHOAL_{name.upper()}")) is not None:
            values[name] = text
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
    )


def _document(file: Path) -> Mapping[str, Any]:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(document, Mapping | None):
        raise ConfigError(f"{file}: must be a mapping of settings, not a {type(document).__name__}")
    return document or {}


def _checked_keys(document: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    for key in document:
        if key not in _NAMES:
            near = difflib.get_close_matches(str(key), _NAMES, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_NAMES)}"
            raise ConfigError(f"{where}: unknown setting {key!r}; {hint}")
    return document


_TYPES = {f.name: str(f.type) for f in fields(Settings)}
_NAMES = list(_TYPES)
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def _typed(name: str, value: Any) -> Any:
    kind = _TYPES[name]
    if value is None and "None" in kind:
        return None
    try:
        if kind.startswith("Path"):
            return Path(value).expanduser().resolve()
        if kind.startswith("int"):
            return _whole(value)
        if kind.startswith("float"):
            return float(value)
        if kind == "bool":
            return _truth(value)
    except (TypeError, ValueError):
        raise ConfigError(f"setting {name} must be {_word(kind)}, not {value!r}") from None
    return str(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError(value)
    return int(value)


def _truth(value: Any) -> bool:
    text = str(value).lower()
    if text not in _TRUE + _FALSE:
        raise ValueError(value)
    return text in _TRUE


def _word(kind: str) -> str:
    words = {"P": "a path", "i": "a whole number", "f": "a number", "b": "true or false"}
    return words.get(kind[0], "text")


def _consistent(settings: Settings) -> Settings:
    for name in (
        "port",
        "grpc_port",
        "metrics_port",
        "edge_metrics_port",
        "tensorflow_port",
        "https_port",
    ):
        port = getattr(settings, name)
        if port is not None and not 0 <= port <= 65535:
            raise ConfigError(f"setting {name} must be a port from 0 to 65535, not {port}")
    if settings.https_port is not None and settings.tls_pem is None:
        raise ConfigError("setting https_port needs tls_pem: a file with certificate and key")
    if settings.tls_pem is not None and not settings.tls_pem.is_file():
        raise ConfigError(f"setting tls_pem names {str(settings.tls_pem)!r}, which is not a file")
    return settings
