"""How does TF Serving's JSON become tensors, and how do tensors become its JSON?

    rows      {"instances": [1, 2]}  or  [{"a": 1, "b": 2}, …]   ─►  {"predictions": …}
    columns   {"inputs": [1, 2]}     or  {"a": [1, …], "b": […]} ─►  {"outputs": …}
    examples  {"context": {…}, "examples": [{feature: value}, …]} ─►  {"results": …}

Values say neither type nor shape, so both come from the model's signature: the types are checked
strictly (a string is not a number, 1.5 is not a whole number), the nesting is the shape. NaN and
Infinity are legal in both directions, which is not JSON; orjson reads and writes everything else.
Bytes that are not text travel as `{"b64": "…"}`.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from deployments.inference import DTYPES, InferenceError, Signature, Tensor, Tensors
from deployments.serving.protocols.tensors import (
    Inputs,
    bytes_array,
    datatype_of,
    elements_of,
    invalid,
)

SIGNATURE_NAME = "serving_default"

_DIMENSIONS_MAX = 32
_FLOATS = frozenset({"FP16", "BF16", "FP32", "FP64"})
_NUMBERS = frozenset({int, float})
_ALLOWED: Mapping[str, frozenset[type]] = {
    "BOOL": frozenset({bool}),
    "BYTES": frozenset({str, dict}),
    **dict.fromkeys(_FLOATS, _NUMBERS),
}
_WHOLE = frozenset({int})
_SCORES = ("scores", "probability", "probabilities")
_VALUES = ("outputs", "value", "score")


def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`; NaN, Infinity and -Infinity are numbers."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if b"NaN" not in body and b"Infinity" not in body:
            raise invalid(f"JSON Parse error: {error}") from None
        document = _parsed_with_nan(body)
    if type(document) is not dict:
        raise invalid("JSON Parse error: the body must be an object")
    return document


def _parsed_with_nan(body: bytes) -> Any:
    try:
        document = json.loads(body)
        json.dumps(document, ensure_ascii=False).encode()  # strings must be encodable
    except (ValueError, RecursionError) as error:
        raise invalid(f"JSON Parse error: {str(error) or 'nested too deeply'}") from None
    return document


def check_signature_name(document: Mapping[str, Any]) -> None:
    """A model has one signature; only its name, or none, may be asked for."""
    name = document.get("signature_name")
    if name not in (None, "", SIGNATURE_NAME):
        raise invalid(
            f"Serving signature name: {_shown(name)} not found in signature def; "
            f'this model has "{SIGNATURE_NAME}"',
            "signature_name",
        )


class Reader:
    """Reads requests for one model."""

    def __init__(self, model: str, signature: Signature) -> None:
        self.signature = signature
        self._model = model
        self._forms = {t.name: t for t in signature.inputs}
        self._inputs = Inputs(model, signature)

    def predict(self, document: Mapping[str, Any]) -> tuple[Tensors, bool]:
        """The tensors of a predict request, and whether they came as rows."""
        self._check_takes_tensors()
        check_signature_name(document)
        is_row = "instances" in document
        if is_row == ("inputs" in document):
            raise invalid(
                "the body must have exactly one of instances (rows) and inputs (columns); it has "
                + ("both" if is_row else "neither"),
                "instances",
            )
        if is_row:
            columns = self._columns("instances", document["instances"])
        else:
            columns = self._named(document["inputs"])
        return self._tensors(columns), is_row

    def examples(self, document: Mapping[str, Any]) -> Tensors:
        """The tensors of a classify or regress request."""
        self._check_takes_tensors()
        check_signature_name(document)
        context = document.get("context", {})
        if type(context) is not dict:
            raise invalid("context must be an object of features", "context")
        examples = document.get("examples")
        if type(examples) is not list or not examples:
            raise invalid("examples must be a list of at least one object", "examples")
        for place, example in enumerate(examples):
            if type(example) is not dict:
                raise invalid(f"examples[{place}] must be an object of features", "examples")
        rows = [{**context, **example} for example in examples]
        columns = self._by_name("examples", rows)
        return self._tensors(
            {n: [_feature(self._forms[n], v) for v in values] for n, values in columns.items()}
        )

    def _check_takes_tensors(self) -> None:
        if not self._forms:
            raise invalid(f"model {self._model!r} takes no tensors; use its text routes")

    def _columns(self, field: str, rows: Any) -> dict[str, list[Any]]:
        """The values of each input, one for a row."""
        if type(rows) is not list or not rows:
            raise invalid(f"{field} must be a list of at least one row", field)
        named = [_is_named(row) for row in rows]
        if all(named):
            return self._by_name(field, rows)
        if any(named):
            place = named.index(not named[0])
            raise invalid(
                f"{field}[{place}] is {'an object' if named[place] else 'a plain value'} unlike "
                f"the rows before; all rows must be alike",
                field,
            )
        return {self._only(field): rows}

    def _by_name(self, field: str, rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        names = set(self._forms)
        for place, row in enumerate(rows):
            if row.keys() != names:
                raise self._wrong_names(f"{field}[{place}]", row, field)
        return {name: [row[name] for row in rows] for name in self._forms}

    def _named(self, columns: Any) -> dict[str, Any]:
        """The value of each input, all rows in one."""
        if not _is_named(columns):
            return {self._only("inputs"): columns}
        if columns.keys() != self._forms.keys():
            raise self._wrong_names("inputs", columns, "inputs")
        return {name: columns[name] for name in self._forms}

    def _only(self, field: str) -> str:
        if len(self._forms) != 1:
            raise invalid(
                f"model {self._model!r} has several inputs, so {field} must name them: "
                f"{', '.join(self._forms)}",
                field,
            )
        return next(iter(self._forms))

    def _wrong_names(self, where: str, row: Mapping[str, Any], field: str) -> InferenceError:
        known = ", ".join(repr(n) for n in self._forms)
        extra = next((n for n in row if n not in self._forms), None)
        if extra is not None:
            what = f"names {_shown(extra)}, which is no input"
        else:
            what = f"lacks {next(n for n in self._forms if n not in row)!r}"
        return invalid(f"{where} {what} of model {self._model!r}; it takes {known}", field)

    def _tensors(self, columns: Mapping[str, Any]) -> Tensors:
        found: Tensors = {}
        for name, value in columns.items():
            form = self._forms[name]
            array = to_array(name, form.datatype, value)
            self._inputs.check(name, form.datatype, array.shape)
            found[name] = array
        self._inputs.check_all(found)
        return found


def to_array(name: str, datatype: str, value: Any) -> NDArray[Any]:
    """The tensor that nested lists hold; their nesting is its shape."""
    shape, leaves = _flat(name, value)
    allowed = _ALLOWED.get(datatype, _WHOLE)
    if not allowed.issuperset(map(type, leaves)):
        raise _wrong_type(name, datatype, allowed, leaves)
    if datatype == "BYTES":
        return bytes_array([_bytes(name, leaf) for leaf in leaves], shape)
    try:
        with np.errstate(over="raise"):
            return np.array(leaves, DTYPES[datatype]).reshape(shape)
    except (OverflowError, FloatingPointError):
        raise invalid(f"input {name!r} holds a number outside the range of {datatype}") from None


def answer(outputs: Tensors, *, is_row: bool) -> bytes:
    """A predict answer; a single output goes without its name."""
    values = {name: _json_value(name, array) for name, array in outputs.items()}
    if not is_row:
        return to_json({"outputs": _without_name(values)})
    if len(values) == 1:
        return to_json({"predictions": _without_name(values)})
    rows = zip(*values.values(), strict=True)
    return to_json({"predictions": [dict(zip(values, row, strict=True)) for row in rows]})


def classes(signature: Signature) -> str:
    """The output with a score for each class. Raises `InferenceError` if none is clear."""
    found = [t for t in signature.outputs if t.datatype in _FLOATS and len(t.shape) == 2]
    return _chosen("classify", "one floating output of shape [-1, classes]", found, _SCORES)


def value(signature: Signature) -> str:
    """The output with one number for each example. Raises `InferenceError` if none is clear."""
    found = [t for t in signature.outputs if t.datatype in _FLOATS and t.shape[1:] in ((), (1,))]
    return _chosen("regress", "one floating output of shape [-1]", found, _VALUES)


def classification(scores: NDArray[Any], labels: Sequence[str]) -> bytes:
    """A classify answer: for each example, each class with its score."""
    names = labels if len(labels) == scores.shape[1] else [str(n) for n in range(scores.shape[1])]
    rows = _json_value("scores", scores)
    results = [[list(pair) for pair in zip(names, row, strict=True)] for row in rows]
    return to_json({"results": results})


def regression(values: NDArray[Any]) -> bytes:
    """A regress answer: a number for each example."""
    return to_json({"results": _json_value("values", values.reshape(-1))})


def to_json(document: Mapping[str, Any]) -> bytes:
    """`document` as TF Serving writes it, with NaN and Infinity where numbers are so."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def _flat(name: str, value: Any) -> tuple[tuple[int, ...], list[Any]]:
    """The shape and the leaves of nested lists; ragged ones are refused."""
    shape: list[int] = []
    level = [value]
    while level and type(level[0]) is list:
        widths = {len(v) if type(v) is list else -1 for v in level}
        if len(widths) > 1:
            raise invalid(f"input {name!r} is ragged: lists at one depth must have the same length")
        if len(shape) == _DIMENSIONS_MAX:
            raise invalid(f"input {name!r} is nested more than {_DIMENSIONS_MAX} deep")
        shape.append(widths.pop())
        level = list(chain.from_iterable(level))
    return tuple(shape), level


def _wrong_type(
    name: str, datatype: str, allowed: frozenset[type], leaves: Sequence[Any]
) -> InferenceError:
    wrong = next(leaf for leaf in leaves if type(leaf) not in allowed)
    if type(wrong) is list:
        return invalid(f"input {name!r} is ragged: it holds lists beside plain values")
    right = {
        _NUMBERS: "numbers",
        _WHOLE: "whole numbers",
        _ALLOWED["BOOL"]: "true or false",
        _ALLOWED["BYTES"]: 'strings or {"b64": "…"}',
    }[allowed]
    return invalid(f"input {name!r} holds {_shown(wrong)}; {datatype} takes {right}")


def _is_named(value: Any) -> bool:
    """Whether an object names inputs; `{"b64": …}` alone is a value."""
    return type(value) is dict and value.keys() != {"b64"}


def _bytes(name: str, leaf: Any) -> bytes:
    if type(leaf) is str:
        return leaf.encode()
    text = leaf.get("b64") if leaf.keys() == {"b64"} else None
    if type(text) is not str:
        raise invalid(f'input {name!r} holds {_shown(leaf)}; bytes are written {{"b64": "…"}}')
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"input {name!r}: b64 {_shown(text)} is not base64: {error}") from None


def _feature(form: Tensor, value: Any) -> Any:
    """A feature's value in the shape of one row: a list of one and its element are the same."""
    if len(form.shape) == 1 and type(value) is list and len(value) == 1:
        return value[0]
    if len(form.shape) == 2 and type(value) is not list:
        return [value]
    return value


def _chosen(verb: str, wanted: str, found: Sequence[Tensor], names: Sequence[str]) -> str:
    """The only tensor found, or the one with a telling name."""
    if len(found) == 1:
        return found[0].name
    for name in names:
        if any(t.name == name for t in found):
            return name
    has = ", ".join(repr(t.name) for t in found) or "none"
    raise invalid(f"{verb} needs {wanted}; this model has {has}; use predict")


def _json_value(name: str, array: NDArray[Any]) -> Any:
    """What `to_json` can write, row by row: an array or nested lists."""
    datatype = datatype_of(array)
    if datatype == "BYTES":
        return _texts(name, array)
    is_half = datatype in ("FP16", "BF16")
    array = np.ascontiguousarray(array, np.float32 if is_half else DTYPES[datatype])
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return _with_tokens(array)
    return array


def _with_tokens(array: NDArray[Any]) -> Any:
    """Nested lists in which NaN and infinities are TF Serving's tokens."""
    leaves = np.empty(array.size, np.object_)
    leaves[:] = [
        v if np.isfinite(v) else orjson.Fragment(json.dumps(float(v))) for v in array.reshape(-1)
    ]
    return leaves.reshape(array.shape).tolist()


def _texts(name: str, array: NDArray[Any]) -> Any:
    """Text as strings; as base64 where the name asks for it or UTF-8 can't hold it."""
    is_binary = name.endswith("_bytes")
    leaves = np.empty(array.size, np.object_)
    leaves[:] = [_text(element, is_binary) for element in elements_of(array)]
    return leaves.reshape(array.shape).tolist()


def _text(element: bytes, is_binary: bool) -> str | dict[str, str]:
    if not is_binary:
        try:
            return element.decode()
        except UnicodeDecodeError:
            pass
    return {"b64": base64.b64encode(element).decode()}


def _without_name(values: Mapping[str, Any]) -> Any:
    return next(iter(values.values())) if len(values) == 1 else values


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
