"""Is a user's class served as its author would expect?"""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest

from deployments.inference import Fault, GenerationChunk, GenerationRequest, InferenceError
from deployments.runtimes import Runtime, TextRuntime, create
from tests.deployments.runtimes.builders import a_tensor, a_version, load_error, texts

TENSORS = {"inputs": [a_tensor("x", "FP32", -1)], "outputs": [a_tensor("y", "FP32", -1)]}
X = np.array([1, 2, 3], dtype=np.float32)


def written(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(dedent(text))
    return folder


def made(weights: Path, **fields: Any) -> Runtime | TextRuntime:
    return create("m", a_version("python", **fields), weights)


def loaded(weights: Path, **fields: Any) -> Runtime:
    runtime = made(weights, **fields)
    assert isinstance(runtime, Runtime)
    runtime.load()
    return runtime


async def started(weights: Path, **fields: Any) -> TextRuntime:
    runtime = made(weights, **fields)
    assert isinstance(runtime, TextRuntime)
    await runtime.start()
    return runtime


async def generated(runtime: TextRuntime, request: GenerationRequest) -> list[GenerationChunk]:
    return [chunk async for chunk in runtime.generate(request)]


def test_a_class_in_a_file_is_loaded_and_answers(tmp_path: Path) -> None:
    folder = written(
        tmp_path,
        doubler="""
        class Doubler:
            def load(self):
                self.factor = 2
            def predict(self, inputs):
                return {"y": inputs["x"] * self.factor}
        """,
    )
    answer = loaded(folder / "doubler.py", **TENSORS).predict({"x": X})
    np.testing.assert_array_equal(answer["y"], X * 2)


def test_load_gets_the_folder_and_the_arguments_that_it_names(tmp_path: Path) -> None:
    folder = written(
        tmp_path,
        model="""
        class Scale:
            inputs = [{"name": "x", "datatype": "FP32", "shape": [-1]}]
            outputs = [{"name": "y", "datatype": "FP64", "shape": [-1]}]
            def load(self, folder, options):
                self.factor = float((folder / "factor.txt").read_text()) + options["more"]
            def predict(self, inputs):
                return inputs["x"] * self.factor
        """,
    )
    (folder / "factor.txt").write_text("3")
    answer = loaded(folder, options={"arguments": {"more": 1}}).predict({"x": X})
    assert answer["y"].dtype == np.float64
    np.testing.assert_array_equal(answer["y"], X * 4)


@pytest.mark.parametrize("line", ["from .near import factor", "from near_too import factor"])
def test_neighbouring_files_can_be_imported(tmp_path: Path, line: str) -> None:
    folder = written(
        tmp_path,
        near="factor = 5",
        near_too="factor = 5",
        model=f"""
        {line}
        class Scale:
            def predict(self, inputs):
                return {{"y": inputs["x"] * factor}}
        """,
    )
    np.testing.assert_array_equal(loaded(folder, **TENSORS).predict({"x": X})["y"], X * 5)


def test_a_class_is_found_by_module_and_name(tmp_path: Path) -> None:
    folder = written(
        tmp_path,
        one="class A:\n def predict(self, inputs): return inputs['x']",
        two="class B:\n def predict(self, inputs): return -inputs['x']",
    )
    runtime = loaded(folder, options={"class_name": "two:B"}, **TENSORS)
    np.testing.assert_array_equal(runtime.predict({"x": X})["y"], -X)


def test_bytes_go_in_and_text_comes_out_as_bytes(tmp_path: Path) -> None:
    folder = written(
        tmp_path,
        model="""
        class Upper:
            inputs = [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
            outputs = [{"name": "loud", "datatype": "BYTES", "shape": [-1]}]
            def predict(self, inputs):
                return [text.decode().upper() for text in inputs["text"]]
        """,
    )
    answer = loaded(folder).predict({"text": texts("fish", "é")})
    assert answer["loud"].tolist() == [b"FISH", "É".encode()]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return {'z': inputs['x']}", "returned no 'y'"),
        ("return {'y': ['a', 'b', 'c']}", "no FP32"),
        ("return {'y': inputs['x'][:2]}", "of shape [2] for 3 rows"),
        ("return {'y': 1.0}", "of shape [] for 3 rows"),
    ],
)
def test_an_answer_that_is_not_as_declared_is_the_models_fault(
    tmp_path: Path, body: str, expected: str
) -> None:
    folder = written(tmp_path, model=f"class M:\n def predict(self, inputs):\n  {body}")
    with pytest.raises(InferenceError) as raised:
        loaded(folder, **TENSORS).predict({"x": X})
    assert raised.value.fault is Fault.INTERNAL
    assert expected in raised.value.message


def test_a_class_may_refuse_a_value(tmp_path: Path) -> None:
    folder = written(
        tmp_path,
        model="""
        from deployments.inference import Fault, InferenceError
        class M:
            def predict(self, inputs):
                raise InferenceError(Fault.INVALID, "no fish today")
        """,
    )
    with pytest.raises(InferenceError, match="no fish today"):
        loaded(folder, **TENSORS).predict({"x": X})


@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        ("raise KeyError('fish')", {}, "KeyError: 'fish'"),
        ("import no_such_fish", {}, "No module named 'no_such_fish'"),
        ("def :", {}, "SyntaxError"),
        ("x = 1", {}, "no class with predict or generate"),
        ("class A:\n predict = 1\nclass B:\n predict = 1", {}, "several classes (A, B)"),
        ("class Fish:\n predict = 1", {"class_name": "Fsh"}, "did you mean 'Fish'?"),
        ("class M:\n predict = 1", {"class_name": "modle:M"}, "did you mean 'model'?"),
        ("class M:\n predict = 1", {"class_name": "a b"}, "options.class_name"),
        ("class M:\n async def predict(self, inputs): ...", {}, "must be a plain function"),
        ("class M:\n def predict(self, inputs): ...", {}, "inputs: must be declared"),
        ("class M:\n inputs = [{'name': 'x'}]\n def predict(self, i): ...", {}, "M.inputs.0"),
    ],
)
def test_a_class_that_cannot_be_served_is_told_why(
    tmp_path: Path, text: str, fields: dict[str, Any], expected: str
) -> None:
    folder = written(tmp_path, model=text)
    assert expected in load_error(lambda: loaded(folder, options=fields))


def test_what_load_raises_is_shown_with_the_authors_own_line(tmp_path: Path) -> None:
    folder = written(
        tmp_path,
        model="""
        class M:
            def load(self):
                self.weights = {}["fish"]
            def predict(self, inputs): ...
        """,
    )
    message = load_error(lambda: loaded(folder, **TENSORS))
    assert "M failed to load" in message
    assert 'self.weights = {}["fish"]' in message
    assert "KeyError: 'fish'" in message


@pytest.mark.parametrize(
    "body",
    [
        "def generate(self, prompt):\n        yield from prompt.split()",
        "async def generate(self, prompt):\n        for w in prompt.split(): yield w",
    ],
)
async def test_plain_and_async_generators_make_a_language_model(tmp_path: Path, body: str) -> None:
    folder = written(tmp_path, model=f"class M:\n    {body}")
    runtime = await started(folder)
    chunks = await generated(runtime, GenerationRequest(prompt="one two three"))
    assert [c.text for c in chunks] == ["one", "two", "three", ""]
    assert chunks[-1] == GenerationChunk("", "stop", 0, 3)
    short = await generated(runtime, GenerationRequest(prompt="one two three", max_tokens=2))
    assert [c.text for c in short] == ["one", "two", ""]
    assert short[-1].finish_reason == "length"


async def test_generate_gets_messages_and_the_options_that_it_names(tmp_path: Path) -> None:
    folder = written(
        tmp_path,
        model="""
        class M:
            def generate(self, prompt, temperature=1.0):
                yield prompt[0]["content"]
                yield str(temperature)
        """,
    )
    request = GenerationRequest(
        messages=[{"role": "user", "content": "hi"}], options={"temperature": 0.5, "top_p": 1}
    )
    chunks = await generated(await started(folder), request)
    assert [c.text for c in chunks] == ["hi", "0.5", ""]


async def test_a_generator_that_nobody_reads_any_more_is_stopped(tmp_path: Path) -> None:
    folder = written(
        tmp_path,
        model="""
        import threading
        ended = threading.Event()
        class M:
            ended = ended
            def generate(self, prompt):
                try:
                    while True:
                        yield "fish "
                finally:
                    ended.set()
        """,
    )
    runtime = await started(folder)
    pieces = runtime.generate(GenerationRequest(prompt="go"))
    assert (await anext(pieces)).text == "fish "
    await pieces.aclose()  # type: ignore[attr-defined]
    assert runtime._user.ended.wait(10)  # type: ignore[attr-defined]


async def test_what_generate_raises_reaches_the_reader(tmp_path: Path) -> None:
    folder = written(
        tmp_path,
        model="class M:\n def generate(self, prompt):\n  yield 'a'\n  raise RuntimeError('sunk')",
    )
    with pytest.raises(RuntimeError, match="sunk"):
        await generated(await started(folder), GenerationRequest(prompt="go"))


async def test_a_class_with_both_methods_generates_and_may_predict(tmp_path: Path) -> None:
    folder = written(
        tmp_path,
        model="""
        class M:
            def generate(self, prompt):
                yield prompt
            def predict(self, inputs):
                return inputs["x"]
        """,
    )
    runtime = await started(folder, **TENSORS)
    np.testing.assert_array_equal(runtime.predict({"x": X})["y"], X)  # type: ignore[attr-defined]
    await runtime.close()
