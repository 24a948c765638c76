"""Does the registry keep versions apart, whole, and for many processes?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deployments import sources
from deployments.registry import Registry
from tests.deployments.runtimes.builders import load_error


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder = tmp_path_factory.mktemp("registry")
    return Registry(f"sqlite:///{folder}/registry.db", folder / "artifacts")


def a_file(folder: Path, text: str = "weights") -> Path:
    file = folder / "model.joblib"
    file.write_text(text)
    return file


def test_versions_are_numbered_and_keep_their_own_weights(
    registry: Registry, tmp_path: Path
) -> None:
    first = registry.register("fraud", a_file(tmp_path, "one"), runtime="sklearn")
    second = registry.register(
        "fraud", a_file(tmp_path, "two"), runtime="sklearn", metadata={"accuracy": "0.9"}
    )
    assert (first, second) == ("1", "2")
    assert registry.resolve("fraud", "1").read_text() == "one"
    assert registry.resolve("fraud", "2").read_text() == "two"
    versions = registry.versions("fraud")
    assert [v.version for v in versions] == ["1", "2"]
    assert versions[1].runtime == "sklearn"
    assert versions[1].metadata == {"accuracy": "0.9"}
    assert "fraud" in registry.names()


def test_a_folder_comes_back_as_a_folder(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a").write_text("a")
    (tmp_path / "b").write_text("b")
    registry.register("folder", tmp_path, runtime="python")
    folder = registry.resolve("folder", "1")
    assert (folder / "sub/a").read_text() == "a"
    assert (folder / "b").read_text() == "b"


def test_an_alias_follows_the_version_that_it_is_given(registry: Registry, tmp_path: Path) -> None:
    registry.register("alias", a_file(tmp_path, "one"), runtime="onnx", alias="champion")
    registry.register("alias", a_file(tmp_path, "two"), runtime="onnx")
    assert registry.fetch("models:/alias@champion").read_text() == "one"
    registry.alias("alias", "champion", "2")
    assert sources.fetch("models:/alias@champion", tmp_path, registry=registry).read_text() == "two"
    assert registry.versions("alias")[1].aliases == ("champion",)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("models:/nearr/1", "did you mean 'near'?"),
        ("models:/near/2", "has no version '2'; it has 1, @best"),
        ("models:/near@bst", "has no version '@bst'"),
        ("models:/near", "must be models:/NAME/VERSION"),
        ("models:near/1", "must be models:/NAME/VERSION"),
    ],
)
def test_what_is_not_registered_names_what_is(
    registry: Registry, tmp_path: Path, source: str, expected: str
) -> None:
    if "near" not in registry.names():
        registry.register("near", a_file(tmp_path), runtime="onnx", alias="best")
    assert expected in load_error(lambda: registry.fetch(source))


def test_a_bad_name_and_missing_weights_are_refused(registry: Registry, tmp_path: Path) -> None:
    for name in ("a/b", "", "a b", "@a"):
        assert "name:" in load_error(
            lambda name=name: registry.register(name, a_file(tmp_path), runtime="onnx")  # type: ignore[misc]
        )
    assert "does not exist" in load_error(
        lambda: registry.register("a", tmp_path / "nothing", runtime="onnx")
    )


def test_a_source_in_the_registry_needs_one(tmp_path: Path) -> None:
    assert "none is configured" in load_error(lambda: sources.fetch("models:/a/1", tmp_path))


def test_a_registry_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_text("this is no database, and long enough to be seen as such")
    registry = Registry(f"sqlite:///{tmp_path}/registry.db", tmp_path)
    assert "can't be opened" in load_error(registry.names)


def test_processes_that_begin_at_once_share_a_new_registry(tmp_path: Path) -> None:
    file = a_file(tmp_path)
    script = (
        "import sys, pathlib\n"
        "from deployments.registry import Registry\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "registry = Registry(f'sqlite:///{folder}/registry.db', folder / 'artifacts')\n"
        "for _ in range(3):\n"
        "    registry.register('fraud', folder / 'model.joblib', runtime='sklearn')\n"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=100)
        assert worker.returncode == 0, errors.decode()
    registry = Registry(f"sqlite:///{tmp_path}/registry.db", tmp_path / "artifacts")
    versions = registry.versions("fraud")
    assert [v.version for v in versions] == [str(n) for n in range(1, 7)]
    assert len({v.weights for v in versions}) == 6
    assert registry.resolve("fraud", "6").read_text() == file.read_text()
