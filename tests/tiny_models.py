"""Tiny random Hugging Face models of every supported shape, in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

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
TIED: dict[str, Any] = {"tie_word_embeddings": True}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""For families whose own are outside of this vocabulary, or are a padding token's."""

# The first layer sees everything, the others a window: masks by layer.
MIXED_WINDOWS: dict[str, Any] = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
SLIDING, FULL = "sliding_attention", "full_attention"
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
QWEN2_EXPERTS: dict[str, Any] = {
    **EXPERTS,
    "shared_expert_intermediate_size": 40,
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "layer_types": [SLIDING, FULL, SLIDING],
}
QWEN3_EXPERTS: dict[str, Any] = {
    **EXPERTS,
    "norm_topk_prob": True,
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "attention_bias": True,
}
ONE_DENSE: dict[str, Any] = {"mlp_only_layers": [1]}
GEMMA: dict[str, Any] = {
    **SPECIAL,
    **TIED,
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 5,
    "final_logit_softcapping": 2.0,
}

DIFFERENCES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {},
    "qwen2-windows": MIXED_WINDOWS,
    "qwen3-windows": MIXED_WINDOWS,
    "llama-tied": TIED,
    "mistral-tied": {"sliding_window": WINDOW, **TIED},
    "qwen2-tied": TIED,
    "qwen3-tied": TIED,
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": QWEN2_EXPERTS,
    "qwen2_moe-dense": {**QWEN2_EXPERTS, **ONE_DENSE},
    "qwen3_moe": QWEN3_EXPERTS,
    "qwen3_moe-dense": {**QWEN3_EXPERTS, **ONE_DENSE},
    "cohere": {**SPECIAL, **TIED, "logit_scale": 1.7, "use_qk_norm": True},
    "cohere2": {
        **SPECIAL,
        **TIED,
        "logit_scale": 0.6,
        "attention_bias": True,
        "sliding_window": WINDOW,
        "layer_types": [SLIDING, SLIDING, FULL],  # the last has no rotary embedding
    },
    "gemma2": {**GEMMA, "layer_types": [SLIDING, FULL, SLIDING], "attn_logit_softcapping": 1.5},
    "gemma3_text": {**GEMMA, "layer_types": [SLIDING, FULL, SLIDING], "attention_bias": True},
    "phi3": {**SPECIAL, "sliding_window": WINDOW, "partial_rotary_factor": 0.5},
    "olmo2": {**SPECIAL, "attention_bias": True},
    "granite": {
        "attention_bias": True,
        "mlp_bias": True,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 0.7,
        "attention_multiplier": 0.2,
    },
    "glm4": {**SPECIAL, "partial_rotary_factor": 0.5, "attention_bias": True},
    "smollm3": {
        **SPECIAL,
        **TIED,
        "attention_bias": True,
        "mlp_bias": True,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "no_rope_layers": [1, 0, 1],  # the one without has the window
    },
}
"""What each model has besides SHAPE, or instead; its name begins with its ``model_type``."""

CONFIGS: dict[str, PretrainedConfig] = {
    name: AutoConfig.for_model(name.partition("-")[0], **{**SHAPE, **settings})
    for name, settings in DIFFERENCES.items()
}
"""By name; every window is shorter than the sequences of the tests."""

FAMILY_NAMES = tuple(name for name in CONFIGS if "-" not in name)
"""One model of each family."""


def make_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Build the model ``name`` in memory: the same random float32 weights each time, then cast to ``dtype``."""
    config = type(CONFIGS[name]).from_dict({**CONFIGS[name].to_dict(), **changes})
    torch.manual_seed(sum(name.encode()))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:  # Hugging Face starts them all alike, which would hide a norm that is left out
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
            elif parameter_name.endswith("bias"):  # and biases at 0
                parameter.normal_(std=0.3)
        embedding = model.get_input_embeddings()
        if embedding.padding_idx is not None:  # and the padding token's row at 0
            embedding.weight[embedding.padding_idx].normal_(std=config.initializer_range)
    if dtype == torch.float64:  # torch's grouped product, which runs the experts otherwise, has no float64
        model.set_experts_implementation("eager")
    return model.to(dtype).requires_grad_(False)


def save_model(name: str, directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save the model ``name`` in several shards, experts one by one as on the hub, and return ``directory``."""
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
