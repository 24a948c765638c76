"""Does the forecast cover what it states, see what repeats, and say so when it fails?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from autoscaler import forecast
from autoscaler.forecast import MEMBERS, STEPS_AHEAD, ForecastMemory, ForecastSettings

Floats = NDArray[np.float64]
SETTINGS = ForecastSettings()
DAY = 1440
TRACES = Path(__file__).parents[3] / "shared" / "traces" / "requests"


def told(counts: Floats, ahead: int = 3) -> tuple[Floats, Floats]:
    """Quantiles [step, row, level] and members' points [step, row, member] of the rate `ahead`
    steps on, after each of `counts` [row, step], a minute each.
    """
    memory = forecast.fresh(len(counts), SETTINGS)
    quantiles, points = [], []
    h = STEPS_AHEAD.index(ahead)
    for step, count in enumerate(counts.T):
        memory = forecast.observe(memory, count[:, None], 60.0, 60.0 * (step + 1), SETTINGS)
        quantiles.append(forecast.predict(memory, [60.0 * ahead]).rate_rps[:, 0])
        points.append(memory.pending_point[:, step % memory.pending_point.shape[1], h])
    return np.array(quantiles), np.array(points)


def made_up(steps: int) -> dict[str, Floats]:
    """True rates, in requests a second."""
    rng = np.random.default_rng(7)
    days = np.arange(steps) / DAY
    return {
        "random walk": 100 * np.exp(np.cumsum(rng.normal(0, 0.05, steps))),
        "daily": 100 * np.exp(np.sin(2 * np.pi * days) + np.cumsum(rng.normal(0, 0.01, steps))),
        "bursts": 100 * np.where(np.repeat(rng.random(steps // 5) < 0.1, 5), 3.0, 1.0),
        "level shifts": 80 * np.exp(0.2 * rng.standard_normal(steps))
        * np.where(np.arange(steps) // 900 % 2 == 0, 1.0, 3.0),
        "independent": 50 * rng.lognormal(0, 0.8, steps),
    }  # fmt: skip


@pytest.fixture(scope="module")
def run() -> tuple[list[str], Floats, Floats, Floats]:
    """Names, true rates [row, step], quantiles and members' points three steps ahead."""
    rates = made_up(2_400)
    true = np.array(list(rates.values()))
    counts = np.random.default_rng(8).poisson(60 * true).astype(float)
    return (list(rates), true, *told(counts))


def test_a_stated_share_is_covered_in_the_long_run_whatever_the_demand_does(
    run: tuple[list[str], Floats, Floats, Floats],
) -> None:
    names, true, quantiles, _ = run
    for row, name in enumerate(names):
        later, said = true[row, 303:], quantiles[300:-3, row]
        for k, level in enumerate(SETTINGS.levels[:6]):
            covered = float((later <= said[:, k]).mean())
            assert covered == pytest.approx(level, abs=0.05), (name, level)


def pinball(true: Floats, said: Floats, level: float) -> float:
    return float(np.maximum(level * (true - said), (level - 1) * (true - said)).mean())


def test_the_mixture_is_hardly_worse_than_the_best_member_alone(
    run: tuple[list[str], Floats, Floats, Floats],
) -> None:
    names, true, quantiles, points = run
    for row, name in enumerate(names):
        later = np.log(true[row, 303:])
        mixed = pinball(later, np.log(quantiles[300:-3, row, 0]), 0.5)
        alone = [
            pinball(later[known], points[300:-3, row, k][known], 0.5)
            for k in range(len(MEMBERS))
            if (known := ~np.isnan(points[300:-3, row, k])).mean() > 0.9
        ]
        assert mixed <= (1.2 if name == "bursts" else 1.1) * min(alone), name


def test_bands_are_no_wider_than_they_need_to_be(
    run: tuple[list[str], Floats, Floats, Floats],
) -> None:
    """Against the best constant band, known afterwards, round the last rate or round the median."""
    _, true, quantiles, _ = run
    top = SETTINGS.levels.index(0.95)
    for row in range(len(true)):
        now, later = true[row, 299:-4], true[row, 303:]
        round_last = now * np.quantile(later / now, 0.95)
        constant = np.full_like(later, np.quantile(later, 0.95))
        best = min(pinball(later, said, 0.95) for said in (round_last, constant))
        assert pinball(later, quantiles[300:-3, row, top], 0.95) <= 1.6 * best


def test_a_daily_rise_is_anticipated_after_two_days() -> None:
    """Every day at noon the rate rises fivefold within half an hour."""
    minute = np.arange(4 * DAY) % DAY
    true = 100 * np.exp(np.log(5.0) * np.clip((minute - 720) / 30, 0, 1) * (minute < 1080))
    counts = np.random.default_rng(9).poisson(60 * true)[None, :].astype(float)
    quantiles, _ = told(counts, ahead=13)
    rise = 720 + np.arange(4, 15)  # what is known before or as it begins, of 13 minutes later
    first, fourth = (
        (quantiles[day * DAY + rise - 13, 0, 0] / true[day * DAY + rise]).min() for day in (0, 3)
    )
    assert first < 0.6
    assert fourth > 0.7


def after(rate_rps: float, steps: int) -> ForecastMemory:
    counts = np.random.default_rng(10).poisson(5 * rate_rps, (1, 12 * steps)).astype(float)
    memory = forecast.fresh(1, SETTINGS)
    for k in range(12 * steps):
        memory = forecast.observe(memory, counts[:, k : k + 1], 5.0, 5.0 * (k + 1), SETTINGS)
    return memory


def test_a_burst_is_seen_within_ten_seconds() -> None:
    memory = after(10.0, 60)
    assert forecast.predict(memory, [30.0]).rate_rps.max() < 15
    for k in (1, 2):
        memory = forecast.observe(memory, np.array([[500.0]]), 5.0, 3600 + 5.0 * k, SETTINGS)
    assert forecast.predict(memory, [30.0, 180.0]).rate_rps.min() > 30


def test_a_steady_rate_gets_a_band_without_the_noise_of_its_counts() -> None:
    """60 requests a minute scatter by 13 %; their rate doesn't, and `queueing` adds the scatter."""
    memory = after(1.0, 400)
    rates = forecast.predict(memory, [60.0]).rate_rps[0, 0]
    assert rates[SETTINGS.levels.index(0.95)] < 1.25
    assert rates[0] == pytest.approx(1.0, abs=0.12)


def test_a_lost_coverage_is_said_and_the_recent_maximum_held() -> None:
    memory = after(10.0, 200)
    assert forecast.predict(memory, [60.0]).is_covered
    rate, k = 10.0, 0
    while forecast.predict(memory, [60.0]).is_covered and k < 25:
        k += 1
        rate *= 1.6
        memory = forecast.observe(
            memory, np.array([[60 * rate]]), 60.0, 12_000.0 + 60 * k, SETTINGS
        )
    lost = forecast.predict(memory, [60.0])
    assert not lost.is_covered
    assert "covered only" in lost.because
    assert (lost.rate_rps >= rate).all()


def test_demand_that_ends_ends_in_the_forecast() -> None:
    memory = after(10.0, 60)
    for k in range(60):
        memory = forecast.observe(memory, np.zeros((1, 1)), 60.0, 3660.0 + 60 * k, SETTINGS)
    assert forecast.predict(memory, [60.0]).rate_rps[0, 0, 0] < 0.1


def test_quantiles_rise_along_the_levels_from_the_first_moment() -> None:
    memory = forecast.fresh(2, SETTINGS)
    for k in range(40):
        assert (np.diff(forecast.predict(memory, [0, 60, 900]).rate_rps, axis=-1) >= 0).all()
        counts = np.array([[0.0, 1.0], [40.0, 90.0]])
        memory = forecast.observe(memory, counts, 30.0, 60.0 * (k + 1), SETTINGS)


def test_models_keep_their_past_when_others_come_and_go() -> None:
    memory = forecast.fresh(2, SETTINGS)
    for k in range(30):
        memory = forecast.observe(
            memory, np.array([[60.0], [600.0]]), 60.0, 60.0 * (k + 1), SETTINGS
        )
    before = forecast.predict(memory, [60.0]).rate_rps
    moved = forecast.reindexed(memory, ["a", "b"], ["b", "new", "a"])
    later = forecast.predict(moved, [60.0]).rate_rps
    assert later[[2, 0]] == pytest.approx(before)
    moved = forecast.observe(moved, np.full((3, 1), 60.0), 60.0, 1860.0, SETTINGS)
    assert np.isfinite(forecast.predict(moved, [60.0]).rate_rps).all()


def test_an_observation_leaves_the_memory_before_it_as_it_was() -> None:
    memory = after(10.0, 20)
    once = forecast.observe(memory, np.full((1, 12), 90.0), 5.0, 1260.0, SETTINGS)
    again = forecast.observe(memory, np.full((1, 12), 90.0), 5.0, 1260.0, SETTINGS)
    assert (
        forecast.predict(once, [60.0]).rate_rps == forecast.predict(again, [60.0]).rate_rps
    ).all()


@pytest.mark.skipif(not TRACES.is_dir(), reason="the traces are not here")
def test_real_traffic_is_covered_as_stated() -> None:
    path = TRACES / "azure-functions-per-minute.csv"
    counts = np.loadtxt(path, delimiter=",", skiprows=1)[:3_000, 1]
    quantiles, _ = told(counts[None, :])
    for k, level in enumerate(SETTINGS.levels):
        covered = float((counts[303:] / 60 <= quantiles[300:-3, 0, k]).mean())
        assert covered == pytest.approx(level, abs=0.02)
