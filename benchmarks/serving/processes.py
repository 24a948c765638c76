"""What does a whole system use: every process it started, and those they started?

A proxy, a raylet or a worker that has made itself a daemon is still part of the bill. Each system
is started with a mark in its environment, which every descendant inherits; processes that
overwrite their environment (to change their title) are found as children of marked ones, and
whoever was seen once stays known. The same list says what may be ended: nothing without the mark
or a marked ancestor is ever touched.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MARK = "SHOAL_BENCHMARK_MARK"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tree has used (`cpu_s`, since its start) and holds (`rss_mb`, shared pages counted
    in each process that maps them)."""

    cpu_s: float
    rss_mb: float
    processes: int


@dataclass(frozen=True, slots=True)
class _Stat:
    """One line of /proc/PID/stat."""

    pid: int
    parent: int
    started: int
    cpu_s: float
    rss_mb: float


def _read_stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()
    if fields[0] == "Z":
        return None
    return _Stat(
        pid=pid,
        parent=int(fields[1]),
        started=int(fields[19]),
        cpu_s=sum(int(ticks) for ticks in fields[11:15]) / _TICKS,
        rss_mb=int(fields[21]) * _PAGE / 1e6,
    )


def _stats() -> dict[int, _Stat]:
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return {stat.pid: stat for pid in pids if (stat := _read_stat(pid)) is not None}


class Tree:
    """All processes that one system started, daemons included."""

    def __init__(self) -> None:
        self._mark = secrets.token_hex(8)
        self._marks = [self._mark.encode()]
        self._seen: dict[int, int] = {}  # pid -> when it started, so that a reused pid isn't ours
        self._roots: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        command: Sequence[str | Path],
        *,
        log: Path,
        environment: Mapping[str, str],
        folder: Path | None = None,
        talks: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Start a command of this system; its output goes to `log`.

        `talks`: the caller writes to its stdin and reads its stdout.
        """
        with log.open("ab") as out:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else out,
                stderr=out,
                cwd=folder,
                env={**environment, _MARK: self._mark},
                start_new_session=True,
            )
        self._roots.append(process)
        return process

    def run(
        self, command: Sequence[str | Path], *, environment: Mapping[str, str], timeout_s: float
    ) -> str:
        """Run a command of this system to its end and return what it printed.

        Raises `RuntimeError` with the end of its stderr when it fails or takes too long.
        """
        words = " ".join(str(part) for part in command)
        try:
            done = subprocess.run(
                [str(part) for part in command],
                check=False,
                env={**environment, _MARK: self._mark},
                capture_output=True,
                text=True,
                timeout=timeout_s,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{words} took more than {timeout_s:.0f} s") from None
        if done.returncode != 0:
            said = (done.stderr or done.stdout)[-2000:]
            raise RuntimeError(f"{words} ended with {done.returncode}: {said}")
        return done.stdout

    def members(self) -> list[_Stat]:
        """The live processes of this tree."""
        stats = _stats()
        ours = {pid for pid, started in self._seen.items() if self._is_same(stats, pid, started)}
        ours |= {pid for pid in stats if pid not in ours and self._has_mark(pid)}
        for pid in _descendants(stats, ours):
            ours.add(pid)
        self._seen = {pid: stats[pid].started for pid in ours}
        return [stats[pid] for pid in ours]

    def adopt(self, mark: str) -> None:
        """Count processes with `mark` in their environment or command line too: those that a
        system made daemons with an environment of its own making."""
        self._marks.append(mark.encode())

    def _has_mark(self, pid: int) -> bool:
        try:
            text = Path(f"/proc/{pid}/environ").read_bytes()
            text += Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False
        return any(mark in text for mark in self._marks)

    @staticmethod
    def _is_same(stats: Mapping[int, _Stat], pid: int, started: int) -> bool:
        return pid in stats and stats[pid].started == started

    def usage(self) -> Usage:
        """CPU so far and memory now, of all live processes and the dead ones they waited for."""
        members = self.members()
        return Usage(
            cpu_s=sum(stat.cpu_s for stat in members),
            rss_mb=sum(stat.rss_mb for stat in members),
            processes=len(members),
        )

    def end(self, patience_s: float = 10.0) -> None:
        """End every process of the tree: asked first, forced after `patience_s`."""
        for process in self._roots:
            if process.stdin:
                process.stdin.close()
        self._signal(signal.SIGTERM)
        deadline_s = time.monotonic() + patience_s
        while self.members() and time.monotonic() < deadline_s:
            self._reap()
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        for process in self._roots:
            process.wait(timeout=10)
            if process.stdout:
                process.stdout.close()

    def _signal(self, number: signal.Signals) -> None:
        for stat in self.members():
            try:
                os.kill(stat.pid, number)
            except ProcessLookupError:
                continue

    def _reap(self) -> None:
        for process in self._roots:
            process.poll()


def _descendants(stats: Mapping[int, _Stat], roots: set[int]) -> Iterator[int]:
    """The processes below `roots`, which itself may grow meanwhile."""
    children: dict[int, list[int]] = {}
    for stat in stats.values():
        children.setdefault(stat.parent, []).append(stat.pid)
    waiting = list(roots)
    while waiting:
        for child in children.get(waiting.pop(), ()):
            if child not in roots:
                yield child
            waiting.append(child)


def machine_busy_s() -> float:
    """CPU seconds that all cores together have been busy since the machine started."""
    fields = [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / _TICKS


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_listening(port: int) -> bool:
    """Whether something accepts connections on `port`."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.5):
            return True
    except OSError:
        return False
