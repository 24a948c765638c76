"""What ends an engine's subprocesses when the replica is killed?

vLLM's engine is a process of its own. A replica that gets SIGKILL can't end it, and an orphan would
keep its memory and its GPU. So a small shell holds one end of a pipe whose other end only the
replica has: when the replica dies, however it dies, the kernel closes the pipe, and the shell kills
the processes that it was told of, unless their ids mean others by then.

    with Guard() as guard:        # a thread looks for new subprocesses while the engine starts
        engine = …
    guard.close()                 # after a proper end: nobody is killed
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_SHELL = """
trap '' INT TERM HUP
known=
while read -r pid started; do
  [ "$pid" = end ] && exit 0
  known="$known $pid:$started"
done
for each in $known; do
  now=$(sed 's/.*) //' /proc/${each%:*}/stat | cut -d' ' -f20)
  [ "$now" = "${each#*:}" ] && kill -9 ${each%:*}
done
"""
_LOOK_EVERY_S = 0.25


class Guard:
    """Tells the shell of each subprocess that appears inside the `with` block."""

    def __init__(self) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _SHELL],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        self._told: set[int] = {self._shell.pid, *(p.pid for p in _children())}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="orphans", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._tell()

    def close(self) -> None:
        """Dismiss the shell; what still runs is left alone."""
        self._send("end -")
        if self._shell.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._shell.stdin.close()
        self._shell.wait(timeout=10)

    def _look(self) -> None:
        while not self._stop.wait(_LOOK_EVERY_S):
            self._tell()

    def _tell(self) -> None:
        for process in _children():
            if process.pid not in self._told:
                self._told.add(process.pid)
                started = _started_ticks(process.pid)
                if started is not None:
                    self._send(f"{process.pid} {started}")

    def _send(self, line: str) -> None:
        if self._shell.stdin is None or self._shell.stdin.closed:
            return
        with contextlib.suppress(BrokenPipeError):
            self._shell.stdin.write(line + "\n")
            self._shell.stdin.flush()


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _started_ticks(pid: int) -> str | None:
    """When the process started, in the kernel's own words."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()[19]
    except (OSError, IndexError):  # it has gone already
        return None
