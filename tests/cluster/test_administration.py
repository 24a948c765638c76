"""Does each action do what an operator asks, refuse what can't be, and leave a line of audit?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.access.keys import hash_of, routes
from cluster.administration import Administration, Refused, shared
from cluster.store import Store
from deployments.inference import Fault
from tests.cluster.timeline import a_file


class Desk:
    """The actions over a store in memory, at a time that the test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.store = Store("sqlite://")
        self.administration = Administration(self.store, lambda: self.now_s)

    def do(self, action: str, **arguments: Any) -> Any:
        self.now_s += 1
        value = getattr(self.administration, action)(arguments, "boss")
        json.dumps(value)  # the admin API sends it
        return value

    def refusal(self, action: str, **arguments: Any) -> tuple[Fault, str]:
        before = self.state()
        with pytest.raises(Refused) as refused:
            self.do(action, **arguments)
        assert self.state() == before, "a refused action changed something"
        return refused.value.fault, refused.value.message

    def deploy(self, **fields: Any) -> Any:
        file = a_file(**fields)
        return self.do("deploy", name=file.name, document=file.model_dump(mode="json"))

    def traffic(self, name: str = "fraud") -> Mapping[str, int]:
        return self.administration.file(name).traffic

    def audit(self) -> list[tuple[str, str, str]]:
        return [(a["actor"], a["action"], a["target"]) for a in reversed(self.store.audit())]

    def state(self) -> Any:
        store = self.store
        return store.in_force(), store.all_keys(), store.key_hashes(), store.audit()


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.store.close()


# models


def test_a_deploy_puts_the_document_in_force_and_tells_what_changes(desk: Desk) -> None:
    answer = desk.deploy(versions=("1",))
    assert answer["model"] == "fraud"
    assert [c["kind"] for c in answer["changes"]] == ["add", "traffic"]
    assert desk.store.in_force()["fraud"].id == answer["row"]
    assert desk.audit() == [("boss", "deploy", "fraud")]


def test_a_plan_tells_the_same_and_changes_nothing(desk: Desk) -> None:
    document = a_file(("1",)).model_dump(mode="json")
    before = desk.state()
    planned = desk.do("plan", document=document)
    assert desk.state() == before
    assert planned["changes"] == desk.do("deploy", name="fraud", document=document)["changes"]


@pytest.mark.parametrize("action", ["plan", "deploy"])
@pytest.mark.parametrize(
    ("document", "said"),
    [
        (None, "must be a mapping with name and versions, not nothing"),
        ([1], "must be a mapping"),
        ({}, "name: is missing"),
        ({"name": "fraud", "versoins": {}}, "did you mean 'versions'?"),
        ({"name": "fraud", "versions": {"1": {"runtime": "sklearn"}}}, "source: is missing"),
    ],
)
def test_a_document_that_is_no_model_file_is_refused_in_its_words(
    desk: Desk, action: str, document: Any, said: str
) -> None:
    fault, text = desk.refusal(action, name="fraud", document=document)
    assert fault is Fault.INVALID
    assert said in text


def test_a_deploy_under_another_name_is_refused(desk: Desk) -> None:
    document = a_file(("1",)).model_dump(mode="json")
    assert desk.refusal("deploy", name="other", document=document) == (
        Fault.INVALID,
        "the document's name 'fraud' must be the path's 'other'",
    )


@pytest.mark.parametrize("action", ["promote", "rollback", "delete"])
@pytest.mark.parametrize("arguments", [{}, {"name": "nobody"}, {"name": 5}])
def test_a_model_that_is_not_there_is_not_found(
    desk: Desk, action: str, arguments: dict[str, Any]
) -> None:
    fault, text = desk.refusal(action, **arguments)
    assert fault is Fault.NOT_FOUND
    assert "there is no model" in text


def test_a_promotion_gives_a_version_all_the_traffic_unless_it_says_how_much(desk: Desk) -> None:
    desk.deploy(versions=("1", "2"), traffic={"1": 100})
    desk.do("promote", name="fraud", version="2", percent=30)
    assert desk.traffic() == {"1": 70, "2": 30}
    answer = desk.do("promote", name="fraud", version=2)
    assert desk.traffic() == {"2": 100}
    assert answer["changes"][-1]["what"] == "1: 70 %, 2: 30 % → 2: 100 %"
    assert desk.audit()[1:] == [("boss", "promote", "fraud")] * 2


def test_a_promotion_in_steps_keeps_them_with_the_model(desk: Desk) -> None:
    desk.deploy(versions=("1", "2"), traffic={"1": 100}, rollout={"interval_s": 9})
    desk.do("promote", name="fraud", version="2", steps=[5, 50])
    rollout = desk.administration.file("fraud").rollout
    assert (rollout.steps, rollout.interval_s) == ((5, 50), 9)
    desk.do("promote", name="fraud", version="1", interval_s=2, steps=None)
    rollout = desk.administration.file("fraud").rollout
    assert (rollout.steps, rollout.interval_s) == ((), 2)


@pytest.mark.parametrize(
    ("arguments", "fault", "said"),
    [
        ({}, Fault.NOT_FOUND, "version '' is not one of '1', '2'"),
        ({"version": "3"}, Fault.NOT_FOUND, "version '3' is not one of '1', '2'"),
        ({"version": "2", "percent": 0}, Fault.INVALID, "percent must be a whole number from 1"),
        ({"version": "2", "percent": 101}, Fault.INVALID, "to 100, not 101"),
        ({"version": "2", "percent": 2.5}, Fault.INVALID, "not 2.5"),
        ({"version": "2", "percent": True}, Fault.INVALID, "not True"),
        ({"version": "2", "percent": "half"}, Fault.INVALID, "not 'half'"),
        ({"version": "2", "percent": None}, Fault.INVALID, "not None"),
        ({"version": "2", "percent": 1e400}, Fault.INVALID, "not inf"),
        ({"version": "2", "steps": [50, 5]}, Fault.INVALID, "must rise"),
        ({"version": "2", "steps": "5,50"}, Fault.INVALID, "rollout.steps"),
        ({"version": "2", "steps": [0]}, Fault.INVALID, "rollout.steps"),
        ({"version": "2", "interval_s": 0}, Fault.INVALID, "rollout.interval_s"),
        ({"version": "2", "interval_s": "soon"}, Fault.INVALID, "rollout.interval_s"),
        ({"version": "1", "percent": 50}, Fault.INVALID, "no other version has traffic"),
    ],
)
def test_a_promotion_that_can_not_be_is_refused(
    desk: Desk, arguments: dict[str, Any], fault: Fault, said: str
) -> None:
    desk.deploy(versions=("1", "2"), traffic={"1": 100})
    found, text = desk.refusal("promote", name="fraud", **arguments)
    assert found is fault
    assert said in text


def test_a_rollback_puts_what_was_before_in_force(desk: Desk) -> None:
    desk.deploy(versions=("1",))
    desk.deploy(versions=("1", "2"), traffic={"2": 100})
    answer = desk.do("rollback", name="fraud")
    assert desk.traffic() == {"1": 100}
    assert [c["kind"] for c in answer["changes"]] == ["keep", "stop", "traffic"]
    assert answer["row"] == desk.store.in_force()["fraud"].id
    assert desk.audit()[-1] == ("boss", "rollback", "fraud")


def test_a_rollback_with_nothing_before_is_a_conflict(desk: Desk) -> None:
    desk.deploy(versions=("1",))
    assert desk.refusal("rollback", name="fraud") == (
        Fault.CONFLICT,
        "model 'fraud' has nothing to go back to",
    )


def test_a_deleted_model_is_gone_until_it_is_deployed_again(desk: Desk) -> None:
    desk.deploy(versions=("1",))
    assert desk.do("delete", name="fraud")["model"] == "fraud"
    assert desk.refusal("delete", name="fraud")[0] is Fault.NOT_FOUND
    assert desk.audit()[-1] == ("boss", "delete", "fraud")
    desk.deploy(versions=("1",))
    assert desk.traffic() == {"1": 100}


# keys


def valid(desk: Desk) -> set[str]:
    """The hashes that the edge takes now."""
    hashes = desk.store.key_hashes()
    return {h for r in routes(desk.store.all_keys(), hashes, desk.now_s) for h in r.hashes}


def test_a_new_key_is_shown_once_and_only_its_hash_is_kept(desk: Desk) -> None:
    made = desk.do("key_create", name="app", models=["fraud"], rate_rps=5, concurrency_max=2)
    assert valid(desk) == {hash_of(made["key"])}
    (listed,) = desk.do("keys")
    assert listed["secrets"] == 1
    assert {k: listed[k] for k in ("name", "role", "models", "rate_rps", "concurrency_max")} == {
        "name": "app", "role": "caller", "models": ["fraud"], "rate_rps": 5, "concurrency_max": 2,
    }  # fmt: skip
    assert made["key"] not in json.dumps([listed, desk.store.audit()])
    assert desk.audit() == [("boss", "key create", "app")]


def test_a_key_for_everything_is_made_by_its_name_alone(desk: Desk) -> None:
    made = desk.do("key_create", name="app", role=None, models=None, rate_rps=None)
    assert (made["role"], made["models"], made["rate_rps"]) == ("caller", [], None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "name '' must be"),
        ({"name": None}, "name '' must be"),
        ({"name": 5}, "name must be text, not 5"),
        ({"name": "a b"}, "name 'a b' must be"),
        ({"name": "a", "role": "root"}, "role 'root' must be one of caller, admin"),
        ({"name": "a", "role": 1}, "role must be text, not 1"),
        ({"name": "a", "models": "fraud"}, "models must be a list of names, not 'fraud'"),
        ({"name": "a", "models": 0}, "models must be a list of names, not 0"),
        ({"name": "a", "models": [1]}, "models must be a list of names, not [1]"),
        ({"name": "a", "models": ["a\nb"]}, "models: 'a\\nb' can't be a model's name"),
        ({"name": "a", "rate_rps": 0}, "rate_rps must be a whole number from 1"),
        ({"name": "a", "rate_rps": 10**30}, "rate_rps must be a whole number from 1"),
        ({"name": "a", "concurrency_max": "2"}, "concurrency_max must be a whole number from 1"),
    ],
)
def test_a_key_that_can_not_be_is_refused_by_its_field(
    desk: Desk, arguments: dict[str, Any], said: str
) -> None:
    fault, text = desk.refusal("key_create", **arguments)
    assert fault is Fault.INVALID
    assert said in text


def test_a_name_that_another_key_has_is_a_conflict(desk: Desk) -> None:
    desk.do("key_create", name="app")
    fault, text = desk.refusal("key_create", name="app")
    assert (fault, text) == (Fault.CONFLICT, "name 'app' is taken by another key")


def test_a_rotated_key_has_two_secrets_for_the_overlap_and_then_one(desk: Desk) -> None:
    old = hash_of(desk.do("key_create", name="app")["key"])
    answer = desk.do("key_rotate", key="app", overlap_s=10)
    new = hash_of(answer["key"])
    assert answer["old_until_s"] == desk.now_s + 10
    assert (valid(desk), desk.do("keys")[0]["secrets"]) == ({old, new}, 2)
    desk.now_s += 10
    assert (valid(desk), desk.do("keys")[0]["secrets"]) == ({new}, 1)
    assert desk.audit()[-1] == ("boss", "key rotate", "app")


def test_a_key_is_found_by_its_id_too_and_an_old_secret_lives_an_hour(desk: Desk) -> None:
    made = desk.do("key_create", name="app")
    assert desk.do("key_rotate", key=made["id"])["old_until_s"] == desk.now_s + 3600


@pytest.mark.parametrize("overlap_s", [-1, "soon", True, None, 1e12, float("nan")])
def test_an_overlap_that_is_no_time_is_refused(desk: Desk, overlap_s: Any) -> None:
    desk.do("key_create", name="app")
    fault, text = desk.refusal("key_rotate", key="app", overlap_s=overlap_s)
    assert fault is Fault.INVALID
    assert "overlap_s must be a number from 0 to 2.592e+06" in text


def test_a_revoked_key_is_worth_nothing_at_once_and_is_not_found_any_more(desk: Desk) -> None:
    desk.do("key_create", name="app")
    desk.do("key_revoke", key="app")
    assert valid(desk) == set()
    assert desk.audit()[-1] == ("boss", "key revoke", "app")
    for action in ("key_revoke", "key_rotate"):
        assert desk.refusal(action, key="app") == (
            Fault.NOT_FOUND,
            "there is no key 'app' (shoal keys list shows them)",
        )


def test_the_last_admin_key_can_not_be_revoked(desk: Desk) -> None:
    desk.do("key_create", name="boss", role="admin")
    desk.do("key_create", name="app")
    fault, text = desk.refusal("key_revoke", key="boss")
    assert (fault, text) == (Fault.CONFLICT, "'boss' is the last admin key; create one first")
    desk.do("key_create", name="next", role="admin")
    desk.do("key_revoke", key="boss")
    assert desk.refusal("key_revoke", key="next")[0] is Fault.CONFLICT


# audit


def test_audit_tells_who_did_what_to_which_with_the_newest_first(desk: Desk) -> None:
    desk.deploy(versions=("1",))
    desk.do("key_create", name="app")
    newest, oldest = desk.do("audit")
    assert (newest["action"], oldest["action"]) == ("key create", "deploy")
    assert json.loads(oldest["detail"]) == {"row": 1, "traffic": {"1": 100}}
    assert len(desk.do("audit", limit="1")) == 1


@pytest.mark.parametrize("limit", ["many", 0, 10_001, 1.5, [], "9" * 5000])
def test_a_limit_that_is_no_count_is_refused(desk: Desk, limit: Any) -> None:
    fault, text = desk.refusal("audit", limit=limit)
    assert fault is Fault.INVALID
    assert "limit must be a whole number from 1 to 10000" in text


# shares


@given(
    st.dictionaries(st.sampled_from("123456"), st.integers(0, 100), min_size=1),
    st.sampled_from("1234567"),
    st.integers(1, 100),
)
def test_shares_always_add_up_and_are_never_negative(
    weights: dict[str, int], version: str, percent: int
) -> None:
    traffic = whole(weights)
    shares = shared(traffic, version, percent)
    assert sum(shares.values()) == 100
    assert all(share > 0 for share in shares.values())
    assert set(shares) <= {*traffic, version}
    others = sum(p for v, p in traffic.items() if v != version)
    assert shares[version] == (percent if others else 100)


@given(
    st.dictionaries(st.sampled_from("12345"), st.integers(1, 100), min_size=1),
    st.integers(1, 99),
)
def test_the_others_keep_their_proportions_but_for_rounding(
    weights: dict[str, int], percent: int
) -> None:
    traffic = whole(weights)
    shares = shared(traffic, "new", percent)
    for version, before in traffic.items():
        fair = before * (100 - percent) / 100
        assert abs(shares.get(version, 0) - fair) < len(traffic)


def whole(weights: Mapping[str, int]) -> dict[str, int]:
    """Traffic that adds up to 100 in about these proportions."""
    total = sum(weights.values())
    if not total:
        return {next(iter(weights)): 100}
    shares = {v: w * 100 // total for v, w in weights.items()}
    first = next(iter(shares))
    return {**shares, first: shares[first] + 100 - sum(shares.values())}
