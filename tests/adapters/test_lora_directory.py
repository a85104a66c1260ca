"""Directories of trained LoRAs: what is written, what is read back, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cadapter.adapters.directory import CONFIG_NAME, WEIGHTS_NAME, kind_of
from cadapter.adapters.lora import LoraSettings
from cadapter.adapters.lora_directory import load_into, read_lora_adapter, write_lora_adapter
from cadapter.convert.lora_directory import read_lora
from cadapter.errors import CadapterError, UsageError
from tests.adapters.lora_cases import TOKENS, base_model, factors_of, put_lora, randomise, write

RANK = 4
EXPERTS = ("v_proj", "gate_up_proj", "down_proj")
CASES = [("llama", None), ("phi3", None), ("mixtral", EXPERTS), ("qwen2_moe", None), ("qwen3_moe", ("down_proj",))]


def saved(directory: Path, name: str = "llama", targets: tuple[str, ...] | None = None, **settings: Any) -> Path:
    """A directory with random factors."""
    blocks, found = put_lora(base_model(name), LoraSettings(RANK, 2.8284, targets=targets, **settings))
    randomise(blocks)
    return write(directory, blocks, found, name)


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / CONFIG_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / WEIGHTS_NAME)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS_NAME)


# ---- writing and reading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "targets"), CASES)
def test_what_was_written_is_read_back_bit_for_bit(name, targets, dtype, tmp_path):
    settings = LoraSettings(RANK, 2.8284, dtype=dtype, targets=targets)
    blocks, found = put_lora(base_model(name), settings)
    randomise(blocks)
    files = read_lora_adapter(write(tmp_path, blocks, found, name))
    expected = factors_of(blocks)
    assert files.tensors.keys() == expected.keys()
    for key, factor in expected.items():
        assert files.tensors[key].dtype == dtype
        assert torch.equal(files.tensors[key], factor)
    assert {layer: set(each.linears) for layer, each in files.targets.items()} == {
        layer: set(each.linears) for layer, each in found.by_layer.items()
    }
    assert [each.experts for each in files.targets.values()] == [each.experts for each in found.by_layer.values()]
    assert (files.settings.rank, files.settings.alpha, files.settings.dtype) == (RANK, 2.8284, dtype)
    assert files.base_model_name_or_path == "base"

    # What was found says what to build: other blocks then take it over.
    again, _ = put_lora(base_model(name), files.settings, seed=9)
    assert not torch.equal(next(iter(factors_of(again).values())), next(iter(expected.values())))
    load_into(again, tmp_path, layers=range(3))
    for key, factor in factors_of(again).items():
        assert torch.equal(factor, expected[key])


def test_the_config_is_plain_and_keeps_the_scale(tmp_path):
    blocks, found = put_lora(base_model("llama"), LoraSettings(16, 4.0, dropout=0.1), layers=[0, 2])
    config = json.loads((write(tmp_path, blocks, found) / CONFIG_NAME).read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": "base",
        "r": 16,
        "lora_alpha": 4,
        "lora_dropout": 0.1,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "lora_bias": False,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "layers_to_transform": [0, 2],
    }
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    assert len(tensors) == 2 * 7 * 2
    assert tensors["base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"].shape == (16, 48)
    card = (tmp_path / "README.md").read_text()
    for text in ("library_name: peft", "`base` (llama)", "16, 4, 0.25", "0,2 (2)", "`self_attn.q_proj`"):
        assert text in card
    assert kind_of(tmp_path) == "additive"
    assert read_lora_adapter(tmp_path).settings.dropout == 0.1


def test_experts_are_spelled_by_layer(tmp_path):
    config = json.loads((saved(tmp_path, "mixtral", ("v_proj", "experts.down_proj")) / CONFIG_NAME).read_text())
    assert config["target_modules"] == ["v_proj"]
    assert config["target_parameters"] == [f"layers.{layer}.mlp.experts.down_proj" for layer in range(3)]
    assert config["lora_alpha"] == 2.8284
    A = load_file(tmp_path / WEIGHTS_NAME)["base_model.model.model.layers.1.mlp.experts.lora_A.weight"]
    assert A.shape == (4 * RANK, 48)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_merge_reads_the_pairs_of_linear_layers(name, tmp_path):
    blocks, found = put_lora(base_model(name), LoraSettings(RANK, 2.8284))
    randomise(blocks)
    files = read_lora(write(tmp_path, blocks, found, name))
    expected = factors_of(blocks)
    assert {f"model.{pair}" for pair in found.pair_names()} == files.pairs.keys()
    for module, pair in files.pairs.items():
        assert pair.scale == pytest.approx(2.8284 / RANK)
        assert torch.equal(pair.A, expected[f"{module.removeprefix('model.')}.lora_A"])


def test_merge_reads_the_pairs_of_experts_one_by_one(tmp_path):
    pairs = read_lora(saved(tmp_path, "mixtral", EXPERTS)).pairs
    stored = load_file(tmp_path / WEIGHTS_NAME)
    pair = pairs["model.layers.1.mlp.experts.down_proj"]
    assert (pair.A.shape, pair.B.shape) == ((4, RANK, 48), (4, 32, RANK))
    prefix = "base_model.model.model.layers.1.mlp.experts."
    A, B = stored[f"{prefix}lora_A.weight"], stored[f"{prefix}lora_B.weight"]
    for expert in range(4):
        assert torch.equal(pair.A[expert], A[expert * RANK : (expert + 1) * RANK])
        assert torch.equal(pair.B[expert], B[:, expert::4])


@pytest.mark.parametrize(
    ("name", "modules", "parameters"),
    [
        ("llama", ["q_proj", "down_proj"], None),
        ("mixtral", ["q_proj"], ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]),
    ],
)
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_directories_that_peft_wrote_are_taken_over(name, modules, parameters, rank_stabilised, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK,
        lora_alpha=3,
        use_rslora=rank_stabilised,
        target_modules=modules,
        target_parameters=parameters,
        init_lora_weights=False,  # random A and B
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    theirs = get_peft_model(base_model(name), config)
    theirs.save_pretrained(tmp_path)
    alpha = 3 * math.sqrt(RANK) if rank_stabilised else 3.0
    targets = tuple(modules + (parameters or []))
    model = base_model(name)
    blocks, _ = put_lora(model, LoraSettings(RANK, alpha, targets=targets))
    load_into(blocks, tmp_path)
    with torch.no_grad():
        plain, expected, found = (each(TOKENS).logits for each in (base_model(name), theirs, model))
    assert (found - plain).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # float32 through three blocks
    assert read_lora_adapter(tmp_path).settings.scale == pytest.approx(alpha / RANK)


# ---- refusals -----------------------------------------------------------------------------------------------------

UP = "base_model.model.model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{UP}.lora_B.weight"), r"layers.1.mlp.up_proj has no lora_B"),
        (lambda t: t.pop(f"{UP}.lora_A.weight"), r"layers.1.mlp.up_proj has no lora_A"),
        (lambda t: t[f"{UP}.lora_A.weight"].fill_(math.nan), r"layers.1.mlp.up_proj.lora_A.weight holds NaN"),
        (lambda t: t[f"{UP}.lora_B.weight"].fill_(math.inf), r"layers.1.mlp.up_proj.lora_B.weight holds NaN or inf"),
        (lambda t: t.update({f"{UP}.lora_A.weight": torch.ones(3, 32)}), "ranks do not agree"),
        (
            lambda t: t.update({f"{UP}.lora_A.weight": torch.ones(8, 32), f"{UP}.lora_B.weight": torch.ones(48, 8)}),
            r"layers.1.mlp.up_proj has shape \[8, 32\]; with r = 4 it must be \[4, in\]",
        ),
        (lambda t: t.update({f"{UP}.lora_A.weight": torch.ones(4, 32, dtype=torch.int32)}), "int32"),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32)}), r"model.norm.weight is no lora_A"),
        (lambda t: t.update({f"{UP}.lora_B.bias": torch.ones(48)}), r"up_proj has a bias"),
        (
            lambda t: t.update(
                {
                    "base_model.model.lm_head.lora_A.weight": torch.ones(4, 32),
                    "base_model.model.lm_head.lora_B.weight": torch.ones(64, 4),
                }
            ),
            "lm_head is no module of a decoder layer",
        ),
        (lambda t: t.update({k.replace("layers.1.", "layers.7."): t.pop(k) for k in list(t) if ".1." in k}), "7"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_broken_tensors_are_refused_with_file_and_name(edit, message, tmp_path):
    edit_weights(saved(tmp_path), edit)
    with pytest.raises(UsageError, match=message) as caught:
        read_lora_adapter(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 0}, "r must be a positive number"),
        ({"r": 2.5}, "r must be a whole number"),
        ({"lora_alpha": None}, "lora_alpha must be a positive number"),
        ({"lora_dropout": 1.0}, "lora_dropout must be a number"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"target_parameters": "down_proj"}, "target_parameters must be a list"),
        ({"layers_to_transform": [0, 1]}, "layers_to_transform says"),
        ({"layers_to_transform": "all"}, "layers_to_transform must be a list"),
    ],
)
def test_configs_that_training_does_not_understand_are_refused(changes, message, tmp_path):
    edit_config(saved(tmp_path), **changes)
    with pytest.raises(UsageError, match=message) as caught:
        read_lora_adapter(tmp_path)
    assert CONFIG_NAME in str(caught.value)


def test_experts_without_their_names_are_refused(tmp_path):
    edit_config(saved(tmp_path, "mixtral", EXPERTS), target_parameters=["layers.0.mlp.experts.down_proj"])
    with pytest.raises(UsageError, match="experts"):
        read_lora_adapter(tmp_path)


@pytest.mark.parametrize(
    ("targets", "changes", "message"),
    [
        (("q_proj", "v_proj", "k_proj"), {}, r"does not hold self_attn.k_proj of layer 0"),
        (("q_proj",), {}, r"holds self_attn.v_proj of layer 0"),
        (
            ("q_proj", "v_proj"),
            {"rank": 8, "alpha": 2 * 2.8284},
            r"lora_A of .* of layer 0 has shape \[4, 32\].*\[8, 32\]",
        ),
        (("q_proj", "v_proj"), {"alpha": 2.0}, r"scale alpha / r is 0.7071; in this run it is 0.5"),
    ],
)
def test_a_directory_of_another_run_is_not_taken_over(targets, changes, message, tmp_path):
    directory = saved(tmp_path, targets=("q_proj", "v_proj"))
    settings = {"rank": RANK, "alpha": 2.8284, "targets": targets, **changes}
    blocks, _ = put_lora(base_model("llama"), LoraSettings(**settings))
    with pytest.raises(UsageError, match=message):
        load_into(blocks, directory)


def test_layers_that_the_run_does_not_train_are_refused(tmp_path):
    directory = saved(tmp_path)
    blocks, _ = put_lora(base_model("llama"), LoraSettings(RANK, 2.8284), layers=[2])
    load_into(blocks, directory)
    with pytest.raises(UsageError, match=r"of layer 0, which this run does not train"):
        load_into(blocks, directory, layers=[2])


def test_nothing_is_written_unless_all_factors_are_there(tmp_path):
    blocks, found = put_lora(base_model("llama"), LoraSettings(RANK, 2.0))
    tensors = factors_of(blocks)
    lost = tensors.pop("layers.1.mlp.up_proj.lora_B")
    with pytest.raises(CadapterError, match=r"layers.1.mlp.up_proj.lora_B"):
        write_lora_adapter(tmp_path, tensors, blocks[0].settings, found, "base", "llama")
    tensors = {**tensors, "layers.1.mlp.up_proj.lora_B": lost, "layers.7.mlp.up_proj.lora_B": lost}
    with pytest.raises(CadapterError, match=r"layers.7"):
        write_lora_adapter(tmp_path, tensors, blocks[0].settings, found, "base", "llama")
    assert list(tmp_path.iterdir()) == []
