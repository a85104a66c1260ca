"""Additive LoRAs against peft, against the merged model, and truncation against an SVD of the full product."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cadapter.adapters.directory import read_control_adapter
from cadapter.convert.add_lora import to_add_lora, truncate
from cadapter.convert.merge import merge_model
from cadapter.convert.operators import Dial
from cadapter.convert.plan import make_recipe
from cadapter.errors import UsageError
from cadapter.models.checkpoint import Checkpoint
from tests.reference import naive

NAMES = ("llama", "llama-tied", "llama-biased")


def merged_logits(base, adapter, tmp_path, tokens, logits, dial=None):
    model = Checkpoint(base)
    recipe = make_recipe(model, adapter, dial or Dial())
    merge_model(model, recipe.plan, tmp_path / "merged", lambda summary: "card")
    return logits(tmp_path / "merged", tokens)


def peft_logits(base, lora, tokens):
    """Logits through peft, and the warnings that loading gave."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(model, lora)
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)])
@pytest.mark.parametrize("name", NAMES)
def test_peft_loads_it_and_gives_the_merged_models_logits(
    name, layers, model_directory, make_adapter, tokens, logits, tmp_path
):
    base = model_directory(name)
    adapter = make_adapter(base, layers=layers, spectral=0.8)
    summary = to_add_lora(Checkpoint(base), str(base), read_control_adapter(adapter), tmp_path / "lora", Dial())
    found, messages = peft_logits(base, tmp_path / "lora", tokens)
    assert not [text for text in messages if "missing" in text.lower() or "unexpected" in text.lower()]
    expected = merged_logits(base, adapter, tmp_path, tokens, logits)
    assert (expected - logits(base, tokens)).abs().max() > 0.1
    # W·x + B·(A·x) against (W + B·A)·x in float32, for logits of order 1 to 10
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert summary.pairs == 2 * len(layers)
    assert summary.biases == (2 * len(layers) if name == "llama-biased" else 0)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["lora_bias"] == (name == "llama-biased")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert config["target_modules"] == ["o_proj", "down_proj"]
    assert config["layers_to_transform"] == list(layers)


@pytest.mark.parametrize("dial", [Dial(strength=-1.0), Dial(strength=0.5), Dial(strength=-1.5)])
def test_strengths_are_those_of_the_merge(dial, model_directory, make_adapter, tokens, logits, tmp_path):
    base = model_directory("llama-biased")
    adapter = make_adapter(base)
    to_add_lora(Checkpoint(base), str(base), read_control_adapter(adapter), tmp_path / "lora", dial)
    found, _ = peft_logits(base, tmp_path / "lora", tokens)
    expected = merged_logits(base, adapter, tmp_path, tokens, logits, dial)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)


def test_pairs_are_the_exact_change_of_the_weights(model_directory, make_adapter, tmp_path):
    base = model_directory("llama-biased")
    adapter = read_control_adapter(make_adapter(base, site="mlp"))
    model = Checkpoint(base)
    to_add_lora(model, "base", adapter, tmp_path / "lora", Dial())
    pairs = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {key.split(".lora_")[0] for key in pairs} == {
        f"base_model.model.model.layers.{layer}.mlp.down_proj" for layer in range(3)
    }
    for layer, factors in adapter.layers.items():
        W = naive.full_matrix(factors.A, factors.B, adapter.scale)
        prefix = f"model.layers.{layer}.mlp.down_proj"
        A, B, bias = (
            pairs[f"base_model.model.{prefix}.lora_{part}"].double() for part in ("A.weight", "B.weight", "B.bias")
        )
        # float32 rounding of sums over H = 32 terms
        torch.testing.assert_close(B @ A, W @ model.tensor(f"{prefix}.weight").double(), rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(bias, W @ model.tensor(f"{prefix}.bias").double(), rtol=1e-6, atol=1e-6)


def test_truncation_is_the_best_of_its_rank():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    B = torch.randn(20, 6, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, 6, dtype=torch.float64)
    for rank in (1, 3, 6):
        new_A, new_B, kept, total = truncate(A, B, rank)
        best, share = naive.truncation(B @ A, rank)
        assert (new_A.shape, new_B.shape) == ((rank, 40), (20, rank))
        torch.testing.assert_close((new_B.double() @ new_A.double()), best, rtol=1e-5, atol=1e-5)  # stored in float32
        assert kept / total == pytest.approx(share, rel=1e-10)
        assert total == pytest.approx((B @ A).square().sum().item(), rel=1e-10)


def test_rank_truncates_and_reports_what_it_keeps(model_directory, make_adapter, tmp_path):
    base = model_directory("llama")
    adapter = read_control_adapter(make_adapter(base, rank=6))
    model = Checkpoint(base)
    summary = to_add_lora(model, "base", adapter, tmp_path / "lora", Dial(), rank=2)
    pairs = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    all_kept = all_total = 0.0
    for layer, factors in adapter.layers.items():
        W = naive.full_matrix(factors.A, factors.B, adapter.scale)
        kept = total = 0.0
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            prefix = f"model.layers.{layer}.{writer}"
            change = W @ model.tensor(f"{prefix}.weight").double()
            best, share = naive.truncation(change, 2)
            A, B = (pairs[f"base_model.model.{prefix}.lora_{part}.weight"].double() for part in "AB")
            torch.testing.assert_close(B @ A, best, rtol=1e-4, atol=1e-5)  # float32, through a decomposition
            kept, total = kept + share * change.square().sum().item(), total + change.square().sum().item()
        assert summary.kept[layer] == pytest.approx(kept / total, rel=1e-5)
        all_kept, all_total = all_kept + kept, all_total + total
    assert summary.kept_overall == pytest.approx(all_kept / all_total, rel=1e-5)
    assert 0.1 < summary.kept_overall < 0.95
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)


def test_a_bias_is_carried_only_where_it_is_not_zero(model_directory, make_adapter, tmp_path):
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(model_directory("llama-biased"), dtype=torch.float32)
    for layer in model.model.layers:
        layer.mlp.down_proj.bias.data.zero_()
    model.save_pretrained(base)
    adapter = read_control_adapter(make_adapter(base))
    assert adapter.facts[0].biased == ("self_attn.o_proj",)
    summary = to_add_lora(Checkpoint(base), "base", adapter, tmp_path / "lora", Dial())
    pairs = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert summary.biases == 3
    assert pairs["base_model.model.model.layers.0.self_attn.o_proj.lora_B.bias"].any()
    assert not pairs["base_model.model.model.layers.0.mlp.down_proj.lora_B.bias"].any()


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_ranks_that_make_no_sense_are_refused(rank, model_directory, make_adapter, tmp_path):
    base = model_directory("llama")
    with pytest.raises(UsageError, match="the adapter has rank 4"):
        to_add_lora(Checkpoint(base), "base", read_control_adapter(make_adapter(base)), tmp_path / "x", Dial(), rank)
    assert not (tmp_path / "x").exists()


def test_nothing_is_left_of_a_conversion_that_fails(model_directory, make_adapter, tmp_path):
    base = model_directory("llama")
    zero = read_control_adapter(make_adapter(base, "zero", spectral=0.0))
    with pytest.raises(UsageError, match="changes nothing"):
        to_add_lora(Checkpoint(base), "base", zero, tmp_path / "lora", Dial())
    other = read_control_adapter(make_adapter(model_directory("llama-narrow"), "narrow"))
    with pytest.raises(UsageError, match="another hidden size"):
        to_add_lora(Checkpoint(base), "base", other, tmp_path / "lora", Dial())
    assert not list(tmp_path.glob("*lora*"))
