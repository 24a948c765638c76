"""`shoal simulate`, `what-if`, `generate`: the autoscaler in recorded markets, without a cluster.

The options are the autoscaler's own (`python -m autoscaler`), handed on as they are, so that there
is one description of them; `--help` after a command shows it.
"""

from __future__ import annotations

from typing import Any

import typer

HANDED_ON: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}
"""How to register these commands: every word after their name is theirs."""


def simulate(context: typer.Context) -> None:
    """Run policies through a recorded market, against the least that anyone could have paid."""
    _hand_on("simulate", context)


def what_if(context: typer.Context) -> None:
    """Make recorded decisions again with other settings, prices or objectives."""
    _hand_on("what-if", context)


def generate(context: typer.Context) -> None:
    """Make requests, a market and a profile that fit each other, to simulate with."""
    _hand_on("generate", context)


def _hand_on(name: str, context: typer.Context) -> None:
    from autoscaler.__main__ import main

    raise typer.Exit(main([name, *context.args], program="shoal"))
