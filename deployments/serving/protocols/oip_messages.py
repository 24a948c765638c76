"""How are an Open Inference request and its answer written in an HTTP body?

    {"inputs": [{"name", "shape", "datatype", "data"}]}                     all JSON
    {"inputs": [{…, "parameters": {"binary_data_size": 12}}]}0123456789ab   JSON, then raw tensors
    0123456789ab                                                            raw: one tensor, no JSON

The header `Inference-Header-Content-Length` says where the JSON ends (0: there is none). Answers
mix JSON and raw tensors as the request asks, output by output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from deployments.inference import (
    DTYPES,
    Engine,
    Fault,
    InferenceError,
    InferenceRequest,
    InferenceResponse,
    Signature,
    Tensor,
    Tensors,
)
from deployments.serving.deadlines import sooner
from deployments.serving.http import HttpResponse
from deployments.serving.protocols import tensors
from deployments.serving.protocols.tensors import Inputs, invalid

Parameters = dict[str, str | int | float | bool]

_SCALARS = frozenset({str, int, float, bool})
_RESERVED: dict[str, tuple[frozenset[type], str]] = {
    "priority": (frozenset({int}), "a whole number"),
    "timeout": (frozenset({int}), "a whole number of microseconds"),
    "sequence_id": (frozenset({int, str}), "a whole number or a string"),
    "sequence_start": (frozenset({bool}), "true or false"),
    "sequence_end": (frozenset({bool}), "true or false"),
    "binary_data_output": (frozenset({bool}), "true or false"),
}
_NO_PARAMETERS: Parameters = {}


@dataclass(slots=True)
class Reply:
    """How the answer is wanted: binary or JSON by output, and which outputs as top classes."""

    binary: bool = False
    binary_by_output: dict[str, bool] = field(default_factory=dict)
    classes_by_output: dict[str, int] = field(default_factory=dict)


_JSON_REPLY = Reply()

UNCHECKED = Signature((), ())
"""How a text request's tensors are read: options come as tensors too, whatever they are called."""


class Reader:
    """Reads requests for one model, and refuses what it does not take."""

    def __init__(self, engine: Engine) -> None:
        self.made_for = engine.signature
        signature = UNCHECKED if engine.generates else engine.signature
        self._model = engine.model
        self._signature = signature
        self.inputs = Inputs(engine.model, signature)
        self._outputs = frozenset(t.name for t in signature.outputs)

    def read(
        self, body: bytes, header_bytes: bytes | None, deadline_s: float | None
    ) -> tuple[InferenceRequest, Reply]:
        """The request in `body`; `header_bytes` is what the header says, if it was sent."""
        if header_bytes is None:
            return self._read_json(parsed(body), b"", deadline_s)
        size = _header_size(header_bytes, len(body))
        if size == 0:
            request = InferenceRequest(self._raw_input(body), deadline_s=deadline_s)
            return request, Reply(binary=True)
        return self._read_json(parsed(body[:size]), memoryview(body)[size:], deadline_s)

    def check_outputs(self, names: list[str]) -> tuple[str, ...] | None:
        """The outputs asked for if the model has them, None = all."""
        if not names:
            return None
        for name in names:
            if self._outputs and name not in self._outputs:
                known = ", ".join(repr(t.name) for t in self._signature.outputs)
                raise invalid(
                    f"unexpected inference output {name!r} for model {self._model!r}; "
                    f"it gives {known}"
                )
        return tuple(names)

    def _read_json(
        self, document: Any, binary: bytes | memoryview, deadline_s: float | None
    ) -> tuple[InferenceRequest, Reply]:
        if type(document) is not dict:
            raise invalid("the request must be a JSON object with inputs")
        parameters = checked_parameters(document.get("parameters"))
        timeout_us = int(parameters.pop("timeout", 0)) if parameters else 0
        names, reply = self._read_outputs(document.get("outputs"), parameters)
        request = InferenceRequest(
            self._read_inputs(document.get("inputs"), binary),
            self.check_outputs(names),
            checked_id(document.get("id", "")),
            parameters,
            sooner(deadline_s, timeout_us),
        )
        return request, reply

    def _read_inputs(self, entries: Any, binary: bytes | memoryview) -> Tensors:
        if type(entries) is not list:
            raise invalid("inputs is missing or no list; it must be a list of tensors")
        found: Tensors = {}
        offset = 0
        for entry in entries:
            name, datatype, shape = self._read_form(entry)
            if name in found:
                raise invalid(f"input {name!r} is given twice")
            size = _binary_size(name, entry.get("parameters"))
            if size is None:
                found[name] = tensors.from_json(name, datatype, shape, entry.get("data"))
                continue
            if "data" in entry:
                raise invalid(f"input {name!r} has both data and binary_data_size; send one")
            raw = binary[offset : offset + size]
            if len(raw) != size:
                raise invalid(
                    f"input {name!r}: binary_data_size is {size} but only {len(raw)} bytes are left"
                )
            found[name] = tensors.from_bytes(name, datatype, shape, raw)
            offset += size
        if offset != len(binary):
            raise invalid(f"{len(binary) - offset} bytes of binary data belong to no input")
        self.inputs.check_all(found)
        return found

    def _read_form(self, entry: Any) -> tuple[str, str, tuple[int, ...]]:
        """Name, datatype and shape of one input, checked against the model's."""
        if type(entry) is not dict:
            raise invalid("each of inputs must be an object with name, shape, datatype and data")
        name = entry.get("name")
        if type(name) is not str:
            raise invalid("each of inputs must have a name, which is a string")
        datatype = tensors.checked_datatype(name, entry.get("datatype"))
        shape = tensors.checked_shape(name, entry.get("shape"))
        self.inputs.check(name, datatype, shape)
        return name, datatype, shape

    def _read_outputs(self, entries: Any, parameters: Parameters) -> tuple[list[str], Reply]:
        """The names asked for and their forms; takes `binary_data_output` out of parameters."""
        if not entries and not parameters:
            return [], _JSON_REPLY
        reply = Reply(bool(parameters.pop("binary_data_output", False)) if parameters else False)
        if entries is None:
            return [], reply
        if type(entries) is not list:
            raise invalid("outputs must be a list of objects with a name")
        return [_read_output(entry, reply) for entry in entries], reply

    def _raw_input(self, body: bytes) -> Tensors:
        """The whole body as the model's only input, batch 1."""
        form = self.inputs.only
        if form is None:
            raise invalid(
                f"model {self._model!r} does not have exactly one input, so a request can't be "
                "raw: Inference-Header-Content-Length must not be 0"
            )
        if form.datatype == "BYTES":
            return {form.name: tensors.bytes_array([body], (1,) * len(form.shape))}
        return {
            form.name: tensors.from_bytes(
                form.name, form.datatype, _raw_shape(form, len(body)), body
            )
        }


def parsed(body: bytes) -> Any:
    """The JSON in a body."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid(f"the body is not JSON: {error}") from None


def checked_id(value: Any) -> str:
    """A request's id."""
    if type(value) is not str:
        raise invalid(f"id {value!r} must be a string")
    return value


def checked_parameters(parameters: Any) -> Parameters:
    """The caller's parameters: strings, numbers and bools; reserved names as they are meant."""
    if parameters is None:
        return _NO_PARAMETERS
    if type(parameters) is not dict:
        raise invalid("parameters must be an object")
    for name, value in parameters.items():
        if type(value) not in _SCALARS:
            raise invalid(f"parameter {name!r} must be a string, a number or a bool")
        if name in _RESERVED:
            types, right = _RESERVED[name]
            if type(value) not in types or (type(value) is int and value < 0):
                raise invalid(f"parameter {name!r} is {value!r}; it must be {right}")
        elif name.startswith("triton_"):
            raise invalid(f"parameter {name!r} begins with the reserved 'triton_'")
    return parameters


def write(engine: Engine, response: InferenceResponse, reply: Reply) -> HttpResponse:
    """The answer's body, with its binary tensors behind the JSON."""
    header: dict[str, Any] = {"model_name": engine.model, "model_version": engine.version}
    if response.id:
        header["id"] = response.id
    if response.parameters:
        header["parameters"] = dict(response.parameters)
    raw: list[bytes] = []
    header["outputs"] = [
        _write_output(name, array, reply, engine.signature, raw)
        for name, array in response.outputs.items()
    ]
    text = orjson.dumps(header)
    if not raw:
        return HttpResponse(200, text)
    length = (b"inference-header-content-length", b"%d" % len(text))
    return HttpResponse(200, b"".join([text, *raw]), b"application/octet-stream", [length])


def _write_output(
    name: str, array: NDArray[Any], reply: Reply, signature: Signature, raw: list[bytes]
) -> dict[str, Any]:
    """One output's entry in the JSON; binary data are added to `raw`."""
    if reply.classes_by_output and name in reply.classes_by_output:
        array = top_classes(name, array, reply.classes_by_output[name], signature.labels)
    entry: dict[str, Any] = {
        "name": name,
        "datatype": tensors.datatype_of(array),
        "shape": array.shape,
    }
    is_binary = reply.binary
    if reply.binary_by_output:
        is_binary = reply.binary_by_output.get(name, is_binary)
    if is_binary:
        raw.append(tensors.to_bytes(array))
        entry["parameters"] = {"binary_data_size": len(raw[-1])}
    else:
        entry["data"] = tensors.to_json(name, array)
    return entry


def top_classes(
    name: str, scores: NDArray[Any], count: int, labels: tuple[str, ...]
) -> NDArray[Any]:
    """The `count` highest scores of each row as Triton writes them: "score:index:label"."""
    if scores.dtype.kind not in "iufb" or scores.ndim < 1:
        raise invalid(f"output {name!r} is {tensors.datatype_of(scores)}, which has no classes")
    rows = scores.reshape(len(scores), prod(scores.shape[1:]))
    best = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :count]
    texts = [
        f"{_score(rows[row, index])}:{index}{_label(labels, index)}".encode()
        for row in range(len(rows))
        for index in best[row].tolist()
    ]
    return tensors.bytes_array(texts, best.shape)


def _score(value: Any) -> str:
    return f"{value:f}" if isinstance(value, np.floating) else str(int(value))


def _label(labels: tuple[str, ...], index: int) -> str:
    return f":{labels[index]}" if index < len(labels) else ""


def _header_size(text: bytes, body_bytes: int) -> int:
    shown = text.decode("latin-1")
    if not (text.isdigit() and len(text) < 19):
        raise invalid(f"Inference-Header-Content-Length {shown!r} must be a number of bytes")
    size = int(text)
    if size > body_bytes:
        raise invalid(
            f"Inference-Header-Content-Length is {size} but the body has {body_bytes} bytes"
        )
    return size


def _binary_size(name: str, parameters: Any) -> int | None:
    """An input's `binary_data_size`, None when its data are in the JSON."""
    if parameters is None:
        return None
    if type(parameters) is not dict:
        raise invalid(f"input {name!r}: parameters must be an object")
    if "shared_memory_region" in parameters:
        raise refuse_shared_memory(f"input {name!r}")
    if "binary_data_size" not in parameters:
        return None
    size = parameters["binary_data_size"]
    if type(size) is not int or size < 0:
        raise invalid(f"input {name!r}: binary_data_size {size!r} must be a number of bytes")
    return size


def _read_output(entry: Any, reply: Reply) -> str:
    """The name of one output asked for; its form is noted in `reply`."""
    if type(entry) is not dict or type(entry.get("name")) is not str:
        raise invalid("each of outputs must be an object with a name, which is a string")
    name: str = entry["name"]
    parameters: Mapping[str, Any] = entry.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise invalid(f"output {name!r}: parameters must be an object")
    if "shared_memory_region" in parameters:
        raise refuse_shared_memory(f"output {name!r}")
    is_binary = parameters.get("binary_data")
    if is_binary is not None:
        if type(is_binary) is not bool:
            raise invalid(f"output {name!r}: binary_data {is_binary!r} must be true or false")
        reply.binary_by_output[name] = is_binary
    classes = parameters.get("classification")
    if classes:
        reply.classes_by_output[name] = checked_classes(name, classes)
    return name


def checked_classes(name: str, count: Any) -> int:
    """How many top classes of an output are wanted."""
    if type(count) is not int or count < 1:
        raise invalid(f"output {name!r}: classification {count!r} must be a number of classes")
    return count


def refuse_shared_memory(what: str) -> InferenceError:
    return InferenceError(
        Fault.INVALID, f"{what} is in shared memory, which Shoal does not offer; send the data"
    )


def _raw_shape(form: Tensor, body_bytes: int) -> tuple[int, ...]:
    """The shape of a raw body: batch 1, and one other variable length made to fit."""
    shape = [1 if place == 0 and n == -1 else n for place, n in enumerate(form.shape)]
    variable = [place for place, n in enumerate(shape) if n == -1]
    if len(variable) > 1:
        raise invalid(
            f"input {form.name!r} has shape {list(form.shape)}: a raw request can have only one "
            "variable length besides the batch"
        )
    if variable:
        row_bytes = prod(n for n in shape if n != -1) * DTYPES[form.datatype].itemsize
        shape[variable[0]] = body_bytes // row_bytes if row_bytes else 0
    return tuple(shape)
