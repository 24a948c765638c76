"""Do the examples' models answer their own requests, and rightly?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.model import ModelFile, read_model_file
from deployments.runtimes import Runtime, create
from deployments.runtimes.signatures import as_datatype
from deployments.sources import fetch
from examples import build
from examples.send import REQUESTS, holds

FOLDER = Path(build.__file__).parent
MODELS = {m.name: m for m in map(read_model_file, sorted(FOLDER.rglob("*.yaml")))}
TENSOR_MODELS = [name for name, m in MODELS.items() if m.versions["1"].runtime != "vllm"]


@pytest.fixture(scope="module", autouse=True)
def weights() -> None:
    build.build(show=lambda line: None)


def test_every_example_has_a_request_and_every_request_a_model() -> None:
    assert {p.stem for p in REQUESTS.glob("*.json")} == set(MODELS)


@pytest.mark.parametrize("name", TENSOR_MODELS)
def test_every_version_answers_the_request_as_expected(name: str, tmp_path: Path) -> None:
    request = json.loads((REQUESTS / f"{name}.json").read_text())
    assert request["path"] == f"/v2/models/{name}/infer"
    for version in MODELS[name].versions:
        reply = answered(MODELS[name], version, request["body"], tmp_path)
        assert holds(reply, request["expect"]), reply


def answered(model: ModelFile, version: str, body: dict[str, Any], cache: Path) -> dict[str, Any]:
    """What the protocol would reply."""
    spec = model.versions[version]
    runtime = create(model.name, spec, fetch(spec.source, cache))
    assert isinstance(runtime, Runtime)
    signature = runtime.load()
    declared = {t.name: t.datatype for t in signature.inputs}
    inputs = {
        i["name"]: as_datatype(np.array(i["data"]), declared[i["name"]]).reshape(i["shape"])
        for i in body["inputs"]
    }
    outputs = runtime.predict(inputs)
    return {
        "outputs": [
            {
                "name": t.name,
                "datatype": t.datatype,
                "shape": list(outputs[t.name].shape),
                "data": [
                    v.decode() if isinstance(v, bytes) else v
                    for v in outputs[t.name].ravel().tolist()
                ],
            }
            for t in signature.outputs
        ]
    }


def test_building_again_makes_nothing() -> None:
    lines: list[str] = []
    build.build(show=lines.append)
    assert len(lines) == len(build.RECIPES)
    assert all("is there" in line for line in lines)


def test_the_canary_is_another_model_than_the_stable_one(tmp_path: Path) -> None:
    pixels, digits = build.digits()
    right = []
    for spec in MODELS["digits-canary"].versions.values():
        runtime = create("m", spec, fetch(spec.source, tmp_path))
        assert isinstance(runtime, Runtime)
        runtime.load()
        rows = pixels[build.TRAINING_ROWS_DIGITS :].astype(np.float32)
        label = runtime.predict({"pixels": rows})["label"]
        right.append((label == digits[build.TRAINING_ROWS_DIGITS :]).mean())
    assert right[1] > right[0] + 0.05


@pytest.mark.parametrize(
    ("reply", "expected", "answer"),
    [
        ({"a": 1, "b": 2}, {"a": 1}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ([1, 2, 3], [1, 2], True),
        ([1], [1, 2], False),
        ("The capital is Paris.", "Paris", True),
        ("Rome", "Paris", False),
        (None, {}, False),
    ],
)
def test_a_reply_may_have_more_than_is_expected_and_not_less(
    reply: Any, expected: Any, answer: bool
) -> None:
    assert holds(reply, expected) is answer
