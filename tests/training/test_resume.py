"""Stopping and going on: a run that was stopped and resumed is the run that was not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.joined_processes import TERMINATED, run_program
from tests.tiny_project import Project, command, environment, listing, metrics, run, run_well

KEYS: dict[str, Any] = {
    "kinds": ("positive", "negative", "neutral"), "control_class0_lambda": 0.5, "lora_dropout": 0.1, "max_steps": 20,
    "gradient_accumulation_steps": 8, "eval_fraction": 0.1, "evals_per_run": 5, "checkpoint_interval_steps": 5,
}  # fmt: skip
STAGES = {1: {}, 2: {"pipeline_stages": 2}}
"""By number of processes."""


def checkpoints(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").glob("step-*"))


def stop(process: subprocess.Popen[str], ready: Callable[[], bool], number: int) -> tuple[int, str]:
    """Send a signal to the command as soon as ``ready``; return its exit code and what it said.

    No process of the command may be left.
    """
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run does not come so far"
        time.sleep(0.005)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    return process.returncode, errors


def start(config: Path, processes: int, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("train", config, "--num-gpus", processes, *options),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All that must be equal bit for bit: everything but what a clock says."""
    clock = ("seconds", "train/tokens_per_second")
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


def assert_equal_runs(one: Path, other: Path) -> None:
    for kind in ("train", "eval"):
        assert without_time(metrics(one, kind)) == without_time(metrics(other, kind))
    for part in ("final", "best", "checkpoints/step-000020"):
        first, second = (load_file(directory / part / "adapter_model.safetensors") for directory in (one, other))
        assert all(torch.equal(first[name], second[name]) for name in first)
    moments = [moments_of(directory / "checkpoints/step-000020") for directory in (one, other)]
    assert moments[0].keys() == moments[1].keys()
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])


def moments_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Adam's state by file and name."""
    files = sorted(checkpoint.glob("optimizer-*.safetensors"))
    found = {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}
    assert found
    return found


@pytest.fixture(scope="session")
def straight(project: Project) -> Path:
    """20 steps without a stop, on one process."""
    run_well("train", project.write_config("straight", **KEYS))
    return project.root / "straight"


def stopped_and_resumed(project: Project, processes: int, number: int, code: int) -> Path:
    name = f"stopped-{processes}"
    config = project.write_config(name, **{**KEYS, **STAGES[processes]})
    directory = project.root / name
    process = start(config, processes)
    got, errors = stop(process, lambda: "step-000010" in checkpoints(directory), number)
    assert got == code, errors
    last = metrics(directory)[-1]["step"]
    assert 10 <= last < 20
    assert errors.strip().splitlines() == [f"Stopped after step {last}; a checkpoint is saved."]
    assert f"step-{last:06d}" in checkpoints(directory)
    done = run_well("train", config, "--num-gpus", processes, "--resume-from-checkpoint")
    assert f"step-{last:06d}" in done.stdout
    return directory


@pytest.mark.processes
def test_a_terminated_run_goes_on_bit_for_bit(project: Project, straight: Path) -> None:
    assert_equal_runs(straight, stopped_and_resumed(project, 1, signal.SIGTERM, 143))


@pytest.mark.processes
@pytest.mark.slow
def test_a_stop_does_not_wait_for_an_evaluation_which_the_resumed_run_makes(project: Project, straight: Path) -> None:
    """Whoever stops a run gives it half a minute, often, before it is killed."""
    config = project.write_config("stopped-at-evaluation", **KEYS)
    directory = project.root / "stopped-at-evaluation"
    codes, said, _ = run_program(TERMINATED, 1, config, STEP="10")
    assert codes == [143], said
    assert checkpoints(directory)[-1] == "step-000010"
    assert [line["step"] for line in metrics(directory, "eval")] == [0, 5]
    run_well("train", config, "--resume-from-checkpoint")
    assert_equal_runs(straight, directory)


@pytest.mark.processes
@pytest.mark.slow
def test_the_same_on_two_stages_under_the_launcher(project: Project) -> None:
    config = project.write_config("straight-2", **KEYS, pipeline_stages=2)
    run_well("train", config, "--num-gpus", 2)
    assert_equal_runs(project.root / "straight-2", stopped_and_resumed(project, 2, signal.SIGTERM, 143))


@pytest.fixture(scope="session")
def half_on_two_stages(project: Project) -> Path:
    """The first 10 steps, on two stages."""
    config = project.write_config("half-2x1", **{**KEYS, "max_steps": 10}, pipeline_stages=2)
    run_well("train", config, "--num-gpus", 2)
    return project.root / "half-2x1"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("stages", "replicas"),
    [(1, 1), *(pytest.param(*layout, marks=pytest.mark.slow) for layout in ((4, 1), (1, 2), (2, 2)))],
)
def test_a_checkpoint_goes_on_in_any_layout(
    project: Project, straight: Path, half_on_two_stages: Path, tmp_path: Path, stages: int, replicas: int
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(half_on_two_stages, directory)
    keys = {**KEYS, "pipeline_stages": stages, "gradient_accumulation_steps": 8 // replicas}
    config = project.write_config(f"on-{stages}x{replicas}", **keys, output_dir=str(directory))
    done = run_well("train", config, "--num-gpus", stages * replicas, "--resume-from-checkpoint")
    assert f"replicas: {stages} × {replicas}" in done.stdout
    if stages != 2:
        assert f"Changed since the checkpoint: pipeline_stages: 2 in the checkpoint, {stages} now." in done.stdout
    assert [line["step"] for line in metrics(directory)] == list(range(1, 21))
    for one, other in zip(metrics(directory), metrics(straight), strict=True):
        first, second = (
            {name: value for name, value in line.items() if "loss" in name or name == "train/grad_norm"}
            for line in (one, other)
        )
        assert len(first) > 2
        # Sums of some 500 float32 terms, added in different orders and on different processes.
        assert first == pytest.approx(second, rel=1e-5, abs=1e-5), one["step"]
    last = [metrics(each, "eval")[-1] for each in (directory, straight)]
    assert last[0]["step"] == last[1]["step"] == 20
    assert last[0]["eval/loss"] == pytest.approx(last[1]["eval/loss"], rel=1e-5)


@pytest.mark.processes
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_saves_and_a_request_to_save_stops_nothing(project: Project, processes: int) -> None:
    keys = {**KEYS, **STAGES[processes], "checkpoint_interval_steps": None, "max_steps": 4000, "epochs": 1000}
    config = project.write_config(f"asked-{processes}", **{**keys, "evals_per_run": 1, "max_checkpoints": 9})
    directory = project.root / f"asked-{processes}"
    process = start(config, processes)
    deadline = time.monotonic() + 120
    while not (directory / "metrics.jsonl").is_file() or not metrics(directory):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    code, errors = stop(process, lambda: len(checkpoints(directory)) == 1, signal.SIGINT)
    assert code == 130, errors
    assert "Traceback" not in errors
    first, second = checkpoints(directory)
    assert first < second


@pytest.mark.processes
def test_a_damaged_newest_checkpoint_is_passed_over(own_project: Project, straight: Path) -> None:
    config = own_project.write_config("straight", **KEYS)
    run_well("train", config)
    directory = own_project.root / "straight"
    damaged = directory / "checkpoints" / "step-000020" / "optimizer-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    done = run_well("train", config, "--resume-from-checkpoint")
    assert f"{damaged.parent} is passed over: optimizer-00001.safetensors is damaged" in done.stderr
    assert "step-000015" in done.stdout
    assert_equal_runs(straight, directory)

    for path in (directory / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    before = listing(own_project.root)
    done = run("train", config, "--resume-from-checkpoint")
    assert done.returncode == 2
    assert "No checkpoint can be resumed from" in done.stderr
    assert listing(own_project.root) == before


@pytest.mark.processes
@pytest.mark.parametrize(
    ("key", "value", "meant", "said"),
    [
        ("sequence_len", 128, False, "sequence_len: 64 in the checkpoint, 128 now"),
        ("lr", 0.5, False, "lr: "),
        ("micro_batch_size", 2, False, "sequences per step: 8 in the checkpoint, 16 now"),
        ("lora_rank", 8, True, "lora_rank: 4 in the checkpoint, 8 now"),
        ("control_site", "mlp", True, "control_site: 'block' in the checkpoint, 'mlp' now"),
        ("max_steps", 20, True, "is the end of this run already: 20 of 20 steps"),
    ],
)
def test_a_changed_run_is_not_resumed(
    project: Project, straight: Path, key: str, value: Any, meant: bool, said: str
) -> None:
    """``meant``: --set names the key, which is not enough where the checkpoint does not fit."""
    before, config = listing(straight), project.root / "straight.toml"
    options = ["--set", f"{key}={json.dumps(value)}"] if meant else []
    if not meant:
        config = project.write_config(f"straight-{key}", **{**KEYS, key: value, "output_dir": str(straight)})
    done = run("train", config, "--resume-from-checkpoint", *options)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert listing(straight) == before


@pytest.mark.processes
def test_a_change_that_set_names_is_said_and_made(own_project: Project, straight: Path) -> None:
    config = own_project.write_config("meant", **KEYS)
    shutil.copytree(straight, own_project.root / "meant")
    changes = ("lr=1e-4", "max_steps=21", "micro_batch_size=2", "checkpoint_interval_steps=100")
    words = [part for change in changes for part in ("--set", change)]
    done = run_well("train", config, "--resume-from-checkpoint", *words)
    for said in ("lr: ", "max_steps: 20 in the checkpoint, 21 now", "micro_batch_size: 1 in the checkpoint, 2 now"):
        assert f"Changed since the checkpoint: {said}" in done.stdout
    lines = metrics(own_project.root / "meant", "train")
    assert [line["step"] for line in lines] == list(range(1, 22))
    before, after = lines[19], lines[20]
    assert after["train/lr"] < before["train/lr"]
    assert ", 16 sequences a step" in done.stdout


@pytest.mark.processes
@pytest.mark.slow
def test_with_other_steps_each_sequence_is_still_read_once(own_project: Project) -> None:
    """Also when it is the layout that makes other steps: fewer stages are more replicas."""
    keys = {**KEYS, "max_steps": 4, "gradient_accumulation_steps": 4, "pipeline_stages": 2, "eval_fraction": 0.0}
    config, directory = own_project.write_config("batches", **keys), own_project.root / "batches"
    run_well("train", config, "--num-gpus", 2)
    longer = ("--resume-from-checkpoint", "--set", "max_steps=1000")
    refused = run("train", config, "--num-gpus", 2, *longer, "--set", "pipeline_stages=1")
    assert refused.returncode == 2
    assert "sequences per step: 4 in the checkpoint, 8 now" in refused.stderr
    changed = ("--set", "pipeline_stages=1", "--set", "gradient_accumulation_steps=1")
    done = run_well("train", config, "--num-gpus", 2, *longer, *changed)
    assert (
        "Changed since the checkpoint: sequences per step: 4 in the checkpoint, 2 now. 16 sequences are" in done.stdout
    )
    straight = own_project.write_config("straight", **{**keys, "max_steps": None, "pipeline_stages": 1})
    run_well("train", straight)
    one, other = (metrics(path)[-1] for path in (directory, own_project.root / "straight"))
    assert one["tokens"] == other["tokens"]
    assert one["step"] == 4 + (other["step"] - 4) * 2 - 1  # the last of the longer steps was half empty, or less
    assert (directory / "epoch1").is_dir()


@pytest.mark.processes
@pytest.mark.slow
def test_results_without_a_checkpoint_are_not_started_over(own_project: Project) -> None:
    config, directory = own_project.write_config("kept", **{**KEYS, "max_steps": 2}), own_project.root / "kept"
    run_well("train", config)
    shutil.rmtree(directory / "checkpoints")
    before = listing(directory)
    done = run("train", config, "--resume-from-checkpoint")
    assert done.returncode == 2
    assert "has no checkpoint to resume from, and starting afresh would replace its final" in done.stderr
    assert listing(directory) == before
    shutil.rmtree(directory / "final")  # killed before its first checkpoint, with a best/ already
    done = run_well("train", config, "--resume-from-checkpoint")
    assert "No checkpoint to resume from: starting afresh." in done.stdout


@pytest.mark.processes
@pytest.mark.slow
def test_changed_data_are_not_resumed_and_more_epochs_are(own_project: Project) -> None:
    keys = {**KEYS, "max_steps": None, "micro_batch_size": 8, "evals_per_run": 1}
    config = own_project.write_config("longer", **keys)
    directory = own_project.root / "longer"
    run_well("train", config)
    steps = metrics(directory)[-1]["step"]

    texts = own_project.root / "positive.jsonl"
    original = texts.read_bytes()
    with open(texts, "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "one more text"}) + "\n")
    before = listing(directory)
    done = run("train", config, "--resume-from-checkpoint", "--set", "epochs=2")
    assert done.returncode == 2
    assert "training data: '" in done.stderr
    assert listing(directory) == before

    texts.write_bytes(original)
    run_well("train", config, "--resume-from-checkpoint", "--set", "epochs=2")
    assert [line["step"] for line in metrics(directory)] == list(range(1, 2 * steps + 1))
    assert (directory / "epoch2").is_dir()
    twice = own_project.write_config("twice", **{**keys, "epochs": 2})
    run_well("train", twice)
    names = ("train/loss", "train/grad_norm")
    for one, other in zip(metrics(directory), metrics(own_project.root / "twice"), strict=True):
        assert [one[name] for name in names] == [other[name] for name in names]


@pytest.mark.processes
def test_resuming_without_a_checkpoint_starts_afresh_and_says_so(own_project: Project) -> None:
    config = own_project.write_config("fresh", **{**KEYS, "max_steps": 2})
    done = run_well("train", config, "--resume-from-checkpoint")
    assert "No checkpoint to resume from: starting afresh." in done.stdout
    assert [line["step"] for line in metrics(own_project.root / "fresh")] == [1, 2]
