"""LoRAs as GGUF files, read back with the gguf package: names, shapes, types, scale and the order of rows."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cadapter.adapters.directory import read_control_adapter
from cadapter.adapters.lora import LoraSettings
from cadapter.convert.add_lora import to_add_lora
from cadapter.convert.gguf import lay_out
from cadapter.convert.gguf_layout import ARCHITECTURES
from cadapter.convert.operators import Dial
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.families import FAMILIES
from tests.adapters import lora_cases
from tests.convert.gguf_models import PERMUTED, in_order_of_llama_cpp
from tests.convert.lora_models import changes, linear_layers, save_lora, to_gguf
from tests.tiny_models import FAMILY_NAMES

HEADS, KEY_VALUE_HEADS = 4, 2

NAMES = {
    "self_attn.q_proj": ["attn_q"],
    "self_attn.k_proj": ["attn_k"],
    "self_attn.v_proj": ["attn_v"],
    "self_attn.qkv_proj": ["attn_qkv"],
    "self_attn.o_proj": ["attn_output"],
    "mlp.gate_proj": ["ffn_gate"],
    "mlp.up_proj": ["ffn_up"],
    "mlp.gate_up_proj": ["ffn_up"],
    "mlp.down_proj": ["ffn_down"],
    "mlp.gate": ["ffn_gate_inp"],
    "mlp.experts.gate_up_proj": ["ffn_gate_exps", "ffn_up_exps"],
    "mlp.experts.down_proj": ["ffn_down_exps"],
    "mlp.shared_expert.gate_proj": ["ffn_gate_shexp"],
    "mlp.shared_expert.up_proj": ["ffn_up_shexp"],
    "mlp.shared_expert.down_proj": ["ffn_down_shexp"],
    "mlp.shared_expert_gate": ["ffn_gate_inp_shexp"],
}
"""What llama.cpp's converter calls a module: learnt from what it wrote for these models."""

ARCHITECTURE_NAMES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "cohere": "command-r", "cohere2": "cohere2", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "phi3": "phi3", "olmo2": "olmo2", "granite": "granite", "glm4": "glm4",
    "smollm3": "smollm3",
}  # fmt: skip
ROUNDING = 2e-6
"""Of a tensor's largest entry: a merged weight in float32 less the base's, each of order 1, errs by some 1e-7."""


def expected_changes(name: str, found: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """``found``, by tensor in the model, by tensor in a GGUF file and in its order of rows."""
    expected = {}
    for tensor, change in found.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+?)(?:\.weight)?", tensor)
        assert match, tensor
        names = NAMES[match[2]]
        for part, values in zip(names, np.split(change.double().numpy(), len(names), axis=-2), strict=True):
            if name in PERMUTED and part in ("attn_q", "attn_k"):
                values = in_order_of_llama_cpp(values, HEADS if part == "attn_q" else KEY_VALUE_HEADS)
            expected[f"blk.{match[1]}.{part}.weight"] = values
    return expected


class Read:
    """A GGUF LoRA: its ``fields``, its ``tensors`` (values and type), and what each pair adds to its weight."""

    def __init__(self, file: Path) -> None:
        reader = gguf.GGUFReader(file)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {t.name: (gguf.dequantize(t.data, t.tensor_type), t.tensor_type.name) for t in reader.tensors}

    def products(self) -> dict[str, np.ndarray]:
        """By the weight's name ``alpha / r · B·A``, as llama.cpp applies it."""
        weights = {name.rpartition(".lora_")[0] for name in self.tensors}
        assert len(self.tensors) == 2 * len(weights)
        found = {}
        for weight in weights:
            A, B = (self.tensors[f"{weight}.lora_{part}"][0].astype(np.float64) for part in "ab")
            found[weight] = self.fields["adapter.lora.alpha"] / B.shape[-1] * B @ A
        return found


def check_products(name: str, base: Path, lora: Path, file: Path) -> None:
    """Make sure that ``file`` adds to each weight what PEFT adds when it merges ``lora``, and to no other."""
    expected, found = expected_changes(name, changes(base, lora)), Read(file).products()
    assert found.keys() == expected.keys()
    for tensor, values in expected.items():
        np.testing.assert_allclose(found[tensor], values, rtol=0, atol=ROUNDING * max(1, np.abs(values).max()))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_linear_layer_of_every_family(name, model_directory, tmp_path):
    base = model_directory(name)
    modules = linear_layers(base)
    lora = save_lora(base, tmp_path / "lora", lora_alpha=6, target_modules=modules)
    summary = to_gguf(lora, tmp_path / "lora.gguf")
    check_products(name, base, lora, tmp_path / "lora.gguf")
    read = Read(tmp_path / "lora.gguf")
    assert {name: read.fields[name] for name in ("general.type", "adapter.type", "general.architecture")} == {
        "general.type": "adapter", "adapter.type": "lora", "general.architecture": ARCHITECTURE_NAMES[name],
    }  # fmt: skip
    assert read.fields["adapter.lora.alpha"] == 6
    assert {kind for _, kind in read.tensors.values()} == {"F32"}
    reordered = {pair.tensor.split(".")[2] for pair in lay_out(lora).pairs if pair.reordered}
    assert reordered == ({"attn_q", "attn_k"} if name in PERMUTED else set())
    assert summary.tensors == {"f32": len(read.tensors)}
    assert summary.bytes == {"f32": sum(values.nbytes for values, _ in read.tensors.values())}
    assert (summary.rounding, summary.kept) == (0.0, {})


def test_every_family_is_known():
    assert ARCHITECTURES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_and_routers(name, model_directory, tmp_path):
    base = model_directory(name)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    modules = ["q_proj", "shared_expert_gate"] if name == "qwen2_moe" else ["q_proj"]
    lora = save_lora(
        base,
        tmp_path / "lora",
        lora_alpha=8,
        target_modules=modules,
        target_parameters=parameters,
    )
    to_gguf(lora, tmp_path / "lora.gguf")
    check_products(name, base, lora, tmp_path / "lora.gguf")
    tensors = Read(tmp_path / "lora.gguf").tensors
    shapes = {
        name: tensors[f"blk.1.{name}"][0].shape for name in ("ffn_down_exps.weight.lora_a", "ffn_up_exps.weight.lora_b")
    }
    assert [len(shape) for shape in shapes.values()] == [3, 3]
    assert {shape[0] for shape in shapes.values()} == {4}  # experts


@pytest.mark.parametrize(
    ("name", "targets"), [("llama", None), ("mixtral", ("q_proj", "experts.down_proj", "experts.gate_up_proj"))]
)
def test_loras_that_cadapter_trained(name, targets, tmp_path):
    model = lora_cases.base_model(name)
    model.save_pretrained(tmp_path / "base")
    settings = LoraSettings(rank=4, alpha=2.0, dtype=torch.bfloat16, targets=targets)
    blocks, found = lora_cases.put_lora(model, settings, layers=(0, 2))
    lora_cases.randomise(blocks)
    lora = lora_cases.write(tmp_path / "lora", blocks, found, name)
    to_gguf(lora, tmp_path / "lora.gguf", base=tmp_path / "base")
    check_products(name, tmp_path / "base", lora, tmp_path / "lora.gguf")
    assert {weight.split(".")[1] for weight in Read(tmp_path / "lora.gguf").products()} == {"0", "2"}


def test_a_head_of_its_own(model_directory, tmp_path):
    base = model_directory("llama")
    lora = save_lora(base, tmp_path / "lora", target_modules=["lm_head"])
    to_gguf(lora, tmp_path / "lora.gguf")
    ((name, found),) = Read(tmp_path / "lora.gguf").products().items()
    assert name == "output.weight"
    np.testing.assert_allclose(found, changes(base, lora)["lm_head.weight"].numpy(), rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({"r": 4, "lora_alpha": 8}, 8),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 16),  # alpha / √r · r
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj": 3}}, None),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"k_proj": 2}}, 8),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"k_proj": 2}, "use_rslora": True}, None),
    ],
)
def test_the_scale_is_right_whatever_it_is_made_of(settings, alpha, model_directory, tmp_path):
    base = model_directory("qwen3")
    lora = save_lora(base, tmp_path / "lora", target_modules=["q_proj", "k_proj", "v_proj"], **settings)
    to_gguf(lora, tmp_path / "lora.gguf")
    check_products("qwen3", base, lora, tmp_path / "lora.gguf")
    if alpha is not None:
        assert Read(tmp_path / "lora.gguf").fields["adapter.lora.alpha"] == alpha


def test_a_converted_control_adapter_has_scale_one(model_directory, make_adapter, tmp_path):
    base = model_directory("llama")
    to_add_lora(Checkpoint(base), str(base), read_control_adapter(make_adapter(base)), tmp_path / "lora", Dial())
    to_gguf(tmp_path / "lora", tmp_path / "lora.gguf")
    read = Read(tmp_path / "lora.gguf")
    assert read.fields["adapter.lora.alpha"] == 4  # r
    assert {name.split(".", 2)[2] for name in read.products()} == {"attn_output.weight", "ffn_down.weight"}
    check_products("llama", base, tmp_path / "lora", tmp_path / "lora.gguf")


# ---- types of numbers -------------------------------------------------------------------------------------------

KEPT = re.compile(r"blk\.\d\.(.*lora_b|ffn_down\.weight\.lora_a)")
"""Tensors of these models whose rows, 4 and 48 numbers, are no multiple of 32."""


@pytest.mark.parametrize(
    ("outtype", "error"),
    [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", (0.5 + 127 * 2**-11) / 127)],
)
def test_types_of_numbers(outtype, error, model_directory, tmp_path):
    """Half a unit in the last place; Q8_0 has 127 steps to the largest of 32 numbers, and their size as f16."""
    base = model_directory("llama")
    lora = save_lora(base, tmp_path / "lora", target_modules=linear_layers(base))
    to_gguf(lora, tmp_path / "exact.gguf")
    summary = to_gguf(lora, tmp_path / "lora.gguf", outtype)
    exact, found = Read(tmp_path / "exact.gguf").tensors, Read(tmp_path / "lora.gguf").tensors
    assert found.keys() == exact.keys()
    kept, largest = set(), 0.0
    for name, (values, kind) in found.items():
        reference = exact[name][0].astype(np.float64)
        step = error
        if kind.lower() != outtype:
            assert (kind, KEPT.fullmatch(name) is None) == ("F16", False)
            kept.add(name)
            step = 2**-11
        scale = np.abs(reference)
        if kind == "Q8_0":  # the largest of 32 numbers
            scale = np.repeat(scale.reshape(-1, 32).max(1), 32).reshape(reference.shape)
        assert (np.abs(values - reference) <= step * scale + 2**-25).all(), name  # f16's numbers below 6e-5 are coarser
        largest = max(largest, np.linalg.norm(values - reference) / np.linalg.norm(reference))
    assert len(kept) == (24 if outtype == "q8_0" else 0)
    assert summary.kept.keys() == kept
    assert all("no multiple of 32" in why and to == "f16" for to, why in summary.kept.values())
    assert summary.rounding == pytest.approx(largest, rel=1e-4)
    assert summary.rounding > 0
    assert summary.tensors.total() == len(found)


def test_values_that_a_type_cannot_hold_stay_f32(model_directory, tmp_path):
    base = model_directory("llama")
    lora = save_lora(base, tmp_path / "lora", target_modules=["q_proj"])
    file = lora / "adapter_model.safetensors"
    tensors = load_file(file)
    large, huge = (f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight" for layer in (0, 1))
    tensors[large][0, 0], tensors[huge][0, 0] = 7e4, 1e9  # f16 ends at 65504, q8_0 at 127 times that
    save_file(tensors, file)
    for outtype, stay in (("f16", (0, 1)), ("q8_0", (1,)), ("bf16", ())):
        summary = to_gguf(lora, tmp_path / "lora.gguf", outtype, force=True)
        found = Read(tmp_path / "lora.gguf").tensors
        kept = {f"blk.{layer}.attn_q.weight.lora_a" for layer in stay}
        assert {name for name, (_, kind) in found.items() if kind == "F32"} == kept
        assert {name for name, (_, why) in summary.kept.items() if "beyond the range" in why} == kept
        assert all(np.isfinite(values).all() for values, _ in found.values())
