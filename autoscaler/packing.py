"""How many machines hold these replicas, and in which groups do they go?

A replica takes a share of a machine: the largest fraction of any resource (`Resources.share_of`).
Shares that add up to one fit in every single resource, so packing shares is safe, if not always the
tightest. Best fit, largest first, by classes of equal shares: n log n in the number of models,
however many replicas each has.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ROOM = 1e-9
"""Rounding of shares: what is closer to fitting than this fits."""


def nodes_needed(replicas: Sequence[tuple[float, int]]) -> int:
    """Machines for `replicas`: (share, count) pairs with 0 < share ≤ 1."""
    free: list[float] = []  # distinct free shares, ascending
    bins: dict[float, int] = {}
    nodes = 0
    for share, count in sorted(replicas, reverse=True):
        left = count
        while left and (place := bisect.bisect_left(free, share - ROOM)) < len(free):
            left -= _put(free, bins, free[place], share, left)
        if left:
            each = max(int((1 + ROOM) / share), 1)
            fresh = -(-left // each)
            nodes += fresh
            full, rest = divmod(left, each)
            _open(free, bins, 1 - each * share, full)
            if rest:
                _open(free, bins, 1 - rest * share, 1)
    return nodes


def _put(free: list[float], bins: dict[float, int], room: float, share: float, left: int) -> int:
    """Fill the bins that have `room` with up to `left` replicas; how many went in."""
    each = max(int((room + ROOM) / share), 1)
    had = bins.pop(room)
    free.remove(room)
    filled = min(had, left // each)
    rest = left - filled * each if filled < had else 0
    _open(free, bins, room - each * share, filled)
    _open(free, bins, room - rest * share, 1 if rest else 0)
    _open(free, bins, room, had - filled - (1 if rest else 0))
    return filled * each + rest


def _open(free: list[float], bins: dict[float, int], room: float, count: int) -> None:
    room = round(room, 9)
    if not count or room <= ROOM:
        return
    if room not in bins:
        bisect.insort(free, room)
    bins[room] = bins.get(room, 0) + count


@dataclass(frozen=True, slots=True)
class Packed:
    """A model's replicas to be spread: `share` of a machine each, `safe` of them on nodes that
    nobody reclaims.
    """

    model: str
    share: float
    count: int
    safe: int = 0


def spread(
    models: Sequence[Packed], nodes: Mapping[str, int], safe: frozenset[str] = frozenset()
) -> dict[str, dict[str, int]]:
    """Replicas by model and group, over groups of `nodes` machines each, evenly filled.

    What must be safe goes to the groups in `safe` first. What finds no room goes where there is
    most of it: the caller sized the nodes, and a late node is better than a lost replica.
    """
    used = dict.fromkeys((g for g, n in nodes.items() if n > 0), 0.0)
    placed: dict[str, dict[str, int]] = {packed.model: {} for packed in models}
    if not used:
        return placed
    for packed in sorted(models, key=lambda m: (-m.share, m.model)):
        reliable = [g for g in used if g in safe]
        floor = min(packed.safe, packed.count) if reliable else 0
        _fill(placed[packed.model], packed.share, floor, reliable, used, nodes)
        rest = packed.count - floor
        _fill(placed[packed.model], packed.share, rest, list(used), used, nodes)
    return placed


def _fill(
    placed: dict[str, int],
    share: float,
    count: int,
    groups: Sequence[str],
    used: dict[str, float],
    nodes: Mapping[str, int],
) -> None:
    """Put `count` replicas one by one where they make the least difference: few here first."""
    if not count:
        return
    heap = [(_fullness(used[g], share, nodes[g]), placed.get(g, 0) / nodes[g], g) for g in groups]
    heapq.heapify(heap)
    for _ in range(count):
        _, _, group = heap[0]
        used[group] += share
        placed[group] = placed.get(group, 0) + 1
        fullness = _fullness(used[group], share, nodes[group])
        heapq.heapreplace(heap, (fullness, placed[group] / nodes[group], group))


def _fullness(used: float, share: float, nodes: int) -> float:
    return (used + share) / nodes
