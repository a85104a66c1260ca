"""Tiny models with a tokenizer, and random control adapters for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cadapter.adapters.directory import ControlAdapterFiles, control_card, write_control_adapter
from cadapter.adapters.factors import LowRank
from tests.tiny_models import HIDDEN, save_model
from tests.tiny_tokenizer import make_tokenizer

RANK = 4
TOKENIZED = {"vocab_size": 320, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
"""What makes a tiny model fit the tiny tokenizer."""


def make_model(directory: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """Save the random model ``name`` and a tokenizer in ``directory``, which is returned."""
    save_model(name, directory, dtype, **TOKENIZED)
    make_tokenizer(directory)
    return directory


def rewrite_weights(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Write a model's tensors again, in one file, after ``change`` did something to them."""
    tensors = {}
    for shard in directory.glob("*.safetensors"):
        tensors.update(load_file(shard))
        shard.unlink()
    (directory / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


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
