"""How are sentences encoded by a BERT without paying for padding?

A batch of sentences of unlike lengths is usually padded to the longest, and half of the work is
then done on nothing. Here the tokens of all sentences stand in one row, so the dense layers see
each token once; only attention, which is cheap at these lengths, looks at sentences, those of equal
length together.

    padded   the cat sat . . .            packed   the cat sat hello a long one here
             hello . . . . .                       └── 3 ───┘ └ 1 ┘ └───── 4 ──────┘
             a long one here

On a GPU many small attention calls would cost more than padding, so attention alone is padded
there. The encoder needs torch, safetensors and tokenizers: they load in 3 s, where transformers
takes 12 s. It knows BERT as sentence-transformers saves it, with mean or first-token pooling;
`knows` says whether a folder is of that kind, and everything else is left to the library.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

Weights = dict[str, torch.Tensor]

_MODULES = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
_FILES = ("model.safetensors", "tokenizer.json", "config.json", "modules.json")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a folder says about its encoder."""

    heads: int
    layers: int
    hidden: int
    epsilon: float
    length_max: int
    pooling: str  # "mean" or "cls"
    normalize: bool


def knows(folder: Path) -> Plan | None:
    """The plan of the encoder in `folder`; None if it is not a kind that is known here."""
    if not all((folder / name).is_file() for name in _FILES):
        return None
    modules = _json(folder / "modules.json")
    kinds = [m["type"].rpartition(".")[2] for m in modules]
    if kinds not in _MODULES or modules[0]["path"] or not _is_plain(folder):
        return None
    config = _json(folder / "config.json")
    pooling = _pooling(_json(folder / modules[1]["path"] / "config.json"))
    if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu" or not pooling:
        return None
    if config.get("position_embedding_type", "absolute") != "absolute":
        return None
    return Plan(
        heads=config["num_attention_heads"],
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        epsilon=config["layer_norm_eps"],
        length_max=_length_max(folder, config),
        pooling=pooling,
        normalize=len(kinds) == 3,
    )


def _json(file: Path) -> Any:
    return json.loads(file.read_text()) if file.is_file() else {}


def _is_plain(folder: Path) -> bool:
    """Whether texts go to the tokenizer as they are, without prompts or another lower-casing."""
    library = _json(folder / "config_sentence_transformers.json")
    return not library.get("default_prompt_name") and not _json(
        folder / "sentence_bert_config.json"
    ).get("do_lower_case")


def _pooling(config: dict[str, Any]) -> str | None:
    modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    if not on and config.get("pooling_mode") in modes.values():
        return str(config["pooling_mode"])
    return modes.get(on[0]) if len(on) == 1 else None


def _length_max(folder: Path, config: dict[str, Any]) -> int:
    longest = int(config["max_position_embeddings"])
    stated = _json(folder / "sentence_bert_config.json").get("max_seq_length")
    tokenizer = _json(folder / "tokenizer_config.json").get("model_max_length", longest)
    return min(longest, int(stated or tokenizer))


class Encoder:
    """The weights of one folder on one device."""

    def __init__(
        self, folder: Path, plan: Plan, device: str, dtype: torch.dtype, length_max: int | None
    ) -> None:
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        self.plan = plan
        self._device = device
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(min(length_max or plan.length_max, plan.length_max))
        weights = {
            name.removeprefix("bert."): tensor.to(device=device, dtype=dtype)
            for name, tensor in load_file(folder / "model.safetensors").items()
            if tensor.is_floating_point()
        }
        self._words, self._positions, self._norm = _embeddings(weights)
        self._layers = [_layer(weights, number) for number in range(plan.layers)]

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One row for each text."""
        ids = [e.ids for e in self._tokenizer.encode_batch_fast(list(texts))]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        with torch.inference_mode():
            rows: NDArray[np.float32] = self._rows([ids[i] for i in order]).float().cpu().numpy()
        answer = np.empty_like(rows)
        answer[order] = rows
        return answer

    def _rows(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """The sentences' vectors; `ids` from the shortest to the longest."""
        lengths = [len(i) for i in ids]
        flat = torch.tensor([t for i in ids for t in i], device=self._device)
        places = torch.cat([torch.arange(n) for n in lengths]).to(self._device)
        x = functional.embedding(flat, self._words) + self._positions[places]
        x = self._normed(x, self._norm)
        attend = _attend_padded if self._device.startswith("cuda") else _attend_by_length
        for layer in self._layers:
            x = self._through(layer, x, lengths, attend)
        return self._pooled(x, lengths)

    def _through(
        self, layer: Layer, x: torch.Tensor, lengths: Sequence[int], attend: Any
    ) -> torch.Tensor:
        """One layer: attention, then two dense layers, each added to what came in."""
        qkv = functional.linear(x, *layer.qkv).view(len(x), 3, self.plan.heads, -1)
        mixed = attend(qkv, lengths).reshape(x.shape)
        x = self._normed(functional.linear(mixed, *layer.out) + x, layer.norm_attention)
        inner = functional.gelu(functional.linear(x, *layer.up))
        return self._normed(functional.linear(inner, *layer.down) + x, layer.norm)

    def _normed(self, x: torch.Tensor, weights: Pair) -> torch.Tensor:
        return functional.layer_norm(x, (x.shape[-1],), *weights, eps=self.plan.epsilon)

    def _pooled(self, x: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        counts = torch.tensor(lengths, device=self._device)
        if self.plan.pooling == "cls":
            rows = x[counts.cumsum(0) - counts]
        else:
            which = torch.repeat_interleave(torch.arange(len(lengths), device=self._device), counts)
            rows = x.new_zeros(len(lengths), x.shape[1], dtype=torch.float32)
            rows.index_add_(0, which, x.float())
            rows /= counts.unsqueeze(1)
        return functional.normalize(rows, dim=1) if self.plan.normalize else rows


Pair = tuple[torch.Tensor, torch.Tensor]
"""A layer's weight and bias."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer; query, key and value stand in one matrix."""

    qkv: Pair
    out: Pair
    norm_attention: Pair
    up: Pair
    down: Pair
    norm: Pair


def _embeddings(weights: Weights) -> tuple[torch.Tensor, torch.Tensor, Pair]:
    """Words; positions, to which the one token type is added; the norm."""
    types = weights["embeddings.token_type_embeddings.weight"]
    positions = weights["embeddings.position_embeddings.weight"] + types[0]
    words = weights["embeddings.word_embeddings.weight"]
    return words, positions, _pair(weights, "embeddings.LayerNorm")


def _layer(weights: Weights, number: int) -> Layer:
    at = f"encoder.layer.{number}"
    parts = [_pair(weights, f"{at}.attention.self.{n}") for n in ("query", "key", "value")]
    return Layer(
        qkv=(torch.cat([w for w, _ in parts]), torch.cat([b for _, b in parts])),
        out=_pair(weights, f"{at}.attention.output.dense"),
        norm_attention=_pair(weights, f"{at}.attention.output.LayerNorm"),
        up=_pair(weights, f"{at}.intermediate.dense"),
        down=_pair(weights, f"{at}.output.dense"),
        norm=_pair(weights, f"{at}.output.LayerNorm"),
    )


def _pair(weights: Weights, name: str) -> Pair:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def _attend_by_length(qkv: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Attention within each sentence, sentences of equal length in one call."""
    mixed = torch.empty_like(qkv[:, 0])
    start = 0
    for length, group in groupby(lengths):
        count = len(list(group))
        end = start + count * length
        q, k, v = qkv[start:end].view(count, length, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
        answer = functional.scaled_dot_product_attention(q, k, v)
        mixed[start:end] = answer.transpose(1, 2).reshape(end - start, *mixed.shape[1:])
        start = end
    return mixed


def _attend_padded(qkv: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Attention in one call over sentences padded to the longest."""
    counts = torch.tensor(lengths, device=qkv.device)
    real = torch.arange(max(lengths), device=qkv.device) < counts.unsqueeze(1)
    padded = qkv.new_zeros(*real.shape, *qkv.shape[1:])
    padded[real] = qkv
    q, k, v = padded.permute(2, 0, 3, 1, 4)
    answer = functional.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
    return answer.transpose(1, 2)[real]
