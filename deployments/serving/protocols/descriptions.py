"""What do Open Inference clients read about servers and models?

Metadata, configuration, statistics and the repository index as plain values in Triton's form. The
REST side writes them as JSON; the gRPC side reads the same values into its messages, whose fields
have the same names.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterable
from typing import Any

from deployments.inference import (
    Catalog,
    Engine,
    Fault,
    InferenceError,
    ModelStatus,
    Signature,
    Statistics,
    Tensor,
    VersionState,
    VersionStatus,
)

Json = dict[str, Any]

EXTENSIONS = [
    "binary_tensor_data",
    "classification",
    "generate",
    "model_configuration",
    "model_repository",
    "parameters",
    "statistics",
]

_STATES = {
    VersionState.STARTING: "LOADING",
    VersionState.READY: "READY",
    VersionState.IDLE: "READY",
    VersionState.FAILED: "UNAVAILABLE",
    VersionState.STOPPING: "UNLOADING",
}
_ANSWERING = (VersionState.READY, VersionState.IDLE)


@functools.cache
def shoal_version() -> str:
    """The release that runs, "unknown" where it was never installed."""
    try:
        return importlib.metadata.version("shoal")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def unknown_model(model: str, version: str | None = None) -> InferenceError:
    """The error whose first words Triton's clients look for."""
    where = "" if version is None else f" version {version!r}"
    return InferenceError(
        Fault.NOT_FOUND, f"Request for unknown model: {model!r}{where} is not found"
    )


def model_status(catalog: Catalog, model: str) -> ModelStatus:
    """The model of that name; raises `InferenceError(NOT_FOUND)`."""
    status = catalog.model(model)
    if status is None:
        raise unknown_model(model)
    return status


def version_status(model: ModelStatus, version: str | None) -> VersionStatus:
    """The version of that name or label, None = the one with the most traffic."""
    status = model.version(version)
    if status is None:
        status = next((v for v in model.versions if version in v.labels), None)
    if status is None:
        raise unknown_model(model.name, version)
    return status


def chosen_engine(
    catalog: Catalog, engine: Engine | None, model: str, version: str | None, backend: str
) -> Engine:
    """The engine, if a request for `model` and `version` (or label) means it.

    `backend` is what the edge chose, such as `fraud--4--1a2b3c4d`: it knows what a label means now.
    """
    if engine is None or model != engine.model:
        raise unknown_model(model, version)
    if version is None or version == engine.version:
        return engine
    if backend.split("--")[:2] == [engine.model, engine.version]:
        return engine
    if version_status(model_status(catalog, model), version).version != engine.version:
        raise unknown_model(model, version)
    return engine


def is_ready(catalog: Catalog, model: str, version: str | None) -> bool:
    """Whether a request for it would be answered (waking it counts)."""
    status = model_status(catalog, model)
    if version is None:
        return status.is_ready
    return version_status(status, version).state in _ANSWERING


def server_metadata(name: str) -> Json:
    """Who answers, and what it understands beyond the protocol."""
    return {"name": name, "version": shoal_version(), "extensions": EXTENSIONS}


def model_metadata(catalog: Catalog, model: str, version: str | None) -> Json:
    """Inputs and outputs of a model, and which versions there are."""
    status = model_status(catalog, model)
    signature = _signature(status, version_status(status, version))
    return {
        "name": status.name,
        "versions": [v.version for v in status.versions],
        "platform": signature.platform,
        "inputs": [_tensor(t) for t in signature.inputs],
        "outputs": [_tensor(t) for t in signature.outputs],
    }


def model_config(catalog: Catalog, model: str, version: str | None) -> Json:
    """The model's configuration as Triton would have it; batched models hide the batch axis."""
    status = model_status(catalog, model)
    chosen = version_status(status, version)
    signature = _signature(status, chosen)
    is_batched = all(t.shape[:1] == (-1,) for t in (*signature.inputs, *signature.outputs))
    config: Json = {
        "name": status.name,
        "platform": signature.platform,
        "backend": signature.platform,
        "version_policy": {"specific": {"versions": _numbers(v.version for v in status.versions)}},
        "max_batch_size": chosen.batch_size_max if is_batched else 0,
        "input": [_config_tensor(t, is_batched) for t in signature.inputs],
        "output": [_config_tensor(t, is_batched) for t in signature.outputs],
        "model_transaction_policy": {"decoupled": chosen.generates},
    }
    if not config["version_policy"]["specific"]["versions"]:
        config["version_policy"] = {"all": {}}
    if is_batched and chosen.batch_size_max > 1:
        config["dynamic_batching"] = {"preferred_batch_size": [chosen.batch_size_max]}
    return config


def model_statistics(catalog: Catalog, model: str | None, version: str | None) -> Json:
    """Counts and times of all models, of one, or of one of its versions."""
    chosen = catalog.models() if model is None else [model_status(catalog, model)]
    return {
        "model_stats": [
            _statistics(status.name, v.version, v.statistics)
            for status in chosen
            for v in (status.versions if version is None else [version_status(status, version)])
        ]
    }


def repository_index(catalog: Catalog, *, only_ready: bool) -> list[Json]:
    """Every version of every model, its state, and why it is not ready."""
    return [
        {"name": m.name, "version": v.version, "state": _STATES[v.state], "reason": v.reason}
        for m in catalog.models()
        for v in m.versions
        if not only_ready or v.state in _ANSWERING
    ]


def _signature(model: ModelStatus, version: VersionStatus) -> Signature:
    if version.signature is None:
        raise InferenceError(
            Fault.UNAVAILABLE,
            f"model {model.name!r} version {version.version!r} has never been loaded, "
            "so its inputs and outputs are not known yet",
            retry_after_s=5,
        )
    return version.signature


def _tensor(tensor: Tensor) -> Json:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


def _config_tensor(tensor: Tensor, is_batched: bool) -> Json:
    kind = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
    shape = tensor.shape[1:] if is_batched else tensor.shape
    form = {"name": tensor.name, "data_type": f"TYPE_{kind}", "dims": list(shape)}
    return form if shape else {**form, "dims": [1], "reshape": {"shape": []}}


def _numbers(versions: Iterable[str]) -> list[int]:
    """Those versions that are numbers, as Triton's all are."""
    return [int(v) for v in versions if v.isascii() and v.isdigit() and len(v) < 19]


def _statistics(model: str, version: str, counts: Statistics) -> Json:
    executions = counts.execution_count
    return {
        "name": model,
        "version": version,
        "last_inference": counts.last_inference_ms,
        "inference_count": counts.inference_count,
        "execution_count": executions,
        "inference_stats": {
            "success": _times(counts.success_count, counts.success_ns),
            "fail": _times(counts.fail_count, counts.fail_ns),
            "queue": _times(counts.success_count, counts.queue_ns),
            "compute_input": _times(counts.success_count, 0),
            "compute_infer": _times(counts.success_count, counts.compute_ns),
            "compute_output": _times(counts.success_count, 0),
            "cache_hit": _times(counts.cache_hit_count, counts.cache_hit_ns),
            "cache_miss": _times(counts.cache_miss_count, counts.cache_miss_ns),
        },
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": _times(count, 0),
                "compute_infer": _times(count, compute_ns),
                "compute_output": _times(count, 0),
            }
            for size, count, compute_ns in counts.batches
        ],
    }


def _times(count: int, total_ns: int) -> Json:
    return {"count": count, "ns": total_ns}
