"""Control-adapter directories: what is written is read again, what is wrong is named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cadapter.adapters.directory import (
    ControlAdapterFiles,
    LayerFacts,
    control_card,
    kind_of,
    layer_ranges,
    read_control_adapter,
    validate_against,
    write_control_adapter,
)
from cadapter.adapters.factors import LowRank
from cadapter.errors import UsageError

RANK, HIDDEN = 4, 24
KEY = "base_model.model.model.layers.{}.control_{}.weight"


def example(path: Path, layers: tuple[int, ...] = (0, 1, 5)) -> ControlAdapterFiles:
    generator = torch.Generator().manual_seed(0)
    return ControlAdapterFiles(
        path=path,
        rank=RANK,
        alpha=2.0,
        layers={
            layer: LowRank(
                torch.randn(RANK, HIDDEN, generator=generator), torch.randn(HIDDEN, RANK, generator=generator)
            )
            for layer in layers
        },
        site="writes",
        inverse="neumann",
        neumann_order=3,
        base_model_type="llama",
        base_model_name_or_path="someone/base",
        facts={
            layer: LayerFacts(("self_attn.o_proj",), ("mlp.down_proj",), biased=("mlp.down_proj",)) for layer in layers
        },
    )


@pytest.fixture
def directory(tmp_path) -> Path:
    """A valid control-adapter directory."""
    path = tmp_path / "adapter"
    path.mkdir()
    write_control_adapter(path, example(path), "card\n", {"notes.txt": "more\n"})
    return path


def edit_config(path: Path, **changes) -> None:
    file = path / "adapter_config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_weights(path: Path, edit) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


def test_what_is_written_is_read_again(directory):
    expected, found = example(directory), read_control_adapter(directory)
    for name in ("rank", "alpha", "site", "form", "inverse", "neumann_order", "base_model_type", "facts"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.base_model_name_or_path == "someone/base"
    assert (found.scale, found.hidden_size) == (0.5, HIDDEN)
    assert list(found.layers) == [0, 1, 5]
    for layer, factors in expected.layers.items():
        assert torch.equal(found.layers[layer].A, factors.A)
        assert torch.equal(found.layers[layer].B, factors.B)
    assert (directory / "README.md").read_text() == "card\n"
    assert (directory / "notes.txt").read_text() == "more\n"
    assert kind_of(directory) == "control"


def test_names_and_config_on_disk(directory):
    tensors = load_file(directory / "adapter_model.safetensors")
    assert sorted(tensors) == sorted(KEY.format(layer, factor) for layer in (0, 1, 5) for factor in "AB")
    assert tensors[KEY.format(5, "A")].shape == (RANK, HIDDEN)
    assert tensors[KEY.format(5, "B")].shape == (HIDDEN, RANK)
    assert json.loads((directory / "adapter_config.json").read_text()) == {
        "peft_type": "CONTROL_ADAPTER",
        "r": 4,
        "lora_alpha": 2.0,
        "layers_to_transform": [0, 1, 5],
        "base_model_name_or_path": "someone/base",
        "base_model_type": "llama",
        "control_form": "general",
        "control_site": "writes",
        "control_inverse": "neumann",
        "control_neumann_order": 3,
        "hidden_size": HIDDEN,
        "layers": {
            str(layer): {
                "attention": ["self_attn.o_proj"],
                "mlp": ["mlp.down_proj"],
                "post_norms": False,
                "biased": ["mlp.down_proj"],
            }
            for layer in (0, 1, 5)
        },
    }


def test_factors_are_stored_in_float32(tmp_path):
    adapter = example(tmp_path)
    for factors in adapter.layers.values():
        factors.A, factors.B = factors.A.bfloat16(), factors.B.bfloat16()
    write_control_adapter(tmp_path, adapter, "card")
    found = read_control_adapter(tmp_path)
    assert found.layers[0].A.dtype == torch.float32
    assert torch.equal(found.layers[0].A, adapter.layers[0].A.float())


def test_unknown_keys_of_a_config_survive_a_rewrite(directory, tmp_path):
    edit_config(directory, made_by="somebody")
    (tmp_path / "again").mkdir()
    write_control_adapter(tmp_path / "again", read_control_adapter(directory), "card")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["made_by"] == "somebody"


def published(path: Path, **config) -> Path:
    """A directory as the published tool wrote it: peft_type LORA, nothing of ours in the config."""
    path.mkdir()
    tensors = {}
    for layer, factors in example(path).layers.items():
        tensors[KEY.format(layer, "A")], tensors[KEY.format(layer, "B")] = factors.A.bfloat16(), factors.B.bfloat16()
    save_file(tensors, path / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["down_proj"], **config}
    (path / "adapter_config.json").write_text(json.dumps(content))
    return path


def test_published_directories_are_known_by_their_keys(tmp_path):
    path = published(tmp_path / "plain")
    found = read_control_adapter(path)
    assert kind_of(path) == "control"
    assert found.scale == 8 / RANK
    assert (found.site, found.form, found.facts) == ("block", "general", {})
    assert (found.inverse, found.neumann_order) == ("neumann", 2)  # the published method, which it does not record
    said = read_control_adapter(published(tmp_path / "said", control_inverse="exact"))
    assert said.inverse == "exact"
    with_rslora = read_control_adapter(published(tmp_path / "rslora", use_rslora=True))
    assert with_rslora.scale == pytest.approx(8 / math.sqrt(RANK))


@pytest.mark.parametrize(("peft_type", "kind"), [("LORA", "additive"), ("MULTIPLICATIVE_LORA", "multiplicative")])
def test_other_kinds_are_told_by_their_type(peft_type, kind, tmp_path):
    save_file({"base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": torch.ones(2, 2)},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type, "r": 2, "lora_alpha": 2}))
    assert kind_of(tmp_path) == kind
    with pytest.raises(UsageError, match="not a control adapter"):
        read_control_adapter(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": ...}, "r must be a positive number"),
        ({"r": 2.5}, "whole number"),
        ({"r": 8}, r"layers\.0\.control_A\.weight has shape \[4, 24\]; with r = 8"),
        ({"lora_alpha": "2"}, "lora_alpha must be a positive number"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a positive number"),
        ({"control_site": "attention"}, "control_site is 'attention'"),
        ({"control_inverse": "none"}, "control_inverse"),
        ({"control_neumann_order": 0}, "control_neumann_order"),
        ({"control_form": "symmetric"}, "control_form is 'symmetric', but .* holds the general form"),
        ({"control_form": "round"}, "control_form is 'round'; it must be one of general, symmetric"),
        ({"layers_to_transform": [0, 1]}, r"\[0, 1\], but .* holds layers \[0, 1, 5\]"),
        ({"layers_to_transform": [0, 1, 5, 1]}, "layer 1 twice"),
        ({"layers_to_transform": "all"}, "list of layer numbers"),
        ({"layers": {"0": {"attention": []}}}, "layer 0 under"),
        ({"layers": {}}, "layer 0 under"),
    ],
)
def test_wrong_configs_are_named(changes, message, directory):
    edit_config(directory, **changes)
    with pytest.raises(UsageError, match=message):
        read_control_adapter(directory)


def rename(tensors: dict, old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(KEY.format(1, "B")), "layer 1 has no control_B"),
        (lambda t: t.pop(KEY.format(1, "A")), "layer 1 has no control_A"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected tensor extra"),
        (lambda t: t.update({"model.layers.1.control_A": torch.ones(4, 24)}), "layer 1 a second time"),
        (lambda t: t.update({KEY.format(1, "Q"): torch.ones(24, 4)}), "holds the symmetric form"),
        (lambda t: t.update({KEY.format(1, "A"): torch.ones(3, 24)}), r"layers\.1\.control_A.*shape \[3, 24\]"),
        (lambda t: t.update({KEY.format(1, "B"): torch.ones(24, 4, 1)}), r"layers\.1\.control_B.*shape"),
        (
            lambda t: t.update({KEY.format(1, "A"): torch.ones(4, 23)}),
            r"layers\.1\.control_A.*shape \[4, 23\]; .* must be \[4, 24\]",
        ),
        (lambda t: t.update({KEY.format(1, "A"): torch.ones(4, 24, dtype=torch.int32)}), "control_A.*int32"),
        (lambda t: t.update({KEY.format(1, "A"): torch.full((4, 24), math.nan)}), r"layers\.1\.control_A.*NaN"),
        (lambda t: t.update({KEY.format(5, "B"): torch.full((24, 4), math.inf)}), r"layers\.5\.control_B.*infinite"),
        (lambda t: t.clear(), "no control_A and control_B"),
        (lambda t: [rename(t, key, key.replace("control", "lora")) for key in list(t)], "no control_A and control_B"),
    ],
)
def test_wrong_tensors_are_named(edit, message, directory):
    edit_weights(directory, edit)
    with pytest.raises(UsageError, match=message):
        read_control_adapter(directory)


def test_missing_and_damaged_files_are_named(directory, tmp_path):
    with pytest.raises(UsageError, match=r"nowhere is not a directory"):
        read_control_adapter(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"it has no adapter_config\.json"):
        read_control_adapter(tmp_path / "empty")
    weights, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    content = config.read_text()
    config.write_text('{"r": 4,\n "lora_alpha": }')
    with pytest.raises(UsageError, match=r"adapter_config\.json, line 2: broken JSON"):
        read_control_adapter(directory)
    config.write_text("[1]")
    with pytest.raises(UsageError, match="JSON object"):
        read_control_adapter(directory)
    config.write_text(content)
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UsageError, match=r"adapter_model\.safetensors is damaged"):
        read_control_adapter(directory)
    weights.unlink()
    with pytest.raises(UsageError, match=r"no adapter_model\.safetensors"):
        read_control_adapter(directory)
    (directory / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UsageError, match="pickled"):
        read_control_adapter(directory)


def test_validation_against_a_model(directory):
    adapter = read_control_adapter(directory)
    validate_against(adapter, HIDDEN, 6)
    with pytest.raises(UsageError, match="another hidden size: 24, where the model has 32"):
        validate_against(adapter, 32, 6)
    with pytest.raises(UsageError, match=r"layer 5, but the model has 5 layers.*\n.*someone/base"):
        validate_against(adapter, HIDDEN, 5)


def test_the_card_says_what_it_is(directory):
    card = control_card(read_control_adapter(directory))
    for words in (
        "`someone/base` (llama)",
        "| layers | 0:1,5 (3) |",
        "`writes`",
        "Neumann series of order 3",
        "4, 2, 0.5",
    ):
        assert words in card


def test_layer_ranges():
    assert layer_ranges([5, 0, 1, 2, 7, 8]) == "0:2,5,7:8"
    assert layer_ranges([]) == ""
