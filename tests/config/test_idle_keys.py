"""Keys that a config gives and that do nothing in it are said, each once, with its line and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from cadapter.config import idle_in_run, idle_keys, load_config, located

CONTROL = "use_control_adapters = true"
LORA, FULL = "use_control_adapters = false", "full_fine_tune = true"
NEUTRAL = '[[datasets]]\ndataset_path = "n.txt"\ncontrol_class = 0\n'
NEGATIVE = '[[datasets]]\ndataset_path = "w.txt"\ncontrol_class = -1\n'
PAIRS = '[[datasets]]\ndataset_path = "p.jsonl"\nchosen_field = "a"\nrejected_field = "b"\n'
BY_RECORD = '[[datasets]]\ndataset_path = "n.jsonl"\nclass_field = "class"\n'


def write(directory: Path, lines: str, mode: str = CONTROL, more: str = "") -> Path:
    path = directory / "run.toml"
    path.write_text(
        f'model_dir = "m"\noutput_dir = "o"\n{mode}\nlr = 1e-5\nsequence_len = 64\n{lines}\n'
        f'[[datasets]]\ndataset_path = "d.txt"\n{more}'
    )
    return path


def idle(directory: Path, lines: str, mode: str = CONTROL, more: str = "", *overrides: str) -> list[str]:
    path = write(directory, lines, mode, more)
    found = located(idle_keys(load_config(path, overrides)), path, overrides)
    return [line.removeprefix(f"{directory}/") for line in found]


@pytest.mark.parametrize(
    ("line", "mode", "says"),
    [
        ("control_gamma = 0.25", CONTROL, 'in the general form; remove it, or set control_form = "symmetric"'),
        ("control_neumann_order = 3", CONTROL, 'on the exact inverse; remove it, or set control_inverse = "neumann"'),
        *(
            (line, mode, "without Control Adapters; remove it, or set use_control_adapters = true")
            for mode in (LORA, FULL)
            for line in ('control_site = "mlp"', 'control_form = "general"', "control_class0_lambda = 1.0",
                         'control_inverse = "exact"', "control_gamma = 0.5", "control_neumann_order = 2",
                         "class_weights = { negative = 0.5 }")
        ),
        *(
            (line, CONTROL, "on a single stage; remove it, or set pipeline_stages above 1")
            for line in ('partition_method = "uniform"', "use_column_major_topology = true")
        ),
        ("lora_rank = 8", FULL, "on full fine-tuning, which has no adapters; remove it"),
        ("control_class0_lambda = 1.0", CONTROL, "without texts of class 0; remove it, or give a dataset with"),
        ("sample_temperature = 1.0", CONTROL, "without sample_prompts; remove it, or give prompts"),
        *(
            (f"{line}\neval_fraction = 0", CONTROL, "without evaluations (eval_fraction = 0); remove it, or set")
            for line in ("evals_per_run = 3", "eval_gradient_accumulation_steps = 2", "early_stopping_patience = 3",
                         'sample_prompts = ["a"]')
        ),
        ("early_stopping_patience = 2\nevals_per_run = 2", CONTROL, "without an evaluation between the first step and"),
    ],
)  # fmt: skip
def test_a_key_without_effect(tmp_path: Path, line: str, mode: str, says: str) -> None:
    key = line.splitlines()[0]
    (found,) = idle(tmp_path, line, mode)
    assert found.startswith(f"run.toml:6: {key}: has no effect ")
    assert says in found


@pytest.mark.parametrize(
    ("lines", "more"),
    [
        ('control_gamma = 0.25\ncontrol_form = "symmetric"', ""),
        ('control_neumann_order = 3\ncontrol_inverse = "neumann"', ""),
        ("control_class0_lambda = 1.0", NEUTRAL),
        ("control_class0_lambda = 1.0", BY_RECORD),
        ("control_class0_lambda = 0", ""),
        ('evals_per_run = 3\nearly_stopping_patience = 1\nsample_prompts = ["a"]\nsample_temperature = 1', ""),
        ("eval_fraction = 0", ""),
        ("lora_rank = 8", ""),
        *(("class_weights = { negative = 0.5 }", more) for more in (NEGATIVE, BY_RECORD, PAIRS)),
        ("class_weights = { positive = 0.5 }", ""),
        ('pipeline_stages = 2\npartition_method = "uniform"\nuse_column_major_topology = true', ""),
    ],
)
def test_a_key_with_its_effect(tmp_path: Path, lines: str, more: str) -> None:
    assert idle(tmp_path, lines, more=more) == []


@pytest.mark.parametrize("lines", ["class_weights = { positive = 2, negative = 0.5 }", "class_weights.negative = 0.5"])
def test_a_key_within_a_table_without_effect(tmp_path: Path, lines: str) -> None:
    (found,) = idle(tmp_path, lines, more=NEUTRAL)
    assert found.startswith(
        "run.toml:6: class_weights.negative = 0.5: has no effect without texts of class -1; remove it"
    )


def test_each_key_once_in_the_order_of_the_file_and_overrides_by_their_name(tmp_path: Path) -> None:
    found = idle(tmp_path, "control_gamma = 0.25\ncontrol_neumann_order = 3", LORA, "", "control_site=mlp")
    assert [line.split(":")[1] for line in found[:2]] == ["6", "7"]
    assert found[2].startswith("--set control_site=mlp: has no effect without Control Adapters")
    assert len(found) == 3


@pytest.mark.parametrize(
    ("line", "more", "says"),
    [
        ("warmup_steps = 21", "", "the run has 20 steps only, so that lr never reaches its value; lower warmup_steps"),
        ("activation_checkpointing = 5", "", "the model has 4 layers only, of which the first alone"),
        ("control_class0_lambda = 0.5", BY_RECORD, "has no effect, since no text has class 0"),
        ("warmup_steps = 20", "", ""),
        ("activation_checkpointing = 4", "", ""),
        ("activation_checkpointing = 'full'", "", ""),
        ("control_class0_lambda = 0.5", "", ""),  # said before the run is known
    ],
)
def test_what_only_the_run_shows(tmp_path: Path, line: str, more: str, says: str) -> None:
    path = write(tmp_path, line, more=more)
    found = located(idle_in_run(load_config(path), 20, 4, 0), path)
    assert len(found) == bool(says)
    assert all(f"run.toml:6: {line.split(' ')[0]} = " in each and says in each for each in found)
    if line.startswith("control_class0"):
        assert idle_in_run(load_config(path), 20, 4, 7) == []


@pytest.mark.parametrize(
    ("lines", "mode", "says"),
    [
        ("lora_rank = 65", CONTROL, "the model's hidden size is 64, beyond which a rank adds nothing; give a smaller"),
        ("lora_rank = 65", LORA, "the model's hidden size is 64"),
        ("lora_rank = 64", CONTROL, ""),
        (
            "gradient_accumulation_steps = 600",
            CONTROL,
            "a step is to take 600 sequences, and there are 80 in all; lower",
        ),
        ("micro_batch_size = 600", CONTROL, "a step is to take 600 sequences, and there are 80 in all; lower"),
        ("gradient_accumulation_steps = 80", CONTROL, ""),
    ],
)
def test_what_is_more_than_the_model_or_the_data_have(tmp_path: Path, lines: str, mode: str, says: str) -> None:
    path = write(tmp_path, lines, mode)
    config = load_config(path)
    step = config.micro_batch_size * config.gradient_accumulation_steps
    found = located(idle_in_run(config, 1, 4, 0, hidden_size=64, sequences=80, sequences_per_step=step), path)
    assert len(found) == bool(says)
    assert all(f"run.toml:6: {lines}: " in each and says in each for each in found)
