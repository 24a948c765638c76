"""What did the user ask of this runtime, and which file holds the weights?

A runtime declares the options that it knows as a frozen pydantic type; whatever else stands under
`options` in the model file is an error that names the near one. Weights may be a file or a folder
with one candidate in it; `options.file` picks among several.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from deployments.runtimes import LoadError


class Options(BaseModel):
    """The base of each runtime's options."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


KnownOptions = TypeVar("KnownOptions", bound=Options)


def read_options(kind: type[KnownOptions], given: Mapping[str, Any]) -> KnownOptions:
    """`given` checked against `kind`. Raises `LoadError` naming each bad option."""
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        problems = [_problem(e, list(kind.model_fields)) for e in error.errors()]
        raise LoadError("; ".join(problems)) from None


def near(name: str, known: Iterable[str]) -> str:
    """A hint: the known name that `name` may have meant, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known here: {', '.join(names) or 'none'}"


def weights_file(weights: Path | None, suffixes: Sequence[str], chosen: str | None = None) -> Path:
    """The one file with weights at `weights` (a file, or a folder that holds it).

    Raises `LoadError` naming what is there instead.
    """
    if weights is None:
        raise LoadError("source: is missing; this runtime needs weights")
    if not weights.exists():
        raise LoadError(f"source: {weights} does not exist")
    if weights.is_file():
        return _with_suffix(weights, suffixes)
    if chosen is not None:
        return _chosen(weights, chosen)
    found = sorted(p for p in weights.rglob("*") if p.suffix in suffixes and p.is_file())
    if len(found) == 1:
        return found[0]
    wanted = " or ".join(suffixes)
    if not found:
        raise LoadError(f"source: {weights} holds no {wanted} file; it holds {_listing(weights)}")
    names = ", ".join(str(p.relative_to(weights)) for p in found[:8])
    raise LoadError(f"source: {weights} holds several {wanted} files ({names}): set options.file")


def _with_suffix(file: Path, suffixes: Sequence[str]) -> Path:
    if file.suffix not in suffixes:
        raise LoadError(
            f"source: {file.name} ends in {file.suffix or 'nothing'!r}; "
            f"this runtime reads {' or '.join(suffixes)}"
        )
    return file


def _chosen(folder: Path, name: str) -> Path:
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise LoadError(f"options.file: {name!r} leads out of {folder}")
    if not file.is_file():
        known = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
        raise LoadError(f"options.file: {name!r} is not in {folder}; {near(name, known)}")
    return file


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "") if names else "nothing"


def _problem(error: Any, known: Sequence[str]) -> str:
    field = ".".join(str(part) for part in ("options", *error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{field}: unknown option; {near(str(error['loc'][-1]), known)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{field}: {message} (is {error.get('input')!r})"


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, never empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
