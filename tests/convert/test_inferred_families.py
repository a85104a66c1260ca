"""Conversions for families that are in no table: right where the residual writers were recognised, else refused."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from cadapter.adapters.directory import read_control_adapter
from cadapter.adapters.layer_facts import describe_layers
from cadapter.cli import app
from cadapter.convert.add_lora import to_add_lora
from cadapter.convert.merge import merge_model
from cadapter.convert.mult_lora import to_mult_lora
from cadapter.convert.operators import Dial
from cadapter.convert.plan import make_recipe
from cadapter.errors import UsageError
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.families import FAMILIES, FUSED, PER_EXPERT
from cadapter.models.loading import family_for
from tests.convert.test_converted_families import peft_logits
from tests.tiny_models import SHAPE, SPECIAL, VOCAB
from tests.tiny_tokenizer import make_tokenizer

SPARSE = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
DENSE = {
    "olmo": ("self_attn.o_proj", "mlp.down_proj"),
    "glm": ("self_attn.o_proj", "mlp.down_proj"),
    "starcoder2": ("self_attn.o_proj", "mlp.c_proj"),
    "nemotron": ("self_attn.o_proj", "mlp.down_proj"),
}
"""The writers of both modules, by type."""

ROUNDING = 1e-5
"""Of the largest logit: 2e-6 is found, what float32 keeps of (I + W)·(w·x) against ((I + W)·w)·x in three blocks."""


@pytest.fixture(scope="module")
def unlisted(tmp_path_factory):
    """A function that saves a tiny random model of a type once and returns its directory."""

    @cache
    def make(kind: str, **settings: Any) -> Path:
        assert kind not in FAMILIES
        directory = tmp_path_factory.mktemp(kind)
        torch.manual_seed(sum(kind.encode()))
        config = AutoConfig.for_model(kind, **{**SHAPE, **SPECIAL, **settings})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(directory)
        return directory

    return make


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def merge(base: Path, adapter: Path, output: Path, strength: float) -> list[str]:
    """Merge as the command does; returns the notes."""
    recipe = make_recipe(Checkpoint(base), adapter, Dial(strength=strength))
    merge_model(Checkpoint(base), recipe.plan, output, lambda summary: "card\n")
    return recipe.notes


@pytest.mark.parametrize("kind", DENSE)
def test_dense_models_convert_exactly_and_it_is_said_where_the_writers_come_from(
    kind, unlisted, make_adapter, native_logits, tokens, logits, tmp_path
):
    base = unlisted(kind)
    adapter = make_adapter(base, spectral=0.3)
    files = read_control_adapter(adapter)
    assert {(*facts.attention, *facts.mlp) for facts in files.facts.values()} == {DENSE[kind]}
    unchanged, *expected = native_logits(base, adapter, tokens, [0.0, 1.0, -1.0, 0.5])
    for strength, native in zip((1.0, -1.0, 0.5), expected, strict=True):
        [note] = merge(base, adapter, tmp_path / f"merged-{strength}", strength)
        assert f"Models of type {kind!r} are in no table" in note
        assert ", ".join(DENSE[kind]) in note
        assert error(native, unchanged) > 0.02
        assert error(logits(tmp_path / f"merged-{strength}", tokens), native) < ROUNDING
    summary = to_add_lora(Checkpoint(base), "base", files, tmp_path / "lora", Dial())
    assert summary.notes == (note,)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    with torch.no_grad():
        assert error(model(input_ids=tokens, use_cache=False).logits, expected[0]) < ROUNDING
    assert to_mult_lora(files, tmp_path / "mult", Dial()).notes == (note,)  # from what the adapter records


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("olmoe", SPARSE),
        ("glm4_moe", SPARSE),
        ("ernie4_5_moe", SPARSE),
        ("deepseek_v3", {**SPARSE, **LATENT}),
        ("hunyuan_v1_moe", {**SPARSE, "moe_topk": 2}),
    ],
)
def test_models_with_experts_convert_exactly(
    kind, settings, unlisted, make_adapter, native_logits, tokens, logits, tmp_path
):
    base = unlisted(kind, **settings)
    adapter = make_adapter(base, spectral=0.3)
    merge(base, adapter, tmp_path / "merged", 0.5)
    unchanged, native = native_logits(base, adapter, tokens, [0.0, 0.5])
    assert error(native, unchanged) > 0.02
    assert error(logits(tmp_path / "merged", tokens), native) < ROUNDING
    to_add_lora(Checkpoint(base), "base", read_control_adapter(adapter), tmp_path / "lora", Dial(strength=0.5))
    assert error(peft_logits(base, tmp_path / "lora", tokens), native) < ROUNDING


def test_a_writer_that_was_not_recognised_is_seen_and_recorded(unlisted, make_adapter, tmp_path):
    base = Checkpoint(unlisted("glm4_moe", **SPARSE))
    family = replace(family_for(base), mlp_writers=("mlp.down_proj", PER_EXPERT, FUSED))  # without the shared expert
    facts = describe_layers(base, family, range(3))
    unknown = ("mlp.experts.*.down_proj", "mlp.shared_experts.down_proj")  # one without the other is not right
    assert [facts[layer].unknown for layer in range(3)] == [(), unknown, unknown]
    adapter = read_control_adapter(make_adapter(base.directory, facts=facts))
    assert adapter.facts == facts
    with pytest.raises(UsageError, match=r"is not known in layer 1 \(mlp\.experts\.\*\.down_proj, mlp\.shared"):
        to_mult_lora(adapter, tmp_path / "mult", Dial())
    assert not (tmp_path / "mult").exists()


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        # experts are named otherwise on disk than in memory
        ("minimax", SPARSE, r"layer 0 \(block_sparse_moe\.experts\.\*\.w2\)"),
        # experts stand the other way round, [experts, in, out], which a square shape does not show, and have biases
        ("gpt_oss", {**SPARSE, "intermediate_size": SHAPE["hidden_size"]}, r"mlp\.experts\.down_proj, .*_bias"),
        # a norm follows the experts within their module
        ("axk1", {**SPARSE, **LATENT}, r"layer 1 \(mlp\.experts\.\*\.down_proj, mlp\.shared_experts\.down_proj\)"),
    ],
)
def test_writers_that_are_not_understood_are_refused(kind, settings, reason, unlisted, make_adapter, tmp_path):
    base = unlisted(kind, **settings)
    adapter = make_adapter(base)
    with pytest.raises(UsageError, match=reason + r"(.|\n)*cadapter generate --adapter"):
        merge(base, adapter, tmp_path / "merged", 1.0)
    with pytest.raises(UsageError, match=reason):
        to_mult_lora(read_control_adapter(adapter), tmp_path / "merged", Dial())
    assert not (tmp_path / "merged").exists()


def test_a_model_none_of_whose_writers_is_known_is_refused(unlisted, make_adapter, tmp_path):
    base = Checkpoint(unlisted("olmo"))
    for missing, module in (("attention_writers", "attention"), ("mlp_writers", "MLP")):
        facts = describe_layers(base, replace(family_for(base), **{missing: ("other",)}), range(3))
        facts = {layer: replace(each, unknown=()) for layer, each in facts.items()}  # nor named as writers usually are
        adapter = read_control_adapter(make_adapter(base.directory, module, facts=facts))
        with pytest.raises(UsageError, match=rf"is not known in layer 0 \(the {module}"):
            to_mult_lora(adapter, tmp_path / "mult", Dial())


def test_the_commands_serve_them(unlisted, make_adapter, tmp_path):
    base = unlisted("starcoder2", vocab_size=VOCAB + 256)
    make_tokenizer(base)
    adapter = make_adapter(base, site="block")

    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    result = run("generate", base, "The quick", "--adapter", adapter, "--compare", "--max-new-tokens", "4")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("strength") == 3
    result = run("merge", base, adapter, tmp_path / "merged")
    assert result.exit_code == 0, result.stderr
    assert "approximation" in result.stderr
    assert "in no table of families" in result.stderr
