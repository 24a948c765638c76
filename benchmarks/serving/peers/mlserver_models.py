"""MLServer custom runtimes; batching is set in model-settings.json (`mlserver_settings`)."""

from __future__ import annotations

import numpy as np
from mlserver import MLModel  # type: ignore[import-not-found]
from mlserver.codecs import NumpyCodec, StringCodec  # type: ignore[import-not-found]
from mlserver.types import InferenceRequest, InferenceResponse  # type: ignore[import-not-found]

from benchmarks.serving.peers import models


class Noop(MLModel):  # type: ignore[misc]
    async def load(self) -> bool:
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        rows = NumpyCodec.decode_input(payload.inputs[0])
        return InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output("y", rows)]
        )


class Digits(MLModel):  # type: ignore[misc]
    async def load(self) -> bool:
        self.rows = models.load("digits")
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        answers = self.rows(NumpyCodec.decode_input(payload.inputs[0]))
        output = NumpyCodec.encode_output("y", np.asarray(answers).reshape(-1, 1))
        return InferenceResponse(model_name=self.name, outputs=[output])


class Minilm(MLModel):  # type: ignore[misc]
    async def load(self) -> bool:
        self.sentences = models.load("minilm")
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        vectors = self.sentences(list(StringCodec.decode_input(payload.inputs[0])))
        output = NumpyCodec.encode_output("y", np.asarray(vectors, dtype=np.float32))
        return InferenceResponse(model_name=self.name, outputs=[output])
