"""How commands reach a cluster: its admin API over HTTP, from here or from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from cluster import embedded
from cluster.config import client_settings


class Unreachable(Exception):
    """There is no cluster at the address, or none is known; the message says what to do."""


class Refusal(Exception):
    """The cluster answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """A cluster's admin API and its models' endpoints."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url.rstrip("/")
        self.key = key
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=httpx.Timeout(60, connect=5)
        )

    @classmethod
    def of(cls, home: Path) -> Client:
        """The cluster that SHOAL_URL and SHOAL_KEY name, else the one in `home`."""
        url, key = client_settings()
        if url:
            return cls(url, key)
        running = embedded.find(home)
        if running is None or not running.is_alive:
            raise Unreachable(
                f"no cluster runs in {home}: start one with 'shoal up', "
                "or name one with SHOAL_URL and SHOAL_KEY"
            )
        return cls(running.url, key or embedded.admin_key(home))

    def admin(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer of the admin API. Raises `Refusal` and `Unreachable`."""
        return self.send(method, f"/admin/v1/{path}", body)

    def send(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON that the cluster answers. Raises `Refusal` and `Unreachable`."""
        try:
            answer = self._http.request(method, path, json=body if body is not None else None)
        except httpx.TransportError as error:
            raise Unreachable(f"no answer from {self.url}: {error}") from None
        if answer.is_success:
            return answer.json()
        raise Refusal(answer.status_code, _message(answer))


def _message(answer: httpx.Response) -> str:
    """The error's text, whichever protocol's form it has."""
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return f"HTTP {answer.status_code}: {answer.text[:300]}"
    return str(error["message"] if isinstance(error, dict) else error)
