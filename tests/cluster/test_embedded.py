"""Does a cluster on this machine know its own files, ports and processes, and nobody else's?"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_type_hints

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import embedded
from cluster.access.keys import hash_of
from cluster.config import ConfigError, Settings
from cluster.embedded import MARK, ClusterError, Running
from cluster.store import Store


def running(home: Path, **changes: Any) -> Running:
    value = Running("abc", Settings(home), "127.0.0.2:1", "http://127.0.0.1:2")
    return replace(value, **changes)


@contextmanager
def a_process(**environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that lives while the block runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", "print('here', flush=True); input()"],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# what is written down


def test_a_cluster_is_found_as_it_was_written_down(tmp_path: Path) -> None:
    settings = Settings(tmp_path, tls_pem=tmp_path / "c.pem", https_port=1, drain_timeout_s=2.5)
    wrote = running(tmp_path, settings=settings, head_pid=7, head_started_s=1.25, is_up=True)
    embedded._write(wrote)
    assert embedded.find(tmp_path) == wrote


def test_where_nothing_was_written_nothing_is_found(tmp_path: Path) -> None:
    assert embedded.find(tmp_path) is None
    assert embedded.find(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "can't be read"),
        ("{", "can't be read"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "can't be read"),
        ("{}", "was not written by this version of Shoal"),
        ("[]", "was not written by this version of Shoal"),
        ('{"settings": 5}', "was not written by this version of Shoal"),
        ('{"settings": {"home": "/x"}, "id": "a", "later": 1}', "was not written by this version"),
    ],
)
def test_a_file_that_says_something_else_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "cluster.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ClusterError, match=said) as failed:
        embedded.find(tmp_path)
    assert str(tmp_path / "cluster.json") in str(failed.value)


def test_a_setting_of_another_version_is_left_aside(tmp_path: Path) -> None:
    embedded._write(running(tmp_path))
    file = tmp_path / "cluster.json"
    values = json.loads(file.read_text())
    values["settings"]["from_the_future"] = 1
    file.write_text(json.dumps(values))
    assert embedded.find(tmp_path) == running(tmp_path)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    if isinstance(kind, UnionType):
        first, _none = kind.__args__
        return st.none() | values_of(first)
    return {
        Path: st.just(Path("/a/b")), int: st.integers(), str: st.text(),
        bool: st.booleans(), float: st.floats(allow_nan=False),
    }[kind]  # fmt: skip


@given(
    st.builds(
        Settings, **{f.name: values_of(get_type_hints(Settings)[f.name]) for f in fields(Settings)}
    )
)
def test_all_settings_survive_the_way_through_the_file(settings: Settings) -> None:
    text = json.dumps(embedded._settings_to(settings))
    assert embedded._settings_from(json.loads(text)) == settings


def test_what_is_private_is_for_its_owner_only_and_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.key"
    embedded._write_private(file, "one")
    embedded._write_private(file, "two")
    assert file.read_text() == "two\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [f.name for f in tmp_path.iterdir()] == ["a.key"]


def test_a_secret_is_made_once_and_stays(tmp_path: Path) -> None:
    secret = embedded.edge_token(tmp_path)
    assert len(secret) == 64
    assert embedded.edge_token(tmp_path) == secret
    other = tmp_path / "other"
    other.mkdir()
    assert embedded.edge_token(other) != secret


def test_an_admin_key_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"admin\.key can't be read"):
        embedded.admin_key(tmp_path)
    (tmp_path / "admin.key").write_text("shoal_x_y\n")
    assert embedded.admin_key(tmp_path) == "shoal_x_y"


def admins(settings: Settings) -> list[str]:
    """The hashes of the store's admin keys."""
    store = Store(settings.store_url)
    ids = {key.id for key in store.all_keys() if key.role == "admin" and key.revoked_s is None}
    found = [item.sha256 for item in store.key_hashes() if item.key_id in ids]
    store.close()
    return found


def test_the_first_start_makes_an_admin_key_and_the_next_ones_keep_it(tmp_path: Path) -> None:
    settings = Settings(tmp_path)
    embedded._first_key(settings)
    key = embedded.admin_key(tmp_path)
    embedded._first_key(settings)
    assert embedded.admin_key(tmp_path) == key
    assert admins(settings) == [hash_of(key)]


def test_a_key_that_the_store_does_not_know_is_replaced(tmp_path: Path) -> None:
    embedded._first_key(Settings(tmp_path))
    other = Settings(tmp_path, store=f"sqlite:///{tmp_path / 'another.db'}")
    embedded._first_key(other)
    assert admins(other) == [hash_of(embedded.admin_key(tmp_path))]


@pytest.mark.parametrize(
    "url", ["nonsense", "sqlite:////nowhere/x.db", "nothing://db/x", "postgresql://127.0.0.1:1/x"]
)
def test_a_store_that_can_not_be_opened_is_named(tmp_path: Path, url: str) -> None:
    with pytest.raises(ClusterError, match="setting store: it can't be opened: "):
        embedded._first_key(Settings(tmp_path, store=url))
    assert not (tmp_path / "admin.key").exists()


def test_a_store_of_a_newer_shoal_is_named(tmp_path: Path) -> None:
    settings = Settings(tmp_path)
    embedded._first_key(settings)
    with sqlite3.connect(tmp_path / "shoal.db") as db:
        db.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(ClusterError, match="9999"):
        embedded._first_key(settings)


def test_the_end_of_a_log_is_its_last_lines_that_say_something(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert embedded._tail(log) == "no log was written"
    log.write_text("\n \n")
    assert embedded._tail(log) == "it printed nothing"
    log.write_bytes(b"one\ntwo\n\nthree \xff\nfour\n")
    assert embedded._tail(log) == "two | three \ufffd | four"


# starting and ending


def test_one_start_or_stop_is_at_work_in_a_home_at_a_time(tmp_path: Path) -> None:
    with embedded._locked(tmp_path):
        with pytest.raises(ClusterError, match="another shoal up or down is at work"):
            embedded.down(tmp_path, print)
        with pytest.raises(ClusterError, match="another shoal up or down is at work"):
            embedded.up(Settings(tmp_path), print)
    with embedded._locked(tmp_path):
        pass


def test_ending_what_was_never_started_is_harmless(tmp_path: Path) -> None:
    assert embedded.down(tmp_path / "nothing", print) is False
    assert embedded.down(tmp_path, print) is False


def test_a_home_that_can_not_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match="can't be the cluster's folder"):
        embedded.up(Settings(tmp_path / "file" / "home"), print)


def test_a_cluster_that_is_up_is_not_started_again(tmp_path: Path) -> None:
    me = psutil.Process()
    known = running(tmp_path, head_pid=me.pid, head_started_s=me.create_time(), is_up=True)
    embedded._write(known)
    assert embedded.up(Settings(tmp_path), print) == (known, False)


# ports


def test_any_port_becomes_a_free_one_of_its_own_and_others_stay(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        fixed = free.getsockname()[1]
    settings = Settings(tmp_path, port=0, grpc_port=0, metrics_port=0, tensorflow_port=fixed)
    chosen = embedded._with_ports(settings)
    ports = [chosen.port, chosen.grpc_port, chosen.metrics_port, chosen.edge_metrics_port, fixed]
    assert all(ports)
    assert len(set(ports)) == 5
    assert (chosen.tensorflow_port, chosen.https_port) == (fixed, None)
    assert replace(chosen, port=0, grpc_port=0, metrics_port=0, edge_metrics_port=0) == settings


def test_a_port_that_another_program_has_is_refused_by_its_flag(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = Settings(tmp_path, port=0, grpc_port=port, metrics_port=0)
        with pytest.raises(ConfigError) as refused:
            embedded._with_ports(settings)
    assert f"grpc_port {port} on 127.0.0.1 is in use by another program" in str(refused.value)
    assert "--grpc-port" in str(refused.value)


def test_an_address_that_is_not_this_machines_is_refused_with_the_systems_reason(
    tmp_path: Path,
) -> None:
    settings = Settings(tmp_path, host="203.0.113.7", port=0)
    with pytest.raises(ConfigError, match=r"203\.0\.113\.7 can't be used: "):
        embedded._with_ports(settings)


# processes


def test_a_process_is_known_by_its_pid_and_its_start() -> None:
    with a_process() as process:
        started_s = psutil.Process(process.pid).create_time()
        assert embedded._is_process(process.pid, started_s)
        assert not embedded._is_process(process.pid, started_s - 60), "another one had this pid"
    assert not embedded._is_process(process.pid, started_s)
    assert not embedded._is_process(0, 0.0)


def test_a_process_that_nobody_has_waited_for_is_no_process_any_more() -> None:
    with a_process() as process:
        known = psutil.Process(process.pid)
        started_s = known.create_time()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert known.status() == psutil.STATUS_ZOMBIE
        assert not embedded._is_process(process.pid, started_s)


def test_only_the_processes_with_the_clusters_mark_are_its_own() -> None:
    with (
        a_process(**{MARK: "this-one"}) as ours,
        a_process(**{MARK: "this-one-too"}),
        a_process(),
    ):
        assert [p.pid for p in embedded.marked("this-one")] == [ours.pid]
    assert embedded.marked("this-one") == []


def test_whoever_ends_a_cluster_is_never_among_what_is_ended() -> None:
    code = "from cluster.embedded import marked; print([p.pid for p in marked('mine')])"
    done = subprocess.run(
        ["sh", "-c", f'{sys.executable} -c "{code}"; true'],
        env={**os.environ, MARK: "mine"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout == "[]\n", done.stderr


def test_processes_of_a_cluster_find_its_ray_and_carry_its_mark(tmp_path: Path) -> None:
    environment = embedded.ray_environment(running(tmp_path))
    assert environment[MARK] == "abc"
    assert environment["RAY_ADDRESS"] == "127.0.0.2:1"
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "ray.token")
