"""Does what the model file declares fit what the weights take and give?

Runtimes read tensors from the weights where these know them; the model file may declare them too.
Both must agree, and the answer says which field is wrong and what would be right. Here, too, live
the two ways between the protocol's datatypes and numpy's (BYTES are object arrays of `bytes`; BF16
is that of ml_dtypes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deployments.inference import DTYPES, Tensor
from deployments.model import TensorSpec
from deployments.runtimes import LoadError
from deployments.runtimes.options import near

_DATATYPES = {dtype: name for name, dtype in DTYPES.items()}


def datatype_of(dtype: np.dtype[Any]) -> str:
    """The protocol's name for a numpy dtype; text of any form is BYTES."""
    if dtype.kind in "SUT":
        return "BYTES"
    name = _DATATYPES.get(dtype.newbyteorder("="))
    if name is None:
        raise LoadError(f"values of type {dtype} can't be sent; known: {', '.join(DTYPES)}")
    return name


def tensors(specs: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
    """The model file's tensors in the form of a signature."""
    return tuple(Tensor(s.name, s.datatype, s.shape) for s in specs)


def agreed(
    field: str,
    declared: Sequence[TensorSpec],
    found: Sequence[Tensor],
    *,
    same_datatype: bool = False,
    may_leave_out: bool = False,
) -> tuple[Tensor, ...]:
    """The declared tensors, checked against those found in the weights; without any, the found.

    `field` is "inputs" or "outputs". With `same_datatype` the weights can't convert;
    `may_leave_out` lets the model file name only some of them.
    """
    if not declared:
        return tuple(found)
    by_name = {t.name: t for t in found}
    for spec in declared:
        if spec.name not in by_name:
            raise LoadError(
                f"{field}: {spec.name!r} is not in the weights; {near(spec.name, by_name)}"
            )
        _check_one(field, spec, by_name[spec.name], same_datatype)
    missing = [t.name for t in found if t.name not in {s.name for s in declared}]
    if missing and not may_leave_out:
        raise LoadError(f"{field}: the weights also have {', '.join(map(repr, missing))}")
    return tensors(declared)


def _check_one(field: str, spec: TensorSpec, found: Tensor, same_datatype: bool) -> None:
    if not _fits(spec.shape, found.shape):
        raise LoadError(
            f"{field}.{spec.name}.shape: is {list(spec.shape)}, the weights have "
            f"{list(found.shape)}"
        )
    convertible = not same_datatype and (spec.datatype == "BYTES") == (found.datatype == "BYTES")
    if spec.datatype != found.datatype and not convertible:
        raise LoadError(
            f"{field}.{spec.name}.datatype: is {spec.datatype}, the weights have {found.datatype}"
        )


def _fits(declared: Sequence[int], found: Sequence[int]) -> bool:
    return len(declared) == len(found) and all(
        a == b or -1 in (a, b) for a, b in zip(declared, found, strict=True)
    )


def as_datatype(array: NDArray[Any], datatype: str) -> NDArray[Any]:
    """`array` as `datatype`; text becomes an object array of `bytes` (UTF-8).

    Raises `ValueError` or `TypeError` when it can't be.
    """
    if datatype == "BYTES":
        return _as_bytes(array)
    target = DTYPES[datatype]
    if array.dtype == target:
        return array
    if array.dtype.kind in "SUT":
        raise TypeError(f"text can't be sent as {datatype}")
    return array.astype(target)


def _as_bytes(array: NDArray[Any]) -> NDArray[Any]:
    flat = np.empty(array.size, dtype=object)
    flat[:] = [_bytes(value) for value in array.ravel().tolist()]
    return flat.reshape(array.shape)


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    raise TypeError(f"BYTES holds text or bytes, not {type(value).__name__}")


def as_text(array: NDArray[Any]) -> NDArray[Any]:
    """A BYTES tensor as an object array of `str`. Raises `UnicodeDecodeError`."""
    flat = np.empty(array.size, dtype=object)
    flat[:] = [v.decode() if isinstance(v, bytes) else v for v in array.ravel().tolist()]
    return flat.reshape(array.shape)
