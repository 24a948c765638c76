"""Where do the examples' weights come from?

They are trained here, in seconds, from the data sets that scikit-learn carries: nothing is
downloaded. Each recipe writes one file into `weights/`; a file is made again only when its recipe
or a library that wrote it has changed. (MiniLM and SmolLM2 come inside packages; see their model
files.)

    python examples/build.py [NAME …]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import inspect
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).parent / "weights"
MADE = WEIGHTS / "made.json"
"""Which recipe made which file: digests by name."""

TRAINING_ROWS_DIGITS = 1437
TRAINING_ROWS_CANCER = 455


@dataclass(frozen=True)
class Recipe:
    """How one file is made. `libraries` are those whose version the file depends on."""

    file: str
    make: Callable[[Path], None]
    libraries: tuple[str, ...]

    def digest(self) -> str:
        parts = [inspect.getsource(self.make)]
        parts += [f"{name}=={importlib.metadata.version(name)}" for name in self.libraries]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def digits() -> tuple[Any, Any]:
    """Handwritten digits, 8 x 8 pixels of 0 to 16, and which digit each is."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return pixels, labels


def cancer() -> tuple[Any, Any]:
    """30 measures of breast tumours, shuffled, and their kind in words."""
    import numpy as np
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    order = np.random.default_rng(0).permutation(len(data.data))
    return data.data[order], data.target_names[data.target[order]]


def forest(**settings: Any) -> Any:
    """A forest fitted on the training rows of the digits."""
    from sklearn.ensemble import RandomForestClassifier

    pixels, labels = digits()
    model = RandomForestClassifier(random_state=0, n_jobs=-1, **settings)
    return model.fit(pixels[:TRAINING_ROWS_DIGITS], labels[:TRAINING_ROWS_DIGITS])


def pipeline() -> Any:
    """Scaling and a logistic regression, fitted on the training rows of the tumours."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    measures, kinds = cancer()
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return model.fit(measures[:TRAINING_ROWS_CANCER], kinds[:TRAINING_ROWS_CANCER])


def save_skops(model: Any, file: Path) -> None:
    import skops.io

    skops.io.dump(model, file)


def save_joblib(model: Any, file: Path) -> None:
    import joblib

    joblib.dump(model, file)


def make_digits(file: Path) -> None:
    save_joblib(forest(n_estimators=100), file)


def make_breast_cancer(file: Path) -> None:
    save_skops(pipeline(), file)


def make_canary_old(file: Path) -> None:
    save_joblib(forest(n_estimators=10, max_depth=5), file)


def make_canary_new(file: Path) -> None:
    save_joblib(forest(n_estimators=200, max_features=0.3), file)


def save_onnx(model: Any, file: Path, name: str, width: int) -> None:
    """The model as a graph whose outputs are plain tensors, named as the sklearn runtime does."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    graph = to_onnx(
        model,
        initial_types=[(name, FloatTensorType([None, width]))],
        options={id(model): {"zipmap": False}},
    )
    text = {
        "output_label": "label",
        "probabilities": "probability",
        "output_probability": "probability",
    }
    rename(graph, text)
    file.write_bytes(graph.SerializeToString())


def rename(graph: Any, names: dict[str, str]) -> None:
    """Other names for tensors of a graph, wherever they are used."""
    for node in graph.graph.node:
        node.input[:] = [names.get(n, n) for n in node.input]
        node.output[:] = [names.get(n, n) for n in node.output]
    for output in graph.graph.output:
        output.name = names.get(output.name, output.name)


def make_digits_onnx(file: Path) -> None:
    save_onnx(forest(n_estimators=100), file, "pixels", 64)


def make_breast_cancer_onnx(file: Path) -> None:
    save_onnx(pipeline(), file, "measures", 30)


def network() -> Any:
    """A small network fitted on the training rows of the digits: 64 to 64 to 10."""
    import torch

    torch.manual_seed(0)
    pixels, labels = digits()
    x = torch.tensor(pixels[:TRAINING_ROWS_DIGITS], dtype=torch.float32)
    y = torch.tensor(labels[:TRAINING_ROWS_DIGITS])
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10), torch.nn.Softmax(-1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.nll_loss(torch.log(model(x / 16) + 1e-9), y).backward()
        optimizer.step()
    with torch.no_grad():
        model[0].weight /= 16  # so that the network takes pixels as they are
    return model.eval()


def make_digits_torchscript(file: Path) -> None:
    import torch

    torch.jit.script(network()).save(str(file))


def make_digits_exported(file: Path) -> None:
    import torch

    rows = torch.export.Dim("rows", min=1, max=65536)
    program = torch.export.export(network(), (torch.zeros(2, 64),), dynamic_shapes=({0: rows},))
    torch.export.save(program, file)


SKLEARN = ("scikit-learn", "numpy")

RECIPES = {
    "digits": Recipe("digits.joblib", make_digits, SKLEARN),
    "breast-cancer": Recipe("breast-cancer.skops", make_breast_cancer, (*SKLEARN, "skops")),
    "canary-old": Recipe("canary-old.joblib", make_canary_old, SKLEARN),
    "canary-new": Recipe("canary-new.joblib", make_canary_new, SKLEARN),
    "digits-onnx": Recipe("digits.onnx", make_digits_onnx, (*SKLEARN, "skl2onnx")),
    "breast-cancer-onnx": Recipe(
        "breast-cancer.onnx", make_breast_cancer_onnx, (*SKLEARN, "skl2onnx")
    ),
    "digits-torch": Recipe("digits.pt", make_digits_torchscript, (*SKLEARN, "torch")),
    "digits-exported": Recipe("digits.pt2", make_digits_exported, (*SKLEARN, "torch")),
}


def build(names: Sequence[str] = (), *, show: Callable[[str], None] = print) -> list[Path]:
    """Make what is missing or out of date; all recipes if no names are given."""
    WEIGHTS.mkdir(exist_ok=True)
    made: dict[str, str] = json.loads(MADE.read_text()) if MADE.exists() else {}
    chosen = list(names or RECIPES)
    for number, name in enumerate(chosen, start=1):
        recipe = RECIPES[name]
        file = WEIGHTS / recipe.file
        head = f"[{number}/{len(chosen)}] {recipe.file:<20}"
        if made.get(name) == recipe.digest() and file.exists():
            show(f"{head} is there ({file.stat().st_size / 1e6:.1f} MB)")
            continue
        started_s = time.monotonic()
        _make(recipe, file)
        made[name] = recipe.digest()
        _write(MADE, json.dumps(made, indent=1).encode())
        took_s = time.monotonic() - started_s
        show(f"{head} made in {took_s:.1f} s ({file.stat().st_size / 1e6:.1f} MB)")
    return [WEIGHTS / RECIPES[name].file for name in chosen]


def _make(recipe: Recipe, file: Path) -> None:
    part = file.with_name(f".{os.getpid()}-{file.name}")
    try:
        recipe.make(part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _write(file: Path, content: bytes) -> None:
    part = file.with_name(f".{os.getpid()}-{file.name}")
    part.write_bytes(content)
    part.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the examples' weights.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RECIPES))
    names = parser.parse_args().names
    if unknown := [n for n in names if n not in RECIPES]:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(RECIPES)}")
    build(names)


if __name__ == "__main__":
    main()
