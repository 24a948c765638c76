"""How are an Open Inference request and its answer written in gRPC messages?

Tensors lie in `raw_input_contents`, one entry an input, or typed in each input's `contents`; a
message that has both is refused. The answer's tensors lie as the request's did, but all raw if one
of them has no typed form (FP16, BF16).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError, Message
from tritonclient.grpc import service_pb2

from deployments.inference import Engine, InferenceRequest, InferenceResponse, Tensors
from deployments.serving.deadlines import sooner
from deployments.serving.protocols import tensors
from deployments.serving.protocols.oip_messages import (
    Parameters,
    Reader,
    checked_classes,
    checked_parameters,
    refuse_shared_memory,
    top_classes,
)
from deployments.serving.protocols.tensors import invalid

FINAL = "triton_final_response"

_WANTS_FINAL = "triton_enable_empty_final_response"
_NOT_OURS = frozenset({_WANTS_FINAL, "binary_data_output"})

CONTENTS: Mapping[str, str] = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Where the typed values of a datatype lie."""


@dataclass(slots=True)
class Wish:
    """How the answer is wanted."""

    is_raw: bool = True
    wants_final: bool = False
    classes_by_output: dict[str, int] = field(default_factory=dict)


def message(kind: Any, data: bytes) -> Any:
    """The message in `data`; what is none is the caller's fault."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise invalid(f"the message is no inference.{kind.DESCRIPTOR.name}") from None


def data_of(made: Message) -> bytes:
    """A message's bytes."""
    return made.SerializeToString()


def read(sent: Any, reader: Reader, deadline_s: float | None) -> tuple[InferenceRequest, Wish]:
    """The request in a `ModelInferRequest`."""
    parameters = _parameters(sent.parameters)
    wish = Wish(
        is_raw=bool(sent.raw_input_contents) or not sent.inputs,
        wants_final=parameters.get(_WANTS_FINAL) is True,
    )
    parameters = checked_parameters({k: v for k, v in parameters.items() if k not in _NOT_OURS})
    timeout_us = int(parameters.pop("timeout", 0)) if parameters else 0
    names = [_read_output(output, wish) for output in sent.outputs]
    request = InferenceRequest(
        _read_inputs(sent, reader),
        reader.check_outputs(names),
        sent.id,
        parameters,
        sooner(deadline_s, timeout_us),
    )
    return request, wish


def write(engine: Engine, response: InferenceResponse, wish: Wish) -> Any:
    """The answer as a `ModelInferResponse`."""
    outputs = response.outputs
    for name, count in wish.classes_by_output.items():
        if name in outputs:
            top = top_classes(name, outputs[name], count, engine.signature.labels)
            outputs = {**outputs, name: top}
    made = service_pb2.ModelInferResponse(
        model_name=engine.model, model_version=engine.version, id=response.id
    )
    for name, value in response.parameters.items():
        _set_parameter(made.parameters[name], value)
    datatypes = {name: tensors.datatype_of(array) for name, array in outputs.items()}
    is_raw = wish.is_raw or not tensors.BINARY_ONLY.isdisjoint(datatypes.values())
    for name, array in outputs.items():
        entry = made.outputs.add(name=name, datatype=datatypes[name], shape=array.shape)
        if is_raw:
            made.raw_output_contents.append(tensors.to_bytes(array))
            continue
        is_bytes = datatypes[name] == "BYTES"
        values = tensors.elements_of(array) if is_bytes else array.reshape(-1).tolist()
        getattr(entry.contents, CONTENTS[datatypes[name]]).extend(values)
    return made


def mark_final(response: Any, is_final: bool) -> Any:
    """The response, saying whether it is the last one to its request."""
    response.parameters[FINAL].bool_param = is_final
    return response


def empty_final(engine: Engine, request_id: str) -> Any:
    """The response without outputs that ends a request's answers."""
    made = service_pb2.ModelInferResponse(
        model_name=engine.model, model_version=engine.version, id=request_id
    )
    return mark_final(made, True)


def repository_parameters(sent: Mapping[str, Any]) -> dict[str, Any]:
    """What came with a load or unload."""
    return {name: _value(name, parameter) for name, parameter in sent.items()}


def _read_inputs(sent: Any, reader: Reader) -> Tensors:
    raw = sent.raw_input_contents
    if raw and len(raw) != len(sent.inputs):
        raise invalid(
            f"raw_input_contents has {len(raw)} entries for {len(sent.inputs)} inputs; "
            "each input needs one"
        )
    found: Tensors = {}
    for place, entry in enumerate(sent.inputs):
        name = entry.name
        if name in found:
            raise invalid(f"input {name!r} is given twice")
        if "shared_memory_region" in entry.parameters:
            raise refuse_shared_memory(f"input {name!r}")
        datatype = tensors.checked_datatype(name, entry.datatype)
        shape = tensors.checked_shape(name, list(entry.shape))
        reader.inputs.check(name, datatype, shape)
        if not raw:
            found[name] = _typed(name, datatype, shape, entry.contents)
            continue
        if entry.HasField("contents"):
            raise invalid(f"input {name!r} has contents beside raw_input_contents; send one")
        found[name] = tensors.from_bytes(name, datatype, shape, raw[place])
    reader.inputs.check_all(found)
    return found


def _typed(name: str, datatype: str, shape: tuple[int, ...], contents: Any) -> Any:
    where = CONTENTS.get(datatype)
    if where is None:
        raise invalid(f"input {name!r}: {datatype} has no typed contents; send it raw")
    for used, _ in contents.ListFields():
        if used.name != where:
            raise invalid(f"input {name!r}: {datatype} belongs in {where}, not in {used.name}")
    return tensors.from_values(name, datatype, shape, list(getattr(contents, where)))


def _read_output(output: Any, wish: Wish) -> str:
    """The name of one output asked for; the classes wanted of it are noted in `wish`."""
    name: str = output.name
    parameters = _parameters(output.parameters)
    if "shared_memory_region" in parameters:
        raise refuse_shared_memory(f"output {name!r}")
    classes = parameters.get("classification")
    if classes:
        wish.classes_by_output[name] = checked_classes(name, classes)
    return name


def _parameters(sent: Mapping[str, Any]) -> Parameters:
    return {name: _value(name, parameter) for name, parameter in sent.items()}


def _value(name: str, parameter: Message) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    if kind is None:
        raise invalid(f"parameter {name!r} has no value")
    return getattr(parameter, kind)


def _set_parameter(parameter: Any, value: str | int | float | bool) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int) and -(2**63) <= value < 2**63:
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = str(value)
