"""Do commands do what they say against a cluster that answers, and say why when it refuses?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from cluster.__main__ import app
from deployments.serving.http import HttpResponse
from tests.cluster.a_cluster import ACluster, Door, a_door

NOWHERE = "http://127.0.0.1:1"


@dataclass(frozen=True, slots=True)
class Done:
    """A command that ended: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def value(self) -> Any:
        """The one JSON value on standard output."""
        return json.loads(self.out)


def shoal(*words: str, url: str = "", key: str = "boss", stdin: str = "", **env: str) -> Done:
    """`shoal WORDS`, for the cluster at `url`."""
    variables: dict[str, str | None] = {"SHOAL_URL": url, "SHOAL_KEY": key, "COLUMNS": "200", **env}
    done = CliRunner().invoke(app, list(words), env=variables, input=stdin)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Done(done.exit_code, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    with a_door() as made:
        yield made


@pytest.fixture
def cluster(door: Door, tmp_path: Path) -> Iterator[ACluster]:
    with door.a_cluster(tmp_path) as made:
        yield made


def model_file(folder: Path, *versions: str, name: str = "fraud", **fields: Any) -> str:
    """A model file's path."""
    specs = {v: {"runtime": "sklearn", "source": f"package:weights/{v}"} for v in versions}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"name": name, "versions": specs, **fields}))
    return str(file)


def traffic(cluster: ACluster, name: str = "fraud") -> dict[str, int]:
    return dict(cluster.administration.file(name).traffic)


# help


def commands() -> Iterator[tuple[str, ...]]:
    """Every command by its words, groups too."""
    pending: list[tuple[tuple[str, ...], Any]] = [((), typer.main.get_command(app))]
    while pending:
        words, found = pending.pop()
        yield words
        inner = getattr(found, "commands", {})
        pending += [((*words, name), one) for name, one in inner.items()]


@pytest.mark.parametrize("words", sorted(commands()), ids=" ".join)
def test_every_command_explains_itself_and_takes_json_and_a_home(words: tuple[str, ...]) -> None:
    done = shoal(*words, "--help")
    assert done.code == 0
    usage, about = [line.strip() for line in done.out.splitlines() if line.strip()][:2]
    assert usage.lower().startswith("usage: ")
    assert len(about) > 10
    without_cluster = ("simulate",), ("what-if",), ("generate",)
    if words not in ((), ("keys",), ("demo",), *without_cluster):
        assert "--json" in done.out
        assert "--home" in done.out


def test_a_command_that_there_is_not_is_wrong_use() -> None:
    assert shoal("depoly").code == 2


# reaching a cluster


@pytest.mark.parametrize("words", [("models",), ("status",), ("keys", "list"), ("rollback", "m")])
def test_without_a_cluster_commands_say_how_to_get_one(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    done = shoal(*words, "--home", str(tmp_path), key="")
    assert (done.code, done.out) == (3, "")
    assert "start one with 'shoal up'" in done.err


def test_a_cluster_that_does_not_answer_is_named() -> None:
    done = shoal("models", "--json", url=NOWHERE)
    assert done.code == 3
    assert done.value["error"].startswith(f"no answer from {NOWHERE}: ")


@pytest.mark.parametrize("url", ["127.0.0.1:1", "ftp://x", "http://[", "http://a b", "nonsense"])
def test_a_url_that_can_not_be_is_no_cluster(url: str) -> None:
    done = shoal("models", url=url)
    assert done.code == 3
    assert url in done.err


@pytest.mark.parametrize(("key", "said"), [("nobody", "needs a key"), ("caller", "role admin")])
def test_a_key_without_the_right_is_told_so(cluster: ACluster, key: str, said: str) -> None:
    done = shoal("models", url=cluster.url, key=key)
    assert (done.code, done.out) == (4, "")
    assert said in done.err


def test_a_proxy_of_the_environment_is_not_asked_for_this_machines_cluster(tmp_path: Path) -> None:
    """Only a cluster by URL may be behind one."""
    (tmp_path / "cluster.json").write_text("{")
    done = shoal("models", "--home", str(tmp_path), HTTP_PROXY=NOWHERE)
    assert done.code == 1
    assert "cluster.json can't be read" in done.err


# deploy


def test_a_deploy_shows_the_plan_and_follows_it_to_the_urls(
    cluster: ACluster, tmp_path: Path
) -> None:
    cluster.polls_late = 1
    done = shoal("deploy", model_file(tmp_path, "1"), url=cluster.url)
    assert done.code == 0, done.err
    assert "+ add version 1 (sklearn from package:weights/1)" in done.out
    assert f"ready: {cluster.url}/v2/models/fraud/infer" in done.out
    assert traffic(cluster) == {"1": 100}


def test_with_json_a_deploy_prints_one_value_and_the_rest_elsewhere(
    cluster: ACluster, tmp_path: Path
) -> None:
    done = shoal("deploy", model_file(tmp_path, "1"), "--json", url=cluster.url)
    (result,) = done.value
    assert result["model"] == "fraud"
    assert result["status"]["versions"][0]["state"] == "ready"
    assert "add version 1" in done.err


def test_a_plan_changes_nothing(cluster: ACluster, tmp_path: Path) -> None:
    done = shoal("deploy", model_file(tmp_path, "1"), "--plan", "--json", url=cluster.url)
    assert [c["kind"] for c in done.value[0]["changes"]] == ["add", "traffic"]
    assert cluster.store.in_force() == {}


def test_a_deploy_that_is_not_waited_for_ends_at_once(cluster: ACluster, tmp_path: Path) -> None:
    cluster.states["1"] = ("starting", "")
    done = shoal("deploy", model_file(tmp_path, "1"), "--no-wait", url=cluster.url)
    assert done.code == 0
    assert traffic(cluster) == {"1": 100}


def test_a_version_that_fails_ends_the_deploy_with_its_reason(
    cluster: ACluster, tmp_path: Path
) -> None:
    cluster.states["2"] = ("failed", "no file [weights]")
    done = shoal("deploy", model_file(tmp_path, "1", "2"), url=cluster.url)
    assert done.code == 1
    assert "fraud: version 2: no file [weights]" in done.err
    assert "what served before goes on serving" in done.err


def test_with_json_a_failed_deploy_says_why_and_where_it_stands(
    cluster: ACluster, tmp_path: Path
) -> None:
    cluster.halted = "version 2 lost its replicas"
    done = shoal("deploy", model_file(tmp_path, "1"), "--json", url=cluster.url)
    assert done.code == 1
    assert "lost its replicas" in done.value["error"]
    assert done.value["models"][0]["status"]["halted"] == "version 2 lost its replicas"


def test_a_failure_of_the_time_before_the_deploy_is_not_taken_for_one_of_now(
    cluster: ACluster, tmp_path: Path
) -> None:
    cluster.states["1"] = ("failed", "the file was missing")
    cluster.polls_late = 1

    def mended() -> None:
        if cluster.polls_late < 1:
            cluster.states["1"] = ("ready", "")

    cluster.on_poll = mended
    done = shoal("deploy", model_file(tmp_path, "1"), url=cluster.url)
    assert done.code == 0, done.err


def test_a_deploy_that_takes_too_long_says_where_it_stands(
    cluster: ACluster, tmp_path: Path
) -> None:
    cluster.states["1"] = ("starting", "waits for room")
    words = ("deploy", model_file(tmp_path, "1"), "--timeout-s", "0")
    done = shoal(*words, url=cluster.url)
    assert done.code == 1
    assert "not done after 0 s: fraud: 1 starting 100 % (waits for room)" in done.err


def test_a_model_that_is_deleted_meanwhile_ends_the_deploy(
    cluster: ACluster, tmp_path: Path
) -> None:
    cluster.on_poll = lambda: cluster.store.append("fraud", "delete", None, "other", 0.0)
    done = shoal("deploy", model_file(tmp_path, "1"), url=cluster.url)
    assert (done.code, "fraud was deleted meanwhile" in done.err) == (1, True)


def test_something_newer_ends_the_waiting(cluster: ACluster, tmp_path: Path) -> None:
    file = model_file(tmp_path, "1")
    cluster.states["1"] = ("starting", "")

    def newer() -> None:
        document = cluster.store.in_force()["fraud"].document
        cluster.store.append("fraud", "deploy", document, "other", 0.0)

    cluster.on_poll = newer
    assert shoal("deploy", file, url=cluster.url).code == 0


def test_a_folder_is_deployed_file_by_file(cluster: ACluster, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    model_file(folder, "1")
    model_file(folder, "1", name="other")
    done = shoal("deploy", str(folder), "--json", url=cluster.url)
    assert [r["status"]["name"] for r in done.value] == ["fraud", "other"]


def test_two_files_of_one_model_are_refused_before_anything_is_done(
    cluster: ACluster, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    text = Path(model_file(folder, "1")).read_text()
    (folder / "again.yml").write_text(text)
    done = shoal("deploy", str(folder), url=cluster.url)
    assert done.code == 2
    assert "several files" in done.err
    assert "'fraud'" in done.err
    assert cluster.store.in_force() == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [", "is not YAML"),
        ("nmae: x", "did you mean 'name'?"),
        ("name: x\nversions: {}", "versions"),
        (b"\xff\xfe\x00", "is not YAML"),
    ],
)
def test_a_file_that_is_no_model_file_is_wrong_use(
    cluster: ACluster, tmp_path: Path, text: str | bytes, said: str
) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    done = shoal("deploy", str(file), url=cluster.url)
    assert (done.code, said in done.err, str(file) in done.err) == (2, True, True)


def test_a_target_that_is_not_there_or_holds_nothing_is_wrong_use(tmp_path: Path) -> None:
    assert "does not exist" in shoal("deploy", str(tmp_path / "x"), url=NOWHERE).err
    empty = shoal("deploy", str(tmp_path), url=NOWHERE)
    assert (empty.code, "holds no model files" in empty.err) == (2, True)


def test_a_file_that_is_a_folder_is_wrong_use(cluster: ACluster, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    (folder / "x.yaml").mkdir(parents=True)
    done = shoal("deploy", str(folder), url=cluster.url)
    assert (done.code, "x.yaml can't be read" in done.err) == (2, True)


# promote, rollback, delete


@pytest.fixture
def deployed(cluster: ACluster, tmp_path: Path) -> ACluster:
    """A cluster with model fraud, versions 1 and 2, all traffic on 1."""
    file = model_file(tmp_path, "1", "2", traffic={"1": 100})
    assert shoal("deploy", file, url=cluster.url).code == 0
    return cluster


def test_a_promotion_moves_traffic_and_shows_how_it_came_out(deployed: ACluster) -> None:
    words = ("promote", "fraud", "2", "--percent", "30", "--steps", "5, 50", "--interval-s", "2")
    done = shoal(*words, url=deployed.url)
    assert done.code == 0, done.err
    assert traffic(deployed) == {"1": 70, "2": 30}
    assert "→ traffic 1: 100 % → 1: 70 %, 2: 30 % (in steps of 5 %, 50 %, 2 s apart)" in done.out
    assert deployed.administration.file("fraud").rollout.steps == (5, 50)


def test_a_promotion_that_halts_ends_with_the_reason(deployed: ACluster) -> None:
    deployed.halted = "version 2 failed: no room"
    done = shoal("promote", "fraud", "2", "--json", url=deployed.url)
    assert done.code == 1
    assert done.value["error"] == "version 2 failed: no room"
    assert done.value["status"]["name"] == "fraud"


def test_a_promotion_to_a_version_that_has_failed_ends_with_the_reason(deployed: ACluster) -> None:
    deployed.states["2"] = ("failed", "no file")
    done = shoal("promote", "fraud", "2", url=deployed.url)
    assert (done.code, "version 2: no file" in done.err) == (1, True)


def test_a_failed_version_without_traffic_is_in_nobodys_way(deployed: ACluster) -> None:
    deployed.states["2"] = ("failed", "no file")
    assert shoal("promote", "fraud", "1", url=deployed.url).code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("3",), "version '3' is not one of '1', '2'"),
        (("2", "--steps", "5,x"), "--steps must be whole percents such as 5,25,50, not '5,x'"),
        (("2", "--steps", "50,5"), "must rise"),
        (("2", "--interval-s", "0"), "rollout.interval_s"),
        (("1", "--percent", "50"), "no other version has traffic"),
    ],
)
def test_a_promotion_that_can_not_be_is_wrong_use(
    deployed: ACluster, words: tuple[str, ...], said: str
) -> None:
    done = shoal("promote", "fraud", *words, url=deployed.url)
    assert (done.code, said in done.err) == (2, True), done.err


def test_a_rollback_goes_back_and_a_second_one_has_nowhere_to_go(deployed: ACluster) -> None:
    shoal("promote", "fraud", "2", url=deployed.url)
    done = shoal("rollback", "fraud", "--json", url=deployed.url)
    assert (done.code, done.value["model"]) == (0, "fraud")
    assert traffic(deployed) == {"1": 100}
    again = shoal("rollback", "fraud", url=deployed.url)
    assert (again.code, "has nothing to go back to" in again.err) == (1, True)


def test_a_deleted_model_is_gone(deployed: ACluster) -> None:
    assert "fraud is deleted" in shoal("delete", "fraud", url=deployed.url).out
    again = shoal("delete", "fraud", url=deployed.url)
    assert (again.code, "there is no model 'fraud'" in again.err) == (2, True)


def test_a_name_with_a_slash_is_a_name_and_no_path(deployed: ACluster) -> None:
    assert shoal("delete", "fraud/rollback", url=deployed.url).code != 0
    assert list(deployed.store.in_force()) == ["fraud"]


# what there is


def test_models_are_a_table_for_people_and_json_for_programs(deployed: ACluster) -> None:
    text = shoal("models", url=deployed.url).out
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["MODEL", "VERSION", "STATE", "TRAFFIC", "READY", "ANSWERED", "REASON"]
    assert rows[1] == ["fraud", "1", "ready", "100", "%", "1", "7"]
    assert [m["name"] for m in shoal("models", "--json", url=deployed.url).value] == ["fraud"]


def test_without_models_it_is_said_how_to_get_one(cluster: ACluster) -> None:
    assert shoal("models", url=cluster.url).out == "no models yet: shoal deploy FILE\n"


def test_the_status_shows_models_replicas_and_what_fails(
    deployed: ACluster, tmp_path: Path
) -> None:
    done = shoal("status", "--home", str(tmp_path), url=deployed.url)
    assert done.code == 0, done.err
    assert f"url        {deployed.url}" in done.out
    assert "shoal-desk" in done.out
    assert "failing: edge: it [refuses] :smile:" in done.out
    value = shoal("status", "--home", str(tmp_path), "--json", url=deployed.url).value
    assert value["url"] == deployed.url


def test_logs_are_shown_as_they_were_printed(deployed: ACluster) -> None:
    done = shoal("logs", "fraud", "-n", "2", "--version", "1", url=deployed.url)
    assert done.out.splitlines() == [
        "version 1 failed: no room",
        "r-1 fraud--1--ab ready",
        "  line [0]",
        "  line [1]",
    ]


# predict


@pytest.mark.parametrize(
    ("body", "path", "sent"),
    [
        ([[1, 2]], "/v1/models/fraud:predict", {"instances": [[1, 2]]}),
        ({"instances": [1]}, "/v1/models/fraud:predict", {"instances": [1]}),
        ({"inputs": {"x": [1]}}, "/v1/models/fraud:predict", {"inputs": {"x": [1]}}),
        ({"inputs": [{"name": "x"}]}, "/v2/models/fraud/infer", {"inputs": [{"name": "x"}]}),
        ({"prompt": "hi"}, "/v1/completions", {"prompt": "hi", "model": "fraud"}),
        ({"input": "hi"}, "/v1/embeddings", {"input": "hi", "model": "fraud"}),
        ({"messages": []}, "/v1/chat/completions", {"messages": [], "model": "fraud"}),
        ({"input": "hi", "model": "x"}, "/v1/embeddings", {"input": "hi", "model": "fraud"}),
        ({"path": "/v1/completions", "body": {"a": 1}}, "/v1/completions", {"a": 1}),
    ],
)
def test_a_body_goes_to_the_route_that_it_is_for(
    cluster: ACluster, body: Any, path: str, sent: Any
) -> None:
    done = shoal("predict", "fraud", "-d", json.dumps(body), "--json", url=cluster.url)
    assert (done.code, done.value) == (0, {"ok": True})
    assert cluster.asked == [(path, sent)]


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ([[1]], "/v1/models/fraud/versions/3:predict"),
        ({"inputs": []}, "/v2/models/fraud/versions/3/infer"),
        ({"input": "hi"}, "/v1/embeddings"),
    ],
)
def test_a_version_is_asked_in_the_routes_own_way(cluster: ACluster, body: Any, path: str) -> None:
    words = ("predict", "fraud", "-d", json.dumps(body), "--version", "3")
    assert shoal(*words, url=cluster.url).code == 0
    ((asked, sent),) = cluster.asked
    assert asked == path
    assert sent.get("model", "fraud@3") == "fraud@3"


def test_what_to_send_comes_from_a_file_or_from_standard_input(
    cluster: ACluster, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    file.write_text('[["é"]]', encoding="utf-8")
    shoal("predict", "m", str(file), url=cluster.url)
    shoal("predict", "m", "-", stdin="[[2]]", url=cluster.url)
    shoal("predict", "m", stdin="[[3]]", url=cluster.url)
    assert [sent["instances"] for _, sent in cluster.asked] == [[["é"]], [[2]], [[3]]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-d", "{"), "--data is not JSON"),
        (("-d", "5"), "send a list of rows or a JSON object"),
        (("-d", '{"prompt": "x", "stream": true}'), "leave 'stream' out"),
        (("-d", '{"path": "//elsewhere/x", "body": 1}'), "path must be one such as"),
        (("-d", '{"path": "http://elsewhere/x", "body": 1}'), "path must be one such as"),
        (("no.json",), "no.json can't be read"),
        (("no.json", "-d", "[]"), "give a file or --data, not both"),
    ],
)
def test_what_can_not_be_sent_is_wrong_use(words: tuple[str, ...], said: str) -> None:
    done = shoal("predict", "fraud", *words, url=NOWHERE)
    assert (done.code, said in done.err) == (2, True), done.err


def test_a_file_that_is_no_text_is_wrong_use(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    file.write_bytes(b"\xff\xfe")
    done = shoal("predict", "fraud", str(file), url=NOWHERE)
    assert (done.code, "x.bin is not JSON" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (HttpResponse(400, b'{"error": "bad [shape]"}'), 2, "bad [shape]"),
        (HttpResponse(404, b'{"error": {"message": "no such model"}}'), 2, "no such model"),
        (HttpResponse(429, b'{"error": {"code": 5}}'), 1, "{'code': 5}"),
        (HttpResponse(503, b"busy", b"text/plain"), 1, "HTTP 503: busy"),
        (HttpResponse(502, b"[]"), 1, "HTTP 502: []"),
        (HttpResponse(200, b"data: x", b"text/event-stream"), 1, "did not answer in JSON: data: x"),
    ],
)
def test_an_answer_that_is_none_is_said_in_the_clusters_words(
    cluster: ACluster, answer: HttpResponse, code: int, said: str
) -> None:
    cluster.answer = answer
    done = shoal("predict", "fraud", "-d", "[[1]]", url=cluster.url)
    assert (done.code, done.out) == (code, "")
    assert said in done.err


def test_numbers_that_are_none_are_the_clusters_to_judge(cluster: ACluster) -> None:
    assert shoal("predict", "fraud", "-d", "[[NaN]]", url=cluster.url).code == 0
    assert str(cluster.asked[0][1]) == "{'instances': [[nan]]}"


# keys


def test_a_key_is_printed_alone_so_that_a_script_can_keep_it(cluster: ACluster) -> None:
    done = shoal("keys", "create", "app", "--models", "a, b", "--rate-rps", "5", url=cluster.url)
    assert done.code == 0
    assert done.out.startswith("shoal_")
    assert done.out.count("\n") == 1
    (key,) = shoal("keys", "list", "--json", url=cluster.url).value
    assert (key["name"], key["models"], key["rate_rps"]) == ("app", ["a", "b"], 5)


@pytest.mark.parametrize("models", ["", ",", "a,,b", " "])
def test_naming_no_model_does_not_make_a_key_for_all_of_them(
    cluster: ACluster, models: str
) -> None:
    done = shoal("keys", "create", "app", "--models", models, url=cluster.url)
    assert (done.code, "--models must be names" in done.err) == (2, True)
    assert cluster.store.all_keys() == []


def test_a_key_that_can_not_be_is_wrong_use_and_a_taken_name_is_a_failure(
    cluster: ACluster,
) -> None:
    bad = shoal("keys", "create", "a b", url=cluster.url)
    assert (bad.code, "name 'a b' must be" in bad.err) == (2, True)
    assert shoal("keys", "create", "app", url=cluster.url).code == 0
    again = shoal("keys", "create", "app", "--json", url=cluster.url)
    assert (again.code, again.value["error"]) == (1, "name 'app' is taken by another key")


def test_a_key_is_rotated_listed_and_revoked(cluster: ACluster) -> None:
    shoal("keys", "create", "app", url=cluster.url)
    rotated = shoal("keys", "rotate", "app", "--overlap-s", "60", url=cluster.url)
    assert rotated.out.startswith("shoal_")
    assert "the old key of app goes on until 2" in rotated.out
    assert "2 valid" in shoal("keys", "list", url=cluster.url).out
    assert "app may not call any more" in shoal("keys", "revoke", "app", url=cluster.url).out
    assert "revoked" in shoal("keys", "list", url=cluster.url).out
    again = shoal("keys", "revoke", "app", url=cluster.url)
    assert (again.code, "there is no key 'app'" in again.err) == (2, True)


def test_the_last_admin_key_stays(cluster: ACluster) -> None:
    shoal("keys", "create", "boss", "--role", "admin", url=cluster.url)
    done = shoal("keys", "revoke", "boss", url=cluster.url)
    assert (done.code, "the last admin key" in done.err) == (1, True)


# the embedded cluster, as far as it goes without starting one


@pytest.mark.parametrize(
    ("text", "said"),
    [("prot: 1", "did you mean 'port'?"), ("port: x", "setting port must be a whole number")],
)
def test_settings_that_can_not_be_start_nothing(tmp_path: Path, text: str, said: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    home = tmp_path / "home"
    done = shoal("up", "--home", str(home), "--config", str(config), "--json")
    assert (done.code, said in done.value["error"]) == (2, True)
    assert not home.exists()


def test_ending_no_cluster_is_harmless(tmp_path: Path) -> None:
    done = shoal("down", "--home", str(tmp_path / "x"))
    assert (done.code, done.out) == (0, "no cluster was running\n")
    assert shoal("down", "--home", str(tmp_path), "--json").value == {"stopped": False}
