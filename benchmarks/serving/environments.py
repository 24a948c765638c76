"""In which Python does each system run? In one of its own.

`requirements/NAME.txt` pins every package of an environment; `.envs/NAME` is made from it by uv
the first time and again whenever the file changes. Nothing is resolved here: the files are flat
and complete, so that two machines measure the same versions.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENVIRONMENTS = HERE / ".envs"
DATA = ENVIRONMENTS / "data"
REQUIREMENTS = HERE / "requirements"


def python(name: str) -> Path:
    """The interpreter of environment `name`, which is made if need be."""
    folder = ENVIRONMENTS / name
    wanted = REQUIREMENTS / f"{name}.txt"
    stamp = folder / "made-from"
    digest = hashlib.sha256(wanted.read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != digest:
        print(f"making the environment of {name} …", flush=True)
        _make(folder, wanted)
        stamp.write_text(digest)
    return folder / "bin" / "python"


def _make(folder: Path, wanted: Path) -> None:
    interpreter = folder / "bin" / "python"
    _uv_run("venv", "--quiet", "--clear", "--python", sys.executable, folder)
    _uv_run("pip", "install", "--quiet", "--no-deps", "--python", interpreter, "-r", wanted)


def _uv_run(*arguments: str | Path) -> None:
    subprocess.run([_uv(), *arguments], check=True, env=_uv_environment())


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise RuntimeError("uv is not installed; run: pip install uv")
    return found


def _uv_environment() -> dict[str, str]:
    """Uv doesn't read pip's find-links by itself."""
    links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS", "")
    return {**os.environ, "UV_FIND_LINKS": links} if links else dict(os.environ)


def variables(name: str, **more: str) -> dict[str, str]:
    """The environment variables of a process of environment `name`: few, and the same each time."""
    kept = {key: os.environ[key] for key in ("HOME", "LANG", "TMPDIR") if key in os.environ}
    binaries = ENVIRONMENTS / name / "bin"
    return {
        **kept,
        "PATH": f"{binaries}:{os.environ.get('PATH', '/usr/bin:/bin')}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "BENCHMARK_DATA": str(DATA),
        **more,
    }


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))
