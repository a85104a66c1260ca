"""Whoever watches a run goes away: the terminal is closed, or what reads the output ends.

And a run is told to stop before there is anything to save, within whoever's code.
"""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cadapter.training.state import newest_checkpoint
from tests.tiny_project import Project, command, environment, make_model, metrics, run

pytestmark = pytest.mark.processes

ENDLESS: dict[str, Any] = {"max_steps": 100_000, "epochs": 10_000}
PROCESSES = [1, pytest.param(2, marks=pytest.mark.slow)]
SECONDS = 120


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + SECONDS
    while not ready():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps(directory: Path) -> int:
    return len(metrics(directory)) if (directory / "metrics.jsonl").is_file() else 0


@pytest.mark.parametrize("processes", PROCESSES)
def test_a_closed_terminal_ends_a_run_with_a_checkpoint(project: Project, tmp_path: Path, processes: int) -> None:
    directory = tmp_path / "run"
    config = project.write_config(
        f"hung-up-{processes}", **ENDLESS, output_dir=str(directory), pipeline_stages=processes
    )
    terminal, side = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command("train", config, "--num-gpus", processes), env=environment(), stdin=side, stdout=side, stderr=side,
        preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(side)

    def shown() -> bool:
        os.read(terminal, 1 << 16)
        return steps(directory) >= 2

    wait_until(shown, process)
    os.close(terminal)  # from now on the terminal takes nothing, and the kernel sends SIGHUP
    assert process.wait(SECONDS) == 128 + signal.SIGHUP
    checkpoint, remarks = newest_checkpoint(directory / "checkpoints")
    assert remarks == []
    assert checkpoint is not None
    assert checkpoint.name == f"step-{steps(directory):06d}"
    assert not (directory / "error.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_nohup_is_nohup(project: Project, tmp_path: Path, processes: int) -> None:
    directory = tmp_path / "run"
    config = project.write_config(f"nohup-{processes}", **ENDLESS, output_dir=str(directory), pipeline_stages=processes)
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(
            ["nohup", *command("train", config, "--num-gpus", processes)], env=environment(), stdin=subprocess.DEVNULL,
            stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
    wait_until(lambda: steps(directory) >= 2, process)
    os.killpg(process.pid, signal.SIGHUP)
    later = steps(directory) + 20
    wait_until(lambda: steps(directory) >= later, process)
    process.terminate()
    assert process.wait(SECONDS) == 143, (tmp_path / "said").read_text()


@pytest.mark.parametrize("processes", PROCESSES)
def test_a_run_goes_on_when_nobody_reads_what_it_prints(project: Project, tmp_path: Path, processes: int) -> None:
    directory = tmp_path / "run"
    keys = {"max_steps": 20, "eval_fraction": 0.1, "evals_per_run": 20, "pipeline_stages": processes}
    config = project.write_config(f"unread-{processes}", **keys, output_dir=str(directory))
    process = subprocess.Popen(
        command("train", config, "--num-gpus", processes), env=environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert any("evaluation after step 0" in line for line in process.stdout)
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert process.wait(SECONDS) == 0, errors
    assert "rror" not in errors
    assert [line["step"] for line in metrics(directory)] == list(range(1, 21))
    assert (directory / "final").is_dir()
    assert not (directory / "error.txt").exists()


def test_a_run_goes_on_where_a_terminal_has_gone_that_is_not_its_own(project: Project, tmp_path: Path) -> None:
    """Nothing but EIO tells of it."""
    config = project.write_config("gone", max_steps=2, output_dir=str(tmp_path / "run"))
    terminal, side = pty.openpty()
    process = subprocess.Popen(
        command("train", config), env=environment(TERM="xterm"), text=True, stdin=subprocess.DEVNULL, stdout=side,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    os.close(side)
    os.read(terminal, 1)
    os.close(terminal)
    _, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, errors) == (0, "")
    assert (tmp_path / "run" / "final").is_dir()


@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
def test_a_run_goes_on_when_the_disk_of_its_output_is_full(project: Project, tmp_path: Path, unbuffered: str) -> None:
    config = project.write_config(f"full-output{unbuffered}", max_steps=2, output_dir=str(tmp_path / "run"))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("train", config), env=environment(PYTHONUNBUFFERED=unbuffered), text=True, stdout=full,
            stderr=subprocess.PIPE,
        )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr.count("warning: The output cannot be written: No space left on device.") == 1
    assert (tmp_path / "run" / "final").is_dir()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_stop_within_the_code_of_others_is_no_fault_of_it(project: Project, tmp_path: Path, number: int) -> None:
    """Here that of the model, whose errors are told as its own."""
    model = make_model(tmp_path / "model")
    settings = (model / "config.json").read_text()
    named = '"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}'
    (model / "config.json").write_text(settings.replace('"model_type": "llama"', named))
    (model / "mine.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")
    keys = {"model_dir": str(model), "output_dir": str(tmp_path / "run"), "trust_remote_code": True}
    config = project.write_config(f"own-code-{int(number)}", **keys)
    done = run("train", config, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.stderr.splitlines()[-1] == "Stopped before the first step; nothing was trained."
    assert done.returncode == 128 + number
