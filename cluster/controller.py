"""The only loop: what runs is compared with what is wanted, and the difference is made.

    reports, Serve's list, store ─ observe ─► Snapshot ─ reconcile ─► Step
                                        ▲                              │
                                        └──── edges, Serve, desks ◄────┘ perform

One detached actor on the head, restarted for ever; what it must remember is in the store. Edges
and replicas go on answering while it is away. A step that fails keeps what was decided before,
counts it, says so, and is tried again. It decides nothing itself (`reconciliation` does), and no
request ever passes through it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
from pydantic import TypeAdapter, ValidationError

from cluster import reconciliation
from cluster.access import keys as access_keys
from cluster.administration import Administration, Arguments, Refused, Reply
from cluster.config import Settings
from cluster.logs import replica_logs
from cluster.nodes.edge import EdgeAgent
from cluster.observation import App, Memory, Snapshot, Wanted
from cluster.serve import ServeApps, metrics_folder
from cluster.store import Entry, Store
from dashboards import metrics
from deployments.edge.routing import Routing
from deployments.inference import Fault
from deployments.model import ModelFileError, parse_model_file
from deployments.serving.holding import View
from deployments.serving.meter import process_meters
from deployments.serving.reports import CONTROLLER, DESK, NAMESPACE, ReplicaState, Report

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
SILENT_S = 8.0
"""After which a replica that says nothing is knocked at."""
KNOCK_TIMEOUT_S = 2.0
VIEW_WAIT_S = 5.0
SERVE_TIMEOUT_S = 120.0
START_ATTEMPTS = 3
REPORTS_S = 2.5 * PERIOD_S
LOAD_TIMEOUT_S = 25.0
ACTORS_MAX = 4
"""Replicas of each backend whose logs can be asked for after they ended."""

Result = TypeVar("Result")
_MEMORY = TypeAdapter(Memory)


@dataclass(frozen=True, slots=True)
class Heard:
    """The newest report of a replica, and when it came (monotonic seconds)."""

    report: Report
    at_s: float


class Controller:
    """The actor. `start` brings the cluster's parts up; everything else may come at any time."""

    def __init__(self, settings: Settings, edge_token: str) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        self._settings = settings
        self._store = Store(settings.store_url)
        self._administration = Administration(self._store, time.time)
        self._serve = ServeApps(settings, edge_token)
        self._serve_thread = ThreadPoolExecutor(1, thread_name_prefix="serve")
        self._edge = EdgeAgent.of(settings, edge_token)
        self._memory = self._remembered()
        self._heard: dict[str, Heard] = {}
        self._targets: dict[str, int] = {}
        self._read: dict[str, Wanted] = {}
        self._unreadable: AbstractSet[str] = frozenset()
        self._actors: dict[str, deque[Report]] = {}
        self._routing: Routing | None = None
        self._view = View(0)
        self._last: reconciliation.Step | None = None
        self._failures: dict[str, str] = {}
        self._meters = process_meters()
        self._counted: dict[tuple[str, str, str], int] = {}
        self._look = asyncio.Event()
        self._began = self._ended = 0
        self._step_ended = asyncio.Event()
        self._view_changed = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when the edge answers and the front desk stands behind it.

        Raises `RuntimeError` with the reason when the first steps fail.
        """
        self._begin()
        failed = 0
        while not (self._routing and self._routing.desks):
            await self._next_step()
            failed = failed + 1 if "step" in self._failures else 0
            if failed >= START_ATTEMPTS:
                raise RuntimeError(self._failures["step"])

    async def report(self, report: Report) -> None:
        """A replica's word. A change of state is answered when it has been acted on."""
        self._begin()
        before = self._heard.get(report.replica)
        if report.state is ReplicaState.GONE:
            self._heard.pop(report.replica, None)
        else:
            self._heard[report.replica] = Heard(report, time.monotonic())
        if before is None or _differ(before.report, report):
            self._recent(report)
        if before is None or _differ(before.report, report):
            self._look.set()
            await self._next_step()

    def _recent(self, report: Report) -> None:
        """Keep who ran a backend lately, so that its logs can be asked for when it is gone."""
        recent = self._actors.setdefault(report.backend, deque(maxlen=ACTORS_MAX))
        for known in recent:
            if known.replica == report.replica:
                recent.remove(known)
                break
        recent.append(report)

    async def view(self, known: int) -> View:
        """The front desks' view, as soon as it is another one than number `known`."""
        self._begin()
        deadline_s = time.monotonic() + VIEW_WAIT_S
        while self._view.number in (0, known) and time.monotonic() < deadline_s:
            changed = self._view_changed
            try:
                await asyncio.wait_for(changed.wait(), deadline_s - time.monotonic())
            except TimeoutError:
                break
        return self._view

    async def wake(self, backend: str) -> None:
        """A request has come for a backend without replicas."""
        self._begin()
        revision = self._memory.revisions.get(backend)
        if revision is None:
            return
        age_s = time.time() - revision.last_request_s
        self._memory = reconciliation.woken(self._memory, backend, time.time())
        if revision.is_unloaded or age_s > PERIOD_S:
            self._look.set()

    async def administer(self, action: str, arguments: Arguments, actor: str) -> Reply:
        """An operator's action; faults come back as values."""
        self._begin()
        try:
            handler = getattr(self, f"_do_{action}", None)
            if handler is not None:
                return Reply(await handler(arguments))
            value = getattr(self._administration, action)(arguments, actor)
        except Refused as refused:
            return Reply(fault=refused.fault.value, message=refused.message)
        self._look.set()
        return Reply(value)

    # the loop

    def _begin(self) -> None:
        if self._loop is None or self._loop.done():
            self._loop = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        meters = self._meters
        steps = meters.counter(metrics.CONTROLLER_STEPS)
        step_failures = meters.counter(metrics.CONTROLLER_STEP_FAILURES)
        step_seconds = meters.histogram(metrics.CONTROLLER_STEP_SECONDS)
        while True:
            self._look.clear()
            self._began += 1
            start_s = time.monotonic()
            try:
                await self._step()
                self._failures.pop("step", None)
            except Exception as error:
                logger.exception("a step failed; what was decided before stays")
                self._failures["step"] = f"{type(error).__name__}: {error}"
                step_failures.inc()
            steps.inc()
            step_seconds.observe(time.monotonic() - start_s)
            self._ended = self._began
            self._step_ended.set()
            self._step_ended = asyncio.Event()
            try:
                await asyncio.wait_for(self._look.wait(), PERIOD_S)
            except TimeoutError:
                continue

    async def _next_step(self) -> None:
        """Wait for the end of a step that began after now."""
        wanted = self._began + 1
        while self._ended < wanted:
            await self._step_ended.wait()

    async def _step(self) -> None:
        await self._in_serve(self._serve.start)
        apps = await self._in_serve(self._serve.list)
        if self._began == 1 and apps:
            await asyncio.sleep(REPORTS_S)  # came back: every replica reports within this time
        await self._forget_silent()
        snapshot = self._observed(apps)
        step = reconciliation.reconcile(snapshot, self._memory)
        await self._keep(step.memory)
        self._last = step
        self._count_replicas()
        await self._route(step)
        self._show(step)
        for command in step.commands:
            if not self._spared(command):
                await self._perform(command)

    def _spared(self, command: reconciliation.Command) -> bool:
        """Whether a command would end a model only because its document can't be read."""
        model = command.backend.split("--")[0]
        return isinstance(command, reconciliation.Delete) and model in self._unreadable

    def _observed(self, apps: Mapping[str, App]) -> Snapshot:
        wanted = self._wanted()
        known = {
            backend: replace(app, replicas=self._targets.get(backend, -1))
            for backend, app in apps.items()
        }
        reports = tuple(h.report for h in self._heard.values() if h.report.backend != DESK)
        return Snapshot(time.time(), wanted, known, reports)

    def _wanted(self) -> dict[str, Wanted]:
        """The models as wanted. One whose document can't be read any more stays as it was."""
        entries = self._store.in_force()
        kept = {}
        for name, entry in entries.items():
            known = self._read.get(name)
            if known is None or known.row != entry.id:
                try:
                    file = parse_model_file(entry.document, name)
                except ModelFileError as error:
                    self._failures[name] = str(error)
                    if known is None:
                        continue
                else:
                    known = Wanted(file, entry.id, at_once=entry.action == "rollback")
                    self._failures.pop(name, None)
            kept[name] = known
        self._read = kept
        self._unreadable = entries.keys() - kept.keys()
        return kept

    async def _forget_silent(self) -> None:
        """Drop replicas that say nothing and don't answer at their own door either."""
        before_s = time.monotonic() - SILENT_S
        silent = [heard.report for heard in self._heard.values() if heard.at_s < before_s]
        answers = await asyncio.gather(*(_answers(report) for report in silent))
        for report, is_there in zip(silent, answers, strict=True):
            if not is_there:
                logger.warning("replica %s of %s is gone", report.replica, report.backend)
                self._heard.pop(report.replica, None)

    async def _keep(self, memory: Memory) -> None:
        if memory != self._memory:
            self._memory = memory
            kept = _MEMORY.dump_python(memory, mode="json")
            await asyncio.to_thread(self._store.remember, "memory", kept)

    def _remembered(self) -> Memory:
        """The memory of the controller before this one; an empty one if it can't be read."""
        kept = self._store.recall("memory")
        try:
            return _MEMORY.validate_python(kept) if kept else Memory()
        except ValidationError:
            logger.exception("the memory in the store is of another form; beginning anew")
            return Memory()

    def _count_replicas(self) -> None:
        """Report the replicas by state; a count that is gone is zero."""
        counts = dict.fromkeys(self._counted, 0)
        for heard in self._heard.values():
            report = heard.report
            if report.backend != DESK:
                model, version, _ = report.backend.split("--")
                key = (model, version, report.state.value)
                counts[key] = counts.get(key, 0) + 1
        for (model, version, state), count in counts.items():
            gauge = self._meters.gauge(metrics.REPLICAS, model=model, version=version, state=state)
            gauge.set(count)
        self._counted = {key: count for key, count in counts.items() if count}

    async def _route(self, step: reconciliation.Step) -> None:
        """Tell the edges, if anything is new to them."""
        desks = [h.report.server for h in self._heard.values() if _is_open_desk(h.report)]
        now_s = time.time()
        routing = Routing(
            models=step.routes,
            keys=access_keys.routes(self._store.all_keys(), self._store.key_hashes(), now_s),
            desks=tuple(sorted((d for d in desks if d), key=lambda d: d.name)),
            needs_key=self._settings.needs_key,
        )
        applied = await self._edge.apply.remote(routing)
        if applied.error:
            self._failures["edge"] = applied.error
            raise RuntimeError(f"the edge refused the routes: {applied.error}")
        self._failures.pop("edge", None)
        self._routing = routing

    def _show(self, step: reconciliation.Step) -> None:
        """Give the front desks a new view, if it is one."""
        if self._view.number and (self._view.models, self._view.routes) == (
            step.statuses,
            step.routes,
        ):
            return
        self._view = View(self._view.number + 1 or 1, step.statuses, step.routes)
        if self._view.number == 1:
            self._view = replace(self._view, number=time.time_ns())  # never one seen before
        self._view_changed.set()
        self._view_changed = asyncio.Event()

    async def _perform(self, command: reconciliation.Command) -> None:
        backend = command.backend
        try:
            await self._in_serve(self._serve.perform, command)
        except Exception as error:
            logger.exception("%s failed", command)
            self._failures[backend] = f"{type(error).__name__}: {error}"
            return
        self._failures.pop(backend, None)
        if isinstance(command, reconciliation.Delete):
            self._targets.pop(backend, None)
        else:
            self._targets[backend] = command.replicas
        if isinstance(command, reconciliation.Deploy):
            self._forget_failed(backend)

    def _forget_failed(self, backend: str) -> None:
        """What replicas of an attempt before said is past."""
        for name, heard in list(self._heard.items()):
            if heard.report.backend == backend and heard.report.state is ReplicaState.FAILED:
                del self._heard[name]

    async def _in_serve(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Do `work` in the one thread that talks to Serve."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._serve_thread, lambda: work(*arguments))
        return await asyncio.wait_for(future, SERVE_TIMEOUT_S)

    # actions that need more than the store

    async def _do_status(self, arguments: Arguments) -> Any:
        entries = self._store.in_force()
        models = [self._model(entry) for _, entry in sorted(entries.items())]
        desks = [h.report for h in self._heard.values() if h.report.backend == DESK]
        return {
            "models": models,
            "desks": [_replica(r) for r in desks],
            "leaving": [_replica(r) for r in self._leaving(entries.keys())],
            "nodes": [_node(n) for n in await asyncio.to_thread(ray.nodes)],
            "edge": await self._edge.status.remote(),
            "controller": {"steps": self._ended, "failures": dict(self._failures)},
        }

    async def _do_models(self, arguments: Arguments) -> Any:
        return [self._model(entry) for _, entry in sorted(self._store.in_force().items())]

    async def _do_model(self, arguments: Arguments) -> Any:
        name = str(arguments.get("name"))
        self._administration.file(name)
        return self._model(self._store.in_force()[name])

    async def _do_logs(self, arguments: Arguments) -> Any:
        name = str(arguments.get("name"))
        self._administration.file(name)
        try:
            lines = int(arguments.get("lines", 200))
        except ValueError:
            lines = 0
        if not 1 <= lines <= 100_000:
            raise Refused(Fault.INVALID, "lines must be a whole number from 1 to 100000")
        prefix = f"{name}--{version}--" if (version := arguments.get("version")) else f"{name}--"
        chosen = [r for b, recent in self._actors.items() if b.startswith(prefix) for r in recent]
        printed = await asyncio.gather(
            *(asyncio.to_thread(replica_logs, r.actor, lines) for r in chosen)
        )
        return {
            "reasons": self._reasons(name),
            "replicas": [
                {**_replica(r), "lines": text} for r, text in zip(chosen, printed, strict=True)
            ],
        }

    async def _do_load(self, arguments: Arguments) -> Any:
        name = str(arguments.get("name"))
        backends = await self._switch(name, is_off=False)
        deadline_s = time.monotonic() + LOAD_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if reasons := self._reasons(name):
                raise Refused(Fault.UNAVAILABLE, f"model {name!r} can't be loaded: {reasons}")
            ready = {h.report.backend for h in self._heard.values() if _is_ready(h.report)}
            if backends <= ready:
                break
            await self._next_step()
        return {"model": name}

    async def _do_unload(self, arguments: Arguments) -> Any:
        name = str(arguments.get("name"))
        await self._switch(name, is_off=True)
        return {"model": name}

    async def _switch(self, name: str, *, is_off: bool) -> set[str]:
        """Unload all versions of a model, or wake them; their backends."""
        self._administration.file(name)
        revisions = self._memory.revisions
        backends = {b for b, r in revisions.items() if r.model == name and r.retired_s is None}
        for backend in backends:
            if is_off:
                self._memory = reconciliation.unloaded(self._memory, backend)
            else:
                self._memory = reconciliation.woken(self._memory, backend, time.time())
        self._look.set()
        await self._next_step()
        return backends

    def _reasons(self, name: str) -> dict[str, str]:
        revisions = self._memory.revisions.values()
        return {r.version: r.reason for r in revisions if r.model == name and r.reason}

    def _leaving(self, models: AbstractSet[str]) -> list[Report]:
        """The replicas of models that are deleted and have not ended yet."""
        reports = [h.report for h in self._heard.values() if h.report.backend != DESK]
        return [r for r in reports if r.backend.split("--")[0] not in models]

    def _model(self, entry: Entry) -> dict[str, Any]:
        """A model as operators see it."""
        name = entry.model
        shift = self._memory.shifts.get(name)
        status = next(
            (s for s in (self._last.statuses if self._last else ()) if s.name == name), None
        )
        reports = [h.report for h in self._heard.values() if _is_of(h.report, name)]
        is_current = shift is not None and shift.row == entry.id
        return {
            "name": name,
            "row": entry.id,
            "is_seen": is_current,
            "is_settled": bool(shift and is_current and (shift.is_done or shift.halted)),
            "halted": shift.halted if shift and is_current else "",
            "problem": self._failures.get("step", ""),
            "traffic": dict(shift.effective) if shift else {},
            "wanted_traffic": (entry.document or {}).get("traffic", {}),
            "versions": [
                {
                    "version": v.version,
                    "state": v.state.value,
                    "percent": v.percent,
                    "reason": v.reason or self._problem(name, v.version),
                    "labels": list(v.labels),
                    "requests": v.statistics.success_count,
                }
                for v in (status.versions if status else ())
            ],
            "replicas": [_replica(r) for r in reports],
        }

    def _problem(self, name: str, version: str) -> str:
        """Why a version is late, if a command for it failed."""
        prefix = f"{name}--{version}--"
        return next((text for b, text in self._failures.items() if b.startswith(prefix)), "")


async def _answers(report: Report) -> bool:
    """Whether somebody is at the replica's door; one that is slow to open counts as there."""
    if report.server is None:
        return False
    try:
        opening = asyncio.open_connection(report.server.host, report.server.port)
        _, writer = await asyncio.wait_for(opening, KNOCK_TIMEOUT_S)
    except TimeoutError:
        return True
    except OSError:
        return False
    writer.close()
    return True


def _differ(before: Report, now: Report) -> bool:
    return (before.state, before.server) != (now.state, now.server)


def _is_open_desk(report: Report) -> bool:
    return report.backend == DESK and report.state is ReplicaState.READY


def _is_ready(report: Report) -> bool:
    return report.state is ReplicaState.READY


def _is_of(report: Report, model: str) -> bool:
    return report.backend.startswith(f"{model}--")


def _replica(report: Report) -> dict[str, Any]:
    return {
        "replica": report.replica,
        "backend": report.backend,
        "state": report.state.value,
        "pid": report.pid,
        "node": report.node,
        "host": report.server.host if report.server else None,
        "port": report.server.port if report.server else None,
        "grpc_port": report.server.grpc_port if report.server else None,
        "ongoing": report.ongoing,
        "queued": report.queued,
        "requests": report.requests,
        "load_s": round(report.load_s, 2),
        "reason": report.reason,
    }


def _node(node: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "node": node["NodeID"],
        "address": node["NodeManagerAddress"],
        "is_alive": node["Alive"],
        "resources": {k: v for k, v in node["Resources"].items() if k in ("CPU", "GPU", "memory")},
        "labels": dict(node.get("Labels", {})),
    }


def create(settings: Settings, edge_token: str) -> Any:
    """The controller's actor handle; it is made if it is not there yet."""
    actor = ray.remote(Controller).options(
        name=CONTROLLER,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=1000,
        num_cpus=0,
        runtime_env={"env_vars": {"PROMETHEUS_MULTIPROC_DIR": str(metrics_folder(settings))}},
    )
    return actor.remote(settings, edge_token)
