"""What must survive every process: models as wanted, keys, memory of the controller, audit.

One SQL store, SQLite in the home folder or PostgreSQL by URL; Alembic brings an older one up to
date when it is opened. A model's history is a list of documents: the newest one is in force, and a
rollback appends the newest earlier one that was not itself rolled back. Times are UNIX seconds and
arrive as arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from cluster.access.keys import Key, KeyHash
from deployments.sources import locked

metadata = sa.MetaData()

history = sa.Table(
    "history",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("model", sa.String(64), nullable=False, index=True),
    sa.Column("action", sa.String(16), nullable=False),
    sa.Column("document", sa.Text, nullable=True),  # JSON of the model file; null = deleted
    sa.Column("actor", sa.String(128), nullable=False),
    sa.Column("created_s", sa.Float, nullable=False),
    sa.Column("is_rolled_back", sa.Boolean, nullable=False, default=False),
)
keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("name", sa.String(64), nullable=False, unique=True),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("models", sa.Text, nullable=False),
    sa.Column("rate_rps", sa.Integer, nullable=True),
    sa.Column("concurrency_max", sa.Integer, nullable=True),
    sa.Column("created_s", sa.Float, nullable=False),
    sa.Column("revoked_s", sa.Float, nullable=True),
)
key_hashes = sa.Table(
    "key_hashes",
    metadata,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("key_id", sa.String(32), sa.ForeignKey("keys.id"), nullable=False, index=True),
    sa.Column("created_s", sa.Float, nullable=False),
    sa.Column("expires_s", sa.Float, nullable=True),
)
memory = sa.Table(
    "memory",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at_s", sa.Float, nullable=False),
    sa.Column("actor", sa.String(128), nullable=False),
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("target", sa.String(128), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a model's history. `document` None = the model was deleted."""

    id: int
    model: str
    action: str
    document: Mapping[str, Any] | None
    actor: str
    created_s: float
    is_rolled_back: bool = False


class Store:
    """The SQL store at `url`, brought up to date when opened."""

    def __init__(self, url: str) -> None:
        self._engine = sa.create_engine(url)
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", _sqlite_pragmas)
            sa.event.listen(self._engine, "begin", _sqlite_begin)
        self._writing = self._engine.execution_options(**{_WRITES: True})
        with _opening(self._engine.url):
            _migrate(self._writing)

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    # models

    def append(
        self, model: str, action: str, document: Mapping[str, Any] | None, actor: str, now_s: float
    ) -> int:
        """Make `document` the one in force for `model`; its history id."""
        with self._writing.begin() as db:
            return _appended(db, model, action, document, actor, now_s)

    def entries(self, model: str) -> list[Entry]:
        """The model's history, oldest first."""
        with self._engine.connect() as db:
            return _entries(db, model)

    def in_force(self) -> dict[str, Entry]:
        """The newest entry of each model that is not deleted."""
        newest = sa.select(sa.func.max(history.c.id)).group_by(history.c.model)
        query = history.select().where(history.c.id.in_(newest), history.c.document.is_not(None))
        with self._engine.connect() as db:
            return {row.model: _entry(row) for row in db.execute(query.order_by(history.c.model))}

    def roll_back(self, model: str, actor: str, now_s: float) -> Entry | None:
        """Put the newest earlier, not rolled back document in force; None if there is none."""
        with self._writing.begin() as db:
            entries = _entries(db, model)
            chosen = _before(entries)
            if chosen is None:
                return None
            bad = [e.id for e in entries if e.document == entries[-1].document]
            db.execute(history.update().where(history.c.id.in_(bad)).values(is_rolled_back=True))
            row = _appended(db, model, "rollback", chosen.document, actor, now_s)
        return replace(chosen, id=row, action="rollback", actor=actor, created_s=now_s)

    # keys

    def add_key(self, key: Key, sha256: str) -> None:
        """Store a new key with its first hash. Raises `ValueError` if the name is taken."""
        row = {**asdict(key), "models": json.dumps(list(key.models))}
        try:
            with self._writing.begin() as db:
                db.execute(keys.insert().values(row))
                db.execute(_hash_row(KeyHash(sha256, key.id, key.created_s)))
        except sa.exc.IntegrityError:
            raise ValueError(f"name {key.name!r} is taken by another key") from None

    def rotate_key(self, key_id: str, sha256: str, now_s: float, overlap_s: float) -> None:
        """Add a hash; the ones before it end in `overlap_s` (or sooner if they did already)."""
        ends = now_s + overlap_s
        older = sa.or_(key_hashes.c.expires_s.is_(None), key_hashes.c.expires_s > ends)
        with self._writing.begin() as db:
            db.execute(
                key_hashes.update()
                .where(key_hashes.c.key_id == key_id, older)
                .values(expires_s=ends)
            )
            db.execute(_hash_row(KeyHash(sha256, key_id, now_s)))

    def revoke_key(self, key_id: str, now_s: float) -> None:
        """End a key at once; its name stays taken by its record."""
        with self._writing.begin() as db:
            db.execute(keys.update().where(keys.c.id == key_id).values(revoked_s=now_s))

    def all_keys(self) -> list[Key]:
        """All keys, revoked ones too, oldest first."""
        with self._engine.connect() as db:
            rows = db.execute(keys.select().order_by(keys.c.created_s, keys.c.id)).mappings().all()
        return [Key(**{**row, "models": tuple(json.loads(row["models"]))}) for row in rows]

    def key_hashes(self) -> list[KeyHash]:
        """The hashes of all keys, expired ones too."""
        with self._engine.connect() as db:
            return [KeyHash(**row) for row in db.execute(key_hashes.select()).mappings()]

    # memory and audit

    def remember(self, name: str, value: Any) -> None:
        """Keep a JSON value under `name`."""
        text = json.dumps(value)
        with self._writing.begin() as db:
            if not db.execute(
                memory.update().where(memory.c.name == name).values(value=text)
            ).rowcount:
                db.execute(memory.insert().values(name=name, value=text))

    def recall(self, name: str) -> Any:
        """What was kept under `name`, or None."""
        with self._engine.connect() as db:
            text = db.execute(sa.select(memory.c.value).where(memory.c.name == name)).scalar()
        return None if text is None else json.loads(text)

    def record(
        self, actor: str, action: str, target: str, detail: Mapping[str, Any], now_s: float
    ) -> None:
        """Write a line of audit."""
        row = {
            "at_s": now_s,
            "actor": actor,
            "action": action,
            "target": target,
            "detail": json.dumps(detail),
        }
        with self._writing.begin() as db:
            db.execute(audit.insert().values(row))

    def audit(self, limit: int = 100) -> list[dict[str, Any]]:
        """The newest lines of audit, newest first."""
        query = audit.select().order_by(audit.c.id.desc()).limit(limit)
        with self._engine.connect() as db:
            return [dict(row) for row in db.execute(query).mappings()]


def _appended(
    db: sa.Connection,
    model: str,
    action: str,
    document: Mapping[str, Any] | None,
    actor: str,
    now_s: float,
) -> int:
    values = {
        "model": model,
        "action": action,
        "document": None if document is None else json.dumps(document),
        "actor": actor,
        "created_s": now_s,
        "is_rolled_back": False,
    }
    query = history.insert().values(values).returning(history.c.id)
    return int(db.execute(query).scalar_one())


def _entries(db: sa.Connection, model: str) -> list[Entry]:
    query = history.select().where(history.c.model == model).order_by(history.c.id)
    return [_entry(row) for row in db.execute(query)]


def _before(entries: list[Entry]) -> Entry | None:
    """What a rollback goes back to: the newest other document since the model's last deletion."""
    if not entries:
        return None
    *earlier, current = entries
    for entry in reversed(earlier):
        if current.document is None or entry.document is None:
            return None
        is_own = entry.action != "rollback" and not entry.is_rolled_back
        if is_own and entry.document != current.document:
            return entry
    return None


def _entry(row: Any) -> Entry:
    document = None if row.document is None else json.loads(row.document)
    return Entry(
        row.id, row.model, row.action, document, row.actor, row.created_s, row.is_rolled_back
    )


def _hash_row(item: KeyHash) -> sa.Insert:
    return key_hashes.insert().values(asdict(item))


_WRITES = "shoal_writes"
"""The execution option that marks connections whose transactions write."""


def _sqlite_pragmas(connection: Any, _record: Any) -> None:
    """Readers never block the writer, and a busy store is waited for."""
    connection.isolation_level = None  # transactions begin in `_sqlite_begin`
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout=10000")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _opening(url: sa.URL) -> AbstractContextManager[None]:
    """One opener of a SQLite file at a time: its first switch to WAL waits for nobody."""
    file = Path(url.database or ":memory:")
    if url.get_backend_name() != "sqlite" or file.name == ":memory:" or not file.parent.is_dir():
        return nullcontext()
    return locked(file.with_name(f"{file.name}.lock"))


def _sqlite_begin(connection: sa.Connection) -> None:
    """A writer takes the lock before it reads, so that what it decided on still holds."""
    writes = connection.get_execution_options().get(_WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(engine: sa.Engine) -> None:
    """Bring the store's tables to the newest form, wholly or not at all."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
