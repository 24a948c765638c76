"""Does OpenAI's own client feel at home?"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.inference import (
    Engine,
    Fault,
    GenerationChunk,
    GenerationRequest,
    InferenceError,
    InferenceResponse,
    Signature,
    Tensor,
    Tensors,
    VersionState,
)
from deployments.serving.application import Application
from deployments.serving.http import Dialect
from deployments.serving.protocols import openai as openai_dialect
from deployments.serving.protocols.openai import OpenAI
from deployments.serving.protocols.openai_texts import StopScan
from deployments.serving.protocols.tfserving import TensorFlowServing
from tests.deployments.serving.engines import NumpyEngine, SingleCatalog, WordsEngine, sum_engine
from tests.deployments.serving.live import Live, eventually, live

POSTS = sorted(openai_dialect.OPENAI_INFERENCE_PATHS)


@contextmanager
def served(engine: Engine, catalog: SingleCatalog | None = None) -> Iterator[Live]:
    catalog = catalog or SingleCatalog(engine)
    dialects: list[Dialect] = [TensorFlowServing(catalog, engine), OpenAI(catalog, engine)]
    app = Application(catalog, engine, dialects, ready=lambda: True)
    with live(app) as server:
        yield server


@contextmanager
def client_of(engine: Engine, **options: Any) -> Iterator[openai.OpenAI]:
    with served(engine) as server, official(server, **options) as client:
        yield client


def official(server: Live, *, max_retries: int = 0, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=max_retries, **options
    )


@pytest.fixture(scope="module")
def words_server() -> Iterator[Live]:
    with served(WordsEngine()) as server:
        yield server


@pytest.fixture(scope="module")
def words(words_server: Live) -> Iterator[openai.OpenAI]:
    with official(words_server) as client:
        yield client


@pytest.fixture(scope="module")
def plain(words_server: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=words_server.url) as client:
        yield client


def says(text: str) -> Any:
    return [{"role": "user", "content": text}]


# Chat


def test_a_chat_answer_is_complete(words: openai.OpenAI) -> None:
    answer = words.chat.completions.create(model="words", messages=says("one two three"))
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "words"
    assert answer.created > 1_700_000_000
    assert len(answer.choices) == 1
    choice = answer.choices[0]
    assert (choice.index, choice.finish_reason) == (0, "stop")
    assert (choice.message.role, choice.message.content) == ("assistant", "ONE TWO THREE")
    assert answer.usage is not None
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
    }


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_text_that_was_cut_short_says_length(words: openai.OpenAI, field: str) -> None:
    limit: Any = {field: 2}
    answer = words.chat.completions.create(model="words", messages=says("one two three"), **limit)
    assert answer.choices[0].message.content == "ONE TWO"
    assert answer.choices[0].finish_reason == "length"


def test_several_choices_are_generated_side_by_side(words: openai.OpenAI) -> None:
    answer = words.chat.completions.create(model="words", messages=says("one two"), n=3)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert [c.message.content for c in answer.choices] == ["ONE TWO"] * 3
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 6)


def test_content_in_parts_and_sampling_options_reach_the_model() -> None:
    engine = WordsEngine()
    with client_of(engine) as client:
        parts: Any = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
        messages: Any = [
            {"role": "system", "content": "be brief"},
            {"role": "assistant", "content": None},
            {"role": "user", "content": parts},
        ]
        answer = client.chat.completions.create(
            model="words",
            messages=messages,
            temperature=0.5,
            top_p=1,
            seed=7,
            stop="never",
            user="ignored",
            tools=[],
            response_format={"type": "text"},
            timeout=5,
        )
        assert answer.choices[0].message.content == "ONE TWO"
    request = engine.requests[0]
    assert request.options == {"temperature": 0.5, "top_p": 1, "seed": 7, "stop": ["never"]}
    assert [m["content"] for m in request.messages or ()] == ["be brief", "", "one two"]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("THREE", "ONE TWO "), ("TWO THREE", "ONE "), (["X", "O T"], "ONE TW"), ("ONE", "")],
)
def test_a_stop_sequence_ends_the_text_and_is_no_part_of_it(
    words: openai.OpenAI, stop: Any, expected: str
) -> None:
    arguments: Any = {"model": "words", "messages": says("one two three four"), "stop": stop}
    answer = words.chat.completions.create(**arguments)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "stop"
    pieces = words.chat.completions.create(**arguments, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == expected


# Streams


def test_a_stream_brings_the_text_in_pieces(words: openai.OpenAI) -> None:
    stream = words.chat.completions.create(
        model="words", messages=says("one two three"), stream=True
    )
    chunks = list(stream)
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.content for c in chunks[1:-1]] == ["ONE", " TWO", " THREE"]
    assert [c.choices[0].finish_reason for c in chunks] == [None] * 4 + ["stop"]
    assert all(c.usage is None for c in chunks)


def test_usage_comes_last_if_it_is_asked_for(words: openai.OpenAI) -> None:
    stream = words.chat.completions.create(
        model="words",
        messages=says("one two"),
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 4


def test_the_streams_bytes_are_events_and_end_with_done(plain: httpx.Client) -> None:
    body = {"model": "words", "messages": says("one"), "stream": True}
    body["stream_options"] = {"include_usage": True}
    answer = plain.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    parsed = [json.loads(e.removeprefix("data: ")) for e in events[:-2]]
    assert [p["usage"] for p in parsed[:-1]] == [None] * (len(parsed) - 1)


def test_streamed_choices_are_told_apart(words: openai.OpenAI) -> None:
    texts = ["", "", ""]
    ends: list[int] = []
    stream = words.chat.completions.create(
        model="words", messages=says("one two three"), n=3, stream=True
    )
    for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ends.append(choice.index)
    assert texts == ["ONE TWO THREE"] * 3
    assert sorted(ends) == [0, 1, 2]


async def test_the_asynchronous_client_streams_many_texts_at_once(words_server: Live) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{words_server.url}/v1", api_key="none", max_retries=0
    ) as client:

        async def one(number: int) -> str:
            stream = await client.chat.completions.create(
                model="words", messages=says(f"a{number} b{number}"), stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        answers = await asyncio.gather(*(one(n) for n in range(20)))
        whole = await client.completions.create(model="words", prompt="x y")
    assert answers == [f"A{n} B{n}" for n in range(20)]
    assert whole.choices[0].text == "X Y"


def test_a_stream_that_fails_midway_ends_with_an_error_event() -> None:
    engine = WordsEngine()
    engine.fail_after = 1
    seen: list[str] = []
    with client_of(engine) as client:
        stream = client.chat.completions.create(
            model="words", messages=says("one two three"), stream=True
        )
        with pytest.raises(openai.APIError, match="the model lost its words"):
            seen.extend(c.choices[0].delta.content or "" for c in stream)
    assert "".join(seen) == "ONE"


def test_a_stream_that_fails_before_it_begins_is_an_ordinary_error() -> None:
    engine = WordsEngine()
    engine.fail_after = 0
    with client_of(engine) as client, pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="words", messages=says("one"), stream=True)


@pytest.mark.parametrize("n", [1, 3])
def test_a_failure_ends_all_choices(n: int) -> None:
    engine = WordsEngine()
    engine.fail_after = 1
    with client_of(engine) as client:
        with pytest.raises(openai.InternalServerError, match="lost its words"):
            client.chat.completions.create(model="words", messages=says("one two"), n=n)
        assert engine.closed == len(engine.requests)


@pytest.mark.parametrize("n", [1, 2])
def test_a_client_that_hangs_up_ends_the_generation(n: int) -> None:
    engine = WordsEngine()
    engine.gate = asyncio.Event()
    with served(engine) as server:
        body = {"model": "words", "messages": says("one two three"), "stream": True, "n": n}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert "assistant" in next(lines)
        eventually(lambda: engine.closed == n)


def test_a_broken_model_ends_a_stream_with_an_error_event_too() -> None:
    class Broken(WordsEngine):
        async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
            yield GenerationChunk("one ")
            raise RuntimeError("secret")

    with client_of(Broken()) as client:
        stream = client.chat.completions.create(
            model="words", messages=says("one two"), stream=True
        )
        with pytest.raises(openai.APIError, match="internal error") as failure:
            list(stream)
    assert "secret" not in str(failure.value)


def test_a_model_that_never_says_why_it_ended_has_stopped() -> None:
    class Silent(WordsEngine):
        async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
            for word in ("one", " two"):
                yield GenerationChunk(word)

    with client_of(Silent()) as client:
        answer = client.chat.completions.create(model="words", messages=says("a b c"), stop="z")
    assert answer.choices[0].message.content == "one two"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 2)


# Completions


def test_a_completion_is_complete(words: openai.OpenAI) -> None:
    answer = words.completions.create(model="words", prompt="one two", echo=True)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].text == "one twoONE TWO"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 4


def test_each_prompt_has_its_choices(words: openai.OpenAI) -> None:
    answer = words.completions.create(model="words", prompt=["a b", "a b", "c"], n=2)
    assert [c.text for c in answer.choices] == ["A B", "A B", "A B", "A B", "C", "C"]
    assert [c.index for c in answer.choices] == list(range(6))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 10)


def test_completions_are_sixteen_tokens_long_unless_asked_otherwise(words: openai.OpenAI) -> None:
    prompt = " ".join("a" * 20)
    answer = words.completions.create(model="words", prompt=prompt)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    answer = words.completions.create(model="words", prompt=prompt, max_tokens=20)
    assert answer.choices[0].finish_reason == "stop"


def test_completions_stream_too(words: openai.OpenAI) -> None:
    stream = words.completions.create(
        model="words",
        prompt=["a b", "c"],
        echo=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts = {0: "", 1: ""}
    chunks = list(stream)
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "a bA B", 1: "cC"}
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 6


# Embeddings

VECTORS = {b"three": [3.0, 4.0, 12.0], b"one": [1.0, 0.0, 0.0]}


def embedder(*, counts: bool = False, width: int = 3) -> NumpyEngine:
    """One of two vectors for each text."""
    signature = Signature(
        (Tensor("text", "BYTES", (-1,)),),
        (Tensor("embedding", "FP32", (-1, width)), Tensor("length", "FP32", (-1,))),
    )

    def compute(inputs: Tensors) -> Tensors:
        rows = [VECTORS[t] for t in inputs["text"]]
        return {"embedding": np.array(rows, "f4"), "length": np.zeros(len(rows), "f4")}

    class Counting(NumpyEngine):
        async def infer(self, request: Any) -> InferenceResponse:
            response = await super().infer(request)
            response.parameters = {"prompt_tokens": 42}
            return response

    return (Counting if counts else NumpyEngine)(signature, compute, model="e5", version="2")


def test_embeddings_come_back_in_order_in_both_encodings() -> None:
    with client_of(embedder()) as client:
        for encoding in ("float", "base64"):
            form: Any = {"encoding_format": encoding}
            answer = client.embeddings.create(model="e5", input=["three", "one"], **form)
            assert [d.index for d in answer.data] == [0, 1]
            found = [d.embedding for d in answer.data]
            if encoding == "base64":  # the client decodes only what it asked for itself
                raw: Any = found
                found = [np.frombuffer(base64.b64decode(v), "<f4").tolist() for v in raw]
            assert found == [VECTORS[b"three"], VECTORS[b"one"]]
        implicit = client.embeddings.create(model="e5", input="three")
    assert implicit.data[0].embedding == VECTORS[b"three"]
    assert (implicit.object, implicit.model, implicit.data[0].object) == ("list", "e5", "embedding")
    assert implicit.usage.prompt_tokens == implicit.usage.total_tokens == 1


def test_usage_is_the_models_own_count_where_it_counts() -> None:
    with client_of(embedder(counts=True)) as client:
        answer = client.embeddings.create(model="e5", input=["three", "one"])
    assert answer.usage.prompt_tokens == 42


def test_fewer_dimensions_are_cut_and_of_unit_length() -> None:
    with client_of(embedder()) as client:
        answer = client.embeddings.create(model="e5", input="three", dimensions=2)
        assert answer.data[0].embedding == pytest.approx([0.6, 0.8])
        whole = client.embeddings.create(model="e5", input="three", dimensions=3)
        assert whole.data[0].embedding == VECTORS[b"three"]
    for width in (3, -1):
        with client_of(embedder(width=width)) as client:
            with pytest.raises(openai.BadRequestError, match="1 to 3") as refusal:
                client.embeddings.create(model="e5", input="three", dimensions=4)
            assert refusal.value.param == "dimensions"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1, 2, 3], "tokens"),
        ([[1, 2], [3]], "tokens"),
        ([], "at least one"),
        ("", "empty"),
        (["one", ""], "empty"),
        (None, "at least one"),
        (["one", None], "null"),
        ({"a": 1}, "at least one"),
        (["one"] * 2049, "2048"),
    ],
)
def test_an_input_that_is_no_text_is_refused(value: Any, words: str) -> None:
    with client_of(embedder()) as client:
        with pytest.raises(openai.BadRequestError, match=words) as refusal:
            client.embeddings.create(model="e5", input=value)
        assert refusal.value.param == "input"


def test_a_model_without_vectors_has_no_embeddings(words: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        words.embeddings.create(model="words", input="one")
    assert refusal.value.param == "model"
    with client_of(sum_engine()) as client, pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="sum", input="one")
    with client_of(embedder()) as client, pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="e5", messages=says("hi"))
    assert refusal.value.param == "model"


def test_vectors_that_are_not_finite_are_the_models_fault() -> None:
    engine = embedder()
    engine._compute = lambda t: {"embedding": np.array([[np.nan, 1, 2]])}
    with client_of(engine) as client, pytest.raises(openai.InternalServerError, match="finite"):
        client.embeddings.create(model="e5", input="one")


# Models


def test_models_are_listed_and_described(words: openai.OpenAI) -> None:
    models = words.models.list().data
    assert [(m.id, m.object, m.owned_by) for m in models] == [("words", "model", "shoal")]
    model = words.models.retrieve("words")
    assert (model.id, model.created) == ("words", 1_700_000_000)
    assert words.models.retrieve("words@1").id == "words@1"
    for missing in ("other", "words@9"):
        with pytest.raises(openai.NotFoundError) as refusal:
            words.models.retrieve(missing)
        assert refusal.value.code == "model_not_found"


def test_the_list_serves_kserve_too(plain: httpx.Client) -> None:
    page = plain.get("/v1/models").json()
    assert page["models"] == ["words"]
    assert page["object"] == "list"


def test_a_model_may_be_named_with_its_version(words: openai.OpenAI) -> None:
    answer = words.completions.create(model="words@1", prompt="a")
    assert answer.model == "words"
    with pytest.raises(openai.NotFoundError):
        words.completions.create(model="words@2", prompt="a")
    labelled = words.with_options(default_headers={"x-shoal-backend": "words--1--1a2b3c4d"})
    assert labelled.completions.create(model="words@stable", prompt="a").choices[0].text == "A"


# Refusals


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content[0]"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"n": True}, "n"),
        ({"seed": "x"}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [3]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
def test_a_chat_that_cannot_be_is_refused_by_the_fields_name(
    words: openai.OpenAI, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        words.post(
            "/chat/completions",
            body={"model": "words", "messages": says("hi"), **change},
            cast_to=object,
        )
    assert refusal.value.param == param
    assert refusal.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": [[1, 2]]}, "prompt"),
        ({"prompt": ["a", {}]}, "prompt"),
        ({"prompt": ["a"] * 40, "n": 2}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"echo": 1}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_a_completion_that_cannot_be_is_refused_by_the_fields_name(
    words: openai.OpenAI, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        words.post("/completions", body={"model": "words", "prompt": "a", **change}, cast_to=object)
    assert refusal.value.param == param


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"a":NaN}'])
def test_a_body_that_is_no_object_is_refused(plain: httpx.Client, path: str, body: bytes) -> None:
    answer = plain.post(path, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("model", [None, 3, "", ["words"]])
def test_a_request_must_name_its_model(plain: httpx.Client, path: str, model: Any) -> None:
    answer = plain.post(path, json={"model": model, "prompt": "a"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model"


@pytest.mark.parametrize("path", POSTS)
def test_a_model_that_is_not_here_is_not_found(plain: httpx.Client, path: str) -> None:
    answer = plain.post(path, json={"model": "gpt-5", "messages": [], "prompt": "a"})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "gpt-5" in error["message"]


# Failures and what the client makes of them


class Failing(WordsEngine):
    """Fails with each fault given, in turn; answers when there are none left."""

    def __init__(self, *failures: InferenceError) -> None:
        super().__init__()
        self.failures = list(failures)
        self.calls = 0

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        async for chunk in super().generate(request):
            yield chunk


def overloaded(retry_after_s: float = 0.02) -> InferenceError:
    return InferenceError(Fault.OVERLOADED, "full", retry_after_s=retry_after_s)


def test_the_client_comes_back_when_it_was_told_to() -> None:
    engine = Failing(overloaded(), overloaded())
    with client_of(engine, max_retries=2) as client:
        answer = client.chat.completions.create(model="words", messages=says("hi"))
    assert answer.choices[0].message.content == "HI"
    assert engine.calls == 3


def test_a_refusal_says_when_to_come_back() -> None:
    refused = pytest.raises(openai.RateLimitError)
    with client_of(Failing(overloaded(1.4))) as client, refused as refusal:
        client.chat.completions.create(model="words", messages=says("hi"))
    headers = refusal.value.response.headers
    assert headers["retry-after"] == "1"
    assert headers["retry-after-ms"] == "1400"
    assert headers["x-should-retry"] == "true"
    assert refusal.value.code == "rate_limit_exceeded"


def test_the_client_does_not_come_back_after_its_deadline() -> None:
    engine = Failing(*[InferenceError(Fault.DEADLINE, "too late")] * 5)
    late = pytest.raises(openai.InternalServerError)
    with client_of(engine, max_retries=3) as client, late as failure:
        client.chat.completions.create(model="words", messages=says("hi"))
    assert failure.value.status_code == 504
    assert engine.calls == 1


@pytest.mark.parametrize(
    ("fault", "kind", "status"),
    [
        (Fault.INVALID, openai.BadRequestError, 400),
        (Fault.UNAUTHENTICATED, openai.AuthenticationError, 401),
        (Fault.FORBIDDEN, openai.PermissionDeniedError, 403),
        (Fault.NOT_FOUND, openai.NotFoundError, 404),
        (Fault.CONFLICT, openai.ConflictError, 409),
        (Fault.OVERLOADED, openai.RateLimitError, 429),
        (Fault.UNIMPLEMENTED, openai.InternalServerError, 501),
        (Fault.UNAVAILABLE, openai.InternalServerError, 503),
        (Fault.DEADLINE, openai.InternalServerError, 504),
        (Fault.INTERNAL, openai.InternalServerError, 500),
    ],
)
def test_each_fault_is_the_clients_own_exception(
    fault: Fault, kind: type[openai.APIStatusError], status: int
) -> None:
    failure = InferenceError(fault, "why it failed", field="some.field")
    with client_of(Failing(failure)) as client, pytest.raises(kind) as raised:
        client.chat.completions.create(model="words", messages=says("hi"))
    assert raised.value.status_code == status
    assert raised.value.param == "some.field"
    assert "why it failed" in raised.value.message


def test_the_callers_deadline_reaches_the_model() -> None:
    engine = WordsEngine()
    with client_of(engine) as client:
        headers = {"x-request-timeout-ms": "1500"}
        client.chat.completions.create(
            model="words", messages=says("hi"), n=2, extra_headers=headers
        )
    assert all(r.deadline_s is not None for r in engine.requests)


def test_a_model_that_is_not_ready_is_503_in_the_description_too() -> None:
    engine = WordsEngine()
    with served(engine, SingleCatalog(engine, state=VersionState.STARTING)) as server:
        answer = httpx.get(f"{server.url}/v1/models/words")
    assert (answer.status_code, answer.json()["ready"]) == (503, False)


def test_without_an_engine_inference_is_left_to_the_front_desk() -> None:
    catalog = SingleCatalog(WordsEngine())
    app = Application(catalog, None, [OpenAI(catalog, None)], ready=lambda: True)
    with live(app) as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 200
        for path in POSTS:
            answer = httpx.post(f"{server.url}{path}", json={"model": "words"})
            assert answer.status_code == 404
            assert "message" in answer.json()["error"]


# Stop sequences, wherever the pieces are cut


@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 12), max_size=6),
)
def test_a_text_is_cut_at_the_first_stop_sequence_however_it_comes(
    text: str, stop: Sequence[str], cuts: Sequence[int]
) -> None:
    places = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    scan = StopScan(stop)
    shown = ""
    for start, end in itertools.pairwise(places):
        shown += scan.feed(text[start:end])
        if scan.has_stopped:
            break
    shown += scan.rest()
    assert scan.has_stopped == any(s in text for s in stop)
    if scan.has_stopped:
        assert text.startswith(shown)
        assert not any(s in shown for s in stop)
        assert any(text[len(shown) :].startswith(s) for s in stop)
    else:
        assert shown == text


# Whatever comes, nothing breaks

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(["user", "text", "one"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text"]) | st.text(max_size=3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
FIELDS = [
    "messages",
    "input",
    "prompt",
    "n",
    "stop",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "seed",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "echo",
    "best_of",
    "dimensions",
    "encoding_format",
    "tools",
    "response_format",
]
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def embedding_server() -> Iterator[httpx.Client]:
    signature = Signature(
        (Tensor("text", "BYTES", (-1, 1)),), (Tensor("vector", "FP64", (-1, -1)),)
    )
    engine = NumpyEngine(
        signature, lambda t: {"vector": np.ones((len(t["text"]), 4))}, model="words"
    )
    with served(engine) as server, httpx.Client(base_url=server.url) as client:
        yield client


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    change=st.dictionaries(st.sampled_from(FIELDS), anything, max_size=4) | anything,
    path=st.sampled_from(POSTS),
)
def test_any_json_gets_an_answer_or_a_reason(
    plain: httpx.Client, embedding_server: httpx.Client, change: Any, path: str
) -> None:
    valid = {"model": "words", "messages": MESSAGES, "prompt": "one", "input": "one"}
    body = {**valid, **change} if isinstance(change, dict) else change
    client = embedding_server if path.endswith("embeddings") else plain
    answer = client.post(path, content=json.dumps(body).encode())
    assert answer.status_code < 500
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
