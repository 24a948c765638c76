"""Which handler answers a path?

Most requests to a replica are for its own model, whose paths are known when it starts: they are a
dictionary. Everything else (other models, labels, the front desk's many models) goes through the
templates, in the order in which they were given.

    POST /v2/models/fraud/infer ── exact ──────────────► handler, {model: fraud}
    GET  /v2/models/other       ── exact ✗ ── templates ► handler, {model: other}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from deployments.inference import Engine, InferenceError
from deployments.serving.http import Handler, HttpResponse, Route

ErrorForm = Callable[[InferenceError], HttpResponse]


class Target(NamedTuple):
    """What answers a request, the template's values, and how its errors look.

    `protocol` is the name under which requests for it are counted, "" where they are not.
    """

    handler: Handler
    parameters: Mapping[str, str]
    error: ErrorForm
    protocol: str = ""


class RouteGroup(NamedTuple):
    """Routes whose errors look alike; `ignores_case`: /V1/Models is /v1/models."""

    routes: Iterable[Route]
    error: ErrorForm
    ignores_case: bool = False
    protocol: str = ""


Methods = dict[str, Target]


class RouteTable:
    """Routes ready for looking up. Where two claim a path and a method, the first wins."""

    def __init__(self, groups: Iterable[RouteGroup], engine: Engine | None) -> None:
        self._exact: dict[str, Methods] = {}
        self._patterns: list[tuple[re.Pattern[str], Methods]] = []
        groups = [group._replace(routes=list(group.routes)) for group in groups]
        for group in groups:
            self._add_fixed(group)
        for group in groups:
            self._add_templates(group, engine)

    def find(self, path: str) -> Mapping[str, Target]:
        """The targets of a path by method; none when nothing is there."""
        methods = self._exact.get(path)
        if methods is not None:
            return methods
        if len(path) > 1 and path.endswith("/"):
            return self.find(path[:-1])
        found: Methods = {}
        for pattern, candidates in self._patterns:
            match = pattern.fullmatch(path)
            if match is not None:
                values = match.groupdict()
                for method, target in candidates.items():
                    found.setdefault(method, target._replace(parameters=values))
        return found

    def _add_fixed(self, group: RouteGroup) -> None:
        """Paths without parts come first: a model named "stats" does not hide the statistics."""
        for route in group.routes:
            if "{" not in route.template:
                self._add_exact(route.template, route, {}, group)

    def _add_templates(self, group: RouteGroup, engine: Engine | None) -> None:
        for route in group.routes:
            if "{" not in route.template and not group.ignores_case:
                continue
            flags = re.IGNORECASE if group.ignores_case else re.NOFLAG
            pattern = re.compile(_expression(route.template), flags)
            self._patterns.append((pattern, {route.method: _target(route, {}, group)}))
            if engine is None:
                continue
            own = {"model": engine.model, "version": engine.version}
            values = {p: v for p, v in own.items() if f"{{{p}}}" in route.template}
            path = route.template
            for part, value in values.items():
                path = path.replace(f"{{{part}}}", value)
            if "{" not in path:
                self._add_exact(path, route, values, group)

    def _add_exact(
        self, path: str, route: Route, values: Mapping[str, str], group: RouteGroup
    ) -> None:
        target = _target(route, values, group)
        self._exact.setdefault(path, {}).setdefault(route.method, target)


def _target(route: Route, values: Mapping[str, str], group: RouteGroup) -> Target:
    """Only what is posted is counted: reading about models is no work of theirs."""
    protocol = group.protocol if route.method == "POST" else ""
    return Target(route.handler, values, group.error, protocol)


def _expression(template: str) -> str:
    """The regular expression of a template: each `{part}` is one segment."""
    pieces = re.split(r"\{(\w+)\}", template)
    return "".join(
        f"(?P<{piece}>[^/]+)" if place % 2 else re.escape(piece)
        for place, piece in enumerate(pieces)
    )
