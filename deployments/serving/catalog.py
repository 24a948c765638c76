"""Which models a process can speak of: a replica of its own, the front desk of all."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from deployments.inference import Fault, InferenceError, ModelStatus, VersionState, VersionStatus
from deployments.model import Version
from deployments.serving.engine import ReplicaEngine


class OwnCatalog:
    """A replica's catalog: its own model, ready since it was made."""

    def __init__(self, engine: ReplicaEngine, spec: Version) -> None:
        self._engine = engine
        self._spec = spec
        self._created_s = int(time.time())

    def models(self) -> Sequence[ModelStatus]:
        """The one model."""
        return (self._status(),)

    def model(self, name: str) -> ModelStatus | None:
        """The one model, if it is called `name`."""
        return self._status() if name == self._engine.model else None

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Not here: a replica is loaded once."""
        raise InferenceError(Fault.UNIMPLEMENTED, "a replica does not load models; ask the cluster")

    async def unload(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Not here: a replica ends with its model."""
        raise InferenceError(
            Fault.UNIMPLEMENTED, "a replica does not unload models; ask the cluster"
        )

    def _status(self) -> ModelStatus:
        engine, spec = self._engine, self._spec
        version = VersionStatus(
            version=engine.version,
            state=VersionState.READY,
            signature=engine.signature,
            created_s=self._created_s,
            labels=spec.labels,
            percent=100,
            generates=engine.generates,
            batch_size_max=spec.batching.batch_size_max,
            statistics=engine.statistics(),
        )
        return ModelStatus(engine.model, (version,))


class ClusterCatalog:
    """The front desk's catalog: what the controller last said.

    `switch(name, is_on)` asks the controller to load or unload a model; it raises `InferenceError`.
    """

    def __init__(self, switch: Callable[[str, bool], Awaitable[None]]) -> None:
        self._switch = switch
        self._models: dict[str, ModelStatus] = {}

    def update(self, models: Sequence[ModelStatus]) -> None:
        """Take what the controller says now."""
        self._models = {m.name: m for m in models}

    def models(self) -> Sequence[ModelStatus]:
        """All models, by name."""
        return tuple(self._models.values())

    def model(self, name: str) -> ModelStatus | None:
        """The model called `name`."""
        return self._models.get(name)

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Wake a model and wait until it answers."""
        await self._known(name, True, parameters)

    async def unload(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Give a model's replicas back; a request or a load wakes it again."""
        await self._known(name, False, parameters)

    async def _known(self, name: str, is_on: bool, parameters: Mapping[str, Any]) -> None:
        if name not in self._models:
            raise InferenceError(
                Fault.NOT_FOUND, f"Request for unknown model: '{name}' is not found"
            )
        if "config" in parameters or any(str(p).startswith("file:") for p in parameters):
            raise InferenceError(
                Fault.UNIMPLEMENTED,
                "models are changed by a model file (shoal deploy), not by load parameters",
            )
        await self._switch(name, is_on)
