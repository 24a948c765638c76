"""The `shoal` command. Heavy imports wait until a command needs them: help answers at once."""

from __future__ import annotations

from collections.abc import Callable

import typer

from cluster.commands import demo, keys, lifecycle, models, simulate

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Serve models on machines you own or rent. Exit codes: 0 done, 1 failed, "
    "2 wrong use, 3 no cluster, 4 no right.",
)
_COMMANDS: tuple[Callable[..., None], ...] = (
    lifecycle.up,
    lifecycle.down,
    lifecycle.status,
    models.deploy,
    models.models,
    models.promote,
    models.rollback,
    models.delete,
    models.predict,
    models.logs,
    demo.demo,
)
for function in _COMMANDS:
    app.command()(function)
for function in (simulate.simulate, simulate.what_if, simulate.generate):
    app.command(**simulate.HANDED_ON)(function)
app.add_typer(keys.app, name="keys")


def main() -> None:
    """Run the command line."""
    app(prog_name="shoal")


if __name__ == "__main__":
    main()
