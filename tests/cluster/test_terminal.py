"""Do commands speak to people and to programs, and mean something by their exit codes?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from cluster.client import Refusal, Unreachable
from cluster.commands import terminal
from cluster.commands.terminal import Exit, Failure, command
from cluster.config import ConfigError
from cluster.embedded import ClusterError
from deployments.model import ModelFileError

ERRORS: list[tuple[Exception, Exit]] = [
    (Failure(Exit.USAGE, "so not"), Exit.USAGE),
    (Unreachable("nobody there"), Exit.NO_CLUSTER),
    (Refusal(400, "bad"), Exit.USAGE),
    (Refusal(404, "what?"), Exit.USAGE),
    (Refusal(401, "who?"), Exit.FORBIDDEN),
    (Refusal(403, "no"), Exit.FORBIDDEN),
    (Refusal(409, "taken"), Exit.FAILED),
    (Refusal(500, "broke"), Exit.FAILED),
    (ConfigError("setting"), Exit.USAGE),
    (ModelFileError("file", ["a", "b"]), Exit.USAGE),
    (ClusterError("did not start"), Exit.FAILED),
]


Streams = pytest.CaptureFixture[str]


def failing(error: BaseException, *, is_json: bool) -> int:
    """The exit code of a command that raises `error`."""

    @command
    def run(is_json: bool) -> None:
        raise error

    with pytest.raises(typer.Exit) as ended:
        run(is_json=is_json)
    return int(ended.value.exit_code)


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: type(value).__name__)
def test_every_known_error_has_its_exit_code_and_goes_to_standard_error(
    error: Exception, code: Exit, capsys: Streams
) -> None:
    assert failing(error, is_json=False) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: {error}\n"


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: type(value).__name__)
def test_with_json_an_error_is_one_value_on_standard_output(
    error: Exception, code: Exit, capsys: Streams
) -> None:
    assert failing(error, is_json=True) == code
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": str(error)}
    assert err == ""


def test_a_failure_may_say_more_to_programs(capsys: Streams) -> None:
    failing(Failure(Exit.FAILED, "late", {"models": [1]}), is_json=True)
    assert json.loads(capsys.readouterr().out) == {"models": [1], "error": "late"}


def test_a_bug_is_shown_as_it_is() -> None:
    @command
    def run() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()


def test_an_interrupted_command_ends_as_shells_expect() -> None:
    assert failing(KeyboardInterrupt(), is_json=False) == 130


def test_an_exit_that_a_command_chose_stays() -> None:
    assert failing(typer.Exit(7), is_json=True) == 7


HARD = ["[bold]x[/bold]", "a \\[b]", ":smile: [/]", "x" * 300, "list[int] 'q' 10 %", ""]


@pytest.mark.parametrize("text", HARD)
def test_text_is_printed_as_it_is(text: str, capsys: Streams) -> None:
    terminal.note(text)
    terminal.note(text, is_json=True)
    assert capsys.readouterr() == (f"{text}\n", f"{text}\n")


@pytest.mark.parametrize("text", HARD)
def test_an_error_is_printed_as_it_is(text: str, capsys: Streams) -> None:
    failing(Failure(Exit.FAILED, text), is_json=False)
    assert capsys.readouterr().err == f"error: {text}\n"


def test_cells_of_a_table_are_printed_as_they_are(
    capsys: Streams,
) -> None:
    terminal.table(("A", "B"), [("[red]", None), (":x:", 0)], "nothing")
    head, first, second = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (head, first, second) == (["A", "B"], ["[red]"], [":x:", "0"])


def test_a_table_without_rows_says_so(capsys: Streams) -> None:
    terminal.table(("A",), [], "no keys")
    assert capsys.readouterr().out == "no keys\n"


@pytest.mark.parametrize("value", [{"a": [1]}, [], None, "text"])
def test_a_value_is_json_for_programs_and_words_for_people(value: Any, capsys: Streams) -> None:
    terminal.show(value, True, lambda: pytest.fail("these are words"))
    assert json.loads(capsys.readouterr().out) == value
    terminal.show(value, False, lambda: terminal.note("words"))
    assert capsys.readouterr().out.endswith("words\n")


def test_progress_is_told_on_standard_error_line_by_line(
    capsys: Streams,
) -> None:
    with terminal.progress("beginning [x]") as tell:
        tell("half [y]")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "… beginning [x]\n… half [y] [0 s]\n"


def test_the_clusters_folder_is_made_whole(tmp_path: Path) -> None:
    assert terminal.home_of(tmp_path / "a" / "..") == tmp_path
    assert terminal.home_of(Path("~/x")) == (Path.home() / "x").resolve()
