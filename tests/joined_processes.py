"""A few lines of Python in several real processes that have joined one job, as under a launcher."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.tiny_project import environment

ROOT = Path(__file__).parents[1]

PROGRAM = """
from cadapter.errors import UsageError
from cadapter.training.distributed import barrier, on_main
from cadapter.training.failures import joined_world

def body(world):
    {body}

with joined_world() as world:
    body(world)
print("done", flush=True)
"""

TERMINATED = """
import os, signal, sys
from cadapter.cli import main
from cadapter.training.trainer import Trainer

forward = Trainer._forward_and_backward

def terminated(self, step):
    if step == int(os.environ["STEP"]):
        os.kill(os.getpid(), signal.SIGTERM)
    forward(self, step)

Trainer._forward_and_backward = terminated
sys.argv = ["cadapter", "train", *sys.argv[1:]]
main()
"""
"""``cadapter train`` that is told to stop within step STEP."""


def run_processes(body: str, count: int = 2) -> tuple[list[int], str, float]:
    """Run ``body(world)`` in each of ``count`` processes: exit codes by rank, all that was said, seconds."""
    return run_program(PROGRAM.format(body=body), count)


def run_program(program: str, count: int, *arguments: object, **changes: str) -> tuple[list[int], str, float]:
    """Run a program in each of ``count`` processes, told of the others as by a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            env=environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                **changes,
            ),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        said = "".join(process.communicate(timeout=300)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said, time.monotonic() - started


def run_processes_well(body: str, count: int) -> None:
    """:func:`run_processes`, where each process must come to its end."""
    codes, said, _ = run_processes(body, count)
    assert codes == [0] * count, said
    assert said.count("done") == count, said
