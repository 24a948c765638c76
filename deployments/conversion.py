"""How does a GGUF file become weights that every runtime reads?

vLLM and transformers read folders of safetensors with a tokenizer. A GGUF file holds the same
model in quantised blocks: transformers undoes the quantisation, and what comes out is saved as a
plain folder. It takes seconds for a small model and memory for the whole of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of `gguf` into `folder`, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **where
    )
    plain = type(model)(_plain_config(model.config)).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)


def _plain_config(config: Any) -> Any:
    """The configuration without what says how the file was quantised."""
    plain = type(config).from_dict(config.to_dict())
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return plain
