"""How does Shoal speak OpenAI's API?

    GET  /v1/models[/{model}]                     from the catalog (`model_pages`)
    POST /v1/chat/completions, /v1/completions    from the engine's text, whole or in events
    POST /v1/embeddings                           from a model that turns text into vectors

`model` may be `name@version` or `name@label`. With an engine (a replica) requests for its model are
answered here; without one (the front desk) the routes of `INFERENCE_TEMPLATES` are left to whoever
holds such requests. A model with an OpenAI app of its own (vLLM) gets `OPENAI_INFERENCE_PATHS`
straight from `application`.

Usage of embeddings is `prompt_tokens` of the model's answer where it counts them, else the number
of words: near enough to budget with, not to bill by.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deployments.inference import (
    Catalog,
    Engine,
    Fault,
    InferenceError,
    InferenceRequest,
    InferenceResponse,
    Signature,
    Tensor,
)
from deployments.serving import stamps
from deployments.serving.http import HttpRequest, HttpResponse, HttpStream, Route
from deployments.serving.protocols import openai_messages as messages
from deployments.serving.protocols.model_pages import ModelPages
from deployments.serving.protocols.openai_messages import (
    Choice,
    Embedding,
    Generation,
    Json,
    Reply,
    Usage,
    refused,
)
from deployments.serving.protocols.openai_texts import Piece, pieces
from deployments.serving.protocols.tensors import bytes_array
from deployments.serving.stamps import Stamp

INFERENCE_TEMPLATES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
"""The POST routes that only a running model can answer."""

OPENAI_INFERENCE_PATHS = frozenset(INFERENCE_TEMPLATES)
"""What a model's own OpenAI app is asked instead of this dialect."""

_FLOATS = ("FP32", "FP64", "FP16", "BF16")
_EMBEDDINGS = ("embedding", "embeddings", "sentence_embedding")

_log = logging.getLogger(__name__)


class OpenAI:
    """The dialect."""

    name = "openai"
    prefixes: Sequence[str] = ("/v1",)

    def __init__(
        self,
        catalog: Catalog,
        engine: Engine | None,
        *,
        stamp: Callable[[], Stamp] = stamps.fresh,
    ) -> None:
        self._stamp = stamp
        self._catalog = catalog
        self._engine = engine
        self._pages = ModelPages(catalog)

    def error(self, error: InferenceError) -> HttpResponse:
        """`{"error": {"message", "type", "param", "code"}}`."""
        return messages.error_response(error)

    def routes(self) -> list[Route]:
        """OpenAI's routes."""
        pages = [
            Route("GET", "/v1/models", self._pages.models),
            Route("GET", "/v1/models/{model}", self._pages.model),
        ]
        if self._engine is None:
            return pages
        return [
            *pages,
            Route("POST", "/v1/chat/completions", self._chat),
            Route("POST", "/v1/completions", self._completion),
            Route("POST", "/v1/embeddings", self._embedding),
        ]

    # Text

    async def _chat(self, request: HttpRequest) -> HttpResponse | HttpStream:
        return await self._text(request, messages.chat, is_chat=True)

    async def _completion(self, request: HttpRequest) -> HttpResponse | HttpStream:
        return await self._text(request, messages.completion, is_chat=False)

    async def _text(
        self,
        request: HttpRequest,
        read: Callable[[Json, float | None], Generation],
        *,
        is_chat: bool,
    ) -> HttpResponse | HttpStream:
        document = messages.parsed(request.body)
        engine = self._chosen(request, messages.model_of(document))
        if not engine.generates:
            raise refused(
                "model", f"model {engine.model!r} does not generate text; ask it by /v2 or :predict"
            )
        wanted = read(document, request.deadline_s())
        reply = Reply(engine.model, engine.version, is_chat, self._stamp())
        if wanted.stream:
            return await _stream(engine, wanted, reply)
        return HttpResponse(200, await _whole(engine, wanted, reply))

    # Embeddings

    async def _embedding(self, request: HttpRequest) -> HttpResponse:
        document = messages.parsed(request.body)
        engine = self._chosen(request, messages.model_of(document))
        given, taken = _text_input(engine), _vector_output(engine)
        wanted = messages.embedding(document)
        if wanted.dimensions is not None and 0 < taken.shape[1] < wanted.dimensions:
            raise _too_many_dimensions(engine.model, wanted.dimensions, taken.shape[1])
        shape = (len(wanted.texts), *(1 for _ in given.shape[1:]))
        texts = bytes_array([text.encode() for text in wanted.texts], shape)
        response = await engine.infer(
            InferenceRequest({given.name: texts}, (taken.name,), deadline_s=request.deadline_s())
        )
        vectors = _vectors(engine.model, response.outputs[taken.name], wanted.dimensions)
        body = messages.embeddings(
            engine.model,
            vectors,
            is_base64=wanted.is_base64,
            prompt_tokens=_prompt_tokens(wanted, response),
        )
        return HttpResponse(200, body)

    def _chosen(self, request: HttpRequest, model: str) -> Engine:
        """The engine, if the request means its model and version."""
        engine = self._engine
        name, _, version = model.partition("@")
        if engine is None or name != engine.model:
            raise messages.unknown_model(model)
        if not version or version == engine.version:
            return engine
        backend = (request.header(b"x-shoal-backend") or b"").decode("latin-1")
        if backend.split("--")[:2] == [engine.model, engine.version]:
            return engine  # the edge knows which version a label means now
        status = self._catalog.model(name)
        for known in status.versions if status else ():
            if known.version == engine.version and version in known.labels:
                return engine
        raise messages.unknown_model(model)


async def _whole(engine: Engine, wanted: Generation, reply: Reply) -> bytes:
    choices = [Choice(echo) for echo in wanted.echoes]
    counts = _Counts(wanted)
    async with aclosing(pieces(engine, wanted)) as texts:
        async for piece in texts:
            choice = choices[piece.choice]
            choice.text += piece.text
            if piece.finish_reason is not None:
                choice.finish_reason = piece.finish_reason
                counts.add(piece)
    return reply.whole(choices, counts.usage)


async def _stream(engine: Engine, wanted: Generation, reply: Reply) -> HttpStream:
    """The first piece is awaited, so that what fails before it is an ordinary error."""
    texts = pieces(engine, wanted)
    try:
        first = await anext(texts)
    except BaseException:
        await texts.aclose()
        raise
    return HttpStream(_events(wanted, reply, first, texts))


async def _events(
    wanted: Generation, reply: Reply, first: Piece, texts: AsyncGenerator[Piece, None]
) -> AsyncGenerator[bytes, None]:
    """The events of a stream; what fails once they flow is its last one."""
    others: Json = {"usage": None} if wanted.include_usage else {}
    counts = _Counts(wanted)
    try:
        async with aclosing(texts):
            for index, echo in enumerate(wanted.echoes):
                if reply.is_chat:
                    yield reply.begin(index, others)
                elif echo:
                    yield reply.piece(index, echo, None, others)
            piece: Piece | None = first
            while piece is not None:
                for text, reason in _parts(piece):
                    yield reply.piece(piece.choice, text, reason, others)
                if piece.finish_reason is not None:
                    counts.add(piece)
                piece = await anext(texts, None)
    except InferenceError as error:
        yield messages.event(messages.error_object(error))
        return
    except Exception:  # noqa: BLE001  # a stream that breaks off says nothing
        _log.exception("a stream of model %r failed", reply.model)
        broken = InferenceError(Fault.INTERNAL, "internal error; the server's log says more")
        yield messages.event(messages.error_object(broken))
        return
    if wanted.include_usage:
        yield reply.total(counts.usage)
    yield messages.DONE


def _parts(piece: Piece) -> list[tuple[str, str | None]]:
    """Text and the end of a choice come in chunks of their own."""
    if piece.finish_reason is None:
        return [(piece.text, None)]
    end: tuple[str, str | None] = ("", piece.finish_reason)
    return [(piece.text, None), end] if piece.text else [end]


class _Counts:
    """Usage over the choices: every completion, but each prompt once."""

    def __init__(self, wanted: Generation) -> None:
        self.usage = Usage()
        self._choices = wanted.choices

    def add(self, piece: Piece) -> None:
        if piece.choice % self._choices == 0:
            self.usage.prompt += piece.prompt_tokens
        self.usage.completion += piece.completion_tokens


def _text_input(engine: Engine) -> Tensor:
    inputs = engine.signature.inputs
    if len(inputs) == 1 and inputs[0].datatype == "BYTES" and inputs[0].shape[1:] in ((), (1,)):
        return inputs[0]
    raise refused("model", f"model {engine.model!r} does not take text, so it has no embeddings")


def _vector_output(engine: Engine) -> Tensor:
    found = _vector_outputs(engine.signature)
    named = [t for t in found if t.name in _EMBEDDINGS]
    if len(found) != 1 and len(named) != 1:
        raise refused(
            "model", f"model {engine.model!r} has no floating output of shape [-1, dimensions]"
        )
    return found[0] if len(found) == 1 else named[0]


def _vector_outputs(signature: Signature) -> list[Tensor]:
    return [t for t in signature.outputs if t.datatype in _FLOATS and len(t.shape) == 2]


def _vectors(model: str, rows: NDArray[Any], dimensions: int | None) -> NDArray[np.float32]:
    """The model's vectors, cut to `dimensions` and made unit length again if so asked."""
    vectors = np.ascontiguousarray(rows, np.float32)
    if not np.isfinite(vectors).all():
        raise InferenceError(Fault.INTERNAL, f"model {model!r} gave vectors that are not finite")
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    if dimensions > vectors.shape[1]:
        raise _too_many_dimensions(model, dimensions, vectors.shape[1])
    cut = np.ascontiguousarray(vectors[:, :dimensions])
    lengths = np.sqrt(np.square(cut).sum(axis=1, keepdims=True))
    units: NDArray[np.float32] = cut / np.where(lengths == 0, np.float32(1), lengths)
    return units


def _too_many_dimensions(model: str, asked: int, most: int) -> InferenceError:
    return refused(
        "dimensions", f"dimensions is {asked}; model {model!r} has {most}, so ask for 1 to {most}"
    )


def _prompt_tokens(wanted: Embedding, response: InferenceResponse) -> int:
    counted = response.parameters.get("prompt_tokens")
    if type(counted) is int:
        return counted
    return sum(len(text.split()) for text in wanted.texts)
