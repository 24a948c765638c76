"""Do subprocesses end with a replica that is killed, and only then?"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

SCRIPT = """
import subprocess, sys
from deployments.runtimes.orphans import Guard

guard = Guard()
with guard:
    child = subprocess.Popen(["sleep", "300"])
    late = subprocess.Popen(["sleep", "300"])
print(child.pid, late.pid, flush=True)
if sys.stdin.readline() == "close\\n":
    guard.close()
    print("closed", flush=True)
sys.stdin.readline()
"""


def eventually(holds: Callable[[], bool], within_s: float = 20) -> bool:
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        if holds():
            return True
        time.sleep(0.05)
    return False


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_subprocesses_end_with_a_replica_that_is_killed(how: signal.Signals) -> None:
    with replica() as process:
        children = reported(process)
        assert all(map(is_alive, children))
        process.send_signal(how)
        process.wait(timeout=20)
        assert eventually(lambda: not any(map(is_alive, children)))


def test_subprocesses_outlive_a_guard_that_was_dismissed() -> None:
    with replica() as process:
        children = reported(process)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("close\n")
        process.stdin.flush()
        assert process.stdout.readline() == "closed\n"
        watchers = [p for p in psutil.Process(process.pid).children() if p.name() == "sh"]
        assert not watchers
        process.kill()
        process.wait(timeout=20)
        assert all(map(is_alive, children))
        for child in children:
            psutil.Process(child).kill()


def replica() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def reported(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(pid) for pid in process.stdout.readline().split()]
