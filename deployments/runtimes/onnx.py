"""How is an ONNX graph served?

The signature is the graph's own; the model file may declare it too and may then ask for other
numeric datatypes, which are converted. Graphs with a fixed number of rows are run in pieces of that
size. A classifier's ZipMap (one mapping a row) becomes a plain matrix [-1, classes]. With
`resources.gpu` the CUDA provider is used where onnxruntime has it, otherwise the CPU.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from deployments.inference import Fault, InferenceError, Signature, Tensor, Tensors
from deployments.model import Version
from deployments.runtimes import LoadError
from deployments.runtimes.options import Options, first_line, near, read_options, weights_file
from deployments.runtimes.signatures import agreed, as_datatype, as_text
from deployments.runtimes.surroundings import cores

log = logging.getLogger(__name__)

Array = NDArray[Any]

_DATATYPES = {
    "float": "FP32",
    "double": "FP64",
    "float16": "FP16",
    "string": "BYTES",
    "bool": "BOOL",
    **{f"uint{bits}": f"UINT{bits}" for bits in (8, 16, 32, 64)},
    **{f"int{bits}": f"INT{bits}" for bits in (8, 16, 32, 64)},
}
_ZIPMAP = re.compile(r"seq\(map\((?:int64|string),\s?tensor\(float\)\)\)")


class OnnxOptions(Options):
    """`file`: which file of a folder. `threads`: cores (default: resources.cpu, rounded up).

    `optimization`: how far the graph is rewritten at loading.
    """

    file: str | None = None
    threads: int | None = Field(default=None, ge=1)
    optimization: Literal["all", "extended", "basic", "off"] = "all"


def create(name: str, version: Version, weights: Path | None) -> OnnxRuntime:
    """The runtime for `version`, not loaded yet."""
    return OnnxRuntime(version, weights, read_options(OnnxOptions, version.options))


class OnnxRuntime:
    """One graph in an onnxruntime session."""

    def __init__(self, version: Version, weights: Path | None, options: OnnxOptions) -> None:
        self._version = version
        self._weights = weights
        self._options = options
        self._session: Any = None
        self._inputs: tuple[Tensor, ...] = ()  # of the graph
        self._outputs: tuple[Tensor, ...] = ()  # as answered

    def load(self) -> Signature:
        file = weights_file(self._weights, (".onnx",), self._options.file)
        self._session = _session(file, self._version, self._options)
        self._inputs = tuple(_tensor("input", i) for i in self._session.get_inputs())
        inputs = agreed("inputs", self._version.inputs, _batched(self._inputs))
        found = self._found_outputs()
        declared = self._version.outputs
        self._outputs = agreed("outputs", declared, _batched(found), may_leave_out=True)
        return Signature(inputs, self._outputs, "onnxruntime", self._version.class_labels)

    def predict(self, inputs: Tensors) -> Tensors:
        feeds = {t.name: _fed(inputs[t.name], t) for t in self._inputs}
        answers = self._run_pieces(feeds, [t.name for t in self._outputs])
        return {
            t.name: as_datatype(a, t.datatype) for t, a in zip(self._outputs, answers, strict=True)
        }

    def close(self) -> None:
        self._session = None

    def _run_pieces(self, feeds: Tensors, names: Sequence[str]) -> list[Array]:
        """One run, or as many as a graph with a fixed number of rows needs."""
        size = self._inputs[0].shape[0]
        rows = len(feeds[self._inputs[0].name])
        if size in (-1, rows):
            return self._run(feeds, names)
        pieces = [
            self._run({n: _piece(a, start, size) for n, a in feeds.items()}, names)
            for start in range(0, rows, size)
        ]
        return [np.concatenate(parts)[:rows] for parts in zip(*pieces, strict=True)]

    def _run(self, feeds: Tensors, names: Sequence[str]) -> list[Array]:
        if self._session is None:
            raise InferenceError(Fault.UNAVAILABLE, "the model is not loaded")
        return [_matrix(a) for a in self._session.run(list(names), feeds)]

    def _found_outputs(self) -> tuple[Tensor, ...]:
        """The outputs of the graph, with what a run on zeros says of forms that it leaves open."""
        stated = tuple(_tensor("output", o) for o in self._session.get_outputs())
        wanted = {s.name for s in self._version.outputs}
        for name in sorted(wanted - {t.name for t in stated}):
            hint = near(name, [t.name for t in stated])
            raise LoadError(f"outputs: {name!r} is not in the graph; {hint}")
        chosen = [t for t in stated if t.name in wanted or not wanted]
        rows = 2 if self._inputs[0].shape[0] == -1 else self._inputs[0].shape[0]
        zeros = {t.name: _zeros(t, rows) for t in self._inputs}
        try:
            answers = self._run(zeros, [t.name for t in chosen])
        except Exception as error:  # noqa: BLE001 zeros need not be sensible: the graph's word stands
            log.info("the graph did not answer zeros: %s", first_line(error))
            return tuple(chosen)
        return tuple(_seen(t, a, rows) for t, a in zip(chosen, answers, strict=True))


def _session(file: Path, version: Version, options: OnnxOptions) -> Any:
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = {
        "all": levels.ORT_ENABLE_ALL,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "basic": levels.ORT_ENABLE_BASIC,
        "off": levels.ORT_DISABLE_ALL,
    }[options.optimization]
    settings.intra_op_num_threads = options.threads or cores(version.resources.cpu)
    settings.inter_op_num_threads = 1
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = _providers(onnxruntime.get_available_providers(), version.resources.gpu)
    try:
        return onnxruntime.InferenceSession(str(file), settings, providers=providers)
    except Exception as error:  # onnxruntime's errors share no base but Exception
        raise LoadError(f"source: {file.name} is no usable graph: {first_line(error)}") from error


def _providers(available: Sequence[str], gpu: float) -> list[str]:
    if gpu > 0 and "CUDAExecutionProvider" in available:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]
    if gpu > 0:
        log.warning("onnxruntime has no CUDA here (it has %s): using the CPU", ", ".join(available))
    return ["CPUExecutionProvider"]


def _tensor(kind: str, node: Any) -> Tensor:
    """The declared form of a graph's input or output."""
    if kind == "output" and _ZIPMAP.fullmatch(node.type):
        return Tensor(node.name, "FP32", (-1, -1))
    inner = re.fullmatch(r"tensor\((\w+)\)", node.type)
    if inner is None or inner[1] not in _DATATYPES:
        raise LoadError(
            f"source: the graph's {kind} {node.name!r} is a {node.type}, which can't be sent; "
            "convert the model so that it is a tensor"
        )
    shape = tuple(d if isinstance(d, int) and d >= 0 else -1 for d in node.shape or ())
    if kind == "input" and not shape:
        raise LoadError(f"source: the graph's input {node.name!r} has no axis for rows")
    return Tensor(node.name, _DATATYPES[inner[1]], shape)


def _batched(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Callers may send any number of rows, whatever the graph says."""
    return tuple(Tensor(t.name, t.datatype, (-1, *t.shape[1:])) for t in tensors)


def _seen(stated: Tensor, answer: Array, rows: int) -> Tensor:
    """The stated form, completed by an answer to `rows` rows."""
    if answer.ndim == 0 or len(answer) != rows:
        raise LoadError(
            f"source: output {stated.name!r} has shape {list(answer.shape)} for {rows} rows; its "
            "first axis must be the rows (leave it out under outputs, or export the model anew)"
        )
    if len(stated.shape) != answer.ndim:
        return Tensor(stated.name, stated.datatype, (-1,) * answer.ndim)
    shape = answer.shape if stated.shape == (-1, -1) else stated.shape  # ZipMap leaves it open
    return Tensor(stated.name, stated.datatype, (-1, *shape[1:]))


def _zeros(tensor: Tensor, rows: int) -> Array:
    shape = [rows, *(max(n, 1) for n in tensor.shape[1:])]
    if tensor.datatype == "BYTES":
        return np.full(shape, "", dtype=object)
    return as_datatype(np.zeros(shape), tensor.datatype)


def _fed(array: Array, tensor: Tensor) -> Array:
    if tensor.datatype != "BYTES":
        return as_datatype(array, tensor.datatype)
    try:
        return as_text(array)
    except UnicodeDecodeError as error:
        raise InferenceError(
            Fault.INVALID, f"input {tensor.name!r} is not UTF-8: {error.reason}", field=tensor.name
        ) from None


def _piece(array: Array, start: int, size: int) -> Array:
    """`size` rows from `start`; the last row is repeated where they run out."""
    piece = array[start : start + size]
    if len(piece) == size:
        return piece
    return np.concatenate([piece, np.repeat(piece[-1:], size - len(piece), axis=0)])


def _matrix(answer: Any) -> Array:
    """An output as an array; ZipMap's mappings lose their keys, which are in class order."""
    if isinstance(answer, list):
        return np.array([list(row.values()) for row in answer], dtype=np.float32)
    return np.asarray(answer)
