"""Blocks in 4 bits: transformers' own nf4 for dense models, the same weights rounded for experts; bytes as counted."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from cadapter.errors import CadapterError, UsageError
from cadapter.models.four_bit import FourBitLinear
from cadapter.models.quantise import (
    KINDS,
    check_mostly_4bit,
    four_bit_weights,
    in_words,
    load_bitsandbytes,
    planned_bytes,
    quantise_block_,
    refuse_unfit,
    stored_bytes,
)

HIDDEN, INNER, LAYERS, VOCAB, EXPERTS = 64, 128, 2, 96, 4
# Every row a multiple of 64 long: others are refused on the CPU. Wide initial values make every weight count.
SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DENSE = ("llama", "mistral", "qwen2", "qwen3", "cohere", "cohere2", "gemma2", "gemma3_text", "phi3", "olmo2", "granite",
         "glm4", "smollm3")  # fmt: skip
SPARSE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "shared_expert_intermediate_size": INNER},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "num_experts_per_tok": 2},
}
LINEAR_ROUTER = {"hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": 2}}
FOUR_BIT_NAMES = re.compile(r"\b(q|k|v|o|qkv|gate|up|gate_up|down)_proj(\.weight)?$")
"""Linear layers and fused experts of every family here, and neither a router nor the gate of a shared expert."""


def make_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The same random frozen model each time."""
    torch.manual_seed(sum(name.encode()))
    config = AutoConfig.for_model(name, **{**SHAPE, **{**SPARSE, **LINEAR_ROUTER}.get(name, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):  # Hugging Face starts them at 0
            nn.init.normal_(parameter, std=0.3)
        parameter.data = parameter.data.to(dtype)  # model.to would round the frequencies of the rotary embedding too
    return model.requires_grad_(False)


def quantised(model: Any) -> Any:
    for block in model.model.layers:
        quantise_block_(block)
    return model


def rounded(model: Any) -> Any:
    """Put in place of each weight what remains of it after quantising: the reference, with plain layers."""
    count = 0
    for name, weight in model.named_parameters():
        if FOUR_BIT_NAMES.search(name):
            packed = bitsandbytes.functional.quantize_4bit(weight.data, compress_statistics=True, quant_type="nf4")
            weight.data = bitsandbytes.functional.dequantize_4bit(*packed)
            count += 1
    assert count > 0
    return model


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


def run_blocks(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states after the last block and norm, and the gradient of a random sum of them at the input."""
    generator = torch.Generator().manual_seed(1)
    dtype = model.dtype
    hidden = torch.randn(2, 12, HIDDEN, generator=generator).to(dtype).requires_grad_()
    found = model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    (found * torch.randn(2, 12, HIDDEN, generator=generator).to(dtype)).sum().backward()
    return found.detach(), hidden.grad


def as_trained(model: Any) -> Any:
    """Keep transformers' own 4-bit layers at the arithmetic of training.

    On CPUs with AVX512-BF16 they would otherwise repack their weights for inference and compute something else.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.fixture
def from_transformers(tmp_path: Path) -> Callable[[Any], Any]:
    """A function that saves a model and loads it with transformers' own nf4 in the dtype of the model."""

    def load(model: Any) -> Any:
        model.save_pretrained(tmp_path)
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=model.dtype,
        )
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=settings, dtype=model.dtype, device_map={"": "cpu"}
        )
        return as_trained(loaded)

    return load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DENSE)
def test_dense_models_equal_transformers_own_nf4(name, dtype, from_transformers):
    model = make_model(name, dtype)
    theirs = from_transformers(model)
    with torch.no_grad():
        exact = model(tokens()).logits
        expected, found = theirs(tokens()).logits, quantised(model)(tokens()).logits
    # Exactly, in bfloat16 too: the same kernels get the same numbers.
    assert torch.equal(found, expected)
    assert (found - exact).abs().max() > 0.01 * exact.abs().max()  # and 4 bits do make a difference
    # Nothing else was quantised, nor left out.
    assert linear_in_4_bits(model, FourBitLinear) == linear_in_4_bits(theirs, Linear4bit)


def linear_in_4_bits(model: Any, kind: type) -> dict[str, bool]:
    return {name: type(module) is kind for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", *SPARSE])
def test_output_and_gradient_are_those_of_the_rounded_weights(name, dtype):
    exact, _ = run_blocks(make_model(name, dtype))
    expected, expected_gradient = run_blocks(rounded(make_model(name, dtype)))
    found, gradient = run_blocks(quantised(make_model(name, dtype)))
    # Exactly: dequantising gives the same weights, and the same products are taken of them.
    assert torch.equal(found, expected)
    assert torch.equal(gradient, expected_gradient)
    assert gradient.abs().max() > 1
    assert (found - exact).abs().max() > 0.5  # and they are not the weights of before


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_pass_without_gradients_changes_nothing(name):
    # On CPUs with AVX512-BF16 bitsandbytes' layers would repack their weights here.
    model = quantised(make_model(name))
    before = run_blocks(model)
    with torch.no_grad():
        evaluated = model.eval()(tokens()).logits
        assert torch.equal(evaluated, model.train()(tokens()).logits)
    for found, expected in zip(run_blocks(model), before, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", SPARSE)
def test_recomputed_blocks_have_the_same_gradient_and_leave_no_dequantised_experts(name):
    _, expected = run_blocks(quantised(make_model(name)))
    model = quantised(make_model(name))
    for block in model.model.layers:
        recompute_(block)
    _, found = run_blocks(model)
    assert torch.equal(found, expected)
    # Recomputation stops in the middle of a forward pass: the cache of what was dequantised must end all the same.
    assert not parametrize._cache_enabled
    assert not parametrize._cache


def recompute_(block: nn.Module) -> None:
    forward = block.forward
    block.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


@pytest.mark.parametrize(
    ("name", "beside_attention"),
    [
        ("llama", ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]),
        ("mixtral", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ("qwen3_moe", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        (
            "qwen2_moe",  # its router is mlp.gate, and mlp.shared_expert_gate weighs the shared expert
            [
                "mlp.experts.gate_up_proj",
                "mlp.experts.down_proj",
                "mlp.shared_expert.gate_proj.weight",
                "mlp.shared_expert.up_proj.weight",
                "mlp.shared_expert.down_proj.weight",
            ],
        ),
        (
            "hunyuan_v1_moe",  # its router is the plain nn.Linear mlp.gate.wg
            [
                "mlp.experts.gate_up_proj",
                "mlp.experts.down_proj",
                "mlp.shared_mlp.gate_proj.weight",
                "mlp.shared_mlp.up_proj.weight",
                "mlp.shared_mlp.down_proj.weight",
            ],
        ),
    ],
)
def test_projections_are_quantised_and_scores_are_not(name, beside_attention):
    attention = [f"self_attn.{letter}_proj.weight" for letter in "qkvo"]
    block = make_model(name).model.layers[0]
    assert four_bit_weights(block) == attention + beside_attention
    kept = {key: value.clone() for key, value in block.named_parameters() if key not in four_bit_weights(block)}
    quantise_block_(block)
    for key, value in kept.items():
        assert torch.equal(block.get_parameter(key), value)
    assert not any(parameter.requires_grad for parameter in block.parameters())


def test_convolutions_and_other_kinds_of_linear_layers_are_left_alone():
    class Router(nn.Linear):
        pass

    block = nn.ModuleDict({"conv": nn.Conv1d(8, 8, 64), "proj": nn.Linear(64, 8), "choice": Router(64, 8)})
    block["router"] = nn.ModuleDict({"layer": nn.Linear(64, 8)})  # as in JetMoe and Longcat
    assert four_bit_weights(block) == ["proj.weight"]


@pytest.mark.parametrize("name", ["qwen2", "qwen2_moe"])
def test_sources_are_freed_one_by_one(name, monkeypatch):
    block = make_model(name).model.layers[0]
    storages = [StorageWeakRef(block.get_parameter(key).untyped_storage()) for key in four_bit_weights(block)]
    alive = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        alive.append(sum(not storage.expired() for storage in storages))
        return quantise_4bit(*args, **kwargs)

    quantise_4bit = bitsandbytes.functional.quantize_4bit
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", counting)
    quantise_block_(block)
    assert alive == list(range(len(storages), 0, -1))
    assert all(storage.expired() for storage in storages)


def bytes_in_4_bits(*shapes: tuple[int, ...]) -> tuple[int, int]:
    """Packed numbers; and per tensor a byte for every 64, a float32 for every 256 of those, two tables and a mean."""
    packed = sum(math.prod(shape) // 2 for shape in shapes)
    constants = 0
    for shape in shapes:
        scales = math.prod(shape) // 64
        constants += scales + 4 * math.ceil(scales / 256) + 4 * 16 + 4 * 256 + 4
    return packed, constants


ATTENTION_SHAPES = ((64, 64), (32, 64), (32, 64), (64, 64))


@pytest.mark.parametrize(
    ("name", "dtype", "shapes", "others"),
    [
        ("llama", torch.bfloat16, [*ATTENTION_SHAPES, (128, 64), (128, 64), (64, 128)], 2 * 64),
        ("qwen2", torch.float32, [*ATTENTION_SHAPES, (128, 64), (128, 64), (64, 128)], 2 * 64 + 64 + 32 + 32),
        ("mixtral", torch.bfloat16, [*ATTENTION_SHAPES, (4, 256, 64), (4, 64, 128)], 2 * 64 + 4 * 64),
    ],
)
def test_bytes_are_counted_by_kind(name, dtype, shapes, others):
    blocks = list(make_model(name, dtype).model.layers)
    planned = sum(map(planned_bytes, blocks))
    on_meta = make_model(name, dtype).to("meta").model.layers
    numbers = others + sum(map(math.prod, shapes))
    kind = str(dtype).removeprefix("torch.")
    assert stored_bytes(blocks) == {**dict.fromkeys(KINDS, 0), kind: LAYERS * numbers * dtype.itemsize}
    for block in blocks:
        quantise_block_(block)
    packed, constants = bytes_in_4_bits(*shapes)
    found = stored_bytes(blocks)
    assert found == {
        **dict.fromkeys(KINDS, 0),
        "4-bit": LAYERS * packed,
        "quantisation constants": LAYERS * constants,
        kind: LAYERS * others * dtype.itemsize,
    }
    assert planned == sum(found.values()) == sum(map(planned_bytes, on_meta)) == sum(map(planned_bytes, blocks))
    check_mostly_4bit(found)
    assert in_words(found).startswith(f"4-bit {LAYERS * packed:,} bytes (")


def test_shared_storage_counts_once():
    block = make_model("llama").model.layers[0]
    quantise_block_(block)
    assert stored_bytes([block, block]) == stored_bytes([block])
    plain = nn.Linear(64, 64, bias=False)
    plain.register_buffer("upper", plain.weight.detach()[:32])
    plain.register_buffer("flag", torch.ones(3, dtype=torch.bool))
    assert stored_bytes([plain]) == {**dict.fromkeys(KINDS, 0), "float32": 4 * 64 * 64, "other": 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPARSE)
def test_experts_that_were_left_out_fail_the_check(name, dtype, from_transformers):
    check_mostly_4bit(stored_bytes(quantised(make_model(name, dtype)).model.layers))
    theirs = stored_bytes(from_transformers(make_model(name, dtype)).model.layers)  # experts are no linear layers to it
    assert theirs["4-bit"] > 0
    with pytest.raises(CadapterError, match=r"(float32|bfloat16) [\d,]+ bytes \(\d\d") as caught:
        check_mostly_4bit(theirs)
    assert caught.value.exit_code == 1


def test_half_of_the_bytes_is_not_most():
    counts = {**dict.fromkeys(KINDS, 0), "4-bit": 50, "bfloat16": 50}
    with pytest.raises(CadapterError, match=r"4-bit 50 bytes \(50.0%\), bfloat16 50 bytes \(50.0%\)"):
        check_mostly_4bit(counts)
    check_mostly_4bit({**counts, "4-bit": 51})
    with pytest.raises(CadapterError, match="They hold nothing"):
        check_mostly_4bit(dict.fromkeys(KINDS, 0))


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("llama", {"intermediate_size": 96}, r"mlp\.down_proj\.weight \[64, 96\]"),
        ("qwen3_moe", {"moe_intermediate_size": 96}, r"mlp\.experts\.down_proj \[4, 64, 96\]"),
    ],
)
def test_rows_that_the_cpu_gets_wrong_are_refused(name, changes, named):
    block = make_model(name, **changes).model.layers[0]
    before = stored_bytes([block])
    with pytest.raises(UsageError, match=named) as caught:
        quantise_block_(block)
    assert "multiple of 64" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3  # one tensor is at fault, and only that is named
    assert stored_bytes([block]) == before  # nothing was converted
    refuse_unfit(block, torch.device("cuda"))  # GPUs get them right


def test_tensors_too_large_for_bitsandbytes_are_refused():
    experts = nn.Module()
    experts.down_proj = nn.Parameter(torch.empty(256, 7168, 2048, device="meta"))
    with pytest.raises(UsageError, match=r"down_proj \[256, 7168, 2048\]: .* 2,147,483,647 numbers"):
        refuse_unfit(experts, torch.device("cuda"))


def test_a_block_without_weights_to_quantise_is_refused():
    block = make_model("llama").model.layers[0]
    quantise_block_(block)
    with pytest.raises(UsageError, match="no weights"):
        quantise_block_(block)


def test_missing_bitsandbytes_is_said_before_anything_is_converted(monkeypatch):
    block = make_model("llama").model.layers[0]
    before = stored_bytes([block])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(UsageError, match="pip install -U bitsandbytes"):
        quantise_block_(block)
    monkeypatch.undo()
    assert stored_bytes([block]) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where bitsandbytes finds no CUDA")
def test_a_bitsandbytes_without_a_library_for_the_gpu_is_refused():
    load_bitsandbytes(torch.device("cpu"))
    with pytest.raises(UsageError, match="no library that works with CUDA"):
        load_bitsandbytes(torch.device("cuda"))
