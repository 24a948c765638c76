"""How is a scikit-learn estimator or pipeline served?

Weights are one `.skops` file, or a `.joblib`/`.pkl` file. skops holds data, not code: types that
are neither scikit-learn's nor numpy's are refused by name unless `options.trusted` lists them.
joblib files are pickles: loading one runs whatever code it holds, so load only your own.

    classifier   label [-1] INT64 or BYTES · probability [-1, classes] FP64 (where it has one)
                 score [-1] FP64, the second class's probability of two, only when declared
    regressor    value [-1] FP64, or one output of any name
    otherwise    what `predict` or `transform` returns: label (whole numbers) or value

Inputs are one matrix (`x` unless named in the model file), or, when the estimator was fitted on a
table, one tensor for each of its columns, declared in the model file; columns may then be BYTES.

The library spends 4 ms on a forest of 100 trees and one row, nearly all of it in setting up threads
that it doesn't need. A forest's trees are therefore asked directly and summed in the library's
order, which takes 0.3 ms; whether the sums are equal bit by bit is checked at loading.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deployments.inference import Fault, InferenceError, Signature, Tensor, Tensors
from deployments.model import TensorSpec, Version
from deployments.runtimes import LoadError
from deployments.runtimes.options import Options, first_line, read_options, weights_file
from deployments.runtimes.signatures import agreed, as_datatype, as_text, datatype_of
from deployments.runtimes.surroundings import ThreadCap, announce_threads, cores

Array = NDArray[Any]
Model = Callable[[Any], Array]
Ask = Callable[[Any, Set[str]], Tensors]
"""Answers a table; only the outputs named need be there."""

SUFFIXES = (".skops", ".joblib", ".pkl", ".pickle")


class SklearnOptions(Options):
    """`file`: which file of a folder. `trusted`: types that a skops file may hold besides."""

    file: str | None = None
    trusted: tuple[str, ...] = ()


def create(name: str, version: Version, weights: Path | None) -> SklearnRuntime:
    """The runtime for `version`, not loaded yet."""
    return SklearnRuntime(version, weights, read_options(SklearnOptions, version.options))


class SklearnRuntime:
    """One estimator, answering on the thread that calls it."""

    def __init__(self, version: Version, weights: Path | None, options: SklearnOptions) -> None:
        self._version = version
        self._weights = weights
        self._options = options
        self._threads = ThreadCap(cores(version.resources.cpu))
        self._table: Callable[[Tensors], Any] = dict
        self._ask: Ask = _closed
        self._outputs: tuple[Tensor, ...] = ()

    def load(self) -> Signature:
        announce_threads(cores(self._version.resources.cpu))
        file = weights_file(self._weights, SUFFIXES, self._options.file)
        estimator = _single_threaded(_read(file, self._options.trusted))
        self._threads.hold()
        inputs, self._table = _inputs(estimator, self._version)
        probe = _probe(inputs, self._table)
        declared = self._version.outputs
        self._ask, found, labels = _outputs(estimator, probe, declared)
        self._outputs = agreed("outputs", declared, found, may_leave_out=True)
        labels = self._version.class_labels or labels
        return Signature(inputs, self._outputs, "sklearn", labels)

    def predict(self, inputs: Tensors) -> Tensors:
        self._threads.hold()
        table = self._table(inputs)
        try:
            answers = self._ask(table, {t.name for t in self._outputs})
        except ValueError as error:
            if _is_plain(table):
                raise
            raise InferenceError(Fault.INVALID, first_line(error)) from error
        return {t.name: as_datatype(answers[t.name], t.datatype) for t in self._outputs}

    def close(self) -> None:
        self._ask = _closed


def _closed(table: Any, names: Set[str]) -> Tensors:
    raise InferenceError(Fault.UNAVAILABLE, "the model is not loaded")


def _read(file: Path, trusted: tuple[str, ...]) -> Any:
    try:
        estimator = _read_skops(file, trusted) if file.suffix == ".skops" else _read_pickle(file)
    except LoadError:
        raise
    except Exception as error:  # unpickling may raise anything
        raise LoadError(
            f"source: {file.name} can't be read: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not (hasattr(estimator, "predict") or hasattr(estimator, "transform")):
        raise LoadError(
            f"source: {file.name} holds a {type(estimator).__name__}, which can neither predict "
            "nor transform; save a fitted estimator or pipeline"
        )
    return estimator


def _read_pickle(file: Path) -> Any:
    import joblib

    return joblib.load(file)


def _read_skops(file: Path, trusted: tuple[str, ...]) -> Any:
    import skops.io

    untrusted = sorted(set(skops.io.get_untrusted_types(file=file)) - set(trusted))
    if untrusted:
        raise LoadError(
            f"source: {file.name} holds types that are not trusted: {', '.join(untrusted)}; "
            "if you know them, list them in options.trusted"
        )
    return skops.io.load(file, trusted=list(trusted))


def _single_threaded(estimator: Any) -> Any:
    """Every part that would start joblib workers told not to: replicas are the parallelism."""
    if hasattr(estimator, "get_params") and hasattr(estimator, "set_params"):
        names = [n for n in estimator.get_params(deep=True) if n.split("__")[-1] == "n_jobs"]
        estimator.set_params(**dict.fromkeys(names, 1))
    return estimator


def _inputs(estimator: Any, version: Version) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
    """The signature's inputs, and how to make the estimator's table of them."""
    columns = [str(c) for c in getattr(estimator, "feature_names_in_", ())]
    if not columns:
        return _matrix_input(estimator, version)
    if version.inputs and {s.name for s in version.inputs} & set(columns):
        names = [Tensor(s.name, s.datatype, (-1,)) for s in version.inputs if s.name in columns]
        names += [Tensor(c, "FP64", (-1,)) for c in columns if c not in {t.name for t in names}]
        inputs = agreed("inputs", version.inputs, names)
        return inputs, lambda tensors: _frame({c: tensors[c] for c in columns})
    inputs, matrix = _matrix_input(estimator, version)
    if _takes(estimator, np.zeros((1, len(columns)))):
        warnings.filterwarnings("ignore", message="X does not have valid feature names")
        return inputs, matrix
    return inputs, lambda tensors: _frame(dict(zip(columns, matrix(tensors).T, strict=True)))


def _matrix_input(
    estimator: Any, version: Version
) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
    width = int(getattr(estimator, "n_features_in_", -1))
    if len(version.inputs) > 1:
        names = ", ".join(s.name for s in version.inputs)
        raise LoadError(
            f"inputs: {names} are declared, but the estimator was fitted on a plain matrix; "
            f"declare one input of shape [-1, {width}]"
        )
    name = version.inputs[0].name if version.inputs else "x"
    found = Tensor(name, version.inputs[0].datatype if version.inputs else "FP64", (-1, width))
    if version.inputs and len(version.inputs[0].shape) == 1:  # a list of texts, for a vectorizer
        found = Tensor(name, found.datatype, (-1,))
    inputs = agreed("inputs", version.inputs, (found,))
    if found.datatype == "BYTES":
        return inputs, lambda tensors: _text(name, tensors[name])
    return inputs, lambda tensors: tensors[name]


def _takes(estimator: Any, table: Any) -> bool:
    """Whether the estimator answers `table` at all."""
    ask = estimator.predict if hasattr(estimator, "predict") else estimator.transform
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ask(table)
    except Exception:  # noqa: BLE001 of any kind: only whether it answers matters
        return False
    return True


def _frame(columns: Tensors) -> Any:
    import pandas

    return pandas.DataFrame(
        {n: _text(n, c) if c.dtype == object else c for n, c in columns.items()}
    )


def _text(name: str, array: Array) -> Array:
    try:
        return as_text(array)
    except UnicodeDecodeError as error:
        raise InferenceError(Fault.INVALID, f"input {name!r}: {error}", field=name) from None


def _probe(inputs: tuple[Tensor, ...], table: Callable[[Tensors], Any]) -> Any:
    """A table of one row of zeros (or empty text)."""
    row: Tensors = {}
    for tensor in inputs:
        shape = [max(n, 1) for n in tensor.shape]
        zero = np.full(shape, b"", dtype=object) if tensor.datatype == "BYTES" else np.zeros(shape)
        row[tensor.name] = zero
    return table(row)


def _outputs(
    estimator: Any, probe: Any, declared: Sequence[TensorSpec]
) -> tuple[Ask, tuple[Tensor, ...], tuple[str, ...]]:
    """How the outputs are computed, their form, and the names of the classes."""
    if not hasattr(estimator, "predict"):
        return _one_output(estimator.transform, probe, declared)
    if not hasattr(estimator, "classes_") or isinstance(estimator.classes_, list):
        return _one_output(_fast_value(estimator, probe), probe, declared)
    if isinstance(probe, np.ndarray):  # a table's columns need not take zeros or empty text
        _answered(estimator.predict, probe)
    classes = _plain(np.asarray(estimator.classes_))
    label = Tensor("label", datatype_of(classes.dtype), (-1,))
    labels = tuple(map(str, classes.tolist()))
    if not hasattr(estimator, "predict_proba"):
        return lambda table, names: {"label": estimator.predict(table)}, (label,), labels
    found = [label, Tensor("probability", "FP64", (-1, len(classes)))]
    if len(classes) == 2 and any(s.name == "score" for s in declared):
        found.append(Tensor("score", "FP64", (-1,)))
    return _classes(estimator, _fast_probability(estimator, probe)), tuple(found), labels


def _classes(estimator: Any, probability_of: Model) -> Ask:
    """Label and probability with as few passes over the model as the names need."""
    classes = np.asarray(estimator.classes_)
    by_argmax = _labels_by_argmax(estimator)

    def ask(table: Any, names: Set[str]) -> Tensors:
        answers: Tensors = {}
        if by_argmax or names & {"probability", "score"}:
            probability = probability_of(table)
            answers = {"probability": probability, "score": probability[:, -1]}
            if by_argmax:
                answers["label"] = classes.take(probability.argmax(axis=1))
        if "label" in names and "label" not in answers:
            answers["label"] = estimator.predict(table)
        return answers

    return ask


def _one_output(
    ask: Model, probe: Any, declared: Sequence[TensorSpec]
) -> tuple[Ask, tuple[Tensor, ...], tuple[str, ...]]:
    """For estimators without classes: the form of the answer to the probe is the output's."""
    answer = _plain(_dense(_answered(ask, probe)))
    datatype = datatype_of(answer.dtype)
    name = "value" if datatype.startswith("FP") else "label"
    if len(declared) == 1:
        name = declared[0].name
    output = Tensor(name, datatype, (-1, *answer.shape[1:]))
    return lambda table, names: {name: _dense(ask(table))}, (output,), ()


def _answered(ask: Model, probe: Any) -> Any:
    try:
        return ask(probe)
    except Exception as error:
        raise LoadError(
            f"source: the estimator can't answer a row of zeros: {first_line(error)}; "
            "declare inputs that fit it"
        ) from error


def _dense(answer: Any) -> Array:
    """Vectorizers return sparse matrices."""
    return np.asarray(answer.toarray() if hasattr(answer, "toarray") else answer)


def _plain(array: Array) -> Array:
    """Object arrays of text or numbers in numpy's own type for them."""
    return np.asarray(array.tolist()) if array.dtype == object else array


def _fast_probability(estimator: Any, probe: Any) -> Model:
    """`predict_proba`, by the trees themselves for a forest."""
    forest, before = _forest(estimator)
    if forest is None or isinstance(forest.n_classes_, list):
        return _as_model(estimator.predict_proba)
    by_trees = _by_trees(forest, before, int(forest.n_classes_), estimator.predict_proba)
    return _if_equal(by_trees, estimator.predict_proba, probe)


def _fast_value(estimator: Any, probe: Any) -> Model:
    """`predict` of an estimator without classes, by the trees themselves for a forest."""
    forest, before = _forest(estimator)
    if forest is None or hasattr(estimator, "classes_") or forest.n_outputs_ != 1:
        return _as_model(estimator.predict)
    by_trees = _by_trees(forest, before, 1, estimator.predict)
    return _if_equal(lambda table: by_trees(table).reshape(-1), estimator.predict, probe)


def _as_model(ask: Any) -> Model:
    return lambda table: np.asarray(ask(table))


def _forest(estimator: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The forest that `estimator` is or ends in, and what comes before it."""
    from sklearn.ensemble import (
        ExtraTreesClassifier,
        ExtraTreesRegressor,
        RandomForestClassifier,
        RandomForestRegressor,
    )
    from sklearn.pipeline import Pipeline

    kinds = (
        ExtraTreesClassifier,
        ExtraTreesRegressor,
        RandomForestClassifier,
        RandomForestRegressor,
    )
    if type(estimator) in kinds:
        return estimator, lambda table: table
    if type(estimator) is Pipeline and len(estimator.steps) > 1 and type(estimator[-1]) in kinds:
        return estimator[-1], estimator[:-1].transform
    return None, lambda table: table


def _by_trees(forest: Any, before: Callable[[Any], Any], width: int, library: Any) -> Model:
    """The mean of the trees' answers, in the library's order and precision."""
    trees = [tree.tree_ for tree in forest.estimators_]

    def ask(table: Any) -> Array:
        rows = before(table)
        if not isinstance(rows, np.ndarray) or rows.dtype == object:
            return np.asarray(library(table))
        matrix = np.ascontiguousarray(rows, dtype=np.float32)
        if matrix.ndim != 2 or not np.isfinite(matrix).all():
            return np.asarray(library(table))
        total = np.zeros((len(matrix), width))
        for tree in trees:
            total += tree.predict(matrix)
        total /= len(trees)
        return total

    return ask


def _if_equal(fast: Model, library: Any, probe: Any) -> Model:
    """`fast` if it answers the probe and some noise as the library does, else the library."""
    try:
        tables = [probe]
        if isinstance(probe, np.ndarray):
            noise = np.random.default_rng(0).normal(scale=10.0, size=(16, probe.shape[1]))
            tables.append(noise.astype(probe.dtype))
        if all(np.array_equal(fast(t), np.asarray(library(t))) for t in tables):
            return fast
    except Exception:  # noqa: BLE001 made by another version: the library itself decides
        return _as_model(library)
    return _as_model(library)


def _labels_by_argmax(estimator: Any) -> bool:
    """Whether `predict` is by definition the most probable class."""
    from sklearn.tree import DecisionTreeClassifier

    forest, _ = _forest(estimator)
    return forest is not None or type(estimator) is DecisionTreeClassifier


def _is_plain(table: Any) -> bool:
    """Whether every value is a finite number, so that a refusal is not the caller's fault."""
    if isinstance(table, np.ndarray) and table.dtype.kind in "fc":
        return bool(np.isfinite(table).all())
    return isinstance(table, np.ndarray) and table.dtype.kind in "biu"
