"""How do tensors travel as JSON and as bytes?

The Open Inference Protocol names datatypes (FP32, BYTES …), lets data be nested or flat JSON in
row-major order, and has a binary form: little-endian numbers, one byte a BOOL, and for BYTES a
4-byte length before each element.

    JSON list ── from_json ──┐                 ┌── to_json ──► JSON text
                             ├──► NDArray ─────┤
    raw bytes ── from_bytes ─┘                 └── to_bytes ─► raw bytes

Everything that comes from outside is checked, because numpy is too kind: it reads `true` as 1,
wraps nothing but turns numbers into text, and takes ragged lists for objects. What is wrong raises
`InferenceError(INVALID)` that names the tensor, the value and what would be right. Data become
arrays of their own (writable, aligned); nothing points into the request's body.

What a model expects is checked by `Inputs`, once made from its signature.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from deployments.inference import DTYPES, Fault, InferenceError, Signature, Tensor, Tensors

BINARY_ONLY = frozenset({"FP16", "BF16"})
"""Datatypes that the protocol never sends as JSON numbers."""

_DIMENSIONS_MAX = 32
_LENGTH_MAX = 2**31 - 1
_FLOAT_MAX = float(np.finfo(np.float32).max)
_LENGTH = struct.Struct("<I")

_NAMES: dict[np.dtype[Any], str] = {dtype: name for name, dtype in DTYPES.items()}
_INTEGERS = frozenset(n for n, dtype in DTYPES.items() if dtype.kind in "iu" and n != "BF16")
_ALLOWED: dict[str, frozenset[type]] = {
    **{name: frozenset({int}) for name in _INTEGERS},
    "BOOL": frozenset({bool}),
    "FP32": frozenset({int, float}),
    "FP64": frozenset({int, float}),
    "BYTES": frozenset({str}),
}
_RIGHT = {int: "whole numbers", float: "numbers", bool: "true or false", str: "strings"}


class Inputs:
    """What a model takes, for a quick check of what came. No declared inputs: anything goes."""

    def __init__(self, model: str, signature: Signature) -> None:
        self._model = model
        self._forms = {t.name: t for t in signature.inputs}

    def check(self, name: str, datatype: str, shape: Sequence[int]) -> None:
        """Refuse an input that the model does not have, or has in another form."""
        if not self._forms:
            return
        form = self._forms.get(name)
        if form is None:
            known = ", ".join(repr(n) for n in self._forms)
            raise invalid(
                f"unexpected inference input {name!r} for model {self._model!r}; it takes {known}"
            )
        if datatype != form.datatype:
            raise invalid(
                f"inference input {name!r} data-type is {datatype!r}, "
                f"but model {self._model!r} expects {form.datatype!r}"
            )
        if not _fits(shape, form.shape):
            raise invalid(
                f"unexpected shape for input {name!r} for model {self._model!r}: "
                f"expected {list(form.shape)}, got {list(shape)}"
            )

    def check_all(self, tensors: Tensors) -> None:
        """Refuse missing inputs, and inputs whose first axes (the rows) differ in length."""
        if len(tensors) < len(self._forms):
            missing = ", ".join(repr(n) for n in self._forms if n not in tensors)
            raise invalid(f"model {self._model!r} needs {missing}, which the request lacks")
        if len(tensors) > 1:
            rows = {name: t.shape[0] if t.ndim else None for name, t in tensors.items()}
            if len(set(rows.values())) > 1:
                raise invalid(f"inputs must have the same number of rows; they have {rows}")
        if not tensors:
            raise invalid("inputs is empty; it must hold at least one tensor")

    @property
    def only(self) -> Tensor | None:
        """The model's input when it has just one."""
        return next(iter(self._forms.values())) if len(self._forms) == 1 else None


def invalid(message: str, field: str | None = None) -> InferenceError:
    """An error of the caller's, as text."""
    return InferenceError(Fault.INVALID, message, field=field)


def datatype_of(array: NDArray[Any]) -> str:
    """The protocol's name for an array's type."""
    name = _NAMES.get(array.dtype)
    if name is not None:
        return name
    if array.dtype.kind in "SU":
        return "BYTES"
    native = array.dtype.newbyteorder("<")
    if native in _NAMES:
        return _NAMES[native]
    raise InferenceError(
        Fault.INTERNAL, f"the model gave {array.dtype}, which has no name in the protocol"
    )


def checked_datatype(name: str, datatype: Any) -> str:
    """`datatype` if the protocol knows it."""
    if isinstance(datatype, str) and datatype in DTYPES:
        return datatype
    raise invalid(f"input {name!r}: datatype {datatype!r} must be one of {', '.join(DTYPES)}")


def checked_shape(name: str, shape: Any) -> tuple[int, ...]:
    """`shape` if it is a list of sensible lengths."""
    if isinstance(shape, list) and len(shape) <= _DIMENSIONS_MAX:
        for length in shape:
            if type(length) is not int or not 0 <= length <= _LENGTH_MAX:
                break
        else:
            return tuple(shape)
    raise invalid(
        f"input {name!r}: shape {_shown(shape)} must be a list of at most {_DIMENSIONS_MAX} "
        f"whole numbers from 0 to {_LENGTH_MAX}"
    )


def from_json(name: str, datatype: str, shape: tuple[int, ...], data: Any) -> NDArray[Any]:
    """The tensor `data` holds, nested like `shape` or flat."""
    if datatype in BINARY_ONLY:
        raise invalid(
            f"input {name!r}: {datatype} can't travel as JSON; send it as binary data "
            "(binary_data_size) or declare FP32"
        )
    if type(data) is not list:
        raise invalid(f"input {name!r}: data {_shown(data)} must be a list")
    if data and type(data[0]) is list:
        data = _flat(name, data, shape)
    _check_count(name, shape, data)
    if not _ALLOWED[datatype].issuperset(map(type, data)):
        raise _wrong_element(name, datatype, data)
    return _reshaped(name, _array(name, datatype, data), shape)


def from_values(
    name: str, datatype: str, shape: tuple[int, ...], values: list[Any]
) -> NDArray[Any]:
    """The tensor with these values, whose Python type is known to be right."""
    _check_count(name, shape, values)
    if datatype == "BYTES":
        return bytes_array(values, shape) if values else _reshaped(name, _no_bytes(), shape)
    try:
        array = np.array(values, DTYPES[datatype])
    except OverflowError:
        raise _out_of_range(name, datatype, values) from None
    return _reshaped(name, array, shape)


def from_bytes(
    name: str, datatype: str, shape: tuple[int, ...], data: bytes | memoryview
) -> NDArray[Any]:
    """The tensor whose binary form is exactly `data`."""
    if datatype == "BYTES":
        return _reshaped(name, _elements(name, prod(shape), data), shape)
    dtype = DTYPES[datatype]
    expected = prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise invalid(
            f"input {name!r}: binary data has {len(data)} bytes but {datatype} "
            f"of shape {list(shape)} needs {expected}"
        )
    if datatype == "BOOL":
        return _reshaped(name, _booleans(name, data), shape)
    return _reshaped(name, np.frombuffer(data, dtype).copy(), shape)


def to_json(name: str, array: NDArray[Any]) -> orjson.Fragment | list[str]:
    """The elements in row-major order, as something that orjson can write.

    NaN becomes null, as everywhere; infinities and BYTES that are not text have no JSON form, and
    the caller must ask for the binary one.
    """
    datatype = datatype_of(array)
    if datatype == "BYTES":
        return _texts(name, array)
    if datatype in BINARY_ONLY:
        raise _ask_for_binary(name, f"is {datatype}")
    flat = np.ascontiguousarray(array, DTYPES[datatype]).reshape(-1)
    text = orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY)
    if b"null" in text and np.isinf(flat).any():
        raise _ask_for_binary(name, "holds infinite values")
    return orjson.Fragment(text)


def to_bytes(array: NDArray[Any]) -> bytes:
    """The binary form of a tensor."""
    datatype = datatype_of(array)
    if datatype != "BYTES":
        return np.ascontiguousarray(array, DTYPES[datatype]).tobytes()
    elements = elements_of(array)
    return b"".join(chain.from_iterable((_LENGTH.pack(len(e)), e) for e in elements))


def elements_of(array: NDArray[Any]) -> list[bytes]:
    """The elements of a BYTES tensor, row-major; text is encoded as UTF-8."""
    return [e if type(e) is bytes else _encoded(e) for e in array.reshape(-1).tolist()]


def bytes_array(elements: Sequence[bytes], shape: tuple[int, ...]) -> NDArray[Any]:
    """A BYTES tensor (numpy would cut trailing zeros off if it chose the type itself)."""
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    return array.reshape(shape)


def _no_bytes() -> NDArray[Any]:
    return np.empty(0, np.object_)


def _check_count(name: str, shape: tuple[int, ...], values: list[Any]) -> None:
    count = prod(shape)
    if len(values) != count:
        raise invalid(
            f"input {name!r}: data holds {len(values)} elements "
            f"but shape {list(shape)} needs {count}"
        )


def _encoded(element: Any) -> bytes:
    return bytes(element) if isinstance(element, bytes | bytearray) else str(element).encode()


def _fits(shape: Sequence[int], form: tuple[int, ...]) -> bool:
    if len(shape) != len(form):
        return False
    for length, wanted in zip(shape, form, strict=True):
        if length != wanted and wanted != -1:
            return False
    return True


def _flat(name: str, data: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """Nested lists made flat, level by level, refusing ragged ones."""
    lengths = [len(data)]
    while data and type(data[0]) is list:
        if len(lengths) > _DIMENSIONS_MAX or set(map(type, data)) != {list}:
            raise invalid(f"input {name!r}: data is nested unevenly; all rows must be alike")
        widths = set(map(len, data))
        if len(widths) > 1:
            raise invalid(
                f"input {name!r}: data has rows of {min(widths)} and of {max(widths)} elements; "
                "all rows must have the same length"
            )
        lengths.append(widths.pop())
        data = list(chain.from_iterable(data))
    if len(lengths) == len(shape) and tuple(lengths) != shape:
        raise invalid(
            f"input {name!r}: data is nested as {lengths} but shape says {list(shape)}; "
            "make them agree or send the data flat"
        )
    return data


def _array(name: str, datatype: str, data: list[Any]) -> NDArray[Any]:
    if datatype == "BYTES":
        return bytes_array([text.encode() for text in data], (len(data),))
    try:
        return _floats(data) if datatype == "FP32" else np.array(data, DTYPES[datatype])
    except (OverflowError, FloatingPointError):
        raise _out_of_range(name, datatype, data) from None


def _floats(data: list[Any]) -> NDArray[Any]:
    """FP32 without silent infinities; for few numbers, comparing is cheaper than `errstate`."""
    if 0 < len(data) < 50:
        if max(data) > _FLOAT_MAX or min(data) < -_FLOAT_MAX:
            raise OverflowError
        return np.array(data, np.float32)
    with np.errstate(over="raise"):
        return np.array(data, np.float32)


def _elements(name: str, count: int, data: bytes | memoryview) -> NDArray[Any]:
    """The elements of a BYTES tensor in binary form."""
    data = bytes(data)
    elements: list[bytes] = []
    start, end = 0, len(data)
    while start < end:
        begin = start + 4
        start = begin + int.from_bytes(data[start:begin], "little")
        if begin > end or start > end:
            raise invalid(f"input {name!r}: binary data ends within element {len(elements)}")
        elements.append(data[begin:start])
    if len(elements) != count:
        raise invalid(
            f"input {name!r}: binary data holds {len(elements)} elements but shape needs {count}"
        )
    return bytes_array(elements, (count,))


def _booleans(name: str, data: bytes | memoryview) -> NDArray[Any]:
    numbers = np.frombuffer(data, np.uint8)
    if numbers.size and numbers.max() > 1:
        raise invalid(f"input {name!r}: BOOL is one byte, 0 or 1; the data hold {numbers.max()}")
    return numbers.astype(np.bool_)


def _reshaped(name: str, flat: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        return flat.reshape(shape)
    except ValueError:
        raise invalid(f"input {name!r}: shape {list(shape)} is too large") from None


def _texts(name: str, array: NDArray[Any]) -> list[str]:
    try:
        return [e if type(e) is str else _encoded(e).decode() for e in array.reshape(-1).tolist()]
    except UnicodeDecodeError:
        raise _ask_for_binary(name, "holds bytes that are not UTF-8 text") from None


def _ask_for_binary(name: str, why: str) -> InferenceError:
    return invalid(
        f"output {name!r} {why}, which JSON can't carry; ask for it with binary_data true"
    )


def _wrong_element(name: str, datatype: str, data: list[Any]) -> InferenceError:
    allowed = _ALLOWED[datatype]
    place, value = next((i, v) for i, v in enumerate(data) if type(v) not in allowed)
    right = _RIGHT[float if float in allowed else next(iter(allowed))]
    return invalid(
        f"input {name!r}: element {place} is {_shown(value)}; {datatype} data must be {right}"
    )


def _out_of_range(name: str, datatype: str, data: list[Any]) -> InferenceError:
    low, high = _range(datatype)
    place = next((i for i, v in enumerate(data) if not low <= v <= high), 0)
    return invalid(
        f"input {name!r}: element {place} is {data[place]}, outside the range of {datatype} "
        f"({low} to {high})"
    )


def _range(datatype: str) -> tuple[float, float]:
    if datatype == "FP32":
        return -_FLOAT_MAX, _FLOAT_MAX
    if datatype == "FP64":
        return -sys.float_info.max, sys.float_info.max
    limits = np.iinfo(DTYPES[datatype])
    return limits.min, limits.max


def _shown(value: Any) -> str:
    """A value as JSON text, cut short."""
    try:
        text = orjson.dumps(value).decode()
    except (TypeError, orjson.JSONEncodeError):
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
