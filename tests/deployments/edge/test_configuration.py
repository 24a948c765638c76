"""Is the configuration right, and does each step lead where a fresh start would?"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.edge import errors
from deployments.edge.configuration import (
    AddServer,
    Reload,
    RemoveServer,
    RoutingError,
    SetMap,
    changes,
    render,
)
from deployments.edge.process import Edge
from deployments.edge.routing import (
    EdgeSettings,
    KeyRoute,
    Listener,
    ModelRoute,
    Routing,
    Server,
    VersionRoute,
)
from tests.deployments.edge.conftest import (
    Lab,
    a_key,
    a_model,
    a_routing,
    a_server,
    a_version,
    hash_of,
)

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = EdgeSettings(http=Listener("127.0.0.1", 8000), token="edge-token")
CANARY = a_routing(
    a_model(
        a_version("3", a_server(30001, 40001), labels=("stable",)),
        a_version("4", a_server(30002), timeout_ms=500, idempotent=False),
        split={"3": 95, "4": 5},
        sticky_header="X-User",
    ),
    keys=(a_key("anna", "secret", models=("fraud",), rate_rps=10, concurrency_max=2),),
    desks=(a_server(30009, 40009, name="d1"),),
)


def test_the_text_is_the_one_that_was_agreed() -> None:
    """After a change that is meant, write `render(…).text` to the golden file and read the diff."""
    wide = replace(SETTINGS, metrics=Listener("127.0.0.1", 9101), grpc=Listener("::1", 9000))
    assert render(CANARY, wide).text == (GOLDEN / "canary.cfg").read_text()


def test_the_maps_say_who_answers_whom() -> None:
    maps = render(CANARY, SETTINGS).maps
    assert maps["models"] == {"fraud": "?x-user"}
    assert maps["versions"] == {"fraud@3": "fraud--3--aa", "fraud@4": "fraud--4--aa"}
    assert maps["labels"] == {"fraud@stable": "fraud--3--aa"}
    assert list(maps["slots"].values()) == ["fraud--3--aa"] * 95 + ["fraud--4--aa"] * 5
    assert maps["keys"] == {hash_of("secret").upper(): "anna"}
    assert maps["allowed"] == {"anna/fraud": "1"}
    assert (maps["rates"], maps["concurrencies"]) == ({"anna": "10"}, {"anna": "2"})


@given(st.lists(st.integers(0, 100), min_size=1, max_size=5))
def test_every_percent_has_its_slot(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), 100]
    percents = [b - a for a, b in pairwise(edges)]
    versions = [a_version(str(i)) for i in range(len(percents))]
    split = {str(i): p for i, p in enumerate(percents)}
    maps = render(a_routing(a_model(*versions, split=split)), SETTINGS).maps
    if 100 in percents:
        assert maps["models"] == {"fraud": f"fraud--{percents.index(100)}--aa"}
    else:
        expected = {f"fraud--{i}--aa": p for i, p in enumerate(percents) if p}
        assert Counter(maps["slots"].values()) == expected


V4 = a_version("4", a_server(1), a_server(2))
STEPS: list[tuple[str, Routing, Routing, object]] = [
    ("nothing", CANARY, CANARY, []),
    (
        "a replica comes",
        a_routing(a_model(a_version("4", a_server(1)))),
        a_routing(a_model(V4)),
        [(AddServer, "r2")],
    ),
    (
        "a replica goes",
        a_routing(a_model(V4)),
        a_routing(a_model(a_version("4", a_server(2)))),
        [(RemoveServer, "r1")],
    ),
    (
        "all go: scaled to zero",
        a_routing(a_model(V4)),
        a_routing(a_model(a_version("4"))),
        [(RemoveServer, "r1"), (RemoveServer, "r2")],
    ),
    (
        "the split moves",
        a_routing(a_model(a_version("3"), V4, split={"3": 100})),
        a_routing(a_model(a_version("3"), V4, split={"3": 90, "4": 10})),
        [(SetMap, "models"), (SetMap, "slots")],
    ),
    (
        "a key comes",
        a_routing(keys=(a_key(),)),
        a_routing(keys=(a_key(), a_key("ben", "b"))),
        [(SetMap, "keys"), (SetMap, "allowed")],
    ),
    ("a version comes", a_routing(), a_routing(a_model(V4)), "backend fraud--4--aa"),
    ("a version goes", a_routing(a_model(V4)), a_routing(), "no more: backend fraud--4--aa"),
    (
        "a desk comes",
        a_routing(),
        a_routing(desks=(a_server(9, name="d"),)),
        "server d 127.0.0.1:9",
    ),
    (
        "a replica moves",
        a_routing(a_model(a_version("4", a_server(1, name="r")))),
        a_routing(a_model(a_version("4", a_server(2, name="r")))),
        "server fraud--4--aa/r has another address",
    ),
]


@pytest.mark.parametrize(
    ("old", "new", "expected"), [s[1:] for s in STEPS], ids=[s[0] for s in STEPS]
)
def test_what_a_step_takes(old: Routing, new: Routing, expected: object) -> None:
    todo = changes(render(old, SETTINGS), render(new, SETTINGS))
    if isinstance(todo, Reload):
        assert isinstance(expected, str)
        assert todo.because.startswith(expected)
    else:
        assert [(type(c), c.name) for c in todo] == expected


REFUSED: list[tuple[dict[str, Any] | Routing, str]] = [
    (a_routing(a_model(a_version("4"), name="a b")), "model 'a b' must be"),
    (a_routing(a_model(a_version("4"), name="x\n  use_backend y")), "must be"),
    (a_routing(a_model(a_version("4/5"))), "version '4/5' must be"),
    (a_routing(a_model(a_version("4", labels=("a@b",)))), "label 'a@b' must be"),
    (a_routing(a_model(a_version("4"), split={"4": 90})), "adds up to 90; it must be 100"),
    (a_routing(a_model(a_version("4"), split={"5": 100})), "names '5'; it has ['4']"),
    (a_routing(a_model(a_version("4"), sticky_header="x y")), "sticky_header of model 'fraud'"),
    (a_routing(a_model(a_version("4", timeout_ms=0))), "timeout_ms of 'fraud--4--aa' is 0"),
    (a_routing(a_model(a_version("4", Server("r", "host;x", 1)))), "must be an IP address"),
    (a_routing(a_model(a_version("4", Server("r", "::1", 0)))), "must be 1 to 65535"),
    (a_routing(a_model(a_version("4")), a_model(a_version("5"))), "model 'fraud' occurs twice"),
    (a_routing(keys=(KeyRoute("a b", ()),)), "key id 'a b' must be"),
    (a_routing(keys=(KeyRoute("a", ("abc",)),)), "must be 64 hex digits"),
    (a_routing(keys=(KeyRoute("a", (), rate_rps=0),)), "rate_rps of key 'a' is 0"),
]


@pytest.mark.parametrize(("routing", "message"), REFUSED)
def test_what_can_not_be_rendered_says_what_would_be_right(routing: Routing, message: str) -> None:
    with pytest.raises(RoutingError) as caught:
        render(routing, SETTINGS)
    assert message in str(caught.value)


def test_every_text_of_an_error_is_json_in_its_form() -> None:
    heads, tails = errors.heads(), errors.tails()
    assert heads.keys() == tails.keys()
    assert heads["429/oip/rate"].startswith('{"error": "too many')
    assert all("\n" not in text for text in [*heads.values(), *tails.values()])
    assert set(errors.GRPC) == set(errors.TEXTS)


# --- any step from anywhere ---------------------------------------------------------------------

PERCENTS = st.sampled_from([{"1": 100}, {"2": 100}, {"1": 95, "2": 5}, {"1": 50, "2": 50}])


@st.composite
def versions(draw: st.DrawFn, model: str, version: str) -> VersionRoute:
    ports = draw(st.lists(st.sampled_from([1, 2, 3]), unique=True, max_size=3))
    servers = [Server(f"{model}-{version}-{p}", "127.0.0.1", p, p + 9) for p in ports]
    labels = draw(st.sampled_from([(), (f"l{version}",)]))
    return a_version(version, *servers, model=model, labels=labels)


@st.composite
def models(draw: st.DrawFn, name: str) -> ModelRoute:
    routes = [draw(versions(name, version)) for version in ("1", "2")]
    sticky = draw(st.sampled_from([None, None, None, "x-user"]))
    return a_model(*routes, split=draw(PERCENTS), name=name, sticky_header=sticky)


KEYS = st.lists(
    st.builds(
        KeyRoute,
        id=st.sampled_from(["anna", "ben", "root"]),
        hashes=st.just(()),
        models=st.sampled_from([(), ("fraud",), ("fraud", "chat")]),
        is_admin=st.booleans(),
        rate_rps=st.sampled_from([None, 1, 9]),
        concurrency_max=st.sampled_from([None, 1, 9]),
    ),
    unique_by=lambda key: key.id,
).map(lambda keys: tuple(replace(k, hashes=(hash_of(k.id), hash_of(k.id * 2))) for k in keys))

ROUTINGS = st.builds(
    Routing,
    models=st.one_of(
        st.tuples(models("fraud"), models("chat")),
        st.tuples(models("fraud"), models("chat")),
        st.tuples(models("fraud")),
    ),
    keys=KEYS,
    desks=st.sampled_from([(), (a_server(8, 9, name="d"),)]).filter(bool) | st.just(()),
)


@pytest.fixture(scope="module")
def running(shared_lab: Lab) -> Edge:
    return shared_lab.start(Routing())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(routing=ROUTINGS)
def test_any_step_leads_where_a_fresh_start_would(running: Edge, routing: Routing) -> None:
    """One HAProxy goes through all examples; after each it is asked what it has."""
    running.apply(routing)
    fresh = render(routing, running.settings)
    for name, entries in fresh.maps.items():
        assert running.runtime.map(name) == entries
    found = {(s.backend, s.name): s.address for s in running.runtime.servers() if s.is_replica}
    assert found == {key: line.split()[0] for key, line in fresh.servers.items()}
    assert (running.folder / "current/haproxy.cfg").read_text() == fresh.text
