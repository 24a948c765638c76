"""The model that does nothing, for Shoal: numbers in, the same numbers out."""

from __future__ import annotations

from typing import Any


class Noop:
    inputs = ({"name": "x", "datatype": "FP32", "shape": [-1, 4]},)
    outputs = ({"name": "y", "datatype": "FP32", "shape": [-1, 4]},)

    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"]}
