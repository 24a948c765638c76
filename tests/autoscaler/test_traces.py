"""Do traces say what their files say, and does a wrong file say what is wrong with it?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.synthetic import generate_market, generate_requests, market_lines, requests_lines
from autoscaler.traces import JITTER_S, Counts, TraceError, expand, read_market, read_requests
from autoscaler.world import Requests
from tests.source import ROOT

SHARED = ROOT.parent / "shared" / "traces"


def a_file(folder: Path, text: str, name: str = "requests.csv") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def a_market_folder(folder: Path, capacity: str, prices: str | None = None) -> Path:
    a_file(folder, capacity, "capacity.csv")
    if prices is not None:
        a_file(folder, prices, "price_usd_h.csv")
    return folder


def counts(*numbers: float, width_s: float = 60.0) -> Counts:
    requests = np.array(numbers, dtype=np.float64)
    t_s = np.arange(len(requests)) * width_s
    none = np.zeros(len(requests))
    return Counts(t_s.astype(np.float64), np.full(len(requests), width_s), requests, none, none)


def expanded(told: Counts, seed: int = 0, scale: float = 1.0) -> Requests:
    return expand(told, scale=scale, rng=np.random.default_rng(seed))


# --- requests, one a row


SOME = "t_s,input_tokens,output_tokens\n0.0,374,44\n4.5,396,109\n4.5,1,2\n9.25,10,20\n"


def test_a_row_is_a_request_with_its_tokens(tmp_path: Path) -> None:
    read = read_requests(a_file(tmp_path, SOME), seed=1)
    assert read.arrival_s.tolist() == [0.0, 4.5, 4.5, 9.25]
    assert read.input_tokens.tolist() == [374, 396, 1, 10]
    assert read.output_tokens.tolist() == [44, 109, 2, 20]
    assert read.duration_s == 10.0  # to the whole second after the last request


def test_a_window_is_cut_and_begins_at_0(tmp_path: Path) -> None:
    read = read_requests(a_file(tmp_path, SOME), seed=1, start_s=4.0, duration_s=2.0)
    assert read.arrival_s.tolist() == [0.5, 0.5]
    assert read.input_tokens.tolist() == [396, 1]
    assert read.duration_s == 2.0


def test_the_window_ends_with_the_trace(tmp_path: Path) -> None:
    assert read_requests(a_file(tmp_path, SOME), seed=1, start_s=4, duration_s=99).duration_s == 6


def test_tokens_are_those_asked_for_where_the_file_has_none(tmp_path: Path) -> None:
    path = a_file(tmp_path, "t_s\n0\n1\n")
    read = read_requests(path, seed=1, input_tokens=7, output_tokens=8)
    assert (read.input_tokens.tolist(), read.output_tokens.tolist()) == ([7, 7], [8, 8])


def test_scaling_up_repeats_each_request_nearby_with_its_tokens(tmp_path: Path) -> None:
    rows = "".join(f"{t},{t},1\n" for t in range(10, 90, 10))
    read = read_requests(
        a_file(tmp_path, f"t_s,input_tokens,output_tokens\n{rows}"), scale=3, seed=1
    )
    assert len(read.arrival_s) == 24
    assert np.all(np.diff(read.arrival_s) >= 0)
    assert np.all(np.abs(read.arrival_s - read.input_tokens) <= JITTER_S)
    assert np.unique(read.arrival_s).size == 24  # copies don't come at the same instant
    assert set(range(10, 90, 10)) <= set(read.arrival_s.tolist())  # and the first one stays


@pytest.mark.parametrize("scale", [0.25, 1.0, 1.6, 2.0])
def test_scaling_keeps_the_mean_traffic(tmp_path: Path, scale: float) -> None:
    rows = "\n".join(map(str, np.arange(0, 4000, 0.5).tolist()))
    read = read_requests(a_file(tmp_path, f"t_s\n{rows}\n"), scale=scale, seed=3)
    assert len(read.arrival_s) == pytest.approx(8000 * scale, rel=0.05)
    assert 0 <= read.arrival_s.min() <= read.arrival_s.max() < read.duration_s


@pytest.mark.parametrize("text", [SOME, "t_s,requests\n0,400\n60,300\n120,500\n"])
def test_the_same_seed_gives_the_same_requests_and_another_gives_others(
    tmp_path: Path, text: str
) -> None:
    path = a_file(tmp_path, text)
    first, again, other = (read_requests(path, scale=1.5, seed=seed) for seed in (1, 1, 2))
    assert first.arrival_s.tobytes() == again.arrival_s.tobytes()
    assert first.arrival_s.tobytes() != other.arrival_s.tobytes()


# --- requests, counted


@given(
    st.lists(st.integers(0, 300), min_size=2, max_size=12),
    st.integers(0, 2**32 - 1),
)
def test_every_interval_keeps_its_count(numbers: list[int], seed: int) -> None:
    read = expanded(counts(*numbers), seed)
    edges = np.arange(len(numbers) + 1) * 60.0
    assert np.histogram(read.arrival_s, edges)[0].tolist() == numbers
    assert np.all(np.diff(read.arrival_s) >= 0)


@given(st.floats(0.01, 3.0), st.integers(0, 1000))
def test_a_scaled_count_is_rounded_to_a_neighbour(scale: float, seed: int) -> None:
    number = len(expanded(counts(7, 0), seed, scale).arrival_s)
    assert abs(number - 7 * scale) < 1


def test_rounding_by_chance_keeps_the_mean() -> None:
    read = expanded(counts(*[1.0] * 20_000), scale=0.3)
    assert len(read.arrival_s) == pytest.approx(6000, rel=0.05)


def test_traffic_rises_within_an_interval_as_it_does_across_its_neighbours() -> None:
    read = expanded(counts(10_000, 20_000, 30_000))
    thirds = np.histogram(read.arrival_s, np.linspace(60, 120, 4))[0]
    assert thirds == pytest.approx([5556, 6667, 7778], rel=0.05)  # from 15 to 25 thousand


def test_there_is_no_step_at_the_edge_of_an_interval() -> None:
    read = expanded(counts(100_000, 200_000, 300_000, 200_000))
    before, after = np.histogram(read.arrival_s, [58, 60, 62])[0]
    assert before == pytest.approx(after, rel=0.05)


def test_an_interval_between_much_larger_ones_is_flat_rather_than_negative() -> None:
    read = expanded(counts(100_000, 9_000, 100_000))
    thirds = np.histogram(read.arrival_s, np.linspace(60, 120, 4))[0]
    assert thirds == pytest.approx([3000, 3000, 3000], rel=0.1)


def test_nobody_comes_where_rows_are_missing(tmp_path: Path) -> None:
    path = a_file(tmp_path, "t_s,requests\n0,60\n60,60\n120,60\n600,60\n660,60\n")
    read = read_requests(path, seed=0)
    assert len(read.arrival_s) == 300
    assert not ((read.arrival_s > 180) & (read.arrival_s < 600)).any()
    assert read.duration_s == 720


def test_counted_requests_have_the_tokens_of_their_interval(tmp_path: Path) -> None:
    text = "t_s,requests,input_tokens,output_tokens\n0,3,10,1\n60,2,20,2\n"
    read = read_requests(a_file(tmp_path, text), seed=0)
    assert read.input_tokens.tolist() == [10, 10, 10, 20, 20]
    assert read.output_tokens.tolist() == [1, 1, 1, 2, 2]


def test_a_window_of_counts_may_begin_and_end_inside_an_interval(tmp_path: Path) -> None:
    path = a_file(tmp_path, "t_s,requests\n0,6000\n60,6000\n120,6000\n")
    read = read_requests(path, seed=0, start_s=30, duration_s=60)
    assert len(read.arrival_s) == pytest.approx(6000, rel=0.1)
    assert 0 <= read.arrival_s.min() < 1
    assert 59 < read.arrival_s.max() < read.duration_s == 60


# --- markets


CAPACITY = "t_s,us-east-1a,us-west-2b\n0,1,0\n100,0,1\n200,1,1\n300,1,0\n"
PRICES = "t_s,us-west-2b,us-east-1a\n0,0.5,1.5\n150,0.6,1.6\n"


def test_a_market_is_what_its_folder_says(tmp_path: Path) -> None:
    market = read_market(a_market_folder(tmp_path, CAPACITY, PRICES))
    assert market.zones == ("us-east-1a", "us-west-2b")
    assert market.capacity_t_s.tolist() == [0, 100, 200, 300]
    assert market.capacity.tolist() == [[1, 0], [0, 1], [1, 1], [1, 0]]
    assert market.price_t_s is not None
    assert market.price_usd_h is not None
    assert market.price_usd_h.tolist() == [[1.5, 0.5], [1.6, 0.6]]  # by zone, not by column


def test_a_market_without_prices_has_none(tmp_path: Path) -> None:
    market = read_market(a_market_folder(tmp_path, CAPACITY))
    assert market.price_t_s is None
    assert market.price_usd_h is None


def test_a_market_window_keeps_the_row_that_holds_when_it_begins(tmp_path: Path) -> None:
    market = read_market(a_market_folder(tmp_path, CAPACITY, PRICES), start_s=170, duration_s=80)
    assert market.capacity_t_s.tolist() == [0, 30]
    assert market.capacity.tolist() == [[0, 1], [1, 1]]
    assert market.price_t_s is not None
    assert market.price_t_s.tolist() == [0]


def test_capacity_is_scaled_to_whole_nodes_and_zones_come_as_asked(tmp_path: Path) -> None:
    folder = a_market_folder(tmp_path, CAPACITY, PRICES)
    market = read_market(folder, nodes_scale=2.5, zones=["us-west-2b"])
    assert market.zones == ("us-west-2b",)
    assert market.capacity.tolist() == [[0], [3], [3], [0]]


# --- wrong files


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["empty", "t_s"]),
        ("\n\n", ["empty"]),
        ("t_s,requests\n", ["no rows"]),
        ("requests,t_s\n5,0\n", ["line 1", "first column is t_s", "'requests'"]),
        ("t_s,request\n0,5\n", ["line 1", "'request'", "did you mean 'requests'?"]),
        ("t_s,input_token\n0,5\n", ["did you mean 'input_tokens'?"]),
        ("t_s,input_tokens,input_tokens\n0,5,5\n", ["twice"]),
        ("t_s,requests\n0,5\n60,many\n", ["line 3", "column requests", "'many'", "number"]),
        ("t_s,requests\n0,5\n60,\n", ["line 3", "column requests", "empty"]),
        ("t_s,requests\n0,5\n60\n", ["line 3", "1 cells", "2 columns"]),
        ("t_s,requests\n0,5\n60,1,2\n", ["line 3", "3 cells", "2 columns"]),
        ("t_s,requests\n0,5,1\n60,1,2\n", ["line 2", "3 cells"]),
        ("t_s,requests\n0,5\n60,nan\n", ["line 3", "column requests", "nan", "finite"]),
        ("t_s,requests\n0,5\n60,-4\n", ["line 3", "column requests", "-4", "negative"]),
        ("t_s,requests\n0,5\n60,4\n\n30,4\n", ["line 5", "column t_s", "30", "60", "sorted"]),
        ("t_s,requests\n0,5\n0,4\n", ["line 3", "later", "once"]),
        ("t_s,requests\n0,5\n", ["one row", "interval"]),
        ("t_s\n-1\n", ["line 2", "-1", "negative"]),
        ("t_s\n5\n4\n", ["line 3", "column t_s", "before", "5"]),
        ("t_s;requests\n0;5\n", ["line 1", "first column is t_s"]),
        ("t_s,requests\n0,90000000\n60,90000000\n", ["1.8e+08", "too many", "scale"]),
    ],
)
def test_a_wrong_request_file_says_where_and_what_would_be_right(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    with pytest.raises(TraceError) as error:
        read_requests(a_file(tmp_path, text), seed=0)
    for part in ["requests.csv", *parts]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("capacity", "prices", "parts"),
    [
        ("t_s\n0\n", None, ["capacity.csv", "no zone"]),
        ("t_s,a\n0,1.5\n", None, ["line 2", "column a", "1.5", "whole"]),
        ("t_s,a\n0,-1\n", None, ["line 2", "column a", "negative"]),
        ("t_s,a\n0,1\n0,2\n", None, ["line 3", "t_s", "later"]),
        ("t_s,a\n0,x\n", None, ["line 2", "column a", "'x'"]),
        (CAPACITY, "t_s,us-east-1a,us-west-2c\n0,1,1\n",
         ["price_usd_h.csv", "'us-west-2c'", "capacity.csv", "did you mean 'us-west-2b'?"]),
        (CAPACITY, "t_s,us-east-1a\n0,1\n", ["price_usd_h.csv", "no prices", "'us-west-2b'"]),
        (CAPACITY, "t_s,us-east-1a,us-west-2b\n0,1,-1\n", ["price_usd_h.csv, line 2", "negative"]),
    ],
)  # fmt: skip
def test_a_wrong_market_says_where_and_what_would_be_right(
    tmp_path: Path, capacity: str, prices: str | None, parts: list[str]
) -> None:
    with pytest.raises(TraceError) as error:
        read_market(a_market_folder(tmp_path, capacity, prices))
    for part in parts:
        assert part in str(error.value)


def test_an_unknown_zone_is_told_its_near_name(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"no zone 'us-east-1b'; did you mean 'us-east-1a'\?"):
        read_market(a_market_folder(tmp_path, CAPACITY), zones=["us-east-1b"])


def test_what_is_not_there_is_told_with_what_is(tmp_path: Path) -> None:
    a_file(tmp_path, SOME, "others.csv")
    with pytest.raises(TraceError, match=r"missing\.csv: no such file; beside it are others\.csv"):
        read_requests(tmp_path / "missing.csv", seed=0)
    with pytest.raises(TraceError, match="not a folder"):
        read_market(tmp_path / "others.csv")
    with pytest.raises(TraceError, match=r"capacity\.csv: no such file"):
        read_market(tmp_path)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"scale": 0.0}, "scale: 0 must be a positive number"),
        ({"scale": float("nan")}, "scale: nan"),
        ({"start_s": -1.0}, "start: -1"),
        ({"duration_s": 0.0}, "duration: 0"),
        ({"start_s": 1e6}, "begins at 1e+06 s, but the trace ends at 10 s"),
    ],
)
def test_a_window_or_scale_that_cannot_be_is_refused(
    tmp_path: Path, options: dict[str, float], part: str
) -> None:
    with pytest.raises(TraceError) as error:
        read_requests(a_file(tmp_path, SOME), seed=0, **options)
    assert part in str(error.value)


# --- there and back


def test_generated_requests_are_read_back_as_counts(tmp_path: Path) -> None:
    told = generate_requests(5, duration_s=7200, rate_rps=2)
    read = read_requests(a_file(tmp_path, "".join(requests_lines(told))), seed=1)
    edges = np.append(told.t_s, 7200.0)
    assert np.histogram(read.arrival_s, edges)[0].tolist() == told.requests.tolist()
    assert read.duration_s == 7200


def test_a_generated_market_is_read_back_the_same(tmp_path: Path) -> None:
    told = generate_market(5, duration_s=86400)
    assert told.price_t_s is not None
    assert told.price_usd_h is not None
    capacity = "".join(market_lines(told.zones, told.capacity_t_s, told.capacity))
    prices = "".join(market_lines(told.zones, told.price_t_s, told.price_usd_h))
    read = read_market(a_market_folder(tmp_path, capacity, prices))
    assert read.price_usd_h is not None
    assert read.zones == told.zones
    assert np.array_equal(read.capacity, told.capacity)
    assert np.array_equal(read.price_usd_h, told.price_usd_h)


def test_zones_of_a_region_fail_together_more_often_than_chance() -> None:
    up = generate_market(1, duration_s=60 * 86400.0).capacity > 0
    one, other = ~up[:, 0], ~up[:, 1]  # two zones of one region
    assert (one & other).mean() > 1.5 * one.mean() * other.mean()


# --- the recorded traces


@pytest.mark.skipif(not SHARED.is_dir(), reason="the recorded traces are not here")
@pytest.mark.parametrize("folder", sorted((SHARED / "spot").glob("*")), ids=lambda path: path.name)
def test_recorded_markets_are_read(folder: Path) -> None:
    market = read_market(folder)
    assert market.capacity.shape == (len(market.capacity_t_s), len(market.zones))
    assert market.capacity.max() >= 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="the recorded traces are not here")
def test_twenty_recorded_days_are_millions_of_requests() -> None:
    path = SHARED / "requests" / "azure-functions-per-minute.csv"
    read = read_requests(path, scale=2e-4, seed=0)
    total = np.loadtxt(path, delimiter=",", skiprows=1)[:, 1].sum()
    assert len(read.arrival_s) == pytest.approx(total * 2e-4, rel=0.01)
    assert read.duration_s == 20 * 86400
