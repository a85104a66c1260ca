"""Residual writers tried on made-up weights: right ones pass, and whatever is wrong with others shows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig

from cadapter.models.families import FAMILIES, FUSED, LLAMA, MODULES, Family
from cadapter.models.writers import proven_modules
from tests.tiny_models import CONFIGS, HIDDEN, LAYERS, SHAPE, SPECIAL

BOTH = frozenset(MODULES)
ATTENTION_ALONE = frozenset(MODULES[:1])


def unlisted(kind: str, **settings: Any) -> Any:
    """A config of a type that is in no table."""
    return AutoConfig.for_model(kind, **{**SHAPE, **SPECIAL, **settings})


def by_layer(config: Any, family: Family) -> list[frozenset[str]]:
    return list(proven_modules(config, family, range(LAYERS)).values())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_writers_of_every_family_of_the_table_are_all_that_it_writes(name):
    assert by_layer(CONFIGS[name], FAMILIES[CONFIGS[name].model_type]) == [BOTH] * LAYERS


@pytest.mark.parametrize("kind", ["olmo", "olmo3", "glm", "nemotron", "gemma"])
def test_writers_of_other_families_are_too(kind):
    assert by_layer(unlisted(kind), LLAMA) == [BOTH] * LAYERS


def test_a_writer_of_another_name_is_missed():
    assert by_layer(unlisted("starcoder2"), LLAMA) == [ATTENTION_ALONE] * LAYERS
    assert by_layer(unlisted("starcoder2"), replace(LLAMA, mlp_writers=("mlp.c_proj",))) == [BOTH] * LAYERS
    assert by_layer(CONFIGS["llama"], replace(LLAMA, attention_writers=("self_attn.v_proj",))) == [frozenset()] * LAYERS


def test_experts_without_the_shared_one_are_not_all():
    family = replace(FAMILIES["qwen2_moe"], mlp_writers=("mlp.down_proj", FUSED))
    found = by_layer(CONFIGS["qwen2_moe-dense"], family)
    assert found == [ATTENTION_ALONE, BOTH, ATTENTION_ALONE]  # the second is dense


def test_a_norm_behind_the_writers_within_the_module_shows():
    config = unlisted(
        "axk1", num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4,
        head_dim=4, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1,
        topk_group=1, first_k_dense_replace=1,
    )  # fmt: skip
    family = Family(mlp_writers=("mlp.down_proj", FUSED, "mlp.shared_experts.down_proj"))
    assert by_layer(config, family) == [BOTH, ATTENTION_ALONE, ATTENTION_ALONE]


@pytest.mark.parametrize("width", [HIDDEN, HIDDEN + 16])
def test_experts_that_stand_the_other_way_round_show(width):
    config = unlisted("gpt_oss", num_local_experts=4, num_experts_per_tok=2, intermediate_size=width)
    assert not any("mlp" in found for found in by_layer(config, Family(mlp_writers=(FUSED,))))


def test_the_config_stays_as_it_was():
    config = unlisted("olmo", attention_dropout=0.1)
    before = config.to_dict(), config._attn_implementation
    by_layer(config, LLAMA)
    assert (config.to_dict(), config._attn_implementation) == before
