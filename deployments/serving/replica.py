"""One running copy of a model version.

The actor loads the weights, warms the model up, opens its own door and says so; it decides nothing.

    Serve ─ start, health, stop ─► Replica ─┬─ runtime: the weights
                                            ├─ listener thread: HTTP and gRPC, from the edge
                                            └─ reporter thread ─ once a second ─► controller

A replica may die at any line. So it owns no request: the edge keeps each one until a reply has
arrived, and sends it elsewhere if none does. Nothing here is saved.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from deployments import sources
from deployments.edge.routing import Server
from deployments.inference import InferenceError, Signature
from deployments.model import Version
from deployments.registry import Registry
from deployments.runtimes import LoadError, Runtime, TextRuntime, create
from deployments.serving import reporter
from deployments.serving.application import Application
from deployments.serving.catalog import OwnCatalog
from deployments.serving.engine import ReplicaEngine
from deployments.serving.listener import Listener
from deployments.serving.meter import ReplicaMeter, process_meters
from deployments.serving.own_openai import OwnOpenAI
from deployments.serving.protocols.oip import OpenInference
from deployments.serving.protocols.oip_grpc import start_server
from deployments.serving.protocols.openai import OPENAI_INFERENCE_PATHS, OpenAI
from deployments.serving.protocols.tfserving import TensorFlowServing
from deployments.serving.reports import ReplicaState, Report

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 20.0
WARM_UP_TIMEOUT_S = 600.0
CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Order:
    """What a replica is asked to be.

    `host` is what it binds, `cache` the folder of fetched weights; `registry` is MLflow's URL and
    `artifacts` where it keeps files.
    """

    backend: str
    model: str
    version: str
    spec: Version
    host: str
    edge_token: str
    cache: str
    drain_timeout_s: float
    registry: str
    artifacts: str


class Replica:
    """The body of the Serve deployment. Raises in the constructor if the model can't be served."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._started_s = time.monotonic()
        self._is_ready = False
        self._progress, self._progress_s = -1, 0.0
        self._engine: ReplicaEngine | None = None
        self._application: Application | None = None
        self._server: Server | None = None
        self._load_s = 0.0
        self._meter = ReplicaMeter(process_meters(), order.model, order.version)
        self._reporter = reporter.Reporter(self._report)
        self._reporter.start()
        self._listener = Listener()
        try:
            self._open()
        except LoadError as error:
            logger.error("%s can't be served: %s", order.backend, error)
            self._reporter.tell(ReplicaState.FAILED, str(error))
            raise

    def _open(self) -> None:
        """Load, warm up, answer, say so."""
        order = self._order
        runtime = self._runtime()
        signature = self._loaded(runtime)
        self._engine = ReplicaEngine(
            order.model, order.version, order.spec, runtime, signature, self._meter
        )
        if order.spec.probe:
            self._warmed_up(self._engine)
        self._server = self._listener.run(self._serve(self._engine))
        self._load_s = time.monotonic() - self._started_s
        self._meter.loaded(self._load_s)
        self._is_ready = True
        self._reporter.tell(ReplicaState.READY)

    def _runtime(self) -> Runtime | TextRuntime:
        order = self._order
        cache = Path(order.cache)
        registry = Registry(order.registry, order.artifacts, cache)
        weights = sources.fetch(order.spec.source, cache, registry=registry)
        return create(order.model, order.spec, weights)

    def _loaded(self, runtime: Runtime | TextRuntime) -> Signature:
        if isinstance(runtime, TextRuntime):
            return self._listener.run(runtime.start())
        return runtime.load()

    def _warmed_up(self, engine: ReplicaEngine) -> None:
        rows = self._order.spec.batching.batch_size_max
        try:
            self._listener.run(engine.warm_up(rows), WARM_UP_TIMEOUT_S)
        except InferenceError as error:
            raise LoadError(
                f"the model failed on a made-up request: {error.message} "
                "(probe: false in the version skips this)"
            ) from error
        except TimeoutError:
            raise LoadError(f"the warm-up took more than {WARM_UP_TIMEOUT_S:.0f} s") from None

    async def _serve(self, engine: ReplicaEngine) -> Server:
        """Open the doors for `engine`; where they are."""
        order = self._order
        catalog = OwnCatalog(engine, order.spec)
        dialects = (
            OpenInference(catalog, engine),
            TensorFlowServing(catalog, engine),
            OpenAI(catalog, engine),
        )
        self._application = Application(
            catalog,
            engine,
            dialects,
            edge_token=order.edge_token,
            ready=lambda: self._is_ready,
            observe=self._meter.request,
            delegates=_delegates(catalog, engine),
        )
        port = await self._listener.serve_http(self._application, order.host)
        self._grpc, grpc_port = await start_server(
            catalog,
            engine,
            order.host,
            0,
            edge_token=order.edge_token,
            ready=lambda: self._is_ready,
            observe=self._meter.request,
            count=self._application.count,
        )
        return Server(reporter.replica_name(), order.host, port, grpc_port)

    def _report(self, state: ReplicaState, reason: str) -> Report:
        """What the controller is told now."""
        engine = self._engine
        ongoing = self._application.ongoing if self._application else 0
        if engine is not None:
            self._meter.load(ongoing, engine.queued)
        return Report(
            replica=reporter.replica_name(),
            backend=self._order.backend,
            state=state,
            pid=os.getpid(),
            node=reporter.node_id(),
            actor=reporter.actor_id(),
            server=self._server,
            signature=engine.signature if engine else None,
            generates=engine.generates if engine else False,
            ongoing=ongoing,
            queued=engine.queued if engine else 0,
            requests=engine.requests if engine else 0,
            load_s=self._load_s,
            statistics=engine.statistics() if engine else reporter.NO_STATISTICS,
            reason=reason,
        )

    async def check_health(self) -> None:
        """Serve asks: does the model really answer? Work that moves on is proof enough."""
        engine = self._engine
        if engine is None or not self._order.spec.probe or not self._is_ready:
            return
        if engine.ongoing and self._is_working(engine):
            return  # a probe would only queue behind the work
        probe = asyncio.run_coroutine_threadsafe(engine.probe(), self._listener.loop)
        await asyncio.wait_for(asyncio.wrap_future(probe), PROBE_TIMEOUT_S)

    def _is_working(self, engine: ReplicaEngine) -> bool:
        """Whether the work inside has moved on within the time that one request may take."""
        progress, now_s = engine.progress, time.monotonic()
        if progress != self._progress:
            self._progress, self._progress_s = progress, now_s
        limit_s = max(PROBE_TIMEOUT_S, self._order.spec.timeout_ms / 1000)
        return now_s - self._progress_s < limit_s

    async def __del__(self) -> None:
        """Serve stops this replica: leave the edges, finish what is inside, close."""
        if self._application is None:
            return
        deadline_s = time.monotonic() + self._order.drain_timeout_s
        self._is_ready = False
        await asyncio.to_thread(self._reporter.tell, ReplicaState.DRAINING)
        while self._application.ongoing and time.monotonic() < deadline_s:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self._reporter.tell, ReplicaState.GONE)
        self._reporter.stop()
        await asyncio.to_thread(self._closed)

    def _closed(self) -> None:
        """Close the doors and let the runtime give back what it holds."""
        self._listener.run(self._grpc.stop(1), CLOSE_TIMEOUT_S)
        self._listener.run(self._listener.close_http(), CLOSE_TIMEOUT_S)
        if self._engine is not None:
            self._listener.run(self._engine.close(), CLOSE_TIMEOUT_S)
        self._listener.close()


def _delegates(catalog: OwnCatalog, engine: ReplicaEngine) -> dict[str, OwnOpenAI]:
    """What answers OpenAI's routes itself: vLLM's own app, within the engine's bound."""
    if engine.openai_app is None:
        return {}
    app = OwnOpenAI(catalog, engine, engine.openai_app, engine.generation)
    return dict.fromkeys(OPENAI_INFERENCE_PATHS, app)
