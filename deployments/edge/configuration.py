"""Which HAProxy configuration fits a `Routing`, and how does one become the next?

    Routing + EdgeSettings ─ render ─► Configuration     haproxy.cfg, maps, servers by backend
    Configuration, Configuration ─ changes ─► Reload | commands for the runtime socket

What changes often (split, labels, keys, limits, replicas) lives in maps and server lines, which
HAProxy takes while it runs; what changes seldom (versions, desks, sticky headers) is structure and
needs a reload. One request goes through the frontend like this:

    protocol ─ key ─ limits ─ (body) ─ model, version ─ may this key? ─ backend ─ headers ─► replica
                                                                 └─ none known ─► desk

A version has two backends, `fraud--4--1a2b3c4d` and `fraud--4--1a2b3c4d.grpc`, as its replicas have
two ports; the front desk is the backup server in each, so a version without a live replica is held
there. The weighted split is a map of 100 slots a model: percent are exact and a sticky caller is a
slot by hash.

Pure text from plain values: files, processes and sockets are `process`'s matter.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from deployments.edge import errors
from deployments.edge.routing import (
    EdgeSettings,
    KeyRoute,
    Listener,
    ModelRoute,
    Routing,
    Server,
    VersionRoute,
)

CURRENT = "current"
"""The folder of all that is written, relative to the one in which HAProxy runs."""

FILE = f"{CURRENT}/haproxy.cfg"
MAPS = f"{CURRENT}/maps"
CERTIFICATE = f"{CURRENT}/certificate.pem"
SOCKET = "edge.sock"
PEERS = "peers.sock"

DESKS = ("desk", "desk.grpc")
BACKUP = "desk-"
"""The desks' backends, and how their names begin where they are a version's backup servers."""

Entries = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Configuration:
    """What HAProxy is to run: `text` has the servers in it, `skeleton` has not.

    `maps`: entries by file name. `servers`: arguments of the server line by (backend, name).
    """

    text: str
    skeleton: str
    maps: Mapping[str, Entries]
    servers: Mapping[tuple[str, str], str]


@dataclass(frozen=True, slots=True)
class SetMap:
    """Replace all entries of a map at once: no reader sees half of them."""

    name: str
    entries: Entries


@dataclass(frozen=True, slots=True)
class AddServer:
    """A replica begins to take requests."""

    backend: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class RemoveServer:
    """A replica gets no more requests; those in flight on it end in peace."""

    backend: str
    name: str


RuntimeCommand = SetMap | AddServer | RemoveServer


@dataclass(frozen=True, slots=True)
class Reload:
    """A new process must take over, because of this part of the configuration."""

    because: str


class RoutingError(ValueError):
    """A routing that can't be rendered: the message has the field, its value and what is right."""


def changes(old: Configuration, new: Configuration) -> Reload | list[RuntimeCommand]:
    """What turns a HAProxy that runs `old` into one that runs `new`.

    Additions come first, then maps, then removals: a request that a map sends on finds its server.
    """
    if old.skeleton != new.skeleton:
        return Reload(_first_difference(old.skeleton, new.skeleton))
    moved = [key for key, line in new.servers.items() if old.servers.get(key, line) != line]
    if moved:
        return Reload(f"server {moved[0][0]}/{moved[0][1]} has another address")
    return [
        *(AddServer(*key, new.servers[key]) for key in new.servers if key not in old.servers),
        *(SetMap(m, entries) for m, entries in new.maps.items() if old.maps.get(m) != entries),
        *(RemoveServer(*key) for key in old.servers if key not in new.servers),
    ]


def render(routing: Routing, settings: EdgeSettings) -> Configuration:
    """The configuration for `routing`. Raises `RoutingError`."""
    _check(routing, settings)
    servers = dict(_servers(routing))
    return Configuration(
        text=_text(routing, settings, servers),
        skeleton=_text(routing, settings, {}),
        maps=_maps(routing),
        servers=servers,
    )


def _first_difference(old: str, new: str) -> str:
    known = set(old.splitlines())
    added = next((line for line in new.splitlines() if line not in known), None)
    if added is None:
        kept = set(new.splitlines())
        gone = next((line for line in old.splitlines() if line not in kept), "order of lines")
        return f"no more: {gone.strip()}"
    return added.strip()


# --- checks -------------------------------------------------------------------------------------

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?")
_HEADER = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,63}")
_HOST = re.compile(r"[A-Za-z0-9.:-]{1,253}")
_HASH = re.compile(r"[0-9a-fA-F]{64}")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{1,256}")
_OWN_NAMES = frozenset({"edge", *DESKS, "metrics", "limits", "events"})


def _match(what: str, value: str, form: re.Pattern[str], right: str) -> None:
    if not form.fullmatch(value):
        raise RoutingError(f"{what} {value!r} must be {right}")


def _name(what: str, value: str) -> None:
    right = "1 to 128 letters, digits, '.', '_' or '-', with a letter or digit at both ends"
    _match(what, value, _NAME, right)


def _distinct(what: str, values: Iterable[str]) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise RoutingError(f"{what} {value!r} occurs twice; it must be unique")
        seen.add(value)


def _check(routing: Routing, settings: EdgeSettings) -> None:
    _match("token", settings.token, _TOKEN, "1 to 256 letters, digits or ._~+/=-")
    for listener in _listeners(settings).values():
        _match("listener host", listener.host, _HOST, "an address or a host name")
    if settings.https and settings.tls_pem is None:
        raise RoutingError("https is set but tls_pem is None; it must name certificate and key")
    _distinct("model", (m.name for m in routing.models))
    _distinct("key id", (k.id for k in routing.keys))
    _distinct("key hash", (h.lower() for k in routing.keys for h in k.hashes))
    versions = [v for m in routing.models for v in m.versions]
    _distinct("backend", [*(v.backend for v in versions), *_OWN_NAMES])
    _distinct("server", [s.name for v in versions for s in v.servers])
    _distinct("desk", [s.name for s in routing.desks])
    for server in routing.desks:
        _check_server(server)
    for model in routing.models:
        _check_model(model)
    for key in routing.keys:
        _check_key(key)


def _check_server(server: Server) -> None:
    _name("server", server.name)
    try:
        ipaddress.ip_address(server.host)
    except ValueError:
        raise RoutingError(
            f"host of server {server.name!r} is {server.host!r}; it must be an IP address"
        ) from None
    for port in (server.port, server.grpc_port):
        if port is not None and not 0 < port < 65536:
            raise RoutingError(f"port of server {server.name!r} is {port}; it must be 1 to 65535")


def _check_model(model: ModelRoute) -> None:
    _name("model", model.name)
    if model.sticky_header is not None:
        right = "a letter, then up to 63 letters, digits or '-'"
        _match(f"sticky_header of model {model.name!r}", model.sticky_header, _HEADER, right)
    names = [v.version for v in model.versions]
    _distinct(f"version of model {model.name!r}", names)
    _distinct(f"label of model {model.name!r}", (x for v in model.versions for x in v.labels))
    for version in model.versions:
        _check_version(version)
    for name, percent in model.split.items():
        if name not in names:
            raise RoutingError(f"split of model {model.name!r} names {name!r}; it has {names}")
        if percent < 0:
            raise RoutingError(f"split of model {model.name!r} has {percent} for {name!r}; min. 0")
    total = sum(model.split.values())
    if total != 100 and model.versions:
        raise RoutingError(f"split of model {model.name!r} adds up to {total}; it must be 100")


def _check_version(version: VersionRoute) -> None:
    _name("version", version.version)
    _name("backend", version.backend)
    if version.backend.endswith(".grpc"):
        raise RoutingError(f"backend {version.backend!r} must not end in '.grpc'")
    for label in version.labels:
        _name("label", label)
    if version.timeout_ms <= 0:
        raise RoutingError(f"timeout_ms of {version.backend!r} is {version.timeout_ms}; min. 1")
    for server in version.servers:
        _check_server(server)
        if server.name.startswith(BACKUP):
            raise RoutingError(f"server {server.name!r} must not begin with {BACKUP!r}")


def _check_key(key: KeyRoute) -> None:
    _name("key id", key.id)
    for digest in key.hashes:
        _match(f"hash of key {key.id!r}", digest, _HASH, "64 hex digits (SHA-256)")
    for model in key.models:
        _name(f"model of key {key.id!r}", model)
    for field, limit in (("rate_rps", key.rate_rps), ("concurrency_max", key.concurrency_max)):
        if limit is not None and limit < 1:
            raise RoutingError(f"{field} of key {key.id!r} is {limit}; must be None or at least 1")


# --- maps ---------------------------------------------------------------------------------------


def _maps(routing: Routing) -> dict[str, dict[str, str]]:
    keys = _key_maps(routing.keys) if routing.needs_key else {}
    return {**_model_maps(routing.models), **keys, **_FIXED_MAPS}


def _model_maps(models: Iterable[ModelRoute]) -> dict[str, dict[str, str]]:
    versions = [(m.name, v) for m in models for v in m.versions]
    return {
        "models": {m.name: _choice(m) for m in models if m.versions},
        "slots": {f"{m.name}/{i}": b for m in models for i, b in enumerate(_slots(m))},
        "versions": {f"{name}@{v.version}": v.backend for name, v in versions},
        "labels": {f"{name}@{label}": v.backend for name, v in versions for label in v.labels},
    }


def _key_maps(keys: Iterable[KeyRoute]) -> dict[str, dict[str, str]]:
    rates = {k.id: k.rate_rps for k in keys}
    concurrencies = {k.id: k.concurrency_max for k in keys}
    return {
        "keys": {h.upper(): k.id for k in keys for h in k.hashes},
        "admins": {k.id: "1" for k in keys if k.is_admin},
        "allowed": {f"{k.id}/{model}": "1" for k in keys for model in k.models or ("*",)},
        "rates": {name: str(rate) for name, rate in rates.items() if rate is not None},
        "concurrencies": {
            name: str(most) for name, most in concurrencies.items() if most is not None
        },
    }


_FIXED_MAPS: Mapping[str, dict[str, str]] = {
    "kinds": {
        "/v2/models/": "oip",
        "/v1/models/": "tensorflow",
        "/v1/chat/completions": "openai",
        "/v1/completions": "openai",
        "/v1/embeddings": "openai",
        "/inference.grpcinferenceservice/model": "grpc",
    },
    "heads": errors.heads(),
    "tails": errors.tails(),
    "grpc-statuses": errors.grpc_statuses(),
    "grpc-messages": errors.grpc_messages(),
}


def _choice(model: ModelRoute) -> str:
    """The backend of all unversioned requests, or how to choose a slot: `?` or `?header`."""
    whole = [v.backend for v in model.versions if model.split.get(v.version, 0) == 100]
    return whole[0] if whole else f"?{(model.sticky_header or '').lower()}"


def _slots(model: ModelRoute) -> list[str]:
    """The backend of each percent; none when one version has them all."""
    if not _choice(model).startswith("?"):
        return []
    return [v.backend for v in model.versions for _ in range(model.split.get(v.version, 0))]


# --- servers ------------------------------------------------------------------------------------

_CHECK = "check inter 2s fastinter 500ms downinter 1s fall 2 rise 1"
_OBSERVE = "observe layer4 error-limit 1 on-error mark-down"


def _servers(routing: Routing) -> Iterator[tuple[tuple[str, str], str]]:
    """The replicas' server lines; the desks are part of the skeleton."""
    for version in (v for m in routing.models for v in m.versions):
        for server in sorted(version.servers, key=_by_name):
            yield (version.backend, server.name), f"{_http(server)} {_CHECK} {_OBSERVE}"
            if server.grpc_port is not None:
                check = f"check-proto h1 port {server.port} {_CHECK}"
                line = f"{joined(server.host, server.grpc_port)} proto h2 {check} {_OBSERVE}"
                yield (f"{version.backend}.grpc", server.name), line


def _by_name(server: Server) -> str:
    return server.name


def _http(server: Server) -> str:
    return joined(server.host, server.port)


def joined(host: str, port: int) -> str:
    """Host and port as HAProxy writes them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# --- text ---------------------------------------------------------------------------------------


def _listeners(settings: EdgeSettings) -> dict[str, Listener]:
    """The listeners for callers, by the name of their `bind` line."""
    listeners = {
        "http": settings.http,
        "https": settings.https,
        "grpc": settings.grpc,
        "tensorflow": settings.tensorflow,
    }
    return {name: listener for name, listener in listeners.items() if listener is not None}


def _text(routing: Routing, settings: EdgeSettings, servers: Mapping[tuple[str, str], str]) -> str:
    desks = sorted(routing.desks, key=_by_name)
    versions = [v for m in routing.models for v in m.versions]
    sections = [
        _global(settings),
        _defaults(settings),
        _METERS,
        *([_metrics(settings.metrics)] if settings.metrics else []),
        _frontend(routing, settings),
        _desk(desks),
        *(
            _backend(version, backend, servers, desks)
            for version in sorted(versions, key=lambda v: v.backend)
            for backend in (version.backend, f"{version.backend}.grpc")
        ),
    ]
    return "\n".join(sections)


def _section(head: str, lines: Iterable[str]) -> str:
    return "\n".join([head, *(f"    {line}" for line in lines), ""])


def _global(settings: EdgeSettings) -> str:
    room = settings.retry_body_bytes_max + _HEADERS_MAX + _REWRITE
    return _section(
        "global",
        [
            f"stats socket unix@{SOCKET} mode 600 level admin",
            f"nbthread {settings.threads}",
            f"maxconn {settings.connections_max}",
            "localpeer edge",
            "hard-stop-after 30m",
            f"tune.bufsize {room}",
            f"tune.maxrewrite {_REWRITE}",
            "tune.h2.fe.max-concurrent-streams 512",
            f"tune.h2.fe.initial-window-size {settings.retry_body_bytes_max}",
            "ssl-default-bind-options ssl-min-ver TLSv1.2",
            f"ssl-default-bind-ciphers {_CIPHERS}",
            "log ring@events local0 notice",
        ],
    )


_HEADERS_MAX = 32_768
_PATH_MAX = 8_192
_REWRITE = 4_096
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


def _defaults(settings: EdgeSettings) -> str:
    return _section(
        "defaults",
        [
            "mode http",
            "log global",
            "option dontlognull",
            "option httplog",
            "option dontlog-normal",
            "option abortonclose",
            "option http-no-delay",
            "option idle-close-on-response",
            "option redispatch 1",
            "option allbackups",
            "option httpchk",
            "http-check send meth GET uri /readyz ver HTTP/1.1 hdr host edge",
            "http-check expect status 200",
            "http-reuse always",
            "balance leastconn",
            "retries 3",
            f"retry-on {_RETRY_ON}",
            f"maxconn {settings.connections_max}",
            "timeout http-request 5s",
            "timeout http-keep-alive 60s",
            "timeout client 1h",
            "timeout connect 300ms",
            "timeout check 2s",
            "timeout queue 5s",
            "timeout server 60s",
            *_error_lines(),
        ],
    )


_RETRY_ON = "conn-failure empty-response junk-response 503"
"""Not `response-timeout` (the request's time is over) and not 500 (the model failed, and would
again). 503 is what a replica says that drains: it has not begun."""


def _error_lines() -> Iterator[str]:
    for status in errors.TEXTS:
        key = f"str({status}/),concat(,txn.form,/),concat(,txn.why)"
        head = f"{key},map_str({MAPS}/heads.map),concat(,txn.detail)"
        body = f"%[{head}]%[{key},map_str({MAPS}/tails.map)]"
        headers = (("x-shoal-answered-by", "edge"), *errors.HEADERS.get(status, ()))
        extra = " ".join(f"hdr {name} {_quoted(value)}" for name, value in headers)
        yield f"http-error status {status} content-type application/json lf-string '{body}' {extra}"


def _quoted(text: str) -> str:
    return f"'{text}'" if " " in text or '"' in text else text


_METERS = "\n".join(
    [
        _section(
            "peers edge",
            [f"bind unix@{PEERS} mode 600", "server edge"],
        ),
        _section(
            "backend limits",
            [
                "stick-table type string len 128 size 100k expire 1m "
                "store conn_cur,gpc0,gpc0_rate(1s) peers edge"
            ],
        ),
        _section("ring events", ["format rfc3164", "maxlen 1024", "size 1048576"]),
    ]
)


def _metrics(listener: Listener) -> str:
    return _section(
        "frontend metrics",
        [
            f"bind {joined(listener.host, listener.port)} name metrics",
            "http-request use-service prometheus-exporter if { path /metrics }",
            "http-request deny deny_status 404",
        ],
    )


def _frontend(routing: Routing, settings: EdgeSettings) -> str:
    sticky = sorted({m.sticky_header.lower() for m in routing.models if m.sticky_header})
    return _section(
        "frontend edge",
        [
            *_binds(settings),
            *_PROTOCOL,
            *_strip(sticky),
            *(_KEY if routing.needs_key else _NO_KEY),
            *_body_and_model(settings),
            *(_MAY_USE_MODEL if routing.needs_key else ()),
            *_choose_backend(sticky),
            *_headers(settings),
            *_ANSWER,
        ],
    )


def _binds(settings: EdgeSettings) -> Iterator[str]:
    for name, listener in _listeners(settings).items():
        tls = f" ssl crt {CERTIFICATE} alpn h2,http/1.1" if name == "https" else ""
        yield f"bind {joined(listener.host, listener.port)} name {name} tcp-ut 30s{tls}"


_KINDS = f"{MAPS}/kinds.map"
_GRPC = "/inference.GRPCInferenceService"
_IS_STREAM = f"{{ var(txn.path) -m str {_GRPC}/ModelStreamInfer }}"


def _is(name: str, value: str) -> str:
    return f"{{ var(txn.{name}) -m str {value} }}"


def _has(name: str) -> str:
    return f"{{ var(txn.{name}) -m found }}"


_PROTOCOL = (
    "http-request set-var(txn.form) str(oip)",
    "http-request set-var(txn.path) path,url_dec",
    "http-request set-var(txn.form) str(openai) if { path_beg /v1/ } !{ path -m sub : }"
    " !{ so_name tensorflow }",
    "http-request set-var(txn.form) str(grpc)"
    " if { req.fhdr(content-type) -m beg application/grpc }",
    f"http-request set-var(txn.why) str(path) if {{ pathq,length gt {_PATH_MAX} }}",
    f"http-request set-var(txn.why) str(headers) if {{ req.hdrs,length gt {_HEADERS_MAX} }}",
    f"http-request deny deny_status 400 if {_has('why')}",
    f"http-request set-var(txn.kind) var(txn.path),lower,map_beg({_KINDS})",
    f"http-request unset-var(txn.kind) if {_is('kind', 'grpc')} !{_is('form', 'grpc')}",
)

_STRIPPED = (
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "serve_multiplexed_model_id",
    "x-session-id",
    "proxy-connection",
    "proxy-authorization",
    "keep-alive",
    "upgrade",
    "forwarded",
)
"""Headers that steer Ray, or that are meant for one hop only."""


def _strip(sticky: Iterable[str]) -> Iterator[str]:
    yield "http-request set-var(txn.named) req.fhdr(x-shoal-model)"
    yield "http-request del-header x-shoal- -m beg"
    yield f"http-request set-header x-shoal-model %[var(txn.named)] if {_has('named')}"
    for name in _STRIPPED:
        if name not in sticky:
            yield f"http-request del-header {name}"


_PUBLIC_PATHS = "/healthz /readyz /docs /redoc /openapi.json"
_PUBLIC_FOLDERS = (
    f"/v2/health/ /docs/ {_GRPC}/ServerLive {_GRPC}/ServerReady /grpc.health.v1.Health/"
)
_ADMIN_FOLDERS = f"/admin /v2/repository/models/ {_GRPC}/RepositoryModel"

_KEY = (
    f"http-request set-var(txn.public) bool(true) if {{ path {_PUBLIC_PATHS} }}",
    f"http-request set-var(txn.public) bool(true) if {{ path_beg {_PUBLIC_FOLDERS} }}",
    f"http-request set-var(txn.key) http_auth_bearer,sha2(256),hex,map_str({MAPS}/keys.map)"
    f" if !{_has('public')}",
    f"http-request set-var(txn.key) req.fhdr(x-api-key),sha2(256),hex,map_str({MAPS}/keys.map)"
    f" if !{_has('public')} !{_has('key')}",
    f"http-request set-var(txn.why) str(unknown) if !{_has('key')}"
    " { req.fhdr(authorization) -m found }",
    f"http-request set-var(txn.why) str(unknown) if !{_has('key')}"
    " { req.fhdr(x-api-key) -m found }",
    f"http-request deny deny_status 401 if !{_has('public')} !{_has('key')}",
    "http-request unset-var(txn.why)",
    "http-request set-var(txn.role) str(caller)",
    "http-request set-var(txn.role) str(admin) if"
    f" {{ var(txn.key),map_str({MAPS}/admins.map) -m found }}",
    f"http-request set-var(txn.why) str(admin) if {{ var(txn.path) -m beg -i {_ADMIN_FOLDERS} }}"
    f" !{_is('role', 'admin')}",
    f"http-request deny deny_status 403 if {_has('why')}",
    f"http-request set-var(txn.rate) var(txn.key),map_str_int({MAPS}/rates.map)",
    f"http-request set-var(txn.most) var(txn.key),map_str_int({MAPS}/concurrencies.map)",
    f"http-request track-sc0 var(txn.key) table limits if {_has('rate')} or {_has('most')}",
    f"http-request set-var(txn.why) str(rate) if {_has('rate')}"
    " { sc_gpc0_rate(0),sub(txn.rate) ge 0 }",
    f"http-request set-var(txn.why) str(concurrency) if {_has('most')}"
    " { sc_conn_cur(0),sub(txn.most) gt 0 }",
    f"http-request set-var-fmt(txn.detail) ' %[var(txn.rate)]' if {_is('why', 'rate')}",
    f"http-request set-var-fmt(txn.detail) ' %[var(txn.most)]' if {_is('why', 'concurrency')}",
    f"http-request deny deny_status 429 if {_has('why')}",
    f"http-request sc-inc-gpc0(0) if {_has('rate')}",
)

_NO_KEY = ("http-request set-var(txn.role) str(admin)",)

_INFER = (
    (
        "oip",
        "{ var(txn.path) -m reg"
        " ^/v2/models/[^/]+(/versions/[^/]+)?/(infer|generate|generate_stream)$ }",
    ),
    (
        "tensorflow",
        "{ var(txn.path) -m reg -i"
        " ^/v1/models/[^/:]+(/(versions|labels)/[^/:]+)?:(predict|classify|regress)$ }",
    ),
    ("openai", "{ var(txn.path) -m str /v1/chat/completions /v1/completions /v1/embeddings }"),
    ("grpc", f"{{ var(txn.path) -m str {_GRPC}/ModelInfer {_GRPC}/ModelStreamInfer }}"),
)
"""Which requests of each kind go to a replica."""


def _body_and_model(settings: EdgeSettings) -> Iterator[str]:
    for kind, condition in _INFER:
        yield (
            f"http-request set-var(txn.infer) bool(true) if {_is('kind', kind)} {{ method POST }}"
            f" {condition}"
        )
    yield f"http-request wait-for-body time 30s if {_has('infer')} !{_IS_STREAM}"
    yield f"http-request wait-for-body time 30s if {_is('kind', 'grpc')} !{_IS_STREAM}"
    yield from _FIRST_MESSAGE
    yield from _MODEL
    unread = f"http-request set-var(txn.why) str(model) if {_is('kind', 'openai')} {_has('infer')}"
    yield f"{unread} !{_has('model')} {{ req.body_len ge {settings.retry_body_bytes_max} }}"
    yield f"{unread} !{_has('model')} {{ req.fhdr(content-encoding) -m found }}"
    yield (
        f"http-request set-var(txn.why) str(compressed) if {_is('kind', 'grpc')} !{_has('model')}"
        " { req.body,bytes(0,1),hex -m str 01 }"
    )
    yield f"http-request deny deny_status 400 if {_has('why')}"


_FIRST_MESSAGE = (
    f"http-request wait-for-body time 30s at-least 6 if {_IS_STREAM}",
    f"http-request set-var(txn.length) req.body,bytes(1,4),hex,hex2i if {_is('kind', 'grpc')}",
    *(
        f"http-request wait-for-body time 30s at-least {n + 5} if {_IS_STREAM}"
        f" {{ var(txn.length) -m int ge {n} }}"
        for n in (16, 32, 64, 100, 140, 280)
    ),
)
"""A stream may never end, so its body is not waited for: only for so much of the first message
that its name and version (fields 1 and 2, at most 128 letters each) are there."""

_IS_WHOLE = "{ req.body_len,sub(txn.length) ge 5 }"
"""Whether the first message is there to its end; `ungrpc` sees nothing in one that is not, and
`protobuf` would read on into the next one."""

_PATH_4 = "var(txn.path),field(4,/)"
_PATH_5 = "var(txn.path),field(5,/)"
_PATH_6 = "var(txn.path),field(6,/)"

_MODEL = (
    f"http-request set-var(txn.model) {_PATH_4} if {_is('kind', 'oip')}",
    f"http-request set-var(txn.version) {_PATH_6} if {_is('kind', 'oip')}"
    f" {{ {_PATH_5} -m str versions }}",
    f"http-request set-var(txn.model) {_PATH_4},field(1,:) if {_is('kind', 'tensorflow')}",
    f"http-request set-var(txn.version) {_PATH_6},field(1,:) if {_is('kind', 'tensorflow')}"
    f" {{ {_PATH_5} -m str -i versions }}",
    f"http-request set-var(txn.label) {_PATH_6},field(1,:) if {_is('kind', 'tensorflow')}"
    f" {{ {_PATH_5} -m str -i labels }}",
    f"http-request set-var(txn.model) req.body,bytes(5),protobuf(1) if {_is('kind', 'grpc')}",
    f"http-request set-var(txn.version) req.body,ungrpc(2) if {_is('kind', 'grpc')}"
    f" {_has('model')} {_IS_WHOLE}",
    f"http-request set-var(txn.version) req.body,bytes(5),protobuf(2) if {_is('kind', 'grpc')}"
    f" {_has('model')} !{_IS_WHOLE}",
    f"http-request set-var(txn.named) req.body,json_query('$.model') if {_is('kind', 'openai')}"
    f" {_has('infer')} !{_has('named')}",
    *(
        f"http-request set-var(txn.{part}) var(txn.named),field({n},@) if {_is('kind', kind)}"
        f" !{_has(part)} {_has('named')}{condition}"
        for kind in ("openai", "grpc")
        for part, n, condition in (
            ("version", 2, f" !{_has('model')} {{ var(txn.named) -m sub @ }}"),
            ("model", 1, ""),
        )
    ),
)
"""Where each protocol names model and version; `name@version` where there is one field for both."""

_ALLOWED = f"map_str({MAPS}/allowed.map) -m found"

_MAY_USE_MODEL = (
    f"http-request set-var(txn.why) str(model) if {_has('model')}"
    f" !{{ var(txn.key),concat(/*),{_ALLOWED} }}"
    f" !{{ var(txn.key),concat(/,txn.model),{_ALLOWED} }}",
    f"http-request set-var-fmt(txn.detail) ' %[var(txn.model),json(utf8ps)]' if {_has('why')}",
    f"http-request set-var-fmt(txn.detail) ' %[var(txn.model),url_enc]' if {_has('why')}"
    f" {_is('form', 'grpc')}",
    f"http-request deny deny_status 403 if {_has('why')}",
)

_IS_SPLIT = "{ var(txn.backend) -m beg ? }"


def _choose_backend(sticky: Iterable[str]) -> Iterator[str]:
    """The last lookup but one is for a split that ended after the first."""
    choose = "http-request set-var(txn.backend) var(txn.model)"
    infer, version, label = _has("infer"), _has("version"), _has("label")
    yield f"{choose},concat(@,txn.version),map_str({MAPS}/versions.map) if {infer} {version}"
    yield f"{choose},concat(@,txn.label),map_str({MAPS}/labels.map) if {infer} {label}"
    yield f"{choose},map_str({MAPS}/models.map) if {infer} !{version} !{label}"
    yield f"http-request set-var(txn.slot) rand(100) if {_IS_SPLIT}"
    for name in sticky:
        chosen = f"{{ var(txn.backend) -m str ?{name} }}"
        yield f"http-request set-var(txn.slot) req.fhdr({name}),xxh32,mod(100) if {chosen}"
    yield f"{choose},concat(/,txn.slot),map_str({MAPS}/slots.map) if {_IS_SPLIT}"
    yield f"{choose},map_str({MAPS}/models.map) if {_IS_SPLIT}"
    yield f"http-request unset-var(txn.backend) if {_IS_SPLIT}"


_REQUEST_ID = "[A-Za-z0-9._:/+=@-]{1,128}"


def _headers(settings: EdgeSettings) -> Iterator[str]:
    valid = f"{{ req.fhdr(x-request-id) -m reg ^{_REQUEST_ID}$ }}"
    yield "http-request del-header authorization"
    yield "http-request del-header x-api-key"
    yield f"http-request set-header x-request-id %[uuid()] if !{valid}"
    yield "http-request set-header x-forwarded-proto https if { ssl_fc }"
    yield "http-request set-header x-forwarded-proto http if !{ ssl_fc }"
    yield "http-request add-header x-forwarded-for %[src]"
    yield f"http-request set-header x-shoal-edge {settings.token}"
    yield "http-request set-header x-shoal-role %[var(txn.role)]"
    yield f"http-request set-header x-shoal-key %[var(txn.key)] if {_has('key')}"
    yield f"http-request set-header x-shoal-backend %[var(txn.backend)] if {_has('backend')}"
    yield "http-request del-header x-shoal-model"  # what was checked, not what was claimed
    yield f"http-request set-header x-shoal-model %[var(txn.model)] if {_has('model')}"
    yield "http-request set-header x-shoal-dialect tensorflow if { so_name tensorflow }"
    yield (
        "http-request set-var(txn.timeout_ms) req.fhdr(x-request-timeout-ms),add"
        f"({_SLACK_MS}) if {{ req.fhdr(x-request-timeout-ms) -m found }}"
    )


_SLACK_MS = 1_000
"""A replica answers its deadline itself; the edge steps in only this much later."""

_OWN_GRPC = f"if {_is('form', 'grpc')} {{ res.fhdr(x-shoal-answered-by) -m str edge }}"

_ANSWER = (
    f"use_backend %[var(txn.backend)].grpc if {_has('backend')} {_is('form', 'grpc')}",
    f"use_backend %[var(txn.backend)] if {_has('backend')}",
    f"use_backend desk.grpc if {_is('form', 'grpc')}",
    "default_backend desk",
    f"http-after-response set-header grpc-status %[status,map_str({MAPS}/grpc-statuses.map)]"
    f" {_OWN_GRPC}",
    "http-after-response set-header grpc-message"
    f" %[status,concat(/,txn.why),map_str({MAPS}/grpc-messages.map)]%[var(txn.detail)] {_OWN_GRPC}",
    f"http-after-response set-header content-type application/grpc {_OWN_GRPC}",
    f"http-after-response del-header content-length {_OWN_GRPC}",
    f"http-after-response set-status 200 {_OWN_GRPC}",
)

_STREAM_TIMEOUT = f"http-request set-timeout server 1h if {_IS_STREAM}"


def _desk(desks: Iterable[Server]) -> str:
    """What no replica answers. Only what reads may be sent twice."""
    common = (
        "timeout server 10m",
        "http-request disable-l7-retry if !{ method GET }",
    )
    http = (f"server {d.name} {_http(d)} {_CHECK}" for d in desks)
    grpc = (
        f"server {d.name} {joined(d.host, d.grpc_port)} proto h2 track desk/{d.name}"
        for d in desks
        if d.grpc_port is not None
    )
    return "\n".join(
        [
            _section("backend desk", [*common, *http]),
            _section("backend desk.grpc", [*common, _STREAM_TIMEOUT, *grpc]),
        ]
    )


def _backend(
    version: VersionRoute,
    backend: str,
    servers: Mapping[tuple[str, str], str],
    desks: Iterable[Server],
) -> str:
    """One of a version's two backends; the desks come last, as backup."""
    limit_ms = version.timeout_ms + _SLACK_MS
    is_grpc = backend.endswith(".grpc")
    return _section(
        f"backend {backend}",
        [
            f"timeout server {limit_ms}ms",
            "http-request set-timeout server var(txn.timeout_ms)"
            f" if {{ var(txn.timeout_ms) -m int {_SLACK_MS + 1}:{limit_ms} }}",
            *([_STREAM_TIMEOUT] if is_grpc else []),
            *(() if version.idempotent else ("retry-on conn-failure", "http-reuse never")),
            *(
                f"server {name} {arguments}"
                for (owner, name), arguments in servers.items()
                if owner == backend
            ),
            *(_backup(d, is_grpc) for d in desks if not is_grpc or d.grpc_port is not None),
        ],
    )


def _backup(desk: Server, is_grpc: bool) -> str:
    port, proto = (desk.grpc_port, " proto h2") if is_grpc else (desk.port, "")
    address = joined(desk.host, port or desk.port)
    return f"server {BACKUP}{desk.name} {address}{proto} backup track desk/{desk.name}"
