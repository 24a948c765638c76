"""How is text asked for in the Open Inference Protocol, and how does it come back?

As JSON (`generate`, `generate_stream`), or with tensors as Triton's language models take it:
`text_input` with one string, beside it `sampling_parameters` (JSON) or single numbers and strings
of the options' names; the answer is `text_output`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson

from deployments.inference import (
    Engine,
    GenerationChunk,
    GenerationRequest,
    InferenceError,
    InferenceRequest,
    InferenceResponse,
)
from deployments.serving.deadlines import sooner
from deployments.serving.protocols import tensors
from deployments.serving.protocols.oip_messages import checked_id, checked_parameters, parsed
from deployments.serving.protocols.tensors import invalid

_NOT_OPTIONS = ("stream", "details", "exclude_input_in_output", "return_finish_reason")
_NOT_PASSED = ("priority", "sequence_id", "sequence_start", "sequence_end")


def read_text(engine: Engine, body: bytes, deadline_s: float | None) -> GenerationRequest:
    """The text asked for in JSON: options beside `text_input` (Triton) or in `parameters`."""
    check_generates(engine)
    document = parsed(body)
    if type(document) is not dict or type(document.get("text_input")) is not str:
        raise invalid("the body must be an object with text_input, which is a string", "text_input")
    beside = {k: v for k, v in document.items() if k not in ("text_input", "id", "parameters")}
    within = document.get("parameters")
    if within is not None and type(within) is not dict:
        raise invalid("parameters must be an object", "parameters")
    return _request(
        document["text_input"],
        {**beside, **(within or {})},
        checked_id(document.get("id", "")),
        deadline_s,
    )


def text_from_tensors(request: InferenceRequest) -> GenerationRequest:
    """The text asked for with tensors of one element each."""
    inputs = request.inputs
    values = {name: _single(name, inputs[name].reshape(-1).tolist()) for name in inputs}
    if type(values.get("text_input")) is not str:
        raise invalid("input 'text_input' is missing; it must be BYTES with one string")
    prompt = values.pop("text_input")
    sampling = values.pop("sampling_parameters", "{}")
    options = parsed(sampling.encode()) if type(sampling) is str else None
    if type(options) is not dict:
        raise invalid("input 'sampling_parameters' must be BYTES with a JSON object")
    options = {**request.parameters, **values, **options}
    return _request(prompt, options, request.id, request.deadline_s)


def check_generates(engine: Engine) -> None:
    """Refuse to ask a model for text that has none."""
    if not engine.generates:
        raise invalid(f"model {engine.model!r} does not generate text; use infer")


async def whole(engine: Engine, wanted: GenerationRequest) -> tuple[str, GenerationChunk | None]:
    """The whole text, and the last chunk."""
    pieces: list[str] = []
    last: GenerationChunk | None = None
    async for chunk in engine.generate(wanted):
        pieces.append(chunk.text)
        last = chunk
    return "".join(pieces), last


def answer(
    engine: Engine, wanted: GenerationRequest, text: str, chunk: GenerationChunk | None
) -> dict[str, Any]:
    """A text or a piece of it as JSON; the last one says why it ended and what it took."""
    made: dict[str, Any] = {
        "model_name": engine.model,
        "model_version": engine.version,
        "text_output": text,
    }
    if wanted.id:
        made["id"] = wanted.id
    if chunk is not None and chunk.finish_reason is not None:
        made["details"] = {
            "finish_reason": chunk.finish_reason,
            "prompt_tokens": chunk.prompt_tokens,
            "completion_tokens": chunk.completion_tokens,
        }
    return made


def text_response(wanted: GenerationRequest, text: str) -> InferenceResponse:
    """A text or a piece of it as a tensor."""
    return InferenceResponse(
        {"text_output": tensors.bytes_array([text.encode()], (1,))}, id=wanted.id
    )


async def events(
    engine: Engine,
    wanted: GenerationRequest,
    first: GenerationChunk | None,
    rest: AsyncIterator[GenerationChunk],
) -> AsyncIterator[bytes]:
    """Server-sent events, a chunk each; what fails once they flow is an event too."""
    try:
        chunk = first
        while chunk is not None:
            yield _event(answer(engine, wanted, chunk.text, chunk))
            chunk = await anext(rest, None)
    except InferenceError as error:
        yield _event({"error": error.message})
    finally:
        await close(rest)


async def close(chunks: AsyncIterator[GenerationChunk]) -> None:
    """End a generation early."""
    end = getattr(chunks, "aclose", None)
    if end is not None:
        await end()


def _request(
    prompt: str, options: dict[str, Any], request_id: str, deadline_s: float | None
) -> GenerationRequest:
    options = {k: v for k, v in options.items() if k not in _NOT_OPTIONS}
    checked_parameters({k: v for k, v in options.items() if not _is_list(k, v)})
    timeout_us = int(options.pop("timeout", 0))
    max_tokens = options.pop("max_tokens", None)
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise invalid(f"max_tokens {max_tokens!r} must be a whole number above 0", "max_tokens")
    return GenerationRequest(
        prompt,
        max_tokens=max_tokens,
        options={k: v for k, v in options.items() if k not in _NOT_PASSED},
        id=request_id,
        deadline_s=sooner(deadline_s, timeout_us),
    )


def _is_list(name: str, value: Any) -> bool:
    """Some options (stop) are lists; lists of strings and numbers are all there is."""
    if type(value) is not list:
        return False
    if not all(type(item) in (str, int, float) for item in value):
        raise invalid(f"parameter {name!r} must be a list of strings or numbers", name)
    return True


def _single(name: str, elements: list[Any]) -> Any:
    """The one element of a tensor; BYTES as text."""
    if len(elements) != 1:
        raise invalid(f"input {name!r} has {len(elements)} elements; a text request takes one")
    if type(elements[0]) is not bytes:
        return elements[0]
    try:
        return elements[0].decode()
    except UnicodeDecodeError:
        raise invalid(f"input {name!r} must be UTF-8 text") from None


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
