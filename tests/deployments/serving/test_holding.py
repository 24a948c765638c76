"""Does a request that waits for its model keep its place no longer than it must?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.edge.routing import ModelRoute, Server, VersionRoute
from deployments.inference import Fault, InferenceError, ModelStatus, VersionState, VersionStatus
from deployments.serving.holding import RETRY_AFTER_S, View, WaitingRoom

ONE = Server("r-1", "127.0.0.1", 9001)
TWO = Server("r-2", "127.0.0.1", 9002)


def a_view(
    *servers: Server,
    number: int = 1,
    state: VersionState = VersionState.IDLE,
    reason: str = "",
    **route: Any,
) -> View:
    """Model fraud with version 1, which has these servers; other models never have any."""
    versions = (VersionRoute("1", "fraud--1", servers, **route),)
    status = VersionStatus("1", state, None, reason)
    return View(
        number,
        (ModelStatus("fraud", (status,)),),
        (
            ModelRoute("fraud", versions, {"1": 100}),
            ModelRoute("other", (VersionRoute("1", "other--1"),), {"1": 100}),
        ),
    )


class Room:
    """A waiting room and what it told the controller."""

    def __init__(self, places_max: int = 4, view: View | None = None, **options: Any) -> None:
        self.woken: list[str] = []
        self.room = WaitingRoom(places_max, self._wake, **options)
        self.room.update(view or a_view())

    async def _wake(self, backend: str) -> None:
        self.woken.append(backend)

    async def held(self, backend: str = "fraud--1", within_s: float = 5.0) -> Server:
        """One held request: a place, then a server."""
        with self.room.place(backend):
            return await self.room.server(backend, time.monotonic() + within_s)

    def hold(self, **options: Any) -> asyncio.Task[Server]:
        return asyncio.create_task(self.held(**options))


async def until(claim: Callable[[], bool]) -> None:
    """Let others run until `claim()` holds."""
    async with asyncio.timeout(5):
        while not claim():
            await asyncio.sleep(0)


async def fault_of(waiting: Any) -> InferenceError:
    with pytest.raises(InferenceError) as refused:
        await waiting
    return refused.value


# places


async def test_a_request_is_held_until_a_replica_is_there() -> None:
    room = Room()
    request = room.hold()
    await until(lambda: room.room.held == {"fraud": 1} and room.woken == ["fraud--1"])
    room.room.update(a_view(ONE, number=2))
    assert await request is ONE
    assert room.room.held == {}


async def test_a_full_room_turns_the_next_one_away_and_says_when_to_come_back() -> None:
    room = Room(places_max=2)
    requests = [room.hold(), room.hold(backend="other--1")]
    await until(lambda: len(room.woken) == 2)
    error = await fault_of(room.held())
    assert (error.fault, error.retry_after_s) == (Fault.OVERLOADED, RETRY_AFTER_S)
    assert "2 requests already wait" in error.message
    assert room.room.held == {"fraud": 1, "other": 1}
    for request in requests:
        request.cancel()


async def test_a_place_is_free_again_once_its_request_is_answered() -> None:
    room = Room(places_max=1, view=a_view(ONE))
    assert [await room.held() for _ in range(3)] == [ONE] * 3


async def test_a_place_is_free_again_once_its_caller_has_gone() -> None:
    room = Room(places_max=1)
    request = room.hold()
    await until(lambda: bool(room.room.held))
    request.cancel()
    with suppress(asyncio.CancelledError):
        await request
    assert room.room.held == {}


async def test_a_place_is_free_again_once_its_request_has_failed() -> None:
    room = Room(places_max=1)
    assert (await fault_of(room.held(within_s=0.01))).fault is Fault.DEADLINE
    assert room.room.held == {}


async def test_a_model_that_is_removed_while_a_request_waits_still_gives_its_place_back() -> None:
    room = Room()
    request = room.hold()
    await until(lambda: bool(room.room.held))
    room.room.update(View(2))
    error = await fault_of(request)
    assert (error.fault, error.message) == (Fault.UNAVAILABLE, "the model was removed")
    assert room.room.held == {}


# waiting


async def test_a_version_that_can_not_be_loaded_says_why_at_once() -> None:
    failed = a_view(state=VersionState.FAILED, reason="no file weights.onnx")
    room = Room(view=failed)
    error = await fault_of(room.held())
    assert error.fault is Fault.UNAVAILABLE
    assert error.message == (
        "version '1' of model 'fraud' could not be loaded: no file weights.onnx"
    )
    assert room.woken == []


async def test_a_version_that_fails_while_a_request_waits_ends_the_waiting() -> None:
    room = Room()
    request = room.hold()
    await until(lambda: bool(room.woken))
    room.room.update(a_view(number=2, state=VersionState.FAILED, reason="no room"))
    assert "could not be loaded: no room" in (await fault_of(request)).message


async def test_a_deadline_ends_the_waiting() -> None:
    start_s = time.monotonic()
    error = await fault_of(Room().held(within_s=0.03))
    assert error.fault is Fault.DEADLINE
    assert time.monotonic() - start_s >= 0.03


async def test_a_request_whose_deadline_has_passed_gets_no_replica() -> None:
    room = Room(view=a_view(ONE))
    assert (await fault_of(room.held(within_s=-1))).fault is Fault.DEADLINE


async def test_the_controller_is_asked_again_while_nothing_happens() -> None:
    room = Room(ask_again_s=0.01)
    request = room.hold()
    await until(lambda: len(room.woken) >= 3)
    assert set(room.woken) == {"fraud--1"}
    request.cancel()


async def test_news_of_something_else_leave_a_request_waiting() -> None:
    room = Room()
    request = room.hold()
    await until(lambda: len(room.woken) == 1)
    room.room.update(a_view(number=2))
    await until(lambda: len(room.woken) == 2)
    assert not request.done()
    request.cancel()


async def test_a_replica_that_refused_is_not_asked_while_there_is_another() -> None:
    room = Room(view=a_view(ONE, TWO)).room
    deadline_s = time.monotonic() + 5
    for _ in range(20):
        assert await room.server("fraud--1", deadline_s, ["r-1"]) is TWO


async def test_a_replica_that_refused_is_asked_again_after_news() -> None:
    room = Room(view=a_view(ONE))
    request = asyncio.create_task(room.room.server("fraud--1", time.monotonic() + 5, ["r-1"]))
    await until(lambda: bool(room.woken))
    assert not request.done()
    room.room.update(a_view(ONE, number=2))
    assert await request is ONE


# what a request means

VIEW = View(
    1,
    routes=(
        ModelRoute(
            "fraud",
            (
                VersionRoute("3", "b3", labels=("stable",), timeout_ms=1500, idempotent=False),
                VersionRoute("4", "b4", labels=("3x", "next")),
                VersionRoute("next", "bn"),
            ),
            {"3": 20, "4": 80, "next": 0},
        ),
        ModelRoute("empty", (), {}),
    ),
)


@pytest.mark.parametrize(
    ("model", "version", "backend"),
    [
        ("fraud", None, "b4"),
        ("fraud", "3", "b3"),
        ("fraud", "4", "b4"),
        ("fraud", "stable", "b3"),
        ("fraud", "3x", "b4"),
        ("fraud", "next", "bn"),  # a version's own name is worth more than a label
        ("fraud", "5", None),
        ("fraud", "", None),
        ("other", None, None),
        ("empty", None, None),
    ],
)
def test_a_request_means_a_version_by_name_by_label_or_by_traffic(
    model: str, version: str | None, backend: str | None
) -> None:
    assert Room(view=VIEW).room.backend_of(model, version) == backend


def test_a_backend_tells_its_model_and_its_limits() -> None:
    room = Room(view=VIEW).room
    assert (room.knows("b3"), room.knows("fraud")) == (True, False)
    assert (room.model_of("b3"), room.model_of("gone")) == ("fraud", "gone")
    assert (room.timeout_s("b3"), room.timeout_s("b4"), room.timeout_s("gone")) == (1.5, 60, 60)
    assert (room.is_idempotent("b3"), room.is_idempotent("b4")) == (False, True)


# the bound, whatever happens

EVENTS = st.sampled_from(["come", "come", "other", "leave", "ready", "gone", "fail", "remove"])


@settings(max_examples=60)
@given(st.integers(1, 3), st.lists(EVENTS, max_size=25))
def test_never_more_wait_than_there_are_places_and_in_the_end_nobody_does(
    places_max: int, events: list[str]
) -> None:
    asyncio.run(_story(places_max, events))


async def _story(places_max: int, events: list[str]) -> None:
    room = Room(places_max)
    requests: list[asyncio.Task[Server]] = []
    most = 0
    for number, event in enumerate(events, 2):
        match event:
            case "come":
                requests.append(room.hold())
            case "other":
                requests.append(room.hold(backend="other--1"))
            case "leave" if requests:
                requests[0].cancel()
            case "ready":
                room.room.update(a_view(ONE, number=number))
            case "gone":
                room.room.update(a_view(number=number))
            case "fail":
                room.room.update(replace(a_view(state=VersionState.FAILED), number=number))
            case "remove":
                room.room.update(View(number))
        for _ in range(4):
            await asyncio.sleep(0)
            most = max(most, sum(room.room.held.values()))
        assert all(count > 0 for count in room.room.held.values())
    assert most <= places_max
    for request in requests:
        request.cancel()
    await asyncio.gather(*requests, return_exceptions=True)
    assert room.room.held == {}
    for request in requests:
        if not request.cancelled() and (error := request.exception()) is not None:
            assert isinstance(error, InferenceError)
            assert error.fault in (Fault.OVERLOADED, Fault.UNAVAILABLE)
