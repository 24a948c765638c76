"""A model without weights: the mood of a sentence, by counting words."""

from __future__ import annotations

from typing import Any

import numpy as np

GOOD = frozenset(["good", "great", "happy", "calm", "bright", "love", "sunny", "delighted"])
SAD = frozenset(["bad", "sad", "angry", "dark", "hate", "grey", "tired", "lost"])


class Mood:
    """Shoal calls `load` once and `predict` with each batch."""

    inputs = ({"name": "text", "datatype": "BYTES", "shape": [-1]},)
    outputs = ({"name": "mood", "datatype": "FP32", "shape": [-1]},)

    def load(self, options: dict[str, Any]) -> None:
        self.strength = float(options.get("strength", 1.0))

    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        texts = [text.decode(errors="replace") for text in inputs["text"]]
        return {"mood": np.array([self.mood(text) for text in texts])}

    def mood(self, text: str) -> float:
        words = text.lower().split()
        balance = sum(w.strip(".,!?") in GOOD for w in words)
        balance -= sum(w.strip(".,!?") in SAD for w in words)
        return max(-1.0, min(1.0, balance * self.strength))
