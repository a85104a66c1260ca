"""The benchmarks run, on the smallest of everything: what they measure here says nothing, and that they work does."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.tiny_project import environment

BENCHMARKS = {
    "step_parts": (["--shape", "tiny", "--steps", "1", "--settings", "full"], r"full +[\d,]+ tokens/s"),
    "against_plain_loop": (["--steps", "5"], r"cadapter has \d\.\d\d of the plain loop's speed"),
    "train_speed": (["--shape", "tiny", "--steps", "3"], r"tokens/s"),
    "plan_memory": (["--shape", "tiny", "--only", "control, none"], r"settings measured"),
    "prepare_speed": (["--megabytes", "1", "--rounds", "1"], r"tokens/s|per second"),
}
"""Their options, and a pattern of what they print."""
ALWAYS = "step_parts"
"""It reaches into a training run, which changes under it."""


@pytest.mark.parametrize(
    "name", [each if each == ALWAYS else pytest.param(each, marks=pytest.mark.slow) for each in BENCHMARKS]
)
def test_a_benchmark_works(name: str) -> None:
    options, said = BENCHMARKS[name]
    done = subprocess.run(
        [sys.executable, "-m", f"tests.benchmarks.{name}", *options],
        capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(said, done.stdout), done.stdout
