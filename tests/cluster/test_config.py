"""Do settings mean what they say, wherever they come from, and is a wrong one named?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import (
    ConfigError,
    Settings,
    client_settings,
    default_home,
    edge_settings,
    read_settings,
)
from deployments.edge.routing import Listener

HOME = {"SHOAL_HOME": "/srv/shoal"}


def read(
    document: Any = None,
    *,
    folder: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    **environment: str,
) -> Settings:
    """The settings of a file with `document`, of flags and of `SHOAL_…` variables."""
    file = None
    if folder is not None:
        file = folder / "cluster.yaml"
        file.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return read_settings(file, flags, {**HOME, **environment})


def refusal(**flags: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        read(flags=flags)
    return str(refused.value)


# where they come from


def test_without_any_word_the_defaults_hold() -> None:
    assert read() == Settings(home=Path("/srv/shoal"))


def test_flags_outdo_variables_which_outdo_the_file(tmp_path: Path) -> None:
    document = {"port": 1, "grpc_port": 2, "metrics_port": 3}
    settings = read(
        document, folder=tmp_path, SHOAL_GRPC_PORT="20", SHOAL_METRICS_PORT="30",
        flags={"metrics_port": 300, "cpus": None},
    )  # fmt: skip
    assert (settings.port, settings.grpc_port, settings.metrics_port) == (1, 20, 300)
    assert settings.cpus is None


def test_every_setting_can_be_a_variable() -> None:
    texts = {
        "home": "/elsewhere", "host": "127.0.0.9", "port": "1", "grpc_port": "2",
        "metrics_port": "3", "metrics_host": "127.0.0.8", "edge_metrics_port": "4",
        "tensorflow_port": "5", "https_port": "6", "tls_pem": __file__, "needs_key": "off",
        "cpus": "7", "gpus": "0", "object_store_mb": "100", "held_requests_max": "9",
        "drain_timeout_s": "1.5", "store": "sqlite://", "registry": "x", "retry_body_kb": "64",
        "edge_threads": "3",
    }  # fmt: skip
    variables = {f"SHOAL_{name.upper()}": text for name, text in texts.items()}
    settings = read_settings(environment=variables)
    assert {f.name for f in fields(Settings)} == set(texts)
    assert settings == Settings(
        Path("/elsewhere"), "127.0.0.9", port=1, grpc_port=2, metrics_port=3,
        metrics_host="127.0.0.8", edge_metrics_port=4, tensorflow_port=5, https_port=6,
        tls_pem=Path(__file__).resolve(), needs_key=False, cpus=7, gpus=0, object_store_mb=100,
        held_requests_max=9, drain_timeout_s=1.5, store="sqlite://", registry="x",
        retry_body_kb=64, edge_threads=3,
    )  # fmt: skip


def test_a_variable_set_to_nothing_is_not_set() -> None:
    assert read(SHOAL_PORT="", SHOAL_TLS_PEM="").port == 8000
    assert read_settings(environment={"SHOAL_HOME": ""}).home == Path.home() / ".shoal"


def test_the_home_is_a_users_own_folder_unless_somebody_says_otherwise() -> None:
    assert default_home({}) == Path.home() / ".shoal"
    assert default_home(HOME) == Path("/srv/shoal")
    assert read(flags={"home": "~/x"}).home == (Path.home() / "x").resolve()


def test_everything_of_a_cluster_lives_below_its_home() -> None:
    settings = read()
    assert settings.store_url == "sqlite:////srv/shoal/shoal.db"
    assert settings.registry_url == "sqlite:////srv/shoal/registry.db"
    assert read(SHOAL_STORE="postgresql://db/shoal").store_url == "postgresql://db/shoal"


def test_two_homes_never_share_rays_folder_and_sockets_fit_into_it() -> None:
    one, two = read(), read(SHOAL_HOME="/srv/other")
    assert one.ray_folder != two.ray_folder
    assert one.ray_folder == read().ray_folder
    assert len(str(one.ray_folder)) < 40


def test_small_models_share_cores_unless_cpus_are_set() -> None:
    assert read().logical_cpus() >= 16
    assert read(SHOAL_CPUS="3").logical_cpus() == 3


def test_commands_learn_of_another_cluster_from_two_variables() -> None:
    assert client_settings({"SHOAL_URL": "http://x", "SHOAL_KEY": "k"}) == ("http://x", "k")
    assert client_settings({}) == (None, None)


# what is refused


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("prot", "did you mean 'port'?"),
        ("held_request_max", "did you mean 'held_requests_max'?"),
        ("tls", "did you mean 'tls_pem'?"),
        ("zzzz", "known: home, host, port"),
        (8000, "known: home"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_near_one(
    tmp_path: Path, key: Any, hint: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        read({key: 1}, folder=tmp_path)
    assert f"unknown setting {key!r}" in str(refused.value)
    assert hint in str(refused.value)
    assert "cluster.yaml" in str(refused.value)


def test_a_variable_that_is_nearly_a_setting_is_refused_with_the_near_one() -> None:
    with pytest.raises(ConfigError, match="SHOAL_PROT; did you mean SHOAL_PORT"):
        read(SHOAL_PROT="80")


def test_variables_of_others_are_left_alone() -> None:
    others = {
        "SHOAL_URL": "u",
        "SHOAL_KEY": "k",
        "SHOAL_CLUSTER": "c",
        "SHOAL_XYZ": "",
        "PROT": "1",
    }
    assert read_settings(environment={**HOME, **others}) == read()


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("port", "http", "a whole number"),
        ("port", 80.5, "a whole number"),
        ("port", True, "a whole number"),
        ("port", float("inf"), "a whole number"),
        ("port", float("nan"), "a whole number"),
        ("port", [1], "a whole number"),
        ("cpus", "two", "a whole number"),
        ("drain_timeout_s", "long", "a number"),
        ("drain_timeout_s", True, "a number"),
        ("drain_timeout_s", {}, "a number"),
        ("needs_key", "maybe", "true or false"),
        ("needs_key", 2, "true or false"),
        ("host", 127, "text"),
        ("store", ["x"], "text"),
        ("home", 5, "a path"),
        ("home", "~nobody-of-that-name/x", "a path"),
        ("tls_pem", {"a": 1}, "a path"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_the_right_kind(
    name: str, value: Any, right: str
) -> None:
    assert refusal(**{name: value}) == f"setting {name} must be {right}, not {value!r}"


@pytest.mark.parametrize("name", ["host", "port", "needs_key", "drain_timeout_s", "store"])
def test_null_is_no_value_for_what_must_have_one(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"setting {name} must be .*, not None"):
        read({name: None}, folder=tmp_path)


@pytest.mark.parametrize("name", ["cpus", "gpus", "tensorflow_port", "https_port", "tls_pem"])
def test_null_says_nothing_where_nothing_is_possible(tmp_path: Path, name: str) -> None:
    assert getattr(read({name: None}, folder=tmp_path), name) is None


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("port", 65536, "a port from 0 to 65535"),
        ("https_port", -1, "a port from 0 to 65535"),
        ("cpus", 0, "from 1 to"),
        ("gpus", -1, "from 0 to"),
        ("object_store_mb", 10, "from 75 to"),
        ("held_requests_max", 0, "from 1 to"),
        ("drain_timeout_s", -1, "from 0 to"),
        ("drain_timeout_s", float("nan"), "from 0 to"),
        ("drain_timeout_s", float("inf"), "from 0 to"),
        ("retry_body_kb", 0, "from 1 to"),
        ("edge_threads", 0, "from 1 to 64"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_bounds(name: str, value: Any, right: str) -> None:
    text = refusal(**{name: value})
    assert text.startswith(f"setting {name} must be {right}")
    assert text.endswith(f"not {float(value) if name == 'drain_timeout_s' else value}")


@pytest.mark.parametrize("host", ["localhost", "::1", "", "256.0.0.1", "127.0.0.1:80"])
@pytest.mark.parametrize("name", ["host", "metrics_host"])
def test_a_host_that_nothing_can_bind_is_refused(name: str, host: str) -> None:
    assert refusal(**{name: host}) == (
        f"setting {name} must be an IPv4 address such as 127.0.0.1, not {host!r}"
    )


def test_two_listeners_can_not_have_one_port() -> None:
    assert refusal(port=8001) == (
        "settings port and grpc_port are both 8001; each needs a port of its own"
    )


def test_any_number_of_listeners_may_have_any_free_port() -> None:
    settings = read(flags={"port": 0, "grpc_port": 0, "metrics_port": 0, "tensorflow_port": 0})
    assert (settings.port, settings.tensorflow_port) == (0, 0)


def test_https_needs_a_certificate_that_is_there() -> None:
    assert refusal(https_port=8443) == (
        "setting https_port needs tls_pem: a file with certificate and key"
    )
    assert "which is not a file" in refusal(https_port=8443, tls_pem="/nowhere/cert.pem")
    assert read(flags={"https_port": 8443, "tls_pem": __file__}).https_port == 8443


@pytest.mark.parametrize("text", ["- a\n- b", "just text", "a: [", "\x00"])
def test_a_file_that_is_no_mapping_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.yaml: (must be a mapping|can't be read)"):
        read(text, folder=tmp_path)


def test_a_file_that_is_not_there_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: can't be read"):
        read_settings(tmp_path / "nothing.yaml", environment=HOME)


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert read("", folder=tmp_path) == read()


anything = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.just(1))
)


@given(st.sampled_from([f.name for f in fields(Settings)]), anything)
def test_whatever_a_setting_is_set_to_the_answer_is_settings_or_a_config_error(
    name: str, value: Any
) -> None:
    try:
        settings = read(flags={name: value})
    except ConfigError as error:
        assert name in str(error)  # noqa: PT017  # either outcome is right
    else:
        assert settings == read(flags={f.name: getattr(settings, f.name) for f in fields(Settings)})


# what the edge is told


def test_the_edge_listens_where_the_settings_say() -> None:
    flags = {"host": "127.0.0.2", "port": 80, "tensorflow_port": 8501, "retry_body_kb": 2}
    edge = edge_settings(read(flags=flags), "secret")
    assert edge.http == Listener("127.0.0.2", 80)
    assert edge.grpc == Listener("127.0.0.2", 8001)
    assert edge.tensorflow == Listener("127.0.0.2", 8501)
    assert (edge.https, edge.tls_pem, edge.token) == (None, None, "secret")
    assert edge.retry_body_bytes_max == 2048


def test_the_edges_own_figures_are_for_this_machine_only() -> None:
    metrics = edge_settings(read(flags={"host": "0.0.0.0"}), "secret").metrics
    assert metrics is not None
    assert metrics.host == "127.0.0.1"
