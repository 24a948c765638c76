"""How fast is each model without any server? And what are the right answers?

`prepare` trains the forest and writes the inputs and reference answers that every system is held
to; `measure` calls the model in a loop, in batches of 32: the limit that a server can approach.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from benchmarks.serving.peers import models

_WORDS = tuple(
    "river harbour lantern market signal copper window garden engine letter winter ladder "  # noqa: SIM905
    "captain silver morning shelter bridge thunder orchard compass".split()
)


def sentences(count: int) -> list[str]:
    """Sentences of 8 to 23 words, no two the same."""
    return [
        " ".join(_WORDS[(i * 7 + k * (i % 5 + 1)) % len(_WORDS)] for k in range(8 + i % 16))
        + f" {i}."
        for i in range(count)
    ]


def prepare() -> None:
    """Write digits.joblib and reference.json."""
    import joblib
    from sklearn.datasets import load_digits
    from sklearn.ensemble import RandomForestClassifier

    folder = models.data_folder()
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits(return_X_y=True)
    forest = RandomForestClassifier(n_estimators=100, random_state=0, n_jobs=1)
    forest.fit(images[:1200], labels[:1200])
    joblib.dump(forest, folder / "digits.joblib")
    rows: dict[str, list[Any]] = {
        "noop": [[float(i), i + 0.5, -float(i), 1.0] for i in range(64)],
        "digits": images[1200:1456].tolist(),
        "minilm": sentences(256),
    }
    reference = {
        name: {"rows": inputs, "answers": models.load(name)(inputs)}
        for name, inputs in rows.items()
    }
    (folder / "reference.json").write_text(json.dumps(reference))


def measure(workload: str, seconds: float) -> float:
    """Rows a second in batches of 32."""
    rows = json.loads((models.data_folder() / "reference.json").read_text())[workload]["rows"]
    predict = models.load(workload)
    batches = [rows[at : at + 32] for at in range(0, len(rows), 32)]
    for batch in batches:
        predict(batch)
    done, start_s = 0, time.perf_counter()
    while time.perf_counter() - start_s < seconds:
        done += len(predict(batches[done // 32 % len(batches)]))
    return done / (time.perf_counter() - start_s)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["prepare", "measure"])
    parser.add_argument("--workload", choices=list(models.PREDICTORS))
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare()
    else:
        print(json.dumps({"rows_per_s": measure(arguments.workload, arguments.seconds)}))


if __name__ == "__main__":
    main()
