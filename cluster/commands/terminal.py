"""How commands speak: to people with rich, to programs with JSON, and by their exit codes.

    0  done        1  the cluster tried and it failed     2  the command or a file is wrong
    3  no cluster  4  the key has no right to do this

With `--json`, standard output is one JSON value and progress goes to standard error.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

P = ParamSpec("P")
R = TypeVar("R")


class Exit(IntEnum):
    """What a command's exit code says."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NO_CLUSTER = 3
    FORBIDDEN = 4


class Failure(Exception):
    """The command ends with `code` and `message`; `value` is what --json prints besides."""

    def __init__(self, code: Exit, message: str, value: Any = None) -> None:
        super().__init__(message)
        self.code = code
        self.value = value


HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="The cluster's folder [default: $SHOAL_HOME or ~/.shoal]."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value for programs.")]

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def home_of(option: Path | None) -> Path:
    """The cluster's folder."""
    from cluster.config import default_home

    return (option or default_home()).expanduser().resolve()


def client(option: Path | None) -> Any:
    """The cluster's client."""
    from cluster.client import Client

    return Client.of(home_of(option))


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Turn the errors that a command may meet into its message and exit code."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        is_json = bool(kwargs.get("is_json"))
        try:
            return function(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            failure = _as_failure(error)
            if failure is None:
                raise
            if is_json:
                value = failure.value if isinstance(failure.value, dict) else {}
                sys.stdout.write(json.dumps({**value, "error": str(failure)}) + "\n")
            else:
                err.print(Text.assemble(("error:", "bold red"), " ", str(failure)), soft_wrap=True)
            raise typer.Exit(int(failure.code)) from None

    return run


def _as_failure(error: Exception) -> Failure | None:
    """The failure that an error means to a user; None = a bug, shown as it is."""
    from cluster.client import Refusal, Unreachable
    from cluster.config import ConfigError
    from cluster.embedded import ClusterError
    from deployments.model import ModelFileError

    if isinstance(error, Failure):
        return error
    if isinstance(error, Unreachable):
        return Failure(Exit.NO_CLUSTER, str(error))
    if isinstance(error, Refusal):
        codes = {401: Exit.FORBIDDEN, 403: Exit.FORBIDDEN, 400: Exit.USAGE, 404: Exit.USAGE}
        return Failure(codes.get(error.status, Exit.FAILED), str(error))
    if isinstance(error, ConfigError | ModelFileError):
        return Failure(Exit.USAGE, str(error))
    if isinstance(error, ClusterError):
        return Failure(Exit.FAILED, str(error))
    return None


def show(value: Any, is_json: bool, people: Callable[[], object]) -> None:
    """Print `value` as JSON, or whatever `people` prints."""
    if is_json:
        sys.stdout.write(json.dumps(value, indent=2 if sys.stdout.isatty() else None) + "\n")
    else:
        people()


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], empty: str) -> None:
    """Print rows under columns, or what to say when there are none."""
    if not rows:
        out.print(empty)
        return
    grid = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        grid.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    out.print(grid)


def note(text: str, is_json: bool = False) -> None:
    """A line for people, as it is; on standard error when standard output is for a program."""
    (err if is_json else out).print(Text(text), soft_wrap=True)


@contextlib.contextmanager
def progress(first: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done and since when: a spinner for people, lines for logs."""
    start_s = time.monotonic()
    if not err.is_terminal:
        note(f"… {first}", is_json=True)
        yield lambda text: note(f"… {text} [{time.monotonic() - start_s:.0f} s]", is_json=True)
        return
    with err.status(Text(first)) as status:
        yield lambda text: status.update(Text(f"{text} ({time.monotonic() - start_s:.0f} s)"))
