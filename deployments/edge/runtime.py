"""What a running HAProxy knows, and how to change it while it runs.

HAProxy's runtime socket takes one command a connection and answers in text. This module speaks that
language: it performs `RuntimeCommand`s and reads back maps and servers. A server that leaves is put
into maintenance, which leaves alone what is in flight on it, and is deleted once it has no more
connections (`sweep`); one that comes back before that is let in again.

It decides nothing: which commands, says `configuration.changes`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deployments.edge.configuration import (
    BACKUP,
    CERTIFICATE,
    DESKS,
    MAPS,
    AddServer,
    Entries,
    RemoveServer,
    RuntimeCommand,
    SetMap,
    joined,
)

_PAYLOAD_MAX = 12_000
_MAINTENANCE = 0x01


class RefusedError(Exception):
    """HAProxy did not do what it was told; the message has its own words."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server as HAProxy sees it. `is_leaving`: in maintenance, to be deleted."""

    backend: str
    name: str
    address: str
    is_leaving: bool

    @property
    def is_replica(self) -> bool:
        """Whether it is a replica that stays, not a desk."""
        is_desk = self.backend in DESKS or self.name.startswith(BACKUP)
        return not is_desk and not self.is_leaving


class RuntimeSocket:
    """The socket `name` in `folder`, however long the folder's path is."""

    def __init__(self, folder: Path, name: str, timeout_s: float = 10.0) -> None:
        self._folder = folder
        self._name = name
        self._timeout_s = timeout_s

    def send(self, command: str) -> str:
        """The answer to `command`. Raises `OSError` when nobody answers."""
        folder = os.open(self._folder, os.O_PATH | os.O_DIRECTORY)
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(self._timeout_s)
                connection.connect(f"/proc/self/fd/{folder}/{self._name}")
                connection.sendall(command.encode() + b"\n")
                return b"".join(iter(lambda: connection.recv(65536), b"")).decode().strip()
        finally:
            os.close(folder)

    def tell(self, command: str, *expected: str) -> str:
        """Like `send`; raises `RefusedError` unless the answer is empty or has an expected word."""
        answer = self.send(command)
        if answer and not any(word in answer for word in expected):
            raise RefusedError(f"{command.splitlines()[0]}: {answer}")
        return answer

    def perform(self, command: RuntimeCommand) -> None:
        """Do it. Raises `RefusedError`."""
        match command:
            case SetMap(name, entries):
                self._set_map(f"{MAPS}/{name}.map", entries)
            case AddServer(backend, name, arguments):
                self._add_server(backend, name, arguments)
            case RemoveServer(backend, name):
                self.tell(f"set server {backend}/{name} state maint", "Health checks")

    def _set_map(self, name: str, entries: Entries) -> None:
        version = self.tell(f"prepare map {name}", "New version created: ").rpartition(" ")[2]
        for payload in _payloads(f"{key} {value}" for key, value in entries.items()):
            self.tell(f"add map @{version} {name} <<\n{payload}")
        self.tell(f"commit map @{version} {name}")

    def _add_server(self, backend: str, name: str, arguments: str) -> None:
        server = f"{backend}/{name}"
        answer = self.send(f"add server {server} {arguments}")
        if "Already exists" in answer:
            self._let_in_again(backend, name, arguments)
        elif "New server registered" not in answer:
            raise RefusedError(f"add server {server} {arguments}: {answer}")
        self.tell(f"enable health {server}")
        self.tell(f"set server {server} state ready")

    def _let_in_again(self, backend: str, name: str, arguments: str) -> None:
        known = {(s.backend, s.name): s.address for s in self.servers()}
        if known.get((backend, name)) != arguments.split(maxsplit=1)[0]:
            raise RefusedError(f"server {backend}/{name} still leaves {known}")

    def sweep(self) -> int:
        """Delete the servers that have left; the number of those that still have connections."""
        leaving = [s for s in self.servers() if s.is_leaving]
        answers = [self.send(f"del server {s.backend}/{s.name}") for s in leaving]
        return sum("Server deleted" not in answer for answer in answers)

    def servers(self) -> list[RunningServer]:
        """Every server of every backend."""
        lines = self.send("show servers state").splitlines()[1:]
        names = lines[0].removeprefix("# ").split()
        return [_server(dict(zip(names, line.split(), strict=False))) for line in lines[1:] if line]

    def map(self, name: str) -> dict[str, str]:
        """The entries of the map `name`."""
        lines = self.send(f"show map {MAPS}/{name}.map").splitlines()
        entries = (line.split(" ", 2)[1:] for line in lines if line)
        return {entry[0]: entry[1] if len(entry) > 1 else "" for entry in entries}

    def set_certificate(self, pem: str) -> None:
        """Take `pem` for new TLS connections. Raises `RefusedError`; the old one stays then."""
        text = "\n".join(line for line in pem.splitlines() if line.strip())
        try:
            self.tell(f"set ssl cert {CERTIFICATE} <<\n{text}\n", "Transaction created")
            self.tell(f"commit ssl cert {CERTIFICATE}", "Success!")
        except RefusedError:
            self.send(f"abort ssl cert {CERTIFICATE}")
            raise


def _server(row: dict[str, str]) -> RunningServer:
    return RunningServer(
        backend=row["be_name"],
        name=row["srv_name"],
        address=joined(row["srv_addr"], int(row["srv_port"])),
        is_leaving=bool(int(row["srv_admin_state"]) & _MAINTENANCE),
    )


def _payloads(lines: Iterable[str]) -> Iterator[str]:
    """The lines in blocks that fit HAProxy's buffer, each with the blank line that ends it."""
    block: list[str] = []
    size = 0
    for line in lines:
        if size + len(line) > _PAYLOAD_MAX:
            yield "\n".join([*block, ""])
            block, size = [], 0
        block.append(line)
        size += len(line) + 1
    if block:
        yield "\n".join([*block, ""])
