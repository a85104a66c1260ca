"""Tiny random Hugging Face models of every supported shape, in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

HIDDEN, LAYERS, VOCAB, WINDOW = 32, 3, 64, 8

# Wide initial values, so that logits are of order 1 and every block adds something of the residual stream's size.
SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
# The first layer sees everything, the others a window: masks by layer.
MIXED_WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}

UNTIED: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "qwen2-windows": Qwen2Config(**SHAPE, **MIXED_WINDOWS),
    "qwen3-windows": Qwen3Config(**SHAPE, **MIXED_WINDOWS),
}
TIED = {
    f"{name}-tied": type(config).from_dict({**config.to_dict(), "tie_word_embeddings": True})
    for name, config in UNTIED.items()
    if "-" not in name
}
CONFIGS = {**UNTIED, **TIED}
"""By name; ``mistral`` and ``-windows`` have windows shorter than the sequences of the tests."""


def make_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Build the model ``name`` in memory: the same random float32 weights each time, then cast to ``dtype``."""
    config = type(CONFIGS[name]).from_dict({**CONFIGS[name].to_dict(), **changes})
    torch.manual_seed(sum(name.encode()))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:  # Hugging Face starts them at 1, which would hide a norm that is left out
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith("bias"):  # and biases at 0
                parameter.normal_(std=0.3)
    return model.to(dtype).requires_grad_(False)


def save_model(name: str, directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save the model ``name`` in several shards and return ``directory``."""
    make_model(name, dtype, **changes).save_pretrained(directory, max_shard_size="24KB")
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that saves the model ``name`` once per session and returns its directory, which is read only."""
    root, saved = tmp_path_factory.mktemp("tiny-models"), dict[tuple[str, torch.dtype], Path]()

    def directory_of(name: str, dtype: torch.dtype = torch.float32) -> Path:
        key = (name, dtype)
        if key not in saved:
            saved[key] = save_model(name, root / f"{name}-{str(dtype).rpartition('.')[2]}", dtype)
        return saved[key]

    return directory_of
