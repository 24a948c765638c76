"""A whole cluster on this machine: how it is started, found again and ended.

    start:  Ray head ─► GCS answers ─► controller ─► edge and front desk ─► /readyz
    stop:   the same processes, found by a mark in their environment, and nothing else

Everything that belongs to the cluster inherits `SHOAL_CLUSTER=<id>`, so ending it ends what it
started, whatever became of the process tree, and never anything else on the host. What runs is
written to `HOME/cluster.json` before it is started, so that an interrupted start can be ended too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from random import SystemRandom
from typing import TYPE_CHECKING, Any

import psutil

from cluster.access.keys import Key, hash_of, new_secret
from cluster.config import PORTS, ConfigError, Settings, child_environment, edge_settings

if TYPE_CHECKING:
    from cluster.store import Store

MARK = "SHOAL_CLUSTER"
HEAD_TIMEOUT_S = 120.0
LAUNCH_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 40.0

Tell = Callable[[str], None]


class ClusterError(Exception):
    """The cluster could not be started or found; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Running:
    """A cluster as `HOME/cluster.json` describes it. `head_pid` 0 = its start did not get far."""

    id: str
    settings: Settings
    ray_address: str
    dashboard_url: str
    head_pid: int = 0
    head_started_s: float = 0.0
    is_up: bool = False

    @property
    def url(self) -> str:
        """Where clients send HTTP."""
        return f"http://{self.settings.host}:{self.settings.port}"

    @property
    def is_alive(self) -> bool:
        """Whether its head process still lives (and is not another one with the same pid)."""
        return _is_process(self.head_pid, self.head_started_s)


def up(settings: Settings, tell: Tell) -> tuple[Running, bool]:
    """A running cluster in `settings.home`, and whether it was started just now.

    Raises `ClusterError`; what was begun is ended again.
    """
    try:
        settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ClusterError(f"{settings.home} can't be the cluster's folder: {error}") from None
    with _locked(settings.home):
        known = find(settings.home)
        if known is not None and known.is_up and known.is_alive:
            return known, False
        if known is not None:
            tell("ending what an interrupted cluster left")
            _end(known)
        try:
            return _start(settings, tell), True
        except BaseException:
            if (begun := find(settings.home)) is not None:
                _end(begun)
            raise


def down(home: Path, tell: Tell) -> bool:
    """End the cluster in `home`; False if there was none."""
    if not home.is_dir():
        return False
    with _locked(home):
        known = find(home)
        if known is None:
            return False
        tell("draining and stopping")
        _end(known)
    return True


def find(home: Path) -> Running | None:
    """The cluster that `home` tells of, running or not."""
    file = home / "cluster.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return Running(**{**values, "settings": _settings_from(values["settings"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ClusterError(f"{file} can't be read: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise ClusterError(f"{file} was not written by this version of Shoal") from None


def admin_key(home: Path) -> str:
    """The first admin key. Raises `ClusterError` if it is not there."""
    try:
        return (home / "admin.key").read_text(encoding="utf-8").strip()
    except OSError:
        raise ClusterError(f"{home / 'admin.key'} can't be read; is this cluster yours?") from None


def edge_token(home: Path) -> str:
    """The secret between the edges and the replicas."""
    return _secret(home / "edge.token")


def ray_environment(running: Running) -> dict[str, str]:
    """The variables by which a process joins the cluster's Ray."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(running.settings.home / "ray.token"),
        "RAY_ADDRESS": running.ray_address,
        "RAY_USAGE_STATS_ENABLED": "0",
        MARK: running.id,
    }


# starting


def _start(settings: Settings, tell: Tell) -> Running:
    settings = _with_ports(settings)
    address, dashboard = _ray_host(), _free_port("127.0.0.1")
    gcs_port = _free_port(address)
    running = Running(
        id=secrets.token_hex(8),
        settings=settings,
        ray_address=f"{address}:{gcs_port}",
        dashboard_url=f"http://127.0.0.1:{dashboard}",
    )
    _secret(settings.home / "ray.token")
    edge_token(settings.home)
    _first_key(settings)
    (settings.home / "logs").mkdir(exist_ok=True)
    _write(running)
    tell("starting Ray")
    running = _start_head(running, dashboard)
    tell("starting the controller, Ray Serve and the edge")
    _launch(running, tell)
    tell("waiting for the edge")
    _wait_for_edge(running)
    running = replace(running, is_up=True)
    _write(running)
    return running


def _start_head(running: Running, dashboard_port: int) -> Running:
    settings = running.settings
    host, port = running.ray_address.rsplit(":", 1)
    shutil.rmtree(settings.ray_folder, ignore_errors=True)
    settings.ray_folder.mkdir(parents=True, mode=0o700)
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
        "--port", port, "--node-ip-address", host, "--temp-dir", str(settings.ray_folder),
        "--num-cpus", str(settings.logical_cpus()),
        "--object-store-memory", str(settings.object_store_mb * 2**20),
        "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard_port),
        "--ray-client-server-port", str(_free_port(host)),
        "--dashboard-agent-listen-port", "0", "--metrics-export-port", "0",
        "--min-worker-port", "0", "--max-worker-port", "0", "--disable-usage-stats",
        "--labels", "ray.io/market-type=on-demand,ray.io/node-group=embedded",
    ]  # fmt: skip
    if settings.gpus is not None:
        command += ["--num-gpus", str(settings.gpus)]
    environment = child_environment(
        {
            **ray_environment(running),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "AUTOSCALER_METRIC_PORT": str(_free_port("127.0.0.1")),
            "RAY_SERVE_LOG_TO_STDERR": "0",
        }
    )
    environment.pop("RAY_ADDRESS")
    log = settings.home / "logs" / "head.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    started_s = psutil.Process(process.pid).create_time()
    running = replace(running, head_pid=process.pid, head_started_s=started_s)
    _write(running)
    _wait_for_gcs(process, host, int(port), log)
    return running


def _wait_for_gcs(process: subprocess.Popen[bytes], host: str, port: int, log: Path) -> None:
    deadline_s = time.monotonic() + HEAD_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise ClusterError(f"Ray ended with {process.returncode}: {_tail(log)}")
        with socket.socket() as probe:
            if probe.connect_ex((host, port)) == 0:
                return
        time.sleep(0.1)
    raise ClusterError(f"Ray did not answer within {HEAD_TIMEOUT_S:.0f} s: {_tail(log)}")


def _launch(running: Running, tell: Tell) -> None:
    """Run `cluster.launch` in a process of its own: Ray's settings are read at import."""
    log = running.settings.home / "logs" / "launch.log"
    command = [sys.executable, "-m", "cluster.launch", str(running.settings.home)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=child_environment(ray_environment(running)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
    for line in process.stdout or ():
        tell(line.strip())
    if process.wait(LAUNCH_TIMEOUT_S) != 0:
        raise ClusterError(f"the controller did not start: {_tail(log)} (all of it: {log})")


def _wait_for_edge(running: Running) -> None:
    deadline_s = time.monotonic() + 60
    error: Exception | None = None
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
    while time.monotonic() < deadline_s:
        try:
            with direct.open(f"{running.url}/readyz", timeout=5):
                return
        except (OSError, urllib.error.URLError) as failed:
            error = failed
        time.sleep(0.1)
    raise ClusterError(f"the edge at {running.url} does not answer: {error}")


def _first_key(settings: Settings) -> None:
    """Make the admin key that this machine's commands use, unless the store knows the one there."""
    file = settings.home / "admin.key"
    with contextlib.closing(_opened_store(settings)) as store:
        if file.exists() and _is_admin(store, file.read_text(encoding="utf-8").strip()):
            return
        rng = SystemRandom()
        key = Key(
            id=f"{rng.getrandbits(40):010x}",
            name=f"admin-{rng.getrandbits(40):010x}",
            role="admin",
            created_s=time.time(),
        )
        secret, digest = new_secret(key.id, rng)
        store.add_key(key, digest)
    _write_private(file, secret)


def _opened_store(settings: Settings) -> Store:
    """The cluster's store. Raises `ClusterError`."""
    from alembic.util import CommandError
    from sqlalchemy.exc import SQLAlchemyError

    from cluster.store import Store

    try:
        return Store(settings.store_url)
    except (SQLAlchemyError, ImportError, CommandError) as error:
        raise ClusterError(f"setting store: it can't be opened: {_first_line(error)}") from None


def _is_admin(store: Store, text: str) -> bool:
    """Whether `text` is a key of role admin that goes on being valid."""
    hashes = [h for h in store.key_hashes() if h.sha256 == hash_of(text) and h.expires_s is None]
    live = {k.id for k in store.all_keys() if k.role == "admin" and k.revoked_s is None}
    return any(h.key_id in live for h in hashes)


# ending


def _end(running: Running) -> None:
    """End the cluster's processes: the edge (requests in flight finish), the head, the rest."""
    from deployments.edge.process import Edge

    settings = running.settings
    edge = Edge(settings.home / "edge", edge_settings(settings, ""))
    edge.stop()
    if running.is_alive:
        head = psutil.Process(running.head_pid)
        with contextlib.suppress(psutil.Error):
            head.terminate()
            head.wait(STOP_TIMEOUT_S)
    left = marked(running.id)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, stubborn = psutil.wait_procs(left, timeout=5)
    for process in stubborn:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(stubborn, timeout=5)
    edge.stop()  # its keeper may have started it anew before it ended itself
    shutil.rmtree(settings.ray_folder, ignore_errors=True)
    (settings.home / "cluster.json").unlink(missing_ok=True)


def marked(cluster_id: str) -> list[psutil.Process]:
    """The processes that belong to a cluster, this one and its parents left out."""
    own = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter(["environ"]):
        environment = process.info["environ"] or {}
        if environment.get(MARK) == cluster_id and process.pid not in own:
            found.append(process)
    return found


# small things


def _is_process(pid: int, started_s: float) -> bool:
    if not pid:
        return False
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started_s) < 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _with_ports(settings: Settings) -> Settings:
    """The settings with every port that may be any made a free one, the others checked."""
    chosen: dict[str, int] = {}
    hosts = {"metrics_port": settings.metrics_host, "edge_metrics_port": "127.0.0.1"}
    with contextlib.ExitStack() as until_all_are_chosen:
        for name in PORTS:
            if (port := getattr(settings, name)) is not None:
                host = hosts.get(name, settings.host)
                bound = until_all_are_chosen.enter_context(_bound(host, name, port))
                chosen[name] = int(bound.getsockname()[1])
    return replace(settings, **chosen)  # type: ignore[arg-type]


def _bound(host: str, name: str, port: int) -> socket.socket:
    """A socket on the port. Raises `ConfigError` if it can't be had."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = "is in use by another program"
        else:
            why = f"can't be used: {error.strerror}"
        raise ConfigError(
            f"{name} {port} on {host} {why}; choose another with --{name.replace('_', '-')} or "
            f"SHOAL_{name.upper()} (0 = any free one)"
        ) from None


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


def _ray_host() -> str:
    """A loopback address that Ray takes as it is (it replaces 127.0.0.1 by the host's own)."""
    try:
        _free_port("127.0.0.2")
    except OSError:
        return socket.gethostbyname(socket.gethostname())
    return "127.0.0.2"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _tail(log: Path, lines: int = 3) -> str:
    try:
        found = [x.strip() for x in log.read_text(errors="replace").splitlines() if x.strip()]
    except OSError:
        return "no log was written"
    return " | ".join(found[-lines:]) or "it printed nothing"


def _secret(file: Path) -> str:
    if not file.exists():
        _write_private(file, secrets.token_hex(32))
    return file.read_text(encoding="utf-8").strip()


def _write_private(file: Path, text: str) -> None:
    """Write whole or not at all, readable by the owner only."""
    part = file.with_suffix(file.suffix + ".part")
    with os.fdopen(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as output:
        output.write(text + "\n")
    part.replace(file)


def _write(running: Running) -> None:
    values = {**asdict(running), "settings": _settings_to(running.settings)}
    _write_private(running.settings.home / "cluster.json", json.dumps(values, indent=1))


def _settings_to(settings: Settings) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()}


def _settings_from(values: Mapping[str, Any]) -> Settings:
    known = {f.name: f.type for f in fields(Settings)}
    paths = {k for k, kind in known.items() if str(kind).startswith("Path")}
    typed: dict[str, Any] = {
        k: Path(v) if k in paths and v is not None else v for k, v in values.items() if k in known
    }
    return Settings(**typed)


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One start or stop at a time in `home`; the lock dies with its process."""
    with (home / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError(
                f"another shoal up or down is at work in {home}; wait for it"
            ) from None
        yield
