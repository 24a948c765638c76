"""How does Shoal speak TF Serving's REST API, and KServe's V1 with it?

    POST /v1/models/{m}[/versions/{v}|/labels/{l}]:predict|classify|regress    from the engine
    GET  /v1/models/{m}[/versions/{v}|/labels/{l}][/metadata]                  from the catalog

Paths are case-insensitive. KServe V1 is a subset with the same routes; its `:explain` is refused.
With an engine (a replica) requests for its model are answered here; without one (the front desk)
the routes of `INFERENCE_TEMPLATES` are left to whoever holds such requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from deployments.inference import (
    Catalog,
    Engine,
    Fault,
    InferenceError,
    InferenceRequest,
    ModelStatus,
    Signature,
    Tensor,
    Tensors,
    VersionStatus,
)
from deployments.serving.http import Handler, HttpRequest, HttpResponse, Route
from deployments.serving.protocols import tfserving_messages as messages
from deployments.serving.protocols.model_pages import (
    ModelPages,
    tensorflow_status,
    unknown_version,
)
from deployments.serving.protocols.oip import error_response

MODEL_TEMPLATES = (
    "/v1/models/{model}",
    "/v1/models/{model}/versions/{version}",
    "/v1/models/{model}/labels/{label}",
)
INFERENCE_TEMPLATES = tuple(
    f"{model}:{verb}" for model in MODEL_TEMPLATES for verb in ("predict", "classify", "regress")
)
"""The POST routes that only a running model can answer."""

_TYPES = {
    "BOOL": "DT_BOOL",
    "UINT8": "DT_UINT8",
    "UINT16": "DT_UINT16",
    "UINT32": "DT_UINT32",
    "UINT64": "DT_UINT64",
    "INT8": "DT_INT8",
    "INT16": "DT_INT16",
    "INT32": "DT_INT32",
    "INT64": "DT_INT64",
    "FP16": "DT_HALF",
    "BF16": "DT_BFLOAT16",
    "FP32": "DT_FLOAT",
    "FP64": "DT_DOUBLE",
    "BYTES": "DT_STRING",
}


class TensorFlowServing:
    """The dialect."""

    name = "tensorflow"
    ignores_case = True
    prefixes: Sequence[str] = ("/v1/models",)

    def __init__(self, catalog: Catalog, engine: Engine | None) -> None:
        self._catalog = catalog
        self._engine = engine
        self._pages = ModelPages(catalog)
        self._reader_made: messages.Reader | None = None

    def error(self, error: InferenceError) -> HttpResponse:
        """`{"error": text}`."""
        return error_response(error)

    def routes(self) -> list[Route]:
        """TF Serving's routes, and KServe's greeting."""
        verbs: dict[str, Handler] = {"explain": self._explain}
        if self._engine is not None:
            verbs |= {
                "predict": self._predict,
                "classify": self._classify,
                "regress": self._regress,
            }
        return [
            *(
                Route("POST", f"{model}:{verb}", handler)
                for verb, handler in verbs.items()
                for model in MODEL_TEMPLATES
            ),
            *(Route("GET", model, self._model) for model in MODEL_TEMPLATES),
            *(Route("GET", f"{model}/metadata", self._metadata) for model in MODEL_TEMPLATES),
            Route("GET", "/v1/models", self._models),
            Route("GET", "/", self._alive),
        ]

    # Inference

    async def _predict(self, request: HttpRequest) -> HttpResponse:
        engine = self._chosen(request)
        inputs, is_row = self._reader(engine).predict(messages.parsed(request.body))
        wanted = InferenceRequest(inputs, deadline_s=request.deadline_s())
        response = await engine.infer(wanted)
        return HttpResponse(200, messages.answer(response.outputs, is_row=is_row))

    async def _classify(self, request: HttpRequest) -> HttpResponse:
        engine = self._chosen(request)
        output = messages.classes(engine.signature)
        outputs = await self._examples(engine, request, output)
        labels = engine.signature.labels
        return HttpResponse(200, messages.classification(outputs[output], labels))

    async def _regress(self, request: HttpRequest) -> HttpResponse:
        engine = self._chosen(request)
        output = messages.value(engine.signature)
        outputs = await self._examples(engine, request, output)
        return HttpResponse(200, messages.regression(outputs[output]))

    async def _explain(self, request: HttpRequest) -> HttpResponse:
        self._version(request)
        raise InferenceError(
            Fault.UNIMPLEMENTED,
            f"model {request.parameters['model']!r} has no explainer; use :predict",
        )

    async def _examples(self, engine: Engine, request: HttpRequest, output: str) -> Tensors:
        inputs = self._reader(engine).examples(messages.parsed(request.body))
        wanted = InferenceRequest(inputs, (output,), deadline_s=request.deadline_s())
        return (await engine.infer(wanted)).outputs

    def _chosen(self, request: HttpRequest) -> Engine:
        """The engine, if the request means its model and version."""
        engine, asked = self._engine, request.parameters
        if engine is None or asked["model"] != engine.model:
            raise _not_served(asked["model"], asked.get("version"))
        if "version" not in asked and "label" not in asked:
            return engine
        if asked.get("version") == engine.version:
            return engine
        backend = (request.header(b"x-shoal-backend") or b"").decode("latin-1")
        if "label" in asked and backend.split("--")[:2] == [engine.model, engine.version]:
            return engine  # the edge knows which version a label means now
        if self._version(request)[1].version != engine.version:
            raise _not_served(asked["model"], asked.get("version"))
        return engine

    def _reader(self, engine: Engine) -> messages.Reader:
        reader = self._reader_made
        if reader is None or reader.signature is not engine.signature:
            reader = self._reader_made = messages.Reader(engine.model, engine.signature)
        return reader

    # What there is

    async def _alive(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, b'{"status":"alive"}')

    async def _models(self, request: HttpRequest) -> HttpResponse:
        if _is_own_listener(request):
            raise InferenceError(Fault.INVALID, "Missing model name in request: /v1/models/{model}")
        return await self._pages.models(request)

    async def _model(self, request: HttpRequest) -> HttpResponse:
        if not _is_own_listener(request) and len(request.parameters) == 1:
            return await self._pages.model(request)
        model, version = self._version(request)
        is_one = len(request.parameters) > 1
        status = tensorflow_status(model, version if is_one else None)
        return HttpResponse(200, orjson.dumps(status))

    async def _metadata(self, request: HttpRequest) -> HttpResponse:
        model, version = self._version(request)
        if version.signature is None:
            raise InferenceError(
                Fault.UNAVAILABLE,
                f"version {version.version} of model {model.name} has never been loaded, "
                "so its signature is not known yet",
                retry_after_s=5,
            )
        return HttpResponse(200, orjson.dumps(_metadata(model, version, version.signature)))

    def _version(self, request: HttpRequest) -> tuple[ModelStatus, VersionStatus]:
        """The model and the version that the path names; none = the one with most traffic."""
        asked = request.parameters
        model = self._catalog.model(asked["model"])
        if model is None:
            raise InferenceError(
                Fault.NOT_FOUND, f"Could not find any versions of model {asked['model']}"
            )
        label = asked.get("label")
        if label is not None:
            found = next((v for v in model.versions if label in v.labels), None)
            if found is None:
                raise InferenceError(
                    Fault.INVALID, f"Unrecognized servable version label: {label}", field="label"
                )
            return model, found
        name = asked.get("version")
        found = model.version(name)
        if found is None:
            raise unknown_version(model.name, name or "")
        return model, found


def _is_own_listener(request: HttpRequest) -> bool:
    return request.header(b"x-shoal-dialect") == b"tensorflow"


def _not_served(model: str, version: str | None) -> InferenceError:
    which = f"Latest({model})" if version is None else f"Specific({model}, {version})"
    return InferenceError(Fault.NOT_FOUND, f"Servable not found for request: {which}")


def _metadata(model: ModelStatus, version: VersionStatus, signature: Signature) -> dict[str, Any]:
    definition = {
        "inputs": {t.name: _tensor(t) for t in signature.inputs},
        "outputs": {t.name: _tensor(t) for t in signature.outputs},
        "method_name": "tensorflow/serving/predict",
        "defaults": {},
    }
    definitions = {messages.SIGNATURE_NAME: definition}
    return {
        "model_spec": {"name": model.name, "signature_name": "", "version": version.version},
        "metadata": {"signature_def": {"signature_def": definitions}},
    }


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {
        "dtype": _TYPES[tensor.datatype],
        "tensor_shape": {
            "dim": [{"size": str(n), "name": ""} for n in tensor.shape],
            "unknown_rank": False,
        },
        "name": f"{tensor.name}:0",
    }
