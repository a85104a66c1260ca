"""Merged weights against naive float64 products, and what else a merged directory must and must not hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cadapter.adapters.directory import read_control_adapter
from cadapter.convert.add_lora import to_add_lora
from cadapter.convert.merge import MergeSummary, merge_model
from cadapter.convert.mult_lora import to_mult_lora
from cadapter.convert.operators import Dial
from cadapter.convert.plan import make_recipe
from cadapter.errors import CadapterError, UsageError
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.device import usable_device
from tests.reference import naive
from tests.tiny_models import FAMILY_NAMES

NAMES = ("llama", "llama-tied", "llama-biased")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def merge(
    base: Path, adapter: Path, output: Path, dial: Dial | None = None, dtype: str | None = None, **recipe
) -> MergeSummary:
    """Merge as the command does."""
    model = Checkpoint(base)
    plan = make_recipe(model, adapter, dial or Dial(), **recipe).plan
    return merge_model(model, plan, output, lambda summary: "card\n", dtype=dtype)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model directory."""
    found = {}
    for file in directory.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def naive_merge(base: Path, adapter: Path, power=lambda W: W, writers=WRITERS) -> dict[str, torch.Tensor]:
    """The base's tensors in float64 with ``I + power(W)`` applied to the writers' weights and biases."""
    files, merged = read_control_adapter(adapter), {k: v.double() for k, v in tensors_of(base).items()}
    for layer, factors in files.layers.items():
        W = power(naive.full_matrix(factors.A, factors.B, files.scale))
        for writer in writers:
            for part in ("weight", "bias"):
                name = f"model.layers.{layer}.{writer}.{part}"
                if name in merged:
                    merged[name] = naive.merged(merged[name], W)
    return merged


def assert_equal_to_rounding(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], close: float = 2e-6):
    """Equal to float32 rounding: sums over H = 32 terms of order 1 and ranks below 10 err by some 1e-7."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=close, atol=close, msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_merged_weights_are_the_naive_product(name, model_directory, make_adapter, tmp_path):
    base = model_directory(name)
    adapter = make_adapter(base)
    summary = merge(base, adapter, tmp_path / "merged")
    expected = naive_merge(base, adapter)
    assert_equal_to_rounding(tensors_of(tmp_path / "merged"), expected)
    before = tensors_of(base)
    changed = [k for k in before if not torch.equal(before[k].double(), expected[k])]
    assert summary.changed == len(changed) == (12 if name == "llama-biased" else 6)
    assert summary.copied == len(before) - summary.changed
    assert 0.05 < summary.largest_change < 0.6  # ‖W‖₂ = 0.5
    assert summary.largest_name in changed


@pytest.mark.parametrize(("name", "form"), [*((name, "general") for name in NAMES), ("llama", "symmetric")])
def test_three_ways_to_one_model(name, form, model_directory, make_adapter, tokens, logits, tmp_path):
    """merge(control) = merge(to-mult-lora) = merge(to-add-lora) to float32 rounding, for an adapter that matters."""
    base = model_directory(name)
    adapter = make_adapter(base, form=form)
    control = read_control_adapter(adapter)
    to_mult_lora(control, tmp_path / "mult", Dial())
    to_add_lora(Checkpoint(base), str(base), control, tmp_path / "add", Dial())
    for kind, source in (("control", adapter), ("mult", tmp_path / "mult"), ("add", tmp_path / "add")):
        merge(base, source, tmp_path / f"merged-{kind}")
    reference = tensors_of(tmp_path / "merged-control")
    for kind in ("mult", "add"):
        found = tensors_of(tmp_path / f"merged-{kind}")
        assert_equal_to_rounding(found, {k: v.double() for k, v in reference.items()})
    moved = (logits(tmp_path / "merged-control", tokens) - logits(base, tokens)).abs().max()
    assert moved > 0.1


def test_the_sites_choose_the_writers(model_directory, make_adapter, tmp_path):
    base = model_directory("llama")
    for site, option, writers in (
        ("mlp", None, WRITERS[1:]),
        ("writes", None, WRITERS),
        ("block", None, WRITERS),
        ("block", "mlp", WRITERS[1:]),
        ("mlp", "all", WRITERS),
    ):
        adapter = make_adapter(base, name=f"adapter-{site}-{option}", site=site)
        output = tmp_path / f"merged-{site}-{option}"
        merge(base, adapter, output, writers=option)
        assert_equal_to_rounding(tensors_of(output), naive_merge(base, adapter, writers=writers))


def test_inverse_undoes_the_merge(model_directory, make_adapter, tmp_path):
    base = model_directory("llama-biased")
    adapter = make_adapter(base, spectral=0.8)
    merge(base, adapter, tmp_path / "there")
    merge(tmp_path / "there", adapter, tmp_path / "back", Dial(strength=-1.0))
    original = {k: v.double() for k, v in tensors_of(base).items()}
    assert_equal_to_rounding(tensors_of(tmp_path / "back"), original, close=1e-5)  # two roundings, condition below 10
    merge(base, adapter, tmp_path / "inverse", Dial.from_options(inverse=True))
    assert_equal_to_rounding(tensors_of(tmp_path / "inverse"), naive_merge(base, adapter, naive.inverse_minus_identity))


def test_half_strength_twice_is_the_whole(model_directory, make_adapter, tmp_path):
    base = model_directory("llama")
    adapter = make_adapter(base)
    merge(base, adapter, tmp_path / "half", Dial(strength=0.5))
    merge(tmp_path / "half", adapter, tmp_path / "whole", Dial(strength=0.5))
    expected = naive_merge(base, adapter)
    assert_equal_to_rounding(tensors_of(tmp_path / "whole"), expected)
    half = tensors_of(tmp_path / "half")["model.layers.0.mlp.down_proj.weight"]
    assert (half - expected["model.layers.0.mlp.down_proj.weight"]).abs().max() > 0.01


def test_scale_is_linear(model_directory, make_adapter, tmp_path):
    base = model_directory("llama")
    adapter = make_adapter(base)
    merge(base, adapter, tmp_path / "scaled", Dial.from_options(scale=-0.5))
    assert_equal_to_rounding(tensors_of(tmp_path / "scaled"), naive_merge(base, adapter, lambda W: -0.5 * W))


def test_also_merges_further_adapters_in_order(model_directory, make_adapter, tmp_path):
    base = model_directory("llama-biased")
    first, second = make_adapter(base, "first", seed=1), make_adapter(base, "second", seed=2, layers=(0, 2))
    third = make_adapter(base, "third", seed=3)
    merge(base, first, tmp_path / "at-once", also=[(second, 2.0), (third, -1.0)])
    merge(base, first, tmp_path / "step-1")
    merge(tmp_path / "step-1", second, tmp_path / "step-2", Dial(strength=2.0))
    merge(tmp_path / "step-2", third, tmp_path / "step-3", Dial(strength=-1.0))
    expected = {k: v.double() for k, v in tensors_of(tmp_path / "step-3").items()}
    assert_equal_to_rounding(tensors_of(tmp_path / "at-once"), expected, close=1e-5)  # three roundings, condition < 10
    merge(base, first, tmp_path / "swapped", also=[(third, -1.0), (second, 2.0)])
    name = "model.layers.0.mlp.down_proj.weight"
    assert (tensors_of(tmp_path / "swapped")[name].double() - expected[name]).abs().max() > 1e-2


def test_a_bfloat16_base_is_rounded_once(model_directory, make_adapter, tmp_path):
    base = model_directory("llama", torch.bfloat16)
    adapter = make_adapter(base)
    merge(base, adapter, tmp_path / "merged")
    found, expected = tensors_of(tmp_path / "merged"), naive_merge(base, adapter)
    unequal = total = 0
    for name, tensor in found.items():
        once = expected[name].to(torch.bfloat16)
        assert tensor.dtype == torch.bfloat16
        unequal += (tensor != once).sum().item()
        total += tensor.numel()
        # never further than float32's error (1e-6) plus half a step of bfloat16 (at most 2^-8 of the value)
        assert ((tensor.double() - expected[name]).abs() <= expected[name].abs() * 2**-8 + 1e-6).all()
    assert unequal / total < 1e-3  # float32's error crosses a rounding boundary of bfloat16 that rarely


def test_dtype_converts_all_weights_and_the_config(model_directory, make_adapter, tokens, logits, tmp_path):
    base = model_directory("llama")
    adapter = make_adapter(base)
    summary = merge(base, adapter, tmp_path / "half", dtype="bfloat16")
    expected = naive_merge(base, adapter)
    for name, tensor in tensors_of(tmp_path / "half").items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), expected[name], rtol=2**-8, atol=1e-6)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((tmp_path / "half" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == summary.bytes == 2 * sum(t.numel() for t in expected.values())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert torch.isfinite(logits(tmp_path / "half", tokens)).all()


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_shards_index_and_ties_are_as_in_the_base(name, model_directory, make_adapter, tmp_path):
    base, output = model_directory(name), tmp_path / "merged"
    merge(base, make_adapter(base), output)
    shards = sorted(file.name for file in base.glob("*.safetensors"))
    assert len(shards) > 3
    assert sorted(file.name for file in output.glob("*.safetensors")) == shards
    for shard in shards:
        with safe_open(base / shard, "pt") as old, safe_open(output / shard, "pt") as new:
            assert set(old.keys()) == set(new.keys())
            assert old.metadata() == new.metadata()
    old_index, new_index = (json.loads((d / "model.safetensors.index.json").read_text()) for d in (base, output))
    assert old_index == new_index
    assert ("lm_head.weight" in old_index["weight_map"]) == (name == "llama")
    _, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_tensors_that_do_not_change_are_the_same_bytes(model_directory, make_adapter, tmp_path):
    base = model_directory("qwen2")
    summary = merge(base, make_adapter(base, layers=(1,)), tmp_path / "merged")
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert set(before) - set(same) == {f"model.layers.1.{writer}.weight" for writer in WRITERS}
    assert summary.copied == len(same)
    untouched = Checkpoint(base).file_of("model.embed_tokens.weight")
    assert (tmp_path / "merged" / untouched).read_bytes() == (base / untouched).read_bytes()


def test_a_single_file_model_stays_one(model_directory, make_adapter, tmp_path):
    base = tmp_path / "single"
    AutoModelForCausalLM.from_pretrained(model_directory("llama")).save_pretrained(base)
    adapter = make_adapter(base)
    merge(base, adapter, tmp_path / "merged")
    assert [file.name for file in (tmp_path / "merged").glob("*.safetensors*")] == ["model.safetensors"]
    assert_equal_to_rounding(tensors_of(tmp_path / "merged"), naive_merge(base, adapter))


def test_only_listed_files_are_copied(model_directory, make_adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model_directory("llama"), base)
    wanted = {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
        "chat_template.jinja", "tokenizer.model", "LICENSE", "generation_config.json",
    }  # fmt: skip
    unwanted = {
        "pytorch_model.bin", "tokenizer.pkl", "training_args.bin", "modeling_custom.py", "optimizer.pt", "notes.md",
        "consolidated.safetensors", "config.py", "tokenizer.json.bak",
    }  # fmt: skip
    for name in wanted | unwanted:
        (base / name).write_text("{}")
    (base / "README.md").write_text("the base's own card")
    merge(base, make_adapter(base), tmp_path / "merged")
    found = {file.name for file in (tmp_path / "merged").iterdir()}
    weights = {file.name for file in base.glob("model*.safetensors*")}
    assert found == wanted | weights | {"config.json", "README.md"}
    assert (tmp_path / "merged" / "README.md").read_text() == "card\n"
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def peft_lora(base: Path, directory: Path, seed: int = 0, copy_of_head: bool = False, **options) -> Path:
    """A random additive LoRA written by peft itself."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    modules = options.pop("target_modules", ["q_proj", "down_proj"])
    lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=modules, **options))
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    lora.save_pretrained(directory, save_embedding_layers=copy_of_head)
    return directory


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 11, "q_proj": 3}},
        {"lora_bias": True, "target_modules": ["o_proj", "down_proj"]},
        {"target_modules": ["lm_head", "up_proj"], "layers_to_transform": None},
    ],
    ids=["plain", "rslora", "patterns", "bias", "head"],
)
def test_additive_loras_merge_as_peft_merges_them(options, model_directory, tokens, logits, tmp_path):
    base = model_directory("llama-biased")
    lora = peft_lora(base, tmp_path / "lora", **options)
    merge(base, lora, tmp_path / "merged")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
    assert (expected - logits(base, tokens)).abs().max() > 0.1
    # the same products in another order, in float32, for logits of order 1 to 10
    torch.testing.assert_close(logits(tmp_path / "merged", tokens), expected, rtol=1e-5, atol=2e-5)
    merged = model.merge_and_unload().state_dict()
    for name, tensor in tensors_of(tmp_path / "merged").items():
        torch.testing.assert_close(tensor, merged[name], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_additive_loras_of_every_family_merge_as_peft_applies_them(name, model_directory, tokens, logits, tmp_path):
    base = model_directory(name)
    has_experts = any("experts" in tensor for tensor in Checkpoint(base).names())
    modules = ["q_proj", "o_proj"] if has_experts else "all-linear"  # which peft takes to mean the experts too
    lora = peft_lora(base, tmp_path / "lora", target_modules=modules)
    merge(base, lora, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(model, lora)(input_ids=tokens, use_cache=False).logits
    assert (expected - logits(base, tokens)).abs().max() > 0.1
    # of the largest logit, 3e-6 is found: what float32 keeps of the same products in another order in three blocks
    error = (logits(tmp_path / "merged", tokens) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_inverse_subtracts_an_additive_lora_and_scale_multiplies_it(model_directory, tmp_path):
    base = model_directory("llama")
    lora = peft_lora(base, tmp_path / "lora")
    merge(base, lora, tmp_path / "plus", Dial(factor=2.0))
    merge(base, lora, tmp_path / "minus", Dial.from_options(inverse=True))
    old, plus, minus = (tensors_of(tmp_path / d if d != "base" else base) for d in ("base", "plus", "minus"))
    name = "model.layers.1.mlp.down_proj.weight"
    assert (plus[name] - old[name]).abs().max() > 0.01
    torch.testing.assert_close(plus[name] - old[name], -2 * (minus[name] - old[name]), rtol=0, atol=1e-6)


def test_multiplicative_can_be_forced_for_directories_that_do_not_say_so(model_directory, make_adapter, tmp_path):
    base, adapter = model_directory("llama"), None
    adapter = make_adapter(base)
    to_mult_lora(read_control_adapter(adapter), tmp_path / "mult", Dial())
    config = json.loads((tmp_path / "mult" / "adapter_config.json").read_text())
    (tmp_path / "mult" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))
    merge(base, tmp_path / "mult", tmp_path / "merged", Dial(strength=-1.0), multiplicative=True)
    expected = naive_merge(base, adapter, naive.inverse_minus_identity)
    assert_equal_to_rounding(tensors_of(tmp_path / "merged"), expected)


def edit_config(directory: Path, **changes) -> Path:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return directory


def edit_weights(directory: Path, edit) -> Path:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    return directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"lora_alpha": None}, "lora_alpha must be a positive number"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_loras_that_merge_does_not_understand_are_refused(changes, message, model_directory, tmp_path):
    base = model_directory("llama")
    lora = edit_config(peft_lora(base, tmp_path / "lora"), **changes)
    with pytest.raises(UsageError, match=message):
        merge(base, lora, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


DOWN = "base_model.model.model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{DOWN}.lora_B.weight"), "has no lora_B"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}), "not supported by merge"),
        (lambda t: t.update({f"{DOWN}.lora_A.weight": torch.ones(3, 48)}), "ranks do not agree"),
        (lambda t: t.update({f"{DOWN}.lora_A.weight": torch.ones(4, 40)}), r"has shape \[32, 48\]"),
        (lambda t: t.update({f"{DOWN}.lora_B.bias": torch.ones(32)}), "has none"),
        (lambda t: t.update({f"{DOWN}.lora_A.weight": torch.full((4, 48), torch.nan)}), "layers.1.*NaN"),
        (lambda t: t.update({k: torch.zeros_like(v) for k, v in t.items() if "lora_B" in k}), "changes nothing"),
        (
            lambda t: t.update({k.replace("layers.1", "layers.7"): t.pop(k) for k in list(t) if "layers.1" in k}),
            "no tensor model.layers.7",
        ),
    ],
)
def test_broken_loras_are_refused(edit, message, model_directory, tmp_path):
    base = model_directory("llama")
    lora = edit_weights(peft_lora(base, tmp_path / "lora"), edit)
    with pytest.raises(UsageError, match=message):
        merge(base, lora, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_tied_head_is_refused(model_directory, tmp_path):
    lora = peft_lora(model_directory("llama"), tmp_path / "lora", target_modules=["lm_head"])
    with pytest.raises(UsageError, match="tied"):
        merge(model_directory("llama-tied"), lora, tmp_path / "merged")


def test_a_lora_with_a_copy_of_the_base_is_refused(model_directory, tmp_path):
    base = model_directory("llama")
    lora = peft_lora(base, tmp_path / "lora", target_modules=["lm_head"], copy_of_head=True)
    with pytest.raises(UsageError, match=r"lm_head\.base_layer\.weight"):
        merge(base, lora, tmp_path / "merged")


def test_an_additive_lora_has_no_strength(model_directory, tmp_path):
    lora = peft_lora(model_directory("llama"), tmp_path / "lora")
    for strength in (0.5, -1.0):
        with pytest.raises(UsageError, match="--strength"):
            merge(model_directory("llama"), lora, tmp_path / "merged", Dial.from_options(strength=strength))


def test_adapters_that_touch_nothing_are_an_error(model_directory, make_adapter, tmp_path):
    base = model_directory("llama")
    zero = make_adapter(base, "zero", spectral=0.0)
    real = make_adapter(base, "real")
    for adapter, dial in ((zero, Dial()), (real, Dial(strength=0.0)), (real, Dial(factor=0.0))):
        with pytest.raises(UsageError, match="changes nothing"):
            merge(base, adapter, tmp_path / "merged", dial)
    with pytest.raises(UsageError, match="changes nothing"):
        merge(base, real, tmp_path / "merged", also=[(zero, 1.0)])
    faint = make_adapter(base, "faint", spectral=1e-14)
    with pytest.raises(CadapterError, match="below the precision"):
        merge(base, faint, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_an_adapter_of_another_model_is_refused(model_directory, make_adapter, tmp_path):
    narrow = make_adapter(model_directory("llama-narrow"), "narrow")
    deep = make_adapter(model_directory("llama-deep"), "deep", layers=(0, 1, 2, 3))
    base = model_directory("llama")
    with pytest.raises(UsageError, match="another hidden size: 16"):
        merge(base, narrow, tmp_path / "merged")
    with pytest.raises(UsageError, match="layer 3, but the model has 3 layers"):
        merge(base, deep, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_singular_adapter_has_no_inverse_and_the_layer_is_named(model_directory, make_adapter, tmp_path):
    base = model_directory("llama")

    def projection(tensors):
        u = torch.nn.functional.normalize(torch.ones(1, 32), dim=1)
        tensors["base_model.model.model.layers.1.control_A.weight"] = u
        tensors["base_model.model.model.layers.1.control_B.weight"] = -u.T.contiguous()

    adapter = edit_weights(make_adapter(base, rank=1), projection)
    merge(base, adapter, tmp_path / "forward")
    for strength in (-1.0, 0.5):
        with pytest.raises(UsageError, match=r"layer 1: .*singular"):
            merge(base, adapter, tmp_path / "merged", Dial(strength=strength))


def test_a_base_with_broken_weights_is_refused_and_nothing_is_left(model_directory, make_adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model_directory("llama"), base)
    name = "model.layers.2.mlp.down_proj.weight"
    file = base / Checkpoint(base).file_of(name)
    tensors = load_file(file)
    tensors[name][0, 0] = torch.inf
    save_file(tensors, file, metadata={"format": "pt"})
    adapter = make_adapter(base)
    with pytest.raises(UsageError, match=name):
        merge(base, adapter, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_quantised_bases_are_refused(model_directory, make_adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model_directory("llama"), base)
    name = "model.layers.2.mlp.down_proj.weight"
    file = base / Checkpoint(base).file_of(name)
    adapter = make_adapter(base)
    save_file({**load_file(file), name: torch.zeros(32, 48, dtype=torch.uint8)}, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="quantised"):
        merge(base, adapter, tmp_path / "merged")


def test_an_overflow_in_the_asked_dtype_is_refused(model_directory, make_adapter, tmp_path):
    base = model_directory("llama")
    with pytest.raises(UsageError, match="float16"):
        merge(base, make_adapter(base, spectral=1e6), tmp_path / "merged", dtype="float16")


def test_devices_that_are_not_there_are_refused():
    assert usable_device("cpu") == "cpu"
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(UsageError, match="--device"):
            usable_device(name)
