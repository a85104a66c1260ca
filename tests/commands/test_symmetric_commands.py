"""The symmetric form from training to the last command, each command against another way to the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cadapter.adapters.directory import read_control_adapter
from cadapter.algebra import orthogonality_error
from tests.tiny_project import Project, metrics, run, run_well

KEYS = {
    "control_form": "symmetric", "control_site": "writes", "control_gamma": 0.25, "lora_weight_decay": 4.0, "lr": 3e-2,
    "gradient_accumulation_steps": 2, "eval_fraction": 0.2, "max_steps": 12, "checkpoint_interval_steps": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(command_project: Project) -> Path:
    """The directory of a finished run."""
    run_well("train", command_project.write_config("symmetric", **KEYS))
    return command_project.root / "symmetric"


def scores(config: Path, file: Path, *options: object) -> dict[tuple[int, float], dict[str, float]]:
    """What eval says, by class and strength."""
    run_well("eval", config, "--json", file, *options)
    lines = [line for line in json.loads(file.read_text()) if "strength" in line]
    return {(line["control_class"], line["strength"]): line for line in lines}


def test_the_adapter_is_symmetric_and_steers(command_project: Project, trained: Path, tmp_path: Path) -> None:
    files = read_control_adapter(trained / "final")
    assert files.form == "symmetric"
    for factors in files.layers.values():
        assert orthogonality_error(factors.Q) <= 1e-6
        assert factors.S.abs().max() > 0.01
    found = scores(command_project.root / "symmetric.toml", tmp_path / "scores.json")
    for kind in (1, -1):  # each class is likelier at its own strength
        assert found[kind, kind]["loss"] < found[kind, 0.0]["loss"] < found[kind, -kind]["loss"]


@pytest.mark.slow
def test_resuming_gives_the_same_bits(command_project: Project, trained: Path) -> None:
    config = command_project.write_config("symmetric-resumed", **KEYS)
    run_well("train", config, "--set", "max_steps=6")
    run_well("train", config, "--resume-from-checkpoint")
    one, other = (load_file(command_project.root / name / "final" / "adapter_model.safetensors")
                  for name in ("symmetric", "symmetric-resumed"))  # fmt: skip
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert len(metrics(command_project.root / "symmetric-resumed")) == 12


def test_another_form_does_not_resume_and_does_not_start_from_it(command_project: Project, trained: Path) -> None:
    config = command_project.root / "symmetric.toml"
    result = run(
        "train", config, "--resume-from-checkpoint", "--set", 'control_form="general"', "--set", "max_steps=20"
    )
    assert result.returncode == 2
    assert "control_form" in result.stderr
    other = command_project.write_config("general", init_from=str(trained / "final"), control_site="writes")
    result = run("train", other)
    assert result.returncode == 2
    assert 'was trained with control_form = "symmetric", not "general"' in result.stderr


def test_more_directions_than_there_are_is_refused_before_anything_is_written(command_project: Project) -> None:
    config = command_project.write_config("too-many", control_form="symmetric", lora_rank=65)
    for options in (["--dry-run"], []):
        result = run("train", config, *options)
        assert result.returncode == 2
        assert "lora_rank = 65" in result.stderr
    assert not (command_project.root / "too-many").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strength", ["0.5", "-1"])
def test_merged_models_score_as_the_adapter_does(
    command_project: Project, trained: Path, tmp_path: Path, strength: str
) -> None:
    """eval applies the adapter natively; the merged model, and the LoRA, are evaluated as models of their own."""
    native = scores(command_project.root / "symmetric.toml", tmp_path / "native.json", "--strength", strength)
    base = command_project.root / "model"
    merged, lora = tmp_path / "merged", tmp_path / "lora"
    run_well("merge", base, trained / "final", merged, "--strength", strength, "--verify")
    run_well("to-add-lora", base, trained / "final", lora, "--strength", strength)
    keys = {"use_control_adapters": False, "eval_fraction": 0.2}
    config = command_project.write_config("plain", kinds=("positive",), **keys)
    for adapter in (merged, lora):
        found = scores(config, tmp_path / "plain.json", "--adapter", adapter)
        expected = native[1, float(strength)]
        assert found[1, 1.0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)  # float32, products in another order
        assert found[1, 1.0]["kl"] == pytest.approx(expected["kl"], rel=1e-3)
        assert expected["kl"] > 1e-5


@pytest.mark.slow
def test_generated_text_is_that_of_the_merged_model(command_project: Project, trained: Path, tmp_path: Path) -> None:
    base, prompt = (
        command_project.root / "model",
        ("best lovely", "--temperature", 0, "--max-new-tokens", 24, "--quiet"),
    )
    run_well("merge", base, trained / "final", tmp_path / "merged", "--strength", -8)
    native = run_well("generate", base, *prompt, "--adapter", trained / "final", "--strength", -8).stdout
    assert native == run_well("generate", tmp_path / "merged", *prompt).stdout
    assert native != run_well("generate", base, *prompt).stdout
