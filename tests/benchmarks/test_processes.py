"""Is everything that a system starts counted and ended, and nothing else?"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.serving.processes import Tree, free_port, is_listening, machine_busy_s

SLEEPS = "import time; time.sleep(60)"
DAEMON = f"""
import subprocess, sys
if "--daemon" not in sys.argv:
    subprocess.Popen([sys.executable, __file__, "--daemon"], start_new_session=True)
    sys.exit()
{SLEEPS}
"""
CLEARS_ITS_ENVIRONMENT = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {SLEEPS!r}], env={{"OTHER": "mark-of-its-own"}}).wait()
"""


def eventually(is_so: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def started(tree: Tree, tmp_path: Path, code: str) -> subprocess.Popen[bytes]:
    program = tmp_path / "program.py"
    program.write_text(code)
    return tree.start([sys.executable, program], log=tmp_path / "log", environment=dict(os.environ))


@pytest.fixture
def tree() -> Tree:
    return Tree()


def test_a_process_that_has_made_itself_a_daemon_is_still_counted_and_ended(
    tree: Tree, tmp_path: Path
) -> None:
    parent = started(tree, tmp_path, DAEMON)
    parent.wait(timeout=10)
    eventually(lambda: len(tree.members()) == 1)
    tree.end(patience_s=5)
    assert tree.members() == []


def test_a_child_without_the_mark_is_found_through_its_parent(tree: Tree, tmp_path: Path) -> None:
    started(tree, tmp_path, CLEARS_ITS_ENVIRONMENT)
    eventually(lambda: tree.usage().processes == 2)
    tree.end(patience_s=5)
    assert tree.usage().processes == 0


def test_a_process_with_an_adopted_mark_is_counted(tree: Tree) -> None:
    other = subprocess.Popen([sys.executable, "-c", SLEEPS], env={"OTHER": "mark-4f1c"})
    assert tree.members() == []
    tree.adopt("mark-4f1c")
    eventually(lambda: tree.usage().processes == 1)
    tree.end(patience_s=5)
    assert other.wait(timeout=5) != 0


def test_a_process_is_found_by_an_adopted_word_of_its_command_line(tree: Tree) -> None:
    other = subprocess.Popen([sys.executable, "-c", SLEEPS, "folder-7e21"], env={})
    tree.adopt("folder-7e21")
    eventually(lambda: tree.usage().processes == 1)
    tree.end(patience_s=5)
    assert other.wait(timeout=5) != 0


def test_processes_of_others_are_left_alone(tree: Tree, tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", SLEEPS])
    started(tree, tmp_path, SLEEPS)
    tree.end(patience_s=5)
    assert other.poll() is None
    other.kill()
    other.wait()


def test_cpu_and_memory_are_those_of_the_whole_tree(tree: Tree, tmp_path: Path) -> None:
    busy = "import time\nheld = bytearray(50_000_000)\nwhile time.process_time() < 60: pass"
    busy_s = machine_busy_s()
    started(tree, tmp_path, busy)
    eventually(lambda: tree.usage().cpu_s > 0.2)
    usage = tree.usage()
    tree.end(patience_s=5)
    assert 0.2 < usage.cpu_s < 30
    assert usage.rss_mb > 50
    assert machine_busy_s() > busy_s


def test_a_failing_command_says_what_it_said(tree: Tree) -> None:
    with pytest.raises(RuntimeError, match="the reason"):
        tree.run(
            [sys.executable, "-c", "import sys; sys.exit('the reason')"],
            environment=dict(os.environ),
            timeout_s=30,
        )


def test_a_free_port_has_no_listener() -> None:
    assert not is_listening(free_port())
