"""Does the repository keep the shape that it says it has?

Who may know whom, what decides without a clock or a cluster, which one module reads the
environment, what no file may hold. A rule is a table at the top; an exception stands in it with its
reason.
"""

from __future__ import annotations

import ast
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import packages_distributions
from itertools import chain

import pytest

from dashboards import metrics
from tests import source
from tests.source import PACKAGES, ROOT, Module, dotted

MAY_KNOW: dict[str, set[str]] = {
    "autoscaler": set(),
    "chaos": {"autoscaler", "cluster", "dashboards", "deployments"},
    "cluster": {"autoscaler", "dashboards", "deployments"},
    "dashboards": set(),
    "deployments": {"dashboards.metrics"},
}
OUTSIDE = ("benchmarks", "examples", "tests")  # what Shoal itself knows nothing of

CLUSTER_AND_CLOCK = {"ray", "time", "datetime"}
WITHOUT: dict[str, set[str]] = {
    "autoscaler/": {*CLUSTER_AND_CLOCK, "random"},
    "deployments/model.py": CLUSTER_AND_CLOCK,
    "deployments/inference.py": CLUSTER_AND_CLOCK,
    "deployments/edge/routing.py": CLUSTER_AND_CLOCK,
    "deployments/edge/configuration.py": CLUSTER_AND_CLOCK,
    "deployments/serving/protocols/": CLUSTER_AND_CLOCK,
    "cluster/reconciliation.py": CLUSTER_AND_CLOCK,
}
"""What these may not import, since they get facts, time and chance as arguments."""

EXCEPTED: dict[tuple[str, str], str] = {
    ("autoscaler/__main__.py", "time"): "a stopwatch, read outside the decisions",
}
"""(file, module) that may be imported all the same: why."""

NUMBERS = {"numpy", "scipy"}
"""All that autoscaler/ may import besides Python's own library and itself."""

BESIDES_NUMBERS: dict[tuple[str, str], str] = {
    ("autoscaler/queue_kernel.py", "numba"): "the simulator's inner loop",
    ("autoscaler/report.py", "matplotlib"): "pictures",
    ("autoscaler/profile.py", "yaml"): "the format of profiles",
}
"""(file, module) that may be imported there all the same: why."""

READS_ENVIRONMENT: dict[str, str] = {
    "cluster/config.py": "the one reader of settings",
    "deployments/runtimes/surroundings.py": "sets what libraries read only there",
    "deployments/serving/meter.py": "sets prometheus_client's shared folder, read only there",
}
"""Files that may touch the environment: why."""

SEEDED = {"default_rng", "Generator", "SeedSequence", "PCG64", "Philox", "BitGenerator"}
"""What may be called in numpy.random: generators with a seed, handed on as arguments."""

NOT_NAMES = re.compile(r"(^|_)(utils?|helpers?|managers?|misc|common)(_|$)")

MACHINE_PATH = re.compile(
    r"(?<![\w.~$}*)])/(?:" + "|".join(["home", "root", "work", "Users"]) + r")/[\w.]"
)
REGISTRY_HOST = re.compile(
    "|".join(
        re.escape(".".join(parts))
        for parts in [
            ("pypi", "org"),
            ("pythonhosted", "org"),
            ("pypi", "python", "org"),
            ("npmjs", "org"),
            ("download", "pytorch", "org"),
            ("deb", "debian", "org"),
            ("crates", "io"),
        ]
    )
)


def expect_none(problems: Iterable[str]) -> None:
    found = sorted(problems)
    assert not found, "\n" + "\n".join(found)


# --- who may know whom


def strangers(module: Module) -> Iterator[str]:
    """The imports of `module` that its package may not make."""
    allowed = {module.package, *MAY_KNOW[module.package]}
    for found in source.imports(module):
        if found.target.partition(".")[0] not in (*PACKAGES, *OUTSIDE):
            continue
        if not any(f"{found.target}.".startswith(f"{known}.") for known in allowed):
            yield f"{module.path}:{found.line} imports {found.target}"


def test_every_package_knows_only_those_that_it_may_know() -> None:
    expect_none(problem for module in source.modules() for problem in strangers(module))


def unwanted(module: Module) -> Iterator[str]:
    """The imports that a module which only decides may not make."""
    names = {
        n for prefix, banned in WITHOUT.items() if module.path.startswith(prefix) for n in banned
    }
    for found in source.imports(module):
        top = found.target.partition(".")[0]
        if top in names and (module.path, top) not in EXCEPTED:
            yield f"{module.path}:{found.line} imports {found.target}"


def test_what_decides_imports_neither_the_cluster_nor_a_clock() -> None:
    expect_none(problem for module in source.modules() for problem in unwanted(module))


def strange_to_autoscaler(module: Module) -> Iterator[str]:
    """The imports of `module` that are neither Python's own, nor the autoscaler's, nor numbers."""
    known = {*sys.stdlib_module_names, *NUMBERS, "autoscaler"}
    for found in source.imports(module):
        top = found.target.partition(".")[0]
        if top not in known and (module.path, top) not in BESIDES_NUMBERS:
            yield f"{module.path}:{found.line} imports {found.target}"


def test_the_autoscaler_knows_numbers_and_nothing_else() -> None:
    expect_none(p for m in source.modules("autoscaler") for p in strange_to_autoscaler(m))


def unseeded(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if not re.match(r"(np|numpy)\.random\.", name):
            continue
        function = name.rpartition(".")[2]
        if function not in SEEDED or (function == "default_rng" and not node.args):
            yield f"{module.path}:{node.lineno} calls {name} without a seed"


def test_chance_in_the_autoscaler_always_has_a_seed() -> None:
    expect_none(problem for m in source.modules("autoscaler") for problem in unseeded(m))


def environment_uses(module: Module) -> Iterator[str]:
    touching = {"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"}
    for node in ast.walk(module.tree):
        if dotted(node) in touching:
            yield f"{module.path}:{node.lineno} uses {dotted(node)}"  # type: ignore[attr-defined]
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {f"os.{alias.name}" for alias in node.names} & touching
            yield from (f"{module.path}:{node.lineno} imports {name}" for name in names)


def test_the_environment_is_read_in_one_place() -> None:
    expect_none(
        problem
        for module in source.modules()
        if module.path not in READS_ENVIRONMENT
        for problem in environment_uses(module)
    )


@pytest.mark.parametrize(
    "path", [*WITHOUT, *READS_ENVIRONMENT, *(path for path, _ in (*EXCEPTED, *BESIDES_NUMBERS))]
)
def test_rules_and_exceptions_are_about_files_that_exist(path: str) -> None:
    if path in ("cluster/reconciliation.py", "cluster/config.py") and not (ROOT / path).exists():
        pytest.skip(f"{path} is not written yet")
    assert (ROOT / path).exists()


def declared_packages() -> set[str]:
    """The distributions that pyproject.toml asks for, in any extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    return {distribution(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in asked}


def distribution(name: str) -> str:
    """A distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_that_is_imported_is_asked_for_in_the_project_file() -> None:
    declared, providers = declared_packages(), packages_distributions()
    known = {*sys.stdlib_module_names, *PACKAGES}
    expect_none(
        f"{module.path}:{found.line} imports {found.target}"
        for module in source.modules()
        for found in source.imports(module)
        if (top := found.target.partition(".")[0]) not in known
        and not {distribution(name) for name in providers.get(top, [top])} & declared
    )


# --- names, docstrings, text


def test_no_module_is_a_drawer() -> None:
    parts = ((m.path, part) for m in source.modules() for part in m.name.split("."))
    expect_none(path for path, part in parts if NOT_NAMES.search(part))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_which_question_it_answers(package: str) -> None:
    bare = (m.path for m in source.modules(package) if not ast.get_docstring(m.tree))
    expect_none(bare)


def texts() -> Iterator[tuple[str, int, str]]:
    """(file, line number, line) of every text file."""
    for path in source.files():
        try:
            lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        yield from ((path, number, line) for number, line in enumerate(lines, 1))


@pytest.mark.parametrize(
    ("what", "pattern"),
    [("a path of one machine", MACHINE_PATH), ("a registry's host", REGISTRY_HOST)],
)
def test_no_file_names_a_place_that_others_do_not_have(what: str, pattern: re.Pattern[str]) -> None:
    expect_none(
        f"{path}:{number} holds {what}: {line.strip()[:100]}"
        for path, number, line in texts()
        if pattern.search(line)
    )


def test_the_patterns_find_what_they_are_for() -> None:
    assert MACHINE_PATH.search("cd " + "/".join(["", "home", "me", "shoal"]))
    assert not MACHINE_PATH.search("~/work/shoal and $ROOT/work/x and 127.0.0.1/home/x")
    assert REGISTRY_HOST.search("https://" + ".".join(["pypi", "org"]) + "/simple")


# --- metrics


REPORTING = ("cluster/controller.py", "deployments/serving/meter.py")

CONSTANTS = {
    name: value for name, value in vars(metrics).items() if isinstance(value, metrics.Metric)
}


def metrics_used(module: Module) -> set[str]:
    """The constants of the catalogue that `module` uses."""
    used: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.module == "dashboards.metrics":
            used |= {alias.name for alias in node.names}
        elif (parts := dotted(node).split("."))[-2:-1] == ["metrics"]:
            used.add(parts[-1])
    return used & set(CONSTANTS)


def test_every_declared_metric_is_reported_or_queried() -> None:
    for path in REPORTING:
        if not (ROOT / path).exists():
            pytest.skip(f"not everything that reports is written yet: {path}")
    outside = [module for module in source.modules() if module.path != "dashboards/metrics.py"]
    unused = set(CONSTANTS).difference(*(metrics_used(module) for module in outside))
    expect_none(unused)


def test_only_the_catalogue_makes_series() -> None:
    expect_none(
        f"{module.path}:{found.line} imports prometheus_client; use dashboards.metrics"
        for module in source.modules()
        if module.path != "dashboards/metrics.py"
        for found in source.imports(module)
        if found.target.partition(".")[0] == "prometheus_client"
    )


def test_every_series_in_a_query_or_page_is_declared() -> None:
    declared = {
        name for metric in metrics.CATALOGUE.values() for name in (metric.name, *metric.series)
    }
    shown = (
        (path, number, name)
        for path, number, line in texts()
        if path.startswith(("dashboards/", "docs/")) or path == "README.md"
        for name in re.findall(r"\bshoal_[a-z][a-z_]*\b(?![-./(])", line)
    )
    expect_none(
        f"{path}:{number} names {name}" for path, number, name in shown if name not in declared
    )


# --- what the README says


@cache
def readme() -> str:
    path = ROOT / "README.md"
    if not path.exists():
        pytest.skip("README.md is not written yet")
    return path.read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The shell commands in the README's code blocks, each as its words."""
    blocks = re.findall(
        r"^```(?:bash|sh|shell|console)\n(.*?)^```", readme(), re.DOTALL | re.MULTILINE
    )
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.strip()]
    return [command for command in words if command]


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))


def test_every_make_target_in_the_readme_exists() -> None:
    asked = {
        word
        for command in commands()
        if "make" in command
        for word in command[command.index("make") + 1 :]
        if "=" not in word and not word.startswith("-")
    }
    assert asked
    assert asked <= make_targets()


def test_every_shoal_command_in_the_readme_exists() -> None:
    asked = [
        command[place + 1 :]
        for command in commands()
        for place, word in enumerate(command)
        if word.rpartition("/")[2] == "shoal"
    ]
    expect_none(" ".join(words) for words in asked if not _is_shoal_command(words))


def _is_shoal_command(words: list[str]) -> bool:
    """Whether `shoal` has a command that these words begin with."""
    import typer

    from cluster.__main__ import app  # late: only where there is a README

    here = typer.main.get_command(app)
    for word in words:
        choices = getattr(here, "commands", None)
        if choices is None or word.startswith("-"):
            return True
        if word not in choices:
            return False
        here = choices[word]
    return True


def test_every_file_that_the_readme_links_to_exists() -> None:
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", readme())
    expect_none(target for target in targets if not (ROOT / target).exists())
