"""Does a chat model on vLLM answer OpenAI's client, whole and in pieces, through the edge?"""

from __future__ import annotations

from typing import Any

import openai
import psutil
import pytest
import yaml

from tests.e2e.cluster import EXAMPLES, Cluster, until

pytestmark = [pytest.mark.llm, pytest.mark.timeout(480)]

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> openai.OpenAI:
    pytest.importorskip("vllm")
    document = yaml.safe_load((EXAMPLES / "smollm2.yaml").read_text())
    document["versions"][1]["batching"] = {"queue_requests_max": 2}
    cluster.deploy(document, "--timeout-s", "400")
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=cluster.key, max_retries=0)


def test_a_chat_is_answered_rightly_with_its_usage(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smollm2", messages=QUESTION, max_tokens=24, temperature=0
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_a_stream_comes_in_pieces_and_ends_with_its_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="smollm2@1",
        messages=QUESTION,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert len(chunks) > 5
    assert "Paris" in text
    assert chunks[-1].usage is not None


def test_what_is_wrong_is_told_in_openais_form(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="smollm2", messages=QUESTION, max_tokens=-1)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=QUESTION)


def test_more_chats_than_places_are_refused_with_429(client: openai.OpenAI) -> None:
    streams: list[Any] = [
        client.chat.completions.create(
            model="smollm2", messages=QUESTION, max_tokens=300, stream=True
        )
        for _ in range(2)
    ]
    try:
        for stream in streams:
            next(iter(stream))
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="smollm2", messages=QUESTION, max_tokens=4)
        assert refused.value.response.headers["retry-after"]
    finally:
        for stream in streams:
            stream.close()


def test_open_inference_generates_text_too(client: openai.OpenAI, cluster: Cluster) -> None:
    until(lambda: not any(r["ongoing"] for r in cluster.replicas("smollm2")), 60)
    reply = cluster.post(
        "/v2/models/smollm2/generate",
        {"text_input": "The capital of France is", "parameters": {"max_tokens": 8}},
    )
    assert reply.status_code == 200, reply.text
    assert reply.json()["text_output"]


def test_deleting_it_ends_the_engine_too(client: openai.OpenAI, cluster: Cluster) -> None:
    def engines() -> list[int]:
        home = str(cluster.home)
        return [
            p.pid
            for p in psutil.process_iter(["cmdline", "environ"])
            if "EngineCore" in " ".join(p.info["cmdline"] or ())
            and home in (p.info["environ"] or {}).get("RAY_AUTH_TOKEN_PATH", "")
        ]

    assert engines()
    cluster.ok("delete", "smollm2")
    until(lambda: not engines(), 30)
