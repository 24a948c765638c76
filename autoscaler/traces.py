"""What do the files say: who asked when, and where could machines be had at what price?

A request trace is a row a request (`t_s,input_tokens,output_tokens`) or a count an interval
(`t_s,requests`, with tokens a request where they are known). Counts become arrival times along a
continuous intensity: straight lines through the middle of each interval and half-way between
neighbours at its edges, so that every interval keeps its count and nobody sees a step at a minute.

    count     8 |   ___             8 |   .
              4 | _|   |_    ->     4 | _/ \\_
                +---------            +--------

A market is a folder: `capacity.csv` (`t_s,ZONE…`, nodes to be had from that time on) and, where
prices are known, `price_usd_h.csv` with the same columns. Windows are cut and shifted to begin at
0. What is wrong with a file is said with its line, its column, and what would be right.

Nothing is repaired here, and no trace is made up (see `synthetic`).
"""

from __future__ import annotations

import csv
import difflib
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoscaler.world import Floats, Ints, MarketTrace, Requests

Flags = NDArray[np.bool_]

JITTER_S = 2.0
"""How far at most, either way, the second and further copies of a request move (scale > 1)."""

REQUESTS_MAX = 100_000_000
"""More requests than this in one window are refused: they would not fit into memory."""

COUNTED = "requests"
TOKENS = ("input_tokens", "output_tokens")


class TraceError(ValueError):
    """A trace can't be used: which file, line and column, what is there, what would be right."""


@dataclass(frozen=True)
class Table:
    """A CSV file of numbers: `values[row, column]`, and the line of each row in the file."""

    path: Path
    columns: tuple[str, ...]
    values: Floats
    lines: Ints

    def column(self, name: str, default: float = 0.0) -> Floats:
        """The column's values; `default` in every row where the file has no such column."""
        if name not in self.columns:
            return np.full(len(self.values), default)
        values: Floats = self.values[:, self.columns.index(name)]
        return values

    def refuse(self, bad: Flags, column: str, right: str) -> None:
        """Raise for the first row of `bad`, with its value in `column`."""
        if not bad.any():
            return
        row = int(np.argmax(bad))
        value = float(self.values[row, self.columns.index(column)])
        raise TraceError(_at(self.path, int(self.lines[row]), column, f"{value:g} {right}"))


@dataclass(frozen=True)
class Counts:
    """Requests by interval: `requests[i]` within `width_s[i]` from `t_s[i]` on (not necessarily
    whole), with mean tokens a request.
    """

    t_s: Floats
    width_s: Floats
    requests: Floats
    input_tokens: Floats
    output_tokens: Floats


# --- requests


def read_requests(
    path: Path | str,
    *,
    scale: float = 1.0,
    seed: int,
    start_s: float = 0.0,
    duration_s: float | None = None,
    input_tokens: float = 0.0,
    output_tokens: float = 0.0,
) -> Requests:
    """The requests of a trace between `start_s` and `start_s + duration_s`, shifted to begin at 0.

    `scale` multiplies the traffic. Counts: count · scale, rounded up or down by chance so that the
    mean is right. A row a request: below 1 each one stays with that chance; above 1 each one comes
    several times, the further copies moved by up to `JITTER_S` either way. The last interval is as
    long as the median one. A window that reaches beyond the trace ends with it. `input_tokens` and
    `output_tokens`: of each request where the file has no such column. The same seed gives the same
    requests.

    Raises:
        TraceError: the file, or the window of it, can't be used.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise TraceError(f"scale: {scale:g} must be a positive number")
    path = Path(path)
    table = _read_table(path)
    _check_requests(table)
    rng = np.random.default_rng([seed, 0])
    tokens = table.column(TOKENS[0], input_tokens), table.column(TOKENS[1], output_tokens)
    if COUNTED in table.columns:
        counts = _counts(table, *tokens)
        end_s = _end_s(path, float(counts.t_s[-1] + counts.width_s[-1]), start_s, duration_s)
        _check_size(path, counts, scale, start_s, end_s)
        return expand(counts, scale=scale, rng=rng, start_s=start_s, end_s=end_s)
    t_s = table.column("t_s")
    end_s = _end_s(path, math.floor(t_s[-1]) + 1.0, start_s, duration_s)
    return _rescaled(t_s, *tokens, scale, rng, start_s, end_s)


def expand(
    counts: Counts,
    *,
    scale: float = 1.0,
    rng: np.random.Generator,
    start_s: float = 0.0,
    end_s: float | None = None,
) -> Requests:
    """Arrival times for counts, from `start_s` to `end_s` (the end of the counts), shifted to 0."""
    end_s = float(counts.t_s[-1] + counts.width_s[-1]) if end_s is None else end_s
    left, middle, right = _intensity(counts)
    first = int(np.searchsorted(counts.t_s + counts.width_s, start_s, side="right"))
    last = int(np.searchsorted(counts.t_s, end_s, side="left"))
    want = counts.requests[first:last] * scale
    number = np.floor(want + rng.random(len(want))).astype(np.int64)
    bin_of = np.repeat(np.arange(first, last), number)
    arrival_s = counts.t_s[bin_of] + _within(left, middle, right, counts.width_s, bin_of, rng)
    arrival_s.sort()  # bins are apart, so each request stays in the place of its own bin
    keep = (arrival_s >= start_s) & (arrival_s < end_s)
    bin_of = bin_of[keep]
    return Requests(
        _shifted(arrival_s[keep], start_s, end_s),
        counts.input_tokens[bin_of],
        counts.output_tokens[bin_of],
        end_s - start_s,
    )


def _intensity(counts: Counts) -> tuple[Floats, Floats, Floats]:
    """Requests a second at the left edge, the middle and the right edge of each interval."""
    mean = counts.requests / counts.width_s
    padded = np.concatenate([mean[:1], mean, mean[-1:]])
    left, right = (padded[:-2] + mean) / 2, (mean + padded[2:]) / 2
    middle = 2 * mean - (left + right) / 2  # (left + 2 middle + right) / 4 is the mean
    flat = middle < 0
    return np.where(flat, mean, left), np.where(flat, mean, middle), np.where(flat, mean, right)


def _within(
    left: Floats,
    middle: Floats,
    right: Floats,
    width_s: Floats,
    bin_of: Ints,
    rng: np.random.Generator,
) -> Floats:
    """A time within its interval for each request: the inverse of the distribution that the
    intensity's two straight pieces give.
    """
    share = (left + middle) / np.maximum(left + 2 * middle + right, 1e-300)
    half_s = width_s[bin_of] / 2
    u, edge = rng.random(len(bin_of)), share[bin_of]
    is_late = u >= edge
    u = np.where(is_late, (u - edge) / np.maximum(1 - edge, 1e-300), u / np.maximum(edge, 1e-300))
    a = np.where(is_late, middle[bin_of], left[bin_of])
    b = np.where(is_late, right[bin_of], middle[bin_of])
    root = np.sqrt(np.maximum(a * a + u * (b * b - a * a), 0.0))
    x: Floats = half_s * (u * (a + b) / np.maximum(a + root, 1e-300) + is_late)
    return x


def _rescaled(
    t_s: Floats,
    tokens_in: Floats,
    tokens_out: Floats,
    scale: float,
    rng: np.random.Generator,
    start_s: float,
    end_s: float,
) -> Requests:
    """Each request as many times as `scale` says, chance deciding about the fraction."""
    copies = np.floor(scale + rng.random(len(t_s))).astype(np.int64)
    which = np.repeat(np.arange(len(t_s)), copies)
    is_first = np.diff(which, prepend=-1) > 0
    moved = t_s[which] + np.where(is_first, 0.0, rng.uniform(-JITTER_S, JITTER_S, len(which)))
    moved = np.abs(moved)  # nobody comes before 0
    last_s = float(t_s[-1])
    moved = np.where(moved > last_s, np.maximum(2 * last_s - moved, 0.0), moved)
    order = np.argsort(moved, kind="stable")
    arrival_s, which = moved[order], which[order]
    keep = (arrival_s >= start_s) & (arrival_s < end_s)
    which = which[keep]
    shifted = _shifted(arrival_s[keep], start_s, end_s)
    return Requests(shifted, tokens_in[which], tokens_out[which], end_s - start_s)


def _shifted(arrival_s: Floats, start_s: float, end_s: float) -> Floats:
    """Seconds from `start_s`, kept below the duration whatever rounding does."""
    moved: Floats = np.minimum(arrival_s - start_s, np.nextafter(end_s - start_s, 0.0))
    return moved


def _check_size(path: Path, counts: Counts, scale: float, start_s: float, end_s: float) -> None:
    inside = (counts.t_s < end_s) & (counts.t_s + counts.width_s > start_s)
    number = float(counts.requests[inside].sum())
    if number * scale > REQUESTS_MAX:
        what = f"{number * scale:.3g} requests in the window are too many at once"
        right = f"a scale of {REQUESTS_MAX / number:.1g} or less, or a shorter window, would do"
        raise TraceError(f"{path}: {what}; {right}")


def _check_requests(table: Table) -> None:
    known = ("t_s", COUNTED, *TOKENS)
    for name in table.columns:
        if name not in known:
            right = f"unknown column; {_near(name, known)}"
            raise TraceError(_at(table.path, 1, repr(name), right))
    is_counted = COUNTED in table.columns
    _check_times(table, is_strict=is_counted)
    for name in table.columns[1:]:
        table.refuse(table.column(name) < 0, name, "must not be negative")
    if is_counted and len(table.values) < 2:
        raise TraceError(f"{table.path}: one row of counts doesn't say how long an interval is")


def _counts(table: Table, tokens_in: Floats, tokens_out: Floats) -> Counts:
    t_s = table.column("t_s")
    gaps = np.diff(t_s)
    usual = float(np.median(gaps))  # where rows are missing, nobody came
    width_s = np.minimum(np.append(gaps, usual), usual)
    return Counts(t_s, width_s, table.column(COUNTED), tokens_in, tokens_out)


# --- markets


def read_market(
    folder: Path | str,
    *,
    start_s: float = 0.0,
    duration_s: float | None = None,
    nodes_scale: float | None = None,
    zones: Sequence[str] | None = None,
) -> MarketTrace:
    """The market in a folder between `start_s` and `start_s + duration_s`, shifted to begin at 0.

    `nodes_scale` multiplies the capacity (rounded to whole nodes; None: as it stands). `zones`:
    only these, in this order. A window that reaches beyond the trace keeps its last row.

    Raises:
        TraceError: a file, or the window of it, can't be used.
    """
    if nodes_scale is not None and not (math.isfinite(nodes_scale) and nodes_scale > 0):
        raise TraceError(f"nodes scale: {nodes_scale:g} must be a positive number")
    folder = Path(folder)
    if not folder.is_dir():
        raise TraceError(f"{folder}: not a folder; a market is a folder with capacity.csv in it")
    table = _read_table(folder / "capacity.csv")
    _check_market(table)
    for name in table.columns[1:]:
        column = table.column(name)
        table.refuse(column != np.floor(column), name, "must be a whole number of nodes")
    chosen = _zones(table, zones)
    _end_s(table.path, math.inf, start_s, duration_s)
    if start_s > table.column("t_s")[-1]:
        raise _beyond(table.path, start_s, float(table.column("t_s")[-1]))
    t_s, capacity = _window(table, chosen, start_s, duration_s)
    nodes = np.floor(capacity * (nodes_scale or 1.0) + 0.5).astype(np.int64)
    if not (folder / "price_usd_h.csv").exists():
        return MarketTrace(chosen, t_s, nodes)
    prices = _read_table(folder / "price_usd_h.csv")
    _check_prices(prices, table)
    return MarketTrace(chosen, t_s, nodes, *_window(prices, chosen, start_s, duration_s))


def _zones(table: Table, asked: Sequence[str] | None) -> tuple[str, ...]:
    known = table.columns[1:]
    for zone in asked or ():
        if zone not in known:
            raise TraceError(f"{table.path}: no zone {zone!r}; {_near(zone, known)}")
    return tuple(dict.fromkeys(asked)) if asked else known


def _check_market(table: Table) -> None:
    if len(table.columns) < 2:
        raise TraceError(_at(table.path, 1, None, "no zone; the header is t_s,ZONE,ZONE…"))
    _check_times(table, is_strict=True)
    for name in table.columns[1:]:
        table.refuse(table.column(name) < 0, name, "must not be negative")


def _check_prices(prices: Table, capacity: Table) -> None:
    _check_market(prices)
    for zone in prices.columns[1:]:
        if zone not in capacity.columns:
            right = f"zone is not in {capacity.path.name}; {_near(zone, capacity.columns[1:])}"
            raise TraceError(_at(prices.path, 1, repr(zone), right))
    for zone in capacity.columns[1:]:
        if zone not in prices.columns:
            right = f"no prices of zone {zone!r}, which {capacity.path.name} has"
            raise TraceError(_at(prices.path, 1, None, right))


def _window(
    table: Table, zones: Iterable[str], start_s: float, duration_s: float | None
) -> tuple[Floats, Floats]:
    """Times and values of the rows that hold at some time of the window, shifted to begin at 0."""
    t_s = table.column("t_s")
    first = max(int(np.searchsorted(t_s, start_s, side="right")) - 1, 0)
    last = len(t_s) if duration_s is None else int(np.searchsorted(t_s, start_s + duration_s))
    rows = slice(first, max(last, first + 1))
    values = np.column_stack([table.column(zone)[rows] for zone in zones])
    return np.maximum(t_s[rows] - start_s, 0.0), values


# --- files


def _end_s(path: Path, trace_end_s: float, start_s: float, duration_s: float | None) -> float:
    """Where the window ends."""
    if not (math.isfinite(start_s) and start_s >= 0):
        raise TraceError(f"start: {start_s:g} must be a number of seconds, 0 or more")
    if duration_s is not None and not duration_s > 0:
        raise TraceError(f"duration: {duration_s:g} must be a positive number of seconds")
    if start_s >= trace_end_s:
        raise _beyond(path, start_s, trace_end_s)
    return float(min(trace_end_s, start_s + (math.inf if duration_s is None else duration_s)))


def _beyond(path: Path, start_s: float, end_s: float) -> TraceError:
    return TraceError(
        f"{path}: the window begins at {start_s:g} s, but the trace ends at {end_s:g} s"
    )


def _read_table(path: Path) -> Table:
    """A CSV file whose first column is `t_s` and whose cells are all finite numbers."""
    lines = _lines(path)
    filled = [number for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise TraceError(f"{path}: empty; the first line is a header that begins with t_s")
    if filled[0] != 1:
        raise TraceError(_at(path, 1, None, "empty line; the header belongs here"))
    columns = _header(path, lines[0])
    if len(filled) == 1:
        raise TraceError(f"{path}: no rows below the header")
    body = [lines[number - 1] for number in filled[1:]]
    numbers = np.array(filled[1:], dtype=np.int64)
    try:
        values = np.loadtxt(body, delimiter=",", comments=None, ndmin=2, quotechar='"')
    except ValueError:
        raise _first_fault(path, columns, body, numbers) from None
    if values.shape[1] != len(columns):
        raise _first_fault(path, columns, body, numbers)
    if not np.isfinite(values).all():
        row, column = (int(index[0]) for index in np.nonzero(~np.isfinite(values)))
        right = f"{values[row, column]} must be a finite number"
        raise TraceError(_at(path, int(numbers[row]), columns[column], right))
    return Table(path, columns, values, numbers)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        beside = sorted(found.name for found in path.parent.glob("*.csv"))
        hint = f"; beside it are {', '.join(beside[:8])}" if beside else ""
        raise TraceError(f"{path}: no such file{hint}") from None
    except IsADirectoryError:
        raise TraceError(f"{path}: a folder; a file of comma-separated values is needed") from None
    except (OSError, UnicodeDecodeError) as error:
        what = f"can't be read as comma-separated text ({error})"
        raise TraceError(f"{path}: {what}") from None


def _header(path: Path, line: str) -> tuple[str, ...]:
    columns = tuple(name.strip() for name in next(csv.reader(io.StringIO(line))))
    if columns[0] != "t_s":
        what = f"the first column is t_s, not {columns[0]!r}"
        raise TraceError(_at(path, 1, None, f"{what} (header: {line.strip()[:80]})"))
    for name in columns:
        if columns.count(name) > 1 or not name:
            what = "column stands twice" if name else "column without a name"
            raise TraceError(_at(path, 1, repr(name), what))
    return columns


def _first_fault(
    path: Path, columns: Sequence[str], body: Sequence[str], numbers: Ints
) -> TraceError:
    """What is wrong with the first row that isn't one number a column."""
    for number, line in zip(numbers.tolist(), body, strict=True):
        cells = next(csv.reader(io.StringIO(line)))
        if len(cells) != len(columns):
            right = f"{len(cells)} cells, but the header has {len(columns)} columns"
            return TraceError(_at(path, number, None, right))
        for name, cell in zip(columns, cells, strict=True):
            if not _is_number(cell):
                what = f"{cell!r} must be a number" if cell.strip() else "empty; needs a number"
                return TraceError(_at(path, number, name, what))
    return TraceError(f"{path}: can't be read as comma-separated numbers")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def _check_times(table: Table, *, is_strict: bool) -> None:
    t_s = table.column("t_s")
    table.refuse(t_s < 0, "t_s", "must not be negative")
    steps = np.diff(t_s, prepend=-1.0)
    bad, right = (steps <= 0, "must be later than") if is_strict else (steps < 0, "is before")
    if bad.any():
        before = float(t_s[int(np.argmax(bad)) - 1])
        rule = "rows are sorted by time, each once" if is_strict else "rows are sorted by time"
        table.refuse(bad, "t_s", f"{right} the row above ({before:g}): {rule}")


def _at(path: Path, line: int, column: str | None, what: str) -> str:
    where = f"{path}, line {line}" + (f", column {column}" if column else "")
    return f"{where}: {what}"


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
