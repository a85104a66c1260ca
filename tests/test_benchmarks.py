"""The benchmarks run, on the smallest of everything: what they measure here says nothing, and that they work does."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.tiny_project import environment

QUICK = {
    "step_parts": (["--shape", "tiny", "--steps", "1", "--settings", "full"], r"full +[\d,]+ tokens/s"),
    "against_plain_loop": (["--steps", "5"], r"cadapter has \d\.\d\d of the plain loop's speed"),
}
"""Those that reach into a training run, which changes under them; with what they print."""
SLOW = {
    "train_speed": (["--shape", "tiny", "--steps", "3"], r"tokens/s"),
    "plan_memory": (["--shape", "tiny", "--only", "control, none"], r"settings measured"),
    "prepare_speed": (["--megabytes", "1", "--rounds", "1"], r"tokens/s|per second"),
}


def check(name: str, options: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.benchmarks.{name}", *options],
        capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(said, done.stdout), done.stdout


@pytest.mark.parametrize("name", QUICK)
def test_a_benchmark_of_a_training_run_works(name: str) -> None:
    check(name, *QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_benchmark_of_commands_works(name: str) -> None:
    check(name, *SLOW[name])
