"""Where do a version's weights lie on this machine?

    path                   the file or folder itself
    package:NAME[/sub]     inside an installed Python package (one that carries weights)
    s3://bucket/key        an object, or everything under a prefix, copied into the cache
    models:/NAME/VERSION   the model registry (also models:/NAME@alias)

`fetch` answers with a local file or folder. What has to be made or copied is made beside its place
in the cache and renamed into it when it is whole, under a lock that dies with its process: a killed
fetch leaves nothing that looks finished, and two replicas don't do the same work twice.

A package that holds a GGUF file and no plain weights is turned once into the folder of safetensors
that every runtime reads. Nothing is fetched from a model hub.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.runtimes import LoadError
from deployments.runtimes.options import first_line, near

if TYPE_CHECKING:
    from deployments.registry import Registry

Progress = Callable[[int, int], None]
"""Told of bytes done and bytes in all (0 = not known)."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pt2", ".onnx", ".skops", ".joblib", ".gguf")


def fetch(
    source: str,
    folder: Path,
    *,
    registry: Registry | None = None,
    progress: Progress | None = None,
) -> Path:
    """The local file or folder of `source`; `folder` is the cache.

    `registry` answers `models:` sources.

    Raises `LoadError` naming what was not found and what is near it.
    """
    if source.startswith("package:"):
        return _package(source.removeprefix("package:"), folder, progress)
    if source.startswith("s3://"):
        from deployments import buckets

        return buckets.download(source, folder / "s3", progress=progress)
    if source.startswith("models:"):
        return _registered(source, registry)
    if scheme := re.match(r"([A-Za-z0-9_+.-]+):", source):
        raise LoadError(
            f"source: {source!r} begins with {scheme[0]!r}; known are a path, package:NAME, "
            "s3://bucket/key and models:/NAME/VERSION"
        )
    return _path(Path(source))


def _registered(source: str, registry: Registry | None) -> Path:
    if registry is None:
        raise LoadError(f"source: {source!r} needs a model registry; none is configured")
    return registry.fetch(source)


def _path(path: Path) -> Path:
    if path.exists():
        return path
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if parent != path.parent:
        raise LoadError(f"source: {path} does not exist; the nearest folder is {parent}")
    known = [p.name for p in parent.iterdir() if not p.name.startswith(".")]
    raise LoadError(f"source: {path} does not exist; in {parent}: {near(path.name, known)}")


def _package(name: str, cache: Path, progress: Progress | None) -> Path:
    """The folder of weights of an installed package, found without importing it."""
    name, _, inside = name.partition("/")
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise LoadError(f"source: package {name!r} is not installed{_similar(name)}") from None
    files = [f for f in distribution.files or () if ".dist-info/" not in str(f)]
    root = Path(str(distribution.locate_file("")))
    if inside:
        return _path(_inside(root, [str(f) for f in files], name, inside))
    weights = sorted(str(f) for f in files if f.suffix in _WEIGHTS)
    if not weights:
        raise LoadError(
            f"source: package {name!r} holds no weights ({', '.join(_WEIGHTS)}); "
            f"name a folder in it, package:{name}/FOLDER"
        )
    if all(w.endswith(".gguf") for w in weights):
        return _plain_weights(root / weights[0], cache, progress)
    return _top_folder(root, weights)


def _similar(name: str) -> str:
    known = {d.metadata["Name"] or "" for d in importlib.metadata.distributions()}
    hint = near(name, known)
    return f"; {hint}" if hint.startswith("did you mean") else ""


def _inside(root: Path, files: list[str], name: str, inside: str) -> Path:
    """`inside` from the package's own folder, whose name may differ from the distribution's."""
    folders = sorted({f.split("/")[0] for f in files if "/" in f and not f.startswith("..")})
    for folder in folders:
        path = root / folder / inside
        if path.exists() and path.resolve().is_relative_to((root / folder).resolve()):
            return path
    known = [f.partition("/")[2] for f in files]
    known += [str(Path(k).parent) for k in known if "/" in k]
    raise LoadError(
        f"source: package {name!r} has no {inside!r}; {near(inside, set(known) - {''})}"
    )


def _top_folder(root: Path, weights: list[str]) -> Path:
    """The folder that has everything which belongs to the weights."""
    common = os.path.commonpath([Path(w).parent for w in weights])
    if not common:
        raise LoadError(f"source: the package's weights lie apart: {', '.join(weights[:5])}")
    return root / common


def _plain_weights(gguf: Path, cache: Path, progress: Progress | None) -> Path:
    """The folder of safetensors made of a GGUF file, once for each file."""
    size = gguf.stat().st_size
    with gguf.open("rb") as file:
        key = hashlib.sha256(str(size).encode() + file.read(1 << 20)).hexdigest()
    target = cache / "converted" / f"{gguf.stem}-{key[:12]}"
    with made_once(target) as folder:
        if folder is not None:
            if progress is not None:
                progress(0, size)
            _convert(gguf, folder)
            if progress is not None:
                progress(size, size)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    try:
        from deployments import conversion

        conversion.convert(gguf, folder)
    except ImportError as error:
        raise LoadError(
            f"source: {gguf.name} must be converted, which needs torch, transformers, gguf and "
            f"accelerate: {first_line(error)}"
        ) from error


@contextlib.contextmanager
def made_once(target: Path) -> Iterator[Path | None]:
    """A fresh folder that becomes `target` when the block ends well; None if `target` is there.

    One process at a time; what an earlier, killed one left is swept away.
    """
    if target.exists():
        yield None
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent / f".{target.name}.lock"):
        if target.exists():
            yield None
            return
        for left in target.parent.glob(f".{target.name}.part-*"):
            shutil.rmtree(left, ignore_errors=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
        try:
            yield part
            part.chmod(0o755)
            part.rename(target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock `file`; the kernel frees it when the process dies."""
    with file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
