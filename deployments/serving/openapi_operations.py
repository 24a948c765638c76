"""What does each route take and give, in words and schemas?

A table from (method, path) to an `Operation`; paths that name a version or a label do the same as
those that don't, so they share an entry. `openapi` makes the document from this table and from the
routes that there really are: a route without an entry is an error there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deployments.inference import DTYPES

Schema = dict[str, Any]

JSON = "application/json"
BINARY = "application/octet-stream"
EVENTS = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Operation:
    """One route for readers. `takes` and `gives` are names in `SCHEMAS`, by content type.

    `faults` is the schema of its errors; `can_be_missing`: 501 is a legal answer.
    """

    tag: str
    summary: str
    takes: Mapping[str, str] = field(default_factory=dict)
    gives: Mapping[str, str] = field(default_factory=dict)
    faults: str = "Error"
    takes_optional: bool = False
    can_be_missing: bool = False


def _object(required: str = "", /, **properties: Schema) -> Schema:
    """An object; what it must have is listed in `required`, with blanks between."""
    made: Schema = {"type": "object", "properties": properties}
    return {**made, "required": required.split()} if required else made


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _map(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _optional(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_NUMBER: Schema = {"type": "number"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_POSITIVE: Schema = {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
_ANY: Schema = {}
_SHAPE = _list({"type": "integer", "minimum": -1})
_TIMES = _object("count ns", count=_COUNT, ns=_COUNT)
_STOP: Schema = {"anyOf": [_TEXT, _list(_TEXT, maxItems=4)]}
_DATA = _list(_ANY)


def _between(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def _one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


_SAMPLING: dict[str, Schema] = {
    "temperature": _optional(_between(0, 2)),
    "top_p": _optional(_between(0, 1)),
    "stop": _optional(_STOP),
    "seed": _optional({"type": "integer"}),
    "presence_penalty": _optional(_between(-2, 2)),
    "frequency_penalty": _optional(_between(-2, 2)),
}
_CHOICES: dict[str, Schema] = {
    "n": _optional({"type": "integer", "minimum": 1, "maximum": 128}),
    "stream": _optional(_FLAG),
    "stream_options": _optional(_object(include_usage=_FLAG)),
}
_USAGE = _object("prompt_tokens total_tokens", prompt_tokens=_COUNT, total_tokens=_COUNT)
_GENERATED = "id object created model choices usage"
_OUTPUT = _object(
    "name datatype shape",
    name=_TEXT,
    datatype=_ref("Datatype"),
    shape=_SHAPE,
    data=_DATA,
    parameters=_object(binary_data_size=_COUNT),
)

SCHEMAS: Mapping[str, Schema] = {
    "Error": _object("error", error=_TEXT),
    "OpenAIError": _object(
        "error",
        error=_object(
            "message type param code",
            message=_TEXT,
            type=_TEXT,
            param=_optional(_TEXT),
            code=_optional(_TEXT),
        ),
    ),
    "AnyError": {"anyOf": [_ref("Error"), _ref("OpenAIError"), _ref("ModelPage")]},
    "Any": _ANY,
    "AnyObject": {"type": "object"},
    "Binary": {"type": "string", "format": "binary"},
    "Events": {**_object("data", data=_TEXT), "description": "One of the server-sent events"},
    "Page": _TEXT,
    # Open Inference Protocol
    "Datatype": _one_of(*DTYPES),
    "Parameters": _map({"type": ["string", "number", "boolean"]}),
    "ServerMetadata": _object(
        "name version extensions", name=_TEXT, version=_TEXT, extensions=_list(_TEXT)
    ),
    "Live": _object("live", live=_FLAG),
    "Alive": _object("alive", alive=_FLAG),
    "Ready": _object("ready", ready=_FLAG, name=_TEXT),
    "ModelNames": _object("models", models=_list(_TEXT)),
    "TensorMetadata": _object(
        "name datatype shape", name=_TEXT, datatype=_ref("Datatype"), shape=_SHAPE
    ),
    "ModelMetadata": _object(
        "name versions platform inputs outputs",
        name=_TEXT,
        versions=_list(_TEXT),
        platform=_TEXT,
        inputs=_list(_ref("TensorMetadata")),
        outputs=_list(_ref("TensorMetadata")),
    ),
    "ModelConfig": _object("name platform max_batch_size input output", max_batch_size=_COUNT),
    "InferRequest": _object(
        "inputs",
        id=_TEXT,
        parameters=_ref("Parameters"),
        inputs=_list(_ref("InferInput"), minItems=1),
        outputs=_list(_ref("RequestedOutput")),
    ),
    "InferInput": _object(
        "name shape datatype",
        name=_TEXT,
        shape=_list(_COUNT),
        datatype=_ref("Datatype"),
        data=_DATA,
        parameters=_object(binary_data_size=_COUNT),
    ),
    "RequestedOutput": _object(
        "name",
        name=_TEXT,
        parameters=_object(binary_data=_FLAG, classification=_COUNT),
    ),
    "InferResponse": _object(
        "model_name model_version outputs",
        model_name=_TEXT,
        model_version=_TEXT,
        id=_TEXT,
        parameters=_ref("Parameters"),
        outputs=_list(_OUTPUT),
    ),
    "GenerateRequest": _object(
        "text_input", text_input=_TEXT, id=_TEXT, parameters=_object(max_tokens=_POSITIVE)
    ),
    "GenerateResponse": _object(
        "model_name model_version text_output",
        model_name=_TEXT,
        model_version=_TEXT,
        text_output=_TEXT,
        id=_TEXT,
        details=_object(
            "finish_reason prompt_tokens completion_tokens",
            finish_reason=_TEXT,
            prompt_tokens=_COUNT,
            completion_tokens=_COUNT,
        ),
    ),
    "Statistics": _object(
        "model_stats",
        model_stats=_list(
            _object(
                "name version inference_count execution_count inference_stats batch_stats",
                name=_TEXT,
                version=_TEXT,
                last_inference=_COUNT,
                inference_count=_COUNT,
                execution_count=_COUNT,
                inference_stats=_map(_TIMES),
                batch_stats=_list({"type": "object"}),
            )
        ),
    ),
    "IndexRequest": _object(ready=_FLAG),
    "Index": _list(
        _object("name version state reason", name=_TEXT, version=_TEXT, state=_TEXT, reason=_TEXT)
    ),
    "RepositoryRequest": _object(
        parameters=_map({"type": ["string", "integer", "boolean"]}),
    ),
    "Loaded": _object("name", name=_TEXT, load=_FLAG, unload=_FLAG),
    "Regions": _list({"type": "object"}),
    # TF Serving and KServe V1
    "PredictRequest": {
        "type": "object",
        "properties": {"signature_name": _TEXT},
        "oneOf": [
            {"required": ["instances"], "properties": {"instances": _list(_ANY, minItems=1)}},
            {"required": ["inputs"], "properties": {"inputs": _ANY}},
        ],
    },
    "PredictResponse": _object(predictions=_list(_ANY), outputs=_ANY),
    "ExamplesRequest": _object(
        "examples",
        signature_name=_TEXT,
        context={"type": "object"},
        examples=_list({"type": "object"}, minItems=1),
    ),
    "ClassifyResponse": _object("results", results=_list(_list(_DATA))),
    "RegressResponse": _object("results", results=_DATA),
    "VersionStatus": _object(
        "version state status",
        version=_TEXT,
        state=_one_of("START", "LOADING", "AVAILABLE", "UNLOADING", "END"),
        status=_object("error_code error_message", error_code=_TEXT, error_message=_TEXT),
    ),
    "ModelVersionStatus": _object(
        "model_version_status", model_version_status=_list(_ref("VersionStatus"))
    ),
    "SignatureMetadata": _object(
        "model_spec metadata", model_spec={"type": "object"}, metadata={"type": "object"}
    ),
    "Greeting": _object("status", status=_TEXT),
    # OpenAI
    "ModelList": _object(
        "object data models",
        object=_one_of("list"),
        data=_list(_ref("OpenAIModel")),
        models=_list(_TEXT),
    ),
    "OpenAIModel": _object(
        "id object created owned_by",
        id=_TEXT,
        object=_one_of("model"),
        created=_COUNT,
        owned_by=_TEXT,
    ),
    "ModelPage": {"allOf": [_ref("OpenAIModel"), _ref("Ready"), _ref("ModelVersionStatus")]},
    "ChatRequest": _object(
        "model messages",
        model=_TEXT,
        messages=_list(
            _object(
                "role content",
                role=_one_of("developer", "system", "user", "assistant", "tool", "function"),
                content=_TEXT,
            ),
            minItems=1,
        ),
        max_completion_tokens=_optional(_POSITIVE),
        max_tokens=_optional(_POSITIVE),
        **_SAMPLING,
        **_CHOICES,
    ),
    "ChatResponse": _object(
        _GENERATED,
        id=_TEXT,
        object=_one_of("chat.completion"),
        created=_COUNT,
        model=_TEXT,
        choices=_list(
            _object(
                "index message finish_reason",
                index=_COUNT,
                message=_object("role content", role=_TEXT, content=_optional(_TEXT)),
                finish_reason=_TEXT,
            )
        ),
        usage=_USAGE,
    ),
    "CompletionRequest": _object(
        "model prompt",
        model=_TEXT,
        prompt={"anyOf": [_TEXT, _list(_TEXT, minItems=1)]},
        max_tokens=_optional(_POSITIVE),
        echo=_optional(_FLAG),
        **_SAMPLING,
        **_CHOICES,
    ),
    "CompletionResponse": _object(
        _GENERATED,
        id=_TEXT,
        object=_one_of("text_completion"),
        created=_COUNT,
        model=_TEXT,
        choices=_list(
            _object("index text finish_reason", index=_COUNT, text=_TEXT, finish_reason=_TEXT)
        ),
        usage=_USAGE,
    ),
    "EmbeddingRequest": _object(
        "model input",
        model=_TEXT,
        input={"anyOf": [_TEXT, _list(_TEXT, minItems=1)]},
        encoding_format=_one_of("float", "base64"),
        dimensions=_optional(_POSITIVE),
    ),
    "EmbeddingResponse": _object(
        "object data model usage",
        object=_one_of("list"),
        data=_list(
            _object(
                "object index embedding",
                object=_one_of("embedding"),
                index=_COUNT,
                embedding={"anyOf": [_list(_NUMBER), _TEXT]},
            )
        ),
        model=_TEXT,
        usage=_USAGE,
    ),
    # The admin API
    "ModelFileRequest": _object("document", document=_ANY),
    "PromoteRequest": _object(
        version=_TEXT,
        percent={"type": "integer", "minimum": 1, "maximum": 100},
        steps=_list({"type": "integer", "minimum": 1, "maximum": 100}),
        interval_s={"type": "number", "exclusiveMinimum": 0},
    ),
    "KeyRequest": _object(
        name=_TEXT,
        role=_one_of("admin", "caller"),
        models=_list(_TEXT),
        rate_rps=_optional(_POSITIVE),
        concurrency_max=_optional(_POSITIVE),
    ),
    "RotateRequest": _object(overlap_s={"type": "number", "minimum": 0}),
}

_OIP = "Open Inference Protocol"
_TEXTS = "Open Inference Protocol: text"
_TRITON = "Triton's extensions"
_TENSORFLOW = "TF Serving and KServe V1"
_OPENAI = "OpenAI"
_ADMIN = "Administration"
_SERVER = "Server"


def _get(tag: str, summary: str, gives: str, faults: str = "Error") -> Operation:
    return Operation(tag, summary, gives={JSON: gives}, faults=faults)


def _post(tag: str, summary: str, takes: str, gives: str, faults: str = "Error") -> Operation:
    return Operation(tag, summary, {JSON: takes}, {JSON: gives}, faults)


def _setting(summary: str) -> Operation:
    return Operation(
        _TRITON,
        summary,
        {JSON: "AnyObject"},
        {JSON: "Any"},
        takes_optional=True,
        can_be_missing=True,
    )


def _repository(summary: str, takes: str, gives: str) -> Operation:
    return Operation(
        _TRITON, summary, {JSON: takes}, {JSON: gives}, takes_optional=True, can_be_missing=True
    )


def _memory(place: str) -> dict[tuple[str, str], Operation]:
    base = f"/v2/{place}sharedmemory"
    return {
        ("GET", f"{base}/status"): _get(_TRITON, "Shared memory: never any", "Regions"),
        ("GET", f"{base}/region/{{region}}/status"): _get(
            _TRITON, "A region of shared memory: never found", "Regions"
        ),
        ("POST", f"{base}/region/{{region}}/register"): _setting("Shared memory is not offered"),
        ("POST", f"{base}/region/{{region}}/unregister"): _setting("Forget a region (none is)"),
        ("POST", f"{base}/unregister"): _setting("Forget all regions (none are)"),
    }


def _text(summary: str, takes: str, gives: str) -> Operation:
    return Operation(
        _OPENAI, summary, {JSON: takes}, {JSON: gives, EVENTS: "Events"}, "OpenAIError"
    )


OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("GET", "/healthz"): _get(_SERVER, "Is the process alive?", "Alive"),
    ("GET", "/readyz"): _get(_SERVER, "Does it take requests?", "Ready"),
    ("GET", "/openapi.json"): _get(_SERVER, "This document", "AnyObject"),
    ("GET", "/docs"): Operation(_SERVER, "This document to be read", gives={"text/html": "Page"}),
    ("GET", "/v2"): _get(_OIP, "The server's name and extensions", "ServerMetadata"),
    ("GET", "/v2/health/live"): _get(_OIP, "Is the server alive?", "Live"),
    ("GET", "/v2/health/ready"): _get(_OIP, "Is the server ready?", "Ready"),
    ("GET", "/v2/models"): _get(_OIP, "The names of all models", "ModelNames"),
    ("GET", "/v2/models/{model}"): _get(_OIP, "A model's inputs and outputs", "ModelMetadata"),
    ("GET", "/v2/models/{model}/ready"): _get(_OIP, "Is a model ready?", "Ready"),
    ("POST", "/v2/models/{model}/infer"): Operation(
        _OIP,
        "Infer: tensors in, tensors out",
        {JSON: "InferRequest", BINARY: "Binary"},
        {JSON: "InferResponse", BINARY: "Binary"},
    ),
    ("POST", "/v2/models/{model}/generate"): _post(
        _TEXTS, "Generate a text", "GenerateRequest", "GenerateResponse"
    ),
    ("POST", "/v2/models/{model}/generate_stream"): Operation(
        _TEXTS, "Generate a text, piece by piece", {JSON: "GenerateRequest"}, {EVENTS: "Events"}
    ),
    ("GET", "/v2/models/stats"): _get(_TRITON, "Statistics of all models", "Statistics"),
    ("GET", "/v2/models/{model}/stats"): _get(_TRITON, "Statistics of a model", "Statistics"),
    ("GET", "/v2/models/{model}/config"): _get(_TRITON, "A model's configuration", "ModelConfig"),
    ("POST", "/v2/repository/index"): _repository(
        "Every version of every model", "IndexRequest", "Index"
    ),
    ("POST", "/v2/repository/models/{model}/load"): _repository(
        "Load a model", "RepositoryRequest", "Loaded"
    ),
    ("POST", "/v2/repository/models/{model}/unload"): _repository(
        "Unload a model", "RepositoryRequest", "Loaded"
    ),
    ("GET", "/v2/trace/setting"): _get(_TRITON, "Trace settings", "AnyObject"),
    ("GET", "/v2/models/{model}/trace/setting"): _get(_TRITON, "Trace settings", "AnyObject"),
    ("POST", "/v2/trace/setting"): _setting("Trace settings (can't be changed)"),
    ("POST", "/v2/models/{model}/trace/setting"): _setting("Trace settings (can't be changed)"),
    ("GET", "/v2/logging"): _get(_TRITON, "Log settings", "AnyObject"),
    ("POST", "/v2/logging"): _setting("Log settings (can't be changed)"),
    **_memory("system"),
    **_memory("cuda"),
    ("GET", "/"): _get(_TENSORFLOW, "A greeting", "Greeting"),
    ("POST", "/v1/models/{model}:predict"): _post(
        _TENSORFLOW, "Predict, by rows or columns", "PredictRequest", "PredictResponse"
    ),
    ("POST", "/v1/models/{model}:classify"): _post(
        _TENSORFLOW, "Classify examples", "ExamplesRequest", "ClassifyResponse"
    ),
    ("POST", "/v1/models/{model}:regress"): _post(
        _TENSORFLOW, "Regress examples", "ExamplesRequest", "RegressResponse"
    ),
    ("POST", "/v1/models/{model}:explain"): Operation(
        _TENSORFLOW,
        "Explain (no model here does)",
        {JSON: "AnyObject"},
        {JSON: "AnyObject"},
        can_be_missing=True,
    ),
    ("GET", "/v1/models/{model}/versions/{version}"): _get(
        _TENSORFLOW, "The state of a version", "ModelVersionStatus"
    ),
    ("GET", "/v1/models/{model}/labels/{label}"): _get(
        _TENSORFLOW, "The state of the version with a label", "ModelVersionStatus"
    ),
    ("GET", "/v1/models/{model}/metadata"): _get(
        _TENSORFLOW, "A model's signature", "SignatureMetadata"
    ),
    ("GET", "/v1/models"): _get(_OPENAI, "All models", "ModelList", "AnyError"),
    ("GET", "/v1/models/{model}"): _get(
        _OPENAI, "A model, in the forms of OpenAI, KServe and TF Serving", "ModelPage", "AnyError"
    ),
    ("POST", "/v1/chat/completions"): _text("Answer a chat", "ChatRequest", "ChatResponse"),
    ("POST", "/v1/completions"): _text(
        "Continue a text", "CompletionRequest", "CompletionResponse"
    ),
    ("POST", "/v1/embeddings"): _post(
        _OPENAI, "Turn texts into vectors", "EmbeddingRequest", "EmbeddingResponse", "OpenAIError"
    ),
    ("GET", "/admin/v1/status"): _get(_ADMIN, "The cluster at a glance", "Any"),
    ("GET", "/admin/v1/models"): _get(_ADMIN, "Every model as deployed", "Any"),
    ("GET", "/admin/v1/models/{name}"): _get(_ADMIN, "A model as deployed", "Any"),
    ("POST", "/admin/v1/plan"): _post(
        _ADMIN, "What a model file would change", "ModelFileRequest", "Any"
    ),
    ("PUT", "/admin/v1/models/{name}"): _post(
        _ADMIN, "Deploy a model file", "ModelFileRequest", "Any"
    ),
    ("DELETE", "/admin/v1/models/{name}"): _get(_ADMIN, "Delete a model", "Any"),
    ("POST", "/admin/v1/models/{name}/promote"): _post(
        _ADMIN, "Give a version traffic", "PromoteRequest", "Any"
    ),
    ("POST", "/admin/v1/models/{name}/rollback"): _get(_ADMIN, "Back to the traffic before", "Any"),
    ("GET", "/admin/v1/models/{name}/logs"): _get(_ADMIN, "What the replicas logged", "Any"),
    ("GET", "/admin/v1/keys"): _get(_ADMIN, "The keys, without their secrets", "Any"),
    ("POST", "/admin/v1/keys"): _post(_ADMIN, "Make a key", "KeyRequest", "Any"),
    ("POST", "/admin/v1/keys/{key}/rotate"): _post(
        _ADMIN, "Give a key a new secret; the old one stays for a while", "RotateRequest", "Any"
    ),
    ("DELETE", "/admin/v1/keys/{key}"): _get(_ADMIN, "Revoke a key", "Any"),
    ("GET", "/admin/v1/audit"): _get(_ADMIN, "Who changed what", "Any"),
}
"""By method and path; `/versions/{version}` and `/labels/{label}` before a verb are left out."""
