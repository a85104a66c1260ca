"""The quickstart's base model as a GGUF file, so that llama.cpp can be tried without a model from the hub.

python base_gguf.py BASE OUTPUT.gguf

For this one model only, a Llama with a byte-level BPE tokenizer of its own, which llama.cpp's convert_hf_to_gguf.py
does not know. Models that others use are converted with that.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection as llama.cpp has them: the two halves of each head alternate."""
    size = len(rows) // heads
    return rows.reshape(heads, 2, size // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def add_shape(writer: gguf.GGUFWriter, model: LlamaForCausalLM) -> None:
    """What llama.cpp must know of the model besides its weights."""
    config = model.config
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def add_tokenizer(writer: gguf.GGUFWriter, directory: Path) -> None:
    """The tokens, which of them are special, and the merges of the byte-level BPE."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)


def write(directory: Path, output: Path) -> None:
    """Write the model in ``directory`` with all of its weights in float32."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    writer = gguf.GGUFWriter(output, "llama")
    add_shape(writer, model)
    add_tokenizer(writer, directory)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        module, values = name.split(".")[-2], tensor.numpy()
        values = permuted(values, heads[module]) if module in heads else values
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{sys.argv[2]}: {Path(sys.argv[2]).stat().st_size:,} bytes")
