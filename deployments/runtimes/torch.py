"""How is a PyTorch program served?

Weights carry their code: TorchScript (`.pt`, `.ts`, `.pth`) or `torch.export` (`.pt2`). Neither
names its tensors, so the model file must declare `inputs`; they are passed in that order. What
comes back is one tensor, a tuple (in the order of the declared `outputs`) or a mapping (by name);
undeclared outputs are called `output`, `output_0`, `output_1` …, or by their key.

With `resources.gpu` the program runs on CUDA where there is any, unless `options.device` says
otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from deployments.inference import DTYPES, Fault, InferenceError, Signature, Tensor, Tensors
from deployments.model import Version
from deployments.runtimes import LoadError
from deployments.runtimes.options import Options, first_line, near, read_options, weights_file
from deployments.runtimes.signatures import agreed, as_datatype, datatype_of, tensors
from deployments.runtimes.surroundings import announce_threads, cores

if TYPE_CHECKING:
    import torch

SUFFIXES = (".pt", ".ts", ".pth", ".pt2")


class TorchOptions(Options):
    """`file`: which file of a folder.

    `device`: cpu, cuda, cuda:1 (default: cuda if resources.gpu asks for it and there is one).
    `threads`: cores for torch (default: resources.cpu, rounded up).
    """

    file: str | None = None
    device: str | None = Field(default=None, min_length=1)
    threads: int | None = Field(default=None, ge=1)


def create(name: str, version: Version, weights: Path | None) -> TorchRuntime:
    """The runtime for `version`, not loaded yet."""
    return TorchRuntime(version, weights, read_options(TorchOptions, version.options))


class TorchRuntime:
    """One program on one device."""

    def __init__(self, version: Version, weights: Path | None, options: TorchOptions) -> None:
        self._version = version
        self._weights = weights
        self._options = options
        self._program: Any = _closed
        self._device: Any = None
        self._inputs: tuple[Tensor, ...] = tensors(version.inputs)
        self._outputs: tuple[Tensor, ...] = ()

    def load(self) -> Signature:
        file = weights_file(self._weights, SUFFIXES, self._options.file)
        _check_inputs(self._inputs)
        _cap_threads(self._options.threads or cores(self._version.resources.cpu))
        self._device = _device(self._version, self._options)
        self._program = _read(file, self._device)
        self._outputs = self._found_outputs()
        return Signature(self._inputs, self._outputs, "pytorch", self._version.class_labels)

    def predict(self, inputs: Tensors) -> Tensors:
        answer = self._run(inputs)
        try:
            return {t.name: as_datatype(answer[t.name], t.datatype) for t in self._outputs}
        except KeyError as error:
            hint = near(str(error.args[0]), answer)
            raise InferenceError(
                Fault.INTERNAL, f"the program returned no {error.args[0]!r}; {hint}"
            ) from None

    def close(self) -> None:
        self._program = _closed

    def _run(self, inputs: Tensors) -> Tensors:
        import torch

        with torch.inference_mode():
            given = [_given(inputs[t.name], t, self._device) for t in self._inputs]
            return _named(self._program(*given), [s.name for s in self._version.outputs])

    def _found_outputs(self) -> tuple[Tensor, ...]:
        """The declared outputs, checked by a run on zeros; without any, that run's."""
        declared = self._version.outputs
        zeros = {t.name: _zeros(t) for t in self._inputs}
        try:
            answer = self._run(zeros)
        except LoadError:
            raise
        except Exception as error:  # whatever the program raises
            if declared and any(-1 in t.shape[1:] for t in self._inputs):
                return tensors(declared)  # zeros of length 1 need not be a sensible input
            raise LoadError(
                f"inputs: the program can't take zeros of the declared shapes: {_last_line(error)}"
            ) from error
        found = [_seen(name, array) for name, array in answer.items()]
        return agreed("outputs", declared, found, may_leave_out=True)


def _closed(*given: Any) -> Any:
    raise InferenceError(Fault.UNAVAILABLE, "the model is not loaded")


def _check_inputs(inputs: Sequence[Tensor]) -> None:
    if not inputs:
        raise LoadError(
            "inputs: must be declared for torch, whose programs don't name them, such as "
            "[{name: x, datatype: FP32, shape: [-1, 64]}]"
        )
    for tensor in inputs:
        if tensor.datatype == "BYTES":
            raise LoadError(f"inputs.{tensor.name}.datatype: torch has no BYTES; use numbers")
        if not tensor.shape:
            raise LoadError(f"inputs.{tensor.name}.shape: must begin with -1, the rows")


def _cap_threads(threads: int) -> None:
    announce_threads(threads)
    import torch

    torch.set_num_threads(threads)


def _device(version: Version, options: TorchOptions) -> torch.device:
    import torch

    if options.device is None:
        wants_gpu = version.resources.gpu > 0 and torch.cuda.is_available()
        return torch.device("cuda" if wants_gpu else "cpu")
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LoadError(
            f"options.device: {options.device!r} can't be used here: {first_line(error)}"
        ) from error
    return device


def _read(file: Path, device: torch.device) -> Any:
    try:
        return _exported(file, device) if file.suffix == ".pt2" else _scripted(file, device)
    except Exception as error:  # torch raises anything for files that it can't read
        raise LoadError(
            f"source: {file.name} is neither TorchScript nor a torch.export program "
            f"({first_line(error)}); a state_dict or a pickled module has no code in it: save "
            "torch.jit.script(model) as .pt or torch.export.export(…) as .pt2"
        ) from error


def _scripted(file: Path, device: torch.device) -> Any:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        load: Any = torch.jit.load  # has no types
        return torch.jit.freeze(load(str(file), map_location=device).eval())


def _exported(file: Path, device: torch.device) -> Any:
    import torch

    program = torch.export.load(file)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    return program.module()


def _given(array: NDArray[Any], tensor: Tensor, device: torch.device) -> torch.Tensor:
    import torch

    array = as_datatype(array, tensor.datatype)
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy()  # torch can't promise to leave it as it is
    if tensor.datatype == "BF16":  # torch knows no numpy type for it
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def _named(answer: Any, names: Sequence[str]) -> Tensors:
    """What the program returned, by name."""
    if isinstance(answer, Mapping):
        return {str(name): _array(value) for name, value in answer.items()}
    if not isinstance(answer, tuple | list):
        return {names[0] if names else "output": _array(answer)}
    if not names:
        names = [f"output_{i}" for i in range(len(answer))]
    if len(answer) < len(names):
        raise LoadError(
            f"outputs: {', '.join(names)} are declared, the program returns {len(answer)} tensors"
        )
    return {name: _array(value) for name, value in zip(names, answer, strict=False)}


def _array(value: Any) -> NDArray[Any]:
    import torch

    if not isinstance(value, torch.Tensor):
        raise LoadError(f"outputs: the program returns a {type(value).__name__}, not a tensor")
    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:
        return np.asarray(value.view(torch.int16).numpy().view(DTYPES["BF16"]))
    return np.asarray(value.numpy())


def _zeros(tensor: Tensor) -> NDArray[Any]:
    rows = 2 if tensor.shape[0] == -1 else tensor.shape[0]
    return np.zeros([rows, *(max(n, 1) for n in tensor.shape[1:])], DTYPES[tensor.datatype])


def _seen(name: str, array: NDArray[Any]) -> Tensor:
    if array.ndim == 0:
        raise LoadError(f"outputs: {name!r} is a single number; its first axis must be the rows")
    return Tensor(name, datatype_of(array.dtype), (-1, *array.shape[1:]))


def _last_line(error: BaseException) -> str:
    """TorchScript's errors end with the reason and begin with its own stack."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
