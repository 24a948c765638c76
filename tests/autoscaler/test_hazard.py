"""Are reclaims foretold as often as they come, on made-up processes and on real markets?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from autoscaler.hazard import (
    HazardMemory,
    HazardSettings,
    age_exponent,
    common_fraction,
    fraction_lost,
    launchable,
    observe,
    scenarios,
    shock_rate_per_h,
)
from autoscaler.snapshot import Event, EventKind, Group, Market, Node, NodeState

Floats = NDArray[np.float64]

TRACES = Path(__file__).parents[2].parent / "shared" / "traces" / "spot"
SETTINGS = HazardSettings()
STEADY = HazardSettings(half_life_s=1e9)
LAUNCHED, FAILED = EventKind.LAUNCHED, EventKind.LAUNCH_FAILED
NOTICED, RECLAIMED = EventKind.NOTICED, EventKind.RECLAIMED
HOUR_S = 3600.0


def spot_groups(*zones: str, machine: str = "m") -> dict[str, Group]:
    return {zone: Group(zone, machine, Market.SPOT, zone, 1.0, notice_s=120.0) for zone in zones}


def held_nodes(counts: Mapping[str, int]) -> list[Node]:
    return [
        Node(f"{name}/{i}", name, NodeState.READY, 0.0, 0.0)
        for name, count in counts.items()
        for i in range(count)
    ]


@dataclass
class Story:
    """A memory that is told one interval after another."""

    groups: dict[str, Group]
    settings: HazardSettings = SETTINGS
    memory: HazardMemory = dataclasses.field(default_factory=HazardMemory)

    def tell(self, now_s: float, counts: Mapping[str, int], *events: Event) -> None:
        self.memory = observe(
            self.memory, self.groups, held_nodes(counts), events, now_s, self.settings
        )

    def rate_per_h(self, group: str, now_s: float) -> float:
        return float(shock_rate_per_h(self.memory, self.groups, now_s)[self.row(group)])

    def row(self, group: str) -> int:
        return list(self.groups).index(group)

    def shocks(self, group: str) -> float:
        return float(self.memory.tally.shocks[self.row(group)])


# ── what counts as a shock ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("events", "shocks"),
    [
        ([(RECLAIMED, 100, 1)], 1),
        ([(NOTICED, 100, 2)], 1),
        ([(NOTICED, 100, 2), (RECLAIMED, 220, 2)], 1),
        ([(NOTICED, 100, 2), (RECLAIMED, 220, 3)], 2),
        ([(RECLAIMED, 100, 1), (RECLAIMED, 130, 1)], 1),
        ([(RECLAIMED, 100, 1), (RECLAIMED, 200, 1)], 2),
        ([(LAUNCHED, 100, 1), (FAILED, 110, 1)], 0),
    ],
)
def test_losses_within_a_minute_are_one_shock_and_a_notice_counts_once(
    events: list[tuple[EventKind, float, int]], shocks: int
) -> None:
    story = Story(spot_groups("r-1a"), STEADY)
    story.tell(0.0, {"r-1a": 8})
    story.tell(300.0, {"r-1a": 4}, *[Event(kind, "r-1a", at, n) for kind, at, n in events])
    assert story.shocks("r-1a") == pytest.approx(shocks, rel=1e-3)


def test_the_reclaim_of_a_node_noticed_in_an_earlier_interval_is_no_second_shock() -> None:
    story = Story(spot_groups("r-1a"), STEADY)
    story.tell(0.0, {"r-1a": 2})
    noticed = Node("x", "r-1a", NodeState.READY, 0.0, 0.0, reclaim_s=220.0)
    event = Event(NOTICED, "r-1a", 100.0)
    story.memory = observe(
        story.memory, story.groups, [*held_nodes({"r-1a": 1}), noticed], [event], 150.0, STEADY
    )
    story.tell(300.0, {"r-1a": 1}, Event(RECLAIMED, "r-1a", 220.0))
    assert story.shocks("r-1a") == pytest.approx(1.0, rel=1e-3)
    story.tell(400.0, {}, Event(RECLAIMED, "r-1a", 390.0))
    assert story.shocks("r-1a") == pytest.approx(2.0, rel=1e-3)


def test_machines_that_nobody_reclaims_have_no_hazard() -> None:
    groups = {"od": Group("od", "m", Market.ON_DEMAND, "any", 3.0), **spot_groups("r-1a")}
    story = Story(groups)
    story.tell(0.0, {"od": 3, "r-1a": 3})
    story.tell(60.0, {"od": 2, "r-1a": 3}, Event(RECLAIMED, "od", 30.0))
    assert story.rate_per_h("od", 60.0) == 0.0
    assert story.rate_per_h("r-1a", 60.0) > 0.0


def test_the_fraction_lost_is_learned_from_nodes_taken_of_nodes_held() -> None:
    story = Story(spot_groups("r-1a"), STEADY)
    assert fraction_lost(story.memory, story.groups) == pytest.approx(0.75)
    for k in range(40):
        now_s = k * HOUR_S
        story.tell(now_s, {"r-1a": 10})
        taken = [Event(RECLAIMED, "r-1a", now_s + s, 1) for s in (10.0, 20.0)]
        story.tell(now_s + 60, {"r-1a": 8}, *taken)
    assert fraction_lost(story.memory, story.groups)[0] == pytest.approx(0.2, abs=0.06)


def test_time_may_not_run_backwards() -> None:
    story = Story(spot_groups("r-1a"))
    story.tell(10.0, {})
    with pytest.raises(ValueError, match="backwards"):
        story.tell(9.0, {})


# ── made-up processes ─────────────────────────────────────────────────────────────────────────


def shocks_of_a_weibull(
    shape: float, scale_h: float, hours: float, rng: np.random.Generator
) -> list[float]:
    """Times in seconds of a renewal process with Weibull gaps."""
    gaps_h = scale_h * rng.weibull(shape, size=int(hours / scale_h * 10) + 100)
    times_h = np.cumsum(gaps_h)
    return [float(t) * HOUR_S for t in times_h[times_h < hours]]


def lived(
    story: Story, shocks_s: Mapping[str, Sequence[float]], hours: float, begin_s: float = 0.0
) -> None:
    """Ten nodes in each zone; each shock takes half of them, and they are back at once."""
    counts = dict.fromkeys(shocks_s, 10)
    step_s = 300.0
    story.tell(begin_s, counts)
    for k in range(round(hours * HOUR_S / step_s)):
        a, b = k * step_s, (k + 1) * step_s
        events = [
            event
            for zone, times in shocks_s.items()
            for t in times
            if a < t <= b
            for event in (
                Event(RECLAIMED, zone, begin_s + t, 5),
                Event(LAUNCHED, zone, begin_s + t, 5),
            )
        ]
        story.tell(begin_s + b, counts, *events)


def test_a_constant_rate_is_found_and_so_is_that_age_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    story = Story(spot_groups("r-1a"), STEADY)
    lived(story, {"r-1a": shocks_of_a_weibull(1.0, 0.5, 200, rng)}, 200)
    assert story.rate_per_h("r-1a", 200 * HOUR_S) == pytest.approx(2.0, rel=0.25)
    assert age_exponent(story.memory) < 0.15


def test_a_hazard_that_falls_with_age_is_found_and_lowers_the_rate_of_old_runs() -> None:
    rng = np.random.default_rng(2)
    story = Story(spot_groups("r-1a"), STEADY)
    lived(story, {"r-1a": shocks_of_a_weibull(0.4, 1.0, 300, rng)}, 300)
    assert age_exponent(story.memory) > 0.35
    story.tell(300 * HOUR_S + 1, {"r-1a": 5}, Event(RECLAIMED, "r-1a", 300 * HOUR_S, 5))
    young = story.rate_per_h("r-1a", 300 * HOUR_S + 60)
    old = story.rate_per_h("r-1a", 324 * HOUR_S)
    assert old < young / 4


def test_right_after_a_shock_the_rate_is_raised() -> None:
    story = Story(spot_groups("r-1a"))
    lived(story, {"r-1a": []}, 6)
    before = story.rate_per_h("r-1a", 6 * HOUR_S)
    story.tell(6 * HOUR_S + 60, {"r-1a": 9}, Event(RECLAIMED, "r-1a", 6 * HOUR_S + 30))
    assert story.rate_per_h("r-1a", 6 * HOUR_S + 60) > 2 * before


def test_a_new_zone_starts_from_what_its_region_and_its_machine_type_have_shown() -> None:
    rng = np.random.default_rng(3)
    zones = ("bad-1a", "bad-1b", "good-1a", "good-1b")
    story = Story(spot_groups(*zones), STEADY)
    shocks = {
        zone: shocks_of_a_weibull(1.0, 0.4 if zone.startswith("bad") else 10.0, 100, rng)
        for zone in zones
    }
    lived(story, shocks, 100)
    story.groups |= spot_groups("bad-1c", "good-1c", "else-1a")
    at_s = 100 * HOUR_S
    bad, good, other = (story.rate_per_h(z, at_s) for z in ("bad-1c", "good-1c", "else-1a"))
    assert good < other < bad
    assert bad == pytest.approx(2.5, rel=0.4)


def test_old_shocks_fade() -> None:
    story = Story(spot_groups("r-1a"))
    lived(story, {"r-1a": [600.0 * k for k in range(1, 60)]}, 10)
    stormy = story.rate_per_h("r-1a", 10 * HOUR_S + 1800)
    lived(story, {"r-1a": []}, 72, begin_s=10 * HOUR_S)
    story.tell(82 * HOUR_S, {"r-1a": 9}, Event(RECLAIMED, "r-1a", 82 * HOUR_S))
    assert story.rate_per_h("r-1a", 82 * HOUR_S + 1800) < stormy / 3


def test_zones_that_fall_together_raise_the_common_fraction_and_others_lower_it() -> None:
    rng = np.random.default_rng(4)
    zones = ("r-1a", "r-1b", "r-1c")
    together, apart = Story(spot_groups(*zones), STEADY), Story(spot_groups(*zones), STEADY)
    times = shocks_of_a_weibull(1.0, 2.0, 100, rng)
    lived(together, {zone: [t + 20 * k for t in times] for k, zone in enumerate(zones)}, 100)
    lived(apart, {zone: shocks_of_a_weibull(1.0, 2.0, 100, rng) for zone in zones}, 100)
    assert common_fraction(HazardMemory()) == SETTINGS.common_prior
    assert common_fraction(together.memory) > 0.85
    assert common_fraction(apart.memory) < 0.12


def test_a_price_above_its_average_raises_the_rate_within_bounds() -> None:
    story = Story(spot_groups("r-1a"))
    story.tell(0.0, {"r-1a": 1})
    usual = story.rate_per_h("r-1a", 60.0)
    for price, ratio in ((1.5, 1.5), (9.0, 2.0), (0.01, 0.5)):
        now = {"r-1a": dataclasses.replace(story.groups["r-1a"], price_usd_h=price)}
        rate = shock_rate_per_h(story.memory, now, 60.0)[0]
        assert rate == pytest.approx(usual * ratio)


# ── launches ──────────────────────────────────────────────────────────────────────────────────


def told_failures(count: int, held: int = 0) -> Story:
    story = Story(spot_groups("r-1a"))
    story.tell(0.0, {"r-1a": held})
    for k in range(count):
        story.tell(60.0 * (k + 1), {"r-1a": held}, Event(FAILED, "r-1a", 60.0 * (k + 1)))
    return story


def test_a_place_that_was_never_tried_is_open_without_a_known_bound() -> None:
    story = told_failures(0)
    hope = launchable(story.memory, story.groups, 10.0)
    assert hope.success_probability[0] == pytest.approx(SETTINGS.success_prior_spot)
    assert hope.retry_at_s[0] <= 10.0
    assert hope.believed_free[0] == math.inf


def test_after_a_failure_no_more_is_believed_to_be_there_until_the_retry() -> None:
    story = told_failures(1, held=3)
    hope = launchable(story.memory, story.groups, 61.0)
    assert hope.believed_free[0] == 0.0
    assert hope.retry_at_s[0] == 60.0 + SETTINGS.retry_min_s
    assert hope.success_probability[0] < 0.1
    assert launchable(story.memory, story.groups, 90.0).believed_free[0] == 1.0


def test_nodes_given_back_are_believed_to_be_there_still() -> None:
    story = told_failures(1, held=3)
    story.tell(70.0, {"r-1a": 1})
    assert launchable(story.memory, story.groups, 71.0).believed_free[0] == 2.0


def test_the_wait_grows_with_each_failure_in_a_row_up_to_its_bound() -> None:
    waits = []
    for count in range(1, 12):
        story = told_failures(count)
        waits.append(
            launchable(story.memory, story.groups, 60.0 * count).retry_at_s[0] - 60.0 * count
        )
    assert waits[:4] == [30.0, 60.0, 120.0, 240.0]
    assert max(waits) == waits[-1] == SETTINGS.retry_max_s


def test_where_capacity_is_always_back_soon_the_wait_stays_short() -> None:
    story = Story(spot_groups("r-1a"))
    for k in range(60):
        begin_s = 600.0 * k
        fails = [Event(FAILED, "r-1a", begin_s + s) for s in (0.0, 30.0)]
        story.tell(begin_s + 60, {"r-1a": 1}, *fails, Event(LAUNCHED, "r-1a", begin_s + 60))
        story.tell(begin_s + 599, {}, Event(RECLAIMED, "r-1a", begin_s + 599))
    for k in range(8):
        story.tell(36_000.0 + k, {}, Event(FAILED, "r-1a", 36_000.0 + k))
    hope = launchable(story.memory, story.groups, 36_010.0)
    assert hope.retry_at_s[0] - 36_007.0 < 100.0


def test_probes_double_with_every_success_and_the_quota_bounds_them() -> None:
    story = told_failures(1)
    sizes = []
    held = 0
    for k in range(4):
        now_s = 200.0 + 60.0 * k
        ask = int(launchable(story.memory, story.groups, now_s).believed_free[0])
        sizes.append(ask)
        held += ask
        story.tell(now_s, {"r-1a": held}, Event(LAUNCHED, "r-1a", now_s, ask))
    assert sizes == [1, 2, 4, 8]
    limited = {"r-1a": dataclasses.replace(story.groups["r-1a"], nodes_max=held + 1)}
    assert launchable(story.memory, limited, 400.0).believed_free[0] == 1.0


def test_a_loss_lowers_the_hope_of_a_launch_and_it_comes_back_with_time() -> None:
    story = Story(spot_groups("r-1a"))
    story.tell(0.0, {"r-1a": 4}, Event(LAUNCHED, "r-1a", 0.0, 4))
    assert launchable(story.memory, story.groups, 1.0).success_probability[0] > 0.95
    story.tell(600.0, {}, Event(RECLAIMED, "r-1a", 600.0, 4))
    hopes = [
        float(launchable(story.memory, story.groups, 600.0 + s).success_probability[0])
        for s in (0.0, 300.0, 3600.0, 36000.0)
    ]
    assert hopes == sorted(hopes)
    assert hopes[0] == 0.0
    assert hopes[-1] > 0.6


# ── scenarios ─────────────────────────────────────────────────────────────────────────────────

ZONES = ("r-1a", "r-1b", "r-1c", "s-1a", "s-1b", "t-1a")


def a_past(seed: int) -> Story:
    rng = np.random.default_rng(seed)
    story = Story(spot_groups(*ZONES))
    lived(story, {z: shocks_of_a_weibull(0.7, rng.uniform(0.3, 3), 5, rng) for z in ZONES}, 5)
    return story


PASTS = [a_past(seed) for seed in range(3)]


@given(
    st.sampled_from(PASTS),
    st.lists(st.sampled_from([0.0, 30.0, 180.0, 900.0]), min_size=6, max_size=6),
    st.integers(3, 200),
)
def test_weights_add_up_to_one_and_survival_is_a_share(
    story: Story, gaps_s: list[float], count: int
) -> None:
    drawn = scenarios(
        story.memory, story.groups, np.array(gaps_s), 5 * HOUR_S, np.random.default_rng(0), count
    )
    assert drawn.weight.sum() == pytest.approx(1.0)
    assert (drawn.weight >= 0).all()
    assert drawn.survival.shape == (len(drawn.weight), 6)
    assert len(drawn.weight) <= count
    assert (drawn.survival >= 0).all()
    assert (drawn.survival <= 1).all()
    assert (drawn.survival[:, np.array(gaps_s) == 0.0] == 1.0).all()


@pytest.mark.parametrize("count", [8, 64, 4000])
@pytest.mark.parametrize("gap_s", [60.0, 600.0])
def test_a_group_is_short_with_the_probability_of_a_shock_within_its_gap(
    gap_s: float, count: int
) -> None:
    story, at_s = PASTS[0], 5 * HOUR_S
    rng = np.random.default_rng(5)
    runs = [
        scenarios(story.memory, story.groups, np.full(6, gap_s), at_s, rng, count)
        for _ in range(max(1, 4000 // count))
    ]
    short = np.mean([run.weight @ (run.survival < 1) for run in runs], axis=0)
    exact = -np.expm1(-shock_rate_per_h(story.memory, story.groups, at_s) * gap_s / HOUR_S)
    assert short == pytest.approx(exact, abs=0.02)


def test_zones_of_a_region_are_short_together_more_often_than_zones_apart() -> None:
    story = PASTS[1]
    drawn = scenarios(
        story.memory, story.groups, np.full(6, 300.0), 5 * HOUR_S, np.random.default_rng(0), 2000
    )
    short = (drawn.survival < 1).astype(float)
    both = short.T @ (short * drawn.weight[:, None])
    alone = np.diag(both)
    lift = both / np.outer(alone, alone)
    assert lift[0, 1] > 1.3 * lift[0, 5]
    assert lift[0, 5] == pytest.approx(1.0, abs=0.15)


def test_rare_shocks_are_listed_exactly_without_any_sampling() -> None:
    story = Story(spot_groups("r-1a", "s-1a"))
    story.tell(0.0, {})
    runs = [
        scenarios(story.memory, story.groups, np.full(2, 1.0), 1.0, np.random.default_rng(s), 30)
        for s in (1, 2)
    ]
    assert np.array_equal(runs[0].survival, runs[1].survival)
    assert len(runs[0].weight) == 4  # none, each of two alone, both


def test_too_few_scenarios_are_refused() -> None:
    story = PASTS[0]
    with pytest.raises(ValueError, match="at least 3"):
        scenarios(story.memory, story.groups, np.zeros(6), 0.0, np.random.default_rng(0), 2)


# ── real markets ──────────────────────────────────────────────────────────────────────────────


@dataclass
class Foretold:
    """What was foretold of each step, and what came."""

    shock_probability: Floats
    shock: Floats
    launch_probability: Floats
    launch: Floats


def replayed(folder: Path, days: float) -> Foretold:
    """Holds in each zone whatever can be had; asks an empty zone when `launchable` says so."""
    with (folder / "capacity.csv").open() as file:
        zones = file.readline().strip().split(",")[1:]
        rows = np.loadtxt(file, delimiter=",")
    rows = rows[rows[:, 0] <= days * 86400]
    story = Story(spot_groups(*zones))
    held = dict.fromkeys(zones, 0)
    retry = dict.fromkeys(zones, -math.inf)
    hope = dict.fromkeys(zones, math.nan)
    shocks: list[tuple[float, bool]] = []
    launches: list[tuple[float, bool]] = []
    for k, (now_s, *capacity) in enumerate(rows):
        there = dict(zip(zones, map(int, capacity), strict=True))
        is_asked = {z: held[z] > 0 or now_s >= retry[z] for z in zones}
        launches += [(hope[z], there[z] > 0) for z in zones if k and held[z] == 0 and is_asked[z]]
        events = list(_happenings(held, there, is_asked, now_s))
        held = {z: there[z] if is_asked[z] else 0 for z in zones}
        story.tell(now_s, held, *events)
        if k + 1 == len(rows):
            break
        next_s = rows[k + 1, 0]
        step_s = min(next_s - now_s, HOUR_S)
        rate = shock_rate_per_h(story.memory, story.groups, now_s + step_s / 2)
        chance = -np.expm1(-rate * step_s / HOUR_S)
        for z, column in enumerate(rows[k + 1, 1:]):
            if held[zones[z]] > 0:
                shocks.append((float(chance[z]), column < held[zones[z]]))
        hopes = launchable(story.memory, story.groups, next_s)
        retry = dict(zip(zones, hopes.retry_at_s.tolist(), strict=True))
        hope = dict(zip(zones, hopes.success_probability.tolist(), strict=True))
    return Foretold(*np.array(shocks, float).T, *np.array(launches, float).T)


def _happenings(
    held: Mapping[str, int], there: Mapping[str, int], is_asked: Mapping[str, bool], now_s: float
) -> Iterator[Event]:
    for zone, before in held.items():
        now = there[zone]
        if now < before:
            yield Event(RECLAIMED, zone, now_s, before - now)
        elif is_asked[zone] and now > before:
            yield Event(LAUNCHED, zone, now_s, now - before)
        elif is_asked[zone] and now == 0:
            yield Event(FAILED, zone, now_s)


def log_loss(chance: Floats, came: Floats) -> float:
    chance = np.clip(chance, 1e-3, 1 - 1e-3)
    return float(-np.mean(came * np.log(chance) + (1 - came) * np.log1p(-chance)))


REPLAYS: list[tuple[str, float]] = [
    ("aws-v100-1node-2023", 6.0),
    ("aws-v100-16node-2023", 7.0),
    ("aws-v100-4node-2023", 7.0),
    ("gcp-h100-16node-2025", 7.0),
]


@pytest.mark.skipif(not TRACES.exists(), reason="the traces are not here")
@pytest.mark.parametrize(("name", "days"), REPLAYS)
def test_reclaims_of_real_markets_come_about_as_often_as_foretold(name: str, days: float) -> None:
    seen = replayed(TRACES / name, days)
    observed, foretold = seen.shock.sum(), seen.shock_probability.sum()
    assert 0.6 < observed / foretold < 1.6
    constant = np.full_like(seen.shock, seen.shock.mean())
    assert log_loss(seen.shock_probability, seen.shock) < log_loss(constant, seen.shock)
    brier = np.mean((seen.shock_probability - seen.shock) ** 2)
    assert brier < np.mean((constant - seen.shock) ** 2)
    hoped, came = seen.launch_probability.sum(), seen.launch.sum()
    assert 0.6 < came / hoped < 1.7
