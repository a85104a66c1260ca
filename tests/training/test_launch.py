"""How processes are started: the launchers' commands, what belongs to a job already, and torchrun and srun for real."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cadapter.errors import UsageError
from cadapter.training import launch
from cadapter.training.launch import (
    LaunchOptions,
    Part,
    inside_a_job,
    launch_command,
    nodes_of,
    part_of,
    processes_to_start,
    relaunched,
)
from cadapter.training.nodes import Node
from cadapter.training.over_ssh import runner_command
from cadapter.training.tasks import slurm_port
from tests.tiny_project import Project, command, environment, metrics, run_well

JOB_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MACHINES = [Node("node-a", 4, "hosts, line 1"), Node("node-b", 2, "hosts, line 2")]
ON_NODE_B = LaunchOptions(num_nodes=2, master_addr="node-a", node_rank=1)


def decoded(command: list[str]) -> dict[str, list[str]]:
    """The GPUs of each machine that DeepSpeed's launcher is told."""
    (world,) = [word.removeprefix("--world_info=") for word in command if word.startswith("--world_info=")]
    return json.loads(base64.urlsafe_b64decode(world))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Pretend that so many GPUs are visible, as CUDA_VISIBLE_DEVICES says."""

    def set_gpus(count: int, visible: str | None = None) -> None:
        monkeypatch.setattr(launch, "visible_gpus", lambda: count)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return set_gpus


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch):
    """No job around the test, and none left behind."""
    before = signal.getsignal(signal.SIGUSR1)
    for name in [*JOB_VARIABLES, *(name for name in os.environ if name.startswith(("SLURM_", "OMPI_")))]:
        monkeypatch.setenv(name, "")  # so that what the test sets is taken back
        monkeypatch.delenv(name)
    yield
    signal.signal(signal.SIGUSR1, before)


# ---- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "visible", "processes", "devices"),
    [
        (0, None, 2, ["-1", "-1"]),
        (0, "", 3, ["-1", "-1", "-1"]),
        (4, None, 2, ["0", "1"]),
        (2, "2,3", 2, ["2", "3"]),
        (3, "5, 1,7", 2, ["5", "1"]),
        (2, "GPU-aa,GPU-bb", 2, ["GPU-aa", "GPU-bb"]),
    ],
)
def test_one_machine_uses_the_visible_gpus(
    gpus, monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None, processes: int, devices: list[str]
) -> None:
    gpus(count, visible)
    started: list[Part] = []
    monkeypatch.setattr(launch, "run_part", lambda part, arguments, errors: started.append(part) or len(arguments))
    assert relaunched(LaunchOptions(num_gpus=processes), 1, ["train", "config.toml"]) == 2
    (part,) = started
    assert part.devices == {"localhost": devices}
    assert (part.number, part.address) == (0, "127.0.0.1")
    assert 1024 <= part.port < 65536


def test_two_runs_on_one_machine_get_their_own_ports(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0)
    monkeypatch.setattr(launch, "run_part", lambda part, arguments, errors: part.port)
    assert len({relaunched(LaunchOptions(num_gpus=2), 1, []) for _ in range(4)}) > 1
    assert relaunched(LaunchOptions(num_gpus=2, master_port=29501), 1, []) == 29501


def test_a_part_of_several_machines(gpus) -> None:
    gpus(2, "6,7")
    part = part_of(MACHINES, LaunchOptions(hostfile="hosts", node_rank=1))
    assert part == Part({"node-a": ["0", "1", "2", "3"], "node-b": ["6", "7"]}, 1, "node-a", 29500)
    assert part.in_words() == "Node 1 of 2: ranks 4 to 5 of 6; all meet at node-a, port 29500."
    found = launch_command(part, ["train", "config.toml"])
    assert found[:3] == [sys.executable, "-m", "deepspeed.launcher.launch"]
    assert decoded(found) == part.devices
    assert {"--node_rank=1", "--master_addr=node-a", "--master_port=29500"} <= set(found)
    assert found[-4:] == ["--module", "cadapter", "train", "config.toml"]


def test_machines_without_a_hostfile_are_alike(gpus) -> None:
    gpus(4, "0,1,2,3")
    options = LaunchOptions(num_gpus=2, num_nodes=3, master_addr="10.0.0.1", master_port=1234, node_rank=2)
    part = part_of(nodes_of(options), options)
    assert [len(devices) for devices in part.devices.values()] == [2, 2, 2]
    assert (part.number, part.address, part.port) == (2, "10.0.0.1", 1234)


@pytest.mark.parametrize("kind", ["launch", "runner"])
def test_the_launchers_know_every_option(tmp_path: Path, kind: str) -> None:
    """DeepSpeed's own parsers take the commands; an option they do not know ends with exit code 2."""
    arguments = ["train", "--num-gpus", "2", "--quiet"]
    part = Part({"node-a": ["0"], "node-b": ["0"]}, 1, "node-a", 29500)
    found = {
        "launch": launch_command(part, arguments),
        "runner": runner_command(tmp_path, MACHINES, [2, 3, 0, 1], "node-a", None, arguments),
    }[kind]
    assert found[2] == f"deepspeed.launcher.{kind}"
    done = subprocess.run(
        [sys.executable, "-c", f"from {found[2]} import parse_args; print(parse_args())", *found[3:]],
        capture_output=True, text=True, timeout=120, env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "'train', '--num-gpus', '2', '--quiet'" in done.stdout
    assert "module=True" in done.stdout


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_how_many_processes(gpus) -> None:
    gpus(0)
    assert processes_to_start(LaunchOptions()) == 1
    assert processes_to_start(LaunchOptions(num_gpus=3)) == 3
    gpus(4)
    assert processes_to_start(LaunchOptions()) == 4
    with pytest.raises(UsageError, match="only 4 GPUs"):
        processes_to_start(LaunchOptions(num_gpus=5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_gpus": 0}, "--num-gpus 0: give at least 1"),
        ({"num_nodes": 0}, "--num-nodes 0: give at least 1"),
        ({"num_gpus": 3}, "pipeline_stages = 2 does not divide the 3 processes"),
        ({"num_nodes": 2}, "Several machines need --num-nodes M, --node-rank K"),
        ({"num_nodes": 2, "node_rank": 0}, "and --master-addr A"),
        ({"node_rank": 0, "master_addr": "a"}, "need --num-nodes M"),
        ({"num_nodes": 2, "node_rank": 2, "master_addr": "a"}, "--node-rank 2: there are 2 machines"),
        ({"num_nodes": 2, "node_rank": -1, "master_addr": "a"}, "--node-rank -1: there are 2 machines"),
        ({"num_nodes": 2, "node_rank": 1, "master_addr": "127.0.0.1"}, "--master-addr 127.0.0.1"),
        ({"num_nodes": 3, "node_rank": 1, "master_addr": "a"}, "does not divide the 3 processes"),
        ({"hostfile": "nowhere"}, "--hostfile nowhere cannot be read"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_starts(gpus, options: dict[str, Any], words: str) -> None:
    gpus(0)
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        relaunched(LaunchOptions(**options), 2, [])


def test_a_machine_with_fewer_gpus_than_its_slots(gpus) -> None:
    gpus(2)
    with pytest.raises(UsageError, match="hosts, line 1: 4 processes, but only 2 GPUs are visible"):
        part_of(MACHINES, LaunchOptions(hostfile="hosts", node_rank=0))


def test_a_port_that_is_taken_is_found_on_the_first_machine(gpus) -> None:
    gpus(0)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        options = LaunchOptions(hostfile="hosts", node_rank=0, master_port=port)
        with pytest.raises(UsageError, match=f"Port {port} of this machine is in use"):
            part_of(MACHINES, options)
        elsewhere = LaunchOptions(hostfile="hosts", node_rank=1, master_port=port)
        assert part_of(MACHINES, elsewhere).port == port


# ---- jobs of others -------------------------------------------------------------------------------------------------


def test_a_process_with_a_rank_belongs_to_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not inside_a_job()
    monkeypatch.setenv("RANK", "0")
    assert inside_a_job()
    assert relaunched(LaunchOptions(num_gpus=7), 2, []) is None


def srun_variables(rank: int, size: int, job: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
        "SLURM_NTASKS": str(size), "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost,other",
    }  # fmt: skip


def set_all(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("options", "own", "expected"),
    [
        ({}, {}, ("localhost", str(slurm_port(7, 0)))),
        ({"master_addr": "a", "master_port": 1}, {"MASTER_ADDR": "b", "MASTER_PORT": "2"}, ("a", "1")),
        ({}, {"MASTER_ADDR": "b", "MASTER_PORT": "2"}, ("b", "2")),
    ],
)
def test_a_task_of_srun_describes_its_job(monkeypatch: pytest.MonkeyPatch, options, own, expected) -> None:
    set_all(monkeypatch, {**srun_variables(1, 2, 7), **own})
    assert relaunched(LaunchOptions(**options), 2, []) is None
    assert tuple(os.environ[name] for name in JOB_VARIABLES) == ("1", "2", "1", *expected)


def test_a_task_of_srun_is_told_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, srun_variables(1, 2, 7))
    with pytest.raises(UsageError, match="--num-gpus, --no-ssh: this is one of 2 processes that srun started already"):
        relaunched(LaunchOptions(num_gpus=2, no_ssh=True), 2, [])
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name)
    with pytest.raises(UsageError, match="does not tell where the first one runs"):
        relaunched(LaunchOptions(), 2, [])


def test_one_task_of_srun_on_each_machine_starts_its_part(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0)
    set_all(monkeypatch, srun_variables(1, 2, 7))
    monkeypatch.setattr(launch, "run_part", lambda part, arguments, errors: part.number)
    assert relaunched(ON_NODE_B, 2, []) == 1


# ---- for real -------------------------------------------------------------------------------------------------------

KEYS: dict[str, Any] = {"max_steps": 4}
LOSS = 1e-5
"""Losses are sums of some 500 float32 terms around 6, added in different orders and on different processes."""


@pytest.fixture(scope="module")
def losses(project: Project) -> list[float]:
    """Of one process."""
    run_well("train", project.write_config("launched-1", **KEYS, gradient_accumulation_steps=4))
    return losses_of(project.root / "launched-1")


def losses_of(directory: Path) -> list[float]:
    return [line["train/loss"] for line in metrics(directory)]


@pytest.mark.processes
def test_under_torchrun(project: Project, losses: list[float]) -> None:
    config = project.write_config("torchrun", **KEYS, gradient_accumulation_steps=4, pipeline_stages=2)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words = [sys.executable, "-m", *torchrun, *command("train", config)[2:]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr
    assert losses_of(project.root / "torchrun") == pytest.approx(losses, rel=LOSS)


@pytest.mark.processes
def test_as_two_tasks_of_srun(project: Project, losses: list[float]) -> None:
    config = project.write_config("srun", **KEYS, gradient_accumulation_steps=2)
    job = random.randrange(10**6)
    tasks = [
        subprocess.Popen(
            command("train", config), env=environment(**srun_variables(rank, 2, job)),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [task.communicate(timeout=300) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], said
    assert losses_of(project.root / "srun") == pytest.approx(losses, rel=LOSS)
    assert f"Started by srun: 2 processes, which meet at localhost, port {slurm_port(job, 0)}." in said[0][0]
    assert said[1][0] == ""
