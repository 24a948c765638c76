"""Does a served program answer as the module that it was made of?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from deployments.inference import Signature, Tensor
from deployments.runtimes import Runtime, create
from tests.deployments.runtimes.builders import a_tensor, a_version, load_error

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

X = a_tensor("x", "FP32", -1, 4)
ROWS = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)


class Network(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x))


class Two(Network):
    def forward(  # type: ignore[override]
        self, x: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.linear(x) * scale.unsqueeze(1)
        return y, y.argmax(1)


class Named(Network):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.linear(x), "half": x.to(torch.bfloat16)}


def scripted(folder: Path, module: torch.nn.Module) -> Path:
    file = folder / "model.pt"
    torch.jit.script(module.eval()).save(str(file))
    return file


def exported(folder: Path, module: torch.nn.Module) -> Path:
    file = folder / "model.pt2"
    shapes = ({0: torch.export.Dim("rows", min=1, max=4096)},)
    torch.export.save(
        torch.export.export(module.eval(), (torch.zeros(2, 4),), dynamic_shapes=shapes), file
    )
    return file


def served(file: Path, **fields: Any) -> tuple[Runtime, Signature]:
    runtime = create("m", a_version("torch", **fields), file)
    assert isinstance(runtime, Runtime)
    return runtime, runtime.load()


@pytest.mark.parametrize("save", [scripted, exported])
def test_a_program_answers_as_its_module_does(tmp_path: Path, save: Any) -> None:
    module = Network()
    runtime, signature = served(save(tmp_path, module), inputs=[X])
    assert signature.outputs == (Tensor("output", "FP32", (-1, 3)),)
    expected = module(torch.from_numpy(ROWS)).detach().numpy()
    for rows in (1, 7):
        answer = runtime.predict({"x": ROWS[:rows]})["output"]
        np.testing.assert_allclose(answer, expected[:rows], rtol=1e-5, atol=1e-6)


def test_a_tuple_has_the_declared_names_in_order(tmp_path: Path) -> None:
    file = scripted(tmp_path, Two())
    inputs = [X, a_tensor("scale", "FP32", -1)]
    runtime, _ = served(
        file,
        inputs=inputs,
        outputs=[a_tensor("scores", "FP64", -1, 3), a_tensor("best", "INT64", -1)],
    )
    answer = runtime.predict({"scale": np.ones(7, dtype=np.float32), "x": ROWS})
    assert answer["scores"].dtype == np.float64
    np.testing.assert_array_equal(answer["best"], answer["scores"].argmax(1))
    _, signature = served(file, inputs=inputs)
    assert [t.name for t in signature.outputs] == ["output_0", "output_1"]


def test_a_mapping_is_answered_by_name_and_bfloat16_survives(tmp_path: Path) -> None:
    runtime, signature = served(scripted(tmp_path, Named()), inputs=[X])
    assert signature.outputs == (Tensor("y", "FP32", (-1, 3)), Tensor("half", "BF16", (-1, 4)))
    half = runtime.predict({"x": ROWS})["half"]
    np.testing.assert_array_equal(half, ROWS.astype(ml_dtypes.bfloat16))


def test_bfloat16_and_read_only_memory_go_in(tmp_path: Path) -> None:
    class Wide(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.float32)

    rows = ROWS.astype(ml_dtypes.bfloat16)
    rows.setflags(write=False)
    runtime, _ = served(scripted(tmp_path, Wide()), inputs=[a_tensor("x", "BF16", -1, 4)])
    np.testing.assert_array_equal(runtime.predict({"x": rows})["output"], rows.astype(np.float32))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "inputs: must be declared for torch"),
        ({"inputs": [a_tensor("x", "BYTES", -1)]}, "inputs.x.datatype: torch has no BYTES"),
        ({"inputs": [a_tensor("x", "FP32", -1, 5)]}, "can't take zeros of the declared shapes"),
        ({"inputs": [X], "outputs": [a_tensor("y", "FP32", -1, 9)]}, "the weights have [-1, 3]"),
        (
            {"inputs": [X], "outputs": [a_tensor("y", "FP32", -1), a_tensor("z", "FP32", -1)]},
            "outputs",
        ),
        ({"inputs": [X], "options": {"device": "cudda"}}, "options.device: 'cudda'"),
        ({"inputs": [X], "options": {"devise": "cpu"}}, "did you mean 'device'?"),
    ],
)
def test_a_model_file_that_does_not_fit_is_told_what_would(
    tmp_path: Path, fields: dict[str, Any], expected: str
) -> None:
    file = scripted(tmp_path, Network())
    assert expected in load_error(lambda: served(file, **fields))


def test_a_state_dict_is_refused_with_what_would_be_right(tmp_path: Path) -> None:
    torch.save(Network().state_dict(), tmp_path / "state.pt")
    message = load_error(lambda: served(tmp_path / "state.pt", inputs=[X]))
    assert "state.pt is neither TorchScript nor a torch.export program" in message
    assert "torch.jit.script" in message
