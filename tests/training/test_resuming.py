"""Which settings may differ when a run goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from cadapter.config import Config, load_config
from cadapter.errors import UsageError
from cadapter.training.resuming import EXCUSED_BY, FREE, compare_settings, excused_facts, given_keys, settings_of

TEXT = """
model_dir = "base"
output_dir = "run"
use_control_adapters = true
lora_weight_decay = 10.0
lr = 1e-3
sequence_len = 64
[[datasets]]
dataset_path = "good.jsonl"
"""


def settings(tmp_path: Path, *overrides: str) -> dict:
    (tmp_path / "config.toml").write_text(TEXT)
    return settings_of(load_config(tmp_path / "config.toml", overrides))


def compare(tmp_path: Path, *overrides: str, given: bool = False) -> list[str]:
    keys = given_keys(overrides) if given else set()
    return compare_settings(settings(tmp_path), settings(tmp_path, *overrides), keys, "step-000010")


def test_files_may_move_and_datasets_not_come_and_go(tmp_path: Path) -> None:
    assert compare(tmp_path, 'datasets.0.dataset_path="other.jsonl"')[0].startswith("datasets.0.dataset_path: ")
    before, more = settings(tmp_path), settings(tmp_path)
    more["datasets"].append({**more["datasets"][0], "control_class": -1})
    with pytest.raises(UsageError, match=r"datasets\.1\.control_class: not set in the checkpoint, -1 now"):
        compare_settings(before, more, set(), "step-000010")
    with pytest.raises(UsageError, match=r"datasets\.1\.control_class: -1 in the checkpoint, not set now"):
        compare_settings(more, before, set(), "step-000010")


def test_nothing_changed(tmp_path: Path) -> None:
    assert compare(tmp_path) == []


def test_where_and_how_long_may_change(tmp_path: Path) -> None:
    changed = compare(tmp_path, "epochs=3", 'output_dir="elsewhere"', "pipeline_stages=2", "max_checkpoints=9")
    assert [line.partition(":")[0] for line in changed] == [
        "output_dir",
        "epochs",
        "pipeline_stages",
        "max_checkpoints",
    ]
    assert "epochs: 1 in the checkpoint, 3 now" in changed


@pytest.mark.parametrize(
    "override",
    ["lr=2e-3", "beta2=0.9", "lora_weight_decay=1.0", 'control_inverse="neumann"', "class_weights={negative = 0.5}",
     'lr_schedule="linear"', "gradient_clipping=0.5", "lora_dropout=0.1", 'dtype="float32"', "load_in_4bit=true",
     "datasets.0.control_class=-1", "seed=7", "eval_fraction=0.5"],
)  # fmt: skip
def test_what_a_step_does_may_change_only_where_set_names_it(tmp_path: Path, override: str) -> None:
    with pytest.raises(UsageError) as refused:
        compare(tmp_path, override)
    assert "step-000010 was written with other settings" in str(refused.value)
    assert f"  {override.partition('=')[0]}" in str(refused.value)
    assert "--set" in str(refused.value)
    (line,) = compare(tmp_path, override, given=True)
    assert line.startswith(override.partition("=")[0])


def test_all_that_is_refused_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        compare(tmp_path, "lr=2e-3", "seed=7", "epochs=2")
    assert "  lr: 0.001 in the checkpoint, 0.002 now" in str(refused.value)
    assert "  seed: 42 in the checkpoint, 7 now" in str(refused.value)
    assert "epochs" not in str(refused.value)


def test_facts_are_excused_by_the_keys_they_follow_from() -> None:
    assert excused_facts(set()) == set()
    assert excused_facts({"lr"}) == set()
    assert excused_facts({"gradient_accumulation_steps"}) == {"sequences per step"}
    assert excused_facts({"sequence_len"}) == {"sequence_len", "training data"}


def test_every_key_that_is_named_exists() -> None:
    named = set().union(FREE, *EXCUSED_BY.values())
    assert named <= set(Config.model_fields)
