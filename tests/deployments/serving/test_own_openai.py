"""Does a model that answers OpenAI's routes itself get only what is its own, within its bound?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import orjson
import pytest

from deployments.inference import Fault, InferenceError, ModelStatus
from deployments.serving.application import Application
from deployments.serving.delegation import Receive, Send
from deployments.serving.own_openai import OwnOpenAI
from deployments.serving.protocols.openai import OPENAI_INFERENCE_PATHS, OpenAI
from tests.deployments.serving.engines import SingleCatalog, WordsEngine
from tests.deployments.serving.live import live


async def library(scope: Any, receive: Receive, send: Send) -> None:
    """What vLLM's app stands for here: it answers with the body that it got."""
    body = (await receive())["body"]
    assert dict(scope["headers"])[b"content-length"] == b"%d" % len(body)
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class LabelledCatalog(SingleCatalog):
    """The model's version is also called stable."""

    def models(self) -> list[ModelStatus]:
        (model,) = super().models()
        (version,) = model.versions
        return [replace(model, versions=(replace(version, labels=("stable",)),))]


@contextmanager
def served(places: int = 1) -> Iterator[httpx.Client]:
    engine = WordsEngine(version="2")
    catalog = LabelledCatalog(engine)

    @contextmanager
    def place() -> Iterator[None]:
        if not places:
            raise InferenceError(Fault.OVERLOADED, "all places are taken", retry_after_s=1)
        yield

    own = OwnOpenAI(catalog, engine, library, place)
    application = Application(
        catalog,
        engine,
        [OpenAI(catalog, engine)],
        ready=lambda: True,
        delegates=dict.fromkeys(OPENAI_INFERENCE_PATHS, own),
    )
    with live(application) as server, httpx.Client(base_url=server.url) as http:
        yield http


@pytest.mark.parametrize("model", ["words", "words@2", "words@stable"])
def test_the_model_hears_its_plain_name_whatever_the_caller_calls_it(model: str) -> None:
    with served() as http:
        for path in OPENAI_INFERENCE_PATHS:
            answer = http.post(path, json={"model": model, "prompt": "é", "n": 2})
            assert answer.json() == {"model": "words", "prompt": "é", "n": 2}


def test_the_edges_choice_decides_what_a_label_means() -> None:
    chosen = {"x-shoal-backend": "words--2--1a2b3c4d"}
    with served() as http:
        assert http.post("/v1/completions", json={"model": "words@new"}).status_code == 404
        answer = http.post("/v1/completions", json={"model": "words@new"}, headers=chosen)
        assert answer.json() == {"model": "words"}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "other"}, 404),
        ({"model": "words@3"}, 404),
        ({"model": 5}, 400),
        ({}, 400),
        ([], 400),
    ],
)
def test_what_is_not_its_own_is_refused_in_openais_form(body: Any, status: int) -> None:
    with served() as http:
        answer = http.post("/v1/chat/completions", content=orjson.dumps(body))
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_without_a_place_the_caller_is_told_to_come_back() -> None:
    with served(places=0) as http:
        answer = http.post("/v1/completions", json={"model": "words"})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["message"] == "all places are taken"
