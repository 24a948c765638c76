"""Versions and tensors that state only what matters to a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deployments.model import Version
from deployments.runtimes import LoadError


def a_version(runtime: str, **fields: Any) -> Version:
    return Version.model_validate({"runtime": runtime, "source": "here", **fields})


def a_tensor(name: str, datatype: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape)}


def texts(*values: str | bytes) -> NDArray[Any]:
    return np.array([v.encode() if isinstance(v, str) else v for v in values], dtype=object)


def load_error(call: Callable[[], object]) -> str:
    with pytest.raises(LoadError) as raised:
        call()
    return str(raised.value)
