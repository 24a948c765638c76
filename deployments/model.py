"""The model file that a user writes, checked and frozen.

One YAML file describes one model: its versions, what each needs, how traffic is split and which
latency is promised. Anything that is not understood is an error that names the field and the
nearest known one; a file that passes here can be deployed without surprises of spelling.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

Datatype = Literal[
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "BF16",
    "FP32",
    "FP64",
    "BYTES",
]
RuntimeName = Literal["sklearn", "onnx", "torch", "sentence_transformers", "vllm", "python"]

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
"""Model and version names: safe in URLs, in Serve application names and in HAProxy maps."""

_RESERVED = re.compile(r"--|\.\.")


class ModelFileError(ValueError):
    """A model file that can't be used. `problems` has one line for each thing to mend."""

    def __init__(self, where: str, problems: list[str]) -> None:
        self.where = where
        self.problems = problems
        super().__init__("\n".join([f"{where}:", *(f"  {p}" for p in problems)]))


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class TensorSpec(_Frozen):
    """One input or output: `shape` includes the batch dimension, -1 = any length."""

    name: str = Field(min_length=1)
    datatype: Datatype
    shape: tuple[Annotated[int, Field(ge=-1)], ...]

    @field_validator("shape")
    @classmethod
    def _rows_first(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape[:1] != (-1,):
            raise ValueError(f"shape {list(shape)} must begin with -1, the rows")
        return shape


class Resources(_Frozen):
    """What one replica needs. `gpu` may be a fraction; `memory_mb` is reserved, not enforced."""

    cpu: float = Field(default=1, ge=0, le=1024)
    gpu: float = Field(default=0, ge=0, le=64)
    memory_mb: int = Field(default=0, ge=0)


class Batching(_Frozen):
    """How requests are put together. A lone caller never waits `wait_max_ms`."""

    batch_size_max: int = Field(default=32, ge=1, le=65536)
    wait_max_ms: float = Field(default=5, ge=0, le=10_000)
    queue_requests_max: int = Field(default=1024, ge=1, le=1_000_000)


class Cache(_Frozen):
    """Answers kept by the digest of their inputs, in each replica."""

    entries_max: int = Field(default=1024, ge=1)
    ttl_s: float = Field(default=300, gt=0)


class Slo(_Frozen):
    """The promise: `attainment` of the requests are answered within `latency_p99_ms`."""

    latency_p99_ms: float = Field(gt=0)
    attainment: float = Field(default=0.99, gt=0, lt=1)


class Scaling(_Frozen):
    """Bounds on the number of replicas of each version that has traffic.

    `replicas_min: 0` or `idle_to_zero_s` lets an unused version go to zero; the front desk holds
    the request that wakes it.
    """

    replicas_min: int = Field(default=1, ge=0, le=10_000)
    replicas_max: int = Field(default=20, ge=1, le=10_000)
    on_demand_min: int = Field(default=0, ge=0)
    idle_to_zero_s: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.replicas_min > self.replicas_max:
            raise ValueError(
                f"replicas_min is {self.replicas_min} but replicas_max is {self.replicas_max}: "
                "replicas_min must not be larger"
            )
        return self


class Rollout(_Frozen):
    """How traffic moves to what a deploy asks for: percent steps, `interval_s` apart.

    No steps = at once, as soon as the new version is ready.
    """

    steps: tuple[Annotated[int, Field(gt=0, le=100)], ...] = ()
    interval_s: float = Field(default=30, gt=0)
    rollback_window_s: float = Field(default=600, ge=0)

    @field_validator("steps")
    @classmethod
    def _rising(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if any(a >= b for a, b in itertools.pairwise(steps)):
            raise ValueError(f"steps {list(steps)} must rise, such as [5, 25, 50, 100]")
        return steps


class Version(_Frozen):
    """One version: which weights, which runtime, what one replica of it needs.

    `options` go to the runtime (its file says which it knows). `timeout_ms` is the longest a
    request may take; callers may ask for less. `idempotent: false` forbids the edge to send a
    request twice. `labels` are names by which callers reach this version ("stable"). `probe: false`
    skips the warm-up and the health probe, for a model that can't take zeros or a short text.
    """

    runtime: RuntimeName
    source: str = Field(min_length=1)
    resources: Resources = Resources()
    batching: Batching = Batching()
    cache: Cache | None = None
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    labels: tuple[str, ...] = ()
    class_labels: tuple[str, ...] = ()
    options: dict[str, Any] = Field(default_factory=dict)
    timeout_ms: int = Field(default=60_000, gt=0, le=86_400_000)
    idempotent: bool = True
    probe: bool = True

    @field_validator("inputs", "outputs")
    @classmethod
    def _each_once(cls, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        names = [s.name for s in specs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} stands there twice")
        return specs

    @cached_property
    def digest(self) -> str:
        """Eight hex digits that change when a replica must be started anew."""
        text = json.dumps(self.model_dump(mode="json", exclude={"labels"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def _text_keys(value: Any) -> Any:
    """YAML reads `3:` as a number; versions are text."""
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value


class ModelFile(_Frozen):
    """A whole model file. `traffic` is percent by version and adds up to 100.

    Without `traffic`, the last version in the file gets everything. `sticky_header` keeps callers
    that send the same value of that header on one version.
    """

    name: str
    versions: Annotated[dict[str, Version], BeforeValidator(_text_keys)] = Field(min_length=1)
    traffic: Annotated[dict[str, Annotated[int, Field(ge=0, le=100)]], BeforeValidator(_text_keys)]
    slo: Slo | None = None
    scaling: Scaling = Scaling()
    rollout: Rollout = Rollout()
    sticky_header: str | None = Field(default=None, pattern=r"^[A-Za-z][A-Za-z0-9-]{0,63}$")

    @model_validator(mode="before")
    @classmethod
    def _default_traffic(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "traffic" not in data:
            versions = data.get("versions")
            if isinstance(versions, Mapping) and versions:
                return {**data, "traffic": {str(list(versions)[-1]): 100}}
            return {**data, "traffic": {}}
        return data

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        return _checked_name("name", name)

    @field_validator("versions")
    @classmethod
    def _version_names(cls, versions: dict[str, Version]) -> dict[str, Version]:
        labels: dict[str, str] = {}
        for name, version in versions.items():
            _checked_name("version", name)
            for label in version.labels:
                _checked_name("label", label)
                if label in labels:
                    raise ValueError(
                        f"label {label!r} is on versions {labels[label]!r} and {name!r}"
                    )
                labels[label] = name
        return versions

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        for version in self.versions:
            if len(self.name) + len(version) > 100:
                raise ValueError(
                    f"name and version {version!r} have {len(self.name) + len(version)} "
                    "characters together; they may have 100"
                )
        return self

    @model_validator(mode="after")
    def _traffic_adds_up(self) -> Self:
        for name in self.traffic:
            if name not in self.versions:
                known = ", ".join(repr(v) for v in self.versions)
                raise ValueError(f"traffic names version {name!r}; the file has {known}")
        if sum(self.traffic.values()) != 100:
            raise ValueError(
                f"traffic adds up to {sum(self.traffic.values())} percent; it must be 100"
            )
        return self


def _checked_name(field: str, name: str) -> str:
    if not NAME.fullmatch(name) or _RESERVED.search(name):
        raise ValueError(
            f"{field} {name!r} must be 1 to 64 letters, digits, '.', '_' or '-', "
            "begin and end with a letter or digit, and hold no '--' or '..'"
        )
    return name


def parse_model_file(document: Any, where: str = "model file") -> ModelFile:
    """The model file in `document` (the parsed YAML or JSON).

    Raises `ModelFileError` with every problem found, each naming the field, the value and what
    would be right.
    """
    if not isinstance(document, Mapping):
        raise ModelFileError(
            where, [f"must be a mapping with name and versions, not {_kind(document)}"]
        )
    try:
        return ModelFile.model_validate(document)
    except ValidationError as error:
        raise ModelFileError(where, [_problem(e) for e in error.errors()]) from None


def read_model_file(path: Path) -> ModelFile:
    """The model file at `path`; relative `source` paths are resolved against its folder.

    Raises `ModelFileError` (also for YAML that can't be read) and `OSError`.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ModelFileError(str(path), [f"is not YAML: {' '.join(str(error).split())}"]) from None
    model = parse_model_file(document, str(path))
    versions = {
        name: version.model_copy(update={"source": _anchored(version.source, path.parent)})
        for name, version in model.versions.items()
    }
    return model.model_copy(update={"versions": versions})


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets the second of two equal keys win silently; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of `node`; what `<<` merges into it may be overridden as usual."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"the key {key_node.value!r} stands there twice",
                    key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _anchored(source: str, folder: Path) -> str:
    """A path source made absolute; other kinds of source as they are."""
    if re.match(r"[A-Za-z0-9_+.-]+:", source):
        return source
    return str((folder / source).resolve())


def _problem(error: Any) -> str:
    """One line of a pydantic error: the field, what is wrong with it, and the near key."""
    location = tuple(p for p in error["loc"] if p != "function-before[_text_keys(), dict]")
    field = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{field}: unknown key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{field}: is missing"
    value = error.get("input")
    shown = f" (is {value!r})" if field and isinstance(value, str | int | float | bool) else ""
    return f"{field}: {message}{shown}" if field else message


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys allowed at `location` of a model file."""
    places: dict[str, type[BaseModel]] = {
        "resources": Resources,
        "batching": Batching,
        "cache": Cache,
        "inputs": TensorSpec,
        "outputs": TensorSpec,
        "slo": Slo,
        "scaling": Scaling,
        "rollout": Rollout,
    }
    for part in reversed(location):
        if part in places:
            return list(places[part].model_fields)
    return list((Version if location and location[0] == "versions" else ModelFile).model_fields)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
