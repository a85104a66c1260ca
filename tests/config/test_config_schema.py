"""The schema as users see it: defaults, words, warnings, JSON schema."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from cadapter.config import Config, DatasetConfig, check_layout, config_warnings
from cadapter.config.json_schema import config_schema
from cadapter.config.schema import ClassWeights
from cadapter.config.toml import parse_toml, toml_text
from cadapter.config.wording import expected, reference_table
from cadapter.errors import UsageError


def make(*classes: int, **keys: Any) -> Config:
    values = {
        "model_dir": "m",
        "output_dir": "o",
        "lr": 2e-5,
        "sequence_len": 128,
        "use_control_adapters": True,
        **keys,
    }
    datasets = tuple(DatasetConfig(dataset_path="d", control_class=code) for code in classes or (1,))
    return Config(**values, datasets=datasets)


def test_defaults_are_those_of_the_documentation() -> None:
    written = {
        "seed": 42,
        "full_fine_tune": False,
        "dtype": "bfloat16",
        "init_from": None,
        "load_in_4bit": False,
        "lora_rank": 16,
        "lora_alpha": None,
        "lora_dropout": 0.0,
        "lora_weight_decay": 0.0,
        "lora_weight_dtype": "float32",
        "target_modules": None,
        "layers_to_transform": None,
        "control_class0_lambda": 0.0,
        "control_inverse": "exact",
        "control_neumann_order": 2,
        "control_form": "general",
        "control_gamma": 0.5,
        "control_site": "block",
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-6,
        "lr_schedule": "rms_ratio",
        "warmup_steps": 0,
        "gradient_clipping": 1.0,
        "gradient_dtype": "float32",
        "class_weights": {"positive": 1.0, "negative": 1.0, "neutral": 1.0},
        "epochs": 1,
        "max_steps": None,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "eval_gradient_accumulation_steps": None,
        "pipeline_stages": 1,
        "partition_method": "estimated_size",
        "use_column_major_topology": False,
        "activation_checkpointing": "auto",
        "attn_implementation": "auto",
        "document_attention": "packed",
        "compile": "auto",
        "eval_fraction": 0.01,
        "evals_per_run": 11,
        "checkpoint_interval_hours": 1.0,
        "checkpoint_interval_steps": None,
        "max_checkpoints": 3,
        "cache_dir": None,
        "sequence_prefix": None,
        "document_prefix": None,
        "document_suffix": None,
        "mask_tokens": None,
        "mix_datasets": False,
        "drop_tails": False,
        "max_sequences": None,
        "overlength": None,
        "early_stopping_patience": None,
        "sample_prompts": [],
        "sample_max_new_tokens": 64,
        "sample_temperature": 0.0,
        "sample_chat": None,
        "max_skipped_steps": 10,
        "trust_remote_code": False,
    }
    given = {"model_dir", "output_dir", "lr", "sequence_len", "use_control_adapters", "datasets"}
    assert {key: value for key, value in make().model_dump().items() if key not in given} == written
    assert Config.model_fields["use_control_adapters"].default is False
    dataset = {
        "dataset_path": "d",
        "control_class": 1,
        "text_field": "text",
        "messages_field": None,
        "class_field": None,
        "chosen_field": None,
        "rejected_field": None,
        "overlength": None,
        "max_sequences": None,
        "max_tokens": None,
        "drop_tails": None,
    }
    assert DatasetConfig(dataset_path="d").model_dump() == dataset


def test_alpha_is_the_square_root_of_the_rank_unless_given() -> None:
    assert make(lora_rank=8).alpha == math.sqrt(8)
    assert make(lora_rank=8, lora_alpha=3).alpha == 3.0


def test_configs_are_frozen() -> None:
    config = make()
    for table, key in [(config, "lr"), (config.datasets[0], "control_class"), (config.class_weights, "positive")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(table, key, 1)


@pytest.mark.parametrize("model", [Config, DatasetConfig, ClassWeights])
def test_every_key_is_described_and_says_what_it_accepts(model: Any) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name
        assert field.description.endswith((".", "?")), name
        assert expected(field), name
        assert f"| `{name}` | {expected(field)} |" in reference_table(model)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_rank", "an integer of at least 1"),
        ("max_steps", "an integer of at least 1"),
        ("dtype", '"bfloat16" or "float32"'),
        ("control_site", '"block", "mlp" or "writes"'),
        ("drop_tails", "true or false"),
        ("lora_alpha", "a number above 0"),
    ],
)
def test_words_for_what_a_key_accepts(key: str, words: str) -> None:
    assert expected(Config.model_fields[key]) == words


def test_warnings() -> None:
    assert config_warnings(make(1, -1, lora_weight_decay=500.0)) == []
    (decay,) = config_warnings(make(1, -1))
    assert "without weight decay" in decay
    (neutral,) = config_warnings(make(1, 0, lora_weight_decay=500.0))
    assert "class 0 train nothing" in neutral
    assert config_warnings(make(1, 0, lora_weight_decay=500.0, control_class0_lambda=0.1)) == []
    decay, series = config_warnings(
        make(lora_weight_decay=500.0, control_inverse="neumann", lora_weight_dtype="bfloat16")
    )
    assert "lora_weight_decay is off" in decay
    assert "neumann" in series
    assert config_warnings(make(lora_weight_decay=500.0, control_inverse="neumann")) == []


def test_warnings_without_control_adapters() -> None:
    lora, full = {"use_control_adapters": False}, {"use_control_adapters": False, "full_fine_tune": True}
    for mode in (lora, full):
        assert config_warnings(make(**mode)) == []  # decay is for Control Adapters what it is not for these
    assert config_warnings(make(**lora, lora_weight_dtype="bfloat16")) == []


@pytest.mark.parametrize("control", [True, False])
def test_decay_of_bfloat16_adapters_is_off_and_said_to_be(control: bool) -> None:
    (off,) = config_warnings(make(use_control_adapters=control, lora_weight_decay=5.0, lora_weight_dtype="bfloat16"))
    assert off.startswith("lora_weight_decay is off: bfloat16 weights")
    assert 'lora_weight_dtype = "float32"' in off


def test_the_dtype_of_gradients_is_that_of_full_fine_tuning() -> None:
    full = {"use_control_adapters": False, "full_fine_tune": True}
    assert config_warnings(make(**full, gradient_dtype="bfloat16")) == []
    for keys in ({"use_control_adapters": False}, {"lora_weight_decay": 500.0}):
        (effect,) = config_warnings(make(**keys, gradient_dtype="bfloat16"))
        assert effect == "gradient_dtype has an effect on full fine-tuning only."
        assert config_warnings(make(**keys, gradient_dtype="float32")) == []


def test_stages_divide_processes() -> None:
    check_layout(2, 4)
    with pytest.raises(UsageError, match="pipeline_stages = 3 does not divide the 4 processes"):
        check_layout(3, 4)


def test_json_schema_holds_every_key_with_bounds_and_descriptions() -> None:
    schema = config_schema()
    assert set(schema["properties"]) == set(Config.model_fields)
    assert set(schema["required"]) == {"model_dir", "output_dir", "lr", "sequence_len", "datasets"}
    assert schema["additionalProperties"] is False
    for name, entry in schema["properties"].items():
        assert entry["description"] == Config.model_fields[name].description
    assert schema["properties"]["sequence_len"]["multipleOf"] == 64
    assert schema["properties"]["lr"]["exclusiveMinimum"] == 0
    assert schema["$defs"]["DatasetConfig"]["properties"]["control_class"]["enum"] == [1, -1, 0]
    assert '"null"' not in json.dumps(schema)
    assert "null" not in json.dumps(schema)


@pytest.mark.parametrize(
    "value", ['a "b" \\ \n\t\r c', True, 3, 2.5e-7, [1, "x", [False]], "", {"a": 1, "b": {"c": "d"}}]
)
def test_values_are_shown_as_toml(value: Any) -> None:
    assert parse_toml(f"x = {toml_text(value, width=1000)}") == {"x": value}
