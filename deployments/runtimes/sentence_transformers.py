"""How do sentences become vectors?

Weights are a folder as sentence-transformers saves it. Input `text` BYTES [-1] (UTF-8), output
`embedding` FP32 [-1, d]. BERT encoders run in `bert`, which spends nothing on padding and starts in
3 s; any other kind runs in the library itself. No hub is asked for anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from deployments.inference import Fault, InferenceError, Signature, Tensor, Tensors
from deployments.model import Version
from deployments.runtimes import LoadError
from deployments.runtimes.options import Options, first_line, read_options
from deployments.runtimes.signatures import agreed, as_datatype
from deployments.runtimes.surroundings import announce_threads, cores, stay_offline

Encode = Callable[[Sequence[str]], NDArray[Any]]


class SentenceOptions(Options):
    """`threads`: cores for torch (default: resources.cpu, rounded up).

    `device`: cpu, cuda, cuda:1 (default: cuda if resources.gpu asks for it and there is one).
    `max_seq_length`: tokens after which a text is cut, at most the model's own limit.
    `library: true` runs the model in sentence-transformers even if it is known here.
    """

    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_seq_length: int | None = Field(default=None, ge=2)
    threads: int | None = Field(default=None, ge=1)
    library: bool = False


def create(name: str, version: Version, weights: Path | None) -> SentenceRuntime:
    """The runtime for `version`, not loaded yet."""
    return SentenceRuntime(version, weights, read_options(SentenceOptions, version.options))


class SentenceRuntime:
    """One encoder, answering on the thread that calls it."""

    def __init__(self, version: Version, weights: Path | None, options: SentenceOptions) -> None:
        self._version = version
        self._weights = weights
        self._options = options
        self._encode: Encode = _closed
        self._input = "text"
        self._output = Tensor("embedding", "FP32", (-1, -1))

    def load(self) -> Signature:
        folder = _folder(self._weights)
        self._encode = self._encoder(folder)
        width = self._encode(["warm up"]).shape[1]
        inputs = agreed("inputs", self._version.inputs, (Tensor("text", "BYTES", (-1,)),))
        found = (Tensor("embedding", "FP32", (-1, width)),)
        outputs = agreed("outputs", self._version.outputs, found)
        self._input, self._output = inputs[0].name, outputs[0]
        return Signature(inputs, outputs, "sentence_transformers", self._version.class_labels)

    def predict(self, inputs: Tensors) -> Tensors:
        rows = self._encode(_texts(inputs[self._input].ravel().tolist()))
        return {self._output.name: as_datatype(rows, self._output.datatype)}

    def close(self) -> None:
        self._encode = _closed

    def _encoder(self, folder: Path) -> Encode:
        """The packed encoder where it knows the folder, else the library's."""
        _prepare(self._version, self._options)
        device = _device(self._version, self._options)
        try:
            if not self._options.library:
                encode = _packed(folder, device, self._options)
                if encode is not None:
                    return encode
            return _library(folder, device, self._options)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise LoadError(
                f"source: {folder} is no sentence-transformers model: {first_line(error)}"
            ) from error


def _closed(texts: Sequence[str]) -> NDArray[Any]:
    raise InferenceError(Fault.UNAVAILABLE, "the model is not loaded")


def _folder(weights: Path | None) -> Path:
    if weights is None or not weights.exists():
        raise LoadError(f"source: {weights} does not exist")
    if not weights.is_dir() or not (weights / "config.json").is_file():
        raise LoadError(
            f"source: {weights} must be a folder with config.json, "
            "as sentence-transformers saves it"
        )
    return weights


def _prepare(version: Version, options: SentenceOptions) -> None:
    """Offline, and with no more threads than the replica has cores."""
    stay_offline()
    threads = options.threads or cores(version.resources.cpu)
    announce_threads(threads)
    import torch

    torch.set_num_threads(threads)


def _device(version: Version, options: SentenceOptions) -> str:
    import torch

    if options.device is not None:
        return options.device
    return "cuda" if version.resources.gpu > 0 and torch.cuda.is_available() else "cpu"


def _packed(folder: Path, device: str, options: SentenceOptions) -> Encode | None:
    import torch

    from deployments.runtimes import bert

    plan = bert.knows(folder)
    if plan is None:
        return None
    dtype: torch.dtype = getattr(torch, options.dtype)
    return bert.Encoder(folder, plan, device, dtype, options.max_seq_length).encode


def _library(folder: Path, device: str, options: SentenceOptions) -> Encode:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(folder), device=device, model_kwargs={"torch_dtype": options.dtype}
    )
    if options.max_seq_length is not None:
        model.max_seq_length = min(options.max_seq_length, model.max_seq_length or 1 << 30)

    def encode(texts: Sequence[str]) -> NDArray[Any]:
        rows = model.encode(list(texts), batch_size=max(len(texts), 1), show_progress_bar=False)
        return np.asarray(rows)

    return encode


def _texts(values: Sequence[Any]) -> list[str]:
    """The texts; raises `InferenceError(INVALID)` naming the row that is not UTF-8."""
    texts = []
    for row, value in enumerate(values):
        try:
            texts.append(value.decode() if isinstance(value, bytes) else str(value))
        except UnicodeDecodeError as error:
            raise InferenceError(
                Fault.INVALID, f"input 'text' row {row} is not UTF-8: {error.reason}", field="text"
            ) from None
    return texts
