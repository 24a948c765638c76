"""What does each method of the Open Inference gRPC service answer?

Here are the methods over messages; connections, statuses and tokens are `oip_grpc`'s. On a stream
many requests are answered at the same time: those of a model that generates in pieces that mingle
(their ids tell them apart), all others in the order in which they came.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf.json_format import ParseDict
from tritonclient.grpc import model_config_pb2, service_pb2

from deployments.inference import Catalog, Engine, Fault, InferenceError, InferenceRequest
from deployments.serving.deadlines import deadline_in, now_s
from deployments.serving.protocols import descriptions, oip_proto, oip_text
from deployments.serving.protocols.oip_messages import Reader
from deployments.serving.protocols.oip_proto import Wish, data_of, message

Observe = Callable[[str, Fault | None, float], None]

STREAM_REQUESTS_MAX = 256
"""Requests of one stream that are answered at the same time; the next ones wait unread."""

_log = logging.getLogger(__name__)


class Servicer:
    """The service's methods over messages; what it raises is `InferenceError`."""

    def __init__(
        self,
        catalog: Catalog,
        engine: Engine | None,
        server_name: str,
        ready: Callable[[], bool] | None,
        observe: Observe,
    ) -> None:
        self._catalog = catalog
        self._engine = engine
        self._server_name = server_name
        self._ready = ready
        self._observe = observe
        self._reader_made: Reader | None = None

    # Inference

    async def infer(self, data: bytes, context: Any) -> bytes:
        """ModelInfer."""
        start_s = now_s()
        fault: Fault | None = None
        try:
            sent = message(service_pb2.ModelInferRequest, data)
            engine, request, wish = self._read(sent, context)
            answer = _whole if engine.generates else _inferred
            return data_of(await answer(engine, request, wish))
        except InferenceError as error:
            fault = error.fault
            raise
        except Exception:
            fault = Fault.INTERNAL
            raise
        finally:
            self._observe("grpc", fault, now_s() - start_s)

    async def stream_infer(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """ModelStreamInfer, in Triton's form."""
        garbled: InferenceError | None = None
        stream = _Stream(context)
        async with asyncio.TaskGroup() as group:
            async for data in requests:
                try:
                    sent = message(service_pb2.ModelInferRequest, data)
                except InferenceError as error:
                    garbled = error
                    break
                turn = await stream.turn(in_order=not self._generates)
                group.create_task(stream.write(self._responses(sent, context), turn))
        if garbled is not None:
            raise garbled

    @property
    def _generates(self) -> bool:
        return self._engine is not None and self._engine.generates

    async def _responses(self, sent: Any, context: Any) -> AsyncIterator[Any]:
        """The stream messages that answer one request; errors are messages too."""
        start_s = now_s()
        fault: Fault | None = None
        try:
            engine, request, wish = self._read(sent, context)
            pieces = _chunks if engine.generates else _single
            async for response in pieces(engine, request, wish):
                yield service_pb2.ModelStreamInferResponse(infer_response=response)
        except InferenceError as error:
            fault = error.fault
            yield _stream_error(sent.id, error.message)
        except Exception:  # noqa: BLE001  # the stream's other requests go on
            fault = Fault.INTERNAL
            _log.exception("a request of a gRPC stream failed")
            yield _stream_error(sent.id, "internal error; the server's log says more")
        self._observe("grpc", fault, now_s() - start_s)

    def _read(self, sent: Any, context: Any) -> tuple[Engine, InferenceRequest, Wish]:
        engine = descriptions.chosen_engine(
            self._catalog,
            self._engine,
            sent.model_name,
            sent.model_version or None,
            metadata_value(context, "x-shoal-backend"),
        )
        deadline_s = deadline_in(context.time_remaining())
        return engine, *oip_proto.read(sent, self._reader(engine), deadline_s)

    def _reader(self, engine: Engine) -> Reader:
        reader = self._reader_made
        if reader is None or reader.made_for is not engine.signature:
            reader = self._reader_made = Reader(engine)
        return reader

    # What there is

    def is_ready(self) -> bool:
        """A replica's server is ready when its model is, the front desk's always."""
        if self._ready is not None:
            return self._ready()
        if self._engine is None:
            return True
        status = self._catalog.model(self._engine.model)
        return status is not None and status.is_ready

    async def server_live(self, request: Any) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    async def server_ready(self, request: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=self.is_ready())

    async def model_ready(self, request: Any) -> Any:
        """Clients ask this until a model is there: an unknown one is not ready."""
        try:
            is_ready = descriptions.is_ready(self._catalog, request.name, request.version or None)
        except InferenceError:
            is_ready = False
        return service_pb2.ModelReadyResponse(ready=is_ready)

    async def server_metadata(self, request: Any) -> Any:
        return service_pb2.ServerMetadataResponse(**descriptions.server_metadata(self._server_name))

    async def model_metadata(self, request: Any) -> Any:
        metadata = descriptions.model_metadata(self._catalog, request.name, request.version or None)
        return service_pb2.ModelMetadataResponse(**metadata)

    async def model_config(self, request: Any) -> Any:
        config = descriptions.model_config(self._catalog, request.name, request.version or None)
        return service_pb2.ModelConfigResponse(
            config=ParseDict(config, model_config_pb2.ModelConfig())
        )

    async def model_statistics(self, request: Any) -> Any:
        statistics = descriptions.model_statistics(
            self._catalog, request.name or None, request.version or None
        )
        return ParseDict(statistics, service_pb2.ModelStatisticsResponse())

    async def repository_index(self, request: Any) -> Any:
        models = descriptions.repository_index(self._catalog, only_ready=request.ready)
        return service_pb2.RepositoryIndexResponse(models=models)

    async def repository_load(self, request: Any) -> Any:
        parameters = oip_proto.repository_parameters(request.parameters)
        await self._catalog.load(request.model_name, parameters)
        return service_pb2.RepositoryModelLoadResponse()

    async def repository_unload(self, request: Any) -> Any:
        parameters = oip_proto.repository_parameters(request.parameters)
        await self._catalog.unload(request.model_name, parameters)
        return service_pb2.RepositoryModelUnloadResponse()


class _Stream:
    """One stream's answers: whose turn it is, and one write at a time."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._places = asyncio.Semaphore(STREAM_REQUESTS_MAX)
        self._writing = asyncio.Lock()
        self._last: asyncio.Event | None = None

    async def turn(self, *, in_order: bool) -> tuple[asyncio.Event | None, asyncio.Event]:
        """A place on the stream: what to wait for before writing, and what to set after it."""
        await self._places.acquire()
        before, self._last = self._last, asyncio.Event()
        return (before if in_order else None), self._last

    async def write(
        self,
        answers: AsyncIterator[Any],
        turn: tuple[asyncio.Event | None, asyncio.Event],
    ) -> None:
        """Send the answers to one request when it is its turn."""
        before, after = turn
        try:
            async for sent in answers:
                if before is not None:
                    await before.wait()
                async with self._writing:
                    await self._context.write(data_of(sent))
        finally:
            after.set()
            self._places.release()


def _stream_error(request_id: str, text: str) -> Any:
    return service_pb2.ModelStreamInferResponse(
        error_message=text, infer_response=service_pb2.ModelInferResponse(id=request_id)
    )


async def _inferred(engine: Engine, request: InferenceRequest, wish: Wish) -> Any:
    """Tensors from tensors."""
    answer = await engine.infer(request)
    answer.id = request.id
    return oip_proto.write(engine, answer, wish)


async def _whole(engine: Engine, request: InferenceRequest, wish: Wish) -> Any:
    """A generated text in one response."""
    wanted = oip_text.text_from_tensors(request)
    text, _ = await oip_text.whole(engine, wanted)
    return oip_proto.write(engine, oip_text.text_response(wanted, text), wish)


async def _single(engine: Engine, request: InferenceRequest, wish: Wish) -> AsyncIterator[Any]:
    """Tensors from tensors, as the one response of a stream to its request."""
    response = await _inferred(engine, request, wish)
    yield oip_proto.mark_final(response, True) if wish.wants_final else response


async def _chunks(engine: Engine, request: InferenceRequest, wish: Wish) -> AsyncIterator[Any]:
    """A generated text, a response a chunk."""
    wanted = oip_text.text_from_tensors(request)
    chunks = engine.generate(wanted)
    try:
        async for chunk in chunks:
            response = oip_proto.write(engine, oip_text.text_response(wanted, chunk.text), wish)
            yield oip_proto.mark_final(response, False) if wish.wants_final else response
    finally:
        await oip_text.close(chunks)
    if wish.wants_final:
        yield oip_proto.empty_final(engine, wanted.id)


def metadata_value(context: Any, name: str) -> str:
    """A call's metadata of that name, "" when there is none."""
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return value if isinstance(value, str) else value.decode("latin-1")
    return ""
