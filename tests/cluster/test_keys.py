"""Is a key what its caller may do, and nothing longer than its time?"""

from __future__ import annotations

import re
from dataclasses import replace
from hashlib import sha256
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.access.keys import (
    LIMIT_MAX,
    Key,
    KeyHash,
    KeyRefused,
    checked,
    hash_of,
    new_secret,
    routes,
)

KEY = Key("00ff00ff00", "my-app")


def test_a_secret_is_new_each_time_and_is_found_by_its_plain_sha256() -> None:
    rng = Random(1)
    text, digest = new_secret("00ff00ff00", rng)
    assert re.fullmatch(r"shoal_00ff00ff00_[0-9a-f]{64}", text)
    assert digest == hash_of(text) == sha256(text.encode()).hexdigest()
    assert new_secret("00ff00ff00", rng) != (text, digest)


@pytest.mark.parametrize("name", ["a", "my-app", "team.x_y@host", "A" * 64])
def test_a_name_may_be_a_word_or_an_address(name: str) -> None:
    assert checked(replace(KEY, name=name)).name == name


@pytest.mark.parametrize("name", ["", "-a", "a b", "a\n", "A" * 65, "a/b", "é", "None\x00"])
def test_any_other_name_is_refused_with_what_would_be_right(name: str) -> None:
    with pytest.raises(KeyRefused, match="must be 1 to 64 letters, digits") as refused:
        checked(replace(KEY, name=name))
    assert repr(name) in str(refused.value)


def test_a_role_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    assert checked(replace(KEY, role="admin")).role == "admin"
    with pytest.raises(KeyRefused, match="role 'root' must be one of caller, admin"):
        checked(replace(KEY, role="root"))


@pytest.mark.parametrize("model", ["", "a b", "a\nb", "../a", "a/b", "*"])
def test_a_model_name_that_no_model_can_have_is_refused(model: str) -> None:
    """It would stand in the edge's maps, where one bad name stops every change of routes."""
    with pytest.raises(KeyRefused, match="models: "):
        checked(replace(KEY, models=("fraud", model)))


@pytest.mark.parametrize("field", ["rate_rps", "concurrency_max"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "10", LIMIT_MAX + 1, 10**30])
def test_a_limit_that_is_no_count_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(KeyRefused, match=f"{field} must be a whole number from 1 to"):
        checked(replace(KEY, **{field: value}))


@pytest.mark.parametrize("value", [None, 1, LIMIT_MAX])
def test_a_limit_may_be_any_count_or_none(value: int | None) -> None:
    key = replace(KEY, rate_rps=value, concurrency_max=value)
    assert checked(key) == key


def test_the_edge_gets_each_keys_rights_and_valid_hashes() -> None:
    admin = Key("b", "boss", "admin")
    app = Key("a", "app", models=("fraud",), rate_rps=5, concurrency_max=2)
    hashes = [KeyHash("22", "a", 0), KeyHash("11", "a", 0), KeyHash("33", "b", 0)]
    first, second = routes([admin, app], hashes, 10.0)
    assert (first.id, first.hashes, first.models) == ("a", ("11", "22"), ("fraud",))
    assert (first.is_admin, first.rate_rps, first.concurrency_max) == (False, 5, 2)
    assert (second.id, second.hashes, second.is_admin) == ("b", ("33",), True)


def test_both_secrets_of_a_rotated_key_are_valid_until_the_old_one_ends() -> None:
    hashes = [KeyHash("old", "a", 0, expires_s=100.0), KeyHash("new", "a", 50.0)]
    key = Key("a", "app")
    assert [r.hashes for r in routes([key], hashes, 99.9)] == [("new", "old")]
    assert [r.hashes for r in routes([key], hashes, 100.0)] == [("new",)]


def test_a_revoked_key_is_not_routed_whatever_its_hashes_say() -> None:
    key = Key("a", "app", revoked_s=5.0)
    assert routes([key], [KeyHash("11", "a", 0)], 10.0) == ()


def test_a_key_without_a_valid_hash_is_not_routed() -> None:
    assert routes([Key("a", "app")], [KeyHash("11", "a", 0, expires_s=9.0)], 10.0) == ()


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.none() | st.floats(0, 20)),
        max_size=10,
    ),
    st.sets(st.sampled_from("abc")),
    st.floats(0, 20),
)
def test_no_hash_is_routed_that_has_ended_or_belongs_to_a_revoked_key(
    secrets: list[tuple[str, float | None]], revoked: set[str], now_s: float
) -> None:
    keys = [Key(k, k, revoked_s=1.0 if k in revoked else None) for k in "abc"]
    hashes = [KeyHash(f"{n}", k, 0, expires_s=end) for n, (k, end) in enumerate(secrets)]
    routed = {digest: r.id for r in routes(keys, hashes, now_s) for digest in r.hashes}
    assert routed == {
        h.sha256: h.key_id
        for h in hashes
        if h.key_id not in revoked and (h.expires_s is None or h.expires_s > now_s)
    }
