"""How do weights come from an S3 bucket to this machine, whole?

`s3://bucket/key` is one object, or everything under `key/`. What is there is listed first; sizes
and ETags name the place in the cache, so changed weights never mix with old ones. Objects are
fetched into a hidden folder beside that place, each verified by size and by MD5 where its ETag is
one; the folder is renamed when all are there. A killed fetch goes on where it stopped, by range, as
long as the object is the same.

Credentials, region and endpoint are boto3's own affair (AWS_ENDPOINT_URL and the rest).
"""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.runtimes import LoadError
from deployments.runtimes.options import first_line, near

Progress = Callable[[int, int], None]

_CHUNK = 1 << 20
_STREAMS = 4
_STALE_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Item:
    """One object: its key, where it goes below the target, and what it must be."""

    key: str
    path: str
    size: int
    etag: str

    @property
    def md5(self) -> str | None:
        """The content's MD5, where the ETag is one (not for multipart uploads)."""
        return self.etag if re.fullmatch(r"[0-9a-f]{32}", self.etag) else None


def download(source: str, cache: Path, *, progress: Progress | None = None) -> Path:
    """The local copy of `source`, an `s3://` address: a file for an object, else a folder.

    Raises `LoadError` naming what is missing and what is near it.
    """
    bucket, key = _parsed(source)
    client = _client()
    try:
        items = _listed(client, bucket, key)
        folder = _copied(client, bucket, items, cache / _place(bucket, key, items), progress)
    except LoadError:
        raise
    except Exception as error:  # boto3's errors share no base; all mean the same here
        raise LoadError(f"source: {source} can't be read: {first_line(error)}") from error
    return folder / items[0].path if items[0].key == key else folder


def _parsed(source: str) -> tuple[str, str]:
    bucket, _, key = source.removeprefix("s3://").partition("/")
    if not bucket or not key.strip("/"):
        raise LoadError(f"source: {source!r} must be s3://bucket/key or s3://bucket/folder")
    return bucket, key


def _client() -> Any:
    import boto3

    return boto3.client("s3")


def _listed(client: Any, bucket: str, key: str) -> list[Item]:
    """The object `key`, or all objects below it."""
    prefix = key.rstrip("/") + "/"
    try:
        if not key.endswith("/") and (item := _object(client, bucket, key)) is not None:
            return [item]
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        found = [o for page in pages for o in page.get("Contents", ()) if o["Key"][-1] != "/"]
    except client.exceptions.NoSuchBucket:
        raise LoadError(
            f"source: there is no bucket {bucket!r}; {_buckets(client, bucket)}"
        ) from None
    if not found:
        raise LoadError(f"source: s3://{bucket}/{key} does not exist; {_near(client, bucket, key)}")
    return [_item(o["Key"], _inside(o["Key"], prefix), o["Size"], o["ETag"]) for o in found]


def _object(client: Any, bucket: str, key: str) -> Item | None:
    try:
        head = client.head_object(Bucket=bucket, Key=key)
    except client.exceptions.ClientError as error:
        if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
            return None
        raise
    etag = head["ETag"]
    if "KMS" in head.get("ServerSideEncryption", "").upper():
        etag = f"kms:{etag}"  # no MD5
    return _item(key, key.rpartition("/")[2], head["ContentLength"], etag)


def _item(key: str, path: str, size: int, etag: str) -> Item:
    return Item(key, path, size, etag.replace('"', ""))


def _inside(key: str, prefix: str) -> str:
    path = key.removeprefix(prefix)
    if ".." in path.split("/") or path.startswith("/"):
        raise LoadError(f"source: the object {key!r} has a name that leads out of its folder")
    return path


def _buckets(client: Any, bucket: str) -> str:
    try:
        return near(bucket, [b["Name"] for b in client.list_buckets()["Buckets"]])
    except client.exceptions.ClientError:  # listing them may not be allowed
        return "check its name and your credentials"


def _near(client: Any, bucket: str, key: str) -> str:
    """What there is in the nearest folder above `key`."""
    above, _, name = key.rstrip("/").rpartition("/")
    prefix = f"{above}/" if above else ""
    page = client.list_objects_v2(Bucket=bucket, Prefix=prefix, Delimiter="/", MaxKeys=200)
    known = [o["Key"].removeprefix(prefix) for o in page.get("Contents", ())]
    known += [p["Prefix"].removeprefix(prefix).rstrip("/") for p in page.get("CommonPrefixes", ())]
    return f"in s3://{bucket}/{prefix}: {near(name, known)}"


def _place(bucket: str, key: str, items: Sequence[Item]) -> str:
    """The name in the cache: readable, and another one for any other content."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", key.rstrip("/").rpartition("/")[2])
    digest = hashlib.sha256(f"{bucket}/{key}".encode())
    for item in items:
        digest.update(f"\n{item.path} {item.size} {item.etag}".encode())
    return f"{slug}-{digest.hexdigest()[:16]}"


def _copied(
    client: Any, bucket: str, items: Sequence[Item], target: Path, progress: Progress | None
) -> Path:
    """`target`, made of the items if it is not there yet."""
    from deployments.sources import locked

    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    with locked(target.parent / f".{target.name}.lock"):
        if target.exists():
            return target
        part = target.parent / f".{target.name}.part"
        part.mkdir(exist_ok=True)
        meter = _Meter(sum(i.size for i in items), progress)
        with ThreadPoolExecutor(_STREAMS) as pool:
            list(pool.map(lambda i: _fetched(client, bucket, i, part / i.path, meter), items))
        part.rename(target)
    return target


def _sweep(folder: Path) -> None:
    """Remove parts that nobody has gone on with for a day."""
    oldest_s = time.time() - _STALE_S
    for part in folder.glob(".*.part"):
        if part.stat().st_mtime < oldest_s:
            shutil.rmtree(part, ignore_errors=True)


class _Meter:
    """Bytes done, told to `progress`."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)


def _fetched(client: Any, bucket: str, item: Item, target: Path, meter: _Meter) -> None:
    """One object at `target`, verified; tried once more from the start if it came out wrong."""
    if target.exists():
        meter.add(item.size)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.bytes")
    wrong: str | None = None
    for _ in range(2):
        _append(client, bucket, item, part, meter)
        wrong = _wrong(item, part)
        if wrong is None:
            part.rename(target)
            return
        meter.add(-part.stat().st_size)
        part.unlink()
    raise LoadError(f"source: s3://{bucket}/{item.key} came damaged twice: {wrong}")


def _append(client: Any, bucket: str, item: Item, part: Path, meter: _Meter) -> None:
    """Fetch what `part` does not have yet; refused by the server if the object has changed."""
    start = part.stat().st_size if part.exists() else 0
    meter.add(start)
    if start >= item.size > 0:
        return
    wanted: dict[str, str] = {"Range": f"bytes={start}-"} if start else {}
    tag = item.etag.removeprefix("kms:")
    reply = client.get_object(Bucket=bucket, Key=item.key, IfMatch=f'"{tag}"', **wanted)
    with part.open("ab") as file:
        for chunk in reply["Body"].iter_chunks(_CHUNK):
            file.write(chunk)
            meter.add(len(chunk))


def _wrong(item: Item, part: Path) -> str | None:
    """What is wrong with the bytes that came, if anything."""
    size = part.stat().st_size
    if size != item.size:
        return f"{size} bytes instead of {item.size}"
    if item.md5 is None:
        return None
    digest = hashlib.md5(usedforsecurity=False)
    with part.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return None if digest.hexdigest() == item.md5 else f"its MD5 is not {item.md5}"
