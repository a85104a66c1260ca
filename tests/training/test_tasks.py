"""Which of several processes this one is, as srun and mpirun say it."""

from __future__ import annotations

import pytest

from cadapter.training.tasks import LOWEST_SLURM_PORT, Task, first_node, slurm_port, task_of

STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8",
    "SLURM_JOB_NODELIST": "gpu[01-04]", "SLURM_STEP_NODELIST": "gpu[03-04]",
}  # fmt: skip


def test_a_task_of_srun() -> None:
    assert task_of(STEP) == Task("srun", 5, 8, 1, "gpu03", slurm_port(4711, 2))
    smaller = {**STEP, "SLURM_STEP_NUM_TASKS": "6"}
    assert task_of(smaller) == Task("srun", 5, 6, 1, "gpu03", slurm_port(4711, 2))
    whole_job = {name: value for name, value in STEP.items() if name != "SLURM_STEP_NODELIST"}
    assert task_of(whole_job) == Task("srun", 5, 8, 1, "gpu01", slurm_port(4711, 2))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"SLURM_STEP_ID": None, "SLURM_PROCID": None, "SLURM_LOCALID": None}, id="old-salloc-shell"),
        pytest.param({"SLURM_STEP_ID": None, "SLURM_PROCID": "0"}, id="batch-script"),
        pytest.param({"SLURM_STEP_ID": "4294967291", "SLURM_PROCID": "0"}, id="batch-script-with-a-step"),
        pytest.param({"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"}, id="interactive-step-of-salloc"),
        pytest.param({"SLURM_PTY_PORT": "40000", "SLURM_PROCID": "0"}, id="srun-with-a-terminal"),
        pytest.param({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, id="one-task"),
        pytest.param({"SLURM_PROCID": None}, id="no-task"),
    ],
)
def test_a_shell_in_an_allocation_is_no_task(changes: dict[str, str | None]) -> None:
    environ = {**STEP, **changes}
    assert task_of({name: value for name, value in environ.items() if value is not None}) is None


def test_a_process_of_mpirun_also_within_a_job_of_slurm() -> None:
    mpi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert task_of(mpi) == task_of({**STEP, **mpi}) == Task("mpirun", 3, 4, 1)
    assert task_of({**mpi, "OMPI_COMM_WORLD_SIZE": "1"}) is None
    assert task_of({}) is None


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[007-010,12],login", "gpu007"),
        ("gpu[3,5-6]", "gpu3"),
        ("r[1-2]n[03-04],x", "r1n03"),
        ("a-b[09-10]-ib,c", "a-b09-ib"),
        ("a.lab,b[1-2].lab", "a.lab"),
        ("", ""),
    ],
)
def test_the_first_of_a_list_of_nodes(nodelist: str, first: str) -> None:
    assert first_node(nodelist) == first


def test_ports_are_valid_and_those_of_neighbours_differ() -> None:
    ports = [slurm_port(job, step) for job in range(4_000_000, 4_000_100) for step in range(5)]
    assert len(set(ports)) == len(ports)
    assert all(LOWEST_SLURM_PORT <= port < 32_768 for port in ports)
