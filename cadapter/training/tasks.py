"""Processes that srun or Open MPI's mpirun started: which of them this one is, and where rank 0 listens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm numbers from here on are no steps of srun but a batch script, an interactive shell and the like (slurm.h)."""
LOWEST_SLURM_PORT, SLURM_PORTS = 10_000, 20_000
"""Below the ports that Linux hands out by itself (32768 and up)."""


@dataclass(frozen=True)
class Task:
    """This process as one of several that ``program`` started; ``address`` and ``port`` of rank 0 where it tells."""

    program: str
    rank: int
    size: int
    local_rank: int
    address: str = ""
    port: int | None = None


def task_of(environ: Mapping[str, str]) -> Task | None:
    """Return which of several tasks of srun or of Open MPI's mpirun this process is; None where it is none."""
    if "OMPI_COMM_WORLD_RANK" in environ:  # first: within a job of Slurm, mpirun starts its processes by srun
        rank, size, local_rank = (int(environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE", "LOCAL_RANK"))
        task = Task("mpirun", rank, size, local_rank)
    elif _in_a_step(environ):
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        task = Task(
            "srun",
            int(environ["SLURM_PROCID"]),
            int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1")),
            int(environ.get("SLURM_LOCALID", "0")),
            first_node(nodes),
            slurm_port(int(environ.get("SLURM_JOB_ID", "0")), int(environ["SLURM_STEP_ID"])),
        )
    else:
        return None
    return task if task.size > 1 else None


def _in_a_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process, not as a shell to type in.

    The shell of ``salloc`` and a batch script see SLURM_NTASKS too, and SLURM_PROCID = 0.
    """
    step = environ.get("SLURM_STEP_ID", "")
    ordinary = step.isdecimal() and int(step) < FIRST_SPECIAL_STEP
    return ordinary and "SLURM_PROCID" in environ and "SLURM_PTY_PORT" not in environ


def first_node(nodelist: str) -> str:
    """Return the first name of a list in Slurm's notation: ``gpu[007-010,12],login`` begins with gpu007."""
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first)


def slurm_port(job: int, step: int) -> int:
    """The port of rank 0, equal in all tasks of a step and rarely equal in two steps at a time."""
    return LOWEST_SLURM_PORT + (31 * job + step) % SLURM_PORTS
