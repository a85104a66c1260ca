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

from tests.tiny_project import Project, environment, metrics, run_well

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
