"""How are bodies compressed and inflated, without letting a small one grow without bound?

Requests may come as gzip or deflate. Answers are compressed only for a client that asks for exactly
one coding, as Triton's does when told to: browsers and HTTP libraries list what they can read with
every request, which is no wish, and inside a data centre compression costs more than it saves.
Whatever takes long goes to a thread (zlib lets others run meanwhile).
"""

from __future__ import annotations

import asyncio
import gzip
import zlib

from deployments.inference import Fault, InferenceError

COMPRESS_BYTES_MIN = 1024
"""Answers below this are sent as they are."""

_THREAD_BYTES_MIN = 256 * 1024
_AUTOMATIC = 32 + zlib.MAX_WBITS  # gzip's or zlib's header, whichever is there


async def inflate(body: bytes, coding: bytes, bytes_max: int) -> bytes:
    """The body behind a content coding; raises `InferenceError` when it is not there."""
    name = coding.strip().lower()
    if name in (b"", b"identity"):
        return body
    if name not in (b"gzip", b"x-gzip", b"deflate"):
        shown = coding.decode("latin-1")
        raise InferenceError(
            Fault.UNSUPPORTED_MEDIA, f"content-encoding {shown!r} must be gzip, deflate or identity"
        )
    if len(body) < _THREAD_BYTES_MIN // 8:
        return _inflated(body, name, bytes_max)
    return await asyncio.to_thread(_inflated, body, name, bytes_max)


def coding_wanted(accepted: bytes | None) -> bytes | None:
    """The one coding that a client asks for with its accept-encoding, None when none or several."""
    if accepted is None:
        return None
    name = accepted.strip().lower()
    return name if name in (b"gzip", b"deflate") else None


async def compress(body: bytes, coding: bytes) -> bytes:
    """The body in a content coding, packed fast rather than tightly."""
    pack = _gzip if coding == b"gzip" else _zlib
    if len(body) < _THREAD_BYTES_MIN:
        return pack(body)
    return await asyncio.to_thread(pack, body)


def _gzip(body: bytes) -> bytes:
    return gzip.compress(body, compresslevel=1, mtime=0)


def _zlib(body: bytes) -> bytes:
    return zlib.compress(body, 1)


def _inflated(body: bytes, name: bytes, bytes_max: int) -> bytes:
    try:
        return _members(body, _AUTOMATIC, bytes_max)
    except zlib.error as error:
        if name == b"deflate":  # some senders leave zlib's header out
            try:
                return _members(body, -zlib.MAX_WBITS, bytes_max)
            except zlib.error:
                pass
        raise InferenceError(
            Fault.INVALID, f"the body is not {name.decode()} as its content-encoding says: {error}"
        ) from None


def _members(body: bytes, window_bits: int, bytes_max: int) -> bytes:
    """All members of a gzip body (it may have several), or the one zlib stream."""
    pieces: list[bytes] = []
    room = bytes_max
    while body:
        stream = zlib.decompressobj(window_bits)
        piece = stream.decompress(body, room + 1)
        room -= len(piece)
        if room < 0:
            raise InferenceError(
                Fault.TOO_LARGE, f"the body inflates to more than {bytes_max} bytes"
            )
        if not stream.eof:
            raise zlib.error("it ends too early")
        pieces.append(piece)
        body = stream.unused_data
    return b"".join(pieces)
