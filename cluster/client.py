"""How commands reach a cluster: its admin API over HTTP, from here or from anywhere."""

from __future__ import annotations

import json
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
    """A cluster's admin API and its models' endpoints.

    `is_remote`: it may be behind the proxy that the environment names; one on this machine is not.
    """

    def __init__(self, url: str, key: str | None, *, is_remote: bool = True) -> None:
        self.url = url.rstrip("/")
        self.key = key
        headers: Mapping[bytes, bytes] = {b"authorization": f"Bearer {key}".encode()} if key else {}
        try:
            self._http = httpx.Client(
                base_url=self.url,
                headers=headers,
                timeout=httpx.Timeout(60, connect=5),
                trust_env=is_remote,
            )
        except httpx.InvalidURL as error:
            raise Unreachable(f"{url!r} can't be a cluster's URL: {error}") from None

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
        return cls(running.url, key or embedded.admin_key(home), is_remote=False)

    def admin(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer of the admin API. Raises `Refusal` and `Unreachable`."""
        return self.send(method, f"/admin/v1/{path}", body)

    def send(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON that the cluster answers. Raises `Refusal` and `Unreachable`."""
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"content-type": "application/json"}
        try:
            answer = self._http.request(method, path, content=content, headers=headers)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            what = str(error) or type(error).__name__
            raise Unreachable(f"no answer from {self.url}: {what}") from None
        if not answer.is_success:
            raise Refusal(answer.status_code, _message(answer))
        try:
            return answer.json()
        except ValueError:
            raise Refusal(
                answer.status_code,
                f"{self.url}{path} did not answer in JSON: {answer.text[:300]}",
            ) from None


def _message(answer: httpx.Response) -> str:
    """The error's text, whichever protocol's form it has."""
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return f"HTTP {answer.status_code}: {answer.text[:300]}"
    return str(error.get("message", error) if isinstance(error, dict) else error)
