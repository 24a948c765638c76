"""Does the autoscaling benchmark play what it says, go on where it was stopped, and add up?"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.experiment import read_world, sizing
from benchmarks.autoscaling import jobs as jobs_
from benchmarks.autoscaling.__main__ import main, parse, report
from benchmarks.autoscaling.combinations import (
    COMBINATIONS,
    CONV,
    PROFILES,
    WINDOWS,
    Combination,
    TracesMissing,
    experiment,
    world_digest,
)
from benchmarks.autoscaling.comparison import (
    Sheet,
    beside_frontier,
    draws,
    least_mix,
    mean_of,
    ratio_of,
)
from benchmarks.autoscaling.jobs import Job, Plan, jobs, left_s, perform
from benchmarks.autoscaling.policies import FRONTIER, POLICIES, SHOAL, STATIC_PEAK, participant
from benchmarks.autoscaling.regret import Known, Played, Split, announced
from benchmarks.autoscaling.report import document, markdown
from benchmarks.autoscaling.results import results
from benchmarks.autoscaling.rows import Row, append_rows, latest, read_rows

LITTLE = Combination("little-conv", "market", "requests.csv", "llm-v100.yaml", 20_000.0, 1.0)
HOURS = 0.25


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Half a day of a request every two seconds; a market of one zone that fails now and then."""
    folder = tmp_path / "traces"
    (folder / "requests").mkdir(parents=True)
    (folder / "spot" / "market").mkdir(parents=True)
    minutes = "".join(f"{60 * k},{30 + k % 7}\n" for k in range(720))
    (folder / "requests" / "requests.csv").write_text("t_s,requests\n" + minutes)
    hours = "".join(f"{600 * k},{0 if k % 5 == 4 else 8}\n" for k in range(72))
    (folder / "spot" / "market" / "capacity.csv").write_text("t_s,us-west-2a\n" + hours)
    return folder


def a_plan(traces: Path, **fields: object) -> Plan:
    values: dict[str, object] = {
        "combinations": (LITTLE,),
        "policies": ("skyserve", STATIC_PEAK),
        "bounds": traces / "bounds",
        "windows": (0, 1),
        "traces": traces,
        "hours": HOURS,
    }
    return Plan(**{**values, **fields})  # type: ignore[arg-type]


def a_row(policy: str = SHOAL, window: int = 0, **fields: object) -> Row:
    values: dict[str, object] = {
        "combination": "v100-16-conv",
        "world": "w",
        "how": "h",
        "bound": "b",
        "cost_usd": 10.0,
        "bound_usd": 8.0,
        "bound_own_usd": 8.0,
        "attainment": 0.995,
        "requests": 1000,
        "p50_ms": 100.0,
        "p99_ms": 200.0,
        "failed": 0,
        "preemptions": 1,
        "launches": {"spot": 3},
        "node_hours": {"spot": 5.0},
        "decide_ms_mean": 2.0,
        "took_s": 1.0,
    }
    return Row(policy=policy, window=window, **{**values, **fields})  # type: ignore[arg-type]


# --- combinations


def test_every_market_meets_every_request_trace_once() -> None:
    pairs = {(one.market, one.requests) for one in COMBINATIONS}
    assert len(COMBINATIONS) == len(pairs) == len({one.name for one in COMBINATIONS}) == 12
    assert len({market for market, _ in pairs}) == 4
    assert len({requests for _, requests in pairs}) == 3


@pytest.mark.parametrize("one", COMBINATIONS, ids=lambda one: one.name)
def test_a_combination_has_a_profile_and_a_name_that_ends_with_its_requests(
    one: Combination,
) -> None:
    assert (PROFILES / one.profile).is_file()
    assert one.name.rpartition("-")[2] in one.requests
    assert (one.slo_ms, "h100" in one.profile) in ((20_000.0, False), (10_000.0, True))
    assert (one.nodes_scale == 16.0) == ("1node" in one.market)
    assert (one.window_s is not None) == (one.requests == CONV)


def test_windows_lie_within_both_traces_and_are_apart(traces: Path) -> None:
    asked = [experiment(LITTLE, k, traces=traces, hours=1.0) for k in range(WINDOWS)]
    for one in asked:
        assert 0 <= one.start_s <= 719 * 60 - 3600
        assert 0 <= one.market_start_s <= 71 * 600 - 3600
    assert len({one.start_s for one in asked}) == WINDOWS
    assert len({one.market_start_s for one in asked}) == WINDOWS
    assert sorted(one.seed for one in asked) == list(range(1, WINDOWS + 1))
    order = np.corrcoef([one.start_s for one in asked], [one.market_start_s for one in asked])
    assert abs(order[0, 1]) < 0.5  # early meets late


def test_there_is_no_eleventh_window(traces: Path) -> None:
    with pytest.raises(ValueError, match="window 10"):
        experiment(LITTLE, 10, traces=traces)


def test_a_missing_trace_is_named_and_so_is_the_option_that_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TracesMissing, match="--traces"):
        experiment(LITTLE, 0, traces=tmp_path)
    nowhere = ["--traces", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(nowhere) == 2
    assert CONV in capsys.readouterr().err


def test_a_digest_changes_with_the_file_and_with_the_window(traces: Path, tmp_path: Path) -> None:
    def digest(folder: Path, window: int) -> str:
        return world_digest(LITTLE, experiment(LITTLE, window, traces=folder, hours=HOURS))

    other = tmp_path / "other"
    (other / "requests").mkdir(parents=True)
    (other / "spot").symlink_to(traces / "spot")
    text = (traces / "requests" / "requests.csv").read_text().replace("0,30\n", "0,31\n", 1)
    (other / "requests" / "requests.csv").write_text(text)
    assert digest(traces, 0) == digest(traces, 0)
    assert len({digest(traces, 0), digest(traces, 1), digest(other, 0)}) == 3


# --- policies


def test_a_variant_of_skyserve_differs_by_its_target_and_its_name_only(traces: Path) -> None:
    world = read_world(experiment(LITTLE, 0, traces=traces, hours=HOURS))
    for name in FRONTIER:
        scale = float(name.partition("@")[2] or 1)
        default = participant("skyserve", world)
        assert participant(name, world) == replace(default, name=name, target_scale=scale)  # type: ignore[type-var]


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_by_name_goes_by_that_name(name: str, traces: Path) -> None:
    world = read_world(experiment(LITTLE, 0, traces=traces, hours=HOURS))
    assert participant(name, world).name == name
    assert sizing(world).peak_rate_rps > 0


# --- jobs


def played(plan: Plan, rows: list[Row]) -> list[Row]:
    return [row for job in jobs(plan, rows) for row in perform(job)]


def test_a_stopped_benchmark_goes_on_where_it_was(traces: Path, tmp_path: Path) -> None:
    plan, path = a_plan(traces), tmp_path / "runs.jsonl"
    first, second = jobs(plan, [])
    append_rows(path, perform(first))
    with path.open("a") as file:
        file.write('{"combination": "little-conv", "wind')  # killed in the middle of a line
    (left,) = jobs(plan, read_rows(path))
    assert left == second
    append_rows(path, perform(left))
    assert len(read_rows(path)) == 4
    assert jobs(plan, read_rows(path)) == []


def test_a_policy_that_joins_later_is_the_only_one_played(traces: Path) -> None:
    plan = a_plan(traces, windows=(0,))
    rows = played(plan, [])
    (job,) = jobs(replace(plan, policies=("skyserve", "knative")), rows)
    assert job.policies == ("knative",)


def test_settings_play_shoal_again_and_a_version_plays_all_again(traces: Path) -> None:
    plan = a_plan(traces, windows=(0,), policies=(SHOAL, "skyserve"))
    (job,) = jobs(plan, [])
    rows = [
        a_row(policy, combination=job.combination, world=job.world, how=how,
              bound=jobs_.bound_digest())
        for policy, how in zip(job.policies, job.hows, strict=True)
    ]  # fmt: skip
    assert jobs(plan, rows) == []
    (tuned,) = jobs(replace(plan, settings=("use_s=1800",)), rows)
    assert tuned.policies == (SHOAL,)
    (new,) = jobs(replace(plan, version="2"), rows)
    assert new.policies == (SHOAL, "skyserve")


def test_a_row_with_an_old_bound_is_bounded_anew_and_not_played(traces: Path) -> None:
    plan = a_plan(traces, windows=(0,), policies=("skyserve",))
    (row,) = played(plan, [])
    (job,) = jobs(plan, [replace(row, bound="old", bound_usd=1e9)])
    assert (job.policies, len(job.stale)) == ((), 1)
    assert perform(job) == [row]


def test_a_kept_bound_is_the_bound(traces: Path) -> None:
    plan = a_plan(traces, windows=(0,), policies=("skyserve",))
    once, again = played(plan, []), played(plan, [])
    assert len(list((traces / "bounds").iterdir())) == 1
    assert [replace(row, took_s=0, decide_ms_mean=0) for row in once] == [
        replace(row, took_s=0, decide_ms_mean=0) for row in again
    ]


def test_no_policy_beats_the_bound_at_what_it_attains(traces: Path) -> None:
    rows = played(a_plan(traces, policies=("skyserve", "on-demand-reactive", STATIC_PEAK)), [])
    assert len(rows) == 6
    assert all(0 < row.bound_own_usd <= min(row.bound_usd, row.cost_usd) for row in rows)


def test_the_time_left_is_that_of_like_windows(traces: Path) -> None:
    job = jobs(a_plan(traces), [])[0]
    other: Job = replace(job, combination="other")
    assert left_s([job, job, other], {"little-conv": [10.0, 20.0], "third": [60.0]}) == 60.0
    assert left_s([job], {}) == 0.0


def test_the_rows_of_another_world_do_not_count() -> None:
    rows = [a_row(world="old", cost_usd=1), a_row("skyserve", world="old"), a_row(world="new")]
    assert latest(rows) == [rows[2]]
    assert latest([*rows, a_row(world="new", cost_usd=3.0)])[0].cost_usd == 3.0


# --- comparison


def test_at_equal_attainment_two_variants_are_mixed() -> None:
    mix = least_mix({"dear": (1.0, 20.0), "cheap": (0.9, 10.0)}, 0.95)
    assert mix is not None
    assert (mix.share, mix.cost_usd) == pytest.approx((0.5, 15.0))
    assert mix.label == "50% cheap, 50% dear"


def test_a_variant_that_attains_more_for_less_is_taken_alone() -> None:
    mix = least_mix({"good": (0.99, 9.0), "bad": (0.9, 10.0)}, 0.95)
    assert mix is not None
    assert (mix.label, mix.cost_usd) == ("good", 9.0)


def test_no_mix_attains_more_than_its_best() -> None:
    assert least_mix({"a": (0.9, 1.0), "b": (0.94, 2.0)}, 0.95) is None


@given(
    st.lists(
        st.tuples(st.floats(0.5, 1.0), st.floats(1.0, 100.0)), min_size=1, max_size=5, unique=True
    ),
    st.floats(0.5, 1.0),
    st.lists(st.floats(0.0, 1.0), min_size=5, max_size=5),
)
def test_no_other_mixture_that_attains_as_much_is_cheaper(
    points: list[tuple[float, float]], asked: float, weights: list[float]
) -> None:
    mix = least_mix({str(k): point for k, point in enumerate(points)}, asked)
    part = np.array(weights[: len(points)]) + 1e-3
    part /= part.sum()
    attained, cost = part @ np.array(points)
    if attained >= asked:
        assert mix is not None
        assert mix.cost_usd <= cost * (1 + 1e-9)


def test_a_paired_interval_knows_that_hard_windows_are_hard_for_both() -> None:
    cost = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    paired = ratio_of(cost * 0.8, cost, draws(5))
    assert (paired.mean, paired.low, paired.high) == pytest.approx((0.8, 0.8, 0.8))
    alone = mean_of(cost, draws(5))
    assert alone.mean == pytest.approx(6.2)
    assert alone.low < 5.0 < 7.5 < alone.high


def test_an_interval_of_many_windows_is_near_that_of_the_normal_law() -> None:
    values = np.random.default_rng(1).normal(10.0, 2.0, 400)
    estimate = mean_of(values, draws(400))
    half = 1.96 * values.std() / math.sqrt(400)
    assert estimate.high - estimate.mean == pytest.approx(half, rel=0.15)
    assert estimate.mean - estimate.low == pytest.approx(half, rel=0.15)


def test_one_window_has_no_interval() -> None:
    estimate = mean_of(np.array([3.0, np.nan]), draws(2))
    assert estimate.mean == 3.0
    assert estimate.as_json() == [3.0, None, None]


def test_each_combination_counts_once_whatever_it_costs() -> None:
    above, below = np.array([[1.0, 1.0], [900.0, 900.0]]), np.array([[2.0, 2.0], [1000.0, 1000.0]])
    assert ratio_of(above, below, draws(2)).mean == pytest.approx(0.7)


def test_windows_that_only_one_has_are_left_out_of_a_ratio() -> None:
    above, below = np.array([1.0, 100.0, 3.0]), np.array([2.0, np.nan, 6.0])
    assert ratio_of(above, below, draws(3)).mean == pytest.approx(0.5)


# --- results


def some_rows(**shoal: object) -> list[Row]:
    """Three windows in which SkyServe at 0.7 is on target for 20 and its default misses for 10."""
    rows = []
    for window in range(3):
        rows += [
            a_row(SHOAL, window, **shoal),
            a_row("skyserve", window, attainment=0.98, cost_usd=10.0),
            a_row("skyserve@0.7", window, attainment=1.0, cost_usd=20.0),
            a_row(STATIC_PEAK, window, attainment=1.0, cost_usd=40.0),
        ]
    return rows


def test_shoal_is_compared_with_a_mix_that_attains_the_target_and_not_more() -> None:
    sheet = Sheet(some_rows(attainment=0.999, cost_usd=9.0))
    found = beside_frontier(sheet, "v100-16-conv", SHOAL, ("skyserve", "skyserve@0.7"))
    assert found is not None
    beside, cost = found
    assert beside.is_equal
    assert beside.attainment == pytest.approx(0.99)
    assert cost == pytest.approx([15.0, 15.0, 15.0])
    assert beside.cost_ratio.mean == pytest.approx(0.6)


def test_goals_are_met_where_the_figures_say_so() -> None:
    (verdict,) = results(some_rows(cost_usd=9.0), {}).verdicts
    assert verdict.met == {
        "attainment": True, "ratio": True, "skyserve": True, "static peak": True,
    }  # fmt: skip
    assert verdict.reached_by == (SHOAL, "skyserve@0.7")


def test_goals_are_missed_where_the_figures_say_so() -> None:
    told = results(some_rows(cost_usd=21.0, attainment=0.985), {})
    (verdict,) = told.verdicts
    assert not any(verdict.met.values())
    assert verdict.windows_lost == 3
    assert told.overall is not None
    assert told.overall.met_in["ratio"] == (0, 1)


def test_what_nobody_without_foresight_reaches_is_no_miss() -> None:
    rows = [row for row in some_rows(attainment=0.9) if row.policy != "skyserve@0.7"]
    (verdict,) = results(rows, {}).verdicts
    assert verdict.met["attainment"] is None
    assert verdict.reached_by == ()


@pytest.mark.parametrize(("cost_usd", "met"), [(15.0, True), (18.0, None)])
def test_beside_a_skyserve_that_attains_less_only_being_cheaper_anyway_counts(
    cost_usd: float, met: bool | None
) -> None:
    rows = [
        a_row(SHOAL, attainment=0.97, cost_usd=cost_usd),
        a_row("skyserve", attainment=0.6, cost_usd=20.0),
    ]
    told = results(rows, {})
    (verdict,) = told.verdicts
    assert verdict.skyserve is not None
    assert not verdict.skyserve.is_equal
    assert verdict.met["skyserve"] is met
    assert told.overall is not None
    assert told.overall.met["skyserve"] is met


def test_one_kind_of_traffic_does_not_hide_behind_another() -> None:
    rows = some_rows(cost_usd=9.0)
    rows += [replace(row, combination="v100-4-functions", bound_usd=1.0) for row in rows]
    told = results(rows, {})
    assert told.by_requests["conv"].met["ratio"] is True
    assert told.by_requests["functions"].met["ratio"] is False


def test_the_page_and_the_document_hold_the_figures(tmp_path: Path) -> None:
    append_rows(tmp_path / "runs.jsonl", some_rows(cost_usd=9.0))
    page = report(tmp_path)
    assert "| v100-16-conv | 0.9950 [0.9950, 0.9950] | 1.12 [1.12, 1.12] | 40% [40%, 40%] |" in page
    told = json.loads((tmp_path / "results.json").read_text())
    shoal = told["combinations"]["v100-16-conv"]["policies"][SHOAL]
    assert shoal["ratio"] == pytest.approx([1.125] * 3)
    assert told["overall"]["static_peak_cost_ratio"] == pytest.approx([9 / 40] * 3)
    assert (tmp_path / "frontier.png").stat().st_size < 200_000


def test_a_report_without_shoal_still_has_its_tables() -> None:
    told = results([row for row in some_rows() if row.policy != SHOAL], {})
    assert told.overall is None
    assert "| skyserve | 0.9800" in markdown(told)
    assert document(told)["overall"] is None


# --- the command


def test_windows_are_asked_for_by_number_or_range() -> None:
    assert parse(["--windows", "0-2,5"]).plan.windows == (0, 1, 2, 5)
    assert parse([]).plan.windows == tuple(range(WINDOWS))


@pytest.mark.parametrize(
    "words",
    [
        ["--windows", "10"],
        ["--windows", "a-b"],
        ["--policies", "skyserv"],
        ["--combinations", "v100"],
        ["--set", "no_such_setting=1"],
        ["--window-h", "0"],
    ],
)
def test_what_does_not_exist_is_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(words)


# --- regret


def test_the_parts_of_the_regret_add_up_to_the_ratio() -> None:
    one = Split("c", 0, 10.0, Played(15.0, 0.99), Played(13.0, 0.99), Played(12.0, 0.99), 0.05)
    assert (one.forecast, one.spot, one.rest) == pytest.approx((0.2, 0.1, 0.15))
    assert 1 + one.forecast + one.spot + 0.05 + one.rest == pytest.approx(one.ratio)


def test_a_known_rate_is_the_one_that_comes() -> None:
    known = Known(np.concatenate([np.arange(0, 600, 1.0), np.arange(600, 1200, 0.5)]), 1200.0)
    assert known.rate_rps(500.0, 60.0) == pytest.approx(1.0)
    assert known.rate_rps(570.0, 60.0) == pytest.approx(1.5)
    assert known.rate_rps(5000.0, 60.0) == pytest.approx(2.0)  # beyond the end: its last step
    assert known.rate_rps(-900.0, 60.0) == pytest.approx(1.0)  # the prelude repeats the beginning


def test_an_announced_world_differs_by_its_notice_alone(traces: Path) -> None:
    world = read_world(experiment(LITTLE, 0, traces=traces, hours=HOURS))
    told = announced(world)
    assert told.profile.notice_s == pytest.approx(150 * 1.2 + 60)
    assert replace(told.profile, notice_s=world.profile.notice_s) == world.profile
    for name, work in world.work.items():
        assert np.array_equal(work.variable_s, told.work[name].variable_s)
    assert {g.notice_s for g in told.groups.values() if g.notice_s} == {240.0}
