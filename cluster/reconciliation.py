"""What must be done so that what runs becomes what is wanted.

    Snapshot + Memory ─ reconcile ─► Step: new Memory, Serve commands, routes, statuses

Pure: no Ray, no clock. The controller performs the commands, routes first, so that a replica is
taken from the edges before it is stopped. Three rules carry it:

- A new version starts beside the old one. Traffic moves only when every version that gains has
  been ready, step by step if the file says so; a version that fails leaves traffic as it was.
- What served stays for the rollback window, unless a new version is short of room.
- A version without requests for `idle_to_zero_s` gives its replicas back; a request wakes it.

It does not choose how many replicas the load needs; that is `autoscaler`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.observation import (
    AppState,
    Memory,
    Revision,
    Shift,
    Snapshot,
    Wanted,
    backend_name,
)
from deployments.edge.routing import ModelRoute, VersionRoute
from deployments.inference import ModelStatus, Statistics, VersionState, VersionStatus
from deployments.model import ModelFile, Rollout, Scaling, Version
from deployments.serving.reports import ReplicaState, Report

IDLE_TO_ZERO_S = 300.0
"""After which a model with `replicas_min: 0` sleeps when it does not say itself."""

ROOM_S = 60.0
"""How long a new version may wait for room before retired ones give theirs."""

Traffic = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Deploy:
    """Start a Serve application for a revision."""

    backend: str
    model: str
    version: str
    spec: Version
    replicas: int


@dataclass(frozen=True, slots=True)
class Scale:
    """Change the count of replicas of a running application."""

    backend: str
    replicas: int


@dataclass(frozen=True, slots=True)
class Delete:
    """Stop an application; its replicas drain."""

    backend: str


Command = Deploy | Scale | Delete


@dataclass(frozen=True, slots=True)
class Step:
    """The outcome of one reconciliation."""

    memory: Memory
    commands: tuple[Command, ...]
    routes: tuple[ModelRoute, ...]
    statuses: tuple[ModelStatus, ...]


def reconcile(snapshot: Snapshot, memory: Memory) -> Step:
    """The next step from what is observed towards what is wanted."""
    revisions = _observed(_known(snapshot, memory), snapshot)
    shifts = {
        name: _shifted(memory.shifts.get(name), name, wanted, revisions, snapshot)
        for name, wanted in snapshot.wanted.items()
    }
    revisions = _retired(revisions, shifts, snapshot)
    counts = _counts(revisions, snapshot)
    kept = {backend: revisions[backend] for backend in counts}
    kept |= {  # remembered for their reason, not run
        backend: revision
        for backend, revision in revisions.items()
        if revision.failed_row is not None and revision.retired_s is None
    }
    return Step(
        memory=Memory(kept, shifts),
        commands=tuple(_commands(kept, counts, snapshot)),
        routes=tuple(_routes(snapshot, shifts, kept)),
        statuses=tuple(_statuses(snapshot, shifts, kept, counts)),
    )


def woken(memory: Memory, backend: str, now_s: float) -> Memory:
    """`memory` after a request has come for a sleeping `backend`."""
    return _with(memory, backend, last_request_s=now_s, is_unloaded=False)


def unloaded(memory: Memory, backend: str) -> Memory:
    """`memory` after somebody asked to give the replicas of `backend` back."""
    return _with(memory, backend, is_unloaded=True)


def _with(memory: Memory, backend: str, **changes: Any) -> Memory:
    revision = memory.revisions.get(backend)
    if revision is None:
        return memory
    return replace(memory, revisions={**memory.revisions, backend: replace(revision, **changes)})


def _backends(wanted: Wanted) -> dict[str, str]:
    """Version name → backend, for the file in force."""
    return {
        name: backend_name(wanted.file.name, name, spec)
        for name, spec in wanted.file.versions.items()
    }


def _known(snapshot: Snapshot, memory: Memory) -> dict[str, Revision]:
    """Every revision to think about: those remembered and those that the files name."""
    revisions = dict(memory.revisions)
    for wanted in snapshot.wanted.values():
        for name, backend in _backends(wanted).items():
            spec = wanted.file.versions[name]
            known = revisions.get(backend)
            if known is None or known.failed_row not in (None, wanted.row):
                revisions[backend] = Revision(wanted.file.name, name, spec, snapshot.now_s)
            elif known.spec != spec or known.retired_s is not None:
                revisions[backend] = replace(known, spec=spec, retired_s=None)
    return revisions


def _observed(revisions: dict[str, Revision], snapshot: Snapshot) -> dict[str, Revision]:
    """The revisions, with what reports and Serve say about them."""
    return {backend: _seen(revision, backend, snapshot) for backend, revision in revisions.items()}


def _seen(revision: Revision, backend: str, snapshot: Snapshot) -> Revision:
    if snapshot.ready(backend) and not revision.was_ready:
        revision = replace(
            revision, was_ready=True, reason="", last_request_s=snapshot.now_s, failed_row=None
        )
    signed = next((r for r in snapshot.of(backend) if r.signature is not None), None)
    if signed is not None and signed.signature != revision.signature:
        revision = replace(revision, signature=signed.signature, generates=signed.generates)
    requests = sum(r.requests for r in snapshot.of(backend))
    is_busy = any(r.ongoing for r in snapshot.of(backend))
    if requests > revision.requests_seen or is_busy:
        revision = replace(revision, last_request_s=snapshot.now_s)
    if requests != revision.requests_seen:
        revision = replace(revision, requests_seen=requests)
    if revision.failed_row is not None:
        return revision
    reason = "" if snapshot.ready(backend) else _failure(backend, snapshot)
    if revision.was_ready:  # it keeps its traffic; why it does not come back is told
        return revision if reason == revision.reason else replace(revision, reason=reason)
    wanted = snapshot.wanted.get(revision.model)
    if reason and wanted:
        return replace(revision, failed_row=wanted.row, reason=reason)
    return revision


def _failure(backend: str, snapshot: Snapshot) -> str:
    """Why a revision can't be had, or nothing; what an ended application said is past."""
    app = snapshot.apps.get(backend)
    if app is None or app.state is AppState.DELETING:
        return ""
    for report in snapshot.of(backend):
        if report.state is ReplicaState.FAILED:
            return report.reason or "the replica failed to load"
    if app.state is AppState.FAILED:
        return app.reason or "Serve could not start a replica"
    return ""


# traffic


def _shifted(
    shift: Shift | None,
    name: str,
    wanted: Wanted,
    revisions: Mapping[str, Revision],
    snapshot: Snapshot,
) -> Shift:
    """Where the model's traffic stands after this moment."""
    backends = _backends(wanted)
    target = {backends[v]: percent for v, percent in wanted.file.traffic.items() if percent}
    if shift is None or shift.row != wanted.row:
        base = {b: p for b, p in (shift.effective if shift else {}).items() if b in revisions}
        shift = Shift(row=wanted.row, base=base, effective=base)
    if shift.is_done:
        return replace(shift, effective=target)
    if not shift.base:
        return _first_traffic(shift, target, revisions)
    rollout = Rollout() if wanted.at_once else wanted.file.rollout
    return _moved(shift, target, revisions, rollout, snapshot)


def _first_traffic(shift: Shift, target: Traffic, revisions: Mapping[str, Revision]) -> Shift:
    """Nothing served before: whichever versions are ready share the traffic."""
    servable = {b: p for b, p in target.items() if revisions[b].was_ready}
    total = sum(servable.values())
    shares = _whole({b: p * 100 / total for b, p in servable.items()}) if total else {}
    return replace(shift, effective=shares, is_done=shares == dict(target))


def _moved(
    shift: Shift,
    target: Traffic,
    revisions: Mapping[str, Revision],
    rollout: Rollout,
    snapshot: Snapshot,
) -> Shift:
    """One look at a move from `shift.base` to `target`."""
    gaining = [b for b, percent in target.items() if percent > shift.base.get(b, 0)]
    failed = [b for b in gaining if revisions[b].failed_row is not None]
    if failed:
        revision = revisions[failed[0]]
        return _halted(shift, f"version {revision.version} failed: {revision.reason}")
    if shift.halted or not all(revisions[b].was_ready for b in gaining):
        return replace(shift, effective=shift.base)
    lost = [b for b in gaining if shift.step and not _is_alive(revisions[b], snapshot)]
    if lost:
        return _halted(shift, f"version {revisions[lost[0]].version} lost its replicas")
    return _stepped(shift, target, rollout, snapshot.now_s)


def _is_alive(revision: Revision, snapshot: Snapshot) -> bool:
    """Whether a revision answers, or sleeps on purpose."""
    app = snapshot.apps.get(revision.backend)
    return bool(snapshot.ready(revision.backend)) or (app is not None and app.replicas == 0)


def _halted(shift: Shift, reason: str) -> Shift:
    return replace(shift, effective=shift.base, halted=reason)


def _stepped(shift: Shift, target: Traffic, rollout: Rollout, now_s: float) -> Shift:
    percents = [*(p for p in rollout.steps if p < 100), 100]
    if shift.step == 0:
        shift = replace(shift, step=1, step_since_s=now_s)
    elif now_s - shift.step_since_s >= rollout.interval_s and shift.step < len(percents):
        shift = replace(shift, step=shift.step + 1, step_since_s=now_s)
    share = percents[min(shift.step, len(percents)) - 1] / 100
    mixed = {
        b: (1 - share) * shift.base.get(b, 0) + share * target.get(b, 0)
        for b in {**shift.base, **target}
    }
    return replace(shift, effective=_whole(mixed), is_done=share == 1)


def _whole(shares: Mapping[str, float]) -> dict[str, int]:
    """Shares that add up to 100 as whole percents that do (largest remainder), no zeros."""
    floors = {name: int(share) for name, share in shares.items()}
    rest = 100 - sum(floors.values())
    by_remainder = sorted(shares, key=lambda n: (floors[n] - shares[n], n))
    for name in by_remainder[:rest]:
        floors[name] += 1
    return {name: percent for name, percent in floors.items() if percent}


# what runs


def _retired(
    revisions: dict[str, Revision], shifts: Mapping[str, Shift], snapshot: Snapshot
) -> dict[str, Revision]:
    """Mark who carries traffic, and since when the others are not wanted."""
    named = {b for wanted in snapshot.wanted.values() for b in _backends(wanted).values()}
    serving = {b for shift in shifts.values() for b in shift.effective}
    return {
        backend: _placed(revision, backend in named, backend in serving, snapshot.now_s)
        for backend, revision in revisions.items()
    }


def _placed(revision: Revision, is_named: bool, is_serving: bool, now_s: float) -> Revision:
    if is_serving and not revision.had_traffic:
        revision = replace(revision, had_traffic=True)
    is_wanted = is_named or is_serving
    if is_wanted != (revision.retired_s is None):
        return replace(revision, retired_s=None if is_wanted else now_s)
    return revision


def _counts(revisions: Mapping[str, Revision], snapshot: Snapshot) -> dict[str, int]:
    """How many replicas each revision that is kept should have."""
    needs_room = any(
        r.retired_s is None and _waits_for_room(r, snapshot) for r in revisions.values()
    )
    counts = {}
    for backend, revision in revisions.items():
        wanted = snapshot.wanted.get(revision.model)
        if wanted is None or revision.failed_row is not None:
            continue
        if revision.retired_s is not None:
            age_s = snapshot.now_s - revision.retired_s
            is_kept = revision.had_traffic and age_s < wanted.file.rollout.rollback_window_s
            if not is_kept or needs_room:
                continue
        counts[backend] = _count(revision, wanted.file.scaling, snapshot.now_s)
    return counts


def _waits_for_room(revision: Revision, snapshot: Snapshot) -> bool:
    """Whether no replica of a new revision has even begun to load for a while."""
    is_new = not (revision.was_ready or revision.is_unloaded or revision.failed_row is not None)
    return (
        is_new
        and snapshot.now_s - revision.created_s > ROOM_S
        and not snapshot.of(revision.backend)
    )


def _count(revision: Revision, scaling: Scaling, now_s: float) -> int:
    if revision.is_unloaded:
        return 0
    idle_s = scaling.idle_to_zero_s
    if idle_s is None and scaling.replicas_min == 0:
        idle_s = IDLE_TO_ZERO_S
    if idle_s is not None and revision.was_ready and now_s - revision.last_request_s > idle_s:
        return 0
    return max(1, scaling.replicas_min)


def _commands(
    revisions: Mapping[str, Revision], counts: Mapping[str, int], snapshot: Snapshot
) -> list[Command]:
    commands: list[Command] = []
    for backend, count in counts.items():
        revision, app = revisions[backend], snapshot.apps.get(backend)
        if app is None:
            commands.append(Deploy(backend, revision.model, revision.version, revision.spec, count))
        elif app.state is not AppState.DELETING and app.replicas != count:
            commands.append(Scale(backend, count))
    for backend, app in snapshot.apps.items():
        if backend not in counts and app.state is not AppState.DELETING:
            commands.append(Delete(backend))
    return commands


# what edges and people see


def _routes(
    snapshot: Snapshot, shifts: Mapping[str, Shift], revisions: Mapping[str, Revision]
) -> list[ModelRoute]:
    return [
        _route(wanted, shifts[name], revisions, snapshot)
        for name, wanted in sorted(snapshot.wanted.items())
    ]


def _route(
    wanted: Wanted, shift: Shift, revisions: Mapping[str, Revision], snapshot: Snapshot
) -> ModelRoute:
    """The model's routes: under a version's name stands the revision that answers for it."""
    file, backends = wanted.file, _backends(wanted)
    target = {backends[v]: p for v, p in file.traffic.items() if p}
    split = dict(shift.effective or target)
    answering = {
        revisions[b].version: b for b in split if b in revisions and revisions[b].was_ready
    }
    named = {**backends}
    for version, backend in answering.items():
        if version in named and not _answers(revisions.get(named[version])):
            named[version] = backend  # the old spec answers until the new one can
    extra = [b for b in split if b not in named.values() and b in revisions]
    routes = [
        _version_route(file, version, backend, revisions, snapshot)
        for version, backend in named.items()
    ]
    routes += [
        _version_route(file, f"{revisions[b].version}-{b[-8:]}", b, revisions, snapshot)
        for b in extra
    ]
    by_backend = {route.backend: route.version for route in routes}
    return ModelRoute(
        name=file.name,
        versions=tuple(routes),
        split={by_backend[b]: p for b, p in split.items()},
        sticky_header=file.sticky_header,
    )


def _answers(revision: Revision | None) -> bool:
    return revision is not None and revision.was_ready


def _version_route(
    file: ModelFile,
    version: str,
    backend: str,
    revisions: Mapping[str, Revision],
    snapshot: Snapshot,
) -> VersionRoute:
    known = revisions.get(backend)
    spec = known.spec if known else file.versions[version]
    in_file = file.versions.get(version)
    servers = [r.server for r in snapshot.ready(backend) if r.server is not None]
    return VersionRoute(
        version=version,
        backend=backend,
        servers=tuple(sorted(servers, key=lambda s: s.name)),
        labels=in_file.labels if in_file else (),
        timeout_ms=spec.timeout_ms,
        idempotent=spec.idempotent,
    )


def _statuses(
    snapshot: Snapshot,
    shifts: Mapping[str, Shift],
    revisions: Mapping[str, Revision],
    counts: Mapping[str, int],
) -> list[ModelStatus]:
    return [
        ModelStatus(
            name,
            tuple(
                _status(
                    wanted.file.versions[version],
                    version,
                    revisions.get(backend),
                    _share(version, shifts[name], revisions),
                    snapshot.of(backend),
                    counts.get(backend),
                )
                for version, backend in _backends(wanted).items()
            ),
        )
        for name, wanted in sorted(snapshot.wanted.items())
    ]


def _share(version: str, shift: Shift, revisions: Mapping[str, Revision]) -> int:
    """The percent of traffic that a version has now, whatever its revision."""
    return sum(p for b, p in shift.effective.items() if revisions[b].version == version)


def _status(
    spec: Version,
    version: str,
    revision: Revision | None,
    percent: int,
    reports: Sequence[Report],
    count: int | None,
) -> VersionStatus:
    ready = any(r.state is ReplicaState.READY for r in reports)
    return VersionStatus(
        version=version,
        state=_state(revision, ready, count),
        signature=revision.signature if revision else None,
        reason=revision.reason if revision else "",
        created_s=int(revision.created_s) if revision else 0,
        labels=spec.labels,
        percent=percent,
        generates=revision.generates if revision else False,
        batch_size_max=spec.batching.batch_size_max,
        statistics=_summed([r.statistics for r in reports]),
    )


def _state(revision: Revision | None, is_ready: bool, count: int | None) -> VersionState:
    if revision is not None and revision.failed_row is not None:
        return VersionState.FAILED
    if revision is not None and revision.was_ready and count == 0:
        return VersionState.IDLE
    return VersionState.READY if is_ready else VersionState.STARTING


def _summed(parts: list[Statistics]) -> Statistics:
    """The statistics of several replicas as those of one."""
    names = [
        n for n in Statistics.__dataclass_fields__ if n not in ("batches", "last_inference_ms")
    ]
    sums = {n: sum(getattr(p, n) for p in parts) for n in names}
    batches: dict[int, tuple[int, int]] = {}
    for size, count, spent_ns in (b for p in parts for b in p.batches):
        before = batches.get(size, (0, 0))
        batches[size] = (before[0] + count, before[1] + spent_ns)
    return Statistics(
        **sums,
        last_inference_ms=max((p.last_inference_ms for p in parts), default=0),
        batches=tuple((size, *both) for size, both in sorted(batches.items())),
    )
