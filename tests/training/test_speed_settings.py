"""compile and activation_checkpointing as a user sets them: whole runs, whose numbers are those of plain runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_project import Project, environment, metrics, run_well, toml_value

# The process is its own launcher's worker; memory runs out where the code says, and nowhere else.
WORKER = """
import sys
import torch
from cadapter.cli import main
from cadapter.models.layers import HeadLayer

original, calls = HeadLayer.forward, [0]

def forward(self, parts):
    calls[0] += 1
    if calls[0] in (3, 5):  # the third micro-batch of the first step, and again the first or second
        raise torch.OutOfMemoryError("for the test")
    return original(self, parts)

HeadLayer.forward = forward
sys.argv = ["cadapter", "train", sys.argv[1]]
main()
"""
KEYS: dict[str, Any] = {
    "kinds": ("positive", "negative", "neutral"), "control_class0_lambda": 0.5, "lora_dropout": 0.1, "max_steps": 4,
    "gradient_accumulation_steps": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(project: Project) -> Path:
    """The directory of a run in which nothing is compiled and everything kept."""
    run_well("train", project.write_config("speed-plain", **KEYS, activation_checkpointing="none"))
    return project.root / "speed-plain"


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "final" / "adapter_model.safetensors")


def without_time(directory: Path) -> list[dict[str, Any]]:
    clock = ("seconds", "train/tokens_per_second")
    return [{name: value for name, value in line.items() if name not in clock} for line in metrics(directory)]


@pytest.mark.parametrize("kept", ["selective", "full", "offload", 2])
def test_what_is_kept_changes_no_number(project, plain, kept):
    name = f"speed-{kept}"
    run_well("train", project.write_config(name, **KEYS, activation_checkpointing=kept))
    assert without_time(project.root / name) == without_time(plain)
    found, expected = adapter(project.root / name), adapter(plain)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_memory_that_runs_out_costs_speed_and_nothing_else(project, plain):
    """Twice in the first step: what was computed of it is forgotten, and it is taken again with less kept."""
    config = project.write_config("speed-out-of-memory", **KEYS)
    worker = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29641"}
    result = subprocess.run(
        [sys.executable, "-c", WORKER, str(config)],
        env={**environment(), **worker}, capture_output=True, text=True, check=False, cwd=os.getcwd(),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = [line for line in (result.stderr + result.stdout).splitlines() if "GPU memory ran out" in line]
    assert ["selective" in said[0], "full" in said[1]] == [True, True]
    assert len(said) == 2
    assert without_time(project.root / "speed-out-of-memory") == without_time(plain)
    found, expected = adapter(project.root / "speed-out-of-memory"), adapter(plain)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["none", "full"])
def test_a_compiled_run_has_the_losses_of_a_plain_one(project, plain, kept):
    name = f"speed-compiled-{kept}"
    run_well("train", project.write_config(name, **KEYS, compile=True, activation_checkpointing=kept))
    for found, expected in zip(metrics(project.root / name), metrics(plain), strict=True):
        for key in ("train/loss", "train/loss_neutral", "train/grad_norm", "train/norm_max"):
            assert found[key] == pytest.approx(expected[key], rel=1e-4)  # float32, Adam's first steps of lr 1e-2


SHARED = Path(__file__).parents[3] / "shared"
STEPS = 200


def losses_of(root: Path, name: str, **keys: Any) -> torch.Tensor:
    """The loss of each of 200 steps on film reviews, in bfloat16, with a small English model."""
    settings = {
        "model_dir": str(SHARED / "models/tiny-english-14m"), "output_dir": str(root / name),
        "use_control_adapters": True, "lora_rank": 8, "lora_weight_decay": 100.0, "lr": 1e-3, "sequence_len": 128,
        "max_steps": STEPS, "eval_fraction": 0, "max_sequences": 300, "gradient_accumulation_steps": 2,
        "layers_to_transform": "0:6", **keys,
    }  # fmt: skip
    lines = [f"{key} = {toml_value(value)}" for key, value in settings.items()]
    for kind, control_class in (("pos", 1), ("neg", -1)):
        path = SHARED / f"data/reviews_{kind}.jsonl"
        lines += ["[[datasets]]", f'dataset_path = "{path}"']
        lines += [f"control_class = {control_class}"] if settings["use_control_adapters"] else []
    lines.insert(0, f'cache_dir = "{root / "cache"}"')
    config = root / f"{name}.toml"
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    run_well("train", config)
    return torch.tensor([line["train/loss"] for line in metrics(root / name)], dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "models/tiny-english-14m").is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("lora", [False, True])
def test_bfloat16_losses_of_fast_paths_differ_from_plain_ones_as_plain_ones_do_from_each_other(lora, tmp_path):
    """What plain runs differ by: the same global batch in another micro-batch size, which rounds otherwise."""
    mode: dict[str, Any] = {"lora_rank": 8}
    if lora:
        mode = {"use_control_adapters": False, "layers_to_transform": "0:7", "lr": 3e-4}
    fast: dict[str, Any] = {**mode, "compile": True}
    plain = losses_of(tmp_path, "plain", **mode)
    assert len(plain) == STEPS
    noise = losses_of(tmp_path, "other", **mode, micro_batch_size=2, gradient_accumulation_steps=1) - plain
    assert plain[-20:].mean() < plain[:20].mean() - 0.03  # it does learn
    for name, keys in (("compiled", fast), ("selective", {**fast, "activation_checkpointing": "selective"})):
        difference = losses_of(tmp_path, name, **keys) - plain
        print(
            f"{name}: mean difference {difference.mean():.1e}, mean of sizes {difference.abs().mean():.1e}; "
            f"of plain runs {noise.mean():.1e}, {noise.abs().mean():.1e}"
        )
        assert difference.abs().mean() < 2 * noise.abs().mean(), name
        assert difference.mean().abs() < 2 * noise.abs().mean(), name
