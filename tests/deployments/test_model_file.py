"""Is every mistake in a model file found, and told with what would be right?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deployments.model import ModelFile, ModelFileError, parse_model_file, read_model_file

EXAMPLES = Path(__file__).parents[2] / "examples"

WHOLE: dict[str, Any] = {
    "name": "fraud",
    "slo": {"latency_p99_ms": 120, "attainment": 0.99},
    "traffic": {"3": 95, "4": 5},
    "sticky_header": "x-user",
    "scaling": {
        "replicas_min": 1,
        "replicas_max": 20,
        "on_demand_min": 1,
        "idle_to_zero_s": None,
    },
    "rollout": {"steps": [5, 25, 100], "interval_s": 30, "rollback_window_s": 600},
    "versions": {
        "3": {
            "runtime": "sklearn",
            "source": "models:/fraud/3",
            "resources": {"cpu": 1, "gpu": 0, "memory_mb": 500},
            "batching": {"batch_size_max": 32, "wait_max_ms": 5, "queue_requests_max": 100},
            "cache": {"entries_max": 10, "ttl_s": 3},
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 30]}],
            "outputs": [{"name": "score", "datatype": "FP32", "shape": [-1]}],
            "labels": ["stable"],
            "class_labels": ["good", "bad"],
            "options": {"file": "a.joblib"},
            "timeout_ms": 1000,
            "idempotent": False,
            "probe": False,
        },
        "4": {"runtime": "onnx", "source": "s3://bucket/fraud/4"},
        "5": {"runtime": "onnx", "source": "s3://bucket/fraud/5"},
    },
}


def a_file(**fields: Any) -> dict[str, Any]:
    """The smallest file that is right, with `fields` besides."""
    return {"name": "m", "versions": {"1": {"runtime": "onnx", "source": "a"}}, **fields}


def a_version(**fields: Any) -> dict[str, Any]:
    return a_file(versions={"1": {"runtime": "onnx", "source": "a", **fields}})


def problems(document: Any) -> list[str]:
    with pytest.raises(ModelFileError) as raised:
        parse_model_file(document)
    return raised.value.problems


def changed(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    document = copy.deepcopy(WHOLE)
    change(document)
    return document


def test_a_whole_file_is_read_as_it_stands() -> None:
    model = parse_model_file(WHOLE)
    assert model.traffic == {"3": 95, "4": 5}
    assert model.slo is not None
    assert model.slo.latency_p99_ms == 120
    version = model.versions["3"]
    assert version.inputs[0].shape == (-1, 30)
    assert version.cache is not None
    assert version.labels == ("stable",)
    assert not version.idempotent


def test_a_whole_file_survives_the_way_through_json() -> None:
    model = parse_model_file(WHOLE)
    assert parse_model_file(model.model_dump(mode="json")) == model


def test_version_names_may_be_written_as_numbers() -> None:
    text = "name: m\ntraffic: {3: 90, 4: 10}\nversions:\n"
    text += "".join(f"  {v}: {{runtime: onnx, source: a}}\n" for v in (3, 4))
    model = parse_model_file(yaml.safe_load(text))
    assert list(model.versions) == ["3", "4"]
    assert model.traffic == {"3": 90, "4": 10}


def test_without_traffic_the_last_version_gets_everything() -> None:
    versions = {v: {"runtime": "onnx", "source": "a"} for v in ("1", "3", "2")}
    assert parse_model_file(a_file(versions=versions)).traffic == {"2": 100}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d.update(nmae="x"), "nmae: unknown key; did you mean 'name'?"),
        (lambda d: d.update(zzz=1), "zzz: unknown key; known here: name, versions, traffic"),
        (lambda d: d["slo"].update(latency_ms=1), "slo.latency_ms: unknown key; did you mean"),
        (lambda d: d["scaling"].update(replica_min=1), "did you mean 'replicas_min'?"),
        (
            lambda d: d["rollout"].update(step=[1]),
            "rollout.step: unknown key; did you mean 'steps'",
        ),
        (lambda d: d["versions"]["3"].update(sources="a"), "versions.3.sources: unknown key; did"),
        (lambda d: d["versions"]["3"]["resources"].update(gpus=1), "did you mean 'gpu'?"),
        (lambda d: d["versions"]["3"]["batching"].update(wait_ms=1), "did you mean 'wait_max_ms'?"),
        (lambda d: d["versions"]["3"]["cache"].update(ttl=1), "did you mean 'ttl_s'?"),
        (
            lambda d: d["versions"]["3"]["inputs"][0].update(dtype="FP32"),
            "versions.3.inputs.0.dtype: unknown key; did you mean 'datatype'?",
        ),
    ],
)
def test_an_unknown_key_names_the_near_one(
    change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    (problem,) = problems(changed(change))
    assert expected in problem


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (a_file(name=""), "name"),
        (a_file(name="a b"), "'a b' must be 1 to 64 letters"),
        (a_file(name="a--b"), "'a--b'"),
        (a_file(name="a..b"), "'a..b'"),
        (a_file(name="-a"), "'-a'"),
        (a_file(name="a\n"), "must be 1 to 64 letters"),
        (a_file(name="x" * 65), "must be 1 to 64 letters"),
        (a_file(name=7), "name"),
        (a_file(name=None), "name"),
        (a_file(versions={}), "versions"),
        (a_file(versions=[]), "versions"),
        (a_file(versions={"a/b": {"runtime": "onnx", "source": "a"}}), "'a/b' must be"),
        (a_file(versions={"1": None}), "versions.1"),
        (a_file(versions={"1": "sklearn"}), "versions.1"),
        (a_file(traffic={"1": 99}), "traffic adds up to 99 percent; it must be 100"),
        (a_file(traffic={"2": 100}), "traffic names version '2'; the file has '1'"),
        (a_file(traffic={"1": 150}), "traffic.1"),
        (a_file(traffic={"1": -1}), "traffic.1"),
        (a_file(traffic={"1": 99.5}), "traffic.1"),
        (a_file(traffic=100), "traffic"),
        (a_version(probe="perhaps"), "versions.1.probe"),
        (a_file(slo={}), "slo.latency_p99_ms: is missing"),
        (a_file(slo={"latency_p99_ms": 0}), "slo.latency_p99_ms"),
        (a_file(slo={"latency_p99_ms": 1, "attainment": 1}), "slo.attainment"),
        (a_file(slo={"latency_p99_ms": float("nan")}), "slo.latency_p99_ms"),
        (a_file(slo={"latency_p99_ms": float("inf")}), "slo.latency_p99_ms"),
        (a_file(scaling={"replicas_min": -1}), "scaling.replicas_min"),
        (a_file(scaling={"replicas_max": 0}), "scaling.replicas_max"),
        (a_file(scaling={"replicas_min": 30}), "replicas_min is 30 but replicas_max is 20"),
        (a_file(scaling={"on_demand_min": -1}), "scaling.on_demand_min"),
        (a_file(scaling={"idle_to_zero_s": 0}), "scaling.idle_to_zero_s"),
        (a_file(rollout={"steps": [50, 5]}), "steps [50, 5] must rise"),
        (a_file(rollout={"steps": [0]}), "rollout.steps.0"),
        (a_file(rollout={"steps": [101]}), "rollout.steps.0"),
        (a_file(rollout={"interval_s": 0}), "rollout.interval_s"),
        (a_file(rollout={"rollback_window_s": -1}), "rollout.rollback_window_s"),
        (a_file(sticky_header="a b"), "sticky_header"),
        (a_file(sticky_header="x" * 65), "sticky_header"),
        (a_version(runtime="sklern"), "versions.1.runtime"),
        (a_version(source=""), "versions.1.source"),
        (a_version(source=3), "versions.1.source"),
        (a_version(resources={"cpu": -1}), "versions.1.resources.cpu"),
        (a_version(resources={"gpu": 65}), "versions.1.resources.gpu"),
        (a_version(resources={"memory_mb": -1}), "versions.1.resources.memory_mb"),
        (a_version(resources={"memory_mb": "much"}), "(is 'much')"),
        (a_version(batching={"batch_size_max": 0}), "versions.1.batching.batch_size_max"),
        (a_version(batching={"wait_max_ms": -1}), "versions.1.batching.wait_max_ms"),
        (a_version(batching={"queue_requests_max": 0}), "batching.queue_requests_max"),
        (a_version(cache={"entries_max": 0}), "versions.1.cache.entries_max"),
        (a_version(cache={"ttl_s": 0}), "versions.1.cache.ttl_s"),
        (a_version(inputs=[{"name": "x", "datatype": "FP31", "shape": [-1]}]), "(is 'FP31')"),
        (a_version(inputs=[{"name": "", "datatype": "FP32", "shape": []}]), "inputs.0.name"),
        (a_version(inputs=[{"name": "x", "datatype": "FP32", "shape": [-2]}]), "shape.0"),
        (a_version(inputs=[{"name": "x", "datatype": "FP32"}]), "inputs.0.shape: is missing"),
        (a_version(inputs=[{"name": "x", "datatype": "FP32", "shape": [2, 30]}]), "begin with -1"),
        (a_version(inputs=[{"name": "x", "datatype": "FP32", "shape": []}]), "begin with -1"),
        (
            a_version(outputs=[{"name": "x", "datatype": "FP32", "shape": [-1]}] * 2),
            "outputs: 'x' stands there twice",
        ),
        (a_version(labels=["a b"]), "label 'a b' must be"),
        (a_version(labels=["a", "a"]), "label 'a'"),
        (a_version(options=[]), "versions.1.options"),
        (a_version(timeout_ms=0), "versions.1.timeout_ms"),
        (a_version(timeout_ms=86_400_001), "versions.1.timeout_ms"),
        (a_version(idempotent="perhaps"), "versions.1.idempotent"),
        ({"versions": {"1": {"runtime": "onnx", "source": "a"}}}, "name: is missing"),
        ({"name": "m"}, "versions: is missing"),
        (a_file(versions={"1": {"source": "a"}}), "versions.1.runtime: is missing"),
        (None, "must be a mapping with name and versions, not nothing"),
        ([], "must be a mapping with name and versions, not a list"),
        ("fraud", "must be a mapping with name and versions, not a str"),
    ],
)
def test_a_bad_value_is_named_with_its_field(document: Any, expected: str) -> None:
    found = problems(document)
    assert any(expected in problem for problem in found), found


def test_a_label_on_two_versions_names_both() -> None:
    versions = {v: {"runtime": "onnx", "source": "a", "labels": ["stable"]} for v in ("1", "2")}
    (problem,) = problems(a_file(versions=versions))
    assert "label 'stable' is on versions '1' and '2'" in problem


def test_all_problems_are_found_at_once() -> None:
    document = a_file(scaling={"replicas_max": 0}, slo={"latency_p99": 1})
    assert len(problems(document)) == 3


def test_a_field_never_names_the_checkers_own_parts() -> None:
    for document in (
        a_file(traffic={"1": "x"}),
        a_file(versions={"1": {"runtime": "onnx"}}),
        a_version(resources={"cpus": 1}),
    ):
        for problem in problems(document):
            assert "function-" not in problem
            assert "[key]" not in problem


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*ModelFile.model_fields, "1", "runtime", "cpu"]) | st.integers(),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_anything_at_all_is_a_model_or_a_model_file_error(document: Any) -> None:
    try:
        parse_model_file(document)
    except ModelFileError as error:
        found = error.problems
        assert found


def test_the_digest_follows_what_a_replica_depends_on_and_nothing_else() -> None:
    one = parse_model_file(a_version()).versions["1"]
    assert parse_model_file(a_version(labels=["stable"])).versions["1"].digest == one.digest
    assert parse_model_file(a_version(options={"a": 1})).versions["1"].digest != one.digest
    assert len(one.digest) == 8


def test_relative_sources_are_found_beside_the_file(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(
        "name: m\n"
        "versions:\n"
        "  1: {runtime: onnx, source: weights/a.onnx}\n"
        "  2: {runtime: onnx, source: 's3://bucket/a'}\n"
        "  3: {runtime: onnx, source: 'package:fish'}\n"
        "  4: {runtime: onnx, source: /absolute/a.onnx}\n"
    )
    sources = [v.source for v in read_model_file(file).versions.values()]
    assert sources == [
        str(tmp_path / "weights/a.onnx"),
        "s3://bucket/a",
        "package:fish",
        "/absolute/a.onnx",
    ]


@pytest.mark.parametrize("text", ["name: [", "\tname: m", "name: m\nname: {", "a: !!python/none"])
def test_what_is_not_yaml_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(text)
    with pytest.raises(ModelFileError) as raised:
        read_model_file(file)
    assert str(raised.value).startswith(f"{file}:\n  is not YAML: ")


def test_bytes_that_are_no_text_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_bytes(b"name: \xff")
    with pytest.raises(ModelFileError, match=r"m\.yaml"):
        read_model_file(file)


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(
        "name: m\nversions:\n  1: {runtime: onnx, source: a}\n  1: {runtime: onnx, source: b}\n"
    )
    with pytest.raises(ModelFileError, match="twice"):
        read_model_file(file)


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda f: f.name)
def test_every_example_is_right(file: Path) -> None:
    assert read_model_file(file).name
