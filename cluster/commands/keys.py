"""`shoal keys`: who may call, and how fast."""

from __future__ import annotations

import time
from typing import Annotated, Any
from urllib.parse import quote

import typer

from cluster.commands.terminal import (
    Exit,
    Failure,
    HomeOption,
    JsonOption,
    client,
    command,
    note,
    show,
    table,
)

app = typer.Typer(no_args_is_help=True, help="Make, replace and end the keys of callers.")


@app.command("create")
@command
def create(
    name: Annotated[str, typer.Argument(help="Who it is for.")],
    models: Annotated[
        str | None, typer.Option(help="Models that it may call, such as a,b [default: all].")
    ] = None,
    role: Annotated[str, typer.Option(help="caller or admin.")] = "caller",
    rate_rps: Annotated[int | None, typer.Option(help="Requests a second.")] = None,
    concurrency_max: Annotated[int | None, typer.Option(help="Requests at a time.")] = None,
    home: HomeOption = None,
    is_json: JsonOption = False,
) -> None:
    """Make a key. It is shown once; only its hash is kept."""
    body = {
        "name": name,
        "role": role,
        "models": _names(models),
        "rate_rps": rate_rps,
        "concurrency_max": concurrency_max,
    }
    value = client(home).admin("POST", "keys", body)
    show(value, is_json, lambda: note(value["key"]))


@app.command("rotate")
@command
def rotate(
    key: Annotated[str, typer.Argument(help="Its name or id.")],
    overlap_s: Annotated[float, typer.Option(help="How long the old one goes on.", min=0)] = 3600,
    home: HomeOption = None,
    is_json: JsonOption = False,
) -> None:
    """Make a second secret for a key; the old one goes on for a while, so nobody is locked out."""
    value = client(home).admin(
        "POST", f"keys/{quote(key, safe='')}/rotate", {"overlap_s": overlap_s}
    )

    def people() -> None:
        note(value["key"])
        until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value["old_until_s"]))
        note(f"the old key of {value['name']} goes on until {until}")

    show(value, is_json, people)


@app.command("revoke")
@command
def revoke(
    key: Annotated[str, typer.Argument(help="Its name or id.")],
    home: HomeOption = None,
    is_json: JsonOption = False,
) -> None:
    """End a key at once."""
    value = client(home).admin("DELETE", f"keys/{quote(key, safe='')}")
    show(value, is_json, lambda: note(f"{value['name']} may not call any more"))


@app.command("list")
@command
def list_keys(home: HomeOption = None, is_json: JsonOption = False) -> None:
    """The keys, without their secrets."""
    value = client(home).admin("GET", "keys")
    columns = ("NAME", "ID", "ROLE", "MODELS", "RATE/S", "AT A TIME", "STATE")
    show(value, is_json, lambda: table(columns, [_row(k) for k in value], "no keys"))


def _names(text: str | None) -> list[str]:
    """The models named; nothing where something was meant must not become all of them."""
    if text is None:
        return []
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise Failure(Exit.USAGE, f"--models must be names such as a,b, not {text!r}")
    return names


def _row(key: dict[str, Any]) -> tuple[Any, ...]:
    state = "revoked" if key["revoked_s"] else f"{key['secrets']} valid"
    models = ", ".join(key["models"]) or "all"
    return (
        key["name"],
        key["id"],
        key["role"],
        models,
        key["rate_rps"],
        key["concurrency_max"],
        state,
    )
