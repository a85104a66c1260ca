"""Conversions for every family: the adapter applied natively, merged, as pairs for each writer, and through peft."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cadapter.adapters.directory import read_control_adapter
from cadapter.adapters.lora import LoraSettings
from cadapter.convert.add_lora import to_add_lora
from cadapter.convert.lora_directory import read_lora
from cadapter.convert.merge import merge_model
from cadapter.convert.mult_lora import to_mult_lora
from cadapter.convert.operators import Dial
from cadapter.convert.plan import make_recipe
from cadapter.errors import UsageError
from cadapter.models.checkpoint import Checkpoint
from tests.adapters.lora_cases import put_lora, randomise, write
from tests.reference import naive
from tests.tiny_models import CONFIGS, FAMILY_NAMES, HIDDEN, LAYERS

EXPERTS = tuple(name for name in CONFIGS if "_moe" in name or name == "mixtral")
FORMATS = [*((name, False) for name in CONFIGS), *((name, True) for name in EXPERTS)]
"""Every model as on the hub, and those with experts also with fused ones on disk."""

PARALLEL = ("cohere", "cohere2")
STRENGTHS = [1.0, -1.0, 0.5]
SPECTRAL = 0.3

ROUNDING = 1e-5
"""Of the largest logit: 2e-6 is found, what float32 keeps of (I + W)·(w·x) against ((I + W)·w)·x in three blocks."""

WRITER = re.compile(r"self_attn\.o_proj|mlp\.(shared_expert\.|experts\.\d+\.|experts\.)?down_proj|.*\.experts\.\d+\.w2")
"""What writes to the residual stream, by name within a layer; all families of the table name it alike."""


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def merge(base: Path, adapter: Path, output: Path, strength: float = 1.0) -> list[str]:
    """Merge as the command does; returns the notes."""
    model = Checkpoint(base)
    recipe = make_recipe(model, adapter, Dial(strength=strength))
    merge_model(model, recipe.plan, output, lambda summary: "card\n")
    return recipe.notes


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def layer_and_module(tensor: str) -> tuple[int | None, str]:
    """A tensor's layer and, within it, the name of its module; those outside of layers have none."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+?)(\.weight|\.bias)?", tensor)
    return (int(match[1]), match[2]) if match else (None, tensor)


@pytest.mark.parametrize(("name", "fused"), FORMATS)
def test_merged_models_are_the_adapter_applied_natively(
    name, fused, model_directory, make_adapter, native_logits, tokens, logits, tmp_path
):
    base = model_directory(name, fused=fused)
    blocks = [("block", "general")] if name in PARALLEL else []
    for site, form in [("writes", "general"), ("mlp", "symmetric"), *blocks]:
        adapter = make_adapter(base, f"adapter-{site}", site, SPECTRAL, form=form)
        expected = native_logits(base, adapter, tokens, [0.0, *STRENGTHS])
        for strength, native in zip(STRENGTHS, expected[1:], strict=True):
            assert error(native, expected[0]) > 0.02
            output = tmp_path / f"merged-{site}-{strength}"
            assert merge(base, adapter, output, strength) == []
            assert error(logits(output, tokens), native) < ROUNDING


@pytest.mark.parametrize(("name", "fused"), FORMATS)
def test_merged_weights_are_the_naive_product(name, fused, model_directory, make_adapter, tmp_path):
    base = model_directory(name, fused=fused)
    files = read_control_adapter(make_adapter(base, layers=(0, 1)))
    merge(base, files.path, tmp_path / "merged")
    found, expected = tensors_of(tmp_path / "merged"), {k: v.double() for k, v in tensors_of(base).items()}
    assert found.keys() == expected.keys()
    for tensor in found:
        layer, module = layer_and_module(tensor)
        if layer in files.layers and WRITER.fullmatch(module):
            factors = files.layers[layer]
            expected[tensor] = naive.merged(expected[tensor], naive.full_matrix(factors.A, factors.B, files.scale))
        # float32 rounding of sums over H = 32 terms of order 1 errs by some 1e-7
        torch.testing.assert_close(found[tensor].double(), expected[tensor], rtol=2e-6, atol=2e-6, msg=tensor)


@pytest.mark.parametrize("name", [name for name in FAMILY_NAMES if name not in PARALLEL])
def test_block_adapters_of_sequential_blocks_are_approximated_and_it_is_said(
    name, model_directory, make_adapter, native_logits, tokens, logits, tmp_path
):
    base = model_directory(name)
    adapter = make_adapter(base, site="block", spectral=SPECTRAL)
    [note] = merge(base, adapter, tmp_path / "merged")
    assert "approximation" in note
    [native] = native_logits(base, adapter, tokens, [1.0])
    assert error(logits(tmp_path / "merged", tokens), native) > 0.005
    assert to_mult_lora(read_control_adapter(adapter), tmp_path / "mult", Dial()).notes == (note,)


@pytest.mark.parametrize(("name", "fused"), [pair for pair in FORMATS if pair[0] in EXPERTS])
def test_a_multiplicative_lora_has_a_pair_for_each_writer_and_merges_to_the_same_bytes(
    name, fused, model_directory, make_adapter, tmp_path
):
    base = model_directory(name, fused=fused)
    adapter = make_adapter(base, spectral=SPECTRAL, layers=(0, 1))
    summary = to_mult_lora(read_control_adapter(adapter), tmp_path / "mult", Dial(strength=-0.5))  # without the base
    places = [layer_and_module(tensor) for tensor in Checkpoint(base).names()]
    writers = {f"model.layers.{layer}.{name}" for layer, name in places if layer in (0, 1) and WRITER.fullmatch(name)}
    pairs = load_file(tmp_path / "mult" / "adapter_model.safetensors")
    assert set(pairs) == {f"base_model.model.{writer}.lora_{part}.weight" for writer in writers for part in "AB"}
    assert {tuple(pair.shape) for pair in pairs.values()} == {(4, HIDDEN), (HIDDEN, 4)}
    assert summary.pairs == len(writers)
    assert any("experts" in writer for writer in writers)
    merge(base, adapter, tmp_path / "merged", -0.5)
    merge(base, tmp_path / "mult", tmp_path / "merged-mult")
    expected, found = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "merged-mult")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[tensor], expected[tensor]) for tensor in found)
    card = (tmp_path / "mult" / "README.md").read_text()
    assert ("experts.*." in card, "experts.0." in card) == (not fused, False)


def test_pairs_of_single_experts_do_not_fit_fused_ones(model_directory, make_adapter, tmp_path):
    adapter = read_control_adapter(make_adapter(model_directory("mixtral")))
    to_mult_lora(adapter, tmp_path / "mult", Dial())
    with pytest.raises(UsageError, match=r"has no tensor model\.layers\.0\.block_sparse_moe\.experts\.0\.w2\.weight"):
        merge(model_directory("mixtral", fused=True), tmp_path / "mult", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_records_nothing_of_its_experts_asks_for_the_base(model_directory, make_adapter, tmp_path):
    base = model_directory("mixtral")
    adapter = read_control_adapter(make_adapter(base))
    adapter.facts = {}
    with pytest.raises(UsageError, match=r"does not record the experts of its base model(.|\n)*--base"):
        to_mult_lora(adapter, tmp_path / "mult", Dial())
    assert to_mult_lora(adapter, tmp_path / "mult", Dial(), base=Checkpoint(base)).pairs == LAYERS * (1 + 4)


def peft_logits(base: Path, lora: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the base with a LoRA that ``PeftModel.from_pretrained`` finds complete."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        model = PeftModel.from_pretrained(model, lora)
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def without_biases(base: Path, directory: Path) -> Path:
    """A copy of a model whose residual writers have biases of zero."""
    shutil.copytree(base, directory)
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("o_proj.bias"):
                tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, file, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(("name", "fused"), FORMATS)
def test_additive_loras_are_the_adapter_applied_natively(
    name, fused, model_directory, make_adapter, native_logits, tokens, logits, tmp_path
):
    """In peft, and merged; dense models and mixtures of experts, whose dense layers are in the way of peft's names."""
    base = model_directory(name, fused=fused)
    if name in EXPERTS:
        base = without_biases(base, tmp_path / "base")
    for site, strength, layers in (("writes", -0.5, (0, 1, 2)), ("mlp", 1.0, (1, 2)), ("writes", 1.0, (1,))):
        adapter = make_adapter(base, f"adapter-{site}-{strength}", site, SPECTRAL, layers=layers)
        lora = tmp_path / f"lora-{site}-{strength}"
        summary = to_add_lora(Checkpoint(base), "base", read_control_adapter(adapter), lora, Dial(strength=strength))
        assert summary.notes == ()
        assert json.loads((lora / "adapter_config.json").read_text())["lora_bias"] == (summary.biases > 0)
        [native] = native_logits(base, adapter, tokens, [strength])
        assert error(peft_logits(base, lora, tokens), native) < ROUNDING
        output = tmp_path / f"merged-{site}-{strength}"
        merge(base, lora, output)
        assert error(logits(output, tokens), native) < ROUNDING


def test_a_truncated_lora_on_experts_is_the_best_of_its_rank_for_each(model_directory, make_adapter, tmp_path):
    base = model_directory("mixtral")
    files = read_control_adapter(make_adapter(base, site="mlp"))
    summary = to_add_lora(Checkpoint(base), "base", files, tmp_path / "lora", Dial(), rank=2)
    pairs, stored = read_lora(tmp_path / "lora").pairs, tensors_of(base)
    kept = {}
    for layer, factors in files.layers.items():
        pair, shares = pairs[f"model.layers.{layer}.mlp.experts.down_proj"], []
        for expert in range(4):
            weight = stored[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"].double()
            product = naive.full_matrix(factors.A, factors.B, files.scale) @ weight
            best, _ = naive.truncation(product, 2)
            torch.testing.assert_close((pair.B[expert] @ pair.A[expert]).double(), best, rtol=1e-5, atol=1e-5)
            shares.append((best.square().sum().item(), product.square().sum().item()))
        kept[layer] = sum(part for part, _ in shares) / sum(whole for _, whole in shares)
    assert summary.kept == pytest.approx(kept, rel=1e-6)


def test_biases_beside_experts_are_refused(model_directory, make_adapter, tmp_path):
    base = model_directory("qwen3_moe")
    adapter = read_control_adapter(make_adapter(base))
    with pytest.raises(UsageError, match=r"layer 0: self_attn\.o_proj(.|\n)*cadapter merge, or cadapter to-mult-lora"):
        to_add_lora(Checkpoint(base), "base", adapter, tmp_path / "lora", Dial())
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(("name", "fused"), [pair for pair in FORMATS if pair[0] in EXPERTS])
def test_a_trained_lora_on_experts_merges_as_peft_applies_it(name, fused, model_directory, tokens, logits, tmp_path):
    """Gate and up projections, one tensor in memory, are two of each expert on disk."""
    base = model_directory(name, fused=fused)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ("q_proj", "experts.gate_up_proj", "experts.down_proj")
    blocks, found = put_lora(model, LoraSettings(4, 8.0, targets=targets))
    randomise(blocks)
    lora = write(tmp_path / "lora", blocks, found, name)
    merge(base, lora, tmp_path / "merged")
    native = peft_logits(base, lora, tokens)
    assert error(native, logits(base, tokens)) > 0.02
    assert error(logits(tmp_path / "merged", tokens), native) < ROUNDING
