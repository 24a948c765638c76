"""What does the source look like: which modules, what each imports, how long its functions are?

Read with `ast`, so nothing is imported and late imports count as much as early ones. The rules
themselves are in `test_tidy`; the sizes are shown after a run by `conftest`.
"""

from __future__ import annotations

import ast
import statistics
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("autoscaler", "chaos", "cluster", "dashboards", "deployments")


@dataclass(frozen=True)
class Module:
    """One Python file. `path` is relative to the root, with slashes."""

    path: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """Its dotted name."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def package(self) -> str:
        return self.path.partition("/")[0]


@dataclass(frozen=True)
class Import:
    """One imported module, and the line that does it."""

    target: str
    line: int


@dataclass(frozen=True)
class Size:
    """How large a package is. `long_fraction`: share of its function lines in long functions."""

    package: str
    files: int
    lines: int
    functions: int
    median_lines: float
    long_fraction: float


@cache
def files() -> tuple[str, ...]:
    """Every file that belongs to the repository, committed or about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(sorted(path for path in listed.stdout.splitlines() if (ROOT / path).is_file()))


@cache
def modules(*packages: str) -> tuple[Module, ...]:
    """The modules of these top-level folders (without any named: all of Shoal's packages)."""
    wanted = packages or PACKAGES
    return tuple(
        Module(path, ast.parse((ROOT / path).read_text(encoding="utf-8"), path))
        for path in files()
        if path.endswith(".py") and path.partition("/")[0] in wanted
    )


def imports(module: Module) -> Iterator[Import]:
    """Everything that `module` imports: early, late, for types only, or by name at run time."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = _origin(module, node)
            yield from (Import(_target(origin, alias.name), node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and (name := _imported_by_name(node)):
            yield Import(name, node.lineno)


def _origin(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    here = Path(module.path).with_suffix("").parts[: -node.level]
    return ".".join([*here, *([node.module] if node.module else [])])


def _target(origin: str, name: str) -> str:
    """`from a import b` names the module a.b where there is one, else a."""
    inner = ROOT / origin.replace(".", "/") / name
    return f"{origin}.{name}" if inner.is_dir() or inner.with_suffix(".py").is_file() else origin


def _imported_by_name(call: ast.Call) -> str | None:
    """The module in `import_module("a.b")`; of an f-string, the part before its first value."""
    if dotted(call.func).rpartition(".")[2] not in ("import_module", "__import__") or not call.args:
        return None
    argument = call.args[0]
    if isinstance(argument, ast.JoinedStr) and argument.values:
        argument = argument.values[0]
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        return argument.value.rstrip(".")
    return None


def dotted(node: ast.AST) -> str:
    """`a.b.c` for such a chain of names, else nothing."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name) if outer := dotted(value):
            return f"{outer}.{name}"
    return ""


def sizes() -> list[Size]:
    """The trend that is watched and never enforced."""
    return [_size(package) for package in (*PACKAGES, "benchmarks", "examples", "tests")]


def _size(package: str) -> Size:
    ours = modules(package)
    lengths = [length for module in ours for length in _function_lengths(module.tree)]
    long = sum(length for length in lengths if length > 50)
    return Size(
        package,
        len(ours),
        sum(len((ROOT / module.path).read_bytes().splitlines()) for module in ours),
        len(lengths),
        statistics.median(lengths) if lengths else 0,
        long / sum(lengths) if lengths else 0,
    )


def _function_lengths(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1
