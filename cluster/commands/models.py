"""`shoal deploy`, `models`, `promote`, `rollback`, `delete`, `predict`, `logs`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from cluster.commands.terminal import (
    Exit,
    Failure,
    HomeOption,
    JsonOption,
    client,
    command,
    note,
    out,
    progress,
    show,
    table,
)

POLL_S = 0.3
quoted = partial(quote, safe="")
TimeoutOption = Annotated[float, typer.Option("--timeout-s", help="How long to follow.")]
_SIGNS = {"add": "+", "replace": "~", "stop": "-", "keep": "=", "traffic": "→", "setting": "~"}


@command
def deploy(
    target: Annotated[Path, typer.Argument(help="A model file, or a folder of them.")],
    is_plan: Annotated[bool, typer.Option("--plan", help="Only show what would change.")] = False,
    wait: Annotated[bool, typer.Option(help="Follow until it is done or has failed.")] = True,
    timeout_s: TimeoutOption = 900,
    home: HomeOption = None,
    is_json: JsonOption = False,
) -> None:
    """Put model files in force: shows the plan, then follows it to ready or to the reason."""
    from deployments.model import read_model_file

    models = [_read(file, read_model_file) for file in _files(target)]
    _check_distinct([model.name for model in models], target)
    reached = client(home)
    documents = {model.name: {"document": model.model_dump(mode="json")} for model in models}
    plans = [reached.admin("POST", "plan", document) for document in documents.values()]
    for plan in plans:
        _show_plan(plan, is_json)
    if is_plan:
        show(plans, is_json, lambda: None)
        return
    results = [
        reached.admin("PUT", f"models/{quoted(name)}", document)
        for name, document in documents.items()
    ]
    if not wait:
        show(results, is_json, lambda: None)
        return
    settled = _followed(reached, results, timeout_s, is_json)
    for result, status in zip(results, settled, strict=True):
        result["status"] = status
    failed = {m["name"]: reasons for m in settled if (reasons := _failures(m))}
    if failed:
        raise Failure(Exit.FAILED, _why(failed), {"models": results})
    show(results, is_json, lambda: _urls(reached, settled))


@command
def models(home: HomeOption = None, is_json: JsonOption = False) -> None:
    """The models, their versions, traffic and states."""
    value = client(home).admin("GET", "models")
    show(value, is_json, lambda: models_table(value))


@command
def promote(
    model: str,
    version: str,
    percent: Annotated[int, typer.Option(min=1, max=100, help="Its share of the traffic.")] = 100,
    steps: Annotated[str | None, typer.Option(help="Shares on the way, such as 5,25,50.")] = None,
    interval_s: Annotated[float | None, typer.Option(help="Seconds between steps.")] = None,
    timeout_s: TimeoutOption = 900,
    home: HomeOption = None,
    is_json: JsonOption = False,
) -> None:
    """Give a version a share of its model's traffic, at once or step by step."""
    body = {
        "version": version,
        "percent": percent,
        "steps": _steps(steps),
        "interval_s": interval_s,
    }
    _change(home, "POST", f"models/{quoted(model)}/promote", body, timeout_s, is_json)


@command
def rollback(
    model: str,
    timeout_s: TimeoutOption = 900,
    home: HomeOption = None,
    is_json: JsonOption = False,
) -> None:
    """Put what was in force before in force again, at once while its replicas still run."""
    _change(home, "POST", f"models/{quoted(model)}/rollback", {}, timeout_s, is_json)


@command
def delete(
    model: str,
    timeout_s: TimeoutOption = 120,
    home: HomeOption = None,
    is_json: JsonOption = False,
) -> None:
    """End a model: requests under way finish, replicas stop, memory comes back."""
    reached = client(home)
    answer = reached.admin("DELETE", f"models/{quoted(model)}")

    def is_gone() -> bool:
        status = reached.admin("GET", "status")
        leaving = [r["backend"] for r in status["leaving"]]
        known = [m["name"] for m in status["models"]]
        return model not in known and not any(b.startswith(f"{model}--") for b in leaving)

    with progress(f"stopping {model}"):
        _poll(is_gone, timeout_s, f"{model} is still there")
    show(answer, is_json, lambda: note(f"{model} is deleted"))


@command
def predict(
    model: str,
    file: Annotated[
        Path | None, typer.Argument(help="JSON to send; '-' or nothing = standard input.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="JSON to send.")] = None,
    version: Annotated[str | None, typer.Option(help="A version other than traffic's.")] = None,
    home: HomeOption = None,
    is_json: JsonOption = False,
) -> None:
    """Send one request: rows ([[…], …]), an Open Inference body, a prompt or chat messages."""
    body = _json_input(file, data)
    path, payload = _request(model, version, body)
    answer = client(home).send("POST", path, payload)
    show(answer, is_json, lambda: out.print_json(json.dumps(answer)))


@command
def logs(
    model: str,
    version: Annotated[str | None, typer.Option(help="Only this version.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Lines a replica.")] = 100,
    home: HomeOption = None,
    is_json: JsonOption = False,
) -> None:
    """What a model's replicas printed, and why versions failed."""
    query = f"?lines={lines}" + (f"&version={quoted(version)}" if version else "")
    value = client(home).admin("GET", f"models/{quoted(model)}/logs{query}")
    show(value, is_json, lambda: _show_logs(value))


def models_table(models: Sequence[dict[str, Any]]) -> None:
    """The models and their versions."""
    rows = [
        (m["name"], v["version"], v["state"], f"{v['percent']} %", _ready(m, v), v["requests"],
         v["reason"])
        for m in models
        for v in m["versions"]
    ]  # fmt: skip
    columns = ("MODEL", "VERSION", "STATE", "TRAFFIC", "READY", "ANSWERED", "REASON")
    table(columns, rows, "no models yet: shoal deploy FILE")


def _ready(model: dict[str, Any], version: dict[str, Any]) -> int:
    prefix = f"{model['name']}--{version['version']}--"
    return sum(r["state"] == "ready" and r["backend"].startswith(prefix) for r in model["replicas"])


def _files(target: Path) -> list[Path]:
    if not target.exists():
        raise Failure(Exit.USAGE, f"{target} does not exist")
    if target.is_file():
        return [target]
    files = sorted([*target.glob("*.yaml"), *target.glob("*.yml")])
    if not files:
        raise Failure(Exit.USAGE, f"{target} holds no model files (*.yaml)")
    return files


def _read(file: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(file)
    except OSError as error:
        raise Failure(Exit.USAGE, f"{file} can't be read: {error.strerror}") from None


def _check_distinct(names: Sequence[str], target: Path) -> None:
    for name in names:
        if names.count(name) > 1:
            raise Failure(Exit.USAGE, f"several files in {target} describe model {name!r}")


def _show_plan(answer: dict[str, Any], is_json: bool) -> None:
    note(f"{answer['model']}:", is_json)
    for line in answer["changes"]:
        detail = f" ({line['detail']})" if line["detail"] else ""
        note(f"  {_SIGNS[line['kind']]} {line['kind']} {line['what']}{detail}", is_json)


def _change(
    home: Path | None, method: str, path: str, body: Any, timeout_s: float, is_json: bool
) -> None:
    """Make a change to one model and follow it."""
    reached = client(home)
    answer = reached.admin(method, path, body)
    _show_plan(answer, is_json)
    (model,) = _followed(reached, [answer], timeout_s, is_json)
    answer["status"] = model
    if reasons := _failures(model, only_wanted=True):
        raise Failure(Exit.FAILED, "\n".join(reasons), answer)
    show(answer, is_json, lambda: models_table([model]))


def _followed(
    reached: Any, results: Sequence[dict[str, Any]], timeout_s: float, is_json: bool
) -> list[dict[str, Any]]:
    """The models once each is settled. Raises `Failure` when that takes too long."""
    rows = {r["model"]: r["row"] for r in results}
    deadline_s = time.monotonic() + timeout_s
    said = ""
    with progress("waiting for replicas") as tell:
        while True:
            by_name = {m["name"]: m for m in reached.admin("GET", "models")}
            if missing := [name for name in rows if name not in by_name]:
                raise Failure(Exit.FAILED, f"{missing[0]} was deleted meanwhile")
            models = [by_name[name] for name in rows]
            late = [m for m in models if not _is_settled(m, rows[m["name"]])]
            if not late:
                return models
            text = "; ".join(_stage(m) for m in late)
            if text != said:
                tell(said := text)
            if time.monotonic() > deadline_s:
                raise Failure(Exit.FAILED, f"not done after {timeout_s:g} s: {text}")
            time.sleep(POLL_S)


def _is_settled(model: dict[str, Any], row: int) -> bool:
    """Whether the change of history line `row` has come about, or something newer is in force."""
    if model["row"] != row:
        return bool(model["row"] > row)
    if not model["is_seen"]:  # what it says of its versions is from before the change
        return False
    starting = [v for v in model["versions"] if v["state"] == "starting"]
    return not starting and (model["is_settled"] or bool(_failures(model, only_wanted=True)))


def _stage(model: dict[str, Any]) -> str:
    parts = [
        f"{v['version']} {v['state']} {v['percent']} %"
        + (f" ({v['reason']})" if v["reason"] else "")
        for v in model["versions"]
    ]
    problem = f" (the controller fails: {model['problem']})" if model["problem"] else ""
    return f"{model['name']}: {', '.join(parts)}{problem}"


def _failures(model: dict[str, Any], *, only_wanted: bool = False) -> list[str]:
    """Why versions failed; `only_wanted`: those that are to have traffic."""
    wanted = model["wanted_traffic"]
    failed = [
        f"version {v['version']}: {v['reason']}"
        for v in model["versions"]
        if v["state"] == "failed" and (not only_wanted or wanted.get(v["version"]))
    ]
    return failed or ([model["halted"]] if model["halted"] else [])


def _why(failed: dict[str, list[str]]) -> str:
    lines = [f"{name}: {reason}" for name, reasons in failed.items() for reason in reasons]
    return "\n".join([*lines, "what served before goes on serving"])


def _urls(reached: Any, models: Sequence[dict[str, Any]]) -> None:
    models_table(models)
    for model in models:
        note(f"ready: {reached.url}/v2/models/{quoted(model['name'])}/infer")


def _steps(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise Failure(
            Exit.USAGE, f"--steps must be whole percents such as 5,25,50, not {text!r}"
        ) from None


def _poll(is_done: Callable[[], bool], timeout_s: float, late: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_done():
        if time.monotonic() > deadline_s:
            raise Failure(Exit.FAILED, f"{late} after {timeout_s:g} s")
        time.sleep(POLL_S)


def _json_input(file: Path | None, data: str | None) -> Any:
    if data is not None and file is not None:
        raise Failure(Exit.USAGE, "give a file or --data, not both")
    name = "--data" if data is not None else str(file or "standard input")
    try:
        if data is None:
            from_file = file is not None and str(file) != "-"
            data = file.read_text("utf-8") if file and from_file else sys.stdin.read()
        return json.loads(data)
    except OSError as error:
        raise Failure(Exit.USAGE, f"{name} can't be read: {error.strerror}") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise Failure(Exit.USAGE, f"{name} is not JSON: {error}") from None


def _request(model: str, version: str | None, body: Any) -> tuple[str, Any]:
    """The path and body that say what `body` seems to mean."""
    at = f"/versions/{quoted(version)}" if version else ""
    name = f"{model}@{version}" if version else model
    if isinstance(body, list):
        return f"/v1/models/{quoted(model)}{at}:predict", {"instances": body}
    if not isinstance(body, dict):
        raise Failure(Exit.USAGE, "send a list of rows or a JSON object")
    if {"path", "body"} <= body.keys():  # as in examples/requests
        return _checked_path(body["path"]), body["body"]
    if body.get("stream"):
        raise Failure(Exit.USAGE, "predict shows whole answers: leave 'stream' out")
    for field, path in (("messages", "chat/completions"), ("prompt", "completions"),
                        ("input", "embeddings")):  # fmt: skip
        if field in body:
            return f"/v1/{path}", {**body, "model": name}
    if "instances" in body or isinstance(body.get("inputs"), dict):
        return f"/v1/models/{quoted(model)}{at}:predict", body
    return f"/v2/models/{quoted(model)}{at}/infer", body


def _checked_path(path: Any) -> str:
    """A path of the cluster: the key goes nowhere else."""
    if not isinstance(path, str) or not path.startswith("/") or path.startswith("//"):
        raise Failure(Exit.USAGE, f"path must be one such as /v2/models/NAME/infer, not {path!r}")
    return path


def _show_logs(value: dict[str, Any]) -> None:
    for version, reason in value["reasons"].items():
        note(f"version {version} failed: {reason}")
    for replica in value["replicas"]:
        out.print(f"[bold]{replica['replica']}[/] {replica['backend']} {replica['state']}")
        for line in replica["lines"]:
            note(f"  {line}")
    if not value["replicas"] and not value["reasons"]:
        note("no replicas and no failures")
