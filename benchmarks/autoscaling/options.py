"""What do the commands of this folder have in common: names, folders, progress?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.autoscaling.combinations import COMBINATIONS, WINDOWS

HERE = Path(__file__).parent
BOUNDS = HERE / ".bounds"
"""Where certified bounds are kept, so that none is worked out twice."""

BY_NAME = {combination.name: combination for combination in COMBINATIONS}


def known(
    parser: argparse.ArgumentParser, field: str, text: str, names: Sequence[str]
) -> tuple[str, ...]:
    """The words of `a,b,…`, each once; an error of `parser` where one is not among `names`."""
    chosen = tuple(dict.fromkeys(text.split(",")))
    for name in chosen:
        if name not in names:
            parser.error(f"--{field}: {name!r} is not one of {', '.join(names)}")
    return chosen


def windows(parser: argparse.ArgumentParser, text: str) -> tuple[int, ...]:
    """The windows in `0,3` or `0-4`, each once; an error of `parser` for anything else."""
    chosen: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            parser.error(f"--windows: {part!r} is neither a number nor a range such as 0-4")
        chosen += range(int(first), int(last or first) + 1)
    if not chosen or max(chosen) >= WINDOWS:
        parser.error(f"--windows: {text!r} must lie in 0-{WINDOWS - 1}")
    return tuple(dict.fromkeys(chosen))


def tell(line: str) -> None:
    """A line of progress."""
    print(f"… {line}", file=sys.stderr, flush=True)
