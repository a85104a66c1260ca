"""Multiplicative LoRA directories: their tensors, their config, and where the writers come from."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from cadapter.adapters.directory import kind_of, read_control_adapter
from cadapter.convert.mult_lora import to_mult_lora
from cadapter.convert.operators import Dial
from cadapter.errors import UsageError
from cadapter.models.checkpoint import Checkpoint
from tests.reference import naive

PREFIX = "base_model.model.model.layers"
BOTH, MLP = ("self_attn.o_proj", "mlp.down_proj"), ("mlp.down_proj",)


@pytest.mark.parametrize(
    ("site", "option", "writers"),
    [("mlp", None, MLP), ("writes", None, BOTH), ("block", None, BOTH), ("block", "mlp", MLP), ("mlp", "all", BOTH)],
)
def test_every_writer_gets_the_factors_with_the_scale_folded(
    site, option, writers, model_directory, make_adapter, tmp_path
):
    adapter = read_control_adapter(make_adapter(model_directory("llama"), site=site, layers=(0, 2)))
    summary = to_mult_lora(adapter, tmp_path / "mult", Dial(), writers=option)
    tensors = load_file(tmp_path / "mult" / "adapter_model.safetensors")
    assert set(tensors) == {
        f"{PREFIX}.{layer}.{writer}.lora_{part}.weight" for layer in (0, 2) for writer in writers for part in "AB"
    }
    assert (summary.layers, summary.pairs, summary.rank) == (2, 2 * len(writers), 4)
    for layer, factors in adapter.layers.items():
        for writer in writers:
            A, B = (tensors[f"{PREFIX}.{layer}.{writer}.lora_{part}.weight"] for part in "AB")
            assert torch.equal(A, factors.A)
            expected = naive.full_matrix(factors.A, factors.B, adapter.scale)
            torch.testing.assert_close(B.double() @ A.double(), expected, rtol=1e-6, atol=1e-7)
    config = json.loads((tmp_path / "mult" / "adapter_config.json").read_text())
    assert config["peft_type"] == "MULTIPLICATIVE_LORA"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert config["target_modules"] == sorted(writer.split(".")[1] for writer in writers)
    assert config["layers_to_transform"] == [0, 2]
    assert kind_of(tmp_path / "mult") == "multiplicative"


def test_the_inverse_keeps_the_rank(model_directory, make_adapter, tmp_path):
    adapter = read_control_adapter(make_adapter(model_directory("llama"), spectral=0.9))
    to_mult_lora(adapter, tmp_path / "inverse", Dial.from_options(inverse=True))
    tensors = load_file(tmp_path / "inverse" / "adapter_model.safetensors")
    factors = adapter.layers[1]
    A, B = (tensors[f"{PREFIX}.1.mlp.down_proj.lora_{part}.weight"].double() for part in "AB")
    expected = naive.inverse_minus_identity(naive.full_matrix(factors.A, factors.B, adapter.scale))
    torch.testing.assert_close(B @ A, expected, rtol=1e-5, atol=1e-6)


def test_only_conversions_that_are_exact_say_nothing(model_directory, make_adapter, tmp_path):
    base = model_directory("llama")
    for number, (site, writers, exact) in enumerate(
        [("mlp", None, True), ("writes", None, True), ("block", None, False), ("writes", "mlp", False)]
    ):
        adapter = read_control_adapter(make_adapter(base, name=f"a{number}", site=site))
        notes = to_mult_lora(adapter, tmp_path / f"out{number}", Dial(), writers=writers).notes
        assert ["approximation" in note for note in notes] == ([] if exact else [True])


def test_an_adapter_of_the_neumann_series_hears_its_remainder(model_directory, make_adapter, tmp_path):
    adapter = read_control_adapter(make_adapter(model_directory("llama"), inverse="neumann"))
    assert to_mult_lora(adapter, tmp_path / "plus", Dial()).notes == ()
    (note,) = to_mult_lora(adapter, tmp_path / "minus", Dial(strength=-1.0)).notes
    largest = max(
        naive.norms(naive.full_matrix(f.A, f.B, adapter.scale))["neumann_remainder_2"] for f in adapter.layers.values()
    )
    assert f"at most {largest:.2g}" in note


def test_the_family_comes_from_the_base_or_from_what_is_recorded(model_directory, make_adapter, tmp_path):
    base = model_directory("llama")
    adapter = read_control_adapter(make_adapter(base))
    adapter.facts = {}
    assert to_mult_lora(adapter, tmp_path / "by-type", Dial()).pairs == 6
    adapter.base_model_type = None
    with pytest.raises(UsageError, match="--base"):
        to_mult_lora(adapter, tmp_path / "unknown", Dial())
    assert not (tmp_path / "unknown").exists()
    assert to_mult_lora(adapter, tmp_path / "by-base", Dial(), base=Checkpoint(base)).pairs == 6
    with pytest.raises(UsageError, match="another hidden size"):
        to_mult_lora(adapter, tmp_path / "wrong", Dial(), base=Checkpoint(model_directory("llama-narrow")))


def test_an_adapter_of_another_family_hears_of_it(model_directory, make_adapter, tmp_path):
    adapter = read_control_adapter(make_adapter(model_directory("llama")))
    (note,) = to_mult_lora(adapter, tmp_path / "out", Dial(), base=Checkpoint(model_directory("mistral"))).notes
    assert "llama" in note
    assert "mistral" in note


def test_options_of_the_dial_exclude_one_another():
    with pytest.raises(UsageError, match="--strength and --inverse exclude"):
        Dial.from_options(strength=0.5, inverse=True)
    with pytest.raises(UsageError, match="--scale and --inverse"):
        Dial.from_options(scale=0.5, inverse=True)
    assert (Dial.from_options().strength, Dial.from_options().factor) == (1.0, 1.0)
