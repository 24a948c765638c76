"""Do the examples answer, and rightly?

Each file in `requests/` holds a request and a part of its reply: `path`, `body`, and `expect`, of
which objects may have more keys in the reply, lists more items, and texts may be longer.

    python examples/send.py http://127.0.0.1:8000 --key KEY [NAME …]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

REQUESTS = Path(__file__).parent / "requests"


def holds(reply: Any, expected: Any) -> bool:
    """Whether `reply` has everything that `expected` has."""
    if isinstance(expected, dict):
        return isinstance(reply, dict) and all(
            key in reply and holds(reply[key], value) for key, value in expected.items()
        )
    if isinstance(expected, list):
        return (
            isinstance(reply, list)
            and len(reply) >= len(expected)
            and all(holds(r, e) for r, e in zip(reply, expected, strict=False))
        )
    if isinstance(expected, str):
        return isinstance(reply, str) and expected in reply
    return bool(reply == expected)


def send(url: str, key: str | None, request: dict[str, Any], timeout_s: float) -> Any:
    """The reply to one request, or what was wrong as text."""
    headers = {"content-type": "application/json"}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    call = urllib.request.Request(
        url.rstrip("/") + request["path"], json.dumps(request["body"]).encode(), headers
    )
    with urllib.request.urlopen(call, timeout=timeout_s) as reply:
        return json.loads(reply.read())


def try_one(url: str, key: str | None, name: str, timeout_s: float) -> bool:
    """Send one example's request and print how it went."""
    request = json.loads((REQUESTS / f"{name}.json").read_text())
    started_s = time.monotonic()
    try:
        reply = send(url, key, request, timeout_s)
    except urllib.error.HTTPError as error:
        print(f"{name:<20} {error.code} {error.read(500).decode(errors='replace')}")
        return False
    except OSError as error:
        print(f"{name:<20} {error}")
        return False
    took_ms = (time.monotonic() - started_s) * 1000
    if holds(reply, request["expect"]):
        print(f"{name:<20} right, {took_ms:.1f} ms")
        return True
    print(f"{name:<20} wrong: {json.dumps(reply)[:300]}; expected {json.dumps(request['expect'])}")
    return False


def main() -> None:
    known = sorted(p.stem for p in REQUESTS.glob("*.json"))
    parser = argparse.ArgumentParser(description="Send the examples' requests.")
    parser.add_argument("url")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument("--key", help="an API key")
    parser.add_argument("--timeout-s", type=float, default=120)
    arguments = parser.parse_intermixed_args()
    if unknown := [n for n in arguments.names if n not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
    names = arguments.names or known
    answers = [try_one(arguments.url, arguments.key, n, arguments.timeout_s) for n in names]
    sys.exit(0 if all(answers) else 1)


if __name__ == "__main__":
    main()
