"""How do a model's pieces of text become OpenAI's choices?

    generate ─► chunks ─► StopScan: cut at a stop sequence ─► Piece(choice, text, finish_reason)
    several choices at once: as the pieces come, from whichever is first

Models may honour stop sequences themselves; this module holds for those that don't. Whoever stops
reading closes what is behind, so that a model does not go on for a caller who has gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import NamedTuple

from deployments.inference import Engine, GenerationChunk, GenerationRequest
from deployments.serving.protocols.openai_messages import Generation

_PIECES_AHEAD = 32  # how far several texts may run ahead of a slow reader


class Piece(NamedTuple):
    """A part of one choice. The last one has a `finish_reason` and the counts."""

    choice: int
    text: str
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class StopScan:
    """Finds stop sequences in a text that arrives in pieces.

    What might be the beginning of one is held back until more has come.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.has_stopped = False

    def feed(self, text: str) -> str:
        """What of the text so far may be shown."""
        if not self._stop:
            return text
        text = self._held + text
        end = min((p for s in self._stop if (p := text.find(s)) >= 0), default=-1)
        if end >= 0:
            self.has_stopped, self._held = True, ""
            return text[:end]
        kept = max(_overlap(text, s) for s in self._stop)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """What was held back and began no stop sequence after all."""
        held, self._held = self._held, ""
        return held


async def pieces(engine: Engine, wanted: Generation) -> AsyncGenerator[Piece, None]:
    """The pieces of all choices. Raises `InferenceError`."""
    if len(wanted.requests) == 1:
        async with aclosing(_one(engine, 0, wanted.requests[0], wanted.stop)) as one:
            async for piece in one:
                yield piece
        return
    async with aclosing(_several(engine, wanted)) as several:
        async for piece in several:
            yield piece


async def _one(
    engine: Engine, index: int, request: GenerationRequest, stop: Sequence[str]
) -> AsyncGenerator[Piece, None]:
    scan = StopScan(stop)
    last: GenerationChunk | None = None
    count = 0
    chunks = engine.generate(request)
    try:
        async for chunk in chunks:
            last = chunk
            count += bool(chunk.text)
            text = scan.feed(chunk.text)
            if scan.has_stopped or chunk.finish_reason is not None:
                break
            if text:
                yield Piece(index, text)
        else:
            text = ""
    finally:
        await _close(chunks)
    text = text if scan.has_stopped else text + scan.rest()
    yield _end(index, text, request, last, count, has_stopped=scan.has_stopped)


def _end(
    index: int,
    text: str,
    request: GenerationRequest,
    last: GenerationChunk | None,
    count: int,
    *,
    has_stopped: bool,
) -> Piece:
    """The last piece. A model that was cut short has not said what it counted: then a chunk counts
    as a token, and the prompt's words as its tokens."""
    reason = "stop" if has_stopped or last is None else last.finish_reason or "stop"
    if last is not None and last.finish_reason is not None:
        return Piece(index, text, reason, last.prompt_tokens, last.completion_tokens)
    return Piece(index, text, reason, words(request), count)


def words(request: GenerationRequest) -> int:
    """An estimate of a prompt's tokens, for want of the model's own count."""
    if request.prompt is not None:
        return len(request.prompt.split())
    return sum(len(str(m["content"]).split()) for m in request.messages or ())


async def _several(engine: Engine, wanted: Generation) -> AsyncGenerator[Piece, None]:
    """All choices at once; the first that fails ends them all."""
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(_PIECES_AHEAD)

    async def follow(index: int, request: GenerationRequest) -> None:
        try:
            async with aclosing(_one(engine, index, request, wanted.stop)) as one:
                async for piece in one:
                    await queue.put(piece)
        except Exception as error:  # noqa: BLE001  # raised again by the reader
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(follow(n, r)) for n, r in enumerate(wanted.requests)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _overlap(text: str, stop: str) -> int:
    """How many of the last letters of `text` begin `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


async def _close(chunks: AsyncIterator[GenerationChunk]) -> None:
    close = getattr(chunks, "aclose", None)
    if close is not None:
        await close()
