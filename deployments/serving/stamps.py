"""When was an answer made, and how is it told from every other?"""

from __future__ import annotations

import secrets
import time
from typing import NamedTuple


class Stamp(NamedTuple):
    """What an answer of OpenAI's form carries besides its content."""

    id: str
    created_s: int  # UNIX time


def fresh() -> Stamp:
    """A stamp of now, with an id that nobody can guess."""
    return Stamp(secrets.token_hex(12), int(time.time()))
