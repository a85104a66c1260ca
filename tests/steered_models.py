"""Tiny random models of real families, with a tokenizer, and random control adapters for them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from cadapter.adapters.directory import ControlAdapterFiles, LowRank, control_card, write_control_adapter
from tests.tiny_tokenizer import make_tokenizer

HIDDEN, LAYERS, RANK = 32, 3, 4

# A wide initialisation, so that random models have logits of order 1 and an adapter can be seen to move them.
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=False),
}


def make_model(directory: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """Save the random model ``name`` and a tokenizer in ``directory``, which is returned."""
    torch.manual_seed(len(name))
    AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype).save_pretrained(directory)
    make_tokenizer(directory)
    return directory


def make_adapter(
    directory: Path,
    site: str = "block",
    spectral: float = 0.6,
    layers: tuple[int, ...] = (0, 1, 2),
    hidden: int = HIDDEN,
    **fields,
) -> ControlAdapterFiles:
    """Write a random adapter with ``‖W‖₂ = spectral`` in every layer to ``directory``, and return it."""
    generator = torch.Generator().manual_seed(5)
    factors, scale = {}, 1 / math.sqrt(RANK)
    for layer in layers:
        A = torch.randn(RANK, hidden, generator=generator)
        B = torch.randn(hidden, RANK, generator=generator)
        factors[layer] = LowRank(A, B * spectral / torch.linalg.matrix_norm(scale * B @ A, 2))
    files = ControlAdapterFiles(
        path=directory, rank=RANK, alpha=math.sqrt(RANK), layers=factors, site=site, base_model_type="llama", **fields
    )
    directory.mkdir()
    write_control_adapter(directory, files, control_card(files))
    return files
