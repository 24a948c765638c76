"""What do OpenAI's requests say, and how are its answers, events and errors written?

    body ─► ChatRequest, CompletionRequest, EmbeddingRequest        every field checked, or named
    text ─► chat.completion, text_completion and their chunks; list of embeddings; {"error": {…}}

Fields that only steer the sampling are checked for type and range and handed on as options. Fields
that would change the answer's form in ways that a model behind Shoal can't follow (tools, images,
log-probabilities, JSON schemas) are refused by name. Anything else is ignored, as others do.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from deployments.inference import Fault, GenerationRequest, InferenceError
from deployments.serving.http import HttpResponse, retry_after
from deployments.serving.stamps import Stamp

Json = dict[str, Any]

CHOICES_MAX = 64
"""How many texts one request may ask for (`n` times the number of prompts)."""

INPUTS_MAX = 2048
"""How many texts one embeddings request may hold, as at OpenAI."""

COMPLETION_TOKENS = 16
"""What `max_tokens` is for /v1/completions where the caller does not say; OpenAI's default."""

_ROLES = ("assistant", "developer", "function", "system", "tool", "user")
_STATUS: Mapping[Fault, tuple[int, str, str | None]] = {
    Fault.INVALID: (400, "invalid_request_error", None),
    Fault.UNAUTHENTICATED: (401, "authentication_error", "invalid_api_key"),
    Fault.FORBIDDEN: (403, "permission_error", "permission_denied"),
    Fault.NOT_FOUND: (404, "invalid_request_error", "not_found"),
    Fault.TOO_LARGE: (413, "invalid_request_error", "request_too_large"),
    Fault.UNSUPPORTED_MEDIA: (415, "invalid_request_error", "unsupported_media_type"),
    Fault.METHOD_NOT_ALLOWED: (405, "invalid_request_error", "method_not_allowed"),
    Fault.CONFLICT: (409, "invalid_request_error", "conflict"),
    Fault.OVERLOADED: (429, "rate_limit_error", "rate_limit_exceeded"),
    Fault.UNIMPLEMENTED: (501, "server_error", "not_implemented"),
    Fault.UNAVAILABLE: (503, "server_error", "unavailable"),
    Fault.DEADLINE: (504, "server_error", "deadline_exceeded"),
    Fault.INTERNAL: (500, "server_error", None),
}
_SHOULD_RETRY = {
    Fault.CONFLICT: b"false",
    Fault.OVERLOADED: b"true",
    Fault.UNIMPLEMENTED: b"false",
    Fault.UNAVAILABLE: b"true",
    Fault.DEADLINE: b"false",
}
"""What OpenAI's clients are told where the status alone would mislead them."""


# Errors


def error_response(error: InferenceError) -> HttpResponse:
    """An error in OpenAI's form; with when to come back, to the millisecond."""
    headers = retry_after(error)
    if error.retry_after_s is not None:
        headers.append((b"retry-after-ms", b"%d" % math.ceil(error.retry_after_s * 1000)))
    if error.fault in _SHOULD_RETRY:
        headers.append((b"x-should-retry", _SHOULD_RETRY[error.fault]))
    status = _STATUS[error.fault][0]
    return HttpResponse(status, orjson.dumps(error_object(error)), headers=headers)


def error_object(error: InferenceError) -> Json:
    """`{"error": {…}}`, as an answer or as the last event of a stream."""
    _, kind, code = _STATUS[error.fault]
    if error.fault is Fault.NOT_FOUND and error.field == "model":
        code = "model_not_found"
    return {
        "error": {"message": error.message, "type": kind, "param": error.field, "code": code},
    }


def unknown_model(model: str) -> InferenceError:
    """OpenAI's words for a model that is not there."""
    return InferenceError(
        Fault.NOT_FOUND,
        f"The model `{model}` does not exist or you do not have access to it.",
        field="model",
    )


def refused(param: str, message: str) -> InferenceError:
    """A request that can't be answered as it is, because of `param`."""
    return InferenceError(Fault.INVALID, message, field=param)


# Requests


@dataclass(frozen=True, slots=True)
class Generation:
    """What chat and completions have in common. `stop` sequences end a text and are no part of it.

    `requests` has one entry for each text of the answer, `choices` of them for each prompt;
    `echoes` is what a text begins with.
    """

    model: str
    requests: Sequence[GenerationRequest]
    choices: int
    echoes: Sequence[str]
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


@dataclass(frozen=True, slots=True)
class Embedding:
    """What an embeddings request asks for."""

    model: str
    texts: Sequence[str]
    is_base64: bool
    dimensions: int | None


def parsed(body: bytes) -> Json:
    """The JSON object in `body`."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InferenceError(
            Fault.INVALID, f"We could not parse the JSON body of your request: {error}"
        ) from None
    if type(document) is not dict:
        raise InferenceError(Fault.INVALID, "The body of your request must be a JSON object.")
    return document


def model_of(document: Json) -> str:
    """The model that a request names."""
    model = document.get("model")
    if type(model) is not str or not model:
        raise refused("model", "you must provide a model parameter, a string")
    return model


def chat(document: Json, deadline_s: float | None) -> Generation:
    """A /v1/chat/completions request."""
    messages = _messages(document.get("messages"))
    _refuse(document, _CHAT_REFUSED)
    n = _checked(document, "n", _is_count, f"a whole number from 1 to {CHOICES_MAX}") or 1
    max_tokens = _tokens(document, "max_completion_tokens") or _tokens(document, "max_tokens")
    stop = _stop(document)
    options = _options(document, stop)
    request = GenerationRequest(
        messages=messages, max_tokens=max_tokens, options=options, deadline_s=deadline_s
    )
    stream, include_usage = _streaming(document)
    return Generation(model_of(document), [request] * n, n, [""] * n, stop, stream, include_usage)


def completion(document: Json, deadline_s: float | None) -> Generation:
    """A /v1/completions request; each prompt has `n` choices."""
    prompts = _prompts(document.get("prompt"))
    n = _checked(document, "n", _is_count, f"a whole number from 1 to {CHOICES_MAX}") or 1
    if n * len(prompts) > CHOICES_MAX:
        raise refused(
            "n", f"{len(prompts)} prompts with n {n} are more than {CHOICES_MAX} texts a request"
        )
    _refuse(document, _COMPLETION_REFUSED)
    if document.get("best_of") not in (None, n):
        raise refused("best_of", "best_of other than n is not supported; leave it out")
    echo = _checked(document, "echo", _is_bool, "true or false") or False
    max_tokens = _tokens(document, "max_tokens") or COMPLETION_TOKENS
    stop = _stop(document)
    options = _options(document, stop)
    requests = [
        GenerationRequest(prompt, max_tokens=max_tokens, options=options, deadline_s=deadline_s)
        for prompt in prompts
        for _ in range(n)
    ]
    echoes = [(r.prompt or "") if echo else "" for r in requests]
    stream, include_usage = _streaming(document)
    return Generation(model_of(document), requests, n, echoes, stop, stream, include_usage)


def embedding(document: Json) -> Embedding:
    """A /v1/embeddings request."""
    form = document.get("encoding_format", "float")
    if form not in ("float", "base64", None):
        raise refused(
            "encoding_format", f'encoding_format {_shown(form)} must be "float" or "base64"'
        )
    dimensions = _checked(document, "dimensions", _is_positive, "a whole number above 0")
    texts = _texts(document.get("input"))
    return Embedding(model_of(document), texts, form == "base64", dimensions)


def _messages(messages: Any) -> list[Json]:
    if type(messages) is not list or not messages:
        raise refused("messages", "messages must be a list of at least one message")
    return [_message(place, message) for place, message in enumerate(messages)]


def _message(place: int, message: Any) -> Json:
    """A message whose content is plain text."""
    where = f"messages[{place}]"
    if type(message) is not dict:
        raise refused(where, f"{where} must be an object with role and content")
    role = message.get("role")
    if type(role) is not str or role not in _ROLES:
        raise refused(f"{where}.role", f"role {_shown(role)} must be one of {', '.join(_ROLES)}")
    content = message.get("content")
    if type(content) is list:
        content = "".join(_part(f"{where}.content[{n}]", part) for n, part in enumerate(content))
    elif content is None and role == "assistant":
        content = ""
    elif type(content) is not str:
        raise refused(f"{where}.content", f"content {_shown(content)} must be a string")
    return {**message, "content": content}


def _part(where: str, part: Any) -> str:
    kind = part.get("type") if type(part) is dict else None
    if kind != "text":
        raise refused(where, f"{where} is {_shown(kind)}; this model reads parts of type text only")
    text = part.get("text")
    if type(text) is not str:
        raise refused(f"{where}.text", f"text {_shown(text)} must be a string")
    return text


def _prompts(prompt: Any) -> list[str]:
    if type(prompt) is str:
        return [prompt]
    return _text_list("prompt", prompt)


def _texts(texts: Any) -> list[str]:
    found = [texts] if type(texts) is str else _text_list("input", texts)
    if len(found) > INPUTS_MAX:
        raise refused("input", f"input holds {len(found)} texts; at most {INPUTS_MAX} are allowed")
    if "" in found:
        raise refused("input", "input must not hold an empty string")
    return found


def _text_list(param: str, value: Any) -> list[str]:
    if type(value) is not list or not value:
        raise refused(param, f"{param} must be a string or a list of at least one string")
    for item in value:
        if type(item) in (int, list):
            raise refused(
                param, f"{param} holds tokens; models here read text, so send a string or strings"
            )
        if type(item) is not str:
            raise refused(param, f"{param} holds {_shown(item)}; it must be a string or strings")
    return value


def _stop(document: Json) -> tuple[str, ...]:
    stop = document.get("stop")
    found = [stop] if type(stop) is str else stop
    if found is None:
        return ()
    if type(found) is not list or len(found) > 4 or not all(type(s) is str and s for s in found):
        raise refused(
            "stop", f"stop {_shown(stop)} must be a string or a list of up to 4, none of them empty"
        )
    return tuple(found)


def _streaming(document: Json) -> tuple[bool, bool]:
    """Whether the answer comes in events, and whether the last one tells the usage."""
    stream = _checked(document, "stream", _is_bool, "true or false") or False
    options = document.get("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise refused("stream_options", "stream_options is only allowed when stream is true")
    if type(options) is not dict or type(options.get("include_usage", False)) is not bool:
        raise refused(
            "stream_options", "stream_options must be an object with include_usage true or false"
        )
    return stream, options.get("include_usage", False)


def _options(document: Json, stop: tuple[str, ...]) -> Json:
    """The sampling fields that were sent."""
    options: Json = {}
    for name, (is_right, right) in _SAMPLING.items():
        value = _checked(document, name, is_right, right)
        if value is not None:
            options[name] = value
    if stop:
        options["stop"] = list(stop)
    return options


def _tokens(document: Json, name: str) -> int | None:
    value: int | None = _checked(document, name, _is_positive, "a whole number above 0")
    return value


def _checked(document: Json, name: str, is_right: Callable[[Any], bool], right: str) -> Any:
    """The value of a field that may be missing or null (None)."""
    value = document.get(name)
    if value is not None and not is_right(value):
        raise refused(name, f"{name} is {_shown(value)}; it must be {right}")
    return value


def _refuse(document: Json, fields: Mapping[str, tuple[Callable[[Any], bool], str]]) -> None:
    for name, (is_harmless, why) in fields.items():
        value = document.get(name)
        if value is not None and not is_harmless(value):
            raise refused(name, why)
    if document.get("top_logprobs") is not None and not document.get("logprobs"):
        raise refused("top_logprobs", "top_logprobs is only allowed when logprobs is true")


def _is_bool(value: Any) -> bool:
    return type(value) is bool


def _is_positive(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= CHOICES_MAX


def _between(low: float, high: float) -> tuple[Callable[[Any], bool], str]:
    def is_right(value: Any) -> bool:
        return type(value) in (int, float) and low <= value <= high

    return is_right, f"a number from {low} to {high}"


def _whole(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    def is_right(value: Any) -> bool:
        return type(value) is int and low <= value <= high

    return is_right, f"a whole number from {low} to {high}"


def _is_bias(value: Any) -> bool:
    return type(value) is dict and all(
        key.isascii() and key.isdigit() and type(v) in (int, float) and -100 <= v <= 100
        for key, v in value.items()
    )


_SAMPLING: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": _between(0, 2),
    "top_p": _between(0, 1),
    "top_k": _whole(-1, 2**31 - 1),
    "min_p": _between(0, 1),
    "presence_penalty": _between(-2, 2),
    "frequency_penalty": _between(-2, 2),
    "repetition_penalty": _between(0, 10),
    "seed": _whole(-(2**63), 2**63 - 1),
    "logit_bias": (_is_bias, "an object from token numbers to biases between -100 and 100"),
    "ignore_eos": (_is_bool, "true or false"),
}
"""Fields for the sampler (OpenAI's, and four that open models know besides)."""


def _is_falsy(value: Any) -> bool:
    return not value


_CHAT_REFUSED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "tools": (_is_falsy, "tools are not supported by this model"),
    "functions": (_is_falsy, "functions are not supported by this model"),
    "audio": (_is_falsy, "audio is not supported by this model"),
    "modalities": (lambda v: v == ["text"], 'modalities must be ["text"]: this model only writes'),
    "response_format": (
        lambda v: type(v) is dict and v.get("type") == "text",
        "response_format must be of type text: this model can't be held to a form",
    ),
    "logprobs": (lambda v: v is False, "logprobs are not offered by this model"),
}
_COMPLETION_REFUSED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "suffix": (_is_falsy, "suffix is not supported by this model"),
    "logprobs": (lambda v: v is False, "logprobs are not offered by this model"),
}


# Answers


@dataclass(slots=True)
class Usage:
    """Tokens of a request, summed over its choices (a prompt counts once)."""

    prompt: int = 0
    completion: int = 0

    def to_json(self) -> Json:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass(slots=True)
class Choice:
    """A text in the making."""

    text: str = ""
    finish_reason: str = "stop"


@dataclass(frozen=True, slots=True)
class Reply:
    """The frame of an answer: the same in every chunk of a stream."""

    model: str
    version: str
    is_chat: bool
    stamp: Stamp

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """A complete answer."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        texts = [self._choice(n, choice) for n, choice in enumerate(choices)]
        return orjson.dumps({**self._frame(kind, texts), "usage": usage.to_json()})

    def begin(self, index: int, others: Json) -> bytes:
        """The first chunk of a chat choice: who speaks."""
        return self._event(index, {"role": "assistant", "content": ""}, None, others)

    def piece(self, index: int, text: str, finish_reason: str | None, others: Json) -> bytes:
        """A chunk with text, or the end of a choice."""
        if not self.is_chat:
            return self._event(index, text, finish_reason, others)
        return self._event(index, {"content": text} if text else {}, finish_reason, others)

    def total(self, usage: Usage) -> bytes:
        """The last chunk, if the caller asked for it."""
        return event({**self._frame(self._chunk, []), "usage": usage.to_json()})

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _event(self, index: int, content: Any, finish_reason: str | None, others: Json) -> bytes:
        choice = {
            "index": index,
            ("delta" if self.is_chat else "text"): content,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        return event({**self._frame(self._chunk, [choice]), **others})

    def _choice(self, index: int, choice: Choice) -> Json:
        rest = {"logprobs": None, "finish_reason": choice.finish_reason}
        if not self.is_chat:
            return {"index": index, "text": choice.text, **rest}
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"index": index, "message": message, **rest}

    def _frame(self, kind: str, choices: Sequence[Json]) -> Json:
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.stamp.id}",
            "object": kind,
            "created": self.stamp.created_s,
            "model": self.model,
            "system_fingerprint": f"{self.model}@{self.version}",
            "choices": choices,
        }


DONE = b"data: [DONE]\n\n"


def event(value: Json) -> bytes:
    """A server-sent event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def embeddings(
    model: str, vectors: NDArray[np.float32], *, is_base64: bool, prompt_tokens: int
) -> bytes:
    """The answer with one embedding for each text."""
    data = [
        {
            "object": "embedding",
            "index": n,
            "embedding": base64.b64encode(v.tobytes()).decode() if is_base64 else v,
        }
        for n, v in enumerate(vectors)
    ]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    page = {"object": "list", "data": data, "model": model, "usage": usage}
    return orjson.dumps(page, option=orjson.OPT_SERIALIZE_NUMPY)


def _shown(value: Any) -> str:
    try:
        text = orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
