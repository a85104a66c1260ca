"""Tiny models of every shape that LoRA meets, with LoRA in their blocks, and PEFT's own models to compare with."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from cadapter.adapters.lora import LoraBlock, LoraSettings
from cadapter.adapters.lora_directory import write_lora_adapter
from cadapter.adapters.lora_targets import ModelTargets, match_model
from tests.tiny_models import SHAPE, VOCAB

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "phi3": Phi3Config(
        **{key: value for key, value in SHAPE.items() if key != "head_dim"}, pad_token_id=0, eos_token_id=1
    ),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(**SHAPE, **EXPERTS, shared_expert_intermediate_size=24, mlp_only_layers=[1]),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, **EXPERTS, mlp_only_layers=[0]),
}
RANK = 4
TOKENS = torch.randint(VOCAB, (2, 11), generator=torch.Generator().manual_seed(5))


def base_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The frozen base model ``name``: the same random weights each time; norms and biases are not at 1 and 0."""
    torch.manual_seed(sum(name.encode()))
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.to(dtype).requires_grad_(False)


def randomise(blocks: Sequence[LoraBlock], seed: int = 1) -> None:
    """Give every factor random values of a size that moves logits."""
    generator = torch.Generator().manual_seed(seed)
    for block in blocks:
        for pair in block.pairs().values():
            for factor in (pair.A, pair.B):
                factor.data.copy_(0.3 * torch.randn(factor.shape, generator=generator))


def put_lora(
    model: Any, settings: LoraSettings, layers: Sequence[int] | None = None, seed: int = 0
) -> tuple[list[LoraBlock], ModelTargets]:
    """Replace the blocks of ``model`` that LoRA goes to; the blocks and what it goes to."""
    inner = model.model
    layers = range(len(inner.layers)) if layers is None else layers
    targets = match_model(list(inner.layers), layers, settings.targets, settings.dropout)
    blocks = []
    for layer, each in targets.by_layer.items():
        inner.layers[layer] = LoraBlock(inner.layers[layer], layer, each, settings, seed)
        blocks.append(inner.layers[layer])
    return blocks, targets


def factors_of(blocks: Sequence[LoraBlock]) -> dict[str, Tensor]:
    """The factors by the names that they have in training."""
    return {
        f"layers.{block.layer}.{name}.lora_{factor}": getattr(pair, factor).detach()
        for block in blocks
        for name, pair in block.pairs().items()
        for factor in "AB"
    }


def write(directory: Path, blocks: Sequence[LoraBlock], targets: ModelTargets, name: str = "llama") -> Path:
    """Write the LoRA of a whole model."""
    directory.mkdir(exist_ok=True)
    write_lora_adapter(directory, factors_of(blocks), blocks[0].settings, targets, "base", name)
    return directory


def peft_model(name: str, directory: Path, trainable: bool = False) -> Any:
    """The base with the directory's LoRA, as PEFT loads it, without a word of complaint."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about PEFT's own code
        return PeftModel.from_pretrained(base_model(name), directory, is_trainable=trainable)
