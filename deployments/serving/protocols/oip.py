"""How does Shoal speak the Open Inference Protocol (KServe V2) over HTTP?

The protocol's own routes, its binary tensors (`oip_messages`), text generation, and Triton's routes
for repository, configuration, statistics and settings, so that clients of KServe and Triton need
another address and nothing else.

    POST …/infer            tensors in, tensors out
    POST …/generate[_stream]  text in, text out (in pieces), for models that generate
    GET  everything else      from the catalog

With an engine (a replica) requests for its model are answered here; without one (the front desk)
the routes of `INFERENCE_TEMPLATES` are left to whoever holds such requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from deployments.inference import (
    Catalog,
    Engine,
    Fault,
    InferenceError,
    InferenceRequest,
    InferenceResponse,
)
from deployments.serving.http import (
    Handler,
    HttpRequest,
    HttpResponse,
    HttpStream,
    Route,
    retry_after,
)
from deployments.serving.protocols import descriptions, oip_text
from deployments.serving.protocols.oip_messages import Reader, parsed, write
from deployments.serving.protocols.tensors import invalid

STATUS: Mapping[Fault, int] = {
    Fault.INVALID: 400,
    Fault.UNAUTHENTICATED: 401,
    Fault.FORBIDDEN: 403,
    Fault.NOT_FOUND: 404,
    Fault.TOO_LARGE: 413,
    Fault.UNSUPPORTED_MEDIA: 415,
    Fault.METHOD_NOT_ALLOWED: 405,
    Fault.CONFLICT: 409,
    Fault.OVERLOADED: 429,
    Fault.UNIMPLEMENTED: 501,
    Fault.UNAVAILABLE: 503,
    Fault.DEADLINE: 504,
    Fault.INTERNAL: 500,
}
"""The HTTP status of each fault."""

MODEL_TEMPLATES = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
INFERENCE_TEMPLATES = tuple(
    f"{model}/{verb}"
    for model in MODEL_TEMPLATES
    for verb in ("infer", "generate", "generate_stream")
)
"""The POST routes that only a running model can answer."""

_TRACE = {
    "trace_level": ["OFF"],
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_file": "",
    "trace_mode": "triton",
}
_LOGGING = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}


def error_response(error: InferenceError) -> HttpResponse:
    """An error as `{"error": text}`."""
    body = orjson.dumps({"error": error.message})
    return HttpResponse(STATUS[error.fault], body, headers=retry_after(error))


class OpenInference:
    """The dialect. `server_name` is what clients read as the server's name."""

    name = "oip"
    prefixes: Sequence[str] = ("/v2",)

    def __init__(
        self,
        catalog: Catalog,
        engine: Engine | None,
        *,
        server_name: str = "shoal",
        ready: Callable[[], bool] | None = None,
    ) -> None:
        self._catalog = catalog
        self._engine = engine
        self._server_name = server_name
        self._ready = ready or self._is_model_ready
        self._reader_made: Reader | None = None

    def error(self, error: InferenceError) -> HttpResponse:
        return error_response(error)

    def routes(self) -> list[Route]:
        get: dict[str, Handler] = {
            "/v2": self._server,
            "/v2/health/live": self._live,
            "/v2/health/ready": self._server_ready,
            "/v2/models": self._models,
            "/v2/models/stats": self._statistics,
            "/v2/trace/setting": self._trace,
            "/v2/models/{model}/trace/setting": self._trace,
            "/v2/logging": self._logging,
        }
        post: dict[str, Handler] = {
            "/v2/repository/index": self._index,
            "/v2/repository/models/{model}/load": self._load,
            "/v2/repository/models/{model}/unload": self._unload,
            "/v2/trace/setting": self._change_trace,
            "/v2/models/{model}/trace/setting": self._change_trace,
            "/v2/logging": self._change_logging,
        }
        for model in MODEL_TEMPLATES:
            get[model] = self._metadata
            get[f"{model}/ready"] = self._model_ready
            get[f"{model}/config"] = self._config
            get[f"{model}/stats"] = self._statistics
            if self._engine is not None:
                post[f"{model}/infer"] = self._infer
                post[f"{model}/generate"] = self._generate
                post[f"{model}/generate_stream"] = self._generate_stream
        for memory in ("/v2/systemsharedmemory", "/v2/cudasharedmemory"):
            get[f"{memory}/status"] = self._no_regions
            get[f"{memory}/region/{{region}}/status"] = self._no_region
            post[f"{memory}/region/{{region}}/register"] = self._register_memory
            post[f"{memory}/unregister"] = self._unregister_memory
            post[f"{memory}/region/{{region}}/unregister"] = self._unregister_memory
        return [
            *(Route("POST", template, handler) for template, handler in post.items()),
            *(Route("GET", template, handler) for template, handler in get.items()),
        ]

    # Inference

    async def _infer(self, request: HttpRequest) -> HttpResponse:
        engine = self._chosen(request)
        wanted, reply = self._reader(engine).read(
            request.body,
            request.header(b"inference-header-content-length"),
            request.deadline_s(),
        )
        if engine.generates:
            response = await _inferred_text(engine, wanted)
        else:
            response = await engine.infer(wanted)
            response.id = wanted.id
        return write(engine, response, reply)

    async def _generate(self, request: HttpRequest) -> HttpResponse:
        engine = self._chosen(request)
        wanted = oip_text.read_text(engine, request.body, request.deadline_s())
        text, last = await oip_text.whole(engine, wanted)
        return _json(oip_text.answer(engine, wanted, text, last))

    async def _generate_stream(self, request: HttpRequest) -> HttpStream:
        """The first piece is awaited, so that what fails before it is an ordinary error."""
        engine = self._chosen(request)
        wanted = oip_text.read_text(engine, request.body, request.deadline_s())
        chunks = engine.generate(wanted)
        try:
            first = await anext(chunks, None)
        except asyncio.CancelledError:
            await oip_text.close(chunks)
            raise
        return HttpStream(oip_text.events(engine, wanted, first, chunks))

    def _chosen(self, request: HttpRequest) -> Engine:
        backend = request.header(b"x-shoal-backend") or b""
        return descriptions.chosen_engine(
            self._catalog, self._engine, *_asked(request), backend.decode("latin-1")
        )

    def _reader(self, engine: Engine) -> Reader:
        reader = self._reader_made
        if reader is None or reader.made_for is not engine.signature:
            reader = self._reader_made = Reader(engine)
        return reader

    # What there is

    async def _server(self, request: HttpRequest) -> HttpResponse:
        return _json(descriptions.server_metadata(self._server_name))

    async def _live(self, request: HttpRequest) -> HttpResponse:
        return _json({"live": True})

    async def _server_ready(self, request: HttpRequest) -> HttpResponse:
        is_ready = self._ready()
        return _json({"ready": is_ready}, 200 if is_ready else 503)

    def _is_model_ready(self) -> bool:
        """Whether the server is ready: a replica when its model is, the front desk always."""
        engine = self._engine
        if engine is None:
            return True
        status = self._catalog.model(engine.model)
        return status is not None and status.is_ready

    async def _models(self, request: HttpRequest) -> HttpResponse:
        return _json({"models": [m.name for m in self._catalog.models()]})

    async def _metadata(self, request: HttpRequest) -> HttpResponse:
        return _json(descriptions.model_metadata(self._catalog, *_asked(request)))

    async def _model_ready(self, request: HttpRequest) -> HttpResponse:
        model, version = _asked(request)
        is_ready = descriptions.is_ready(self._catalog, model, version)
        return _json({"name": model, "ready": is_ready}, 200 if is_ready else 503)

    async def _config(self, request: HttpRequest) -> HttpResponse:
        return _json(descriptions.model_config(self._catalog, *_asked(request)))

    async def _statistics(self, request: HttpRequest) -> HttpResponse:
        values = request.parameters
        statistics = descriptions.model_statistics(
            self._catalog, values.get("model"), values.get("version")
        )
        return _json(statistics)

    # The repository

    async def _index(self, request: HttpRequest) -> HttpResponse:
        only_ready = _object(request).get("ready", False)
        if type(only_ready) is not bool:
            raise invalid(f"ready {only_ready!r} must be true or false", "ready")
        return _json(descriptions.repository_index(self._catalog, only_ready=only_ready))

    async def _load(self, request: HttpRequest) -> HttpResponse:
        model = request.parameters["model"]
        await self._catalog.load(model, _repository_parameters(request))
        return _json({"name": model, "load": True})

    async def _unload(self, request: HttpRequest) -> HttpResponse:
        model = request.parameters["model"]
        await self._catalog.unload(model, _repository_parameters(request))
        return _json({"name": model, "unload": True})

    # Settings that Triton has and Shoal keeps elsewhere

    async def _trace(self, request: HttpRequest) -> HttpResponse:
        model = request.parameters.get("model")
        if model is not None:
            descriptions.model_status(self._catalog, model)
        return _json(_TRACE)

    async def _change_trace(self, request: HttpRequest) -> HttpResponse:
        _refuse_changes(request, "trace settings")
        return await self._trace(request)

    async def _logging(self, request: HttpRequest) -> HttpResponse:
        return _json(_LOGGING)

    async def _change_logging(self, request: HttpRequest) -> HttpResponse:
        _refuse_changes(request, "log settings")
        return _json(_LOGGING)

    async def _no_regions(self, request: HttpRequest) -> HttpResponse:
        return _json([])

    async def _no_region(self, request: HttpRequest) -> HttpResponse:
        region = request.parameters["region"]
        raise InferenceError(Fault.NOT_FOUND, f"Unable to find shared memory region: {region!r}")

    async def _register_memory(self, request: HttpRequest) -> HttpResponse:
        raise InferenceError(
            Fault.UNIMPLEMENTED,
            "shared memory is not offered: replicas run on other machines; send the data",
        )

    async def _unregister_memory(self, request: HttpRequest) -> HttpResponse:
        return _json({})  # nothing is registered, as was asked for


async def _inferred_text(engine: Engine, wanted: InferenceRequest) -> InferenceResponse:
    text_request = oip_text.text_from_tensors(wanted)
    text, _ = await oip_text.whole(engine, text_request)
    return oip_text.text_response(text_request, text)


def _json(value: Any, status: int = 200) -> HttpResponse:
    return HttpResponse(status, orjson.dumps(value))


def _asked(request: HttpRequest) -> tuple[str, str | None]:
    return request.parameters["model"], request.parameters.get("version")


def _object(request: HttpRequest) -> dict[str, Any]:
    """The JSON object of a body that may be empty."""
    if not request.body.strip():
        return {}
    document = parsed(request.body)
    if type(document) is not dict:
        raise invalid("the body must be a JSON object")
    return document


def _repository_parameters(request: HttpRequest) -> dict[str, Any]:
    parameters = _object(request).get("parameters") or {}
    if type(parameters) is not dict or not all(
        type(value) in (str, int, bool) for value in parameters.values()
    ):
        raise invalid(
            'parameters must be an object of strings, numbers and bools, such as {"config": "{…}"}',
            "parameters",
        )
    return parameters


def _refuse_changes(request: HttpRequest, what: str) -> None:
    if _object(request):
        raise InferenceError(
            Fault.UNIMPLEMENTED, f"{what} can't be changed over this protocol; they are Shoal's own"
        )
