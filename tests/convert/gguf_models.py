"""Whole models as GGUF files, and llama.cpp to run them: for tests only.

The facts of llama.cpp's formats are written out here once more, apart from what cadapter says of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "cohere": gguf.MODEL_ARCH.COMMAND_R,
    "cohere2": gguf.MODEL_ARCH.COHERE2,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "glm4": gguf.MODEL_ARCH.GLM4,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
}
PERMUTED = ("llama", "mistral", "mixtral", "granite", "smollm3")
"""Families whose rows of q and k have another order in GGUF files."""

NO_WINDOW: dict[str, Any] = {"use_sliding_window": False, "sliding_window": None}
NO_BIAS: dict[str, Any] = {"attention_bias": False, "mlp_bias": False}
SLIDING, FULL = "sliding_attention", "full_attention"
PLAIN: dict[str, dict[str, Any]] = {
    "mistral": NO_WINDOW,
    "mixtral": NO_WINDOW,
    "qwen2_moe": {**NO_WINDOW, "layer_types": [FULL] * 3},
    "qwen3_moe": {**NO_WINDOW, **NO_BIAS},
    "cohere": {"use_qk_norm": False},  # llama.cpp expects it of 64 layers and more
    "cohere2": {**NO_BIAS, "layer_types": [SLIDING] * 3},
    "gemma2": {"query_pre_attn_scalar": 8},  # the size of a head, as in all models but the largest
    "gemma3_text": {**NO_BIAS, "query_pre_attn_scalar": 8, "layer_types": [SLIDING] * 3},
    "phi3": NO_WINDOW,
    "olmo2": NO_BIAS,
    "granite": NO_BIAS,
    "glm4": NO_BIAS,
    "smollm3": {**NO_WINDOW, **NO_BIAS, "no_rope_layers": [1, 1, 1], "layer_types": [FULL] * 3},
}
"""How the models of ``tests/tiny_models.py`` must differ for llama.cpp, which takes the rest for granted."""


def in_order_of_llama_cpp(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: of each head, the first of the second half comes after the first of the first half, and so on."""
    size = len(rows) // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def write_base(directory: Path, output: Path) -> Path:
    """Write the model in ``directory``, with all of its weights in float32, as llama.cpp reads it."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config, kind = model.config, ARCHITECTURES[model.config.model_type]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    writer = gguf.GGUFWriter(output, gguf.MODEL_ARCH_NAMES[kind])
    _describe(writer, config)
    writer.add_tokenizer_model("none")  # the tests speak in ids
    tied = config.tie_word_embeddings
    for name, values in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        for part, each in _parts(config, name, values.numpy()):
            known = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert known, part
            writer.add_tensor(known, np.ascontiguousarray(each))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


def _describe(writer: gguf.GGUFWriter, config: Any) -> None:
    """What llama.cpp must know of a model besides its weights."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = config.rope_parameters.get(SLIDING, config.rope_parameters)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(int(head * rotary.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rotary["rope_theta"])
    writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
    for key, add in (
        ("rms_norm_eps", writer.add_layer_norm_rms_eps),
        ("layer_norm_eps", writer.add_layer_norm_eps),
        ("num_local_experts" if config.model_type == "mixtral" else "num_experts", writer.add_expert_count),
        ("num_experts_per_tok", writer.add_expert_used_count),
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
        ("logit_scale", writer.add_logit_scale),
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        value = getattr(config, key, None)
        if value is not None:
            add(value)
    window = getattr(config, "sliding_window", None)
    if window or config.model_type == "phi3":
        writer.add_sliding_window(window or 0)


def _parts(config: Any, name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """A tensor of the model as the tensor or tensors of the file."""
    if name.endswith("mlp.experts.gate_up_proj"):
        for part, half in zip(("gate_proj", "up_proj"), np.split(values, 2, axis=1), strict=True):
            yield name.replace("gate_up_proj", f"{part}.weight"), half
        return
    if name.endswith("mlp.experts.down_proj"):
        name += ".weight"
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    module = name.split(".")[-2]
    if module in heads and config.model_type in PERMUTED:
        values = in_order_of_llama_cpp(values, heads[module])
    if name.endswith("norm.weight") and config.model_type.startswith("gemma"):
        values = values + 1
    yield name, values


def run_llama_cpp(base: Path, tokens: torch.Tensor, lora: Path | None = None) -> torch.Tensor:
    """Logits of each row of ``tokens`` as llama.cpp computes them, with keys and values kept in float32."""
    from llama_cpp import GGML_TYPE_F32, Llama

    program = Llama(
        str(base), lora_path=str(lora) if lora else None, logits_all=True, n_ctx=tokens.shape[1], n_threads=1,
        n_threads_batch=1, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False,
    )  # fmt: skip
    rows = []
    for row in tokens.tolist():
        program.reset()
        program.eval(row)
        rows.append(torch.from_numpy(program.scores[: len(row)].copy()))
    program.close()
    return torch.stack(rows)
