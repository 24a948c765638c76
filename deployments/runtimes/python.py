"""How is a user's own class served?

    class Doubler:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1]}]     # or in the model file
        outputs = [{"name": "y", "datatype": "FP32", "shape": [-1]}]

        def load(self, folder, options): ...          # optional; takes what its signature names
        def predict(self, inputs): return {"y": inputs["x"] * 2}

The source is a Python file or a folder; `options.class_name` names the class (`Class`, or
`module:Class` for a module in the folder or an installed one) and may be left out when the file
defines only one with `predict` or `generate`. A folder is imported as a package, so that its files
can import one another (`from .neighbour import …` as well as `import neighbour`).

`predict` gets all inputs by name, numpy arrays with the rows first, BYTES as object arrays of
`bytes`; it returns a mapping by output name, or the one output alone, which is converted to the
declared datatype and checked. To refuse a value, raise `InferenceError(Fault.INVALID, why)`.

A class that defines `generate(prompt, …)` is a language model: `prompt` is text or a list of chat
messages; keyword arguments that it names (`max_tokens`, `temperature`, …) are passed if the caller
sent them. It yields text, from a plain or an async generator. If it defines `predict` as well,
that is offered as a method of the runtime, but language models are asked through `generate`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import threading
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from deployments.inference import (
    Fault,
    GenerationChunk,
    GenerationRequest,
    InferenceError,
    Signature,
    Tensor,
    Tensors,
)
from deployments.model import TensorSpec, Version
from deployments.runtimes import ASGIApp, LoadError
from deployments.runtimes.options import Options, near, read_options
from deployments.runtimes.signatures import as_datatype, tensors

PROMPT = (Tensor("text_input", "BYTES", (-1,)),)
TEXT = (Tensor("text_output", "BYTES", (-1,)),)


class PythonOptions(Options):
    """`class_name`: `Class` or `module:Class`. `arguments`: handed to the user's `load`."""

    class_name: str | None = Field(default=None, pattern=r"^([\w.]+:)?[A-Za-z_]\w*$")
    arguments: dict[str, Any] = Field(default_factory=dict)


def create(name: str, version: Version, weights: Path | None) -> PythonRuntime | PythonTextRuntime:
    """The runtime for the class at `weights`; imports it, to see which kind it is."""
    options = read_options(PythonOptions, version.options)
    if weights is None or not weights.exists():
        raise LoadError(f"source: {weights} does not exist")
    kind = _user_class(weights, options.class_name)
    folder = weights if weights.is_dir() else weights.parent
    if callable(getattr(kind, "generate", None)):
        return PythonTextRuntime(kind, folder, version, options)
    return PythonRuntime(kind, folder, version, options)


class PythonRuntime:
    """An object of the user's class that answers tensors."""

    def __init__(
        self, kind: type[Any], folder: Path, version: Version, options: PythonOptions
    ) -> None:
        self._kind = kind
        self._folder = folder
        self._version = version
        self._options = options
        self._user: Any = None
        self._outputs: tuple[Tensor, ...] = ()

    def load(self) -> Signature:
        predict = getattr(self._kind, "predict", None)
        if not callable(predict):
            raise LoadError(f"class {self._kind.__name__} has no method predict(inputs)")
        if inspect.iscoroutinefunction(predict):
            raise LoadError(f"{self._kind.__name__}.predict is async; it must be a plain function")
        inputs = _declared(self._kind, "inputs", self._version.inputs)
        self._outputs = _declared(self._kind, "outputs", self._version.outputs)
        self._user = _loaded(self._kind, self._folder, self._options)
        return Signature(inputs, self._outputs, "python", self._version.class_labels)

    def predict(self, inputs: Tensors) -> Tensors:
        rows = len(next(iter(inputs.values())))
        return _checked(self._user.predict(inputs), self._outputs, rows)

    def close(self) -> None:
        _close(self._user)
        self._user = None


class PythonTextRuntime:
    """An object of the user's class that generates text."""

    openai_app: ASGIApp | None = None

    def __init__(
        self, kind: type[Any], folder: Path, version: Version, options: PythonOptions
    ) -> None:
        self._kind = kind
        self._folder = folder
        self._version = version
        self._options = options
        self._user: Any = None

    async def start(self) -> Signature:
        self._user = await asyncio.to_thread(_loaded, self._kind, self._folder, self._options)
        return Signature(PROMPT, TEXT, "python", self._version.class_labels)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """The user's pieces as they come; each counts as one token."""
        given: str | list[Any] = list(request.messages or ()) or (request.prompt or "")
        wishes = {**request.options, "max_tokens": request.max_tokens}
        named = _named(self._user.generate, {k: v for k, v in wishes.items() if v is not None})
        count = 0
        async with contextlib.aclosing(_pieces(self._user.generate(given, **named))) as pieces:
            async for piece in pieces:
                if request.max_tokens is not None and count == request.max_tokens:
                    yield GenerationChunk("", "length", completion_tokens=count)
                    return
                count += 1
                yield GenerationChunk(_text(piece))
        yield GenerationChunk("", "stop", completion_tokens=count)

    def predict(self, inputs: Tensors) -> Tensors:
        """The user's `predict`, if the class has one besides `generate`."""
        if not callable(getattr(self._user, "predict", None)):
            raise InferenceError(Fault.UNIMPLEMENTED, "this model only generates text")
        outputs = _declared(self._kind, "outputs", self._version.outputs)
        return _checked(self._user.predict(inputs), outputs, len(next(iter(inputs.values()))))

    async def close(self) -> None:
        _close(self._user)
        self._user = None


def _user_class(weights: Path, class_name: str | None) -> type[Any]:
    """The class that the source and `options.class_name` name."""
    module_name, _, name = (class_name or "").rpartition(":")
    try:
        module = _import(weights, module_name)
    except LoadError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise LoadError(f"source: importing {weights.name} failed:\n{_tail(error)}") from error
    classes = {n: c for n, c in vars(module).items() if _is_model(c, module)}
    if not name:
        return _only(classes, weights)
    found = getattr(module, name, None)
    if not inspect.isclass(found):
        known = [n for n, c in vars(module).items() if inspect.isclass(c)]
        raise LoadError(
            f"options.class_name: {module.__name__.rpartition('.')[2]} has no class {name!r}; "
            f"{near(name, known)}"
        )
    return found


def _is_model(value: Any, module: ModuleType) -> bool:
    return (
        inspect.isclass(value)
        and value.__module__ == module.__name__
        and (hasattr(value, "predict") or hasattr(value, "generate"))
    )


def _only(classes: Mapping[str, type[Any]], weights: Path) -> type[Any]:
    if len(classes) == 1:
        return next(iter(classes.values()))
    if classes:
        raise LoadError(
            f"options.class_name: {weights.name} has several classes ({', '.join(classes)}): "
            "name one"
        )
    raise LoadError(f"source: {weights.name} has no class with predict or generate")


def _import(weights: Path, module_name: str) -> ModuleType:
    """The user's module, imported inside a package made for its folder."""
    folder = weights if weights.is_dir() else weights.parent
    if module_name and not (folder / (module_name.replace(".", "/") + ".py")).exists():
        return _installed(module_name, folder)
    package = _package(folder)
    return importlib.import_module(f"{package}.{module_name or _main_module(weights)}")


def _installed(module_name: str, folder: Path) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        known = [p.stem for p in folder.glob("*.py")]
        raise LoadError(
            f"options.class_name: module {module_name!r} is neither installed nor in {folder}; "
            f"{near(module_name, known)}"
        ) from None


def _main_module(weights: Path) -> str:
    if weights.is_file():
        if weights.suffix != ".py":
            raise LoadError(f"source: {weights.name} is not a Python file")
        return weights.stem
    files = sorted(p.stem for p in weights.glob("*.py") if p.stem != "__init__")
    if "model" in files or len(files) == 1:
        return "model" if "model" in files else files[0]
    raise LoadError(
        f"source: which file of {weights} holds the class? It has {', '.join(files) or 'none'}; "
        "set options.class_name to module:Class"
    )


def _package(folder: Path) -> str:
    """The name under which the folder is importable as a package."""
    name = "shoal_user_" + hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    if name not in sys.modules:
        start = folder / "__init__.py"
        spec = importlib.util.spec_from_file_location(
            name, start if start.exists() else None, submodule_search_locations=[str(folder)]
        )
        if spec is None:
            spec = importlib.util.spec_from_loader(name, loader=None, is_package=True)
        if spec is None:
            raise LoadError(f"source: {folder} can't be imported as a package")
        spec.submodule_search_locations = [str(folder)]
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        if spec.loader is not None and start.exists():
            spec.loader.exec_module(module)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return name


def _loaded(kind: type[Any], folder: Path, options: PythonOptions) -> Any:
    """An object of the class, its `load` called if it has one."""
    try:
        user = kind()
        if hasattr(user, "load"):
            user.load(**_named(user.load, {"folder": folder, "options": options.arguments}))
    except Exception as error:
        raise LoadError(f"{kind.__name__} failed to load:\n{_tail(error)}") from error
    return user


def _named(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `arguments` that `function` takes by name."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(arguments)
    return {n: v for n, v in arguments.items() if n in parameters}


def _declared(kind: type[Any], field: str, in_file: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
    """The model file's tensors, else the class attribute's."""
    if in_file:
        return tensors(in_file)
    given = getattr(kind, field, None)
    if not given:
        raise LoadError(
            f"{field}: must be declared, in the model file or as {kind.__name__}.{field} = "
            "[{'name': 'x', 'datatype': 'FP32', 'shape': [-1]}]"
        )
    try:
        return tensors(TypeAdapter(tuple[TensorSpec, ...]).validate_python(given))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (kind.__name__, field, *first["loc"])))
        raise LoadError(f"{where}: {first['msg']} (is {first['input']!r})") from None


def _checked(answer: Any, declared: Sequence[Tensor], rows: int) -> Tensors:
    """The user's answer as the declared outputs. Raises `InferenceError(INTERNAL)`."""
    if not isinstance(answer, Mapping):
        if len(declared) != 1:
            names = ", ".join(t.name for t in declared)
            raise _wrong(f"must return a mapping with {names}, not {type(answer).__name__}")
        answer = {declared[0].name: answer}
    return {t.name: _one_output(answer, t, rows) for t in declared}


def _one_output(answer: Mapping[str, Any], tensor: Tensor, rows: int) -> Any:
    if tensor.name not in answer:
        raise _wrong(f"returned no {tensor.name!r}; {near(tensor.name, map(str, answer))}")
    array = np.asarray(answer[tensor.name])
    try:
        array = as_datatype(array, tensor.datatype)
    except (TypeError, ValueError) as error:
        raise _wrong(f"returned {tensor.name!r} that is no {tensor.datatype}: {error}") from None
    if array.ndim != len(tensor.shape) or len(array) != rows:
        raise _wrong(
            f"returned {tensor.name!r} of shape {list(array.shape)} for {rows} rows; "
            f"{list(tensor.shape)} is declared"
        )
    return array


def _wrong(what: str) -> InferenceError:
    return InferenceError(Fault.INTERNAL, f"the model's predict {what}")


def _text(piece: Any) -> str:
    if not isinstance(piece, str):
        what = type(piece).__name__
        raise InferenceError(Fault.INTERNAL, f"generate must yield text, not {what}")
    return piece


async def _pieces(given: Any) -> AsyncGenerator[Any, None]:
    """What a plain or an async generator (or a coroutine that returns text) yields."""
    if inspect.isawaitable(given):
        given = await given
    if isinstance(given, str):
        yield given
        return
    source = given if hasattr(given, "__aiter__") else _from_thread(iter(given))
    try:
        async for piece in source:
            yield piece
    finally:
        if hasattr(source, "aclose"):
            await source.aclose()


async def _from_thread(pieces: Iterator[Any]) -> AsyncGenerator[Any, None]:
    """A blocking iterator run in a thread of its own, one piece ahead at most."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[bool, Any]] = asyncio.Queue()
    room = threading.Semaphore(1)
    stopped = threading.Event()

    def send(done: bool, value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(queue.put_nowait, (done, value))

    def run() -> None:
        try:
            for piece in pieces:
                send(False, piece)
                room.acquire()
                if stopped.is_set():
                    break
            if hasattr(pieces, "close"):
                pieces.close()
            send(True, None)
        except BaseException as error:  # noqa: BLE001 raised where the pieces are read
            send(True, error)

    threading.Thread(target=run, name="generate", daemon=True).start()
    try:
        while True:
            done, value = await queue.get()
            if done and value is not None:
                raise value
            if done:
                return
            yield value
            room.release()
    finally:
        stopped.set()
        room.release()


def _close(user: Any) -> None:
    if callable(getattr(user, "close", None)):
        user.close()


def _tail(error: BaseException) -> str:
    """The end of the user's traceback, without this module's frames."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if f.filename not in (__file__, importlib.__file__)
        and not f.filename.startswith("<frozen importlib")
    ]
    lines = traceback.format_list(frames[-3:]) + traceback.format_exception_only(error)
    return "".join(lines).rstrip()
