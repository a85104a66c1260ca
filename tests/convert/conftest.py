"""Tiny random models and control adapters for the conversions' tests."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from cadapter.adapters.directory import (
    ControlAdapterFiles,
    LowRank,
    control_card,
    describe_layers,
    write_control_adapter,
)
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.families import family_of

HIDDEN, LAYERS, VOCAB = 32, 3, 64

# A wide initialisation, so that random models have logits of order 1 and an adapter can be seen to move them.
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**{**SHAPE, "tie_word_embeddings": True}),
    "llama-biased": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama-deep": LlamaConfig(**{**SHAPE, "num_hidden_layers": LAYERS + 1}),
    "llama-narrow": LlamaConfig(**{**SHAPE, "hidden_size": 16}),
    "mistral": MistralConfig(**SHAPE, head_dim=8),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
}


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    """A function that saves the tiny model ``name`` in several shards, once, and returns its directory."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str, dtype: torch.dtype = torch.float32) -> Path:
        directory = root / f"{name}-{str(dtype).rpartition('.')[2]}"
        if not directory.exists():
            torch.manual_seed(len(name))
            model = AutoModelForCausalLM.from_config(CONFIGS[name])
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.3)
            model.to(dtype).save_pretrained(directory, max_shard_size="20KB")
        return directory

    return make


@pytest.fixture
def make_adapter(tmp_path):
    """A function that writes a random control adapter for a model directory and returns the adapter's directory."""

    def make(
        base: Path, name: str = "adapter", site: str = "writes", spectral: float = 0.5, rank: int = 4,
        layers: tuple[int, ...] = tuple(range(LAYERS)), seed: int = 0, inverse: str = "exact", **changes,
    ) -> Path:  # fmt: skip
        checkpoint = Checkpoint(base)
        hidden = checkpoint.config.hidden_size
        generator = torch.Generator().manual_seed(seed)
        factors, scale = {}, 1 / math.sqrt(rank)
        for layer in layers:
            A = torch.randn(rank, hidden, generator=generator)
            B = torch.randn(hidden, rank, generator=generator)
            factors[layer] = LowRank(A, B * spectral / torch.linalg.matrix_norm(scale * B @ A, 2))
        adapter = ControlAdapterFiles(
            path=tmp_path / name,
            rank=rank,
            alpha=math.sqrt(rank),
            layers=factors,
            site=site,
            inverse=inverse,
            base_model_type=checkpoint.config.model_type,
            base_model_name_or_path=str(base),
            facts=describe_layers(checkpoint, family_of(checkpoint.config.model_type), layers),
        )
        for key, value in changes.items():
            setattr(adapter, key, value)
        adapter.path.mkdir()
        write_control_adapter(adapter.path, adapter, control_card(adapter))
        return adapter.path

    return make


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Two sequences of token ids, [2, 12]."""
    return torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(11))


def logits_of(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the model in ``directory`` as Hugging Face computes them in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.fixture(scope="session")
def logits():
    """The function :func:`logits_of`."""
    return logits_of
