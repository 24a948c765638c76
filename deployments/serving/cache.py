"""Has this very question been answered already?

A key is the digest of everything that the answer depends on: names, types, shapes and bytes of the
inputs, which outputs are asked for, and the parameters. Each part is written with its length, so
that no two questions run together into the same bytes:

    ["ab", "c"]  ─►  2 ab 1 c        ["a", "bc"]  ─►  1 a 2 bc

Answers are kept until `ttl_s` has passed or `entries_max` others were used since. Time arrives as
an argument. How large answers may be, nobody asks here: the model file bounds their number.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deployments.inference import InferenceRequest, InferenceResponse

INDIFFERENT_PARAMETERS = frozenset({"binary_data_output", "priority", "timeout"})
"""Parameters that say how an answer travels or when it is wanted, not what it is."""

_LENGTH = struct.Struct("<Q")


class ResponseCache:
    """The last answers by the digest of their question; the least recently used one goes first."""

    def __init__(self, entries_max: int, ttl_s: float) -> None:
        self._entries_max = entries_max
        self._ttl_s = ttl_s
        self._entries: OrderedDict[bytes, tuple[float, InferenceResponse]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def key(self, request: InferenceRequest) -> bytes:
        """The digest of the question; `id` and deadline are no part of it."""
        digest = hashlib.blake2b(digest_size=16)
        for part in _question(request):
            digest.update(_LENGTH.pack(len(part)))
            digest.update(part)
        return digest.digest()

    def get(self, key: bytes, now_s: float) -> InferenceResponse | None:
        """The answer kept for `key`, if it is young enough."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        until_s, response = entry
        if now_s >= until_s:
            del self._entries[key]
            return None
        self._entries.move_to_end(key)
        return response

    def put(self, key: bytes, response: InferenceResponse, now_s: float) -> None:
        """Keep an answer; rows that are part of a larger batch are copied out of it."""
        outputs = {n: a if a.base is None else a.copy() for n, a in response.outputs.items()}
        kept = InferenceResponse(outputs, parameters=response.parameters)
        self._entries[key] = (now_s + self._ttl_s, kept)
        self._entries.move_to_end(key)
        if len(self._entries) > self._entries_max:
            self._entries.popitem(last=False)


def _question(request: InferenceRequest) -> Iterator[bytes | memoryview]:
    """The parts of a question; how many come is always clear from those before."""
    yield _LENGTH.pack(len(request.inputs))
    for name in sorted(request.inputs):
        array = request.inputs[name]
        yield name.encode()
        yield f"{array.dtype.str} {array.dtype} {array.shape}".encode()
        yield from _content(array)
    if request.outputs is None:
        yield b"all outputs"
    else:
        yield b"%d outputs" % len(request.outputs)
        yield from (name.encode() for name in request.outputs)
    for name, value in sorted(request.parameters.items()):
        if name not in INDIFFERENT_PARAMETERS:
            yield name.encode()
            yield f"{type(value).__name__} {value!r}".encode()


def _content(array: NDArray[Any]) -> Iterable[bytes | memoryview]:
    if array.dtype.hasobject:
        return (_element(e) for e in array.reshape(-1).tolist())
    return (np.ascontiguousarray(array).reshape(-1).view(np.uint8).data,)


def _element(element: Any) -> bytes:
    if type(element) is bytes:
        return b"b" + element
    if type(element) is str:
        return b"s" + element.encode("utf-8", "surrogatepass")
    raise TypeError(f"a BYTES tensor holds bytes, not {type(element).__name__}")
