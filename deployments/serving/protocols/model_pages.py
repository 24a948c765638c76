"""What is at GET /v1/models and GET /v1/models/{model}, which three protocols claim?

    OpenAI       {"object": "list", "data": […]}   {"id", "object": "model", "created", …}
    KServe V1    {"models": [name, …]}             {"name", "ready"}, 503 when not ready
    TF Serving   an error                          {"model_version_status": […]}

Their keys don't collide, so on the port that they share one object carries all of them, and errors
have OpenAI's form. On a listener of its own TF Serving gets its own answers: its clients compare
them whole.
"""

from __future__ import annotations

from typing import Any

import orjson

from deployments.inference import (
    Catalog,
    Fault,
    InferenceError,
    ModelStatus,
    VersionState,
    VersionStatus,
)
from deployments.serving.http import HttpRequest, HttpResponse
from deployments.serving.protocols.openai_messages import error_response, unknown_model

Json = dict[str, Any]

_STATES = {
    VersionState.STARTING: "LOADING",
    VersionState.READY: "AVAILABLE",
    VersionState.IDLE: "AVAILABLE",
    VersionState.FAILED: "END",
    VersionState.STOPPING: "UNLOADING",
}


class ModelPages:
    """Both pages, as the shared port has them."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def models(self, request: HttpRequest) -> HttpResponse:
        """Every model: OpenAI's list, and KServe's beside it."""
        models = self._catalog.models()
        data = [openai_model(m) for m in models]
        page = {"object": "list", "data": data, "models": [m.name for m in models]}
        return HttpResponse(200, orjson.dumps(page))

    async def model(self, request: HttpRequest) -> HttpResponse:
        """One model, in all three forms at once; `name@version` is that version."""
        try:
            page, is_ready = self._model(request.parameters["model"])
        except InferenceError as error:
            return error_response(error)
        return HttpResponse(200 if is_ready else 503, orjson.dumps(page))

    def _model(self, asked: str) -> tuple[Json, bool]:
        name, _, version = asked.partition("@")
        model = self._catalog.model(name)
        if model is None:
            raise unknown_model(asked)
        if not version:
            return {**_merged(model), **tensorflow_status(model)}, model.is_ready
        chosen = next((v for v in model.versions if version in (v.version, *v.labels)), None)
        if chosen is None:
            raise unknown_model(asked)
        model = ModelStatus(name, (chosen,))
        return {**_merged(model), "id": asked, **tensorflow_status(model)}, model.is_ready


def openai_model(model: ModelStatus) -> Json:
    """A model as OpenAI describes one."""
    created_s = max((v.created_s for v in model.versions), default=0)
    return {"id": model.name, "object": "model", "created": created_s, "owned_by": "shoal"}


def tensorflow_status(model: ModelStatus, version: VersionStatus | None = None) -> Json:
    """The state of a model's versions, the newest first, or of one of them."""
    versions = model.versions[::-1] if version is None else (version,)
    return {"model_version_status": [_version_status(v) for v in versions]}


def _merged(model: ModelStatus) -> Json:
    return {**openai_model(model), "name": model.name, "ready": model.is_ready}


def _version_status(version: VersionStatus) -> Json:
    has_failed = version.state is VersionState.FAILED
    return {
        "version": version.version,
        "state": _STATES[version.state],
        "status": {
            "error_code": "INTERNAL" if has_failed else "OK",
            "error_message": version.reason if has_failed else "",
        },
    }


def unknown_version(model: str, version: str) -> InferenceError:
    """TF Serving's words for a version that a model does not have."""
    return InferenceError(Fault.NOT_FOUND, f"Could not find version {version} of model {model}")
