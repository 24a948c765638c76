"""Which versions of a model have been registered, and where are their weights?

MLflow's model registry keeps names, versions, aliases and tags in a SQL database (SQLite file or
PostgreSQL); the weights lie under an artifact root, a folder or an `s3://` prefix, each version in
a folder of its own that never changes once it is registered. Weights are stored whole before the
version is made known, so a version that is listed can be loaded.

Any number of processes may use one registry. MLflow sets up and writes an SQLite file without
waiting its turn, so here both happen under a file lock. MLflow takes seconds to import: it is
imported at first use.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from deployments.runtimes import LoadError
from deployments.runtimes.options import first_line, near
from deployments.runtimes.surroundings import stay_offline
from deployments.sources import locked

_SOURCE = re.compile(r"models:/+(?P<name>[^/@]+)(?:/(?P<version>[^/@]+)|@(?P<alias>[^/@]+))")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RUNTIME = "shoal.runtime"


@dataclass(frozen=True, slots=True)
class Registered:
    """One version in the registry."""

    name: str
    version: str
    weights: str
    runtime: str
    created_s: float
    aliases: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


class Registry:
    """The registry at the SQLAlchemy URL `uri`, with weights under `artifacts`.

    `cache` is where weights from a bucket are copied to (default: beside the artifacts).
    """

    def __init__(self, uri: str, artifacts: str | Path, cache: Path | None = None) -> None:
        self.uri = uri
        self.artifacts = str(artifacts)
        self._cache = cache

    def register(
        self,
        name: str,
        path: Path,
        *,
        runtime: str,
        metadata: Mapping[str, str] | None = None,
        alias: str | None = None,
        description: str = "",
    ) -> str:
        """Store the file or folder at `path` as the next version of `name`; its number.

        Raises `LoadError` for a bad name and for weights that are not there.
        """
        if not _NAME.fullmatch(name):
            raise LoadError(f"name: {name!r} must be letters, digits, '.', '_' and '-'")
        if not path.exists():
            raise LoadError(f"path: {path} does not exist")
        client = self._client
        weights = self._stored(name, path)
        tags = {**(metadata or {}), _RUNTIME: runtime}
        with self._turn():
            self._ensure(name)
            made = client.create_model_version(
                name, weights, tags=tags, description=description or None, await_creation_for=0
            )
            if alias is not None:
                client.set_registered_model_alias(name, alias, made.version)
        return str(made.version)

    def alias(self, name: str, alias: str, version: str) -> None:
        """Make `alias` mean `version`."""
        self._version(name, version)
        with self._turn():
            self._client.set_registered_model_alias(name, alias, version)

    def resolve(self, name: str, version: str) -> Path:
        """The local weights of a version, given by its number or by `@alias`.

        Raises `LoadError` naming the versions, aliases or models that there are.
        """
        found = self._version(name, version)
        if found.weights.startswith("s3://"):
            from deployments import buckets

            return _only_file(buckets.download(found.weights, self._cache_folder()))
        folder = Path(found.weights.removeprefix("file://"))
        if not folder.exists():
            raise LoadError(
                f"source: the weights of models:/{name}/{found.version} are gone: {folder}"
            )
        return _only_file(folder)

    def fetch(self, source: str) -> Path:
        """The local weights of `models:/NAME/VERSION` or `models:/NAME@alias`."""
        match = _SOURCE.fullmatch(source)
        if match is None:
            raise LoadError(
                f"source: {source!r} must be models:/NAME/VERSION or models:/NAME@alias"
            )
        return self.resolve(match["name"], match["version"] or f"@{match['alias']}")

    def versions(self, name: str) -> list[Registered]:
        """All versions of `name`, oldest first. Raises `LoadError` for an unknown model."""
        from mlflow.exceptions import MlflowException

        try:
            model = self._client.get_registered_model(name)
        except MlflowException as error:
            raise LoadError(
                f"source: no model {name!r} in the registry; {near(name, self.names())}"
            ) from error
        aliases: dict[str, list[str]] = {}
        for alias, version in model.aliases.items():
            aliases.setdefault(str(version), []).append(alias)
        text = "name='" + name.replace("'", "''") + "'"
        found = [_registered(v, aliases) for v in _pages(self._client.search_model_versions, text)]
        return sorted(found, key=lambda v: int(v.version))

    def names(self) -> list[str]:
        """All models that have been registered."""
        return sorted(m.name for m in _pages(self._client.search_registered_models, None))

    @cached_property
    def _client(self) -> Any:
        stay_offline()
        from mlflow import MlflowClient

        try:
            with self._turn():
                client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
                client.search_registered_models(max_results=1)  # sets up the tables
        except Exception as error:
            raise LoadError(f"the model registry can't be opened: {first_line(error)}") from error
        return client

    def _version(self, name: str, wanted: str) -> Registered:
        versions = self.versions(name)
        for found in versions:
            if wanted == found.version or wanted.removeprefix("@") in found.aliases:
                return found
        known = [v.version for v in versions] + [f"@{a}" for v in versions for a in v.aliases]
        raise LoadError(
            f"source: model {name!r} has no version {wanted!r}; it has {', '.join(known) or 'none'}"
        )

    def _ensure(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _stored(self, name: str, path: Path) -> str:
        """Where the weights lie from now on, in the artifact root."""
        place = f"{name}/{uuid.uuid4().hex}"
        if self.artifacts.startswith("s3://"):
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            target = f"{self.artifacts.rstrip('/')}/{place}"
            store: Any = get_artifact_repository(target)
            (store.log_artifacts if path.is_dir() else store.log_artifact)(str(path))
            return target
        folder = Path(self.artifacts.removeprefix("file://")).absolute() / place
        part = folder.with_name(f".{folder.name}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, part)
        else:
            part.mkdir()
            shutil.copy2(path, part / path.name)
        part.rename(folder)
        return str(folder)

    def _cache_folder(self) -> Path:
        if self._cache is None:
            raise LoadError("the registry keeps its weights in a bucket and has no cache folder")
        return self._cache / "registry"

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Alone with an SQLite file; other databases see to it themselves."""
        match = re.match(r"sqlite(?:\+\w+)?:///([^?]+)", self.uri)
        if match is None:
            yield
            return
        file = Path(match[1])
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_name(f".{file.name}.lock")):
            yield


def _pages(search: Any, text: str | None) -> Iterator[Any]:
    """Everything that a paged search of MLflow's finds."""
    token = None
    while True:
        page = search(filter_string=text, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _registered(version: Any, aliases: Mapping[str, list[str]]) -> Registered:
    tags = dict(version.tags)
    return Registered(
        name=version.name,
        version=str(version.version),
        weights=version.source,
        runtime=tags.pop(_RUNTIME, ""),
        created_s=version.creation_timestamp / 1000,
        aliases=tuple(sorted(aliases.get(str(version.version), ()))),
        metadata=tags,
    )


def _only_file(folder: Path) -> Path:
    """The one file in the folder, if that is all that was registered; else the folder."""
    inside = list(folder.iterdir()) if folder.is_dir() else []
    return inside[0] if len(inside) == 1 and inside[0].is_file() else folder
