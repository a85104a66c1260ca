"""Several processes, one error: whoever fails and wherever the others are, one of them tells."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest

from tests.tiny_project import environment

PROGRAM = """
import sys
from cadapter.errors import CadapterError, Stopped, UsageError
from cadapter.training import distributed
from cadapter.training.distributed import barrier, from_main, gather_tensors, on_main, sum_over_world

def body(world):
    {body}

with distributed.joined_world() as world:
    body(world)
print("done", flush=True)
"""


def run_processes(body: str, count: int = 2) -> tuple[list[int], str, float]:
    """Run ``body(world)`` in each of ``count`` processes: exit codes by rank, all that was said, seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(body=body)],
            env=environment(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    said = "".join(process.communicate(timeout=120)[0] for process in processes)
    return [process.returncode for process in processes], said, time.monotonic() - started


@pytest.mark.processes
@pytest.mark.parametrize(
    ("body", "rank"),
    [
        pytest.param("raise ValueError('spoilt')", 0, id="all"),
        pytest.param("world.is_main or barrier(); raise ValueError('spoilt')", 0, id="the-first-alone"),
        pytest.param("world.is_main and barrier(); raise ValueError('spoilt')", 1, id="another-alone"),
        pytest.param("on_main(lambda: int('spoilt'), world)", 0, id="work-of-the-first"),
    ],
)
def test_one_process_tells(body: str, rank: int) -> None:
    codes, said, seconds = run_processes(body)
    assert said.count("spoilt") == 1, said  # Python's own traceback of the one that tells
    assert said.count("Traceback") == 1, said
    assert f"From rank {rank} of 2:" in said
    assert codes == [1, 1]
    assert seconds < 60  # and not the half hour that a collective waits


@pytest.mark.processes
def test_all_end_with_the_exit_code_of_the_error() -> None:
    _, said, _ = run_processes("raise SystemExit(UsageError('x').exit_code)")
    assert "done" not in said
    codes, said, _ = run_processes("world.is_main or barrier(); raise KeyboardInterrupt")
    assert codes[1] == 130, said


@pytest.mark.processes
def test_what_processes_tell_each_other() -> None:
    body = """
    import torch
    assert sum_over_world(torch.tensor([world.rank, 1.0])).tolist() == [3.0, 3.0]
    assert from_main("größe" if world.is_main else "", world) == "größe"
    assert from_main("", world) == ""
    own = {f"layer {world.rank}": torch.full((2, 2), float(world.rank)), f"half {world.rank}": torch.ones(1).bfloat16()}
    found = gather_tensors(own, [0, 2], world)
    assert sorted(found) == (["half 0", "half 2", "layer 0", "layer 2"] if world.is_main else [])
    if world.is_main:
        assert found["layer 2"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    barrier()
    """
    codes, said, _ = run_processes(body, 3)
    assert said.count("done") == 3, said
    assert codes == [0, 0, 0]
