"""Does a replay repeat what was decided, and show what a change would have done?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoscaler.__main__ import main
from autoscaler.journal import JournalError, Recorded, Writer, read_journal
from autoscaler.policy import Settings, Shoal
from autoscaler.simulation import simulate
from autoscaler.what_if import (
    Amount,
    ChangeError,
    Changes,
    Replay,
    read_changes,
    read_settings,
    replay,
    replayed,
    report_text,
)
from tests.autoscaler.worlds import (
    ON_DEMAND,
    SPOT_A,
    a_machine,
    a_market,
    a_profile,
    a_small_world,
    requests_at,
)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Shoal decided in ten minutes of 30 requests/s, in a market with a gap."""
    world = a_small_world(
        profile=a_profile(a_machine(fixed_ms=200.0, spread=0.2)),
        market=a_market(a=[(0, 20), (250, 3), (450, 20)]),
        requests=requests_at(30.0),
    )
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    with path.open("w", encoding="utf-8") as file:
        simulate(world, Recorded(Shoal(), Writer(file.write)))
    return path


def lines_of(journal: Path) -> list[str]:
    return journal.read_text(encoding="utf-8").splitlines()


def again(journal: Path, *words: str) -> Replay:
    return replay(journal, read_changes(words))


# --- replays


def test_a_replay_without_changes_repeats_the_journal_to_the_last_digit(journal: Path) -> None:
    result = again(journal)
    assert result.differing == 0
    assert len(result.moments) > 30
    for moment in result.moments:
        assert moment.now == moment.recorded


def test_the_prelude_is_replayed_but_not_counted(journal: Path) -> None:
    times = [line.snapshot.now_s for line in read_journal(lines_of(journal))]
    assert min(times) < 0
    assert [m.now_s for m in again(journal).moments] == [at for at in times if at >= 0]


def test_spot_nodes_that_cost_more_than_on_demand_are_not_taken(journal: Path) -> None:
    result = again(journal, "price.*/spot/*=x10")
    last = result.moments[-1]
    assert last.recorded.groups.get(SPOT_A, 0) > last.now.groups.get(SPOT_A, 0)
    assert last.now.groups.get(ON_DEMAND, 0) > last.recorded.groups.get(ON_DEMAND, 0)
    assert result.cost_usd("now") > result.cost_usd("recorded")


def test_more_traffic_wants_more_replicas(journal: Path) -> None:
    result = again(journal, "rate=x2")
    wanted = [(m.recorded.wanted["model"], m.now.wanted["model"]) for m in result.moments]
    assert all(now > was for was, now in wanted)
    assert result.cost_usd("now") > 1.3 * result.cost_usd("recorded")


def test_a_stricter_objective_never_costs_less(journal: Path) -> None:
    loose, strict = again(journal, "slo_ms=2000"), again(journal, "slo_ms=300")
    assert strict.cost_usd("now") > loose.cost_usd("now")


# --- changes


def test_changes_say_what_the_snapshot_would_have_been(journal: Path) -> None:
    line = next(read_journal(lines_of(journal)))
    words = ["price.*=2", "price.m/spot/a=x3", "slo_ms=x2", "attainment=0.9", "nodes_max=7"]
    edited = read_changes(words).edited(line.snapshot)
    before = line.snapshot
    assert edited.groups[ON_DEMAND].price_usd_h == 2.0
    assert edited.groups[SPOT_A].price_usd_h == 3 * before.groups[SPOT_A].price_usd_h
    assert edited.models[0].slo.latency_ms == 2 * before.models[0].slo.latency_ms
    assert edited.models[0].slo.attainment == 0.9
    assert edited.nodes_max == 7
    assert edited.nodes == before.nodes


def test_no_change_leaves_a_snapshot_as_it_is(journal: Path) -> None:
    for line in read_journal(lines_of(journal)):
        assert Changes().edited(line.snapshot) == line.snapshot


def test_settings_are_set_by_their_path() -> None:
    settings = Settings()
    set_now = read_settings(["interval_s=20", "demand.clear_s=30"])
    assert set_now == replace(
        settings, interval_s=20.0, demand=replace(settings.demand, clear_s=30.0)
    )


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("slo_ms", ["'slo_ms'", "KEY=VALUE"]),
        ("slo_ms=fast", ["slo_ms", "number", "'fast'"]),
        ("slo_ms=-5", ["slo_ms", "negative"]),
        ("slo=5", ["'slo'", "did you mean 'slo_ms'?"]),
        ("attainment=99", ["attainment", "(0, 1]"]),
        ("rate=5", ["rate", "x1.5"]),
        ("intervals=5", ["'intervals'", "did you mean 'interval_s'?"]),
        ("demand.clear=5", ["'demand.clear'", "did you mean 'clear_s'?"]),
        ("demand=5", ["demand", "several settings", "clear_s"]),
        ("interval_s.x=5", ["interval_s", "one value"]),
        ("scenarios=1.5", ["scenarios", "whole"]),
    ],
)
def test_a_wrong_change_says_what_would_be_right(word: str, parts: list[str]) -> None:
    with pytest.raises(ChangeError) as error:
        read_changes([word])
    for part in parts:
        assert part in str(error.value)


def test_a_price_of_no_group_names_the_near_one(journal: Path) -> None:
    with pytest.raises(
        ChangeError, match=r"price\.m/spot/b: no such group; did you mean 'm/spot/a'"
    ):
        again(journal, "price.m/spot/b=1")


def test_an_amount_is_a_number_or_a_factor() -> None:
    assert Amount(3.0).of(7.0) == 3.0
    assert Amount(3.0, is_factor=True).of(7.0) == 21.0


# --- journals


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no decisions"),
        ("{\n", "line 1: not JSON"),
        ('{"now_s": 1}\n', "line 1: holds neither"),
    ],
)
def test_what_is_no_journal_is_refused(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text(text)
    with pytest.raises(JournalError, match=r"j\.jsonl") as error:
        again(path)
    assert part in str(error.value)


def test_another_policys_journal_is_refused(journal: Path) -> None:
    lines = list(read_journal(lines_of(journal)))
    other = [replace(line, values={**line.values, "policy": "mark"}) for line in lines]
    with pytest.raises(JournalError, match="not 'mark'"):
        replayed(other, Changes())


# --- what is told


def test_the_text_sums_up_and_shows_where_decisions_part(journal: Path) -> None:
    text = report_text(again(journal, "rate=x2"), most=2)
    assert "decisions made again with rate=x2" in text
    assert text.count("    was  ") == text.count("    now  ") == 2
    assert "0 of them differ" in report_text(again(journal))


def test_the_command_prints_text_or_json(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["what-if", "--journal", str(journal), "--set", "rate=x2"]
    assert main(words) == 0
    assert "differ" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["differing"] == len(told["moments"]) > 0
    assert told["expected_cost_usd"]["now"] > told["expected_cost_usd"]["recorded"]
    assert main(["what-if", "--journal", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl: can't be read" in capsys.readouterr().err
