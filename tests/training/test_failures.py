"""A process that is killed or stands still: one error that says which, and nothing is left of the job."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from cadapter.errors import UsageError
from cadapter.training.watch import limit_seconds
from tests.joined_processes import run_processes
from tests.tiny_project import Project, command, environment, metrics, run

pytestmark = pytest.mark.processes

ENDLESS: dict[str, Any] = {"max_steps": 100_000, "epochs": 100_000}
TIMEOUT = {"CADAPTER_TIMEOUT": "0.1"}
"""Six seconds."""


@contextmanager
def training(project: Project, name: str, processes: int, **changes: str) -> Iterator[subprocess.Popen[str]]:
    """A run of so many stages that has taken a few steps."""
    config = project.write_config(name, **ENDLESS, pipeline_stages=processes)
    process = subprocess.Popen(
        command("train", config, "--num-gpus", processes), env=environment(**changes),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (project.root / name / "metrics.jsonl").is_file() or len(metrics(project.root / name)) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process
    process.kill()


def family(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """The launcher and the workers, these by their rank."""
    children = psutil.Process(process.pid).children(recursive=True)
    return {child.environ().get("RANK", "launcher"): child for child in children}


def is_alive(process: psutil.Process) -> bool:
    """Whether it has not ended: an orphan that has stays as a zombie where process 1, of a container, cares not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ended(process: subprocess.Popen[str], members: dict[str, psutil.Process], seconds: float) -> str:
    """What the command says, which must fail within ``seconds`` with one error and leave no process."""
    started = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert time.monotonic() - started < seconds
    _, there = psutil.wait_procs(list(members.values()), timeout=1)
    assert [each for each in there if is_alive(each)] == []
    assert errors.count("error: ") == 1, errors
    for word in ("internal error", "Traceback", "frame #"):
        assert word not in errors
    return errors


@pytest.mark.parametrize("victim", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_a_process_that_is_killed_is_named(project: Project, victim: str) -> None:
    with training(project, f"killed-{victim}", 2) as process:
        members = family(process)
        members[victim].kill()
        errors = ended(process, members, 30)
    kept = (project.root / f"killed-{victim}" / "error.txt").read_text("utf-8")
    other = 1 - int(victim)
    for text in (errors, kept):
        assert f"From rank {other} of 2 (stage {other} of 2), step " in text
        # Where rank 0 is gone, nobody can be asked what it was doing.
        phase = ", step " if victim == "1" else "."
        assert f"A process has ended without a word: rank {victim} (stage {victim} of 2){phase}" in text


@pytest.mark.slow
def test_a_launcher_that_is_killed_is_named(project: Project) -> None:
    with training(project, "killed-launcher", 2) as process:
        members = family(process)
        members["launcher"].kill()
        errors = ended(process, members, 30)
    assert "error: A process was killed by signal 9" in errors


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["1", "0"])
def test_a_process_that_stands_still_is_named_with_its_stage_and_phase(project: Project, victim: str) -> None:
    name = f"still-{victim}"
    with training(project, name, 3, **TIMEOUT) as process:
        members = family(process)
        members[victim].send_signal(signal.SIGSTOP)
        # The launcher gives the one that is stopped 30 seconds to end.
        errors = ended(process, members, 70)
    kept = (project.root / name / "error.txt").read_text("utf-8")
    for text in (errors, kept):
        if victim == "0":
            assert "Rank 0 (stage 0 of 3) gives no sign of life." in text
        else:
            assert "Nothing has moved for 0.1 minutes." in text
            assert "rank 1 (stage 1 of 3), step " in text
            (line,) = [line for line in text.splitlines() if "gives no sign of life" in line]
            assert "rank 1 (stage 1 of 3), step " in line
            assert text.count("waits for") == 2


@pytest.mark.slow
def test_work_that_takes_longer_than_the_limit_is_left_alone(project: Project) -> None:
    """Steps of many micro-batches, each of which is a sign of life."""
    keys = {"max_steps": 1, "pipeline_stages": 2, "gradient_accumulation_steps": 1500, "epochs": 1000}
    config = project.write_config("long-step", **keys)
    started = time.monotonic()
    done = run("train", config, "--num-gpus", 2, CADAPTER_TIMEOUT="0.05")
    assert done.returncode == 0, done.stderr
    (line,) = metrics(project.root / "long-step")
    assert line["seconds"] > 2 * 3.0, f"the step is too short to show anything ({time.monotonic() - started:.0f} s)"


def test_a_process_that_never_comes_is_said(project: Project, tmp_path: Path) -> None:
    config = project.write_config("alone", **ENDLESS, pipeline_stages=2)
    job = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731"}
    done = run("train", config, **job, CADAPTER_TIMEOUT="0.05")
    assert done.returncode == 1
    assert "error: Rank 0 of 2, start-up: the processes did not all meet at 127.0.0.1, port 29731" in done.stderr
    assert "internal error" not in done.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_too_little_gpu_memory_is_no_internal_error(processes: int) -> None:
    """What PyTorch raises on a GPU, in one of the processes."""
    body = (
        "import torch; world.watch.enter('step 3 of 8')\n"
        "    if world.rank == world.size - 1: raise torch.OutOfMemoryError('CUDA. Tried to allocate 2 GiB.')\n"
        "    barrier()"
    )
    codes, said, _ = run_processes(body, processes)
    assert codes == [1] * processes
    assert said.count("CadapterError: GPU memory ran out, step 3 of 8: Tried to allocate 2 GiB.") == 1, said
    assert "Does another program use the GPU?" in said


def test_a_limit_that_is_none(project: Project) -> None:
    done = run("train", project.write_config("limit", **ENDLESS), CADAPTER_TIMEOUT="soon")
    assert done.returncode == 2
    assert "CADAPTER_TIMEOUT = 'soon' in the environment is no number of minutes" in done.stderr


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADAPTER_TIMEOUT", "0.5")
    assert limit_seconds() == 30
    for value in ("0", "-3", "inf", "nan", ""):
        monkeypatch.setenv("CADAPTER_TIMEOUT", value)
        with pytest.raises(UsageError, match="is no number of minutes"):
            limit_seconds()
