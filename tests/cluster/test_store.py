"""Does the store keep what it is told, in order, whoever else writes at the same time?"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given
from hypothesis import strategies as st

from cluster.access.keys import Key
from cluster.store import Store, metadata

A, B, C = {"name": "a"}, {"name": "b"}, {"name": "c"}


def url_of(folder: Path) -> str:
    return f"sqlite:///{folder / 'shoal.db'}"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(url_of(tmp_path))
    yield opened
    opened.close()


def put(store: Store, *documents: dict[str, Any] | None, model: str = "fraud") -> list[int]:
    return [
        store.append(model, "deploy" if d else "delete", d, "me", 100.0 + n)
        for n, d in enumerate(documents)
    ]


def current(store: Store, model: str = "fraud") -> Any:
    entry = store.in_force().get(model)
    return entry.document if entry else None


def back(store: Store, model: str = "fraud") -> Any:
    """What a rollback puts in force; None when it refuses."""
    entry = store.roll_back(model, "me", 200.0)
    if entry is None:
        return None
    assert entry.action == "rollback"
    assert store.in_force()[model].id == entry.id
    assert store.in_force()[model].document == entry.document
    return entry.document


# models


def test_the_newest_document_of_each_model_is_in_force(store: Store) -> None:
    put(store, A, B)
    put(store, C, model="other")
    assert {name: e.document for name, e in store.in_force().items()} == {"fraud": B, "other": C}


def test_a_models_history_is_told_oldest_first(store: Store) -> None:
    rows = put(store, A, B, None)
    entries = store.entries("fraud")
    assert [e.id for e in entries] == rows == sorted(rows)
    assert [(e.action, e.document, e.actor, e.created_s) for e in entries] == [
        ("deploy", A, "me", 100.0),
        ("deploy", B, "me", 101.0),
        ("delete", None, "me", 102.0),
    ]


def test_a_deleted_model_is_not_in_force_and_comes_back_with_its_next_document(
    store: Store,
) -> None:
    put(store, A, None)
    assert store.in_force() == {}
    put(store, B)
    assert current(store) == B


def test_what_was_written_is_there_when_the_store_is_opened_again(tmp_path: Path) -> None:
    first = Store(url_of(tmp_path))
    put(first, A)
    first.remember("x", [1])
    first.close()
    again = Store(url_of(tmp_path))
    assert (current(again), again.recall("x")) == (A, [1])
    again.close()


# rollback


def test_rollbacks_walk_back_one_document_at_a_time(store: Store) -> None:
    put(store, A, B, C)
    assert [back(store), back(store), back(store)] == [B, A, None]
    assert current(store) == A


def test_a_refused_rollback_changes_nothing(store: Store) -> None:
    put(store, A)
    before = store.entries("fraud")
    assert back(store) is None
    assert store.entries("fraud") == before


def test_a_document_that_was_rolled_back_is_skipped(store: Store) -> None:
    put(store, A, B)
    assert back(store) == A
    put(store, C)
    assert back(store) == A


def test_a_document_that_was_rolled_back_counts_again_once_it_is_deployed_again(
    store: Store,
) -> None:
    put(store, A, B)
    back(store)
    put(store, B, C)
    assert back(store) == B


def test_deploying_the_same_document_twice_needs_one_rollback(store: Store) -> None:
    put(store, A, B, B)
    assert back(store) == A


def test_nothing_from_before_a_deletion_is_gone_back_to(store: Store) -> None:
    put(store, A, B, None, C)
    assert back(store) is None


def test_a_deleted_or_unknown_model_has_nothing_to_go_back_to(store: Store) -> None:
    put(store, A, None)
    assert back(store) is None
    assert back(store, "nobody") is None


def test_a_rollback_of_one_model_leaves_the_others(store: Store) -> None:
    put(store, A, B)
    put(store, A, C, model="other")
    back(store)
    assert current(store, "other") == C


@given(
    actions=st.lists(st.sampled_from(["a", "b", "c", "delete", "back"]), max_size=12),
)
def test_a_rollback_never_invents_repeats_or_revives(actions: list[str]) -> None:
    store = Store("sqlite://")
    deployed: list[str] = []  # since the last deletion
    for action in actions:
        before = current(store)
        if action == "delete":
            put(store, None)
            deployed = []
        elif action == "back":
            after = back(store)
            if after is not None:
                assert after != before
                assert after["name"] in deployed
                assert before is not None
        else:
            put(store, {"name": action})
            deployed.append(action)
    for _ in range(len(actions) + 1):  # and it comes to an end
        if back(store) is None:
            break
    else:
        pytest.fail("rollbacks went round in a circle")
    store.close()


# keys


def test_keys_come_back_as_they_were_with_their_hash(store: Store) -> None:
    key = Key("k1", "app", "admin", ("a", "b"), 10, 2, created_s=5.0)
    store.add_key(key, "f" * 64)
    assert store.all_keys() == [key]
    (found,) = store.key_hashes()
    assert (found.key_id, found.sha256, found.expires_s) == ("k1", "f" * 64, None)


def test_a_keys_name_is_taken_even_after_it_was_revoked(store: Store) -> None:
    store.add_key(Key("k1", "app"), "1" * 64)
    store.revoke_key("k1", 9.0)
    with pytest.raises(ValueError, match="'app' is taken"):
        store.add_key(Key("k2", "app"), "2" * 64)
    assert [k.revoked_s for k in store.all_keys()] == [9.0]
    assert len(store.key_hashes()) == 1


def test_a_rotation_lets_the_old_secret_end_after_the_overlap(store: Store) -> None:
    store.add_key(Key("k1", "app"), "1" * 64)
    store.add_key(Key("k2", "other"), "9" * 64)
    store.rotate_key("k1", "2" * 64, now_s=100.0, overlap_s=50.0)
    assert {h.sha256[0]: h.expires_s for h in store.key_hashes()} == {
        "1": 150.0,
        "2": None,
        "9": None,
    }


def test_a_second_rotation_does_not_lengthen_the_life_of_the_first_secret(store: Store) -> None:
    store.add_key(Key("k1", "app"), "1" * 64)
    store.rotate_key("k1", "2" * 64, 100.0, 50.0)
    store.rotate_key("k1", "3" * 64, 120.0, 3600.0)
    store.rotate_key("k1", "4" * 64, 130.0, 1.0)
    assert {h.sha256[0]: h.expires_s for h in store.key_hashes()} == {
        "1": 131.0,
        "2": 131.0,
        "3": 131.0,
        "4": None,
    }


def test_a_secret_for_a_key_that_is_not_there_is_refused(store: Store) -> None:
    with pytest.raises(sa.exc.IntegrityError):
        store.rotate_key("nobody", "1" * 64, 0.0, 0.0)


# memory and audit


@pytest.mark.parametrize("value", [None, 3, "text", [1, {"a": None}], {}])
def test_what_is_remembered_is_recalled_and_the_last_word_counts(store: Store, value: Any) -> None:
    store.remember("x", "before")
    store.remember("x", value)
    store.remember("y", "other")
    assert store.recall("x") == value
    assert store.recall("nothing") is None


def test_audit_shows_the_newest_lines_first_and_no_more_than_asked(store: Store) -> None:
    for n in range(5):
        store.record("me", "deploy", f"m{n}", {"row": n}, float(n))
    assert [line["target"] for line in store.audit(2)] == ["m4", "m3"]
    assert store.audit()[0] | {"id": 0} == {
        "id": 0,
        "at_s": 4.0,
        "actor": "me",
        "action": "deploy",
        "target": "m4",
        "detail": '{"row": 4}',
    }


# migration


def test_the_migrated_tables_are_those_that_the_code_declares(tmp_path: Path) -> None:
    Store(url_of(tmp_path)).close()
    engine = sa.create_engine(url_of(tmp_path))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_a_migration_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    file = tmp_path / "shoal.db"
    with sqlite3.connect(file) as other:
        other.execute("CREATE TABLE memory (stranger TEXT)")  # the fourth table is in the way
    with pytest.raises(sa.exc.OperationalError):
        Store(url_of(tmp_path))
    with sqlite3.connect(file) as db:
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        assert names == ["memory"]
        db.execute("DROP TABLE memory")
    Store(url_of(tmp_path)).close()


def test_a_store_of_a_newer_shoal_is_refused(tmp_path: Path) -> None:
    Store(url_of(tmp_path)).close()
    with sqlite3.connect(tmp_path / "shoal.db") as db:
        db.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(Exception, match="9999"):
        Store(url_of(tmp_path))


# several processes

WRITER = """
import sys
from cluster.store import Store
url, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
store = Store(url)
for number in range(count):
    store.append("shared", "deploy", {"name": name, "number": number}, name, 0.0)
    store.remember("shared", name)
    store.remember(f"{name}-{number}", number)
    store.record(name, "deploy", "shared", {}, 0.0)
    store.roll_back("shared", name, 0.0)
store.close()
"""


def test_two_processes_open_a_new_store_and_write_at_the_same_time(tmp_path: Path) -> None:
    count = 15
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, url_of(tmp_path), name, str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    assert [w.stdout.readline() for w in writers if w.stdout] == ["ready\n"] * 2
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    errors = [writer.communicate(timeout=60)[1] for writer in writers]
    assert [w.returncode for w in writers] == [0, 0], errors
    store = Store(url_of(tmp_path))
    entries = store.entries("shared")
    assert sum(e.action == "deploy" for e in entries) == 2 * count
    assert len(store.audit(1000)) == 2 * count
    assert [store.recall(f"{w}-{count - 1}") for w in ("one", "two")] == [count - 1] * 2
    assert store.recall("shared") in ("one", "two")
    store.close()


def test_readers_go_on_while_somebody_writes(tmp_path: Path) -> None:
    store = Store(url_of(tmp_path))
    put(store, A)
    writer = sqlite3.connect(tmp_path / "shoal.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    assert current(store) == A
    writer.execute("ROLLBACK")
    writer.close()
    store.close()
