"""A step rehearsed by several processes: what runs out of memory there costs speed, and nothing is left of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe import schedule
from safetensors.torch import load_file

from cadapter.training.engine import rehearsed_micro_batches
from tests.joined_processes import run_program
from tests.tiny_project import Project, make_model, metrics, run_well

WORKER = """
import os, sys
import torch
from cadapter.cli import main
from cadapter.models.layers import DecoderLayer
from cadapter.training import rehearsal
from cadapter.training.trainer import Trainer

rehearsal.can_run_out = lambda device: True  # also on the CPU, where it does as the code below says
small, rank = os.environ["SMALL"].split(), os.environ["RANK"]
forward, step, rehearsed = DecoderLayer.forward, Trainer._step, rehearsal.Rehearsal.run

def limited(self, parts):
    if f"{rank}:{self.keep}" in small and torch.is_grad_enabled():
        raise torch.OutOfMemoryError("CUDA. Tried to allocate 2 GiB.")
    return forward(self, parts)

def telling(self):
    kept = {layer.keep for layer in self.run.pipeline.layers() if isinstance(layer, DecoderLayer)}
    print(f"rank {rank} keeps {' '.join(kept) or 'nothing'}", flush=True)
    return step(self)

def counting(self, micro_batch):
    print(f"rank {rank} rehearses", flush=True)
    rehearsed(self, micro_batch)

DecoderLayer.forward, Trainer._step, rehearsal.Rehearsal.run = limited, telling, counting
sys.argv = ["cadapter", "train", *sys.argv[1:]]
main()
"""
"""``cadapter train`` where memory is too small for what SMALL names, any number of "RANK:SETTING"."""

KEYS: dict[str, Any] = {
    "kinds": ("positive", "negative", "neutral"), "control_class0_lambda": 0.5, "lora_dropout": 0.1, "max_steps": 3,
    "gradient_accumulation_steps": 3, "eval_fraction": 0.1, "evals_per_run": 2,
}  # fmt: skip
LORA: dict[str, Any] = {"use_control_adapters": False, "control_class0_lambda": None, "kinds": ("positive",)}
FULL = {**LORA, "full_fine_tune": True, "lora_rank": None, "lora_weight_decay": None, "lora_dropout": None}


def same(one: Path, other: Path) -> None:
    """Both runs have the same numbers, to the last bit."""
    clock = ("seconds", "train/tokens_per_second")
    lines = [
        [{name: value for name, value in line.items() if name not in clock} for line in metrics(root, name="step")]
        for root in (one, other)
    ]
    assert lines[0] == lines[1]
    (file,) = [path.name for path in (one / "final").glob("*.safetensors")]
    found, expected = (load_file(root / "final" / file) for root in (one, other))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def rehearsed(config: Path, processes: int, small: str = "", *options: str) -> str:
    """What is said by a run of several processes that rehearse, which must succeed."""
    codes, said, _ = run_program(WORKER, processes, config, *options, SMALL=small)
    assert codes == [0] * processes, said
    assert said.count("rehearses") == processes
    return said


@pytest.mark.processes
@pytest.mark.parametrize(
    ("stages", "processes", "small", "warnings", "kept"),
    [
        (2, 2, "1:none", [("none", "rank 1 (stage 1 of 2)")], "selective"),
        pytest.param(1, 2, "0:none 1:none", [("none", "rank 0, rank 1")], "selective", marks=pytest.mark.slow),
        pytest.param(
            2, 4, "3:none 0:selective", [("none", "rank 3 (stage 1 of 2)"), ("selective", "rank 0 (stage 0 of 2)")],
            "full", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_where_memory_runs_out_in_one_process_all_keep_less(
    project: Project, stages: int, processes: int, small: str, warnings: list[tuple[str, str]], kept: str
) -> None:
    name = f"rehearsed-{stages}-{processes}"
    said = rehearsed(project.write_config(name, **KEYS, pipeline_stages=stages), processes, small)
    following = [keep for keep, _ in warnings[1:]] + [kept]
    for (_, ranks), keep in zip(warnings, following, strict=True):
        told = f"GPU memory ran out on {ranks}; going on with activation_checkpointing = '{keep}'."
        assert said.count(told) == 1, said
    assert said.count("GPU memory ran out") == len(warnings)
    assert [said.count(f"rank {rank} keeps {kept}\n") for rank in range(processes)] == [3] * processes
    plain = project.write_config(f"{name}-plain", **KEYS, pipeline_stages=stages, activation_checkpointing=kept)
    run_well("train", plain, "--num-gpus", processes)
    same(project.root / name, project.root / f"{name}-plain")


@pytest.mark.processes
def test_where_nothing_is_small_enough_the_run_ends_with_the_usual_error(project: Project) -> None:
    small = " ".join(f"0:{keep}" for keep in ("none", "selective", "full", "offload"))
    config = project.write_config("too-small", **KEYS, pipeline_stages=2)
    codes, said, _ = run_program(WORKER, 2, config, SMALL=small)
    assert codes == [1, 1]
    assert said.count("going on with activation_checkpointing") == 3
    assert "From rank 0 of 2 (stage 0 of 2), rehearsal of a step:" in said
    assert said.count("error: ") == 1
    assert "error: GPU memory ran out, rehearsal of a step: Tried to allocate 2 GiB." in said
    assert "       Less is taken with load_in_4bit = true, pipeline_stages = 4 on 4 GPUs, " in said
    assert "Traceback" not in said
    assert "keeps" not in said, "a step was taken"


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "stages", "keys"),
    [
        ("control", 2, {}),
        ("replicas", 1, {}),
        ("three-stages", 3, {"document_attention": "isolated", "layers_to_transform": "1:1"}),  # one trains nothing
        ("no-block", 3, {"partition_method": "type:embedding|head"}),  # stages without blocks
        ("lora", 2, LORA),
        ("full-tied", 2, FULL),
        ("full-bfloat16", 2, {**FULL, "dtype": "bfloat16"}),
    ],
)
def test_nothing_is_left_of_a_rehearsal(
    project: Project, tmp_path: Path, name: str, stages: int, keys: dict[str, Any]
) -> None:
    processes = max(2, stages)
    model = make_model(tmp_path / "model", tied=name == "full-tied")
    settings = {**KEYS, **keys, "pipeline_stages": stages, "model_dir": str(model)}
    said = rehearsed(project.write_config(f"left-{name}", **settings), processes)
    assert "GPU memory" not in said
    plain = project.write_config(f"left-{name}-plain", **settings, activation_checkpointing="none")
    run_well("train", plain, "--num-gpus", processes)
    same(project.root / f"left-{name}", project.root / f"left-{name}-plain")


@pytest.mark.slow
@pytest.mark.processes
def test_a_resumed_run_rehearses_too_and_is_exact(project: Project) -> None:
    config = project.write_config("whole", **KEYS, pipeline_stages=2)
    rehearsed(config, 2)
    config = project.write_config("in-parts", **{**KEYS, "max_steps": 2}, pipeline_stages=2)
    rehearsed(config, 2)
    rehearsed(config, 2, "0:none", "--resume-from-checkpoint", "--set", "max_steps=3")
    ends = [metrics(project.root / name)[-1] for name in ("whole", "in-parts")]
    assert ends[0]["train/loss"] == ends[1]["train/loss"]
    found, expected = (
        load_file(project.root / name / "final" / "adapter_model.safetensors") for name in ("in-parts", "whole")
    )
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.processes
def test_a_setting_of_the_users_is_not_rehearsed(project: Project) -> None:
    config = project.write_config("own-setting", **KEYS, pipeline_stages=2, activation_checkpointing="full")
    codes, said, _ = run_program(WORKER, 2, config, SMALL="")
    assert codes == [0, 0]
    assert "rehearses" not in said


def most_under_way(micro_batches: int, stages: int, stage: int) -> tuple[int, int]:
    """By DeepSpeed's schedule: micro-batches whose backward pass is still to come, at most and after the first one."""
    under_way, most, beside_gradients, backwards = 0, 0, 0, 0
    for commands in schedule.TrainSchedule(micro_batches, stages, stage):
        for each in commands:
            if isinstance(each, schedule.ForwardPass):
                under_way += 1
                most = max(most, under_way)
                if backwards:
                    beside_gradients = max(beside_gradients, under_way)
            elif isinstance(each, schedule.BackwardPass):
                under_way -= 1
                backwards += 1
                beside_gradients = max(beside_gradients, under_way)
    return most, beside_gradients


@pytest.mark.parametrize("stages", range(1, 7))
def test_a_rehearsed_step_holds_as_much_as_a_whole_one(stages: int) -> None:
    for stage in range(stages):
        for accumulation in (1, 2, 3, 5, 8, 40):
            count = rehearsed_micro_batches(stage, stages, accumulation)
            whole = most_under_way(accumulation, stages, stage)
            assert most_under_way(count, stages, stage) == whole
            if count > 1:
                assert most_under_way(count - 1, stages, stage) != whole, "a shorter one would do"
