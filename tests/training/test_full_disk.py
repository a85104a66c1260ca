"""A disk that is too small, fills up or becomes read-only: said in plain words, and the last checkpoint is whole.

The disk is a tmpfs, in memory, of a size that the test chooses.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cadapter.data.batches import BatchPlan
from cadapter.training.room import OVERHEAD, room_of
from cadapter.training.state import fault_of, newest_checkpoint
from tests.tiny_project import Project, command, environment, metrics, run, run_well

pytestmark = pytest.mark.processes

MIB = 2**20
KEYS: dict[str, Any] = {"eval_fraction": 0.1, "evals_per_run": 1, "checkpoint_interval_steps": 2, "max_checkpoints": 2}
LONG = {"max_steps": 20_000, "epochs": 200, "checkpoint_interval_steps": 3}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a disk for the test cannot be mounted: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path) -> Path:
    """Leave nothing free on ``disk``."""
    file = disk / "others"
    with open(file, "ab") as content:
        try:
            while True:
                content.write(bytes(MIB // 4))
                content.flush()
        except OSError:
            return file


def make_read_only(disk: Path) -> None:
    # Files that are open for writing keep a whole file system from becoming read-only, but not a view of it.
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)


def start(config: Path, processes: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("train", config, "--num-gpus", processes), env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_a_checkpoint(process: subprocess.Popen[str], directory: Path) -> None:
    deadline = time.monotonic() + 120
    while newest_checkpoint(directory / "checkpoints")[0] is None:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_during_the_run(project: Project, disk: Path, processes: int) -> None:
    directory = disk / "run"
    keys = {**KEYS, **LONG, "output_dir": str(directory), "pipeline_stages": processes}
    config = project.write_config(f"filling-{processes}", **keys)
    process = start(config, processes)
    wait_for_a_checkpoint(process, directory)
    others = fill(disk)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 1, said + errors
    checkpoint, remarks = newest_checkpoint(directory / "checkpoints")
    assert checkpoint is not None
    assert remarks == []
    assert errors.count("error: ") == 1, errors
    assert "No space left on device" in errors
    assert f"The newest whole checkpoint is {checkpoint}." in errors
    assert "internal error" not in errors
    assert "Traceback" not in errors
    assert not list(directory.rglob("*.partial-*"))
    if processes > 1:
        assert "From rank 0 of 2 (stage 0 of 2), " in errors
    kept = directory / "error.txt"  # which finds room where what could not be written has left some
    assert not kept.exists() or f"The newest whole checkpoint is {checkpoint}." in kept.read_text("utf-8")

    others.unlink()
    step = int(checkpoint.name.removeprefix("step-"))
    run_well(
        "train", config, "--num-gpus", processes, "--resume-from-checkpoint", "--set", f"max_steps={step + 4}"
    )  # fmt: skip
    assert [line["step"] for line in metrics(directory)] == list(range(1, step + 5))
    assert not (directory / "error.txt").exists()


def test_a_disk_that_becomes_read_only_during_the_run(project: Project, disk: Path) -> None:
    directory = disk / "run"
    config = project.write_config("read-only", **{**KEYS, **LONG}, output_dir=str(directory))
    process = start(config, 1)
    wait_for_a_checkpoint(process, directory)
    try:
        make_read_only(disk)
        said, errors = process.communicate(timeout=120)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
    assert process.returncode == 1, said + errors
    assert errors.count("error: ") == 1, errors
    assert "Read-only file system" in errors
    checkpoint, _ = newest_checkpoint(directory / "checkpoints")
    assert checkpoint is not None
    assert fault_of(checkpoint) is None
    assert f"The newest whole checkpoint is {checkpoint}." in errors


@pytest.mark.parametrize(
    ("keys", "code", "said"),
    [
        # 4 layers × 2 × 64 × rank numbers of 4 bytes: 8 MiB in final/, three times that in each checkpoint.
        pytest.param({"lora_rank": 4096, "max_steps": 2}, 2, "error: output_dir", id="never-fits"),
        pytest.param({"lora_rank": 256, "max_steps": 100}, 0, "lower max_checkpoints", id="may-not-fit"),
        pytest.param({"lora_rank": 256, "max_steps": 1}, 0, "", id="fits"),
    ],
)
def test_what_a_run_will_take_is_compared_with_what_is_free(
    project: Project, disk: Path, keys: dict[str, Any], code: int, said: str
) -> None:
    config = project.write_config("sizes", **keys, max_checkpoints=20, output_dir=str(disk / "run"))
    done = run("train", config, "--dry-run")
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert bool(said) == ("MiB are free" in done.stderr)
    assert list(disk.iterdir()) == []


@pytest.mark.slow
def test_the_estimate_is_what_is_written(project: Project, disk: Path) -> None:
    """Within the megabyte that is reckoned for what is small."""
    keys = {**KEYS, "lora_rank": 512, "max_steps": 4, "max_checkpoints": 1, "output_dir": str(disk / "run")}
    done = run_well("train", project.write_config("estimate", **keys))
    (estimate,) = [line for line in done.stdout.splitlines() if line.startswith("A checkpoint takes")]
    sizes = [sum(f.stat().st_size for f in (disk / "run" / part).rglob("*") if f.is_file())
             for part in ("checkpoints", "final", "best")]  # fmt: skip
    checkpoint, most, _ = (float(word) * MIB for word in estimate.replace(",", "").split() if word[0].isdigit())
    assert abs(sizes[0] - checkpoint) < MIB / 4
    assert abs(sum(sizes) + checkpoint - most) < 2 * MIB


def test_a_resume_with_larger_steps_writes_as_many_epochs_as_there_are() -> None:
    """Ten epochs of 100 sequences: 900 steps of one sequence are done, and ten of ten are left."""
    config = SimpleNamespace(
        full_fine_tune=False, dtype="bfloat16", lora_weight_dtype="float32", eval_fraction=0.0,
        checkpoint_interval_steps=None, max_checkpoints=3,
    )  # fmt: skip
    mode = SimpleNamespace(trainable=lambda: [MIB])
    steps = BatchPlan(100, 10, epochs=10, after_step=900, after_sequences=900)
    assert steps.total_steps == 910
    plan: Any = SimpleNamespace(config=config, mode=mode, steps=steps)
    checkpoint = 3 * 4 * MIB  # the adapter and Adam's two moments in float32
    assert room_of(plan).least == (10 + 1) * 4 * MIB + 4 * checkpoint + OVERHEAD


def test_a_disk_that_cannot_be_written_is_found_before_weights_are_read(project: Project, disk: Path) -> None:
    config = project.write_config("unwritable", **KEYS, output_dir=str(disk / "run"))
    try:
        make_read_only(disk)
        done = run("train", config)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"output_dir = {disk / 'run'} cannot be written: Read-only file system" in done.stderr
    assert "Loaded this stage's layers" not in done.stdout
    assert list(disk.iterdir()) == []
